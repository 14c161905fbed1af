"""Places on the disk: the names beside a target that belong to its writer, room, and the system's errors as ours."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import StoreError

__all__ = ["check_room", "named", "real", "remove", "sibling", "siblings", "sweep", "sync"]

_FULL = {errno.ENOSPC, errno.EDQUOT}


def real(path: str | Path) -> Path:
    """Follow links, and refuse a path that names nothing of its own."""
    target = Path(os.path.realpath(path))
    if not target.name:
        raise StoreError(f"{str(path)!r} names no folder of its own. Give a name inside it.")
    return target


@contextmanager
def named(target: Path, need: int = 0, new: Path | None = None, full_only: bool = False) -> Iterator[None]:
    """Turn the system's errors into ours, which name the place and what to do."""
    try:
        yield
    except _DiskFull as error:  # of a file in the folder: name the folder
        raise _full(target, max(need, error.need)) from error
    except OSError as error:
        if error.errno in _FULL:
            need = max(need, _size(new) + 1 if new else 0)
            remove(new)  # so that the bytes named as free are those free afterwards
            raise _full(target, need) from error
        if full_only:
            raise
        raise StoreError(
            f"{target} cannot be written: {error.strerror or error} ({error.filename}). "
            "Choose another place, or change who may write there."
        ) from error


def _size(path: Path) -> int:
    files = [Path(root, name) for root, _, names in os.walk(path) for name in names] or [path]
    found = [file.lstat() for file in files if os.path.lexists(file)]
    return sum(max(entry.st_size, 512 * entry.st_blocks) for entry in found)


def _free(path: Path) -> int:
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


class _DiskFull(StoreError):
    need = 0


def _full(target: Path, need: int) -> _DiskFull:
    error = _DiskFull(
        f"{target}: the disk is full or its quota is used up: at least {need:,} bytes are needed, "
        f"{_free(target.parent):,} bytes are free; nothing was written. Free some space, or choose another place."
    )
    error.need = need
    return error


def check_room(target: Path, need: int) -> None:
    """Refuse to write more bytes than are free."""
    if need and need > _free(target.parent):
        raise _full(target, need)


def sibling(target: Path, kind: str) -> Path:
    """Make up a name beside the target, for what is ``new`` or ``old``."""
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def siblings(target: Path, kind: str) -> Iterable[Path]:
    """List what stands beside the target under such names."""
    shape = re.compile(rf"\.{re.escape(target.name)}\.({kind})-\d+-[0-9a-f]{{8}}")
    with suppress(FileNotFoundError, NotADirectoryError):
        return [entry for entry in target.parent.iterdir() if shape.fullmatch(entry.name)]
    return []


def sweep(target: Path, alone: bool) -> None:
    """Remove what stopped writers left: under the lock that is everything, else what belongs to no process."""
    for path in list(siblings(target, "new|old")):
        if alone or _gone(int(path.name.rsplit("-", 2)[1])):
            remove(path)


def remove(path: Path | None) -> None:
    """Remove a file or a folder, if it is there."""
    if path is not None and path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path is not None:
        path.unlink(missing_ok=True)


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def sync(path: Path) -> None:
    """Push a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
