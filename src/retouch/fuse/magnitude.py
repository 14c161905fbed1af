"""``magnitude``: keep each adapter's largest entries, then take the mean."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import setting
from ._blocks import Blocks, Entrywise, Rule, averaged, trim
from .base import FuseMethod

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude(Entrywise, FuseMethod):
    """Keep the largest entries of each adapter's difference and take the mean of what is left.

    Source:
        The trim of TIES-Merging (Yadav et al., NeurIPS 2023) alone; PEFT's ``magnitude_prune_svd``.

    Use when:
        You want to see what trimming does without an election.

    Known problems:
        What is left has full rank and is cut back to the sum of the ranks; the share of the squared norm that is kept
        is noted for each weight.

    Shapes:
        Blocks of rows of all differences; factors (outputs, rank) and (rank, inputs).

    Example:
        >>> Magnitude().averages
        True
    """

    density: float = setting(0.5, "Share of an adapter's entries that is kept, of those that it could set.", gt=0, le=1)

    def rule(self, blocks: Blocks) -> Rule:
        """Trim each adapter, then average."""
        sizes = blocks.thresholds(self.density)
        return lambda values, _: averaged(trim(values, sizes), blocks.module.weights)
