"""Bounds on harm: a multiplier while something is optimised, a certificate before it is kept.

A harm is one number per held-out example, from 0 to `high` (1 when an answer changed, say); the betting bound also takes
harms below 0, for examples that were improved. A certificate says with a stated confidence that the mean harm over all
such examples, not only over those measured, is at most a number. The examples must be drawn independently and must not
have been used to choose or fit the change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import BoundRefused, UserError, unknown
from .multiplier import Multiplier

__all__ = ["Certificate", "Method", "Multiplier", "certify", "needed", "p_value", "require", "upper_bound"]

Method = Literal["betting", "hoeffding_bentkus", "binomial"]
Harms = NDArray[np.float64]

_MAX_BET = 0.75
"""Share of the stake that a single example may take, so that one harmed example never ends the game."""

_SMALL = 1e-5
"""Below this share `needed` does not search: so many examples would be held in memory."""


# ---------------------------------------------------------------- certificates


@dataclass(frozen=True)
class Certificate:
    """What was proved about a mean harm.

    Args:
        what: The harm in words, in the plural: ``"changed answers"``.
        limit: The mean harm that is allowed.
        confidence: The probability, over the draw of the examples, that `upper` is not too low.
        n: How many examples were measured.
        mean: Their mean harm.
        upper: The upper bound of the true mean harm.
        method: How the bound was computed.
        high: The largest harm that an example can have.
    """

    what: str
    limit: float
    confidence: float
    n: int
    mean: float
    upper: float
    method: Method
    high: float = 1.0

    @property
    def holds(self) -> bool:
        """Whether the bound is within the limit."""
        return self.upper <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the verdict as plain values that JSON can hold."""
        return {**asdict(self), "holds": self.holds}

    def sentence(self) -> str:
        """Say it in one English sentence.

        Example:
            >>> print(Certificate("changed answers", 0.05, 0.95, 200, 0.01, 0.035, "betting").sentence())
            With 95% confidence the mean of changed answers is at most 0.035, within the limit of 0.05 (measured: 0.01 on 200 examples).
        """
        verdict = "within" if self.holds else "above"
        return (
            f"With {self.confidence * 100:g}% confidence the mean of {self.what} is at most {_up(self.upper)}, "
            f"{verdict} the limit of {self.limit:g} (measured: {self.mean:.3g} on {_examples(self.n)}"
            f"{self._too_few()})."
        )

    def _too_few(self) -> str:
        least = needed(self.limit, self.confidence, high=self.high, method=self.method)
        return "" if self.holds or self.n >= least else f"; even with no harm at all {_examples(least)} are needed"


def certify(
    harms: ArrayLike,
    limit: float,
    *,
    confidence: float = 0.95,
    high: float = 1.0,
    method: Method = "betting",
    what: str = "changed answers",
    seed: int = 0,
    low: float = 0.0,
) -> Certificate:
    """Bound the mean harm from held-out examples and compare it with a limit.

    Args:
        harms: One harm per example, each from `low` to `high`.
        limit: The mean harm that is allowed, in the unit of the harms.
        confidence: Between 0 and 1.
        high: The largest harm that an example can have.
        method: See `upper_bound`.
        what: The harm in words, in the plural.
        seed: See `upper_bound`.
        low: See `upper_bound`.

    Raises:
        UserError: A harm, the limit or the confidence is not a number that is allowed.

    Example:
        >>> certify([0] * 200, limit=0.05).holds
        True
    """
    _check_limit(limit)
    upper = upper_bound(harms, confidence=confidence, high=high, method=method, seed=seed, low=low)
    x = _harms(harms, high, low)
    return Certificate(what, float(limit), float(confidence), x.size, math.fsum(x) / x.size, upper, method, float(high))


def require(certificate: Certificate) -> None:
    """Refuse to go on unless the certificate holds.

    Raises:
        BoundRefused: It does not; the message has the numbers.
    """
    if not certificate.holds:
        why = "Measure more examples" if certificate.mean <= certificate.limit else "Ask for a gentler change"
        raise BoundRefused(f"{certificate.sentence()} The change is refused. {why}, or allow a higher limit.")


