"""Parameters and FLOPs of a slim model, exactly, and the search from a budget to widths before any training.

FLOPs count two for each multiply-add of the matrix products; lookups, biases, softmax, norms and activations are left
out, and so is padding: `tokens` are an example's real ones. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError
from .base import Budget, Plan, Size, Widths

__all__ = [
    "base_cost",
    "base_parameters",
    "block_flops",
    "cost",
    "flops_ratio",
    "narrower",
    "parameters",
    "plan_of",
    "rank_limit",
    "search",
]

Floats = NDArray[np.float64]

MIN_DEPTH = 1 / 3
"""Share of the blocks that must run on average: a model that always leaves below has an upper part for nothing."""

_SLACK = 1e-9
"""Rounding that a share of the blocks may fall short by, so that a limit which is just met is met."""


# ---------------------------------------------------------------- parameters


def parameters(size: Size, widths: Widths) -> int:
    """Count the parameters of the slim model.

    An exit is one dense map from d_model to the classes. A dense map in front of it, which a full-size model may have
    kept from its original, is not counted.
    """
    widths.require_within(size)
    blocks = sum(_block_parameters(size, n, f) for n, f in zip(widths.heads, widths.d_ff, strict=True))
    return int(_embedding_parameters(size, widths.rank or 0) + blocks + widths.n_exits * _exit_parameters(size))


def base_parameters(size: Size) -> int:
    """Count the parameters of the original with its classifier."""
    blocks = size.blocks * _block_parameters(size, size.heads, size.d_ff)
    pooler = (size.d_model**2 + size.d_model) * size.pooler
    return int(_embedding_parameters(size, 0) + blocks + pooler + _exit_parameters(size))


def rank_limit(size: Size) -> float:
    """Return the rank from which two embedding factors are no smaller than the table that they replace."""
    return size.vocab * size.d_model / (size.vocab + size.d_model)


def _embedding_parameters(size: Size, rank: Any) -> Any:
    """Of a rank or an array of them; 0 is the whole table."""
    words = np.where(np.equal(rank, 0), size.vocab * size.d_model, rank * (size.vocab + size.d_model))
    return words + (size.positions + size.token_types + 2) * size.d_model + size.extra


def _block_parameters(size: Size, heads: Any, d_ff: Any) -> Any:
    d, attended = size.d_model, heads * size.head_dim
    attention = 3 * (d + 1) * attended + attended * d + d
    return attention + (d + 1) * d_ff + d_ff * d + d + 4 * d


def _exit_parameters(size: Size) -> int:
    return (size.d_model + 1) * size.classes


# ---------------------------------------------------------------- FLOPs


def block_flops(size: Size, heads: int, d_ff: int, tokens: float) -> float:
    """Count the FLOPs of one block for one example of so many tokens."""
    return float(_block_flops(size, heads, d_ff, tokens, tokens**2))


def cost(size: Size, widths: Widths, tokens: float, last_block: int, n_exits: int | None = None) -> float:
    """Count the FLOPs of one example that leaves after a block.

    Args:
        size: The original.
        widths: What is kept of it.
        tokens: Real tokens of the example.
        last_block: The block whose exit answers.
        n_exits: How many exits were evaluated; by default all up to `last_block`.

    Raises:
        UserError: There is no such block.
    """
    _check_blocks(size, np.asarray(last_block))
    ran = zip(widths.heads[: last_block + 1], widths.d_ff[: last_block + 1], strict=True)
    evaluated = sum(e <= last_block for e in widths.exits) if n_exits is None else n_exits
    blocks = sum(block_flops(size, n, f, tokens) for n, f in ran)
    return 2.0 * tokens * (widths.rank or 0) * size.d_model + blocks + evaluated * _exit_flops(size)


def base_cost(size: Size, tokens: float) -> float:
    """Count the FLOPs of one example in the original."""
    return float(_base_flops(size, tokens, tokens**2))


def flops_ratio(size: Size, widths: Widths, lengths: ArrayLike, where: ArrayLike) -> float:
    """Return the FLOPs of all examples together as a share of the original's.

    Args:
        size: The original.
        widths: What is kept of it.
        lengths: Real tokens of each example.
        where: The block after which each example leaves, or one for all.

    Raises:
        UserError: A length or a block is not possible, or their numbers differ.
    """
    tokens, left = _lengths(lengths), np.asarray(where)
    _check_blocks(size, left)
    if left.ndim and left.shape != tokens.shape:
        raise UserError(f"There are {tokens.size} lengths and {left.size} blocks to leave after: one each is needed.")
    linear, square, fixed = _cumulative(size, widths)
    spent = linear[left] * tokens + square[left] * tokens**2 + fixed[left]
    return float(spent.sum() / _base_flops(size, tokens, tokens**2).sum())


def _cumulative(size: Size, widths: Widths) -> tuple[Floats, Floats, Floats]:
    """For each block what leaving after it costs: per token, per token squared, and once."""
    heads, d_ff = np.array(widths.heads, dtype=np.float64), np.array(widths.d_ff, dtype=np.float64)
    linear: Floats = np.cumsum(_block_flops(size, heads, d_ff, 1, 0)) + 2.0 * (widths.rank or 0) * size.d_model
    square: Floats = np.cumsum(_block_flops(size, heads, d_ff, 0, 1))
    fixed: Floats = np.cumsum(np.isin(np.arange(len(widths.heads)), widths.exits)) * np.float64(_exit_flops(size))
    return linear, square, fixed


def _block_flops(size: Size, heads: Any, d_ff: Any, tokens: Any, squares: Any) -> Any:
    """Take tokens and their squares apart, so that their means over many examples give the mean FLOPs."""
    attended = heads * size.head_dim
    return 2.0 * tokens * (4 * size.d_model * attended + 2 * size.d_model * d_ff) + 4.0 * squares * attended


def _base_flops(size: Size, tokens: Any, squares: Any) -> Any:
    blocks = size.blocks * _block_flops(size, size.heads, size.d_ff, tokens, squares)
    return blocks + 2.0 * size.d_model**2 * size.pooler + _exit_flops(size)


def _exit_flops(size: Size) -> float:
    return 2.0 * size.d_model * size.classes


def _lengths(lengths: ArrayLike) -> Floats:
    tokens = np.asarray(lengths, dtype=np.float64)
    if tokens.ndim != 1 or tokens.size == 0 or not (np.isfinite(tokens) & (tokens >= 1)).all():
        raise UserError("FLOPs need the token counts of at least one example, each at least 1.")
    return tokens


def _check_blocks(size: Size, blocks: NDArray[Any]) -> None:
    if not np.issubdtype(blocks.dtype, np.integer) or ((blocks < 0) | (blocks >= size.blocks)).any():
        raise UserError(f"An example leaves after a block from 0 to {size.blocks - 1}; got {blocks.tolist()!r:.80}.")


# ---------------------------------------------------------------- plans


def plan_of(
    size: Size, widths: Widths, lengths: ArrayLike, flops: float | None = None, asked: Sequence[int] | None = None
) -> Plan:
    """Price widths that are already chosen.

    Args:
        size: The original.
        widths: What is kept of it.
        lengths: Real tokens of training examples.
        flops: The FLOPs target as a share of the original's, from which the mean depth follows.
        asked: Those exits that examples may leave at; all by default.

    Raises:
        UserError: Even leaving at the first exit costs more than `flops`; the message has the smallest possible.
    """
    full = flops_ratio(size, widths, lengths, size.blocks - 1)
    params = parameters(size, widths) / base_parameters(size)
    tokens = _lengths(lengths)
    embed = 2.0 * tokens.sum() * (widths.rank or 0) * size.d_model / _base_flops(size, tokens, tokens**2).sum()
    share = 1.0 if flops is None else min(1.0, (flops - embed) / (full - embed))
    first = (asked or widths.exits)[0]
    if share < (first + 1) / size.blocks - 2 * _SLACK:
        least = flops_ratio(size, widths, tokens, first)
        raise UserError(
            f"These widths cannot reach flops {flops:g}: leaving at the first exit, after block {first}, already "
            f"costs {_shown(least)}. Ask for more, or for narrower blocks."
        )
    return Plan(size, widths, params, full, float(share * size.blocks))


# ---------------------------------------------------------------- from a budget to a plan


def search(
    size: Size,
    budget: Budget,
    lengths: ArrayLike,
    exits: Iterable[int] | None = None,
    *,
    asked: Sequence[int] | None = None,
    heads: int | None = None,
    d_ff: int | None = None,
    rank: int | None = None,
    depth: float = 0.0,
) -> Plan:
    """Choose uniform widths within a budget: the largest product of the shares kept of every resource.

    The resources are heads, MLP neurons, embedding rank, and the blocks that an example may run on average. Limits are
    strict; among equals the fewest parameters win.

    Args:
        size: The original.
        budget: What may be kept; FLOPs stand for seconds here.
        lengths: Real tokens of training examples.
        exits: Blocks with an exit; all by default.
        asked: Those of them that examples may leave at, in order; all by default.
        heads: Fixes the heads; the rest is still searched.
        d_ff: Fixes the MLP neurons.
        rank: Fixes the embedding's rank; 0 leaves the table whole.
        depth: An example must be allowed to run at least so many blocks on average, or nearly as many as can be reached
            (then a single head may do).

    Raises:
        UserError: The budget has no sizes, a fixed width is not possible, or nothing fits; then the message names the
            nearest pair of limits that can be reached.

    Example:
        >>> bert = Size(12, 768, 12, 3072, 30522, 512, 2, 2)
        >>> plan = search(bert, Budget(params="1/8"), [128])
        >>> plan.widths.heads[0], plan.widths.d_ff[0], plan.widths.rank, plan.mean_depth
        (2, 256, 120, 12.0)
    """
    if budget.max_drop is not None:
        raise UserError("max_drop is found by training several sizes; a search for widths needs params or flops.")
    found = size.exits(exits)
    first = (asked or found)[0]
    axes = _axes(size, heads, d_ff, rank, 1 if depth else max(1, size.heads // 6))
    points = replace(_Points.of(size, axes, _lengths(lengths), found), first_exit=first)
    best = points.best(budget, depth)
    if best is None:
        raise UserError(points.nearest(budget))
    return plan_of(size, Widths.uniform(size, *points.widths(best), found), lengths, budget.flops, asked)


@dataclass(frozen=True)
class _Points:
    """The lattice, one entry a point. Costs are shares of the original's; rank 0 is the whole table."""

    size: Size
    first_exit: int
    heads: NDArray[np.int64]
    d_ff: NDArray[np.int64]
    rank: NDArray[np.int64]
    params: Floats
    embed: Floats
    full: Floats

    @classmethod
    def of(cls, size: Size, axes: Sequence[Sequence[int]], tokens: Floats, exits: Sequence[int]) -> _Points:
        heads, d_ff, rank = (grid.ravel() for grid in np.meshgrid(*map(np.asarray, axes), indexing="ij"))
        mean, square = float(tokens.mean()), float((tokens**2).mean())  # FLOPs depend on the lengths by these alone
        blocks = size.blocks * _block_parameters(size, heads, d_ff)
        params = _embedding_parameters(size, rank) + blocks + len(exits) * _exit_parameters(size)
        base = _base_flops(size, mean, square)
        embed = 2.0 * mean * rank * size.d_model / base
        running = size.blocks * _block_flops(size, heads, d_ff, mean, square) + len(exits) * _exit_flops(size)
        ratio = params / base_parameters(size)
        return cls(size, exits[0], heads, d_ff, rank, ratio, embed, embed + running / base)

    @property
    def least_share(self) -> float:
        """The smallest share of the blocks to run on average; nothing leaves below the first exit."""
        return max(MIN_DEPTH, (self.first_exit + 1) / self.size.blocks)

    def share(self, flops: float | None) -> Floats:
        """The share of the blocks that an example may run on average, for each point."""
        if flops is None:
            return np.ones_like(self.full)
        return np.minimum(1.0, (flops - self.embed) / (self.full - self.embed))

    def best(self, budget: Budget, depth: float = 0.0) -> int | None:
        share = self.share(budget.flops)
        kept = np.flatnonzero((self.params <= (budget.params or math.inf)) & (share >= self.least_share - _SLACK))
        if not kept.size:
            return None
        # the very deepest point pays with all of its embedding, so a little less than that must do
        kept = kept[share[kept] >= min(depth / self.size.blocks, 0.95 * share[kept].max()) - _SLACK]
        score = np.round(self.product(kept) + np.log(share[kept]), 12)  # equal products differ in their last digits
        return int(kept[np.lexsort((self.full[kept], self.params[kept], -score))[0]])

    def product(self, at: NDArray[np.int64]) -> Floats:
        """The sum of the logarithms of the shares kept of heads, neurons and rank."""
        rank = np.where(self.rank[at] == 0, self.size.d_model, self.rank[at]) / self.size.d_model
        shares: Floats = self.heads[at] / self.size.heads * (self.d_ff[at] / self.size.d_ff) * rank
        return np.log(shares)

    def widths(self, at: int) -> tuple[int, int, int | None]:
        return int(self.heads[at]), int(self.d_ff[at]), int(self.rank[at]) or None

    def nearest(self, budget: Budget) -> str:
        """Say which limits near those asked for can be reached."""
        least = self.embed + self.least_share * (self.full - self.embed)
        over = np.zeros_like(least)
        for ratios, limit in ((self.params, budget.params), (least, budget.flops)):
            if limit is not None:
                over += np.maximum(0.0, np.log(ratios / limit)) ** 2
        at = int(over.argmin())
        limits = [("params", self.params[at], budget.params), ("flops", least[at], budget.flops)]
        given = [(name, found, limit) for name, found, limit in limits if limit is not None]
        asked = " and ".join(f"{name} {limit:.4g}" for name, _, limit in given)
        reached = " and ".join(f"{name} {_shown(max(found, limit))}" for name, found, limit in given)
        heads, d_ff, rank = self.widths(at)
        words = f"{heads} heads, d_ff {d_ff}, rank {rank or 'not cut'}"
        if budget.flops is not None:
            words += f" and a mean depth of {self.least_share * self.size.blocks:.3g} of {self.size.blocks} blocks"
        return (
            f"No widths reach {asked}. The nearest that can be reached: {reached}, with {words}. "
            "Ask for that, or for more."
        )


