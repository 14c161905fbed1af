"""Why an edit holds or fails: drift of keys, what of a write arrives, the loss around a value, the shortcut index.

`diagnose` runs all of them on facts, for the unedited model or for a planned change; each can be had alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from .. import linalg, stats
from .._pictures import Picture
from .._plots import plot_bars, plot_curve, plot_heat
from ..change import Change, apply
from ..errors import UserError
from ..model import Model
from ..report import Report, Table
from ..tokens import Bos
from ._delivery import Delivered, Delivery, deliver, delivered_by
from ._drift import WRAPPINGS, Cosines, Drift, cosines, drift, wrappings
from ._landscape import Landscape, auc, crossing, landscape, top_curvature
from ._shortcut import Shortcut, shortcut
from .base import ValueEditMethod, block_at, down, require_decoder
from .facts import Fact
from .rows import grouped

__all__ = [
    "WRAPPINGS",
    "Cosines",
    "Delivered",
    "Delivery",
    "Diagnosis",
    "Drift",
    "Landscape",
    "Shortcut",
    "What",
    "auc",
    "cosines",
    "crossing",
    "deliver",
    "delivered_by",
    "diagnose",
    "drift",
    "landscape",
    "refuse_unknown",
    "shortcut",
    "top_curvature",
    "wrappings",
]

What = Literal["drift", "delivery", "landscape", "shortcut"]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was measured; None where it was not asked for.

    Attributes:
        model: Which model was looked at.
        method: The method of the change; empty without one.
        block: The block that the delivered fraction and the landscape belong to.
        drift: Drift of the keys under instructions.
        cosines: Nearness of other subjects' keys.
        delivery: Delivered fraction under each metric.
        delivered: What the change itself delivers, by weight.
        landscape: The loss around the values: of the change, or of values that were searched for it.
        shortcut: The shortcut index of the unedited model.
        shortcut_after: The same with the change.
        notes: What a reader has to know.
    """

    model: str
    method: str
    block: int
    drift: Drift | None = None
    cosines: Cosines | None = None
    delivery: Delivery | None = None
    delivered: dict[str, Delivered] | None = None
    landscape: Landscape | None = None
    shortcut: Shortcut | None = None
    shortcut_after: Shortcut | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        parts = ("drift", "cosines", "delivery", "landscape", "shortcut", "shortcut_after")
        found = {p: own.to_dict() for p in parts if (own := getattr(self, p)) is not None}
        head = {"model": self.model, "method": self.method, "block": self.block, "notes": list(self.notes)}
        told = {} if self.delivered is None else {"delivered": {n: dict(vars(d)) for n, d in self.delivered.items()}}
        return {**head, **found, **told}

    def report(self, *, pictures: bool = True) -> Report:
        """Make a report of everything; the pictures need the extra ``plot``."""
        return Report(
            title=f"Diagnosis of {self.model}" + (f" with a change by {self.method}" if self.method else ""),
            summary=" ".join(_sentences(self)) or "See the tables.",
            model=self.model,
            tables=tuple(tables(self)),
            pictures=tuple(_pictures(self)) if pictures else (),
            numbers=self.to_dict(),
            notes=self.notes,
        )


def diagnose(
    model: Model,
    facts: Sequence[Fact],
    change: Change | None = None,
    *,
    what: Sequence[What] = get_args(What),
    block: int = -1,
    subjects: Sequence[str] = (),
    statistics: bool = True,
    n_tokens: int = 0,
    settings: ValueEditMethod | None = None,
    n_samples: int = 10,
    seed: int = 0,
    bos: Bos = "tokenizer",
) -> Diagnosis:
    """Measure on facts why an edit of them holds or fails.

    Args:
        model: The unedited decoder.
        facts: Facts with a subject.
        change: A change that makes them true; None measures the model as it is, and searches values for the landscape.
        what: Which diagnostics.
        block: Where a write goes; -1: the last block that the change writes, or 0.18 of the depth.
        subjects: Other subjects for the cosines; see `cosines`.
        statistics: Collect the block's second moment (or take it from the cache), for the metrics covariance and
            nullspace and the whitened drift.
        n_tokens: Tokens for the second moment; 0 for the default.
        settings: Of the search for values; see `landscape`.
        n_samples: Draws of the noise for the shortcut index.
        seed: Of everything random.
        bos: Beginning-of-text rule.

    Raises:
        FactError: There are no facts, or one has no subject.
        UserError: `what` holds an unknown name.
        WrongBase: The change was planned for another model.
    """
    require_decoder(model, "diagnose")
    refuse_unknown(what)
    edited = apply(model, change) if change is not None else None
    at = _block(model, change, block)
    found: dict[str, Any] = {}
    moment = None
    if statistics and {"drift", "delivery"} & set(what):
        name = down(at)
        moment = stats.collect(model, [name], n_tokens=n_tokens or None, bos=bos)[name].mean
    if "drift" in what:
        metrics: dict[int, linalg.Metric] = {} if moment is None else {at: linalg.Covariance.from_moment(moment)}
        found["drift"] = drift(model, facts, metrics=metrics, bos=bos)
        found["cosines"] = cosines(model, facts, subjects, bos=bos)
    if "delivery" in what:
        found["delivery"] = deliver(model, facts, at, moment=moment, bos=bos)
        found["delivered"] = None if change is None else delivered_by(model, change, facts, bos=bos)
    if "landscape" in what:
        found["landscape"] = _landscape(edited or model, facts, at, edited is not None, settings, seed)
    if "shortcut" in what:
        found["shortcut"] = shortcut(model, facts, n_samples=n_samples, seed=seed, bos=bos)
        if edited is not None:
            found["shortcut_after"] = shortcut(edited, facts, n_samples=n_samples, seed=seed, bos=bos)
    method = "" if change is None else change.method
    return Diagnosis(model.source, method, at, **found, notes=tuple(_notes(found)))


