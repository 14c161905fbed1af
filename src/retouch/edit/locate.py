"""Where a model recalls a fact: a causal-trace map, the attribute rate, and knock-outs.

`locate` runs all three; each can be had alone. They need facts that the model knows, and no statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._pictures import Picture
from .._plots import plot_curve, plot_heat
from ..errors import FactError
from ..model import Model
from ..progress import track
from ..report import Report, Table
from ..tokens import Bos
from ._attributes import AttributeRate, KnockOut, attribute_rate, knock_outs, rets_block
from ._causal import Asked, Effects, Part, ask, blur, effects, site, spread_of, window_of
from .facts import Fact

__all__ = [
    "AttributeRate",
    "HeatMap",
    "KnockOut",
    "Location",
    "attribute_rate",
    "causal_trace",
    "knock_outs",
    "locate",
    "rets_block",
]

_MAPS = 6
"""A report draws so many maps."""


# ---------------------------------------------------------------- causal trace


@dataclass(frozen=True)
class HeatMap:
    """How much of an answer comes back when one token's computation is put back, for every token and block.

    Attributes:
        prompt: The filled prompt.
        answer: What the model says.
        tokens: The prompt's tokens as text.
        subject: First and last index of the subject's tokens.
        part: What was put back.
        window: In how many blocks at once.
        clean: P(answer's first token) of the untouched prompt.
        corrupted: The same with the subject blurred, mean over the noise.
        effect: Gain over `corrupted`, a row a token, a column the block at the window's centre.
    """

    prompt: str
    answer: str
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    part: str
    window: int
    clean: float
    corrupted: float
    effect: tuple[tuple[float, ...], ...]

    @property
    def peak(self) -> tuple[int, int, float]:
        """Token, block and size of the largest effect."""
        return max(((i, b, e) for i, row in enumerate(self.effect) for b, e in enumerate(row)), key=lambda p: p[2])

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        token, block, size = self.peak
        peak = {"token": token, "block": block, "effect": size}
        return {**vars(self), "peak": peak}

    def picture(self) -> Picture:
        """Draw the map."""
        token, block, size = self.peak
        first, last = self.subject
        names = [f"{t}*" if first <= i <= last else t for i, t in enumerate(self.tokens)]
        title = (
            f"{self.prompt} → {self.answer}: {_WHAT[self.part]} at {self.tokens[token]!r} around block {block} bring back "
            f"most, {size:.2g} of {self.clean - self.corrupted:.2g}."
        )
        caption = (
            f"Probability that returns when {_WHAT[self.part]} of one token (row) in {self.window} blocks around one block "
            f"(column) are put back. A star marks the blurred subject. P(answer): untouched {self.clean:.3g}, blurred "
            f"{self.corrupted:.3g}."
        )
        return plot_heat(names, self.effect, "block at the window's centre", title, caption)


_WHAT = {"mlp": "the MLP outputs", "attention": "the attention outputs", "state": "the states"}


def causal_trace(
    model: Model,
    facts: Sequence[Fact],
    *,
    part: Part = "mlp",
    window: int | None = None,
    n_samples: int = 10,
    noise: float = 3.0,
    seed: int = 0,
    bos: Bos = "tokenizer",
) -> tuple[list[HeatMap], list[str]]:
    """Blur each fact's subject and find the tokens and blocks whose outputs bring the answer back.

    Source:
        Meng et al. 2022 (arXiv 2202.05262), section 2 and kmeng01/rome, which puts back 10 blocks at a time; ours is a
        fifth of the depth. Noise is `noise` standard deviations of the embedding entries of all subjects of the set.

    Args:
        model: A decoder.
        facts: Facts with a subject; the answer is the truth or the target, whichever the model says next.
        part: Put back the outputs of the MLPs, of the attentions, or the states between the blocks.
        window: Blocks put back together; by default a fifth of the depth, and one for states.
        n_samples: Draws of the noise that the effect is averaged over.
        noise: Size of the noise in standard deviations.
        seed: Of the noise.
        bos: Beginning-of-text rule.

    Returns:
        A map for each fact that the model answers, and a sentence for each that it does not.

    Raises:
        FactError: There are no facts, or one has no subject.
        SettingsError: `part` or `window` is not allowed.
    """
    site(part, 0)
    size = window_of(model, part, window)
    asked, left_out = ask(model, facts, bos)
    spread = noise * spread_of(model, asked) if asked else 0.0
    maps = []
    for one in track(asked, "Causal traces"):
        drawn = blur(model, len(one.subject), n_samples, spread, seed)
        places = range(one.subject[0], len(one.ids))  # what stands before was never blurred
        maps.append(_heat_map(model, one, part, size, effects(model, one, places, one.subject, drawn, part, size)))
    return maps, left_out


def _heat_map(model: Model, one: Asked, part: Part, window: int, found: Effects) -> HeatMap:
    tokens = tuple(model.tokenizer.decode([t]) for t in one.ids)
    ends = (one.subject[0], one.subject[-1])
    nothing = torch.zeros(one.subject[0], model.anatomy.n_blocks)
    rows = tuple(tuple(row) for row in torch.cat([nothing, found.effect]).tolist())
    return HeatMap(one.fact.filled, one.answer, tokens, ends, part, window, found.clean, found.corrupted, rows)


# ---------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Location:
    """Where a model recalls facts.

    Attributes:
        model: Which model was looked at.
        maps: A causal-trace map for each fact that the model answers.
        left_out: Why the others have none.
        rate: Attribute rate after each block; None where no attribute can be told from a stop word.
        knocked: Attribute rate lost by knock-outs.
        no_rate: Why there is no attribute rate; empty where there is one.
    """

    model: str
    maps: tuple[HeatMap, ...]
    left_out: tuple[str, ...]
    rate: AttributeRate | None
    knocked: tuple[KnockOut, ...] = ()
    no_rate: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        return {
            "model": self.model,
            "causal_trace": [m.to_dict() for m in self.maps],
            "left_out": list(self.left_out),
            "attribute_rate": None if self.rate is None else self.rate.to_dict(),
            "knock_outs": [k.to_dict() for k in self.knocked],
            "no_attribute_rate": self.no_rate or None,
        }

    def tables(self) -> list[Table]:
        """Return what a person reads."""
        peaks = [
            (m.prompt, m.answer, m.clean, m.corrupted, m.tokens[t], b, e) for m in self.maps for t, b, e in [m.peak]
        ]
        columns = ("prompt", "answer", "P untouched", "P blurred", "best token", "best block", "P that returns")
        caption = "Probability of the answer's first token; the best token and block bring back most of it."
        found = [Table("Causal traces", columns, tuple(peaks), caption)] if peaks else []
        if self.rate is not None:
            rows = tuple((f"block {i}", r) for i, r in enumerate(self.rate.rates))
            how = f"Share of attributes of the relation among the {self.rate.top} likeliest tokens at the prompt's end."
            found.append(Table("Attribute rate", ("state after", "rate"), rows, how))
        if self.knocked:
            most = [(k, max(k.lost)) for k in self.knocked]
            lost = tuple((f"{k.part}, {k.place}'s last token", k.window, m, k.lost.index(m)) for k, m in most)
            heads = ("silent", "blocks at once", "largest loss", "around block")
            found.append(Table("Knock-outs", heads, lost, "Attribute rate after the last block that is lost."))
        return found

    def pictures(self) -> list[Picture]:
        """Draw the maps, the attribute rate and the knock-outs. Needs the extra ``plot``."""
        drawn = [m.picture() for m in self.maps[:_MAPS]]
        if self.rate is not None:
            rates, at = self.rate.rates, self.rate.block
            title = (
                "The attribute rate never moves."
                if at is None
                else f"The attribute rate passes half of its range at block {at}."
            )
            drawn.append(
                plot_curve(range(len(rates)), {"rate": rates}, "block", "attribute rate at the prompt's end", title)
            )
        if self.knocked:
            lost = {f"{k.part}, {k.place}": k.lost for k in self.knocked}
            worst = max(self.knocked, key=lambda k: max(k.lost))
            title = f"Most is lost without the {worst.part} of {worst.window} blocks around block "
            title += f"{worst.lost.index(max(worst.lost))} at the {worst.place}'s last token."
            blocks = range(len(worst.lost))
            drawn.append(
                plot_curve(blocks, lost, "block at the window's centre", "attribute rate lost by a knock-out", title)
            )
        return drawn

    def report(self, *, pictures: bool = True) -> Report:
        """Make a report of everything; the pictures need the extra ``plot``."""
        n, at = len(self.maps) + len(self.left_out), None if self.rate is None else self.rate.block
        block = (
            "There is no attribute rate to choose a block by."
            if at is None
            else f"RETS's block by the attribute rate: {at}."
        )
        why = [f"No attribute rate: {self.no_rate}"] if self.no_rate else []
        few = [f"Only the first {_MAPS} of {len(self.maps)} maps are drawn."] if len(self.maps) > _MAPS else []
        return Report(
            title=f"Where {self.model} recalls {n} facts",
            summary=f"{len(self.maps)} of {n} facts were traced. {block}",
            model=self.model,
            tables=tuple(self.tables()),
            pictures=tuple(self.pictures()) if pictures else (),
            numbers=self.to_dict(),
            notes=(*(f"Left out: {fact}" for fact in self.left_out), *why, *few),
        )


def locate(
    model: Model,
    facts: Sequence[Fact],
    *,
    attributes: Sequence[str] = (),
    part: Part = "mlp",
    window: int | None = None,
    n_samples: int = 10,
    noise: float = 3.0,
    seed: int = 0,
    bos: Bos = "tokenizer",
) -> Location:
    """Trace facts through a model: which tokens and blocks carry them, and where the answer becomes readable.

    Args:
        model: A decoder.
        facts: Facts with a subject that the model knows.
        attributes: Words that the relation may give; see `attribute_rate`.
        part: See `causal_trace`, as the rest.
        window: Blocks put back together.
        n_samples: Draws of the noise.
        noise: Size of the noise in standard deviations.
        seed: Of the noise.
        bos: Beginning-of-text rule.

    Raises:
        FactError: There are no facts, or one has no subject.
        ModelError: The model predicts no next token.
    """
    maps, left_out = causal_trace(
        model, facts, part=part, window=window, n_samples=n_samples, noise=noise, seed=seed, bos=bos
    )
    try:
        rate = attribute_rate(model, facts, attributes, bos=bos)
        knocked = knock_outs(model, facts, attributes, bos=bos)
    except FactError as error:  # the map does not need attributes
        return Location(model.source, tuple(maps), tuple(left_out), None, no_rate=str(error))
    return Location(model.source, tuple(maps), tuple(left_out), rate, tuple(knocked))
