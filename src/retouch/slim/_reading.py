"""From a file of labelled texts to rows of cells, and the place of each: TSV, CSV, JSON Lines, Parquet, label first.

What the cells mean is decided in `_layouts`. Nothing here needs torch.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._parquet import parquet_columns
from ..errors import UserError, absent

__all__ = ["Example", "Table", "few", "label_text", "read_table"]

LABEL_FIRST = {".all", ".train", ".dev", ".test", ".label"}
"""Extensions of files whose lines are a label, a space, a text (TREC, MR, SST); many are published in Latin-1."""
_LONGEST = 2**31 - 1
"""Characters of a cell; the limit of the csv module, 131,072, is less than a long document has."""


@dataclass(frozen=True)
class Example:
    """One labelled text, or a pair of texts.

    Attributes:
        text: The text, or the first of the pair.
        pair: The second text, or None.
        label: As in the file when just read; in a `Task` the index of the class, or the number to predict.
    """

    text: str
    pair: str | None
    label: str | float | int


@dataclass(frozen=True)
class Table:
    """A file as rows of cells.

    Attributes:
        name: The file's name, for messages.
        columns: Names of the columns; None when the first row may be a header or not.
        rows: The cells.
        lines: The place of each row in the file, from 1.
        unit: What `lines` counts, "line" or "row".
    """

    name: str
    columns: tuple[str, ...] | None
    rows: Sequence[Sequence[Any]]
    lines: Sequence[int]
    unit: str = "line"

    def at(self, *rows: int) -> str:
        """Say where rows stand: ``train.tsv line 3, 8``."""
        return f"{self.name} {self.unit} {few([str(self.lines[row]) for row in rows])}"


def few(names: Sequence[str], most: int = 5) -> str:
    """Join the first names with commas, and say how many more there are.

    Example:
        >>> few(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def read_table(path: Path) -> Table:
    """Read a file by its extension; of an unknown one, the first line decides.

    Tab-separated files have no quoting: a quotation mark is text, as in the sets of GLUE.

    Raises:
        UserError: The file is missing, empty, not text, or not of its format; with the line.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    data = _bytes(path)
    if suffix in {".jsonl", ".ndjson", ".json"}:
        return _json_lines(path.name, _text(path.name, data))
    if suffix == ".csv":
        return _csv(path.name, _text(path.name, data))
    if suffix == ".tsv" or b"\t" in data.split(b"\n", 1)[0]:
        return _tsv(path.name, _text(path.name, data))
    return _label_first(path.name, _text(path.name, data, latin=suffix in LABEL_FIRST))


# Bytes and text


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise absent(path) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if not data.strip():
        raise UserError(f"{path.name} is empty.")
    return data


def _text(name: str, data: bytes, latin: bool = False) -> str:
    if b"\0" in data:
        raise UserError(f"{name} is not UTF-8 text: byte {data.index(0)} is zero. Is it UTF-16, or no text at all?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if latin:
            return data.decode("latin-1")
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name} line {line} is not UTF-8 text: {error.reason}. Save the file as UTF-8.") from error
    if not text.strip():
        raise UserError(f"{name} is empty.")
    return text


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, from 1. Only a line feed ends one: Latin-1 texts hold other line ends."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


# Formats


def _table(name: str, found: Sequence[tuple[int, Sequence[Any]]]) -> Table:
    return Table(name, None, [cells for _, cells in found], [line for line, _ in found])


def _tsv(name: str, text: str) -> Table:
    return _table(name, [(number, line.split("\t")) for number, line in _lines(text)])


def _csv(name: str, text: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: list[tuple[int, Sequence[Any]]] = []
    start, usual = 1, csv.field_size_limit(_LONGEST)
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                found.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{name} line {start} is no valid CSV: {error}. A field with a quotation mark, a comma or a line end is "
            'quoted, and a quotation mark in it doubled: "He said ""no"""'
        ) from error
    finally:
        csv.field_size_limit(usual)
    return _table(name, found)


def _label_first(name: str, text: str) -> Table:
    rows, lines = [], []
    for number, line in _lines(text):
        label, _, rest = line.strip().partition(" ")
        if not rest:
            raise UserError(
                f"{name} line {number} is no 'label text': {few([line], 1)!r:.60}. "
                "Known are .tsv, .csv, .jsonl and .parquet files, and lines of a label, a space and a text."
            )
        rows.append((rest, label))
        lines.append(number)
    return Table(name, ("text", "label"), rows, lines)


def _json_lines(name: str, text: str) -> Table:
    if text.lstrip()[0] == "[":
        records = _parsed(text, name)
        found = list(enumerate(records, 1))
    else:
        found = [(number, _parsed(line, f"{name} line {number}")) for number, line in _lines(text)]
    unit = "record" if text.lstrip()[0] == "[" else "line"
    for number, record in found:
        if not isinstance(record, dict):
            raise UserError(f"{name} {unit} {number} must be an object such as {{'text': ..., 'label': ...}}.")
    if not found:
        raise UserError(f"{name} is empty.")
    columns = tuple(dict.fromkeys(key for _, record in found for key in record))
    rows = [[record.get(key) for key in columns] for _, record in found]
    return Table(name, columns, rows, [number for number, _ in found], unit)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the name {twice[0]!r} is given twice")
    return dict(pairs)


def _parquet(path: Path) -> Table:
    columns, n = parquet_columns(path, ".tsv, .csv or .jsonl")
    return Table(path.name, tuple(columns), list(zip(*columns.values())), range(1, n + 1), "row")


def label_text(value: object) -> str | None:
    """Write a label as text; None when there is none.

    Example:
        >>> label_text(1.0), label_text(True), label_text(" World "), label_text("")
        ('1', '1', 'World', None)
    """
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float):
        return str(int(value)) if math.isfinite(value) and value.is_integer() else repr(value)
    if isinstance(value, int | str):
        return str(value).strip() or None
    return None
