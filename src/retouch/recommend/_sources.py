"""What a path holds and what its columns mean: which file is which format, who took what and when, and the items.

All formats end in the same two things: rows of (user, item, time, rating) and a description of each item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, absent, unknown
from ._formats import Columns, read_atomic, read_csv, read_parquet, read_plain, read_sequences, text_of
from ._items import ids_of, item_table, title_map, usual
from .base import Item

__all__ = ["FORMATS", "Asked", "Rows", "read"]

FORMATS = ("atomic", "sequence", "csv", "parquet", "movielens")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Asked:
    """Which columns hold what, and where the titles are."""

    user: str
    item: str
    time: str
    text: tuple[str, ...]
    titles: Path | None
    rating: str | None


@dataclass(frozen=True, eq=False)
class Rows:
    """The interactions of a file, as they stand there.

    Attributes:
        source: The columns they were read from.
        users: Raw ids.
        items: Raw ids.
        times: When, in `unit` seconds of the file's clock; None where the file has no clock.
        ratings: Given when a rating was asked for.
        described: What is known of items, by raw id.
        format: Which of `FORMATS` it is.
    """

    source: Columns
    users: list[str]
    items: list[str]
    times: NDArray[np.int64] | None
    ratings: NDArray[np.float64] | None
    described: Mapping[str, Item]
    format: str


def read(path: Path, format: str, asked: Asked) -> Rows:
    """Read a file or a folder of interactions, of a named format or of that which it shows.

    Raises:
        UserError: There is nothing that can be read, a column is missing, or a cell has no meaning; with file and line.
    """
    if format and format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if not path.exists():
        raise absent(path)
    file, format = _file_of(path, format)
    if format == "movielens":
        return _movielens(file, asked)
    if format == "sequence":
        columns = read_sequences(file)
        users, items = list(columns.cells["user"]), list(columns.cells["item"])
        known = title_map(_titles_of(file, asked), asked.item, asked.text, set(items))
        _refuse_rating(columns, asked)
        return Rows(columns, users, items, None, None, known, format)
    return _named(file, format, asked)


# ---------------------------------------------------------------- which file


def _file_of(path: Path, format: str) -> tuple[Path, str]:
    if path.is_dir():
        path, found = _inside(path, format)
        return path, format or found
    return path, format or _shown(path)


_ENDINGS = {".inter": "atomic", ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "csv"}


def _shown(path: Path) -> str:
    """Tell a file's format by its ending, and a text's by its first line."""
    ending = path.suffix.lower()
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    if path.name == "u.data":
        return "movielens"
    first = text_of(path).lstrip("\n").partition("\n")[0]
    if "\t" in first and all(":" in cell for cell in first.split("\t")):
        return "atomic"
    return "csv" if any(sign in first for sign in ",;\t") else "sequence"


_FITS: Mapping[str, Callable[[Path], bool]] = {
    "atomic": lambda path: path.suffix.lower() == ".inter",
    "movielens": lambda path: path.name == "u.data",
    "sequence": lambda path: path.suffix.lower() == ".txt" and "readme" not in path.name.lower(),
    "parquet": lambda path: path.suffix.lower() in (".parquet", ".pq") and ".items" not in path.name,
    "csv": lambda path: path.suffix.lower() == ".csv" and ".items" not in path.name,
}


def _inside(folder: Path, format: str) -> tuple[Path, str]:
    """Choose the file of interactions in a folder."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    for kind, fits in _FITS.items():
        found = [p for p in files if fits(p)] if format in ("", kind) else []
        if len(found) > 1:
            names = ", ".join(p.name for p in found[:5])
            raise UserError(f"{folder} holds {len(found)} files that may be the interactions ({names}). Name one.")
        if found:
            return found[0], kind
    raise UserError(
        f"{folder} holds no interactions{f' of the format {format}' if format else ''}. Known are atomic files "
        "(.inter), sequence files (.txt), .csv, .parquet, and MovieLens' u.data."
    )


def _titles_of(file: Path, asked: Asked) -> Path | None:
    """Find the file of titles: the one asked for, or the one of the same name beside the interactions."""
    beside = [file.with_name(f"{file.stem}.items{end}") for end in (".tsv", ".csv", ".json", ".parquet")]
    return asked.titles or next((p for p in beside if p.is_file()), None)


# ---------------------------------------------------------------- named columns


def _named(file: Path, format: str, asked: Asked) -> Rows:
    readers = {"atomic": read_atomic, "csv": read_csv, "parquet": read_parquet}
    columns = readers[format](file)
    users = ids_of(columns, asked.user, "user")
    items = ids_of(columns, asked.item, "item")
    no_clock = not asked.time or (format == "atomic" and asked.time not in columns.cells)
    times = None if no_clock else _times(columns, asked.time)
    ratings = None if asked.rating is None else _ratings(columns, asked.rating)
    known = _of_named(file, format, asked, columns, items)
    return Rows(columns, users, items, times, ratings, known, format)


