"""The inside of a nearline run: what is remembered, how users are shared out, and the work for some of them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import store
from ..errors import StoreError
from ._bundle_parts import asked_of
from .record import Record, decode, history_hash
from .stores import Past, Store

if TYPE_CHECKING:
    from ..stats import Mapper
    from .bundle import Bundle

__all__ = ["Begun", "Done", "Memo", "Row", "Work", "batches", "job_key", "keep", "ranges", "resume"]

Row = tuple[str, Past]
Answer = tuple[int, list[bytes] | str]
_FORMAT = 1
_ROWS = 1024


# ---------------------------------------------------------------- what is remembered


class Memo:
    """Records by codes and history: the same ones need not be asked about twice, whoever the user is.

    What knowledge adds depends on nothing else, so a remembered record is not an estimate.

    Args:
        bundle: Whose records.
        knowledge: The store that remembers too; None: this process alone.
        n_entries: Most records kept in this process, the least recently used go first.
    """

    def __init__(self, bundle: Bundle, knowledge: Store | None, n_entries: int = 100_000) -> None:
        self.bundle, self.knowledge, self.n_entries = bundle, knowledge, n_entries
        made = "\n".join(f"{name} {value}" for name, value in sorted(bundle.makers.items()))
        self._made = made.encode()
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()

    def keys(self, pasts: Sequence[Past]) -> list[bytes]:
        """Name each history and the codes that it gets; no language model is asked."""
        found: list[bytes] = []
        for first in range(0, len(pasts), _ROWS):
            windows = self.bundle.windows([past.items for past in pasts[first : first + _ROWS]])
            codes = self.bundle.codes(windows).cpu().numpy().astype("<i4")
            found.extend(self._key(*row) for row in zip(codes, windows))
        return found

    def _key(self, codes: NDArray[np.int32], window: NDArray[np.int32]) -> bytes:
        digest = hashlib.blake2b(self._made, digest_size=16)
        digest.update(len(codes).to_bytes(4, "little") + codes.tobytes() + window.astype("<i4").tobytes())
        return digest.digest()

    def look_up(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return what is remembered of these."""
        wanted = dict.fromkeys(keys)
        found = {key: self._kept[key] for key in wanted if key in self._kept}
        for key in found:
            self._kept.move_to_end(key)
        missing = [key for key in wanted if key not in found]
        if self.knowledge is not None and missing:
            found_there = zip(missing, self.knowledge.memo(missing))
            more = {key: raw for key, raw in found_there if raw is not None and self.is_usable(raw)}
            self._keep(more)
            found |= more
        return found

    def is_usable(self, raw: bytes | None) -> bool:
        """Tell whether this bundle can use a record."""
        return isinstance(decode(raw, self.bundle.versions, self.bundle.d_model), Record)

    def remember(self, entries: Mapping[bytes, bytes]) -> None:
        """Keep records for later."""
        self._keep(entries)
        if self.knowledge is not None and entries:
            self.knowledge.remember(entries)

    def _keep(self, entries: Mapping[bytes, bytes]) -> None:
        self._kept.update(entries)
        while len(self._kept) > self.n_entries:
            self._kept.popitem(last=False)


# ---------------------------------------------------------------- what was done


@dataclass(frozen=True)
class Done:
    """What a run did.

    Attributes:
        written: Users whose record the language model made now.
        memo: Users whose record was remembered.
        unchanged: Users who needed none, or whose record in the store knows more.
        empty: Users without any known item, who get none.
        failed: Users for whom it failed twice, each with the reason.
        covered: Users with a usable record at the end.
    """

    written: int = 0
    memo: int = 0
    unchanged: int = 0
    empty: int = 0
    failed: tuple[tuple[str, str], ...] = ()
    covered: int = 0

    def __add__(self, other: Done) -> Done:
        """Add up two runs over different users."""
        names = ("written", "memo", "unchanged", "empty", "failed", "covered")
        return Done(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def users(self) -> int:
        """How many users were looked at."""
        return self.written + self.memo + self.unchanged + self.empty + len(self.failed)

    @property
    def coverage(self) -> float:
        """Share of the users with a known item who have a usable record."""
        return self.covered / max(self.users - self.empty, 1)

    @property
    def memo_rate(self) -> float:
        """Share of the new records that were remembered."""
        return self.memo / max(self.written + self.memo, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return {**vars(self), "failed": [list(pair) for pair in self.failed]}


def batches(bundle: Bundle, rows: Sequence[Row], positions: int) -> list[list[Row]]:
    """Cut users into batches of like length, each within a number of positions; the order of the rows decides nothing."""
    lengths = _lengths(bundle, rows)
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], rows[i][0]))
    found: list[list[Row]] = []
    for i in order:  # ascending, so the last one's length is that of the whole batch
        if not found or lengths[i] * (len(found[-1]) + 1) > positions:
            found.append([])
        found[-1].append(rows[i])
    return found


def _lengths(bundle: Bundle, rows: Sequence[Row]) -> list[int]:
    """Return how many positions of the language model each user takes."""
    asked = None if bundle.knowing is None else asked_of(bundle.knowing.source)
    windows = bundle.windows([past.items for _, past in rows])
    n_books = len(bundle.prototypes.books)
    if asked is None:
        return [int((window > 0).sum()) + n_books for window in windows]
    return [asked.embedded.length(window[window > 0]) + n_books for window in windows]


# ---------------------------------------------------------------- the work


