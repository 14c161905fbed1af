"""What a sequence of edits does to a model on its way, and the curve that shows where it collapses."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import _plots, store
from .._pictures import need
from ..ledger import Ledger
from ..measure import answers, continuations, next_logp
from ..model import Model
from ..parting import identities
from ..report import Picture, Report, Table, plot_curve, write_html
from ..tokens import Text
from .evaluate import Neutral, neutral_of
from .facts import Fact, disjoint

__all__ = ["Point", "Watch", "collapse_report", "distinct", "plots", "save_png", "watch", "write_report"]

N_NEIGHBORS = 100
"""Neighbour prompts that are watched."""


@dataclass(frozen=True)
class Point:
    """What was measured after a number of edits.

    Attributes:
        n_edits: Facts given so far.
        efficacy: Share of all facts so far (those that no later one supersedes) whose new answer is likelier than the
            old one.
        efficacy_last: The same over the last batch.
        s_specificity: Share of the watched neighbours whose own answer is likelier than the new one; None without any.
        s_same: Share of them whose likeliest next token is the unedited model's; None likewise.
        perplexity_ratio: Of neutral text, to the model at the start.
    """

    n_edits: int
    efficacy: float
    efficacy_last: float
    s_specificity: float | None
    s_same: float | None
    perplexity_ratio: float

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Watch:
    """What is watched during a sequence, as it was at the start.

    Attributes:
        truths: The old answer of each fact, by what the fact is about.
        neighbors: Prompt, own answer and the edit's answer, a fixed sample.
        said: The likeliest next token after each of these prompts.
        neutral: Neutral text and its perplexity.
    """

    truths: Mapping[tuple[str, str], str]
    neighbors: tuple[tuple[str, str, str], ...]
    said: tuple[int, ...]
    neutral: Neutral

    def point(self, ledger: Ledger, so_far: Sequence[Fact], batch: Sequence[Fact], ratio: float) -> Point:
        """Measure a model on its way.

        Args:
            ledger: With the model as it is now.
            so_far: All facts that were given, in order.
            batch: The last of them.
            ratio: Of perplexities; it was measured already.
        """
        model, current, last = ledger.model, distinct(so_far), distinct(batch)
        pairs = [(Text(f.before, f.subject, f.after), f.target, self.truths[_key(f)]) for f in [*current, *last]]
        wins = _prefers(model, pairs)
        kept = _prefers(model, [(Text(prompt), own, new) for prompt, own, new in self.neighbors])
        now = next_logp(model, [Text(p) for p, _, _ in self.neighbors]).argmax(1).tolist() if kept else []
        same = [a == b for a, b in zip(now, self.said)]
        return Point(
            len(so_far), _mean(wins[: len(current)]), _mean(wins[len(current) :]), _mean(kept) if kept else None,
            _mean(same) if same else None, ratio,
        )  # fmt: skip


def watch(model: Model, facts: Sequence[Fact], seed: int = 0) -> Watch:
    """Measure the model before the first edit.

    Neighbours are drawn once, from all facts of the sequence, without those that a fact of it edits.
    """
    truths = {_key(f): f.truth for f in facts if f.truth}
    unknown = list({_key(f): f for f in facts if _key(f) not in truths}.values())
    for start in range(0, len(unknown), 32):
        part = unknown[start : start + 32]
        for fact, said in zip(part, continuations(model, [f.filled for f in part], 4)):
            truths[_key(fact)] = said.strip().split("\n")[0] or "the"
    named = [(p.prompt, p.answer or f.truth, f.target) for f in disjoint(facts) for p in f.neighbors]
    asked = list(dict.fromkeys((p, own, new) for p, own, new in named if own))
    sample = tuple(random.Random(seed).sample(asked, min(N_NEIGHBORS, len(asked))))
    first = next_logp(model, [Text(p) for p, _, _ in sample]).argmax(1).tolist() if sample else []
    return Watch(truths, sample, tuple(first), neutral_of(model))


def _key(fact: Fact) -> tuple[str, str]:
    return fact.filled, fact.target


def distinct(facts: Sequence[Fact]) -> list[Fact]:
    """Keep of facts that cannot all hold (one subject, one relation or template) the last one."""
    kept: list[Fact] = []
    taken: set[tuple[str, str, str]] = set()
    for fact in reversed(facts):
        about = identities(fact.to_dict())
        if not about & taken:
            kept.append(fact)
            taken |= about
    return kept[::-1]


def _prefers(model: Model, pairs: Sequence[tuple[Text, str, str]]) -> list[bool]:
    texts = [Text(t.before, t.subject, t.after, target) for t, *both in pairs for target in both]
    said = answers(model, texts) if texts else []
    return [a.nll < b.nll for a, b in zip(said[::2], said[1::2])]


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


# The curve


def _curves(points: Sequence[Point]) -> dict[str, list[float]]:
    nan = float("nan")
    curves = {
        "efficacy, all so far": [p.efficacy for p in points],
        "efficacy, last batch": [p.efficacy_last for p in points],
        "neighbours kept": [nan if p.s_specificity is None else p.s_specificity for p in points],
        "fluency kept": [1 / p.perplexity_ratio if p.perplexity_ratio > 0 else nan for p in points],
    }
    return {n: v for n, v in curves.items() if any(x == x for x in v)}


def plots(points: Sequence[Point], name: str = "the model") -> tuple[Picture, Picture]:
    """Draw the collapse curve: shares from 0 to 1, and the perplexity ratio by itself.

    In the first picture fluency is the perplexity before over the one now, so that all falls where a model collapses.

    Raises:
        ValueError: There is no point.
        UserError: matplotlib is not installed.
    """
    x = [float(p.n_edits) for p in points]
    shares = plot_curve(x, _curves(points), "edits", f"share ({name})")
    ratio = plot_curve(
        x, {"perplexity": [p.perplexity_ratio for p in points]}, "edits", "perplexity of neutral text, now over before"
    )
    return shares, ratio


def save_png(points: Sequence[Point], path: str | Path) -> None:
    """Write the collapse curve as a PNG file, whole or not at all.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = need("matplotlib.figure").Figure(figsize=(8, 4.5), facecolor="white")
    _plots._paint_curve(figure, [float(p.n_edits) for p in points], _curves(points), ("edits", "share"))
    with store.new_file(path) as new:
        figure.savefig(new, format="png", dpi=150)


_COLUMNS = (
    "edits",
    "efficacy, all so far",
    "efficacy, last batch",
    "neighbours kept",
    "next token kept",
    "perplexity x",
)


def collapse_report(
    points: Sequence[Point], model: str, method: str, summary: str, numbers: Mapping[str, Any] | None = None
) -> Report:
    """Make a report of a sequence: the curve, its numbers, and how to read them."""
    rows = tuple(tuple(p.to_dict().values()) for p in points)
    notes = (
        "Efficacy: the new answer is likelier than the old one, over facts that no later one supersedes.",
        "Neighbours kept: the neighbour's own answer is likelier than the edit's; one fixed sample throughout.",
        "Fluency kept: perplexity of neutral text before the first edit over the one now.",
    )
    pictures = plots(points, method) if points else ()
    table = Table("On the way", _COLUMNS, rows)
    return Report(
        f"Edits in sequence by {method}", summary, model, (table,) if rows else (), pictures, dict(numbers or {}), notes
    )


def write_report(report: Report, path: str | Path) -> None:
    """Write the report as one HTML file."""
    write_html(report, path)
