"""How unsure an exit is, against scipy and by hand; which exits are asked; what rules refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy

from retouch.errors import SettingsError, UnknownName
from retouch.slim.rules import RULES, Rule, advance, due, uncertainty

SOFTMAX = ["entropy", "max_prob", "margin"]
rows = st.integers(2, 5).flatmap(
    lambda c: st.lists(st.lists(st.floats(-30, 30), min_size=c, max_size=c), min_size=1, max_size=6)
)


def unsure(rule, logits, temperature=1.0):
    return uncertainty(rule, advance(None, logits), 4, temperature)


@given(z=rows, temperature=st.floats(0.05, 20))
@settings(max_examples=60, deadline=None)
def test_the_softmax_rules_are_their_definitions(z, temperature):
    p = softmax(np.array(z) / temperature, axis=1)
    classes, ordered = p.shape[1], np.sort(p, axis=1)
    wanted = {
        "entropy": entropy(p, axis=1) / math.log(classes),
        "max_prob": (1 - ordered[:, -1]) * classes / (classes - 1),
        "margin": 1 - (ordered[:, -1] - ordered[:, -2]),
    }
    for rule, u in wanted.items():
        assert unsure(rule, z, temperature) == pytest.approx(u, abs=1e-9)


@pytest.mark.parametrize("rule", SOFTMAX)
@pytest.mark.parametrize("scale", [1e4, 1e300, 800.0])
def test_a_probability_of_exactly_zero_is_sure_and_never_nan(rule, scale):
    assert unsure(rule, [[0.0, scale], [scale, -scale], [0.0, -scale]]).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rule", SOFTMAX)
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_equal_logits_are_as_unsure_as_can_be(rule, classes):
    for logit in (0.0, 1e4, -1e4):
        assert unsure(rule, np.full((2, classes), logit)) == pytest.approx(1.0, abs=1e-12)


def test_logits_that_are_not_numbers_never_leave():
    for rule in SOFTMAX:
        assert not (unsure(rule, [[math.nan, 0.0]]) < 2.0).any()


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_any_type_are_taken(kind):
    z = torch.tensor([[0.5, -1.25, 2.0]], dtype=kind, requires_grad=True)
    assert unsure("entropy", z)[0] == unsure("entropy", [[0.5, -1.25, 2.0]])[0]


def test_a_higher_temperature_is_less_sure():
    z = [[1.0, -0.5, 0.2]]
    for rule in SOFTMAX:
        u = [unsure(rule, z, t)[0] for t in (0.2, 1.0, 5.0)]
        assert u == sorted(u) and u[0] < u[2]


def test_patience_counts_exits_in_a_row_that_agree():
    state, seen = None, []
    for z in ([[2, 1], [2, 1]], [[2, 1], [1, 2]], [[3, 0], [0, 1]], [[0, 1], [0, 3]]):
        state = advance(state, z)
        seen.append(uncertainty("patience", state, 4).tolist())
    assert seen == [[1.0, 1.0], [0.75, 1.0], [0.5, 0.75], [1.0, 0.5]]


def test_patience_and_delta_on_a_regression():
    state, counts, steps = None, [], []
    for z in (1.0, 1.0625, 1.125, 1.25, 9.0):
        state = advance(state, [[z]], tolerance=0.0625 + 1e-9)
        counts.append(uncertainty("patience", state, 5)[0])
        steps.append(uncertainty("delta", state, 5)[0])
    assert counts == pytest.approx([1.0, 0.8, 0.6, 1.0, 1.0])
    assert steps == [1.0, 0.0625, 0.0625, 0.125, 1.0]


def test_a_step_of_exactly_the_tolerance_does_not_agree():
    state = advance(advance(None, [[1.0]], 0.5), [[1.5]], 0.5)
    assert state.count.tolist() == [0]


def test_states_follow_the_rows_that_stay():
    state = advance(advance(None, [[2.0, 1], [2, 1], [1, 2]]), [[3.0, 1], [1, 2], [1, 2]])
    kept = state.take(np.array([True, False, True]))
    assert kept.count.tolist() == [1, 1]
    assert advance(kept, [[1.0, 2], [1, 2]]).count.tolist() == [0, 2]


@pytest.mark.parametrize("rule", RULES)
def test_no_rows_are_no_trouble(rule):
    state = advance(advance(None, np.empty((0, 3))), np.empty((0, 3)))
    assert uncertainty(rule, state, 4).shape == (0,)


@given(
    exits=st.sets(st.integers(0, 12), min_size=1).map(sorted),
    every=st.integers(1, 5),
    min_block=st.integers(0, 14),
)
def test_the_exits_that_are_asked(exits, every, min_block):
    asked = due(exits, every, min_block)
    assert asked[-1] == exits[-1] and set(asked) <= set(exits)
    assert all(l >= min_block and (l + 1) % every == 0 for l in asked[:-1])
    assert {l for l in exits if l >= min_block and (l + 1) % every == 0} <= set(asked)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"every": 0}, "every"),
        ({"min_block": -1}, "min_block"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"temperatures": (1.0, 0.0)}, "temperatures"),
        ({"temperatures": (math.inf,)}, "temperatures"),
    ],
)
def test_wrong_fields_are_named(fields, name):
    with pytest.raises(SettingsError, match=f"^{name} must"):
        Rule(**fields)


def test_an_unknown_rule_is_named():
    with pytest.raises(UnknownName, match="Did you mean 'entropy'"):
        Rule("entropie")
    with pytest.raises(UnknownName, match="exit rule"):
        unsure("entropie", [[0.0, 1.0]])


@pytest.mark.parametrize("rule", SOFTMAX)
def test_softmax_rules_are_refused_where_an_exit_gives_one_number(rule):
    with pytest.raises(SettingsError, match=f"rule must be 'patience' or 'delta'.*got '{rule}'"):
        Rule(rule).check([0, 1], classes=1)
    Rule(rule).check([0, 1], classes=2)


def test_delta_is_refused_for_classes_and_temperatures_must_fit():
    with pytest.raises(SettingsError, match="rule 'delta' is for regression"):
        Rule("delta").check([0, 1], classes=2)
    with pytest.raises(SettingsError, match="each of the 2 exits; got 3"):
        Rule(temperatures=(1, 1, 1)).check([0, 1], classes=2)
    assert Rule(temperatures=[1, 2]).temperature([1, 3], 3) == 2.0
