"""Operating points: what each threshold gives in quality, and costs, on examples that chose nothing.

A curve of points is what methods are compared by: quality against cost, the area under it, what a small drop in quality
buys, and which texts leave early.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ._quality import quality
from .rules import Floats, Ints, Rule
from .table import Costs, Table, leaving

__all__ = ["USUAL_TOKENS", "Point", "area", "at_drop", "best_so_far", "curve", "flops_at", "leavers", "point"]

USUAL_TOKENS = 128
"""The length to which papers pad every text before they count FLOPs."""


@dataclass(frozen=True)
class Point:
    """One threshold, measured.

    Attributes:
        threshold: At which rows leave.
        quality: By the task's metric.
        quality_kept: Of the original's quality, as a share; 0 where that is not above 0.
        flops_ratio: Total FLOPs over the original's.
        exit_layer: Mean number of blocks that ran.
        leaves: Share of the examples that left after each asked block.
        quality_at: Share of right answers among those that left there; for a regression None.
    """

    threshold: float
    quality: float
    quality_kept: float
    flops_ratio: float
    exit_layer: float
    leaves: Mapping[int, float]
    quality_at: Mapping[int, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return asdict(self) | {
            name: {str(l): v for l, v in getattr(self, name).items()} for name in ("leaves", "quality_at")
        }


def point(table: Table, rule: Rule, threshold: float, costs: Costs, metric: str, base: float) -> Point:
    """Measure one threshold; see `curve`."""
    return curve(table, rule, [threshold], costs, metric, base)[0]


def curve(
    table: Table, rule: Rule, lambdas: Sequence[float] | Floats, costs: Costs, metric: str, base: float
) -> tuple[Point, ...]:
    """Measure every threshold of a grid on one split.

    Args:
        table: With labels; not the split that chose the threshold.
        rule: Which exits are asked, and how.
        lambdas: Thresholds.
        costs: In FLOPs.
        metric: The task's.
        base: The original's quality on the same examples.

    Raises:
        UserError: There are no labels.
    """
    if table.labels is None:
        raise UserError("Quality is measured on labelled examples, and these have no labels.")
    where = leaving(table, rule, lambdas)
    share = costs.share(where)
    answered = table.taken(where, table.answers())
    exits = rule.due(table.exits)
    return tuple(
        Point(
            float(threshold),
            found := quality(metric, answered[:, i], table.labels, table.classes if table.classes > 1 else None),
            found / base if base > 0 else 0.0,
            float(share[i]),
            float(where[:, i].mean() + 1),
            {l: float((where[:, i] == l).mean()) for l in exits},
            {l: _right(table, answered[:, i], where[:, i] == l) for l in exits},
        )
        for i, threshold in enumerate(np.asarray(lambdas, dtype=float))
    )


def flops_at(at: Point, spent: Sequence[float]) -> float:
    """Return what a point costs where every text costs the same, as a share of the original's.

    Args:
        at: Says who leaves where.
        spent: By block, the FLOPs of a text that leaves after it, as a share of the original's.
    """
    return sum(share * spent[block] for block, share in at.leaves.items())


def _right(table: Table, answered: NDArray[Any], here: NDArray[np.bool_]) -> float | None:
    if table.classes == 1 or not here.any() or table.labels is None:
        return None
    return float((answered[here] == np.asarray(table.labels)[here]).mean())


def best_so_far(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return the steps of the best quality at a cost of at most x: (flops_ratio, quality), both ascending."""
    found: list[tuple[float, float]] = []
    for p in sorted(points, key=lambda p: (p.flops_ratio, -p.quality)):
        if not found or p.quality > found[-1][1]:
            found.append((p.flops_ratio, p.quality))
    return found


def area(points: Sequence[Point], low: float, high: float) -> float:
    """Return the mean over costs from `low` to `high` of the best quality at a cost of at most x.

    Between two points of the curve quality is taken as a straight line (trapezoids); past the last one it stays.

    Args:
        points: Of one method.
        low: The cheapest cost that all compared methods reach.
        high: The dearest.

    Raises:
        UserError: The method reaches no cost as low, or the interval is empty.
    """
    steps = best_so_far(points)
    if not low < high or not steps or steps[0][0] > low + 1e-12:
        raise UserError(
            f"An area needs costs from the method's cheapest ({steps[0][0] if steps else 'none'}) upwards; got {low:g} to {high:g}."
        )
    xs, ys = np.array([x for x, _ in steps]), np.array([y for _, y in steps])
    inside = xs[(xs > low) & (xs < high)]
    at = np.concatenate([[low], inside, [high]])
    values = np.interp(at, xs, ys)
    return float(np.trapezoid(values, at) / (high - low))


def at_drop(points: Sequence[Point], drop: float) -> Point | None:
    """Return the cheapest point whose quality is within `drop` of the best point's, or None if there is no point."""
    if not points:
        return None
    best = max(p.quality for p in points)
    return min((p for p in points if p.quality >= best - drop - 1e-12), key=lambda p: p.flops_ratio)


def leavers(where: Ints, unsure: Floats, n: int = 5) -> dict[str, list[int]]:
    """Pick examples to show: those surest at the first exit, and those still unsure at the last.

    Args:
        where: Block that each example took.
        unsure: Its uncertainty at each asked exit, (asked, n).
        n: How many of each.
    """
    first, last = where == where.min(), where == where.max()
    early = [int(i) for i in np.argsort(unsure[0], kind="stable") if first[i]]
    late = [int(i) for i in np.argsort(-unsure[-1], kind="stable") if last[i]]
    return {"early": early[:n], "late": [i for i in late if i not in early[:n]][:n]}
