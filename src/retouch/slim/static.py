"""Static: a slender model with one exit, the rival of equal size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..settings import setting
from .base import SlimMethod
from .cutting import Scoring
from .presets import Stage, TrainingSettings

if TYPE_CHECKING:
    from .stages import Fitted, Run, Trained

__all__ = ["Static"]


@dataclass(frozen=True)
class Static(TrainingSettings, SlimMethod):
    """Cut an encoder's width and keep its one exit; the fine-tuned original teaches it directly.

    It has the widths of the first plan, which the method with exits may leave for narrower ones (its setting `depth`),
    the same data and the same number of training tokens: what the assistant would have trained on goes to the last stage.

    Source: the static models of Shen et al. (EMNLP 2022); distillation as in Jiao et al., TinyBERT (Findings of EMNLP 2020).

    Use when: texts come one at a time on hardware where leaving early saves nothing, or as the rival to beat.

    Known problems: every text pays for all blocks.

    Shapes: as in `retouch.slim.costeff`.

    Example:
        >>> Static(match="flops").match
        'flops'
    """

    match: Literal["params", "flops"] = setting(
        "params", "Same widths as the plan; or narrower ones whose cost at full depth is the plan's mean cost."
    )
    score: Literal["gates", "paper", "qkvo", "grain", "magnitude", "random"] = setting(
        "gates", "How heads and neurons are scored."
    )

    def fit(self, run: Run) -> Fitted:
        """Train the stages in their order.

        Raises:
            UserError: Task, model and plan do not fit each other, or no widths are as cheap.
        """
        original = run.original()
        return run.fitted(self.slender(run, original), original)

    def slender(self, run: Run, original: Trained) -> Trained:
        """Return the slender network with its one exit."""
        from .widths import narrower

        plan, stages = run.plan, run.stages
        widths = narrower(plan, run.encoded("train").lengths) if self.match == "flops" else plan.widths
        begin = run.exited(original, [])
        slim = run.slenderised(begin, original, Scoring(self.score), one_exit(stages.slenderise), widths)
        return recovered(run, slim, original)


def recovered(run: Run, slim: Trained, original: Trained) -> Trained:
    """Train a cut network of one exit: the hidden states first, then all.

    What the assistant would have trained on goes to the last stage.
    """
    stages = run.stages
    slim = run.recovered(slim, original, stages.recover_hidden)
    longer = length(stages.assistant_hidden, stages.assistant, stages.recover) / length(stages.recover)
    return run.recovered(slim, original, one_exit(stages.recover).scaled(longer, 1.0))


def one_exit(stage: Stage) -> Stage:
    """Let the one exit learn from the original's."""
    return replace(stage, answers="final")


def length(*stages: Stage | None) -> float:
    """Add up the lengths of stages, which are all in tokens or all in epochs."""
    return sum(float(stage.tokens or stage.epochs or 0) for stage in stages if stage is not None)
