"""What a stage leaves behind: while it runs, everything that it needs to go on; when it is done, its network.

Numbers lie in safetensors, all else in JSON, and each folder appears whole or not at all. Moments of the optimiser are
named after their parameters, states of random generators are rows of bytes, one for each process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import store
from ..errors import StoreError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .network import SlimForSequenceClassification

__all__ = [
    "generators", "load", "moments", "network_of", "plain_config", "remove", "restore_generators", "restore_moments",
    "save", "select", "under",
]  # fmt: skip

_NUMBERS = "state.safetensors"
_REST = "state.json"
_OURS = {_NUMBERS, _REST, "manifest.json"}
_CPU, _GPU = "generator.cpu", "generator.device"


# ---------------------------------------------------------------- folders


def save(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a state: tensors by name, and facts that JSON can hold.

    Raises:
        StoreError: A number is not finite, or the folder cannot be written.
    """
    files: dict[str, str | Callable[[Path], None]] = {
        _NUMBERS: lambda path: store.save_tensors(path, tensors),
        _REST: json.dumps(facts, allow_nan=False, ensure_ascii=False, indent=1),
    }
    store.write_folder(folder, files)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a state, or None where there is none, or it is damaged; then it is removed, to be made again."""
    try:
        store.recover(folder)
        if not folder.is_dir():
            return None
        store.check_folder(folder)
        return store.load_tensors(folder / _NUMBERS), store.read_json(folder / _REST)
    except StoreError:
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= _OURS:
            remove(folder)  # without a manifest it could not be written over
        return None


def remove(folder: Path) -> None:
    """Remove a state that is no longer needed."""
    shutil.rmtree(folder, ignore_errors=True)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put a prefix before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def select(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a prefix, without it."""
    return {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}


# ---------------------------------------------------------------- networks


def plain_config(network: SlimForSequenceClassification) -> dict[str, Any]:
    """Return a network's configuration as values that JSON can hold."""
    config: dict[str, Any] = json.loads(network.config.to_json_string(use_diff=False))
    return config


def network_of(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> SlimForSequenceClassification:
    """Build a network of a configuration and all its weights, evaluating.

    Raises:
        RuntimeError: A weight is missing, extra, or of another shape.
    """
    from .network import SlimConfig, SlimForSequenceClassification

    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and replaced at once
        network = SlimForSequenceClassification(SlimConfig.from_dict(dict(config)))
    network.load_state_dict(dict(weights))
    network.eval()
    return network


# ---------------------------------------------------------------- the optimiser


def moments(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Return the optimiser's numbers as ``{kind}.{parameter}``; a parameter that never moved has none."""
    return {
        f"{kind}.{name}": value
        for name, parameter in named
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], found: Mapping[str, Tensor]
) -> None:
    """Put back what `moments` returned."""
    parameters = dict(named)
    for key, value in found.items():
        kind, _, name = key.partition(".")
        # AdamW counts steps on the CPU, unless it is fused
        at_home = kind != "step" or optimizer.defaults.get("fused")
        place = parameters[name].device if at_home else torch.device("cpu")
        optimizer.state[parameters[name]][kind] = value.to(place)


# ---------------------------------------------------------------- random generators


def generators(accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the states of torch's generators, one row of bytes for each process."""
    found = {_CPU: torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        found[_GPU] = torch.cuda.get_rng_state(accelerator.device)
    return {name: accelerator.gather(state.to(accelerator.device)[None]).cpu() for name, state in found.items()}


def restore_generators(accelerator: Accelerator, found: Mapping[str, Tensor]) -> None:
    """Put back what `generators` returned, each process its own row."""
    row = accelerator.process_index
    torch.set_rng_state(found[_CPU][row])
    if _GPU in found and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(found[_GPU][row], accelerator.device)
