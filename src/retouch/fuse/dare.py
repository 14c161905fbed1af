"""``dare``: drop entries at random, scale the rest, take the mean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..settings import setting
from ._blocks import Blocks, Entrywise, Rule, averaged
from .base import FuseMethod

__all__ = ["Dare", "dropped"]


@dataclass(frozen=True)
class Dare(Entrywise, FuseMethod):
    """Drop entries of each adapter's difference at random, scale up those that stay, and take the mean.

    Source:
        DARE (Yu et al., Language Models are Super Mario, ICML 2024).

    Use when:
        You compare with it. Its expectation is cat, so what it adds is noise.

    Known problems:
        Random: other seeds, other results. The random numbers belong to (seed, weight, adapter's name, row), so that
        the order of the adapters and the memory at hand change nothing. What is left has full rank and is cut back to
        the sum of the ranks, which keeps little at small densities; the share is noted for each weight.

    Shapes:
        Blocks of rows of all differences; factors (outputs, rank) and (rank, inputs).

    Example:
        >>> Dare(density=0.8).density
        0.8
    """

    density: float = setting(0.5, "Probability that an entry stays; those that do are divided by it.", gt=0, le=1)

    def rule(self, blocks: Blocks) -> Rule:
        """Drop, scale, average."""
        return lambda values, row: averaged(
            dropped(blocks, values, row, self.density, self.seed), blocks.module.weights
        )


def dropped(blocks: Blocks, values: Tensor, row: int, density: float, seed: int) -> Tensor:
    """Drop entries of a block at random and divide the others by the probability, in place."""
    if density < 1:
        for i, value in enumerate(values):
            stays = blocks.draws(seed, i, row, len(value)) < density
            value.mul_(stays).div_(density)
    return values
