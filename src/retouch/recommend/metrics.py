"""Numbers of a ranking, with their intervals, and the arithmetic that numbers of one ranking must obey.

A rank is 1 + the number of other items that score at least as much as the target; full catalogue, never a sample of it.
Users are the independent unit: a user's targets are averaged first, and resampling draws users.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

__all__ = ["METRICS", "bootstrap", "coverage", "guard", "intervals", "mrr", "ndcg", "paired",
           "per_user", "recall", "values"]  # fmt: skip

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


# ---------------------------------------------------------------- one target


def recall(ranks: Ints, k: int) -> Floats:
    """Return 1 where the target is among the first `k`, else 0. With one target this is the hit rate too.

    Shapes: [samples]

    Example:
        >>> recall(np.array([1, 5, 6]), 5).tolist()
        [1.0, 1.0, 0.0]
    """
    return (np.asarray(ranks) <= k).astype(np.float64)


def ndcg(ranks: Ints, k: int) -> Floats:
    """Return 1 / log2(rank + 1) where the target is among the first `k`, else 0.

    Shapes: [samples]

    Example:
        >>> ndcg(np.array([1, 3, 6]), 5).tolist()
        [1.0, 0.5, 0.0]
    """
    ranks = np.asarray(ranks)
    return np.where(ranks <= k, 1 / np.log2(ranks + 1.0), 0.0)


def mrr(ranks: Ints, k: int = 10) -> Floats:
    """Return 1 / rank where the target is among the first `k`, else 0.

    Shapes: [samples]
    """
    ranks = np.asarray(ranks)
    return np.where(ranks <= k, 1 / np.maximum(ranks, 1), 0.0)


METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr@10")
"""What every table holds."""


def values(ranks: Ints, names: Sequence[str] = METRICS) -> Floats:
    """Return every metric of every sample, one column a name.

    Shapes: [samples] -> [samples, metrics]

    Raises:
        UserError: A name is not ``recall@K``, ``ndcg@K`` or ``mrr@K``.
    """
    known = {"recall": recall, "hit": recall, "ndcg": ndcg, "mrr": mrr}
    columns = []
    for name in names:
        kind, _, k = name.partition("@")
        if kind not in known or not k.isdigit():
            raise UserError(f"{name!r} is no metric of a ranking. Write recall@K, ndcg@K or mrr@K.")
        columns.append(known[kind](ranks, int(k)))
    return np.stack(columns, axis=1)


def per_user(users: NDArray[np.integer], found: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Average the rows of each user.

    Shapes: [samples], [samples, metrics] -> [users], [users, metrics]

    Example:
        >>> per_user(np.array([7, 7, 2]), np.array([[1.0], [0.0], [1.0]]))[1].ravel().tolist()
        [1.0, 0.5]
    """
    names, row = np.unique(users, return_inverse=True)
    sums = np.zeros((len(names), found.shape[1]))
    np.add.at(sums, row, found)
    return names.astype(np.int64), sums / np.bincount(row, minlength=len(names))[:, None]


def coverage(top: NDArray[np.int32], n_items: int) -> float:
    """Return which share of the catalogue is recommended to anybody; 0 stands for no item.

    Shapes: [samples, k]
    """
    return float(len(np.setdiff1d(top, [0]))) / n_items


# ---------------------------------------------------------------- how sure


def bootstrap(found: Floats, n_boot: int = 2000, seed: int = 0) -> Floats:
    """Return the means of resamples of the rows, all columns in the same draw.

    Shapes: [users, metrics] -> [n_boot, metrics]

    Raises:
        UserError: There is no row.
    """
    n = len(found)
    if n == 0:
        raise UserError("There is no user to resample.")
    chance = np.random.default_rng(seed)
    means = np.empty((n_boot, found.shape[1]))
    for draw in range(n_boot):
        times = np.bincount(chance.integers(n, size=n), minlength=n)
        means[draw] = times @ found / n
    return means


def intervals(found: Floats, n_boot: int = 2000, seed: int = 0, confidence: float = 0.95) -> Floats:
    """Return the lower and upper end of each column's mean, by resampling rows.

    Shapes: [users, metrics] -> [metrics, 2]
    """
    tail = (1 - confidence) / 2
    return np.quantile(bootstrap(found, n_boot, seed), (tail, 1 - tail), axis=0).T


def paired(new: Floats, old: Floats, n_boot: int = 2000, seed: int = 0, confidence: float = 0.95) -> Floats:
    """Return mean difference, lower and upper end for each column; both measured on the same users in the same order.

    Shapes: [users, metrics] twice -> [metrics, 3]

    Raises:
        UserError: The rows differ in number.
    """
    if new.shape != old.shape:
        raise UserError(f"A paired comparison needs the same users: got {len(new)} and {len(old)}.")
    difference = new - old
    return np.column_stack([difference.mean(axis=0), intervals(difference, n_boot, seed, confidence)])


# ---------------------------------------------------------------- arithmetic


def guard(numbers: Mapping[str, float], tolerance: float = 1e-9) -> tuple[str, ...]:
    """Say which laws the numbers of one ranking break when every user has one target.

    A hit in the first five adds between 1/log2(6) and 1 to NDCG@5, a hit at places 6 to 10 between 1/log2(11) and
    1/log2(7) to NDCG@10. Numbers outside of that were not measured on one ranking.

    Args:
        numbers: ``recall@5``, ``ndcg@5``, ``recall@10``, ``ndcg@10``; laws whose numbers are missing are skipped.
        tolerance: What rounding may hide: 1e-4 for numbers published with four places.

    Returns:
        A sentence for each broken law; none when all hold.

    Example:
        >>> guard({"recall@5": 0.1, "recall@10": 0.2, "ndcg@5": 0.06, "ndcg@10": 0.2}, 1e-4)
        ('ndcg@10 - ndcg@5 is 0.1400; with recall@10 - recall@5 = 0.1000 it lies between 0.0289 and 0.0356.',)
    """
    r5, n5, r10, n10 = (float(numbers.get(name, math.nan)) for name in ("recall@5", "ndcg@5", "recall@10", "ndcg@10"))
    laws = (
        ("ndcg@5", n5, f"recall@5 = {r5:.4f}", r5 / math.log2(6), r5),
        ("ndcg@10 - ndcg@5", n10 - n5, f"recall@10 - recall@5 = {r10 - r5:.4f}",
         (r10 - r5) / math.log2(11), (r10 - r5) / math.log2(7)),
        ("recall@10 - recall@5", r10 - r5, "more places", 0.0, 1.0),
    )  # fmt: skip
    return tuple(
        f"{what} is {value:.4f}; with {given} it lies between {low:.4f} and {high:.4f}."
        for what, value, given, low, high in laws
        if value < low - tolerance or value > high + tolerance
    )
