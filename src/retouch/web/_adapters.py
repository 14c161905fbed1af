"""Adapters: how much they contradict each other, as ``retouch fuse merge --dry-run`` tells it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..fuse.merging import conflict_report, open_adapters, seen_by_edges
from ..model import open_model
from ..report import to_json
from . import _wire as wire
from ._folder import Folder
from ._job import Desk

__all__ = ["Adapters"]


class Adapters:
    """Compare adapters. Its public methods are routes of the API.

    Args:
        folder: Where they are.
        desk: Where work lies.
        source_of: Turns a model's name into what is opened, or refuses it.
    """

    def __init__(self, folder: Folder, desk: Desk, source_of: Callable[[str], str]) -> None:
        self.folder, self.desk, self._source_of = folder, desk, source_of

    def adapters(self) -> list[str]:
        """List the adapters, the newest first."""
        return self.folder.adapters()

    def compare(self, asked: wire.Compare) -> wire.Job:
        """Begin to check adapters and to measure where they contradict each other; nothing is fused or written."""
        if len(set(asked.adapters)) < len(asked.adapters):
            raise UserError("An adapter is named twice. Name each once.")
        source, paths = self._source_of(asked.model), [self.folder.inside(path) for path in asked.adapters]
        return self.desk.begin(f"Comparing {len(paths)} adapters", lambda: _compare(source, paths, asked))


def _compare(source: str, paths: list[Path], asked: wire.Compare) -> wire.Saved:
    model = open_model(source)
    given = open_adapters(
        paths, model, base_unverified=asked.base_unverified, targets_from_tensors=asked.targets_from_tensors
    )
    report = conflict_report(model, [seen_by_edges(a, model) for a in given], pictures=False)
    unsure = [f"{a.name}: {told}." for a in given if (told := a.notes["file"]["base"]) != "verified"]
    return wire.Saved(notes=unsure, report=to_json(report))
