"""The language model's work, done before anybody asks: who needs a new record, and the records themselves.

`records` is the one function that makes them; it is pure, so it runs here or on many machines. `refresh` finds out who
needs one and writes them, and may be stopped and started again at any point; `watch` does so for as long as a shop runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from .. import scale
from ..errors import RetouchError, StoreDown, UserError
from ..progress import report
from ..settings import Settings, setting
from ._histories import read_histories
from ._nearline import Begun, Done, Memo, Row, Work, batches, job_key, keep, ranges, resume
from .record import Record, Versions, decode, encode, history_hash, tail_hash
from .stores import Past, Store

if TYPE_CHECKING:
    from ..stats import Mapper
    from .bundle import Bundle

__all__ = [
    "Done",
    "Memo",
    "NearlineSettings",
    "batches",
    "coverage",
    "due",
    "read_histories",
    "records",
    "refresh",
    "trigger",
    "watch",
]

_log = logging.getLogger(__name__)

TTL_S = 7 * 86_400
_ROWS = 1024


@dataclass(frozen=True)
class NearlineSettings(Settings):
    """How records are made and when."""

    ttl_s: int = setting(TTL_S, "For how long a record counts as fresh, in seconds.", ge=1, lt=2**32)
    positions: int = setting(4096, "Positions of the language model in a batch, padding included.", ge=1)
    range_users: int = setting(2048, "Users between two checkpoints.", ge=1)
    coverage: float = setting(0.95, "Share of the active users that must have a record before a roll-out.", ge=0, le=1)
    memo_entries: int = setting(100_000, "Records that are remembered in this process; 0: none.", ge=0)
    remember: bool = setting(True, "Remember records in the store too, by codes and history.")
    poll_s: float = setting(1.0, "Pause between two looks at the store's changes, in seconds.", gt=0)
    sweep_s: float = setting(3600.0, "Pause between two looks at all users, for records that grew old.", gt=0)


# ---------------------------------------------------------------- the records


def records(
    bundle: Bundle, histories: Sequence[tuple[str, Past | Sequence[str]]], at_ms: int, ttl_s: int = TTL_S
) -> list[bytes]:
    """Ask the language model about some users and return their records; the same input gives the same bytes.

    Args:
        bundle: Opened with its language model.
        histories: Users and their raw ids, oldest first. Unknown ids count for the length, and are not read.
        at_ms: What the records say of when they were made, in milliseconds since 1970.
        ttl_s: For how long they count as fresh.

    Returns:
        One record a user, in the same order.

    Raises:
        UserError: The bundle was opened without its language model, or a vector is not finite.
    """
    if bundle.knowing is None or bundle.knowing.source is None:
        raise UserError(
            f"{bundle.path} cannot make records: it was opened without its language model, or has no knowledge. "
            "Open it with open_bundle(path, knowledge=open_model(...))."
        )
    pasts = [_past(items) for _, items in histories]
    if not pasts:
        return []
    with torch.no_grad():
        told = bundle.knowing.tell(torch.from_numpy(bundle.windows([past.items for past in pasts])))
    vectors = told.residual.half().cpu().numpy()
    codes, gates = told.codes.cpu().tolist(), told.gate.float().cpu().tolist()
    return [
        encode(_record(bundle.versions, past, at_ms, ttl_s, gate, tuple(code), vector))
        for past, gate, code, vector in zip(pasts, gates, codes, vectors)
    ]


def _past(items: Past | Sequence[str]) -> Past:
    return items if isinstance(items, Past) else Past(tuple(items), len(items))


def _record(
    versions: Versions, past: Past, at_ms: int, ttl_s: int, gate: float, codes: tuple[int, ...],
    vector: NDArray[np.float16],
) -> Record:  # fmt: skip
    tail = tail_hash(past.items)
    return Record(versions, past.length, history_hash(past.items), at_ms, ttl_s, gate, codes, vector, tail)


# ---------------------------------------------------------------- who needs one


def trigger(length: int) -> int:
    """Return after how many new items a history of this length is read again.

    Example:
        >>> trigger(4), trigger(19), trigger(20)
        (1, 2, 4)
    """
    return 1 if length < 5 else 2 if length < 20 else 4


def due(raw: bytes | None, past: Past, bundle: Bundle, at_ms: int) -> str | None:
    """Say in one word why a user needs a new record; None: no need.

    Returns:
        ``items``: the history grew; ``changed``: it is another one; ``age``; or why the record cannot be used, as
        `retouch.recommend.record.decode` says.
    """
    found = decode(raw, bundle.versions, bundle.d_model)
    if isinstance(found, str):
        return found
    lag = past.length - found.history_length
    if lag < 0:  # the record knows more than we were told
        return None
    if lag >= trigger(past.length):
        return "items"
    if lag == 0 and found.history_hash != history_hash(past.items):
        return "changed"
    return "age" if at_ms - found.computed_at_ms > found.ttl_s * 1000 else None


def coverage(bundle: Bundle, knowledge: Store, users: Sequence[str]) -> float:
    """Return the share of some users who have a record that this bundle can use, however old."""
    found = 0
    for first in range(0, len(users), _ROWS):
        raws = knowledge.get_many(users[first : first + _ROWS], bundle.fingerprint)
        found += sum(isinstance(decode(raw, bundle.versions, bundle.d_model), Record) for raw in raws)
    return found / max(len(users), 1)


# ---------------------------------------------------------------- one run


def refresh(
    bundle: Bundle,
    knowledge: Store,
    users: Mapping[str, Past | Sequence[str]],
    settings: NearlineSettings | None = None,
    *,
    at_ms: int | None = None,
    way: str | Mapper = "here",
    checkpoint: str | Path | None = None,
    memo: Memo | None = None,
    activate: bool = False,
    own: bool = False,
) -> Done:
    """Write a record for every user who needs one, into the namespace of this bundle.

    Writing is idempotent: a record replaces another only if it knows more of the history, or as much and is newer. So a
    run may be repeated, stopped, or run twice at once.

    Args:
        bundle: Opened with its language model.
        knowledge: Where records go.
        users: Their histories, from `read_histories` or `Store.histories`.
        settings: Sizes and times.
        at_ms: What records say of when they were made; by default now, or when the interrupted run began.
        way: ``here``, ``ray``, or any function like `retouch.scale.here`; the records are the same bytes.
        checkpoint: A file that remembers which users are done; removed when all are.
        memo: What is remembered already; by default what the store remembers.
        activate: Roll out at the end, if enough of these users are covered, and of as many as servers read now: give all
            active users then.
        own: These histories are the store's own. A record that knows more then belongs to a history that was replaced;
            it is removed, as no write would supersede it.

    Raises:
        UserError: The bundle cannot make records.
        StoreDown: The store does not answer; start again when it does.
    """
    if not bundle.asks:
        records(bundle, [("", ())], 0)  # says why
    settings = settings or NearlineSettings()
    rows = {user: _past(items) for user, items in users.items()}
    memo = memo or Memo(bundle, knowledge if settings.remember else None, settings.memo_entries)
    place = None if checkpoint is None else Path(checkpoint)
    parts = ranges(rows, settings.range_users)
    key = job_key(bundle, rows, range_users=settings.range_users, ttl_s=settings.ttl_s) if place else ""
    begun = resume(place, Begun(key, _now_ms() if at_ms is None else at_ms), keep_time=at_ms is not None)
    work = _work(bundle, knowledge, memo, settings, begun.at_ms, scale.mapper(way) if isinstance(way, str) else way)
    done = begun.done
    for number in range(begun.n_ranges, len(parts)):
        if own:
            _remove_longer(bundle, knowledge, {user: rows[user] for user in parts[number]})
        done += work.range([(user, rows[user]) for user in parts[number]])
        keep(place, Begun(key, begun.at_ms, number + 1, done))
        report("Making knowledge records", done.users, len(rows))
    if place is not None:
        place.unlink(missing_ok=True)
    if activate and done.covered and done.coverage >= settings.coverage and _is_whole(bundle, knowledge, settings):
        knowledge.activate(bundle.fingerprint)
    return done


def _is_whole(bundle: Bundle, knowledge: Store, settings: NearlineSettings) -> bool:
    """Tell whether this namespace holds about as many users as the one that servers read: a few are no roll-out."""
    active = knowledge.active()
    if active in (None, bundle.fingerprint):
        return True
    held = {space.name: space.n_records for space in knowledge.namespaces()}
    own, theirs = held.get(bundle.fingerprint, 0), held.get(str(active), 0)
    if own >= settings.coverage * theirs:
        return True
    _log.warning(
        "Servers go on with namespace %s, which holds %d users; this one holds %d, and a roll-out needs %.0f%% of them. Give "
        "the histories of all users, or a lower coverage.", str(active)[:12], theirs, own, 100 * settings.coverage,
    )  # fmt: skip
    return False


def _remove_longer(bundle: Bundle, knowledge: Store, rows: Mapping[str, Past]) -> None:
    raws = knowledge.get_many(list(rows), bundle.fingerprint)
    found = [(user, decode(raw)) for user, raw in zip(rows, raws)]
    gone = [user for user, held in found if isinstance(held, Record) and held.history_length > rows[user].length]
    if gone:
        knowledge.forget(gone, histories=False)


def _work(bundle: Bundle, knowledge: Store, memo: Memo, settings: NearlineSettings, at_ms: int, mapper: Mapper) -> Work:
    def needs(raw: bytes | None, past: Past) -> str | None:
        return due(raw, past, bundle, at_ms)

    def restamp(raw: bytes, past: Past) -> bytes:
        return _restamped(raw, past, at_ms, settings.ttl_s)

    answer = partial(_answer, bundle, at_ms, settings.ttl_s)
    return Work(bundle, knowledge, memo, settings.positions, needs, restamp, answer, mapper)


def _answer(bundle: Bundle, at_ms: int, ttl_s: int, numbered: tuple[int, list[Row]]) -> tuple[int, list[bytes] | str]:
    """Make the records of one batch, or say why that failed; this is what runs on other machines."""
    number, batch = numbered
    try:
        return number, records(bundle, batch, at_ms, ttl_s)
    except (RetouchError, RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
        return number, f"{type(error).__name__}: {error}"


def _restamped(raw: bytes, past: Past, at_ms: int, ttl_s: int) -> bytes:
    """Return a remembered record as this user's."""
    found = decode(raw)
    assert isinstance(found, Record)  # what is remembered was checked
    hashed, tail = history_hash(past.items), tail_hash(past.items)
    return encode(
        replace(
            found, history_length=past.length, history_hash=hashed, computed_at_ms=at_ms, ttl_s=ttl_s, tail_hash=tail
        )
    )


