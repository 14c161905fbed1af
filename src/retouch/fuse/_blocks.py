"""Rules that look at single entries of a weight, run over blocks of its rows: no whole difference is ever in memory.

Every pass computes the blocks anew from the factors. Products are always taken over the same tiles of rows and random
numbers belong to a row, so the result has the same bits however many rows are worked on at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .. import store
from ..change import LowRank
from ..settings import setting
from ._streams import draws, keys_of
from .base import Entries, FuseMethod, Module, Resolver
from .core import Core, canonical, factors, spanned, within

__all__ = [
    "Blocks",
    "Elected",
    "Entries",
    "Entrywise",
    "Rule",
    "averaged",
    "collected",
    "elected",
    "in_core",
    "refactored",
    "trim",
    "whole",
]

Rule = Callable[[Tensor, int], Tensor]
"""What turns a block of all differences (adapters, rows, inputs), from a row on, into a fused one (rows, inputs)."""

BYTES = 8 << 20
"""How large a block may be unless sixteen rows need more: what stays near the processor is worked on fastest."""
OVERSAMPLE = 8
"""Columns beyond the wanted rank in the search for a fused difference's largest singular triples."""
WIDER = 4
"""Where a smaller rank is wanted than the adapters have together, the search is up to so many times wider."""
SNAP = 1e-10
"""Coordinates below this share of the largest are rounding: a structural zero must not vote."""


# ---------------------------------------------------------------- the blocks of one weight


