"""Which rows and columns of which weights a unit of pruning is, and how many numbers it holds.

Two kinds of units: a group of query heads with the key-value head that they share, and a neuron of the feed-forward
part. The residual stream, norms, embeddings and head are never cut, so that every edge and the cloud share them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ModelError
from ..model import Model

__all__ = ["ATTENTION", "KeptUnits", "Units", "dense_blocks", "units_of"]

ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.out")
_FEED_FORWARD = ("mlp.gate", "mlp.up", "mlp.gate_up", "mlp.down")


@dataclass(frozen=True)
class KeptUnits:
    """The units of one block that stay: numbers of key-value heads and of neurons, sorted."""

    kv: tuple[int, ...]
    ff: tuple[int, ...]


@dataclass(frozen=True)
class Units:
    """The units of every block of a model.

    Attributes:
        kv: Key-value heads, each with its group of query heads.
        ff: Neurons.
        group: Query heads that share a key-value head.
        head: Width of a head.
        parts: Our names, inside a block, of the weights that units are cut from.
        reason: Why attention stays whole; empty if it can be cut.
    """

    kv: int
    ff: int
    group: int
    head: int
    parts: tuple[str, ...]
    reason: str = ""

    @property
    def attention(self) -> bool:
        """Whether attention can be cut."""
        return not self.reason

    @property
    def whole(self) -> KeptUnits:
        """Everything kept."""
        return KeptUnits(tuple(range(self.kv)), tuple(range(self.ff)))

    def axis(self, part: str) -> Literal["rows", "columns"]:
        """Tell whether units are rows (outputs) or columns (inputs) of a weight."""
        return "columns" if part in ("attention.out", "mlp.down") else "rows"

    def members(self, part: str) -> Tensor:
        """Say which rows or columns of a weight each unit is.

        Shapes:
            returns (units, rows or columns of a unit).
        """
        if part in ATTENTION:
            width = self.head if part in ("attention.key", "attention.value") else self.head * self.group
            return torch.arange(self.kv * width).reshape(self.kv, width)
        if part == "mlp.gate_up":  # the gate's rows first, then those of up
            return torch.arange(2 * self.ff).reshape(2, self.ff).T
        return torch.arange(self.ff)[:, None]

    def index(self, part: str, kept: KeptUnits) -> Tensor | None:
        """List the rows or columns of a weight that stay, sorted; None where all do."""
        units = kept.kv if part in ATTENTION else kept.ff
        members = self.members(part)
        if len(units) == len(members):
            return None
        return members[torch.tensor(units, dtype=torch.long)].flatten().sort().values


def units_of(model: Model) -> Units:
    """Find the units of a model.

    Raises:
        ModelError: The model is no decoder, or nothing in its blocks can be cut.
    """
    a = model.anatomy
    if a.kind != "decoder":
        raise ModelError(f"{model.source} is an encoder ({a.family}); adapters are trained on decoders, so open one.")
    feed_forward = tuple(p for p in _FEED_FORWARD if p in a.parts)
    if "mlp.down" not in a.parts or len(feed_forward) < 2:
        raise ModelError(f"{model.source}: the table {a.table} names no mlp.up and mlp.down, so nothing can be pruned.")
    reason = _why_whole(model)
    parts = feed_forward if reason else (*ATTENTION, *feed_forward)
    return Units(a.kv_heads, a.d_ff, a.heads // a.kv_heads, a.head_dim, parts, reason)


def _why_whole(model: Model) -> str:
    a = model.anatomy
    if a.kv_heads == 1:
        return f"{a.family} of this size has one key-value head, which cannot be divided"
    if missing := [p for p in ATTENTION if p not in a.parts]:
        return f"{a.family} has no {missing[0]} of its own in {a.table}"
    if foreign := _foreign(model):
        return f"{foreign} spans all heads, so they cannot be parted"
    return ""


def _foreign(model: Model) -> str:
    """Name a parameter of attention, besides its four weights, that is not shared by all heads."""
    a = model.anatomy
    attention = model.module("blocks.0.attention")
    inside = a.path("blocks.0.attention") + "."
    known = {a.path(f"blocks.0.{p}").removeprefix(inside) for p in ATTENTION}
    for name, parameter in attention.named_parameters():
        if name.rpartition(".")[0] not in known and parameter.numel() != a.head_dim:
            return inside + name
    return ""


def numbers_of(model: Model, units: Units, block: int) -> tuple[int, int]:
    """Count the weights and biases of one head group and of one neuron in a block."""
    totals = {"attention": 0, "mlp": 0}
    for part in units.parts:
        module = model.module(f"blocks.{block}.{part}")
        bias = getattr(module, "bias", None) if units.axis(part) == "rows" else None
        matrix = model.matrix(f"blocks.{block}.{part}")
        totals[part.partition(".")[0]] += matrix.numel() + (0 if bias is None else bias.numel())
    return totals["attention"] // units.kv, totals["mlp"] // units.ff


def dense_blocks(n_blocks: int, n_first: int | None, n_last: int | None) -> list[int]:
    """List the blocks that stay whole: by default the first 8 % and the last 4 %, at least one each."""
    first = max(1, math.ceil(0.08 * n_blocks)) if n_first is None else n_first
    last = max(1, math.ceil(0.04 * n_blocks)) if n_last is None else n_last
    return [b for b in range(n_blocks) if b < first or b >= n_blocks - last]


def best(scores: Tensor, n: int) -> tuple[int, ...]:
    """Return the numbers of the `n` highest scores, sorted; of equals the first."""
    order: Sequence[int] = scores.sort(descending=True, stable=True).indices[:n].tolist()
    return tuple(sorted(order))


def check_kept(units: Units, kept: Iterable[KeptUnits]) -> str:
    """Say what is wrong with kept units; empty if nothing is."""
    for block, one in enumerate(kept):
        for what, index, n in (("kv", one.kv, units.kv), ("ff", one.ff, units.ff)):
            if not index or list(index) != sorted(set(index)) or index[0] < 0 or index[-1] >= n:
                return f"block {block}: {what} must be sorted, unique, not empty and below {n}"
            if what == "kv" and not units.attention and len(index) != n:
                return f"block {block}: attention must stay whole ({units.reason})"
    return ""
