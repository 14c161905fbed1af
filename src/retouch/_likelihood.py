"""How likely a model finds texts: targets after prompts, next tokens, running text; under one change or many at once.

Rows are padded on the right and positions count a row's own tokens, so neither padding nor the company of other rows
changes a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .lanes import Owners
from .model import Model
from .tokens import Bos, Row, Text, encode
from .trace import Trace

__all__ = [
    "Answer",
    "Before",
    "Shift",
    "answers",
    "chunk_nll",
    "look",
    "next_logp",
    "perplexities",
    "perplexity",
]

ROW_TOKENS = 1024
"""Tokens of one batch on the CPU: large enough for full speed, small enough for any memory."""
DEVICE_TOKENS = 16 * ROW_TOKENS
"""The same on an accelerator, where small batches wait for launches."""
LOGITS = 2**25
"""Numbers of one batch's logits on the CPU, 128 MiB; sixteen times as many on an accelerator."""


@dataclass(frozen=True)
class Answer:
    """How a model takes a target after a prompt, teacher-forced.

    Attributes:
        nll: Mean over the target's tokens of -log P, nats.
        worst: The largest of them.
        exact: Share of the target's tokens that are the likeliest.
        first: The target's first token.
    """

    nll: float
    worst: float
    exact: float
    first: int = -1

    @property
    def strict(self) -> bool:
        """Whether every token of the target is the likeliest."""
        return self.exact == 1.0


@dataclass(frozen=True, eq=False)
class Before:
    """A prompt, and what a model said after it before it was changed.

    Attributes:
        text: The prompt.
        logp: log P of the next token before, (vocabulary,).
        token: A token whose likelihood is asked for now.
    """

    text: Text
    logp: Tensor
    token: int


@dataclass(frozen=True)
class Shift:
    """What became of the next token after a prompt.

    Attributes:
        same: The likeliest token is the one before.
        kl: KL(before, now), nats.
        nll: -log P of the token that was asked for, now.
    """

    same: bool
    kl: float
    nll: float


def answers(model: Model, texts: Sequence[Text], bos: Bos = "tokenizer", owners: Owners | None = None) -> list[Answer]:
    """Score the target of each text.

    Rows that read the same tokens (one prompt, several one-token targets) run once.

    Args:
        model: The model.
        texts: Prompts with targets.
        bos: Beginning-of-text rule.
        owners: The change that each text carries, where several run side by side.

    Shapes:
        Costs the distinct tokens x `flops_per_token`.
    """
    return look(model, texts, [], bos, owners)[0]


def look(
    model: Model, texts: Sequence[Text], prompts: Sequence[Before], bos: Bos = "tokenizer", owners: Owners | None = None
) -> tuple[list[Answer], list[Shift]]:
    """Score targets and compare next tokens with those before, in the same passes.

    A prompt that another row goes on from is read in that row's pass.

    Args:
        model: The model.
        texts: Prompts with targets.
        prompts: Prompts whose next token is compared.
        bos: Beginning-of-text rule.
        owners: The change that each text and then each prompt carries.
    """
    rows = encode(model.tokenizer, [*texts, *(p.text for p in prompts)], bos)
    n = len(texts)
    scored: dict[int, Answer] = {}
    shifts: dict[int, Shift] = {}
    for keys, logp in _read(model, rows, lambda i: _places(rows[i], i < n), owners):
        scored |= _scored(logp, rows, [key for key in keys if key[0] < n])
        shifts |= _shifted(logp, [(prompts[i - n], i - n, at[0]) for i, at in keys if i >= n])
    return [scored[i] for i in range(n)], [shifts[i] for i in range(len(prompts))]


def _places(row: Row, whole: bool) -> range:
    return range(row.prompt, row.prompt + (len(row.target) if whole else 1))


def _scored(logp: Tensor, rows: Sequence[Row], keys: Sequence[tuple[int, list[int]]]) -> dict[int, Answer]:
    """Score targets: all tokens of a batch leave the device together."""
    at = torch.tensor([place for _, places in keys for place in places], dtype=torch.long, device=logp.device)
    wanted = torch.tensor([t for i, _ in keys for t in rows[i].target], dtype=torch.long, device=logp.device)
    best = logp.argmax(-1)[at] == wanted
    said = torch.stack([-logp[at, wanted], best.float()]).cpu()
    found, start = {}, 0
    for i, places in keys:
        nll, exact = said[:, start : start + len(places)]
        found[i] = Answer(float(nll.mean()), float(nll.max()), float(exact.mean()), rows[i].target[0])
        start += len(places)
    return found


def _shifted(logp: Tensor, keys: Sequence[tuple[Before, int, int]]) -> dict[int, Shift]:
    if not keys:
        return {}
    now = logp[torch.tensor([place for *_, place in keys], device=logp.device)]
    before = torch.stack([p.logp for p, *_ in keys]).to(logp.device)
    kl = (before.exp() * (before - now)).sum(1).clamp(min=0)
    same = (now.argmax(1) == before.argmax(1)).float()
    token = torch.tensor([p.token for p, *_ in keys], device=logp.device)
    said = torch.stack([same, kl, -now.gather(1, token[:, None])[:, 0]]).cpu()
    return {i: Shift(bool(s), float(d), float(v)) for (_, i, _), (s, d, v) in zip(keys, said.T)}


