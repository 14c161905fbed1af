"""Which changes a model carries, in order; undo any one of them exactly, or one fact of it.

The ledger keeps the unchanged value of every weight it ever touched and recomposes from there, so a weight depends
only on the set of changes in force: undo is bit-exact, in any order.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import change as changes
from . import store
from .change import Change
from .compare import difference, survival
from .entry import Entry, load_entry
from .errors import StoreError, UnknownName
from .model import Model, open_model
from .parting import bound_facts, columns_of, identities, without

__all__ = ["Entry", "Ledger", "Policy", "carried", "difference", "open_ledger", "read_log", "save_ledger", "survival"]

FORMAT = 1
Policy = Literal["replace", "stack"]
"""What becomes of a fact that is edited again: taken out first, or left in the weights below the new one."""


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

    @property
    def base(self) -> Model:
        """The model without any change."""
        return self._recomposed(self.originals, (), self.originals).model if self.active else self.model

    @property
    def last(self) -> int:
        """The largest number given so far."""
        return max((e.number for e in self.entries), default=0)

    def previous(self, number: int | None = None, *, below: int | None = None) -> dict[str, Tensor]:
        """Return the keys that a plan has to keep, by weight, (inputs, p).

        Stale keys are not among them: those of facts that were undone, or that a later fact supersedes.

        Args:
            number: As they were when this line came; by default as they are now.
            below: Only those of lines before this one.
        """
        found: dict[str, list[Tensor]] = {}
        for entry, facts in self._fresh(number):
            if below is not None and entry.number >= below:
                continue
            columns = columns_of(entry.planned)
            kept = [j for j, group in enumerate(columns or ()) if facts & set(group)]
            for name, keys in entry.planned.keys.items():
                found.setdefault(name, []).append(keys if columns is None else keys[:, kept])
        return {name: torch.cat(keys, 1) for name, keys in found.items()}

    def keys(self, name: str) -> Tensor | None:
        """Return the keys that facts in force set at a weight, (inputs, n): a later solve must keep them."""
        return self.previous().get(name)

    def _fresh(self, number: int | None = None) -> list[tuple[Entry, set[int]]]:
        """Facts in force that no later fact in force is about."""
        at = self.last + 1 if number is None else number
        taken: set[tuple[str, str, str]] = set()
        found = []
        for entry in sorted(self.entries, key=lambda e: -e.number):
            held = [i for i in range(len(entry.planned.facts)) if entry.held(i, at)]
            about = {i: identities(entry.planned.facts[i]) for i in held}
            fresh = {i for i in held if not about[i] & taken}
            taken.update(*about.values())
            in_force = entry.number < at and (entry.until is None or entry.until >= at)
            if fresh or (in_force and not entry.planned.facts):
                found.append((entry, fresh))
        return found[::-1]

    def conflicts(self, facts: Iterable[Mapping[str, Any]]) -> dict[int, set[int]]:
        """Find the facts in force that new facts supersede, by line: same subject, and same relation or template."""
        about = set().union(*map(identities, facts))
        found = {}
        for entry in self.entries:
            numbers = entry.facts if entry.active else []
            if stale := {i for i in numbers if identities(entry.planned.facts[i]) & about}:
                found[entry.number] = stale
        return found

    def supersede(self, facts: Iterable[Mapping[str, Any]]) -> tuple[Ledger, list[Mapping[str, Any]]]:
        """Take out the facts in force that new facts are about, so that these can be planned without them.

        Args:
            facts: The new facts, as plain records.

        Returns:
            The ledger without them; and other facts that had to go too, because they shared one value with a stale one:
            they belong into the new plan.
        """
        ledger, again = self, list[Mapping[str, Any]]()
        for number, stale in self.conflicts(facts).items():
            entry = ledger._entry(number)
            local = {n: i for i, n in enumerate(entry.facts)}
            gone = {entry.facts[j] for i in stale for j in bound_facts(entry.change, local[i])}
            again += [entry.planned.facts[i] for i in sorted(gone - stale)]
            ledger = ledger._without(entry, gone, "superseded")
        return ledger, again

    def apply(self, change: Change, when: str | None = None, policy: Policy | None = None) -> Ledger:
        """Add a change.

        Args:
            change: Planned on this ledger's model.
            when: Time of the line; by default now.
            policy: What becomes of facts in force that the change is about too. ``"stack"`` leaves them in the weights,
                below the new ones; ``"replace"`` takes them out, for a change that was planned without them. By default
                the change's own record of what it was planned without decides (``notes["supersedes"]``).

        Raises:
            WrongBase: It was planned for another model.
            StoreError: It is in force already.
            NoEffect: The weights did not become what was planned.
        """
        changes.check_base(self.model, change)
        if any(c.id == change.id for c in self.active):
            number = next(e.number for e in self.entries if e.active and e.change.id == change.id)
            raise StoreError(
                f"Change {change.id} is in force already, as number {number}. Undo that first, or plan anew."
            )
        planned_without = set(change.notes.get("supersedes", ()))
        if policy == "replace" or (policy is None and planned_without):
            stale = {n: self._entry(n).change.id for n in self.conflicts(change.facts)}
            if policy == "replace" or set(stale.values()) <= planned_without:
                return self.supersede(change.facts)[0].apply(change, when, "stack")
        originals = {n: changes.matrix_of(self.model, n).clone() for n in change.parts if n not in self.originals}
        stamp = when or datetime.now(UTC).isoformat(timespec="seconds")
        seen = {n: _output(self.model, n, keys) for n, keys in change.keys.items()}
        entry = Entry(self.last + 1, change, stamp, seen=seen)
        new = self._recomposed({**self.originals, **originals}, (*self.entries, entry), change.parts)
        changes.prove_stored(self.model, new.model, change)
        return new

    def undo(self, number: int, fact: int | None = None) -> Ledger:
        """Take one change, or one fact of it, out of force.

        All other changes stay bit for bit as if it had never been applied. The other facts of the same change stay as
        planned in an equality write; in a least-squares one they are solved again from their keys and targets.

        Args:
            number: The change's number.
            fact: The fact's number in the change, from 0; None takes out the whole change.

        Raises:
            UnknownName: There is no active change, or no fact in force, of that number.
            UserError: The fact shares its value with others, or the change keeps no targets.
        """
        found = [e for e in self.entries if e.number == number]
        if not found or not found[0].active:
            why = f"was {found[0].status} already" if found else "does not exist"
            known = ", ".join(str(e.number) for e in self.entries if e.active) or "none"
            raise UnknownName(f"Change number {number} {why}. Active: {known}. See: retouch log")
        if fact is not None and fact not in found[0].facts:
            known = ", ".join(map(str, found[0].facts))
            raise UnknownName(
                f"Change number {number} has no fact {fact} in force. In force: {known}. See: retouch log"
            )
        return self._without(found[0], set(found[0].facts) if fact is None else {fact}, "undone")

    def _entry(self, number: int) -> Entry:
        return next(e for e in self.entries if e.number == number)

    def _without(self, entry: Entry, facts: Collection[int], status: str) -> Ledger:
        if set(facts) >= set(entry.facts):
            return self.replaced(replace(entry, status=status, until=self.last))
        places = {n: i for i, n in enumerate(entry.facts)}
        # from what was planned, so that the order of several removals leaves no trace, unless it was solved again since
        source = entry.change if entry.change.notes.get("resolved") else entry.planned
        gone = {places[i] for i in facts} if source is entry.change else {*facts, *entry.removed}
        removed = {**entry.removed, **dict.fromkeys(facts, (status, self.last))}
        return self.replaced(replace(entry, change=without(source, gone), removed=dict(sorted(removed.items()))))

    def replaced(self, entry: Entry) -> Ledger:
        """Return the ledger with another line of the same number."""
        entries = tuple(entry if e.number == entry.number else e for e in self.entries)
        return self._recomposed(self.originals, entries, entry.planned.parts)

    def _recomposed(
        self, originals: Mapping[str, Tensor], entries: tuple[Entry, ...], touched: Collection[str]
    ) -> Ledger:
        values = changes.compose(
            self.model, {n: originals[n] for n in touched}, [e.change for e in entries if e.active]
        )
        model = self.model.with_weights(values, self.model.base_fingerprint)
        if model.fingerprint == model.base:
            model = replace(model, base=None)
        return Ledger(model, entries, originals)

    def to_dict(self) -> dict[str, Any]:
        """Return the whole list for programs.

        A change that a later one has been stacked on is ``superseded``, and ``in_force``; where that holds for some of
        its facts only, ``stale`` lists their numbers.
        """
        fresh = {e.number: facts for e, facts in self._fresh()}
        lines = []
        for entry in self.entries:
            line = entry.to_dict()
            stale = [i for i in entry.facts if entry.active and i not in fresh.get(entry.number, set())]
            if stale and len(stale) == len(entry.facts):
                line |= {"status": "superseded", "in_force": True}
            elif stale:
                line["stale"] = stale
            lines.append(line)
        return {"base": self.model.base_fingerprint, "changes": lines}


def _output(model: Model, name: str, keys: Tensor) -> Tensor:
    return (changes.matrix_of(model, name).double().cpu() @ keys.double()).float()


def save_ledger(
    ledger: Ledger,
    path: str | Path,
    *,
    dtype: str | None = None,
    report: Mapping[str, Any] | None = None,
    found: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write a model folder that any Hugging Face loader opens and that carries its ledger.

    Args:
        ledger: What to write.
        path: The folder; an existing model folder of ours is replaced in one step.
        dtype: Type of the stored weights; by default the file type the model came in.
        report: Measurements to keep beside.
        found: The changes that the folder carried when the work began, from `carried`. If it carries others by now,
            another process has written it, whose work would be lost.

    Raises:
        StoreError: The folder holds something else, was written meanwhile, or cannot be written.
    """
    path = Path(path)
    carried(path)  # refuses to replace something else
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
        if found is not None and carried(path) != list(found):  # the lock is held from here to the swap
            raise StoreError(
                f"{path} was written by another process meanwhile, so nothing was changed here. Give the command again."
            )
        ledger.model.save_files(folder, dtype)
        (folder / "retouch.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        (folder / "README.md").write_text(_card(ledger), encoding="utf-8")
        (folder / "ledger").mkdir()
        store.save_tensors(folder / "ledger" / "originals.safetensors", dict(ledger.originals))
        outputs = {f"{e.number}/{n}": t for e in ledger.entries for n, t in e.seen.items()}
        store.save_tensors(folder / "ledger" / "outputs.safetensors", outputs)
        for entry in ledger.entries:
            for change in {c.id: c for c in (entry.change, entry.planned)}.values():
                changes.save(change, folder / "ledger" / f"{entry.number:04d}-{change.id}")


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
        seen = _seen(path / "ledger" / "outputs.safetensors")
        entries = tuple(load_entry(path / "ledger", line, seen) for line in record["changes"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: retouch.json is no record of a changed model ({error!r}).") from error
    ledger = Ledger(model, entries, originals)
    if odd := originals.keys() ^ {n for e in entries for n in e.planned.parts}:
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


def _seen(path: Path) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in (store.load_tensors(path) if path.is_file() else {}).items():
        number, _, name = key.partition("/")
        found.setdefault(int(number), {})[name] = value
    return found


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
        if not (path / "config.json").is_file():
            raise StoreError(f"{path} holds no model: it has no config.json. A log stands beside a model.")
        return {"base": None, "changes": []}
    record = store.read_json(path / "retouch.json")
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind != "model" or not isinstance(record.get("changes"), list):
        raise StoreError(f"{path} holds no model of ours (kind {kind!r}). See a change: retouch show {path}")
    return {"base": record["base"], "changes": record["changes"]}


def carried(path: Path) -> list[dict[str, Any]]:
    """Read the changes of a model folder, in order; none where no model of ours is yet.

    Raises:
        StoreError: What is there is a change, or its record is damaged.
    """
    if not (path / "retouch.json").is_file():
        return []
    record = store.read_json(path / "retouch.json")
    if not isinstance(record, dict) or record.get("kind") != "model":
        raise StoreError(f"{path} holds a change, which the model would replace. Name another folder.")
    return list(read_log(path)["changes"])


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
    for e in ledger.to_dict()["changes"]:
        lines.append(f"| {e['number']} | {e['id']} | {e['method']} | {len(e['facts'])} | {e['status']} |")
    return "\n".join([*lines, ""])
