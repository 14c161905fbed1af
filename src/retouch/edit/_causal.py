"""Causal tracing: blur some words of a prompt, put back what single tokens computed, and see whether the answer returns.

`locate` draws its map over all tokens and blocks; the shortcut index compares two of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import FactError, SettingsError
from ..measure import next_logp
from ..model import Model
from ..tokens import Bos, Row, Text, encode
from ..trace import Suffix, Trace
from .base import require_decoder, rule
from .facts import Fact

__all__ = ["Asked", "Effects", "Part", "around", "ask", "blur", "effects", "site", "span", "spread_of", "window_of"]

Part = Literal["mlp", "attention", "state"]
PARTS = {"mlp": ".mlp.down", "attention": ".attention.out", "state": ""}


@dataclass(frozen=True)
class Asked:
    """A prompt whose answer the model gives.

    Attributes:
        fact: The fact that the prompt belongs to.
        ids: The prompt's tokens.
        subject: Indices of the tokens that hold the subject.
        others: Indices of all other tokens but special ones.
        answer: The answer: the fact's truth or its target, whichever the model says.
        token: The answer's first token.
    """

    fact: Fact
    ids: tuple[int, ...]
    subject: range
    others: tuple[int, ...]
    answer: str
    token: int


def ask(model: Model, facts: Sequence[Fact], bos: Bos = "tokenizer") -> tuple[list[Asked], list[str]]:
    """Keep the facts whose truth or target is what the model says next; tell which were left out, and why.

    Raises:
        FactError: There is no fact, or a fact has no subject.
        ModelError: The model predicts no next token.
    """
    require_decoder(model, "causal tracing")
    if not facts:
        raise FactError("There are no facts to look at.")
    if lone := [f for f in facts if not f.subject]:
        raise FactError(
            f"The fact {lone[0].prompt!r} has no subject; causal tracing blurs the subject's tokens. Name it."
        )
    pairs = [(f, a) for f in facts for a in dict.fromkeys((f.truth or f.target, f.target))]
    texts = [Text(f.before, f.subject, f.after, answer) for f, answer in pairs]
    said = next_logp(model, texts, bos).argmax(1).tolist()
    found: dict[int, Asked] = {}
    for (fact, answer), row, token in zip(pairs, encode(model.tokenizer, texts, bos), said):
        if row.target[0] == token and id(fact) not in found:
            found[id(fact)] = _asked(model, fact, row, answer, bos)
    instead = {id(fact): token for (fact, _), token in zip(pairs, said)}
    return list(found.values()), [_missed(model, f, instead[id(f)]) for f in facts if id(f) not in found]


def _asked(model: Model, fact: Fact, row: Row, answer: str, bos: Bos) -> Asked:
    subject = span(model, fact, row, bos)
    special = set(model.tokenizer.all_special_ids)
    others = [i for i in range(row.prompt + 1) if i not in subject and row.ids[i] not in special]
    return Asked(fact, row.ids[: row.prompt + 1], subject, tuple(others), answer, row.target[0])


def _missed(model: Model, fact: Fact, token: int) -> str:
    wanted = " or ".join(repr(a) for a in dict.fromkeys((fact.truth or fact.target, fact.target)))
    return f"{fact.filled!r}: the model goes on with {model.tokenizer.decode([token])!r}, not with {wanted}."


def span(model: Model, fact: Fact, row: Row, bos: Bos = "tokenizer") -> range:
    """Find the indices of the tokens that hold a fact's subject, in the row of its prompt."""
    assert row.subject is not None  # the callers have refused facts without a subject
    lead = len(fact.subject) - len(fact.subject.lstrip())
    head, tail = fact.subject[: lead + 1], fact.subject[lead + 1 :] + fact.after
    first = encode(model.tokenizer, [Text(fact.before, head, tail)], bos)[0].subject or 0
    before = fact.before.rstrip()
    if before:  # several byte tokens may share the subject's first character: begin right after what stands before it
        rest = fact.before[len(before) :] + fact.subject + fact.after
        last_before = encode(model.tokenizer, [Text("", before, rest)], bos)[0].subject or 0
    else:
        special = set(model.tokenizer.all_special_ids)
        last_before = next((i for i, t in enumerate(row.ids) if t not in special), 0) - 1
    begin = min(first, last_before + 1)
    while begin < first and not model.tokenizer.decode([row.ids[begin]]).strip():
        begin += 1
    return range(begin, row.subject + 1)


def site(part: Part, block: int) -> str:
    """Name the part whose output is put back.

    Raises:
        SettingsError: There is no such part.
    """
    if part not in PARTS:
        raise SettingsError(f"part must be one of {', '.join(PARTS)}; got {part!r}.")
    return f"blocks.{block}{PARTS[part]}"


