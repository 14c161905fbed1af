"""Keep gradients of one size on the way down through many exits.

With an exit after every block, the gradient of a low block is the sum over all exits above it: it grows towards the
input. Two nodes a block, which do nothing forwards, turn that sum into a mean.

Letters: L blocks; m_l, the number of exits at blocks l and above. The first node stands right after block l, before
its exit and before its output is compared with a teacher's: gradient times 1/m_l. The second stands on the way to block
l + 1: gradient times m_{l+1}. By induction from the top, what leaves block l is the mean over the exits from l upwards.

Source: Shen et al. 2022; Li et al. 2019. They count blocks in place of exits, which is the same with an exit everywhere.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

__all__ = ["counts", "scale_gradient"]


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x` itself, as a view; its gradient is multiplied by `factor` on the way back.

    Shapes: any; returns the same.
    """
    return _Scale.apply(x, factor)  # type: ignore[no-any-return, no-untyped-call]


def counts(exits: Collection[int], blocks: int) -> list[int]:
    """Return m_l for every block: how many exits stand at block l or above.

    Above the last exit, where none stands, the count is 1, so that both nodes do nothing there.

    Example:
        >>> counts([1, 3], 4)
        [2, 2, 1, 1]
    """
    return [max(1, sum(block >= l for block in exits)) for l in range(blocks)]


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)  # an input returned as it is would lose its node

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
