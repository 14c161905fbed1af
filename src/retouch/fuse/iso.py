"""``iso``: the mean of the differences with a flat spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..change import LowRank
from ..settings import setting
from .base import FuseMethod, Module, Resolver
from .core import FACTOR_TOLERANCE, stacked, triples, weighted, within

__all__ = ["Iso"]


@dataclass(frozen=True)
class Iso(FuseMethod):
    """Take the mean like cat and give all its directions the same strength.

    Source:
        Iso-C (Marczak et al., No Task Left Behind, ICML 2025; danielm1405/iso-merging). There the singular values are
        replaced by their mean over the weight's size; for adapters of low rank nearly all of that would go into
        directions that no adapter uses. Here the mean runs over the rank; ``published`` does it their way.

    Use when:
        A few strong directions drown what some adapters have learned.

    Known problems:
        Equal adapters do not give that adapter: the spectrum is flattened. The norm shrinks, so the best `lam` is large.
        ``published`` forms the whole difference, and its result has full rank.

    Shapes:
        Factors (outputs, k) and (k, inputs) for the rank k of the mean.

    Example:
        >>> Iso(lam=3).lam
        3.0
    """

    published: bool = setting(False, "Average over the weight's size instead of the rank, as published.")

    def out_rank(self, ranks: Sequence[int], shape: tuple[int, int], resolver: Resolver | None = None) -> int:
        """As published, every direction of the weight."""
        return min(shape) if self.published else super().out_rank(ranks, shape, resolver)

    def fuse(self, module: Module) -> LowRank:
        """Replace the singular values of the mean by their mean."""
        mean = stacked(module.parts, module.weights)
        if module.core is not None:
            mean = LowRank(module.core.left @ weighted(module.core, module.weights), module.core.right)
        if self.published:
            u, s, vh = torch.linalg.svd(mean.delta(), full_matrices=False)
        else:
            u, s, vh = triples(mean, FACTOR_TOLERANCE)
        return within(u, s.mean().expand_as(s), vh)
