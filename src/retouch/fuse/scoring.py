"""What a model answers to prompts of several questions: forced into the format, over all tuples, or freely written.

Everything that is given is read, and only the answers are chosen, so that a model is never marked down for a comma.
Padding changes nothing, on either side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Literal

from .. import _continuations
from ..errors import ModelError, UserError, unknown
from ..model import Model
from ..progress import track
from ._decoding import Line, Reading, batches, lines
from .base import Question
from .compose import Answers, Instance
from .templates import Rendered, Template, render, template

__all__ = ["Answers", "How", "answer", "chatted", "parse"]

How = Literal["constrained", "joint", "free"]
MOST_TUPLES = 256
SPARE = 6
"""Tokens that free text may go on for behind the answers, so that it is seen whether it ends there."""
COPIED = 8192
"""Tokens of copies of one prompt that are held at once on the CPU; sixteen times as many on an accelerator."""


def answer(
    model: Model,
    instances: Sequence[Instance],
    how: How = "constrained",
    *,
    wording: str | Template = "plain",
    shots: Sequence[Sequence[Question]] = (),
    chat: bool = False,
    side: Literal["left", "right"] = "left",
) -> Answers:
    """Ask a model.

    Source: composed multiple choice is reconstructed from the abstract of arXiv 2605.23913.

    Args:
        model: A decoder.
        instances: What to ask.
        how: ``constrained``: what stands between answers is given, each answer is the likeliest label given those
            before. ``joint``: the likeliest of all tuples of labels, at most 256. ``free``: the model writes, and a
            text that is not exactly in the format counts as no answer.
        wording: The template or its name.
        shots: Answered examples in front, where the template has them.
        chat: Lay the prompt into the tokenizer's chat template, once, as the user's turn.
        side: Where rows are padded; it changes nothing.

    Shapes:
        Costs the prompts' tokens x `flops_per_token`, and two or three tokens for each further part.

    Raises:
        UserError: A label is not one token with this tokenizer, a prompt is too long, there are too many tuples, or
            the template does not suit.
        ModelError: The model predicts no next token, or has no chat template.
    """
    if model.anatomy.kind != "decoder" or not model.anatomy.has_head:
        raise ModelError(f"{model.source} predicts no next token, so it cannot be asked. Open a decoder with its head.")
    if how not in ("constrained", "joint", "free"):
        raise unknown("way of asking", how, ("constrained", "joint", "free"))
    words = template(wording)
    if words.asks == "each" and (chat or how == "free"):
        raise UserError(
            f"The template {words.name} asks after every question; it is for constrained or joint, no chat."
        )
    shown = [render(i.parts, words, shots) for i in instances]
    if chat:
        shown = [chatted(model.tokenizer, r) for r in shown]
    rows = lines(model, shown, words.name, special=not chat)
    ask = {"constrained": _constrained, "joint": _joint}.get(how)
    if ask is None:
        return Answers(tuple(instances), tuple(_free(model, shown, rows, chat)), how)
    found = ask(model, rows, side)
    return Answers(tuple(instances), tuple(c for c, _ in found), how, tuple(s for _, s in found))


def chatted(tokenizer: Any, shown: Rendered) -> Rendered:
    """Lay a prompt into a chat template as the user's turn, so that the answer begins the model's.

    Raises:
        ModelError: The tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("The tokenizer has no chat template; ask without chat.")
    turns = [{"role": "user", "content": shown.prompt}]
    prompt = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    first = shown.gaps[0].lstrip() if prompt[-1:].isspace() else shown.gaps[0]
    return replace(shown, prompt=prompt, gaps=(first, *shown.gaps[1:]))


_Found = tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]
"""The options chosen, and the log probabilities of all."""


def _constrained(model: Model, rows: Sequence[Line], side: Literal["left", "right"]) -> list[_Found]:
    found: dict[int, _Found] = {}
    for chunk in track(list(batches(model, rows)), "Asking"):
        found |= dict(zip(chunk, _chosen(model, [rows[i] for i in chunk], side)))
    return [found[i] for i in range(len(rows))]


