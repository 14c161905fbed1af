"""Users' histories from a file, as nearline reads them: CSV, Parquet, atomic or sequence files, or JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..tokens import broken
from ._cleaning import Taken, clean, coded
from ._formats import text_of
from ._sources import Asked, read
from .stores import Past

__all__ = ["read_histories"]


def read_histories(
    path: str | Path, *, format: str = "", user: str = "user_id", item: str = "item_id", time: str = "timestamp"
) -> dict[str, Past]:
    """Read who took what, oldest first; items need not be in any catalogue.

    A file that ends in ``.jsonl`` has one user a line: ``{"user": "u1", "items": ["i1", "i2"]}``. All others are read as
    `retouch.recommend.data.load` reads them, and nothing rare is left out.

    Args:
        path: The file.
        format: One of `retouch.recommend._sources.FORMATS`; found out by itself when empty.
        user: The column of users.
        item: The column of items.
        time: The column of times; empty: the file's order is the order.

    Raises:
        UserError: Something cannot be read; with file and line.
    """
    path = Path(path)
    if path.suffix.lower() == ".jsonl" and not format:
        return _from_lines(path)
    rows = read(path, format, Asked(user, item, time, (), None, None))
    users, of_users = coded(rows.users)
    items, of_items = coded(rows.items)
    taken = clean(Taken(of_users, of_items, rows.times), min_count=0, repeats="keep", ties="file", seed=0)
    ends = np.cumsum(np.bincount(taken.users, minlength=len(users)))[:-1]
    found = {}
    for name, part in zip(users, np.split(taken.items, ends)):
        found[name] = Past(tuple(items[i] for i in part.tolist()), len(part))
    return found


def _from_lines(path: Path) -> dict[str, Past]:
    found: dict[str, Past] = {}
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        user, items = _line(f"{path.name} line {number}", line)
        if user in found:
            raise UserError(f"{path.name} line {number}: user {user!r} already has a line. Give each user one line.")
        found[user] = Past(items, len(items))
    return found


def _line(where: str, line: str) -> tuple[str, tuple[str, ...]]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}.") from error
    user, items = (row.get("user"), row.get("items")) if isinstance(row, dict) else (None, None)
    if not isinstance(user, str) or not user or not isinstance(items, list):
        raise UserError(f'{where} must be {{"user": "…", "items": ["…"]}}, the oldest item first; got {line[:80]!r}.')
    if not all(isinstance(item, str) and item for item in items):
        raise UserError(f"{where}: all items must be raw ids, written as text.")
    if any(map(broken, (user, *items))):  # no store can keep it
        raise UserError(f"{where}: an id is no valid Unicode text.")
    return user, tuple(items)
