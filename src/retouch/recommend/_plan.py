"""The numbers of a training with knowledge, all settled, and what is remembered of how it went."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..bound import Multiplier

__all__ = ["Choice", "ConstraintKind", "Plan", "Prices", "Recorded"]

ConstraintKind = Literal["slice", "batch", "fixed", "none"]
Choice = Literal["feasible", "best"]


@dataclass(frozen=True)
class Prices:
    """How the constraint's price begins and moves; see `retouch.bound.Multiplier`."""

    limit: float
    start: float
    step: float
    damping: float
    maximum: float
    smoothing: float

    def make(self) -> Multiplier:
        """Make the price of one group."""
        return Multiplier(
            self.limit, self.step, min(self.start, self.maximum), self.maximum, self.smoothing, damping=self.damping
        )


@dataclass(frozen=True)
class Plan:
    """Numbers of a training, all settled."""

    constraint: ConstraintKind
    prices: Prices
    choice: Choice
    batch_size: int
    n_alone: int
    n_epochs: int
    patience: int
    cuts_per_epoch: int
    knowledge_dropout: float
    learning_rate: float
    learning_rate_new: float
    warm_up_steps: int
    weight_decay: float
    clip: float
    validation_beams: int
    seed: int


@dataclass
class Recorded:
    """How far a training is and what was seen, in numbers that JSON can hold.

    ``alone`` says that only the new parts are trained; ``begun_epoch`` and ``begun_step`` are where that, or the training
    of all, began. Gains are nats per code by which the true items of validation users became likelier.
    """

    epoch: int = 0
    step: int = 0
    alone: bool = False
    begun_epoch: int = 0
    begun_step: int = 0
    chosen_epoch: int = 0
    chosen_gain: float = -math.inf
    chosen_harm: float = math.inf
    chosen_is_feasible: bool = False
    done: bool = False
    seconds: float = 0.0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
