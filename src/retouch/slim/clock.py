"""Seconds of each block, measured where the model will serve."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .network import SlimForSequenceClassification

__all__ = ["between", "block_seconds", "spread", "whole_seconds"]


def spread(lengths: ArrayLike, size: int = 32, n: int = 5) -> list[list[int]]:
    """Choose batches to time, from the shortest examples to the longest: rows of similar length, as served.

    Args:
        lengths: Tokens of each example.
        size: Examples a batch.
        n: Batches at most; of batches of equal mean length one is enough.

    Example:
        >>> spread([5, 1, 9, 3], size=2, n=2)
        [[1, 3], [0, 2]]
    """
    tokens = np.asarray(lengths)
    rows = np.argsort(tokens, kind="stable")
    starts = np.linspace(0, max(0, len(rows) - size), n).round().astype(int)
    found = {float(tokens[rows[i : i + size]].mean()): rows[i : i + size].tolist() for i in starts}
    return list(found.values())


def between(lengths: ArrayLike, at: Sequence[float], seconds: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Read each example's seconds off those of the timed lengths around its own, (examples, ...).

    Args:
        lengths: Tokens of each example.
        at: Mean length of each timed batch, ascending.
        seconds: What an example of it took, by block.

    Example:
        >>> between([10, 15, 40], [10, 20], [[1.0, 2.0], [2.0, 4.0]]).tolist()
        [[1.0, 2.0], [1.5, 3.0], [2.0, 4.0]]
    """
    columns = np.asarray(seconds, dtype=np.float64).T
    return np.stack([np.interp(np.asarray(lengths, dtype=float), at, column) for column in columns], axis=1)


def block_seconds(
    network: SlimForSequenceClassification,
    batch: Mapping[str, Any],
    n_repeats: int = 9,
    asked: Sequence[int] | None = None,
) -> tuple[float, list[float]]:
    """Return the seconds an example spends in the embedding, and in each block with its exit: medians of repeats.

    Args:
        network: What is timed.
        batch: Examples.
        n_repeats: How often each block is timed.
        asked: Blocks whose exits are asked; None: all.
    """
    read = network.widths.exits if asked is None else asked
    inputs = {
        k: v.to(network.device) for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")
    }
    mask, n = inputs["attention_mask"], len(inputs["input_ids"])
    with torch.no_grad():
        embed = _median(lambda: network.embed(**inputs), n_repeats) / n
        hidden, found = network.embed(**inputs), []
        for block in range(network.size.blocks):

            def step(hidden: torch.Tensor = hidden, block: int = block) -> torch.Tensor:
                after = network.run_block(block, hidden, mask)
                if block in read:
                    network.read_exit(block, after, mask)
                return after

            found.append(_median(step, n_repeats) / n)
            hidden = network.run_block(block, hidden, mask)
    return embed, found


def whole_seconds(network: SlimForSequenceClassification, batch: Mapping[str, Any], n_repeats: int = 9) -> float:
    """Return the seconds an example takes through the whole network."""
    embed, blocks = block_seconds(network, batch, n_repeats)
    return embed + sum(blocks)


def _median(call: Callable[[], Any], n_repeats: int) -> float:
    call()
    seconds = []
    for _ in range(n_repeats):
        begun = time.perf_counter()
        out = call()
        if out.device.type == "cuda":
            torch.cuda.synchronize(out.device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)
