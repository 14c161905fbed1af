"""Left contexts: short texts before the prompt, so that a key stands for more than the bare sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from ..model import Model

__all__ = ["Context", "Contexts", "chat_header", "contexts_for", "sample"]

Contexts = Literal["plain", "memit", "rome", "instruction", "both"] | tuple[str, ...]

_STARTERS = ("The", "Therefore", "Because", "I", "You")
_ASKING = ("Answer the question: ", "User: ", "Complete the sentence: ", "Question: ")


@dataclass(frozen=True)
class Context:
    """A text that goes before the prompt, and its weight in the mean key."""

    text: str
    weight: float


def contexts_for(model: Model, kind: Contexts, seed: int) -> list[Context]:
    """Draw the contexts of a kind; the first one is always the bare prompt.

    Source:
        memit: six rows, 1/2 for the bare prompt and 1/10 for each of five texts of ten tokens (kmeng01/memit). rome: 21
        rows, ten texts of five tokens and ten of ten, equal weights (kmeng01/rome). instruction: the bare prompt, four
        ways of asking and the tokenizer's chat header, equal weights; both: half memit, half instruction (ours).

    Args:
        model: Writes the texts itself, by sampling.
        kind: ``plain``, ``memit``, ``rome``, ``instruction``, ``both``, or texts of your own.
        seed: Same seed, same texts.
    """
    if kind == "plain":
        return [Context("", 1.0)]
    if kind == "memit":
        drawn = _drawn(model, _STARTERS, 10, seed)
        return [Context("", 0.5), *(Context(f"{t}. ", 0.5 / len(drawn)) for t in drawn)]
    if kind == "rome":
        end = model.tokenizer.eos_token or model.tokenizer.bos_token or "\n"
        drawn = [*_drawn(model, (end,) * 10, 5, seed), *_drawn(model, (end,) * 10, 10, seed + 1)]
        return [Context("", 1 / 21), *(Context(f"{t}. ", 1 / 21) for t in drawn)]
    if kind == "instruction":
        texts = ["", *_ASKING, *filter(None, [chat_header(model)])]
        return [Context(t, 1 / len(texts)) for t in texts]
    if kind == "both":
        halves = contexts_for(model, "memit", seed) + contexts_for(model, "instruction", seed)[1:]
        return [Context(c.text, c.weight / 2 if i < 6 else 0.5 / (len(halves) - 6)) for i, c in enumerate(halves)]
    own = [t if not t or t[-1].isspace() else f"{t} " for t in kind]
    return [Context(t, 1 / len(own)) for t in own]


_DRAWN: WeakKeyDictionary[Model, dict[tuple[Any, ...], list[str]]] = WeakKeyDictionary()


def _drawn(model: Model, starters: tuple[str, ...], n_tokens: int, seed: int) -> list[str]:
    """Sample once for each model: a sequence of edits asks for the same texts a thousand times."""
    known = _DRAWN.setdefault(model, {})
    key = (starters, n_tokens, seed)
    if key not in known:
        known[key] = sample(model, starters, n_tokens, seed)
    return known[key]


def chat_header(model: Model) -> str:
    """Return what the tokenizer's chat template puts before a user's words; empty without a template."""
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return ""
    mark = "retouch-user-message"
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False))
    header = text.partition(mark)[0] if mark in text else ""
    return header.removeprefix(tokenizer.bos_token or "")  # the tokenizer adds its own


@torch.no_grad()
def sample(model: Model, starters: Sequence[str], n_tokens: int, seed: int, top_k: int = 5) -> list[str]:
    """Continue each starter to `n_tokens` tokens in all, sampled among the `top_k` likeliest.

    Returns:
        Texts without braces and line breaks.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [tuple(ids) for ids in model.tokenizer(list(starters))["input_ids"]]
    first = model.tokenizer.bos_token_id
    rows = [r[:1] if len(r) == 2 and r[0] == first and r[1] in model.tokenizer.all_special_ids else r for r in rows]
    skip = set(model.tokenizer.all_special_ids)
    special = [i for i in sorted(skip) if i < model.anatomy.vocab_size]
    while any(len(r) < n_tokens for r in rows):
        batch = model.batch(rows, side="left")
        logits = model.network(**model.inputs(batch)).logits[:, -1].float().cpu()
        logits[:, special] = -torch.inf
        best = logits.topk(min(top_k, logits.shape[1]))
        pick = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
        chosen = best.indices.gather(1, pick)[:, 0].tolist()
        rows = [r if len(r) >= n_tokens else (*r, t) for r, t in zip(rows, chosen)]
    return [_clean(model.tokenizer, r) for r in rows]


def _clean(tokenizer: Any, row: Sequence[int]) -> str:
    text = tokenizer.decode(list(row), skip_special_tokens=True)
    return " ".join(text.replace("{", " ").replace("}", " ").split())
