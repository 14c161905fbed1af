"""MEMIT: many facts at once, spread over several blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .. import linalg
from ..model import Model
from ..settings import setting
from .base import MetricName, down, metrics
from .rows import Problem
from .spread import SpreadMethod, Writer

__all__ = ["Memit"]


@dataclass(frozen=True)
class Memit(SpreadMethod):
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

    metric: MetricName = setting("covariance", "Norm that the write is smallest in.")
    moment_weight: float = setting(
        0.0,
        "Weight of the metric against the facts; 0: half of a lone residual goes through (covariance: the width of the "
        "key; identity: in units of its squared length).",
        ge=0,
    )

    def solver(self, model: Model, blocks: Sequence[int], statistics: Model) -> Callable[[Sequence[Problem]], Writer]:
        """Make the metrics once."""
        names = [down(b) for b in blocks]
        metric = metrics(statistics, names, self.metric, text=self.text, n_tokens=self.n_tokens, bos=self.bos)
        writer = Writer(metric, self._weight)
        return lambda found: writer

    def _weight(self, keys: Tensor, metric: linalg.Metric) -> float:
        # either way a lone fact takes about half of its residual: k' C0^-1 k is d_ff on average, k'k is |k|^2
        if self.metric == "covariance":
            return self.moment_weight or float(len(keys))
        return (self.moment_weight or 1.0) * float((keys**2).sum(0).mean())
