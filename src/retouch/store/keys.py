"""Hashes of files and tensors, and the keys of the cache that are made of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["digest_tensor", "key", "raw", "sha256_file"]


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
    digest.update(raw(tensor))
    return digest.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, in the order of its entries."""
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
