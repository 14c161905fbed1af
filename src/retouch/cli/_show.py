"""How the command line shows things: progress with time left on stderr, tables or JSON on stdout."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import Pace

if TYPE_CHECKING:
    from rich.console import Console

    from ..report import Report

__all__ = ["command", "console", "count", "emit", "progress", "report", "say", "table", "warnings", "writable"]


def console() -> Console:
    """Return the console of stdout."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def emit(value: Any) -> None:
    """Write a result for programs: strict JSON, in which a number that is not finite is null."""
    sys.stdout.write(json.dumps(_strict(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(made: Report, html: Path | None, json_: bool) -> None:
    """Write a report: as a page, if one is asked for, and on stdout for people or programs."""
    from ..report import to_json, to_terminal, write_html

    if html is not None:
        write_html(made, html)
    if json_:
        emit(to_json(made))
    else:
        console().print(to_terminal(made))


def say(sentence: str, style: str = "") -> None:
    """Write a sentence for people as it is: never broken, so that a command in it can be copied."""
    from rich.text import Text

    console().print(Text(sentence, style), soft_wrap=True)


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Write a table for people, whole at any width."""
    from .._sheet import Sheet

    say(title, "bold")  # a table's own title would be folded to the table's width
    console().print(Sheet(columns, rows, ruled=True))


def command(*words: object) -> str:
    """Write a command of ours so that a shell takes it as it is."""
    return " ".join(["retouch", *(_quoted(str(word)) for word in words)])


def _quoted(word: str) -> str:
    return f'"{word}"' if " " in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def count(number: int, what: str) -> str:
    """Write a number of things: 1 fact, 2 facts."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def writable(flag: str, path: Path | None, *needed: str) -> None:
    """Refuse a file that could not be written, before any work.

    Args:
        flag: What the user named it with.
        path: The file; None asks for none.
        needed: Packages that draw it.

    Raises:
        UserError: It is a folder, stands in none or in one that Retouch saved, or a package is not installed.
    """
    from .._pictures import need
    from ..errors import UserError
    from ..store import refuse_place

    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path} must be a file in a folder that exists.")
    refuse_place(path)
    for package in needed:
        need(package)


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
                    tasks[what] = bars.add_task(what, total=total, completed=int(done))
                bars.update(tasks[what], completed=done, total=total)
                if total is not None and done >= total:
                    bars.remove_task(tasks.pop(what))

            with listen(draw):
                yield
        return
    with listen(_Lines()):
        yield


@contextmanager
def warnings() -> Iterator[None]:
    """Tell the library's warnings inside the ``with`` on stderr; several steps may warn of one thing: once."""
    logger, handler = logging.getLogger("retouch"), _Once(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Once(logging.Handler):
    """Each sentence once."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        sentence = record.getMessage()
        if sentence not in self.told:
            self.told.add(sentence)
            sys.stderr.write(f"warning: {sentence}\n")


class _Lines:
    """A line every few seconds, for logs."""

    def __init__(self, every_s: float = 10.0) -> None:
        self.every_s, self.last, self.pace = every_s, time.monotonic(), Pace()

    def __call__(self, what: str, done: float, total: float | None) -> None:
        now = time.monotonic()
        left_s = self.pace.left_s(what, done, total, now)
        if now - self.last < self.every_s:
            return
        self.last = now
        left = "" if left_s is None else f", {left_s:.0f} s left"
        sys.stderr.write(f"{what}: {done:g}{f' of {total:g}' if total else ''}{left}\n")
