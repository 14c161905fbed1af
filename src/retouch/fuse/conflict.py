"""How much adapters contradict each other, weight by weight and pair by pair, beside what chance alone would give.

A raw share of cancelled signs says nothing: independent adapters cancel by chance, about 1 - 1/sqrt(N) of N. So every
number stands beside its null level, made by giving every entry of every adapter a random sign.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import report
from .._plots import plot_heat
from ..linalg import frobenius_norm
from ..progress import track
from ._streams import bits, keys_of
from .base import Adapter, Module, modules, shares
from .core import FACTOR_TOLERANCE, triples

__all__ = ["Conflict", "conflict_of", "differences", "left_by_chance", "level", "levels", "measure", "report_of"]

BLOCK = 1 << 19
"""Numbers of all differences together that are in memory at once, if they are more than a row of each."""
SIGN = -(1 << 31)
"""The bit of a float32 that is its sign."""


@dataclass(frozen=True, eq=False)
class Conflict:
    """What was measured on one weight.

    Attributes:
        name: Our name of the weight.
        owners: Numbers of the adapters that change it.
        conflict: Share of what the adapters write that cancels, 0 to 1.
        null: The same with random signs.
        cosine: Of each pair's differences, (owners, owners).
        output_overlap: Share of the smaller adapter's output space that lies in the other's.
        input_overlap: Likewise of inputs.
        chance: The overlap that random spaces of these ranks have, outputs and inputs, of each pair. Ranks are those of
            the differences, not of the factors: zeros that fill factors up span nothing.
        norms: Frobenius norm of each difference.
    """

    name: str
    owners: tuple[int, ...]
    conflict: float
    null: float
    cosine: Tensor
    output_overlap: Tensor
    input_overlap: Tensor
    chance: tuple[Tensor, Tensor]
    norms: tuple[float, ...]

    @property
    def excess(self) -> float:
        """Conflict above chance; below 0 the adapters agree more than chance."""
        return self.conflict - self.null

    @property
    def scaled(self) -> float:
        """The excess as a share of the largest possible one."""
        return self.excess / (1 - self.null) if self.null < 1 else 0.0


# ---------------------------------------------------------------- one weight


def differences(module: Module, block: int = BLOCK) -> Iterator[tuple[int, Tensor]]:
    """Go through the rows of all weighted differences of a weight: the first row's number, and (adapters, rows, inputs)."""
    outputs, inputs = module.shape
    step = max(1, block // (inputs * len(module.parts)))
    sides = [(w * p.left.double(), p.right.double()) for p, w in zip(module.parts, module.weights)]
    for row in range(0, outputs, step):
        x = torch.empty(len(sides), min(step, outputs - row), inputs, dtype=torch.float64)
        for one, (left, right) in zip(x, sides):
            torch.mm(left[row : row + step], right, out=one)
        yield row, x


def level(x: Tensor) -> tuple[float, float]:
    """Return what is left of all writes, and their sum: conflict is 1 minus their ratio.

    Shapes:
        x: (adapters, rows, inputs).
    """
    return float(x.sum(0).abs().sum()), float(x.abs().sum())


def left_by_chance(x: Tensor, module: Module, seed: int, row: int = 0, draws: int = 4) -> float:
    """Return what random signs would leave of the writes, mean over at most 32 draws; sizes and structural zeros are kept.

    The signs belong to the adapters' names and to the rows, so that the order of adapters and of rows changes nothing.

    Shapes:
        x: (adapters, rows, inputs), from `row` on.
    """
    _, rows, inputs = x.shape
    sums = torch.zeros(draws, rows, inputs)
    for one, key in zip(x.float(), keys_of(module)):
        words, plain = bits(seed, module.name, key, row, rows, inputs), one.view(torch.int32)
        for i, total in enumerate(sums):
            total += (words << (31 - i) & SIGN ^ plain).view(torch.float32)
    return float(sums.abs_().sum(dtype=torch.float64)) / draws


def levels(module: Module, draws: int = 4, seed: int = 0, block: int = BLOCK) -> tuple[float, float]:
    """Return the conflict, and the null level: what random signs would give."""
    left = total = by_chance = 0.0
    for row, x in differences(module, block):
        kept, written = level(x)
        left, total = left + kept, total + written
        by_chance += left_by_chance(x, module, seed, row, draws)
    return (1 - left / total, 1 - by_chance / total) if total else (0.0, 0.0)


def conflict_of(module: Module, draws: int = 4, seed: int = 0, block: int = BLOCK) -> Conflict:
    """Measure one weight.

    Args:
        module: The weight with the adapters' differences.
        draws: How often signs are drawn for the null level, at most 32 times.
        seed: Of those signs.
        block: Numbers of all differences in memory at once.
    """
    found, null = levels(module, draws, seed, block)
    spaces = [triples(p, FACTOR_TOLERANCE) for p in module.parts]  # what the differences span, however they are cut
    ranks = torch.tensor([len(s) for _, s, _ in spaces], dtype=torch.float64)
    outputs, inputs = module.shape
    return Conflict(
        module.name, module.owners, found, null, _cosine(module),
        _overlap([u for u, _, _ in spaces]), _overlap([v.T for _, _, v in spaces]),
        (_by_chance(ranks, outputs), _by_chance(ranks, inputs)),
        tuple(frobenius_norm(p.left, p.right) for p in module.parts),
    )  # fmt: skip


def _cosine(module: Module) -> Tensor:
    """Inner products of differences from their factors alone: <BA, B'A'> = trace(B'ᵀB · AA'ᵀ)."""
    n = len(module.parts)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for (i, p), (j, q) in itertools.combinations_with_replacement(enumerate(module.parts), 2):
        gram[i, j] = gram[j, i] = (
            (p.left.double().T @ q.left.double()) * (p.right.double() @ q.right.double().T)
        ).sum()
    size = gram.diagonal().clamp_min(0).sqrt()
    return gram / (size[:, None] * size[None, :]).clamp_min(torch.finfo(torch.float64).tiny)


def _overlap(bases: Sequence[Tensor]) -> Tensor:
    """Compare orthonormal bases; a difference of zero has an empty one and overlaps with nothing."""
    rows = [[float((a.T @ b).square().sum()) / max(1, min(a.shape[1], b.shape[1])) for b in bases] for a in bases]
    return torch.tensor(rows, dtype=torch.float64)


def _by_chance(ranks: Tensor, width: int) -> Tensor:
    return (torch.maximum(ranks[:, None], ranks[None, :]) / width).clamp_max(1)


# ---------------------------------------------------------------- all of them


def measure(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None, *, draws: int = 4, seed: int = 0
) -> tuple[Conflict, ...]:
    """Measure every weight that at least two adapters change, one in memory at a time.

    Raises:
        UserError: The adapters do not belong together.
    """
    total = len({name for adapter in adapters for name in adapter.parts})
    found = track(modules(adapters, shares(adapters, weights)), "Measuring conflict", total)
    return tuple(conflict_of(m, draws, seed) for m in found if len(m.parts) > 1)


def report_of(
    found: Sequence[Conflict],
    names: Sequence[str],
    model: str,
    *,
    weights: Sequence[float] | None = None,
    top: int = 10,
    pictures: bool = True,
) -> report.Report:
    """Say where adapters contradict each other: a heat map, pairs, the worst weights, and a sentence.

    Args:
        found: What `measure` returned.
        names: The adapters' names.
        model: The base's name.
        weights: The adapters' shares of the fusion, to be shown: one that counts many examples owns it.
        top: Weights in the table.
        pictures: With the heat map, which needs matplotlib.
    """
    worst = sorted(found, key=lambda c: -c.scaled)
    rows = tuple((c.name, c.conflict, c.null, c.excess, *_shares(c, names)) for c in worst[:top])
    tables = (
        report.Table(
            "Where they contradict each other most",
            ("weight", "conflict", "by chance", "excess", *(f"{n}: share of norm" for n in names)), rows,
            "Conflict is the share of what the adapters write that cancels. Independent adapters cancel by chance; only "
            "the excess says something.",
        ),
        _pairs(found, names),
        *([] if weights is None else [_told(names, weights)]),
    )  # fmt: skip
    return report.Report(
        "Conflict among adapters",
        _sentence(found, names),
        model,
        tables,
        (_heat(found),) if found and pictures else (),
        numbers=_numbers(found, names),
    )


def _told(names: Sequence[str], weights: Sequence[float]) -> report.Table:
    return report.Table("Shares of the fusion", ("adapter", "share"), tuple(zip(names, weights)))


def _shares(c: Conflict, names: Sequence[str]) -> list[float | None]:
    total = sum(c.norms) or 1.0
    by_owner = {owner: norm / total for owner, norm in zip(c.owners, c.norms)}
    return [by_owner.get(i) for i in range(len(names))]


def _mean(found: Sequence[Conflict], i: int, j: int, what: str) -> tuple[float, float]:
    """Return the mean of a pair's number over weights, and its mean level by chance."""
    seen, by_chance = [], []
    for c in found:
        if i in c.owners and j in c.owners:
            a, b = c.owners.index(i), c.owners.index(j)
            seen.append(float(getattr(c, what)[a, b]))
            by_chance.append(float(c.chance[what == "input_overlap"][a, b]) if what != "cosine" else 0.0)
    return (sum(seen) / len(seen), sum(by_chance) / len(seen)) if seen else (0.0, 0.0)


def _pairs(found: Sequence[Conflict], names: Sequence[str]) -> report.Table:
    rows = []
    for i, j in itertools.combinations(range(len(names)), 2):
        cosine = _mean(found, i, j, "cosine")[0]
        outputs, inputs = _mean(found, i, j, "output_overlap"), _mean(found, i, j, "input_overlap")
        rows.append((f"{names[i]} and {names[j]}", cosine, *outputs, *inputs))
    return report.Table(
        "Pairs of adapters, mean over weights",
        ("pair", "cosine", "output overlap", "by chance", "input overlap", "by chance "), tuple(rows),
        "Overlap is the share of the smaller adapter's space that lies in the other's.",
    )  # fmt: skip


def _place(name: str) -> tuple[int, str]:
    _, block, part = name.split(".", 2)
    return int(block), part


def _heat(found: Sequence[Conflict]) -> Any:
    by_place = {_place(c.name): c.scaled for c in found}
    blocks = range(max(b for b, _ in by_place) + 1)
    parts = list(dict.fromkeys(part for _, part in by_place))
    values = [[by_place.get((b, part), 0.0) for b in blocks] for part in parts]
    return plot_heat(parts, values, "block", "Conflict above chance", "White: as much as chance.")


def _sentence(found: Sequence[Conflict], names: Sequence[str]) -> str:
    if not found:
        return "No weight is changed by two adapters, so nothing can contradict."
    above = [c for c in found if c.scaled > 0.02]
    mean = sum(c.excess for c in found) / len(found)
    level_ = sum(c.conflict for c in found) / len(found)
    told = f"{len(names)} adapters cancel {level_:.0%} of what they write; chance alone would give {level_ - mean:.0%}."
    if not above:
        return f"{told} No weight lies clearly above chance: resolving conflict has nothing to resolve."
    pairs = list(itertools.combinations(range(len(names)), 2))
    i, j = min(pairs, key=lambda p: _mean(above, p[0], p[1], "cosine")[0])
    blocks = sorted({_place(c.name)[0] for c in above})
    where = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}"
    return (
        f"{told} {len(above)} of {len(found)} weights lie above it, in {where}; there "
        f"{names[i]} and {names[j]} disagree most."
    )


def _numbers(found: Sequence[Conflict], names: Sequence[str]) -> dict[str, Any]:
    weights = {
        c.name: {
            "conflict": c.conflict, "null": c.null, "excess": c.excess, "scaled": c.scaled,
            "adapters": [names[i] for i in c.owners], "norms": list(c.norms), "cosine": c.cosine.tolist(),
            "output_overlap": c.output_overlap.tolist(), "input_overlap": c.input_overlap.tolist(),
        }
        for c in found
    }  # fmt: skip
    n = len(found) or 1
    return {
        "conflict": sum(c.conflict for c in found) / n,
        "null": sum(c.null for c in found) / n,
        "excess": sum(c.excess for c in found) / n,
        "weights": weights,
    }
