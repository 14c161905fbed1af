"""``dare_ties``: drop entries at random, elect signs, average those that agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..settings import setting
from ._blocks import Blocks, Elected, Rule, elected
from .base import FuseMethod
from .dare import dropped

__all__ = ["DareTies"]


@dataclass(frozen=True)
class DareTies(Elected, FuseMethod):
    """Drop entries at random like dare, elect every entry's sign, and average those that have it; nothing is trimmed.

    Source:
        DARE (Yu et al., ICML 2024) before the election of TIES-Merging (Yadav et al., NeurIPS 2023). With
        ``space=core`` the entries are coordinates in the canonical basis: another rule, called dare_ties@core.

    Use when:
        You compare with it.

    Known problems:
        Those of dare. As the mean is over those that stayed, it is larger than cat by about the inverse of the density:
        tune `lam`.

    Shapes:
        Blocks of rows of all differences; factors (outputs, rank) and (rank, inputs).

    Example:
        >>> DareTies(space="core").label
        'dare_ties@core'
    """

    density: float = setting(0.5, "Probability that an entry stays; those that do are divided by it.", gt=0, le=1)

    averages: ClassVar[bool] = False

    def rule(self, blocks: Blocks) -> Rule:
        """Drop, scale, elect, average."""
        return lambda values, row: elected(dropped(blocks, values, row, self.density, self.seed), blocks.module.weights)
