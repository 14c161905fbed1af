"""The linear algebra of every change: one closed-form solver, its metrics, low-rank factors, a randomised SVD.

Letters: a weight is d x m; a fact brings a key (m) and a residual (d), n facts are K (m x n) and R (d x n); p earlier
keys Kp (m x p) may have to keep their output; the answer Dw = left @ right (d x n, n x m) is never multiplied out.
Everything is computed in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from .errors import SolveError, unknown

__all__ = [
    "MAX_CONDITION",
    "Covariance",
    "Identity",
    "Metric",
    "Mode",
    "NullSpace",
    "Operator",
    "Solution",
    "Woodbury",
    "amplification",
    "amplification_bound",
    "compress",
    "frobenius_norm",
    "null_space",
    "randomized_svd",
    "solve",
    "spectral_norm",
]

MAX_CONDITION = 1e12
"""Beyond this an equality solve in float64 keeps fewer than four digits, so it is refused."""

Mode = Literal["equality", "least_squares"]


# ---------------------------------------------------------------- metrics


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
        _positive("The scale of the identity metric", self.scale)

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
        _positive("The scale of the covariance metric", self.scale)

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
        c = _moment(moment)
        added = eta * (c.diagonal().mean().item()) + floor
        c.diagonal().add_(added)
        return cls(_cholesky(c, "The second moment", f"observe more tokens than the {len(c)} entries of a key, or raise"
                             f" eta (now {eta:g})"))  # fmt: skip

    @cached_property
    def condition(self) -> float:
        """Largest over smallest eigenvalue (exact up to m = 512, by iteration beyond)."""
        return _condition(lambda x: self.cholesky @ (self.cholesky.T @ x), replace(self, scale=1.0).apply_inverse,
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
        v = _finite("The low-rank metric's vectors", vectors)
        d = _finite("The low-rank metric's diagonal", torch.as_tensor(diagonal)).expand(len(v)).clone()
        s = torch.ones(v.shape[1]).double() if weights is None else _finite("The low-rank metric's weights", weights)
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
        return _cholesky(inner, "The low-rank metric", "raise its eta")

    @cached_property
    def condition(self) -> float:
        """Largest over smallest eigenvalue (exact up to m = 512, by iteration beyond)."""
        d, f = self.diagonal[:, None], self.factor
        return _condition(lambda x: d * x + f @ (f.T @ x), self.apply_inverse, len(f))

    def apply_inverse(self, x: Tensor) -> Tensor:
        """Return M^{-1} x by the Woodbury identity: one k x k system."""
        y = x / self.diagonal[:, None]
        return y - (self.factor @ torch.cholesky_solve(self.factor.T @ y, self._inner)) / self.diagonal[:, None]

    def scaled(self, factor: float) -> Woodbury:
        """Return factor * M."""
        _positive("The scale of the low-rank metric", factor)
        return Woodbury(self.diagonal * factor, self.factor * math.sqrt(factor))


@dataclass(frozen=True, eq=False)
class NullSpace:
    """M^{-1} = U U^T / lam: a change may only read the directions U (m x r, orthonormal) that text hardly uses."""

    name: ClassVar[str] = "nullspace"
    basis: Tensor
    lam: float = 1.0

    def __post_init__(self) -> None:
        _positive("lam of the null-space metric", self.lam)

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
    values, vectors = torch.linalg.eigh(_moment(moment))
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
    k = _finite("The key", key).reshape(-1, 1)
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


# ---------------------------------------------------------------- the solver


@dataclass(frozen=True, eq=False)
class Solution:
    """Dw = left @ right, and how well it could be found.

    Args:
        left: The residuals (d x n).
        right: B (n x m): what each fact listens to.
        condition: Of the system that was solved; in least squares an upper bound of it.
        ridge: What was added to the system's diagonal, in absolute numbers.
        delivered: Per fact, the fraction of its own residual that its key receives: diag(B K) (n).
    """

    left: Tensor
    right: Tensor
    condition: float
    ridge: float
    delivered: Tensor


def solve(
    keys: Tensor,
    residuals: Tensor,
    metric: Metric,
    *,
    mode: Mode,
    keep: Tensor | None = None,
    keep_weight: float = 1.0,
    ridge: float = 0.0,
    names: Sequence[str] | None = None,
) -> Solution:
    """Find the cheapest change of a weight that gives each key its residual.

        equality        min  tr(Dw M Dw^T)   subject to  Dw K = R  and  Dw Kp = 0
        least squares   min  ‖Dw K - R‖^2 + keep_weight ‖Dw Kp‖^2 + tr(Dw M Dw^T)

    Source:
        The common form of ROME, MEMIT, EMMET and AlphaEdit in its dual: only an (n+p) x (n+p) system is solved.

    Shapes:
        keys m x n, residuals d x n, keep m x p; left d x n, right n x m.

    Args:
        keys: K, the inputs of the weight, one column a fact.
        residuals: R, wanted output minus present output at those inputs.
        metric: M.
        mode: ``"equality"`` or ``"least_squares"``.
        keep: Kp, keys whose output must stay.
        keep_weight: What a unit of change at a kept key costs; in equality mode kept keys stay exactly.
        ridge: Equality only: added to the system's diagonal, relative to its mean. Above 0, coinciding keys are
            accepted and share what they can; `Solution.delivered` tells how much that is.
        names: What to call each fact in an error; by default its number, from 0.

    Raises:
        SolveError: Shapes do not fit, a number is not finite, or in equality mode the system is singular or has a
            condition above `MAX_CONDITION`; the message names the facts whose keys coincide.

    Example:
        >>> solution = solve(torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0]]), Identity(), mode="equality")
        >>> (solution.left @ solution.right).tolist()
        [[0.5, 0.0]]
    """
    k, r = _finite("The keys", keys), _finite("The residuals", residuals)
    _check_request(k, r, mode, keep, keep_weight, ridge, names)
    n = k.shape[1]
    together = k if keep is None else _with_kept(k, keep, keep_weight, mode)
    x = metric.apply_inverse(together)
    gram = together.T @ x
    gram = _finite("The system of keys", (gram + gram.T) / 2)
    added = 1.0 if mode == "least_squares" else ridge * gram.diagonal().mean().item()
    system = gram + added * torch.eye(len(gram)).double()
    if mode == "least_squares":
        condition = float(torch.linalg.matrix_norm(system, math.inf))  # no eigenvalue is below 1
    elif (condition := _eigen_condition(system)) > MAX_CONDITION:
        raise SolveError(_blame(gram, n, condition, k.shape[0], metric.name, names))
    factor = _cholesky(system, "The system of keys", "use a metric with a larger scale")
    columns = torch.cholesky_solve(torch.eye(len(gram), n).double(), factor)
    right = columns.T @ x.T
    return Solution(r, right, condition, added, (right * k.T).sum(1))


def _check_request(
    k: Tensor, r: Tensor, mode: str, keep: Tensor | None, weight: float, ridge: float, names: Sequence[str] | None
) -> None:
    if mode not in ("equality", "least_squares"):
        raise unknown("solver mode", mode, ["equality", "least_squares"])
    if k.ndim != 2 or r.ndim != 2 or k.shape[1] != r.shape[1] or k.shape[1] == 0:
        raise SolveError(f"Keys (m x n) and residuals (d x n) need the same n of at least 1; got {_shape(k)} and "
                         f"{_shape(r)}.")  # fmt: skip
    if keep is not None and (keep.ndim != 2 or keep.shape[0] != k.shape[0]):
        raise SolveError(f"Kept keys must be {k.shape[0]} x p like the keys; got {_shape(keep)}.")
    if not (weight >= 0 and ridge >= 0 and math.isfinite(weight) and math.isfinite(ridge)):
        raise SolveError(f"keep_weight and ridge must be finite and at least 0; got {weight!r} and {ridge!r}.")
    if ridge and mode != "equality":
        raise SolveError(f"ridge belongs to equality mode; least squares has its metric for that. Got ridge {ridge:g}.")
    if names is not None and len(names) != k.shape[1]:
        raise SolveError(f"Each of the {k.shape[1]} facts needs one name; got {len(names)}.")


def _with_kept(k: Tensor, keep: Tensor, weight: float, mode: str) -> Tensor:
    """Append the kept keys; for exact constraints repeated ones are replaced by a basis of their span."""
    kp = _finite("The kept keys", keep)
    if mode == "least_squares":
        return torch.cat([k, math.sqrt(weight) * kp], 1)
    if kp.shape[1]:
        u, s, _ = torch.linalg.svd(kp, full_matrices=False)
        rank = int((s > s[0] / math.sqrt(MAX_CONDITION)).sum())
        if rank < kp.shape[1]:
            kp = u[:, :rank] * s[:rank].mean()
    return torch.cat([k, kp], 1)


def _blame(gram: Tensor, n: int, condition: float, m: int, metric: str, names: Sequence[str] | None) -> str:
    """Say which facts make the system singular."""
    label = [str(i) for i in range(n)] if names is None else list(names)
    size = gram.diagonal().clamp_min(0).sqrt()
    if empty := [label[i] for i in range(n) if size[i] <= 1e-7 * size.max()]:
        return f"The key of {_facts(empty)} is zero under metric {metric}: nothing can be written there."
    cosine = (gram / size.clamp_min(1e-300).outer(size.clamp_min(1e-300))).abs() > 1 - 1e-9
    advice = "group them by subject (method rose or memit_merge), or solve by least squares"
    groups = {tuple(row.nonzero().flatten().tolist()) for row in cosine[:n, :n] if int(row.sum()) > 1}
    if groups:
        shown = "; ".join(f"{_facts([label[i] for i in g])} share one key" for g in sorted(groups)[:3])
        more = f" (and {len(groups) - 3} more such groups)" if len(groups) > 3 else ""
        return f"F{shown[1:]}{more}: {advice}."
    if kept := [label[i] for i in range(n) if bool(cosine[i, n:].any())]:
        return f"The key of {_facts(kept)} is also a key whose output must stay: undo the earlier change, or do not " \
               "keep that key."  # fmt: skip
    weak = torch.linalg.eigh(gram).eigenvectors[:n, 0].abs()
    most = [label[i] for i in weak.argsort(descending=True)[:6].tolist() if weak[i] > 0.1 * weak.max()]
    return f"The {len(gram)} keys ({m} entries each) are linearly dependent under metric {metric} (condition " \
           f"{condition:.1e}, allowed {MAX_CONDITION:.0e}); most involved: {_facts(most)}. Remove one, or solve by " \
           "least squares."  # fmt: skip


def _facts(names: list[str]) -> str:
    if len(names) == 1:
        return f"fact {names[0]}"
    head = names[:8] + ([f"{len(names) - 8} others"] if len(names) > 8 else [])
    return f"facts {', '.join(head[:-1])} and {head[-1]}"


# ---------------------------------------------------------------- low-rank algebra


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
    left, right = _finite("The left factor", left), _finite("The right factor", right)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise SolveError(f"Factors must be d x r and r x m; got {_shape(left)} and {_shape(right)}.")
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
        a = _finite("The matrix", matrix)
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


# ---------------------------------------------------------------- checks


def _finite(what: str, x: Tensor) -> Tensor:
    y = x.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(y).all()):
        where = (~torch.isfinite(y)).nonzero()[0].tolist()
        raise SolveError(f"{what} must be finite; the entry at {where} is {y[tuple(where)].item()}.")
    return y


def _positive(what: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise SolveError(f"{what} must be finite and above 0; got {value!r}.")


def _moment(moment: Tensor) -> Tensor:
    c = _finite("The second moment", moment)
    if c.ndim != 2 or c.shape[0] != c.shape[1] or c.trace() <= 0:
        raise SolveError(f"A second moment is a square matrix with a trace above 0; got shape {_shape(c)}.")
    return (c + c.T) / 2


def _cholesky(matrix: Tensor, what: str, advice: str) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or not bool(torch.isfinite(factor.diagonal()).all()):
        raise SolveError(f"{what} ({_shape(matrix)}) is not positive definite: {advice}.")
    return factor


def _eigen_condition(matrix: Tensor) -> float:
    values = torch.linalg.eigvalsh(matrix)
    return float(values[-1] / values[0]) if values[0] > 0 else math.inf


def _condition(apply: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], size: int) -> float:
    if size <= 512:
        return _eigen_condition(apply(torch.eye(size).double()))
    return _largest(apply, size) * _largest(inverse, size)


def _largest(apply: Callable[[Tensor], Tensor], size: int, block: int = 4, n_iter: int = 30) -> float:
    x = torch.randn(size, block, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(n_iter):
        x = torch.linalg.qr(apply(x)).Q
    return float(torch.linalg.matrix_norm(x.T @ apply(x), 2))


def _shape(x: Tensor) -> str:
    return " x ".join(map(str, x.shape)) or "a number"
