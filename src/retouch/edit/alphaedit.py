"""AlphaEdit: writes that read only what ordinary text hardly uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from .. import linalg
from ..model import Model
from ..settings import setting
from .base import down, null_spaces
from .rows import Problem
from .spread import SpreadMethod, Writer

__all__ = ["AlphaEdit"]


@dataclass(frozen=True)
class AlphaEdit(SpreadMethod):
    """Write many facts like memit, but only through the directions of the keys that ordinary text hardly uses.

    Source: Fang et al., AlphaEdit: Null-Space Constrained Model Editing (arXiv 2410.02355); jianghoucheng/AlphaEdit.
        The directions are the smallest that together carry `energy` of the second moment's trace, because the
        authors' absolute threshold (used under ``faithful``) depends on the scale of a model's keys; earlier edits'
        keys come from the caller, not from a matrix that outlives the run.

    Use when: edits follow one another and earlier ones must stay.

    Known problems: a key with little part in those directions needs a large change; drifted keys hear it unevenly.
        Needs second moments (collected once, cached).

    Shapes: at each block K (d_ff x n), R (d_model x n), P of rank r <= d_ff; the change has rank n.

    Example:
        >>> AlphaEdit().energy
        0.02
    """

    energy: float = setting(
        0.02, "Share of the second moment's trace that the allowed directions may carry.", gt=0, le=1
    )
    strength: float = setting(0.0, "Weight of the change's own size; 0: a hundredth of the keys' mean squared length "
                              "in the allowed directions (faithful: 10).", ge=0)  # fmt: skip

    def solver(self, model: Model, blocks: Sequence[int], statistics: Model) -> Callable[[Sequence[Problem]], Writer]:
        """Find the allowed directions once."""
        metric = null_spaces(
            statistics,
            [down(b) for b in blocks],
            self.energy,
            threshold=2e-2 if self.faithful else None,
            text=self.text,
            n_tokens=self.n_tokens,
            bos=self.bos,
        )
        writer = Writer(metric, self._weight)
        return lambda found: writer

    def _weight(self, keys: Tensor, metric: linalg.Metric) -> float:
        projected = cast(linalg.NullSpace, metric).project(keys)
        return self.strength or (10.0 if self.faithful else 0.01 * float((projected**2).sum(0).mean()))