def refuse_unknown(what: Sequence[str]) -> None:
    """Refuse names that no diagnostic has.

    Raises:
        UserError: With the first of them.
    """
    if bad := [w for w in what if w not in get_args(What)]:
        raise UserError(f"There is no diagnostic {bad[0]!r}. Known: {', '.join(get_args(What))}.")


def _block(model: Model, change: Change | None, wanted: int) -> int:
    written = (
        [model.anatomy.block_of(n.removesuffix(":bias")) for n in change.parts if n.startswith("blocks.")]
        if change
        else []
    )
    return max(written) if wanted < 0 and written else block_at(wanted, 0.18, model.anatomy, "block")


def _landscape(
    model: Model, facts: Sequence[Fact], block: int, edited: bool, settings: ValueEditMethod | None, seed: int
) -> Landscape:
    """Look around the state that an edited model already has, or around a value that is searched for."""
    zero = torch.zeros(len(grouped(facts)), model.anatomy.d_model) if edited else None
    return landscape(model, facts, block, delta=zero, settings=settings, seed=seed)


def _notes(found: dict[str, Any]) -> list[str]:
    notes = list(found["delivery"].notes) if found.get("delivery") else []
    for name, when in (("shortcut", "before the change"), ("shortcut_after", "after it")):
        if found.get(name):
            notes += [f"No shortcut index {when}: {why}" for why in found[name].left_out]
    return notes


# ---------------------------------------------------------------- for people


def _sentences(d: Diagnosis) -> list[str]:
    said = []
    if d.delivery is not None:
        right = "and it does" if d.delivery.predicted == d.delivery.observed else f"but {d.delivery.observed} does"
        said.append(f"Drift predicts that the {d.delivery.predicted} metric delivers best, {right}.")
    if d.landscape is not None and d.landscape.auc is not None:
        said.append(f"Tolerance over drift tells where the answer stays with an AUC of {d.landscape.auc:.2f}.")
    if d.shortcut is not None and d.shortcut.index is not None:
        after = d.shortcut_after.index if d.shortcut_after is not None else None
        said.append(
            f"Shortcut index {d.shortcut.index:.2f}"
            + (f", after the change {after:.2f}." if after is not None else ".")
        )
    return said


def tables(d: Diagnosis) -> list[Table]:
    """Return what a person reads, a table a diagnostic."""
    found = []
    if d.drift is not None and d.cosines is not None:
        found.append(_drift_table(d.drift, d.cosines))
    if d.delivery is not None:
        found.append(_delivery_table(d.delivery))
    if d.delivered:
        rows = tuple((n, v.place, v.alpha, v.off) for n, v in d.delivered.items())
        columns = ("weight", "heard at", "mean fraction", "mean abs(fraction - 1)")
        found.append(Table("What the change delivers behind an instruction", columns, rows, "1 is all of it."))
    if d.landscape is not None:
        found += _landscape_tables(d.landscape)
    for title, own in (("Shortcut index", d.shortcut), ("Shortcut index with the change", d.shortcut_after)):
        if own is not None and own.facts:
            back = tuple((f.prompt, f.answer, f.subject, f.relation, f.index) for f in own.facts)
            heads = ("prompt", "answer", "from the subject", "from the relation", "index")
            found.append(
                Table(title, heads, back, "Probability that one token brings back; 1: the subject does it alone.")
            )
    return found


