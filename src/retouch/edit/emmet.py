"""EMMET: many facts at once in one weight, each of them exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import SettingsError
from ..model import Model
from ..settings import setting
from .base import MetricName, down, metrics, rule
from .rows import Problem
from .spread import SpreadMethod, Writer

__all__ = ["Emmet"]


@dataclass(frozen=True)
class Emmet(SpreadMethod):
    """Write many facts into one MLP weight so that every key gets its whole value: ROME in batches.

    Source: Gupta et al., A Unified Framework for Model Editing (arXiv 2403.14236);
        scalable-model-editing/unified-model-editing. Where its code adds 0.1 I to the system, we add a ridge relative
        to the system's own size.

    Use when: up to some hundreds of facts about different subjects have to hold exactly in one weight.

    Known problems: facts whose keys coincide cannot all hold and are refused by name; the change grows quickly with
        the number of facts.

    Shapes: K (d_ff x n), R (d_model x n); the change has rank n.

    Example:
        >>> Emmet().ridge
        1e-06
    """

    metric: MetricName = setting("covariance", "Norm that the write is smallest in.")
    ridge: float = setting(1e-6, "Added to the system of keys, relative to its mean diagonal.", ge=0)

    def blocks_of(self, model: Model) -> tuple[int, ...]:
        """Return the one edited block: the setting's, or rome's."""
        if len(self.blocks) > 1:
            raise SettingsError(f"emmet: blocks takes one block; got {list(self.blocks)}.")
        early = model.anatomy.groups & {"gpt2", "gpt_neox"}
        return super().blocks_of(model) if self.blocks else (rule(0.35 if early else 0.18, model.anatomy),)

    def solver(self, model: Model, blocks: Sequence[int], statistics: Model) -> Callable[[Sequence[Problem]], Writer]:
        """Make the metric once."""
        names = [down(b) for b in blocks]
        metric = metrics(statistics, names, self.metric, text=self.text, n_tokens=self.n_tokens, bos=self.bos)
        writer = Writer(metric, mode="equality", ridge=self.ridge)
        return lambda found: writer
