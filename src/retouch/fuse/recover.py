"""Bring an adapter that was trained on a pruned model back to the whole model's shape: an exact scatter.

Rows that the edge did not have become zero rows of B, columns that it did not have zero columns of A; nothing else
changes, so norm and rank stay, and pruning the recovered adapter gives the trained one again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..change import LowRank
from ..errors import StoreError, UserError, WrongBase
from ..model import Model
from ._folder import quoted
from ._units import Units
from .adapter_file import Origin
from .base import Adapter, Kept
from .prune import PrunePlan, check_plan

__all__ = ["check_origin", "gamma", "propagate", "recover", "restricted", "scaled"]


def recover(adapter: Adapter, plan: PrunePlan, model_full: Model) -> Adapter:
    """Return an adapter of the whole model; factors are read and scattered when they are asked for.

    Source:
        LoRAM (ICLR 2025).

    Args:
        adapter: Trained under `plan`.
        plan: The plan.
        model_full: The whole model.

    Raises:
        WrongBase: The plan, or the adapter, belongs to another model.
        UserError: The adapter was trained under another plan, or was recovered before.
        StoreError: A factor does not have the pruned weight's size (raised when it is read).
    """
    units = _checked(adapter, plan, model_full)
    kept: dict[str, Kept] = {}
    for name in adapter.parts:
        block, part = model_full.anatomy.block_of(name), name.split(".", 2)[2]
        index = units.index(part, plan.kept[block]) if part in units.parts else None
        if index is not None:
            kept[name] = Kept(units.axis(part), tuple(index.tolist()))
    return replace(adapter, parts=_Recovered(adapter, kept, model_full), kept=kept)


def _checked(adapter: Adapter, plan: PrunePlan, model: Model) -> Units:
    units = check_plan(plan, model)
    check_origin(adapter.name, Origin(adapter.base, adapter.plan, bool(adapter.kept)), plan)
    return units


def check_origin(name: str, origin: Origin, plan: PrunePlan) -> None:
    """Make sure that an adapter can be recovered by a plan, as far as its record tells; no model is needed.

    Raises:
        WrongBase: The plan belongs to another model.
        UserError: The adapter was trained under another plan, or is recovered already.
    """
    if origin.base != plan.base:
        raise WrongBase(
            f"The adapter {name} belongs to base {quoted(origin.base[:6])}, the plan to {plan.base[:6]}. "
            "Recover it with the plan and the model that it was trained for."
        )
    if origin.recovered:
        raise UserError(f"The adapter {name} is recovered already: it has the whole model's sizes. Fuse it as it is.")
    if not origin.plan:
        raise UserError(f"The adapter {name} was trained on a whole model, so nothing is missing. Fuse it as it is.")
    if origin.plan != plan.hash:
        raise UserError(
            f"The adapter {name} was trained under plan {quoted(origin.plan[:8])}; this plan is {plan.hash[:8]}. Give "
            "the plan that `retouch fuse prune` wrote beside that edge's model."
        )


class _Recovered(Mapping[str, LowRank]):
    """Factors at full size, made when they are read."""

    def __init__(self, adapter: Adapter, kept: Mapping[str, Kept], model: Model) -> None:
        self._adapter, self._kept, self._model = adapter, kept, model

    def __getitem__(self, name: str) -> LowRank:
        part = self._adapter.parts[name]
        shape, kept = tuple(self._model.matrix(name).shape), self._kept.get(name)
        expected = shape
        if kept is not None:
            expected = (len(kept.index), shape[1]) if kept.axis == "rows" else (shape[0], len(kept.index))
        if part.shape != expected:
            raise StoreError(
                f"The adapter {self._adapter.name} is {part.shape} at {name}; its plan has {expected} there. "
                "It was not trained under this plan."
            )
        return part if kept is None else _scattered(part, kept, shape)

    def __contains__(self, name: object) -> bool:
        return name in self._adapter.parts  # else asking would read and scatter

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.parts)

    def __len__(self) -> int:
        return len(self._adapter.parts)


def _scattered(part: LowRank, kept: Kept, shape: tuple[int, ...]) -> LowRank:
    index = torch.tensor(kept.index, dtype=torch.long)
    if kept.axis == "rows":
        left = part.left.new_zeros(shape[0], part.rank)
        left[index] = part.left
        return LowRank(left, part.right)
    right = part.right.new_zeros(part.rank, shape[1])
    right[:, index] = part.right
    return LowRank(part.left, right)


def restricted(adapter: Adapter, plan: PrunePlan, model_full: Model) -> Adapter:
    """Cut an adapter of the whole model to what an edge of a plan has; undoes `recover`.

    Raises:
        WrongBase: The plan or the adapter belongs to another model.
    """
    units = check_plan(plan, model_full)
    if adapter.base != plan.base:
        raise WrongBase(f"The adapter {adapter.name} belongs to base {adapter.base[:6]}, the plan to {plan.base[:6]}.")
    parts = {}
    for name, part in adapter.parts.items():
        block, inside = model_full.anatomy.block_of(name), name.split(".", 2)[2]
        index = units.index(inside, plan.kept[block]) if inside in units.parts else None
        if index is None:
            parts[name] = part
        elif units.axis(inside) == "rows":
            parts[name] = LowRank(part.left[index], part.right)
        else:
            parts[name] = LowRank(part.left, part.right[:, index])
    return replace(adapter, parts=parts, kept={}, plan=plan.hash)


# ---------------------------------------------------------------- options, all off unless called


def propagate(adapter: Adapter, model_full: Model, ridge: float = 1e-2) -> Adapter:
    """Fill the rows or columns that the edge did not have, as the base's own weights follow from those it had.

    Source:
        Ours: the ridge map from kept to pruned rows of the base's weight, applied to the adapter's factor.

    Args:
        adapter: A recovered adapter.
        model_full: The whole model.
        ridge: Added to the Gram matrix, relative to its mean diagonal.

    Returns:
        An adapter without structural zeros: `kept` is empty.
    """
    parts = {}
    for name, part in adapter.parts.items():
        kept = adapter.kept.get(name)
        parts[name] = part if kept is None else _propagated(part, kept, model_full.matrix(name), ridge)
    return replace(adapter, parts=parts, kept={}, notes={**adapter.notes, "propagate": ridge})


def _propagated(part: LowRank, kept: Kept, matrix: Tensor, ridge: float) -> LowRank:
    weight = (matrix if kept.axis == "rows" else matrix.T).double().cpu()
    factor = part.left if kept.axis == "rows" else part.right.T
    has = torch.zeros(len(weight), dtype=torch.bool)
    has[list(kept.index)] = True
    here, gone = weight[has], weight[~has]
    gram = here @ here.T
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    full = factor.clone()
    filled = gone @ here.T @ torch.cholesky_solve(factor[has].double(), torch.linalg.cholesky(gram))
    full[~has] = filled.to(factor.dtype)
    return LowRank(full, part.right) if kept.axis == "rows" else LowRank(part.left, full.T.contiguous())


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """Multiply an adapter's difference by a number."""
    parts = {name: LowRank(part.left * factor, part.right) for name, part in adapter.parts.items()}
    return replace(adapter, parts=parts)


def gamma(
    adapter: Adapter, likelihood: Callable[[Adapter], float], *, low: float = 0.25, high: float = 2.0, n_looks: int = 12
) -> tuple[Adapter, float]:
    """Scale an adapter by the number that makes held-out text likeliest, found by golden section.

    Args:
        adapter: The adapter.
        likelihood: Mean log-likelihood of held-out answers under an adapter; it must be deterministic.
        low: Smallest number.
        high: Largest number.
        n_looks: How often the likelihood is measured.

    Returns:
        The scaled adapter, and the number.
    """
    ratio = (math.sqrt(5) - 1) / 2
    a, b = low, high
    points = [b - ratio * (b - a), a + ratio * (b - a)]
    seen = {x: likelihood(scaled(adapter, x)) for x in points}
    for _ in range(n_looks - 2):
        c, d = points
        if seen[c] >= seen[d]:
            b, points = d, [d - ratio * (d - a), c]
        else:
            a, points = c, [d, c + ratio * (b - c)]
        for x in points:
            if x not in seen:
                seen[x] = likelihood(scaled(adapter, x))
    best = max(seen, key=lambda x: (seen[x], -abs(x - 1)))
    return scaled(adapter, best), best
