"""Prompts as tokens with places for answers, and passes that go on from what was read before."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import ModelError, UserError
from ..model import Model
from ..trace import Trace
from .templates import Rendered

__all__ = ["Line", "Reading", "batches", "lines"]

ROW_TOKENS = 2048
"""Tokens of one batch on the CPU; sixteen times as many on an accelerator."""


@dataclass(frozen=True)
class Line:
    """A prompt with its answers as tokens.

    Attributes:
        ids: The tokens, with each part's first label in its place.
        slots: Index of each part's label.
        labels: For each part the token of each label, found where it stands.
    """

    ids: tuple[int, ...]
    slots: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]

    def gap(self, part: int) -> tuple[int, ...]:
        """Return the tokens between a part's label and the next one's."""
        return self.ids[self.slots[part] + 1 : self.slots[part + 1]]

    @property
    def front(self) -> tuple[int, ...]:
        """All that stands before the first label."""
        return self.ids[: self.slots[0]]


def lines(model: Model, shown: Sequence[Rendered], name: str, special: bool = True) -> list[Line]:
    """Tokenise prompts, and find the token of every label in every place.

    The last line is encoded with each label, and what differs is the label's token there.

    Args:
        model: Its tokenizer is used.
        shown: The prompts.
        name: The template's name, for messages.
        special: Whether the tokenizer adds its special tokens.

    Raises:
        UserError: A label is not one token of its own in its place, or a prompt is longer than the model reads.
        ModelError: The tokenizer gives no character offsets.
    """
    if not getattr(model.tokenizer, "is_fast", False):
        raise ModelError(
            f"The tokenizer {type(model.tokenizer).__name__} gives no character offsets, so answers cannot be placed. "
            "Open the model with a fast tokenizer (a tokenizer.json in its folder)."
        )
    coded = model.tokenizer([_with(r, 0) for r in shown], return_offsets_mapping=True, add_special_tokens=special)
    most = getattr(model.network.config, "max_position_embeddings", None)
    endings: dict[Rendered, Line] = {}
    found = []
    for r, ids in zip(shown, coded["input_ids"]):
        end = _ending(r)
        if end is not None and end not in endings:
            endings[end] = _line(model.tokenizer, end, name, special)
        line = None if end is None else _joined(ids, endings[end])
        line = line or _line(model.tokenizer, r, name, special)
        if most is not None and line.slots[-1] + 1 > most:
            raise UserError(
                f"A prompt of {len(r.gaps)} questions has {line.slots[-1] + 1} tokens, and the model reads {most}. Ask "
                "fewer questions at once, or leave out long ones."
            )
        found.append(line)
    return found


def _with(shown: Rendered, variant: int) -> str:
    return shown.prompt + shown.target([variant % len(labels) for labels in shown.labels])


def _ending(shown: Rendered) -> Rendered | None:
    """Return a prompt's last line, the same in many prompts; None where questions stand between answers."""
    if any("\n" in gap for gap in shown.gaps):
        return None
    return replace(shown, prompt=shown.prompt[shown.prompt.rstrip().rfind("\n") + 1 :])


def _joined(ids: Sequence[int], end: Line) -> Line | None:
    """Place what was found in the last line at the end of the whole; None if that reads otherwise in the whole."""
    behind = len(end.ids) - max(0, end.slots[0] - 1)
    if tuple(ids[-behind:]) != end.ids[-behind:]:
        return None
    moved = len(ids) - len(end.ids)
    return Line(tuple(ids), tuple(slot + moved for slot in end.slots), end.labels)


