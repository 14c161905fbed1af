"""Measure how long models take to answer, side by side: real texts at their own lengths, one by one and in batches.

All models see the same batches and are called in turn, so that a machine that slows down hits all alike. Load averages
are taken before and after, and a run on a busy machine is marked `noisy` instead of being believed.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UserError, unknown
from ..measure import environment
from ..progress import report
from ..router import Router

__all__ = ["Batch", "Call", "Latency", "Row", "batches", "call_network", "call_router", "machine", "measure"]

Ints: TypeAlias = NDArray[np.int64]
Order = Literal["shuffled", "by_length"]
_FEWEST_CALLS = 50
"""Calls of a batch size at least, where batches are so large that fewer would serve all requests."""


class Batch(NamedTuple):
    """What one call is given, padded on the right to its longest row.

    Shapes:
        input_ids, attention_mask, token_type_ids: (batch, tokens).
    """

    input_ids: Ints
    attention_mask: Ints
    token_type_ids: Ints


Call: TypeAlias = Callable[[Batch], object]


@dataclass(frozen=True)
class Row:
    """The time that one model took at one batch size.

    Args:
        model: The model's name.
        batch_size: Texts of one call.
        order: ``"by_length"`` where texts of similar length share a call.
        n_calls: Calls that were timed.
        p50_ms: Half of the calls took at most this, in milliseconds.
        p95_ms: 95 % of the calls took at most this, in milliseconds.
        examples_per_second: All texts by all seconds.
    """

    model: str
    batch_size: int
    order: Order
    n_calls: int
    p50_ms: float
    p95_ms: float
    examples_per_second: float


@dataclass(frozen=True)
class Latency:
    """What `measure` found.

    Args:
        rows: One for each batch size, order and model.
        environment: Processor, versions, threads and load averages.
        noisy: Whether more work than the machine has cores was waiting before or after.
    """

    rows: tuple[Row, ...]
    environment: Mapping[str, Any]
    noisy: bool

    def row(self, model: str, batch_size: int = 1, order: Order = "shuffled") -> Row:
        """Find one row.

        Raises:
            UnknownName: It was not measured.
        """
        wanted = f"{model} at batch {batch_size} {order}"
        rows = {f"{row.model} at batch {row.batch_size} {row.order}": row for row in self.rows}
        if wanted not in rows:
            raise unknown("measured row", wanted, rows)
        return rows[wanted]

    def speedup(self, base: str, model: str, batch_size: int = 1, order: Order = "shuffled") -> float:
        """Divide the time of `base` by that of `model`, both the median of a call."""
        return self.row(base, batch_size, order).p50_ms / self.row(model, batch_size, order).p50_ms

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {
            "noisy": self.noisy,
            "environment": dict(self.environment),
            "rows": [asdict(row) for row in self.rows],
        }


# ---------------------------------------------------------------- what is called


def call_network(network: torch.nn.Module) -> Call:
    """Make a call of a PyTorch classifier: logits and nothing else are asked for, and waited for."""
    takes_types = "token_type_ids" in inspect.signature(network.forward).parameters
    takes_types = takes_types and getattr(getattr(network, "config", None), "type_vocab_size", 2) > 1
    device = next(network.parameters()).device
    network.eval()

    @torch.inference_mode()
    def call(batch: Batch) -> object:
        fields = batch._asdict() if takes_types else {k: v for k, v in batch._asdict().items() if k[0] != "t"}
        return network(**{k: torch.from_numpy(v).to(device) for k, v in fields.items()}).logits.cpu()

    return call


def call_router(router: Router) -> Call:
    """Make a call of an exported model; its threads are those that it was opened with."""
    return lambda batch: router.answer(*batch)


def batches(
    rows: Sequence[Sequence[int]],
    batch_size: int,
    n_calls: int,
    *,
    types: Sequence[Sequence[int]] | None = None,
    pad: int = 0,
    by_length: bool = False,
    seed: int = 0,
) -> list[Batch]:
    """Make the batches of a run: rows in a fixed shuffle, taken again from its start when it ends.

    Args:
        rows: Token ids of each text, without padding.
        batch_size: Rows of a batch; each batch is full.
        n_calls: How many batches.
        types: Token types of each text; None for zeros.
        pad: Token id of the padding.
        by_length: Sort the rows that were drawn by length, so that rows of similar length meet.
        seed: Of the shuffle.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    drawn = np.resize(order, n_calls * batch_size).tolist()
    if by_length:
        drawn.sort(key=lambda i: len(rows[i]))
    parts = (drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size))
    return [_padded([rows[i] for i in part], types and [types[i] for i in part], pad) for part in parts]


