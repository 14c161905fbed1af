"""``svd``: the mean of the differences, cut to the rank that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..change import LowRank
from ..settings import setting
from ._blocks import Blocks, averaged, refactored
from .base import FuseMethod, Module, Resolver
from .core import factors, stacked, triples, weighted, within

__all__ = ["Svd"]


@dataclass(frozen=True)
class Svd(FuseMethod):
    """Take the mean like cat and keep its largest singular triples.

    Source:
        The best approximation of a rank (Eckart and Young, 1936), found from the factors: no whole difference is formed.

    Use when:
        The fused adapter must be small, or of the rank that an engine allows.

    Known problems:
        Independent adapters hardly share directions: cutting four of ranks 4, 8, 2 and 6 to rank 8 loses two thirds of
        the mean. The share of the squared norm that is kept is noted for each weight.

    Shapes:
        Factors (outputs, rank) and (rank, inputs).

    Example:
        >>> Svd(rank=16).rank
        16
    """

    rank: int | None = setting(None, "Rank to keep; by default that of the largest adapter.", ge=1)

    def takes_entries(self) -> bool:
        """A mean can be taken of entries as well."""
        return True

    def out_rank(self, ranks: Sequence[int], shape: tuple[int, int], resolver: Resolver | None = None) -> int:
        """The rank that is kept, if there is as much."""
        wanted = min(self.rank or max(ranks), *shape)
        whole = getattr(resolver, "space", "core") == "full"  # single entries are changed, which leaves full rank
        return wanted if whole else min(wanted, sum(ranks))

    def fuse(self, module: Module) -> LowRank:
        """Find the largest singular triples of the mean."""
        rank = self.rank or max(module.ranks or (p.rank for p in module.parts))
        if module.entries is not None:
            return refactored(Blocks(module), lambda x, _: averaged(x, module.weights), rank, self.seed)
        if module.core is not None:
            return factors(module.core, weighted(module.core, module.weights), rank)
        u, s, vh = triples(stacked(module.parts, module.weights))
        return within(u[:, :rank], s, vh[:rank])
