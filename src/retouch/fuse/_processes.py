"""Processes that we start and therefore stop: whole trees, by recorded identity, never by name."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import RetouchError, UserError

__all__ = ["Program", "Programs", "executable"]

_PATIENCE_S = 15.0


def executable(name: str) -> str:
    """Return the path of a program that came with this Python's packages.

    Raises:
        UserError: It is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise UserError(f"{name} is not installed beside {sys.executable}. Install it: pip install 'retouch[edges]'.")
    return str(path)


class Program:
    """One process with all that descend from it."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self._seen: dict[int, Any] = {}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                list(command), env=dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        self.look()

    @property
    def running(self) -> bool:
        """Whether the process itself has not ended."""
        self.look()
        return self.process.poll() is None

    def look(self) -> None:
        """Record the process and its descendants as they are now; those of a dead parent could not be found later."""
        import psutil  # type: ignore[import-untyped]

        roots = [self.process.pid, *self._seen]
        for pid in roots:
            with contextlib.suppress(psutil.Error):
                root = self._seen.get(pid) or psutil.Process(pid)
                if not root.is_running():
                    continue
                for found in (root, *root.children(recursive=True)):
                    self._seen.setdefault(found.pid, found)
        for found in psutil.process_iter():  # a child whose parent has gone keeps the session that we gave it
            with contextlib.suppress(psutil.Error, OSError):
                if found.pid not in self._seen and os.getsid(found.pid) == self.process.pid:
                    self._seen[found.pid] = found

    def stop(self) -> None:
        """Ask the whole tree to end, wait, and end by force what is left of it."""
        import psutil  # type: ignore[import-untyped]

        self.look()
        for found in self._seen.values():
            with contextlib.suppress(psutil.Error):
                found.terminate()
        self._reaped(_PATIENCE_S)
        self.look()
        for found in self._seen.values():
            with contextlib.suppress(psutil.Error):
                found.kill()
        self._reaped(_PATIENCE_S)

    def kill(self) -> None:
        """End the whole tree by force, as a machine does that loses its power."""
        import psutil  # type: ignore[import-untyped]

        self.look()
        for found in self._seen.values():
            with contextlib.suppress(psutil.Error):
                found.kill()
        self._reaped(_PATIENCE_S)

    def _reaped(self, timeout_s: float) -> None:
        import psutil  # type: ignore[import-untyped]

        psutil.wait_procs(list(self._seen.values()), timeout=timeout_s)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)

    def left(self) -> list[int]:
        """List the processes of the tree that still run."""
        return [pid for pid, p in self._seen.items() if p.is_running() and p.status() != "zombie"]

    def tail(self, n_lines: int = 12) -> str:
        """Return the last lines of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.is_file() else []
        return "\n".join(lines[-n_lines:])

    def wait_until(self, ready: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until something holds.

        Raises:
            RetouchError: The process has ended, or the time is over; the message shows the end of its log.
        """
        until = time.monotonic() + timeout_s
        while not ready():
            if not self.running or time.monotonic() > until:
                told = "has ended" if not self.running else f"was not ready within {timeout_s:.0f} s"
                raise RetouchError(f"{self.name} {told} ({what}). Its log, {self.log}, ends with:\n{self.tail()}")
            time.sleep(0.2)


class Programs:
    """Programs that are all stopped when the ``with`` ends, whatever happened."""

    def __init__(self) -> None:
        self.all: list[Program] = []

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Program:
        """Start a program; its output goes to the end of a file."""
        program = Program(name, command, environment, log)
        self.all.append(program)
        return program

    def __enter__(self) -> Programs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for program in reversed(self.all):
            program.stop()
