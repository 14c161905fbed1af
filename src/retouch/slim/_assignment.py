"""What one stage of a method is asked to do, and the network that it leaves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .base import Widths
from .cutting import Scoring
from .presets import Stage

if TYPE_CHECKING:
    from .network import SlimForSequenceClassification

__all__ = ["Assignment", "Trained"]


@dataclass(frozen=True, eq=False)
class Trained:
    """A network that a stage left.

    Attributes:
        network: In eval mode.
        key: Of everything that made it.
        record: The stage's loss curve, checks and cuts; empty where nothing was trained.
    """

    network: SlimForSequenceClassification
    key: str
    record: dict[str, Any]

    @property
    def exits(self) -> tuple[int, ...]:
        """Blocks with an exit."""
        return self.network.widths.exits


@dataclass(frozen=True, eq=False)
class Assignment:
    """What one stage of a method does, beside the network that it begins with.

    Args:
        stage: What is learnt.
        teacher: Whom it learns from; None where it learns from labels alone.
        equilibrium: Whether gradients flow down as means over exits.
        cuts: The widths after each cut.
        scoring: What is cut, and how it is found; needed with `cuts`.
        original: Whom the harm is measured against; None: no constraint.
        price_step: How fast the price of that harm rises.
    """

    stage: Stage
    teacher: Trained | None = None
    equilibrium: bool = True
    cuts: tuple[Widths, ...] = ()
    scoring: Scoring | None = None
    original: Trained | None = None
    price_step: float = 0.1

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the result, as values for a key."""
        return {
            "stage": self.stage.to_dict(),
            "teacher": None if self.teacher is None else self.teacher.key,
            "equilibrium": self.equilibrium,
            "cuts": [goal.to_dict() for goal in self.cuts],
            "scoring": None if self.scoring is None else asdict(self.scoring),
            "original": None if self.original is None else [self.original.key, self.price_step],
        }
