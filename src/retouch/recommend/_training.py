"""What training by epochs needs whoever trains: the order of the samples, the learning rate, what decides the next step.

Nothing here knows what is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import checkpoint

__all__ = ["adamw", "learning_rate", "order", "parts", "restore", "snapshot"]

_POOL = 16
"""Batches that are sorted by length together."""


def order(n_samples: int, seed: int, epoch: int, cap: int | None = None) -> NDArray[np.int64]:
    """Return which samples an epoch sees, in a random order that seed and epoch alone decide."""
    shuffled = np.random.default_rng((seed, epoch)).permutation(n_samples)
    return shuffled[:cap]


def parts(lengths: NDArray[np.integer], order: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield an epoch's batches; samples of like length go together, so that little padding is computed.

    Only neighbours of the random order are sorted, a few batches at a time, and those batches come in random order.

    Args:
        lengths: Positions of each sample.
        order: Which samples, in their random order.
        batch_size: Samples of a batch; the last one of the epoch may be smaller.
    """
    for first in range(0, len(order), _POOL * batch_size):
        pool = order[first : first + _POOL * batch_size]
        by_length = np.argsort(lengths[pool], kind="stable")
        batches = [by_length[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        for batch in sorted(batches, key=np.min):  # by the smallest place in the pool, which is random
            yield pool[batch]


def learning_rate(step: int, n_steps: int, peak: float, warm_up: int) -> float:
    """Rise in a straight line for `warm_up` steps, then fall to zero like a cosine; `step` counts from 0."""
    warm_up = min(warm_up, n_steps // 2)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(n_steps - warm_up, 1)))


def adamw(network: nn.Module, weight_decay: float, free: tuple[str, ...] = ()) -> torch.optim.AdamW:
    """Make an optimiser that lets only matrices decay.

    Args:
        network: Whose parameters with gradients are trained.
        weight_decay: Of matrices; vectors and the `free` ones have none.
        free: Names of matrices that do not decay, such as embeddings.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    decays = [p for name, p in named if p.ndim > 1 and name not in free]
    rest = [p for name, p in named if p.ndim <= 1 or name in free]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)


# ---------------------------------------------------------------- the state on disk


def snapshot(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return everything that decides the next step: weights, moments, and the random generators of torch."""
    return {
        **checkpoint.under("network", network.state_dict()),
        **checkpoint.moments(optimizer, network.named_parameters()),
        **checkpoint.under("generator", checkpoint.generators(next(network.parameters()).device)),
    }


def restore(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `snapshot` returned."""
    network.load_state_dict(checkpoint.select("network", tensors))
    checkpoint.restore_moments(optimizer, network.named_parameters(), tensors)
    checkpoint.restore_generators(next(network.parameters()).device, checkpoint.select("generator", tensors))
