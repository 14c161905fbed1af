"""Names for groups of users: what those who hold one word of the instructions like more than others do."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .base import Item

__all__ = ["Group", "name_groups"]

_PRIOR, _LEAST_HOLDERS, _SHOWN = 10.0, 20, 5
_COMMON = frozenset(
    ("the", "and", "for", "with", "from", "into", "than", "that", "this", "are", "was", "you", "your", "all")
)


@dataclass(frozen=True)
class Group:
    """The users who hold one word of one book of instructions, as people can picture them.

    Attributes:
        book: Which book, from 0.
        word: Which word of it, from 0.
        n_users: How many hold it.
        items: Titles that they take more than others do.
        words: Words of these users' items that are more frequent than elsewhere.
    """

    book: int
    word: int
    n_users: int
    items: tuple[str, ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        """Name the group by book and word, counted from 1, and what its users like."""
        liked = f" ({', '.join(self.words[:3] or self.items[:2])})" if self.words or self.items else ""
        return f"group {self.book + 1}-{self.word + 1}{liked}"


def name_groups(
    codes: NDArray[np.integer], histories: Sequence[Sequence[int]], items: Sequence[Item]
) -> dict[tuple[int, int], Group]:
    """Name the groups of training users that hold the same word by what they take more than others.

    Source: log-odds with an even prior of 10 counts, as in Monroe, Colaresi and Quinn (2008).

    Args:
        codes: The words that each training user holds; [users, books].
        histories: Item numbers of each training user, of the time trained on.
        items: The catalogue.

    Returns:
        By (book, word), for each word that at least 20 users hold.
    """
    per_user = [sorted(set(map(int, history))) for history in histories]
    item_words = {i: sorted(set(_words(items[i - 1]))) for user in per_user for i in user}
    bags = [Counter(w for i in user for w in item_words[i]) for user in per_user]
    takes = [Counter(user) for user in per_user]
    all_takes, all_bags = _total(takes, range(len(takes))), _total(bags, range(len(bags)))
    found = {}
    for book in range(codes.shape[1]):
        for word in np.unique(codes[:, book]).tolist():
            holders = np.flatnonzero(codes[:, book] == word)
            if len(holders) < _LEAST_HOLDERS:
                continue
            liked = _lifted(_total(takes, holders), all_takes)
            words = _lifted(_total(bags, holders), all_bags)
            titles = tuple(items[i - 1].title for i in liked)
            found[book, word] = Group(book, word, len(holders), titles, tuple(map(str, words)))
    return found


def _words(item: Item) -> list[str]:
    text = " ".join([item.title, *item.categories])
    return [w for w in re.findall(r"[^\W\d_]{3,}|\d{4}", text.lower()) if w not in _COMMON]


def _total(bags: Sequence[Counter[Any]], rows: Collection[int] | NDArray[np.intp]) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for row in rows:
        total.update(bags[row])
    return total


def _lifted(inside: Counter[Any], everywhere: Counter[Any]) -> list[Any]:
    """Return what a group holds more often than the others do; the prior keeps rare things from the top."""
    n_in, n_all = sum(inside.values()), sum(everywhere.values())
    n_out = n_all - n_in

    def odds(name: Any) -> float:
        share = everywhere[name] / n_all * _PRIOR
        x, y = inside[name] + share, everywhere[name] - inside[name] + share
        return math.log(x / (n_in + _PRIOR - x)) - math.log(y / (n_out + _PRIOR - y))

    lifts = {name: odds(name) for name in inside}
    ranked = sorted((name for name in lifts if lifts[name] > 0), key=lambda name: (-lifts[name], str(name)))
    return ranked[:_SHOWN]
