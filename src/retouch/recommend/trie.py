"""The catalogue as a tree of codes, in flat arrays that vectorised code can walk.

A node of depth l is a distinct prefix of l codes; the nodes of one depth are numbered in the order of their prefixes.
So the children of a node are neighbours, child j *is* node j of the next depth, and the items below a node are
neighbours as well. Built by one sort, without a loop over items.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Ints", "Trie", "TrieTensors"]

Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Trie:
    """Hold which codes may follow which.

    Source: the flattened prefix tree of STATIC, arXiv 2602.22647.

    Shapes:
        levels is the number of codes of an item, nodes[l] the number of prefixes of l codes; nodes[0] is 1, the root,
        and nodes[levels] is items.

    Args:
        start: For each level the place of a node's first child; [nodes[level] + 1], the last entry closes the last node.
        code: For each level the code that leads to each node of the next depth; [nodes[level + 1]].
        leaf: For each depth 0 ... levels the first leaf below a node; [nodes[depth] + 1]. Node n has the leaves
            ``leaf[depth][n]`` to ``leaf[depth][n + 1]``, the last not included.
        item: The item number of each leaf, counted from 1; [items].
        place: The leaf of each item number; [items + 1], and -1 for number 0.
    """

    start: tuple[Ints, ...]
    code: tuple[Ints, ...]
    leaf: tuple[Ints, ...]
    item: Ints
    place: Ints
    _tensors: dict[str, TrieTensors] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, codes: NDArray[np.integer]) -> Trie:
        """Build the tree of a catalogue.

        Args:
            codes: The codes of each item, all rows different; [items, levels]. Row i - 1 is item i.

        Raises:
            UserError: There are no items or no codes, a code is negative, or two items have the same codes.

        Example:
            >>> trie = Trie.of(np.array([[1, 0], [0, 3], [0, 2]]))
            >>> [code.tolist() for code in trie.code], trie.item.tolist()
            ([[0, 1], [2, 3, 0]], [3, 2, 1])
        """
        codes = _checked(codes)
        order = np.lexsort(codes.T[::-1])
        rows = codes[order]
        begins = _begins(rows, order)
        n = len(rows)
        leaf = [np.append(begin, n) for begin in begins]
        start = [np.searchsorted(below, here) for here, below in zip(leaf, begins[1:])]
        code = [rows[below, level] for level, below in enumerate(begins[1:])]
        place = np.full(n + 1, -1, np.int32)
        place[order + 1] = np.arange(n)
        return cls(_tight(start), _tight(code), _tight(leaf), (order + 1).astype(np.int32), place)

    @property
    def n_items(self) -> int:
        """How many items the catalogue holds."""
        return len(self.item)

    @property
    def n_levels(self) -> int:
        """How many codes an item has."""
        return len(self.code)

    @property
    def n_nodes(self) -> tuple[int, ...]:
        """How many prefixes there are of 0, 1, ... codes."""
        return tuple(len(leaf) - 1 for leaf in self.leaf)

    def tensors(self, device: torch.device) -> TrieTensors:
        """Return the arrays where a search runs; they are made once for each device."""
        import torch

        def index(array: Ints) -> Tensor:
            return torch.from_numpy(array).to(device=device, dtype=torch.int64)

        if (found := self._tensors.get(str(device))) is None:
            with torch.inference_mode(False):
                start, code, leaf = (tuple(map(index, part)) for part in (self.start, self.code, self.leaf))
                found = TrieTensors(index(self.item), start, code, leaf, tuple(int(part.max()) for part in self.code))
            self._tensors[str(device)] = found
        return found

    def find(self, prefixes: NDArray[np.integer]) -> NDArray[np.int64]:
        """Find the node of each prefix.

        Args:
            prefixes: Codes; [rows, depth], of any depth up to `n_levels`.

        Returns:
            The node among those of that depth, -1 where no item begins so; [rows].
        """
        node = np.zeros(len(prefixes), np.int64)
        for level in range(prefixes.shape[1]):
            wanted = prefixes[:, level].astype(np.int64)
            span = int(max(self.code[level].max(), wanted.max(initial=0))) + 1
            parent = np.repeat(np.arange(len(self.start[level]) - 1), np.diff(self.start[level]))
            keys = parent * span + self.code[level]  # ascending, as both parts are
            asked = np.where((node < 0) | (wanted < 0), -1, node * span + wanted)
            at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
            node = np.where(keys[at] == asked, at, -1)
        return node


class TrieTensors(NamedTuple):
    """The arrays of a `Trie` as tensors, and the largest code of each level."""

    item: Tensor
    start: tuple[Tensor, ...]
    code: tuple[Tensor, ...]
    leaf: tuple[Tensor, ...]
    most: tuple[int, ...]


def _checked(codes: NDArray[np.integer]) -> Ints:
    codes = np.asarray(codes)
    if codes.ndim != 2 or not codes.size:
        raise UserError(f"A catalogue needs items with codes, [items, levels]; got an array of shape {codes.shape}.")
    if codes.min() < 0 or codes.max() > np.iinfo(np.int32).max:
        raise UserError(f"Codes count from 0; got codes from {codes.min()} to {codes.max()}.")
    return codes.astype(np.int32, copy=False)


def _begins(rows: Ints, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Find where a prefix differs from the one before it, for prefixes of 0, 1, ... codes."""
    changed = np.zeros(len(rows), bool)
    changed[0] = True
    begins = [np.flatnonzero(changed)]
    for level in range(rows.shape[1]):
        changed[1:] |= rows[1:, level] != rows[:-1, level]
        begins.append(np.flatnonzero(changed))
    if not changed.all():
        same = int(np.flatnonzero(~changed)[0])
        raise UserError(
            f"Items {order[same - 1] + 1} and {order[same] + 1} have the same codes {rows[same].tolist()}. "
            "Codes must tell all items apart: give them a last digit with retouch.recommend.tokenise.assign."
        )
    return begins


def _tight(arrays: list[NDArray[np.int64]] | list[Ints]) -> tuple[Ints, ...]:
    return tuple(np.ascontiguousarray(array, np.int32) for array in arrays)