def _line(tokenizer: Any, shown: Rendered, name: str, special: bool) -> Line:
    """Encode a text with every label in every place; nothing but the places may differ."""
    texts = [_with(shown, v) for v in range(max(map(len, shown.labels)))]
    coded = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=special)
    rows, spans = coded["input_ids"], coded["offset_mapping"][0]
    slots, at = [], len(shown.prompt)
    for gap, labels in zip(shown.gaps, shown.labels):
        at += len(gap)
        slots.append(next(i for i, (a, b) in enumerate(spans) if a <= at < b))
        at += len(labels[0])
    first = rows[0]
    for variant, row in enumerate(rows):
        same = len(row) == len(first) and all(a == b for i, (a, b) in enumerate(zip(row, first)) if i not in slots)
        if not same:
            raise _not_one_token(name, sorted({part[variant % len(part)] for part in shown.labels}))
    tokens = tuple(tuple(rows[n][slot] for n in range(len(labels))) for slot, labels in zip(slots, shown.labels))
    for part, labels in zip(tokens, shown.labels):
        if len(set(part)) < len(part):
            raise _not_one_token(name, labels)
    return Line(tuple(first), tuple(slots), tokens)


def _not_one_token(name: str, labels: Sequence[str]) -> UserError:
    return UserError(
        f"The template {name} cannot be scored with this tokenizer: there the answer {' or '.join(labels)} is not one "
        "token of its own. Try another template, e.g. numbered."
    )


def batches(model: Model, rows: Sequence[Line]) -> Iterator[list[int]]:
    """Cut rows of as many parts, sorted by length, into rectangles whose tokens are bounded."""
    budget = ROW_TOKENS * (1 if model.device.type == "cpu" else 16)
    chunk: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (_kind(model, rows[i]), len(rows[i].front))):
        full = chunk and (len(chunk) + 1) * len(rows[i].ids) > budget
        if full or (chunk and _kind(model, rows[chunk[0]]) != _kind(model, rows[i])):
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def _kind(model: Model, row: Line) -> tuple[int, ...]:
    """Return what rows of one batch have in common.

    A row whose gap is shorter gets holes in the middle. A window over the last columns would count them, so that in a
    model with one only rows with the same gaps run together.
    """
    window = getattr(model.network.config, "sliding_window", None)
    n = len(row.slots)
    if window is None or len(row.ids) <= window:
        return (n,)
    return (n, *(len(row.gap(part)) for part in range(n - 1)), len(row.front))


class _Stop(Exception):
    """Ends a pass after the last block; never leaves this module."""


class Reading:
    """Rows that a decoder has read, to be gone on with."""

    def __init__(self, model: Model, side: Literal["left", "right"] = "left") -> None:
        self.model = model
        self.side = side
        self.cache = DynamicCache()
        self.mask: Tensor | None = None

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[int]], last: int = 1) -> Tensor:
        """Read on, and return the log probabilities behind the last tokens of each row.

        Args:
            rows: What each row goes on with.
            last: How many of each row's last tokens are looked behind.

        Shapes:
            (rows, last, vocabulary), float32.
        """
        batch = self.model.batch([tuple(row) for row in rows], side=self.side)
        before = (
            torch.zeros(len(rows), 0, dtype=torch.long, device=batch.mask.device) if self.mask is None else self.mask
        )
        self.mask = torch.cat([before, batch.mask], dim=1)
        inputs = self.model.inputs(batch) | {"attention_mask": self.mask}
        inputs["position_ids"] = batch.positions + before.sum(1, keepdim=True)
        states = self._states(inputs)
        end = batch.first + batch.mask.sum(1)
        columns = end[:, None] + torch.arange(-last, 0, device=end.device)
        found = states[torch.arange(len(rows), device=end.device)[:, None], columns]
        return self.model.logits(found).float().log_softmax(-1)

    def _states(self, inputs: dict[str, Tensor]) -> Tensor:
        seen: list[Tensor] = []

        def stop(tensor: Tensor) -> None:
            seen.append(tensor)
            raise _Stop

        network: Any = self.model.network
        with Trace(self.model) as trace, suppress(_Stop):
            trace.watch(f"blocks.{self.model.anatomy.n_blocks - 1}", stop)
            network(**inputs, past_key_values=self.cache, use_cache=True)
        return seen[0]

    def repeated(self, n: int) -> Reading:
        """Return `n` copies of every row, to be gone on with in different ways."""
        found = copy.copy(self)
        found.cache = copy.deepcopy(self.cache)
        found.cache.batch_repeat_interleave(n)
        found.mask = None if self.mask is None else self.mask.repeat_interleave(n, dim=0)
        return found
