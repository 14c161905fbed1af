"""How far a fact's key moves when an instruction stands before the prompt, and how close other subjects' keys are.

An edit writes at one key. What arrives when the same fact is asked differently depends on the key that is there then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import FactError
from ..linalg import Metric
from ..model import Model
from ..progress import track
from ..tokens import Bos, Row, Text, encode
from ..trace import Trace
from .base import down, require_decoder
from .contexts import chat_header
from .facts import Fact, demo

__all__ = ["WRAPPINGS", "Cosines", "Drift", "cosines", "drift", "reference", "wrappings"]

WRAPPINGS = (
    "Answer the question: ",
    "Complete the sentence: ",
    "Continue this text: ",
    "User: ",
    "Question: ",
    "Please finish the following statement. ",
    "Fill in what is missing at the end: ",
    "You are a helpful assistant. Give a short answer. ",
    "Here is a sentence from an encyclopedia: ",
    "True or false? ",
    "I need a quick fact for my homework. ",
    "In one word: ",
    "Instruction: end the line below with the right name.\n",
    "Task: complete the fact.\nFact: ",
    "Hello! Could you help me with something? ",
    "Quiz, question 7. ",
    "Read carefully and reply with the missing words only. ",
    "Think step by step. ",
    "Translate nothing, explain nothing, just go on: ",
    "A student asks and a teacher answers.\nStudent: ",
    "Dear reader, as everybody knows, ",
    "Write the next words of this line. ",
)
"""Texts that people put before a prompt. The chat header of the tokenizer joins them where it has one."""

_TOKENS = 1024
"""Tokens of one batch."""

LEAD = "Here is a fact. "
"""Stands before a subject that would open the text, where its key is the attention sink's."""


def wrappings(model: Model) -> list[str]:
    """Return the texts of `WRAPPINGS` and, where the tokenizer has a chat template, the header of a user's message."""
    header = chat_header(model)
    return [*WRAPPINGS, *([header] if header else [])]


class Keys(NamedTuple):
    """What flows into each block's ``mlp.down`` at the subject's and at the prompt's last token.

    Shapes:
        subject, prompt: (rows, blocks, d_ff), float32.
    """

    subject: Tensor
    prompt: Tensor


