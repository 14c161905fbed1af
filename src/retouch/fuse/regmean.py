"""``regmean``: the mean whose outputs are nearest to each adapter's on that adapter's own inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..change import LowRank
from ..errors import UserError
from ..settings import setting
from .base import FuseMethod, Kept, Module
from .core import triples, within
from .coverage import corrected, pruned_axis

__all__ = ["Regmean"]


@dataclass(frozen=True)
class Regmean(FuseMethod):
    """Weigh each adapter, input by input, by how much of those inputs its own data held.

    ``D = (sum w_i D_i G_i) (sum w_i G_i)^-1`` for the second moments G_i of what flows into the weight at edge i; in
    factors ``A_i`` becomes ``A_i G_i (sum w_i G_i)^-1``, which is exact.

    Source:
        RegMean (Jin et al., Dataless Knowledge Fusion, ICLR 2023), on differences, with their shrinking of the
        moments' off-diagonal.

    Use when:
        Edges may send second moments, and their inputs differ.

    Known problems:
        A moment has inputs x inputs numbers, larger than the adapter, and tells something of the edge's data: edges
        send it only when told to. With one moment for all it is the mean, so that is refused.

    Shapes:
        Moments (inputs, inputs), or of the kept inputs alone; factors (outputs, R) and (R, inputs) for the sum R of the
        ranks.

    Example:
        >>> Regmean().shrink
        0.9
    """

    shrink: float = setting(0.9, "What the moments' off-diagonal is multiplied by.", ge=0, le=1)
    ridge: float = setting(
        1e-6,
        "Added to the diagonal of their sum, as a share of its mean: with it inputs may depend on one another.",
        gt=0,
    )

    averages: ClassVar[bool] = False  # the inverse divides by what each adapter's inputs cover; rows are seen to below
    needs: ClassVar[Literal["", "selection", "moments"]] = "moments"

    def fuse(self, module: Module) -> LowRank:
        """Solve for the right factors; the left ones stay."""
        whole = sum(module.weights)
        module = replace(module, weights=tuple(w / whole for w in module.weights))
        if self.coverage and pruned_axis(module) == "rows":
            module = corrected(module)
        moments = [self._moment(m, k, module) for m, k in zip(module.moments, module.kept)]
        _check_apart(moments, module)
        total = sum((g * w for g, w in zip(moments, module.weights)), torch.zeros_like(moments[0]))
        heard = torch.cat([w * (p.right.double() @ g) for p, g, w in zip(module.parts, moments, module.weights)])
        right = torch.cholesky_solve(heard.T, self._factor(total, module.name)).T
        fused = LowRank(torch.cat([p.left for p in module.parts], 1).float(), right.float())
        return fused if fused.rank <= module.rank else _cut(fused, module.rank)

    def _factor(self, total: Tensor, name: str) -> Tensor:
        diagonal = total.diagonal()
        diagonal += self.ridge * diagonal.mean()
        diagonal[diagonal == 0] = 1.0  # nobody saw anything: nothing is written
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(total)
        if failed:
            raise UserError(
                f"The second moments of {name} add up to a matrix with negative directions, which no inputs have. Set a "
                f"larger ridge (it is {self.ridge:g}) or a smaller shrink (it is {self.shrink:g}), or measure them again."
            )
        return factor

    def _moment(self, given: Any, kept: Kept | None, module: Module) -> Tensor:
        """Read a moment, put it where its edge's inputs were, and shrink its off-diagonal."""
        g = (given if isinstance(given, Tensor) else given.mean).double()
        inputs = module.shape[1]
        if kept is not None and kept.axis == "columns" and len(g) == len(kept.index):
            at = torch.tensor(kept.index, dtype=torch.long)
            g = torch.zeros(inputs, inputs, dtype=torch.float64).index_put_((at[:, None], at[None, :]), g)
        if g.shape != (inputs, inputs) or not bool(g.isfinite().all()) or bool((g.diagonal() < 0).any()):
            raise UserError(
                f"A second moment of {module.name} must be {inputs} x {inputs}, finite, with a diagonal of at least 0; "
                f"got {' x '.join(map(str, g.shape))}."
            )
        return g * self.shrink + torch.diag(g.diagonal() * (1 - self.shrink))


def _cut(fused: LowRank, rank: int) -> LowRank:
    """Behind a resolver all parts share one factor, so that side by side they are longer than their rank."""
    u, s, vh = triples(fused)
    return within(u[:, :rank], s[:rank], vh[:rank])


def _check_apart(moments: list[Tensor], module: Module) -> None:
    if len(moments) > 1 and all(torch.equal(g, moments[0]) for g in moments[1:]):
        raise UserError(
            f"All adapters gave one and the same second moment at {module.name}, so that regmean is the plain mean. Use cat."
        )
