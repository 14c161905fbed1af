"""What a unit of pruning is worth, by five rules. Higher is kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .. import store
from ..model import Model
from ..progress import track
from ._inputs import Inputs
from ._units import Units

__all__ = ["NEEDS_INPUTS", "Score", "twin", "unit_scores"]

Score = Literal["random", "magnitude", "wanda", "taylor", "flap"]
NEEDS_INPUTS = ("wanda", "flap")
Scores = dict[int, tuple[Tensor, Tensor]]
"""By block: what each head group and each neuron is worth, float64."""


def unit_scores(
    model: Model, units: Units, score: Score, blocks: Sequence[int], *, inputs: Mapping[str, Inputs] | None = None,
    rows: Sequence[tuple[int, ...]] = (), seed: int = 0, second_order: bool = False,
) -> Scores:  # fmt: skip
    """Score the units of some blocks.

    Source:
        wanda: Sun et al., A Simple and Effective Pruning Approach for Large Language Models (2024), summed over a unit.
        flap: An et al., Fluctuation-based Adaptive Structured Pruning (2024). taylor: Ma et al., LLM-Pruner (2023).

    Args:
        model: The whole model.
        units: Its units.
        score: The rule.
        blocks: Which blocks.
        inputs: What flows into ``attention.out`` and ``mlp.down``, for wanda and flap.
        rows: Token rows whose loss is differentiated, for taylor.
        seed: Of the random rule.
        second_order: For taylor: subtract half of the weight's square times the gradient's.
    """
    if score == "random":
        return {b: (_drawn(seed, b, "kv", units.kv), _drawn(seed, b, "ff", units.ff)) for b in blocks}
    if score == "magnitude":
        return _over_members(model, units, blocks, lambda name: model.matrix(name).double() ** 2, root=True)
    if score == "taylor":
        return _taylor(model, units, blocks, rows, second_order)
    assert inputs is not None
    rule = _wanda if score == "wanda" else _flap
    found: Scores = {}
    for block in blocks:
        kv, ff = torch.zeros(units.kv, dtype=torch.float64), torch.zeros(units.ff, dtype=torch.float64)
        if units.attention:
            kv = rule(model, units, block, "attention.out", inputs)
        found[block] = kv, rule(model, units, block, "mlp.down", inputs) if ff.numel() else ff
    return found


def _drawn(seed: int, block: int, kind: str, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(int(store.key(seed=seed, block=block, kind=kind)[:15], 16))
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _wanda(model: Model, units: Units, block: int, part: str, inputs: Mapping[str, Inputs]) -> Tensor:
    name = f"blocks.{block}.{part}"
    seen = inputs[name]
    channel = (seen.count * seen.square).sqrt() * model.matrix(name).abs().mean(0).double().cpu()
    return channel[units.members(part)].sum(1)


def _flap(model: Model, units: Units, block: int, part: str, inputs: Mapping[str, Inputs]) -> Tensor:
    name = f"blocks.{block}.{part}"
    channel = inputs[name].variance * (model.matrix(name).double() ** 2).sum(0).cpu()
    if part == "attention.out":
        channel = channel**2  # as the authors' code has it
    return channel[units.members(part)].sum(1)


def _over_members(model: Model, units: Units, blocks: Sequence[int], values: object, root: bool) -> Scores:
    """Sum a value of every weight over the rows and columns of each unit; with `root` the root of each row's sum."""
    assert callable(values)
    found: Scores = {}
    for block in blocks:
        totals = [torch.zeros(n, dtype=torch.float64) for n in (units.kv, units.ff)]
        for part in units.parts:
            matrix: Tensor = values(f"blocks.{block}.{part}")
            lines = matrix.sum(1 if units.axis(part) == "rows" else 0).cpu()
            lines = lines.sqrt() if root else lines
            totals[part.startswith("mlp")] += lines[units.members(part)].sum(1)
        found[block] = totals[0], totals[1]
    return found


# ---------------------------------------------------------------- gradients


def twin(network: nn.Module, trained: Sequence[str] = (), dtype: torch.dtype = torch.float32) -> nn.Module:
    """Copy a network's structure but not its numbers; the parameters at the paths of `trained` take gradients.

    With another dtype the numbers are copied too.
    """
    wanted = {id(network.get_parameter(path)) for path in trained}
    memo: dict[int, object] = {id(b): b for b in network.buffers()}
    for p in network.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=id(p) in wanted)
    return copy.deepcopy(network, memo)


def _taylor(
    model: Model, units: Units, blocks: Sequence[int], rows: Sequence[tuple[int, ...]], second_order: bool
) -> Scores:
    paths = [model.anatomy.weight(f"blocks.{b}.{p}") for b in blocks for p in units.parts]
    network = twin(model.network, paths)
    first = {p: torch.zeros_like(network.get_parameter(p)) for p in paths}
    squares = {p: torch.zeros_like(network.get_parameter(p)) for p in paths} if second_order else {}
    weights = [network.get_parameter(p) for p in paths]
    for row in track(rows, "Gradients of the whole model"):
        batch = model.batch([row])
        logits = network(**model.inputs(batch), use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, batch.ids[0, 1:])
        for path, gradient in zip(paths, torch.autograd.grad(loss, weights)):
            first[path] += gradient / len(rows)
            if second_order:
                squares[path] += gradient**2 / len(rows)

    def worth(name: str) -> Tensor:
        path = model.anatomy.weight(name)
        weight = network.get_parameter(path).detach()
        change = weight * first[path]
        if second_order:
            change = change - weight**2 * squares[path] / 2
        return (change.T if model.anatomy.transposed(name) else change).abs().double()

    return _over_members(model, units, blocks, worth, root=False)
