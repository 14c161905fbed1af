"""Which words a model has in mind at a prompt's end: the attribute rate of every block, and what knock-outs take from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import FactError
from ..model import Model
from ..progress import report
from ..tokens import Bos, Row, Text, encode
from ..trace import Trace
from ._causal import Part, around, site, window_of
from .base import require_decoder, rule
from .facts import Fact, is_stop

__all__ = ["AttributeRate", "KnockOut", "attribute_rate", "knock_outs", "rets_block"]

_TOKENS = 1024
"""Tokens of one batch."""

Place = Literal["subject", "prompt"]


@dataclass(frozen=True)
class AttributeRate:
    """How many of the likeliest words at the prompt's end are attributes of the relation, block by block.

    Attributes:
        rates: After each block, the share of the `top` likeliest tokens; mean over the facts.
        top: How many tokens are looked at.
        n_tokens: How many attribute tokens each relation has.
    """

    rates: tuple[float, ...]
    top: int
    n_tokens: dict[str, int]

    @property
    def block(self) -> int | None:
        """The block that RETS should write at: see `rets_block`."""
        return rets_block(self.rates)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        return {"rates": list(self.rates), "top": self.top, "n_tokens": self.n_tokens, "rets_block": self.block}


def rets_block(rates: Sequence[float]) -> int | None:
    """Return the first block whose attribute rate passes half of its range; None when the rate never moves.

    Example:
        >>> rets_block([0.0, 0.02, 0.3, 0.5, 0.4])
        2
    """
    low, high = min(rates), max(rates)
    return None if low == high else next(i for i, r in enumerate(rates) if r > (low + high) / 2)


def attribute_rate(
    model: Model, facts: Sequence[Fact], attributes: Sequence[str] = (), *, top: int = 50, bos: Bos = "tokenizer"
) -> AttributeRate:
    """Read each block's state at the prompt's end as words, and count the relation's attributes among the likeliest.

    Source:
        sunshower-liu/RETS (arXiv 2408.15091), after Geva et al. 2023. Ours: first pieces without stop words instead of all
        word pieces, the state after a block instead of before it, and half of the range as RETS's threshold.

    Args:
        model: A decoder.
        facts: The facts.
        attributes: Words that the relation may give, e.g. cities; by default the truths and targets of the facts of
            the same relation (or, unnamed, of the same prompt).
        top: How many of the likeliest tokens are looked at.
        bos: Beginning-of-text rule.

    Raises:
        FactError: There are no facts, or no attribute is left once stop words are out. Relations without one are left
            out of the mean.
    """
    require_decoder(model, "the attribute rate")
    words = _attribute_tokens(model, facts, attributes, bos)
    usable = [f for f in facts if words[_relation(f)]]
    total = torch.zeros(model.anatomy.n_blocks)
    for states, own in _states(model, usable, words, bos):
        total += _share(model, states, own, top)
    sizes = {relation: len(own) for relation, own in words.items()}
    return AttributeRate(tuple((total / len(usable)).tolist()), min(top, model.anatomy.vocab_size), sizes)


def _relation(fact: Fact) -> str:
    return fact.relation or fact.prompt


def _attribute_tokens(model: Model, facts: Sequence[Fact], attributes: Sequence[str], bos: Bos) -> dict[str, list[int]]:
    """Find the first token of every attribute, as it stands behind the relation's prompt."""
    if not facts:
        raise FactError("There are no facts to look at.")
    words: dict[str, dict[str, Fact]] = {}
    for fact in facts:
        own = words.setdefault(_relation(fact), {})
        for word in attributes or (fact.truth, fact.target):
            if word and word.strip():
                own.setdefault(word, fact)
    found = {}
    for relation, own in words.items():
        rows = encode(model.tokenizer, [Text(f.before, f.subject, f.after, w) for w, f in own.items()], bos)
        first = {row.target[0] for row in rows}
        found[relation] = sorted(t for t in first if not is_stop(model.tokenizer.decode([t])))
    if not any(found.values()):
        raise FactError(
            f"No attribute of {', '.join(map(repr, list(found)[:3]))} begins with more than a stop word or a letter: "
            "give a list of the relation's answers."
        )
    return found