def _chosen(model: Model, rows: Sequence[Line], side: Literal["left", "right"]) -> list[_Found]:
    reading = Reading(model, side)
    fed = [row.front for row in rows]
    chosen: list[list[int]] = [[] for _ in rows]
    scores: list[list[tuple[float, ...]]] = [[] for _ in rows]
    for part in range(len(rows[0].slots)):
        logp = reading.read(fed)[:, -1].cpu()
        for i, row in enumerate(rows):
            options = logp[i, list(row.labels[part])]
            chosen[i].append(int(options.argmax()))
            scores[i].append(tuple(options.tolist()))
        if part + 1 < len(rows[0].slots):
            fed = [(row.labels[part][chosen[i][part]], *row.gap(part)) for i, row in enumerate(rows)]
    return [(tuple(c), tuple(s)) for c, s in zip(chosen, scores)]


def _joint(model: Model, rows: Sequence[Line], side: Literal["left", "right"]) -> list[_Found]:
    for row in rows:
        if (n := math.prod(map(len, row.labels))) > MOST_TUPLES:
            raise UserError(f"joint looks at no more than {MOST_TUPLES} tuples of answers; here there are {n}.")
    return [_likeliest(model, row, side) for row in track(rows, "Asking")]


def _likeliest(model: Model, row: Line, side: Literal["left", "right"]) -> _Found:
    """Read the prompt once, and all but the last answers of every tuple behind it."""
    reading = Reading(model, side)
    first = reading.read([row.front])[0, -1].cpu()
    heads = list(product(*(range(len(labels)) for labels in row.labels[:-1])))
    places = [slot - row.slots[0] - 1 for slot in row.slots[1:]]  # of the tokens before each further label
    n_fed = row.slots[-1] - row.slots[0]
    best: tuple[float, tuple[int, ...]] = (-math.inf, ())
    scores: tuple[tuple[float, ...], ...] = ()
    size = max(1, COPIED * (1 if model.device.type == "cpu" else 16) // len(row.ids))
    for start in range(0, len(heads), size):
        group = heads[start : start + size]
        behind = None
        if n_fed:
            fed = [_spelt(row, head) for head in group]
            behind = reading.repeated(len(group)).read(fed, last=n_fed)[:, places].cpu()
        for g, head in enumerate(group):
            at = [first, *([] if behind is None else behind[g])]
            parts = [tuple(logp[list(labels)].tolist()) for logp, labels in zip(at, row.labels)]
            last = max(range(len(parts[-1])), key=parts[-1].__getitem__)
            total = sum(part[i] for part, i in zip(parts, (*head, last)))
            if total > best[0]:
                best, scores = (total, (*head, last)), tuple(parts)
    return best[1], scores


def _spelt(row: Line, head: Sequence[int]) -> list[int]:
    """Return the tokens from the first label up to right before the last one."""
    return [token for part, i in enumerate(head) for token in (row.labels[part][i], *row.gap(part))]


def _free(model: Model, shown: Sequence[Rendered], rows: Sequence[Line], chat: bool) -> list[tuple[int, ...]]:
    new = [row.slots[-1] - row.slots[0] + 1 + SPARE for row in rows]
    prompts: list[str | tuple[int, ...]] = [r.prompt for r in shown]
    if chat:
        prompts = [tuple(model.tokenizer(r.prompt, add_special_tokens=False)["input_ids"]) for r in shown]
    texts = _continuations.continuations(model, prompts, new) if prompts else []
    return [parse(text, r) or (-1,) * len(r.gaps) for text, r in zip(texts, shown)]


def parse(text: str, shown: Rendered) -> tuple[int, ...] | None:
    """Read answers from written text: exactly the format, then nothing more in that line.

    Returns:
        The options chosen, or None where the text is not in the format.

    Example:
        >>> shown = Rendered("Good?", (" ", ", "), (("A", "B"), ("A", "B")))
        >>> parse(" B, A", shown), parse(" B, A, A", shown), parse("The answer is B.", shown)
        ((1, 0), None, None)
    """
    pattern = r"\s*"
    for gap, labels in zip(shown.gaps, shown.labels):
        given = r"[ \t]*".join(re.escape(word) for word in gap.split())
        options = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
        pattern += rf"[ \t]*{given}[ \t]*({options})"
    match = re.match(pattern + r"[ \t]*\.?[ \t]*(?:\n|$)", text)
    return match and tuple(labels.index(label) for label, labels in zip(match.groups(), shown.labels))
