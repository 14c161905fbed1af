"""Folders that appear in one step, whole or not at all, and are checked before anything in them is used."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..progress import track
from .keys import sha256_file
from .locks import ABSENT, locked, mine
from .manifest import FORMAT, MANIFEST, check, check_name, check_pickle, few, files_below, read_manifest, refuse_inside
from .places import check_room, named, real, sibling, siblings, sweep, sync

_log = logging.getLogger(__name__)

__all__ = ["check_folder", "put_back", "recover", "replacing", "write_folder", "writing"]


@contextmanager
def writing(path: str | Path, *, replace: bool = True, need_bytes: int = 0) -> Iterator[Path]:
    """Give an empty folder to fill; when the ``with`` ends well, it takes its place at `path` in one step.

    Up to that step, whatever stops the writer, Ctrl-C and a lost process included, leaves `path` as it was. Other
    writers of the same path wait. A link at `path` is followed.

    Args:
        path: Where the folder is to be; missing parents are made.
        replace: Whether a folder of ours that is already there gives way.
        need_bytes: Size of what will be written in bytes, if known: checked before anything is written.

    Raises:
        StoreError: The place is taken by something else, lies inside a saved folder, cannot be written, or the disk is
            full.
    """
    target = real(path)
    refuse_inside(target)
    with locked(target) as alone, replacing(target, alone, replace, need_bytes) as folder:
        yield folder


def write_folder(
    path: str | Path, files: Mapping[str, bytes | str | Callable[[Path], None]], *, replace: bool = True
) -> None:
    """Write a folder of files, whole or not at all.

    Args:
        path: Where the folder is to be.
        files: Content by relative name: bytes, text (stored as UTF-8), or a function that writes the path it is given.
        replace: Whether a folder of ours that is already there gives way.

    Raises:
        StoreError: As `writing`; or a name leaves the folder or is that of a pickle.
    """
    known = {name: item.encode() if isinstance(item, str) else item for name, item in files.items()}
    for name in known:
        check_name(name, str(path))
    size = sum(len(item) for item in known.values() if isinstance(item, bytes))
    with writing(path, replace=replace, need_bytes=size) as folder:
        for name, item in known.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(item, bytes):
                (folder / name).write_bytes(item)
            else:
                item(folder / name)


def check_folder(path: str | Path, *, verify_hashes: bool = True) -> dict[str, Any]:
    """Make sure that a folder is complete and unchanged before anything in it is used.

    Args:
        path: The folder.
        verify_hashes: Also read every file and compare its hash; without it only names and sizes are compared.

    Returns:
        The manifest: ``format``, and ``files`` with ``sha256`` and ``bytes`` by relative name.

    Raises:
        StoreError: With the first thing that is wrong.
    """
    target = real(path)
    for more in reversed(range(9)):
        recover(target)
        before = _identity(target)
        try:
            return check(target, verify_hashes)
        except StoreError:
            if not more or _identity(target) == before:
                raise  # else another writer replaced the folder meanwhile: look again
    raise AssertionError("unreachable")


def _identity(target: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        return target.stat().st_ino, target.stat().st_ctime_ns
    return None


def recover(path: str | Path) -> None:
    """Put a complete folder back that an interrupted writer had moved aside; `check_folder` calls this first.

    Raises:
        StoreError: There is one, and it cannot be moved.
    """
    target = real(path)
    if not os.path.lexists(target) and any(siblings(target, "old")) and target not in mine.get():
        with locked(target), named(target):
            put_back(target)


def put_back(target: Path) -> None:
    """Put the latest complete folder back that was moved aside, where nothing is; the lock is held."""
    if os.path.lexists(target):
        return
    for old in sorted(siblings(target, "old"), key=lambda p: p.stat().st_mtime, reverse=True):
        with suppress(StoreError):
            check(old, verify_hashes=False)
            old.rename(target)
            sync(target.parent)
            _log.warning("%s: put back after an interrupted write", target)
            return


@contextmanager
def replacing(target: Path, alone: bool, replace: bool, need_bytes: int = 0, own: bool = False) -> Iterator[Path]:
    """Fill and swap in a folder, the lock being held; `own` skips the question whose folder it is."""
    new = sibling(target, "new")
    with named(target):
        put_back(target)
        sweep(target, alone)
    _check_place(target, replace, own)
    check_room(target, need_bytes)
    try:
        with named(target, need_bytes, new):
            new.mkdir()
        with named(target, need_bytes, new, full_only=True):
            yield new
        with named(target, need_bytes, new):
            _seal(new)
            _check_place(target, replace, own)
            _swap(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # after the swap this name holds the old folder


def _check_place(target: Path, replace: bool, own: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise StoreError(f"{target} is a file, and a folder is to be written there. Choose another name.")
    if own or not (present := files_below(target)):
        return
    if not replace:
        raise StoreError(f"{target} exists already. Choose another name, or allow it to be replaced.")
    try:
        foreign = sorted(set(present) - set(read_manifest(target)["files"]) - {MANIFEST})
    except StoreError as error:
        raise StoreError(
            f"{target} was not written by this version of Retouch and will not be replaced ({error}) "
            "Choose another name, or move that folder away."
        ) from error
    if foreign:
        raise StoreError(
            f"{target} also holds files that Retouch did not write ({few(foreign)}) and will not be replaced. "
            "Move these files away, or choose another name."
        )


def _seal(folder: Path) -> None:
    """Add the manifest and push everything to the disk, the folder last."""
    files = {}
    for name in track([n for n in files_below(folder) if n != MANIFEST], "Hashing files"):
        check_name(name, str(folder))
        check_pickle(folder / name)
        files[name] = {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
    text = json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def _swap(new: Path, target: Path) -> None:
    try:
        new.rename(target)  # replaces nothing, or an empty folder
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        if not _exchange(new, target):
            _step_aside(new, target)
    sync(target.parent)


def _step_aside(new: Path, target: Path) -> None:
    old = sibling(target, "old")
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        put_back(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; say no where the system cannot."""
    import ctypes

    if (rename := _renameat2()) is None:
        return False
    here, exchange = -100, 2
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    if (code := ctypes.get_errno()) in ABSENT:
        _log.info("%s: names cannot be exchanged here; the old folder steps aside instead", other)
        return False
    raise OSError(code, os.strerror(code), str(other))


@functools.cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function
