"""Labelled texts and multiple choice as they stand in published files. Loads no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FactError, UserError
from ..tokens import broken

__all__ = ["Choice", "Labelled", "labelled", "multiple_choice"]

_TEXTS = (
    ("text", "text2"), ("#1 string", "#2 string"), ("question1", "question2"), ("sentence1", "sentence2"),
    ("premise", "hypothesis"), ("question", "sentence"), ("text",), ("sentence",), ("question",), ("sentence1",), ("premise",),
)  # fmt: skip
"""Names of the columns of a text, or of a pair of texts; the first that are all there count."""
_LABELS = ("label", "quality", "is_duplicate", "gold_label", "class")


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
        FactError: A row has not six fields, no question, or another letter; with file and line.
        UserError: The file is missing or is no text.
    """
    return [_choice(path, line, cells) for line, cells in _comma_rows(path, _text(path))]


def _choice(path: Path, line: int, cells: Sequence[str]) -> Choice:
    where = f"{_named(path)} line {line}"
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
        raise FactError(f"{_named(path)} line {line} is not UTF-8 text. Save the file as UTF-8.") from error


def _named(path: Path) -> str:
    """Name a file with its folder: every domain has a train file."""
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


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
        raise FactError(f"{_named(path)} line {start} is no valid CSV: {error}.") from error


def _from_table(path: Path, rows: Sequence[tuple[int, Sequence[str]]]) -> list[Labelled]:
    names = [cell.strip().casefold() for cell in rows[0][1]] if rows else []
    if columns := _columns(names):
        body = rows[1:]
    elif len(names) == 2:
        columns, body = (("0",), "1"), rows
        names = ["0", "1"]
    else:
        raise FactError(
            f"{_named(path)} line 1: there must be columns text and label (or sentence1, sentence2, label as in GLUE); "
            f"got {', '.join(names)!r:.80}."
        )
    found = []
    for line, cells in body:
        if len(cells) != len(names):
            raise FactError(f"{_named(path)} line {line} has {len(cells)} fields where {len(names)} are expected.")
        found.append(_row(path, line, dict(zip(names, cells)), columns))
    return found


def _columns(names: Collection[str]) -> tuple[Sequence[str], str] | None:
    """Return the names of the text, or of both texts, and of the label; None where a second text would be left unread."""
    texts = next((known for known in _TEXTS if all(name in names for name in known)), ())
    label = next((name for name in _LABELS if name in names), None)
    seconds = {known[1] for known in _TEXTS if len(known) > 1}
    unread = seconds.intersection(names).difference(texts)
    return None if not texts or label is None or unread else (texts, label)


def _from_object(path: Path, line: int, text: str) -> Labelled:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FactError(f"{_named(path)} line {line} is not valid JSON: {error}") from error
    cells = {str(name).casefold(): value for name, value in found.items()} if isinstance(found, dict) else {}
    columns = _columns([name for name, value in cells.items() if value is not None])
    if columns is None:
        raise FactError(f"{_named(path)} line {line} must be an object with text and label.")
    texts, label = columns
    if not all(isinstance(cells[name], str) for name in texts) or not isinstance(cells[label], str | int | float):
        raise FactError(f"{_named(path)} line {line}: a text must be a text, and a label a text or a number.")
    return _row(path, line, {name: str(value) for name, value in cells.items()}, columns)


def _label_first(path: Path, line: int, text: str) -> Labelled:
    label, _, rest = text.strip().partition(" ")
    return _row(path, line, {"text": rest, "label": label}, (("text",), "label"))


def _row(path: Path, line: int, cells: Mapping[str, str], columns: tuple[Sequence[str], str]) -> Labelled:
    texts, label = [cells[name].strip() for name in columns[0]], cells[columns[1]].strip()
    if not texts[0] or not label:
        raise FactError(f"{_named(path)} line {line} has no {'label' if texts[0] else 'text'}.")
    if broken("".join((*texts, label))):
        raise FactError(
            f"{_named(path)} line {line} holds half of a character (a lone surrogate). Correct or leave out the row."
        )
    return Labelled(texts[0], texts[1] if len(texts) > 1 else "", label, f"{_named(path)} line {line}")
