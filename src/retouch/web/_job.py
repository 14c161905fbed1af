"""Work, one piece at a time.

A long piece runs in a thread of its own, with progress, warnings, an end in words, and a way to stop it; a short one is
answered at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BoundRefused, RetouchError, UserError
from ..progress import Pace, listen
from ._wire import Job, Progress, Saved

__all__ = ["Busy", "Desk", "Work", "status_of"]

_log = logging.getLogger("uvicorn.error")  # the one that the server shows with where it happened


class Busy(UserError):
    """Something else is being worked on."""


class _Stopped(KeyboardInterrupt):
    """Somebody asked for the end: for the work it is as if Ctrl-C were pressed, for which all of it is made."""


def status_of(error: Exception) -> int:
    """Return the HTTP status of an error: what was asked wrongly, refused or busy, or our fault."""
    if isinstance(error, BoundRefused | Busy):
        return 409
    return 422 if isinstance(error, UserError) else 500


class Desk:
    """Where one piece of work lies at a time; the latest one stays to be looked at."""

    def __init__(self) -> None:
        self._work: Work | None = None
        self._busy = threading.Lock()

    @property
    def job(self) -> Job | None:
        """How far the latest work is, and how it ended."""
        return self._work.job if self._work else None

    def begin(self, what: str, do: Callable[[], Saved]) -> Job:
        """Begin a piece of long work.

        Raises:
            Busy: Something is under way.
        """
        self._take()
        self._work = Work(self._work.job.number + 1 if self._work else 1, what, do, self._busy.release)
        return self._work.job

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let nothing else begin inside of the ``with``.

        Raises:
            Busy: Something is under way.
        """
        self._take()
        try:
            yield
        finally:
            self._busy.release()

    def cancel(self) -> Job:
        """Stop the work, at its next step.

        Raises:
            UserError: There is none.
        """
        if self._work is None or self._work.job.state != "running":
            raise UserError("Nothing is being worked on.")
        self._work.stop()
        return self._work.job

    def end(self, timeout_s: float) -> None:
        """Stop what is being worked on, and wait for its end."""
        if self._work is not None:
            self._work.stop()
            self._work.join(timeout_s)

    def _take(self) -> None:
        if not self._busy.acquire(blocking=False):
            if self._work and self._work.job.state == "running":
                raise Busy(f"{self._work.job.what} is under way. Wait for it, or cancel it.")
            raise Busy("An answer is under way. Wait for it.")


class Work:
    """Run a function in a thread and know how far it is.

    Args:
        number: Tells pieces of work apart.
        what: Names it, for people.
        do: The work.
        ended: Called at its end, whatever that is.
    """

    def __init__(self, number: int, what: str, do: Callable[[], Saved], ended: Callable[[], None]) -> None:
        self._do, self._ended = do, ended
        self._begin, self._pace, self._stop = time.monotonic(), Pace(), threading.Event()
        self._job = Job(number=number, what=what, state="running", seconds=0, progress=[], warnings=[])
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    @property
    def job(self) -> Job:
        """How it stands now."""
        if self._job.state != "running":
            return self._job
        return self._job.model_copy(update={"seconds": round(time.monotonic() - self._begin, 1)})

    def stop(self) -> None:
        """Ask for its end, which comes at the next step that it reports."""
        self._stop.set()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for its end."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        warnings = _Warnings(self._warn)
        logging.getLogger("retouch").addHandler(warnings)
        try:
            with listen(self._hear):
                outcome = self._outcome()
        finally:
            logging.getLogger("retouch").removeHandler(warnings)
            self._ended()  # before it is told: whoever hears of the end may begin something at once
        self._job = self.job.model_copy(update={"progress": [], **outcome})

    def _outcome(self) -> dict[str, Any]:
        try:
            return {"result": self._do(), "state": "done"}
        except _Stopped:
            return {"state": "stopped", "error": "Stopped. Nothing was half-written."}
        except RetouchError as error:
            state = "refused" if isinstance(error, BoundRefused) else "failed"
            return {"state": state, "error": str(error), "status": status_of(error)}
        except Exception:
            _log.exception("%s failed", self._job.what)
            return {"state": "failed", "error": "Retouch failed at this; the server's log says why.", "status": 500}

    def _hear(self, what: str, done: float, total: float | None) -> None:
        if self._stop.is_set():
            raise _Stopped
        left_s = self._pace.left_s(what, done, total, time.monotonic())
        others = [p for p in self._job.progress if p.what != what]
        ended = total is not None and done >= total
        now = [] if ended else [Progress(what=what, done=done, total=total, left_s=left_s)]
        self._job = self._job.model_copy(update={"progress": others + now})

    def _warn(self, sentence: str) -> None:
        if sentence not in self._job.warnings:
            self._job = self._job.model_copy(update={"warnings": [*self._job.warnings, sentence]})


class _Warnings(logging.Handler):
    """What the thread that made it warns of."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell, self._thread = tell, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread and record.levelno == logging.WARNING:
            self._tell(record.getMessage())
