"""What a change did, for people and for programs: terminal, JSON, one HTML file, model card.

A report holds what was measured and never measures. HTML and pictures need the extra ``plot``; the rest does not.
All text may come from users and is taken literally everywhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import store
from ._pictures import Picture, clean, need, shown
from ._plots import plot_bars, plot_curve, plot_drift, plot_ranks, plot_where
from ._sheet import Sheet, numeric

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "Picture",
    "Report",
    "Table",
    "mark",
    "mark_table",
    "model_card",
    "plot_bars",
    "plot_curve",
    "plot_drift",
    "plot_ranks",
    "plot_where",
    "to_html",
    "to_json",
    "to_terminal",
    "write_html",
]

FORMAT = 1
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$&])")


@dataclass(frozen=True)
class Table:
    """Hold one table of a report.

    Args:
        title: What the table is about.
        columns: The names of its columns, with units.
        rows: Cells, as many a row as there are columns; the first names the row.
        caption: How to read it.

    Raises:
        ValueError: A row has another number of cells than there are columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Table {self.title!r} has {len(self.columns)} columns, and its row {i} has {len(row)} cells."
                )


def _versions() -> Mapping[str, str]:
    from .change import versions

    return versions()


@dataclass(frozen=True)
class Report:
    """Hold the numbers before and after a change, with how they were measured.

    Args:
        title: What was done.
        summary: One sentence for people.
        model: Which model it was done to.
        tables: Measurements for people.
        pictures: What the ``plot_`` functions drew.
        numbers: Measurements for programs.
        notes: What a reader has to know to judge the numbers.
        environment: Versions and machine; by default the versions at hand.

    Example:
        >>> table = Table("Ranks", ("fact", "rank"), (("France", 1),))
        >>> report = Report("One edit", "It holds.", "gpt2", tables=(table,), environment={})
        >>> to_json(report)["tables"][0]["rows"]
        [['France', 1]]
    """

    title: str
    summary: str
    model: str
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=_versions)


def to_json(report: Report) -> dict[str, Any]:
    """Return the report for programs: plain, strict JSON values.

    A number that is not finite becomes null, because JSON has no word for it. Of a picture only its words are kept.
    """
    return {
        "format": FORMAT,
        "kind": "report",
        "title": report.title,
        "summary": report.summary,
        "model": report.model,
        "numbers": _plain(report.numbers),
        "tables": [
            {"title": t.title, "columns": list(t.columns), "rows": _plain(t.rows), "caption": t.caption}
            for t in report.tables
        ],
        "pictures": [{"title": p.title, "caption": p.caption} for p in report.pictures],
        "notes": list(report.notes),
        "environment": _plain(report.environment),
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):  # an array or a tensor
        return _plain(value.tolist())
    return str(value)


def to_terminal(report: Report) -> RenderableType:
    """Return the report as something that a rich console prints; nothing is cut off at any width.

    A table that is too wide for the console becomes one small block a row.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(clean(report.title), "bold"), Text(clean(report.summary))]
    parts.append(Text.assemble(("model ", "dim"), clean(report.model)))
    parts += [part for table in report.tables for part in _drawn(table)]
    for heading, lines in (("Seen", [p.title for p in report.pictures]), ("Notes", report.notes)):
        if lines:
            parts += [Text(), Text(heading, "bold"), *(Text("- " + clean(line)) for line in lines)]
    if report.environment:
        made = ", ".join(f"{clean(name)} {clean(value)}" for name, value in report.environment.items())
        parts += [Text(), Text(made, "dim")]
    return Group(*parts)


def _drawn(table: Table) -> list[Any]:
    from rich.text import Text

    parts: list[Any] = [Text(), Text(clean(table.title), "bold"), Sheet(table.columns, table.rows)]
    return [*parts, Text(clean(table.caption), "dim")] if table.caption else parts


def to_html(report: Report) -> str:
    """Return the report as one HTML file: pictures inline, no scripts, nothing loaded from elsewhere.

    It follows the reader's light or dark setting and prints on paper.

    Raises:
        UserError: jinja2 is not installed.
    """
    jinja = need("jinja2")
    text = (files("retouch") / "data" / "report.html").read_text(encoding="utf-8")
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    template = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, **options).from_string(text)
    page: str = template.render(
        title=clean(report.title),
        summary=clean(report.summary),
        model=clean(report.model),
        pictures=[{"title": clean(p.title), "svg": p.svg, "caption": clean(p.caption)} for p in report.pictures],
        tables=[_page_table(table) for table in report.tables],
        notes=[clean(note) for note in report.notes],
        environment=[(clean(name), clean(value)) for name, value in report.environment.items()],
        numbers=_json_text(report.numbers),
    )
    return page


def _page_table(table: Table) -> dict[str, Any]:
    return {
        "title": clean(table.title),
        "caption": clean(table.caption),
        "columns": [clean(name) for name in table.columns],
        "numeric": numeric(table.columns, table.rows),
        "rows": [[shown(cell) for cell in row] for row in table.rows],
    }


def _json_text(numbers: Mapping[str, Any]) -> str:
    if not numbers:
        return ""
    lines = json.dumps(_plain(numbers), indent=2, ensure_ascii=False, allow_nan=False).split("\n")
    return "\n".join(clean(line) for line in lines)


def write_html(report: Report, path: str | Path) -> None:
    """Write the report as one HTML file, whole or not at all.

    Raises:
        UserError: jinja2 is not installed.
        StoreError: The file cannot be written.
    """
    data = to_html(report).encode("utf-8")
    with store.new_file(path, len(data)) as new:
        new.write_bytes(data)


def model_card(report: Report) -> str:
    """Return the report as the ``README.md`` of a model folder: Markdown with the header that model hubs read.

    Example:
        >>> print(model_card(Report("One edit", "It holds.", "gpt2", environment={})).splitlines()[5])
        # One edit
    """
    lines = ["---", "library_name: transformers", "tags: [retouch, model-editing]", "---", ""]
    lines += [f"# {mark(report.title)}", "", mark(report.summary), "", f"Changed model: {mark(report.model)}", ""]
    for table in report.tables:
        lines += [f"## {mark(table.title)}", "", *mark_table(table), ""]
        lines += [mark(table.caption), ""] if table.caption else []
    for heading, texts in (("What is seen", [p.title for p in report.pictures]), ("Notes", report.notes)):
        if texts:
            lines += [f"## {heading}", "", *(f"- {mark(text)}" for text in texts), ""]
    if report.environment:
        lines += ["## How this was made", ""]
        lines += [f"- {mark(name)} {mark(value)}" for name, value in report.environment.items()] + [""]
    return "\n".join(lines)


def mark_table(table: Table) -> list[str]:
    """Write a table as lines of Markdown."""
    rules = ["---:" if right else "---" for right in numeric(table.columns, table.rows)]
    rows = [[mark(name) for name in table.columns], rules]
    rows += [[mark(shown(cell)) for cell in row] for row in table.rows]
    return ["| " + " | ".join(row) + " |" for row in rows]


def mark(text: object) -> str:
    """Write a text so that Markdown shows it and does not read it."""
    return re.sub(r"^(\d*)([+.)-])(?= |$)", r"\1\\\2", _MARKDOWN.sub(r"\\\1", clean(text).strip()))
