"""Look for adapters that are unlike the others: by size, and by how much lies in a single direction.

It reports and never drops one: an unusual adapter may be an attack, or the one site that has seen something new.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..progress import track
from ..report import Table
from .base import Adapter

__all__ = ["LIMIT", "Screened", "screen", "screen_table"]

LIMIT = 5.0
"""Median absolute deviations from the others' median; beyond is flagged."""
_FEWEST = 3
"""Others that are needed to say what is usual."""
_FLOOR = 0.05
"""The least deviation that counts as usual, as a share of the median: a few others may lie close together by chance."""


@dataclass(frozen=True)
class Screened:
    """What was measured on one adapter.

    Attributes:
        name: Of the adapter.
        norm: Frobenius norm of its whole change.
        top_share: Share of the squared norm that lies in the first singular direction of each weight, 0 to 1.
        largest: The weight that it changes most.
        flags: What is unlike the others: ``norm``, ``top_share``.
    """

    name: str
    norm: float
    top_share: float
    largest: str
    flags: tuple[str, ...]


def screen(adapters: Sequence[Adapter], limit: float = LIMIT) -> tuple[Screened, ...]:
    """Measure adapters and flag those that are unlike the others; none is dropped.

    Use when: adapters came from sites that you do not control.

    Known problems: fewer than four adapters say nothing about what is usual; an attacker who sends most of them defines
        it.

    Args:
        adapters: At least one; their factors are read weight by weight.
        limit: How many median absolute deviations from the others are allowed.

    Example:
        >>> screen([])
        ()
    """
    measured = [_measured(adapter) for adapter in track(adapters, "screen adapters")]
    columns = {"norm": [m[0] for m in measured], "top_share": [m[1] for m in measured]}
    return tuple(
        Screened(adapter.name, *measured[i], tuple(n for n, values in columns.items() if _unlike(values, i, limit)))
        for i, adapter in enumerate(adapters)
    )


def _measured(adapter: Adapter) -> tuple[float, float, str]:
    squares, tops = {}, []
    for name in adapter.parts:
        frobenius, spectral = adapter.parts[name].norms()
        squares[name] = frobenius**2
        tops.append(spectral**2)
    total = math.fsum(squares.values())
    return (
        math.sqrt(total),
        math.fsum(tops) / total if total else 0.0,
        max(squares, key=squares.__getitem__, default=""),
    )


def _unlike(values: Sequence[float], i: int, limit: float) -> bool:
    others = [value for j, value in enumerate(values) if j != i]
    if len(others) < _FEWEST:
        return False
    middle = statistics.median(others)
    usual = max(statistics.median(abs(value - middle) for value in others), _FLOOR * abs(middle))
    return abs(values[i] - middle) > limit * usual


def screen_table(screened: Sequence[Screened], limit: float = LIMIT) -> Table:
    """Lay what was measured out for a report."""
    few = len(screened) <= _FEWEST
    caption = (
        f"Fewer than {_FEWEST + 1} adapters: nothing says what is usual."
        if few
        else f"Flagged is what lies more than {limit:g} median absolute deviations from the others; nothing is dropped."
    )
    rows = tuple((s.name, s.norm, s.top_share, s.largest, ", ".join(s.flags) or "-") for s in screened)
    return Table(
        "Adapters beside each other", ("adapter", "norm", "top share", "largest", "unlike the others"), rows, caption
    )
