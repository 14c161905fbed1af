"""COST-EFF: slender and with exits, the two trained together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..settings import setting
from .base import SlimMethod
from .presets import Answers, Stage, Stages, TrainingSettings

if TYPE_CHECKING:
    from .cutting import Scoring
    from .stages import Fitted, Run, Trained

__all__ = ["CostEff"]


@dataclass(frozen=True)
class CostEff(TrainingSettings, SlimMethod):
    """Cut an encoder's width by the losses of all its exits, and let a full-size network with exits teach it.

    The original is fine-tuned; an assistant of full size learns to answer after every block; it is cut in steps, while
    it learns from the assistant block to block and exit to exit; then it recovers, first its hidden states, then all.

    Source: Shen et al., COST-EFF: Collaborative Optimization of Spatial and Temporal Efficiency with Slenderized
        Multi-exit Language Models (EMNLP 2022); sbwww/COST-EFF (Apache-2.0). Gates as scores, their loss without hidden
        states, the weighted embedding and the preset ``fast`` are ours.

    Use when: a classifier must become several times smaller and cheaper, and easy texts may be answered early.

    Known problems: the rates and lengths of ``fast`` are first values, a small part of the published training; ``paper``
        follows the authors' scripts, whose tables of results were not at hand to compare with.

    Shapes: heads and neurons of every block become fewer, the word embedding two factors of (vocab x rank) and
        (rank x d_model); d_model, the number of blocks and the size of a head stay.

    Example:
        >>> CostEff(preset="paper", assistant=False).score
        'gates'
    """

    assistant: bool = setting(True, "Teach by a full-size network with exits; off: by the original's last answers.")
    assistant_from: Literal["preset", "raw", "finetuned"] = setting(
        "preset", "What the assistant starts from; raw: the encoder before fine-tuning."
    )
    equilibrium: bool = setting(True, "Let gradients flow down as means over exits; off: as sums.")
    hidden_loss: bool = setting(True, "Compare hidden states with the teacher's.")
    exit_loss: bool = setting(True, "Exits learn from the teacher's exits; off: from hard labels.")
    score: Literal["gates", "paper", "qkvo", "grain", "magnitude", "random"] = setting(
        "gates", "How heads and neurons are scored."
    )
    score_loss: Literal["exits_ce", "paper", "final_only"] = setting("exits_ce", "The loss that scores are slopes of.")
    widths: Literal["uniform", "global"] = setting("uniform", "Equal widths, or blocks compete for the same total.")
    weighted_embedding: bool = setting(True, "The embedding's factors mind how often a token occurs.")
    depth: Literal["plan", "assistant"] = setting(
        "assistant", "Mean depth: as planned, or deeper and narrower where the assistant's exits need it."
    )
    n_cuts: int = setting(0, "Cuts; 1: all at once; 0: the preset's (fast 5, paper one a head).", ge=0)
    constrained: bool = setting(False, "Add the labels' loss to the last stage at a price that the limit of harm sets.")
    price_step: float = setting(0.1, "How fast that price rises.", gt=0)

    def fit(self, run: Run) -> Fitted:
        """Train the stages in their order.

        Raises:
            UserError: Task, model and plan do not fit each other.
            RetouchError: A stage diverged.
        """
        stages = self.altered(run.stages)
        original = run.original(stages.finetune)
        assistant, begin = self._teacher(run, original, stages)
        if assistant is not None and self.depth == "assistant":
            run.replan(assistant)
        teacher = assistant or original
        slim = run.slenderised(begin, teacher, self.scoring(), stages.slenderise, equilibrium=self.equilibrium)
        slim = run.recovered(slim, teacher, stages.recover_hidden, equilibrium=self.equilibrium)
        slim = run.recovered(
            slim,
            teacher,
            stages.recover,
            equilibrium=self.equilibrium,
            original=original if self.constrained else None,
            price_step=self.price_step,
        )
        return run.fitted(slim, original, assistant)

    def altered(self, stages: Stages) -> Stages:
        """Return a preset's stages with what the settings switch off."""
        before = stages.assistant_hidden
        return replace(
            stages,
            assistant_hidden=None if before is None else self._altered(before, "assistant"),
            slenderise=self._altered(stages.slenderise),
            recover_hidden=self._altered(stages.recover_hidden),
            recover=self._altered(stages.recover),
        )

    def _altered(self, stage: Stage, without: Answers = "exits") -> Stage:
        """Change one stage; without hidden states, one that compares nothing else learns from `without`."""
        hidden = stage.hidden and self.hidden_loss
        answers = without if not hidden and stage.answers == "none" else stage.answers
        if answers == "exits" and not self.exit_loss:
            answers = "labels"
        if answers == "exits" and not self.assistant:
            answers = "final"
        return replace(stage, hidden=hidden, answers=answers)

    def scoring(self) -> Scoring:
        """Return what is cut, and how it is found."""
        from .cutting import Scoring

        return Scoring(self.score, self.score_loss, self.widths, self.weighted_embedding, self.n_cuts or None)

    def _teacher(self, run: Run, original: Trained, stages: Stages) -> tuple[Trained | None, Trained]:
        """Return the assistant, if there is one, and the network to cut."""
        if not self.assistant:
            return None, run.exited(original)
        raw = None if self.assistant_from == "preset" else self.assistant_from == "raw"
        found = run.assistant(
            original, stages.assistant, stages.assistant_hidden, raw=raw, equilibrium=self.equilibrium
        )
        return found, found
