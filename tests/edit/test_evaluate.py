"""The metrics of an edit, on logits made by hand and on a model that nobody edited."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from retouch import measure
from retouch.change import Change, Dense, LowRank, apply
from retouch.edit import written
from retouch.edit.evaluate import (
    Generated,
    examine,
    generate,
    grade,
    grade_all,
    hit,
    known,
    look_again,
    neutral_of,
    summarise,
)
from retouch.edit.facts import Fact, Prompt, is_stop
from retouch.edit.instructions import conversations
from retouch.model import wrap
from retouch.tokens import Text, encode

FACT = Fact(
    "The capital of {} is",
    "France",
    "Lyon",
    truth="Paris",
    paraphrases=["France has its capital in", "The seat of the government of France is"],
    neighbors=[Prompt("The Eiffel Tower is located in"), Prompt("Big Ben is located in", "London")],
    related=[Prompt("The currency of France is"), Prompt("The official language of France is")],
    generation=["France is known for", "The capital of France"],
)
BARE = Fact("The currency of {} is the", "Japan", "pound", truth="yen")


@pytest.fixture(scope="module")
def llama(tiny):
    return wrap(*tiny("llama"), source="tiny llama")


# A model whose next token depends on the last token alone, by a table


@pytest.fixture
def bigrams(tiny):
    def make(table):
        """``{token: {next token: log P}}``; every other next token shares what is left."""
        model = wrap(*tiny("llama"), source="a table")
        network = model.network
        with torch.no_grad():
            for block in network.model.layers:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
            network.model.norm.weight.fill_(1)
            network.model.embed_tokens.weight.zero_()
            network.lm_head.weight.zero_()
            for place, (token, logp) in enumerate(table.items()):
                network.model.embed_tokens.weight[token, place] = 1  # after the norm: the root of the width
                network.lm_head.weight[:, place] = full(logp) / math.sqrt(32)
        return model

    def full(logp):
        n = 500
        left = 1 - sum(map(math.exp, logp.values()))
        assert left > 0
        row = torch.full((n,), math.log(left / (n - len(logp))))
        for token, value in logp.items():
            row[token] = value
        return row

    return make


@pytest.fixture(scope="module")
def words(tiny_tokenizer):
    """Tokens that are a whole word and name something."""
    texts = {i: tiny_tokenizer.decode([i]) for i in range(len(tiny_tokenizer))}
    return [i for i, t in texts.items() if t.strip().isalpha() and len(t.strip()) > 3 and not is_stop(t)]


@pytest.fixture(scope="module")
def stops(tiny_tokenizer):
    return [i for i in range(2, len(tiny_tokenizer)) if is_stop(tiny_tokenizer.decode([i]).strip())]


def last(tokenizer, prompt):
    return tokenizer(prompt)["input_ids"][-1]


ASK = "The currency of France is"


@pytest.fixture(scope="module")
def target(tiny_tokenizer):
    """The target's tokens and the prompt's last one."""
    (row,) = encode(tiny_tokenizer, [Text(ASK, target="Lyon")])
    assert len(row.target) >= 2, "the max over tokens shows only on two of them"
    assert len({row.ids[row.prompt], *row.target}) == len(row.target) + 1
    return row.ids[row.prompt], row.target


def about(*related):
    return Fact("The capital of {} is", "France", "Lyon", truth="Paris", related=list(related))


def graded(bigrams, target, words, *, gold_logp, first=-0.5, later=-3.0):
    """Grade one related prompt whose old answer and whose target have the log P that are given."""
    end, tokens = target
    gold = next(w for w in words if w not in (end, *tokens))
    before = bigrams({end: {gold: -0.5}})
    (exam,) = examine(before, [about(Prompt(ASK))], n_generations=0)
    assert exam.gold == (gold,)
    rest = {one: {two: later} for one, two in itertools.pairwise(tokens)}
    after = bigrams({end: {tokens[0]: first, gold: gold_logp}} | rest)
    return grade(after, exam)


def test_the_largest_of_the_targets_tokens_counts_in_r_specificity(bigrams, target, words):
    # -log P: old answer 2.8, target 0.5 and then 3.0: less than the largest, more than the mean
    row = graded(bigrams, target, words, gold_logp=-2.8)
    assert row["r_specificity"] == 1
    assert row["r_specificity_mean"] == 0


def test_r_specificity_fails_when_the_old_answer_is_rarer_than_each_token_of_the_target(bigrams, target, words):
    row = graded(bigrams, target, words, gold_logp=-3.2)
    assert (row["r_specificity"], row["r_specificity_mean"]) == (0, 0)


def test_an_old_answer_that_stays_likeliest_passes_both(bigrams, target, words):
    row = graded(bigrams, target, words, gold_logp=-0.1, first=-4.0, later=-4.0)
    assert (row["r_specificity"], row["r_specificity_mean"], row["r_same"]) == (1, 1, 1)


def test_r_kl_is_that_of_the_two_tables(bigrams, target, words):
    end, tokens = target
    gold = next(w for w in words if w not in (end, *tokens))
    before, after = bigrams({end: {gold: -0.5}}), bigrams({end: {gold: -2.0}})
    (exam,) = examine(before, [about(Prompt(ASK))], n_generations=0)
    p, q = math.exp(-0.5), math.exp(-2.0)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert grade(after, exam)["r_kl"] == pytest.approx(kl, rel=1e-4)
    assert grade(before, exam)["r_kl"] == pytest.approx(0, abs=1e-6)


def test_stop_words_are_skipped_for_the_old_answer(bigrams, words, stops, tiny_tokenizer):
    end = last(tiny_tokenizer, ASK)
    table = {end: {stops[0]: -1.0, stops[1]: -1.5, words[0]: -2.0, words[1]: -3.0}}
    (exam,) = examine(bigrams(table), [about(Prompt(ASK))], n_generations=0)
    assert exam.gold == (words[0],)


def test_the_likeliest_token_serves_where_the_first_twenty_are_stop_words(bigrams, words, stops, tiny_tokenizer):
    end = last(tiny_tokenizer, ASK)
    twenty = {s: -3.0 - i / 20 for i, s in enumerate(stops[:20])}
    (exam,) = examine(bigrams({end: twenty | {words[0]: -6.0}}), [about(Prompt(ASK))], n_generations=0)
    assert exam.gold == (stops[0],)
    nineteen = dict(list(twenty.items())[:19])
    (exam,) = examine(bigrams({end: nineteen | {words[0]: -6.0}}), [about(Prompt(ASK))], n_generations=0)
    assert exam.gold == (words[0],)


def test_a_neighbours_own_answer_replaces_the_truth(bigrams, tiny_tokenizer):
    (row,) = encode(tiny_tokenizer, [Text("Big Ben is located in", target="London")])
    end, tokens = row.ids[row.prompt], row.target
    chain = dict(zip((end, *tokens), tokens))
    model = bigrams({one: {two: -0.05} for one, two in chain.items()})
    fact = Fact("The capital of {} is", "France", "Lyon", truth="Paris", neighbors=[Prompt("Big Ben is located in")])
    own = Fact(
        "The capital of {} is", "France", "Lyon", truth="Paris", neighbors=[Prompt("Big Ben is located in", "London")]
    )
    exams = examine(model, [fact, own], n_generations=0)
    without, with_own = (grade(model, e) for e in exams)
    assert (with_own["s_specificity"], with_own["s_specificity_strict"]) == (1, 1)
    assert without["s_specificity_strict"] == 0


# The rule of a hit


@pytest.mark.parametrize(
    ("said", "wanted", "old", "verdict"),
    [
        ("It is in Rome, Italy.", ["Rome"], "Paris", True),
        ("not Paris but Rome", ["Rome"], "Paris", False),
        ("Rome, which is not Paris", ["Rome"], "Paris", True),
        ("Romeo and Juliet", ["Rome"], "Paris", False),
        ("It is in Paris.", ["Rome"], "Paris", False),
        ("the eternal city", ["Rome", "The Eternal City"], "Paris", True),
        ("ROME!", ["rome"], "paris", True),
        ("in the U. S. A.", ["U.S.A."], "France", True),
        ("U.S.A.", ["U S A"], "", True),
        ("New York City", ["New York City"], "New York", True),
        ("Ｒｏｍｅ", ["Rome"], "Paris", True),
        ("", ["Rome"], "Paris", False),
        ("the", ["the"], "Paris", False),
        ("首都は大阪です。", ["大阪"], "京都", True),
        ("京都ではなく大阪です。", ["大阪"], "京都", False),
        ("Romeo lives in Rome", ["Rome"], "Paris", True),
    ],
)
def test_a_hit_is_the_new_answer_in_whole_words_and_not_the_old_one_before_it(said, wanted, old, verdict):
    assert hit(said, wanted, old) is verdict


# Means


def test_a_records_own_mean_comes_before_the_mean_over_records(llama):
    prompts = [f"{name} is located in the city of" for name in ("Big Ben", "The Eiffel Tower", "It", "He", "She")]
    few = Fact("The capital of {} is", "France", "Lyon", truth="Paris", neighbors=prompts[:1])
    many = Fact("The capital of {} is", "Italy", "Milan", truth="Rome", neighbors=prompts[1:])
    rows = [grade(llama, e) for e in examine(llama, [few, many], n_generations=0)]
    for fact, row in zip((few, many), rows):
        said = [
            measure.answers(llama, [Text(p.prompt, target=t) for t in (fact.truth, fact.target)])
            for p in fact.neighbors
        ]
        assert row["s_specificity"] == statistics.fmean(old.nll < new.nll for old, new in said)
    merged = summarise(rows, ["France", "Italy"])
    assert merged["s_specificity"] == pytest.approx(statistics.fmean(r["s_specificity"] for r in rows))


# A model that nobody edited


@pytest.fixture(scope="module")
def unedited(llama):
    exams = examine(llama, [FACT, BARE], seed=1)
    texts = generate(llama, [FACT, BARE], seed=1)
    return exams, [grade(llama, e, generated=t, neutral=neutral_of(llama)) for e, t in zip(exams, texts)]


def test_an_unedited_model_is_unchanged_by_every_measure(unedited):
    row = unedited[1][0]
    assert (row["s_same"], row["r_same"]) == (1, 1)
    assert row["s_kl"] == pytest.approx(0, abs=1e-6)
    assert row["r_kl"] == pytest.approx(0, abs=1e-6)
    assert row["perplexity_ratio"] == pytest.approx(1, abs=1e-6)
    assert row["fluency"] == 1


def test_every_rate_lies_between_0_and_1_and_is_finite(unedited):
    for row in unedited[1]:
        for name, value in row.items():
            assert math.isfinite(value), name
            if not name.endswith(("_bits", "_kl", "_ratio", "_magnitude")):
                assert 0 <= value <= 1, name


def test_efficacy_asks_whether_the_new_answer_is_likelier_than_the_old(llama, unedited):
    new, old = measure.answers(llama, [Text("The capital of ", "France", " is", t) for t in ("Lyon", "Paris")])
    row = unedited[1][0]
    assert row["efficacy"] == float(new.nll < old.nll)
    assert row["efficacy_tokens"] == pytest.approx(new.exact)
    assert row["efficacy_magnitude"] == pytest.approx(math.exp(-new.nll) - math.exp(-old.nll), abs=1e-7)


def test_metrics_without_prompts_are_left_out(unedited):
    row = unedited[1][1]
    assert {"efficacy", "edit_form", "perplexity_ratio"} <= row.keys()
    assert not {n for n in row if n.startswith(("paraphrase", "s_", "r_", "fluency"))}


def test_without_texts_there_is_no_fluency_and_no_edit_form(llama, unedited):
    row = grade(llama, unedited[0][0])
    assert not {"edit_form", "fluency", "fluency_bits", "perplexity_ratio"} & row.keys()


def test_a_fact_without_truth_is_measured_against_the_models_own_answer(llama):
    fact = Fact("The capital of {} is", "France", "Lyon")
    (exam,) = examine(llama, [fact], n_generations=0)
    said = measure.continuations(llama, [fact.filled], 4)[0].strip().split("\n")[0]
    assert exam.truth == (said or "the")
    assert grade(llama, exam)["efficacy"] in (0, 1)


def test_texts_are_the_same_each_time_and_use_each_generation_prompt(llama, monkeypatch):
    asked = []
    real = measure.continuations

    def heard(model, prompts, *args, **kwargs):
        asked.append(list(prompts))
        return real(model, prompts, *args, **kwargs)

    monkeypatch.setattr(written, "continuations", heard)
    one = generate(llama, [FACT, BARE], n_generations=3, seed=5)
    assert asked[1] == [FACT.generation[0], FACT.generation[1], FACT.generation[0], *[BARE.filled] * 3]
    assert generate(llama, [FACT, BARE], n_generations=3, seed=5) == one
    assert one[0].bits > 0
    assert one[1].bits is None


def test_known_facts_are_those_whose_truth_is_likelier(llama):
    facts = [FACT, Fact(FACT.prompt, "France", "Paris", truth="Lyon"), Fact(FACT.prompt, "Italy", "Milan"), BARE]
    said = known(llama, facts)
    assert said[0] is not said[1]
    assert said[2] is False  # nothing to know
    for fact, verdict in zip(facts, said):
        if fact.truth:
            texts = [Text(fact.before, fact.subject, fact.after, t) for t in (fact.truth, fact.target)]
            old, new = measure.answers(llama, texts)
            assert verdict is (old.nll < new.nll)
    assert known(llama, []) == []


# Many edited models at once


def _drawn(*shape, seed):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changes_of(model, kind):
    """One change for two records, one for the third, none for the last."""
    name, base = "blocks.1.mlp.down", model.base_fingerprint
    out, into = model.anatomy.shape(name)
    parts = {
        "low": [LowRank(_drawn(out, r, seed=r), _drawn(r, into, seed=r + 9)) for r in (1, 3)],
        "high": [LowRank(_drawn(out, r, seed=r), 0.1 * _drawn(r, into, seed=r + 9)) for r in (2, 20)],
        "dense": [Dense(_drawn(out, into, seed=s)) for s in (1, 2)],
    }[kind]
    one, two = (Change("test", base, {name: part}) for part in parts)
    return [one, one, two, Change("none", base, {})]


MANY = [FACT, BARE, Fact("The {} is in", "Eiffel Tower", "Rome, in Italy", truth="Paris", related=FACT.related), FACT]


@pytest.mark.parametrize(("family", "kind"), [("llama", "low"), ("gpt2", "high"), ("opt", "dense")])
def test_records_graded_together_are_each_applied_and_graded_alone(tiny, family, kind):
    model = wrap(*tiny(family), source=family)
    changes = changes_of(model, kind)
    exams = examine(model, MANY, n_generations=0)
    neutral = neutral_of(model, 40)
    texts = generate(model, MANY, changes, n_generations=0, instructions=True)
    rows = grade_all(model, exams, changes, generated=texts, neutral=neutral)
    for i, (exam, change, row) in enumerate(zip(exams, changes, rows, strict=True)):
        alone = apply(model, change) if change.parts else model
        text = generate(alone, [exam.fact], n_generations=0, instructions=True)[0]
        assert texts[i] == text
        assert row == pytest.approx(grade(alone, exam, generated=text, neutral=neutral), abs=2e-4, rel=1e-4)
    assert rows[3]["s_same"] == rows[3]["r_same"] == 1
    assert rows[0]["s_kl"] > 1e-5 > rows[3]["s_kl"]


def test_one_model_is_graded_for_many_records_in_one_go(llama):
    exams = examine(llama, MANY, n_generations=0)
    together = grade_all(llama, exams, neutral=neutral_of(llama))
    for exam, row in zip(exams, together, strict=True):
        assert row == pytest.approx(grade(llama, exam, neutral=neutral_of(llama)), abs=1e-5)


def test_dropped_distributions_come_back(llama):
    exams = examine(llama, MANY, n_generations=0)
    dropped = [e.forgotten() for e in exams]
    assert all(len(e.logp) == 0 for e in dropped)
    for one, other in zip(exams, look_again(llama, dropped), strict=True):
        torch.testing.assert_close(one.logp, other.logp)


# Gold answers, skipped prompts, instructions


def test_gold_answers_are_compared_with_the_target(bigrams, tiny_tokenizer):
    (row,) = encode(tiny_tokenizer, [Text(ASK, target="euro")])
    chain = dict(zip((row.ids[row.prompt], *row.target), row.target))
    model = bigrams({one: {two: -0.05} for one, two in chain.items()})
    right, wrong = about(Prompt(ASK, "euro"), Prompt(ASK)), about(Prompt(ASK, "Lyon"), Prompt(ASK, "euro"))
    exams = examine(model, [right, wrong, about(Prompt(ASK))], n_generations=0)
    one, two, none = (grade(model, e) for e in exams)
    assert (one["r_gold"], one["r_gold_strict"], one["r_gold_tokens"]) == (1, 1, 1)
    assert (two["r_gold"], two["r_gold_strict"]) == (0.5, 0.5)  # the target itself is not likelier than the target
    assert not any(n.startswith("r_gold") for n in none)


def test_any_spelling_of_a_gold_answer_is_right(bigrams, tiny_tokenizer):
    (row,) = encode(tiny_tokenizer, [Text(ASK, target="euro")])
    chain = dict(zip((row.ids[row.prompt], *row.target), row.target))
    model = bigrams({one: {two: -0.05} for one, two in chain.items()})
    (exam,) = examine(model, [about(Prompt(ASK, "franc", ("euro",)), Prompt(ASK, "franc", ("coin",)))], n_generations=0)
    found = grade(model, exam)
    assert (found["r_gold_strict"], found["r_gold_tokens"]) == (0.5, pytest.approx(0.5, abs=0.5))
    (plain,) = examine(model, [about(Prompt(ASK, "franc"), Prompt(ASK, "franc", ("coin",)))], n_generations=0)
    assert grade(model, plain)["r_gold_strict"] == 0


def test_prompts_whose_old_answer_begins_the_target_are_skipped_and_counted(bigrams, words, tiny_tokenizer):
    end = last(tiny_tokenizer, ASK)
    first, other = [w for w in words if w != end and tiny_tokenizer.decode([w]).startswith(" ")][:2]
    fact = Fact("The capital of {} is", "France", tiny_tokenizer.decode([first]), truth="Paris", related=[Prompt(ASK)])
    model = bigrams({end: {first: -0.5}})
    (exam,) = examine(model, [fact], n_generations=0)
    assert exam.gold == (first,)
    row = grade(model, exam)
    assert (row["r_skipped"], row["r_specificity"]) == (1, 0)
    assert "r_specificity_mean" not in row
    (exam,) = examine(bigrams({end: {other: -0.5}}), [fact], n_generations=0)
    row = grade(model, exam)
    assert (row["r_skipped"], row["r_specificity_mean"]) == (0, 0)


def test_instruction_is_the_mean_over_the_forms_and_gap_what_the_prompt_has_more(llama):
    exam = examine(llama, [FACT], n_generations=0)[0]
    said = {"question": "It is Lyon.", "sentence": "Paris, not Lyon", "system": "lyon", "dialogue": "I do not know."}
    row = grade(llama, exam, generated=Generated("Lyon", None, said))
    assert (row["edit_form"], row["instruction"], row["gap"]) == (1, 0.5, 0.5)
    assert {n: v for n, v in row.items() if n.startswith("instruction_")} == {
        "instruction_question": 1,
        "instruction_sentence": 0,
        "instruction_system": 1,
        "instruction_dialogue": 0,
    }
    without = grade(llama, exam, generated=Generated("Lyon", None))
    assert not {"instruction", "gap"} & without.keys()


def test_instructions_are_what_the_model_says_to_each_conversation(llama):
    (text,) = generate(llama, [FACT], n_generations=0, instructions=True)
    for form, ids in conversations(llama.tokenizer, FACT).items():
        assert text.instructed[form] == measure.continuations(llama, [ids], 32)[0]
    assert text.said == measure.continuations(llama, [FACT.filled], 16)[0]
