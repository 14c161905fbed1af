"""Codes by residual k-means: each level explains what the levels before it left over. No gradients, seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import StoreError
from ..settings import Settings, setting
from ._kmeans import Rows, checked, codes_for, kmeans, nearest
from .tokenise import Codes, Fitted

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FittedRQKMeans", "RQKMeans"]

_LEAST_NORM = 1e-9


@dataclass(frozen=True)
class RQKMeans(Settings):
    """Give items codes by k-means on their vectors, then on what is left over, level by level.

    Source: residual quantisation by k-means as in OneRec (arXiv 2502.18965); dividing the residual by its norm is ours.

    Use when: always, unless you know why not; it is the default.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(60, 8))
        >>> RQKMeans(levels=2, codes=4).fit(vectors).encode(vectors).shape
        (60, 2)
    """

    levels: int = setting(3, "How many codes describe an item, the last digit not counted.", ge=1, le=8)
    codes: int | None = setting(None, "Codes of each level; none: 256, or 64 below 3,000 items.", ge=2)
    normalise_residual: bool = setting(True, "Divide what is left over by its norm, which evens out later levels.")
    restarts: int = setting(3, "Starts of k-means, of which the best is kept.", ge=1)
    iterations: int = setting(50, "Most steps of k-means.", ge=1)

    def fit(self, vectors: Rows, seed: int = 0) -> FittedRQKMeans:
        """Learn the centres of each level.

        Shapes: [items, width]

        Raises:
            UserError: The vectors are not finite, or fewer than codes.
        """
        n_codes = codes_for(len(vectors), self.codes)
        vectors = checked(vectors, n_codes).astype(np.float64)
        mean = vectors.mean(0).astype(np.float32)
        left, books = vectors - mean, []
        for level in range(self.levels):
            rows = _level(left, level, self.normalise_residual)
            what = f"codes of level {level}"
            books.append(kmeans(rows, n_codes, seed * 1000 + level, self.restarts, self.iterations, what))
            left = rows - books[-1][nearest(rows, books[-1].astype(np.float64))[0]]
        return FittedRQKMeans(mean, np.stack(books), self.normalise_residual)


def _level(left: Rows, level: int, normalise: bool) -> Rows:
    if level == 0 or not normalise:
        return left
    divided: Rows = left / np.maximum(np.linalg.norm(left, axis=1, keepdims=True), _LEAST_NORM)
    return divided


@dataclass(frozen=True, eq=False)
class FittedRQKMeans(Fitted):
    """Hold the centres of each level.

    Args:
        mean: Taken from each vector first; [width].
        books: The centres; [levels, codes, width].
        normalise_residual: Whether what is left over is divided by its norm.
    """

    mean: Rows
    books: Rows
    normalise_residual: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many codes each level has."""
        return (len(self.books[0]),) * len(self.books)

    def encode(self, vectors: Rows) -> Codes:
        """Return the codes of each vector. Computed in float64, so that a vector's company never decides its codes.

        Shapes: [items, width] -> [items, levels]

        Raises:
            UserError: The vectors are not finite, or of another width.
        """
        return self._walk(vectors)[0]

    def residual_shares(self, vectors: Rows) -> tuple[float, ...]:
        """Return the share of each level's squared length that its centres leave over.

        Where the residual is divided by its norm, levels after the first are shares of that.
        """
        return self._walk(vectors)[1]

    def _walk(self, vectors: Rows) -> tuple[Codes, tuple[float, ...]]:
        left = checked(vectors, 0, len(self.mean)).astype(np.float64) - self.mean
        codes, shares = np.zeros((len(left), len(self.books)), np.int32), []
        for level, book in enumerate(self.books.astype(np.float64)):
            rows = _level(left, level, self.normalise_residual)
            codes[:, level] = nearest(rows, book)[0]
            left = rows - book[codes[:, level]]
            shares.append(float((left**2).sum() / max(float((rows**2).sum()), 1e-30)))
        return codes, tuple(shares)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that makes it."""
        import torch

        return {
            "rq_kmeans.mean": torch.from_numpy(self.mean.copy()),
            "rq_kmeans.books": torch.from_numpy(self.books.copy()),
            "rq_kmeans.normalise_residual": torch.tensor(self.normalise_residual),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FittedRQKMeans:
        """Make it again from `tensors`.

        Raises:
            StoreError: They are not those of this tokeniser.
        """
        try:
            mean, books, normalise = (tensors[f"rq_kmeans.{n}"] for n in ("mean", "books", "normalise_residual"))
        except KeyError as error:
            raise StoreError(f"The tokeniser lacks {error}. Copy it again from its source.") from error
        if books.ndim != 3 or mean.shape != books.shape[2:]:
            raise StoreError(f"The tokeniser's centres {tuple(books.shape)} and mean {tuple(mean.shape)} do not fit.")
        return cls(mean.numpy(), books.numpy(), bool(normalise))