def _states(
    model: Model, facts: Sequence[Fact], words: dict[str, list[int]], bos: Bos
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each fact's states at the prompt's end, (blocks, d_model), and its attribute tokens."""
    names = [f"blocks.{b}" for b in range(model.anatomy.n_blocks)]
    rows = encode(model.tokenizer, [Text(f.before, f.subject, f.after) for f in facts], bos)
    per = max(1, _TOKENS // max(len(r.ids) for r in rows))
    for start in range(0, len(rows), per):
        part = rows[start : start + per]
        with torch.no_grad(), Trace(model) as trace:
            for name in names:
                trace.read(name)
            trace.run(model.batch([r.ids for r in part]), stop_after=names[-1])
            seen = torch.stack([trace[n, "output"] for n in names])
        for i, row in enumerate(part):
            own = torch.tensor(words[_relation(facts[start + i])], device=model.device)
            yield seen[:, i, row.prompt], own


@torch.no_grad()
def _share(model: Model, states: Tensor, own: Tensor, top: int) -> Tensor:
    """Return the share of the likeliest tokens that are among `own`, a number a state."""
    logits = model.logits(states)
    best = logits.topk(min(top, logits.shape[-1])).indices
    return torch.isin(best, own).float().mean(-1).cpu()


# ---------------------------------------------------------------- knock-outs


@dataclass(frozen=True)
class KnockOut:
    """The attribute rate that is lost when a part is silent in some blocks in a row.

    Attributes:
        part: The MLPs or the attentions.
        place: At which token: the subject's last, or the prompt's last.
        window: How many blocks are silent at once.
        lost: Rate after the last block that is lost, for each block at the window's centre; mean over the facts.
    """

    part: str
    place: str
    window: int
    lost: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        return {"part": self.part, "place": self.place, "window": self.window, "lost": list(self.lost)}


def knock_outs(
    model: Model,
    facts: Sequence[Fact],
    attributes: Sequence[str] = (),
    *,
    window: int | None = None,
    top: int = 50,
    bos: Bos = "tokenizer",
) -> list[KnockOut]:
    """Silence the MLPs or the attentions of some blocks at one token, and measure the attribute rate that is lost.

    Source:
        sunshower-liu/RETS after Geva et al. 2023, about 10 blocks in a row; ours a third of the depth.

    Args:
        model: A decoder.
        facts: The facts; those without a subject are measured at the prompt's end only.
        attributes: As for `attribute_rate`.
        window: Blocks that are silent together.
        top: As for `attribute_rate`.
        bos: Beginning-of-text rule.
    """
    require_decoder(model, "knock-outs")
    size = max(1, rule(1 / 3, model.anatomy)) if window is None else window_of(model, "mlp", window)
    words = _attribute_tokens(model, facts, attributes, bos)
    facts = [f for f in facts if words[_relation(f)]]
    rows = encode(model.tokenizer, [Text(f.before, f.subject, f.after) for f in facts], bos)
    found: list[KnockOut] = []
    parts: tuple[Part, ...] = ("mlp", "attention")
    for part in parts:
        for place in get_args(Place):
            lost = [
                _lost(model, row, at, torch.tensor(words[_relation(fact)], device=model.device), part, size, top)
                for fact, row in zip(facts, rows)
                if (at := row.subject if place == "subject" else row.prompt) is not None
            ]
            report("Knock-outs", len(found) + 1, 4)
            if lost:
                found.append(KnockOut(part, place, size, tuple(torch.stack(lost).mean(0).tolist())))
    return found


@torch.no_grad()
def _lost(model: Model, row: Row, at: int, own: Tensor, part: Part, window: int, top: int) -> Tensor:
    """Run a row for each window, and one untouched; return the rate that each window loses."""
    n = model.anatomy.n_blocks
    with Trace(model) as trace:
        for block in range(n):
            silent = [c for c in range(n) if block in around(c, window, n)]
            trace.edit(site(part, block), partial(_silenced, silent, n + 1, at))
        states = trace.states(model.batch([row.ids] * (n + 1)))[:, row.prompt]
    rates = _share(model, states, own, top)
    return rates[n] - rates[:n]


def _silenced(rows: list[int], n_rows: int, at: int, out: Tensor) -> Tensor:
    moved = out.reshape(n_rows, -1, out.shape[-1]).clone()
    moved[rows, at] = 0
    return moved.reshape(out.shape)
