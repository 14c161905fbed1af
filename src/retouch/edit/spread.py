"""Spread one wanted state over the weights of several blocks: what MEMIT and its kin share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import linalg
from ..change import Change, LowRank
from ..errors import SettingsError
from ..model import Model
from ..settings import setting
from ..trace import Trace
from .base import ValueEditMethod, down, rule
from .contexts import contexts_for
from .facts import Fact
from .keys import averages, batches, prefixes
from .neighbors import neighbors
from .rows import Problem, grouped, problems
from .value import Value, optimise

__all__ = ["Solver", "SpreadMethod", "Writer", "Written", "spread"]

Solver = Callable[[str, Tensor, Tensor], linalg.Solution]
"""(weight, keys (d_ff, n), residuals (d_model, n)) -> the write."""


@dataclass(frozen=True)
class SpreadMethod(ValueEditMethod):
    """Base of the methods that find a state after the last of several blocks and let all of them bring it about."""

    keeps_previous: ClassVar[bool] = True
    merges: ClassVar[bool] = False
    """Whether the facts of one subject share one value and one key."""
    reads: ClassVar[Literal["state", "down"]] = "state"
    """What the values are wanted at: the state after the last block, or what its weight gives."""
    power: ClassVar[float] = 1.0
    """With j blocks left, each takes what is missing over j to this power."""

    n_steps: int = setting(25, "Steps of the search; N steps make N - 1 updates.", ge=1, le=1000)
    clamp: float = setting(0.75, "Longest value change, in lengths of the value itself.", gt=0)
    blocks: tuple[int, ...] = setting(
        (), "Edited blocks, ascending; empty: 0.13 to 0.26 of the depth (gpt2: 0.27 to 0.35)."
    )

    @abstractmethod
    def solver(self, model: Model, blocks: Sequence[int], statistics: Model) -> Callable[[Sequence[Problem]], Writer]:
        """Prepare what is the same for all facts (metrics); return what writes one set of facts."""

    def values(
        self, model: Model, found: Sequence[Problem], groups: Sequence[Sequence[int]], block: int, **more: Any
    ) -> list[Value]:
        """Find the wanted state of each group at the last block."""
        return optimise(model, found, block, "residual", self, groups=groups, **more)

    def planned(self, model: Model, facts: Sequence[Fact], previous: Mapping[str, Tensor], unedited: Model) -> Change:
        """Plan all facts together."""
        return self._planned(model, [facts], previous, unedited)[0]

    def plan_each(self, model: Model, groups: Sequence[Sequence[Fact]]) -> list[Change]:
        """Plan each group alone; values are searched together and the metrics are made once."""
        self.ready(model, [f for g in groups for f in g])
        return self._planned(model, groups, {}, model)

    def _planned(
        self,
        model: Model,
        sets: Sequence[Sequence[Fact]],
        previous: Mapping[str, Tensor],
        unedited: Model,
    ) -> list[Change]:
        facts = [f for s in sets for f in s]
        method = self.as_published(model)
        blocks = method.blocks_of(model)
        contexts = contexts_for(unedited, method.contexts, self.seed)
        found = problems(model, facts, contexts, "subject", self.bos)
        groups_of: list[list[list[int]]] = []
        start = 0
        for each in sets:
            groups = grouped(each) if self.merges else [[i] for i in range(len(each))]
            groups_of.append([[start + i for i in g] for g in groups])
            start += len(each)
        flat = [g for groups in groups_of for g in groups]
        writer_of = method.solver(model, blocks, unedited)
        names = [down(b) for b in blocks]
        heard = neighbors(model, found, flat, names, method, writer_of(found).metric) if method.max_drift else []
        values = iter(method.values(model, found, flat, blocks[-1], bystanders=heard))
        changes = []
        for groups in groups_of:
            numbers = sorted(i for g in groups for i in g)
            part = [found[i] for i in numbers]
            place = {i: n for n, i in enumerate(numbers)}
            own = [[place[i] for i in g] for g in groups]
            change = method._written(
                model, part, own, [next(values) for _ in groups], blocks, writer_of(part), previous,
                [c.text for c in contexts],
            )  # fmt: skip
            changes.append(replace(change, settings=self.to_dict()))  # what was asked for; `faithful` says the rest
        return changes

    def blocks_of(self, model: Model) -> tuple[int, ...]:
        """Return the edited blocks: the setting's, or by the depth rule.

        Raises:
            SettingsError: The setting names blocks that the model lacks, or not in ascending order.
        """
        a = model.anatomy
        low, high = (0.27, 0.35) if "gpt2" in a.groups else (0.13, 0.26)
        blocks = self.blocks or tuple(range(rule(low, a), rule(high, a) + 1))
        if list(blocks) != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < a.n_blocks:
            raise SettingsError(f"{self.name}: blocks must ascend within 0 to {a.n_blocks - 1}; got {list(blocks)}.")
        return blocks

    def _written(
        self,
        model: Model,
        found: Sequence[Problem],
        groups: Sequence[Sequence[int]],
        values: Sequence[Value],
        blocks: Sequence[int],
        writer: Writer,
        previous: Mapping[str, Tensor],
        contexts: list[str],
    ) -> Change:
        names = [found[g[0]].fact.filled for g in groups]

        def solve(name: str, keys: Tensor, residuals: Tensor) -> linalg.Solution:
            metric, keep = writer.scaled(name, keys), previous.get(name)
            if writer.ridge:  # with it, keys that coincide would share in silence what each is to get whole
                linalg.solve(keys, residuals, metric, mode=writer.mode, keep=keep, names=names)
            return linalg.solve(keys, residuals, metric, mode=writer.mode, ridge=writer.ridge, keep=keep, names=names)

        targets = torch.stack([v.target for v in values])
        written = spread(model, found, groups, targets, blocks, solve, reads=self.reads, power=self.power)
        member = {i: g for g, members in enumerate(groups) for i in members}
        notes = {
            "facts": [
                {
                    **values[member[i]].notes(),
                    "delivered": [s["delivered"][member[i]] for s in written.notes],
                    "warnings": list(p.notes),
                }
                for i, p in enumerate(found)
            ],
            "groups": [list(g) for g in groups],
            "mode": writer.mode,
            "blocks": [_averaged(s) for s in written.notes],
            "contexts": contexts,
        }
        return self.change(
            model, [p.fact for p in found], written.parts, keys=written.keys, targets=written.residuals, notes=notes
        )


@contextmanager
def _normed(model: Model, block: int) -> Iterator[list[Tensor]]:
    """Keep what flows into and out of the norm behind a block's MLP; nothing where the family has none."""
    seen: list[Tensor] = []
    if model.anatomy.mlp_norm is None:
        yield seen
        return
    norm = model.network.get_submodule(f"{model.anatomy.path(f'blocks.{block}')}.{model.anatomy.mlp_norm}")
    handle = norm.register_forward_hook(lambda module, args, out: seen.extend((args[0], out)))
    try:
        yield seen
    finally:
        handle.remove()


