"""Interactions: who took what, in which order, and what the items are. Read, cleaned, numbered, fingerprinted.

Users and items are numbers from 1; 0 is padding. Raw ids are strings.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import store
from .._gate import shown
from ..errors import UserError, unknown
from ..report import Table
from ._cleaning import Taken, clean, coded
from ._sources import FORMATS, Asked, Rows, read
from .answers import check_id
from .base import History, Item

__all__ = ["FORMATS", "Interactions", "describe", "fingerprint", "load", "numbered"]

_log = logging.getLogger(__name__)

MOST_WITHOUT_TEXT = 0.2
"""Above this share of items without any text, reading is refused unless it is allowed."""

MOST_TIED = 0.1
"""Above this share of neighbours with equal times, the order is said to be largely the file's."""


@dataclass(frozen=True, eq=False)
class Interactions:
    """Histories of users over a catalogue of items.

    Attributes:
        name: Where they come from, for people.
        users: Raw ids; user number u is ``users[u - 1]``.
        items: The catalogue; item number i is ``items[i - 1]``.
        histories: Item numbers of each user, oldest first.
        times: When, beside each history; None where the source has no clock.
        fingerprint: Stands for all of this in keys and reports.
        notes: What was found and let go while reading.
    """

    name: str
    users: tuple[str, ...]
    items: tuple[Item, ...]
    histories: tuple[NDArray[np.int32], ...]
    times: tuple[NDArray[np.int64], ...] | None
    fingerprint: str
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_users(self) -> int:
        """How many users there are."""
        return len(self.users)

    @property
    def n_items(self) -> int:
        """How many items the catalogue has."""
        return len(self.items)

    @functools.cached_property
    def lengths(self) -> NDArray[np.int64]:
        """How long each history is."""
        return np.fromiter(map(len, self.histories), np.int64, len(self.histories))

    @functools.cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each history begins in `flat`."""
        return np.cumsum(self.lengths) - self.lengths

    @functools.cached_property
    def flat(self) -> NDArray[np.int32]:
        """All histories, one after the other."""
        return np.concatenate(self.histories).astype(np.int32) if self.histories else np.zeros(0, np.int32)

    @functools.cached_property
    def flat_times(self) -> NDArray[np.int64] | None:
        """The times beside `flat`, or None without a clock."""
        return None if self.times is None else np.concatenate(self.times)

    @functools.cached_property
    def item_numbers(self) -> Mapping[str, int]:
        """The number of each raw item id."""
        return {item.id: number for number, item in enumerate(self.items, 1)}

    @functools.cached_property
    def user_numbers(self) -> Mapping[str, int]:
        """The number of each raw user id."""
        return {user: number for number, user in enumerate(self.users, 1)}

    def history(self, user: int) -> History:
        """Return a user's history in raw ids."""
        return History(self.users[user - 1], tuple(self.items[i - 1].id for i in self.histories[user - 1]))


def load(
    path: str | Path,
    *,
    format: str = "",
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
    text: Sequence[str] = (),
    titles: str | Path | None = None,
    rating: str = "rating",
    min_rating: float | None = None,
    min_count: int = 5,
    ties: Literal["file", "shuffle"] = "file",
    repeats: Literal["keep", "first"] = "keep",
    allow_missing_text: bool = False,
    seed: int = 0,
) -> Interactions:
    """Read interactions and items from files, clean them, and number them.

    Known formats are atomic files (``.inter`` with an ``.item`` beside it), a sequence file (a line is a user and all
    items in time order) with a map of titles, CSV or Parquet with named columns, and MovieLens' own ``u.data``. A
    folder that holds such files may be named instead.

    Args:
        path: A file or folder.
        format: One of `FORMATS`; found out by itself when empty.
        user: The column of users.
        item: The column of items.
        time: The column of times: numbers or dates. Empty: the file's order is the order, and there is no clock.
        text: Columns that describe an item; by default the usual ones, of atomic files all tokens.
        titles: A map of titles: TSV, CSV, Parquet, JSON object, or an ``.item`` file. By default the file beside the
            interactions that has their name and ends in ``.items.tsv`` (``.csv``, ``.json``, ``.parquet``).
        rating: The column of ratings, read only for `min_rating`.
        min_rating: Leave out interactions rated lower; None: every interaction counts.
        min_count: Users and items with fewer interactions are removed, until none is left; 0 keeps all.
        ties: What decides between equal times: the order in the file, or chance.
        repeats: Whether a user may take an item again at another time, or only the first time is kept.
        allow_missing_text: Go on when more than a fifth of the items has no text.
        seed: Decides the order under ``ties="shuffle"``.

    Returns:
        Histories over a catalogue, with what was found and let go in `Interactions.notes`.

    Raises:
        UserError: Something cannot be read, a cell has no meaning (with file and line), fewer than two items are left,
            or too many items have no text.
    """
    _one_of("ties", ties, ("file", "shuffle"))
    _one_of("repeats", repeats, ("keep", "first"))
    if min_count < 0:
        raise UserError(f"min_count must be at least 0; got {min_count}.")
    asked = Asked(
        user, item, time, tuple(text), None if titles is None else Path(titles), None if min_rating is None else rating
    )
    rows = read(Path(path), format, asked)
    users, items, taken = numbered(rows, min_rating)
    for kind, ids in (("user", users), ("item", items)):
        longest = max(ids, key=len)
        check_id(f"{rows.source.name}: the id of {kind} {shown(longest)}", longest)  # no request could name it
    taken = clean(taken, min_count=min_count, repeats=repeats, ties=ties, seed=seed)
    found = _made(rows, users, items, taken)
    _check(found, allow_missing_text)
    return found


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise unknown(f"choice of {name}", value, known)


