"""Folders written whole or not at all, the cache, and the hashes that name what is in them.

A folder is built beside its place and swapped in by one rename; its ``manifest.json`` holds the size and hash of every
file. A reader therefore finds the old folder or the new one, never a mixture, whenever the writer was stopped. Names
that begin with a dot and the folder's own name (``.NAME.new-*``, ``.NAME.old-*``, ``.NAME.lock``) belong to a writer.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .errors import StoreError
from .progress import track

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FORMAT",
    "cache_dir",
    "cached",
    "check_folder",
    "digest_tensor",
    "key",
    "load_tensors",
    "read_json",
    "recover",
    "refuse_inside",
    "save_tensors",
    "sha256_file",
    "write_folder",
    "write_json_atomic",
    "writing",
]

FORMAT = 1
"""The format number of a manifest; a folder with a larger one comes from a newer Retouch."""

_MANIFEST = "manifest.json"
_AGAIN = "Copy it again from its source, or make it again."
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill"}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_ABSENT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENOLCK}
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_log = logging.getLogger(__name__)
_mine: ContextVar[frozenset[Path]] = ContextVar("retouch_store_mine", default=frozenset())


# Hashes and keys.


def sha256_file(path: str | Path) -> str:
    """Hash the bytes of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_tensor(tensor: Tensor) -> str:
    """Hash a tensor's dtype, shape and raw bytes; a contiguous tensor in main memory is not copied.

    Shapes: any.

    Example:
        >>> import torch
        >>> digest_tensor(torch.zeros(2, 3)) == digest_tensor(torch.zeros(3, 2))
        False
    """
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(_raw(tensor))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")  # an empty one may have stride 0


