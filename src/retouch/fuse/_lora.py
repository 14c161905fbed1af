"""Put low-rank adapters into a copy of a network's structure, and fold them into our factors afterwards."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import store
from ..change import LowRank
from ..errors import SettingsError, UserError
from ..model import Model
from ._scores import twin

if TYPE_CHECKING:
    from .prune import PrunePlan
    from .train import LoraSettings

__all__ = ["folded", "initial_a", "injected", "lean", "lora_layers", "targets_of"]

_LINEAR = (
    "attention.query", "attention.key", "attention.value", "attention.qkv", "attention.out", "mlp.gate", "mlp.up",
    "mlp.gate_up", "mlp.down",
)  # fmt: skip


def targets_of(model: Model, settings: LoraSettings) -> list[str]:
    """List our names of the weights that get an adapter.

    Raises:
        SettingsError: The family has no such weight, or the rank exceeds a weight's smaller size.
    """
    known = [part for part in _LINEAR if part in model.anatomy.parts]
    wanted = known if settings.targets is None else list(settings.targets)
    if odd := [t for t in wanted if t not in known]:
        raise SettingsError(f"targets: a block of {model.anatomy.family} has no {odd[0]!r}. Known: {', '.join(known)}.")
    names = [f"blocks.{b}.{part}" for b in range(model.anatomy.n_blocks) for part in known if part in wanted]
    for name in names:
        if settings.rank > min(model.matrix(name).shape):
            shape = "x".join(map(str, model.matrix(name).shape))
            raise SettingsError(f"rank {settings.rank} is larger than {name} allows ({shape}). Lower it.")
    return names


# ---------------------------------------------------------------- where A begins


def initial_a(
    model_full: Model, plan: PrunePlan | None, settings: LoraSettings, *, edge: int = 0, n_edges: int = 1
) -> dict[str, Tensor]:
    """Draw the first factors of an edge's adapter, cut to the columns that the edge has.

    The cloud calls this: an edge does not know which columns it has. ``shared`` gives every edge the same full-size
    matrix, ``orthogonal`` rows of one orthogonal matrix that no other edge has, ``independent`` a matrix of its own.

    Args:
        model_full: The whole model.
        plan: The edge's plan; None for an edge that holds the whole model.
        settings: Rank, targets and seeds.
        edge: Number of the edge, from 0.
        n_edges: How many edges there are.

    Returns:
        A matrix of (rank, inputs that the edge has) for each weight.

    Raises:
        UserError: Too many edges for orthogonal rows, or the plan was made for another model.
    """
    from .prune import check_plan

    units = None if plan is None else check_plan(plan, model_full)
    found = {}
    for name in targets_of(model_full, settings):
        matrix = _drawn(settings, name, model_full.matrix(name).shape[1], edge, n_edges)
        part = name.split(".", 2)[2]
        if plan is not None and units is not None and part in units.parts and units.axis(part) == "columns":
            index = units.index(part, plan.kept[model_full.anatomy.block_of(name)])
            matrix = matrix if index is None else matrix[:, index]
        found[name] = matrix.contiguous()
    return found


def _drawn(settings: LoraSettings, name: str, width: int, edge: int, n_edges: int) -> Tensor:
    rank, how = settings.rank, settings.a_init
    own = {"seed": settings.seed, "edge": edge} if how == "independent" else {"seed": settings.a_seed}
    generator = torch.Generator().manual_seed(int(store.key(weight=name, how=how, **own)[:15], 16))
    if how != "orthogonal":  # uniform with variance 1 / (3 inputs), as PEFT begins
        drawn: Tensor = (torch.rand(rank, width, generator=generator) * 2 - 1) / width**0.5
        return drawn
    if not 0 <= edge < n_edges or n_edges * rank > width:
        raise UserError(
            f"a_init orthogonal: edge {edge} of {n_edges} at rank {rank} needs {n_edges * rank} orthogonal rows, and "
            f"{name} has {width} inputs. Use a_init shared or independent, or a lower rank."
        )
    square = torch.randn(width, n_edges * rank, generator=generator, dtype=torch.float64)
    rows: Tensor = torch.linalg.qr(square).Q.T[edge * rank : (edge + 1) * rank]
    return rows.div(3**0.5).float()


def beginning(model: Model, settings: LoraSettings, initial: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the first factors to begin with: those given, or drawn here where that is possible.

    Raises:
        UserError: They must come from the cloud and were not given, or do not fit the model.
    """
    names = targets_of(model, settings)
    if initial is None:
        if settings.a_init == "orthogonal" or (settings.a_init == "shared" and getattr(model, "plan", None)):
            raise UserError(
                f"a_init {settings.a_init}: the first factors must come with the model, since only the cloud knows which "
                "columns it kept. Pass what initial_a gave there, or set a_init independent."
            )
        return initial_a(model, None, settings)
    for name in {*names, *initial}:
        expected = (settings.rank, model.matrix(name).shape[1]) if name in names else None
        if name not in initial or tuple(initial[name].shape) != expected:
            got = tuple(initial[name].shape) if name in initial else "nothing"
            raise UserError(f"The first factor of {name} must be {expected or 'absent'}; got {got}.")
    return {name: initial[name] for name in names}


# ---------------------------------------------------------------- memory

_THRESHOLD, _SMALL, _USUAL = -3, 64 * 2**10, 32 * 2**20
"""glibc's number for the size from which a block is the system's own, and two such sizes."""


@contextmanager
def lean(on: bool) -> Iterator[None]:
    """Have glibc give every large block back as soon as it is freed; elsewhere nothing happens.

    It otherwise keeps them in a heap that fragments: training a model of 130 million weights then took 1.6 times the
    memory, and grew on.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if on and sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_THRESHOLD, _USUAL)


# ---------------------------------------------------------------- PEFT


def injected(model: Model, settings: LoraSettings, first: Mapping[str, Tensor]) -> nn.Module:
    """Return a network with fresh adapters, in training mode; the model's own is neither changed nor copied."""
    from peft import LoraConfig, inject_adapter_in_model

    network = twin(model.network, dtype=getattr(torch, settings.dtype))
    transposed = {model.anatomy.transposed(name) for name in first}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=[model.anatomy.path(name) for name in first],
        fan_in_fan_out=transposed == {True},
    )
    adapted: nn.Module = inject_adapter_in_model(config, network)
    for name, layer in lora_layers(model, adapted, first).items():
        layer.lora_A["default"].to(torch.float32).weight.data.copy_(first[name])
        layer.lora_B["default"].to(torch.float32).weight.data.zero_()
        layer.lora_A["default"].weight.requires_grad_(not settings.freeze_a)
    if settings.checkpointing:
        enable: Any = getattr(adapted, "activation_checkpointing_enable", None)
        enable = enable or adapted.gradient_checkpointing_enable  # as transformers called it before
        enable({"use_reentrant": False})
    return adapted.train()


def lora_layers(model: Model, network: nn.Module, names: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's layers by our names."""
    return {name: network.get_submodule(model.anatomy.path(name)) for name in names}


def folded(model: Model, network: nn.Module, names: Sequence[str], settings: LoraSettings) -> dict[str, LowRank]:
    """Return the trained factors, with the scale folded into the left one."""
    scale = settings.alpha / settings.rank
    parts = {}
    for name, layer in lora_layers(model, network, names).items():
        left, right = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        parts[name] = LowRank(left.detach().cpu() * scale, right.detach().cpu().clone())
    return parts
