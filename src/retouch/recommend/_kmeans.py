"""k-means in numpy, the same for the same seed: k-means++ starts, empty clusters refilled, the best restart wins."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..progress import track

__all__ = ["Rows", "checked", "codes_for", "kmeans", "lloyd", "nearest"]

Rows = NDArray[np.floating[Any]]
MOVEMENT = 1e-5
"""Centres that move less than this share of the rows' root mean square have arrived."""


def checked(vectors: Rows, n_codes: int, width: int | None = None) -> Rows:
    """Refuse vectors that cannot be clustered.

    Raises:
        UserError: They are no matrix, not finite, of another width, or fewer than codes.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or (width is not None and vectors.shape[1] != width):
        raise UserError(f"Vectors must be [items, {width or 'width'}]; got an array of shape {vectors.shape}.")
    if not np.isfinite(vectors).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
        raise UserError(f"Vector {bad} holds a value that is not finite. Look how the vectors were made.")
    if len(vectors) < n_codes:
        raise UserError(
            f"{len(vectors)} items cannot fill {n_codes} codes a level. Set codes to at most {len(vectors)}."
        )
    return vectors


def codes_for(n_items: int, wanted: int | None) -> int:
    """Return how many codes a level has: 256, 64 below 3,000 items, and for toys a power of two near n/4.

    Example:
        >>> codes_for(12_000, None), codes_for(1_300, None), codes_for(100, None), codes_for(100, 7)
        (256, 64, 16, 7)
    """
    if wanted is not None:
        return wanted
    usual = 256 if n_items >= 3000 else 64
    return usual if n_items >= 4 * usual else max(2, 1 << max(0, (n_items // 4).bit_length() - 1))


def nearest(x: Rows, centres: Rows) -> tuple[NDArray[np.int64], Rows]:
    """Find the nearest centre of each row, the first among equals, and the squared distance.

    Shapes: x [rows, width], centres [k, width] -> [rows] twice
    """
    scores = x @ centres.T
    scores *= -2
    scores += (centres * centres).sum(1)
    labels = scores.argmin(1)
    distance = scores[np.arange(len(x)), labels] + (x * x).sum(1)
    return labels, np.maximum(distance, 0)


def kmeans(x: Rows, k: int, seed: int, restarts: int = 3, iterations: int = 50, what: str = "k-means") -> Rows:
    """Return the k centres of the restart with the least squared error, in float32.

    Shapes: x [rows, width] -> [k, width]
    """
    x = np.ascontiguousarray(x, np.float32)
    tries = []
    for restart in track(range(restarts), what):
        start = _plus_plus(x, k, np.random.default_rng((seed, restart)))
        tries.append(lloyd(x, start, iterations))
    return min(tries, key=lambda found: found[1])[0]


def lloyd(x: Rows, centres: Rows, iterations: int) -> tuple[Rows, float]:
    """Move the centres into the middle of their rows until they stand still; return them and the squared error."""
    still = MOVEMENT * float(np.sqrt((x * x).sum(1).mean()))
    for _ in range(iterations):
        labels, distance = nearest(x, centres)
        moved = _middles(x, labels, distance, centres)
        step = float(np.sqrt(((moved - centres) ** 2).sum(1).max()))
        centres = moved
        if step <= still:
            break
    return centres, float(nearest(x, centres)[1].sum(dtype=np.float64))


def _middles(x: Rows, labels: NDArray[np.int64], distance: Rows, centres: Rows) -> Rows:
    """Average the rows of each centre; a centre without rows moves onto the row that is served worst."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=len(centres))
    held = np.flatnonzero(counts)
    begins = np.append(0, np.cumsum(counts[held])[:-1])
    found = centres.copy()
    found[held] = np.add.reduceat(x[order], begins, axis=0) / counts[held, None]
    empty = np.flatnonzero(counts == 0)
    found[empty] = x[np.argsort(-distance, kind="stable")[: len(empty)]]
    return found


def _plus_plus(x: Rows, k: int, random: np.random.Generator) -> Rows:
    """Draw each centre among the rows in proportion to the squared distance from those drawn before."""
    norms = (x * x).sum(1)
    chosen = [int(random.integers(len(x)))]
    distance = np.full(len(x), np.inf, np.float32)
    while len(chosen) < k:
        last = x[chosen[-1]]
        distance = np.minimum(distance, np.maximum(norms - 2 * (x @ last) + last @ last, 0))
        distance[chosen[-1]] = 0
        total = np.cumsum(distance, dtype=np.float64)
        if total[-1] <= 0:  # fewer different rows than centres: the rest are copies
            chosen.append(int(random.integers(len(x))))
            continue
        at = int(np.searchsorted(total, random.random() * total[-1], side="right"))
        chosen.append(min(at, len(x) - 1))
    return x[chosen].copy()
