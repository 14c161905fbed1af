"""Random numbers that belong to an adapter's row: neither the order of adapters nor the rows asked for together matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import store
from .base import Module

__all__ = ["bits", "draws", "keys_of"]


def draws(seed: int, weight: str, adapter: str, row: int, rows: int, inputs: int) -> Tensor:
    """Return uniform numbers in [0, 1) that depend on the row, not on which rows are asked for together.

    Args:
        seed: The method's seed.
        weight: Our name of the weight.
        adapter: The adapter's name, as `keys_of` gives it.
        row: The first row.
        rows: How many rows.
        inputs: Numbers in a row.

    Returns:
        (rows, inputs), float32.
    """
    numbers = _words(seed, weight, adapter, row, rows, inputs) >> 8
    return torch.from_numpy(numbers.astype(np.float32)).mul_(2.0**-24)


def bits(seed: int, weight: str, adapter: str, row: int, rows: int, inputs: int) -> Tensor:
    """Return 32 random bits for every entry of some rows; the arguments are those of `draws`.

    Returns:
        (rows, inputs), int32.
    """
    return torch.from_numpy(_words(seed, weight, adapter, row, rows, inputs).view("<i4").copy())


def _words(seed: int, weight: str, adapter: str, row: int, rows: int, inputs: int) -> NDArray[Any]:
    key = int(store.key(seed=seed, weight=weight, adapter=adapter)[:32], 16)
    steps = -(-inputs // 8)  # one step of the counter gives eight numbers of 32 bits
    words = np.random.Philox(key=key, counter=row * steps).random_raw(rows * steps * 4)
    return words.astype("<u8", copy=False).view("<u4").reshape(rows, steps * 8)[:, :inputs]


def keys_of(module: Module) -> list[str]:
    """Name the adapters of a weight apart: those of one name by their order among themselves."""
    names = module.names or tuple(str(owner) for owner in module.owners)
    return [f"{name}#{names[:i].count(name)}" if name in names[:i] else name for i, name in enumerate(names)]
