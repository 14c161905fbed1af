"""A bench measures every method alike, goes on where it was stopped, and writes what the contract says."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from retouch import registry
from retouch.change import Dense, apply
from retouch.edit import _records, bench
from retouch.edit.bench import Bench, known_facts
from retouch.edit.emmet import Emmet
from retouch.edit.evaluate import examine, grade, known
from retouch.edit.facts import Fact, Prompt
from retouch.edit.ft_m import FtM
from retouch.edit.memit import Memit
from retouch.edit.rets import Rets
from retouch.edit.rome import Rome
from retouch.edit.score import read_rows
from retouch.errors import FactError, NoEffect, SettingsError, UnknownName, UserError
from retouch.model import wrap
from retouch.progress import listen

PLACES = [
    ("France", "is Lyon", "is Paris"),
    ("Italy", "is Milan", "is Rome"),
    ("Brazil", "is Rio", "is Lima"),
    ("Japan", "is Kobe", "is Kyoto"),
]
FACTS = [
    Fact(
        "The capital of {}",
        subject,
        target,
        truth,
        paraphrases=[f"{subject} has its capital, which"],
        neighbors=[Prompt("Big Ben is located in", "London")],
        related=[Prompt(f"The currency of {subject} is")],
    )
    for subject, target, truth in PLACES
]
TIMES = ("seconds_per_fact", "peak_mib")


@dataclass(frozen=True)
class Counted(FtM):
    """FT-M that tells what it was asked to plan."""

    asked: ClassVar[list[str]] = []

    def plan(self, model, facts, **how):
        self.asked.extend(f.subject for f in facts)
        return super().plan(model, facts, **how)


@dataclass(frozen=True)
class Idle(FtM):
    """Finds nothing to do."""

    def plan(self, model, facts, **how):
        raise NoEffect("The model says all of it already.")


QUICK = {"n_steps": 3, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def llama(tiny):
    return wrap(*tiny("llama"), source="tiny llama")


@pytest.fixture(autouse=True)
def _nothing_planned():
    Counted.asked.clear()


def asked(batch_size=1, chunk=1, **settings):
    """Plan fact by fact, or batch by batch."""
    return Bench({"counted": Counted(**QUICK | settings)}, batch_size, n_generations=0, chunk=chunk)


def untimed(result):
    return {m: {k: v for k, v in row.items() if not k.startswith(TIMES)} for m, row in result["methods"].items()}


def stop_at(what, number):
    def listener(said, done, total):
        if said == what and done == number:
            raise KeyboardInterrupt

    return listener


def interrupted(model, out, number, wanted):
    with pytest.raises(KeyboardInterrupt), listen(stop_at("counted: records", number)):
        bench.run(model, FACTS, wanted, out, data="facts")
    assert not out.exists()
    return out.with_name(out.name + ".partial")


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """Run without interruption, alone and two at once."""
    folder = tmp_path_factory.mktemp("whole")
    return {n: bench.run(llama, FACTS, asked(n), folder / f"{n}.json", data="facts") for n in (1, 2)}


# What is written


def test_the_file_has_the_keys_of_the_contract_and_numbers_only(llama, tmp_path):
    methods = {"ft": FtM(**QUICK), "rome": Rome(block=1, n_steps=3, contexts="plain")}
    out = tmp_path / "new" / "bench.json"
    result = bench.run(llama, FACTS[:2], Bench(methods, n_generations=1, seed=7), out, data="two.jsonl")
    read = json.loads(out.read_text())
    assert read == result
    assert set(read) == {"verb", "model", "data", "n", "seed", "environment", "methods"}
    assert (read["verb"], read["model"], read["data"], read["n"], read["seed"]) == (
        "edit",
        "tiny llama",
        "two.jsonl",
        2,
        7,
    )
    assert set(read["methods"]) == set(methods)
    assert {"retouch", "torch", "transformers", "python", "cores", "threads"} <= set(read["environment"])
    assert read["environment"]["settings"] == {n: m.to_dict() for n, m in methods.items()}
    wanted = {"efficacy", "paraphrase", "s_specificity", "r_specificity", "score", *TIMES}
    for row in read["methods"].values():
        assert wanted <= set(row)
        assert all(isinstance(v, float | int) for v in row.values())
        assert all(0 <= row[n] <= 1 for n in wanted - {*TIMES})
        assert row["peak_mib"] > 1
    assert (read["environment"]["device"], read["environment"]["dtype"]) == ("cpu", "float32")
    assert (read["environment"]["batch"], read["environment"]["chunk"]) == (1, 16)
    for row in read["methods"].values():
        assert row["seconds_per_fact"] > 0
    assert list(out.parent.iterdir()) == [out]  # nothing is left beside it


def test_an_edit_that_works_is_seen_in_its_numbers(whole):
    row = whole[1]["methods"]["counted"]
    assert row["efficacy"] == 1
    assert row["frobenius_norm"] > 0
    assert 0 < row["share_of_weight"] < 1
    assert row["s_kl"] > 0


def test_a_batch_goes_into_one_model(llama, whole):
    assert whole[2]["environment"]["batch"] == 2
    assert untimed(whole[2]) != untimed(whole[1])
    change = FtM(**QUICK).plan(llama, FACTS[:2])
    exams = examine(llama, FACTS[:2], n_generations=0)
    rows = [grade(apply(llama, change), e) for e in exams]
    change = FtM(**QUICK).plan(llama, FACTS[2:])
    rows += [grade(apply(llama, change), e) for e in examine(llama, FACTS[2:], n_generations=0)]
    for name in ("efficacy_magnitude", "s_kl", "r_kl"):
        mean = sum(r[name] for r in rows) / 4
        assert whole[2]["methods"]["counted"][name] == pytest.approx(mean, rel=1e-4)


def test_a_last_batch_may_be_smaller(llama, tmp_path):
    bench.run(llama, FACTS[:3], asked(2), tmp_path / "b.json", data="facts")
    assert Counted.asked == ["France", "Italy", "Brazil"]


def test_a_method_with_nothing_to_do_is_measured_as_the_unchanged_model(llama, tmp_path):
    result = bench.run(llama, FACTS[:2], Bench({"idle": Idle()}, n_generations=0), tmp_path / "b.json", data="facts")
    row = result["methods"]["idle"]
    assert (row["s_same"], row["r_same"], row["perplexity_ratio"]) == (1, 1, 1)
    assert "frobenius_norm" not in row


def test_the_model_is_left_as_it_was(llama, tmp_path):
    before = {n: p.clone() for n, p in llama.network.named_parameters()}
    bench.run(llama, FACTS[:1], asked(), tmp_path / "b.json", data="facts")
    assert all(torch.equal(before[n], p) for n, p in llama.network.named_parameters())


def test_no_facts_is_the_users_mistake(llama, tmp_path):
    with pytest.raises(UserError, match="no facts to measure on"):
        bench.run(llama, [], asked(), tmp_path / "b.json", data="facts")


# Many at once


def rows_of(folder, model, facts, wanted):
    """Run and read every record's numbers; measured times apart."""
    bench.run(model, facts, replace(wanted, keep_rows=True), folder / "b.json", data="facts")
    every = read_rows(folder / "b.rows.json")["counted"]
    return [{n: v for n, v in row.items() if not n.startswith(TIMES)} for row in every]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_records_measured_together_are_each_record_measured_alone(llama, tmp_path, batch_size):
    alone = rows_of(tmp_path / "alone", llama, FACTS, asked(batch_size))
    together = rows_of(tmp_path / "together", llama, FACTS, asked(batch_size, chunk=16))
    assert len(alone) == 4
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert alone[0] != pytest.approx(alone[1], abs=1e-4)