def _of_named(file: Path, format: str, asked: Asked, columns: Columns, items: list[str]) -> dict[str, Item]:
    beside = _titles_of(file, asked)
    if format == "atomic" and asked.titles is None and file.with_suffix(".item").is_file():
        table = read_atomic(file.with_suffix(".item"))
        tokens = tuple(n for n, kind in table.kinds.items() if kind.startswith("token") or n.endswith("year"))
        return item_table(table, asked.item, asked.text or tuple(n for n in tokens if n != asked.item))
    if beside is not None:
        return title_map(beside, asked.item, asked.text, set(items))
    for name in asked.text:
        columns.column(name, "text")
    names = asked.text or usual(columns.cells)
    first = list({item: row for row, item in reversed([*enumerate(items)])}.values()) if names else []
    return item_table(columns.rows(first), asked.item, names) if names else {}


def _ratings(columns: Columns, name: str) -> NDArray[np.float64]:
    cells = columns.column(name, "rating")
    try:
        found = np.array(cells, dtype=object).astype(np.float64)
    except (TypeError, ValueError):
        found = np.array([_number(cell) for cell in cells])
    if (wrong := np.flatnonzero(np.isnan(found))).size:
        row = int(wrong[0])
        raise UserError(f"{columns.place(row)}: the rating {cells[row]!r} is no number, and min_rating asks for one.")
    return found


def _number(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return np.nan


def _refuse_rating(columns: Columns, asked: Asked) -> None:
    if asked.rating is not None:
        raise UserError(f"{columns.name} is a sequence file and has no ratings, so min_rating cannot be used.")


# ---------------------------------------------------------------- time


def _times(columns: Columns, name: str) -> NDArray[np.int64]:
    """Read times as whole numbers: as they are, or in microseconds where they have fractions or are dates."""
    cells = columns.column(name, "time")
    if set(map(type, cells)) == {Decimal}:
        cells = [int(cell) if cell == cell.to_integral_value() else float(cell) for cell in cells]
    whole = _as(cells, np.int64)
    if whole is not None:
        return whole.astype(np.int64)
    found = _as(cells, np.float64)
    if found is None:
        return _dates(columns, name, cells)
    bad = ~np.isfinite(found) | (np.abs(found) >= 2.0**53)
    if bad.any():
        raise _no_time(columns, name, cells, int(np.flatnonzero(bad)[0]))
    fractions = bool((found != np.rint(found)).any())
    return np.rint(found * 1e6 if fractions and np.abs(found).max() < 2.0**43 else found).astype(np.int64)


def _as(cells: Sequence[Any], kind: type) -> NDArray[Any] | None:
    kinds = set(map(type, cells))
    if not (kinds == {str} or kinds <= {int, float}) or (kind is np.int64 and float in kinds):
        return None
    try:
        return np.array(cells).astype(kind)
    except (ValueError, OverflowError):
        return None


def _dates(columns: Columns, name: str, cells: Sequence[Any]) -> NDArray[np.int64]:
    found = np.empty(len(cells), np.int64)
    for row, cell in enumerate(cells):
        try:
            date = cell if isinstance(cell, datetime) else datetime.fromisoformat(str(cell).strip())
        except ValueError:
            raise _no_time(columns, name, cells, row) from None
        gap = (date if date.tzinfo else date.replace(tzinfo=UTC)) - _EPOCH
        found[row] = (gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds
    return found


def _no_time(columns: Columns, name: str, cells: Sequence[Any], row: int) -> UserError:
    first = next((r for r, cell in enumerate(cells) if not _is_time(cell)), row)
    return UserError(
        f"{columns.place(first)}: {cells[first]!r} in column {name!r} is no time. Write a finite number or a date such "
        "as 2014-07-23T18:05:00. With an empty setting time the file's order is taken."
    )


def _is_time(cell: Any) -> bool:
    try:
        datetime.fromisoformat(str(cell).strip())
    except ValueError:
        return bool(np.isfinite(_number(cell)) and abs(_number(cell)) < 2.0**53)
    return True


# ---------------------------------------------------------------- MovieLens' own files


def _movielens(file: Path, asked: Asked) -> Rows:
    columns = read_plain(file, ("user_id", "item_id", "rating", "timestamp"))
    users, items = ids_of(columns, "user_id", "user"), ids_of(columns, "item_id", "item")
    ratings = None if asked.rating is None else _ratings(columns, "rating")
    beside = file.with_name("u.item")
    found = asked.titles or (beside if beside.is_file() else None)
    known = title_map(found, asked.item, asked.text, set(items))
    return Rows(columns, users, items, _times(columns, "timestamp"), ratings, known, "movielens")
