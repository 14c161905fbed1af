"""Certificates against simulations and exact cases; the multiplier against problems with a known answer."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from retouch.bound import Certificate, Multiplier, certify, needed, p_value, require, upper_bound
from retouch.errors import BoundRefused, UnknownName, UserError

METHODS = ["betting", "hoeffding_bentkus"]
methods = pytest.mark.parametrize("method", METHODS)
harms01 = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def hoeffding(x, confidence=0.95):
    return np.mean(x) + math.sqrt(math.log(1 / (1 - confidence)) / (2 * len(x)))


# ------------------------------------------------ the promise

DRAWS = {
    "bernoulli 0.02": (0.02, lambda g, n: (g.random(n) < 0.02).astype(float)),
    "bernoulli 0.4": (0.4, lambda g, n: (g.random(n) < 0.4).astype(float)),
    "beta": (0.5 / 10.5, lambda g, n: g.beta(0.5, 10, n)),
    "points": (0.3 * 0.1 + 0.1, lambda g, n: g.choice([0.0, 0.1, 1.0], n, p=[0.6, 0.3, 0.1])),
}


@methods
@pytest.mark.parametrize("draw", DRAWS)
def test_the_bound_fails_no_more_often_than_it_says(method, draw):
    """400 draws; more than 5 % + 3 standard errors of failures would refute the confidence."""
    mean, sample = DRAWS[draw]
    g, runs, delta = np.random.default_rng(11), 400, 0.1
    failed = sum(upper_bound(sample(g, 50), confidence=1 - delta, method=method, seed=i) < mean for i in range(runs))
    assert failed / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)


@methods
def test_a_sorted_file_does_not_break_the_promise(method):
    """Reading a sorted sample in its order would stop the game before the harm begins."""
    g, mean = np.random.default_rng(5), 0.3
    samples = [np.sort(g.random(60) < mean) for _ in range(200)]
    failed = sum(upper_bound(s, method=method, seed=i) < mean for i, s in enumerate(samples))
    assert failed / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


@methods
@pytest.mark.parametrize("share", [0.0, 0.01, 0.05])
def test_it_is_tighter_than_hoeffding_for_rare_harm(method, share):
    x = np.zeros(400)
    x[: int(400 * share)] = 1
    assert upper_bound(x, method=method) < hoeffding(x)


def test_betting_uses_small_variance():
    x = np.full(400, 0.3)
    assert upper_bound(x, method="betting") < upper_bound(x, method="hoeffding_bentkus") - 0.02


@methods
def test_the_bound_approaches_the_mean(method):
    x = np.tile([0.0, 0.0, 0.0, 1.0], 2500)
    assert 0.25 < upper_bound(x, method=method) < 0.265


# ------------------------------------------------ exact cases


@given(st.integers(1, 400), st.floats(0.5, 0.999))
@settings(max_examples=30, deadline=None)
def test_hoeffding_bentkus_of_no_harm_is_exact(n, confidence):
    """With no harm at all the exact bound is 1 - delta^(1/n)."""
    bound = upper_bound(np.zeros(n), confidence=confidence, method="hoeffding_bentkus")
    assert bound == pytest.approx(1 - (1 - confidence) ** (1 / n), abs=1e-9)


@methods
@pytest.mark.parametrize("n", [1, 2, 50])
def test_only_harm_bounds_nothing(method, n):
    assert upper_bound(np.ones(n), method=method) == 1.0


@methods
def test_one_example_says_little_and_never_too_much(method):
    assert 0.9 < upper_bound([0], method=method) <= 1.0
    assert upper_bound([1], method=method) == 1.0
    assert 0.4 < upper_bound([0.4], method=method) <= 1.0


@given(n=st.integers(1, 300), share=st.floats(0, 1), confidence=st.floats(0.5, 0.999))
@settings(max_examples=40, deadline=None)
def test_the_binomial_bound_is_clopper_and_pearsons(n, share, confidence):
    x = np.arange(n) < round(n * share)
    bound = upper_bound(x, confidence=confidence, method="binomial")
    wanted = 1.0 if x.all() else beta.ppf(confidence, x.sum() + 1, n - x.sum())
    assert bound == pytest.approx(wanted, abs=1e-9)
    assert bound <= upper_bound(x, confidence=confidence, method="hoeffding_bentkus") + 1e-9


def test_the_binomial_p_value_is_exact():
    x = [1.0] * 7 + [0.0] * 93
    assert p_value(x, 0.1, method="binomial") == pytest.approx(binom.cdf(7, 100, 0.1))
    assert p_value([3 * v for v in x], 0.3, high=3.0, method="binomial") == pytest.approx(binom.cdf(7, 100, 0.1))


# ------------------------------------------------ harms below 0


def slow_betting(x, delta, candidate):
    """The capital process in a loop; what it wins at most against one candidate mean."""
    n, total, squares, variance, capital, best = len(x), 0.5, 0.25, 0.25, 1.0, 1.0
    for i, v in enumerate(x, 1):
        bet = min(math.sqrt(2 * math.log(1 / delta) / (n * variance)), 0.75 / (1 - candidate))
        capital *= 1 - bet * (v - candidate)
        best = max(best, capital)
        total += v
        squares += (v - total / (i + 1)) ** 2
        variance = squares / (i + 1)
    return best


@given(
    x=st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=40),
    limit=st.floats(0.01, 0.95),
    seed=st.integers(0, 9),
)
@settings(max_examples=50, deadline=None)
def test_betting_on_signed_harms_against_a_loop(x, limit, seed):
    order = np.random.default_rng(seed).permutation(x)
    p = p_value(x, limit, method="betting", confidence=0.9, seed=seed, low=-1.0)
    assert p == pytest.approx(1 / slow_betting(order, 0.1, limit), rel=1e-9)


def test_the_signed_bound_by_a_grid_of_means():
    g = np.random.default_rng(3)
    x = g.choice([-1.0, 0.0, 1.0], 300, p=[0.03, 0.9, 0.07])
    order = np.random.default_rng(0).permutation(x)
    first = next(m for m in np.arange(0, 1, 1e-4) if slow_betting(order, 0.1, m) >= 10)
    assert upper_bound(x, confidence=0.9, low=-1.0) == pytest.approx(first, abs=1e-4)


def test_the_signed_bound_fails_no_more_often_than_it_says():
    g, runs, delta, mean = np.random.default_rng(12), 2000, 0.1, 0.02
    draws = g.choice([-1.0, 0.0, 1.0], (runs, 150), p=[0.03, 0.92, 0.05])
    failed = sum(p_value(x, mean, method="betting", confidence=1 - delta, low=-1.0) <= delta for x in draws)
    assert 0.01 < failed / runs <= delta + 0.02


def test_examples_that_improved_lower_the_bound_even_below_zero():
    harmed, mixed = [1.0] * 5 + [0.0] * 195, [1.0] * 5 + [-1.0] * 5 + [0.0] * 190
    assert upper_bound(mixed, low=-1.0) < upper_bound(harmed, low=-1.0) == upper_bound(harmed)
    better = certify([-1.0] * 60 + [0.0] * 140, 0.01, low=-1.0)
    assert better.holds and -0.3 <= better.upper < 0 and "at most -0." in better.sentence()


@given(x=harms01, limit=st.floats(0.01, 0.99), confidence=st.sampled_from([0.8, 0.9, 0.95]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_p_value_and_the_bound_say_the_same(x, limit, confidence, data):
    method, low = data.draw(st.sampled_from([("betting", 0.0), ("betting", -1.0), ("hoeffding_bentkus", 0.0)]))
    x = [v * data.draw(st.sampled_from([-1, 1])) for v in x] if low else x
    fields = {"method": method, "confidence": confidence, "low": low}
    bound = upper_bound(x, **fields)
    if abs(bound - limit) > 1e-9 and limit > np.mean(x):
        assert (p_value(x, limit, **fields) <= 1 - confidence) == (bound <= limit)
    assert p_value(x, 1.0, **fields) == 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low": -1.0, "method": "hoeffding_bentkus"}, "takes no harms below 0; use 'betting'"),
        ({"method": "binomial", "low": -1.0}, "only harms that are 0 or the largest possible"),
        ({"low": -0.4}, "Harm number 1 is -0.5; each must lie from -0.4 to 1"),
        ({"low": 0.1}, "smallest possible harm"),
        ({"low": math.nan}, "smallest possible harm"),
    ],
)
def test_harms_that_a_bound_does_not_take_are_named(fields, message):
    for call in (upper_bound, lambda x, **f: p_value(x, 0.5, **f), lambda x, **f: certify(x, 0.5, **f)):
        with pytest.raises(UserError, match=message):
            call([0.0, -0.5, 0.0], **fields)
    with pytest.raises(UserError, match="only harms that are 0 or the largest possible"):
        upper_bound([0.5], method="binomial")


# ------------------------------------------------ laws


@methods
@given(x=harms01, seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_bound_lies_between_the_mean_and_the_largest_harm(method, x, seed):
    assert np.mean(x) - 1e-12 <= upper_bound(x, method=method, seed=seed) <= 1.0


@given(x=harms01, data=st.data())
@settings(max_examples=60, deadline=None)
def test_more_harm_never_lowers_hoeffding_bentkus(x, data):
    more = [data.draw(st.floats(v, 1)) for v in x]
    one, two = (upper_bound(v, method="hoeffding_bentkus") for v in (x, more))
    assert one <= two + 1e-9


@methods
@given(n=st.integers(5, 80), data=st.data())
@settings(max_examples=40, deadline=None)
def test_adding_the_same_harm_everywhere_raises_the_bound(method, n, data):
    low = data.draw(st.floats(0, 0.9))
    high = data.draw(st.floats(low, 1.0))
    assert upper_bound([low] * n, method=method) <= upper_bound([high] * n, method=method) + 1e-9


@methods
@given(x=harms01, low=st.floats(0.5, 0.98))
@settings(max_examples=40, deadline=None)
def test_more_confidence_never_lowers_hoeffding_bentkus_and_the_zero_bound(method, x, low):
    y = x if method == "hoeffding_bentkus" else [0.0] * len(x)
    assert upper_bound(y, confidence=low, method=method) <= upper_bound(y, confidence=low + 0.01, method=method) + 1e-9


@methods
@given(x=harms01, high=st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_the_unit_of_the_harm_does_not_matter(method, x, high):
    scaled = [min(high, v * high) for v in x]
    assert upper_bound(scaled, high=high, method=method) == pytest.approx(
        high * upper_bound(x, method=method), rel=1e-6
    )


@given(x=harms01, seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_order_does_not_matter_to_hoeffding_bentkus_and_a_seed_repeats(x, seed):
    assert upper_bound(x, method="hoeffding_bentkus") == upper_bound(sorted(x), method="hoeffding_bentkus")
    assert upper_bound(x, seed=seed) == upper_bound(x, seed=seed)


@methods
@given(limit=st.floats(0.005, 0.9), confidence=st.sampled_from([0.8, 0.9, 0.95, 0.99]))
@settings(max_examples=30, deadline=None)
def test_needed_is_the_least_number_that_can_pass(method, limit, confidence):
    n = needed(limit, confidence, method=method)
    assert certify(np.zeros(n), limit + 1e-9, confidence=confidence, method=method).holds
    assert n == 1 or not certify(np.zeros(n - 1), limit - 1e-9, confidence=confidence, method=method).holds


# ------------------------------------------------ certificates


@pytest.mark.parametrize("method", ["binomial", "hoeffding_bentkus", "betting"])
def test_a_tiny_limit_costs_neither_memory_nor_time(method):
    """Searched for as larger ones are, this would hold billions of zeros."""
    at = needed(1e-5, method=method)
    assert needed(1e-10, method=method) == pytest.approx(at * 1e5, rel=1e-4)
    assert needed(0.99e-5, method=method) > at
    few = certify([0.0] * 20, 1e-10, method=method)
    assert "even with no harm at all" in few.sentence()


def test_a_certificate_that_holds_lets_through():
    certificate = certify([0.0] * 990 + [1.0] * 10, limit=0.05)
    require(certificate)
    assert certificate.holds and certificate.n == 1000 and certificate.mean == 0.01
    assert json.loads(json.dumps(certificate.to_dict())) == certificate.to_dict()
    assert "within the limit of 0.05 (measured: 0.01 on 1000 examples)." in certificate.sentence()


def test_a_refusal_has_the_numbers_and_a_way_out():
    with pytest.raises(BoundRefused, match=r"above the limit of 0\.05 \(measured: 0\.3 on 100 examples\)") as caught:
        require(certify([1.0] * 30 + [0.0] * 70, limit=0.05, what="lost neighbours"))
    assert caught.value.exit_code == 3
    assert "lost neighbours" in str(caught.value) and "gentler change" in str(caught.value)


@methods
def test_too_few_examples_are_told_how_many_are_needed(method):
    certificate = certify([0.0] * 20, limit=0.05, method=method)
    assert not certificate.holds
    assert f"even with no harm at all {needed(0.05, method=method)} examples are needed" in certificate.sentence()
    with pytest.raises(BoundRefused, match="Measure more examples"):
        require(certificate)


def test_a_limit_of_the_largest_harm_always_holds():
    assert certify([3.0], limit=3.0, high=3.0).holds
    assert needed(3.0, high=3.0) == 1


def test_the_sentence_never_shows_a_bound_as_lower_than_it_is():
    certificate = Certificate("changes", 0.04, 0.95, 100, 0.02, 0.04001, "betting")
    assert "at most 0.0401, above the limit of 0.04 " in certificate.sentence()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"harms": []}, "at least one number"),
        ({"harms": [[0.1]]}, r"got shape \(1, 1\)"),
        ({"harms": ["a"]}, "Harms must be numbers"),
        ({"harms": [0.0, math.nan]}, "Harm number 1 is nan"),
        ({"harms": [0.0, 0.5, -0.1]}, "Harm number 2 is -0.1; each must lie from 0 to 1"),
        ({"harms": [2.5], "high": 2.0}, "Harm number 0 is 2.5; each must lie from 0 to 2"),
        ({"high": 0.0}, "largest possible harm"),
        ({"confidence": 1.0}, "confidence must lie"),
        ({"confidence": math.nan}, "confidence must lie"),
        ({"limit": 0.0}, "limit must be"),
        ({"limit": math.nan}, "limit must be"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        certify(**({"harms": [0.0], "limit": 0.5} | arguments))


def test_an_unknown_method_is_named():
    for call in (lambda: upper_bound([0.0], method="beting"), lambda: needed(0.1, method="beting")):
        with pytest.raises(UnknownName, match="Did you mean 'betting'"):
            call()


def test_importing_loads_no_torch():
    code = "import sys, retouch.bound; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------ the multiplier


def test_multiplier_and_solution_of_a_scalar_problem():
    """Min (x-2)^2 subject to x <= 1 has x = 1 and multiplier 2."""
    x, price = 0.0, Multiplier(limit=1.0, step_size=0.1)
    for _ in range(600):
        x -= 0.1 * (2 * (x - 2) + price.value)
        price.update(x)
    assert x == pytest.approx(1.0, abs=1e-6) and price.value == pytest.approx(2.0, abs=1e-6)


def test_an_idle_constraint_costs_nothing():
    """Min (x-2)^2 subject to x <= 3 has x = 2 and multiplier 0."""
    x, price = 10.0, Multiplier(limit=3.0, step_size=0.1)
    for _ in range(600):
        x -= 0.1 * (2 * (x - 2) + price.value)
        price.update(x)
    assert x == pytest.approx(2.0, abs=1e-6) and price.value == 0.0


def test_two_multipliers_in_a_vector_problem_with_tensors():
    """Min ‖x - (3, 2, 1)‖^2 subject to ‖x‖^2 <= 2 and x_3 <= 0: x = (3, 2, 0) sqrt(2/13), by stationarity."""
    goal = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    size, third = Multiplier(limit=2.0, step_size=0.05), Multiplier(limit=0.0, step_size=0.05)
    for _ in range(2000):
        loss = (x - goal).square().sum() + size.penalty(x.square().sum()) + third.penalty(x[2])
        (gradient,) = torch.autograd.grad(loss, x)
        with torch.no_grad():
            x -= 0.05 * gradient
        size.update(x.square().sum())
        third.update(x[2])
    scale = math.sqrt(2 / 13)
    assert x.tolist() == pytest.approx([3 * scale, 2 * scale, 0.0], abs=1e-5)
    assert size.value == pytest.approx(1 / scale - 1, abs=1e-5) and third.value == pytest.approx(2.0, abs=1e-5)


def test_penalty_carries_the_gradient_of_the_harm_and_not_of_the_price():
    harm = torch.tensor(0.4, requires_grad=True)
    price = Multiplier(limit=0.1, value=2.0)
    price.penalty(harm).backward()
    assert float(harm.grad) == 2.0
    assert price.penalty(0.4) == pytest.approx(0.6)


@given(st.lists(st.floats(-5, 5), max_size=40), st.floats(0.01, 2), st.floats(0, 0.9), st.floats(0, 3))
@settings(max_examples=50, deadline=None)
def test_the_price_stays_within_its_range_and_rises_only_in_excess(harms, step, smoothing, maximum):
    price = Multiplier(limit=0.2, step_size=step, smoothing=smoothing, maximum=maximum)
    for harm in harms:
        before = price.value
        after = price.update(harm)
        assert 0 <= after <= maximum
        assert (after >= before) if price.smoothed >= 0.2 else (after <= before)


def test_smoothing_is_a_running_mean():
    price = Multiplier(limit=0.0, smoothing=0.5)
    price.update(1.0)
    price.update(0.0)
    assert price.smoothed == 0.5


def test_damping_adds_the_change_of_the_smoothed_harm_and_nothing_at_first():
    price = Multiplier(limit=0.2, step_size=0.5, value=1.0, smoothing=0.9, damping=3.0)
    mean, value = None, 1.0
    for harm in (0.4, 0.1, 0.9, 0.9, 0.0):
        before, mean = mean, harm if mean is None else 0.9 * mean + 0.1 * harm
        value += 0.5 * (mean - 0.2) + (0.0 if before is None else 3.0 * (mean - before))
        assert price.update(harm) == pytest.approx(value, rel=1e-12)


def test_damping_calms_the_swing_around_the_limit():
    """Min -4x subject to x^2/2 <= 1/2, by small steps: the price swings around 4, and much less when damped."""
    swings = {}
    for damping in (0.0, 5.0):
        x, price, seen = 0.0, Multiplier(limit=0.5, step_size=0.5, damping=damping), []
        for _ in range(800):
            x -= 0.02 * (-4 + price.value * x)
            price.update(x * x / 2)
            seen.append(price.value)
        assert price.value == pytest.approx(4.0, abs=0.3)
        swings[damping] = max(seen) - 4.0
    assert swings[5.0] < swings[0.0] / 2


def test_a_harm_that_is_not_finite_leaves_the_price():
    price = Multiplier(limit=0.1, value=1.0)
    with pytest.raises(UserError, match="must be a finite number"):
        price.update(math.nan)
    assert price.value == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": math.nan},
        {"step_size": 0.0},
        {"smoothing": 1.0},
        {"value": -1.0},
        {"value": 2.0, "maximum": 1.0},
        {"damping": -1.0},
        {"damping": math.nan},
    ],
)
def test_wrong_multipliers_are_refused(wrong):
    with pytest.raises(UserError, match="A multiplier needs"):
        Multiplier(**({"limit": 0.1} | wrong))