def numbered(rows: Rows, min_rating: float | None) -> tuple[list[str], list[str], Taken]:
    """Number users and items, and leave out what was rated too low."""
    users, of_users = coded(rows.users)
    items, of_items = coded(rows.items)
    notes = {"format": rows.format, "source": rows.source.name, "read": len(of_users)}
    notes |= {"users_read": len(users), "items_read": len(items)}
    taken = Taken(of_users, of_items, rows.times, notes)
    if rows.ratings is None or min_rating is None:
        return users, items, taken
    liked = rows.ratings >= min_rating
    if not liked.any():
        raise UserError(f"{rows.source.name}: no interaction is rated {min_rating:g} or more. Lower min_rating.")
    return users, items, taken.at(liked, rated_lower=int((~liked).sum()))


def _made(rows: Rows, users: Sequence[str], items: Sequence[str], taken: Taken) -> Interactions:
    """Renumber what is left from 1 and cut it into histories."""
    left_users, of_users = np.unique(taken.users, return_inverse=True)
    left_items, of_items = np.unique(taken.items, return_inverse=True)
    raws = [items[i] for i in left_items]
    catalogue = tuple(rows.described.get(raw) or Item(raw, "", "") for raw in raws)
    cuts = np.cumsum(np.bincount(of_users))[:-1]
    histories = tuple(np.split((of_items + 1).astype(np.int32), cuts))
    times = None if taken.times is None else tuple(np.split(taken.times, cuts))
    names = tuple(users[u] for u in left_users)
    notes = taken.notes | _texts(catalogue) | {"described_unused": len(rows.described.keys() - set(raws))}
    notes |= {"clock": times is not None}
    return Interactions(
        rows.source.name, names, catalogue, histories, times, fingerprint(names, catalogue, histories, times), notes
    )


def _texts(items: Sequence[Item]) -> dict[str, Any]:
    """Count items without text, and items whose text is also another's: no tokeniser can tell these apart."""
    texts = [item.text.casefold() for item in items if item.text]
    counts = dict.fromkeys(texts, 0)
    for one in texts:
        counts[one] += 1
    equal = sum(n for n in counts.values() if n > 1)
    n = max(len(items), 1)
    return {"no_text": (len(items) - len(texts)) / n, "equal_texts": equal, "equal_texts_share": equal / n}


def fingerprint(
    users: Sequence[str],
    items: Sequence[Item],
    histories: Sequence[NDArray[np.int32]],
    times: Sequence[NDArray[np.int64]] | None,
) -> str:
    """Hash everything that decides what is learnt from interactions.

    Returns:
        32 hexadecimal digits.
    """
    return store.key(
        users=list(users),
        items=[[item.id, item.text, item.title, list(item.categories)] for item in items],
        histories=_digest(histories, "<i4"),
        times=None if times is None else _digest(times, "<i8"),
    )


def _digest(parts: Sequence[NDArray[Any]], kind: str) -> str:
    lengths = np.fromiter(map(len, parts), "<i8", len(parts))
    flat = np.concatenate(parts).astype(kind) if parts else np.zeros(0, kind)
    return hashlib.sha256(lengths.tobytes() + flat.tobytes()).hexdigest()


def _check(data: Interactions, allow_missing_text: bool) -> None:
    notes = data.notes
    if data.n_items < 2:
        raise UserError(
            f"{data.name}: one item is left ({data.items[0].id!r}), and there is nothing to choose. Give more data, or "
            "lower min_count."
        )
    share = notes["no_text"]
    if share > MOST_WITHOUT_TEXT and not allow_missing_text:
        raise UserError(
            f"{data.name}: {share:.1%} of the {data.n_items:,} items have no text, such as {_first_bare(data)!r}. Name "
            "the columns (text) or a file of titles (titles), or allow it (allow_missing_text)."
        )
    if notes["out_of_order"]:
        _log.info(
            "%s: %d rows stood before an older row of their user; all were sorted.", data.name, notes["out_of_order"]
        )
    for warning in _warnings(data):
        _log.warning("%s: %s", data.name, warning)


def _first_bare(data: Interactions) -> str:
    return next(item.id for item in data.items if not item.text)


def _warnings(data: Interactions) -> list[str]:
    """Say what a user can act on."""
    notes = data.notes
    found = []
    if notes["no_text"]:
        found.append(f"{notes['no_text']:.1%} of the items have no text, such as {_first_bare(data)!r}.")
    if notes["tied"] > MOST_TIED:
        found.append(
            f"{notes['tied']:.0%} of neighbours in a history have equal times, and for {notes['tied_last']:.0%} of "
            "users the last two. Their order is the file's or chance; claims need finer times."
        )
    return found


def describe(data: Interactions) -> Table:
    """Return what was read and let go as a table for people."""
    notes, lengths = data.notes, data.lengths
    rows: list[tuple[str, Any]] = [
        ("users", data.n_users),
        ("items", data.n_items),
        ("interactions", int(lengths.sum())),
        ("shortest, median and longest history", f"{lengths.min()}, {np.median(lengths):g}, {lengths.max()}"),
    ]
    words = {
        "read": "interactions in the file",
        "rated_lower": "rated too low",
        "duplicates": "equal in user, item and time: dropped",
        "repeats": "taken again by the same user",
        "rare": "of rare users and items: dropped",
        "out_of_order": "not in order of time: sorted",
        "equal_texts": "items whose text is also another's",
    }
    rows += [(words[name], notes[name]) for name in words if name in notes]
    shares = {"no_text": "items without text", "tied": "neighbours with equal times", "tied_last": "last two tied"}
    rows += [(words, f"{notes[name]:.1%}") for name, words in shares.items() if name in notes]
    return Table(f"Data: {data.name}", ("what", "value"), tuple(rows), f"Fingerprint {data.fingerprint}.")
