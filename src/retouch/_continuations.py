"""What a model writes after a prompt: greedily or sampled, many prompts at once, under one change or many."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ._positions import refuse_longer
from .errors import ModelError, UserError
from .lanes import Owners
from .model import Model
from .tokens import broken

__all__ = ["continuations"]

CACHE_MIB = 1024
"""Keys and values of one batch of continuations on the CPU; sixteen times as many on an accelerator."""


Prompts = Sequence[str] | Sequence[tuple[int, ...]] | Sequence[str | tuple[int, ...]]


@torch.no_grad()
def continuations(
    model: Model,
    prompts: Prompts,
    n_tokens: int | Sequence[int],
    *,
    total: bool = False,
    top_k: int = 1,
    seed: int = 0,
    stop: Sequence[int] = (),
    owners: Owners | None = None,
) -> list[str]:
    """Continue prompts, greedily or sampled.

    Args:
        model: A decoder.
        prompts: Texts, or token ids that already hold every special token (a chat's turns).
        n_tokens: New tokens of all or of each; with `total`, tokens of prompt and continuation together.
        total: See `n_tokens`.
        top_k: 1 is greedy; else sample among so many.
        seed: Of the sampling; the global generator is left alone. Draws are made for a batch as a whole, so a text
            depends on the texts beside it.
        stop: Tokens that end a text, besides the model's own.
        owners: The change that each prompt carries, where several run side by side.

    Returns:
        The new text of each prompt, without the prompt.

    Raises:
        UserError: A prompt has no token to go on from, or `n_tokens` is below 1.
        ModelError: The model predicts no next token.
    """
    if model.anatomy.kind != "decoder" or not model.anatomy.has_head:
        raise ModelError(
            f"{model.source} is a {model.anatomy.family} {model.anatomy.kind} without a next token to predict, so it "
            "continues no text. Open a decoder with its head, e.g. smollm2."
        )
    each = [n_tokens] * len(prompts) if isinstance(n_tokens, int) else list(n_tokens)
    if min(each, default=1) < 1:
        raise UserError(f"n_tokens must be at least 1; got {min(each)}.")
    rows = _prompt_rows(model, prompts)
    found: dict[int, str] = {}
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
        for part in _batches(model, rows, max(each, default=1), total):
            torch.manual_seed(seed)
            carried = owners.rows(part) if owners else nullcontext()
            with carried:
                new = _decode(model, [rows[i] for i in part], max(each[i] for i in part), total, top_k, stop)
            cut = [ids[: len(ids) if total else each[i]] for i, ids in zip(part, new)]
            found |= dict(zip(part, model.tokenizer.batch_decode(cut, skip_special_tokens=True)))
    return [found[i] for i in range(len(rows))]


def _prompt_rows(model: Model, prompts: Prompts) -> list[tuple[int, ...]]:
    texts = [p.rstrip() for p in prompts if isinstance(p, str)]
    if halves := [text for text in texts if broken(text)]:
        raise UserError(f"The text {halves[0]!r:.80} holds half of a character (a lone surrogate). Correct it.")
    coded = iter(model.tokenizer(texts)["input_ids"] if texts else [])
    rows = [tuple(next(coded)) if isinstance(p, str) else tuple(p) for p in prompts]
    if not all(rows):
        raise UserError("An empty text cannot be continued: this model needs at least one token. Give it some words.")
    return rows


def _batches(model: Model, rows: Sequence[tuple[int, ...]], new: int, total: bool) -> Iterator[list[int]]:
    """Cut prompts, sorted by length, into batches whose keys and values are bounded; one batch keeps its order."""
    config: Any = model.network.config
    heads = getattr(config, "num_key_value_heads", None) or model.anatomy.heads
    width = getattr(config, "head_dim", None) or model.anatomy.d_model // model.anatomy.heads
    budget = CACHE_MIB * 2**20 * (1 if model.device.type == "cpu" else 16)
    per_token = 8 * model.anatomy.n_blocks * heads * width
    part: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        columns = max(len(rows[i]) + 1, new) if total else len(rows[i]) + new
        if part and (len(part) + 1) * columns * per_token > budget:
            yield sorted(part)
            part = []
        part.append(i)
    if part:
        yield sorted(part)


def _decode(
    model: Model, rows: list[tuple[int, ...]], n_tokens: int, total: bool, top_k: int, stop: Sequence[int]
) -> list[list[int]]:
    from transformers import GenerationConfig

    batch = model.batch(rows, side="left")
    ends = {model.tokenizer.eos_token_id, *stop} - {None}
    n_new = max(1, n_tokens - batch.shape[1]) if total else n_tokens
    refuse_longer(batch.shape[1] + n_new - 1, model.longest, model.source)  # the last one is never read
    config = GenerationConfig(
        max_new_tokens=n_new,
        do_sample=top_k > 1,
        top_k=top_k if top_k > 1 else None,
        pad_token_id=model.pad_id,
        eos_token_id=sorted(ends) or None,
    )
    network: Any = copy.copy(model.network)  # one whose own wishes (a repetition penalty, a temperature) are gone
    network.generation_config = GenerationConfig()
    ids = network.generate(input_ids=batch.ids, attention_mask=batch.mask, generation_config=config)
    new: list[list[int]] = ids[:, batch.shape[1] :].tolist()
    return [_ended(row, ends) for row in new]


def _ended(ids: list[int], ends: set[int]) -> list[int]:
    """Cut a text at its end: what follows in a batch is filling."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
