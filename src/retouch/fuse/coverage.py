"""Edges under different plans: a row or column that an edge could not see is no opinion of its, not a zero.

A mean over all edges would shrink what only few could train. So a difference is divided, row by row or column by column,
by the weight of the edges that could see it. As one axis of a weight is pruned, this scales one factor and stays low-rank.

Source: our own, after the counting of HeteroFL (Diao et al., ICLR 2021).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..change import LowRank
from ..errors import UserError
from .base import Module

__all__ = ["FLOOR", "corrected", "covered", "pruned_axis"]

FLOOR = 0.1
"""The least weight that is divided by: what one edge in many has seen grows tenfold at most."""


def pruned_axis(module: Module) -> Literal["rows", "columns"] | None:
    """Return which axis of the weight some edge could not see whole; None if every edge saw all of it.

    Raises:
        UserError: One edge lacks rows and another columns.
    """
    axes = {kept.axis for kept in module.kept if kept is not None}
    if len(axes) > 1:
        raise UserError(
            f"Of {module.name} one adapter's edge saw part of the rows and another's part of the columns. "
            "A weight is pruned along one axis; make both plans with the same tables of the family."
        )
    return axes.pop() if axes else None


def covered(module: Module) -> Tensor:
    """Sum, for each row or column, the weights of the adapters whose edges could see it.

    Returns:
        As many numbers as the pruned axis is long, or a single one where nothing is pruned.
    """
    axis = pruned_axis(module)
    length = 1 if axis is None else module.shape[0 if axis == "rows" else 1]
    total = torch.zeros(length, dtype=torch.float64)
    for weight, kept in zip(module.weights, module.kept):
        if kept is None:
            total += weight
        else:
            total[torch.tensor(kept.index, dtype=torch.long)] += weight
    return total


def corrected(module: Module) -> Module:
    """Divide every difference by the weight that covers its rows or columns; under one common plan nothing changes."""
    share = covered(module)
    seen = share > 0
    if bool(((share - 1).abs()[seen] < 1e-9).all()):
        return module
    factor = torch.where(seen, 1 / share.clamp_min(FLOOR), torch.ones(()).double())
    by_columns = pruned_axis(module) == "columns"
    return replace(module, parts=tuple(_scaled(p, factor, by_columns) for p in module.parts))


def _scaled(part: LowRank, factor: Tensor, by_columns: bool) -> LowRank:
    if by_columns:
        return LowRank(part.left, (part.right.double() * factor).float())
    return LowRank((part.left.double() * factor[:, None]).float(), part.right)
