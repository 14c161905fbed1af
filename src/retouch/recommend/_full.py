"""A scorer for methods that score every item at once: ranks, likelihoods and best items from one row of numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..progress import track
from .base import OUTSIDE
from .data import Interactions
from .splits import Samples, seen_pairs, targets, windows

__all__ = ["FullRanking", "best"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FullRanking(ABC):
    """Rank a catalogue by log-probabilities of all its items.

    Attributes:
        data: Whose histories the samples name.
        n_history: How many of the latest items are seen.
        filter_seen: Hide the items that a history already holds. Likelihoods do not change.
        batch_size: Rows of one batch; it changes no result.
    """

    data: Interactions
    n_history: int
    filter_seen: bool = False
    batch_size: int = 256

    @abstractmethod
    def log_probs(self, windows: NDArray[np.int32]) -> Floats:
        """Return the log-probability of every item for windows of history.

        Shapes: [n, history] -> [n, items]; column i - 1 is item i
        """

    def ranks(self, samples: Samples) -> NDArray[np.int64]:
        """Return the rank of each target among all items; an equal score counts as better.

        A target that is hidden has rank `OUTSIDE`.
        """
        parts = [self._ranks(part) for part in self._parts(samples)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _ranks(self, samples: Samples) -> NDArray[np.int64]:
        scores = self.log_probs(windows(self.data, samples, self.n_history)[0])
        if self.filter_seen:
            rows, items = seen_pairs(self.data, samples)
            scores[rows, items - 1] = -np.inf
        own = scores[np.arange(len(samples)), targets(self.data, samples) - 1]
        found = (scores >= own[:, None]).sum(axis=1)  # the target itself is the 1 of 1 + others
        return np.where(np.isneginf(own), OUTSIDE, found).astype(np.int64)

    def log_likelihood(self, samples: Samples) -> Floats:
        """Return the log-probability of each target in nats."""
        found = np.zeros(len(samples))
        at = 0
        for part in self._parts(samples):
            scores = self.log_probs(windows(self.data, part, self.n_history)[0])
            found[at : at + len(part)] = scores[np.arange(len(part)), targets(self.data, part) - 1]
            at += len(part)
        return found

    def top(self, windows: NDArray[np.int32], k: int) -> NDArray[np.int32]:
        """Return the best `k` items of each window, best first, equal ones by number; 0 where there are fewer."""
        found = np.zeros((len(windows), k), np.int32)
        for at in range(0, len(windows), self.batch_size):
            part = windows[at : at + self.batch_size]
            scores = self.log_probs(part[:, -self.n_history :])
            if self.filter_seen:
                rows, places = np.nonzero(part)
                scores[rows, part[rows, places] - 1] = -np.inf
            found[at : at + len(part)] = best(scores, k)
        return found

    def _parts(self, samples: Samples) -> Iterator[Samples]:
        starts = range(0, len(samples), self.batch_size)
        return (samples.take(slice(at, at + self.batch_size)) for at in track(starts, "rank the catalogue"))


def best(scores: Floats, k: int) -> NDArray[np.int32]:
    """Return the numbers of the `k` highest scores of each row, best first, equal ones by number; 0 for none.

    Shapes: [n, items] -> [n, k]

    Example:
        >>> best(np.array([[0.1, 0.3, 0.3, -np.inf]]), 5).tolist()
        [[2, 3, 1, 0, 0]]
    """
    n, items = scores.shape
    kept = min(k, items)
    least = np.partition(scores, items - kept, axis=1)[:, items - kept, None]
    equal = scores == least
    above = scores > least
    room = kept - above.sum(axis=1, keepdims=True)
    chosen = above | (equal & (np.cumsum(equal, axis=1) <= room))
    columns = np.nonzero(chosen)[1].reshape(n, kept)
    values = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    columns, values = np.take_along_axis(columns, order, axis=1), np.take_along_axis(values, order, axis=1)
    found = np.zeros((n, k), np.int32)
    found[:, :kept] = np.where(np.isneginf(values), 0, columns + 1)
    return found
