"""Keys: what flows into a weight at the edited token, averaged over the left contexts of a fact or of a subject."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import Model
from ..trace import Trace
from .rows import Problem

__all__ = ["Prefix", "averages", "batches", "keys_at", "mean_keys", "output_at", "prefixes", "read_all"]


class Prefix(NamedTuple):
    """A row up to its edited token, and its weight in the mean key.

    In a causal model the key at a token depends on the text up to it only, so that two prompts that share it have one
    key: it is read, and counted, once.
    """

    ids: tuple[int, ...]
    weight: float
    bare: bool


def prefixes(found: Sequence[Problem], group: Sequence[int]) -> list[Prefix]:
    """Return the distinct rows of a group of facts up to the edited token; their weights sum to 1.

    Attributes of each: ``bare`` tells the rows that the facts' first rows made.
    """
    merged: dict[tuple[int, ...], tuple[float, bool]] = {}
    for i in group:
        problem = found[i]
        for j, (row, anchor, weight) in enumerate(zip(problem.rows, problem.anchors, problem.weights)):
            ids = row.ids[: anchor + 1]
            old, bare = merged.get(ids, (weight, False))
            merged[ids] = (old, bare or j == 0)
    total = sum(w for w, _ in merged.values())
    return [Prefix(ids, w / total, bare) for ids, (w, bare) in merged.items()]


@torch.no_grad()
def keys_at(model: Model, rows: Sequence[tuple[int, ...]], positions: Sequence[int], name: str) -> Tensor:
    """Read the input of a weight at one position of each row.

    Shapes:
        Returns (rows, inputs), float64 on the CPU.
    """
    return read_all(model, [row[: p + 1] for row, p in zip(rows, positions)], [name])[name]


@torch.no_grad()
def read_all(
    model: Model, rows: Sequence[tuple[int, ...]], names: Sequence[str], *, every: bool = False, n_tokens: int = 8192
) -> dict[str, Tensor]:
    """Read the inputs of weights at each row's last token, all weights in one pass.

    Args:
        model: A decoder.
        rows: Token ids; equal rows run once.
        names: Weights, in the order in which a pass meets them.
        every: Return all tokens of the rows, (all tokens, inputs), instead of the last ones.
        n_tokens: Most tokens of one batch.

    Shapes:
        By weight (rows, inputs), float64 on the CPU.
    """
    found: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for part in batches(rows, n_tokens):
        batch = model.batch(part)
        with Trace(model) as trace:
            for name in names:
                trace.read(name, "input")
            trace.run(batch, stop_after=names[-1])
            at = batch.first.cpu() + torch.tensor([len(row) - 1 for row in part])
            for name in names:
                seen = trace[name, "input"]
                kept = seen[batch.mask.bool()] if every else seen[torch.arange(len(part)), at]
                pieces = torch.split(kept.double().cpu(), [len(row) if every else 1 for row in part])
                for row, piece in zip(part, pieces):
                    found.setdefault(row, {})[name] = piece
    none = {name: torch.zeros(0, model.matrix(name).shape[1], dtype=torch.float64) for name in names}
    return {name: torch.cat([none[name], *(found[row][name] for row in rows)]) for name in names}


def batches(rows: Sequence[tuple[int, ...]], n_tokens: int = 8192) -> Iterator[list[tuple[int, ...]]]:
    """Cut the distinct rows, shortest first, into batches of at most `n_tokens` tokens, padding counted."""
    part: list[tuple[int, ...]] = []
    for row in sorted(dict.fromkeys(rows), key=len):
        if part and (len(part) + 1) * len(row) > n_tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def output_at(model: Model, name: str, key: Tensor) -> Tensor:
    """Return what a weight (and its bias) makes of a key, float64 on the CPU."""
    out = model.matrix(name).double().cpu() @ key
    bias = getattr(model.module(name), "bias", None)
    return out if bias is None else out + bias.detach().double().cpu()


def mean_keys(
    model: Model, found: Sequence[Problem], groups: Sequence[Sequence[int]], names: Sequence[str]
) -> Mapping[str, Tensor]:
    """Return each group's mean key at each weight, (inputs, groups)."""
    merged = [prefixes(found, g) for g in groups]
    keys = read_all(model, [p.ids for ps in merged for p in ps], names)
    mean = averages(merged)
    return {n: (mean @ keys[n]).T for n in names}


def averages(merged: Sequence[Sequence[Prefix]], *, bare: bool = False) -> Tensor:
    """The matrix (groups, rows) that takes all rows to each group's weighted mean; with `bare`, to the bare rows' mean."""
    mean = torch.zeros(len(merged), sum(map(len, merged)), dtype=torch.float64)
    start = 0
    for g, ps in enumerate(merged):
        weights = torch.tensor([float(p.bare) if bare else p.weight for p in ps], dtype=torch.float64)
        mean[g, start : start + len(ps)] = weights / weights.sum()
        start += len(ps)
    return mean
