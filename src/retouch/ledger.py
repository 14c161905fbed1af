"""Which changes a model carries, in order; undo any one of them exactly.

The ledger keeps the unchanged value of every weight it ever touched and recomposes from there, so a weight depends
only on the set of changes in force: undo is bit-exact, in any order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import change as changes
from . import store
from .change import Change
from .errors import NoEffect, StoreError, UnknownName
from .model import Model, open_model

__all__ = ["Entry", "Ledger", "difference", "open_ledger", "read_log", "save_ledger", "survival"]

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Entry:
    """One line of a ledger."""

    number: int
    change: Change
    when: str
    active: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the line for programs."""
        return {
            "number": self.number,
            "id": self.change.id,
            "method": self.change.method,
            "status": "active" if self.active else "undone",
            "when": self.when,
            "facts": [dict(f) for f in self.change.facts],
        }


@dataclass(frozen=True, eq=False)
class Ledger:
    """A model and the changes it carries. Every operation returns a new ledger.

    Attributes:
        model: The model with all active changes in it.
        entries: The changes, by number from 1; undone ones stay listed.
        originals: The unchanged value of every weight that an entry touches, as (outputs, inputs), by our names.
    """

    model: Model
    entries: tuple[Entry, ...] = ()
    originals: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def active(self) -> list[Change]:
        """The changes in force."""
        return [e.change for e in self.entries if e.active]

    def keys(self, name: str) -> Tensor | None:
        """Return the keys that active changes set at a weight, (inputs, n): a later solve must keep them."""
        found = [c.keys[name] for c in self.active if name in c.keys]
        return torch.cat(found, 1) if found else None

    def apply(self, change: Change, when: str | None = None) -> Ledger:
        """Add a change.

        Raises:
            WrongBase: It was planned for another model.
            NoEffect: It is in force already, or the weights did not become what was planned.
        """
        changes.check_base(self.model, change)
        if any(c.id == change.id for c in self.active):
            number = next(e.number for e in self.entries if e.active and e.change.id == change.id)
            raise NoEffect(
                f"Change {change.id} is in force already, as number {number}. Undo that first, or plan anew."
            )
        originals = {n: changes._matrix(self.model, n).clone() for n in change.parts if n not in self.originals}
        stamp = when or datetime.now(UTC).isoformat(timespec="seconds")
        entry = Entry(max((e.number for e in self.entries), default=0) + 1, change, stamp)
        new = self._recomposed({**self.originals, **originals}, (*self.entries, entry), change)
        changes.prove_stored(self.model, new.model, change)
        return new

    def undo(self, number: int) -> Ledger:
        """Take one change out of force; all others stay bit for bit as if it had never been applied.

        Raises:
            UnknownName: There is no active change of that number.
        """
        found = [e for e in self.entries if e.number == number]
        if not found or not found[0].active:
            why = "was undone already" if found else "does not exist"
            known = ", ".join(str(e.number) for e in self.entries if e.active) or "none"
            raise UnknownName(f"Change number {number} {why}. Active: {known}. See: retouch log")
        entries = tuple(replace(e, active=False) if e.number == number else e for e in self.entries)
        return self._recomposed(self.originals, entries, found[0].change)

    def _recomposed(self, originals: Mapping[str, Tensor], entries: tuple[Entry, ...], touched: Change) -> Ledger:
        active = [e.change for e in entries if e.active]
        wanted = {n: originals[n] for n in touched.parts}
        model = self.model.with_weights(changes.compose(self.model, wanted, active), self.model.base_fingerprint)
        if model.fingerprint == model.base:
            model = replace(model, base=None)
        return Ledger(model, entries, originals)

    def to_dict(self) -> dict[str, Any]:
        """Return the whole list for programs."""
        return {"base": self.model.base_fingerprint, "changes": [e.to_dict() for e in self.entries]}


