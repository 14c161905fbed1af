"""The small space that low-rank adapters span: exact coordinates of each in bases that all share.

Source: Core Space Merging (Panariello et al., NeurIPS 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import linalg
from ..change import LowRank

__all__ = [
    "FACTOR_TOLERANCE",
    "Core",
    "Fused",
    "canonical",
    "coordinates",
    "factors",
    "outputs_of",
    "spanned",
    "stacked",
    "triples",
    "weighted",
    "within",
]

RANK_TOLERANCE = 1e-10
"""Singular values below this share of the largest are rounding."""

FACTOR_TOLERANCE = 1e-6
"""The same where every direction counts alike however weak it is: below this a direction may be float32's rounding."""


@dataclass(frozen=True, eq=False)
class Fused(LowRank):
    """A fused difference, with what is to be said of it.

    Attributes:
        notes: Numbers by name, such as ``kept_energy``: the share of the squared norm that a smaller rank has kept.
    """

    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Core:
    """Adapters as small matrices: the difference of adapter i is ``left @ middles[i] @ right``.

    Shapes:
        left: (outputs, a), orthonormal columns; middles: (adapters, a, b); right: (b, inputs), orthonormal rows. All
        float64; a and b are at most the sum of the ranks, and the weight's sizes.
    """

    left: Tensor
    middles: Tensor
    right: Tensor


def coordinates(parts: Sequence[LowRank]) -> Core:
    """Find bases that hold all adapters' outputs and inputs, and each adapter's coordinates in them.

    Inner products among adapters are those of their differences. Costs O((outputs + inputs) R^2 + R^3) for the sum R
    of the ranks; nothing of size outputs x inputs is made.
    """
    left, left_slices = _basis([p.left.double() for p in parts])
    right, right_slices = _basis([p.right.double().T for p in parts])
    middles = torch.stack([b @ a.T for b, a in zip(left_slices, right_slices)])
    return Core(left, middles, right.T)


def _basis(blocks: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    q, t = torch.linalg.qr(torch.cat(list(blocks), 1))
    return q, t.split([b.shape[1] for b in blocks], 1)


def canonical(core: Core) -> Core:
    """Turn to the basis that only the differences decide, not how each was cut into factors.

    Rules that look at single entries give, in this basis, the same answer for B, A as for B G and the inverse of G
    times A. Directions in which no adapter does anything are dropped.
    """
    n, a, b = core.middles.shape
    u, s, _ = torch.linalg.svd(core.middles.permute(1, 0, 2).reshape(a, n * b), full_matrices=False)
    _, t, vh = torch.linalg.svd(core.middles.reshape(n * a, b), full_matrices=False)
    u = _signed(u[:, s > RANK_TOLERANCE * s[:1]], core.left)
    v = _signed(vh[t > RANK_TOLERANCE * t[:1]].T, core.right.T)
    return Core(core.left @ u, u.T @ core.middles @ v, v.T @ core.right)


def spanned(parts: Sequence[LowRank]) -> Core:
    """Return what ``canonical(coordinates(parts))`` returns, from the factors: cheap for many adapters too."""
    left = outputs_of([(p.left.double(), p.right.double()) for p in parts])
    right = outputs_of([(p.right.double().T, p.left.double().T) for p in parts])
    left, right = left * _signs(left), right * _signs(right)
    middles = torch.stack([(left.T @ p.left.double()) @ (p.right.double() @ right) for p in parts])
    return Core(left, middles, right.T)


def outputs_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the left singular vectors of all differences side by side, from their factors B, A.

    Shapes:
        B: (outputs, r), A: (r, inputs), float64; the result is (outputs, k), k at most the sum of the ranks.
    """
    wide = torch.cat([b @ torch.linalg.qr(a.T).R.T for b, a in pairs], 1)  # A = R^T Q^T, and Q^T turns nothing here
    q, t = torch.linalg.qr(wide)
    u, s, _ = torch.linalg.svd(t, full_matrices=False)
    shared: Tensor = q @ u[:, s > RANK_TOLERANCE * s[:1]]
    return shared


def _signed(basis: Tensor, outer: Tensor) -> Tensor:
    """Make the largest entry of each vector positive, as the weight's own coordinates ``outer @ basis`` show it."""
    return basis * _signs(outer @ basis) if basis.numel() else basis


def _signs(vectors: Tensor) -> Tensor:
    """A singular vector's sign is arbitrary: return what makes its largest entry positive."""
    if not vectors.numel():
        return torch.ones(())
    return torch.where(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)


def weighted(core: Core, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of the coordinates, (a, b)."""
    return torch.einsum("n,nab->ab", torch.tensor(weights, dtype=torch.float64), core.middles)


def factors(core: Core, middle: Tensor, rank: int | None = None) -> LowRank:
    """Turn coordinates into factors of the weight's difference, of the smallest rank, or at most `rank`.

    Shapes:
        middle: (a, b).
    """
    u, s, vh = torch.linalg.svd(middle, full_matrices=False)
    n = max(1, int((s > RANK_TOLERANCE * s[:1]).sum())) if s.numel() else 0
    n = min(n, rank or n)
    return within(core.left @ u[:, :n], s, vh[:n] @ core.right)


# ---------------------------------------------------------------- factors and singular triples


def stacked(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Put factors side by side, in float64: the weighted sum of the differences, of the sum of their ranks."""
    left = torch.cat([p.left.double() * w for p, w in zip(parts, weights)], 1)
    return LowRank(left, torch.cat([p.right.double() for p in parts]))


def triples(part: LowRank, tolerance: float = RANK_TOLERANCE) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular vectors and values of a difference up to its rank, from its factors alone.

    Args:
        part: The difference.
        tolerance: Singular values up to this share of the largest count as rounding.

    Returns:
        U (outputs, k), s (k) and Vh (k, inputs) in float64; k is 0 for a difference of zero.
    """
    left, right = linalg.compress(part.left, part.right, tolerance)
    root = left.norm(dim=0)
    return left / root, root.square(), right / root[:, None]


def within(left: Tensor, values: Tensor, right: Tensor) -> Fused:
    """Make factors of the first singular triples, and say how much of the squared norm they keep.

    Shapes:
        left: (outputs, k); values: all singular values, k or more; right: (k, inputs).
    """
    k = left.shape[1]
    root = values[:k].sqrt()
    whole = float(values.square().sum())
    kept = float(values[:k].square().sum()) / whole if whole else 1.0
    return Fused(
        (left * root).float(), (root[:, None] * right).float(), {"kept_energy": kept} if kept < 1 - 1e-12 else {}
    )
