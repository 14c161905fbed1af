"""The header of a stranger's safetensors file, checked whole before any tensor is read.

A file begins with the header's length (8 bytes, little endian), then JSON: for each tensor its type, its shape and the
bytes it takes. Accepted is only what tells, without gap or overlap, what every byte of the file is.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ._folder import exactly, parsed, quoted

MAX_HEADER = 1 << 20
MAX_TENSORS = 10_000
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of factors, and their bytes a number."""
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive or a pickle in one",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        dtype: Its type, as the format names it.
        shape: Its shape.
        start: First byte, counted from the beginning of the file.
        end: The byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: io.FileIO, where: Path, sizes: Mapping[str, int] = SIZES) -> dict[str, Entry]:
    """Return where each tensor of a file lies.

    Args:
        file: The file.
        where: What errors call it.
        sizes: Types that are read, and their bytes a number.

    Raises:
        StoreError: It is no safetensors file, is too large a header, or does not account for every byte.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise _refused(where, f"it has {size} bytes, too few for a header")
    head = bytes(exactly(file, 0, 8, where))
    length = int.from_bytes(head, "little")
    if length > min(MAX_HEADER, size - 8):
        raise _refused(where, _kind(head) or f"its header of {length:,} bytes {_too_long(length, size)}")
    header = parsed(exactly(file, 8, length, where), where)
    _check_metadata(header.pop("__metadata__", {}), where)
    if len(header) > MAX_TENSORS:
        raise _refused(where, f"it names {len(header):,} tensors; at most {MAX_TENSORS:,} are read")
    entries = {name: _entry(name, told, (8 + length, size), where, sizes) for name, told in header.items()}
    _check_cover(entries, 8 + length, size, where)
    return entries


def _refused(where: Path, what: str) -> StoreError:
    return StoreError(f"{where} is no sound safetensors file: {what}. Copy it again, or do not use this adapter.")


def _kind(head: bytes) -> str:
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return "it is a pickle by its content, which runs code when it is read"
    return next((f"it is {kind} by its content" for mark, kind in _ARCHIVES.items() if head.startswith(mark)), "")


def _too_long(length: int, size: int) -> str:
    return f"is larger than {MAX_HEADER:,}" if length > MAX_HEADER else f"does not fit into a file of {size:,}"


def _check_metadata(told: Any, where: Path) -> None:
    if not isinstance(told, dict) or not all(isinstance(text, str) for text in told.values()):
        raise _refused(where, "its __metadata__ is not text by text")


def _entry(name: str, told: Any, span: tuple[int, int], where: Path, sizes: Mapping[str, int]) -> Entry:
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise _refused(where, f"the tensor {quoted(name)} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in sizes:
        raise _refused(where, f"{quoted(name)} is of type {quoted(dtype)}; factors are {', '.join(sizes)}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise _refused(where, f"shape or data_offsets of {quoted(name)} are not counts")
    base, size = span
    if any(count > size for count in (*shape, *offsets)):  # before it is multiplied or printed: it may have any length
        raise _refused(where, f"shape or data_offsets of {quoted(name)} go beyond its {size:,} bytes")
    start, end = offsets
    if end - start != math.prod(shape) * sizes[dtype]:
        raise _refused(where, f"{quoted(name)} takes {end - start:,} bytes, which its shape and type do not")
    return Entry(dtype, tuple(shape), base + start, base + end)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_cover(entries: dict[str, Entry], start: int, size: int, where: Path) -> None:
    """Every byte after the header belongs to one tensor, and the file ends with the last."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            what = "overlap" if entry.start < at else "leave a gap"
            raise _refused(where, f"the bytes of {quoted(name)} {what}: they begin at {entry.start:,}, expected {at:,}")
        at = entry.end
    if at != size:
        raise _refused(where, f"its header accounts for {at:,} bytes and it has {size:,}")
