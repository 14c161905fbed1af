"""Any fitted method, measured: full ranking, every metric for every segment with intervals, and the arithmetic guard.

Nothing here knows how a method works; it asks a `Scorer` for ranks and for its best items.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import store
from ..errors import UserError
from ..report import Table
from .base import Scorer
from .data import Interactions
from .metrics import METRICS, coverage, guard, intervals, paired, per_user, values
from .splits import Samples, Splits, segments, windows

__all__ = ["Evaluation", "Row", "check_table", "compare", "evaluate", "measured", "read_numbers"]

ROUNDING = 1e-4
"""What four decimal places may hide in a sum of numbers."""

_COVERAGE = 10


@dataclass(frozen=True)
class Row:
    """One metric of one segment.

    Attributes:
        segment: Which samples.
        metric: Such as ``recall@10``.
        value: The mean over users.
        low: Lower end of the 95 % interval; None where resampling users says nothing (coverage, or no user).
        high: Upper end.
        n_users: Over how many users.
    """

    segment: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n_users: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured of one method.

    Attributes:
        rows: Every metric of every segment.
        users: The users measured, sorted.
        values: Their metrics, in the order of `METRICS`: what paired comparisons need.
        ranks: The rank of every sample's target.
        samples: What was measured.
        broken: Sentences of the arithmetic guard; none unless something is wrong with the ranks.
    """

    rows: tuple[Row, ...]
    users: NDArray[np.int64]
    values: NDArray[np.float64]
    ranks: NDArray[np.int64]
    samples: Samples
    broken: tuple[str, ...]

    @property
    def numbers(self) -> dict[str, float]:
        """Metrics over all users by name, with ``coverage@10`` and ``tail_recall@10``."""
        found = {row.metric: row.value for row in self.rows if row.segment == "all"}
        tail = [r.value for r in self.rows if (r.segment, r.metric) == ("tail", "recall@10")]
        return found | ({"tail_recall@10": tail[0]} if tail else {})

    def table(self, title: str = "Full ranking") -> Table:
        """Return the rows as a table for people, a line a segment."""
        names = tuple(dict.fromkeys(row.metric for row in self.rows))
        by = {(row.segment, row.metric): row for row in self.rows}
        lines = []
        for segment in dict.fromkeys(row.segment for row in self.rows):
            cells = [_cell(by.get((segment, name))) for name in names]
            lines.append((segment, by[segment, names[0]].n_users, *cells))
        return Table(title, ("segment", "users", *names), tuple(lines), "Mean over users, 95 % interval.")

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows as plain values."""
        return [dict(row.__dict__) for row in self.rows]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.value:.4f}" + ("" if row.low is None else f" ({row.low:.4f} to {row.high:.4f})")


def evaluate(
    scorer: Scorer,
    data: Interactions,
    splits: Splits,
    which: str = "test",
    n_boot: int = 2000,
    seed: int = 0,
    n_history: int = 20,
) -> Evaluation:
    """Rank the full catalogue for each target of a split and measure it.

    Args:
        scorer: A fitted method. Whether it leaves out what a user has already taken is its own affair; never compare
            filtered with unfiltered numbers.
        data: The histories.
        splits: The split it was fitted on.
        which: ``test``, or another part.
        n_boot: Resamples of users for the intervals; 0: no intervals.
        seed: Of the resamples.
        n_history: How many items `Scorer.top` is shown.

    Returns:
        All rows; segments without a sample are left out.

    Raises:
        UserError: The part is empty, or the scorer's ranks are no ranks.
    """
    samples = splits.of(which)
    if not len(samples):
        raise UserError(f"There is no {which} sample to measure.")
    ranks = np.asarray(scorer.ranks(samples), np.int64)
    top = scorer.top(windows(data, samples, n_history)[0], _COVERAGE)
    return measured(data, splits, samples, ranks, top, n_boot=n_boot, seed=seed)


def measured(
    data: Interactions,
    splits: Splits,
    samples: Samples,
    ranks: NDArray[np.int64],
    top: NDArray[np.int32] | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """Measure ranks that are already known, as `evaluate` does.

    Raises:
        UserError: There is not one rank of at least 1 for each sample.
    """
    if ranks.shape != (len(samples),) or (len(ranks) and ranks.min() < 1):
        raise UserError(f"{len(samples)} ranks of at least 1 were expected; got {ranks.shape} from {ranks.min()} on.")
    found = values(ranks)
    rows: list[Row] = []
    for name, mask in segments(data, splits, samples).items():
        if mask.any():
            rows += _rows(name, *per_user(samples.users[mask], found[mask]), n_boot, seed)
    users, of_users = per_user(samples.users, found)
    if top is not None:
        rows.append(Row("all", f"coverage@{_COVERAGE}", coverage(top, data.n_items), None, None, len(users)))
    broken = guard(dict(zip(METRICS, of_users.mean(axis=0).tolist())))
    return Evaluation(tuple(rows), users, of_users, ranks, samples, broken)


def _rows(segment: str, users: NDArray[np.int64], found: NDArray[np.float64], n_boot: int, seed: int) -> list[Row]:
    means = found.mean(axis=0)
    ends = intervals(found, n_boot, seed).tolist() if n_boot else [(None, None)] * len(METRICS)
    return [Row(segment, name, float(m), low, high, len(users)) for name, m, (low, high) in zip(METRICS, means, ends)]


def compare(new: Evaluation, old: Evaluation, n_boot: int = 2000, seed: int = 0) -> Table:
    """Compare two methods user by user.

    Returns:
        Mean difference of every metric, with its 95 % interval by resampling users.

    Raises:
        UserError: They were not measured on the same users.
    """
    if not np.array_equal(new.users, old.users):
        raise UserError("These two were measured on different users. Measure both on one split of the same data.")
    found = paired(new.values, old.values, n_boot, seed)
    rows = tuple((name, *map(float, row)) for name, row in zip(METRICS, found))
    return Table("Paired difference", ("metric", "difference", "low", "high"), rows, "95 % interval over users.")


# ---------------------------------------------------------------- published tables


def check_table(rows: Sequence[Mapping[str, Any]] | str | Path, tolerance: float = ROUNDING) -> tuple[str, ...]:
    """Say which rows of a table cannot be the numbers of one ranking with one target a user.

    Args:
        rows: Mappings with ``model`` and metrics, or a CSV, TSV or JSON file of them. ``R@5``, ``HR@5``, ``Hit@5``
            and ``Recall@5`` are the same; so are ``N@5`` and ``NDCG@5``. With a number above 1, all of the table are percentages.
        tolerance: What rounding may hide.

    Returns:
        A sentence for each broken law, with the row's name; none when all rows are possible.

    Raises:
        UserError: The file cannot be read, or a row has no two numbers that can be compared.

    Example:
        >>> row = {"model": "A", "R@5": 0.05, "N@5": 0.034, "R@10": 0.09, "N@10": 0.063}
        >>> check_table([row])
        ('A: ndcg@10 - ndcg@5 is 0.0290; with recall@10 - recall@5 = 0.0400 it lies between 0.0116 and 0.0142.',)
    """
    records = read_numbers(rows) if isinstance(rows, str | Path) else list(rows)
    named = [_numbers(record, number) for number, record in enumerate(records, 1)]
    unit = 100 if any(value > 1 for _, numbers in named for value in numbers.values()) else 1
    found: list[str] = []
    for name, numbers in named:
        scaled = {metric: value / unit for metric, value in numbers.items()}
        found += [f"{name}: {sentence}" for sentence in guard(scaled, tolerance)]
    return tuple(found)


def read_numbers(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a table of results: CSV or TSV with a header, or a JSON list of objects.

    Raises:
        UserError: It is missing, or has no rows.
    """
    path = Path(path)
    if path.suffix == ".json":
        records = store.read_json(path)
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as a table: {error}.") from error
        sign = "\t" if "\t" in text.partition("\n")[0] else ","
        records = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=sign))
    if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
        raise UserError(f"{path.name} must have a row a model, with names of columns such as model, R@5, N@5.")
    return records


_KINDS = {"r": "recall", "hr": "recall", "hit": "recall", "recall": "recall", "n": "ndcg", "ndcg": "ndcg"}


def _numbers(record: Mapping[str, Any], number: int) -> tuple[str, dict[str, float]]:
    found: dict[str, float] = {}
    name = f"row {number}"
    for column, cell in record.items():
        kind, _, k = str(column).strip().lower().partition("@")
        if k and kind in _KINDS:
            found[f"{_KINDS[kind]}@{k}"] = _number(cell, column, number)
        elif str(column).strip().lower() in ("model", "name", "method"):
            name = str(cell)
    if not {"recall@5", "ndcg@5"} <= found.keys() and not {"recall@5", "recall@10"} <= found.keys():
        raise UserError(
            f"{name}: nothing to check. Needed are R@5 with N@5 or R@10; found {', '.join(found) or 'none'}."
        )
    return name, found


def _number(cell: Any, column: str, number: int) -> float:
    try:
        text = str(cell).strip()
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except (TypeError, ValueError):
        raise UserError(f"Row {number}: {cell!r} in column {column!r} is no number.") from None
