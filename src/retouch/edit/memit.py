"""MEMIT: many facts at once, spread over several blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .. import linalg
from ..change import Change
from ..errors import SettingsError
from ..model import Model
from ..settings import setting
from .base import MetricName, ValueEditMethod, down, metrics, rule
from .contexts import contexts_for
from .facts import Fact
from .spread import spread
from .value import Problem, Value, optimise, problems

__all__ = ["Memit"]


@dataclass(frozen=True)
class Memit(ValueEditMethod):
    """Write many facts together as a least-squares change of the MLP weights of several blocks.

    Source: Meng et al., Mass-Editing Memory in a Transformer (arXiv 2210.07229), section 4; kmeng01/memit (MIT).
        Default weight of the second moment: the width of the key, so that a lone fact takes half of its residual at
        each block; the published 15,000 to 20,000 fit widths of 6,400 to 16,384 and are used under ``faithful``.

    Use when: ten to thousands of facts about different subjects.

    Known problems: facts that share a subject share a key and get 1/n of their residual each. Needs second moments
        (collected once, cached), or ``metric=identity``.

    Shapes: at each block K (d_ff x n), R (d_model x n); the change has rank n.

    Example:
        >>> Memit(blocks=(4, 5, 6)).clamp
        0.75
    """

    n_steps: int = setting(25, "Steps of the search; N steps make N - 1 updates.", ge=1, le=1000)
    clamp: float = setting(0.75, "Longest value change, in lengths of the value itself.", gt=0)
    blocks: tuple[int, ...] = setting(
        (), "Edited blocks, ascending; empty: 0.13 to 0.26 of the depth (gpt2: 0.27 to 0.35)."
    )
    metric: MetricName = setting("covariance", "Norm that the write is smallest in.")
    moment_weight: float = setting(
        0.0,
        "Weight of the metric against the facts; 0: half of a lone residual goes through (covariance: the width of the "
        "key; identity: in units of its squared length).",
        ge=0,
    )

    def plan(self, model: Model, facts: Sequence[Fact]) -> Change:
        """Plan all facts together."""
        return self._planned(model, facts, together=True)[0]

    def plan_each(self, model: Model, facts: Sequence[Fact]) -> list[Change]:
        """Plan each fact alone; values are searched together and the metrics are made once."""
        return self._planned(model, facts, together=False)

    def _planned(self, model: Model, facts: Sequence[Fact], *, together: bool) -> list[Change]:
        self.ready(model, facts)
        method = self.as_published(model)
        blocks = method._blocks(model)
        contexts = contexts_for(model, self.contexts, self.seed)
        found = problems(model, facts, contexts, "subject", self.bos)
        metric = metrics(
            model, [down(b) for b in blocks], self.metric, text=self.text, n_tokens=self.n_tokens, bos=self.bos
        )
        values = optimise(model, found, blocks[-1], "residual", method)
        pairs = list(zip(found, values))
        groups = [pairs] if together else [[pair] for pair in pairs]
        return [method._written(model, blocks, metric, group, [c.text for c in contexts]) for group in groups]

    def _blocks(self, model: Model) -> tuple[int, ...]:
        a = model.anatomy
        low, high = (0.27, 0.35) if "gpt2" in a.groups else (0.13, 0.26)
        blocks = self.blocks or tuple(range(rule(low, a), rule(high, a) + 1))
        if list(blocks) != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < a.n_blocks:
            raise SettingsError(f"memit: blocks must ascend within 0 to {a.n_blocks - 1}; got {list(blocks)}.")
        return blocks

    def _written(
        self,
        model: Model,
        blocks: Sequence[int],
        metric: Mapping[str, linalg.Metric],
        group: Sequence[tuple[Problem, Value]],
        contexts: list[str],
    ) -> Change:

        def solve(name: str, keys: torch.Tensor, residuals: torch.Tensor) -> linalg.Solution:
            # either way a lone fact takes about half of its residual: k' C0^-1 k is d_ff on average, k'k is |k|^2
            half = float(model.anatomy.d_ff) if self.metric == "covariance" else float((keys**2).sum(0).mean())
            factor = self.moment_weight if self.metric == "covariance" else self.moment_weight * half
            scaled = metric[name].scaled(factor or half)
            return linalg.solve(keys, residuals, scaled, mode="least_squares")

        found = [p for p, _ in group]
        targets = torch.stack([v.target for _, v in group])
        parts, keys, steps = spread(model, found, targets, blocks, solve)
        notes = {
            "facts": [{**v.notes(), "warnings": list(p.notes)} for p, v in group],
            "blocks": steps,
            "contexts": contexts,
        }
        return self.change(model, [p.fact for p in found], parts, keys=keys, notes=notes)
