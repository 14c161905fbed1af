"""Users' histories from a file, as nearline reads them: CSV, Parquet, atomic or sequence files, or JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..tokens import broken
from ._cleaning import clean
from ._formats import text_of
from ._sources import Asked, read
from .data import numbered
from .stores import Past

__all__ = ["read_histories"]


def read_histories(
    path: str | Path, *, format: str = "", user: str = "user_id", item: str = "item_id", time: str = "timestamp",
    rating: str = "rating", min_rating: float | None = None,
) -> dict[str, Past]:  # fmt: skip
    """Read who took what, oldest first; items need not be in any catalogue.

    A file that ends in ``.jsonl`` has one user a line: ``{"user": "u1", "items": ["i1", "i2"]}``. All others are read as
    `retouch.recommend.data.load` reads them, and nothing rare is left out.

    Args:
        path: The file.
        format: One of `retouch.recommend._sources.FORMATS`; found out by itself when empty.
        user: The column of users.
        item: The column of items.
        time: The column of times; empty: the file's order is the order.
        rating: The column of ratings, read only for `min_rating`.
        min_rating: Leave out what is rated lower, as when the bundle was fitted; None: every interaction counts.

    Raises:
        UserError: Something cannot be read; with file and line.
    """
    path = Path(path)
    if path.suffix.lower() == ".jsonl" and not format:
        if min_rating is not None:
            raise UserError(f"{path.name} holds histories without ratings, so min_rating cannot be used.")
        return _from_lines(path)
    rows = read(path, format, Asked(user, item, time, (), None, None if min_rating is None else rating))
    users, items, taken = numbered(rows, min_rating)
    taken = clean(taken, min_count=0, repeats="keep", ties="file", seed=0)
    ends = np.cumsum(np.bincount(taken.users, minlength=len(users)))[:-1]
    parts = zip(users, np.split(taken.items, ends))
    return {name: Past(tuple(items[i] for i in part.tolist()), len(part)) for name, part in parts if len(part)}


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