@dataclass(frozen=True, eq=False)
class Work:
    """What a run needs to make the records of some users.

    Attributes:
        bundle: Makes them.
        knowledge: Where they go.
        memo: What is remembered.
        positions: Size of a batch.
        due: Says why a user needs a record.
        restamp: Makes a remembered record a user's own.
        answer: Makes the records of a numbered batch, or says what went wrong.
        mapper: Where `answer` runs.
    """

    bundle: Bundle
    knowledge: Store
    memo: Memo
    positions: int
    due: Callable[[bytes | None, Past], str | None]
    restamp: Callable[[bytes, Past], bytes]
    answer: Callable[[tuple[int, list[Row]]], Answer]
    mapper: Mapper

    def range(self, rows: Sequence[Row]) -> Done:
        """Bring the records of some users up to date."""
        raws = self.knowledge.get_many([user for user, _ in rows], self.bundle.fingerprint)
        wanting = [row for row, raw in zip(rows, raws) if self.due(raw, row[1])]
        had = {user for (user, _), raw in zip(rows, raws) if self.memo.is_usable(raw)}
        known = (self.bundle.windows([past.items for _, past in wanting])[:, -1] > 0).tolist()
        empty = [user for (user, _), has in zip(wanting, known) if not has]
        done = Done(unchanged=len(rows) - len(wanting), empty=len(empty))
        done += self._make([row for row, has in zip(wanting, known) if has])
        without = [user for user in (*empty, *(user for user, _ in done.failed)) if user not in had]
        return replace(done, covered=len(rows) - len(without))

    def _make(self, rows: Sequence[Row]) -> Done:
        """Write the records of users who need one: from memory, else from the model, equals once."""
        groups: dict[bytes, list[Row]] = {}
        for key, row in zip(self.memo.keys([past for _, past in rows]), rows):
            groups.setdefault(key, []).append(row)
        kept = self.memo.look_up(list(groups))
        done = self._write({}, {user: self.restamp(kept[k], past) for k in kept for user, past in groups[k]})
        asked = {key: group for key, group in groups.items() if key not in kept}
        return done + self._ask(asked) if asked else done

    def _ask(self, groups: Mapping[bytes, list[Row]]) -> Done:
        keys = {group[0][0]: key for key, group in groups.items()}
        done, again = Done(), list[list[Row]]()
        for batch, answer in self._answers(
            batches(self.bundle, [group[0] for group in groups.values()], self.positions)
        ):
            if isinstance(answer, str):
                again += [[row] for row in batch]  # alone, so that one user's failure is no other's
            else:
                done += self._accept(batch, answer, keys, groups)
        for batch, answer in self._answers(again):
            if isinstance(answer, str):
                done += Done(failed=tuple((user, answer) for user, _ in groups[keys[batch[0][0]]]))
            else:
                done += self._accept(batch, answer, keys, groups)
        return done

    def _answers(self, parts: list[list[Row]]) -> Iterator[tuple[list[Row], list[bytes] | str]]:
        for number, answer in self.mapper(self.answer, list(enumerate(parts))):
            yield parts[number], answer

    def _accept(
        self, batch: list[Row], answer: list[bytes], keys: Mapping[str, bytes], groups: Mapping[bytes, list[Row]]
    ) -> Done:
        mine = {user: raw for (user, _), raw in zip(batch, answer)}
        theirs = {user: self.restamp(raw, past) for name, raw in mine.items() for user, past in groups[keys[name]][1:]}
        self.memo.remember({keys[user]: raw for user, raw in mine.items()})
        return self._write(mine, theirs)

    def _write(self, made: Mapping[str, bytes], remembered: Mapping[str, bytes]) -> Done:
        space = self.bundle.fingerprint
        n = [self.knowledge.put_many(part, space) if part else 0 for part in (made, remembered)]
        return Done(written=n[0], memo=n[1], unchanged=len(made) + len(remembered) - sum(n))


# ---------------------------------------------------------------- ranges and checkpoints


def ranges(rows: Mapping[str, Past], size: int) -> list[list[str]]:
    """Share users out by their hash, so that a user is always in the same range whatever the order of the input."""
    n = -(-len(rows) // size)
    found: list[list[str]] = [[] for _ in range(n)]
    for user in rows:
        hashed = int.from_bytes(hashlib.blake2b(user.encode(), digest_size=8).digest(), "big")
        found[hashed * n >> 64].append(user)
    return [sorted(part) for part in found]


def job_key(bundle: Bundle, rows: Mapping[str, Past], **settings: int) -> str:
    """Name a job by its bundle, its users with their histories, and what decides its ranges and records."""
    digest = hashlib.sha256()
    for user in sorted(rows):
        digest.update(f"{len(user)}:{user}{rows[user].length}:{history_hash(rows[user].items)};".encode())
    return store.key(bundle=bundle.fingerprint, users=digest.hexdigest(), settings=settings)


@dataclass(frozen=True)
class Begun:
    """How far a run is."""

    key: str
    at_ms: int
    n_ranges: int = 0
    done: Done = field(default_factory=Done)


def keep(place: Path | None, at: Begun) -> None:
    """Write how far a run is."""
    if place is not None:
        told = {"format": _FORMAT, "key": at.key, "at_ms": at.at_ms, "n_ranges": at.n_ranges}
        store.write_json_atomic(place, told | {"done": at.done.to_dict()})


def resume(place: Path | None, begin: Begun, *, keep_time: bool) -> Begun:
    """Return how far an interrupted run of the same job came, else where it begins; another job's file is let go.

    Raises:
        StoreError: The file is no checkpoint.
    """
    if place is None or not place.exists():
        return begin
    told = store.read_json(place)
    try:
        if told["format"] != _FORMAT or told["key"] != begin.key:
            return begin
        failed = tuple((str(user), str(why)) for user, why in told["done"]["failed"])
        done = Done(**{**told["done"], "failed": failed})
        return Begun(begin.key, begin.at_ms if keep_time else int(told["at_ms"]), int(told["n_ranges"]), done)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{place} is no checkpoint of nearline: {error!r}. Remove it to begin again.") from error