def _padded(rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None, pad: int) -> Batch:
    shape = len(rows), max(map(len, rows))
    ids, mask, kinds = np.full(shape, pad, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        if types is not None:
            kinds[i, : len(row)] = types[i]
    return Batch(ids, mask, kinds)


# ---------------------------------------------------------------- the clock


def measure(
    models: Mapping[str, Call],
    rows: Sequence[Sequence[int]],
    *,
    types: Sequence[Sequence[int]] | None = None,
    pad: int = 0,
    batch_sizes: Sequence[int] = (1, 8, 32),
    n_calls: int = 500,
    n_warm_up: int = 20,
    threads: int = 1,
    seed: int = 0,
) -> Latency:
    """Time models on the same requests, call by call in turn.

    Known problems: PyTorch and onnxruntime keep threads of their own and disturb each other; measure them apart.

    Args:
        models: What is called, by name; see `call_network` and `call_router`.
        rows: Token ids of real texts, without padding, at their own lengths.
        types: Token types of each text; None for zeros.
        pad: Token id of the padding.
        batch_sizes: Texts of one call; each above 1 is measured shuffled and sorted by length.
        n_calls: Calls at batch size 1; larger batches serve as many texts, in at least 50 calls (or `n_calls`).
        n_warm_up: Calls of each model before the clock starts, at each batch size.
        threads: Threads that PyTorch may use meanwhile.
        seed: Of the shuffle.

    Raises:
        UserError: There is no model, no text, or an empty text; or a number is below 1.
    """
    _check(models, rows, batch_sizes, n_calls, threads)
    runs: list[tuple[int, Order]] = [(b, o) for b in batch_sizes for o in _orders(b)]
    found: list[Row] = []
    load = [_load()]
    with _threads(threads):
        used = {"torch_threads": torch.get_num_threads(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS")}
        for done, (size, order) in enumerate(runs):
            report("latency", done, len(runs))
            calls = n_calls if size == 1 else max(min(_FEWEST_CALLS, n_calls), n_calls // size)
            given = batches(rows, size, calls, types=types, pad=pad, by_length=order == "by_length", seed=seed)
            for name, seconds in _timed(models, given, n_warm_up).items():
                found.append(_row(name, size, order, seconds))
    report("latency", len(runs), len(runs))
    load.append(_load())
    return Latency(tuple(found), {**machine(), **used, "load_before": load[0], "load_after": load[1]}, _noisy(load))


def _orders(batch_size: int) -> tuple[Order, ...]:
    return ("shuffled",) if batch_size == 1 else ("shuffled", "by_length")


def _check(models: Mapping[str, Call], rows: Sequence[Sequence[int]], sizes: Sequence[int], *counts: int) -> None:
    if not models or not rows or not all(len(row) for row in rows):
        raise UserError(f"Latency needs a model and texts with tokens; got {len(models)} models, {len(rows)} texts.")
    if not sizes or min(*sizes, *counts) < 1:
        raise UserError(f"batch_sizes, n_calls and threads must be at least 1; got {list(sizes)}, {list(counts)}.")


def _timed(models: Mapping[str, Call], given: Sequence[Batch], n_warm_up: int) -> dict[str, list[float]]:
    """Time each call; who comes first changes from batch to batch."""
    names = list(models)
    for i in range(n_warm_up):
        for name in names:
            models[name](given[i % len(given)])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i, batch in enumerate(given):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begin = time.perf_counter()
            models[name](batch)
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def _row(model: str, batch_size: int, order: Order, seconds: Sequence[float]) -> Row:
    p50, p95 = (float(1000 * np.percentile(seconds, q)) for q in (50, 95))
    return Row(model, batch_size, order, len(seconds), p50, p95, batch_size * len(seconds) / sum(seconds))


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def _noisy(load: Sequence[float | None]) -> bool:
    return max((value for value in load if value is not None), default=0.0) > (os.cpu_count() or 1)


def machine() -> dict[str, Any]:
    """Say on what times are taken."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {**environment(), **_onnxruntime(), "usable_cores": usable}


def _onnxruntime() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"onnxruntime": version("onnxruntime")}
    except PackageNotFoundError:
        return {}
