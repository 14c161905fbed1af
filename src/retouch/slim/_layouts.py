"""Which cells are the text, the second text and the label: by the names of the columns, or by their look.

A new published set is a row in `LAYOUTS`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import UserError
from ._reading import Example, Table, few, label_text

__all__ = ["LAYOUTS", "Layout", "Rows", "rows_of"]

_log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """Names of columns, in lower case, and what is known of sets that are published so.

    Attributes:
        text, pair, label: The columns; `pair` is None for single texts.
        task: Which GLUE task it can only be.
        glue: Whether tasks of GLUE are published so: their test file has no labels.
        loose: Known to hold broken rows as published: they are left out.
    """

    text: str
    pair: str | None
    label: str
    task: str | None = None
    glue: bool = True
    loose: bool = False


LAYOUTS = (
    Layout("text", "text2", "label", glue=False),
    Layout("text1", "text2", "label", glue=False),
    Layout("text", None, "label", glue=False),
    Layout("#1 string", "#2 string", "quality", "mrpc"),
    Layout("question1", "question2", "is_duplicate", "qqp", loose=True),
    Layout("sentence1", "sentence2", "gold_label", "mnli", loose=True),
    Layout("sentence1", "sentence2", "score", "stsb"),
    Layout("question1", "question2", "label"),
    Layout("sentence1", "sentence2", "label"),
    Layout("premise", "hypothesis", "label", loose=True),
    Layout("question", "sentence", "label", "qnli"),
    Layout("sentence", None, "label"),
)
_TEXTS = {name for layout in LAYOUTS for name in (layout.text, layout.pair) if name}
_LABELS = {layout.label for layout in LAYOUTS}
_COLA, _STS = 4, 7  # columns of CoLA's files, and of STS-B's dev and test: neither has a header


@dataclass(frozen=True)
class Rows:
    """What was read from one file: examples whose labels are texts still, and where each stands.

    Attributes:
        examples: The rows, in the file's order.
        table: Their places.
        layout: How the file names its columns.
        skipped: Rows left out, of a published set that is known to hold broken ones.
        sha256: Hash of the file; None when the rows came from no file.
        names: The classes in the order that the set itself gives them; None where it gives none.
    """

    examples: tuple[Example, ...]
    table: Table
    layout: Layout
    skipped: int = 0
    sha256: str | None = None
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __getitem__(self, row: int) -> Example:
        return self.examples[row]


def rows_of(table: Table, columns: Mapping[str, str] | None = None) -> Rows:
    """Read the examples of a table.

    Args:
        table: The cells.
        columns: Names of the columns that are ``text``, ``text2`` (if any) and ``label``, where they are not known.

    Raises:
        UserError: There is no column of texts or labels, a name stands twice, a row has too few or too many cells, or
            a text or label is missing; with the line.
    """
    layout, places, first = _chosen(table, columns)
    width = len(table.rows[0]) if first or table.columns else None
    faults = {row: _fault(table.rows[row], places, width, layout) for row in range(first, len(table.rows))}
    kept = [row for row, fault in faults.items() if not fault]
    bad = [row for row, fault in faults.items() if fault]
    if not kept and not bad:
        raise UserError(f"{table.name} holds a header and no rows.")
    if bad and not (layout.loose and kept):
        fault = faults[bad[0]]
        raise UserError(f"{table.at(*(row for row in bad if faults[row] == fault))}: {fault}.")
    if bad:
        _log.warning("%s: left out %d broken rows, as published (%s).", table.name, len(bad), faults[bad[0]])
    examples = tuple(_example(table.rows[row], places) for row in kept)
    lines = [table.lines[row] for row in kept]
    return Rows(examples, Table(table.name, table.columns, (), lines, table.unit), layout, len(bad))


def _example(cells: Sequence[Any], places: tuple[int, int | None, int]) -> Example:
    text, pair, label = places
    return Example(cells[text].strip(), None if pair is None else cells[pair].strip(), label_text(cells[label]) or "")


def _fault(cells: Sequence[Any], places: tuple[int, int | None, int], width: int | None, layout: Layout) -> str | None:
    """Say what is wrong with a row, or None."""
    if len(cells) != width and width is not None:
        return f"has {len(cells)} cells where the first line has {width}"
    wanted = [place for place in places if place is not None]
    if max(wanted) >= len(cells):
        return f"has only {len(cells)} cells"
    for place in places[:2]:
        if place is not None and (not isinstance(cells[place], str) or not cells[place].strip()):
            return "the text is empty" if cells[place] is None or isinstance(cells[place], str) else "no text"
    label = cells[places[2]]
    if isinstance(label, list | dict):
        return "the label must be a text or a number; several labels for one text are not supported"
    if label_text(label) == "-" and layout.label == "gold_label":
        return "the label is '-': its annotators did not agree"
    return "the label is missing" if label_text(label) is None else None


def _chosen(table: Table, columns: Mapping[str, str] | None) -> tuple[Layout, tuple[int, int | None, int], int]:
    """Return the layout, the places of text, pair and label, and the row at which the data begin."""
    names = table.columns or tuple(str(cell) for cell in table.rows[0])
    known = [name.strip().casefold() for name in names]
    header = table.columns is not None or columns is not None or not {*known}.isdisjoint(_TEXTS | _LABELS)
    if not header:
        return _guessed(table)
    if twice := [name for name, count in Counter(known).items() if count > 1]:
        raise UserError(f"{table.name}: the column {twice[0]!r} stands twice in the header. Rename one.")
    layout = _asked(columns) if columns else next((one for one in LAYOUTS if _fits(one, known)), None)
    if layout is None or not _fits(layout, known):
        raise _no_column(table, names, known, layout)
    pair = None if layout.pair is None else known.index(layout.pair)
    return layout, (known.index(layout.text), pair, known.index(layout.label)), int(table.columns is None)


def _fits(layout: Layout, known: Sequence[str]) -> bool:
    return {layout.text, layout.label, layout.pair or layout.text} <= {*known}


def _asked(columns: Mapping[str, str]) -> Layout:
    if not {"text", "label"} <= {*columns} <= {"text", "text2", "label"}:
        raise UserError(f"columns names 'text', 'label' and perhaps 'text2'; got {', '.join(columns) or 'nothing'}.")
    folded = {part: name.strip().casefold() for part, name in columns.items()}
    return Layout(folded["text"], folded.get("text2"), folded["label"], glue=False)


def _no_column(table: Table, names: Sequence[str], known: Sequence[str], asked: Layout | None) -> UserError:
    if asked:
        absent = [name for name in (asked.text, asked.pair, asked.label) if name and name not in known]
        what = f"no column {absent[0]!r}"
    else:
        what = "no label column" if {*known}.isdisjoint(_LABELS) else "no column of texts that goes with its labels"
    other = next((mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]), None)
    if other:
        return UserError(
            f"{table.name} has one column: its cells are set apart by {other!r}. Save it with commas, or as .tsv."
        )
    return UserError(
        f"{table.name} has {what}. Its columns: {few([name[:40] for name in names], 12)}. Call them text, label and, "
        "for pairs, text2; or say which they are: --columns text=...,label=..., in Python "
        "columns={'text': ..., 'label': ...}."
    )


def _guessed(table: Table) -> tuple[Layout, tuple[int, int | None, int], int]:
    """Place the columns of a file without a header by their look."""
    width = len(table.rows[0])
    if width >= _STS and all(len(row) >= _STS and _is_number(row[4]) for row in table.rows[:20]):
        return Layout("", "", "", "stsb"), (5, 6, 4), 0
    if width == _COLA and all(len(row) == _COLA and row[1] in ("0", "1") for row in table.rows[:20]):
        return Layout("", None, "", "cola"), (3, None, 1), 0
    if width not in (2, 3):
        raise _no_column(table, table.rows[0], [], None)
    for row, cells in enumerate(table.rows):
        if len(cells) != width:
            raise UserError(f"{table.at(row)}: has {len(cells)} cells where the first line has {width}.")
    label = min(range(width), key=lambda place: (len({row[place] for row in table.rows}), -place))
    counts = Counter(row[label] for row in table.rows)
    others = [count for name, count in counts.items() if name != table.rows[0][label]]
    if len(table.rows) > 3 and counts[table.rows[0][label]] == 1 < min(others, default=1):
        raise _no_column(table, table.rows[0], [], None)  # the first line is a header whose names are not known
    texts = [p for p in range(width) if p != label and not all(_is_number(row[p]) for row in table.rows)]
    if not texts:  # a column of numbers alone is an index
        raise _no_column(table, table.rows[0], [], None)
    text, *pair = texts
    return Layout("", "" if pair else None, "", glue=False), (text, pair[0] if pair else None, label), 0


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
