"""Products of two factors that are never multiplied out: norms, compression, a randomised SVD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolveError
from .checked import finite, shape_of

__all__ = ["Operator", "compress", "frobenius_norm", "randomized_svd", "spectral_norm"]


def spectral_norm(left: Tensor, right: Tensor) -> float:
    """Return the largest singular value of left @ right without forming it (d x r, r x m).

    Example:
        >>> round(spectral_norm(torch.ones(2, 1), torch.ones(1, 8)), 6)
        4.0
    """
    _, core, _ = _core(left, right)
    return float(torch.linalg.matrix_norm(core, 2)) if core.numel() else 0.0


def frobenius_norm(left: Tensor, right: Tensor) -> float:
    """Return the root of the sum of squares of left @ right without forming it (d x r, r x m)."""
    _, core, _ = _core(left, right)
    return float(core.norm())


def compress(left: Tensor, right: Tensor, tolerance: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Return factors of the same product with the least inner size.

    Args:
        left: d x r.
        right: r x m.
        tolerance: Singular values up to this share of the largest are dropped.

    Returns:
        Factors (d x q, q x m) in float64, q <= r, with equally long columns and rows; q = 0 when the product is zero.

    Example:
        >>> [tuple(f.shape) for f in compress(torch.ones(5, 3), torch.ones(3, 4))]
        [(5, 1), (1, 4)]
    """
    q_left, core, q_right = _core(left, right)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    q = int((s > tolerance * s[0]).sum()) if len(s) else 0
    root = s[:q].sqrt()
    return q_left @ (u[:, :q] * root), (root[:, None] * vh[:q]) @ q_right.T


def _core(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Ql, core, Qr with left @ right = Ql core Qr^T and orthonormal Ql, Qr."""
    left, right = finite("The left factor", left), finite("The right factor", right)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise SolveError(f"Factors must be d x r and r x m; got {shape_of(left)} and {shape_of(right)}.")
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    return q_left, r_left @ r_right.T, q_right


@dataclass(frozen=True)
class Operator:
    """A matrix known only by its products: forward (m x k to d x k) and adjoint (d x k to m x k)."""

    shape: tuple[int, int]
    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]


def randomized_svd(
    matrix: Tensor | Operator, rank: int, oversample: int = 10, n_iter: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the largest singular values and vectors from a few products with random vectors.

    Source:
        Halko, Martinsson, Tropp (2011), with subspace iteration orthonormalised at each half step.

    Args:
        matrix: A (d x m), or an `Operator` when it should not be formed.
        rank: How many singular values, at most min(d, m).
        oversample: Extra random vectors.
        n_iter: Subspace iterations; more for a spectrum that falls slowly.
        seed: Of the random vectors. The caller's random state is not touched.

    Returns:
        U (d x rank), s (rank), Vh (rank x m), so that A is about U diag(s) Vh.

    Raises:
        SolveError: `rank` does not fit the shape.

    Example:
        >>> randomized_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)[1].round(decimals=6).tolist()
        [3.0, 2.0]
    """
    if isinstance(matrix, Tensor):
        a = finite("The matrix", matrix)
        matrix = Operator((a.shape[0], a.shape[1]), lambda x: a @ x, lambda y: a.T @ y)
    d, m = matrix.shape
    if not 1 <= rank <= min(d, m):
        raise SolveError(f"A {d} x {m} matrix has from 1 to {min(d, m)} singular values; {rank} were asked for.")
    width = min(rank + oversample, d, m)
    start = torch.randn(m, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(matrix.forward(start)).Q
    for _ in range(n_iter):
        q = torch.linalg.qr(matrix.forward(torch.linalg.qr(matrix.adjoint(q)).Q)).Q
    u, s, vh = torch.linalg.svd(matrix.adjoint(q).T, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vh[:rank]
