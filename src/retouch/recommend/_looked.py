"""What a server finds in the store about a batch of users: histories, and records that may be used.

A store that fails costs quality and never an answer: it is counted, left alone for a while, and nothing is found. In a
server nobody who waits for an answer finds out whether it is back: that is for the thread that looks at the store anyway.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ..errors import StoreDown
from .record import N_HISTORY, N_TAIL, Record, history_hash, tail_hash
from .stores import Past, Store

__all__ = ["Looked", "Looker", "lag_of"]

T = TypeVar("T")

_LONGEST_S = 30.0
"""The longest rest."""


@dataclass(frozen=True, eq=False)
class Looked:
    """What was found of each user, and what went wrong.

    Attributes:
        pasts: Histories that the store knows.
        raw: Bytes of the records, not read yet.
        errors: How often the store failed, by what was asked of it.
    """

    pasts: list[Past | None]
    raw: list[bytes | None]
    errors: Counter[str] = field(default_factory=Counter)


class Looker:
    """Ask a store, and give it a rest after it failed, twice as long each time until it answers.

    Args:
        store: The store; None: nothing is ever found.
        namespace: Whose records are read: the fingerprint of the bundle that answers.
        rest_s: For how long a store that failed is not asked, the first time.
        probed: Whether somebody calls `probe`; then only that ends a rest.
    """

    def __init__(self, store: Store | None, namespace: str, rest_s: float = 1.0, probed: bool = False) -> None:
        self.store, self.namespace, self.rest_s, self.probed = store, namespace, rest_s, probed
        self._down, self._until, self._rest_s = False, 0.0, rest_s

    @property
    def resting(self) -> bool:
        """Whether the store failed and is not asked now."""
        return self._down and (self.probed or time.monotonic() < self._until)

    def probe(self) -> None:
        """Ask a store that failed and has had its rest, from a thread that nobody waits for."""
        if self.store is None or not self._down or time.monotonic() < self._until:
            return
        try:
            for kind in ("records", "histories"):
                self._asked(self.store, kind)(["-"])
        except StoreDown:
            self._failed()
        else:
            self._down = False  # the rest stays as long until a look succeeds

    def _failed(self) -> None:
        self._down, self._until = True, time.monotonic() + self._rest_s
        self._rest_s = min(2 * self._rest_s, _LONGEST_S)

    def look(self, users: Sequence[str | None], needs_history: Sequence[bool]) -> Looked:
        """Find histories and records.

        Args:
            users: Raw ids; None for somebody without one.
            needs_history: Whose history the request does not hold.
        """
        found = Looked([None] * len(users), [None] * len(users))
        self._fill(found.raw, [i for i, user in enumerate(users) if user], users, "records", found.errors)
        wanted = [i for i, user in enumerate(users) if user and needs_history[i]]
        self._fill(found.pasts, wanted, users, "histories", found.errors)
        return found

    def _fill(
        self, into: list[T], places: list[int], users: Sequence[str | None], kind: str, errors: Counter[str]
    ) -> None:
        if self.store is None or not places or self.resting:
            return
        names = list(dict.fromkeys(str(users[i]) for i in places))
        try:
            values = self._asked(self.store, kind)(names)
        except StoreDown:
            errors[kind] += 1
            self._failed()
            return
        self._down, self._rest_s = False, self.rest_s
        held = dict(zip(names, values))
        for i in places:
            into[i] = held[str(users[i])]  # type: ignore[assignment]

    def _asked(self, store: Store, kind: str) -> Callable[[list[str]], Sequence[object]]:
        if kind == "histories":
            return store.histories
        return lambda users: store.get_many(users, self.namespace)


def lag_of(record: Record, history: Sequence[str], length: int, most: int) -> int | None:
    """Count the items that a record does not know.

    A caller may send the end of a history alone. Then the lengths say nothing, but where the last items that the record
    knew are all there, their hash does; and where just a few of them are, the hash of these few.

    Args:
        record: The record.
        history: Raw ids, oldest first; perhaps only the latest.
        length: How many items the user has, as far as is known.
        most: The largest lag that anybody asks for.

    Returns:
        None where the record belongs to another history, or nothing can be said.

    Example:
        >>> import numpy as np
        >>> from retouch.recommend.record import Versions
        >>> known = Record(Versions(1, 1, 1), 2, history_hash(["a", "b"]), 0, 60, 1.0, (), np.zeros(2, np.float16))
        >>> lag_of(known, ["a", "b", "c"], 3, 8), lag_of(known, ["x", "y", "c"], 3, 8)
        (1, None)
    """
    lag = length - record.history_length
    if lag >= 0:
        end = len(history) - lag
        whole = end >= min(N_HISTORY, record.history_length)
        if not whole:  # too much is missing to compare
            return lag
        if history_hash(history[:end]) == record.history_hash:
            return lag
    for lag in range(most + 1):
        end = len(history) - lag
        if N_HISTORY <= end < record.history_length and history_hash(history[:end]) == record.history_hash:
            return lag
    for lag in range(most + 1):
        end = len(history) - lag
        known = N_TAIL <= end < min(N_HISTORY, record.history_length) and record.tail_hash
        if known and tail_hash(history[:end]) == record.tail_hash:
            return lag
    return None
