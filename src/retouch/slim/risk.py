"""What leaving early may do to answers, and which thresholds are certified not to exceed a limit of it.

A loss is one number per example that compares an early answer with a reference: `gap` (1 where only the early answer is
wrong, -1 where only the reference is; its mean is the accuracy lost), `worse` (1 where only the early answer is wrong)
or `flip` (1 where they differ; needs no labels). Thresholds are walked from the most careful one to the fastest, up to
the first failure and never beyond it: a fixed sequence errs only at its first bad member, so all that were passed are
certified at once and any of them may be used.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..bound import Certificate, Method, certify, needed, p_value
from ..errors import SettingsError, UserError, unknown
from .rules import Floats, Ints
from .table import Table

__all__ = ["ExpectedRisk", "Guarantee", "Loss", "Risk", "approved", "guarantee", "losses", "passed"]

Loss = Literal["gap", "worse", "flip"]
Reference = Literal["original", "full_depth"]
How = Literal["ucb", "crc", "ltt"]

WORDS = {"gap": "answers lost less answers gained", "worse": "answers spoilt", "flip": "answers changed"}
DISTANCES = "distances to the reference"


@dataclass(frozen=True)
class Risk:
    """How much harm is allowed, and how it is to be shown.

    Args:
        limit: Largest mean loss.
        loss: ``gap``, ``worse`` or ``flip``. On a regression ``flip`` is the distance to the reference as a share of the
            targets' range, and the only one.
        reference: What early answers are compared with: ``original``, the model before it was made slim, or
            ``full_depth``, the slim model without early exits.
        how: ``ucb`` and ``ltt`` hold with probability 1 - delta, ``crc`` in expectation.
        method: Of the bound (see `retouch.bound.upper_bound`). None: ``betting`` for `gap` and regressions, the exact
            ``binomial`` where a loss is 0 or 1. Never choose it by its outcome.
        delta: Probability of a wrong certificate.
        seed: Of the order in which the betting bound reads the examples.

    Raises:
        SettingsError: The message names the field.
    """

    limit: float
    loss: Loss = "gap"
    reference: Reference = "original"
    how: How = "ucb"
    method: Method | None = None
    delta: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        known = {"loss": WORDS, "reference": ("original", "full_depth"), "how": ("ucb", "crc", "ltt")}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise SettingsError(f"limit must be a finite number above 0; got {self.limit!r}.")
        if not 0 < self.delta < 1:
            raise SettingsError(f"delta must lie between 0 and 1, both excluded; got {self.delta!r}.")
        if self.how == "crc" and self.loss == "gap":
            raise SettingsError("loss must be 'worse' or 'flip' for how='crc': it needs losses that are not below 0.")
        if self.loss == "gap" and self.method not in (None, "betting"):
            raise SettingsError(f"method must be 'betting' for loss='gap', which may be below 0; got {self.method!r}.")

    def bound(self, classes: int) -> Method:
        """Return the method of the bound, fixed by the kind of loss and never by its values."""
        return self.method or ("betting" if self.loss == "gap" or classes == 1 else "binomial")


# ---------------------------------------------------------------- losses


def losses(
    table: Table, where: Ints, risk: Risk, *, original: NDArray[Any] | None = None, span: float | None = None
) -> Floats:
    """Return each example's loss at each threshold, (n, thresholds), from -1 to 1.

    Args:
        table: Logits of all exits.
        where: The blocks that answer, (n, thresholds).
        risk: Which loss, against which reference.
        original: The original's logits, (n, classes), in the unit of the table's; for ``reference="original"``.
        span: Largest less smallest target of the training set, in the unit of the logits; for a regression.

    Raises:
        SettingsError: The message names what is missing or does not fit.
    """
    reference = _reference(table, risk, original)
    if table.classes == 1:
        return _distances(table, where, reference, risk, span)
    answers = table.taken(where, table.answers())
    if risk.loss == "flip":
        return np.asarray(answers != reference[:, None], dtype=np.float64)
    if table.labels is None:
        raise SettingsError(f"loss {risk.loss!r} needs labels, and these examples have none; choose loss='flip'.")
    labels = np.asarray(table.labels)[:, None]
    gap = (answers != labels).astype(np.float64) - (reference[:, None] != labels)
    return np.asarray(np.maximum(0.0, gap) if risk.loss == "worse" else gap, dtype=np.float64)


def _reference(table: Table, risk: Risk, original: NDArray[Any] | None) -> NDArray[Any]:
    if risk.reference == "full_depth":
        return np.asarray(table.answers()[-1])
    if original is None or np.shape(original) != (table.n, table.classes):
        raise SettingsError(
            f"reference 'original' needs the original's logits of the shape {(table.n, table.classes)}, in the order "
            f"of the table; got {None if original is None else np.shape(original)}."
        )
    return np.asarray(original[:, 0] if table.classes == 1 else original.argmax(axis=1))


def _distances(table: Table, where: Ints, reference: NDArray[Any], risk: Risk, span: float | None) -> Floats:
    if risk.loss != "flip":
        raise SettingsError(
            f"loss must be 'flip' for a regression, which is neither right nor wrong; got {risk.loss!r}."
        )
    if span is None or not (math.isfinite(span) and span > 0):
        raise SettingsError(f"span must be the range of the training targets, above 0; got {span!r}.")
    return np.asarray(np.minimum(1.0, np.abs(table.taken(where, table.answers()) - reference[:, None]) / span))


# ---------------------------------------------------------------- certificates


@dataclass(frozen=True)
class ExpectedRisk:
    """What conformal risk control proved: a bound in expectation over the draw of the examples.

    Source:
        Angelopoulos et al. (2024), Conformal Risk Control.

    Args:
        what: The loss in words, in the plural.
        limit: The mean loss that is allowed.
        n: How many examples were measured.
        mean: Their mean loss, the largest up to this threshold for each.
        upper: (n mean + 1) / (n + 1).
    """

    what: str
    limit: float
    n: int
    mean: float
    upper: float

    @property
    def holds(self) -> bool:
        """Whether the bound is within the limit."""
        return self.upper <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the verdict as plain values that JSON can hold."""
        return {**asdict(self), "method": "conformal", "holds": self.holds}

    def sentence(self) -> str:
        """Say it in one English sentence.

        Example:
            >>> print(ExpectedRisk("answers changed", 0.05, 99, 0.01, 0.0199).sentence())
            In expectation the mean of answers changed is at most 0.0199, within the limit of 0.05 (measured: 0.01 on 99 examples).
        """
        verdict = "within" if self.holds else "above"
        return (
            f"In expectation the mean of {self.what} is at most {self.upper:.3g}, {verdict} the limit of "
            f"{self.limit:g} (measured: {self.mean:.3g} on {self.n} examples)."
        )


