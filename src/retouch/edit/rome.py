"""ROME: one fact, one weight, one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import linalg
from ..change import Change
from ..model import Model
from ..settings import setting
from .base import MetricName, block_at, down, metrics
from .contexts import Context
from .facts import Fact
from .neighbors import neighbors
from .rank_one import RankOneMethod
from .rows import problems
from .value import optimise

__all__ = ["Rome"]


@dataclass(frozen=True)
class Rome(RankOneMethod):
    """Write each fact as a rank-one change of one MLP weight, at the subject's last token.

    Source: Meng et al., Locating and Editing Factual Associations in GPT (arXiv 2202.05262), section 3; kmeng01/rome
        (MIT). The default writes with the mean key in direction and scale, as r_rome does; ``faithful`` keeps the
        authors' unprefixed key in the scale and their 21 contexts.

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

    def shared(self, model: Model, facts: Sequence[Fact]) -> linalg.Metric:
        """Make the metric once for all facts."""
        name = down(self.block_of(model))
        return metrics(model, [name], self.metric, text=self.text, n_tokens=self.n_tokens, bos=self.bos)[name]

    def each(self, model: Model, facts: Sequence[Fact], contexts: Sequence[Context], shared: Any) -> list[Change]:
        """Plan each fact alone on `model`; values are searched together."""
        block = self.block_of(model)
        found = problems(model, facts, contexts, "subject", self.bos)
        groups = [[i] for i in range(len(found))]
        heard = neighbors(model, found, groups, [down(block)], self, {down(block): shared})
        values = optimise(model, found, block, "down", self, bystanders=heard)
        return [self.written(model, block, shared, p, v, contexts) for p, v in zip(found, values)]

    def block_of(self, model: Model) -> int:
        """Return the edited block: the setting's, or by the depth rule."""
        early = model.anatomy.groups & {"gpt2", "gpt_neox"}
        return block_at(self.block, 0.35 if early else 0.18, model.anatomy, self.name)
