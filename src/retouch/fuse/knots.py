"""``knots``: turn all adapters to one output basis, then merge their input sides entry by entry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..change import LowRank
from ..settings import setting
from ._blocks import Blocks, Rule, averaged, collected, elected, trim
from .base import FuseMethod, Module
from .core import outputs_of
from .dare import dropped

__all__ = ["Knots"]


@dataclass(frozen=True)
class Knots(FuseMethod):
    """Find the output directions that the adapters share, and merge what each reads in for them, entry by entry.

    ``[D_1 ... D_N] = U S [V_1 ... V_N]^T``; the blocks ``S V_i^T`` are merged, and U leads back.

    Source:
        KnOTS (Stoica et al., ICLR 2025; gstoica27/KnOTS). The decomposition is taken from the factors.

    Use when:
        Adapters write into the same directions, and you want the election of ties without leaving their span of
        outputs: the rank stays at most the sum of the ranks, nothing is cut.

    Known problems:
        Inputs keep their own coordinates and outputs do not, so coverage by rows is corrected only for rules that
        average.

    Shapes:
        U (outputs, k), merged blocks (k, inputs), k at most the sum of the ranks.

    Example:
        >>> Knots(rule="mean").rule
        'mean'
    """

    rule: Literal["ties", "dare", "mean"] = setting("ties", "How blocks are merged; the mean gives what cat gives.")
    density: float = setting(0.5, "ties: share of entries that is kept; dare: probability of each.", gt=0, le=1)

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings that the rule does not look at, which tuning therefore leaves alone."""
        return ("density",) if self.rule == "mean" else ()

    def corrects(self) -> bool:
        """An election is already among those that have an opinion."""
        return self.rule != "ties" and super().corrects()

    def fuse(self, module: Module) -> LowRank:
        """Turn to the shared output basis, merge, turn back."""
        if module.core is None:
            sides = [(p.left.double(), p.right.double()) for p in module.parts]
        else:
            sides = [(module.core.left @ m, module.core.right) for m in module.core.middles]
        shared = outputs_of(sides)
        turned = tuple(LowRank(_snapped(shared.T @ left).float(), right.float()) for left, right in sides)
        kept = tuple(k if k is not None and k.axis == "columns" else None for k in module.kept)
        blocks = Blocks(replace(module, parts=turned, kept=kept, core=None))
        return LowRank(shared.float(), collected(blocks, self._rule(blocks)))

    def _rule(self, blocks: Blocks) -> Rule:
        weights = blocks.module.weights
        if self.rule == "ties":
            sizes = blocks.thresholds(self.density)
            return lambda values, _: elected(trim(values, sizes), weights)
        density = self.density if self.rule == "dare" else 1.0
        return lambda values, row: averaged(dropped(blocks, values, row, density, self.seed), weights)


def _snapped(left: Tensor) -> Tensor:
    """Set to zero the rows that only rounding has filled: an adapter has no vote where it writes nothing."""
    sizes = left.norm(dim=1, keepdim=True)
    return torch.where(sizes > 1e-8 * sizes.max(), left, 0.0) if left.numel() else left
