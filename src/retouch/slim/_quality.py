"""How good predictions are: accuracy, F1, Matthews' correlation, Spearman's rank correlation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._rules import Floats, Ints
from ..errors import UserError, unknown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["METRICS", "Metric", "qualities", "quality"]

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
    for what, values in (("predictions", predicted), ("labels", true)):
        if n_bad := int((~np.isfinite(values)).sum()):
            raise UserError(f"{n_bad} of {len(values)} {what} are not finite.")
    return float(qualities(metric, np.ones((1, len(true))), predicted[:, None], true, classes or 2)[0, 0])


def qualities(metric: str, weights: Floats, answers: NDArray[Any], labels: NDArray[Any], classes: int) -> Floats:
    """Do as `quality` for rows that count several times, at many thresholds.

    Shapes: `weights` (draws, n), `answers` (n, thresholds), `labels` (n); returns (draws, thresholds).

    Args:
        metric: One of `METRICS`.
        weights: How often each example counts.
        answers: Classes, or numbers for ``spearman``.
        labels: Likewise.
        classes: How many classes there are.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if metric == "accuracy":
        return np.asarray(weights @ (answers == labels[:, None]) / weights.sum(1)[:, None])
    if metric == "spearman":
        return _spearman(weights, answers.astype(np.float64), labels.astype(np.float64))
    counts = _confusion(weights, answers.astype(int), labels.astype(int), classes)
    return _f1(counts) if metric == "f1" else _mcc(counts)


def _confusion(weights: Floats, answers: Ints, labels: Ints, classes: int) -> Floats:
    """Count by true class and answer, (draws, thresholds, classes, classes)."""
    size = max(classes, 2, int(answers.max()) + 1, int(labels.max()) + 1)
    counts = np.empty((len(weights), answers.shape[1], size, size))
    for true in range(size):
        here = labels == true
        for said in range(size):
            counts[:, :, true, said] = weights[:, here] @ (answers[here] == said)
    return counts


def _f1(counts: Floats) -> Floats:
    twice, total = 2 * np.einsum("...cc->...c", counts), counts.sum(-1) + counts.sum(-2)
    scores = np.divide(twice, total, out=np.zeros_like(twice), where=total > 0)
    return np.asarray(scores[..., 1] if scores.shape[-1] == 2 else scores.mean(-1))


def _mcc(counts: Floats) -> Floats:
    n, right = counts.sum((-1, -2)), np.einsum("...cc->...", counts)
    predicted, true = counts.sum(-2), counts.sum(-1)
    spread = (n**2 - (predicted**2).sum(-1)) * (n**2 - (true**2).sum(-1))
    lead = right * n - (predicted * true).sum(-1)
    return np.asarray(np.divide(lead, np.sqrt(np.maximum(spread, 0)), out=np.zeros_like(lead), where=spread > 0))


def _spearman(weights: Floats, answers: Floats, labels: Floats) -> Floats:
    true, total = _ranks(weights, labels), weights.sum(1)
    true = true - ((weights * true).sum(1) / total)[:, None]
    found = np.zeros((len(weights), answers.shape[1]))
    for i in range(answers.shape[1]):
        said = _ranks(weights, answers[:, i])
        said = said - ((weights * said).sum(1) / total)[:, None]
        spread = np.sqrt((weights * said**2).sum(1) * (weights * true**2).sum(1))
        both = (weights * said * true).sum(1)
        found[:, i] = np.clip(np.divide(both, spread, out=np.zeros_like(both), where=spread > 0), -1, 1)
    return found


def _ranks(weights: Floats, values: Floats) -> Floats:
    """Rank values that count several times; equal ones share their mean rank, (draws, n)."""
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    ends = np.flatnonzero(np.diff(place[order], append=place.max() + 1))
    upto = weights[:, order].cumsum(1)[:, ends]
    below = np.concatenate([np.zeros((len(weights), 1)), upto[:, :-1]], axis=1)
    return np.asarray(((below + upto + 1) / 2)[:, place])
