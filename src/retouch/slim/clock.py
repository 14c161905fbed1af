"""Seconds of each block, measured where the model will serve."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .network import SlimForSequenceClassification

__all__ = ["block_seconds", "whole_seconds"]


def block_seconds(
    network: SlimForSequenceClassification, batch: Mapping[str, Any], n_repeats: int = 9
) -> tuple[float, list[float]]:
    """Return the seconds an example spends in the embedding, and in each block with its exit: medians of repeats."""
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
                if block in network.widths.exits:
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
