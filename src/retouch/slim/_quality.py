"""How good predictions are: accuracy, F1, Matthews' correlation, Spearman's rank correlation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import UserError, unknown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["METRICS", "Metric", "quality"]

Metric = Literal["accuracy", "f1", "mcc", "spearman"]
METRICS: tuple[Metric, ...] = ("accuracy", "f1", "mcc", "spearman")


def quality(metric: str, predictions: ArrayLike, labels: ArrayLike, classes: int | None = None) -> float:
    """Compare predictions with labels.

    ``accuracy`` is the share of equal ones. ``f1`` is that of class 1 where there are two classes, as GLUE has it, and
    the mean over the classes where there are more; a class that is never predicted and never right counts 0. ``mcc``
    is Matthews' correlation, also for several classes. ``spearman`` is the correlation of ranks, ties sharing the mean
    rank. A correlation with something constant is 0.

    Args:
        metric: One of `METRICS`.
        predictions: Classes, or numbers for ``spearman``; of shape [n, classes], logits (or [n, 1], numbers).
        labels: As many classes, or numbers.
        classes: How many classes there are; the largest one seen if not given.

    Raises:
        UserError: There is nothing to compare, the lengths differ, or a number is not finite.

    Example:
        >>> quality("accuracy", [0, 1, 1, 1], [0, 1, 0, 1])
        0.75
        >>> quality("spearman", [0.1, 0.7, 0.2], [1.0, 5.0, 3.0])
        1.0
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    predicted, true = np.asarray(predictions), np.asarray(labels)
    if predicted.ndim == 2:
        predicted = predicted[:, 0] if metric == "spearman" else predicted.argmax(1)
    if predicted.shape != true.shape or true.ndim != 1 or not len(true):
        raise UserError(
            f"{metric} compares as many predictions as labels, at least one; got shapes {predicted.shape} and "
            f"{true.shape}."
        )
    if metric == "spearman":
        return _spearman(predicted.astype(float), true.astype(float))
    if metric == "accuracy":
        return float((predicted == true).mean())
    counts = _confusion(predicted.astype(int), true.astype(int), classes)
    return _f1(counts) if metric == "f1" else _mcc(counts)


def _confusion(predicted: NDArray[np.int64], true: NDArray[np.int64], classes: int | None) -> NDArray[np.float64]:
    """Count by true class (rows) and predicted class (columns)."""
    size = max(classes or 2, int(predicted.max()) + 1, int(true.max()) + 1)
    counts = np.zeros((size, size))
    np.add.at(counts, (true, predicted), 1)
    return counts


def _f1(counts: NDArray[np.float64]) -> float:
    twice, total = 2 * np.diag(counts), counts.sum(0) + counts.sum(1)
    scores = np.divide(twice, total, out=np.zeros(len(counts)), where=total > 0)
    return float(scores[1] if len(counts) == 2 else scores.mean())


def _mcc(counts: NDArray[np.float64]) -> float:
    n, right = counts.sum(), np.trace(counts)
    predicted, true = counts.sum(0), counts.sum(1)
    spread = (n**2 - predicted @ predicted) * (n**2 - true @ true)
    return float((right * n - predicted @ true) / np.sqrt(spread)) if spread > 0 else 0.0


def _spearman(predicted: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    for what, values in (("predictions", predicted), ("labels", true)):
        if n_bad := int((~np.isfinite(values)).sum()):
            raise UserError(f"{n_bad} of {len(values)} {what} are not finite.")
    one, other = (ranks - ranks.mean() for ranks in (_ranks(predicted), _ranks(true)))
    spread = np.sqrt((one @ one) * (other @ other))
    return float(np.clip(one @ other / spread, -1, 1)) if spread > 0 else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks
