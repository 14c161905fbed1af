"""What any verb measures: likelihoods, generation, perplexity, sizes, FLOPs, seconds, memory.

Nothing here knows a method. Rows are padded on the right and positions count a row's own tokens, so neither padding nor
the company of other rows changes a number.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import ModelError, UserError
from .model import Model
from .tokens import Bos, Row, Text, encode
from .trace import Trace

__all__ = [
    "Answer",
    "Cost",
    "answers",
    "chunk_nll",
    "continuations",
    "flops_per_token",
    "n_parameters",
    "next_logp",
    "ngram_entropy",
    "perplexity",
    "watched",
]

T = TypeVar("T")
ROW_TOKENS = 1024
"""Tokens of one batch: large enough for full speed, small enough for any memory."""


@dataclass(frozen=True)
class Answer:
    """How a model takes a target after a prompt, teacher-forced.

    Attributes:
        nll: Mean over the target's tokens of -log P, nats.
        worst: The largest of them.
        exact: Share of the target's tokens that are the likeliest.
    """

    nll: float
    worst: float
    exact: float

    @property
    def strict(self) -> bool:
        """Whether every token of the target is the likeliest."""
        return self.exact == 1.0


def answers(model: Model, texts: Sequence[Text], bos: Bos = "tokenizer") -> list[Answer]:
    """Score the target of each text.

    Rows that read the same tokens (one prompt, several one-token targets) run once.

    Shapes:
        Costs the distinct tokens x `flops_per_token`.
    """
    rows = encode(model.tokenizer, texts, bos)
    found: dict[int, Answer] = {}
    for keys, logp in _read(model, rows, lambda row: range(row.prompt, row.prompt + len(row.target))):
        best = logp.argmax(-1)
        for i, span in keys:
            wanted = torch.tensor(rows[i].target, device=logp.device)
            said = logp[span, :].gather(1, wanted[:, None])[:, 0]
            exact = float((best[span] == wanted).float().mean())
            found[i] = Answer(float(-said.mean()), float(-said.min()), exact)
    return [found[i] for i in range(len(rows))]


def next_logp(model: Model, texts: Sequence[Text], bos: Bos = "tokenizer") -> Tensor:
    """Return log P of the next token after each prompt.

    Shapes:
        (texts, vocabulary), float32 on the CPU.
    """
    rows = encode(model.tokenizer, texts, bos)
    out = torch.empty(len(rows), model.anatomy.vocab_size)
    for keys, logp in _read(model, rows, lambda row: range(row.prompt, row.prompt + 1)):
        for i, span in keys:
            out[i] = logp[span][0].cpu()
    return out


@torch.no_grad()
def _read(
    model: Model, rows: Sequence[Row], where: Callable[[Row], range]
) -> Iterator[tuple[list[tuple[int, slice]], Tensor]]:
    """Run distinct rows in batches of like length; yield log probabilities where they are wanted."""
    users: dict[tuple[tuple[int, ...], range], list[int]] = {}
    for i, row in enumerate(rows):
        places = where(row)
        users.setdefault((row.ids[: places.stop], places), []).append(i)
    ordered = sorted(users, key=lambda key: len(key[0]))
    for chunk in _chunks(ordered, lambda key: len(key[0])):
        batch = model.batch([ids for ids, _ in chunk])
        with Trace(model) as trace:
            states = trace.states(batch)
        row_at = torch.tensor([r for r, (_, places) in enumerate(chunk) for _ in places])
        column = torch.tensor([p for _, places in chunk for p in places])
        logp = model.logits(states[row_at, column]).float().log_softmax(-1)
        keys, start = [], 0
        for key in chunk:
            span = slice(start, start + len(key[1]))
            keys += [(i, span) for i in users[key]]
            start = span.stop
        yield keys, logp


def _chunks(items: Sequence[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut items, sorted by length, into rectangles of at most `ROW_TOKENS`."""
    chunk: list[T] = []
    for item in items:
        if chunk and (len(chunk) + 1) * length(item) > ROW_TOKENS:
            yield chunk
            chunk = []
        chunk.append(item)
    if chunk:
        yield chunk


