"""What is minimised: block to block, exit to exit, and exit to label.

Letters: B batch, t_b real tokens of example b, d = d_model, x the embedding's output, h_l the output of block l, z_l the
logits of the exit after block l. Sums over levels and exits carry no weights. Logits by block are dictionaries
``{block: (batch, classes)}``. In a regression there is one output, in units of the standardised label, and the squared
error stands wherever a classification has the cross-entropy.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UserError, unknown

if TYPE_CHECKING:
    from .network import SlimConfig, SlimForSequenceClassification

__all__ = [
    "TASKS",
    "SlimLoss",
    "assistant_loss",
    "exit_loss",
    "hard_loss",
    "hidden_loss",
    "soft_cross_entropy",
    "targets",
]

TASKS = ("classification", "regression")


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, levels: Sequence[int] | None = None
) -> Tensor:
    """Return how far the student's hidden states are from the teacher's, level by level, without the padding.

    L = sum over levels of mean over b of (1/t_b) sum over real tokens of |student - teacher|^2 / d.

    Source: Shen et al. 2022, the mean over real tokens in place of all positions.

    Shapes: each state (batch, tokens, d_model); `mask` (batch, tokens) of 0 and 1; returns a scalar.

    Args:
        student: x, h_0 .. h_{L-1} of the student.
        teacher: The same of the teacher; no gradient flows into them.
        mask: 1 at real tokens.
        levels: Places in the two sequences (0 is x, l + 1 is h_l); None takes all.

    Raises:
        UserError: The two networks have different depths or widths of the stream.
    """
    if len(student) != len(teacher) or student[0].shape != teacher[0].shape:
        raise UserError(
            f"Hidden states can only be compared level by level: the student has {len(student)} levels of "
            f"{tuple(student[0].shape)}, the teacher {len(teacher)} of {tuple(teacher[0].shape)}. "
            "Take a teacher of the same depth and d_model."
        )
    real = mask.to(student[0].dtype)
    weight = real / (real.sum(1, keepdim=True).clamp(min=1) * len(real))
    which = range(len(student)) if levels is None else levels
    return torch.stack([((student[i] - teacher[i].detach()).square().mean(-1) * weight).sum() for i in which]).sum()


def soft_cross_entropy(target_probs: Tensor, logits: Tensor, tau: float = 1.0) -> Tensor:
    """Return the cross-entropy of the softened answers against the teacher's probabilities, averaged over examples.

    Shapes: both (batch, classes); returns a scalar.

    Args:
        target_probs: The teacher's probabilities, softened by the same `tau`.
        logits: The student's logits.
        tau: Temperature; other than 1, the loss is multiplied by its square, which keeps the gradient's size.
    """
    loss = -(target_probs * (logits / tau).log_softmax(-1)).sum(-1).mean()
    return loss if tau == 1 else loss * tau**2


def hard_loss(logits: Mapping[int, Tensor], y: Tensor, task: str) -> Tensor:
    """Return the sum over exits of the loss against the labels.

    Shapes: `logits` {block: (batch, classes)}; `y` (batch,); returns a scalar.

    Args:
        logits: Of every exit.
        y: Indices of classes, or standardised numbers.
        task: ``"classification"`` or ``"regression"``.

    Raises:
        UnknownName: There is no such task.
    """
    _check(task)
    if task == "regression":
        return torch.stack([functional.mse_loss(z.squeeze(-1), y.to(z.dtype)) for z in logits.values()]).sum()
    return torch.stack([functional.cross_entropy(z, y) for z in logits.values()]).sum()


def assistant_loss(logits: Mapping[int, Tensor], original: Tensor, y: Tensor, task: str) -> Tensor:
    """Return what the assistant's exits learn from: half the original's final answers, half the labels.

    Shapes: `logits` {block: (batch, classes)}; `original` (batch, classes); `y` (batch,); returns a scalar.

    Raises:
        UnknownName: There is no such task.
    """
    return (exit_loss(logits, dict.fromkeys(logits, original), task) + hard_loss(logits, y, task)) / 2


def exit_loss(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], task: str) -> Tensor:
    """Return the sum over the student's exits of the loss against the teacher's exit at the same block.

    Shapes: both {block: (batch, classes)}; returns a scalar.

    Raises:
        UserError: The student has an exit where the teacher has none.
        UnknownName: There is no such task.
    """
    _check(task)
    if lacking := [block for block in student if block not in teacher]:
        raise UserError(
            f"The teacher has no exit after block {lacking[0]}, where the student has one. "
            f"The teacher's exits: {sorted(teacher)}."
        )
    return torch.stack([_taught(z, teacher[block].detach(), task) for block, z in student.items()]).sum()


def targets(labels: Tensor, config: SlimConfig) -> Tensor:
    """Return labels as the exits answer them: a regression's numbers standardised, classes as they are.

    Shapes: any shape of batch numbers; returns (batch,).
    """
    if config.task == "regression":
        return (labels.reshape(-1) - config.target_mean) / config.target_scale
    return labels.reshape(-1)


class SlimLoss:
    """Let a plain ``Trainer`` train a network under a teacher: ``Trainer(compute_loss_func=SlimLoss(teacher, student))``.

    While the student trains, the loss is the hidden loss plus the exits' losses against the teacher, plus, if asked
    for, the labels'; the teacher is in eval mode, at full depth, without gradient. While it is evaluated, the loss is
    that of its answers against the labels. The batch reaches the teacher by a hook on the student's ``forward``,
    because a ``Trainer`` shows a loss the outputs only; `close`, or the end of a ``with``, takes the hook off.

    Args:
        teacher: A network of the same depth and d_model, with an exit wherever the student has one.
        student: What the ``Trainer`` trains.
        hidden: Whether to compare hidden states.
        exits: Whether to compare exits.
        hard: Factor of the exits' losses against the labels.

    Raises:
        UserError: Nothing is left to learn from; or, when called, the two networks do not fit each other.
    """

    def __init__(
        self,
        teacher: SlimForSequenceClassification,
        student: SlimForSequenceClassification,
        *,
        hidden: bool = True,
        exits: bool = True,
        hard: float = 0.0,
    ) -> None:
        if not (hidden or exits or hard):
            raise UserError("SlimLoss has nothing to learn from: switch on hidden, exits or hard.")
        self.teacher, self.student = teacher, student
        self.hidden, self.exits, self.hard = hidden, exits, hard
        self._inputs: dict[str, Any] | None = None
        self._hook = student.register_forward_pre_hook(self._look, with_kwargs=True)

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss of the batch that the student has just answered.

        Args:
            outputs: The student's.
            labels: Not needed while training unless `hard` is above 0.
            num_items_in_batch: Examples of all batches that one update adds up; None: a plain mean over this batch.
        """
        inputs, self._inputs = self._inputs, None
        loss = self._answers(outputs, labels) if inputs is None else self._taught(outputs, labels, inputs)
        return loss if num_items_in_batch is None else loss * len(outputs.logits) / num_items_in_batch

    def close(self) -> None:
        """Take the hook off the student."""
        self._hook.remove()

    def __enter__(self) -> SlimLoss:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look(self, student: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._inputs = None
        if student.training:
            self._inputs = dict(inspect.signature(student.forward).bind(*args, **kwargs).arguments)
            kwargs = {**kwargs, "return_dict": True} | ({"output_hidden_states": True} if self.hidden else {})
        return args, kwargs

    def _taught(self, outputs: Any, labels: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        taught = self._teach(ids, mask, inputs.get("token_type_ids"))
        task, parts = self.student.config.task, []
        if self.hidden:
            parts.append(hidden_loss(outputs.hidden_states, taught.hidden, mask))
        if self.exits:
            parts.append(exit_loss(outputs.exit_logits, taught.logits, task))
        if self.hard:
            if labels is None:
                raise UserError("SlimLoss with hard above 0 needs labels in every batch.")
            parts.append(self.hard * hard_loss(outputs.exit_logits, targets(labels, self.student.config), task))
        return torch.stack(parts).sum()

    def _teach(self, ids: Tensor, mask: Tensor, types: Tensor | None) -> Any:
        if self.teacher.device != ids.device:
            self.teacher.to(ids.device)
        self.teacher.eval()
        with torch.no_grad():
            return self.teacher.levels(ids, mask, types)

    def _answers(self, outputs: Any, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise UserError("An evaluation has no loss without labels.")
        config = self.student.config
        logits = outputs.logits
        if config.task == "regression":
            logits = (logits - config.target_mean) / config.target_scale
        return hard_loss({self.student.size.blocks - 1: logits}, targets(labels, config), config.task)


def _taught(logits: Tensor, teacher: Tensor, task: str) -> Tensor:
    if task == "regression":
        return functional.mse_loss(logits, teacher)
    return soft_cross_entropy(teacher.softmax(-1), logits)


def _check(task: str) -> None:
    if task not in TASKS:
        raise unknown("task", task, TASKS)
