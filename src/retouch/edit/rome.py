"""ROME: one fact, one weight, one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import linalg
from ..change import Change, LowRank, apply
from ..model import Model
from ..settings import setting
from .base import MetricName, ValueEditMethod, block_at, down, keys_at, metrics
from .contexts import Context, contexts_for
from .facts import Fact
from .value import Problem, Value, optimise, problems

__all__ = ["Rome"]


@dataclass(frozen=True)
class Rome(ValueEditMethod):
    """Write each fact as a rank-one change of one MLP weight, at the subject's last token.

    Source: Meng et al., Locating and Editing Factual Associations in GPT (arXiv 2202.05262), section 3; kmeng01/rome
        (MIT). The default writes with the mean key in direction and scale (R-ROME, scalable-model-editing/
        rebuilding-rome); ``faithful`` keeps the authors' unprefixed key in the scale and their 21 contexts.

    Use when: a few facts about different subjects. Needs no statistics with the identity metric.

    Known problems: over-generalises to other relations of the subject and, for one-token subjects, to neighbours.
        With ``faithful`` the scale can explode when the unprefixed key lies across the mean key ("disabling edits").

    Shapes: k (d_ff), v (d_model); the change is (d_model x rank)(rank x d_ff), rank = number of facts.

    Example:
        >>> Rome(block=6).metric
        'identity'
    """

    block: int = setting(-1, "Edited block; -1: 0.35 of the depth for gpt2 and gpt_neox, else 0.18.", ge=-1)
    metric: MetricName = setting("identity", "Norm that the write is smallest in.")

    def plan(self, model: Model, facts: Sequence[Fact]) -> Change:
        """Plan all facts one after another, each on the model that carries the earlier ones."""
        self.ready(model, facts)
        shared = self._shared(model)  # a write moves no key of its own block, so that the metric stays as it is
        work, planned = model, list[Change]()
        for fact in facts:
            planned += self._each(work, [fact], *shared)
            work = apply(work, planned[-1])
        return _joined(self, model, facts, planned)

    def plan_each(self, model: Model, facts: Sequence[Fact]) -> list[Change]:
        """Plan each fact alone on `model`; values are searched together."""
        self.ready(model, facts)
        return self._each(model, facts, *self._shared(model))

    def _shared(self, model: Model) -> tuple[list[Context], linalg.Metric]:
        kind = "rome" if self.faithful and self.contexts == "memit" else self.contexts
        method = self.as_published(model)
        name = down(method._block(model))
        metric = metrics(model, [name], method.metric, text=self.text, n_tokens=self.n_tokens, bos=self.bos)
        return contexts_for(model, kind, self.seed), metric[name]

    def _each(
        self, model: Model, facts: Sequence[Fact], contexts: Sequence[Context], metric: linalg.Metric
    ) -> list[Change]:
        method = self.as_published(model)
        block = method._block(model)
        found = problems(model, facts, contexts, "subject", self.bos)
        values = optimise(model, found, block, "down", method)
        return [
            method._written(model, block, metric, problem, value, [c.text for c in contexts])
            for problem, value in zip(found, values)
        ]

    def _block(self, model: Model) -> int:
        early = model.anatomy.groups & {"gpt2", "gpt_neox"}
        return block_at(self.block, 0.35 if early else 0.18, model.anatomy, self.name)

    def _written(
        self, model: Model, block: int, metric: linalg.Metric, problem: Problem, value: Value, contexts: list[str]
    ) -> Change:
        name = down(block)
        every = keys_at(model, [r.ids for r in problem.rows], problem.anchors, name)
        weights = torch.tensor(problem.weights, dtype=torch.float64)
        key = weights @ every
        scale_key = every[0] if self.faithful else key
        residual = value.target.double() - output_at(model, name, scale_key)
        w = linalg.solve(key[:, None], torch.ones(1, 1), metric, mode="equality").right
        reach = float(w[0] @ scale_key)  # 1 with one key; faithful: how much of the write the bare prompt receives
        left = (residual / reach)[:, None]
        notes = {
            "facts": [
                {
                    **value.notes(),
                    "reach": reach,
                    "cosine": float(w[0] @ scale_key / (w.norm() * scale_key.norm())),
                    "amplification": float(w.norm() * key.norm()),
                    "warnings": list(problem.notes),
                }
            ],
            "contexts": contexts,
            "block": block,
        }
        part = LowRank(left.float(), w.float())
        return self.change(model, [problem.fact], {name: part}, keys={name: scale_key[:, None].float()}, notes=notes)


def output_at(model: Model, name: str, key: torch.Tensor) -> torch.Tensor:
    """Return what a weight (and its bias) makes of a key, float64 on the CPU."""
    out = model.matrix(name).double().cpu() @ key
    bias = getattr(model.module(name), "bias", None)
    return out if bias is None else out + bias.detach().double().cpu()


def _joined(method: Rome, model: Model, facts: Sequence[Fact], planned: Sequence[Change]) -> Change:
    name = next(iter(planned[0].parts))
    parts = [p for c in planned for p in c.parts.values() if isinstance(p, LowRank)]
    part = LowRank(torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts], 0))
    notes = {**planned[0].notes, "facts": [f for c in planned for f in c.notes["facts"]]}
    keys = {name: torch.cat([c.keys[name] for c in planned], 1)}
    return method.change(model, facts, {name: part}, keys=keys, notes=notes)
