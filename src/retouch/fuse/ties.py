"""``ties``: trim each adapter, elect signs, average those that agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..settings import setting
from ._blocks import Blocks, Elected, Rule, elected, trim
from .base import FuseMethod

__all__ = ["Ties"]


@dataclass(frozen=True)
class Ties(Elected, FuseMethod):
    """Keep each adapter's largest entries, let them elect every entry's sign, and average those that have it.

    Source:
        TIES-Merging (Yadav et al., NeurIPS 2023), on whole differences; weights enter the vote and the mean. With
        ``space=core`` the entries are coordinates in the canonical basis of what the adapters span: another rule,
        called ties@core.

    Use when:
        Adapters contradict one another entry by entry. Tune `lam` and `density`.

    Known problems:
        What is left has full rank and is cut back to the sum of the ranks; the share of the squared norm that is kept
        is noted for each weight. In the core it has no more than that rank. Trimming factors instead of differences,
        as PEFT's ``ties`` does, means nothing for their product and is not offered.

    Shapes:
        Blocks of rows of all differences; factors (outputs, rank) and (rank, inputs).

    Example:
        >>> Ties(space="core").label
        'ties@core'
    """

    density: float = setting(0.2, "Share of an adapter's entries that is kept, of those that it could set.", gt=0, le=1)

    averages: ClassVar[bool] = False  # the mean is already over those that have an opinion

    def rule(self, blocks: Blocks) -> Rule:
        """Trim, elect, average."""
        sizes = blocks.thresholds(self.density)
        return lambda values, _: elected(trim(values, sizes), blocks.module.weights)
