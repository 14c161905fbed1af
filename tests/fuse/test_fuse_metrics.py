"""Measures of composed prompts, and intervals that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from retouch.errors import UserError
from retouch.fuse import compose
from retouch.fuse.base import Question
from retouch.fuse.compose import Answers, Instance
from retouch.fuse.composed_metrics import (
    assemble,
    chance,
    contrast,
    interval,
    measure,
    no_signal,
    paired,
    require_signal,
)


def pools(n, domains=("law", "film"), options=4):
    return {
        d: [Question(d, d, f"{d} {i}", tuple("wxyz"[:options]), i % options, f"{d}{i}") for i in range(n)]
        for d in domains
    }


def told(instances, right):
    """Answers that are right where ``right(instance, part)`` says so."""
    chosen = tuple(
        tuple(q.answer if right(i, p) else (q.answer + 1) % len(q.options) for p, q in enumerate(i.parts))
        for i in instances
    )
    return Answers(tuple(instances), chosen)


def test_measures_of_a_hand_made_case():
    law, film = pools(4).values()
    instances = [Instance(0, (law[0], film[0])), Instance(1, (film[1], law[1])), Instance(2, (law[2], film[2]))]
    found = measure(Answers(tuple(instances), ((0, 0), (1, 0), (2, 3))))
    assert found.all_correct == pytest.approx(1 / 3)
    assert found.part_correct == pytest.approx(4 / 6)
    assert found.by_domain == pytest.approx({"law": 2 / 3, "film": 2 / 3})
    assert found.by_position == pytest.approx((1.0, 1 / 3))
    assert found.coupling == pytest.approx(1 / 3 - 4 / 9)
    assert (found.macro, found.worst_domain) == pytest.approx((2 / 3, 2 / 3))
    assert (found.chance_all, found.chance_part) == (1 / 16, 1 / 4)
    assert (found.n_instances, found.n_bundles, found.format_failure) == (3, 3, 0)
    assert found.composition_cost is None
    assert found.retention is None


def test_cost_of_composition_and_retention():
    instances = compose.bundles(pools(9), 2)
    together = told(instances, lambda i, p: p == 0)
    alone = told(compose.singles(instances), lambda i, p: True)
    own = {"law": told(instances, lambda i, p: True), "film": told(instances, lambda i, p: False)}
    found = measure(together, alone=alone, own=own)
    assert found.composition_cost == pytest.approx(0.5, abs=0.02)
    assert found.retention["law"] == pytest.approx(found.by_domain["law"])
    assert np.isnan(found.retention["film"])
    with pytest.raises(UserError, match="were not asked alone"):
        measure(together, alone=told(compose.singles(instances)[:3], lambda i, p: True))


def test_the_oracle_puts_single_answers_together():
    instances = compose.bundles(pools(9), 2)
    by = {d: [i for i in compose.singles(instances) if i.parts[0].domain == d] for d in ("law", "film")}
    oracle = assemble(instances, {d: told(some, lambda i, p, d=d: d == "law") for d, some in by.items()})
    assert measure(oracle).by_domain == {"law": 1.0, "film": 0.0}
    with pytest.raises(UserError, match="film was not asked alone"):
        assemble(instances, {"law": told(by["law"], lambda i, p: True)})


def test_chance_is_a_product():
    four, two = pools(3, ("a",)), pools(3, ("b",), options=2)
    assert chance(compose.bundles(four | two, 2)) == (1 / 8, 3 / 8)


def test_what_was_not_in_the_format_is_wrong():
    instances = compose.bundles(pools(3), 2)
    found = measure(Answers(tuple(instances), ((-1, -1),) * len(instances), "free"))
    assert (found.format_failure, found.part_correct) == (1, 0)
    one_more = (*instances[:1], Instance(5, instances[1].parts))
    assert interval(Answers(one_more, ((-1, -1),) * 2), "format_failure").value == 1


def test_the_bootstrap_equals_the_slow_one():
    draw = np.random.default_rng(0)
    instances = compose.bundles(pools(30), 2)
    one = told(instances, lambda i, p: draw.random() < 0.7)
    other = told(instances, lambda i, p: draw.random() < 0.5)
    for statistic in ("all_correct", "part_correct", "macro"):
        found = paired(one, other, statistic, draws=2000)
        assert found.value == pytest.approx(getattr(measure(one), statistic) - getattr(measure(other), statistic))
    groups = [[j for j, i in enumerate(instances) if i.bundle == b] for b in range(10)]
    slow = []
    for _ in range(1500):
        rows = [j for b in draw.integers(10, size=10) for j in groups[b]]
        right = [
            np.mean([[c == q.answer for c, q in zip(a.chosen[j], instances[j].parts)] for j in rows])
            for a in (one, other)
        ]
        slow.append(right[0] - right[1])
    found = paired(one, other, "part_correct")
    assert found.standard_error == pytest.approx(np.std(slow), rel=0.08)
    tail = stats.norm.cdf(-np.sqrt(10 / 9) * stats.t.ppf(0.975, 9))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow, [tail, 1 - tail])), abs=0.02)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Simulated systems whose bundles have abilities of their own, so that answers in one bundle go together."""
    draw = np.random.default_rng(1)
    law = pools(1, ("law",))["law"][0]
    instances = tuple(Instance(b, (law,)) for b in range(80) for _ in range(3))
    held, n = 0, 500
    for _ in range(n):
        ability = draw.beta(2, 2, size=80).repeat(3)
        systems = [
            Answers(instances, tuple((int(wrong),) for wrong in draw.random(240) > ability * scale))
            for scale in (1.0, 0.8)
        ]
        held += paired(*systems, "part_correct", draws=3000).holds(0.5 * 0.2)
    assert 0.93 <= held / n <= 0.97


