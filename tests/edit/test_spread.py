"""What all methods that spread a state over blocks share: order, groups, records, statistics, and what is refused."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from spread_oracle import APART, OWN, QUICK, SAME, close, covariance, down, found_for, mean_state, slow, written

from retouch import change as changes
from retouch import linalg, registry
from retouch.edit import keys as reading
from retouch.edit.contexts import Contexts
from retouch.edit.facts import Fact
from retouch.edit.keys import averages, batches, prefixes
from retouch.edit.spread import spread
from retouch.edit.value import optimise
from retouch.errors import FactError
from retouch.model import wrap

N_BLOCKS = 4


SPREAD = ["alphaedit", "emmet", "memit", "memit_merge", "rose"]
MERGING = ["memit_merge", "rose"]
MIXED = [SAME[0], APART[1], replace(SAME[1], subject=" France "), APART[2], SAME[2]]


def make(name, **settings):
    quick = QUICK | {"n_steps": 3, "blocks": (1,) if name == "emmet" else (1, 2)}
    return registry.make("edit", name, **quick | settings)


@pytest.fixture(scope="module")
def planned(llama):
    return functools.cache(lambda name, facts: make(name).plan(llama, list(facts)))


def test_the_methods_say_whether_they_merge():
    assert [n for n in SPREAD if registry.load("edit", n).merges] == MERGING
    assert all(registry.load("edit", n).keeps_previous for n in SPREAD)


@pytest.mark.parametrize("name", MERGING)
def test_one_column_a_subject_and_facts_in_the_order_they_came_in(planned, name):
    change = planned(name, tuple(MIXED))
    assert [Fact.from_dict(f) for f in change.facts] == MIXED
    assert change.notes["groups"] == [[0, 2, 4], [1], [3]]
    assert change.notes["mode"] == "least_squares"
    for weight, part in change.parts.items():
        assert part.rank == 3
        assert change.keys[weight].shape == (64, 3) and change.targets[weight].shape == (32, 3)
    told = change.notes["facts"]
    assert len(told) == 5
    assert told[0] == told[2] == told[4] and told[0]["losses"] != told[1]["losses"]


@pytest.mark.parametrize("name", ["alphaedit", "emmet", "memit"])
def test_one_column_a_fact_without_merging(planned, name):
    change = planned(name, tuple(APART))
    assert change.notes["groups"] == [[0], [1], [2]]
    assert change.notes["mode"] == ("equality" if name == "emmet" else "least_squares")
    assert {t.shape[1] for t in (*change.keys.values(), *change.targets.values())} == {3}


@pytest.mark.parametrize("name", SPREAD)
def test_the_notes_tell_what_each_fact_receives(planned, name):
    change = planned(name, tuple(APART))
    for j, (weight, part) in enumerate(change.parts.items()):
        share = (part.right.double() * change.keys[weight].double().T).sum(1).tolist()
        assert [f["delivered"][j] for f in change.notes["facts"]] == pytest.approx(share, rel=1e-3, abs=1e-3)
        assert change.notes["blocks"][j]["delivered"] == pytest.approx(sum(share) / 3, rel=1e-3, abs=1e-3)
        close(part.left, change.targets[weight], 1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_facts_are_the_algorithm_with_written_weights(open_tiny, family):
    model, facts = open_tiny(family), [SAME[0], APART[1], SAME[1]]
    groups, method = [[0, 2], [1]], make("memit_merge", blocks=(0, 2), moment_weight=3.0)
    found = found_for(model, facts)
    z = torch.stack([v.target for v in optimise(model, found, 2, "residual", method, groups=groups)])

    def formula(block, k, r):
        return r @ k.T @ torch.linalg.inv(3 * covariance(model, block) + k @ k.T)

    wanted = slow(model, found, groups, z, (0, 2), formula)
    for name, part in method.plan(model, facts).parts.items():
        close(part.delta(), wanted[name])


def test_nothing_is_left_of_what_the_value_asks_once_an_exact_write_is_applied(llama):
    found = found_for(llama, APART)
    states = torch.stack([mean_state(llama, found, [i], 2) for i in range(3)])
    targets = states + 0.1 * torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def exact(name, k, r):
        return linalg.solve(k, r, linalg.Identity(), mode="equality")

    plain = found_for(llama, APART, ("",))  # one text a fact: the key is that text's own
    parts = spread(llama, plain, [[0], [1], [2]], targets, [2], exact).parts
    edited = written(llama, 2, parts[down(2)].delta())
    close(torch.stack([mean_state(edited, plain, [i], 2) for i in range(3)]), targets, 1e-4)


def test_a_subject_is_one_subject_after_stripping_and_never_another_in_other_letters(planned):
    facts = (SAME[0], replace(SAME[1], subject="France "), replace(SAME[2], subject="FRANCE"))
    assert planned("memit_merge", facts).notes["groups"] == [[0, 1], [2]]


@pytest.mark.parametrize("name", SPREAD)
def test_groups_planned_each_are_plans_of_their_own(llama, name):
    sets = [[APART[0], APART[1]], [APART[2]]]
    if name in MERGING:
        sets.append([SAME[0], SAME[2]])
    method = make(name)
    for facts, change in zip(sets, method.plan_each(llama, sets), strict=True):
        alone = method.plan(llama, facts)
        assert change.facts == alone.facts and change.notes["groups"] == alone.notes["groups"]
        for weight, part in alone.parts.items():
            close(change.parts[weight].delta(), part.delta(), 5e-3)
            close(change.keys[weight], alone.keys[weight])


@pytest.mark.parametrize("name", SPREAD)
def test_the_same_seed_gives_the_same_bits(tiny, planned, name):
    again = make(name).plan(wrap(*tiny("llama", n_blocks=4)), APART)
    first = planned(name, tuple(APART))
    assert again.id == first.id
    assert all(torch.equal(again.targets[n], t) for n, t in first.targets.items())


@pytest.mark.parametrize("name", ["alphaedit", "emmet", "memit", "memit_merge"])
def test_statistics_come_from_the_model_before_any_edit(llama, name):
    method = make(name, blocks=(2,))
    noise = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    edited = written(llama, 0, noise)
    own, before = (method.plan(edited, APART[:1], unedited=m) for m in (edited, llama))
    assert torch.equal(own.keys[down(2)], before.keys[down(2)])
    assert torch.equal(own.targets[down(2)], before.targets[down(2)])
    one, two = own.parts[down(2)].right.double(), before.parts[down(2)].right.double()
    assert float((one - two).norm()) > 0.05 * float(two.norm())
    assert method.plan(edited, APART[:1]).id == own.id


def test_contexts_of_a_plan_are_kept_word_for_word(llama, planned):
    assert planned("memit", tuple(APART)).notes["contexts"] == list(OWN)
    kinds = {}
    for kind in ("plain", "instruction"):
        change = make("rose", contexts=kind, blocks=(1,)).plan(llama, APART[:1])
        kinds[kind] = change.notes["contexts"]
    assert kinds["plain"] == [""] and kinds["instruction"][:3] == ["", "Answer the question: ", "User: "]
    assert set(Contexts.__args__[0].__args__) >= {"plain", "instruction"}


def test_an_instruction_context_moves_the_key_that_is_written(llama):
    plain, asked = (make("rose", contexts=c, blocks=(1,)).plan(llama, APART[:1]) for c in ("plain", "instruction"))
    one, two = plain.keys[down(1)], asked.keys[down(1)]
    assert float((one - two).norm()) > 0.01 * float(one.norm())


# Reading.


def test_texts_that_facts_share_are_read_and_counted_once(llama):
    found = found_for(llama, SAME)
    (merged,) = [prefixes(found, [0, 1, 2])]
    assert len(merged) == 3 and sum(p.weight for p in merged) == pytest.approx(1)
    assert [p.bare for p in merged] == [True, False, False]
    apart = prefixes(found_for(llama, [SAME[0], Fact("The king of {} is", "France", "Louis")]), [0, 1])
    assert len(apart) == 6 and sum(p.bare for p in apart) == 2
    mean = averages([merged, apart], bare=True)
    assert mean.sum(1).tolist() == [1, 1] and mean[1].tolist() == [0, 0, 0, 0.5, 0, 0, 0.5, 0, 0]


def test_rows_are_read_in_batches_that_hold_each_text_once(monkeypatch, llama):
    rows = [(1, 2, 3), (4,), (1, 2, 3), (5, 6), (7, 8, 9)]
    assert list(batches(rows, 100)) == [[(4,), (5, 6), (1, 2, 3), (7, 8, 9)]]
    assert list(batches(rows, 4)) == [[(4,), (5, 6)], [(1, 2, 3)], [(7, 8, 9)]]
    assert list(batches(rows, 1)) == [[(4,)], [(5, 6)], [(1, 2, 3)], [(7, 8, 9)]]
    assert list(batches([], 4)) == []

    whole = make("memit").plan(llama, APART)
    monkeypatch.setattr("retouch.edit.spread.batches", lambda rows: reading.batches(rows, 20))
    parts = make("memit").plan(llama, APART)
    for name, part in whole.parts.items():
        close(parts.parts[name].delta(), part.delta())


# Keys that must stay.


@pytest.mark.parametrize("metric", ["identity", "covariance"])
def test_one_fact_after_another_with_earlier_keys_kept_is_all_at_once(llama, metric):
    found = found_for(llama, APART, ("",))  # a state is read on one text, which the key then stands for
    states = torch.stack([mean_state(llama, found, [i], 2) for i in range(3)])
    targets = states + torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    m = linalg.Identity() if metric == "identity" else linalg.Covariance(torch.linalg.cholesky(covariance(llama, 2)))

    def solver(keep):
        return lambda name, k, r: linalg.solve(k, r, m.scaled(4.0), mode="least_squares", keep=keep)

    once = spread(llama, found, [[0], [1], [2]], targets, [2], solver(None)).parts[down(2)].delta()
    work, keep, total = llama, torch.zeros(64, 0), torch.zeros(32, 64, dtype=torch.float64)
    for i in range(3):
        step = spread(work, found[i : i + 1], [[0]], targets[i : i + 1], [2], solver(keep))
        total = total + step.parts[down(2)].delta()
        work, keep = written(llama, 2, total), torch.cat([keep, step.keys[down(2)]], 1)
    close(total, once, 1e-4)


@pytest.mark.parametrize("name", SPREAD)
def test_earlier_keys_hear_less_of_a_write_that_keeps_them(llama, name):
    settings = {"moment_weight": 1e-3} if name.startswith("memit") else {}
    method = make(name, blocks=(1,), **settings)
    earlier = method.plan(llama, APART[1:2]).keys
    free, kept = (method.plan(llama, APART[:1], previous=p).parts[down(1)] for p in (None, earlier))
    key = earlier[down(1)].double()
    heard, still = (float((p.delta() @ key).norm()) for p in (free, kept))
    assert still < 0.7 * heard
    assert still < (1e-4 if name == "emmet" else 1) * heard


# Refusals.


@pytest.mark.parametrize("name", SPREAD)
def test_no_facts_and_no_subject_are_refused(llama, name):
    with pytest.raises(FactError, match="no facts"):
        make(name).plan(llama, [])
    with pytest.raises(FactError, match="has no subject"):
        make(name).plan(llama, [Fact("The currency of Japan is the", "", "franc")])


def test_a_change_of_groups_is_saved_with_its_keys_and_targets(planned, tmp_path):
    change = planned("rose", tuple(MIXED))
    changes.save(change, tmp_path / "change")
    again = changes.load(tmp_path / "change")
    assert again.id == change.id and again.notes == change.notes
    for columns in ("keys", "targets"):
        before, after = getattr(change, columns), getattr(again, columns)
        assert before.keys() == after.keys() == change.parts.keys()
        assert all(torch.equal(after[n], t) for n, t in before.items())