def test_a_model_larger_than_a_chunk_is_measured_in_parts(llama, tmp_path):
    parts = rows_of(tmp_path / "parts", llama, FACTS, asked(4, chunk=3))
    whole = rows_of(tmp_path / "whole", llama, FACTS, asked(4, chunk=4))
    for one, other in zip(parts, whole, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_distributions_that_were_dropped_are_asked_for_again(llama, tmp_path, monkeypatch):
    kept = rows_of(tmp_path / "kept", llama, FACTS, asked())
    monkeypatch.setattr(_records, "KEPT", 0)
    methods = {"first": FtM(**QUICK), **asked().methods}
    wanted = Bench(methods, n_generations=0, chunk=1)
    for one, other in zip(kept, rows_of(tmp_path / "dropped", llama, FACTS, wanted), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_one_of_several_with_nothing_to_do_is_measured_as_unchanged(llama, tmp_path):
    @dataclass(frozen=True)
    class Picky(Counted):
        def plan(self, model, facts, **how):
            if facts[0].subject == "Italy":
                raise NoEffect("The model says it already.")
            return super().plan(model, facts, **how)

    rows = rows_of(tmp_path, llama, FACTS, Bench({"counted": Picky(**QUICK)}, n_generations=0, chunk=4))
    assert [r["s_same"] == 1 and r["s_kl"] < 1e-6 for r in rows] == [False, True, False, False]
    assert ["frobenius_norm" in r for r in rows] == [True, False, True, True]


# Groups


def test_the_facts_of_a_group_go_into_one_model_and_are_counted_together(llama, tmp_path):
    wanted = Bench(asked().methods, n_generations=0, instructions=True, keep_rows=True)
    result = bench.run(llama, [FACTS[:2], FACTS[2:3], FACTS[3:]], wanted, tmp_path / "b.json", data="facts")
    rows = read_rows(tmp_path / "b.rows.json")["counted"]
    assert Counted.asked == ["France", "Italy", "Brazil", "Japan"]
    assert rows[0]["frobenius_norm"] == rows[1]["frobenius_norm"] != rows[2]["frobenius_norm"]
    assert ["all_facts" in r for r in rows] == [True, False, True, True]
    assert rows[0]["all_facts"] == min(rows[0]["edit_form"], rows[1]["edit_form"])
    assert rows[0]["all_facts_instruction"] == float(min(r["instruction"] for r in rows[:2]) > 0.5)
    found = result["methods"]["counted"]
    assert found["all_facts_n"] == 3
    assert result["environment"]["groups"] == 3
    change = FtM(**QUICK).plan(llama, FACTS[:2])
    exams = examine(llama, FACTS[:2], n_generations=0)
    for row, exam in zip(rows, exams):
        graded = grade(apply(llama, change), exam)
        assert {n: row[n] for n in graded} == pytest.approx(graded, abs=1e-4)


def test_a_batch_of_groups_goes_into_one_model(llama, tmp_path):
    groups = [FACTS[:1], FACTS[1:3], FACTS[3:]]
    rows = rows_of(tmp_path, llama, groups, Bench(asked().methods, 2, n_generations=0))
    norms = [r["frobenius_norm"] for r in rows]
    assert norms[0] == norms[1] == norms[2] != norms[3]


def test_an_empty_group_is_the_users_mistake(llama, tmp_path):
    with pytest.raises(UserError, match="no facts to measure on"):
        bench.run(llama, [FACTS[:1], []], asked(), tmp_path / "b.json", data="facts")


# What a change writes, and what its method tells


def test_the_size_of_a_change_is_that_of_its_difference(llama, tmp_path):
    (row,) = rows_of(tmp_path, llama, FACTS[:1], asked())
    change = FtM(**QUICK).plan(llama, FACTS[:1])
    ((name, part),) = change.parts.items()
    delta = part.delta()
    assert row["frobenius_norm"] == pytest.approx(float(delta.norm()), rel=1e-4)
    assert row["spectral_norm"] == pytest.approx(float(torch.linalg.matrix_norm(delta, 2)), rel=1e-4)
    assert row["share_of_weight"] == pytest.approx(float(delta.norm() / llama.matrix(name).norm()), rel=1e-4)


def test_the_searchs_margin_is_told(llama, tmp_path):
    wanted = Bench({"counted": Rome(block=1, n_steps=3, contexts="plain")}, n_generations=0)
    rows = rows_of(tmp_path, llama, FACTS[:2], wanted)
    notes = Rome(block=1, n_steps=3, contexts="plain").plan_each(llama, [[f] for f in FACTS[:2]])
    for row, change in zip(rows, notes, strict=True):
        assert row["margin_nats"] == pytest.approx(change.notes["facts"][0]["margin"], abs=1e-4)


def test_a_change_that_is_not_finite_stops_the_bench(llama, tmp_path):
    @dataclass(frozen=True)
    class Burst(FtM):
        def plan(self, model, facts, **how):
            change = super().plan(model, facts, **how)
            ((name, part),) = change.parts.items()
            return replace(change, parts={name: Dense(part.difference * torch.inf)})

    wanted = Bench({"burst": Burst(**QUICK)}, n_generations=0)
    with pytest.raises(NoEffect, match="not finite"):
        bench.run(llama, FACTS[:2], wanted, tmp_path / "b.json", data="facts")


def test_facts_that_a_method_refuses_are_measured_unedited_and_counted(llama, tmp_path, caplog):
    one = {"n_steps": 2, "contexts": "plain", "metric": "identity"}
    methods = {"emmet": Emmet(**one), "ft": FtM(**QUICK)}
    both = [Fact("In {} the capital", "France", "is Lyon", "is Paris"), Fact("In {} people say", "France", "hi", "yes")]
    rows = bench.run(llama, [both, FACTS[:1]], Bench(methods, n_generations=0), tmp_path / "b.json", data="facts")
    emmet, ft = rows["methods"]["emmet"], rows["methods"]["ft"]
    assert emmet["refused"] == pytest.approx(2 / 3) and "refused" not in ft
    assert emmet["rank_of_change_n"] == 1
    assert "share one key" in caplog.text
    alone = bench.run(llama, [both], Bench({"emmet": methods["emmet"]}, n_generations=0), tmp_path / "c.json", data="x")
    idle = bench.run(llama, [both], Bench({"idle": Idle()}, n_generations=0), tmp_path / "d.json", data="x")
    assert alone["methods"]["emmet"]["efficacy_magnitude"] == idle["methods"]["idle"]["efficacy_magnitude"]


def test_a_fact_without_the_subject_that_a_method_needs_is_named_before_any_work(llama, tmp_path):
    facts = [FACTS[0], Fact("The sky is", "", "green", "blue")]
    methods = {"counted": Counted(**QUICK), "rome": Rome(n_steps=2)}
    with pytest.raises(FactError, match="'The sky is' has no subject"):
        bench.run(llama, facts, Bench(methods, n_generations=0), tmp_path / "b.json", data="facts")
    assert not Counted.asked


def test_a_change_of_huge_numbers_is_sized_or_refused_by_name(llama):
    huge = Dense(torch.full((32, 64), 1e25))
    norms = _records._dense_norms(huge.difference / 1e10, llama.device)
    assert norms == pytest.approx((1e15 * 2048**0.5,) * 2, rel=1e-4)
    assert not all(map(math.isfinite, _records._dense_norms(huge.difference, llama.device)))


# Going on


def test_an_interrupted_bench_goes_on_and_plans_nothing_twice(llama, tmp_path, whole):
    partial = interrupted(llama, tmp_path / "b.json", 3, asked())
    assert len([line for line in partial.read_text().splitlines() if line]) == 2
    Counted.asked.clear()
    result = bench.run(llama, FACTS, asked(), tmp_path / "b.json", data="facts")
    assert Counted.asked == ["Brazil", "Japan"]
    assert untimed(result) == untimed(whole[1])
    assert not partial.exists()


def test_an_interrupted_batch_is_planned_again_as_a_whole(llama, tmp_path, whole):
    interrupted(llama, tmp_path / "b.json", 4, asked(2))
    Counted.asked.clear()
    result = bench.run(llama, FACTS, asked(2), tmp_path / "b.json", data="facts")
    assert Counted.asked == ["Brazil", "Japan"]  # the third record was there, but not the fourth
    assert untimed(result) == untimed(whole[2])


def test_a_torn_last_line_is_ignored_and_swallows_nothing_that_follows(llama, tmp_path, whole):
    out = tmp_path / "b.json"
    partial = interrupted(llama, out, 3, asked())
    torn = partial.read_text().rstrip("\n")
    partial.write_text(torn[:-20])
    Counted.asked.clear()
    interrupted(llama, out, 4, asked())
    assert Counted.asked == ["Italy", "Brazil", "Japan"]
    Counted.asked.clear()
    result = bench.run(llama, FACTS, asked(), out, data="facts")
    assert Counted.asked == ["Japan"]
    assert untimed(result) == untimed(whole[1])


@pytest.mark.parametrize(
    "how", ["settings", "batch", "seed", "generations", "instructions", "chunk", "groups", "facts", "model"]
)
def test_other_settings_do_not_reuse_what_was_measured(llama, tiny, tmp_path, how):
    interrupted(llama, tmp_path / "b.json", 3, asked())
    Counted.asked.clear()
    model, facts, wanted = llama, FACTS, asked()
    match how:
        case "settings":
            wanted = asked(n_steps=2)
        case "batch":
            wanted = asked(2)
        case "seed":
            wanted = Bench(wanted.methods, seed=1, n_generations=0, chunk=1)
        case "generations":
            wanted = Bench(wanted.methods, n_generations=1, chunk=1)
        case "instructions":
            wanted = Bench(wanted.methods, n_generations=0, instructions=True, chunk=1)
        case "chunk":
            wanted = asked(chunk=2)
        case "groups":
            facts = [FACTS[:2], FACTS[2:]]
        case "facts":
            facts = [FACTS[1], FACTS[0], *FACTS[2:]]
        case "model":
            model = wrap(*tiny("llama", seed=1), source="tiny llama")
    bench.run(model, facts, wanted, tmp_path / "b.json", data="facts")
    flat = [f for g in facts for f in (g if isinstance(g, list) else [g])]
    assert Counted.asked == [f.subject for f in flat]


def test_another_method_is_added_beside_what_was_measured(llama, tmp_path):
    interrupted(llama, tmp_path / "b.json", 3, asked())
    Counted.asked.clear()
    both = Bench({"rome": Rome(block=1, n_steps=2, contexts="plain"), **asked().methods}, n_generations=0, chunk=1)
    result = bench.run(llama, FACTS, both, tmp_path / "b.json", data="facts")
    assert Counted.asked == ["Brazil", "Japan"]
    assert list(result["methods"]) == ["rome", "counted"]


# What is asked


def test_methods_are_read_with_their_settings():
    found = registry.parse("edit", "rome, memit:metric=identity:n-steps=10,ft-m:learning_rate=1e-3,", seed=4)
    assert list(found) == ["rome", "memit:metric=identity:n-steps=10", "ft-m:learning_rate=1e-3"]
    rome, memit, ft = found.values()
    assert (rome.name, memit.name, ft.name) == ("rome", "memit", "ft_m")
    assert (memit.metric, memit.n_steps, ft.learning_rate) == ("identity", 10, 1e-3)
    assert {m.seed for m in found.values()} == {4}


def test_a_setting_of_ones_own_beats_the_seed_of_all():
    assert registry.parse("edit", "rome:seed=9", seed=4)["rome:seed=9"].seed == 9


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("memitt", UnknownName, "Did you mean 'memit'"),
        ("rome:n_stepz=3", SettingsError, "has no setting 'n_stepz'. Did you mean 'n_steps'"),
        ("rome:n_steps=0", SettingsError, "n_steps must be int >= 1"),
        ("rome:n_steps=", SettingsError, "n_steps must be int >= 1"),
        (" , ", UserError, "No method was named"),
    ],
)
def test_methods_that_cannot_be_read_say_why(text, error, says):
    with pytest.raises(error, match=says.replace("?", "[?]")):
        registry.parse("edit", text)


