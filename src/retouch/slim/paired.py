"""Whether one method is better than another: the same test examples, drawn again and again, answered by both.

Rows of a split are drawn with replacement, many times at once; each draw is a row of weights. Quality, cost and the
area under the curve are worked out for all draws and all thresholds together. The first draw is the split itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ._quality import qualities
from .rules import Floats, Ints
from .table import Costs, Table

__all__ = ["Difference", "Draws", "areas", "compare", "draw"]

_CELLS = 4_000_000
"""Weights that are held at once, draws by examples."""


@dataclass(frozen=True, eq=False)
class Draws:
    """One method at one seed, on all draws.

    Attributes:
        costs: FLOPs as a share of the original's, (draws, thresholds), thresholds from the slowest to the fastest.
        qualities: By the task's metric, likewise.
        chosen: Quality at the chosen threshold, (draws).
        chosen_cost: The cost there, on the split itself.
    """

    costs: Floats
    qualities: Floats
    chosen: Floats
    chosen_cost: float

    @property
    def span(self) -> tuple[float, float]:
        """The cheapest and the dearest cost, on the split itself."""
        return float(self.costs[0].min()), float(self.costs[0].max())

    @property
    def is_curve(self) -> bool:
        """Whether thresholds change the cost at all."""
        low, high = self.span
        return high > low

    def within(self, cost: float) -> Floats | None:
        """Return the quality at the most careful threshold that costs at most so much, (draws), or None."""
        meets = self.costs[0] <= cost * (1 + 1e-9)
        return self.qualities[:, int(meets.argmax())] if meets.any() else None

    def area(self, low: float, high: float) -> Floats:
        """Return the mean of the best quality over an interval of costs, (draws)."""
        return areas(self.costs, self.qualities, low, high)


def draw(
    table: Table, where: Ints, costs: Costs, metric: str, *, n_draws: int = 1000, seed: int = 0
) -> Draws:  # fmt: skip
    """Measure a method on many draws of a split. Equal `seed` and number of examples give equal draws.

    Shapes: `where` is (n, thresholds + 1), the thresholds ascending and the chosen one last.

    Args:
        table: With labels.
        where: The blocks that answer.
        costs: In FLOPs.
        metric: The task's.
        n_draws: How many, beside the split itself.
        seed: Of the draws.

    Raises:
        UserError: There are no labels.
    """
    if table.labels is None:
        raise UserError("Methods are compared on labelled examples, and these have no labels.")
    answers, labels = table.taken(where, table.answers()), np.asarray(table.labels)
    spent = np.take_along_axis(costs.spent, where, axis=1)
    found, cost = [], []
    for weights in _weights(table.n, n_draws, seed):
        found.append(qualities(metric, weights, answers, labels, table.classes))
        cost.append(weights @ spent / (weights @ costs.base)[:, None])
    quality, share = np.concatenate(found), np.concatenate(cost)
    return Draws(share[:, :-1], quality[:, :-1], quality[:, -1], float(share[0, -1]))


def _weights(n: int, n_draws: int, seed: int) -> Iterator[Floats]:
    """Yield how often each example was drawn, (draws, n), some draws at a time; first the split itself."""
    chance, size = np.random.default_rng(seed), max(1, _CELLS // n)
    yield np.ones((1, n))
    for start in range(0, n_draws, size):
        drawn = chance.integers(n, size=(min(size, n_draws - start), n))
        drawn += n * np.arange(len(drawn))[:, None]
        yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)


# ---------------------------------------------------------------- areas


def areas(costs: Floats, found: Floats, low: float, high: float) -> Floats:
    """Do as `retouch.slim.points.area`, for many draws.

    A draw whose cheapest cost lies above `low` keeps its first quality down to there.

    Shapes: `costs` and `found` are (draws, thresholds), costs falling; returns (draws).

    Args:
        costs: Shares of the original's.
        found: Qualities.
        low: Where the interval begins.
        high: Where it ends.
    """
    x, y = costs[:, ::-1], found[:, ::-1]
    best = np.maximum.accumulate(y, axis=1)
    step = np.concatenate([np.ones((len(y), 1), dtype=bool), y[:, 1:] > best[:, :-1]], axis=1)
    line = _between(x, best, step)
    x = np.concatenate([np.minimum(x[:, :1], low), x, np.maximum(x[:, -1:], high)], axis=1)
    line = np.concatenate([line[:, :1], line, line[:, -1:]], axis=1)
    left, right = (np.clip(part, low, high) for part in (x[:, :-1], x[:, 1:]))
    wide = x[:, 1:] - x[:, :-1]
    slope = np.divide(line[:, 1:] - line[:, :-1], wide, out=np.zeros_like(wide), where=wide > 0)
    middle = line[:, :-1] + slope * ((left + right) / 2 - x[:, :-1])
    return np.asarray(((right - left) * middle).sum(1) / (high - low))


def _between(x: Floats, best: Floats, step: NDArray[np.bool_]) -> Floats:
    """Put what is no step on the straight line between its neighbours that are; behind the last one it stays."""
    n = x.shape[1]
    index = np.arange(n)
    before = np.maximum.accumulate(np.where(step, index, 0), axis=1)
    after = np.minimum.accumulate(np.where(step, index, n)[:, ::-1], axis=1)[:, ::-1]
    last = after == n
    after = np.where(last, before, after)
    (x0, x1), (y0, y1) = ([np.take_along_axis(v, at, axis=1) for at in (before, after)] for v in (x, best))
    wide = np.where(x1 > x0, x1 - x0, 1.0)
    return np.asarray(y0 + np.where(x1 > x0, (x - x0) / wide, 0.0) * (y1 - y0))


# ---------------------------------------------------------------- differences


@dataclass(frozen=True)
class Difference:
    """How two methods differ on the same examples.

    Attributes:
        method: The one.
        rival: The other.
        metric: ``quality`` at the chosen thresholds, ``quality_at_cost`` at the rival's mean FLOPs, or
            ``quality_auc`` over the costs that both reach.
        difference: The method's less the rival's, the mean over seeds.
        standard_error: Over draws of the examples, and over seeds where there are several.
    """

    method: str
    rival: str
    metric: str
    difference: float
    standard_error: float

    @property
    def verdict(self) -> str:
        """``higher`` or ``lower``; below two standard errors it is ``no difference``."""
        if abs(self.difference) < 2 * self.standard_error or self.difference == 0:
            return "no difference"
        return "higher" if self.difference > 0 else "lower"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the verdict as plain values that JSON can hold."""
        return {**asdict(self), "verdict": self.verdict}


