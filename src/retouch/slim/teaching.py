"""What a network learns in one step, who teaches it, and how good its exits are.

A `Lesson` is the student with its loss, one module, so that gradients of several processes are joined where it is
wrapped. A teacher's logits are computed once and looked up by the example's number; so are its hidden states where they
fit into memory, since a teacher of full size costs several times what a slender student does. Otherwise they are
computed again for each batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..progress import track
from .data import quality
from .encoded import Encoded, collate, order
from .losses import assistant_loss, exit_loss, hard_loss, hidden_loss, targets
from .presets import Stage

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .base import Size
    from .network import Levels, SlimForSequenceClassification

__all__ = [
    "Hidden", "Lesson", "Spoken", "Teacher", "answers", "hidden_bytes", "hidden_states", "inputs_of", "numbered",
    "qualities", "resting",
]  # fmt: skip

Batch = Mapping[str, Tensor]


def inputs_of(batch: Batch) -> dict[str, Any]:
    """Return what a network reads of a batch."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: value for name in names if (value := batch.get(name)) is not None}


def numbered(encoded: Encoded, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Make a batch on a device, with the examples' numbers as ``index``."""
    batch = collate(encoded, rows) | {"index": torch.tensor(list(rows))}
    return {name: value.to(device) for name, value in batch.items()}


@dataclass(frozen=True, eq=False)
class Hidden:
    """A teacher's hidden states at the real tokens of all training examples, one example after another.

    Attributes:
        states: (tokens of all examples, levels, d_model) float16, on the CPU.
        starts: Where each example begins, (examples,).
    """

    states: Tensor
    starts: Tensor

    def of(self, index: Tensor, mask: Tensor) -> list[Tensor]:
        """Return a batch's states by level, each (batch, tokens, d_model) float32; at padding, whatever stands there.

        Args:
            index: The examples' numbers, (batch,).
            mask: 1 at real tokens, which come first, (batch, tokens).
        """
        tokens = torch.arange(mask.shape[1])
        last = mask.sum(1, keepdim=True).cpu() - 1
        places = self.starts[index.cpu()].unsqueeze(1) + torch.minimum(tokens, last)
        return list(self.states[places].to(mask.device).float().unbind(2))


@dataclass(frozen=True, eq=False)
class Teacher:
    """A network that does not learn, and what it answers to the training examples.

    Attributes:
        network: In eval mode.
        logits: By block with an exit, (examples, classes); empty where nothing is learnt from its answers.
        original: Of the original's last exit, (examples, classes), where harm against it is watched.
        hidden: Its states at the levels that the stage compares; None: they are computed batch by batch.
    """

    network: SlimForSequenceClassification | None
    logits: Mapping[int, Tensor]
    original: Tensor | None = None
    hidden: Hidden | None = None


class Lesson(nn.Module):
    """A student and what it is charged for.

    Args:
        student: The network that learns.
        stage: What it learns from.
        teacher: Whom it learns from.
        equilibrium: Whether gradients flow down as means over exits.
        watched: Blocks whose exits the harm is averaged over.
    """

    def __init__(
        self,
        student: SlimForSequenceClassification,
        stage: Stage,
        teacher: Teacher,
        equilibrium: bool = True,
        watched: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.student = student
        self.stage = stage
        self.equilibrium = equilibrium
        self.watched = watched
        self._teacher = (teacher,)  # in a tuple, so that its network is no part of this module

    def forward(self, batch: Batch, hidden_only: bool, price: float) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, averaged over its examples, and its harm (0 where none is watched)."""
        seen = self.student.levels(**inputs_of(batch), equilibrium=self.equilibrium)
        y = targets(batch["labels"], self.student.config)
        loss = self._hidden(seen, batch) if self.stage.hidden else None
        if not (hidden_only and self.stage.hidden):
            answers = self._answers(seen, batch, y)
            if answers is not None:
                loss = answers if loss is None else loss + answers
        assert loss is not None  # a stage without a loss cannot be made
        harm = self._harm(seen, batch, y)
        if price:
            loss = loss + price * hard_loss(seen.logits, y, self.student.config.task)
        return loss, harm

    def _hidden(self, seen: Levels, batch: Batch) -> Tensor:
        teacher, mask = self._teacher[0], batch["attention_mask"]
        levels = self.stage.levels(self.student.size.blocks)
        if teacher.hidden is not None:
            own = seen.hidden if levels is None else [seen.hidden[i] for i in levels]
            return hidden_loss(own, teacher.hidden.of(batch["index"], mask), mask)
        assert teacher.network is not None
        with torch.no_grad():
            shown = teacher.network.levels(**inputs_of(batch), exits=())
        return hidden_loss(seen.hidden, shown.hidden, mask, levels)

    def _answers(self, seen: Levels, batch: Batch, y: Tensor) -> Tensor | None:
        task, how = self.student.config.task, self.stage.answers
        if how == "none":
            return None
        if how == "labels":
            return hard_loss(seen.logits, y, task)
        taught = {block: z[batch["index"]] for block, z in self._teacher[0].logits.items()}
        if how == "exits":
            return exit_loss(seen.logits, taught, task)
        last = taught[max(taught)]
        if how == "assistant":
            return assistant_loss(seen.logits, last, y, task)
        return exit_loss(seen.logits, dict.fromkeys(seen.logits, last), task)

    def _harm(self, seen: Levels, batch: Batch, y: Tensor) -> Tensor:
        """Return by how much the labels cost the exits that will be used more than they cost the original."""
        original = self._teacher[0].original
        if original is None:
            return y.new_zeros((), dtype=torch.float32)
        task = self.student.config.task
        with torch.no_grad():
            here = hard_loss({block: seen.logits[block] for block in self.watched}, y, task) / len(self.watched)
            return (here - hard_loss({0: original[batch["index"]]}, y, task)).float()


class Spoken(nn.Module):
    """A network of one exit as a teacher of many: its last answer stands at every block."""

    def __init__(self, network: SlimForSequenceClassification, exits: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.exits = network, exits

    def levels(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Levels:
        """Return the network's levels, its last logits repeated."""
        seen = self.network.levels(input_ids, attention_mask, token_type_ids)
        return type(seen)(seen.hidden, dict.fromkeys(self.exits, seen.logits[max(seen.logits)]))


# ---------------------------------------------------------------- answers and their quality


@contextmanager
def resting(network: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while; afterwards every module is as it was."""
    training = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, was in training:
            module.training = was


def answers(
    accelerator: Accelerator,
    network: SlimForSequenceClassification,
    encoded: Encoded,
    only: Sequence[int] | None = None,
    batch_size: int = 64,
) -> dict[int, Tensor]:
    """Return every exit's logits, at full depth, on the CPU; all processes share the work.

    Shapes: by block, (examples, classes) float32, in the order of the examples; a regression's are standardised. Where
    `only` some are asked for, the others are 0.
    """
    network.to(accelerator.device)
    found = {
        b: torch.zeros(len(encoded), network.size.classes, device=accelerator.device) for b in network.widths.exits
    }
    with resting(network), torch.no_grad(), accelerator.autocast():
        asked = range(len(encoded)) if only is None else only
        work = order(encoded if only is None else encoded.only(only), batch_size, seed=None)
        for rows in work[accelerator.process_index :: accelerator.num_processes]:
            batch = numbered(encoded, [asked[row] for row in rows], accelerator.device)
            for block, z in network.levels(**inputs_of(batch)).logits.items():
                found[block][batch["index"]] = z.float()
    # each row is filled by one process and 0 elsewhere, so the sum is exact
    return {block: cast(Tensor, accelerator.reduce(z, "sum")).cpu() for block, z in found.items()}


def hidden_bytes(size: Size, encoded: Encoded, levels: Sequence[int] | None) -> int:
    """Return what `hidden_states` would take."""
    n_levels = size.blocks + 1 if levels is None else len(levels)
    return 2 * sum(encoded.lengths) * n_levels * size.d_model


def hidden_states(
    accelerator: Accelerator,
    network: SlimForSequenceClassification,
    encoded: Encoded,
    levels: Sequence[int] | None,
    batch_size: int = 64,
) -> Hidden:
    """Compute a teacher's hidden states once, in one pass; every process does so for itself.

    Args:
        accelerator: Where it runs.
        network: The teacher.
        encoded: The training examples.
        levels: Places in ``x, h_0 ..``; None takes all.
        batch_size: Examples at a time, of similar length.
    """
    network.to(accelerator.device)
    which = range(network.size.blocks + 1) if levels is None else levels
    lengths = torch.tensor(encoded.lengths)
    starts = lengths.cumsum(0) - lengths
    states = torch.empty(int(lengths.sum()), len(which), network.size.d_model, dtype=torch.float16)
    with resting(network), torch.no_grad(), accelerator.autocast():
        for rows in track(order(encoded, batch_size, seed=None), "Teacher's hidden states"):
            batch = numbered(encoded, rows, accelerator.device)
            seen = network.levels(**inputs_of(batch), exits=()).hidden
            real = batch["attention_mask"].bool()
            places = starts[rows].unsqueeze(1) + torch.arange(real.shape[1])
            states[places[real.cpu()]] = torch.stack([seen[level] for level in which], 2)[real].half().cpu()
    return Hidden(states, starts)


def qualities(logits: Mapping[int, Tensor], labels: Any, metric: str) -> dict[int, float]:
    """Return how good each exit is, by its block."""
    found = {}
    for block, z in logits.items():
        classes = z.shape[1] if metric != "spearman" else None
        found[block] = quality(metric, z.double().numpy(), labels, classes)
    return found
