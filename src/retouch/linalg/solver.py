"""The one closed-form solver, and who is to blame when it has no solution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import SolveError, unknown
from .checked import cholesky, eigen_condition, finite, shape_of
from .metrics import Metric

__all__ = ["MAX_CONDITION", "Mode", "Solution", "solve"]

MAX_CONDITION = 1e12
"""Beyond this an equality solve in float64 keeps fewer than four digits, so it is refused."""
Mode = Literal["equality", "least_squares"]


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
    k, r = finite("The keys", keys), finite("The residuals", residuals)
    _check_request(k, r, mode, keep, keep_weight, ridge, names)
    n = k.shape[1]
    together = k if keep is None else _with_kept(k, keep, keep_weight, mode)
    x = metric.apply_inverse(together)
    gram = together.T @ x
    gram = finite("The system of keys", (gram + gram.T) / 2)
    added = 1.0 if mode == "least_squares" else ridge * gram.diagonal().mean().item()
    system = gram + added * torch.eye(len(gram)).double()
    if mode == "least_squares":
        condition = float(torch.linalg.matrix_norm(system, math.inf))  # no eigenvalue is below 1
    elif (condition := eigen_condition(system)) > MAX_CONDITION:
        raise SolveError(_blame(gram, n, condition, k.shape[0], metric.name, names))
    factor = cholesky(system, "The system of keys", "use a metric with a larger scale")
    columns = torch.cholesky_solve(torch.eye(len(gram), n).double(), factor)
    right = columns.T @ x.T
    return Solution(r, right, condition, added, (right * k.T).sum(1))


def _check_request(
    k: Tensor, r: Tensor, mode: str, keep: Tensor | None, weight: float, ridge: float, names: Sequence[str] | None
) -> None:
    if mode not in ("equality", "least_squares"):
        raise unknown("solver mode", mode, ["equality", "least_squares"])
    if k.ndim != 2 or r.ndim != 2 or k.shape[1] != r.shape[1] or k.shape[1] == 0:
        raise SolveError(f"Keys (m x n) and residuals (d x n) need the same n of at least 1; got {shape_of(k)} and "
                         f"{shape_of(r)}.")  # fmt: skip
    if keep is not None and (keep.ndim != 2 or keep.shape[0] != k.shape[0]):
        raise SolveError(f"Kept keys must be {k.shape[0]} x p like the keys; got {shape_of(keep)}.")
    if not (weight >= 0 and ridge >= 0 and math.isfinite(weight) and math.isfinite(ridge)):
        raise SolveError(f"keep_weight and ridge must be finite and at least 0; got {weight!r} and {ridge!r}.")
    if ridge and mode != "equality":
        raise SolveError(f"ridge belongs to equality mode; least squares has its metric for that. Got ridge {ridge:g}.")
    if names is not None and len(names) != k.shape[1]:
        raise SolveError(f"Each of the {k.shape[1]} facts needs one name; got {len(names)}.")


def _with_kept(k: Tensor, keep: Tensor, weight: float, mode: str) -> Tensor:
    """Append the kept keys; for exact constraints repeated ones are replaced by a basis of their span."""
    kp = finite("The kept keys", keep)
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
