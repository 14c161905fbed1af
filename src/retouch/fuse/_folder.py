"""A stranger's folder: opened without following links, read within limits, its JSON taken strictly.

Whatever is wrong becomes one error that says where, what and what to do. Nothing is ever written.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import store
from ..errors import StoreError

KIB = 1 << 10
MAX_ENTRIES = 1_000
"""More files than this are no adapter."""
MAX_DEPTH = 16
"""Levels of lists and objects that a JSON file may have."""
MAX_NODES = 40_000
"""Lists and objects that a JSON file may have: a header of ten thousand tensors has thirty thousand."""
_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not keep us waiting


@dataclass(frozen=True)
class Folder:
    """An opened folder.

    Attributes:
        path: Where it is, for messages.
        handle: Its open descriptor; files are opened relative to it, so that renaming the folder changes nothing.
        names: What lies in it.
    """

    path: Path
    handle: int
    names: frozenset[str]

    @contextmanager
    def file(self, name: str) -> Iterator[io.FileIO]:
        """Open a regular file that lies in the folder itself.

        Raises:
            StoreError: It is missing, a link, a folder or a device.
        """
        where = self.path / name
        try:
            handle = os.open(name, _PLAIN, dir_fd=self.handle)
        except OSError as error:
            if (self.path / name).is_symlink():
                raise StoreError(
                    f"{where} is a symbolic link, and only files of the folder itself are read. "
                    f"Put the file there (cp -rL copies what links lead to)."
                ) from error
            raise StoreError(f"{where} cannot be read: {error.strerror}. {_COMPLETE}") from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise StoreError(f"{where} is no regular file. {_COMPLETE}")
        with io.FileIO(handle) as file:
            yield file

    def read(self, name: str, limit: int) -> bytes:
        """Return a small file's bytes.

        Raises:
            StoreError: As `file`, or it has more than `limit` bytes.
        """
        with self.file(name) as file:
            return bytes(exactly(file, 0, self._size(file, name, limit), self.path / name))

    def check_size(self, name: str, limit: int) -> None:
        """Make sure that a file is small before anybody reads all of it.

        Raises:
            StoreError: As `read`.
        """
        with self.file(name) as file:
            self._size(file, name, limit)

    def _size(self, file: io.FileIO, name: str, limit: int) -> int:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise StoreError(
                f"{self.path / name} has {size:,} bytes; at most {limit:,} are read. Do not use this adapter."
            )
        return size

    def json(self, name: str, limit: int) -> dict[str, Any]:
        """Return the object that a small JSON file holds.

        Raises:
            StoreError: As `read` and `parsed`.
        """
        return self.parsed(self.read(name, limit), name)

    def parsed(self, data: bytes, name: str) -> dict[str, Any]:
        """Return the object that the bytes of one of its JSON files hold.

        Raises:
            StoreError: As `parsed`.
        """
        return parsed(data, self.path / name)


_COMPLETE = "An adapter is a folder with the files adapter_config.json and adapter_model.safetensors."


@contextmanager
def opened(path: Path) -> Iterator[Folder]:
    """Open a folder for reading.

    Raises:
        StoreError: There is none, it is a file (archives are not unpacked), or it holds too much.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError as error:
        raise StoreError(
            f"{path} is a file; archives are not unpacked and nothing else is read. {_COMPLETE}"
        ) from error
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}. Check the path."
        ) from error
    try:
        yield Folder(path, handle, frozenset(_listed(path, handle)))
    finally:
        os.close(handle)


def _listed(path: Path, handle: int) -> Iterator[str]:
    with os.scandir(handle) as entries:
        for n, entry in enumerate(entries):
            if n >= MAX_ENTRIES:
                raise StoreError(
                    f"{path} holds more than {MAX_ENTRIES:,} files, so it is no adapter. Check the path. {_COMPLETE}"
                )
            yield entry.name


def exactly(file: io.FileIO, start: int, n_bytes: int, where: Path) -> bytearray:
    """Return the bytes of a stretch of a file.

    Raises:
        StoreError: The file ends before, or cannot be read.
    """
    data = bytearray(n_bytes)
    view, done = memoryview(data), 0
    try:
        file.seek(start)
        while done < n_bytes and (more := file.readinto(view[done:])):
            done += more
    except OSError as error:
        raise StoreError(f"{where} cannot be read: {error.strerror}. Copy it again.") from error
    if done < n_bytes:
        raise StoreError(f"{where} ended after {start + done:,} bytes; {start + n_bytes:,} were there. Copy it again.")
    return data


def parsed(data: bytes | bytearray, where: Path) -> dict[str, Any]:
    """Return the JSON object of a text: no NaN, no infinity, no name twice, no deep nesting.

    Raises:
        StoreError: It is something else.
    """
    if data.count(b"[") + data.count(b"{") > MAX_NODES:  # each costs a hundred times its bytes in memory
        raise StoreError(f"{where} holds more than {MAX_NODES:,} lists and objects. Do not use this adapter.")
    try:
        found = store.parse_json(bytes(data).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else clipped(error)
        raise StoreError(f"{where} is not valid JSON: {reason}. Copy it again, or do not use this adapter.") from error
    if not isinstance(found, dict):
        raise StoreError(f"{where} must hold a JSON object, not a {type(found).__name__}. Do not use this adapter.")
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _inside(value)]
    if level:
        raise StoreError(f"{where} is nested more than {MAX_DEPTH} levels deep. Do not use this adapter.")
    return found


def _inside(value: Any) -> list[Any]:
    items = value.values() if isinstance(value, dict) else value
    return [item for item in items if isinstance(item, dict | list)]


def clipped(text: object, n: int = 120) -> str:
    """Return a text for a message: a stranger's may be long."""
    whole = str(text)
    return whole if len(whole) <= n else f"{whole[: n - 3]}..."


def quoted(text: object) -> str:
    """Return a stranger's text in quotes, clipped, without characters that a terminal obeys."""
    return clipped(repr(clipped(text)))
