"""Curves of quality against cost, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from retouch.errors import UserError
from retouch.slim.points import Point, area, at_drop, best_so_far, curve, leavers
from retouch.slim.rules import ALWAYS, Rule
from retouch.slim.table import Costs, Table, leaving, unsure


def _table() -> Table:
    # Two exits, four examples: the first exit is sure and right, sure and wrong, unsure and wrong, unsure and right.
    first = [[4.0, 0.0], [4.0, 0.0], [0.3, 0.0], [0.0, 0.2]]
    last = [[5.0, 0.0], [0.0, 5.0], [0.0, 5.0], [0.0, 5.0]]
    return Table(np.array([first, last]), (0, 1), np.array([0, 1, 1, 1]), np.array([3, 4, 5, 6]))


def _costs() -> Costs:
    return Costs(np.tile([1.0, 2.0], (4, 1)), np.full(4, 4.0))


def test_a_curve_is_what_each_threshold_gives():
    never, half, always = curve(_table(), Rule("max_prob"), [0.0, 0.5, ALWAYS], _costs(), "accuracy", 1.0)
    assert (never.quality, never.flops_ratio, never.exit_layer) == (1.0, 0.5, 2.0)
    assert (half.quality, half.flops_ratio, half.exit_layer) == (0.75, 0.375, 1.5)
    assert half.leaves == {0: 0.5, 1: 0.5}
    assert half.quality_at == {0: 0.5, 1: 1.0}
    assert (always.quality, always.flops_ratio) == (0.5, 0.25)
    assert always.quality_at == {0: 0.5, 1: None}
    assert curve(_table(), Rule("max_prob"), [0.5], _costs(), "accuracy", 0.9)[0].quality_kept == pytest.approx(
        0.75 / 0.9
    )


def _point(cost: float, quality: float) -> Point:
    return Point(0.5, quality, quality, cost, 1.0, {}, {})


def test_area_is_that_under_the_best_so_far():
    points = [_point(0.1, 0.5), _point(0.2, 0.4), _point(0.3, 0.7)]
    assert best_so_far(points) == [(0.1, 0.5), (0.3, 0.7)]
    assert area(points, 0.1, 0.3) == pytest.approx(0.6)
    assert area(points, 0.1, 0.5) == pytest.approx((0.6 * 0.2 + 0.7 * 0.2) / 0.4)
    assert area([_point(0.1, 0.5)], 0.2, 0.3) == pytest.approx(0.5)
    with pytest.raises(UserError, match="cheapest"):
        area(points, 0.05, 0.3)


def test_a_small_drop_takes_the_cheapest_point_within_it():
    points = [_point(0.1, 0.50), _point(0.2, 0.69), _point(0.3, 0.70)]
    assert at_drop(points, 0.01) == points[1]
    assert at_drop(points, 0.0) == points[2]
    assert at_drop([], 0.1) is None


def test_those_shown_leave_surest_first_and_most_unsure_last():
    table, rule = _table(), Rule("max_prob")
    where = leaving(table, rule, [0.5])[:, 0]
    assert leavers(where, unsure(table, rule), 1) == {"early": [0], "late": [2]}


def test_no_labels_no_quality():
    bare = Table(_table().logits, (0, 1), None, np.array([3, 4, 5, 6]))
    with pytest.raises(UserError, match="no labels"):
        curve(bare, Rule("max_prob"), [0.0], _costs(), "accuracy", 1.0)
