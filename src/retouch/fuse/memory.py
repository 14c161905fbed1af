"""How much memory training an adapter takes at its peak, predicted from a model's shapes and an edge's settings.

All terms are linear in the head groups and neurons that stay, so that a budget turns into widths without a search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..settings import Settings, setting
from ._units import Units, numbers_of

if TYPE_CHECKING:
    from ..model import Model

__all__ = ["MIB", "RUNTIME_MIB", "Load", "Peak", "predicted"]

MIB = 2**20
RUNTIME_MIB = 400
"""Interpreter, torch, transformers, PEFT and tokenizer, on a CPU."""


@dataclass(frozen=True)
class Load(Settings):
    """A class of edge: how it will train."""

    batch: int = setting(8, "Rows of one pass.", ge=1)
    n_tokens: int = setting(256, "Tokens of a row.", ge=1)
    n_answer_tokens: int = setting(32, "Tokens of a row that the loss is taken on.", ge=1)
    rank: int = setting(8, "Rank of the adapter.", ge=1, le=1024)
    bytes_per_weight: Literal[1, 2, 4] = setting(4, "4 for float32, 2 for bfloat16, 1 for int8.")
    checkpointing: bool = setting(False, "Whether activations are computed again in the backward pass.")
    dropout: float = setting(
        0.05, "Of the adapter; above 0 the backward pass keeps a mask of every adapted input.", ge=0, lt=1
    )


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of training, by what holds them."""

    weights: float
    adapter: float
    activations: float
    head: float
    runtime: float = RUNTIME_MIB * MIB

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return self.weights + self.adapter + self.activations + self.head + self.runtime

    @property
    def mib(self) -> float:
        """All of it, in MiB."""
        return self.total / MIB

    def to_dict(self) -> dict[str, float]:
        """Return MiB by what holds them."""
        names = ("weights", "adapter", "activations", "head", "runtime")
        return {n: round(getattr(self, n) / MIB, 3) for n in names} | {"total": round(self.mib, 3)}


def predicted(model: Model, units: Units, widths: Mapping[int, tuple[float, float]], load: Load) -> Peak:
    """Predict the peak of training an adapter on all weights of the blocks.

    Source:
        Our own count: weights once; per adapter number its value, gradient and two moments of AdamW; what a block keeps
        for the backward pass; the answers' log-probabilities and two gradients of their size.

    Args:
        model: The whole model.
        units: Its units.
        widths: Head groups and neurons that stay, by block; a block that is not named is whole.
        load: How the edge will train.

    Returns:
        The bytes. Fractions of units are allowed, for interpolation.
    """
    a = model.anatomy
    whole = float(units.kv), float(units.ff)
    each = [widths.get(b, whole) for b in range(a.n_blocks)]
    lost = 0.0
    for block, (kv, ff) in widths.items():
        of_kv, of_ff = numbers_of(model, units, block)
        lost += (units.kv - kv) * of_kv + (units.ff - ff) * of_ff
    n_numbers = sum(p.numel() for p in model.network.parameters()) - lost
    return Peak(
        weights=load.bytes_per_weight * n_numbers,
        adapter=16.0 * sum(_adapter(model, units, kv, ff, load.rank) for kv, ff in each),
        activations=_activations(model, units, each, load),
        head=12.0 * load.batch * load.n_answer_tokens * a.vocab_size,
    )


def _adapter(model: Model, units: Units, kv: float, ff: float, rank: int) -> float:
    """Numbers of the two factors on every linear weight of a block with these widths."""
    a = model.anatomy
    q, d = kv * units.group * units.head, a.d_model
    sizes = {
        "attention.query": (q, d), "attention.key": (kv * units.head, d), "attention.value": (kv * units.head, d),
        "attention.qkv": (q + 2 * kv * units.head, d), "attention.out": (d, q), "mlp.gate": (ff, d),
        "mlp.up": (ff, d), "mlp.gate_up": (2 * ff, d), "mlp.down": (d, ff),
    }  # fmt: skip
    return sum(rank * sum(sizes[p]) for p in a.parts if p in sizes)


def _activations(model: Model, units: Units, each: Sequence[tuple[float, float]], load: Load) -> float:
    """What the backward pass needs, as autograd was seen to keep it, and one block's gradients."""
    a, dropped = model.anatomy, load.dropout > 0  # dropout keeps its mask, as wide as its result
    n_norms, on_heads = _norms(model)
    blocks = []
    for kv, ff in each:
        q = kv * units.group * units.head
        stream = (n_norms + (10 if dropped else 2)) * a.d_model
        heads = (6 if dropped else 4) * q + on_heads * (q + kv * units.head)
        blocks.append(stream + heads + (5 if dropped else 4) * ff + 7 * load.rank + load.n_tokens)
    kept = len(each) * a.d_model + max(blocks) if load.checkpointing else sum(blocks)
    return 4.0 * load.batch * load.n_tokens * (kept + max(blocks))


def _norms(model: Model) -> tuple[int, int]:
    """Count a block's norms of the stream, and say whether heads have their own."""
    lines = {
        n: p.numel() for n, p in model.module("blocks.0").named_parameters() if p.dim() == 1 and n.endswith("weight")
    }
    inside = model.anatomy.path("blocks.0.attention").removeprefix(model.anatomy.path("blocks.0") + ".") + "."
    on_heads = any(n.startswith(inside) for n in lines)
    return sum(not n.startswith(inside) for n in lines), int(on_heads)