def test_one_against_itself_is_nothing_and_a_shared_ability_cancels():
    draw = np.random.default_rng(2)
    instances = compose.bundles(pools(60), 2)
    one = told(instances, lambda i, p: i.bundle % 2 == 0)
    assert paired(one, one).standard_error == 0
    better = told(instances, lambda i, p: i.bundle % 2 == 0 or draw.random() < 0.1)
    found = paired(better, one, "part_correct")
    assert found.low > 0
    assert found.standard_error < interval(one, "part_correct").standard_error / 2
    assert found.smallest == pytest.approx(2.8 * found.standard_error, rel=0.01)


def test_what_fusion_costs_beyond_what_composing_costs():
    instances = compose.bundles(pools(30), 2)
    alone = compose.singles(instances)
    full, base = told(alone, lambda i, p: True), told(alone, lambda i, p: True)
    fused, plain = told(instances, lambda i, p: p == 0), told(instances, lambda i, p: True)
    terms = [(1, full), (-1, fused), (-1, base), (1, plain)]
    assert contrast(terms, "part_correct").value == pytest.approx(0.5)


def test_systems_of_other_bundles_are_refused():
    instances = compose.bundles(pools(9), 2)
    with pytest.raises(UserError, match="different bundles"):
        paired(told(instances, lambda i, p: True), told(instances[:9], lambda i, p: True))
    with pytest.raises(UserError, match="two bundles of questions or more"):
        interval(told(instances[:9], lambda i, p: True))
    with pytest.raises(UserError, match="No statistic is called 'all'"):
        interval(told(instances, lambda i, p: True), "all")


def test_guessing_is_no_signal():
    draw = np.random.default_rng(3)
    instances = compose.bundles(pools(90), 2)
    guesses = {f"adapter {n}": told(instances, lambda i, p: draw.random() < 0.25) for n in range(4)}
    assert no_signal(list(guesses.values()))
    with pytest.raises(UserError, match="No signal"):
        require_signal(guesses)
    knows = guesses | {"base": told(instances, lambda i, p: draw.random() < 0.5)}
    require_signal(knows)