def save_ledger(
    ledger: Ledger, path: str | Path, *, dtype: str | None = None, report: Mapping[str, Any] | None = None
) -> None:
    """Write a model folder that any Hugging Face loader opens and that carries its ledger.

    Args:
        ledger: What to write.
        path: The folder; an existing model folder of ours is replaced in one step.
        dtype: Type of the stored weights; by default the file type the model came in.
        report: Measurements to keep beside.
    """
    path = Path(path)
    if (path / "retouch.json").is_file() and store.read_json(path / "retouch.json").get("kind") != "model":
        raise StoreError(f"{path} holds a change, which the model would replace. Name another folder.")
    dtype = dtype or ledger.model.file_dtype
    record = {
        "format": FORMAT,
        "kind": "model",
        "dtype": dtype,
        "versions": changes.versions(),
        "report": dict(report or {}),
        **ledger.to_dict(),
    }
    with store.writing(path) as folder:
        ledger.model.save_files(folder, dtype)
        (folder / "retouch.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        (folder / "README.md").write_text(_card(ledger), encoding="utf-8")
        (folder / "ledger").mkdir()
        store.save_tensors(folder / "ledger" / "originals.safetensors", dict(ledger.originals))
        for entry in ledger.entries:
            changes.save(entry.change, folder / "ledger" / f"{entry.number:04d}-{entry.change.id}")


def open_ledger(source: str | Path) -> Ledger:
    """Open a model with the changes it carries; a model without a ledger has an empty one.

    Raises:
        StoreError: The ledger is damaged, or the stored weights are not what it says.
    """
    model = open_model(source)
    path = Path(source)
    if not (path / "ledger").is_dir():
        return Ledger(model)
    record = store.read_json(path / "retouch.json")
    originals = store.load_tensors(path / "ledger" / "originals.safetensors")
    try:
        kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[record["dtype"]]
        entries = tuple(_entry(path / "ledger", line) for line in record["changes"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: retouch.json is no record of a changed model ({error!r}).") from error
    ledger = Ledger(model, entries, originals)
    if odd := originals.keys() ^ {n for e in entries for n in e.change.parts}:
        raise StoreError(f"{path}: the originals do not fit the changes at {min(odd)}. The record was altered.")
    values = changes.compose(model, originals, ledger.active)
    exact = True
    for name, value in values.items():
        stored = model.network.get_parameter(name)
        exact = exact and torch.equal(value, stored)
        # another processor may sum a product in another order: the last bit may differ, and one step of the file's type
        if not torch.allclose(value.to(kind).float(), stored, rtol=2 * torch.finfo(kind).eps, atol=1e-7):
            raise StoreError(f"{path}: the stored weight {name} is not what the ledger's changes make. It was altered.")
    if not exact:  # work on the exact values; cast ones are for those who only read
        ledger = replace(ledger, model=model.with_weights(values, record["base"]))
    return ledger


def _entry(folder: Path, line: Mapping[str, Any]) -> Entry:
    change = changes.load(folder / f"{line['number']:04d}-{line['id']}")
    return Entry(line["number"], change, line["when"], line["status"] == "active")


def read_log(path: Path) -> dict[str, Any]:
    """Read which changes a model folder carries, without its weights.

    Raises:
        UnknownName: There is no such folder.
        StoreError: Its record is damaged.
    """
    if not path.is_dir():
        raise UnknownName(
            f"There is no model folder {str(path)!r}. A log stands in a folder that `retouch apply` wrote."
        )
    if not (path / "retouch.json").is_file():
        return {"base": None, "changes": []}
    record = store.read_json(path / "retouch.json")
    if not isinstance(record, dict) or record.get("kind") != "model" or not isinstance(record.get("changes"), list):
        raise StoreError(
            f"{path} holds no model of ours (kind {record.get('kind')!r}). See a change: retouch show {path}"
        )
    return {"base": record["base"], "changes": record["changes"]}


def survival(ledger: Ledger, dtype: str | None = None, *, accept_loss: bool = False) -> dict[str, float]:
    """Measure how much of the active changes a file type swallows.

    Args:
        ledger: The model and its changes.
        dtype: Type of the stored weights; by default the file type the model came in.
        accept_loss: Return the loss instead of refusing it.

    Returns:
        For each changed weight ‖cast(W) - W‖ / ‖W - W0‖; empty for float32, which loses nothing.

    Raises:
        NoEffect: More than one percent of a change would be lost.
        StoreError: There is no such type.
    """
    dtype = dtype or ledger.model.file_dtype
    if dtype not in ("float32", ledger.model.file_dtype):
        own = dict.fromkeys(["float32", ledger.model.file_dtype])
        raise StoreError(
            f"This model's weights can be stored as {' or '.join(own)}; got {dtype!r}, which would round every weight and "
            "not only the changed ones."
        )
    if dtype == "float32":
        return {}
    touched = {n for c in ledger.active for n in c.parts}
    lost = changes.cast_error(ledger.model, {n: ledger.originals[n] for n in touched}, dtype)
    if (
        (worst := max(lost, key=lambda n: lost[n], default=None))
        and lost[worst] > changes.TOLERANCE
        and not accept_loss
    ):
        raise NoEffect(
            f"Stored as {dtype}, {worst} would lose {lost[worst]:.0%} of its change. Store float32 (--dtype float32), keep "
            "the change beside the model (retouch ask --change, or as a LoRA adapter), or accept it (--accept-loss)."
        )
    return lost


def difference(one: Model, two: Model) -> list[dict[str, Any]]:
    """List the weights in which two models differ, largest share first.

    Raises:
        UnknownName: The models are not of one shape.
    """
    first = dict(one.network.named_parameters())
    second = dict(two.network.named_parameters())
    if {n: p.shape for n, p in first.items()} != {n: p.shape for n, p in second.items()}:
        raise UnknownName(f"{one.source} and {two.source} are not of one shape, so their weights cannot be compared.")
    rows = []
    for name, old in first.items():
        new = second[name]
        if torch.equal(old, new):
            continue
        delta = (new - old).double()
        size = float(delta.norm())
        share = size / float(old.double().norm()) if old.any() else float("inf")
        rows.append({"weight": name, "frobenius": size, "share": share, "largest": float(delta.abs().max())})
    return sorted(rows, key=lambda r: -float(r["share"]))


def _card(ledger: Ledger) -> str:
    lines = [
        f"# {Path(ledger.model.source).name}, changed with Retouch",
        "",
        f"{len(ledger.active)} changes in force of {len(ledger.entries)} ever made. `retouch log` lists them, `retouch undo` "
        "takes any one of them out, bit for bit.",
        "",
        "| number | id | method | facts | status |",
        "| --- | --- | --- | --- | --- |",
    ]
    for e in ledger.entries:
        status = "active" if e.active else "undone"
        lines.append(f"| {e.number} | {e.change.id} | {e.change.method} | {len(e.change.facts)} | {status} |")
    return "\n".join([*lines, ""])
