"""Several changes of one model in the same pass: which row carries which, and what each adds to a weight's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Factors", "Lanes", "Owners"]

Factors: TypeAlias = tuple[Tensor, Tensor | None]
"""left (outputs, rank) and right (rank, inputs), or a whole difference (outputs, inputs) and None."""

GATHERED_RANK = 16
"""Factors up to this rank are copied for each row and multiplied in one batch; larger ones lane by lane."""


class Lanes:
    """Which of several changes each row of a pass carries, while they run side by side (see `change.side_by_side`).

    Until told otherwise the rows are as many equal groups as there are changes, in order.

    Args:
        lanes: The lane of each change: changes that are one and the same share a lane.
        device: Where the passes run.

    Attributes:
        n_rows: Rows of the pass; before `carrying`, equal groups of rows.
        index: The lane of each row, (n_rows,).
        rows: The rows of each lane.
    """

    def __init__(self, lanes: Sequence[int], device: torch.device) -> None:
        self.n_lanes = max(lanes, default=-1) + 1
        self._lanes, self._device = tuple(lanes), device
        self._carry(range(len(lanes)))

    def _carry(self, owners: Sequence[int]) -> None:
        lanes = [self._lanes[o] for o in owners]
        found: dict[int, list[int]] = {}
        for row, lane in enumerate(lanes):
            found.setdefault(lane, []).append(row)
        self.n_rows = len(lanes)
        self.index = torch.tensor(lanes, device=self._device)
        self.rows = {lane: torch.tensor(rows, device=self._device) for lane, rows in found.items()}

    @contextmanager
    def carrying(self, owners: Sequence[int]) -> Iterator[None]:
        """Let each row of the passes inside the ``with`` carry the change of that number."""
        self._carry(owners)
        try:
            yield
        finally:
            self._carry(range(len(self._lanes)))

    def gain(self, parts: Mapping[int, Factors]) -> Callable[[Tensor], Tensor]:
        """Return what maps a weight's input to what the rows' own changes add to its output.

        Args:
            parts: The change of the weight by lane; a lane without one gains nothing.

        Shapes:
            (n_rows, columns, inputs) -> (n_rows, columns, outputs).
        """
        low = {lane: (left, right) for lane, (left, right) in parts.items() if right is not None}
        if len(low) == len(parts) and max(left.shape[1] for left, _ in low.values()) <= GATHERED_RANK:
            return self._gathered(low)
        return self._lane_by_lane(parts)

    def _gathered(self, parts: Mapping[int, tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        """Lay all factors into one stack, padded to one rank, of which each row takes its own."""
        some, other = next(iter(parts.values()))
        rank = max(left.shape[1] for left, _ in parts.values())
        lefts = torch.zeros(self.n_lanes, some.shape[0], rank)
        rights = torch.zeros(self.n_lanes, rank, other.shape[1])
        for lane, (left, right) in parts.items():
            lefts[lane, :, : left.shape[1]], rights[lane, : left.shape[1]] = left, right
        lefts, rights = lefts.to(self._device), rights.to(self._device)
        return lambda x: (x @ rights[self.index].mT) @ lefts[self.index].mT

    def _lane_by_lane(self, parts: Mapping[int, Factors]) -> Callable[[Tensor], Tensor]:
        """Multiply the rows of one lane after another: whole differences are too large to be copied for each row."""
        moved = {i: [t.to(self._device, torch.float32) for t in p if t is not None] for i, p in parts.items()}
        outputs = next(iter(moved.values()))[0].shape[0]

        def gain(x: Tensor) -> Tensor:
            total = x.new_zeros(*x.shape[:2], outputs)
            for lane, rows in self.rows.items():
                if lane in moved:
                    total[rows] = _through(moved[lane], x[rows])
            return total

        return gain


def _through(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    for factor in reversed(factors):
        x = x @ factor.mT
    return x


@dataclass(frozen=True, eq=False)
class Owners:
    """The change that each text of a measure carries, by number, among those that run side by side."""

    lanes: Lanes
    each: Sequence[int]

    @contextmanager
    def rows(self, texts: Sequence[int]) -> Iterator[None]:
        """Let each row of the passes inside the ``with`` carry the change of that text."""
        with self.lanes.carrying([self.each[i] for i in texts]):
            yield