def upper_bound(
    harms: ArrayLike,
    *,
    confidence: float = 0.95,
    high: float = 1.0,
    method: Method = "betting",
    seed: int = 0,
    low: float = 0.0,
) -> float:
    """Return a number that the true mean harm exceeds with probability at most 1 - confidence.

    All methods hold for any number of examples. The first two hold for any distribution on [0, high], betting also for
    one on [low, high] with `low` below 0: only small harms are bet on, so how far an example can improve is no matter.

    Source:
        ``betting``: the one-sided capital process with predictable plug-in bets of Waudby-Smith and Ramdas (2024),
        and its running maximum. ``hoeffding_bentkus``: the p-value of Bates et al. (2021), inverted; it never falls
        when a harm rises, and it is the tighter one when no example is harmed. ``binomial``: Clopper and Pearson
        (1934), exact for harms that are 0 or `high`, and never looser than ``hoeffding_bentkus`` on them.

    Args:
        harms: One harm per example, each from `low` to `high`.
        confidence: Between 0 and 1.
        high: The largest harm that an example can have.
        method: ``"betting"`` (tighter when harms vary little), ``"hoeffding_bentkus"``, or ``"binomial"``.
        seed: Betting reads the examples in a random order drawn from it. Choose it before looking at the data:
            trying several until one passes voids the confidence.
        low: The smallest harm that an example can have; below 0 for betting only.

    Returns:
        The bound, from the measured mean to `high`.

    Raises:
        UserError: Harms are missing, not finite or out of range (the message has the index), or an argument is wrong.

    Example:
        >>> round(upper_bound([0] * 59, method="hoeffding_bentkus"), 3)
        0.05
    """
    x, delta = _harms(harms, high, low) / high, 1 - confidence
    p = _evidence(x, confidence, method, seed)
    return min(high, high * _largest_possible(lambda mean: p(mean) <= delta, math.fsum(x) / x.size))


def p_value(
    harms: ArrayLike,
    limit: float,
    *,
    high: float = 1.0,
    method: Method = "hoeffding_bentkus",
    confidence: float = 0.95,
    seed: int = 0,
    low: float = 0.0,
) -> float:
    """Return a p-value of "the true mean harm exceeds the limit": small when the data rule that out.

    It is at most 1 - confidence just when `upper_bound` with the same arguments is at most the limit. The bets of
    ``betting`` are sized for the confidence; the other methods' p-values do not depend on it.

    Example:
        >>> round(p_value([0] * 59, 0.05), 4)
        0.0485
    """
    _check_limit(limit)
    p = _evidence(_harms(harms, high, low) / high, confidence, method, seed)
    return p(limit / high) if limit < high else 0.0


def _evidence(x: Harms, confidence: float, method: Method, seed: int) -> PValue:
    """Check what decides the p-values of candidate means, and return them as a function."""
    _check_confidence(confidence)
    if method not in _METHODS:
        raise unknown("bound", method, _METHODS)
    if method == "binomial" and not ((x == 0) | (x == 1)).all():
        raise UserError("The bound 'binomial' takes only harms that are 0 or the largest possible; use 'betting'.")
    if method != "betting" and x.min() < 0:
        raise UserError(f"The bound {method!r} takes no harms below 0; use 'betting'.")
    return _METHODS[method](np.random.default_rng(seed).permutation(x), 1 - confidence)


def needed(limit: float, confidence: float = 0.95, *, high: float = 1.0, method: Method = "betting") -> int:
    """Return how many examples a certificate needs when not one of them is harmed; for limits below 1e-5 to five digits.

    Example:
        >>> needed(0.05, method="hoeffding_bentkus"), needed(0.05)
        (59, 78)
    """
    _check_limit(limit)
    _check_confidence(confidence)
    if method not in _METHODS:
        raise unknown("bound", method, _METHODS)
    share = limit / high
    if share >= 1:
        return 1
    delta = 1 - confidence
    if share < _SMALL:  # there the number is, to five digits, inversely proportional to the limit
        return math.ceil(_enough(_SMALL, delta, method) * (_SMALL / share))
    return _enough(share, delta, method)


