"""Spread one wanted state over the weights of several blocks: the second half of MEMIT and its kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import linalg
from ..change import LowRank
from ..model import Model
from ..trace import Trace
from .base import down
from .value import Problem

__all__ = ["Solver", "spread"]

Solver = Callable[[str, Tensor, Tensor], linalg.Solution]
"""(weight, keys (d_ff, n), residuals (d_model, n)) -> the write."""


@torch.no_grad()
def spread(
    model: Model, found: Sequence[Problem], targets: Tensor, blocks: Sequence[int], solve: Solver
) -> tuple[dict[str, LowRank], dict[str, Tensor], list[dict[str, float]]]:
    """Write in ascending blocks, each taking an equal share of what is still missing at the last one.

    For the j-th of J blocks: keys on the partly edited model; residual (z - h now) / (J - j); solve; write. The model
    is never altered: what is already written lives in side branches of the trace.

    Source:
        Meng et al., Mass-Editing Memory in a Transformer (arXiv 2210.07229), algorithm 1.

    Args:
        model: The model.
        found: The facts as rows; h is read on each fact's first row, keys are the weighted mean over its rows.
        targets: z, the wanted state after the last block, (n, d_model).
        blocks: Ascending.
        solve: Makes the write of one weight.

    Returns:
        The parts and the keys (d_ff, n) by weight, and for each block the solve's condition and delivered share.
    """
    rows = [r.ids[: p.anchor(r) + 1] for p in found for r in p.rows]
    at = torch.tensor([p.anchor(r) for p in found for r in p.rows])
    batch = model.batch(rows)
    mean = _averages(found)
    first = torch.tensor([len(p.rows) for p in found]).cumsum(0) - torch.tensor([len(p.rows) for p in found])
    index = torch.arange(len(rows))
    parts: dict[str, LowRank] = {}
    kept: dict[str, Tensor] = {}
    notes = []
    for j, block in enumerate(blocks):
        name, last = down(block), f"blocks.{blocks[-1]}"
        with Trace(model) as trace:
            for other, part in parts.items():
                trace.branch(other, part.left, part.right)
            trace.read(name, "input")
            trace.read(last)
            trace.run(batch, stop_after=last)
            every = trace[name, "input"][index, at].double().cpu()
            now = trace[last, "output"][index, at][first].double().cpu()
        keys = (mean @ every).T
        residuals = (targets.double() - now).T / (len(blocks) - j)
        solution = solve(name, keys, residuals)
        parts[name] = LowRank(solution.left.float(), solution.right.float())
        kept[name] = keys.float()
        notes.append(
            {
                "block": float(block),
                "condition": solution.condition,
                "delivered": float(solution.delivered.mean()),
                "missing": float((targets.double() - now).norm(dim=1).mean()),
            }
        )
    return parts, kept, notes


def _averages(found: Sequence[Problem]) -> Tensor:
    """The matrix that takes all rows to each fact's weighted mean."""
    rows = sum(len(p.rows) for p in found)
    mean = torch.zeros(len(found), rows, dtype=torch.float64)
    start = 0
    for i, problem in enumerate(found):
        mean[i, start : start + len(problem.rows)] = torch.tensor(problem.weights, dtype=torch.float64)
        start += len(problem.rows)
    return mean
