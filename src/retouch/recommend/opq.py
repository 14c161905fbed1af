"""Codes by optimised product quantisation: the vector is turned, cut into blocks, and each block gets a code.

The codes have no order. A tree in block order still works, but a prefix means little, so searches need more beams.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError, UserError
from ..progress import track
from ..settings import Settings, setting
from ._kmeans import Rows, checked, codes_for, kmeans, lloyd, nearest
from .tokenise import Codes, Fitted

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OPQ", "FittedOPQ"]


@dataclass(frozen=True)
class OPQ(Settings):
    """Give items unordered codes: one for each block of the turned vector.

    Source: Ge et al., Optimized Product Quantization, CVPR 2013; as item codes in RPG (arXiv 2506.05781).

    Use when: a peer is wanted for the ordered codes of `rq_kmeans`.

    Known problems: prefixes of codes mean little, so a beam search needs more beams to be exact.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(60, 8))
        >>> OPQ(blocks=2, codes=4).fit(vectors).encode(vectors).shape
        (60, 2)
    """

    blocks: int = setting(4, "How many blocks, and codes of an item, the last digit not counted.", ge=1, le=64)
    codes: int | None = setting(None, "Codes of each block; none: 256, or 64 below 3,000 items.", ge=2)
    rounds: int = setting(20, "How often codes and rotation are improved in turn.", ge=0)
    restarts: int = setting(3, "Starts of k-means, of which the best is kept.", ge=1)
    iterations: int = setting(50, "Most steps of k-means.", ge=1)

    def fit(self, vectors: Rows, seed: int = 0) -> FittedOPQ:
        """Learn the rotation and the centres of each block.

        Shapes: [items, width]

        Raises:
            UserError: The vectors are not finite or fewer than codes, or their width is no multiple of the blocks.
        """
        n_codes = codes_for(len(vectors), self.codes)
        vectors = checked(vectors, n_codes).astype(np.float64)
        if vectors.shape[1] % self.blocks:
            raise UserError(f"Vectors of width {vectors.shape[1]} cannot be cut into {self.blocks} equal blocks.")
        mean = vectors.mean(0)
        x = vectors - mean
        rotation = _balanced(x, self.blocks)
        blocks = _cut(x @ rotation, self.blocks)
        books = np.stack(
            [kmeans(b, n_codes, seed * 1000 + i, self.restarts, self.iterations) for i, b in enumerate(blocks)]
        )
        for _ in track(range(self.rounds), "rotation"):
            left, _, right = np.linalg.svd(x.T @ _quantised(_cut(x @ rotation, self.blocks), books))
            rotation = left @ right
            turned = _cut(x @ rotation, self.blocks).astype(np.float32)
            books = np.stack([lloyd(b, book, 2)[0] for b, book in zip(turned, books)])
        return FittedOPQ(mean.astype(np.float32), rotation.astype(np.float32), books)


def _balanced(x: Rows, blocks: int) -> Rows:
    """Turn to the principal axes, dealt out so that the blocks have about equal products of variances."""
    values, axes = np.linalg.eigh(x.T @ x / len(x))
    logs = np.log(np.maximum(values, 1e-12))
    each = len(values) // blocks
    held: list[list[int]] = [[] for _ in range(blocks)]
    sums = np.zeros(blocks)
    for axis in range(len(values) - 1, -1, -1):  # the largest first
        free = [b for b in range(blocks) if len(held[b]) < each]
        block = min(free, key=lambda b: (sums[b], b))
        held[block].append(axis)
        sums[block] += logs[axis] - logs[0]  # so that every axis adds, also those below 1
    turned: Rows = axes[:, [axis for block in held for axis in block]]
    return turned


def _cut(turned: Rows, blocks: int) -> Rows:
    """Cut rows into blocks. Shapes: [items, width] -> [blocks, items, width / blocks]"""
    return np.ascontiguousarray(turned.reshape(len(turned), blocks, -1).transpose(1, 0, 2))


def _labels(cut: Rows, books: Rows) -> NDArray[np.int64]:
    return np.stack([nearest(rows, book.astype(np.float64))[0] for rows, book in zip(cut, books)], 1)


def _quantised(cut: Rows, books: Rows) -> Rows:
    labels = _labels(cut, books)
    return np.concatenate([book[labels[:, block]] for block, book in enumerate(books)], 1)


@dataclass(frozen=True, eq=False)
class FittedOPQ(Fitted):
    """Hold the rotation and the centres of each block.

    Args:
        mean: Taken from each vector first; [width].
        rotation: Orthogonal; [width, width].
        books: The centres; [blocks, codes, width / blocks].
    """

    mean: Rows
    rotation: Rows
    books: Rows

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many codes each block has."""
        return (len(self.books[0]),) * len(self.books)

    def encode(self, vectors: Rows) -> Codes:
        """Return the codes of each vector, computed in float64.

        Shapes: [items, width] -> [items, blocks]

        Raises:
            UserError: The vectors are not finite, or of another width.
        """
        return _labels(self._turned(vectors), self.books).astype(np.int32)

    def residual_shares(self, vectors: Rows) -> tuple[float, ...]:
        """Return the share of each block's squared length that its centres leave over."""
        cut = self._turned(vectors)
        left = [nearest(rows, book.astype(np.float64))[1].sum() for rows, book in zip(cut, self.books)]
        return tuple(float(e / max(float((rows**2).sum()), 1e-30)) for e, rows in zip(left, cut))

    def _turned(self, vectors: Rows) -> Rows:
        x = checked(vectors, 0, len(self.mean)).astype(np.float64) - self.mean
        return _cut(x @ self.rotation, len(self.books))

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that makes it."""
        import torch

        parts = {"mean": self.mean, "rotation": self.rotation, "books": self.books}
        return {f"opq.{name}": torch.from_numpy(part.copy()) for name, part in parts.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FittedOPQ:
        """Make it again from `tensors`.

        Raises:
            StoreError: They are not those of this tokeniser.
        """
        try:
            mean, rotation, books = (tensors[f"opq.{name}"] for name in ("mean", "rotation", "books"))
        except KeyError as error:
            raise StoreError(f"The tokeniser lacks {error}. Copy it again from its source.") from error
        width = len(mean)
        if books.ndim != 3 or rotation.shape != (width, width) or books.shape[0] * books.shape[2] != width:
            raise StoreError(f"The tokeniser's parts do not fit a width of {width}. Copy it again from its source.")
        return cls(mean.numpy(), rotation.numpy(), books.numpy())
