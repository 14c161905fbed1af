"""How the command line shows things: progress with time left on stderr, tables or JSON on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "emit", "progress", "table"]


def console() -> Console:
    """Return the console of stdout."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def emit(value: Any) -> None:
    """Write a result for programs."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Write a table for people."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title), title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(_cell(c)) for c in row))
    console().print(drawn)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


@contextmanager
def progress() -> Iterator[None]:
    """Show all progress inside the ``with`` on stderr, with time left: a live bar, or a line now and then in a log."""
    from ..progress import listen

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        parts = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*parts, console=Console(stderr=True), transient=True) as bars:
            tasks: dict[str, TaskID] = {}

            def draw(what: str, done: float, total: float | None) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total)
                if total is not None and done >= total:
                    bars.remove_task(tasks.pop(what))

            with listen(draw):
                yield
        return
    with listen(_Lines()):
        yield


class _Lines:
    """A line every few seconds, for logs."""

    def __init__(self, every_s: float = 10.0) -> None:
        self.every_s, self.last = every_s, time.monotonic()
        self.began: dict[str, float] = {}

    def __call__(self, what: str, done: float, total: float | None) -> None:
        now = time.monotonic()
        began = self.began.setdefault(what, now)
        if now - self.last < self.every_s:
            return
        self.last = now
        left = f", {(now - began) / done * (total - done):.0f} s left" if total and done else ""
        sys.stderr.write(f"{what}: {done:g}{f' of {total:g}' if total else ''}{left}\n")
