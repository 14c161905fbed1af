"""Tensors in safetensors files: finite, aligned, and the same bytes for the same content."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StoreError
from ..progress import track
from .files import new_file
from .keys import raw
from .manifest import PICKLES, few
from .strict_json import AGAIN

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["load_tensors", "save_tensors"]

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


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
    with new_file(path, 8 + len(head) + end) as new, new.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in track(order, f"write {Path(path).name}"):
            file.write(raw(tensors[name]))


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
        raise StoreError(f"{path} is damaged: {error}. {AGAIN}") from error
    for what, names in (
        ("lacks", set(expected or ()) - set(tensors)),
        ("also holds", set(tensors) - set(expected or ())),
    ):
        if expected is not None and names:
            raise StoreError(f"{path} {what} {few(names)}; it must hold exactly {few(expected)}. {AGAIN}")
    for name, tensor in tensors.items():
        _check_finite(path, name, tensor)
    return tensors


def _check_header(path: Path) -> None:
    if path.suffix.lower() in PICKLES:
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
    raise StoreError(f"{path} is truncated or no safetensors file: header of {length:,} in {size:,} bytes. {AGAIN}")
