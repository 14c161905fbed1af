"""Answer a batch whose rows leave at different exits: those that are sure go, the others move up and run on.

The law: every row gets the exit and the logits that it would get alone, whatever its batch mates, their order, the
padding and its side. `answer_one_by_one` is the obvious loop that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import SettingsError
from .rules import TOLERANCE, Rule, State, advance, uncertainty

__all__ = ["Answers", "Compact", "answer", "answer_one_by_one", "rule_of"]

Compact = Literal["auto", "always", "never"]

GATHER_SHARE = 0.25
"""Share of the carried rows that must have left before the others move up; moving costs a copy."""


@dataclass(eq=False)
class Answers:
    """The answers to a batch.

    Attributes:
        logits: Of the exit that each row took, [batch, classes].
        where: The block of that exit, [batch].
    """

    logits: Tensor
    where: Tensor


def rule_of(
    network: Any,
    rule: str | None = None,
    temperatures: Sequence[float] | None = None,
    every: int | None = None,
    min_block: int | None = None,
) -> Rule:
    """Complete what is given by what the network was saved with.

    Raises:
        SettingsError: A field has a value that it does not allow.
    """
    saved = network.config
    given = saved.temperatures if temperatures is None else temperatures
    return Rule(
        saved.rule if rule is None else rule,
        None if given is None else tuple(given),
        saved.every if every is None else every,
        saved.min_block if min_block is None else min_block,
        TOLERANCE if getattr(saved, "tolerance", None) is None else saved.tolerance,
    )


@torch.no_grad()
def answer(
    network: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor | None = None,
    *,
    rule: str | None = None,
    threshold: float | None = None,
    temperatures: Sequence[float] | None = None,
    every: int | None = None,
    min_block: int | None = None,
    compact: Compact = "auto",
) -> Answers:
    """Answer a batch; each row leaves at the first exit that is asked and sure enough.

    Shapes: `input_ids`, `attention_mask` and `token_type_ids` are [batch, tokens]; the batch may be empty, and padding
    may stand on either side.

    Args:
        network: A slim network, evaluating.
        input_ids: Token ids.
        attention_mask: 1 for tokens, 0 for padding.
        token_type_ids: The text of a pair that a token belongs to.
        rule: See `Rule`; None takes the network's, as below.
        threshold: Leave where the uncertainty is below it; 0 lets nobody leave early.
        temperatures: See `Rule`.
        every: See `Rule`.
        min_block: See `Rule`.
        compact: ``auto`` moves the others up where enough rows have left or the padding shrinks, ``always`` at every
            exit, ``never`` at none. The answers are the same.

    Raises:
        SettingsError: A setting does not fit the network; the message names the field.
    """
    if compact not in ("auto", "always", "never"):
        raise SettingsError(f"compact must be 'auto', 'always' or 'never'; got {compact!r}.")
    deciding = rule_of(network, rule, temperatures, every, min_block)
    limit = _threshold(network, threshold)
    batch = _Batch.start(network, *right_padded(input_ids, attention_mask, token_type_ids))
    asked = _asked(network, deciding, limit)
    for block in range(network.size.blocks):
        if batch.done:
            break
        batch.run(block)
        if block in asked:
            batch.leave(block, deciding, limit)
            batch.move_up(compact)
    return batch.answers


def _threshold(network: Any, threshold: float | None) -> float:
    limit = network.config.threshold if threshold is None else threshold
    return 0.0 if limit is None else float(limit)


def _asked(network: Any, rule: Rule, limit: float) -> tuple[int, ...]:
    """Return the blocks whose exits are asked; the last alone where nobody can leave before it."""
    exits = network.widths.exits
    if limit <= 0:
        return (exits[-1],)
    rule.check(exits, network.config.num_labels)
    return rule.due(exits)


def right_padded(
    input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Move each row's tokens to the left in their order, and cut off what is padding in all rows."""
    order = (1 - attention_mask.long()).argsort(dim=1, stable=True)[:, : _longest(attention_mask)]
    types = None if token_type_ids is None else token_type_ids.gather(1, order)
    return input_ids.gather(1, order), attention_mask.gather(1, order), types


def _longest(mask: Tensor) -> int:
    return max(1, int(mask.sum(1).max())) if mask.numel() else mask.shape[1]


