"""Plugged: exits put into a finished slender model, the case that the paper warns of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..settings import setting
from .static import Static

if TYPE_CHECKING:
    from .stages import Fitted, Run

__all__ = ["Plugged"]


@dataclass(frozen=True)
class Plugged(Static):
    """Train a slender model with one exit, freeze it, and train exits on what its blocks happen to compute.

    Source: the plugged-in exits of Shen et al. (EMNLP 2022); Xin et al., DeeBERT (ACL 2020), trains exits in the same way.

    Use when: to see what joint training of width and exits is worth.

    Known problems: lower blocks were trained to serve upper ones, so that early exits answer badly.

    Shapes: as in `retouch.slim.costeff`.

    Example:
        >>> Plugged(joint=True).joint
        True
    """

    joint: bool = setting(False, "Train the slender model on together with its exits, in place of freezing it.")
    exit_rate: float = setting(
        1e-3, "Learning rate of exits that train alone: far higher than a whole network's, as for any linear map.", gt=0
    )

    def fit(self, run: Run) -> Fitted:
        """Train the stages in their order.

        Raises:
            UserError: Task, model and plan do not fit each other.
        """
        original = run.original()
        exits = replace(run.stages.assistant, name="plugged", answers="final", only_exits=not self.joint)
        if not self.joint:
            exits = replace(exits, learning_rate=self.exit_rate * self.rate_factor)
        slim = run.recovered(run.exited(self.slender(run, original)), original, exits)
        return run.fitted(slim, original)
