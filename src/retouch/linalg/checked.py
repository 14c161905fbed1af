"""Numbers that are what they should be, in float64 on the CPU, or an error that names what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import SolveError

__all__ = ["cholesky", "condition_of", "eigen_condition", "finite", "positive", "shape_of", "symmetric_moment"]


def finite(what: str, x: Tensor) -> Tensor:
    """Return a tensor in float64 on the CPU, all of it finite."""
    y = x.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(y).all()):
        where = (~torch.isfinite(y)).nonzero()[0].tolist()
        raise SolveError(f"{what} must be finite; the entry at {where} is {y[tuple(where)].item()}.")
    return y


def positive(what: str, value: float) -> None:
    """Refuse a number that is not above 0."""
    if not (math.isfinite(value) and value > 0):
        raise SolveError(f"{what} must be finite and above 0; got {value!r}.")


def symmetric_moment(moment: Tensor) -> Tensor:
    """Return a second moment, square and exactly symmetric."""
    c = finite("The second moment", moment)
    if c.ndim != 2 or c.shape[0] != c.shape[1] or c.trace() <= 0:
        raise SolveError(f"A second moment is a square matrix with a trace above 0; got shape {shape_of(c)}.")
    return (c + c.T) / 2


def cholesky(matrix: Tensor, what: str, advice: str) -> Tensor:
    """Factorise a matrix; one that is not positive definite is refused with advice."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or not bool(torch.isfinite(factor.diagonal()).all()):
        raise SolveError(f"{what} ({shape_of(matrix)}) is not positive definite: {advice}.")
    return factor


def eigen_condition(matrix: Tensor) -> float:
    """Return the largest over the smallest eigenvalue; infinite where one is not above 0."""
    values = torch.linalg.eigvalsh(matrix)
    return float(values[-1] / values[0]) if values[0] > 0 else math.inf


def condition_of(apply: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], size: int) -> float:
    """Return the condition of a matrix that is known by its products: exact up to 512 rows, by iteration beyond."""
    if size <= 512:
        return eigen_condition(apply(torch.eye(size).double()))
    return _largest(apply, size) * _largest(inverse, size)


def _largest(apply: Callable[[Tensor], Tensor], size: int, block: int = 4, n_iter: int = 30) -> float:
    x = torch.randn(size, block, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(n_iter):
        x = torch.linalg.qr(apply(x)).Q
    return float(torch.linalg.matrix_norm(x.T @ apply(x), 2))


def shape_of(x: Tensor) -> str:
    """Write a shape for people."""
    return " x ".join(map(str, x.shape)) or "a number"
