"""FT-M: fine-tuning with the right objective, a strong simple baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..change import Change
from ..model import Model
from ..settings import setting
from ..tokens import Bos, Text, encode
from ._tune import Reads, tune
from .base import EditMethod, block_at, down
from .facts import Fact

__all__ = ["FtM"]


@dataclass(frozen=True)
class FtM(EditMethod):
    """Fine-tune one MLP weight on the facts with cross entropy on the target's own tokens.

    Source: Zhang et al., A Comprehensive Study of Knowledge Editing (arXiv 2401.01286); zjunlp/EasyEdit (MIT).

    Use when: as the baseline that a new method has to beat.

    Known problems: nothing keeps it near the start, so neighbours drift; a full-rank change.

    Shapes: one difference (d_model x d_ff).

    Example:
        >>> FtM().learning_rate
        0.0005
    """

    block: int = setting(-1, "Edited block; -1: 0.66 of the depth.", ge=-1)
    learning_rate: float = setting(5e-4, "Adam's step.", gt=0)
    n_steps: int = setting(25, "Most passes over the facts.", ge=1)
    stop_loss: float = setting(1e-2, "Mean loss at which the training ends.", ge=0)
    batch_size: int = setting(64, "Facts of a step.", ge=1)
    bos: Bos = setting("tokenizer", "Beginning-of-text token: as the tokenizer does, always, never.")

    def planned(self, model: Model, facts: Sequence[Fact], previous: Mapping[str, Tensor], unedited: Model) -> Change:
        """Train on all facts together."""
        name = down(block_at(self.block, 0.66, model.anatomy, self.name))
        rows = encode(model.tokenizer, [Text(f.before, f.subject, f.after, f.target) for f in facts], self.bos)
        parts, losses = tune(
            model,
            name,
            [Reads.at_target(r) for r in rows],
            learning_rate=self.learning_rate,
            n_steps=self.n_steps,
            max_change=0.0,
            stop_loss=self.stop_loss,
            batch_size=self.batch_size,
        )
        return self.change(model, facts, parts, notes={"losses": losses})
