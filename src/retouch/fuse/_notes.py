"""What a fusion says of itself: kept beside the result, whichever way it is kept, and shown in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report import Table
from .base import Adapter, FuseMethod, Resolver
from .certificate import Proof
from .tuning import Tuned

TOP = 10
_NUMBERS = {
    "kept_energy": ("What a smaller rank has kept", "share of the squared norm", False),
    "relative_error": ("How far the result lies from the mean", "share of the mean's norm", True),
}
"""What methods say of single weights: a title, what the number is, and whether a large one is bad."""


def fusion_notes(
    adapters: Sequence[Adapter], weights: Sequence[float], method: FuseMethod, resolver: Resolver | None,
    told: Mapping[str, Any], *, tuned: Tuned | None = None, proof: Proof | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Say what was fused, how, and what was found out on the way, in plain values.

    Args:
        adapters: The adapters.
        weights: Those they were fused with, also where the method chose them.
        method: The method, with the scale that was used.
        resolver: What stood before it.
        told: What the method itself says, of single weights or of its choice.
        tuned: How the scale was chosen.
        proof: The certificate.
    """
    notes = {
        **told,
        "adapters": [a.name for a in adapters],
        "weights": list(weights),
        "fused": {a.name: w for a, w in zip(adapters, weights)},
        "plans": sorted({a.plan for a in adapters if a.plan}),
        "method": method.label,
        "settings": method.to_dict(),
        "resolver": None if resolver is None else {"name": resolver.name, **resolver.to_dict()},
    }
    if tuned is not None:
        tried = [{"form": t.variant, "scale": t.lam, "n": t.n, "score": t.score} for t in tuned.tried]
        notes["tuned"] = {"form": tuned.variant, "tried": tried, "note": tuned.note}
    return notes if proof is None else {**notes, "proof": proof.to_dict()}


def notes_tables(notes: Mapping[str, Any]) -> list[Table]:
    """Show what a method says of single weights, of the weights that it chose, and of what each bound costs."""
    tables = [_worst(notes[what], *how) for what, how in _NUMBERS.items() if notes.get(what)]
    return tables + _weighed(notes)


def _worst(numbers: Mapping[str, float], title: str, what: str, large_is_bad: bool) -> Table:
    rows = tuple(sorted(numbers.items(), key=lambda row: (-row[1] if large_is_bad else row[1], row[0])))
    mean = sum(numbers.values()) / len(numbers)
    end = "highest" if large_is_bad else "lowest"
    many = f"; the {TOP} {end}" if len(rows) > TOP else ""
    return Table(title, ("weight", what), rows[:TOP], f"{mean:.3g} in the mean over {len(rows)} weights{many}.")


def _weighed(notes: Mapping[str, Any]) -> list[Table]:
    told = notes.get("weighing")
    if not told:
        return []
    rows = tuple(zip(notes["adapters"], notes["weights"]))
    tables = [Table("Weights that were chosen", ("adapter", "weight"), rows, "Chosen on selection questions.")]
    if "multipliers" in told:
        columns = ("multipliers", "harm", "harm_allowed", "drop", "reference")
        prices = tuple((domain, *(told[c][domain] for c in columns)) for domain in told["multipliers"])
        heads = ("domain", "multiplier", "harm in nats", "allowed", "drop", "against")
        tables.append(Table("What the bounds cost", heads, prices, told["meaning"]))
    return tables
