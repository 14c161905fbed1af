"""``cr_subspace``: project opposing writes apart, direction by direction, before fusing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ..settings import setting
from ._streams import draws, keys_of
from .base import Module, Resolver
from .core import Core

__all__ = ["CRSubspace"]

TINY = 1e-8
"""Writes below this share of an adapter's largest are left out of all comparisons."""


@dataclass(frozen=True)
class CRSubspace(Resolver):
    """Make adapters stop writing against each other in the output directions that they share.

    In each principal output direction of all adapters together, an adapter's write is a row of input coordinates. Two
    adapters conflict there when their rows point against each other by more than rows of different directions do by
    chance; each row is then projected on the cone of rows that oppose none of its opponents. Optionally directions
    that many adapters crowd with agreeing writes are shrunk.

    Source:
        Reconstructed from the abstract of arXiv 2605.23913, which names a conflict-resolution module (LoRA-CR) and
        gives no formula. The projection is our own design; its idea is PCGrad's (Yu et al., 2020), made independent of
        the adapters' order by solving for all opponents at once.

    Use when:
        Adapters of different domains are fused and the conflict report shows more conflict than chance. No data is
        needed, the rank never grows, and the result does not depend on how an adapter was cut into factors.

    Known problems:
        Singular values that coincide leave the directions inside their block arbitrary.

    Shapes:
        Core coordinates in, core coordinates out.

    Example:
        >>> CRSubspace(beta=0.5).name
        'cr_subspace'
    """

    beta: float = setting(1.0, "Strength of the projection; 0 leaves all as it is.", ge=0, le=1)
    kappa: float = setting(0.0, "Strength of the shrinking of crowded directions; 0: none.", ge=0, le=1)
    quantile: float = setting(0.9, "How far beyond chance, as a quantile of chance, a conflict must lie.", gt=0, lt=1)
    random: bool = setting(False, "A control: as many conflicts for each pair, in directions drawn at random.")

    def resolve(self, core: Core, module: Module) -> Core:
        """Return the core with opposing writes projected apart."""
        if len(module.parts) == 1 or not core.middles.any():
            return core
        z, basis = writes(core, module.weights)
        live = norms(z) > TINY * norms(z).max(1, keepdim=True).values
        cosine = cosines(z, live)
        shared = live[:, None] & live[None]
        against = (cosine < -chance(z, live, self.quantile)[..., None]) & shared
        if self.random:
            against = _dealt(against, shared, self.seed, module)
        solved = z.clone()
        for i, k in torch.nonzero(against.any(1)).tolist():
            opponents = torch.nonzero(against[i, :, k]).flatten()
            # those drawn at random may agree: they are turned round
            facing = z[opponents, k] * -cosine[i, opponents, k].sign()[:, None]
            solved[i, k] = (1 - self.beta) * z[i, k] + self.beta * projected(z[i, k], facing)
        if self.kappa:
            solved = solved * crowding(z, cosine, live, self.kappa)[None, :, None]
        shares = torch.tensor(module.weights, dtype=torch.float64)[:, None, None]
        moved = torch.einsum("ak,nkb->nab", basis, solved - z)
        return replace(core, middles=core.middles + torch.where(shares > 0, moved / shares, 0.0))


def _dealt(against: Tensor, shared: Tensor, seed: int, module: Module) -> Tensor:
    """Give each pair as many conflicts in directions drawn at random among those into which both write.

    Shapes:
        all: (adapters, adapters, directions).
    """
    dealt, keys = torch.zeros_like(against), keys_of(module)
    for i, j in combinations(range(len(against)), 2):
        pair = "|".join(sorted((keys[i], keys[j])))
        numbers = draws(seed, module.name, pair, 0, 1, against.shape[2])[0]
        places = torch.where(shared[i, j], numbers, 2.0).argsort()  # numbers lie below 1
        dealt[i, j, places[: int(against[i, j].sum())]] = True
        dealt[j, i] = dealt[i, j]
    return dealt


def writes(core: Core, weights: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return what each weighted adapter writes into each principal output direction, and the directions.

    Shapes:
        (adapters, directions, b) and (a, directions).
    """
    n, a, b = core.middles.shape
    x = core.middles * torch.tensor(weights, dtype=torch.float64)[:, None, None]
    u, s, _ = torch.linalg.svd(x.permute(1, 0, 2).reshape(a, n * b), full_matrices=False)
    u = u[:, s > 1e-10 * s[:1]]
    return torch.einsum("ak,nab->nkb", u, x), u


def norms(z: Tensor) -> Tensor:
    """Return the size of each write, (adapters, directions)."""
    sizes: Tensor = z.norm(dim=-1)
    return sizes


def cosines(z: Tensor, live: Tensor) -> Tensor:
    """Return how far adapters' writes into one direction agree, (adapters, adapters, directions); 0 where none is."""
    unit = z / norms(z).clamp_min(torch.finfo(z.dtype).tiny)[..., None] * live[..., None]
    return torch.einsum("ikb,jkb->ijk", unit, unit)


def chance(z: Tensor, live: Tensor, quantile: float) -> Tensor:
    """Return for each pair the size of cosine that writes into different directions reach by chance.

    Shapes:
        (adapters, adapters); 0 on the diagonal, where nothing can oppose.
    """
    n, directions, _ = z.shape
    unit = z / norms(z).clamp_min(torch.finfo(z.dtype).tiny)[..., None]
    apart = ~torch.eye(directions, dtype=torch.bool)
    limit = torch.zeros(n, n, dtype=z.dtype)
    for i, j in combinations(range(n), 2):
        known = live[i][:, None] & live[j][None, :] & apart
        sizes = (unit[i] @ unit[j].T).abs()[known].numpy()
        limit[i, j] = limit[j, i] = float(np.quantile(sizes, quantile)) if sizes.size else 0.0
    return limit


def projected(row: Tensor, opponents: Tensor) -> Tensor:
    """Return the nearest row that opposes none of `opponents`, as the row plus non-negative shares of them."""
    from scipy.optimize import nnls

    shares, _ = nnls(opponents.T.numpy(), -row.numpy())
    return row + torch.from_numpy(np.asarray(shares)) @ opponents


def crowding(z: Tensor, cosine: Tensor, live: Tensor, kappa: float) -> Tensor:
    """Return a factor for each direction: less where several adapters write the same."""
    energy = norms(z).square() * live
    count = energy.sum(0).square() / energy.square().sum(0).clamp_min(torch.finfo(z.dtype).tiny)
    pairs = live[:, None, :] & live[None, :, :] & ~torch.eye(len(z), dtype=torch.bool)[:, :, None]
    agree = (cosine.clamp_min(0) * pairs).sum((0, 1)) / pairs.sum((0, 1)).clamp_min(1)
    return count.clamp_min(1).pow(-kappa * agree)
