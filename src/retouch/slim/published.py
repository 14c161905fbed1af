"""The widths that the authors of COST-EFF published, which the preset ``paper`` takes as they stand. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .base import Budget, Size, Widths
from .widths import base_parameters, parameters, rank_limit

__all__ = ["paper", "published"]

_ROWS = ((6, False), (4, False), (4, True), (3, False), (2, False), (2, True))
"""Heads of 12, and whether the MLP keeps half of their share."""

_NAMED = 0.03
"""How far the parameters of published widths may lie from a budget that is to mean them."""


def paper(size: Size, heads: int, half: bool | None = None) -> Widths:
    """Return the authors' widths for a number of heads: each resource has the same share, or half of it for the MLP.

    Source:
        The scripts of sbwww/COST-EFF: of 12 heads of 64, n are kept with rank 64 n and d_ff 256 n or 128 n.

    Args:
        size: The original.
        heads: How many heads are kept.
        half: Whether the MLP keeps half of the heads' share; by default it does for up to a third of the heads.

    Raises:
        UserError: The original has fewer heads.

    Example:
        >>> bert = Size(12, 768, 12, 3072, 30522, 512, 2, 2)
        >>> paper(bert, 2).d_ff[0], paper(bert, 2).rank, paper(bert, 6).d_ff[0]
        (256, 128, 1536)
    """
    half = 3 * heads <= size.heads if half is None else half
    d_ff = max(1, size.d_ff * heads // (size.heads * (2 if half else 1)))
    rank = heads * size.head_dim
    return Widths.uniform(size, heads, d_ff, rank if rank < rank_limit(size) else None)


def published(size: Size, budget: Budget, exits: Iterable[int] | None = None) -> Widths | None:
    """Return the authors' widths whose parameters are, but for 3 %, what a budget asks for; None if there are none.

    They stand as published, so that the limit may be exceeded by as much.

    Example:
        >>> bert = Size(12, 768, 12, 3072, 30522, 512, 2, 2)
        >>> published(bert, Budget("1/8")).d_ff[0], published(bert, Budget("1/10"))
        (256, None)
    """
    if budget.params is None:
        return None
    rows = [
        replace(paper(size, n * size.heads // 12, half), exits=size.exits(exits))
        for n, half in _ROWS
        if n * size.heads % 12 == 0
    ]
    off = [abs(parameters(size, row) / base_parameters(size) / budget.params - 1) for row in rows]
    best = min(range(len(rows)), key=off.__getitem__, default=None)
    return None if best is None or off[best] > _NAMED else rows[best]
