"""Records into one number each: means, scores, and 95 % bootstrap intervals over subjects.

Facts of one subject are not independent, so subjects are drawn and not records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .. import store

__all__ = ["harmonic", "paired", "read_rows", "summarise"]

Row = Mapping[str, float]


def harmonic(values: Sequence[float]) -> float:
    """Return the harmonic mean; 0 if one value is 0.

    Example:
        >>> harmonic([1.0, 0.5]), harmonic([1.0, 0.0])
        (0.6666666666666666, 0.0)
    """
    return len(values) / sum(1 / v for v in values) if all(v > 0 for v in values) else 0.0


def summarise(rows: Sequence[Row], subjects: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Average records into a bench's metrics, with scores, counts and 95 % bootstrap intervals over subjects.

    Args:
        rows: The records' metrics by name; a record may lack some.
        subjects: What each record is about.
        seed: Of the draws.

    Returns:
        ``NAME``, ``NAME_low`` and ``NAME_high`` for each metric, ``NAME_n`` where some records lack it, and ``score``
        (harmonic mean of efficacy, paraphrase, s_specificity, r_specificity) or ``score_classic`` without the last.
    """
    names = list(dict.fromkeys(n for r in rows for n in r))
    out: dict[str, float] = {}
    groups = _numbered(subjects)
    draws = _draws(groups, 1000, seed)
    for name in names:
        has = np.array([name in r for r in rows])
        values = np.array([r.get(name, 0.0) for r in rows])
        out[name] = float(values[has].mean())
        totals = np.bincount(groups, np.where(has, values, 0.0))
        counts = np.bincount(groups, has)[draws].sum(1)
        means = (totals[draws].sum(1) / np.maximum(counts, 1))[counts > 0]  # a draw without the metric says nothing
        out[f"{name}_low"], out[f"{name}_high"] = _interval(means)
        if not has.all():
            out[f"{name}_n"] = float(has.sum())
    classic = ["efficacy", "paraphrase", "s_specificity"]
    if all(n in out for n in classic):
        out["score_classic"] = harmonic([out[n] for n in classic])
        if "r_specificity" in out:
            out["score"] = harmonic([out[n] for n in (*classic, "r_specificity")])
    return out


def paired(
    rows_a: Sequence[Row], rows_b: Sequence[Row], subjects: Sequence[str], metric: str, seed: int = 0
) -> dict[str, float]:
    """Compare two methods on the same records: how much more of a metric the first one has.

    Both means are taken over the same draw of subjects, 2,000 times, so what makes a record hard for both cancels.

    Args:
        rows_a: The first method's records.
        rows_b: The second method's, in the same order.
        subjects: What each record is about.
        metric: The metric's name; records that lack it on either side are left out.
        seed: Of the draws.

    Returns:
        ``difference`` of the means with ``low`` and ``high``; ``relative``, the ratio of the means less 1, with
        ``relative_low`` and ``relative_high``: infinite where the second mean is 0 and the first is not, 0 where both
        are.

    Example:
        >>> paired([{"x": 1.0}, {"x": 0.5}], [{"x": 0.5}, {"x": 0.25}], ["a", "b"], "x")["relative"]
        1.0
    """
    both = [i for i, (a, b) in enumerate(zip(rows_a, rows_b, strict=True)) if metric in a and metric in b]
    if not both:
        raise KeyError(metric)
    groups = _numbered([subjects[i] for i in both])
    draws = _draws(groups, 2000, seed)
    a, b = (np.bincount(groups, [rows[i][metric] for i in both]) for rows in (rows_a, rows_b))
    counts = np.bincount(groups)
    n = counts[draws].sum(1)
    mean_a, mean_b = a[draws].sum(1) / n, b[draws].sum(1) / n
    low, high = _interval(mean_a - mean_b)
    relative_low, relative_high = _interval(_ratio(mean_a, mean_b))
    return {
        "difference": float((a.sum() - b.sum()) / counts.sum()),
        "low": low,
        "high": high,
        "relative": float(_ratio(a.sum(keepdims=True), b.sum(keepdims=True))[0]),
        "relative_low": relative_low,
        "relative_high": relative_high,
    }


def read_rows(path: str | Path) -> dict[str, list[dict[str, float]]]:
    """Read the records that a bench has kept beside its result (``OUT.rows.json``), by method, in order."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for record in store.read_json(path):
        found.setdefault(record["method"], {})[record["number"]] = record["row"]
    return {method: [rows[i] for i in sorted(rows)] for method, rows in found.items()}


def _numbered(subjects: Sequence[str]) -> np.ndarray:
    numbers: np.ndarray = np.unique(np.asarray(list(subjects), dtype=object).astype(str), return_inverse=True)[1]
    return numbers


def _draws(groups: np.ndarray, n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, groups.max() + 1, (n, groups.max() + 1))


def _interval(values: np.ndarray) -> tuple[float, float]:
    # the nearest draw below and above: no interpolation, which an infinite ratio would turn into no number
    low = np.quantile(values, 0.025, method="lower") if np.isinf(values).any() else np.quantile(values, 0.025)
    high = np.quantile(values, 0.975, method="higher") if np.isinf(values).any() else np.quantile(values, 0.975)
    return float(low), float(high)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    safe = np.where(b == 0, 1.0, b)
    return np.where(b == 0, np.where(a == 0, 0.0, np.inf), a / safe - 1)
