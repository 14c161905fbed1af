"""Thresholds that meet a cost or are certified for a risk: by hand, against scipy, and by thousands of calibrations."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, entropy
from threshold_tables import make_table

from retouch.bound import needed, p_value, upper_bound
from retouch.errors import BoundRefused, SettingsError, UnknownName, UserError
from retouch.slim.base import Size, Widths
from retouch.slim.risk import approved, guarantee, losses, passed
from retouch.slim.rules import ALWAYS, Rule
from retouch.slim.table import leaving
from retouch.slim.thresholds import (
    Costs,
    Likeness,
    Risk,
    Table,
    choose,
    choose_rule,
    fit_temperatures,
    flops_costs,
    grid,
    likeness,
)

SIZE = Size(blocks=4, d_model=32, heads=4, d_ff=64, vocab=100, positions=64, token_types=2, classes=3)
WIDTHS = Widths.uniform(SIZE, 2, 24, 16)
RULE = Rule()


@pytest.fixture(scope="module")
def calib():
    return make_table(400, seed=1)


@pytest.fixture(scope="module")
def points():
    return grid(make_table(200, seed=2), RULE)


@pytest.fixture(scope="module")
def costs(calib):
    return flops_costs(calib, SIZE, WIDTHS, RULE)


@pytest.fixture(scope="module")
def original(calib):
    """As good as the deepest exit, and not the same."""
    return calib.logits[-1] + np.random.default_rng(4).normal(size=calib.logits[-1].shape)


# ------------------------------------------------ losses


def hand():
    """Four examples, two exits, two classes; labels all 0. Exit 0 answers 0 1 0 1, exit 1 and the original by turns."""
    pick = np.eye(2) * 5
    logits = np.stack([pick[[0, 1, 0, 1]], pick[[0, 0, 1, 1]]])
    return Table(logits, (0, 1), np.zeros(4, dtype=int), np.ones(4, dtype=int)), pick[[0, 0, 1, 0]]


WHERE = np.array([[1, 0]] * 4)


@pytest.mark.parametrize(
    ("loss", "reference", "deep", "early"),
    [
        ("gap", "original", [0, 0, 0, 1], [0, 1, -1, 1]),
        ("worse", "original", [0, 0, 0, 1], [0, 1, 0, 1]),
        ("flip", "original", [0, 0, 0, 1], [0, 1, 1, 1]),
        ("gap", "full_depth", [0, 0, 0, 0], [0, 1, -1, 0]),
        ("worse", "full_depth", [0, 0, 0, 0], [0, 1, 0, 0]),
        ("flip", "full_depth", [0, 0, 0, 0], [0, 1, 1, 0]),
    ],
)
def test_losses_by_hand(loss, reference, deep, early):
    table, original = hand()
    found = losses(table, WHERE, Risk(0.1, loss, reference), original=original)
    assert found.T.tolist() == [deep, early]


def test_the_loss_of_a_regression_is_a_share_of_the_range():
    table = Table(np.array([[[1.0], [2.0]], [[4.0], [2.5]]]), (0, 1), None, np.ones(2, dtype=int))
    where = np.array([[0, 1], [0, 1]])
    assert losses(table, where, Risk(0.1, "flip", "full_depth"), span=2.0).tolist() == [[1.0, 0.0], [0.25, 0.0]]
    original = np.array([[1.5], [2.0]])
    assert losses(table, where, Risk(0.1, "flip"), original=original, span=5.0).tolist() == [[0.1, 0.5], [0.0, 0.1]]


@pytest.mark.parametrize(
    ("table", "risk", "fields", "message"),
    [
        (make_table(4), Risk(0.1), {}, r"reference 'original' needs the original's logits of the shape \(4, 3\)"),
        (make_table(4), Risk(0.1), {"original": np.zeros((3, 3))}, r"got \(3, 3\)"),
        (make_table(4, labelled=False), Risk(0.1, "gap", "full_depth"), {}, "loss 'gap' needs labels.*loss='flip'"),
        (make_table(4, classes=1), Risk(0.1, "gap", "full_depth"), {}, "loss must be 'flip' for a regression"),
        (make_table(4, classes=1), Risk(0.1, "flip", "full_depth"), {}, "span must be the range"),
    ],
)
def test_what_a_loss_lacks_is_named(table, risk, fields, message):
    with pytest.raises(SettingsError, match=message):
        losses(table, np.full((4, 1), 3), risk, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"limit": 0.0}, "limit must"),
        ({"limit": math.nan}, "limit must"),
        ({"delta": 1.0}, "delta must"),
        ({"loss": "gap", "how": "crc"}, "loss must be 'worse' or 'flip'"),
        ({"loss": "gap", "method": "hoeffding_bentkus"}, "method must be 'betting'"),
    ],
)
def test_wrong_risks_name_the_field(fields, message):
    with pytest.raises(SettingsError, match=message):
        Risk(**({"limit": 0.1} | fields))
    for name in ("loss", "reference", "how"):
        with pytest.raises(UnknownName, match=name):
            Risk(0.1, **{name: "what"})


# ------------------------------------------------ bounds


@given(n=st.integers(2, 200), share=st.floats(0, 0.5), limit=st.floats(0.005, 0.9))
@settings(max_examples=60, deadline=None)
def test_hoeffding_bentkus_and_the_binomial_against_scipy(n, share, limit):
    harmed = int(n * share)
    x = np.r_[np.ones(harmed), np.zeros(n - harmed)]
    mean = min(harmed / n, limit)
    kl = entropy([mean, 1 - mean], [limit, 1 - limit])
    exact = binom.cdf(harmed, n, limit)
    assert p_value(x, limit, method="binomial") == pytest.approx(exact, rel=1e-9, abs=1e-12)
    wanted = min(1.0, math.exp(-n * kl), math.e * exact) if harmed / n < limit else 1.0
    assert p_value(x, limit) == pytest.approx(wanted, rel=1e-6, abs=1e-12)


REACH = {
    0.00: {100: 0.023, 300: 0.0076, 500: 0.0046, 1000: 0.0023, 2000: 0.0012},
    0.01: {100: 0.048, 300: 0.027, 500: 0.022, 1000: 0.018, 2000: 0.015},
    0.02: {100: 0.066, 300: 0.041, 500: 0.035, 1000: 0.030, 2000: 0.027},
}


@pytest.mark.parametrize("share", REACH)
def test_what_a_number_of_examples_can_certify(share):
    for n, limit in REACH[share].items():
        x = np.zeros(n)
        x[: round(share * n)] = 1
        bound = upper_bound(x, confidence=0.9, method="hoeffding_bentkus")
        assert bound == pytest.approx(limit, abs=0.6 * 10 ** -(len(str(limit)) - 2))


def test_what_is_expected_of_one_percent_of_losses():
    for n, limit in {100: 0.020, 300: 0.013, 500: 0.012, 1000: 0.011, 2000: 0.0105}.items():
        x = np.zeros((n, 1))
        x[: n // 100] = 1
        assert guarantee(x, 0, Risk(0.5, "worse", how="crc"), 2).upper == pytest.approx(limit, abs=5.5e-4)


def test_one_point_is_out_of_reach_of_400_examples_with_two_losses():
    risk = Risk(0.01, "worse")
    for n_losses in range(4):
        x = np.zeros((400, 1))
        x[:n_losses] = 1
        assert passed(x, risk, 2) == (n_losses < 2)


def test_conformal_risk_control_by_hand():
    """Four examples: means of the running maxima 0, 1/4, 2/4, 3/4 give (n mean + 1) / 5 of .2, .4, .6, .8."""
    values = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=float)
    for limit, count in ((0.19, 0), (0.2, 1), (0.39, 1), (0.4, 2), (0.6, 3), (0.79, 3), (0.8, 4)):
        assert passed(values, Risk(limit, "flip", how="crc"), 2) == count, limit
        assert passed(values, Risk(limit, "flip", "full_depth", how="crc"), 2) == max(1, count)
    proof = guarantee(values, 2, Risk(0.6, "flip", how="crc"), 2)
    assert (proof.n, proof.mean, proof.upper, proof.holds) == (4, 0.5, 0.6, True)
    assert "In expectation the mean of answers changed is at most 0.6, within" in proof.sentence()


def test_the_walk_never_jumps_over_a_failure():
    values = np.zeros((200, 4))
    values[:100, 2] = 1
    for how in ("ucb", "ltt"):
        assert passed(values, Risk(0.05, "flip", how=how), 2) == 2
    assert approved(values, Risk(0.05, "flip", how="ltt"), 2).tolist() == [True, True, False, True]


@pytest.mark.parametrize("fields", [{}, {"loss": "worse"}, {"loss": "flip", "method": "hoeffding_bentkus"}])
def test_what_is_passed_has_a_bound_within_the_limit(calib, points, original, fields):
    risk = Risk(0.12, **fields)
    values = losses(calib, leaving(calib, RULE, points), risk, original=original)
    count = passed(values, risk, 3)
    assert 1 < count < len(points)
    bounds = [guarantee(values, i, risk, 3).upper for i in range(count + 1)]
    assert max(bounds[:-1]) <= risk.limit < bounds[-1]


def test_bonferroni_asks_more_of_each_point():
    values = np.zeros((60, 3))
    assert approved(values[:, :1], Risk(0.05, "flip"), 2).all()
    assert not approved(values, Risk(0.05, "flip"), 2).any()


# ------------------------------------------------ the promise, by simulation


def population(kind, n=4000, m=7):
    """Losses of a population along a grid on which ever more examples leave, and their true means."""
    g = np.random.default_rng(8)
    when, spoilt, gained = g.random((n, 1)), g.random((n, 1)) < 0.14, g.random((n, 1)) < 0.05
    left = when < np.linspace(0, 1, m) ** 2
    worse = (spoilt & left).astype(float)
    return worse - (gained & ~spoilt & left) if kind == "gap" else worse


@pytest.mark.parametrize(
    ("loss", "how", "method"),
    [
        ("worse", "ucb", "binomial"),
        ("worse", "ltt", "hoeffding_bentkus"),
        ("worse", "ucb", "betting"),
        ("gap", "ucb", "betting"),
    ],
)
def test_of_2000_calibrations_no_more_than_delta_choose_a_threshold_that_is_too_risky(loss, how, method):
    pool, runs, n = population(loss), 2000, 120
    risk = Risk(0.06, loss, how=how, method=method, delta=0.1)
    truth, g = pool.mean(axis=0), np.random.default_rng(3)
    chosen = [passed(pool[g.integers(0, len(pool), n)], risk, 2) - 1 for _ in range(runs)]
    misses = np.mean([c >= 0 and truth[c] > risk.limit for c in chosen])
    assert misses <= risk.delta + 0.02  # three standard errors
    assert np.mean(chosen) > 1, "a bound that always refuses would hold as well"


def test_conformal_risk_control_holds_on_average_over_2000_calibrations():
    pool, n = population("worse"), 120
    risk = Risk(0.06, "worse", how="crc")
    truth, g = pool.mean(axis=0), np.random.default_rng(3)
    chosen = np.array([passed(pool[g.integers(0, len(pool), n)], risk, 2) - 1 for _ in range(2000)])
    assert chosen.min() >= 0
    assert 0.03 < truth[chosen].mean() <= 0.06 + 3 * truth[chosen].std() / math.sqrt(2000)


# ------------------------------------------------ a budget


@given(budget=st.floats(0.02, 1.2), seed=st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_the_budget_takes_the_smallest_threshold_that_meets_it(budget, seed):
    table = make_table(60, seed=seed)
    spent = flops_costs(table, SIZE, WIDTHS, RULE)
    lambdas = grid(make_table(60, seed=seed + 100), RULE)
    found = choose(table, RULE, lambdas, budget=budget, costs=spent)
    shares = spent.share(leaving(table, RULE, lambdas))
    if shares[-1] > budget:
        assert not found.reachable and found.value is None and found.saved == 0.0
        assert found.nearest == pytest.approx(shares[-1])
        assert "is out of reach" in found.reason and "block 0" in found.reason
    else:
        index = lambdas.tolist().index(found.value)
        assert shares[index] <= budget and (index == 0 or shares[index - 1] > budget)
        assert found.cost == pytest.approx(shares[index])
        assert found.exit_layer == pytest.approx(sum((l + 1) * share for l, share in found.leaves.items()))


def test_a_confident_budget_is_more_careful_and_says_what_it_proves(calib, points, costs):
    plain = choose(calib, RULE, points, budget=0.2, costs=costs)
    sure = choose(calib, RULE, points, budget=0.2, costs=costs, confidence=0.95)
    assert sure.value > plain.value and sure.cost_certificate.holds
    assert plain.cost_certificate is None
    assert "shares of the original's cost" in sure.cost_certificate.sentence()


def test_a_confident_budget_that_too_few_examples_show_says_so():
    table = make_table(5)
    spent = flops_costs(table, SIZE, WIDTHS, RULE)
    plain = choose(table, RULE, [0.0, 0.5, ALWAYS], budget=0.2, costs=spent)
    assert plain.reachable
    found = choose(table, RULE, [0.0, 0.5, ALWAYS], budget=0.2, costs=spent, confidence=0.95)
    assert not found.reachable and found.nearest > 0.2 and "measure more examples" in found.reason


def test_a_generous_budget_needs_no_exits(calib, points, costs):
    found = choose(calib, RULE, points, budget=1.0, costs=costs)
    assert (found.value, found.exit_layer, found.leaves[3]) == (0.0, 4.0, 1.0)


def test_a_budget_of_seconds(calib, points):
    clock = Costs(np.tile(np.arange(1.0, 5.0), (calib.n, 1)), np.full(calib.n, 8.0))
    found = choose(calib, RULE, points, budget=0.25, costs=clock)
    assert found.cost == pytest.approx(found.exit_layer / 8) and found.exit_layer <= 2


# ------------------------------------------------ a risk


def test_a_risk_takes_the_fastest_certified_threshold(calib, points, original, costs):
    found = choose(calib, RULE, points, risk=Risk(0.12), original=original, costs=costs)
    assert found.reachable and found.value == max(found.certified) > 0
    assert found.certificate.holds and found.certificate.confidence == 0.9
    assert found.cost < choose(calib, RULE, points, budget=1.0, costs=costs).cost
    json.loads(json.dumps(found.to_dict()))
    found.require()


def test_a_larger_limit_is_never_slower(calib, points, original):
    for fields in ({}, {"loss": "worse"}, {"loss": "worse", "how": "crc"}):
        values = [
            choose(calib, RULE, points, risk=Risk(limit, **fields), original=original).value or 0.0
            for limit in (0.02, 0.05, 0.1, 0.2, 0.5)
        ]
        assert values == sorted(values) and values[-1] > 0


def test_no_loss_at_all_lets_everybody_leave_at_once():
    table = make_table(50)
    same = Table(np.tile(table.logits[-1], (4, 1, 1)), table.exits, table.labels, table.lengths)
    for risk in (Risk(0.1, "flip"), Risk(0.1), Risk(0.1, "flip", how="crc")):
        found = choose(same, RULE, [0.0, 0.5, ALWAYS], risk=risk, original=same.logits[-1])
        assert found.value == ALWAYS and found.exit_layer == 1.0


def test_too_few_examples_are_a_reason_with_a_way_out():
    table = make_table(20)
    same = Table(np.tile(table.logits[-1], (4, 1, 1)), table.exits, table.labels, table.lengths)
    for risk, least in ((Risk(0.02, "worse"), needed(0.02, 0.9, method="binomial")), (
        Risk(0.02, "worse", how="crc"), 49)):  # fmt: skip
        found = choose(same, RULE, [0.0, ALWAYS], risk=risk, original=same.logits[-1])
        assert (found.value, found.reachable, found.saved) == (None, False, 0.0)
        assert f"20 examples cannot show a limit of 0.02 even without any loss: {least} are needed" in found.reason
        assert found.nearest == found.certificate.upper > 0.02 and not found.certificate.holds
        assert found.to_dict()["certificate"]["holds"] is False
        with pytest.raises(BoundRefused, match="20 examples") as caught:
            found.require()
        assert caught.value.exit_code == 3


def test_a_limit_below_one_over_n_plus_one_is_unreachable_in_expectation():
    table = make_table(9)
    same = Table(np.tile(table.logits[-1], (4, 1, 1)), table.exits, table.labels, table.lengths)
    for limit, reachable in ((0.0999, False), (0.1, True)):
        risk = Risk(limit, "flip", how="crc")
        assert choose(same, RULE, [0.0, ALWAYS], risk=risk, original=same.logits[-1]).reachable is reachable


def test_a_slim_model_that_is_bad_at_full_depth_is_a_reason(calib, points):
    right = np.eye(3)[calib.labels]
    worse = Table(calib.logits[:, :, [1, 2, 0]], calib.exits, calib.labels, calib.lengths)
    found = choose(worse, RULE, points, risk=Risk(0.05), original=right)
    assert not found.reachable and "exceeds the limit at full depth" in found.reason
    assert found.nearest > 0.5 and found.certified == ()


def test_against_full_depth_never_leaving_is_always_allowed():
    table = make_table(8)
    flipped = Table(np.concatenate([-table.logits[:3], table.logits[3:]]), table.exits, table.labels, table.lengths)
    for how in ("ucb", "crc"):
        found = choose(flipped, RULE, [0.0, 0.9, ALWAYS], risk=Risk(0.01, "flip", "full_depth", how=how))
        assert found.reachable and found.value == 0.0
        assert "No saving is certified" in found.reason


def test_a_regression_has_a_threshold():
    calib, valid = make_table(500, classes=1, seed=1), make_table(300, classes=1, seed=2)
    for rule in (Rule("delta"), Rule("patience", tolerance=0.4)):
        risk = Risk(0.05, "flip", "full_depth")
        found = choose(calib, rule, grid(valid, rule), risk=risk, span=6.0)
        assert found.reachable and found.value > 0 and found.exit_layer < 4
        assert found.certificate.method == "betting" and "distances to the reference" in found.certificate.what


# ------------------------------------------------ both


def test_a_cost_and_a_risk_that_agree_take_the_most_careful_threshold_of_the_cost(calib, points, costs, original):
    risk = Risk(0.15, "worse")
    alone = choose(calib, RULE, points, budget=0.25, costs=costs)
    both = choose(calib, RULE, points, budget=0.25, costs=costs, risk=risk, original=original)
    assert both.reachable and both.value == alone.value
    assert both.value in both.certified and both.certificate.holds and max(both.certified) >= both.value


def test_a_cost_and_a_risk_that_exclude_one_another_show_both_numbers(calib, points, costs, original):
    safe = choose(calib, RULE, points, risk=Risk(0.06), original=original, costs=costs)
    cheap = choose(calib, RULE, points, budget=0.13, costs=costs)
    both = choose(calib, RULE, points, budget=0.13, costs=costs, risk=Risk(0.06), original=original)
    assert safe.reachable and cheap.reachable and safe.cost > 0.13
    assert (both.value, both.reachable, both.nearest) == (None, False, safe.cost)
    assert f"{safe.cost:.4g} of the original, above the budget of 0.13" in both.reason
    assert f"{cheap.value:.4g}, has a risk of up to" in both.reason
    assert both.certified == safe.certified


def test_the_first_threshold_that_is_not_certified_is_refused_and_the_last_that_is_taken(
    calib, points, costs, original
):
    risk = Risk(0.06)
    shares = costs.share(leaving(calib, RULE, points))
    n_safe = len(choose(calib, RULE, points, risk=risk, original=original).certified)
    assert shares[n_safe] < shares[n_safe - 1] < shares[n_safe - 2]
    for index, reachable in ((n_safe - 1, True), (n_safe, False)):
        found = choose(calib, RULE, points, budget=float(shares[index]), costs=costs, risk=risk, original=original)
        assert found.reachable is reachable and found.value == (points[index] if reachable else None)


def test_both_with_a_budget_that_nobody_meets(calib, points, costs, original):
    both = choose(calib, RULE, points, budget=0.001, costs=costs, risk=Risk(0.1), original=original)
    assert not both.reachable and "no threshold meets the budget" in both.reason


# ------------------------------------------------ several rules


def test_the_cheapest_of_several_rules_at_a_corrected_confidence(calib, original):
    rules = [Rule(), Rule("margin"), Rule("patience"), Rule(every=2)]
    valid = make_table(200, seed=2)
    candidates = [(rule, grid(valid, rule, n_points=10)) for rule in rules]
    spent = [flops_costs(calib, SIZE, WIDTHS, rule) for rule in rules]
    n_points = sum(len(lambdas) for _, lambdas in candidates)
    found = choose_rule(calib, candidates, Risk(0.2, "worse", how="ltt"), spent, original=original)
    assert found.reachable and found.rule in rules and found.certificate.holds
    assert found.certificate.confidence == pytest.approx(1 - 0.1 / n_points)
    none = choose_rule(calib, candidates, Risk(0.001, "worse", how="ltt"), spent, original=original)
    assert not none.reachable and "cannot show a limit of 0.001" in none.reason
    with pytest.raises(SettingsError, match="how must be 'ltt'"):
        choose_rule(calib, candidates, Risk(0.2), spent, original=original)


# ------------------------------------------------ settings and likeness


def test_what_there_is_to_choose_by_must_be_given(calib, points, costs):
    with pytest.raises(SettingsError, match="budget or risk must be given"):
        choose(calib, RULE, points)
    for budget, spent in ((0.5, None), (0.0, costs), (math.nan, costs)):
        with pytest.raises(SettingsError, match="budget must be above 0 and come with costs"):
            choose(calib, RULE, points, budget=budget, costs=spent)
    for wrong in ([], [0.1, 0.5], [0.0, 0.5, 0.4], [0.0, 0.5, 0.5], [0.0, math.nan]):
        with pytest.raises(UserError, match="must begin with 0 and rise"):
            choose(calib, RULE, wrong, budget=0.5, costs=costs)


def test_softmax_rules_on_a_regression_name_the_field():
    table = make_table(10, classes=1)
    with pytest.raises(SettingsError, match="rule must be 'patience' or 'delta'"):
        choose(table, RULE, [0.0, 1.0], budget=0.5, costs=Costs(np.ones((10, 4)), np.ones(10)))


def test_temperatures_belong_to_the_rule_and_are_used(calib):
    rule = Rule(temperatures=fit_temperatures(make_table(300, seed=2)))
    assert rule.temperatures != (1.0,) * 4
    warm, plain = (leaving(calib, r, [0.3]) for r in (rule, RULE))
    assert (warm != plain).any()


def test_likeness_warns_where_the_lengths_differ_by_more_than_a_quarter(calib):
    def of_length(n):
        return Table(calib.logits, calib.exits, None, np.full(calib.n, n))

    for length, alike in ((16, True), (20, True), (25, True), (26, False), (14, False)):
        found = likeness(of_length(20), of_length(length), RULE)
        assert found.alike is alike and found.calib_unsure == found.use_unsure
        assert ("certificates may not hold" in found.sentence()) is not alike
    assert "20.0 tokens where the threshold was chosen, 30.0 in use" in Likeness(20, 30, 0.1, 0.2).sentence()
