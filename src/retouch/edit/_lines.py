"""The rows of a search: what each is for, which of them have to run, and where their states are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._search import Bystander

__all__ = ["Line", "Now", "Read", "Reads", "distinct", "heard", "living", "placed", "reads_of"]

Read = tuple[int, int, int, int, float]


class Line(NamedTuple):
    """One row of the batch, up to the last token that matters."""

    kind: Literal["target", "kl", "bystander"]
    fact: int
    group: int
    ids: tuple[int, ...]
    anchor: int


class Reads(NamedTuple):
    """Where states are read: line and column of each read, whom it belongs to, for targets the token, and a weight."""

    line: Tensor
    column: Tensor
    owner: Tensor
    token: Tensor
    weight: Tensor


class Now(NamedTuple):
    """The reads of lines that still run: their place in the packed batch, and which of all reads they are."""

    place: Tensor
    kept: Tensor
    owner: Tensor
    token: Tensor
    weight: Tensor


def distinct(lines: Sequence[Line]) -> tuple[list[tuple[tuple[int, ...], int]], list[int]]:
    """Return the rows that have to run, with their edited token, and the row that holds each line.

    A line that another one goes on from, edited at the same token, stands at that one's beginning.
    """
    found: dict[tuple[int, tuple[int, ...]], int] = {}
    rows: list[tuple[tuple[int, ...], int]] = []
    for anchor, ids in sorted({(line.anchor, line.ids) for line in lines}, reverse=True):
        if not rows or rows[-1][1] != anchor or rows[-1][0][: len(ids)] != ids:
            rows.append((ids, anchor))
        found[anchor, ids] = len(rows) - 1
    return rows, [found[line.anchor, line.ids] for line in lines]


def living(reads: Reads, table: Tensor) -> Now:
    """Keep the reads of lines that have places.

    Shapes:
        table (lines, columns), -1 where nothing runs.
    """
    at = table[reads.line, reads.column]
    kept = (at >= 0).nonzero()[:, 0]
    return Now(at[kept], kept, reads.owner[kept], reads.token[kept], reads.weight[kept])


def heard(lines: Sequence[Line], bystanders: Sequence[Bystander], columns: int) -> Tensor:
    """The share of its value that each line hears in each column: all of it at the edited token; bystanders as told."""
    shares = torch.zeros(len(lines), columns)
    told = iter(bystanders)
    for i, line in enumerate(lines):
        if line.kind == "bystander":
            hears = next(told).hears
            shares[i, : len(hears)] = hears.to(shares)
        else:
            shares[i, 0] = 1
    return shares


def reads_of(reads: Sequence[Read], device: torch.device) -> Reads:
    """Make tensors of (line, column, owner, token, weight)."""
    line, column, owner, token = (
        torch.tensor([r[i] for r in reads], dtype=torch.long, device=device) for i in range(4)
    )
    return Reads(line, column, owner, token, torch.tensor([r[4] for r in reads], dtype=torch.float32, device=device))


def placed(
    running: Sequence[tuple[int, int]], places: Sequence[Sequence[int]], hears: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Tell what each place of a packed batch hears, and where each line's tokens stand.

    Args:
        running: Number and group of each line that runs.
        places: The places of each one's tokens.
        hears: The share that each line hears in each column, (lines, columns).
        shape: Of the packed batch.

    Returns:
        The group whose value a place hears, and its share, both of that shape; and the place of each line's column,
        (lines, columns), -1 where nothing runs.
    """
    each = [(n, column, place, group) for (n, group), own in zip(running, places) for column, place in enumerate(own)]
    line, column, place, group = torch.tensor(each).T
    owner, share = torch.zeros(shape.numel(), dtype=torch.long), torch.zeros(shape.numel())
    owner[place], share[place] = group, hears[line, column]
    table = torch.full(hears.shape, -1)
    table[line, column] = place
    return owner.view(shape), share.view(shape), table
