"""Where the subject, the prompt's end and the target stand among a text's tokens, and how rows are padded.

Every method, metric and diagnostic asks here. Text is joined first and tokenised once, whole, with offsets: nothing is
ever tokenised alone and glued, so a merge at a seam is seen and reported instead of shifting a position by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ._texts import broken
from .errors import FactError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Batch", "Bos", "Row", "Text", "broken", "encode", "pad"]

Bos = Literal["tokenizer", "always", "never"]


@dataclass(frozen=True)
class Text:
    """The pieces of one row of text: ``context + before + subject + after + target``.

    The target gets one leading space unless it begins with white space; white space at the prompt's end is dropped.
    """

    before: str
    subject: str = ""
    after: str = ""
    target: str = ""
    context: str = ""


@dataclass(frozen=True)
class Row:
    """One text as tokens.

    Attributes:
        ids: Token ids, with the special tokens that the tokenizer puts in front.
        subject: Index of the subject's last token; None when the text has no subject.
        prompt: Index of the prompt's last token; the target begins right after it.
        merged: A token straddles the subject's end or the prompt's end, so its key depends on what follows.
    """

    ids: tuple[int, ...]
    subject: int | None
    prompt: int
    merged: bool = False

    @property
    def target(self) -> tuple[int, ...]:
        """The target's token ids; empty when there is none."""
        return self.ids[self.prompt + 1 :]

    @property
    def seen(self) -> tuple[int, ...]:
        """All ids but the last one of a target: what a model must read to predict the target."""
        return self.ids[:-1] if self.target else self.ids


def encode(tokenizer: Any, texts: Sequence[Text], bos: Bos = "tokenizer") -> list[Row]:
    """Tokenise texts and find their positions by character offsets.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        texts: The rows.
        bos: Whether a beginning-of-text token goes in front: as the tokenizer does, always, or never.

    Returns:
        One row a text, in order.

    Raises:
        ModelError: The tokenizer has no offsets, or no beginning-of-text token where one is asked for.
        FactError: A text is empty, or holds half of a character.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"The tokenizer {type(tokenizer).__name__} gives no character offsets, so positions cannot be found. "
            "Open the model with a fast tokenizer (a tokenizer.json in its folder)."
        )
    if not texts:
        return []
    prompts = [(t.context + t.before + t.subject + t.after).rstrip() for t in texts]
    targets = [t.target if not t.target or t.target[0].isspace() else f" {t.target}" for t in texts]
    whole = [p + t for p, t in zip(prompts, targets)]
    if halves := [text for text in whole if broken(text)]:
        raise FactError(f"The text {halves[0]!r:.80} holds half of a character (a lone surrogate). Correct it.")
    coded = tokenizer(
        whole,
        return_offsets_mapping=True,
        add_special_tokens=bos != "never",
    )
    front = _bos_id(tokenizer) if bos == "always" else None
    return [
        _row(text, prompt, target, list(ids), [tuple(s) for s in spans], front)
        for text, prompt, target, ids, spans in zip(
            texts, prompts, targets, coded["input_ids"], coded["offset_mapping"]
        )
    ]


def _bos_id(tokenizer: Any) -> int:
    if tokenizer.bos_token_id is None:
        raise ModelError("bos='always' was asked for, but the tokenizer has no beginning-of-text token.")
    return int(tokenizer.bos_token_id)


def _row(text: Text, prompt: str, target: str, ids: list[int], spans: list[tuple[int, int]], front: int | None) -> Row:
    while spans and spans[-1][0] == spans[-1][1]:  # an end-of-text token would stand between prompt and target
        ids.pop()
        spans.pop()
    if not spans:
        raise FactError(f"The text {prompt + target!r} has no tokens.")
    if front is not None and ids[0] != front:
        ids.insert(0, front)
        spans.insert(0, (0, 0))
    merged = False
    subject = None
    if text.subject:
        end = len(text.context) + len(text.before) + len(text.subject.rstrip())
        subject = _holding(spans, end - 1, last=True)
        merged = spans[subject][1] > end and end < len(prompt)
    last = len(ids) - 1
    if target.strip():
        first = len(prompt) + len(target) - len(target.lstrip())
        begin = _holding(spans, first, last=False)
        merged = merged or spans[begin][0] < len(prompt)
        last = begin - 1
    if last < 0:
        raise FactError(f"The prompt {prompt!r} has no token before its target {target!r}.")
    return Row(tuple(ids), subject, last, merged)


def _holding(spans: list[tuple[int, int]], character: int, *, last: bool) -> int:
    """Find the token whose span holds a character; several byte tokens of one character may share its span."""
    found = [i for i, (a, b) in enumerate(spans) if a <= character < b]
    if not found:  # the tokenizer dropped this character (white space, control): the nearest token before it
        found = [i for i, (a, b) in enumerate(spans) if a < b <= character] or [0]
        return found[-1]
    return found[-1] if last else found[0]


@dataclass(frozen=True)
class Batch:
    """Rows as rectangles.

    Shapes:
        ids, mask, positions: (rows, columns).
        first: (rows,), the column of each row's first token.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    first: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.ids.shape[0], self.ids.shape[1]


def pad(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    *,
    side: Literal["right", "left"] = "right",
    anchors: Sequence[int] | None = None,
    spare: int = 0,
) -> Batch:
    """Lay token rows into one rectangle.

    Args:
        rows: Token ids of each row.
        pad_id: What fills the rest; masked.
        side: Where the filling goes.
        anchors: One index a row: the rows are shifted so that these tokens share one column. Overrides `side`.
        spare: Columns of padding in front of all rows, with `anchors`.

    Returns:
        The batch; position ids count the row's own tokens from 0, so padding never shifts them.
    """
    import torch

    longest = max(map(len, rows))
    if anchors is not None:
        first = [spare + max(anchors) - a for a in anchors]
        longest = max(f + len(r) for f, r in zip(first, rows))
    else:
        first = [longest - len(r) if side == "left" else 0 for r in rows]
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (start, row) in enumerate(zip(first, rows)):
        ids[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, start : start + len(row)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch(ids, mask, positions, torch.tensor(first))
