"""Plan what an edge's copy of a model does without: neurons and groups of heads, chosen by a score and a budget.

The width of the residual stream is never cut, so an adapter that was trained on the pruned model fits the whole one
after a mere scatter (`recover`). The plan holds the indices and stays with whoever made it; an edge is given the pruned
weights (`pruned.save_pruned`) and the plan's hash.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .. import store
from ..anatomy import describe
from ..errors import StoreError, UserError
from ..model import Model
from . import _widths
from ._inputs import Inputs, Text, inputs_key, observe_inputs
from ._scores import NEEDS_INPUTS, Score, unit_scores
from ._units import KeptUnits, Units, check_kept, dense_blocks, units_of
from .memory import MIB, Load, Peak, predicted

__all__ = [
    "Inputs", "KeptUnits", "PrunePlan", "Text", "measured_inputs", "open_plan", "plan_prune", "save_plan",
]  # fmt: skip

FORMAT = 1
Align = Literal["none", "bias", "lstsq", "distil"]


@dataclass(frozen=True)
class PrunePlan:
    """Which units of each block stay.

    Attributes:
        base: Fingerprint of the model before any change: what adapters name as their base.
        model: Fingerprint of the model whose weights are cut; differs from `base` after an edit.
        family: Its family.
        units: Key-value heads, neurons, query heads a key-value head, width of a head.
        attention: Whether attention is cut at all.
        kept: The units that stay, block by block.
        score: How they were chosen.
        align: What is done to the pruned weights before they are given out.
        settings: All other settings of the choice.
        seed: Of everything random.
        stats: Name, by content, of the activations that the score looked at; empty if it looked at none.
        ratio: Share of what could be pruned that is gone.
        peak: Predicted MiB at the peak of training, by what holds them.
        notes: What a reader should know, as sentences.
    """

    base: str
    model: str
    family: str
    units: tuple[int, int, int, int]
    attention: bool
    kept: tuple[KeptUnits, ...]
    score: str
    align: str = "none"
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    stats: str = ""
    ratio: float = 0.0
    peak: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values that JSON can hold."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {str(b): {"kv": list(k.kv), "ff": list(k.ff)} for b, k in enumerate(self.kept)}
        lists = {"units": list(self.units), "notes": list(self.notes)}
        dicts = {"settings": dict(self.settings), "peak": dict(self.peak)}
        return {"format": FORMAT, "kind": "plan", **plain, **lists, **dicts, "kept": kept}

    @property
    def widths(self) -> dict[int, tuple[int, int]]:
        """Head groups and neurons that stay, by block."""
        return {b: (len(k.kv), len(k.ff)) for b, k in enumerate(self.kept)}


def plan_prune(
    model: Model, *, budget_mib: float | None = None, ratio: float | None = None, score: Score = "wanda",
    align: Align = "bias", moments: Mapping[str, Inputs] | None = None, text: Text | None = None, load: Load | None = None,
    n_first: int | None = None, n_last: int | None = None, second_order: bool = False, seed: int = 0,
) -> PrunePlan:  # fmt: skip
    """Choose what of a model stays, for a class of edge; the model is not touched.

    Source:
        Units and recovery: LoRAM (ICLR 2025); scores: see `_scores`; the budget's arithmetic is ours.

    Args:
        model: The whole model.
        budget_mib: What an edge has at the peak of training, in MiB.
        ratio: In place of a budget: the share of the prunable numbers that goes, at most 0.85.
        score: How units are compared. ``flap`` also decides how much each block loses; all others prune evenly.
        align: What `align.aligned` will do to the pruned weights; part of the plan, so that the hash covers it.
        moments: What flows into ``attention.out`` and ``mlp.down``; by default it is measured over `text`.
        text: Public text for activations and gradients.
        load: How the edge will train: batch, tokens, rank, bytes a weight.
        n_first: Blocks at the beginning that stay whole; by default 8 %, at least one.
        n_last: Blocks at the end that stay whole; by default 4 %, at least one.
        second_order: For ``taylor``: with the second-order term.
        seed: Of the random score.

    Raises:
        UserError: Neither or both of budget and ratio are given, or no accepted plan meets them; the message names the
            smallest budget that works.
        ModelError: The model has nothing that can be pruned.
    """
    _check_request(budget_mib, ratio)
    load, text, units = load or Load(), text or Text(), units_of(model)
    dense = dense_blocks(model.anatomy.n_blocks, n_first, n_last)
    blocks = [b for b in range(model.anatomy.n_blocks) if b not in dense]
    if not blocks:
        raise UserError(
            f"{model.source} has {model.anatomy.n_blocks} blocks, and all of them stay whole "
            f"({len(dense)} at the ends). Set n_first and n_last lower."
        )
    costs, limit = _costs(model, units, blocks, load, budget_mib, ratio)
    gone = _widths.within(
        costs,
        units,
        len(blocks),
        limit,
        lambda least: _refusal(budget_mib, ratio, costs, units, blocks, least, predicted(model, units, {}, load).total),
    )
    kept, stats = dict[int, KeptUnits](), ""
    if gone:
        if score in NEEDS_INPUTS and moments is None:
            moments = measured_inputs(model, units, blocks, text)
        stats = inputs_key(moments) if moments is not None and score in NEEDS_INPUTS else ""
        rows = text.rows(model) if score == "taylor" else []
        found = unit_scores(
            model, units, score, blocks, inputs=moments, rows=rows, seed=seed, second_order=second_order
        )
        over = score == "flap"
        kept = (
            _widths.over_all(costs, units, found, limit) if over else _widths.by_block(costs, units, found, limit, gone)
        )
    each = tuple(kept.get(b, units.whole) for b in range(model.anatomy.n_blocks))
    settings = {
        "budget_mib": budget_mib, "ratio": ratio, "n_first": n_first, "n_last": n_last, "second_order": second_order,
        "load": vars(load), **text.key,
    }  # fmt: skip
    peak, share = _outcome(model, units, blocks, each, load)
    return PrunePlan(
        base=model.base_fingerprint, model=model.fingerprint, family=model.anatomy.family,
        units=(units.kv, units.ff, units.group, units.head), attention=units.attention, kept=each, score=score,
        align=align, settings=settings, seed=seed, stats=stats, ratio=share, peak=peak.to_dict(),
        notes=_notes(units, gone),
    )  # fmt: skip


def measured_inputs(model: Model, units: Units, blocks: list[int], text: Text) -> dict[str, Inputs]:
    """Measure what flows into the weights whose columns are cut."""
    parts = [p for p in units.parts if units.axis(p) == "columns"]
    return observe_inputs(model, [f"blocks.{b}.{p}" for b in blocks for p in parts], text)


# ---------------------------------------------------------------- the budget


def _check_request(budget_mib: float | None, ratio: float | None) -> None:
    if (budget_mib is None) == (ratio is None):
        raise UserError("Give budget_mib or ratio: one of them decides how much is pruned.")
    if budget_mib is not None and not 0 < budget_mib < math.inf:
        raise UserError(f"A budget in MiB must be a finite number above 0; got {budget_mib!r}.")
    if ratio is not None and not 0 <= ratio <= _widths.LARGEST_RATIO:
        raise UserError(f"ratio must be at least 0 and at most {_widths.LARGEST_RATIO}; got {ratio!r}.")


def _costs(
    model: Model, units: Units, blocks: list[int], load: Load, budget_mib: float | None, ratio: float | None
) -> tuple[_widths.Costs, float]:
    """Say what a unit costs, in bytes at the peak or in numbers, and what may be spent."""

    def spent(kv: float, ff: float) -> float:
        peak = predicted(model, units, dict.fromkeys(blocks, (kv, ff)), load)
        return peak.total if ratio is None else peak.weights / load.bytes_per_weight

    none = 0 if units.attention else units.kv
    fixed = spent(none, 0)
    kv = (spent(1, 0) - fixed) / len(blocks) if units.attention else 0.0
    costs = _widths.Costs(fixed, kv, (spent(none, 1) - fixed) / len(blocks))
    if ratio is None:
        assert budget_mib is not None
        return costs, budget_mib * MIB
    return costs, fixed + (1 - ratio) * len(blocks) * costs.block(units)


def _refusal(
    budget_mib: float | None,
    ratio: float | None,
    costs: _widths.Costs,
    units: Units,
    blocks: list[int],
    least: float,
    whole: float,
) -> str:
    if budget_mib is None:
        most = 1 - (least - costs.fixed) / (len(blocks) * costs.block(units))
        return f"A ratio of {ratio} would leave less than one unit a block; the largest that works here is {most:.3f}."
    return (
        f"A budget of {budget_mib:g} MiB would prune more than {_widths.LARGEST_RATIO:.0%} of what can be pruned. "
        f"The smallest that works is {math.ceil(least / MIB * 10) / 10:.1f} MiB, {math.ceil(1000 * least / whole) / 10:.1f}% of "
        f"the whole model's {whole / MIB:,.0f} MiB; or plan for other training: a smaller batch, fewer tokens, bytes_per_weight=2, "
        "checkpointing."
    )


def _outcome(
    model: Model, units: Units, blocks: list[int], kept: tuple[KeptUnits, ...], load: Load
) -> tuple[Peak, float]:
    """Predict the peak and count the share of the prunable numbers that is gone."""
    widths = {b: (float(len(kept[b].kv)), float(len(kept[b].ff))) for b in blocks}
    nothing = {b: (0.0 if units.attention else float(units.kv), 0.0) for b in blocks}
    whole, least, now = (predicted(model, units, w, load) for w in ({}, nothing, widths))
    return now, round((whole.weights - now.weights) / (whole.weights - least.weights), 6)


def _notes(units: Units, gone: float) -> tuple[str, ...]:
    if not gone:
        return ("Everything fits: nothing is pruned.",)
    return () if units.attention else (f"Only the feed-forward part is pruned: {units.reason}.",)


# ---------------------------------------------------------------- the plan as a file


def save_plan(plan: PrunePlan, path: str | Path) -> None:
    """Write a plan, with its hash, as one JSON file. It holds the indices: keep it away from the edges.

    Raises:
        StoreError: The file cannot be written.
    """
    store.write_json_atomic(path, plan.to_dict() | {"hash": plan.hash})


def open_plan(path: str | Path) -> PrunePlan:
    """Read a plan and check its indices and its hash.

    Raises:
        StoreError: The file is damaged, altered, or of another format.
    """
    record = store.read_json(path)
    if not isinstance(record, dict) or record.get("kind") != "plan" or record.get("format") != FORMAT:
        raise StoreError(f"{path} is no pruning plan of format {FORMAT}. Make it again with plan_prune.")
    try:
        kept = [
            KeptUnits(tuple(k["kv"]), tuple(k["ff"]))
            for _, k in sorted(record["kept"].items(), key=lambda i: int(i[0]))
        ]
        names = {f.name for f in fields(PrunePlan)} - {"kept", "units", "notes"}
        plain = {n: record[n] for n in names}
        plan = PrunePlan(**plain, kept=tuple(kept), units=tuple(record["units"]), notes=tuple(record["notes"]))
        kv, ff, group, head = plan.units
        reason = "" if plan.attention else "the plan says so"
        fault = check_kept(Units(kv, ff, group, head, (), reason), kept)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} lacks a part of a pruning plan or holds something else there: {error!r}.") from error
    if fault or plan.hash != record.get("hash"):
        raise StoreError(f"{path} was altered: {fault or 'its content does not match its hash'}. Take the original.")
    return plan


def check_plan(plan: PrunePlan, model: Model) -> Units:
    """Return the units of a model that a plan was made for.

    Raises:
        WrongBase: It was made for another model.
    """
    from ..errors import WrongBase

    if plan.model != model.fingerprint:
        raise WrongBase(
            f"This plan was made for model {plan.model[:6]} ({plan.family}); {model.source} is "
            f"{model.fingerprint[:6]} ({describe(model.network.config).family}). Open the model it was made for."
        )
    return units_of(model)
