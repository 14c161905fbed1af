"""MEMIT-Merge: MEMIT with one value and one key for each subject."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .memit import Memit

__all__ = ["MemitMerge"]


@dataclass(frozen=True)
class MemitMerge(Memit):
    """Write facts like memit, after merging those of one subject into one value and one key.

    Source: Dong et al., MEMIT-Merge (arXiv 2502.07322): the abstract; the details (a value from the mean of its facts'
        losses, a key from their distinct left contexts) are ours.

    Use when: several facts about one subject.

    Known problems: one value of the length that memit allows to one fact has to carry all of a subject's facts, so
        that it stops at small margins; see rose.

    Shapes: at each block K (d_ff x subjects), R (d_model x subjects); the change has rank = number of subjects.

    Example:
        >>> MemitMerge().metric
        'covariance'
    """

    merges: ClassVar[bool] = True
