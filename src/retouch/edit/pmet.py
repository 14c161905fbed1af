"""PMET: values found for attention and MLP together, of which only the MLP's is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from ..model import Model
from ..settings import setting
from .memit import Memit
from .rows import Problem
from .value import Settled, Value, optimise

__all__ = ["Pmet"]


@dataclass(frozen=True)
class Pmet(Memit):
    """Search what attention and the MLP have to add together, and write the MLP's share like memit.

    Source: Li et al., PMET: Precise Model Editing in a Transformer (arXiv 2308.08742); xpq-tech/PMET (no licence:
        derived anew). Two values at the last block, at the outputs of attention and of the MLP; once the target leads
        everywhere its loss weighs a tenth, and the search ends when the drift of ``{subject} is a`` is small. With j
        blocks left a block takes the residual over the root of j, not over j.

    Use when: as a rival of memit that asks the MLP only for what attention does not bring.

    Known problems: as memit's. What attention was found to add is never written, so that less than the search promised
        may arrive; `margin` speaks of both values together.

    Shapes: delta (2 x d_model) a fact; at each block K (d_ff x n), R (d_model x n); the change has rank n.

    Example:
        >>> Pmet().learning_rate
        0.2
    """

    reads: ClassVar[Literal["state", "down"]] = "down"
    power: ClassVar[float] = 0.5

    n_steps: int = setting(30, "Steps of the search; N steps make N - 1 updates.", ge=1, le=1000)
    learning_rate: float = setting(0.2, "Adam's step for the values.", gt=0)
    kl_factor: float = setting(1.0, "Weight of the drift of '{subject} is a'.", ge=0)
    said_weight: float = setting(0.1, "Weight of the target's loss once it leads everywhere.", ge=0)
    stop_drift: float = setting(0.01, "Drift term at which a fact that is said everywhere is done.", ge=0)

    def values(
        self, model: Model, found: Sequence[Problem], groups: Sequence[Sequence[int]], block: int, **more: Any
    ) -> list[Value]:
        """Search both values; keep the MLP's."""
        settled = Settled(self.said_weight, self.stop_drift)
        d = model.anatomy.d_model
        values = optimise(model, found, block, "both", self, groups=groups, settled=settled, **more)
        return [replace(v, delta=v.delta[:d], initial=v.initial[:d]) for v in values]
