"""Full size with exits: what leaving early is worth without slimness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import SlimMethod
from .presets import TrainingSettings

if TYPE_CHECKING:
    from .stages import Fitted, Run

__all__ = ["FullExits"]


@dataclass(frozen=True)
class FullExits(TrainingSettings, SlimMethod):
    """Put an exit after every block of the full-size model: the assistant of COST-EFF, used by itself.

    Source: the assistant of Shen et al. (EMNLP 2022); joint training of exits as in Zhou et al., BERT Loses Patience
        (NeurIPS 2020).

    Use when: memory is plentiful and only time matters.

    Known problems: it has all parameters of the original, and a few more.

    Shapes: widths stay as they are.

    Example:
        >>> FullExits().preset
        'fast'
    """

    def fit(self, run: Run) -> Fitted:
        """Train the stages in their order.

        Raises:
            UserError: Task and model do not fit each other.
        """
        original = run.original()
        return run.fitted(run.assistant(original), original)