def compare(method: str, own: Sequence[Draws], rival: str, others: Sequence[Draws]) -> list[Difference]:
    """Compare two methods, seed by seed and draw by draw.

    Args:
        method: The one.
        own: Its draws, one a seed.
        rival: The other.
        others: Its draws, of the same seeds.
    """
    found = [_difference(method, rival, "quality", [a.chosen - b.chosen for a, b in zip(own, others)])]
    equal = [(a.within(b.chosen_cost), b.chosen) for a, b in zip(own, others)]
    if all(a is not None for a, _ in equal):
        found.append(_difference(method, rival, "quality_at_cost", [a - b for a, b in equal if a is not None]))
    if (both := shared([*own, *others])) is not None:
        gaps = [a.area(*both) - b.area(*both) for a, b in zip(own, others)]
        found.append(_difference(method, rival, "quality_auc", gaps))
    return found


def shared(draws: Sequence[Draws]) -> tuple[float, float] | None:
    """Return the interval of costs that all curves reach; None if there is none, or one of them is a point."""
    if not draws or not all(d.is_curve for d in draws):
        return None
    low, high = max(d.span[0] for d in draws), min(d.span[1] for d in draws)
    return (low, high) if low < high else None


def _difference(method: str, rival: str, metric: str, gaps: Sequence[Floats]) -> Difference:
    """Take the first draw, the split itself, for the difference, and the others for its error."""
    each = np.array([gap[0] for gap in gaps])
    examples = np.mean([gap[1:] for gap in gaps], axis=0).std(ddof=1)
    seeds = each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else 0.0
    return Difference(method, rival, metric, float(each.mean()), float(np.hypot(examples, seeds)))
