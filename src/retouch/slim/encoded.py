"""Examples as token ids, and batches of them: of similar length, padded on the right, the same for the same seed.

A batch's padding is what a small machine pays for nothing, so rows of similar length go together. Which rows do, and in
which order the batches come, depends only on the lengths, the seed and the epoch.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ModelError, UserError
from ..progress import track
from ..tokens import broken
from .data import Example

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Encoded", "batches", "collate", "encode", "endless", "order", "padded"]

AT_ONCE = 1024
"""Texts given to the tokenizer at once."""
POOL = 64
"""Batches' worth of rows that are sorted by length together: enough for little padding, few enough to mix."""


@dataclass(frozen=True)
class Encoded:
    """Examples as token ids.

    Attributes:
        ids: Token ids of each example, special ones included, not padded.
        types: Token types likewise; None when the network has none.
        labels: Classes (int), or numbers to predict (float).
        pad: The id that stands where nothing is.
        truncated: How many examples were cut.
    """

    ids: tuple[tuple[int, ...], ...]
    types: tuple[tuple[int, ...], ...] | None
    labels: tuple[int | float, ...]
    pad: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, rows: Sequence[int]) -> Encoded:
        """Return some of the examples, in the order of `rows`."""
        ids = tuple(self.ids[row] for row in rows)
        types = None if self.types is None else tuple(self.types[row] for row in rows)
        labels = tuple(self.labels[row] for row in rows)
        return Encoded(ids, types, labels, self.pad, self.truncated)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each example."""
        return tuple(map(len, self.ids))


def encode(
    tokenizer: Any, examples: Sequence[Example], max_tokens: int = 128, *, token_types: int | None = None
) -> Encoded:
    """Tokenise examples; too long ones are cut at the end, of pairs the longer text first.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        examples: Of a `Task`, so that labels are numbers.
        max_tokens: Tokens to keep at most, special ones included.
        token_types: How many token types the network has: 0 for none, 1 for all zero. If not given, whatever the
            tokenizer makes.

    Raises:
        ModelError: The tokenizer is not a fast one.
        UserError: `max_tokens` leaves no room for a text, a label is a text, an example has no tokens, or half of a character.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"The tokenizer {type(tokenizer).__name__} is not a fast one. Open the model with a tokenizer.json."
        )
    room = max_tokens - tokenizer.num_special_tokens_to_add(pair=any(e.pair is not None for e in examples))
    if room < 1:
        raise UserError(f"max_tokens={max_tokens} leaves no room for a text beside the special tokens.")
    for i, example in enumerate(examples):
        if broken(example.text + (example.pair or "")):
            raise UserError(
                f"Example {i} holds half of a character (a lone surrogate): {example.text!r:.60}. Correct it."
            )
    ids: list[tuple[int, ...]] = []
    types: list[tuple[int, ...]] = []
    truncated = 0
    for start in track(range(0, len(examples), AT_ONCE), "tokenise"):
        coded = _coded(tokenizer, examples[start : start + AT_ONCE], max_tokens)
        ids += [tuple(encoding.ids) for encoding in coded]
        types += [tuple(encoding.type_ids) for encoding in coded]
        truncated += sum(bool(encoding.overflowing) for encoding in coded)
    if empty := [i for i, row in enumerate(ids) if not row]:
        raise UserError(f"Example {empty[0]} has no tokens: {examples[empty[0]].text!r:.60}.")
    if token_types is None:
        token_types = 2 if "token_type_ids" in tokenizer.model_input_names else 0
    if token_types == 1:
        types = [(0,) * len(row) for row in types]
    pad = tokenizer.pad_token_id
    labels = tuple(map(_label, examples))
    return Encoded(tuple(ids), tuple(types) if token_types else None, labels, pad or 0, truncated)


def _coded(tokenizer: Any, examples: Sequence[Example], max_tokens: int) -> list[Any]:
    texts = [e.text for e in examples]
    pairs = None if examples[0].pair is None else [e.pair for e in examples]
    coded = tokenizer(texts, pairs, truncation="longest_first", max_length=max_tokens, padding=False)
    return list(coded.encodings)


def _label(example: Example) -> int | float:
    if isinstance(example.label, str):
        raise UserError(f"The label {example.label!r} is a text. Make a task of the examples first (make_task).")
    return example.label


# Batches


