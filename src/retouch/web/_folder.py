"""The one folder that the page reads and writes: nothing above it, and no link that leads out of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import StoreError, UnknownName, UserError
from ..store import read_json, refuse_place

__all__ = ["Folder"]

_DEEP = 4
_MOST = 1000
_LARGEST = 2**20
"""Bytes of a configuration that is read to see what it is of."""
_NAME = re.compile(r"\w[\w .+-]{0,99}(?<![ .])")
_MARK = b'<meta name="generator" content="Retouch">'


class Folder:
    """Find what Retouch made below a folder, and names for new ones. To list something reads no weights.

    Args:
        root: The folder; made if it is absent.

    Raises:
        UserError: It is a file, or cannot be made.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(os.path.realpath(root))
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{root} cannot be used as a folder: {error.strerror}. Name another one.") from error

    def inside(self, name: str) -> Path:
        """Return what a relative path names.

        Raises:
            UnknownName: Nothing is there, or it lies outside, perhaps by way of a link.
        """
        path = Path(os.path.realpath(self.root / name)) if name and "\0" not in name else self.root.parent
        if not path.is_relative_to(self.root) or not path.exists():
            raise UnknownName(f"There is no {name!r} below {self.root}.")
        return path

    def new(self, name: str) -> Path:
        """Return a free path directly in the folder: the name, or the name and a number if it is taken.

        Raises:
            UserError: The name is no plain one, or nothing may be written there.
        """
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} is no name of a new folder. Use letters, digits, spaces and . + - _ inside it.")
        numbers = iter(range(2, 10**6))
        path = self.root / name
        while os.path.lexists(path):
            path = self.root / f"{name}-{next(numbers)}"
        refuse_place(path)
        return path

    def models(self) -> list[str]:
        """List the model folders."""
        return self._named(lambda f: _is_model(f) and not _is_slim(f))

    def slims(self) -> list[str]:
        """List the slim classifiers."""
        return self._named(lambda f: _is_model(f) and _is_slim(f))

    def bundles(self) -> list[str]:
        """List the recommenders."""
        return self._named(_is_bundle)

    def adapters(self) -> list[str]:
        """List the adapters; whether one is fit for use is known when it is opened."""
        return self._named(lambda f: _plain(f / "adapter_config.json"))

    def changes(self) -> list[str]:
        """List the saved changes, the newest first."""
        return self._named(
            lambda f: _plain(f / "change.safetensors") and _plain(f / "retouch.json") and not _is_bundle(f)
        )

    def reports(self) -> list[str]:
        """List the reports that Retouch wrote as HTML, the newest first."""
        pages = (path for folder in self._folders() for path in folder.glob("*.html") if _plain(path))
        return self._sorted(path for path in pages if _is_report(path))

    def _named(self, wanted: Callable[[Path], bool]) -> list[str]:
        return self._sorted(folder for folder in self._folders() if folder != self.root and wanted(folder))

    def _sorted(self, paths: Iterator[Path]) -> list[str]:
        newest = sorted(paths, key=lambda path: (-path.stat().st_mtime, str(path)))
        return [path.relative_to(self.root).as_posix() for path in newest]

    def _folders(self) -> Iterator[Path]:
        """Yield the folder and those below it, the near ones first; what a saved folder holds is its own affair."""
        waiting = [(0, self.root)]
        for depth, folder in waiting:  # grows while it is read
            yield folder
            is_saved = folder != self.root and (folder / "manifest.json").exists()
            if depth < _DEEP and not is_saved:
                waiting += [(depth + 1, path) for path in _below(folder)][: _MOST - len(waiting)]


def _below(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for e in entries if e.is_dir(follow_symlinks=False) and e.name[0] != ".")
    except OSError:
        return []


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_model(folder: Path) -> bool:
    return _plain(folder / "config.json") and any(map(_plain, folder.glob("*.safetensors")))


def _is_bundle(folder: Path) -> bool:
    return _plain(folder / "items.jsonl") and _plain(folder / "trie.safetensors")


def _is_slim(folder: Path) -> bool:
    """Whether a model's configuration says that it is slim, as the command line asks it."""
    config = folder / "config.json"
    try:
        told = read_json(config) if config.stat().st_size <= _LARGEST else None
    except (StoreError, OSError):
        return False
    return isinstance(told, dict) and told.get("model_type") == "retouch_slim"


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _MARK in file.read(2048)
    except OSError:
        return False
