"""FT-L: fine-tuning held close to the start, the oldest baseline."""

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

__all__ = ["FtL"]


@dataclass(frozen=True)
class FtL(EditMethod):
    """Fine-tune one MLP weight on the facts, every entry held within a small distance of its start.

    Source: Zhu et al., Modifying Memories in Transformer Models (arXiv 2012.00363), as implemented in kmeng01/rome
        (MIT): all of the target's tokens are read at the prompt's last token.

    Use when: as a baseline in a bench.

    Known problems: for targets of several tokens the objective is wrong (it asks one position for all of them);
        paraphrases are rarely reached; a full-rank change, so a saved one is as large as the weight.

    Shapes: one difference (d_model x d_ff).

    Example:
        >>> FtL().n_steps
        25
    """

    block: int = setting(-1, "Edited block; -1: 0 for gpt2 and gptj, else 0.66 of the depth.", ge=-1)
    learning_rate: float = setting(5e-4, "Adam's step.", gt=0)
    n_steps: int = setting(25, "Most passes over the facts.", ge=1)
    max_change: float = setting(5e-4, "Farthest that an entry may move; 0: as far as it likes.", ge=0)
    stop_loss: float = setting(1e-2, "Mean loss at which the training ends.", ge=0)
    batch_size: int = setting(64, "Facts of a step.", ge=1)
    bos: Bos = setting("tokenizer", "Beginning-of-text token: as the tokenizer does, always, never.")

    def planned(self, model: Model, facts: Sequence[Fact], previous: Mapping[str, Tensor], unedited: Model) -> Change:
        """Train on all facts together."""
        method = self.as_published(model)
        early = model.anatomy.groups & {"gpt2", "gptj"}
        name = down(block_at(method.block, 0.0 if early else 0.66, model.anatomy, self.name))
        rows = encode(model.tokenizer, [Text(f.before, f.subject, f.after, f.target) for f in facts], self.bos)
        parts, losses = tune(
            model,
            name,
            [Reads.at_prompt(r) for r in rows],
            learning_rate=method.learning_rate,
            n_steps=method.n_steps,
            max_change=method.max_change,
            stop_loss=method.stop_loss,
            batch_size=method.batch_size,
        )
        return self.change(model, facts, parts, notes={"losses": losses})