def order(
    encoded: Encoded,
    batch_size: int | None = None,
    n_tokens: int | None = None,
    seed: int | None = 0,
    epoch: int = 0,
    by_length: bool = True,
) -> list[list[int]]:
    """Decide which rows form a batch, and the batches' order. Every row stands in exactly one batch.

    Args:
        encoded: The examples.
        batch_size: Rows of a batch; the last one may have fewer.
        n_tokens: Instead of it, tokens of a batch at most, padding included; a longer row is a batch of its own.
        seed: Decides, with `epoch`, who goes with whom and in which order. None: no chance at all, the rows in their
            order or, by length, the shortest first.
        epoch: The pass over the data, from 0.
        by_length: Put rows of similar length together.

    Raises:
        UserError: Not exactly one of `batch_size` and `n_tokens` is given, or it is below 1.

    Example:
        >>> encoded = Encoded(((1,), (1, 2, 3), (1, 2)), None, (0, 1, 0))
        >>> order(encoded, batch_size=2, seed=None)
        [[0, 2], [1]]
        >>> order(encoded, n_tokens=3, seed=None)
        [[0], [2], [1]]
    """
    if (batch_size is None) == (n_tokens is None):
        raise UserError("Give a batch's size either as batch_size or as n_tokens.")
    size = batch_size if n_tokens is None else n_tokens
    if size is None or size < 1:
        raise UserError(f"{'batch_size' if n_tokens is None else 'n_tokens'} must be at least 1; got {size}.")
    rows = list(range(len(encoded)))
    lengths = encoded.lengths
    if seed is None:
        rows = sorted(rows, key=lambda row: (lengths[row], row)) if by_length else rows
        return list(_cut(rows, lengths, batch_size, n_tokens))
    chance = random.Random(f"{seed} {epoch} batches")
    chance.shuffle(rows)
    if not by_length:
        return list(_cut(rows, lengths, batch_size, n_tokens))
    mean = sum(lengths) / max(len(lengths), 1)
    pool = POOL * (batch_size or max(1, int((n_tokens or 1) / max(mean, 1))))
    found = [
        batch
        for start in range(0, len(rows), pool)
        for batch in _cut(sorted(rows[start : start + pool], key=lambda r: lengths[r]), lengths, batch_size, n_tokens)
    ]
    chance.shuffle(found)
    return found


def endless(encoded: Encoded, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield the batches of `order`, pass after pass, without end: what a stage trains on, from its first step."""
    for epoch in itertools.count():
        yield from order(encoded, batch_size, seed=seed, epoch=epoch)


def _cut(
    rows: Sequence[int], lengths: Sequence[int], batch_size: int | None, n_tokens: int | None
) -> Iterator[list[int]]:
    batch: list[int] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        full = len(batch) == batch_size if n_tokens is None else (len(batch) + 1) * longest > n_tokens
        if batch and full:
            yield batch
            batch, longest = [], lengths[row]
        batch.append(row)
    if batch:
        yield batch


def padded(encoded: Encoded, rows: Sequence[int]) -> int:
    """Count the tokens of a batch, padding included.

    Example:
        >>> padded(Encoded(((1,), (1, 2, 3)), None, (0, 1)), [0, 1])
        6
    """
    return len(rows) * max(len(encoded.ids[row]) for row in rows)


def collate(encoded: Encoded, rows: Sequence[int]) -> dict[str, Tensor]:
    """Make one batch of rows, padded on the right to its longest.

    Returns:
        ``input_ids``, ``attention_mask`` (0 and 1) and, when there are types, ``token_type_ids``, of shape
        [batch, tokens]; ``labels`` of shape [batch], int64 for classes and float32 for numbers.
    """
    rest = [max(len(encoded.ids[row]) for row in rows) - len(encoded.ids[row]) for row in rows]

    def block(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*values[row], *[fill] * more] for row, more in zip(rows, rest)])

    batch = {
        "input_ids": block(encoded.ids, encoded.pad),
        "attention_mask": torch.tensor([[1] * len(encoded.ids[row]) + [0] * more for row, more in zip(rows, rest)]),
    }
    if encoded.types is not None:
        batch["token_type_ids"] = block(encoded.types, 0)
    return batch | {"labels": torch.tensor([encoded.labels[row] for row in rows])}


def batches(
    encoded: Encoded,
    batch_size: int | None = None,
    n_tokens: int | None = None,
    seed: int | None = 0,
    epoch: int = 0,
    by_length: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of one pass: `collate` over `order`, whose arguments these are."""
    for rows in order(encoded, batch_size, n_tokens, seed, epoch, by_length):
        yield collate(encoded, rows)
