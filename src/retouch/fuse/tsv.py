"""``tsv``: keep every adapter's singular directions, made orthogonal to those of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..change import LowRank
from ..settings import setting
from .base import FuseMethod, Module, Resolver
from .core import FACTOR_TOLERANCE, factors, triples

__all__ = ["Tsv", "polar"]

Triples = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Tsv(FuseMethod):
    """Stack the singular vectors of all adapters, make them orthogonal, and add what each adapter does along them.

    Source:
        TSV-Merge (Gargiulo et al., Task Singular Vectors, CVPR 2025; AntoAndGar/task_singular_vectors). There every
        adapter gives as many triples as the weight's size divided by the number of adapters; for adapters of low rank
        most of those are directions in which they do nothing, and making all orthogonal bends the real ones. Here an
        adapter gives as many as its rank; ``published`` does it their way. Weights scale the singular values, times
        the number of adapters: equal weights leave them alone.

    Use when:
        Adapters overlap in directions without agreeing. Equal adapters give that adapter, orthogonal ones their sum.

    Known problems:
        Between a mean and a sum, so the best `lam` differs from that of cat. ``published`` forms whole differences and
        takes N full decompositions of each.

    Shapes:
        U (outputs, K), s (K), V (inputs, K) for the sum K of the ranks.

    Example:
        >>> Tsv().published
        False
    """

    published: bool = setting(False, "Take size / N triples of each adapter, whatever its rank, as published.")

    averages: ClassVar[bool] = False

    def out_rank(self, ranks: Sequence[int], shape: tuple[int, int], resolver: Resolver | None = None) -> int:
        """As published, at most the weight's share of each adapter; a resolver may give each the rank of all."""
        if not self.published:
            return super().out_rank(ranks, shape, resolver)
        k, each = _published_share(shape, len(ranks)), [sum(ranks) if resolver and r else r for r in ranks]
        return min(sum(min(k, r) for r in each), *shape)

    def fuse(self, module: Module) -> LowRank:
        """Stack singular triples, make them orthogonal, multiply out."""
        scales = [w * module.n_adapters for w in module.weights]
        if self.published:
            k = _published_share(module.shape, module.n_adapters)
            return _joined([_dense(p, k) for p in module.parts], scales, tolerance=0.0)
        if module.core is None:
            return _joined([triples(p, FACTOR_TOLERANCE) for p in module.parts], scales)
        one = torch.eye(module.core.right.shape[0])
        small = _joined([triples(LowRank(m, one), FACTOR_TOLERANCE) for m in module.core.middles], scales)
        return factors(module.core, small.delta())


def _published_share(shape: tuple[int, int], n_adapters: int) -> int:
    return max(1, min(shape) // n_adapters)


def _dense(part: LowRank, k: int) -> Triples:
    u, s, vh = torch.linalg.svd(part.delta(), full_matrices=False)
    s[part.rank :] = 0.0  # rounding, whose size would decide the rank of the result
    return u[:, :k], s[:k], vh[:k]


def _joined(found: Sequence[Triples], scales: Sequence[float], tolerance: float = FACTOR_TOLERANCE) -> LowRank:
    values = torch.cat([s * scale for (_, s, _), scale in zip(found, scales)])
    left = polar(torch.cat([u for u, _, _ in found], 1), tolerance)
    right = polar(torch.cat([vh.T for _, _, vh in found], 1), tolerance)
    does = values.abs() > 1e-14 * values.abs().max() if len(values) else values > 0
    root = values[does].abs().sqrt()
    return LowRank((left[:, does] * root * values[does].sign()), root[:, None] * right.T[does])


def polar(stack: Tensor, tolerance: float = FACTOR_TOLERANCE) -> Tensor:
    """Return the nearest matrix whose columns are orthonormal as far as they are independent: X = P S Q^T -> P Q^T.

    Args:
        stack: (d, k).
        tolerance: Singular values up to this share of the largest count as none; 0 keeps all.
    """
    q, t = torch.linalg.qr(stack)
    u, s, vh = torch.linalg.svd(t, full_matrices=False)
    real = s > tolerance * s[:1] if tolerance else torch.ones_like(s, dtype=torch.bool)
    nearest: Tensor = q @ (u[:, real] @ vh[real])
    return nearest
