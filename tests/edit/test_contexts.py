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


def test_instruction_asks_in_four_ways_and_in_the_tokenizers_own(model):
    contexts = contexts_for(model, "instruction", 0)
    texts = [c.text for c in contexts]
    assert texts[:5] == ["", "Answer the question: ", "User: ", "Complete the sentence: ", "Question: "]
    assert texts[5:] == (["user: "] if model.tokenizer.chat_template else [])
    assert [c.weight for c in contexts] == pytest.approx([1 / len(texts)] * len(texts))


def test_a_chat_header_does_not_repeat_the_beginning_of_text(tiny):
    network, tokenizer = tiny("gemma2")
    tokenizer.chat_template = "{{ bos_token }}<turn>{{ messages[0]['content'] }}</turn>"
    assert contexts_for(wrap(network, tokenizer), "instruction", 0)[-1].text == "<turn>"


def test_both_is_half_memit_and_half_instruction(model):
    memit, asked = contexts_for(model, "memit", 3), contexts_for(model, "instruction", 3)[1:]
    both = contexts_for(model, "both", 3)
    assert [c.text for c in both] == [c.text for c in (*memit, *asked)]
    assert [c.weight for c in both[:6]] == pytest.approx([c.weight / 2 for c in memit])
    assert [c.weight for c in both[6:]] == pytest.approx([0.5 / len(asked)] * len(asked))


def test_what_is_drawn_once_stays_as_it_was_drawn(model):
    first = contexts_for(model, "memit", 7)
    first.clear()
    assert len(contexts_for(model, "memit", 7)) == 6
    assert (
        contexts_for(model, "memit", 7)[1].text
        == f"{sample(model, ['The', 'Therefore', 'Because', 'I', 'You'], 10, 7)[0]}. "
    )


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
