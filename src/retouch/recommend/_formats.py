"""From files of interactions to columns, and the place of each row: atomic files, sequences, CSV, Parquet, MovieLens.

What the columns mean is decided in `_sources`. Columns are lists of cells, read without a loop over rows in Python.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._parquet import parquet_columns
from ..errors import UserError, absent, unknown

__all__ = ["Columns", "read_atomic", "read_csv", "read_parquet", "read_plain", "read_sequences", "text_of"]


@dataclass(frozen=True, eq=False)
class Columns:
    """A file as named columns of equal length.

    Attributes:
        name: The file's name, for messages.
        cells: The columns, in the file's order.
        place: Says where a row stands, from its number: ``ratings.csv line 12``.
        kinds: What an atomic file's header calls each column: token, token_seq, float, float_seq.
    """

    name: str
    cells: Mapping[str, Sequence[Any]]
    place: Callable[[int], str]
    kinds: Mapping[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many rows there are."""
        return len(next(iter(self.cells.values()), ()))

    def column(self, name: str, setting: str) -> Sequence[Any]:
        """Return one column.

        Raises:
            UnknownName: The file has none of that name.
        """
        if name not in self.cells:
            raise unknown(f"column of {self.name}", name, self.cells, f"the setting {setting}")
        return self.cells[name]

    def rows(self, index: Sequence[int]) -> Columns:
        """Keep some rows."""
        cells = {name: [column[row] for row in index] for name, column in self.cells.items()}
        return Columns(self.name, cells, lambda row: self.place(index[row]), self.kinds)


# ---------------------------------------------------------------- text