def window_of(model: Model, part: Part, wanted: int | None) -> int:
    """Return how many blocks are put back together: by default a fifth of them, and one for the whole state.

    Raises:
        SettingsError: It is below 1.
    """
    if wanted is not None and wanted < 1:
        raise SettingsError(f"window must be at least 1 block; got {wanted}.")
    return wanted or (1 if part == "state" else max(1, rule(0.2, model.anatomy)))


def around(centre: int, window: int, n_blocks: int) -> range:
    """Return the blocks of a window, cut at both ends of the model."""
    first = centre - window // 2
    return range(max(0, first), min(n_blocks, first + window))


@torch.no_grad()
def spread_of(model: Model, asked: Sequence[Asked]) -> float:
    """Return the standard deviation of the entries of all subjects' token embeddings."""
    seen = []
    for one in asked:
        with Trace(model) as trace:
            trace.read("embed")
            trace.run(model.batch([one.ids]), stop_after="embed")
            seen.append(trace["embed", "output"][0, list(one.subject)].flatten())
    return float(torch.cat(seen).std(correction=0))


def blur(model: Model, n_tokens: int, n_samples: int, size: float, seed: int) -> Tensor:
    """Draw noise for some tokens, (n_samples, n_tokens, width of an embedding); equal seeds, equal noise."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n_samples, n_tokens, model.anatomy.d_embed, generator=generator)
    return (size * drawn).to(model.device)


class Effects(NamedTuple):
    """What came back.

    Attributes:
        clean: P(answer) of the untouched prompt.
        corrupted: P(answer) with the blurred words, mean over the noise.
        effect: P(answer) with one token put back in a window around a block, minus `corrupted`; (places, blocks).
    """

    clean: float
    corrupted: float
    effect: Tensor


@torch.no_grad()
def effects(
    model: Model, asked: Asked, places: Sequence[int], corrupt: Sequence[int], noise: Tensor, part: Part, window: int
) -> Effects:
    """Blur tokens and put a part's outputs back, one token and one window of blocks at a time.

    Source:
        Meng et al. 2022 (arXiv 2202.05262), section 2, and kmeng01/rome.

    Shapes:
        noise (samples, corrupted tokens, d_embed). Only blocks from the window's first on and tokens from the restored
        one on are computed again: about a quarter of places x blocks x samples whole passes.

    Args:
        model: A decoder.
        asked: The prompt.
        places: Tokens that are put back, one after another.
        corrupt: Tokens whose embeddings get the noise.
        noise: What is added, a sample a row.
        part: What is put back.
        window: How many blocks at once.
    """
    n_blocks = model.anatomy.n_blocks
    own, clean = _clean(model, asked, part)
    effect = torch.zeros(len(places), n_blocks)
    blurred = float(_probability(model, _blurred(model, asked, corrupt, noise, len(asked.ids) - 1), asked))
    for i, place in enumerate(places):
        suffix = _blurred(model, asked, corrupt, noise, place)
        for centre in range(n_blocks):
            blocks = around(centre, window, n_blocks)
            while suffix.first < blocks.start:
                suffix = suffix.above()
            with Trace(model) as trace:
                for block in blocks:
                    trace.edit(site(part, block), partial(_put, own[block][place], len(noise)))
                effect[i, centre] = _probability(model, suffix, asked) - blurred
    return Effects(clean, blurred, effect)


def _clean(model: Model, asked: Asked, part: Part) -> tuple[list[Tensor], float]:
    """Run the untouched prompt; keep the part's output in every block, (tokens, d_model), and P(answer)."""
    names = [site(part, b) for b in range(model.anatomy.n_blocks)]
    batch = model.batch([asked.ids])
    with Trace(model) as trace:
        for name in names:
            trace.read(name)
        state = trace.states(batch)[0, -1]
        return [trace[n, "output"][0].clone() for n in names], float(_of(model, state, asked))


def _blurred(model: Model, asked: Asked, corrupt: Sequence[int], noise: Tensor, place: int) -> Suffix:
    """Run one row a noise sample and keep what stands before `place`."""

    def add(out: Tensor) -> Tensor:
        moved = out.clone()
        columns = [out.shape[1] - len(asked.ids) + c for c in corrupt]  # rows are padded in front
        moved[:, columns] += noise
        return moved

    with Trace(model) as trace:
        trace.edit("embed", add)
        return Suffix.of(model, [asked.ids] * len(noise), [place] * len(noise), 0)


def _put(value: Tensor, rows: int, out: Tensor) -> Tensor:
    moved = out.reshape(rows, -1, out.shape[-1]).clone()  # some families flatten rows and columns in the MLP
    moved[:, 0] = value
    return moved.reshape(out.shape)


def _probability(model: Model, suffix: Suffix, asked: Asked) -> Tensor:
    return _of(model, suffix.run()[:, -1], asked).mean()


def _of(model: Model, state: Tensor, asked: Asked) -> Tensor:
    return model.logits(state).float().softmax(-1)[..., asked.token]