@torch.no_grad()
def keys_of(model: Model, rows: Sequence[Row]) -> Keys:
    """Read the keys of rows with a subject, in all blocks, in one pass a batch."""
    names = [down(b) for b in range(model.anatomy.n_blocks)]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    per = max(1, _TOKENS // max(len(r.ids) for r in rows))
    for start in range(0, len(rows), per):
        part = rows[start : start + per]
        with Trace(model) as trace:
            for name in names:
                trace.read(name, "input")
            trace.run(model.batch([r.ids for r in part]), stop_after=names[-1])
            for i, row in enumerate(part):
                for place, at in zip(found, (row.subject or 0, row.prompt)):
                    place.append(torch.stack([trace[n, "input"][i, at] for n in names]).float().cpu())
    return Keys(torch.stack(found[0]), torch.stack(found[1]))


def lead_of(model: Model, fact: Fact, bos: Bos = "tokenizer") -> str:
    """Return what must stand before a fact's prompt: nothing, or `LEAD` where its subject's last token opens the text.

    Raises:
        FactError: The fact has no subject.
    """
    if not fact.subject:
        raise FactError(f"The fact {fact.prompt!r} has no subject, so it has no key at a subject. Name it.")
    return "" if _row(model, fact, "", bos).subject else LEAD


def reference(model: Model, fact: Fact, bos: Bos = "tokenizer") -> Row:
    """Encode a fact's prompt, bare or behind `lead_of`.

    Raises:
        FactError: The fact has no subject.
    """
    return _row(model, fact, lead_of(model, fact, bos), bos)


def _row(model: Model, fact: Fact, context: str, bos: Bos) -> Row:
    return encode(model.tokenizer, [Text(fact.before, fact.subject, fact.after, context=context)], bos)[0]


def wrapped(model: Model, fact: Fact, texts: Sequence[str], bos: Bos) -> list[Row]:
    """Encode a fact's prompt behind each text."""
    return encode(model.tokenizer, [Text(fact.before, fact.subject, fact.after, context=t) for t in texts], bos)


# ---------------------------------------------------------------- drift


@dataclass(frozen=True)
class Drift:
    """How far keys move when a text stands before the prompt, in lengths of the key: ‖k' - k*‖ / ‖k*‖.

    Attributes:
        wrappings: The texts.
        subject: At the subject's last token: a row a text, a column a block; mean over the facts.
        prompt: The same at the prompt's last token.
        whitened: By block, the mean over texts and facts at the subject in the norm of the second moment, where known.
    """

    wrappings: tuple[str, ...]
    subject: tuple[tuple[float, ...], ...]
    prompt: tuple[tuple[float, ...], ...]
    whitened: dict[int, float]

    def by_block(self) -> tuple[list[float], list[float]]:
        """Return the means over the texts, at the subject and at the prompt's end."""
        one, other = (torch.tensor(t).mean(0).tolist() for t in (self.subject, self.prompt))
        return one, other

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        subject, prompt = self.by_block()
        return {**vars(self), "subject_by_block": subject, "prompt_by_block": prompt}


def drift(
    model: Model,
    facts: Sequence[Fact],
    *,
    texts: Sequence[str] = (),
    metrics: dict[int, Metric] | None = None,
    bos: Bos = "tokenizer",
) -> Drift:
    """Measure how far each fact's key moves under instructions.

    Args:
        model: A decoder.
        facts: Facts with a subject.
        texts: What is put before the prompt; by default `wrappings`.
        metrics: By block, a second moment as a metric, for the whitened norm.
        bos: Beginning-of-text rule.

    Raises:
        FactError: There are no facts, or one has no subject.
    """
    require_decoder(model, "diagnose")
    _some(facts)
    chosen = list(texts) or wrappings(model)
    totals = [torch.zeros(len(chosen), model.anatomy.n_blocks) for _ in range(2)]
    white = dict.fromkeys(metrics or {}, 0.0)
    for fact in track(facts, "Drift of keys"):
        own = keys_of(model, [reference(model, fact, bos), *wrapped(model, fact, chosen, bos)])
        for total, keys in zip(totals, own):
            total += (keys[1:] - keys[:1]).norm(dim=2) / keys[:1].norm(dim=2)
        for block, metric in (metrics or {}).items():
            white[block] += _whitened(own.subject[:, block].double(), metric) / len(facts)
    subject, prompt = (tuple(map(tuple, (t / len(facts)).tolist())) for t in totals)
    return Drift(tuple(chosen), subject, prompt, white)


def _whitened(keys: Tensor, metric: Metric) -> float:
    moved = torch.cat([keys[:1], keys[1:] - keys[:1]]).T
    size = (moved * metric.apply_inverse(moved)).sum(0).clamp(min=0).sqrt()
    return float((size[1:] / size[0]).mean())


def _some(facts: Sequence[Fact]) -> None:
    if not facts:
        raise FactError("There are no facts to diagnose.")


# ---------------------------------------------------------------- other subjects


@dataclass(frozen=True)
class Cosines:
    """Cosine between a fact's key and the keys of other subjects in the same prompt: what of a plain write they receive.

    Attributes:
        subject: By block, at the subject's last token; mean over facts and other subjects.
        prompt: By block, at the prompt's last token.
        others: For each fact, the other subjects.
    """

    subject: tuple[float, ...]
    prompt: tuple[float, ...]
    others: dict[str, tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        return dict(vars(self))


def cosines(
    model: Model, facts: Sequence[Fact], others: Sequence[str] = (), *, most: int = 8, bos: Bos = "tokenizer"
) -> Cosines:
    """Compare each fact's key with those of other subjects in the same prompt, in every block.

    Args:
        model: A decoder.
        facts: Facts with a subject.
        others: Other subjects; by default those of the other facts with the same prompt, else of the sample facts.
        most: So many others are compared with each fact.
        bos: Beginning-of-text rule.

    Raises:
        FactError: There are no facts, one has no subject, or there is no other subject.
    """
    require_decoder(model, "diagnose")
    _some(facts)
    totals = [torch.zeros(model.anatomy.n_blocks) for _ in range(2)]
    used = {}
    for fact in track(facts, "Keys of other subjects"):
        names = _others(fact, facts, others)[:most]
        used[fact.filled] = tuple(names)
        rows = [reference(model, Fact(fact.prompt, name, fact.target), bos) for name in names]
        for total, keys in zip(totals, keys_of(model, [reference(model, fact, bos), *rows])):
            total += functional.cosine_similarity(keys[:1], keys[1:], dim=2).mean(0)
    subject, prompt = (tuple((t / len(facts)).tolist()) for t in totals)
    return Cosines(subject, prompt, used)


def _others(fact: Fact, facts: Sequence[Fact], given: Sequence[str]) -> list[str]:
    same = [f.subject for f in facts if f.prompt == fact.prompt]
    for names in (given, same, [f.subject for f in demo()]):
        kept = [n for n in dict.fromkeys(names) if n.strip() and n.strip() != fact.subject.strip()]
        if kept:
            return kept
    raise FactError(f"There is no other subject to compare {fact.subject!r} with.")
