"""What a long training leaves behind to go on from: numbers in safetensors, all else in JSON, each folder whole or not at all.

A run that goes on from its state ends, on a CPU, with the same bits as one that was never stopped. A damaged state is
told and begun again. Nothing here knows what is learnt.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import store
from .errors import StoreError

__all__ = [
    "generators", "load", "moments", "remove", "restore_generators", "restore_moments", "save", "select", "under",
]  # fmt: skip

_log = logging.getLogger(__name__)
_NUMBERS, _REST = "state.safetensors", "state.json"
_OURS = {_NUMBERS, _REST, "manifest.json"}
_KINDS = ("step", "exp_avg", "exp_avg_sq")
"""What Adam and AdamW keep of each parameter."""


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


def load(folder: Path | None, key: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a state, or None where there is none to go on from; a damaged one, or another run's, is told.

    Args:
        folder: Where it is; None keeps none.
        key: What the state's facts must have as ``key``; None asks for nothing.

    Raises:
        StoreError: The folder is damaged and holds other files too, so that it cannot be begun again.
    """
    if folder is None:
        return None
    try:
        store.recover(folder)
        if not folder.is_dir():
            return None
        store.check_folder(folder)
        tensors, facts = store.load_tensors(folder / _NUMBERS), store.read_json(folder / _REST)
    except StoreError as error:
        _begin_again(folder, error)
        return None
    if key is not None and facts.get("key") != key:
        _log.warning("%s is the state of a run with other data, settings or model: it starts again", folder)
        return None
    return tensors, facts


def _begin_again(folder: Path, error: StoreError) -> None:
    """Remove what is damaged: without a manifest it could not be written over."""
    if folder.is_dir() and not {path.name for path in folder.iterdir()} <= _OURS:
        raise StoreError(f"{error} Move {folder} away to begin again.") from error
    _log.warning("a saved state is damaged, so its run starts again: %s", error)
    remove(folder)


def remove(folder: Path) -> None:
    """Remove a state that is no longer needed."""
    shutil.rmtree(folder, ignore_errors=True)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put a prefix before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def select(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a prefix, without it."""
    return {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}


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
    """Put back what `moments` returned; other names are passed over."""
    for name, parameter in named:
        for kind in (kind for kind in _KINDS if f"{kind}.{name}" in found):
            # AdamW counts steps on the CPU, unless it is fused
            at_home = kind != "step" or optimizer.defaults.get("fused")
            place = parameter.device if at_home else torch.device("cpu")
            optimizer.state[parameter][kind] = found[f"{kind}.{name}"].to(place)


# ---------------------------------------------------------------- random generators


def generators(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators as bytes: ``cpu``, and ``device`` where that is a GPU."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_rng_state(device)
    return found


def restore_generators(device: torch.device, found: Mapping[str, Tensor]) -> None:
    """Put back what `generators` returned."""
    torch.set_rng_state(found["cpu"])
    if "device" in found and device.type == "cuda":
        torch.cuda.set_rng_state(found["device"], device)