def _now_ms() -> int:
    return int(time.time() * 1000)


# ---------------------------------------------------------------- for as long as a shop runs


def watch(
    bundle: Bundle,
    knowledge: Store,
    settings: NearlineSettings | None = None,
    *,
    stop: threading.Event,
    limit: int = 1000,
    activate: bool = True,
    counted: Callable[[Done, float], None] | None = None,
) -> Iterator[Done]:
    """Keep the records of all users of a store up to date, until told to stop.

    First all users are looked at, then those whose history changes, and from time to time all of them again, for
    records that grew old. When a look at all has covered enough of them, and servers read another namespace, this one
    is rolled out, once: a rollback afterwards stays.

    Args:
        bundle: Opened with its language model.
        knowledge: Where histories come from and records go.
        settings: Sizes and times.
        stop: Ends the watch after the users in work.
        limit: Most users of one look.
        activate: Whether a new namespace is rolled out.
        counted: Told of what each look did, and of the seconds that it took.

    Yields:
        What was done, after each look that found somebody. While the store is down nothing is done or lost.
    """
    settings = settings or NearlineSettings()
    memo = Memo(bundle, knowledge if settings.remember else None, settings.memo_entries)
    position, whole, sweeping, next_sweep = 0, Done(), True, 0.0
    while not stop.is_set():
        page, done, begin = list[tuple[int, str]](), Done(), time.monotonic()
        try:
            if not sweeping and time.monotonic() >= next_sweep:
                position, whole, sweeping = 0, Done(), True
            page = knowledge.changed(position, limit)
            done = _page(bundle, knowledge, settings, memo, [user for _, user in page])
            position, whole = page[-1][0] if page else position, whole + done
            if sweeping and len(page) < limit:  # not at an empty page, which a busy shop never has
                sweeping, next_sweep = False, time.monotonic() + settings.sweep_s
                activate = activate and not _flip(bundle, knowledge, settings, whole)
        except StoreDown as error:
            _log.warning("nearline waits: %s", error)
            done = Done()
        if done.users:
            if counted is not None:
                counted(done, time.monotonic() - begin)
            yield done
        if len(page) < limit:
            stop.wait(settings.poll_s)


def _page(bundle: Bundle, knowledge: Store, settings: NearlineSettings, memo: Memo, users: Sequence[str]) -> Done:
    names = list(dict.fromkeys(users))
    pasts = {user: past for user, past in zip(names, knowledge.histories(names)) if past is not None}
    return refresh(bundle, knowledge, pasts, settings, memo=memo, own=True) if pasts else Done()


def _flip(bundle: Bundle, knowledge: Store, settings: NearlineSettings, whole: Done) -> bool:
    """Roll out after a look at all users, if enough are covered; say whether servers read this bundle's records."""
    if knowledge.active() == bundle.fingerprint:
        return True
    if not whole.covered or whole.coverage < settings.coverage:
        _log.warning("%.1f%% of the users have a record; a roll-out needs %.0f%%.", 100 * whole.coverage,
                     100 * settings.coverage)  # fmt: skip
        return False
    knowledge.activate(bundle.fingerprint)
    return True