class Blocks:
    """The differences of one weight, some rows at a time, as often as they are asked for.

    Attributes:
        module: The weight.
        rows: How many rows come at once.
    """

    def __init__(self, module: Module, rows: int | None = None) -> None:
        self.module = module
        self.shape = module.shape
        self.tile = _tile(len(module.parts), self.shape[1])
        self.rows = self.tile * -(-(rows or 1) // self.tile)
        self._factors = [(p.left.float().contiguous(), p.right.float().contiguous()) for p in module.parts]
        self._keys = keys_of(module)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row's number and the differences there, (adapters, rows, inputs), which may be written over."""
        outputs = self.shape[0]
        for row in range(0, outputs, self.rows):
            values = self._block(row, min(row + self.rows, outputs))
            yield row, values if self.module.entries is None else self.module.entries(values, row)

    def _block(self, start: int, stop: int) -> Tensor:
        padded = self.tile * -(-(stop - start) // self.tile)  # so that tiles lie alike in memory whatever the block
        values = torch.empty(len(self._factors), padded, self.shape[1])
        for i, (left, right) in enumerate(self._factors):
            for row in range(start, stop, self.tile):
                end = min(row + self.tile, stop)
                torch.mm(left[row:end], right, out=values[i, row - start : end - start])
        return values[:, : stop - start]

    def seen(self, adapter: int) -> int:
        """Return how many entries of the weight the adapter's edge could see."""
        outputs, inputs = self.shape
        kept = self.module.kept[adapter]
        if kept is None:
            return outputs * inputs
        return len(kept.index) * (inputs if kept.axis == "rows" else outputs)

    def columns(self, adapter: int) -> Tensor | None:
        """Return the columns that the adapter's edge could see; None is all of them."""
        kept = self.module.kept[adapter]
        return torch.tensor(kept.index, dtype=torch.long) if kept is not None and kept.axis == "columns" else None

    def draws(self, seed: int, adapter: int, row: int, rows: int) -> Tensor:
        """Return an adapter's own random numbers for some rows, (rows, inputs)."""
        return draws(seed, self.module.name, self._keys[adapter], row, rows, self.shape[1])

    def thresholds(self, density: float) -> Tensor | None:
        """Find for each adapter the size from which on an entry is among the largest `density` of those it could set.

        Exact, in three passes: a non-negative float's bits grow with it, so their first 12 give a histogram of 16 bins
        an octave, and the next 12 and the last 7 tell the values of one bin apart.

        Returns:
            A size for each adapter; entries of that size or more are kept. None where all are.
        """
        if density >= 1:
            return None
        missing = [max(1, round(density * self.seen(i))) for i in range(len(self._factors))]
        found = [0] * len(missing)
        for shift, width in ((19, 12), (7, 12), (0, 7)):
            counts = self._histograms(found, shift, width)
            for i, count in enumerate(counts):
                above = count.flip(0).cumsum(0)  # entries in this bin or a higher one, from the highest down
                n = int((above < missing[i]).sum())
                missing[i] -= int(above[n - 1]) if n else 0
                found[i] = (found[i] << width) | (len(count) - 1 - n)
        return torch.tensor(found, dtype=torch.int32).view(torch.float32)

    def _histograms(self, found: Sequence[int], shift: int, width: int) -> Tensor:
        """Count, for each adapter, the next bits of the values whose bits before them are those found."""
        counts = torch.zeros(len(found), 1 << width, dtype=torch.long)
        for _, values in self:
            for i, value in enumerate(values):
                bits = value.abs().flatten().view(torch.int32)
                if shift < 19:
                    bits = bits[(bits >> (shift + width)) == found[i]] & ((1 << (shift + width)) - 1)
                counts[i] += torch.bincount(bits >> shift, minlength=1 << width)
        return counts


def _tile(n: int, inputs: int) -> int:
    tile = 256
    while tile > 16 and 4 * tile * inputs * (n + 3) > BYTES:
        tile //= 2
    return tile


# ---------------------------------------------------------------- steps of rules


def averaged(values: Tensor, weights: Sequence[float]) -> Tensor:
    """Add up differences with their weights: (adapters, rows, inputs) to (rows, inputs)."""
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights):
        total.add_(value, alpha=weight)
    return total


def trim(values: Tensor, sizes: Tensor | None) -> Tensor:
    """Set to zero what is smaller than each adapter's own size, in place."""
    if sizes is not None:
        for value, size in zip(values, sizes):
            value.masked_fill_(value.abs() < size, 0)
    return values


def elected(values: Tensor, weights: Sequence[float]) -> Tensor:
    """Let adapters elect each entry's sign, by their weighted sum, and average those that have it.

    Zeros never have it, and where the sum is zero nobody has.

    Source: the second and third step of TIES-Merging (Yadav et al., NeurIPS 2023).
    """
    side = averaged(values, weights).sign_()
    total, share = torch.zeros_like(side), torch.zeros_like(side)
    for value, weight in zip(values, weights):
        agrees = value * side > 0
        total.add_(value * agrees, alpha=weight)
        share.add_(agrees, alpha=weight)
    return total.div_(share.masked_fill_(share == 0, 1))


# ---------------------------------------------------------------- from fused blocks to factors


def collected(blocks: Blocks, rule: Rule) -> Tensor:
    """Run a rule over all blocks and put the fused rows together, (outputs, inputs)."""
    fused = torch.empty(blocks.shape)
    for row, values in blocks:
        fused[row : row + values.shape[1]] = rule(values, row)
    return fused


def whole(difference: Tensor) -> LowRank:
    """Write a difference of full rank as factors, exactly: itself and an identity."""
    outputs, inputs = difference.shape
    if outputs <= inputs:
        return LowRank(torch.eye(outputs), difference)
    return LowRank(difference, torch.eye(inputs))


def refactored(blocks: Blocks, rule: Rule, rank: int, seed: int = 0) -> LowRank:
    """Run a rule and find the best factors of the fused difference that two passes over the blocks can find.

    The first pass takes F'F times vectors that sketch what the adapters read, so that a step of subspace iteration costs
    no pass of its own; the second takes F in the space found. Where the rank is nearly the weight's own, the fused difference is formed instead.

    Source: Halko, Martinsson, Tropp (2011), their two-pass scheme, in float64.

    Args:
        blocks: The differences.
        rule: What fuses a block.
        rank: Of the result, at most the weight's size.
        seed: Of the sketch.

    Returns:
        Factors in float32; the share of the squared norm that the rank keeps is in their notes.
    """
    if rank >= min(blocks.shape):
        return whole(collected(blocks, rule))
    width = max(rank, min(blocks.module.rank, WIDER * rank)) + OVERSAMPLE
    if width >= min(blocks.shape):
        u, s, vh = torch.linalg.svd(collected(blocks, rule).double(), full_matrices=False)
        return within(u[:, :rank], s, vh[:rank])
    basis, energy = _rows_space(blocks, rule, width, seed)
    seen = torch.empty(blocks.shape[0], basis.shape[1], dtype=torch.float64)
    for row, part in _tiles(blocks, rule):
        seen[row : row + len(part)] = part @ basis
    q, t = torch.linalg.qr(seen)
    u, s, vh = torch.linalg.svd(t)
    fused = within(q @ u[:, :rank], s[:rank], vh[:rank] @ basis.T)
    kept = min(1.0, float(s[:rank].square().sum()) / energy) if energy else 1.0
    return replace(fused, notes={"kept_energy": kept})


def _rows_space(blocks: Blocks, rule: Rule, width: int, seed: int) -> tuple[Tensor, float]:
    """Return an orthonormal basis (inputs, width) near the largest right singular vectors, and the squared norm."""
    start = _start(blocks.module, width, seed)
    product, energy = torch.zeros_like(start), 0.0
    for _, part in _tiles(blocks, rule):
        product.addmm_(part.T, part @ start)
        energy += float(part.square().sum())
    return torch.linalg.qr(product).Q, energy


def _start(module: Module, width: int, seed: int) -> Tensor:
    """Return vectors that sketch what the adapters read, and random ones beside: the fused difference lies near."""
    outputs, inputs = module.shape
    first = min(width - OVERSAMPLE, sum(p.rank for p in module.parts))
    sketch = torch.zeros(inputs, first, dtype=torch.float64)
    for part, weight, name in zip(module.parts, module.weights, keys_of(module)):
        mixed = part.left.double().T @ _normal(outputs, first, seed, module.name, name)
        sketch.addmm_(part.right.double().T, mixed, alpha=weight)
    return torch.cat([sketch, _normal(inputs, width - first, seed, module.name, "")], 1)


def _normal(rows: int, columns: int, seed: int, weight: str, adapter: str) -> Tensor:
    start = int(store.key(seed=seed, weight=weight, adapter=adapter)[:15], 16)
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(start))


