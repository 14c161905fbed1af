"""Rounds: average the factors for the edges to go on with, and fold into the base what the average misses.

After one round nothing beats cat, which is exact. Over several rounds the edges must start again from small factors: the
averages of theirs. The product of averages is not the average of products, but what lies between is known and of low
rank; added to the base, it makes the round exact.

Source: FedEx-LoRA (Singhal et al., ACL 2025). FLoRA (Wang et al., NeurIPS 2024) folds the whole mean, which is what `cat`
plans, and starts anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..change import Change, LowRank
from ..errors import UserError
from .base import Adapter, Module, modules, shares

__all__ = ["Round", "average", "next_round", "residual"]


@dataclass(frozen=True, eq=False)
class Round:
    """What one round of training gives.

    Attributes:
        adapter: The averaged factors: where every edge starts the next round.
        residual: The change of the base that makes base and averaged adapter the exact mean.
    """

    adapter: Adapter
    residual: Change


def average(module: Module) -> LowRank:
    """Average the factors B and A of one weight apart; they keep their rank r.

    Raises:
        UserError: Ranks differ, or some adapter does not change this weight.
    """
    if len(module.parts) < module.n_adapters or len({p.rank for p in module.parts}) > 1:
        ranks = ", ".join(str(p.rank) for p in module.parts)
        raise UserError(
            f"Rounds average factors, so every adapter must change {module.name} with one rank; {len(module.parts)} of "
            f"{module.n_adapters} do, with ranks {ranks}. Fold the whole mean instead: the change that cat plans."
        )
    left = sum((p.left.double() * w for p, w in zip(module.parts, module.weights)), torch.zeros(()).double())
    right = sum((p.right.double() * w for p, w in zip(module.parts, module.weights)), torch.zeros(()).double())
    return LowRank(left.float(), right.float())


def residual(module: Module) -> LowRank:
    """Return the mean of the products less the product of the means, in factors of rank (N - 1) r.

    ``sum w_i B_i A_i - B A = sum w_i (B_i - B)(A_i - A)``, and as the weighted ``B_i - B`` sum to 0, the last of the N
    terms can be put into the others: ``sum over i < N of w_i (B_i - B)(A_i - A_N)``.

    Raises:
        UserError: As `average`.
    """
    mean, last = average(module).left.double(), module.parts[-1].right.double()
    pairs = list(zip(module.parts, module.weights))[:-1]
    if not pairs:
        return LowRank(torch.zeros(module.shape[0], 0), torch.zeros(0, module.shape[1]))
    left = torch.cat([w * (p.left.double() - mean) for p, w in pairs], 1)
    right = torch.cat([p.right.double() - last for p, _ in pairs])
    return LowRank(left.float(), right.float())


def next_round(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Round:
    """Close a round: averaged factors for the edges, and the residual for the base.

    Args:
        adapters: Those of this round, of equal ranks and on the same weights.
        weights: Their shares; by default equal ones.

    Raises:
        UserError: As `average`.
    """
    given = shares(adapters, weights)
    starts: dict[str, LowRank] = {}
    rest: dict[str, LowRank] = {}
    for module in modules(adapters, given):
        starts[module.name] = average(module)
        left = residual(module)
        if left.rank and bool(left.left.any()) and bool(left.right.any()):
            rest[module.name] = left
    notes = {"adapters": [a.name for a in adapters], "weights": list(given)}
    change = Change("fedex", adapters[0].base, rest, notes=notes)
    return Round(Adapter("average", starts, adapters[0].base, notes=notes), change)
