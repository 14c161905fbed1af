"""A rank-one write: what ROME, RETS and TOP share once they know which key is to give which value."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..change import Change, LowRank, apply
from ..model import Model
from .base import ValueEditMethod, down
from .contexts import Context, contexts_for
from .facts import Fact
from .keys import keys_at, output_at
from .neighbors import stopped
from .rows import Problem
from .value import Value

__all__ = ["RankOneMethod", "join", "write"]


@dataclass(frozen=True)
class RankOneMethod(ValueEditMethod):
    """Base of the methods that write each fact as a rank-one change of one weight, one fact after another."""

    @property
    def consistent(self) -> bool:
        """Whether the mean key stands in direction and scale; as published, the first row's key is in the scale."""
        return not self.faithful

    @abstractmethod
    def each(self, model: Model, facts: Sequence[Fact], contexts: Sequence[Context], shared: Any) -> list[Change]:
        """Plan each fact alone on `model`; values are searched together."""

    def shared(self, model: Model, facts: Sequence[Fact]) -> Any:
        """Prepare what is the same for all facts, a metric for instance."""
        return None

    def planned(self, model: Model, facts: Sequence[Fact], previous: Mapping[str, Tensor], unedited: Model) -> Change:
        """Plan all facts one after another, each on the model that carries the earlier ones."""
        method, contexts = self.as_published(model), self._contexts(unedited)
        shared = method.shared(unedited, facts)  # a write moves no key of its own block
        work, planned = model, list[Change]()
        for i, fact in enumerate(facts):
            planned += method.each(work, [fact], contexts, shared)
            if i + 1 < len(facts) and not stopped(planned[-1]):  # a write of nothing cannot be proved
                work = apply(work, planned[-1])
        return join(self, model, facts, planned)

    def plan_each(self, model: Model, groups: Sequence[Sequence[Fact]]) -> list[Change]:
        """Plan each group alone on `model`; groups of one fact are searched together."""
        if any(len(g) != 1 for g in groups):
            return [self.plan(model, g) for g in groups]
        facts = [f for g in groups for f in g]
        self.ready(model, facts)
        method = self.as_published(model)
        planned: list[Change] = method.each(model, facts, self._contexts(model), method.shared(model, facts))
        return [replace(change, settings=self.to_dict()) for change in planned]

    def _contexts(self, model: Model) -> list[Context]:
        kind = "rome" if self.faithful and self.contexts == "memit" else self.contexts
        return contexts_for(model, kind, self.seed)

    def written(
        self,
        model: Model,
        block: int,
        metric: linalg.Metric,
        problem: Problem,
        value: Value,
        contexts: Sequence[Context],
        **notes: Any,
    ) -> Change:
        """Make the change that gives a fact's mean key its value."""
        name = down(block)
        part, key, said = write(model, name, problem, value, metric, consistent=self.consistent)
        record = {**value.notes(), **said, **notes, "warnings": [*problem.notes, *notes.get("warnings", ())]}
        return self.change(
            model,
            [problem.fact],
            {name: part},
            keys={name: key[:, None].float()},
            targets={name: part.left * record["reach"]},
            notes={"facts": [record], "mode": "equality", "block": block, "contexts": [c.text for c in contexts]},
        )


def write(
    model: Model, name: str, problem: Problem, value: Value, metric: linalg.Metric, *, consistent: bool = True
) -> tuple[LowRank, Tensor, dict[str, float]]:
    """Write a value at a fact's mean key: Dw = r w', w = M^-1 k / (k' M^-1 k), so that (W + Dw) k + bias = v.

    Source:
        Meng et al. 2022 (arXiv 2202.05262), equation 2; rebuilding-rome for the mean key in both places.

    Args:
        model: The model.
        name: The weight.
        problem: The fact as rows.
        value: What its key is to give.
        metric: M.
        consistent: Take the mean key in direction and scale; else, as in ROME's code, the first row's in the scale,
            which explodes when that one lies across the mean.

    Returns:
        The part, the key (d_ff) that receives the value exactly, and numbers for the report.
    """
    every = keys_at(model, [r.ids for r in problem.rows], problem.anchors, name)
    key = torch.tensor(problem.weights, dtype=torch.float64) @ every
    exact = key if consistent else every[0]
    residual = value.target.double() - output_at(model, name, exact)
    w = linalg.solve(key[:, None], torch.ones(1, 1), metric, mode="equality", names=[problem.fact.filled]).right[0]
    reach = float(w @ exact)
    said = {
        "reach": reach,
        "cosine": float(w @ exact / (w.norm() * exact.norm())),
        "amplification": float(w.norm() * key.norm()),
        "bare": float(w @ every[0]) / reach,
    }
    return LowRank((residual / reach)[:, None].float(), w[None].float()), exact, said


def join(method: ValueEditMethod, model: Model, facts: Sequence[Fact], planned: Sequence[Change]) -> Change:
    """Join changes that were planned one after another into one."""
    parts: dict[str, LowRank] = {}
    keys: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    for change in planned:
        for name, part in change.parts.items():
            assert isinstance(part, LowRank)
            old = parts.get(name)
            parts[name] = part if old is None else LowRank(
                torch.cat([old.left, part.left], 1), torch.cat([old.right, part.right], 0)
            )  # fmt: skip
            for columns, more in ((keys, change.keys), (targets, change.targets)):
                columns[name] = torch.cat([columns[name], more[name]], 1) if name in columns else more[name]
    notes = {**planned[0].notes, "facts": [f for c in planned for f in c.notes["facts"]]}
    return method.change(model, facts, parts, keys=keys, targets=targets, notes=notes)
