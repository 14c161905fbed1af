"""The floor: recommend to everybody what was taken most often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..settings import setting
from ._full import FullRanking
from .base import Recommender, Run

__all__ = ["Popularity", "PopularityScorer"]


@dataclass(frozen=True)
class Popularity(Recommender):
    """Rank all items by how often they were taken in training, the same for everybody.

    Source:
        Counting; the common floor of recommendation. Smoothed so that every item has a likelihood.

    Use when:
        You want to know what a method adds to no method at all.

    Known problems:
        Says nothing about a user. Items taken equally often are tied, and a tie counts against the target.

    Shapes:
        counts: [items]
    """

    smoothing: float = setting(0.5, "Added to each count, so that no likelihood is zero.", gt=0)

    def fit(self, run: Run) -> PopularityScorer:
        """Count training interactions."""
        counts = run.splits.counts[1:] + self.smoothing
        return PopularityScorer(run.data, 1, row=np.log(counts / counts.sum()))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Row:
    row: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PopularityScorer(_Row, FullRanking):
    """The same log-probabilities for every history.

    Attributes:
        row: Log-probability of each item.
    """

    def log_probs(self, windows: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return the one row, once for each window."""
        return np.repeat(self.row[None], len(windows), axis=0)