def _enough(share: float, delta: float, method: Method) -> int:
    """Search for the least number of unharmed examples whose p-value at a share is at most delta."""
    enough = 1
    while _METHODS[method](np.zeros(enough), delta)(share) > delta:
        enough *= 2
    low = enough // 2
    while enough - low > 1:
        middle = (low + enough) // 2
        low, enough = (low, middle) if _METHODS[method](np.zeros(middle), delta)(share) <= delta else (middle, enough)
    return enough


PValue = Callable[[float], float]
"""The p-value of "the true mean is as large as this"; it falls as the candidate rises."""


def _betting(x: Harms, delta: float) -> PValue:
    """Bet against each candidate mean; whoever multiplies the stake by 1/delta has refuted it."""
    count = np.arange(1, x.size + 1)
    mean = (0.5 + np.cumsum(x)) / (count + 1)
    spread = (0.25 + np.cumsum((x - mean) ** 2)) / (count + 1)
    before = np.concatenate([[0.25], spread[:-1]])  # a bet may only know the examples before it
    bets = np.sqrt(2 * math.log(1 / delta) / (x.size * before))

    def p(candidate: float) -> float:
        stake = np.minimum(bets, _MAX_BET / (1 - candidate))
        return math.exp(-max(0.0, float(np.cumsum(np.log1p(stake * (candidate - x))).max())))

    return p


def _hoeffding_bentkus(x: Harms, delta: float) -> PValue:
    from scipy.special import bdtr, xlogy

    n, total = x.size, math.fsum(x)
    mean, harmed = total / n, math.ceil(total - 1e-12 * n)

    def p(candidate: float) -> float:
        if candidate <= mean:
            return 1.0
        divergence = xlogy(mean, mean / candidate) + xlogy(1 - mean, (1 - mean) / (1 - candidate))
        return float(min(math.exp(-n * divergence), math.e * bdtr(harmed, n, candidate)))

    return p


def _binomial(x: Harms, delta: float) -> PValue:
    from scipy.special import bdtr

    n, harmed = x.size, round(math.fsum(x))
    return lambda candidate: float(bdtr(harmed, n, candidate))


_METHODS = {"betting": _betting, "hoeffding_bentkus": _hoeffding_bentkus, "binomial": _binomial}


def _largest_possible(rejects: Callable[[float], bool], mean: float) -> float:
    """Bisect for the smallest rejected mean in [mean, 1]; the end returned is the rejected one, or 1."""
    low, high = mean, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if rejects(middle) else (middle, high)
    return high


# ---------------------------------------------------------------- checks


def _harms(harms: ArrayLike, high: float, low: float = 0.0) -> Harms:
    if not (math.isfinite(high) and high > 0):
        raise UserError(f"The largest possible harm must be finite and above 0; got {high!r}.")
    if not (math.isfinite(low) and low <= 0):
        raise UserError(f"The smallest possible harm must be finite and not above 0; got {low!r}.")
    try:
        x = np.asarray(harms, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"Harms must be numbers, one per example; got {type(harms).__name__}.") from error
    if x.ndim != 1 or x.size == 0:
        raise UserError(f"Harms must be a list of at least one number, one per example; got shape {x.shape}.")
    wrong = ~((x >= low) & (x <= high))  # not a number compares false, so it is wrong too
    if wrong.any():
        index = int(wrong.argmax())
        raise UserError(f"Harm number {index} is {x[index]:g}; each must lie from {low:g} to {high:g}.")
    return x


def _check_limit(limit: float) -> None:
    if not (math.isfinite(limit) and limit > 0):
        raise UserError(f"The limit must be a finite number above 0 (no sample proves that harm never happens); got "
                        f"{limit!r}.")  # fmt: skip


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"The confidence must lie between 0 and 1, both excluded; got {confidence!r}.")


def _up(value: float) -> str:
    """Round to three digits, upward: a bound must not look lower than it is."""
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 2) if value else 1.0
    return f"{math.ceil(value / step - 1e-9) * step:.3g}"


def _examples(n: int) -> str:
    return f"{n} example" + "s" * (n != 1)
