"""What an edge could see of each weight, as an adapter's record holds it.

The factors alone do not tell: rows that an edge did not have are zeros, and zeros may also have been learnt.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..change import LowRank
from ..errors import StoreError
from .base import Kept


def packed(kept: Mapping[str, Kept], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Write rows and columns as bits, and those that weights have in common once."""
    sets: dict[str, int] = {}
    weights = {name: [k.axis, sets.setdefault(_bits(k, shapes[name]), len(sets))] for name, k in kept.items()}
    return {"sets": list(sets), "weights": weights}


def _bits(kept: Kept, shape: tuple[int, int]) -> str:
    held = np.zeros(_length(kept.axis, shape), dtype=bool)
    held[list(kept.index)] = True
    return base64.b64encode(np.packbits(held, bitorder="little").tobytes()).decode()


def _length(axis: str, shape: tuple[int, int]) -> int:
    return shape[("rows", "columns").index(axis)]


def unpacked(told: Any, shapes: Mapping[str, tuple[int, int]], where: str) -> dict[str, Kept]:
    """Read what `packed` wrote, of a stranger.

    Args:
        told: The record's entry.
        shapes: Outputs and inputs of the weights that the adapter changes.
        where: The file, for messages.

    Raises:
        StoreError: It is something else, or does not fit the weights.
    """
    seen: dict[tuple[int, int], tuple[int, ...]] = {}
    kept = {}
    try:
        for name, (axis, number) in told["weights"].items():
            length = _length(axis, shapes[name])
            if (number, length) not in seen:
                seen[number, length] = _index(told["sets"][number], length)
            kept[name] = Kept(axis, seen[number, length])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreError(
            f"{where} lacks what the edge could see, or it does not fit. Copy the folder again."
        ) from error
    return kept


def _index(text: str, length: int) -> tuple[int, ...]:
    data = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(data) != -(-length // 8):  # before bits become numbers, each of which takes three hundred times its size
        raise ValueError("another number of rows or columns")
    index = tuple(np.flatnonzero(np.unpackbits(data, bitorder="little")).tolist())
    if not index or index[-1] >= length:
        raise ValueError("rows or columns beyond the weight, or none of them")
    return index


def check_unseen(weight: str, part: LowRank, kept: Kept | None, where: str) -> None:
    """Make sure that a difference is zero where its edge could see nothing.

    Raises:
        StoreError: It is not.
    """
    if kept is None:
        return
    factor = part.left if kept.axis == "rows" else part.right.T
    gone = torch.ones(len(factor), dtype=torch.bool)
    gone[list(kept.index)] = False
    if bool(factor[gone.to(factor.device)].any()):
        raise StoreError(
            f"{where}: {weight} is changed in {kept.axis} that its edge is said not to have had. Recover the adapter again."
        )
