"""``cr_sign``: at every entry that adapters dispute, lessen those that the weightier side outvotes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..settings import setting
from ._streams import draws, keys_of
from .base import Module, Resolver
from .conflict import differences, left_by_chance, level, levels
from .core import Core

__all__ = ["CRSign"]

Entries = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class CRSign(Resolver):
    """Mask, entry by entry, what the larger sum of the other sign outvotes, as far as the entry is disputed beyond chance.

    An entry that all adapters push one way is left alone. The more evenly an entry is disputed, the more of the
    outvoted side is taken away; each adapter is then scaled back to its old size, at most twofold.

    Source:
        Reconstructed from the abstract of arXiv 2605.23913 (LoRA-CR), which gives no formula. At `beta` 1 and a full
        gate it is the election of TIES-Merging (Yadav et al., 2023) without its trim; the gate above the null level is
        our own.

    Use when:
        The conflict report shows clearly more conflict than chance in some weights.

    Known problems:
        In full space the masked differences are no longer low-rank: only rules that look at single entries can follow,
        and the result is cut back to the sum of the ranks. In core space the entries are coordinates, so it is another
        rule.

    Shapes:
        Core coordinates in, core coordinates out; in full space blocks of rows of all differences.

    Example:
        >>> CRSign(beta=0.5, space="core").name
        'cr_sign'
    """

    beta: float = setting(1.0, "How much of an outvoted entry is taken away; 0 leaves all as it is.", ge=0, le=1)
    gate: Literal["entry", "module"] = setting(
        "entry", "entry: by the entry's own dispute; module: a weight at chance level is left alone as a whole."
    )
    space: Literal["full", "core"] = setting("full", "Where entries are looked at.")
    floor: Literal["null", "zero"] = setting(
        "null", "The dispute from which masking begins: the weight's chance level, or 0."
    )
    flipped: bool = setting(False, "A control: mask the majority instead.")
    random: bool = setting(False, "A control: the same masks, at entries of the same row drawn at random.")

    def resolve(self, core: Core, module: Module) -> Core:
        """Return the core with outvoted coordinates lessened."""
        shares = torch.tensor(module.weights, dtype=torch.float64)[:, None, None]
        x = core.middles * shares
        left, total = level(x)
        by_chance = left_by_chance(x, module, self.seed)
        found = (1 - left / total, 1 - by_chance / total) if total else (0.0, 0.0)
        masked = self._masked(x, self._limits(*found), 0, module)
        solved = core.middles * masked
        return replace(core, middles=solved * _restored(core.middles, solved))

    def entries(self, module: Module) -> Entries | None:
        """Return what lessens a block of rows of the differences, for rules that look at single entries of the weight.

        The weight is read twice before: for its chance level and for each adapter's size afterwards.

        Returns:
            A function of (unweighted differences (adapters, rows, inputs), first row), or None in core space.
        """
        if self.space == "core":
            return None
        limits = self._limits(*levels(module, seed=self.seed))
        before = torch.zeros(len(module.parts), dtype=torch.float64)
        after = before.clone()
        for row, x in differences(module):
            before += x.square().sum((1, 2))
            after += (x * self._masked(x, limits, row, module)).square().sum((1, 2))
        scale = (before / after.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().clamp_max(2.0)
        shares = torch.tensor(module.weights, dtype=torch.float64)[:, None, None]

        def lessen(block: Tensor, row: int) -> Tensor:
            mask = self._masked(block.double() * shares, limits, row, module)
            return (block * mask * scale[:, None, None]).to(block.dtype)

        return lessen

    def _limits(self, conflict: float, null: float) -> tuple[float, float]:
        """Return the dispute from which masking begins, and its strength in this weight."""
        floor = null if self.floor == "null" else 0.0
        share = min(1.0, max(0.0, (conflict - null) / (1 - null))) if null < 1 else 0.0
        return floor, self.beta * (share if self.gate == "module" else 1.0)

    def _masked(self, x: Tensor, limits: tuple[float, float], row: int, module: Module) -> Tensor:
        """Return the factor of every entry, from 1 - beta to 1."""
        floor, beta = limits
        above, below = x.clamp_min(0).sum(0), (-x).clamp_min(0).sum(0)
        total = above + below
        dispute = 1 - (above - below).abs() / total.clamp_min(torch.finfo(x.dtype).tiny)
        gate = ((dispute - floor) / max(1 - floor, 1e-12)).clamp(0, 1) * (total > 0)
        loses = (x.sign() != (above - below).sign()) & (x != 0)
        if self.flipped:
            loses = ~loses & (x != 0)
        taken = beta * gate * loses
        if self.random:
            each = [draws(self.seed, module.name, key, row, *x.shape[1:]) for key in keys_of(module)]
            taken = _shuffled(taken, x != 0, torch.stack(each))
        mask: Tensor = 1 - taken
        return mask


def _shuffled(values: Tensor, seen: Tensor, numbers: Tensor) -> Tensor:
    """Deal each row's values anew to those of its entries that are not structural zeros, in the order of random numbers.

    Shapes:
        all: (adapters, rows, inputs).
    """
    dealt = values.gather(2, seen.int().argsort(dim=2, descending=True, stable=True))
    places = torch.where(seen, numbers, 2.0).argsort(dim=2, stable=True)  # numbers lie below 1
    return torch.zeros_like(values).scatter(2, places, dealt)


def _restored(before: Tensor, after: Tensor) -> Tensor:
    old, new = before.flatten(1).norm(dim=1), after.flatten(1).norm(dim=1)
    scale: Tensor = (old / new.clamp_min(torch.finfo(old.dtype).tiny)).clamp_max(2.0)
    return scale[:, None, None]
