"""``cat``: the exact weighted mean of the differences, by putting factors side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..change import LowRank
from ._blocks import Blocks, averaged, refactored, whole
from .base import FuseMethod, Module
from .core import factors, stacked, weighted

__all__ = ["Cat"]


@dataclass(frozen=True)
class Cat(FuseMethod):
    """Take the weighted mean of the adapters' differences, exactly, whatever their ranks.

    Source:
        Task arithmetic (Ilharco et al., ICLR 2023) on differences; in factors as stacking in FLoRA (Wang et al.,
        NeurIPS 2024) and PEFT's ``cat``.

    Use when:
        You have no reason for another: it is the default, and with a tuned `lam` the baseline that counts.

    Known problems:
        The rank is the sum of the ranks; `svd` cuts it. What adapters contradict one another in cancels; a resolver may
        stand before.

    Shapes:
        Factors (outputs, R) and (R, inputs) for the sum R of the ranks; at most the weight's smaller size.

    Example:
        >>> one = LowRank(torch.ones(2, 1), torch.tensor([[1.0, 2.0]]))
        >>> Cat().fuse(Module("a", (one, one), (0.5, 0.5), (0, 1), 2, (None, None))).delta()[0].tolist()
        [1.0, 2.0]
    """

    def takes_entries(self) -> bool:
        """A mean can be taken of entries as well."""
        return True

    def fuse(self, module: Module) -> LowRank:
        """Put factors side by side."""
        if module.entries is not None:
            return refactored(Blocks(module), lambda x, _: averaged(x, module.weights), module.rank, self.seed)
        if module.core is not None:
            return factors(module.core, weighted(module.core, module.weights))
        mean = stacked(module.parts, module.weights)
        if mean.rank <= min(mean.shape):
            return LowRank(mean.left.float(), mean.right.float())
        total = torch.empty(mean.shape)
        for row in range(0, len(total), 256):  # float64 of a few rows at a time
            total[row : row + 256] = mean.left[row : row + 256] @ mean.right
        return whole(total)
