"""What is known of items: tables, maps of titles, and how their fields become one line of text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import store
from ..errors import UserError, absent
from ._formats import Columns, read_atomic, read_csv, read_parquet, read_plain
from .base import Item

__all__ = ["USUAL", "described", "ids_of", "item_table", "title_map", "usual"]

USUAL = ("title", "brand", "year", "category", "categories", "genre", "genres")
"""Columns that are text of an item when nobody says which are."""

_TITLES = ("title", "name")
_ITEMS = ("item", "item_id", "itemid", "id", "asin")
_GROUPS = {"category", "categories", "genre", "genres", "class"}


# ---------------------------------------------------------------- what items are


def described(
    raw: str, title: str, year: str, parts: Sequence[tuple[str, Sequence[str]]], groups: Sequence[str]
) -> Item:
    """Join what is known of an item as ``title (year). Field: value, value.``, with empty parts left out.

    Example:
        >>> described("1", "Fargo", "1996", [("genre", ["Crime", "Noir"]), ("brand", [])], ["Crime"]).text
        'Fargo (1996). Genre: Crime, Noir.'
    """
    title, year = " ".join(title.split()), year.removesuffix(".0").strip()
    head = f"{title} ({year})" if title and year and f"({year})" not in title else title
    known = [(label, [" ".join(v.split()) for v in values if v.strip()]) for label, values in parts]
    tail = [
        f"{_label(label)}: {', '.join(values)}." if label else f"{', '.join(values)}."
        for label, values in known
        if values
    ]
    if head and tail:
        head += "" if head.endswith((".", "!", "?")) else "."
    return Item(raw, " ".join([head, *tail]).strip(), title, tuple(dict.fromkeys(filter(None, map(str.strip, groups)))))


def _label(name: str) -> str:
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def ids_of(columns: Columns, name: str, setting: str) -> list[str]:
    """Read ids as text; a whole number that a table keeps as a fraction (12.0) is written as one (12)."""
    cells = columns.column(name, setting)
    kinds = set(map(type, cells))
    if kinds == {str}:
        ids = list(map(str.strip, cells))
    elif kinds <= {int, str} and bool not in kinds:
        ids = [str(cell).strip() for cell in cells]
    else:
        ids = [_id(cell) for cell in cells]
    if not all(ids):
        raise UserError(f"{columns.place(ids.index(''))}: the {setting} in column {name!r} is empty.")
    return ids


def _id(cell: object) -> str:
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "replace").strip()
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell).strip()


def item_table(columns: Columns, item: str, names: Sequence[str]) -> dict[str, Item]:
    """Describe the items of a table from some of its columns; of an item that stands twice the first row counts."""
    ids = ids_of(columns, item, "item")
    cells = {name: columns.column(name, "text") for name in names}
    title = next((n for t in _TITLES for n in names if t in n.lower()), next(iter(names), ""))
    year = next((n for n in names if n.lower().endswith("year")), "")
    found: dict[str, Item] = {}
    for row, raw in enumerate(ids):
        if raw in found:
            continue
        texts = {name: _text(column[row]) for name, column in cells.items()}
        rest = [(n, _values(n, text, columns.kinds)) for n, text in texts.items() if n not in (title, year)]
        groups = [value for n, values in rest if n.lower() in _GROUPS for value in values]
        unnamed = [("" if n.isdigit() else n, values) for n, values in rest]
        found[raw] = described(raw, texts.get(title, ""), texts.get(year, ""), unnamed, groups)
    return found


def _text(cell: object) -> str:
    if isinstance(cell, list):
        return "|".join(map(str, cell))
    if isinstance(cell, bytes):  # text that a writer did not mark as such
        return cell.decode("utf-8", "replace")
    return "" if cell is None or cell != cell else str(cell)


def _values(name: str, text: str, kinds: Mapping[str, str]) -> list[str]:
    if kinds.get(name) == "token_seq":
        return [word.strip("',\"") for word in text.split(" ")]
    if "|" in text:
        return text.split("|")
    return text.split(",") if name.lower() in _GROUPS else [text]


# ---------------------------------------------------------------- maps of titles


def title_map(path: Path | None, item: str, text: Sequence[str], known: Collection[str]) -> dict[str, Item]:
    """Read a map of titles: a table with or without a header, an atomic ``.item``, or a JSON object."""
    if path is None:
        return {}
    if not path.is_file():
        raise absent(path)
    if path.suffix == ".json":
        return _of_json(path, item, text)
    if path.name == "u.item":
        return _of_movielens(path)
    if path.suffix == ".item":
        columns = read_atomic(path)
    elif path.suffix in (".parquet", ".pq"):
        columns = read_parquet(path)
    else:
        columns = read_csv(path, header=False)
        first = [str(cells[0]).strip() for cells in columns.cells.values()]
        if first[0] not in known and {item, *_ITEMS, *USUAL} & {cell.lower() for cell in first}:
            columns = read_csv(path)  # the first row names the columns
    item = _id_column(columns, item)
    return item_table(columns, item, tuple(text) or _worth(columns, item))


def _id_column(columns: Columns, item: str) -> str:
    """Choose the column of ids: the one asked for, else one that is usually called so, else the first."""
    spelled = {name.lower(): name for name in columns.cells}
    found = (spelled[name] for name in (item.lower(), *_ITEMS) if name in spelled)
    return item if item in columns.cells else next(found, next(iter(columns.cells)))


def usual(names: Collection[str]) -> tuple[str, ...]:
    """Return those of some columns that are text when nobody says which are, however they are spelled."""
    return tuple(name for known in USUAL for name in names if name.lower() == known)


def _worth(columns: Columns, item: str) -> tuple[str, ...]:
    """Choose the columns of a map that are text: the usual ones, or all."""
    return usual(columns.cells) or tuple(name for name in columns.cells if name != item)


def _of_json(path: Path, item: str, text: Sequence[str]) -> dict[str, Item]:
    records = store.read_json(path)
    if not isinstance(records, dict) or not records:
        raise UserError(f"{path.name} must be a JSON object with an entry a item, such as {{'B0001': 'its title'}}.")
    rows = [_record(path.name, raw, value) for raw, value in records.items()]
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    cells: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in names}
    columns = Columns(path.name, {**cells, item: list(records)}, lambda row: f"{path.name}: item {[*records][row]!r}")
    return item_table(columns, item, text or tuple(n for n in names if n.lower() not in {item, *_ITEMS}))


def _record(name: str, raw: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, str | list) or value is None:
        return {"title": value if not isinstance(value, list) else " ".join(map(str, value))}
    raise UserError(f"{name}: item {raw!r} has {value!r}; expected is a title, or an object of fields.")


def _of_movielens(path: Path) -> dict[str, Item]:
    """Read ``u.item``: id, title with its year, dates, address, and a flag for each genre of ``u.genre``."""
    genres = _genres(path.with_name("u.genre"))
    names = ["id", "title", "released", "video", "address", *genres]
    columns = read_plain(path, names, "|", "latin-1")
    flags = np.array([columns.cells[genre] for genre in genres]).T == "1"
    found = {}
    for row, (raw, title) in enumerate(zip(columns.cells["id"], columns.cells["title"])):
        own = [genres[k] for k in np.flatnonzero(flags[row]) if genres[k] != "unknown"]
        found[raw] = described(raw, title, "", [("genres", own)], own)
    return found


def _genres(path: Path) -> list[str]:
    if not path.is_file():
        return _GENRES.split("|")
    columns = read_plain(path, ("genre", "number"), "|", "latin-1")
    return list(columns.cells["genre"])


_GENRES = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|Musical|"
    "Mystery|Romance|Sci-Fi|Thriller|War|Western"
)