def next_logp(
    model: Model, texts: Sequence[Text], bos: Bos = "tokenizer", *, device: torch.device | str = "cpu"
) -> Tensor:
    """Return log P of the next token after each prompt.

    Args:
        model: The model.
        texts: Prompts.
        bos: Beginning-of-text rule.
        device: Where the result is kept.

    Shapes:
        (texts, vocabulary), float32.
    """
    rows = encode(model.tokenizer, texts, bos)
    out = torch.empty(len(rows), model.anatomy.vocab_size, device=device)
    for keys, logp in _read(model, rows, lambda i: _places(rows[i], False)):
        at = [places[0] for _, places in keys]
        out[torch.tensor([i for i, _ in keys], device=device)] = logp[at].to(device)
    return out


_Key = tuple[int, tuple[int, ...]]
"""The change that a row carries, and its tokens."""


@torch.no_grad()
def _read(
    model: Model, rows: Sequence[Row], where: Callable[[int], range], owners: Owners | None = None
) -> Iterator[tuple[list[tuple[int, list[int]]], Tensor]]:
    """Run distinct rows in batches of like length; yield log probabilities where they are wanted.

    Yields:
        The rows that are answered by this batch, each with its places in the log probabilities (places, vocabulary).
    """
    users: dict[_Key, list[int]] = {}
    for i, row in enumerate(rows):
        owner = owners.each[i] if owners else 0
        users.setdefault((owner, row.ids[: where(i).stop]), []).append(i)
    shared = _shared(users) if model.anatomy.kind == "decoder" else users
    wanted = {key: sorted({p for i in found for p in where(i)}) for key, found in shared.items()}
    for chunk in _chunks(model, wanted):
        batch = model.batch([ids for _, ids in chunk])
        carried = owners.lanes.carrying([owner for owner, _ in chunk]) if owners else nullcontext()
        with carried, Trace(model) as trace:
            states = trace.states(batch)
        row_at = torch.tensor([r for r, key in enumerate(chunk) for _ in wanted[key]], device=states.device)
        column = torch.tensor([p for key in chunk for p in wanted[key]], device=states.device)
        logp = model.logits(states[row_at, column]).float().log_softmax(-1)
        keys, start = [], 0
        for key in chunk:
            at = {place: start + k for k, place in enumerate(wanted[key])}
            keys += [(i, [at[p] for p in where(i)]) for i in shared[key]]
            start += len(at)
        yield keys, logp


def _shared(users: dict[_Key, list[int]]) -> dict[_Key, list[int]]:
    """Let a row that another one begins with be read there: attention looks back only."""
    found: dict[_Key, list[int]] = {}
    last: _Key | None = None
    for key in sorted(users, reverse=True):  # whatever goes on from a row stands right before it
        if last is None or last[0] != key[0] or last[1][: len(key[1])] != key[1]:
            last = key
        found.setdefault(last, []).extend(users[key])
    return found


def _chunks(model: Model, wanted: Mapping[_Key, list[int]]) -> Iterator[list[_Key]]:
    """Cut rows, sorted by length, into rectangles whose tokens and logits are bounded."""
    on_cpu = model.device.type == "cpu"
    tokens, logits = (ROW_TOKENS, LOGITS) if on_cpu else (DEVICE_TOKENS, 16 * LOGITS)
    chunk: list[_Key] = []
    places = 0
    for key in sorted(wanted, key=lambda key: len(key[1])):
        places += len(wanted[key])
        too_long = (len(chunk) + 1) * len(key[1]) > tokens
        if chunk and (too_long or places * model.anatomy.vocab_size > logits):
            yield chunk
            chunk, places = [], len(wanted[key])
        chunk.append(key)
    if chunk:
        yield chunk


def chunk_nll(model: Model, text: str, n_tokens: int = 2048, chunk: int = 32, owners: Owners | None = None) -> Tensor:
    """Score a text in consecutive chunks.

    Args:
        model: The model.
        text: The text.
        n_tokens: Tokens of it that are read.
        chunk: Tokens of a chunk.
        owners: The changes to score it under, where several run side by side.

    Shapes:
        (chunks,): mean -log P of each chunk's tokens, nats; without a beginning-of-text token, of all but the first.
        With owners (owners, chunks).
    """
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][:n_tokens]
    front = _front(model)
    pieces = [tuple(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    pieces = [(*front, *p) for p in pieces if len(p) > 1]
    each = owners.each if owners else [0]
    rows = [Row(p, None, max(0, len(front) - 1)) for _ in each for p in pieces]
    carried = owners and Owners(owners.lanes, [o for o in each for _ in pieces])
    found = torch.zeros(len(rows))
    for keys, logp in _read(model, rows, lambda i: _places(rows[i], True), carried):
        for i, answer in _scored(logp, rows, keys).items():
            found[i] = answer.nll
    return found.reshape(len(each), len(pieces)) if owners else found


def _front(model: Model) -> tuple[int, ...]:
    """Return what the tokenizer puts before a text: a model that was trained with it reads badly without."""
    plain = model.tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = model.tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return tuple(whole[:start])


def perplexity(model: Model, text: str, n_tokens: int = 2048, chunk: int = 128) -> float:
    """Return exp of the mean over a text's chunks of `chunk` tokens of their NLL."""
    return math.exp(float(chunk_nll(model, text, n_tokens, chunk).mean()))


def perplexities(model: Model, text: str, owners: Owners, n_tokens: int = 2048, chunk: int = 128) -> list[float]:
    """Return the perplexity of a text under each of several changes that run side by side."""
    nll = chunk_nll(model, text, n_tokens, chunk, owners).mean(1)
    return [math.exp(v) for v in nll.tolist()]
