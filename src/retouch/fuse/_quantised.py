"""How factors are written for the way: their size before they are there, and a byte a number where that is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import StoreError

__all__ = ["dequantised", "quantised", "upload_bytes"]

_LEVELS = 127.5
_SCALE = ".scale"
_BYTES = {"int8": 1, "float16": 2, "float32": 4}


def upload_bytes(shapes: Iterable[tuple[int, int]], rank: int, dtype: str, *, freeze_a: bool = False) -> int:
    """Return the size of an adapter's factors.

    Args:
        shapes: Outputs and inputs of every weight that it changes, as the edge has them.
        rank: Of the adapter.
        dtype: ``float32``, ``float16``, or ``int8``, which has a float32 scale for each of a factor's `rank` directions.
        freeze_a: Only B is sent.
    """
    scales = 4 if dtype == "int8" else 0
    return sum(
        rank * (size * _BYTES[dtype] + scales)
        for outputs, inputs in shapes
        for size in ((outputs,) if freeze_a else (outputs, inputs))
    )


def quantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write every factor as int8 with a scale for each row of A and each column of B.

    Args:
        tensors: ``NAME.lora_A`` (rank, inputs) and ``NAME.lora_B`` (outputs, rank).

    Returns:
        The same names, and ``NAME.lora_A.scale`` beside each. No entry moves by more than 1/255 of the largest in its row
        of A or column of B.
    """
    found = {}
    for name, tensor in tensors.items():
        axis = _axis(name)
        step = tensor.float().abs().amax(axis, keepdim=True) / _LEVELS
        # levels lie half-way between whole numbers, none at 0: a row of zeros says that an edge had no such row
        levels = (tensor.float() / step).nan_to_num(0.0).floor().clamp(-128, 127)
        found[name] = levels.to(torch.int8).contiguous()
        found[name + _SCALE] = step.flatten().contiguous()
    return found


def dequantised(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Read factors that may be int8; others stay as they are.

    Raises:
        StoreError: A scale is missing or is none.
    """
    scales = {name: t for name, t in tensors.items() if name.endswith(_SCALE)}
    found = {name: t for name, t in tensors.items() if name not in scales}
    for name in [name for name, t in found.items() if t.dtype == torch.int8]:
        found[name] = _read(name, found[name], scales.pop(name + _SCALE, None), where)
    if scales:
        raise StoreError(f"{where}: {next(iter(scales))[:80]!r} is a scale of nothing. Do not use it.")
    return found


def _read(name: str, levels: Tensor, scale: Tensor | None, where: str) -> Tensor:
    axis = _axis(name)
    sound = (
        scale is not None
        and scale.dtype == torch.float32
        and levels.dim() == 2
        and tuple(scale.shape) == (levels.shape[1 - axis],)
        and bool((scale.isfinite() & (scale >= 0)).all())
    )
    if scale is None or not sound:
        raise StoreError(f"{where}: {name[:80]!r} is int8 without a sound scale for each row. Do not use it.")
    return (levels.float() + 0.5) * scale.unsqueeze(axis)


def _axis(name: str) -> int:
    """Return the axis along which the numbers of one direction lie."""
    return 1 if name.endswith("A") else 0
