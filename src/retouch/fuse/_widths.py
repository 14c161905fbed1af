"""How many head groups and neurons of each block stay, so that a limit is met and hardly undercut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError
from ._units import KeptUnits, Units, best

__all__ = ["LARGEST_RATIO", "QUANTUM", "Costs", "by_block", "over_all", "within"]

QUANTUM = 16
"""Neurons come in multiples of this."""
LARGEST_RATIO = 0.85
"""More of what can be pruned was never shown to work."""


@dataclass(frozen=True)
class Costs:
    """What a limit is counted in: bytes, or numbers.

    Attributes:
        fixed: What is spent when nothing of the prunable blocks stays.
        kv: What a head group of one block costs; 0 where attention stays whole.
        ff: What a neuron of one block costs.
    """

    fixed: float
    kv: float
    ff: float

    def block(self, units: Units) -> float:
        """What a whole block costs."""
        return self.kv * units.kv + self.ff * units.ff

    def smallest(self, units: Units, n_blocks: int) -> float:
        """The smallest limit that is accepted."""
        least = self.kv + self.ff * min(QUANTUM, units.ff)
        return self.fixed + n_blocks * max((1 - LARGEST_RATIO) * self.block(units), least)


def within(costs: Costs, units: Units, n_blocks: int, limit: float, tell: Callable[[float], str]) -> float:
    """Return the share of what can be pruned that must go; 0 where everything fits.

    Args:
        costs: Of the prunable blocks.
        units: What can be pruned.
        n_blocks: How many blocks can be pruned.
        limit: What may be spent.
        tell: Makes the refusal's words of the smallest limit.

    Raises:
        UserError: More than 85 % would have to go, or less than a unit of each kind would stay.
    """
    ratio = 1 - (limit - costs.fixed) / (n_blocks * costs.block(units))
    smallest = costs.smallest(units, n_blocks)
    if limit < smallest * (1 - 1e-12):
        raise UserError(tell(smallest))
    return max(ratio, 0.0)


def by_block(
    costs: Costs, units: Units, scores: Mapping[int, tuple[Tensor, Tensor]], limit: float, ratio: float
) -> dict[int, KeptUnits]:
    """Keep the best units of each block: as many head groups everywhere, and the neurons that then fit."""
    n_blocks, quantum = len(scores), min(QUANTUM, units.ff)
    room = limit - costs.fixed
    n_kv = max(1, round((1 - ratio) * units.kv)) if costs.kv else units.kv
    while costs.kv and n_kv > 1 and n_blocks * (n_kv * costs.kv + quantum * costs.ff) > room:
        n_kv -= 1
    while (
        costs.kv and n_kv < units.kv and n_blocks * (n_kv * costs.kv + costs.block(units) - units.kv * costs.kv) < room
    ):
        if n_blocks * ((n_kv + 1) * costs.kv + quantum * costs.ff) > room:
            break
        n_kv += 1  # all neurons fit and room is left
    per_quantum = quantum * costs.ff
    n_quanta = max(int((room - n_blocks * n_kv * costs.kv) / per_quantum + 1e-9), n_blocks)
    each, more = divmod(n_quanta, n_blocks)
    found = {}
    for i, (block, (kv, ff)) in enumerate(scores.items()):
        n_ff = min((each + (i < more)) * quantum, units.ff)
        found[block] = KeptUnits(best(kv, n_kv), best(ff, n_ff))
    return found


def over_all(
    costs: Costs, units: Units, scores: Mapping[int, tuple[Tensor, Tensor]], limit: float
) -> dict[int, KeptUnits]:
    """Keep the best units of all blocks together, by scores that are standardised within each block and kind.

    Every block keeps a head group and 16 neurons; neurons then come in multiples of 16.
    """
    quantum = min(QUANTUM, units.ff)
    n_kv = dict.fromkeys(scores, 1 if costs.kv else units.kv)
    n_ff = dict.fromkeys(scores, quantum)
    room = limit - costs.fixed - len(scores) * (costs.kv + quantum * costs.ff)
    for _, block, is_ff in sorted(_candidates(costs, units, scores, quantum), reverse=True):
        price = costs.ff if is_ff else costs.kv
        if price <= room + 1e-9:
            room -= price
            (n_ff if is_ff else n_kv)[block] += 1
    _round(n_ff, quantum, units.ff, room / costs.ff)
    return {b: KeptUnits(best(kv, n_kv[b]), best(ff, n_ff[b])) for b, (kv, ff) in scores.items()}


def _candidates(
    costs: Costs, units: Units, scores: Mapping[int, tuple[Tensor, Tensor]], quantum: int
) -> list[tuple[float, int, bool]]:
    rows = []
    for block, (kv, ff) in scores.items():
        if costs.kv:
            rows += [(value, block, False) for value in _standard(kv)[1:]]
        rows += [(value, block, True) for value in _standard(ff)[quantum:]]
    return rows


def _standard(scores: Tensor) -> Sequence[float]:
    spread = scores.std(unbiased=False)
    values: Sequence[float] = (
        ((scores - scores.mean()) / (spread if spread > 0 else 1)).sort(descending=True).values.tolist()
    )
    return values


def _round(n_ff: dict[int, int], quantum: int, most: int, spare: float) -> None:
    """Bring all counts to multiples of 16 and hand what that frees to those that lost most."""
    lost = {b: n % quantum if n < most else 0 for b, n in n_ff.items()}
    spare += sum(lost.values())
    for block in n_ff:
        n_ff[block] -= lost[block]
    for block in sorted(n_ff, key=lambda b: (-lost[b], b)):
        step = min(quantum, most - n_ff[block])
        if 0 < step <= spare + 1e-9:
            n_ff[block] += step
            spare -= step
