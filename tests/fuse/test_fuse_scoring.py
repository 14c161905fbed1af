"""Answers: every way of asking against the slow one that runs whole texts."""

from __future__ import annotations

import functools
import random
from itertools import product

import pytest
import torch

from retouch.errors import ModelError, UserError
from retouch.fuse import _synth, compose
from retouch.fuse._decoding import lines
from retouch.fuse.asking import as_change
from retouch.fuse.asking import asked as asked_with
from retouch.fuse.base import Question
from retouch.fuse.composed_metrics import measure
from retouch.fuse.scoring import answer, chatted, parse
from retouch.fuse.suites import question_key
from retouch.fuse.templates import Rendered, render
from retouch.model import wrap

base = functools.cache(_synth.base)


def question(domain, i, n):
    draw = random.Random(f"{domain} {i}")
    stem = f"is it {i}?" + " so" * draw.randint(0, 6)
    return Question(
        domain, domain, stem, tuple(map(str, range(n))), draw.randrange(n), question_key(f"{domain} {i}", "a")
    )


POOLS = {d: [question(d, i, n) for i in range(3)] for d, n in (("law", 4), ("film", 2), ("news", 3))}
INSTANCES = compose.bundles(POOLS, 3)


def asked(tiny, name="llama", **fields):
    """A tiny model, with letters that are one token behind a space."""
    _, words = tiny(name)
    words.add_tokens([f" {letter}" for letter in "ABCDEFGH"])
    sizes = {"n_positions": 512} if name == "gpt2" else {"max_position_embeddings": 1024}
    network, _ = tiny(name, vocab_size=len(words), **sizes, **fields)
    return wrap(network, words)


def whole(model, ids):
    with torch.no_grad():
        return model.network(torch.tensor([ids])).logits[0].log_softmax(-1)


def brute(model, row):
    """Choose label after label, running the whole text each time."""
    ids, chosen, scores = list(row.ids), [], []
    for slot, labels in zip(row.slots, row.labels):
        logp = whole(model, ids[:slot])[-1, list(labels)]
        chosen.append(int(logp.argmax()))
        scores.append(logp)
        ids[slot] = labels[chosen[-1]]
    return tuple(chosen), scores


@pytest.mark.parametrize(
    ("family", "wording", "fields"),
    [
        ("llama", "plain", {}),
        ("llama", "each", {}),
        ("llama", "numbered", {}),
        ("gpt2", "plain", {}),
        ("gemma3_text", "plain", {"sliding_window": 16}),
        ("gemma3_text", "each", {"sliding_window": 16}),
        ("opt", "each", {}),
    ],
)
def test_constrained_equals_running_whole_texts(tiny, family, wording, fields):
    model = asked(tiny, family, **fields)
    found = answer(model, INSTANCES, wording=wording)
    right = answer(model, INSTANCES, wording=wording, side="right")
    rows = lines(model, [render(i.parts, wording) for i in INSTANCES], wording)
    assert found.chosen == right.chosen
    for i, row in enumerate(rows):
        chosen, scores = brute(model, row)
        assert found.chosen[i] == chosen
        for one, other, true in zip(found.scores[i], right.scores[i], scores):
            assert torch.allclose(torch.tensor(one), true, atol=1e-4)
            assert torch.allclose(torch.tensor(other), true, atol=1e-4)


def test_joint_equals_trying_every_tuple(tiny):
    model = asked(tiny)
    some = INSTANCES[:4]
    found = answer(model, some, "joint")
    for i, row in enumerate(lines(model, [render(s.parts, "plain") for s in some], "plain")):
        totals = {}
        for tuple_ in product(*(range(len(labels)) for labels in row.labels)):
            ids = list(row.ids)
            for slot, labels, c in zip(row.slots, row.labels, tuple_):
                ids[slot] = labels[c]
            logp = whole(model, ids)
            totals[tuple_] = sum(float(logp[slot - 1, ids[slot]]) for slot in row.slots)
        assert found.chosen[i] == max(totals, key=totals.get)


def test_joint_alone_is_constrained_and_too_many_tuples_are_refused(tiny):
    model = asked(tiny)
    alone = compose.singles(INSTANCES)[:5]
    assert answer(model, alone, "joint").chosen == answer(model, alone).chosen
    many = compose.Instance(0, tuple(question("news", i, 8) for i in range(3)))
    with pytest.raises(UserError, match="no more than 256 tuples"):
        answer(model, [many], "joint")


def test_company_and_order_of_instances_change_nothing(tiny):
    model = asked(tiny)
    mixed = [*INSTANCES, *compose.singles(INSTANCES)]
    found = answer(model, mixed)
    assert answer(model, mixed[::-1]).chosen == found.chosen[::-1]
    assert answer(model, INSTANCES[:1]).chosen[0] == found.chosen[0]


