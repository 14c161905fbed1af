"""``linear``: average the factors A and B apart. Kept as a warning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from .. import linalg
from ..change import LowRank
from ..errors import UserError
from ..settings import setting
from .base import FuseMethod, Module, Resolver
from .core import Fused, stacked

__all__ = ["Linear"]


@dataclass(frozen=True)
class Linear(FuseMethod):
    """Average the factors A and B apart, as federated averaging of LoRA does; the product is not the mean.

    Source:
        ``fedit``: Zhang et al., Towards Building the Federated GPT (ICASSP 2024): plain averages of A and of B.
        ``peft``: PEFT's ``linear``: both factors are summed with the roots of the weights.

    Use when:
        You compare with a system that does so, or all adapters share one A that was never trained.

    Known problems:
        The product of the averages holds every B with every other adapter's A. With independent A the error against the
        mean is 0.71, 0.87, 0.94 times its norm for 2, 4, 8 adapters (fedit) and 1, 1.7, 2.7 (peft); it is measured for
        each weight and noted. The result depends on how each difference was cut into factors. Equal ranks only. The
        form ``peft`` is not normalised as a mean: N equal adapters give N times one of them.

    Shapes:
        Factors (outputs, r) and (r, inputs) for adapters of rank r.

    Example:
        >>> Linear().gauge_dependent
        True
    """

    form: Literal["fedit", "peft"] = setting(
        "fedit", "fedit: plain averages; peft: sums with the roots of the weights."
    )

    gauge_dependent: ClassVar[bool] = True
    resolvable: ClassVar[bool] = False

    def out_rank(self, ranks: Sequence[int], shape: tuple[int, int], resolver: Resolver | None = None) -> int:
        """That of the adapters."""
        return min(max(ranks), *shape)

    def fuse(self, module: Module) -> LowRank:
        """Average the factors, and measure how far their product is from the mean."""
        if len({p.rank for p in module.parts}) > 1:
            names = module.names or tuple(map(str, module.owners))
            told = ", ".join(f"{name}: {p.rank}" for name, p in zip(names, module.parts))
            raise UserError(
                f"linear averages factors and so needs equal ranks; at {module.name} they differ ({told}). Use cat."
            )
        by_right = [_root(w) for w in module.weights] if self.form == "peft" else list(module.weights)
        by_left = [abs(w) for w in by_right] if self.form == "peft" else by_right
        left = sum((p.left.double() * w for p, w in zip(module.parts, by_left)), torch.zeros(()).double())
        right = sum((p.right.double() * w for p, w in zip(module.parts, by_right)), torch.zeros(()).double())
        return Fused(left.float(), right.float(), {"relative_error": _error(LowRank(left, right), module)})


def _root(weight: float) -> float:
    return math.copysign(math.sqrt(abs(weight)), weight)


def _error(fused: LowRank, module: Module) -> float:
    """Distance to the mean as a share of the mean's norm, from factors."""
    mean = stacked(module.parts, module.weights)
    size = linalg.frobenius_norm(mean.left, mean.right)
    gap = linalg.frobenius_norm(torch.cat([fused.left, -mean.left], 1), torch.cat([fused.right, mean.right]))
    return gap / size if size else 0.0