def key(**parts: object) -> str:
    """Make the key of a cache entry from everything that decides its content.

    Args:
        parts: Texts, numbers, booleans, None, and lists, tuples and dicts of these. A list and a tuple are the same.

    Returns:
        32 hexadecimal digits.

    Raises:
        TypeError: A part has another type, of which no stable text is known.

    Example:
        >>> key(layer=5, dtype="float32") == key(dtype="float32", layer=5)
        True
        >>> key(layer=5) == key(layer=5.0)
        False
    """
    text = json.dumps(_plain(parts, "key"), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _plain(value: object, where: str) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    raise TypeError(
        f"{where} is a {type(value).__name__}; a key is made of str, int, float, bool, None, and of lists, tuples and "
        "dicts with str names of these. Pass digest_tensor(...) for a tensor and sha256_file(...) for a file."
    )


# Writing.


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
    target = _real(path)
    refuse_inside(target)
    with _locked(target) as alone, _replacing(target, alone, replace, need_bytes) as folder:
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
        _check_name(name, str(path))
    size = sum(len(item) for item in known.values() if isinstance(item, bytes))
    with writing(path, replace=replace, need_bytes=size) as folder:
        for name, item in known.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(item, bytes):
                (folder / name).write_bytes(item)
            else:
                item(folder / name)


def refuse_inside(path: str | Path) -> None:
    """Refuse a place inside a folder that Retouch saved: with anything more in it, that folder is damaged.

    All writers ask; ask first where there is work to do before something is written.

    Raises:
        StoreError: It lies inside such a folder.
    """
    target = _real(path)
    for folder in target.parents:
        if _is_saved(folder):
            raise StoreError(
                f"{target} lies inside {folder}, a folder that Retouch saved and that must stay as it is. "
                "Choose a place outside of it."
            )


def _is_saved(folder: Path) -> bool:
    with suppress(StoreError, OSError):
        manifest = read_json(folder / _MANIFEST)  # also one of a later format
        return isinstance(manifest, dict) and {"format", "files"} <= manifest.keys()
    return False


@contextmanager
def _replacing(target: Path, alone: bool, replace: bool, need_bytes: int = 0, own: bool = False) -> Iterator[Path]:
    """Fill and swap in a folder, the lock being held; `own` skips the question whose folder it is."""
    new = _sibling(target, "new")
    with _named(target):
        _put_back(target)
        _sweep(target, alone)
    _check_place(target, replace, own)
    _check_room(target, need_bytes)
    try:
        with _named(target, need_bytes, new):
            new.mkdir()
        with _named(target, need_bytes, new, full_only=True):
            yield new
        with _named(target, need_bytes, new):
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
    if own or not (present := _files(target)):
        return
    if not replace:
        raise StoreError(f"{target} exists already. Choose another name, or allow it to be replaced.")
    try:
        foreign = sorted(set(present) - set(_read_manifest(target)["files"]) - {_MANIFEST})
    except StoreError as error:
        raise StoreError(
            f"{target} was not written by this version of Retouch and will not be replaced ({error}) "
            "Choose another name, or move that folder away."
        ) from error
    if foreign:
        raise StoreError(
            f"{target} also holds files that Retouch did not write ({_few(foreign)}) and will not be replaced. "
            "Move these files away, or choose another name."
        )


def _seal(folder: Path) -> None:
    """Add the manifest and push everything to the disk, the folder last."""
    files = {}
    for name in track([n for n in _files(folder) if n != _MANIFEST], f"hash {folder.name}"):
        _check_name(name, str(folder))
        _check_pickle(folder / name)
        files[name] = {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
    text = json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True)
    (folder / _MANIFEST).write_text(text + "\n", encoding="utf-8")
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def _swap(new: Path, target: Path) -> None:
    try:
        new.rename(target)  # replaces nothing, or an empty folder
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        if not _exchange(new, target):
            _step_aside(new, target)
    _sync(target.parent)


def _step_aside(new: Path, target: Path) -> None:
    old = _sibling(target, "old")
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        _put_back(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; say no where the system cannot."""
    import ctypes

    if (rename := _renameat2()) is None:
        return False
    here, exchange = -100, 2
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    if (code := ctypes.get_errno()) in _ABSENT:
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


def recover(path: str | Path) -> None:
    """Put a complete folder back that an interrupted writer had moved aside; `check_folder` calls this first.

    Raises:
        StoreError: There is one, and it cannot be moved.
    """
    target = _real(path)
    if not os.path.lexists(target) and any(_siblings(target, "old")) and target not in _mine.get():
        with _locked(target), _named(target):
            _put_back(target)


def _put_back(target: Path) -> None:
    if os.path.lexists(target):
        return
    for old in sorted(_siblings(target, "old"), key=lambda p: p.stat().st_mtime, reverse=True):
        with suppress(StoreError):
            _check(old, verify_hashes=False)
            old.rename(target)
            _sync(target.parent)
            _log.warning("%s: put back after an interrupted write", target)
            return


def _sweep(target: Path, alone: bool) -> None:
    """Remove what stopped writers left: under the lock that is everything, else what belongs to no process."""
    for path in list(_siblings(target, "new|old")):
        if alone or _gone(int(path.name.rsplit("-", 2)[1])):
            _remove(path)


def _remove(path: Path | None) -> None:
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


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _siblings(target: Path, kind: str) -> Iterable[Path]:
    shape = re.compile(rf"\.{re.escape(target.name)}\.({kind})-\d+-[0-9a-f]{{8}}")
    with suppress(FileNotFoundError, NotADirectoryError):
        return [entry for entry in target.parent.iterdir() if shape.fullmatch(entry.name)]
    return []


@contextmanager
def _locked(target: Path) -> Iterator[bool]:
    """Let one writer at a time through; gives False where the file system has no locks."""
    if target in _mine.get():
        raise StoreError(f"{target} is already being written by this same call. Let it end first.")
    lock = target.with_name(f".{target.name}.lock")
    with _named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, alone = _take(lock)
    token = _mine.set(_mine.get() | {target})
    try:
        yield alone
    finally:
        _mine.reset(token)
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
            if error.errno in _ABSENT:
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


def _real(path: str | Path) -> Path:
    target = Path(os.path.realpath(path))
    if not target.name:
        raise StoreError(f"{str(path)!r} names no folder of its own. Give a name inside it.")
    return target


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _named(target: Path, need: int = 0, new: Path | None = None, full_only: bool = False) -> Iterator[None]:
    """Turn the system's errors into ours, which name the place and what to do."""
    try:
        yield
    except _DiskFull as error:  # of a file in the folder: name the folder
        raise _full(target, max(need, error.need)) from error
    except OSError as error:
        if error.errno in _FULL:
            need = max(need, _size(new) + 1 if new else 0)
            _remove(new)  # so that the bytes named as free are those free afterwards
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


def _check_room(target: Path, need: int) -> None:
    if need and need > _free(target.parent):
        raise _full(target, need)


# Reading.


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
    target = _real(path)
    for more in reversed(range(9)):
        recover(target)
        before = _identity(target)
        try:
            return _check(target, verify_hashes)
        except StoreError:
            if not more or _identity(target) == before:
                raise  # else another writer replaced the folder meanwhile: look again
    raise AssertionError("unreachable")


def _identity(target: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        return target.stat().st_ino, target.stat().st_ctime_ns
    return None


def _check(folder: Path, verify_hashes: bool) -> dict[str, Any]:
    if not os.path.lexists(folder):
        raise StoreError(f"{folder} does not exist. Check the path.")
    if not folder.is_dir():
        raise StoreError(f"{folder} is a file; a folder that Retouch saved is expected. Name the folder.")
    try:
        present = set(_files(folder)) - {_MANIFEST}
        manifest = _read_manifest(folder)
        files = manifest["files"]
        if missing := sorted(set(files) - present):
            raise StoreError(f"{folder} is incomplete: {_few(missing)} missing. {_AGAIN}")
        if extra := sorted(present - set(files)):
            raise StoreError(f"{folder} holds what it was not saved with: {_few(extra)}. Move that away.")
        for name in track(sorted(files), f"check {folder.name}") if verify_hashes else sorted(files):
            _check_file(folder / name, files[name], verify_hashes)
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {error.strerror or error} ({error.filename}).") from error
    return manifest


def _check_file(path: Path, entry: Mapping[str, Any], verify_hash: bool) -> None:
    if (size := path.stat().st_size) != entry["bytes"]:
        raise StoreError(f"{path} has {size:,} bytes and was saved with {entry['bytes']:,}. {_AGAIN}")
    if verify_hash and sha256_file(path) != entry["sha256"]:
        raise StoreError(f"{path} has other content than it was saved with (its hash differs). {_AGAIN}")
    _check_pickle(path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (path := folder / _MANIFEST).is_file():
        raise StoreError(f"{folder} has no {_MANIFEST}: it is incomplete, or Retouch did not write it. {_AGAIN}")
    manifest = read_json(path)
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if type(number) is int and number > FORMAT:
        raise StoreError(f"{path} has format {number}; this Retouch reads up to {FORMAT}. Update Retouch.")
    if number != FORMAT or type(number) is not int or not _well_formed(manifest):
        raise StoreError(f"{path} is not a list of files as Retouch writes it. {_AGAIN}")
    for name in manifest["files"]:
        _check_name(name, str(path))
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


def _files(folder: Path) -> list[str]:
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


def _few(names: Collection[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in sorted(names)[:5]) + rest


def _check_name(name: str, where: str) -> None:
    plain = PurePosixPath(name)
    inside = plain.parts and not plain.is_absolute() and ".." not in plain.parts and str(plain) == name
    if not inside or "\\" in name or "\0" in name or name == _MANIFEST:
        raise StoreError(f"{where} names the file {name!r}; allowed are plain names inside the folder. Do not use it.")
    if PurePosixPath(name).suffix.lower() in _PICKLES:
        raise StoreError(f"{where}: {name!r} may be a pickle, which runs code when it is read. Use safetensors.")


def _check_pickle(path: Path) -> None:
    import zipfile

    if path.suffix.lower() not in {".npy", ".npz"}:
        return
    try:
        with path.open("rb") as file:
            numeric = _numeric_archive(file) if path.suffix.lower() == ".npz" else _numeric(file)
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise StoreError(f"{path} is not a NumPy array ({error}). {_AGAIN}") from error
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


# Single files: tensors and JSON.


@contextmanager
def _new_file(path: str | Path, need_bytes: int = 0) -> Iterator[Path]:
    """Give the name of a file to write; when the ``with`` ends well, it takes the place of `path` in one step."""
    target = _real(path)
    refuse_inside(target)
    if target.is_dir():
        raise StoreError(f"{target} is a folder, and a file is to be written there. Choose another name.")
    with _named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target, alone=False)
    _check_room(target, need_bytes)
    new = _sibling(target, "new")
    try:
        with _named(target, need_bytes, new):
            yield new
            _sync(new)
            new.replace(target)
            _sync(target.parent)
    finally:
        new.unlink(missing_ok=True)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, whole or not at all; equal content gives equal bytes.

    Shapes: any; a view or a tied tensor is written in full.

    Raises:
        StoreError: A value is not finite, a dtype has no place in the format, or the disk is full.
        TypeError: A name or a text of the metadata is not a str.
    """
    if not all(isinstance(text, str) for item in (metadata or {}).items() for text in item):
        raise TypeError(f"{path}: metadata must be text by text, got {metadata!r}. Turn the values into str.")
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so every tensor is aligned
    end = 0
    for name in order:
        header[name] = _entry(path, name, tensors[name], end)
        end = header[name]["data_offsets"][1]
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with _new_file(path, 8 + len(head) + end) as new, new.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in track(order, f"write {Path(path).name}"):
            file.write(_raw(tensors[name]))


def _entry(path: str | Path, name: str, tensor: Tensor, start: int) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES or name == "__metadata__":
        raise StoreError(f"{path}: cannot store {name!r} of dtype {dtype}; allowed: {', '.join(_DTYPES)}. Convert it.")
    _check_finite(path, name, tensor)
    return {"dtype": _DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [start, start + tensor.nbytes]}


def _check_finite(path: str | Path, name: str, tensor: Tensor) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    values = tensor.float() if tensor.element_size() == 1 else tensor  # float8 knows no isfinite
    if bad := int((~values.isfinite()).sum()):
        raise StoreError(
            f"{path}: {bad:,} of the {tensor.numel():,} values of {name!r} are not finite (NaN or infinity). "
            "Such weights are never stored or used; look where they came from."
        )


def load_tensors(path: str | Path, expected: Collection[str] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file and refuse all that is not one.

    Args:
        path: The file.
        expected: The names that must be there, and no others; None takes any.

    Raises:
        StoreError: The file is missing, damaged or a pickle, a value is not finite, or a name is missing or extra.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_header(Path(path))
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError, ArithmeticError) as error:
        raise StoreError(f"{path} is damaged: {error}. {_AGAIN}") from error
    for what, names in (
        ("lacks", set(expected or ()) - set(tensors)),
        ("also holds", set(tensors) - set(expected or ())),
    ):
        if expected is not None and names:
            raise StoreError(f"{path} {what} {_few(names)}; it must hold exactly {_few(expected)}. {_AGAIN}")
    for name, tensor in tensors.items():
        _check_finite(path, name, tensor)
    return tensors


def _check_header(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise StoreError(f"{path} may be a pickle, which runs code when it is read. Convert it to safetensors.")
    try:
        with path.open("rb") as file:
            head, size = file.read(8), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    if size >= 8 and int.from_bytes(head, "little") <= min(size - 8, 100_000_000):
        return
    if head.startswith((b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))):
        raise StoreError(f"{path} is a pickle by its content, which runs code when read. Convert it to safetensors.")
    length = int.from_bytes(head, "little")
    raise StoreError(f"{path} is truncated or no safetensors file: header of {length:,} in {size:,} bytes. {_AGAIN}")


def read_json(path: str | Path) -> Any:
    """Read a JSON file strictly: NaN, infinity and a name given twice are refused.

    Raises:
        StoreError: The file is missing, or is not JSON.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
        return json.loads(text, parse_constant=_number, parse_float=_number, object_pairs_hook=_once)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not valid JSON: {error}. {_AGAIN}") from error


def _number(text: str) -> float:
    if text.lstrip("-") in {"NaN", "Infinity"} or float(text) in (float("inf"), -float("inf")):
        raise ValueError(f"{text} is no finite number")
    return float(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def write_json_atomic(path: str | Path, obj: object) -> None:
    """Write one JSON file, whole or not at all.

    Raises:
        StoreError: `obj` is not strict JSON (NaN and infinity are not), or the file cannot be written.
    """
    try:
        data = (json.dumps(obj, allow_nan=False, ensure_ascii=False, indent=2) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}: cannot be stored as JSON: {error}. Pass plain, finite values.") from error
    with _new_file(path, len(data)) as new:
        new.write_bytes(data)


# The cache.


def cache_dir() -> Path:
    """Name the cache's folder: ``$RETOUCH_CACHE``, else ``$XDG_CACHE_HOME/retouch``, else ``~/.cache/retouch``."""
    if own := os.environ.get("RETOUCH_CACHE"):
        return Path(own).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "retouch"


def cached(kind: str, key: str, build: Callable[[Path], None], *, verify: bool = False) -> Path:
    """Give the folder of a cache entry, and build it first when it is absent or damaged.

    Whoever comes while an entry is built waits and then uses it. An entry may hold gigabytes, so an existing one is
    only compared by the names and sizes of its files.

    Args:
        kind: What is cached, e.g. ``"stats"``.
        key: What `key` made from all inputs.
        build: Fills the empty folder it is given.
        verify: Compare the files' hashes too.

    Raises:
        StoreError: The entry cannot be written, or the disk is full.
    """
    _check_name(f"{kind}/{key}", "the cache")
    target = _real(cache_dir() / kind / key)
    if _fault(target, verify) is None:
        return target
    with _locked(target) as alone:
        _put_back(target)
        if (fault := _fault(target, verify)) is None:
            return target
        if target.exists():
            _log.warning("built again, because the cache is damaged: %s", fault)
        with _replacing(target, alone, replace=True, own=True) as folder:
            build(folder)
    return target


def _fault(target: Path, verify: bool) -> StoreError | None:
    try:
        _check(target, verify)
    except StoreError as error:
        return error
    return None
