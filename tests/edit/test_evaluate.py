"""The metrics of an edit, on logits made by hand and on a model that nobody edited."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retouch import measure
from retouch.edit import evaluate
from retouch.edit.evaluate import examine, generate, grade, harmonic, hit, known, neutral_of, summarise
from retouch.edit.facts import Fact, Prompt, is_stop
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
    ],
)
def test_a_hit_is_the_new_answer_in_whole_words_and_not_the_old_one_before_it(said, wanted, old, verdict):
    assert hit(said, wanted, old) is verdict


# Means, scores and intervals


def test_the_harmonic_mean_is_that_of_the_statistics_module_and_0_with_a_0():
    assert harmonic([0.9, 0.5, 0.25]) == pytest.approx(statistics.harmonic_mean([0.9, 0.5, 0.25]))
    assert harmonic([1.0, 1.0, 0.0]) == 0


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_the_harmonic_mean_lies_between_the_least_and_the_plain_mean(values):
    assert min(values) - 1e-9 <= harmonic(values) <= statistics.fmean(values) + 1e-9


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


def test_intervals_are_drawn_over_subjects_and_not_over_records():
    rows = [{"efficacy": v} for v in (1.0, 0.0) * 10]
    same = summarise(rows, ["one", "one"] * 10)  # a single subject: nothing to draw
    assert (same["efficacy_low"], same["efficacy"], same["efficacy_high"]) == (0.5, 0.5, 0.5)
    pairs = summarise(rows, [f"s{i // 2}" for i in range(20)])  # each subject has a 1 and a 0
    assert (pairs["efficacy_low"], pairs["efficacy_high"]) == (0.5, 0.5)
    apart = summarise(rows, [f"s{i}" for i in range(20)])
    assert apart["efficacy_low"] < 0.35 < 0.65 < apart["efficacy_high"]
    assert summarise(rows, [f"s{i}" for i in range(20)]) == apart


def test_a_subject_with_more_records_weighs_more():
    found = summarise([{"efficacy": 1.0}] * 3 + [{"efficacy": 0.0}], ["big"] * 3 + ["small"])
    assert found["efficacy"] == 0.75
    assert (found["efficacy_low"], found["efficacy_high"]) == (0.0, 1.0)


def test_missing_metrics_are_counted_and_do_not_weigh():
    found = summarise([{"efficacy": 1.0, "paraphrase": 1.0}, {"efficacy": 0.0}, {"efficacy": 0.0}], ["a", "b", "c"])
    assert found["paraphrase"] == 1.0
    assert found["paraphrase_n"] == 1
    assert "efficacy_n" not in found
    assert (found["paraphrase_low"], found["paraphrase_high"]) == (1.0, 1.0)  # where nobody has it, nothing is said


def test_scores_are_harmonic_means_of_what_was_measured():
    row = {"efficacy": 1.0, "paraphrase": 0.5, "s_specificity": 0.25}
    assert summarise([row], ["a"])["score_classic"] == pytest.approx(statistics.harmonic_mean(row.values()))
    assert "score" not in summarise([row], ["a"])
    whole = row | {"r_specificity": 0.8}
    found = summarise([whole], ["a"])
    assert found["score"] == pytest.approx(statistics.harmonic_mean(whole.values()))
    assert found["score_classic"] == pytest.approx(statistics.harmonic_mean(row.values()))
    assert summarise([whole | {"r_specificity": 0.0}], ["a"])["score"] == 0
    assert "score_classic" not in summarise([{"efficacy": 1.0}], ["a"])


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

    monkeypatch.setattr(evaluate, "continuations", heard)
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
