"""A run's diary: one JSON line a state of an edge, on the disk before the run goes on.

A line that was cut short by a crash is the last one and is left out; the adapters that earlier lines name are kept and
need not be trained again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import store
from ..errors import StoreError

__all__ = ["STATES", "Entry", "Journal"]

STATES = ("sent", "received", "refused", "failed", "absent", "late")


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
        run: Name of the run.
        node: Name of the edge.
        plan: Hash of its pruning plan; empty for an edge that was refused before it had one.
        settings: Hash of what decides its adapter; empty likewise.
        state: One of `STATES`.
        files: SHA-256 of what was kept, by name inside the run's folder.
        why: A sentence, where something went wrong.
        facts: What else is known: bytes, whether training was stopped early.
        time: Seconds since 1970.
    """

    run: str
    node: str
    plan: str
    settings: str
    state: str
    files: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    time: float = 0.0


class Journal:
    """The diary of a folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def add(self, entry: Entry) -> None:
        """Write a line and wait until it is on the disk.

        Raises:
            StoreError: It cannot be written.
        """
        if entry.state not in STATES:
            raise ValueError(f"no state {entry.state!r}")
        record = vars(entry) | {
            "files": dict(entry.files),
            "facts": dict(entry.facts),
            "time": entry.time or time.time(),
        }
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                torn = file.tell() > 0 and not self._ends_well()
                file.write((b"\n" if torn else b"") + line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {error.strerror}. Choose another folder.") from error

    def _ends_well(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def entries(self) -> list[Entry]:
        """Read all lines; one that was cut short by a crash is left out.

        Raises:
            StoreError: A whole line is no entry.
        """
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().split(b"\n")
        return [e for n, line in enumerate(lines, 1) if line and (e := self._read(n, line, len(lines))) is not None]

    def _read(self, number: int, line: bytes, n_lines: int) -> Entry | None:
        try:
            record = json.loads(line)
        except ValueError:
            return None  # torn by a crash
        try:
            return Entry(**record)
        except TypeError as error:
            raise StoreError(
                f"{self.path} line {number} of {n_lines} is no entry of a run. Use another folder."
            ) from error

    def finished(self, run: str, node: str, plan: str, settings: str) -> Entry | None:
        """Return the line of an edge that is done: its adapter was received whole and its files are as they were."""
        for entry in reversed(self.entries()):
            if (entry.run, entry.node, entry.plan, entry.settings) != (run, node, plan, settings):
                continue
            if entry.state == "received" and self.holds(entry):
                return None if entry.facts.get("partial") else entry
        return None

    def received(self, run: str, node: str, plan: str, settings: str) -> Entry | None:
        """Return the last line of an edge whose adapter is here, whole or partial."""
        for entry in reversed(self.entries()):
            same = (entry.run, entry.node, entry.plan, entry.settings) == (run, node, plan, settings)
            if same and entry.state == "received" and self.holds(entry):
                return entry
        return None

    def holds(self, entry: Entry) -> bool:
        """Say whether the files of a line are still what they were."""
        for name, digest in entry.files.items():
            path = self.path.parent / name
            if not path.is_file() or store.sha256_file(path) != digest:
                return False
        return bool(entry.files)
