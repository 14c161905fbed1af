"""What a change costs: metrics M, known by M^{-1} x alone, and how much a drifted key is amplified under one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import SolveError
from .checked import cholesky, condition_of, finite, positive, symmetric_moment

__all__ = [
    "Covariance",
    "Identity",
    "Metric",
    "NullSpace",
    "Woodbury",
    "amplification",
    "amplification_bound",
    "null_space",
]


class Metric(Protocol):
    """What a change costs: tr(Dw M Dw^T), given only by M^{-1} x."""

    @property
    def name(self) -> str:
        """The metric's name in settings and reports."""

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue of M."""

    def apply_inverse(self, x: Tensor) -> Tensor:
        """Return M^{-1} x for x of shape m x n."""

    def scaled(self, factor: float) -> Metric:
        """Return factor * M; whatever was factorised is shared."""


@dataclass(frozen=True, eq=False)
class Identity:
    """M = scale * I: every direction costs the same."""

    name: ClassVar[str] = "identity"
    scale: float = 1.0

    def __post_init__(self) -> None:
        positive("The scale of the identity metric", self.scale)

    @property
    def condition(self) -> float:
        """Always 1."""
        return 1.0

    def apply_inverse(self, x: Tensor) -> Tensor:
        """Return x / scale."""
        return x / self.scale

    def scaled(self, factor: float) -> Identity:
        """Return factor * M."""
        return Identity(self.scale * factor)


@dataclass(frozen=True, eq=False)
class Covariance:
    """M = scale * L L^T, L the Cholesky factor (m x m) of a second moment: what text often uses costs more."""

    name: ClassVar[str] = "covariance"
    cholesky: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        positive("The scale of the covariance metric", self.scale)

    @classmethod
    def from_moment(cls, moment: Tensor, eta: float = 1e-4, floor: float = 0.0) -> Covariance:
        """Factorise a second moment once, for any number of solves.

        Args:
            moment: C, mean of k k^T (m x m).
            eta: Added to the diagonal, relative to the mean eigenvalue tr(C)/m.
            floor: Added to the diagonal as it is (MEMIT's lam_n, for instance).

        Raises:
            SolveError: `moment` is not square, not finite, or not positive definite.

        Example:
            >>> Covariance.from_moment(4 * torch.eye(2), eta=0.0).apply_inverse(torch.ones(2, 1).double()).tolist()
            [[0.25], [0.25]]
        """
        c = symmetric_moment(moment)
        added = eta * (c.diagonal().mean().item()) + floor
        c.diagonal().add_(added)
        return cls(cholesky(c, "The second moment", f"observe more tokens than the {len(c)} entries of a key, or raise"
                             f" eta (now {eta:g})"))  # fmt: skip

    @cached_property
    def condition(self) -> float:
        """Largest over smallest eigenvalue (exact up to m = 512, by iteration beyond)."""
        return condition_of(lambda x: self.cholesky @ (self.cholesky.T @ x), replace(self, scale=1.0).apply_inverse,
                          len(self.cholesky))  # fmt: skip

    def apply_inverse(self, x: Tensor) -> Tensor:
        """Return M^{-1} x by two triangular solves."""
        return torch.cholesky_solve(x, self.cholesky) / self.scale

    def scaled(self, factor: float) -> Covariance:
        """Return factor * M; the Cholesky factor is shared."""
        return replace(self, scale=self.scale * factor)


@dataclass(frozen=True, eq=False)
class Woodbury:
    """M = diag(diagonal) + F F^T with F m x k, k far below m: a covariance from few vectors, with no m x m matrix."""

    name: ClassVar[str] = "low_rank"
    diagonal: Tensor
    factor: Tensor

    @classmethod
    def of(cls, diagonal: Tensor | float, vectors: Tensor, weights: Tensor | None = None) -> Woodbury:
        """Make M = diag(diagonal) + V diag(weights) V^T.

        Args:
            diagonal: One positive number, or m of them.
            vectors: V (m x k).
            weights: k numbers that are not negative; ones when left out.

        Raises:
            SolveError: A diagonal entry is not positive, a weight is negative, or something is not finite.
        """
        v = finite("The low-rank metric's vectors", vectors)
        d = finite("The low-rank metric's diagonal", torch.as_tensor(diagonal)).expand(len(v)).clone()
        s = torch.ones(v.shape[1]).double() if weights is None else finite("The low-rank metric's weights", weights)
        if not bool((d > 0).all()) or bool((s < 0).any()):
            raise SolveError(
                f"A low-rank metric needs a diagonal above 0 and weights of at least 0; the least are "
                f"{d.min().item():g} and {s.min().item():g}. Raise its eta."
            )
        return cls(d, v * s.sqrt())

    @cached_property
    def _inner(self) -> Tensor:
        inner = self.factor.T @ (self.factor / self.diagonal[:, None])
        inner.diagonal().add_(1.0)
        return cholesky(inner, "The low-rank metric", "raise its eta")

    @cached_property
    def condition(self) -> float:
        """Largest over smallest eigenvalue (exact up to m = 512, by iteration beyond)."""
        d, f = self.diagonal[:, None], self.factor
        return condition_of(lambda x: d * x + f @ (f.T @ x), self.apply_inverse, len(f))

    def apply_inverse(self, x: Tensor) -> Tensor:
        """Return M^{-1} x by the Woodbury identity: one k x k system."""
        y = x / self.diagonal[:, None]
        return y - (self.factor @ torch.cholesky_solve(self.factor.T @ y, self._inner)) / self.diagonal[:, None]

    def scaled(self, factor: float) -> Woodbury:
        """Return factor * M."""
        positive("The scale of the low-rank metric", factor)
        return Woodbury(self.diagonal * factor, self.factor * math.sqrt(factor))


@dataclass(frozen=True, eq=False)
class NullSpace:
    """M^{-1} = U U^T / lam: a change may only read the directions U (m x r, orthonormal) that text hardly uses."""

    name: ClassVar[str] = "nullspace"
    basis: Tensor
    lam: float = 1.0

    def __post_init__(self) -> None:
        positive("lam of the null-space metric", self.lam)

    @property
    def condition(self) -> float:
        """Infinite: the directions outside of U cost infinitely much."""
        return 1.0 if self.basis.shape[0] == self.basis.shape[1] else math.inf

    @property
    def dimension(self) -> int:
        """The number r of directions that are left."""
        return self.basis.shape[1]

    def project(self, x: Tensor) -> Tensor:
        """Return P x = U U^T x."""
        return self.basis @ (self.basis.T @ x)

    def apply_inverse(self, x: Tensor) -> Tensor:
        """Return P x / lam."""
        return self.project(x) / self.lam

    def scaled(self, factor: float) -> NullSpace:
        """Return factor * M; the basis is shared."""
        return replace(self, lam=self.lam * factor)


def null_space(moment: Tensor, energy: float = 0.02, *, threshold: float | None = None, lam: float = 1.0) -> NullSpace:
    """Find the directions that a second moment hardly uses.

    Source:
        AlphaEdit (Fang et al., 2025), which takes eigenvalues below an absolute `threshold`; the share of the trace
        is ours, because it does not depend on the scale of a model's keys.

    Args:
        moment: C (m x m).
        energy: The smallest eigenvalues are taken as long as they carry at most this share of tr(C), from 0 to 1.
        threshold: Take the eigenvalues below this number instead.
        lam: See `NullSpace`.

    Raises:
        SolveError: No direction qualifies, or `moment` is not square and finite.

    Example:
        >>> null_space(torch.diag(torch.tensor([1.0, 98.0, 1.0]))).dimension
        2
    """
    values, vectors = torch.linalg.eigh(symmetric_moment(moment))
    values = values.clamp_min(0)
    if threshold is not None:
        dimension = int((values < threshold).sum())
    else:
        dimension = int((values.cumsum(0) <= energy * values.sum() * (1 + 1e-12)).sum())
    if dimension == 0:
        rule = f"an eigenvalue below {threshold:g}" if threshold is not None else f"at most {energy:.2%} of the trace"
        raise SolveError(f"No direction of this second moment has {rule}; the smallest eigenvalue is {values[0]:g}, "
                         f"the trace {values.sum():g}. Allow more, or use metric covariance.")  # fmt: skip
    return NullSpace(vectors[:, :dimension].clone(), lam)


def amplification(key: Tensor, metric: Metric) -> float:
    """Tell how much more a write under `metric` reacts to a drifted key than the isotropic write does.

    With w_M = M^{-1}k / (k^T M^{-1}k) it is ‖w_M‖ / ‖w_I‖ = 1 / cos(k, M^{-1}k), at least 1.

    Args:
        key: k (m).
        metric: M.

    Raises:
        SolveError: The key is not finite, is zero, or has no part in the metric's directions.

    Example:
        >>> amplification(torch.ones(4), Identity())
        1.0
    """
    k = finite("The key", key).reshape(-1, 1)
    x = metric.apply_inverse(k)
    along = float((k * x).sum())
    if along <= 1e-14 * float(k.norm() * x.norm()):
        raise SolveError(f"This key has no part in the directions that metric {metric.name} allows; use another one.")
    return max(1.0, float(k.norm() * x.norm()) / along)


def amplification_bound(condition: float) -> float:
    """Return Kantorovich's bound on `amplification`: (c + 1) / (2 sqrt(c)) for a metric of condition c.

    Example:
        >>> amplification_bound(4.0)
        1.25
    """
    return (condition + 1) / (2 * math.sqrt(condition)) if math.isfinite(condition) else math.inf
