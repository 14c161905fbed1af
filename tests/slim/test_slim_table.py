"""Temperatures, grids, who leaves where and at what cost, on tables of logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from threshold_tables import make_table

from retouch.errors import SettingsError, UserError
from retouch.slim.base import Size, Widths
from retouch.slim.rules import ALWAYS, Rule, advance, due, uncertainty
from retouch.slim.table import Costs, Table, fit_temperatures, flops_costs, grid, leaving, scan, unsure

CLASS_RULES = ["entropy", "max_prob", "margin", "patience"]
NUMBER_RULES = ["patience", "delta"]
LAMBDAS = [0.0, 0.05, 0.2, 0.4, 0.6, 0.75, 0.9, 1.0, ALWAYS]
settings_of_a_rule = st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(0, 30), st.booleans())
SIZE = Size(blocks=4, d_model=32, heads=4, d_ff=64, vocab=100, positions=64, token_types=2, classes=3)


def slowly(table, rule, threshold):
    """The definition, an example and an exit at a time."""
    where = []
    for i in range(table.n):
        state = None
        for block in rule.due(table.exits):
            s = table.exits.index(block)
            state = advance(state, table.logits[s, i : i + 1], rule.tolerance)
            heat = 1.0 if rule.temperatures is None else rule.temperatures[s]
            if uncertainty(rule.name, state, table.n_blocks, heat)[0] < threshold:
                break
        where.append(block)
    return where


@given(given_rule=settings_of_a_rule, exits=st.sampled_from([(0, 1, 2, 3), (1, 3), (0, 2, 3), (3,)]))
@settings(max_examples=25, deadline=None)
def test_the_scan_is_the_obvious_loop(given_rule, exits):
    every, min_block, seed, heated = given_rule
    for names, classes in ((CLASS_RULES, 3), (NUMBER_RULES, 1)):
        table = make_table(12, exits, classes, seed)
        heat = tuple(0.5 + l for l in range(len(exits))) if heated else None
        for name in names:
            rule = Rule(name, heat, every, min_block, tolerance=0.5)
            where = scan(table, name, LAMBDAS, every, min_block, temperatures=heat, tolerance=0.5)
            assert where.T.tolist() == [slowly(table, rule, threshold) for threshold in LAMBDAS]


@given(given_rule=settings_of_a_rule)
@settings(max_examples=25, deadline=None)
def test_a_larger_threshold_never_deepens_an_exit_and_never_costs_more(given_rule):
    every, min_block, seed, _ = given_rule
    widths = Widths.uniform(SIZE, 2, 24, 16)
    for names, classes in ((CLASS_RULES, 3), (NUMBER_RULES, 1)):
        table = make_table(30, classes=classes, seed=seed)
        for name in names:
            rule = Rule(name, every=every, min_block=min_block)
            where = leaving(table, rule, grid(table, rule))
            assert (np.diff(where, axis=1) <= 0).all()
            assert (where[:, 0] == 3).all() and (where[:, -1] == rule.due(table.exits)[0]).all()
            assert (np.diff(flops_costs(table, SIZE, widths, rule).share(where)) <= 0).all()


def test_a_tie_with_the_threshold_stays():
    table = Table(np.zeros((2, 3, 2)), (0, 1), None, np.ones(3, dtype=int))
    assert scan(table, "entropy", [1.0, np.nextafter(1.0, 2)]).tolist() == [[1, 0]] * 3


def test_no_number_never_leaves_and_does_not_stop_a_later_exit():
    logits = np.array([[[math.nan, 0.0]], [[9.0, 0.0]], [[9.0, 0.0]]])
    table = Table(logits, (0, 1, 2), None, np.ones(1, dtype=int))
    assert scan(table, "entropy", [0.5, ALWAYS]).tolist() == [[1, 1]]


def test_the_last_exit_alone_answers_all():
    table = make_table(5, exits=(3,))
    rule = Rule()
    assert grid(table, rule).tolist() == [0.0, ALWAYS]
    assert (leaving(table, rule, [0.0, 0.5, ALWAYS]) == 3).all()


def test_what_is_taken_stands_where_it_was_taken():
    table = make_table(6, exits=(1, 3, 5))
    where = np.array([1, 3, 5, 5, 3, 1])
    wanted = [table.logits[[0, 1, 2, 2, 1, 0][i], i].tolist() for i in range(6)]
    assert table.taken(where).tolist() == wanted
    both = table.taken(np.stack([where, np.full(6, 5)], axis=1), table.answers())
    assert both[:, 0].tolist() == [int(np.argmax(z)) for z in wanted]
    assert both[:, 1].tolist() == table.logits[2].argmax(axis=1).tolist()


# ------------------------------------------------ grids


@pytest.mark.parametrize("name", ["entropy", "max_prob", "margin"])
def test_the_grid_holds_quantiles_between_never_and_always(name):
    table, rule = make_table(200), Rule(name)
    points = grid(table, rule)
    assert points[0] == 0.0 and points[-1] == ALWAYS and len(points) <= 102
    assert (np.diff(points) > 0).all()
    u = unsure(table, rule)[:-1]
    assert points[1] == max(u.min(), points[1]) and points[-2] == u.max()
    assert np.mean(u <= np.median(points)) == pytest.approx(0.5, abs=0.02)


def test_the_grid_of_patience_separates_every_count():
    table, rule = make_table(300), Rule("patience")
    points = grid(table, rule)
    assert points.tolist() == [0.0, 1 - 1.5 / 4, 1 - 0.5 / 4, ALWAYS]
    where = leaving(table, rule, points)
    assert where.min(axis=0).tolist() == [3, 2, 1, 0]


# ------------------------------------------------ temperatures


def test_temperatures_are_the_best_fit():
    table = make_table(400, seed=3)
    for s, heat in enumerate(fit_temperatures(table)):
        z = table.logits[s]

        def nll(ln_t, z=z):
            return -log_softmax(z / math.exp(ln_t), axis=1)[np.arange(400), table.labels].mean()

        best = minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
        assert math.log(heat) == pytest.approx(best.x, abs=1e-5)


def test_temperatures_undo_a_scale_and_change_no_answer():
    table = make_table(300, seed=5)
    hot = Table(table.logits * 4, table.exits, table.labels, table.lengths)
    one, four = np.array(fit_temperatures(table)), np.array(fit_temperatures(hot))
    assert four / one == pytest.approx([4.0] * 4, rel=1e-5)
    assert unsure(hot, Rule(temperatures=tuple(four))) == pytest.approx(
        unsure(table, Rule(temperatures=tuple(one))), abs=1e-5
    )


def test_temperatures_stay_in_their_range_where_the_labels_are_all_met():
    logits = np.tile(np.array([[3.0, 0.0], [0.0, 3.0]]), (1, 1, 1))
    right = Table(logits, (0,), np.array([0, 1]), np.ones(2, dtype=int))
    wrong = Table(logits, (0,), np.array([1, 0]), np.ones(2, dtype=int))
    assert fit_temperatures(right)[0] == pytest.approx(math.exp(-3), rel=1e-4)
    assert fit_temperatures(wrong)[0] == pytest.approx(math.exp(3), rel=1e-4)


def test_temperatures_of_huge_logits_of_a_regression_and_without_labels():
    table = make_table(20)
    huge = Table(np.sign(table.logits) * 1e4, table.exits, table.labels, table.lengths)
    assert all(math.isfinite(t) for t in fit_temperatures(huge))
    assert fit_temperatures(make_table(20, classes=1)) == (1.0,) * 4
    with pytest.raises(UserError, match="have none"):
        fit_temperatures(make_table(20, labelled=False))


# ------------------------------------------------ costs


def test_costs_count_the_exits_that_are_asked():
    table = make_table(8)
    widths = Widths.uniform(SIZE, 2, 24, 16)
    head = 2 * SIZE.d_model * SIZE.classes
    every1, every2 = (flops_costs(table, SIZE, widths, Rule(every=k)) for k in (1, 2))
    assert (every1.spent - every2.spent)[:, [1, 3]].tolist() == [[head, 2 * head]] * 8
    assert due(table.exits, 2) == (1, 3)


def test_the_share_is_of_totals_and_the_ratio_of_each():
    costs = Costs(np.array([[1.0, 2.0], [10.0, 30.0]]), np.array([4.0, 40.0]))
    where = np.array([[1, 0], [1, 1]])
    assert costs.share(where).tolist() == [32 / 44, 31 / 44]
    assert costs.ratios(where).tolist() == [[0.5, 0.25], [0.75, 0.75]]
    assert costs.highest() == 1.0
    assert Costs(np.array([[1.0, 5.0]]), np.array([4.0])).highest() == 1.25


# ------------------------------------------------ traps


def test_wrong_tables_are_refused():
    logits, ones = np.zeros((2, 3, 2)), np.ones(3, dtype=int)
    for wrong in (np.zeros((0, 3, 2)), np.zeros((2, 0, 2)), np.zeros((2, 3))):
        with pytest.raises(UserError, match="none of them 0"):
            Table(wrong, (0, 1), None, ones)
    with pytest.raises(UserError, match="table's exits must have 2"):
        Table(logits, (0, 1, 2), None, ones)
    with pytest.raises(UserError, match="table's labels must have 3"):
        Table(logits, (0, 1), np.zeros(2), ones)
    with pytest.raises(UserError, match="table's lengths must have 3"):
        Table(logits, (0, 1), None, ones[:2])


@pytest.mark.parametrize("name", ["entropy", "max_prob", "margin"])
def test_softmax_rules_on_a_regression_name_the_field(name):
    with pytest.raises(SettingsError, match="rule must be 'patience' or 'delta'"):
        scan(make_table(4, classes=1), name, [0.5])
