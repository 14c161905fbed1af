"""What training by epochs needs whoever trains: the order of the samples, the learning rate, the state on disk.

Nothing here knows what is learnt. A state holds weights, moments of the optimiser and the random generators as
safetensors and all else as JSON, in a folder that appears whole or not at all; a run that goes on from it ends, on a
CPU, with the same bits as one that was never stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import store
from ..errors import StoreError

__all__ = ["adamw", "learning_rate", "load_state", "order", "parts", "restore", "save_state", "snapshot"]

_NUMBERS, _REST = "state.safetensors", "state.json"
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


def save_state(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a state: tensors by name, and facts that JSON can hold.

    Raises:
        StoreError: A number is not finite, or the folder cannot be written.
    """
    files: dict[str, str | Callable[[Path], None]] = {
        _NUMBERS: lambda path: store.save_tensors(path, tensors),
        _REST: json.dumps(facts, allow_nan=False, ensure_ascii=False, indent=1),
    }
    store.write_folder(folder, files)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a state; None where there is none.

    Raises:
        StoreError: There is one and it is damaged.
    """
    store.recover(folder)
    if not folder.is_dir():
        return None
    try:
        store.check_folder(folder)
        return store.load_tensors(folder / _NUMBERS), store.read_json(folder / _REST)
    except StoreError as error:
        raise StoreError(
            f"{error} It is the state of an interrupted training; remove {folder} to begin again."
        ) from error


def snapshot(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return everything that decides the next step: weights, moments, and the random generators of torch."""
    found = {f"network.{name}": value.detach() for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            found[f"{kind}.{name}"] = value
    found["generator.cpu"] = torch.get_rng_state()
    device = next(network.parameters()).device
    if device.type == "cuda":
        found["generator.device"] = torch.cuda.get_rng_state(device)
    return found


def restore(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `snapshot` returned."""
    network.load_state_dict(under("network", tensors))
    device = next(network.parameters()).device
    for name, parameter in network.named_parameters():
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            if (key := f"{kind}.{name}") in tensors:
                optimizer.state[parameter][kind] = tensors[key].to(device)
    torch.set_rng_state(tensors["generator.cpu"])
    if "generator.device" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["generator.device"], device)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}