def _tiles(blocks: Blocks, rule: Rule) -> Iterator[tuple[int, Tensor]]:
    """Yield the fused rows in float64, always in the same tiles."""
    for first, values in blocks:
        fused = rule(values, first)
        for row in range(0, len(fused), blocks.tile):
            yield first + row, fused[row : row + blocks.tile].double()


# ---------------------------------------------------------------- the core as one small weight


def in_core(module: Module, make: Callable[[Blocks], Rule], rank: int | None = None) -> LowRank:
    """Run a rule on the adapters' coordinates in the canonical basis: another rule than on the weight's own entries.

    Args:
        module: The weight.
        make: Gives the rule when it is given the blocks.
        rank: At most, of the result.
    """
    core = spanned(module.parts) if module.core is None else canonical(module.core)
    blocks = _Coordinates(module, core)
    return factors(core, collected(blocks, make(blocks)).double(), rank)


class _Coordinates(Blocks):
    """Coordinates as the differences of a small weight, without what only rounding has put there."""

    def __init__(self, module: Module, core: Core) -> None:
        largest = core.middles.abs().max() if core.middles.numel() else 0.0
        self._values = torch.where(core.middles.abs() > SNAP * largest, core.middles, 0.0).float()
        super().__init__(replace(module, kept=(None,) * len(module.parts), core=None, entries=None))
        self.shape = core.middles.shape[1], core.middles.shape[2]
        self.rows = max(1, self.shape[0])

    def _block(self, start: int, stop: int) -> Tensor:
        return self._values[:, start:stop].clone()  # rules write over what they are given


# ---------------------------------------------------------------- what such methods share


@dataclass(frozen=True)
class Entrywise(FuseMethod):
    """Base of methods whose rule looks at single entries of the whole differences."""

    rank: int | None = setting(None, "Rank of the fused difference; by default the sum of the adapters' ranks.", ge=1)
    rows: int | None = setting(
        None, "Rows worked on at once, rounded up; more take more memory and change nothing.", ge=1
    )

    def takes_entries(self) -> bool:
        """Such a rule may follow a resolver of entries."""
        return True

    def out_rank(self, ranks: Sequence[int], shape: tuple[int, int], resolver: Resolver | None = None) -> int:
        """The rank that is wanted: what the rule leaves has full rank."""
        return min(self.rank or sum(ranks), *shape)

    @abstractmethod
    def rule(self, blocks: Blocks) -> Rule:
        """Return what fuses a block; thresholds and the like are found here, before."""

    def fuse(self, module: Module) -> LowRank:
        """Run the rule over blocks of rows, and find factors of what it gives."""
        blocks = Blocks(module, self.rows)
        return refactored(blocks, self.rule(blocks), self.rank or module.rank, self.seed)


@dataclass(frozen=True)
class Elected(Entrywise):
    """Base of methods whose rule lets adapters elect signs, in the weight or in the core."""

    space: Literal["full", "core"] = setting(
        "full", "Whose entries vote: the weight's, or those of the small core that the adapters span."
    )

    @property
    def label(self) -> str:
        """In the core it is another rule, and called so."""
        return self.name if self.space == "full" else f"{self.name}@core"

    def takes_entries(self) -> bool:
        """Only where the weight's own entries vote."""
        return self.space == "full"

    def out_rank(self, ranks: Sequence[int], shape: tuple[int, int], resolver: Resolver | None = None) -> int:
        """In the core never more than the adapters have together."""
        wanted = super().out_rank(ranks, shape, resolver)
        return wanted if self.space == "full" else min(wanted, sum(ranks))

    def fuse(self, module: Module) -> LowRank:
        """Run the rule over blocks of rows, or over the coordinates in the core."""
        return super().fuse(module) if self.space == "full" else in_core(module, self.rule, self.rank)
