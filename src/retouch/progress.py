"""Where long work says how far it is. Silent unless somebody listens; the command line does.

A listener is any callable ``(what, done, total)``; `total` is None when nobody knows it. It is held in a context
variable, so that two threads never hear each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["Listener", "Pace", "listen", "report", "track"]

T = TypeVar("T")
Listener = Callable[[str, float, float | None], None]
_listener: ContextVar[Listener | None] = ContextVar("retouch_progress", default=None)


@contextmanager
def listen(listener: Listener | None) -> Iterator[None]:
    """Send all progress inside the ``with`` to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report(what: str, done: float, total: float | None = None) -> None:
    """Say that `done` of `total` units of `what` are finished."""
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` and report each one as it is finished."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    report(what, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        report(what, done, total)


class Pace:
    """How long each work will take, by its own pace so far; for listeners."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, float]] = {}

    def left_s(self, what: str, done: float, total: float | None, now: float) -> float | None:
        """Return the seconds that `what` still needs, or None while nobody can know it.

        Args:
            what: The work, as its listener hears it.
            done: As its listener hears it.
            total: As its listener hears it.
            now: The time, s.
        """
        since, first = self._began.setdefault(what, (now, done))  # resumed work does not begin at 0
        if total is not None and done >= total:
            del self._began[what]  # the next work of this name has a time of its own
        return (now - since) / (done - first) * (total - done) if total and done > first else None
