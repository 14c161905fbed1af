"""The scale is chosen on selection alone, the same way for every method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from retouch.change import Change, LowRank
from retouch.errors import UserError
from retouch.fuse.base import FuseMethod
from retouch.fuse.knots import Knots
from retouch.fuse.tuning import LAMS, scaled, tune, variants
from retouch.settings import setting


@dataclass(frozen=True)
class Fixed(FuseMethod):
    """Gives one difference whatever it is given."""

    def fuse(self, module):
        return module.parts[0]


@dataclass(frozen=True)
class Dense(Fixed):
    """Has a density."""

    density: float = setting(0.2, "Share that is kept.", gt=0, le=1)


def planned(form: FuseMethod) -> Change:
    size = getattr(form, "density", 1.0) * form.lam
    return Change("fixed", "base", {"blocks.0.mlp.up": LowRank(torch.full((2, 1), size), torch.ones(1, 2))})


def height(change: Change) -> float:
    return float(change.parts["blocks.0.mlp.up"].delta()[0, 0])


def peak_at(best: float, asked: list):
    def judge(change, rows):
        asked.append((height(change), len(rows)))
        return -np.abs(np.log(height(change) / best)) * np.ones(len(rows))

    return judge


def test_the_best_scale_is_found_and_few_are_judged_on_all():
    asked: list = []
    tuned = tune(variants(Fixed()), planned, peak_at(1.6, asked), 200)
    assert tuned.method.lam == 1.5 and height(tuned.change) == pytest.approx(1.5)
    assert tuned.change.settings["lam"] == 1.5 and tuned.note == ""
    assert sum(n == 200 for _, n in asked) == 2 and sum(n == 50 for _, n in asked) == len(LAMS)


def test_a_density_is_tuned_with_the_scale():
    tuned = tune(variants(Dense()), planned, peak_at(0.1, []), 50)
    assert tuned.method.density * tuned.method.lam == pytest.approx(0.1)
    assert set(variants(Dense())) == {"density=0.2", "density=0.5", "density=0.8", "density=1"}


def test_a_density_that_the_rule_does_not_look_at_is_not_tried():
    assert list(variants(Knots(rule="mean"))) == [""]
    assert len(variants(Knots())) == 4


@pytest.mark.parametrize(("best", "beyond"), [(0.01, 0.18), (100.0, 6.75)])
def test_a_best_scale_at_the_end_is_followed_one_step_and_told(best, beyond):
    tuned = tune(variants(Fixed()), planned, peak_at(best, []), 50)
    assert tuned.method.lam == pytest.approx(beyond) and "at its end" in tuned.note


def test_of_equals_the_smaller_scale_is_taken():
    tuned = tune(variants(Fixed()), planned, lambda change, rows: np.zeros(len(rows)), 10, lams=(0.5, 1.0))
    assert tuned.method.lam == 0.25


def test_bad_input_is_named():
    with pytest.raises(UserError, match="selection instances"):
        tune(variants(Fixed()), planned, peak_at(1, []), 0)
    with pytest.raises(UserError, match="not a number"):
        tune(variants(Fixed()), planned, lambda change, rows: np.full(len(rows), np.nan), 5)


def test_scaling_scales():
    assert height(scaled(planned(Fixed()), 2.5)) == pytest.approx(2.5)
