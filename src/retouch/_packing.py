"""Lay what remains of many short rows side by side in few longer ones, so that no padding is computed.

What two rows share from the edited token on is computed once. Only indices live here; `trace.Suffix.pack` moves the
tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Layout", "Strip", "lay_out"]

LONGEST = 64
"""Tokens of rows that begin alike are kept together up to this many; more of them are begun anew."""
WIDER = 16
"""How much wider than its longest content a row may become."""


class Strip(NamedTuple):
    """What remains of one row.

    Attributes:
        row: Its number in the suffix.
        ids: All its tokens.
        anchor: The edited one, the first that remains.
        owner: Rows of different owners share nothing, even where they begin alike.
    """

    row: int
    ids: tuple[int, ...]
    anchor: int
    owner: Hashable


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of several rows stand when they are laid side by side.

    Attributes:
        row: Which row each place takes its token from.
        column: And which column, counted from the edited one.
        before_row: The row of each constant key, in front of the places.
        before_column: Its column, counted from the edited one backwards: -1 stands right before it.
        sees: Which keys a place may see: its own row's constant ones, itself, and what leads to it.
        places: For each strip the place of each of its tokens, rows and columns of places counted through.

    Shapes:
        row, column (bins, width); before_row, before_column (bins, before); sees (bins, width, before + width).
    """

    row: Tensor
    column: Tensor
    before_row: Tensor
    before_column: Tensor
    sees: Tensor
    places: tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class _Bunch:
    """Rows that are alike up to the edited token, as a tree of the tokens from there on.

    Attributes:
        first: The row that stands for all up to the edited token.
        nodes: Row, column and way of each token; the way leads from the edited token to the token itself.
        strips: Numbers of the strips, each with its way.
    """

    first: Strip
    nodes: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    strips: dict[int, tuple[int, ...]] = field(default_factory=dict)
    known: dict[tuple[int, ...], int] = field(default_factory=dict)

    def add(self, number: int, strip: Strip) -> None:
        way: tuple[int, ...] = ()
        for end in range(strip.anchor + 1, len(strip.ids) + 1):
            here = self.known.setdefault(strip.ids[:end], len(self.nodes))
            way = (*way, here)
            if here == len(self.nodes):
                self.nodes.append((strip.row, len(way) - 1, way))
        self.strips[number] = way


def _bunches(strips: Sequence[Strip]) -> list[_Bunch]:
    done: list[_Bunch] = []
    open_: dict[Hashable, _Bunch] = {}
    for number, strip in enumerate(strips):
        key = (strip.owner, strip.ids[: strip.anchor + 1])
        bunch = open_.get(key)
        if bunch is None or len(bunch.nodes) + len(strip.ids) - strip.anchor > LONGEST:
            bunch = open_[key] = _Bunch(strip)
            done.append(bunch)
        bunch.add(number, strip)
    return done


def _filled(bunches: Sequence[_Bunch], width: int) -> Iterator[list[_Bunch]]:
    """Fill rows of one width, each with the largest bunches that still fit."""
    by_size: dict[int, list[_Bunch]] = {}
    for bunch in reversed(bunches):
        by_size.setdefault(len(bunch.nodes), []).append(bunch)
    sizes = sorted(by_size, reverse=True)
    while sizes:
        content, room = list[_Bunch](), width
        for size in sizes:
            while by_size[size] and size <= room:
                content.append(by_size[size].pop())
                room -= size
        sizes = [size for size in sizes if by_size[size]]
        yield content


def _before(content: Sequence[_Bunch]) -> int:
    return sum(b.first.anchor for b in content)


def _bins(bunches: Sequence[_Bunch], key_cost: float) -> tuple[list[list[_Bunch]], int]:
    """Choose the width at which padding and the keys that each place is compared with cost least together."""
    longest = max(len(b.nodes) for b in bunches)
    found: list[tuple[float, int, list[list[_Bunch]]]] = []
    for width in range(longest, longest + WIDER + 1):
        bins = list(_filled(bunches, width))
        keys = max(map(_before, bins)) + width
        found.append((len(bins) * width * (1 + key_cost * keys), width, bins))
        if len(bins) == 1:
            break
    _, width, bins = min(found, key=lambda f: f[:2])
    return bins, width


def lay_out(strips: Sequence[Strip], key_cost: float) -> Layout:
    """Lay the remains of rows side by side.

    Args:
        strips: What remains of each row.
        key_cost: What it costs to compare a place with one key, in units of all else that a place costs.
    """
    bins, width = _bins(_bunches(strips), key_cost)
    before = max(1, *map(_before, bins))
    n = len(bins)
    row, column = torch.zeros(n, width, dtype=torch.long), torch.zeros(n, width, dtype=torch.long)
    before_row, before_column = torch.zeros(n, before, dtype=torch.long), torch.full((n, before), -1)
    sees = torch.zeros(n, width, before + width, dtype=torch.bool)
    sees[:, range(width), range(before, before + width)] = True  # filling sees itself, or its softmax had nothing
    places: list[tuple[int, ...]] = [()] * len(strips)
    for b, content in enumerate(bins):
        row[b], at, behind = content[0].first.row, 0, 0
        for bunch in content:
            end, back = at + len(bunch.nodes), behind + bunch.first.anchor
            row[b, at:end] = torch.tensor([node[0] for node in bunch.nodes])
            column[b, at:end] = torch.tensor([node[1] for node in bunch.nodes])
            before_row[b, behind:back] = bunch.first.row
            before_column[b, behind:back] = torch.arange(-bunch.first.anchor, 0)
            sees[b, at:end, behind:back] = True
            who, whom = zip(*((at + way[-1], before + at + i) for *_, way in bunch.nodes for i in way))
            sees[b, list(who), list(whom)] = True
            for number, way in bunch.strips.items():
                places[number] = tuple(b * width + at + i for i in way)
            at, behind = end, back
    return Layout(row, column, before_row, before_column, sees, tuple(places))