def _before_norm(wanted: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Take a wanted gain back through an RMS norm, which scales each coordinate by after / before.

    The least-squares inverse: coordinates that the norm all but closes are left alone. The norm's length stays what it
    is, so that less than the wanted gain arrives; the blocks that follow see what is missing.

    Shapes:
        (groups, d_model) three times.
    """
    scale = after / torch.where(before == 0, 1.0, before)
    floor = 0.1 * scale.abs().median(1, keepdim=True).values
    return scale * wanted / (scale**2 + floor**2)


def _averaged(step: Mapping[str, Any]) -> dict[str, float]:
    """Return a block's notes with the mean of what its facts received."""
    delivered = step["delivered"]
    return {**step, "delivered": sum(delivered) / len(delivered)}


@dataclass(frozen=True, eq=False)
class Writer:
    """How a set of facts is solved at each weight.

    Attributes:
        metric: By weight.
        weight: What scales the metric, given its keys (d_ff, n) and the metric.
        mode: Of `linalg.solve`.
        ridge: Of `linalg.solve`.
    """

    metric: Mapping[str, linalg.Metric]
    weight: Callable[[Tensor, linalg.Metric], float] = lambda keys, metric: 1.0
    mode: linalg.Mode = "least_squares"
    ridge: float = 0.0

    def scaled(self, name: str, keys: Tensor) -> linalg.Metric:
        """Return a weight's metric at its scale."""
        return self.metric[name].scaled(self.weight(keys, self.metric[name]))


@dataclass(frozen=True, eq=False)
class Written:
    """What `spread` wrote, by weight.

    Shapes:
        keys (d_ff, groups), residuals (d_model, groups).
    """

    parts: dict[str, LowRank]
    keys: dict[str, Tensor]
    residuals: dict[str, Tensor]
    notes: list[dict[str, Any]]


@torch.no_grad()
def spread(
    model: Model,
    found: Sequence[Problem],
    groups: Sequence[Sequence[int]],
    targets: Tensor,
    blocks: Sequence[int],
    solve: Solver,
    *,
    reads: Literal["state", "down"] = "state",
    power: float = 1.0,
) -> Written:
    """Write in ascending blocks, each taking an equal share of what is still missing at the last one.

    For the j-th of J blocks: keys on the partly edited model; residual (z - h now) / (J - j); solve; write. The model
    is never altered: what is already written lives in side branches of the trace.

    Source:
        Meng et al., Mass-Editing Memory in a Transformer (arXiv 2210.07229), algorithm 1.

    Args:
        model: The model.
        found: The facts as rows.
        groups: Facts that share one key and one target: h is read on the bare rows, keys are the mean over all rows.
        targets: z, the wanted state after the last block, (groups, d_model).
        blocks: Ascending.
        solve: Makes the write of one weight.
        reads: See `SpreadMethod`.
        power: See `SpreadMethod`.
    """
    merged = [prefixes(found, g) for g in groups]
    rows = [p.ids for ps in merged for p in ps]
    mean, bare = averages(merged), averages(merged, bare=True)
    last = down(blocks[-1]) if reads == "down" else f"blocks.{blocks[-1]}"
    written = Written({}, {}, {}, [])
    for j, block in enumerate(blocks):
        name = down(block)
        keys, states, *norm = _read(model, rows, block, last, written.parts)
        keys = (mean @ keys).T
        missing = targets.double() - bare @ states
        wanted = missing / (len(blocks) - j) ** power
        if norm and reads == "state":
            wanted = _before_norm(wanted, *(bare @ side for side in norm))
        solution = solve(name, keys, wanted.T)
        written.parts[name] = LowRank(solution.left.float(), solution.right.float())
        written.keys[name], written.residuals[name] = keys.float(), solution.left.float()
        written.notes.append(
            {
                "block": float(block),
                "condition": solution.condition,
                "delivered": solution.delivered.tolist(),
                "missing": float(missing.norm(dim=1).mean()),
            }
        )
    return written


def _read(
    model: Model, rows: Sequence[tuple[int, ...]], block: int, last: str, parts: Mapping[str, LowRank]
) -> list[Tensor]:
    """Read at each row's last token, with `parts` written: what flows into a block's weight, and the state after `last`.

    Where a norm stands behind the MLP, also what flows into it and out of it.
    """
    name = down(block)
    found: dict[tuple[int, ...], list[Tensor]] = {}
    for some in batches(rows):
        batch = model.batch(some)
        at = batch.first.cpu() + torch.tensor([len(row) - 1 for row in some])
        index = torch.arange(len(some))
        with Trace(model) as trace, _normed(model, block) as normed:
            for other, part in parts.items():
                trace.branch(other, part.left, part.right)
            trace.read(name, "input")
            trace.read(last)
            trace.run(batch, stop_after=last)
            sides = [trace[name, "input"], trace[last, "output"], *normed]
            seen = [t[index, at].double().cpu() for t in sides]
        found.update({row: [side[i] for side in seen] for i, row in enumerate(some)})
    return [torch.stack(side) for side in zip(*(found[r] for r in rows))]