def _drift_table(drift: Drift, cosines: Cosines) -> Table:
    columns = (
        "block",
        "drift at the subject",
        "drift at the prompt's end",
        "other subjects",
        "other subjects, prompt's end",
    )
    numbers = zip(*drift.by_block(), cosines.subject, cosines.prompt)
    rows = tuple((str(b), *row) for b, row in enumerate(numbers))
    white = "".join(f" Whitened drift at block {b}: {v:.3g}." for b, v in drift.whitened.items())
    caption = (
        f"Drift in lengths of the key, mean over {len(drift.wrappings)} texts; cosine with other subjects' keys.{white}"
    )
    return Table("Keys", columns, rows, caption)


def _delivery_table(delivery: Delivery) -> Table:
    columns = (
        "metric",
        "mean abs(fraction - 1)",
        "mean fraction",
        "cross talk",
        "predicted error",
        "amplification",
        "at most",
    )
    rows = tuple(
        (n, r.off, r.alpha, r.cross_talk, r.expected, r.amplification, r.bound) for n, r in delivery.rows.items()
    )
    caption = (
        f"Delivered fraction of a write at block {delivery.block} on {delivery.n_texts[0]} texts that were held out; the "
        f"drift metric and the prediction come from {delivery.n_texts[1]} others. 1 is exact."
    )
    return Table("Delivered fraction", columns, rows, caption)


def _landscape_tables(own: Landscape) -> list[Table]:
    subjects = tuple(
        (s.subject, s.n_facts, _mean(s.cosines_before), _mean(s.cosines), s.sharpness, s.norm_ratio, s.loss)
        for s in own.subjects
    )
    columns = ("subject", "facts", "gradient cosine, no value", "at the value", "sharpness", "value / state", "loss")
    facts = tuple((f.prompt, f.lead, f.first_order, f.least, f.median, _mean(f.hits)) for f in own.facts)
    heads = ("prompt", "lead", "tolerance, first order", "least of 16", "median of 16", "answer stays")
    hits = [h for f in own.facts for h in f.hits]
    chance = f"AUC {'none' if own.auc is None else f'{own.auc:.3f}'} with {len(hits) - sum(hits)} of {len(hits)} lost"
    first = own.aucs["first_order"]
    chance += "" if first is None else f", {first:.3f} by the first-order tolerance"
    caption = (
        f"Tolerance in the units of the state after block {own.block}. Tolerance over drift above 1 predicts that the answer "
        f"stays: right for {own.accuracy:.0%} of texts, {chance}."
    )
    return [Table("Loss around the values", columns, subjects), Table("Tolerance", heads, facts, caption)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _pictures(d: Diagnosis) -> list[Picture]:
    drawn = []
    if d.drift is not None and d.cosines is not None:
        subject, prompt = d.drift.by_block()
        blocks = range(len(subject))
        at = {"at the subject": subject, "at the prompt's end": prompt}
        least = min(blocks, key=lambda b: subject[b])
        title = f"The subject's key moves least at block {least}, by {subject[least]:.2g} of its length."
        drawn.append(plot_curve(blocks, at, "block", "drift of the key in its lengths", title))
        at = {"at the subject": list(d.cosines.subject), "at the prompt's end": list(d.cosines.prompt)}
        least = min(blocks, key=lambda b: d.cosines.subject[b] if d.cosines else 0.0)
        title = f"Keys of subjects differ most at block {least}, cosine {d.cosines.subject[least]:.2g}."
        drawn.append(plot_curve(blocks, at, "block", "cosine with other subjects' keys", title))
        drawn.append(_drift_map(d.drift))
    if d.delivery is not None:
        bars = {"mean abs(fraction - 1)": "off", "predicted error": "expected", "amplification": "amplification"}
        values = {title: {n: getattr(r, f) for n, r in d.delivery.rows.items()} for title, f in bars.items()}
        title = f"The {d.delivery.observed} metric delivers best behind texts that it has not seen."
        drawn.append(plot_bars(values, title))
    if d.shortcut is not None and d.shortcut.index is not None:
        both = {"before": d.shortcut, "with the change": d.shortcut_after}
        indices = {name: own.index for name, own in both.items() if own is not None}
        drawn.append(plot_bars({"shortcut index": indices}, "How far answers hang on the subject alone."))
    return drawn


def _drift_map(drift: Drift) -> Picture:
    caption = "Drift of the key at the subject's last token, a row a text before the prompt, a column a block."
    title = "How far each text before the prompt moves the key."
    return plot_heat([repr(t)[1:-1] for t in drift.wrappings], drift.subject, "block", title, caption)
