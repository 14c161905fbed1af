"""Edits in sequence: earlier keys kept, stale facts gone, stopped at the bound, and not lost when the run is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from retouch.edit import collapse, sequence
from retouch.edit.emmet import Emmet
from retouch.edit.facts import Fact, Prompt
from retouch.edit.ft_m import FtM
from retouch.edit.memit import Memit
from retouch.edit.memit_merge import MemitMerge
from retouch.edit.rome import Rome
from retouch.errors import FactError, NoEffect, SolveError, UserError
from retouch.ledger import Ledger, open_ledger
from retouch.measure import answers, perplexity
from retouch.model import wrap
from retouch.progress import listen
from retouch.tokens import Text

PLACES = [("France", "Lyon"), ("Italy", "Milan"), ("Brazil", "Rio"), ("Japan", "Kobe"), ("Peru", "Cusco")]
FACTS = [
    Fact(
        "The capital of {}",
        land,
        f"is {city}",
        "is Paris",
        neighbors=[Prompt(f"Big Ben is located {i} miles from", "London")],
    )
    for i, (land, city) in enumerate(PLACES)
]
AGAIN = Fact("The capital of {}", "FRANCE", "is Nice", "is Paris")
NAME = "blocks.1.mlp.down"
METHOD = Memit(blocks=(0, 1), metric="identity", n_steps=3, contexts=("",))
WILD = FtM(block=1, n_steps=5, learning_rate=0.1)
FREE = 1e9


@dataclass(frozen=True)
class Heard(Memit):
    """MEMIT that tells which keys it was to keep."""

    heard: ClassVar[list[dict[str, torch.Tensor]]] = []

    def plan(self, model, facts, *, previous=None, unedited=None):
        self.heard.append(dict(previous))
        return super().plan(model, facts, previous=previous, unedited=unedited)


@dataclass(frozen=True)
class Idle(FtM):
    """Finds that the model says all of it."""

    def plan(self, model, facts, **more):
        raise NoEffect("The model says all of it already.")


@pytest.fixture(scope="module")
def llama(tiny):
    return wrap(*tiny("llama"), source="tiny llama")


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """A run without interruption."""
    out = tmp_path_factory.mktemp("whole") / "model"
    return sequence.run(llama, [*FACTS, AGAIN], METHOD, batch_size=2, max_perplexity_ratio=FREE, out=out, every=2), out


def run(model, facts=FACTS, method=METHOD, batch_size=2, **more):
    return sequence.run(model, facts, method, batch_size=batch_size, **{"max_perplexity_ratio": FREE} | more)


def weights(model):
    return {n: p.clone() for n, p in model.network.named_parameters()}


def equal(one, two):
    return all(torch.equal(one[n], two[n]) for n in one)


# What a batch is planned on.


def test_the_keys_of_all_earlier_batches_are_kept_and_stale_ones_are_not(llama):
    Heard.heard.clear()
    fields = {f: getattr(METHOD, f) for f in ("blocks", "metric", "n_steps", "contexts")}
    done = run(llama, [*FACTS[:4], AGAIN], Heard(**fields))
    first, second, third = Heard.heard
    changes = [e.planned for e in done.ledger.entries]
    assert first == {}
    assert second.keys() == {"blocks.0.mlp.down", NAME}
    for name in second:
        assert torch.equal(second[name], changes[0].keys[name])
        wanted = torch.cat([changes[0].keys[name][:, 1:], changes[1].keys[name]], 1)
        assert torch.equal(third[name], wanted)  # without France, which the third batch edits again


def test_a_superseded_fact_is_taken_out_before_its_successor_is_planned(llama):
    done = run(llama, [*FACTS[:2], AGAIN], Rome(block=1, n_steps=3, contexts=("",)))
    one, two = done.ledger.entries
    assert one.removed == {0: ("superseded", 1)} and one.facts == [1]
    assert two.change.notes["supersedes"] == [one.planned.id]
    alone = Ledger(llama).apply(one.planned).undo(1, 0)
    assert done.ledger.undo(2).model.fingerprint == alone.model.fingerprint
    assert (done.n_edits, done.n_superseded) == (3, 1)
    stacked = run(llama, [*FACTS[:2], AGAIN], Rome(block=1, n_steps=3, contexts=("",)), policy="stack")
    assert stacked.ledger.to_dict()["changes"][0]["stale"] == [0]
    assert stacked.ledger.entries[0].removed == {}


def test_facts_that_shared_a_value_with_a_stale_one_are_planned_again(llama):
    money = Fact("The money of {}", "France", "is the pound", "is the euro")
    method = MemitMerge(blocks=(0, 1), metric="identity", n_steps=3, contexts=("",))
    again = replace(FACTS[0], target="is Nice")
    done = run(llama, [FACTS[0], money, FACTS[1], again], method, batch_size=3)
    one, two = done.ledger.entries
    assert one.facts == [2]
    assert [f["target"] for f in two.change.facts] == ["is Nice", "is the pound"]


def test_of_two_facts_about_the_same_in_one_batch_the_last_counts(llama):
    done = run(llama, [FACTS[0], FACTS[1], AGAIN], batch_size=3)
    assert [f["target"] for f in done.ledger.entries[0].change.facts] == ["is Milan", "is Nice"]


def test_a_batch_that_changes_nothing_is_no_line(llama):
    done = run(llama, method=Idle())
    assert done.ledger.entries == () and done.n_edits == len(FACTS)
    assert done.points[-1].perplexity_ratio == 1.0 and done.points[-1].s_specificity is not None


def test_a_model_that_carries_changes_keeps_them(llama):
    start = run(llama, FACTS[:2]).ledger
    done = run(start, FACTS[2:4])
    assert [e.number for e in done.ledger.entries] == [1, 2]
    assert done.ledger.undo(2).model.fingerprint == start.model.fingerprint
    assert done.ledger.base.fingerprint == llama.fingerprint


# What is measured.


def test_points_are_what_the_model_says(whole, llama):
    done, _ = whole
    assert [p.n_edits for p in done.points] == [2, 4, 6]
    end = done.points[-1]
    current = [*FACTS[1:], AGAIN]
    texts = [Text(f.before, f.subject, f.after, t) for f in current for t in (f.target, f.truth)]
    said = [a.nll for a in answers(done.ledger.model, texts)]
    wins = [new < old for new, old in zip(said[::2], said[1::2])]
    assert end.efficacy == sum(wins) / 5
    assert end.efficacy_last == sum(wins[-2:]) / 2
    watched = collapse.watch(llama, [*FACTS, AGAIN])
    assert len(watched.neighbors) == 5
    text, n = watched.neutral.text, watched.neutral.n_tokens
    assert end.perplexity_ratio == pytest.approx(perplexity(done.ledger.model, text, n) / watched.neutral.before)
    assert done.points[0].efficacy == done.points[0].efficacy_last


def test_facts_without_an_old_answer_are_measured_against_the_models_own(llama):
    bare = [Fact("The capital of {}", land, f"is {city}") for land, city in PLACES[:2]]
    done = run(llama, bare)
    assert done.points[-1].s_specificity is None and done.points[-1].s_same is None
    assert 0 <= done.points[-1].efficacy <= 1


# The guard.


def test_the_guard_keeps_no_batch_that_would_pass_the_bound(llama, tmp_path):
    free = run(llama, method=WILD, batch_size=1, every=1)
    ratios = [p.perplexity_ratio for p in free.points]
    at = max(range(5), key=lambda i: ratios[i])
    assert ratios[at] > 1
    earlier = max([1.0, *ratios[:at]])
    bound = (earlier + ratios[at]) / 2  # passed by that batch and by none before
    with pytest.raises(sequence.Stopped, match=f"After {at + 1} of 5 edits .* not kept: {at} edits stand") as stopped:
        run(llama, method=WILD, batch_size=1, max_perplexity_ratio=bound, out=tmp_path / "m")
    kept = stopped.value.run
    assert stopped.value.exit_code == 3
    assert (kept.n_edits, kept.bound_at, kept.ratio) == (at, at + 1, ratios[at])
    assert len(open_ledger(tmp_path / "m").active) == at
    assert equal(weights(open_ledger(tmp_path / "m").model), weights(kept.ledger.model))
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and p.name != "cache"] == ["m"]
    recorded = run(llama, method=WILD, batch_size=1, every=1, max_perplexity_ratio=bound, guard="record")
    assert recorded.points == free.points and recorded.bound_at == at + 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"facts": []}, "There are no facts"),
        ({"batch_size": 0}, "at least 1 fact; got 0"),
        ({"every": 0}, "at least 1 fact"),
        ({"max_perplexity_ratio": 1.0}, "ratio of perplexities above 1"),
        ({"max_perplexity_ratio": float("nan")}, "ratio of perplexities above 1"),
    ],
)
def test_a_sequence_names_what_cannot_be(llama, more, says):
    with pytest.raises(UserError, match=says):
        run(llama, **more)


# Interrupted.

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import families
import test_sequence as t
from retouch.model import wrap
model = wrap(families.FAMILIES["llama"](), families.tokenizer(), source="tiny llama")
t.run(model, [*t.FACTS, t.AGAIN], out={out!r}, every=2)
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(llama, whole, tmp_path):
    done, _ = whole
    here = Path(__file__).parent
    code = KILLED.format(tests=str(here.parent), out=str(tmp_path / "model"))
    path = os.pathsep.join([str(here), str(here.parent)])
    env = os.environ | {"PYTHONPATH": path, "RETOUCH_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    journal = tmp_path / "model.sequence" / "journal.jsonl"
    running = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(100, running.kill)
    watchdog.start()
    while running.poll() is None and not journal.is_file():
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    error = running.communicate()[1]
    watchdog.cancel()
    assert journal.is_file(), error
    finished = len([x for x in journal.read_text().splitlines() if x.endswith("}")])
    assert not (tmp_path / "model").exists() and 1 <= finished <= 3
    (tmp_path / "model.sequence" / "00002-torn").mkdir()  # a folder that was not finished
    with journal.open("a") as file:
        file.write('\n{"key": "torn')

    planned = []
    with listen(lambda what, n, total: planned.append(what) if what.startswith("Values") else None):
        again = run(llama, [*FACTS, AGAIN], out=tmp_path / "model", every=2)
    assert equal(weights(again.ledger.model), weights(done.ledger.model))
    assert again.points == done.points
    assert [e.planned.id for e in again.ledger.entries] == [e.planned.id for e in done.ledger.entries]
    assert [e.removed for e in again.ledger.entries] == [e.removed for e in done.ledger.entries]
    assert not journal.exists()
    opened = open_ledger(tmp_path / "model")
    assert opened.undo(1).undo(2).undo(3).model.fingerprint == llama.fingerprint


def test_ctrl_c_loses_no_finished_batch(llama, whole, tmp_path):
    def stop(what, number, total):
        if what == "memit: edits in sequence" and number == 4:
            raise KeyboardInterrupt

    facts = [*FACTS, AGAIN]
    with pytest.raises(KeyboardInterrupt), listen(stop):
        run(llama, facts, out=tmp_path / "model", every=2)
    lines = (tmp_path / "model.sequence" / "journal.jsonl").read_text().split()
    assert not (tmp_path / "model").exists() and sum(map(len, lines)) > 0
    assert run(llama, facts, out=tmp_path / "model", every=2).points == whole[0].points


def test_a_journal_of_other_facts_is_not_read(llama, tmp_path):
    first = run(llama, FACTS[:2], journal=tmp_path / "j")
    other = run(llama, FACTS[2:4], journal=tmp_path / "j")
    assert other.ledger.active[0].facts[0]["subject"] == "Brazil"
    assert first.ledger.model.fingerprint == run(llama, FACTS[:2], journal=tmp_path / "j").ledger.model.fingerprint


def test_a_method_that_cannot_go_on_is_no_bound_that_was_passed(llama, tmp_path, caplog):
    method = Emmet(metric="identity", n_steps=2, contexts="plain")
    facts = [
        Fact("In {} the capital", "France", "is Lyon", "is Paris"),
        FACTS[1],
        Fact("In {} people say", "France", "hi", "yes"),
    ]
    result = sequence.run_bench(
        llama, facts, {"emmet": method}, 1, tmp_path / "b.json", data="x", max_perplexity_ratio=FREE
    )
    row = result["methods"]["emmet"]
    assert (row["n_edits"], row["ended_at_edits"]) == (2, 2) and "bound_at_edits" not in row
    assert "is also a key whose output must stay" in result["ended"]["emmet"]
    assert "ends after 2 edits" in caplog.text
    with pytest.raises(SolveError, match="must stay"):
        run(llama, facts, method, 1)


def test_a_fact_without_its_subject_is_named_before_the_first_batch(llama, tmp_path):
    with pytest.raises(FactError, match="has no subject"):
        run(llama, [*FACTS, Fact("The sky is", "", "green")], journal=tmp_path / "journal")
    assert not (tmp_path / "journal").exists()


# The bench and the curve.


def test_the_bench_writes_last_numbers_and_curves(llama, tmp_path):
    methods = {"memit": METHOD, "wild": WILD}
    out = tmp_path / "bench.json"
    result = sequence.run_bench(llama, FACTS, methods, 2, out, data="five", seed=3, every=2, max_perplexity_ratio=1.001)
    assert json.loads(out.read_text()) == result
    assert (result["verb"], result["data"], result["n"], result["seed"]) == ("edit", "five", 5, 3)
    for name in methods:
        row, curve = result["methods"][name], result["curves"][name]
        assert all(isinstance(v, int | float) for v in row.values())
        assert [p["n_edits"] for p in curve] == [2, 4, 5]
        assert row["efficacy"] == curve[-1]["efficacy"] and row["n_edits"] == 5
        over = [p["n_edits"] for p in curve if p["perplexity_ratio"] > 1.001]
        assert row.get("bound_at_edits") == (over[0] if over else None)
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["bench.json"]
    stopped = sequence.run_bench(
        llama, FACTS, methods, 2, tmp_path / "two.json", data="five", guard="stop", max_perplexity_ratio=1.001
    )["methods"]["wild"]
    assert stopped["bound_at_edits"] == result["methods"]["wild"]["bound_at_edits"]
    assert stopped["n_edits"] < stopped["bound_at_edits"]


def test_the_curve_is_a_report_and_a_picture(whole, tmp_path):
    done, _ = whole
    report = collapse.collapse_report(done.points, "tiny llama", "memit", "6 edits stand.", done.numbers())
    collapse.write_report(report, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 2 and "neighbours kept" in page and "6 edits stand." in page
    assert [row[0] for row in report.tables[0].rows] == [2, 4, 6]
    collapse.save_png(done.points, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match="no finite value"):
        collapse.plots([])


def test_another_text_of_the_same_name_is_another_run(llama, tmp_path):
    text, keys = tmp_path / "words.txt", set()
    for words in ("one", "one", "two"):
        text.write_text(words)
        method = replace(METHOD, text=str(text))  # the identity reads none, so that the run is short
        sequence.run(llama, FACTS[:1], method, batch_size=1, max_perplexity_ratio=FREE, journal=tmp_path / "journal")
        lines = (tmp_path / "journal" / "journal.jsonl").read_text().split("\n")
        keys |= {json.loads(line)["key"] for line in lines if line}
    assert len(keys) == 2
