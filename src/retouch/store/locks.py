"""One writer of a place at a time, among processes and threads."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from ..errors import StoreError
from .places import named

__all__ = ["ABSENT", "locked", "mine"]

ABSENT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENOLCK}
"""What a file system answers that lacks what was asked for."""
_log = logging.getLogger(__name__)
mine: ContextVar[frozenset[Path]] = ContextVar("retouch_store_mine", default=frozenset())
"""The places that this call is writing."""


@contextmanager
def locked(target: Path) -> Iterator[bool]:
    """Let one writer at a time through; gives False where the file system has no locks."""
    if target in mine.get():
        raise StoreError(f"{target} is already being written by this same call. Let it end first.")
    lock = target.with_name(f".{target.name}.lock")
    with named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, alone = _take(lock)
    token = mine.set(mine.get() | {target})
    try:
        yield alone
    finally:
        mine.reset(token)
        if alone:
            with suppress(OSError):
                lock.unlink()
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child made meanwhile has the same handle: closing is not enough
        os.close(handle)


def _take(lock: Path) -> tuple[int, bool]:
    while True:
        handle = os.open(lock, os.O_RDONLY | os.O_CREAT, 0o666)
        try:
            _flock(handle, lock)
            with suppress(FileNotFoundError):  # the writer before us removed the file that we waited for
                if os.path.samestat(os.fstat(handle), lock.stat()):
                    return handle, True
        except OSError as error:
            if error.errno in ABSENT:
                _log.warning("%s: no locks on this file system; let only one process write here", lock.parent)
                return handle, False
            os.close(handle)
            raise
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _flock(handle: int, lock: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.info("waiting for another writer (%s)", lock)
        fcntl.flock(handle, fcntl.LOCK_EX)
