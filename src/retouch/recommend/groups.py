"""Names for groups of users: what those who hold one word of the instructions like more than others do.

They are made of training users when a bundle is saved, and kept in it for reasons to name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import store
from ..errors import StoreError

if TYPE_CHECKING:
    from .base import Item
    from .fitted import PolicyScorer
    from .splits import Splits

__all__ = ["Group", "name_groups", "read_groups", "training_groups", "write_groups"]

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


def training_groups(fitted: PolicyScorer, splits: Splits) -> dict[tuple[int, int], Group]:
    """Name the groups of the users that a policy was trained on; no language model is asked.

    Args:
        fitted: What fitting a policy returned.
        splits: Who trains; nobody else is read.
    """
    import torch

    from .prototypes import drawn_users

    policy, asked = fitted.policy, fitted.asked
    if policy is None or asked is None or policy.instructions is None:
        return {}
    windows = asked.windows(drawn_users(splits))
    with torch.no_grad():
        codes = [policy.codes(part).cpu() for part in torch.split(torch.from_numpy(windows), 1024)]
    held = torch.cat(codes).numpy() if codes else np.zeros((0, 0), np.int64)
    return name_groups(held, [window[window > 0].tolist() for window in windows], asked.data.items)


def write_groups(path: Path, groups: Mapping[tuple[int, int], Group]) -> None:
    """Write the names of groups as JSON."""
    store.write_json_atomic(path, {"groups": [asdict(group) for group in groups.values()]})


def read_groups(path: Path) -> dict[tuple[int, int], Group]:
    """Read what `write_groups` wrote; nothing where there is no file.

    Raises:
        StoreError: It holds something else.
    """
    if not path.is_file():
        return {}
    try:
        rows = [
            {**row, "items": tuple(row["items"]), "words": tuple(row["words"])}
            for row in store.read_json(path)["groups"]
        ]
        return {(row["book"], row["word"]): Group(**row) for row in rows}
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path} does not hold the names of groups: {error!r}. Make the bundle again.") from error


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
