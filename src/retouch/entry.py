"""A line of a ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from . import change as changes
from .change import Change

__all__ = ["Entry", "facts_in_words", "load_entry", "status_in_words"]


@dataclass(frozen=True, eq=False)
class Entry:
    """One line of a ledger.

    Attributes:
        number: From 1, never used again.
        change: What is in the weights while the line is active: what was planned, less the facts that were taken out.
        when: Time of the line.
        status: ``active``, ``undone``, or ``superseded`` by a later fact.
        until: Number of the last line at the time when this one was taken out.
        planned: The change as it was planned; facts are counted in it.
        removed: Facts taken out one by one: for each number its status and, as above, until when it was in force.
        seen: What each weight made of the planned keys right before, (outputs, n): a re-solve starts from it.
    """

    number: int
    change: Change
    when: str
    status: str = "active"
    until: int | None = None
    planned: Change = None  # type: ignore[assignment]
    removed: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    seen: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "planned", self.planned or self.change)

    @property
    def active(self) -> bool:
        """Whether the line's change is in the weights."""
        return self.status == "active"

    @property
    def facts(self) -> list[int]:
        """Numbers of the facts that were not taken out one by one."""
        return [i for i in range(len(self.planned.facts)) if i not in self.removed]

    def held(self, fact: int, number: int) -> bool:
        """Whether a fact was in force when line `number` came."""
        ends = [self.until, self.removed[fact][1] if fact in self.removed else None]
        return self.number < number and all(end is None or end >= number for end in ends)

    def to_dict(self) -> dict[str, Any]:
        """Return the line for programs."""
        line = {
            "number": self.number,
            "id": self.change.id,
            "method": self.change.method,
            "status": self.status,
            "when": self.when,
            "facts": [dict(f) for f in self.change.facts],
        }
        if self.until is not None:
            line["until"] = self.until
        if self.planned is not self.change:
            line["planned"] = self.planned.id
        if self.removed:
            gone = self.removed.items()
            line["removed"] = [{"fact": i, "status": s, "until": u, **self.planned.facts[i]} for i, (s, u) in gone]
        return line


def load_entry(folder: Path, line: Mapping[str, Any], seen: Mapping[int, Mapping[str, Tensor]]) -> Entry:
    """Read a line's changes from the folder of a ledger."""
    number = line["number"]
    planned = changes.load(folder / f"{number:04d}-{line.get('planned', line['id'])}")
    change = planned if planned.id == line["id"] else changes.load(folder / f"{number:04d}-{line['id']}")
    stacked = line["status"] == "superseded" and line.get("in_force")
    status = "active" if stacked else line["status"]
    removed = {r["fact"]: (r["status"], r["until"]) for r in line.get("removed", ())}
    if change is not planned and len(change.facts) + len(removed) != len(planned.facts):
        raise ValueError(f"the facts of number {number} do not add up")
    return Entry(number, change, line["when"], status, line.get("until"), planned, removed, seen.get(number, {}))


def status_in_words(line: Mapping[str, Any]) -> str:
    """Say whether the change of a line, as `Entry.to_dict` or a log has it, is in force."""
    return f"{line['status']}, below a later one" if line.get("in_force") else str(line["status"])


def facts_in_words(line: Mapping[str, Any]) -> str:
    """Count the facts of a line, and how many there were if some were taken out one by one: ``2 of 3``."""
    gone = len(line.get("removed", ()))
    return f"{len(line['facts'])} of {len(line['facts']) + gone}" if gone else str(len(line["facts"]))