@dataclass(eq=False)
class _Batch:
    """The rows that are carried through the blocks.

    Attributes:
        network: What they run through.
        answers: By original row.
        hidden: [carried, tokens, d_model].
        mask: [carried, tokens].
        rows: The original row of each carried one.
        lengths: Its tokens.
        active: Whether it has not left yet; those that have are frozen.
        state: What the exits said about each.
    """

    network: Any
    answers: Answers
    hidden: Tensor
    mask: Tensor
    rows: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    active: np.ndarray[Any, Any]
    state: State | None = None

    @classmethod
    def start(cls, network: Any, ids: Tensor, mask: Tensor, types: Tensor | None) -> _Batch:
        n, classes = len(ids), network.config.num_labels
        where = torch.zeros(n, dtype=torch.long, device=ids.device)
        kind = next(network.parameters()).dtype
        answers = Answers(torch.zeros(n, classes, dtype=kind, device=ids.device), where)
        hidden = network.embed(ids, mask, types) if n else ids
        return cls(network, answers, hidden, mask, np.arange(n), mask.sum(1).cpu().numpy(), np.ones(n, dtype=np.bool_))

    @property
    def done(self) -> bool:
        return not self.active.any()

    def run(self, block: int) -> None:
        self.hidden = self.network.run_block(block, self.hidden, self.mask)

    def leave(self, block: int, rule: Rule, limit: float) -> None:
        """Ask the exit after a block, and write the answers of those that are sure, by their original row."""
        logits = self.network.read_exit(block, self.hidden, self.mask)
        if block == self.network.size.blocks - 1:
            left = self.active.copy()
        else:
            self.state = advance(self.state, logits, rule.tolerance)
            heat = rule.temperature(self.network.widths.exits, block)
            left = self.active & (uncertainty(rule.name, self.state, self.network.size.blocks, heat) < limit)
        if left.any():
            here, there = self._places(np.flatnonzero(left)), self._places(self.rows[left])
            self.answers.logits[there] = logits[here].to(self.answers.logits.dtype)
            self.answers.where[there] = block
        self.active &= ~left

    def move_up(self, compact: Compact) -> None:
        """Drop the rows that have left, and the padding that only they needed."""
        n_left = int((~self.active).sum())
        if compact == "never" or self.done or (compact == "auto" and not n_left):
            return
        longest = max(1, int(self.lengths[self.active].max()))
        shrinks = longest < self.mask.shape[1]
        if compact == "auto" and n_left < GATHER_SHARE * len(self.active) and not shrinks:
            return
        kept = self._places(np.flatnonzero(self.active))
        self.hidden, self.mask = self.hidden[kept, :longest], self.mask[kept, :longest]
        self.state = None if self.state is None else self.state.take(self.active)
        self.rows, self.lengths = self.rows[self.active], self.lengths[self.active]
        self.active = np.ones(len(self.rows), dtype=np.bool_)

    def _places(self, indices: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(indices).to(self.mask.device)


@torch.no_grad()
def answer_one_by_one(
    network: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor | None = None,
    *,
    rule: str | None = None,
    threshold: float | None = None,
    temperatures: Sequence[float] | None = None,
    every: int | None = None,
    min_block: int | None = None,
) -> Answers:
    """Do as `answer`, one row after the other and without padding: slow, obvious, and what `answer` is compared with.

    Args:
        network: See `answer`.
        input_ids: See `answer`.
        attention_mask: See `answer`.
        token_type_ids: See `answer`.
        rule: See `answer`.
        threshold: See `answer`.
        temperatures: See `answer`.
        every: See `answer`.
        min_block: See `answer`.
    """
    deciding = rule_of(network, rule, temperatures, every, min_block)
    limit, logits, where = _threshold(network, threshold), [], []
    for i, mask in enumerate(attention_mask.bool()):
        types = None if token_type_ids is None else token_type_ids[i, mask][None]
        answered, block = _alone(network, input_ids[i, mask][None], types, deciding, limit)
        logits.append(answered)
        where.append(block)
    kind, classes = next(network.parameters()).dtype, network.config.num_labels
    empty = torch.zeros(0, classes, dtype=kind, device=input_ids.device)
    return Answers(torch.cat([empty, *logits]), torch.tensor(where, dtype=torch.long, device=input_ids.device))


def _alone(network: Any, ids: Tensor, types: Tensor | None, rule: Rule, limit: float) -> tuple[Tensor, int]:
    mask, state = torch.ones_like(ids), None
    hidden, asked, last = network.embed(ids, mask, types), _asked(network, rule, limit), network.size.blocks - 1
    for block in range(last + 1):
        hidden = network.run_block(block, hidden, mask)
        if block not in asked:
            continue
        logits = network.read_exit(block, hidden, mask)
        if block == last:
            break
        state = advance(state, logits, rule.tolerance)
        heat = rule.temperature(network.widths.exits, block)
        if uncertainty(rule.name, state, network.size.blocks, heat)[0] < limit:
            return logits, block
    return logits, last