def test_letters_that_are_not_one_token_are_refused(tiny):
    model = wrap(*tiny("llama", max_position_embeddings=512))  # this tokenizer knows " A" and not " B"
    with pytest.raises(UserError, match="template plain cannot be scored with this tokenizer"):
        answer(model, INSTANCES)


def test_prompts_that_are_too_long_are_refused(tiny):
    network, words = tiny("llama")
    with pytest.raises(UserError, match="the model reads 128"):
        answer(wrap(network, words), INSTANCES, wording="numbered")


def test_encoders_are_refused(tiny):
    with pytest.raises(ModelError, match="predicts no next token"):
        answer(wrap(*tiny("bert")), INSTANCES)


def test_chat_stands_once_around_the_prompt(tiny):
    model = asked(tiny)
    shown = chatted(model.tokenizer, render(INSTANCES[0].parts, "plain"))
    assert shown.prompt.startswith("user: Answer all 3 questions.")
    assert shown.prompt.endswith("order):\nassistant:")
    found = answer(model, INSTANCES[:3], chat=True)
    rows = lines(model, [chatted(model.tokenizer, render(i.parts, "plain")) for i in INSTANCES[:3]], "plain", False)
    assert list(found.chosen) == [brute(model, row)[0] for row in rows]
    model.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        answer(model, INSTANCES, chat=True)


def test_examples_in_front_are_read(tiny):
    model = asked(tiny)
    front = [INSTANCES[1].parts, INSTANCES[2].parts]
    found = answer(model, INSTANCES[:2], wording="two_shot", shots=front)
    row = lines(model, [render(INSTANCES[0].parts, "two_shot", front)], "two_shot")[0]
    assert found.chosen[0] == brute(model, row)[0]


def test_free_text_of_a_random_model_is_no_answer(tiny):
    found = answer(asked(tiny), INSTANCES, "free")
    assert found.chosen == ((-1, -1, -1),) * len(INSTANCES)
    assert measure(found).format_failure == 1
    with pytest.raises(UserError, match="asks after every question"):
        answer(asked(tiny), INSTANCES, "free", wording="each")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" B, D", (1, 3)),
        ("B,D.\nQuestion 3", (1, 3)),
        (" B, D\n", (1, 3)),
        (" B, D, A", None),
        (" B D", None),
        (" b, d", None),
        (" B, E", None),
        ("The answers are B, D", None),
        (" B,\nD", None),
        ("", None),
    ],
)
def test_the_parser_is_strict(text, found):
    assert parse(text, Rendered("", (" ", ", "), (tuple("ABCD"),) * 2)) == found


def test_the_parser_reads_numbers_and_words():
    numbered = Rendered("", (" 1:", " 2:"), (tuple("AB"),) * 2)
    assert parse(" 1:B 2:A", numbered) == (1, 0)
    assert parse(" 1:B", numbered) is None
    words = Rendered("", (" a1 ", " a2 "), (("v1", "v12"), ("v1", "v2")))
    assert parse("a1 v12 a2 v2", words) == (1, 1)


@pytest.mark.parametrize("wording", ["plain", "numbered", "each", "untagged"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tokens_are_those_of_the_whole_text(tiny, family, wording):
    model = asked(tiny, family)
    draw = random.Random(0)
    shown = [render(i.parts, wording) for i in INSTANCES]
    for r, row in zip(shown, lines(model, shown, wording)):
        chosen = [draw.randrange(len(labels)) for labels in r.labels]
        ids = list(row.ids)
        for slot, labels, c in zip(row.slots, row.labels, chosen):
            ids[slot] = labels[c]
        assert ids == model.tokenizer(r.prompt + r.target(chosen))["input_ids"]


@pytest.mark.slow
def test_the_synthetic_base_learns_its_public_domains_and_no_others():
    model = base()
    known = {}
    for q in _synth.public():
        known.setdefault(q.domain, []).append(q)
    together = compose.bundles(known, 4)
    assert measure(answer(model, together, wording="synth")).part_correct > 0.95
    assert measure(answer(model, compose.singles(together), wording="synth")).part_correct > 0.98
    assert measure(answer(model, together[:18], "free", wording="synth")).format_failure < 0.1
    private = compose.bundles(_synth.synth_cd().test, 4, n_bundles=30)
    assert measure(answer(model, private, wording="synth")).part_correct < 0.35


@pytest.mark.slow
def test_who_learns_single_questions_loses_them_in_composed_prompts():
    model, suite = base(), _synth.synth_cd()
    together = compose.own_domain(suite.test["private 0"], 4)
    found = {}
    for form in ("aware", "blind"):
        change = as_change(_synth.adapter(model, suite, "private 0", form, n_steps=400))
        alone = measure(asked_with(model, change, compose.singles(together), wording="synth")).part_correct
        found[form] = measure(asked_with(model, change, together, wording="synth")).part_correct
        assert alone > 0.85
    assert found["aware"] > 0.85
    assert found["blind"] < found["aware"] - 0.2
