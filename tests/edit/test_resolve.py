"""After an undo the later changes can be solved again, as if the undone one had never been there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch.change import Change, LowRank
from retouch.edit.emmet import Emmet
from retouch.edit.facts import Fact
from retouch.edit.ft_m import FtM
from retouch.edit.memit import Memit
from retouch.edit.resolve import resolve
from retouch.edit.rome import Rome
from retouch.edit.sequence import plan_next
from retouch.errors import UserError
from retouch.ledger import Ledger, open_ledger, save_ledger
from retouch.linalg import Covariance, Identity, Woodbury, solve
from retouch.model import wrap

NAME = "blocks.1.mlp.down"
FACTS = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("The official language of {} is", "Brazil", "French"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "Italian"),
    Fact("The currency of {} is", "Japan", "pound"),
]
QUICK = {"n_steps": 3, "contexts": ("", "I am the one. ")}


@pytest.fixture(scope="module")
def llama(tiny):
    return wrap(*tiny("llama", n_blocks=3), source="tiny llama")


@pytest.fixture(scope="module")
def gpt2(tiny):
    return wrap(*tiny("gpt2", n_blocks=3), source="tiny gpt2")


# The law that all rests on.


def _metric(kind, m, make):
    if kind == "identity":
        return Identity(0.5)
    vectors = torch.randn(m, 2 * m, generator=make).double()
    if kind == "covariance":
        return Covariance.from_moment(vectors @ vectors.T / (2 * m)).scaled(3.0)
    return Woodbury.of(0.7, vectors[:, :3])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    kind=st.sampled_from(["identity", "covariance", "low_rank"]),
    seed=st.integers(0, 999),
)
def test_least_squares_in_sequence_is_the_one_time_solve(sizes, kind, seed):
    make, m, d = torch.Generator().manual_seed(seed), 9, 5
    metric = _metric(kind, m, make)
    keys = torch.randn(m, sum(sizes), generator=make).double()
    outputs = torch.randn(d, sum(sizes), generator=make).double()
    weight = torch.randn(d, m, generator=make).double()
    once = solve(keys, outputs - weight @ keys, metric, mode="least_squares")
    delta, start = torch.zeros(d, m).double(), 0
    for size in sizes:
        new = keys[:, start : start + size]
        wanted = outputs[:, start : start + size] - (weight + delta) @ new
        keep = keys[:, :start] if start else None
        step = solve(new, wanted, metric, mode="least_squares", keep=keep)
        delta, start = delta + step.left @ step.right, start + size
    wanted = once.left @ once.right
    assert (delta - wanted).norm() < 1e-10 * max(1.0, float(wanted.norm()))


# On a ledger.


def plan_all(model, method, batches):
    ledger = Ledger(model)
    for facts in batches:
        ledger, change = plan_next(ledger, facts, method)
        ledger = ledger.apply(change)
    return ledger


def outputs(ledger, entry, name):
    return ledger.model.matrix(name).double() @ entry.change.keys[name].double()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_memit_solved_again_is_the_one_time_solve_of_what_is_left(request, family):
    model = request.getfixturevalue(family)
    method = Memit(blocks=(0, 1), metric="identity", moment_weight=2.0, **QUICK)
    ledger = plan_all(model, method, [FACTS[:1], FACTS[1:2], FACTS[2:]])
    # a metric that is the same for all: its scale is in units of the first keys
    again = resolve(ledger.undo(1), after=1)
    assert [e.active for e in again.entries] == [False, True, True]
    assert again.entries[1].change.id != ledger.entries[1].change.id
    for name in ledger.entries[0].change.parts:
        entries = again.entries[1:]
        delta, kept = torch.zeros(model.matrix(name).shape).double(), []
        for entry in entries:
            keys = entry.planned.keys[name].double()
            wanted = entry.seen[name].double() + entry.planned.targets[name].double()
            metric = Identity(2.0 * float((keys**2).sum(0).mean()))
            now = (model.matrix(name).double() + delta) @ keys
            step = solve(keys, wanted - now, metric, mode="least_squares", keep=torch.cat(kept, 1) if kept else None)
            delta, kept = delta + step.left @ step.right, [*kept, keys]
        got = again.model.matrix(name).double() - model.matrix(name).double()
        assert (got - delta).norm() < 1e-4 * delta.norm()


def test_rome_solved_again_gives_every_later_key_its_old_value(llama):
    method = Rome(block=1, **QUICK)
    ledger = plan_all(llama, method, [FACTS[:1], FACTS[1:]])
    before = outputs(ledger, ledger.entries[1], NAME)
    plain = ledger.undo(1)
    again = resolve(plain, after=1)
    last = -1  # the last fact of a batch has all others below it
    moved = (outputs(plain, plain.entries[1], NAME) - before)[:, last].norm()
    assert (outputs(again, again.entries[1], NAME) - before)[:, last].norm() < 1e-3 * moved
    one_fact = resolve(ledger.undo(2, 0), after=1)
    assert (outputs(one_fact, one_fact.entries[1], NAME) - before[:, 1:])[:, last].norm() < 1e-4 * before.norm()


def test_emmet_solved_again_holds_at_all_keys(llama):
    method = Emmet(blocks=(1,), metric="identity", ridge=1e-9, **QUICK)
    ledger = plan_all(llama, method, [FACTS[:2], FACTS[2:]])
    before = outputs(ledger, ledger.entries[1], NAME)
    again = resolve(ledger.undo(1), after=1)
    assert (outputs(again, again.entries[1], NAME) - before).norm() < 1e-4 * before.norm()
    assert (outputs(ledger.undo(1), ledger.entries[1], NAME) - before).norm() > 1e-3 * before.norm()


def test_what_came_before_the_undone_change_stays_bit_for_bit(llama):
    method = Rome(block=1, **QUICK)
    ledger = plan_all(llama, method, [[f] for f in FACTS])
    again = resolve(ledger.undo(3), after=3)
    assert [a.change.id == b.change.id for a, b in zip(again.entries, ledger.entries)] == [True, True, True, False]
    last = ledger.undo(4)
    assert resolve(last, after=4).model.fingerprint == last.model.fingerprint
    assert resolve(last).model.fingerprint == last.model.fingerprint  # nothing below any of them has moved


def test_a_reopened_ledger_is_solved_again_alike(llama, tmp_path):
    method = Memit(blocks=(0, 1), metric="identity", **QUICK)
    ledger = plan_all(llama, method, [FACTS[:2], FACTS[2:]]).undo(1)
    save_ledger(ledger, tmp_path / "m")
    again, direct = resolve(open_ledger(tmp_path / "m"), after=1), resolve(ledger, after=1)
    assert again.model.fingerprint == direct.model.fingerprint
    save_ledger(again, tmp_path / "m")
    third = open_ledger(tmp_path / "m")
    assert third.to_dict() == again.to_dict()
    assert third.undo(2).model.fingerprint == llama.fingerprint
    assert third.undo(2, 0).entries[1].facts == [1]


def test_a_change_without_keys_or_targets_is_named(llama):
    first = Rome(block=1, **QUICK).plan(llama, FACTS[:1])
    ledger = Ledger(llama).apply(first)
    tuned = ledger.apply(FtM(block=1, n_steps=3, learning_rate=0.01).plan(ledger.model, FACTS[1:2]))
    with pytest.raises(UserError, match=r"number 2 \(ft_m\) does not keep keys and targets"):
        resolve(tuned.undo(1), after=1)
    bare = replace(Rome(block=1, **QUICK).plan(ledger.model, FACTS[1:2]), targets={})
    with pytest.raises(UserError, match=r"does not keep keys and targets for blocks\.1\.mlp\.down"):
        resolve(ledger.apply(bare).undo(1), after=1)
    assert tuned.undo(1).undo(2).model.fingerprint == llama.fingerprint


def test_a_change_of_an_unknown_metric_is_named(llama):
    make = torch.Generator().manual_seed(0)
    keys, targets = torch.randn(64, 2, generator=make), torch.randn(32, 2, generator=make)
    solved = solve(keys, targets, Identity(9.0), mode="least_squares")
    part = LowRank(solved.left.float(), solved.right.float())
    facts = tuple(f.to_dict() for f in FACTS[1:3])
    odd = Change("rome", llama.base_fingerprint, {NAME: part}, facts=facts, keys={NAME: keys}, targets={NAME: targets})
    ledger = Ledger(llama).apply(Rome(block=1, **QUICK).plan(llama, FACTS[:1])).apply(odd)
    with pytest.raises(UserError, match="metric that is not known"):
        resolve(ledger.undo(1), after=1)
