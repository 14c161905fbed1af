"""Draws of a split: weighted quality is that of repeated rows, areas are those of the curve, verdicts are careful."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch.errors import UnknownName, UserError
from retouch.slim.data import quality
from retouch.slim.paired import Difference, Draws, areas, compare, draw, qualities, shared
from retouch.slim.points import Point, area, best_so_far
from retouch.slim.table import Costs, Table


@given(st.integers(0, 10_000), st.sampled_from(["accuracy", "f1", "mcc", "spearman"]), st.sampled_from([2, 3]))
@settings(max_examples=60, deadline=None)
def test_a_row_that_counts_twice_is_a_row_given_twice(seed, metric, classes):
    chance = np.random.default_rng(seed)
    n, of = 12, 1 if metric == "spearman" else classes
    answers = chance.integers(classes, size=(n, 3)) if of > 1 else chance.integers(4, size=(n, 3)) / 3
    labels = chance.integers(classes, size=n)
    weights = chance.multinomial(n, np.full(n, 1 / n), size=5).astype(float)
    found = qualities(metric, weights, answers, labels, of)
    for one, row in zip(weights, found):
        rows = np.repeat(np.arange(n), one.astype(int))
        want = [quality(metric, answers[rows, i], labels[rows], classes if of > 1 else None) for i in range(3)]
        np.testing.assert_allclose(row, want, atol=1e-12)


def test_an_unknown_metric_is_named():
    with pytest.raises(UnknownName, match="accurcy"):
        qualities("accurcy", np.ones((1, 2)), np.zeros((2, 1)), np.zeros(2), 2)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 10)), min_size=1, max_size=12, unique_by=lambda p: p[0]),
    st.integers(0, 20),
    st.integers(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_areas_are_those_of_the_curve(places, start, wide):
    points = [Point(0.0, y / 10, 0.0, x / 40, 1.0, {}, {}) for x, y in places]
    low = best_so_far(points)[0][0] + start / 40
    falling = sorted(points, key=lambda p: -p.flops_ratio)
    x, y = (np.array([[getattr(p, name) for p in falling]]) for name in ("flops_ratio", "quality"))
    assert areas(x, y, low, low + wide / 40)[0] == pytest.approx(area(points, low, low + wide / 40), abs=1e-12)


def _table(right: list[list[int]], lengths: list[int] | None = None) -> Table:
    """Exits whose answers are right where it says 1; the label is always 1."""
    logits = np.array([[[0.0, 1.0] if r else [1.0, 0.0] for r in row] for row in right])
    n = logits.shape[1]
    return Table(logits, tuple(range(len(right))), np.ones(n, dtype=int), np.array(lengths or [4] * n))


def _drawn(right: list[list[int]], spent: list[float], **more: int) -> Draws:
    """Nobody, then everybody leaves at the first exit; nobody is chosen."""
    table = _table(right)
    last = len(right) - 1
    where = np.array([[last, 0, last]] * table.n)
    return draw(table, where, Costs(np.tile(spent, (table.n, 1)), np.ones(table.n)), "accuracy", **more)


def test_the_first_draw_is_the_split_itself():
    found = _drawn([[1, 0, 0, 1], [1, 1, 1, 0]], [0.1, 0.3], n_draws=50)
    assert found.qualities.shape == (51, 2)
    assert found.qualities[0].tolist() == [0.75, 0.5]
    assert found.costs[0] == pytest.approx([0.3, 0.1])
    assert found.chosen[0] == 0.75
    assert found.chosen_cost == pytest.approx(0.3)
    assert found.span == pytest.approx((0.1, 0.3))
    assert len(np.unique(found.chosen)) > 2


def test_the_error_of_a_mean_is_the_one_of_the_books():
    right = [[int(i % 5 > 0) for i in range(200)]] * 2
    found = _drawn(right, [0.1, 0.3], n_draws=4000)
    assert found.chosen[1:].std() == pytest.approx(np.sqrt(0.8 * 0.2 / 200), rel=0.06)


def test_the_same_model_never_differs():
    one = _drawn([[1, 0, 0, 1], [1, 1, 1, 0]], [0.1, 0.3])
    for found in compare("a", [one], "b", [one]):
        assert (found.difference, found.standard_error, found.verdict) == (0.0, 0.0, "no difference")
    assert [d.metric for d in compare("a", [one], "b", [one])] == ["quality", "quality_at_cost", "quality_auc"]


def test_draws_are_paired():
    good, bad = [1] * 60 + [0] * 40, [1] * 55 + [0] * 45
    a, b = (_drawn([row, row], [0.1, 0.3], n_draws=2000) for row in (good, bad))
    found = compare("a", [a], "b", [b])[0]
    assert found.difference == pytest.approx(0.05)
    assert found.standard_error == pytest.approx(np.sqrt(0.05 * 0.95 / 100), rel=0.1)  # unpaired it would be 0.07
    assert found.verdict == "higher"
    assert compare("b", [b], "a", [a])[0].verdict == "lower"


def test_several_seeds_widen_the_error():
    base = _drawn([[1] * 90 + [0] * 10] * 2, [0.1, 0.3])
    seeds = [_drawn([[1] * k + [0] * (100 - k)] * 2, [0.1, 0.3]) for k in (99, 81)]
    one = compare("a", [seeds[0]], "b", [base])[0]
    both = compare("a", seeds, "b", [base, base])[0]
    assert both.difference == pytest.approx(0.0, abs=1e-12)
    assert both.standard_error > 0.09 > one.standard_error


def test_a_model_of_one_cost_has_no_area_but_a_quality_at_its_cost():
    curve = _drawn([[1, 0, 0, 0], [1, 1, 1, 0]], [0.1, 0.3])
    cheap, dear = _drawn([[1, 1, 0, 0]], [0.2]), _drawn([[1, 1, 1, 1]], [0.05])
    assert not cheap.is_curve
    found = {d.metric: d.difference for d in compare("a", [curve], "b", [cheap])}
    assert found == {"quality": 0.25, "quality_at_cost": pytest.approx(-0.25)}
    assert [d.metric for d in compare("a", [curve], "b", [dear])] == ["quality"]
    assert shared([curve, cheap]) is None


def test_curves_without_a_common_cost_have_no_area():
    one, other = (_drawn([[1, 0], [1, 1]], spent) for spent in ([0.1, 0.3], [0.4, 0.9]))
    assert shared([one, other]) is None
    assert shared([one, one]) == pytest.approx((0.1, 0.3))


@pytest.mark.parametrize(
    ("difference", "error", "verdict"),
    [(0.02, 0.011, "no difference"), (0.02, 0.009, "higher"), (-0.02, 0.009, "lower"), (0.0, 0.0, "no difference")],
)
def test_below_two_standard_errors_there_is_no_difference(difference, error, verdict):
    assert Difference("a", "b", "quality", difference, error).verdict == verdict


def test_many_examples_are_drawn_in_parts(monkeypatch):
    from retouch.slim import paired

    right = [[1, 0, 1, 0, 1], [1, 1, 1, 0, 1]]
    monkeypatch.setattr(paired, "_CELLS", 15)
    found = _drawn(right, [0.1, 0.3], n_draws=10)
    assert found.qualities.shape == (11, 2)
    again = _drawn(right, [0.1, 0.3], n_draws=10)
    assert (found.qualities == again.qualities).all()
    assert (found.qualities != _drawn(right, [0.1, 0.3], n_draws=10, seed=1).qualities).any()


def test_no_labels_no_comparison():
    bare = Table(np.zeros((1, 2, 2)), (0,), None, np.array([3, 4]))
    with pytest.raises(UserError, match="no labels"):
        draw(bare, np.zeros((2, 1), dtype=int), Costs(np.ones((2, 1)), np.ones(2)), "accuracy")
