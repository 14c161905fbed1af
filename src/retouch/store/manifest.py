"""What a saved folder must hold: the files that its manifest lists, unchanged, and nothing else."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import StoreError
from ..progress import track
from .keys import sha256_file
from .places import named, real
from .strict_json import AGAIN, read_json

__all__ = [
    "FORMAT",
    "MANIFEST",
    "PICKLES",
    "check",
    "check_name",
    "check_pickle",
    "few",
    "files_below",
    "read_manifest",
    "refuse_inside",
    "refuse_place",
]

FORMAT = 1
"""The format number of a manifest; a folder with a larger one comes from a newer Retouch."""
MANIFEST = "manifest.json"
"""The file that lists the others."""
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill"}
"""Endings of files that run code when they are read."""


def refuse_inside(path: str | Path) -> None:
    """Refuse a place inside a folder that Retouch saved: with anything more in it, that folder is damaged.

    All writers ask; ask first where there is work to do before something is written.

    Raises:
        StoreError: It lies inside such a folder.
    """
    target = real(path)
    for folder in target.parents:
        if _is_saved(folder):
            raise StoreError(
                f"{target} lies inside {folder}, a folder that Retouch saved and that must stay as it is. "
                "Choose a place outside of it."
            )


def refuse_place(path: str | Path) -> None:
    """Refuse a place where nothing could be written, before hours of work for it.

    Raises:
        StoreError: It lies inside a folder that Retouch saved, or below one that this process may not write in.
    """
    target = real(path)
    refuse_inside(target)
    there = next(folder for folder in target.parents if os.path.lexists(folder))
    with named(target):
        Path(tempfile.mkdtemp(prefix=".retouch-", dir=there)).rmdir()


def _is_saved(folder: Path) -> bool:
    with suppress(StoreError, OSError):
        manifest = read_json(folder / MANIFEST)  # also one of a later format
        return isinstance(manifest, dict) and {"format", "files"} <= manifest.keys()
    return False


def check(folder: Path, verify_hashes: bool) -> dict[str, Any]:
    """Return the manifest of a folder that is complete and unchanged.

    Raises:
        StoreError: With the first thing that is wrong.
    """
    if not os.path.lexists(folder):
        raise StoreError(f"{folder} does not exist. Check the path.")
    if not folder.is_dir():
        raise StoreError(f"{folder} is a file; a folder that Retouch saved is expected. Name the folder.")
    try:
        present = set(files_below(folder)) - {MANIFEST}
        manifest = read_manifest(folder)
        files = manifest["files"]
        if missing := sorted(set(files) - present):
            raise StoreError(f"{folder} is incomplete: {few(missing)} missing. {AGAIN}")
        if extra := sorted(present - set(files)):
            raise StoreError(f"{folder} holds what it was not saved with: {few(extra)}. Move that away.")
        for name in track(sorted(files), "Checking files") if verify_hashes else sorted(files):
            _check_file(folder / name, files[name], verify_hashes)
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {error.strerror or error} ({error.filename}).") from error
    return manifest


def _check_file(path: Path, entry: Mapping[str, Any], verify_hash: bool) -> None:
    if (size := path.stat().st_size) != entry["bytes"]:
        raise StoreError(f"{path} has {size:,} bytes and was saved with {entry['bytes']:,}. {AGAIN}")
    if verify_hash and sha256_file(path) != entry["sha256"]:
        raise StoreError(f"{path} has other content than it was saved with (its hash differs). {AGAIN}")
    check_pickle(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest, and refuse one of a newer format or with names that no saved folder has."""
    if not (path := folder / MANIFEST).is_file():
        raise StoreError(f"{folder} has no {MANIFEST}: it is incomplete, or Retouch did not write it. {AGAIN}")
    manifest = read_json(path)
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if type(number) is int and number > FORMAT:
        raise StoreError(f"{path} has format {number}; this Retouch reads up to {FORMAT}. Update Retouch.")
    if number != FORMAT or type(number) is not int or not _well_formed(manifest):
        raise StoreError(f"{path} is not a list of files as Retouch writes it. {AGAIN}")
    for name in manifest["files"]:
        check_name(name, str(path))
    return dict(manifest)


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    files = manifest.get("files")
    return (
        set(manifest) == {"format", "files"}
        and isinstance(files, dict)
        and all(map(_well_formed_entry, files.values()))
    )


def _well_formed_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"} or type(entry["bytes"]) is not int:
        return False
    return entry["bytes"] >= 0 and bool(re.fullmatch("[0-9a-f]{64}", str(entry["sha256"])))


def files_below(folder: Path) -> list[str]:
    """List the files below a folder, and refuse whatever is neither a file nor a folder."""
    names = []
    for root, folders, files in os.walk(folder, onerror=_raise):
        for path in (Path(root, name) for name in (*folders, *files)):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise StoreError(f"{path} is a symbolic link, which a saved folder never holds. Put the file there.")
            if stat.S_ISREG(mode):
                names.append(path.relative_to(folder).as_posix())
            elif not stat.S_ISDIR(mode):
                raise StoreError(f"{path} is neither a file nor a folder. Remove it.")
    return sorted(names)


def _raise(error: OSError) -> None:
    raise error


def few(names: Collection[str]) -> str:
    """Name the first five."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in sorted(names)[:5]) + rest


def check_name(name: str, where: str) -> None:
    """Refuse a name that leaves the folder or is that of a pickle."""
    plain = PurePosixPath(name)
    inside = plain.parts and not plain.is_absolute() and ".." not in plain.parts and str(plain) == name
    if not inside or "\\" in name or "\0" in name or name == MANIFEST:
        raise StoreError(f"{where} names the file {name!r}; allowed are plain names inside the folder. Do not use it.")
    if PurePosixPath(name).suffix.lower() in PICKLES:
        raise StoreError(f"{where}: {name!r} may be a pickle, which runs code when it is read. Use safetensors.")


def check_pickle(path: Path) -> None:
    """Refuse a NumPy file that holds Python objects."""
    import zipfile

    if path.suffix.lower() not in {".npy", ".npz"}:
        return
    try:
        with path.open("rb") as file:
            numeric = _numeric_archive(file) if path.suffix.lower() == ".npz" else _numeric(file)
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise StoreError(f"{path} is not a NumPy array ({error}). {AGAIN}") from error
    if not numeric:
        raise StoreError(f"{path} holds Python objects, which run code when they are read. Use numbers or safetensors.")


def _numeric(file: Any) -> bool:
    from numpy.lib import format as npy

    read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    return not read(file)[2].hasobject


def _numeric_archive(file: Any) -> bool:
    import zipfile

    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                if not _numeric(member):
                    return False
    return True