def text_of(path: Path, encoding: str = "utf-8-sig") -> str:
    """Read a text file whose lines end in a line feed.

    Raises:
        UserError: It is missing, empty, or not such text; with the line.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise absent(path) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if b"\0" in data:
        raise UserError(f"{path.name} is no text: byte {data.index(0)} is zero. Is it UTF-16, or Parquet?")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path.name} line {line} is not UTF-8 text: {error.reason}. Save the file as UTF-8."
        ) from error
    if not text.strip():
        raise UserError(f"{path.name} is empty.")
    return text.replace("\r\n", "\n")


def _lines(text: str) -> tuple[list[str], Callable[[int], int]]:
    """Split into lines that are not blank, and say which line of the file each is."""
    lines = text.rstrip("\n").split("\n")
    if all(map(str.strip, lines)):
        return lines, lambda row: row + 1
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    return [lines[number - 1] for number in numbers], lambda row: numbers[row]


def _split(name: str, lines: Sequence[str], line: Callable[[int], int], sign: str, n: int) -> list[list[str]]:
    """Cut lines of `n` cells into `n` columns; the check and the cut both run over all lines at once."""
    found = np.fromiter(map(str.count, lines, itertools.repeat(sign)), np.int64, len(lines))
    if (wrong := np.flatnonzero(found != n - 1)).size:
        row = int(wrong[0])
        sign = {"\t": "tab", "|": "'|'"}.get(sign, sign)
        raise UserError(
            f"{name} line {line(row)} has {found[row] + 1} cells; {n} were expected, with a {sign} between."
        )
    cells = sign.join(lines).split(sign) if lines else []
    return [cells[column::n] for column in range(n)]


# ---------------------------------------------------------------- formats


def read_plain(path: Path, names: Sequence[str], sign: str = "\t", encoding: str = "utf-8-sig") -> Columns:
    """Read a file with neither header nor quoting, such as MovieLens' own; more cells than names are let go.

    Raises:
        UserError: The file is missing or empty, or a line has another number of cells than the first.
    """
    lines, line = _lines(text_of(path, encoding))
    n = lines[0].count(sign) + 1
    if n < len(names):
        raise UserError(f"{path.name} line {line(0)} has {n} cells; expected are {len(names)}: {', '.join(names)}.")
    columns = _split(path.name, lines, line, sign, n)
    return Columns(path.name, dict(zip(names, columns)), lambda row: f"{path.name} line {line(row)}")


def read_atomic(path: Path) -> Columns:
    """Read an atomic file: tab-separated, and each cell of its header a ``name:type``.

    Raises:
        UserError: The file is missing or empty, its header is no such header, or a line has another number of cells.
    """
    lines, line = _lines(text_of(path))
    heads = [cell.strip().rpartition(":") for cell in lines[0].split("\t")]
    kinds = {"token", "token_seq", "float", "float_seq"}
    if wrong := [name + colon + kind for name, colon, kind in heads if not name or kind not in kinds]:
        raise UserError(
            f"{path.name} line {line(0)}: {wrong[0]!r} is no cell of an atomic file's header. Write name:type, where "
            "type is token, token_seq, float or float_seq."
        )
    names = [name for name, _, _ in heads]
    _once(path.name, names)
    if len(lines) == 1:
        raise UserError(f"{path.name} is empty: it has a header and no row.")
    columns = _split(path.name, lines[1:], lambda row: line(row + 1), "\t", len(heads))
    return Columns(
        path.name,
        dict(zip(names, columns)),
        lambda row: f"{path.name} line {line(row + 1)}",
        {name: kind for name, _, kind in heads},
    )


def read_csv(path: Path, header: bool = True) -> Columns:
    """Read a file with named columns; tabs, commas or semicolons stand between, as the first line shows.

    Tab-separated files have no quoting: a quotation mark is text. Without `header` the columns are named 0, 1, ...

    Raises:
        UserError: The file is missing, empty or no valid CSV, a name stands twice, or a row has another number of cells.
    """
    text = text_of(path)
    first = text.lstrip("\n").partition("\n")[0]
    sign = "\t" if "\t" in first else max(",;", key=first.count)
    if sign == "\t":
        lines, line = _lines(text)
        cells = _split(path.name, lines, line, sign, first.count(sign) + 1)
    else:
        rows, line = _quoted(path.name, text, sign)
        cells = [list(column) for column in zip(*rows)]
    names = [column[0].strip() for column in cells] if header else [str(k) for k in range(len(cells))]
    _once(path.name, names)
    skip = int(header)
    if len(cells[0]) == skip:
        raise UserError(f"{path.name} is empty: it has a header and no row.")
    columns = {name: column[skip:] for name, column in zip(names, cells)}
    return Columns(path.name, columns, lambda row: f"{path.name} line {line(row + skip)}")


def _quoted(name: str, text: str, sign: str) -> tuple[list[list[str]], Callable[[int], int]]:
    def reader() -> Any:
        return csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=True)

    def line(row: int) -> int:
        return next(itertools.islice(_starts(reader()), row, None))

    source = reader()
    try:
        rows = list(filter(None, source))
    except csv.Error as error:
        raise UserError(
            f"{name} line {source.line_num} is no valid CSV: {error}. A cell with a quotation mark, a line end or "
            f"{sign!r} is quoted, and a quotation mark in it doubled."
        ) from error
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    if (wrong := np.flatnonzero(lengths != lengths[0])).size:
        row = int(wrong[0])
        raise UserError(f"{name} line {line(row)} has {lengths[row]} cells; the first line has {lengths[0]}.")
    return rows, line


def _starts(reader: Any) -> Iterator[int]:
    """Yield the line on which each row that is not blank begins: a quoted cell may hold line ends."""
    start = 1
    for cells in reader:
        if cells:
            yield start
        start = reader.line_num + 1


def _once(name: str, names: Sequence[str]) -> None:
    if twice := [n for n in dict.fromkeys(names) if names.count(n) > 1]:
        raise UserError(f"{name}: the column {twice[0]!r} stands twice in the header. Rename one.")


def read_parquet(path: Path) -> Columns:
    """Read a Parquet file with named columns.

    Raises:
        UserError: The file is missing, empty or no Parquet, or the package that reads it is not installed.
    """
    columns, _ = parquet_columns(path, "CSV")
    return Columns(path.name, columns, lambda row: f"{path.name} row {row + 1}")


def read_sequences(path: Path) -> Columns:
    """Read lines of a user and all of that user's items in time order; a user without items is let go.

    Returns:
        The columns ``user`` and ``item``.

    Raises:
        UserError: The file is missing or empty, has a user on two lines, or no line has an item.
    """
    lines, line = _lines(text_of(path))
    parts = [words.split() for words in lines]
    users = [words[0] for words in parts]
    if len(set(users)) < len(users):
        first = {user: row for row, user in reversed([*enumerate(users)])}
        row = next(row for row, user in enumerate(users) if first[user] != row)
        raise UserError(
            f"{path.name} line {line(row)}: user {users[row]!r} already stands on line {line(first[users[row]])}. "
            "A sequence file has one line a user: the user, then all items in time order."
        )
    counts = np.fromiter(map(len, parts), np.int64, len(parts)) - 1
    if not counts.any():
        raise UserError(
            f"{path.name}: no line has an item after the user, with a blank between. If it is no sequence file, name its "
            "format: csv, atomic."
        )
    ends = np.cumsum(counts)
    columns = {
        "user": list(itertools.chain.from_iterable(map(itertools.repeat, users, counts.tolist()))),
        "item": list(itertools.chain.from_iterable(words[1:] for words in parts)),
    }
    return Columns(
        path.name, columns, lambda row: f"{path.name} line {line(int(np.searchsorted(ends, row, side='right')))}"
    )
