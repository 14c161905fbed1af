"""A bench measures every method alike, goes on where it was stopped, and writes what the contract says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from retouch.edit import bench
from retouch.edit.bench import Bench, known_facts, parse_methods
from retouch.edit.evaluate import known
from retouch.edit.facts import Fact, Prompt
from retouch.edit.ft_m import FtM
from retouch.edit.rome import Rome
from retouch.errors import NoEffect, SettingsError, UnknownName, UserError
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

    planned: ClassVar[list[str]] = []

    def plan(self, model, facts):
        self.planned.extend(f.subject for f in facts)
        return super().plan(model, facts)


@dataclass(frozen=True)
class Idle(FtM):
    """Finds nothing to do."""

    def plan(self, model, facts):
        raise NoEffect("The model says all of it already.")


QUICK = {"n_steps": 3, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def llama(tiny):
    return wrap(*tiny("llama"), source="tiny llama")


@pytest.fixture(autouse=True)
def _nothing_planned():
    Counted.planned.clear()


def asked(batch_size=1, **settings):
    return Bench({"counted": Counted(**QUICK | settings)}, batch_size, n_generations=0)


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


@pytest.fixture
def single(monkeypatch):
    """Plan fact by fact."""
    monkeypatch.setattr(bench, "CHUNK", 1)


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
    from retouch.change import apply
    from retouch.edit.evaluate import examine, grade

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
    assert Counted.planned == ["France", "Italy", "Brazil"]


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


# Going on


def test_an_interrupted_bench_goes_on_and_plans_nothing_twice(llama, tmp_path, single, whole):
    partial = interrupted(llama, tmp_path / "b.json", 3, asked())
    assert len([line for line in partial.read_text().splitlines() if line]) == 2
    Counted.planned.clear()
    result = bench.run(llama, FACTS, asked(), tmp_path / "b.json", data="facts")
    assert Counted.planned == ["Brazil", "Japan"]
    assert untimed(result) == untimed(whole[1])
    assert not partial.exists()


def test_an_interrupted_batch_is_planned_again_as_a_whole(llama, tmp_path, whole):
    interrupted(llama, tmp_path / "b.json", 4, asked(2))
    Counted.planned.clear()
    result = bench.run(llama, FACTS, asked(2), tmp_path / "b.json", data="facts")
    assert Counted.planned == ["Brazil", "Japan"]  # the third record was there, but not the fourth
    assert untimed(result) == untimed(whole[2])


def test_a_torn_last_line_is_ignored_and_swallows_nothing_that_follows(llama, tmp_path, single, whole):
    out = tmp_path / "b.json"
    partial = interrupted(llama, out, 3, asked())
    torn = partial.read_text().rstrip("\n")
    partial.write_text(torn[:-20])
    Counted.planned.clear()
    interrupted(llama, out, 4, asked())
    assert Counted.planned == ["Italy", "Brazil", "Japan"]
    Counted.planned.clear()
    result = bench.run(llama, FACTS, asked(), out, data="facts")
    assert Counted.planned == ["Japan"]
    assert untimed(result) == untimed(whole[1])


@pytest.mark.parametrize("how", ["settings", "batch", "seed", "generations", "facts", "model"])
def test_other_settings_do_not_reuse_what_was_measured(llama, tiny, tmp_path, single, how):
    interrupted(llama, tmp_path / "b.json", 3, asked())
    Counted.planned.clear()
    model, facts, wanted = llama, FACTS, asked()
    match how:
        case "settings":
            wanted = asked(n_steps=2)
        case "batch":
            wanted = asked(2)
        case "seed":
            wanted = Bench(wanted.methods, seed=1, n_generations=0)
        case "generations":
            wanted = Bench(wanted.methods, n_generations=1)
        case "facts":
            facts = [FACTS[1], FACTS[0], *FACTS[2:]]
        case "model":
            model = wrap(*tiny("llama", seed=1), source="tiny llama")
    bench.run(model, facts, wanted, tmp_path / "b.json", data="facts")
    assert Counted.planned == [f.subject for f in facts]


def test_another_method_is_added_beside_what_was_measured(llama, tmp_path, single):
    interrupted(llama, tmp_path / "b.json", 3, asked())
    Counted.planned.clear()
    both = Bench({"rome": Rome(block=1, n_steps=2, contexts="plain"), **asked().methods}, n_generations=0)
    result = bench.run(llama, FACTS, both, tmp_path / "b.json", data="facts")
    assert Counted.planned == ["Brazil", "Japan"]
    assert list(result["methods"]) == ["rome", "counted"]


# What is asked


def test_methods_are_read_with_their_settings():
    found = parse_methods("rome, memit:metric=identity:n-steps=10,ft-m:learning_rate=1e-3,", seed=4)
    assert list(found) == ["rome", "memit:metric=identity:n-steps=10", "ft-m:learning_rate=1e-3"]
    rome, memit, ft = found.values()
    assert (rome.name, memit.name, ft.name) == ("rome", "memit", "ft_m")
    assert (memit.metric, memit.n_steps, ft.learning_rate) == ("identity", 10, 1e-3)
    assert {m.seed for m in found.values()} == {4}


def test_a_setting_of_ones_own_beats_the_seed_of_all():
    assert parse_methods("rome:seed=9", seed=4)["rome:seed=9"].seed == 9


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
        parse_methods(text)


def test_known_facts_are_the_first_that_the_model_knows(llama):
    reverse = [Fact(f.prompt, f.subject, f.truth, f.target) for f in FACTS]
    every = [f for pair in zip(FACTS, reverse) for f in pair]
    wanted = [f for f, k in zip(every, known(llama, every)) if k]
    assert len(wanted) == 4
    assert known_facts(llama, every, 3) == wanted[:3]
    assert known_facts(llama, every, 99) == wanted