def test_known_facts_are_the_first_that_the_model_knows(llama):
    reverse = [Fact(f.prompt, f.subject, f.truth, f.target) for f in FACTS]
    every = [f for pair in zip(FACTS, reverse) for f in pair]
    wanted = [f for f, k in zip(every, known(llama, every)) if k]
    assert len(wanted) == 4
    assert known_facts(llama, every, 3) == wanted[:3]
    assert known_facts(llama, every, 99) == wanted


def test_a_search_that_finds_nothing_within_its_limit_ends_no_bench(llama, tmp_path):
    method = Memit(n_steps=3, contexts="plain", metric="identity", max_drift=1e-9, n_bystanders=2)
    wanted = Bench({"memit": method}, n_generations=0)
    found = bench.run(llama, FACTS[:1], wanted, tmp_path / "b.json", data="f")["methods"]["memit"]
    assert found["refused"] == 1 and found["perplexity_ratio"] == 1


def test_records_that_were_made_with_another_file_are_not_read_back(tmp_path):
    words = tmp_path / "words.txt"
    method = Rets(constraints=str(words))
    words.write_text("The capital of Spain is")
    first = bench._Partial(tmp_path / "p", "key")
    assert first.rows("rets", method) == {}
    first.add("rets", 0, {"efficacy": 1.0})
    assert bench._Partial(tmp_path / "p", "key").rows("rets", method) == {0: {"efficacy": 1.0}}
    words.write_text("The capital of Peru is")
    assert bench._Partial(tmp_path / "p", "key").rows("rets", method) == {}