@torch.no_grad()
def continuations(
    model: Model, prompts: Sequence[str], n_tokens: int, *, total: bool = False, top_k: int = 1, seed: int = 0
) -> list[str]:
    """Continue prompts, greedily or sampled.

    Args:
        model: A decoder.
        prompts: Texts.
        n_tokens: New tokens of each; with `total`, tokens of prompt and continuation together.
        total: See `n_tokens`.
        top_k: 1 is greedy; else sample among so many.
        seed: Of the sampling; the global generator is left alone.

    Returns:
        The new text of each prompt, without the prompt.

    Raises:
        UserError: A prompt has no token to go on from, or `n_tokens` is below 1.
        ModelError: The model predicts no next token.
    """
    from transformers import GenerationConfig

    if model.anatomy.kind != "decoder" or not model.anatomy.has_head:
        raise ModelError(
            f"{model.source} is a {model.anatomy.family} {model.anatomy.kind} without a next token to predict, so it "
            "continues no text. Open a decoder with its head, e.g. smollm2."
        )
    if n_tokens < 1:
        raise UserError(f"n_tokens must be at least 1; got {n_tokens}.")
    if not prompts:
        return []
    rows = [tuple(ids) for ids in model.tokenizer([p.rstrip() for p in prompts])["input_ids"]]
    if not all(rows):
        raise UserError("An empty text cannot be continued: this model needs at least one token. Give it some words.")
    batch = model.batch(rows, side="left")
    new = max(1, n_tokens - batch.shape[1]) if total else n_tokens
    config = GenerationConfig(
        max_new_tokens=new,
        do_sample=top_k > 1,
        top_k=top_k if top_k > 1 else None,
        pad_token_id=model.pad_id,
        eos_token_id=model.tokenizer.eos_token_id,
    )
    network: Any = copy.copy(model.network)  # one whose own wishes (a repetition penalty, a temperature) are gone
    network.generation_config = GenerationConfig()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = network.generate(input_ids=batch.ids, attention_mask=batch.mask, generation_config=config)
    return list(model.tokenizer.batch_decode(ids[:, batch.shape[1] :], skip_special_tokens=True))


def chunk_nll(model: Model, text: str, n_tokens: int = 2048, chunk: int = 32) -> Tensor:
    """Score a text in consecutive chunks.

    Shapes:
        (chunks,): mean -log P of each chunk's tokens but the first, nats.
    """
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][:n_tokens]
    rows = [tuple(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    rows = [r for r in rows if len(r) > 1]
    found = torch.zeros(len(rows))
    with torch.no_grad():
        for start in range(0, len(rows), per := max(1, ROW_TOKENS // chunk)):
            part = rows[start : start + per]
            batch = model.batch(part)
            with Trace(model) as trace:
                logp = model.logits(trace.states(batch)[:, :-1]).float().log_softmax(-1)
            said = logp.gather(2, batch.ids[:, 1:, None])[..., 0] * batch.mask[:, 1:]
            found[start : start + len(part)] = (-said.sum(1) / batch.mask[:, 1:].sum(1)).cpu()
    return found


def perplexity(model: Model, text: str, n_tokens: int = 2048, chunk: int = 128) -> float:
    """Return exp of the mean over a text's chunks of `chunk` tokens of their NLL."""
    return math.exp(float(chunk_nll(model, text, n_tokens, chunk).mean()))


def ngram_entropy(text: str) -> float:
    """Return the weighted mean of 2/3 of the bigrams' and 4/3 of the trigrams' entropy, in bits.

    Source:
        The fluency of kmeng01/rome: repetitive text scores low. Papers print it times 100.

    Example:
        >>> ngram_entropy("a b a b a b a b") < ngram_entropy("one two three four five six seven eight")
        True
    """
    words = text.split()
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n))))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def n_parameters(model: Model) -> int:
    """Count parameters; tied ones once."""
    return sum(p.numel() for p in model.network.parameters())


def flops_per_token(model: Model, first: int = 0, head: bool = True) -> float:
    """Count the multiply-adds of one token through the blocks from `first` on, two FLOPs each; attention scores are left out."""
    a = model.anatomy
    per_block = sum(p.numel() for p in model.module(f"blocks.{a.n_blocks - 1}").parameters() if p.dim() == 2)
    return 2.0 * ((a.n_blocks - first) * per_block + (a.vocab_size * a.d_embed if head else 0))


@dataclass
class Cost:
    """What a piece of work took; filled in when its ``with`` ends."""

    seconds: float = 0.0
    peak_mib: float = 0.0
    start_mib: float = field(default=0.0, repr=False)


@contextmanager
def watched() -> Iterator[Cost]:
    """Measure wall-clock seconds and the process's peak memory of the work inside the ``with``.

    On Linux the peak is that of this piece alone; elsewhere it is the process's peak so far.
    """
    cost = Cost(start_mib=_memory("VmRSS"))
    reset = _reset_peak()
    begin = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - begin
        cost.peak_mib = _memory("VmHWM") if reset else _lifetime_peak()


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _memory(field_name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field_name + ":")), 0.0)


def _lifetime_peak() -> float:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
