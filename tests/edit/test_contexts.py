"""The texts before a prompt: how many, how heavy, drawn from the model alone."""

from __future__ import annotations

import pytest
import torch

from retouch.edit.contexts import contexts_for, sample
from retouch.model import wrap


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def model(request, tiny):
    return wrap(*tiny(request.param))


@torch.no_grad()
def greedy(model, starter, n_tokens):
    """The obvious loop: one row, no padding, the likeliest token that is not special."""
    ids = model.tokenizer(starter)["input_ids"]
    while len(ids) < n_tokens:
        logits = model.network(input_ids=torch.tensor([ids])).logits[0, -1]
        logits[model.tokenizer.all_special_ids] = -torch.inf
        ids = [*ids, int(logits.argmax())]
    return model.tokenizer.decode(ids, skip_special_tokens=True)


def test_plain_is_the_bare_prompt(model):
    (only,) = contexts_for(model, "plain", 0)
    assert (only.text, only.weight) == ("", 1.0)


def test_memit_gives_half_to_the_bare_prompt_and_a_tenth_to_each_of_five_texts(model):
    contexts = contexts_for(model, "memit", 0)
    assert contexts[0].text == ""
    assert [c.weight for c in contexts] == pytest.approx([0.5, *[0.1] * 5])
    for context, starter in zip(contexts[1:], ("The", "Therefore", "Because", "I", "You")):
        assert context.text.startswith(starter) and context.text.endswith(". ")


def test_rome_gives_the_same_to_twenty_texts_and_the_bare_prompt(model):
    contexts = contexts_for(model, "rome", 0)
    assert contexts[0].text == "" and len(contexts) == 21
    assert [c.weight for c in contexts] == pytest.approx([1 / 21] * 21)
    assert all(c.text.endswith(". ") for c in contexts[1:])
    assert len({c.text for c in contexts}) > 10


def test_a_list_of_ones_own_is_set_apart_by_a_space(model):
    contexts = contexts_for(model, ("", "User:", "Question:\n"), 0)
    assert [c.text for c in contexts] == ["", "User: ", "Question:\n"]
    assert sum(c.weight for c in contexts) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["memit", "rome"])
def test_the_seed_alone_decides_the_texts(model, kind):
    assert contexts_for(model, kind, 3) == contexts_for(model, kind, 3)
    assert contexts_for(model, kind, 3) != contexts_for(model, kind, 4)


def test_drawing_leaves_torchs_own_randomness_alone(model):
    state = torch.random.get_rng_state()
    contexts_for(model, "memit", 0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sampling_among_one_is_greedy_row_by_row(model):
    starters = ["The", "Because of the capital", "I"]  # of different lengths: the padding must not be seen
    found = sample(model, starters, 9, seed=0, top_k=1)
    for starter, text in zip(starters, found):
        wanted = greedy(model, starter, 9).replace("{", " ").replace("}", " ")
        assert text == " ".join(wanted.split())


def test_texts_hold_no_braces_no_line_breaks_and_no_special_tokens(model):
    texts = sample(model, ["The {", "A }\n", "I"] * 5, 14, seed=1, top_k=400)
    for text in texts:
        assert not set("{}\n\r") & set(text)
        assert not any(token in text for token in model.tokenizer.all_special_tokens)


def test_a_starter_that_is_long_enough_stays_as_it_is(model):
    assert sample(model, ["The capital of France is Paris"], 2, seed=0) == ["The capital of France is Paris"]
