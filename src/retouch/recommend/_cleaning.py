"""From rows as they stand in a file to histories: duplicates, repeats, the k-core, order and ties. Arrays throughout.

Every step says how many rows it let go; the counts are the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

__all__ = ["Taken", "clean", "coded", "in_order", "natural"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Taken:
    """Interactions as numbers, row by row.

    Attributes:
        users: The user of each row, from 0.
        items: The item of each row, from 0.
        times: When; None without a clock.
        notes: What was found and let go, for the report.
    """

    users: Ints
    items: Ints
    times: Ints | None
    notes: dict[str, Any] = field(default_factory=dict)

    def at(self, rows: NDArray[Any], **notes: Any) -> Taken:
        """Keep rows, chosen by a mask or by number."""
        times = None if self.times is None else self.times[rows]
        return Taken(self.users[rows], self.items[rows], times, {**self.notes, **notes})


def natural(raws: Sequence[str]) -> list[str]:
    """Sort ids so that 9 stands before 10: whole numbers first by value, then all others as text.

    Example:
        >>> natural(["b", "10", "9", "a"])
        ['9', '10', 'a', 'b']
    """

    def key(raw: str) -> tuple[int, int, str, str]:
        if not (raw.isascii() and raw.isdigit()):
            return 1, 0, raw, raw
        digits = raw.lstrip("0")  # of two numbers without leading zeros the longer one is larger, however long
        return 0, len(digits), digits, raw

    return sorted(raws, key=key)


def coded(raws: Sequence[str]) -> tuple[list[str], Ints]:
    """Number ids from 0 in their natural order, so that the order of a file's rows decides nothing.

    Returns:
        The ids in order, and the number of each row.
    """
    names = natural(list(dict.fromkeys(raws)))
    index = {raw: number for number, raw in enumerate(names)}
    return names, np.fromiter(map(index.__getitem__, raws), np.int64, len(raws))


def clean(taken: Taken, *, min_count: int, repeats: str, ties: str, seed: int) -> Taken:
    """Sort, drop duplicates and rare users and items; rows come back user by user, oldest first.

    Raises:
        UserError: Nothing is left.
    """
    taken = in_order(taken)
    taken = _once(taken, repeats)
    taken = _core(taken, min_count)
    if ties == "shuffle" and taken.times is not None:
        taken = _shuffled(taken, taken.times, seed)
    return replace(taken, notes=taken.notes | _ties(taken))


def in_order(taken: Taken) -> Taken:
    """Sort by user, time, and place in the file; count rows that stood before an older one of their user."""
    place = np.arange(len(taken.users))
    by_file = np.lexsort((place, taken.users))
    if taken.times is None:
        return taken.at(by_file, out_of_order=0)
    users, times = taken.users[by_file], taken.times[by_file]
    wrong = int(((users[1:] == users[:-1]) & (times[1:] < times[:-1])).sum())
    return taken.at(np.lexsort((place, taken.times, taken.users)), out_of_order=wrong)


def _once(taken: Taken, repeats: str) -> Taken:
    """Drop rows equal in user, item and time; with ``first`` also later rows of the same user and item."""
    pair = taken.users * (int(taken.items.max(initial=0)) + 1) + taken.items
    keys = (np.arange(len(pair)), pair) if taken.times is None else (np.arange(len(pair)), taken.times, pair)
    order = np.lexsort(keys)
    again = pair[order][1:] == pair[order][:-1]
    same_time = (
        again & (taken.times[order][1:] == taken.times[order][:-1]) if taken.times is not None else again & False
    )
    gone = again if repeats == "first" else same_time
    kept = np.ones(len(pair), bool)
    kept[order[1:][gone]] = False
    n_same, n_again = int(same_time.sum()), int(again.sum())
    return taken.at(kept, duplicates=n_same, repeats=n_again - n_same)


def _core(taken: Taken, least: int) -> Taken:
    """Remove users and items with fewer than `least` rows until all have as many."""
    kept = np.ones(len(taken.users), bool)
    rounds = 0
    while least > 1 and kept.any():
        users = np.bincount(taken.users[kept], minlength=int(taken.users.max()) + 1)
        items = np.bincount(taken.items[kept], minlength=int(taken.items.max()) + 1)
        still = kept & (users[taken.users] >= least) & (items[taken.items] >= least)
        if still.sum() == kept.sum():
            break
        kept, rounds = still, rounds + 1
    if not kept.any():
        raise UserError(
            f"Nothing is left of {len(kept):,} interactions: no users and items have {least} interactions with each "
            "other's kept ones. Lower min_count (0 keeps all)."
        )
    return taken.at(kept, rare=int((~kept).sum()), rounds=rounds)


def _shuffled(taken: Taken, times: Ints, seed: int) -> Taken:
    chance = np.random.default_rng([seed, 0x7135]).random(len(times))
    return taken.at(np.lexsort((chance, times, taken.users)))


def _ties(taken: Taken) -> dict[str, float]:
    """Measure how much of the order is the file's: neighbours, and last two items, with equal times."""
    if taken.times is None:
        return {"tied": 0.0, "tied_last": 0.0}
    same_user = taken.users[1:] == taken.users[:-1]
    tied = same_user & (taken.times[1:] == taken.times[:-1])
    last = same_user & np.append(~same_user[1:], True)
    return {"tied": _share(tied, same_user), "tied_last": _share(tied & last, last)}


def _share(part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> float:
    return float(part.sum() / max(int(whole.sum()), 1))