def _axes(
    size: Size, heads: int | None, d_ff: int | None, rank: int | None, fewest: int
) -> tuple[list[int], list[int], list[int]]:
    """Return the values of heads, d_ff and rank that are tried."""
    step, limit = max(8, size.d_ff // 48 // 8 * 8), rank_limit(size)
    ranks = [r for r in range(max(4, size.d_model // 96), math.ceil(limit), max(4, size.d_model // 96)) if r < limit]
    return (
        _fixed("heads", heads, 1, size.heads) or list(range(fewest, size.heads + 1)),
        _fixed("d_ff", d_ff, 1, size.d_ff) or sorted({*range(step, size.d_ff + 1, step), size.d_ff}),
        _fixed("rank", rank, 0, math.ceil(limit) - 1) or [0, *ranks],
    )


def _fixed(name: str, value: int | None, least: int, most: int) -> list[int]:
    if value is not None and not least <= value <= most:
        raise UserError(f"{name} must lie from {least} to {most} for this original; got {value}.")
    return [] if value is None else [value]


def _shown(ratio: float) -> str:
    """Write a share so that asking for what is written suffices: four digits, rounded up."""
    step = 10.0 ** (math.floor(math.log10(ratio)) - 3)
    up = math.ceil(ratio / step - 1e-9) * step
    return f"{up:.4g} (1/{1 / up:.3g})"


def narrower(plan: Plan, lengths: ArrayLike = (32,)) -> Widths:
    """Find widths without early exits whose cost at full depth is at most a plan's mean cost.

    The embedding stays. Of all heads and neurons that fit, those with the largest product are taken, as in `search`.

    Args:
        plan: Its mean depth says what an example costs on average.
        lengths: Real tokens of training examples.

    Raises:
        UserError: Even one head and eight neurons a block cost more.
    """
    size, tokens = plan.size, _lengths(lengths)
    mean, square = float(tokens.mean()), float((tokens**2).mean())
    blocks = zip(plan.widths.heads, plan.widths.d_ff, strict=True)
    full = sum(_block_flops(size, n, f, mean, square) for n, f in blocks) + plan.widths.n_exits * _exit_flops(size)
    limit = full * plan.mean_depth / size.blocks
    steps = sorted({*range(8, size.d_ff + 1, 8), size.d_ff})
    heads, d_ff = (axis.ravel() for axis in np.meshgrid(range(1, size.heads + 1), steps, indexing="ij"))
    costs = size.blocks * _block_flops(size, heads, d_ff, mean, square) + _exit_flops(size)
    fits = np.flatnonzero(costs <= limit * (1 + _SLACK))
    if not fits.size:
        depth = f"{plan.mean_depth:.3g} blocks of the plan"
        raise UserError(f"No widths run all {size.blocks} blocks at the cost of {depth}. Allow a higher cost.")
    best = fits[np.lexsort((costs[fits], -heads[fits] * d_ff[fits]))[0]]
    return Widths.uniform(size, int(heads[best]), int(d_ff[best]), plan.widths.rank, [size.blocks - 1])