Guarantee: TypeAlias = Certificate | ExpectedRisk


def passed(values: Floats, risk: Risk, classes: int) -> int:
    """Return how many thresholds are certified, counted from the most careful one.

    Args:
        values: Losses, (n, thresholds), from the most careful threshold to the fastest.
        risk: The limit and how it is shown.
        classes: 1 for a regression.
    """
    free = int(risk.reference == "full_depth")  # nobody leaves early there: no loss by construction
    if risk.how == "crc":
        totals = np.maximum.accumulate(values, axis=1).sum(axis=0)  # they never fall
        return max(free, int(((totals + 1) / (len(values) + 1) <= risk.limit).sum()))
    for i in range(free, values.shape[1]):
        if _p_value(values[:, i], risk, classes) > risk.delta:
            return i
    return int(values.shape[1])


def approved(values: Floats, risk: Risk, classes: int) -> NDArray[np.bool_]:
    """Say which points are certified where they have no order, as with several rules or a threshold for each exit.

    Source:
        Angelopoulos et al. (2021), Learn then Test; each of the m points at delta / m.

    Args:
        values: Losses, (n, points).
        risk: The limit; `how` is not looked at.
        classes: 1 for a regression.
    """
    share = risk.delta / values.shape[1]
    return np.array([_p_value(column, risk, classes, share) <= share for column in values.T], dtype=np.bool_)


def _p_value(column: Floats, risk: Risk, classes: int, delta: float | None = None) -> float:
    return p_value(
        column,
        risk.limit,
        method=risk.bound(classes),
        confidence=1 - (risk.delta if delta is None else delta),
        seed=risk.seed,
        low=-1.0 if risk.loss == "gap" else 0.0,
    )


def guarantee(values: Floats, index: int, risk: Risk, classes: int, *, points: int = 1) -> Guarantee:
    """State what is proved about one threshold.

    Args:
        values: Losses, (n, thresholds), as in `passed`.
        index: Of the threshold.
        risk: The limit and how it is shown.
        classes: 1 for a regression.
        points: By how many `delta` was divided, as in `approved`.
    """
    what = DISTANCES if classes == 1 else WORDS[risk.loss]
    if risk.how == "crc":
        worst, n = values[:, : index + 1].max(axis=1), len(values)
        total = math.fsum(worst)
        return ExpectedRisk(what, risk.limit, n, total / n, (total + 1) / (n + 1))
    return certify(
        values[:, index],
        risk.limit,
        confidence=1 - risk.delta / points,
        method=risk.bound(classes),
        what=what,
        seed=risk.seed,
        low=-1.0 if risk.loss == "gap" else 0.0,
    )


def too_few(n: int, risk: Risk, classes: int) -> int | None:
    """Return how many examples the limit needs without any loss, or None if `n` are enough."""
    if risk.how == "crc":
        least = math.ceil(1 / risk.limit - 1e-9) - 1  # (0 + 1) / (n + 1) <= limit
    else:
        least = needed(risk.limit, 1 - risk.delta, method=risk.bound(classes))
    return least if n < least else None


def check_grid(lambdas: Floats) -> None:
    """Refuse thresholds that are not walked from the most careful one.

    Raises:
        UserError: They do not begin with 0 and rise.
    """
    if lambdas.ndim != 1 or lambdas.size == 0 or lambdas[0] != 0 or not (np.diff(lambdas) > 0).all():
        raise UserError("Thresholds to try must begin with 0 and rise, as `grid` makes them.")
