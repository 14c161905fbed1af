"""Quantise exported stages to int8, and compare them with float32 before anybody trusts them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ..router import Router
from ._stages import quiet
from .latency import call_router, measure

__all__ = ["Quantised", "Text", "compared", "mib", "quantised"]

Text: TypeAlias = str | tuple[str, str]


@dataclass(frozen=True)
class Quantised:
    """What int8 did, measured on texts.

    Args:
        n_texts: How many texts.
        agreement: Share of texts with the same answer as float32, exits included; a regression's answers are the same
            if they differ by less than a hundredth of the target's scale.
        same_exit: Share of texts that leave at the same exit.
        bytes_float32: Size of the float32 stages in bytes.
        bytes_int8: Size of the int8 stages in bytes.
        speedup: Median time of float32 over that of int8, one text a call, one thread.
        noisy: Whether the machine was busy meanwhile.
    """

    n_texts: int
    agreement: float
    same_exit: float
    bytes_float32: int
    bytes_int8: int
    speedup: float
    noisy: bool

    def __str__(self) -> str:
        pace = "faster" if self.speedup >= 1 else "SLOWER"
        times = self.speedup if self.speedup >= 1 else 1 / self.speedup
        return (
            f"int8: {mib(self.bytes_int8)} instead of {mib(self.bytes_float32)}; {self.agreement:.1%} of "
            f"{self.n_texts} texts answered as by float32, {self.same_exit:.1%} at the same exit; {times:.2f}x {pace} "
            f"than float32{' (the machine was busy: measure again)' if self.noisy else ''}. Its answers depend on batch "
            "mates and padding."
        )


def mib(n_bytes: int) -> str:
    """Write a size in MiB."""
    return f"{n_bytes / 2**20:.2f} MiB"


def quantised(graph: bytes) -> bytes:
    """Quantise a stage: tables, and linear maps per channel, whose inputs are scaled call by call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped, unused-ignore]

    model = onnx.load_from_string(graph)
    # the exporter has folded the graph already, which is what onnxruntime would otherwise ask for
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with quiet(), tempfile.TemporaryDirectory() as place:
        quantize_dynamic(model, Path(place) / "int8.onnx", per_channel=True, weight_type=QuantType.QInt8)
        return (Path(place) / "int8.onnx").read_bytes()


def compared(full: Router, small: Router, texts: Sequence[Text], sizes: Sequence[int]) -> Quantised:
    """Answer texts one by one with both, and time both in turn; `sizes` are their bytes."""
    ids, mask, types = full.encode(texts)
    answers = [
        [router.answer(*(a[i : i + 1] for a in (ids, mask, types))) for i in range(len(ids))]
        for router in (full, small)
    ]
    before, after = (np.concatenate([a.logits for a in found]) for found in answers)
    where = [np.concatenate([a.where for a in found]) for found in answers]
    if full.exits.task == "regression":
        same = np.abs(before - after)[:, 0] < 0.01
    else:
        same = before.argmax(axis=1) == after.argmax(axis=1)
    rows, kinds = ([row[real == 1].tolist() for row, real in zip(a, mask)] for a in (ids, types))
    calls = {"float32": call_router(full), "int8": call_router(small)}
    clock = measure(calls, rows, types=kinds, batch_sizes=(1,), n_calls=max(50, len(rows)), pad=full.exits.pad)
    speedup = clock.speedup("float32", "int8")
    alike = float((where[0] == where[1]).mean())
    return Quantised(len(rows), float(same.mean()), alike, sizes[0], sizes[1], speedup, clock.noisy)
