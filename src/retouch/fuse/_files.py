"""Labelled texts and multiple choice as they stand in published files. Loads no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FactError, UserError

__all__ = ["Choice", "Labelled", "labelled", "multiple_choice"]

_TEXT = ("text", "sentence", "sentence1", "#1 string", "question", "premise")
_PAIR = ("text2", "sentence2", "#2 string", "hypothesis")
_LABEL = ("label", "quality", "class")


@dataclass(frozen=True)
class Labelled:
    """A text or a pair of texts with its label, and where it stands."""

    text: str
    pair: str
    label: str
    where: str


@dataclass(frozen=True)
class Choice:
    """A question with four options and the number of the right one, and where it stands."""

    stem: str
    options: tuple[str, ...]
    answer: int
    where: str


def labelled(path: Path) -> list[Labelled]:
    """Read texts with labels.

    Tab-separated files have no quoting; they and CSV may begin with names of columns (``text``, ``text2``, ``label``,
    or as in GLUE), else they hold a text and a label. Lines of ``.jsonl`` are objects with these names. Lines of
    ``.all`` are a label, a space and a text.

    Raises:
        FactError: A line cannot be used; with file and line.
        UserError: The file is missing or is no text.
    """
    text = _text(path)
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        rows = [_from_object(path, line, cells) for line, cells in _lines(text)]
    elif suffix == ".all":
        rows = [_label_first(path, line, cells) for line, cells in _lines(text)]
    else:
        split = _comma_rows(path, text) if suffix == ".csv" else ((n, s.split("\t")) for n, s in _lines(text))
        rows = _from_table(path, list(split))
    if not rows:
        raise FactError(f"{path} holds no text.")
    return rows


def multiple_choice(path: Path) -> list[Choice]:
    """Read MMLU's format: question, four options and a letter, separated by commas, without names of columns.

    Raises:
        FactError: A row has not six fields, an empty one, or another letter; with file and line.
        UserError: The file is missing or is no text.
    """
    return [_choice(path, line, cells) for line, cells in _comma_rows(path, _text(path))]


def _choice(path: Path, line: int, cells: Sequence[str]) -> Choice:
    where = f"{path.name} line {line}"
    if len(cells) != 6:
        raise FactError(f"{where}: a row is a question, four options and a letter, so 6 fields; this has {len(cells)}.")
    stem, *options, letter = (cell.strip() for cell in cells)
    if letter not in tuple("ABCD"):
        raise FactError(f"{where}: the answer must be A, B, C or D; got {letter!r:.40}.")
    if not stem:
        raise FactError(f"{where}: the question is empty.")
    return Choice(stem, tuple(options), "ABCD".index(letter), where)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if path.suffix.lower() == ".all":  # published in Latin-1
            return data.decode("latin-1")
        line = data.count(b"\n", 0, error.start) + 1
        raise FactError(f"{path.name} line {line} is not UTF-8 text. Save the file as UTF-8.") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank. Only a line feed ends one: Latin-1 texts hold other line ends."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _comma_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise FactError(f"{path.name} line {start} is no valid CSV: {error}.") from error


def _from_table(path: Path, rows: Sequence[tuple[int, Sequence[str]]]) -> list[Labelled]:
    names = [cell.strip().casefold() for cell in rows[0][1]] if rows else []
    text, label = _column(names, _TEXT), _column(names, _LABEL)
    if text is not None and label is not None:
        pair, body = _column(names, _PAIR), rows[1:]
    elif len(names) == 2:
        text, pair, label, body = 0, None, 1, rows
    else:
        raise FactError(
            f"{path.name} line 1: there must be columns text and label (or sentence1, sentence2, label as in GLUE); "
            f"got {', '.join(names)!r:.80}."
        )
    found = []
    for line, cells in body:
        if len(cells) <= max(text, label, pair or 0):
            raise FactError(f"{path.name} line {line} has {len(cells)} fields where {max(len(names), 2)} are expected.")
        found.append(_row(path, line, cells[text], "" if pair is None else cells[pair], cells[label]))
    return found


def _column(names: Sequence[str], known: Sequence[str]) -> int | None:
    return next((names.index(name) for name in known if name in names), None)


def _from_object(path: Path, line: int, text: str) -> Labelled:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FactError(f"{path.name} line {line} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise FactError(f"{path.name} line {line} must be an object with text and label.")
    cells = {str(name).casefold(): value for name, value in found.items()}
    text_, pair, label = (next((cells[n] for n in known if n in cells), "") for known in (_TEXT, _PAIR, _LABEL))
    return _row(path, line, str(text_), str(pair), str(label))


def _label_first(path: Path, line: int, text: str) -> Labelled:
    label, _, rest = text.strip().partition(" ")
    return _row(path, line, rest, "", label)


def _row(path: Path, line: int, text: str, pair: str, label: str) -> Labelled:
    text, pair, label = text.strip(), pair.strip(), label.strip()
    if not text or not label:
        raise FactError(f"{path.name} line {line} has no {'label' if text else 'text'}.")
    return Labelled(text, pair, label, f"{path.name} line {line}")
