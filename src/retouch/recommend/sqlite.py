"""The store on one machine: SQLite with a write-ahead log, one writer and many readers."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ..errors import StoreDown, UserError
from .record import order
from .stores import Namespace, Past

__all__ = ["SQLite"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    namespace TEXT, user TEXT, length INTEGER, at INTEGER, record BLOB, PRIMARY KEY (namespace, user)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pointer (one INTEGER PRIMARY KEY CHECK (one = 1), active TEXT, previous TEXT);
INSERT OR IGNORE INTO pointer VALUES (1, NULL, NULL);
CREATE TABLE IF NOT EXISTS histories (
    user TEXT PRIMARY KEY, items TEXT, length INTEGER, changed INTEGER
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS changes ON histories (changed);
CREATE TABLE IF NOT EXISTS told (key TEXT PRIMARY KEY, at INTEGER) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS told_at ON told (at);
CREATE TABLE IF NOT EXISTS remembered (key BLOB PRIMARY KEY, value BLOB, at INTEGER) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS remembered_at ON remembered (at);
DROP TABLE IF EXISTS memo;
CREATE TABLE IF NOT EXISTS counter (one INTEGER PRIMARY KEY CHECK (one = 1), last INTEGER);
INSERT OR IGNORE INTO counter SELECT 1, COALESCE(MAX(changed), 0) FROM histories;
"""
_PUT = """
INSERT INTO records VALUES (?, ?, ?, ?, ?) ON CONFLICT (namespace, user) DO UPDATE
SET length = excluded.length, at = excluded.at, record = excluded.record
WHERE (excluded.length, excluded.at) > (records.length, records.at)
"""
K = TypeVar("K", str, bytes)
_MANY = 500
"""Values in one statement; SQLite allows 999 in its oldest builds."""
KEPT = 1000
"""Latest items of a history that are kept."""
TOLD_S = 86_400
"""For how long the key of events is remembered."""
MEMO_S = 30 * 86_400
"""For how long records are remembered by what they were made from."""


class SQLite:
    """Keep knowledge in a file.

    Args:
        path: The file; it and its folder are made.
        timeout_s: How long a call waits for a writer.
        look_s: The same for reading records and histories; None: as long.

    Raises:
        StoreDown: The file cannot be opened or is no such database.
    """

    def __init__(self, path: Path, timeout_s: float = 5.0, look_s: float | None = None) -> None:
        self._path, self._timeout_s, self._look_s = Path(path), timeout_s, timeout_s if look_s is None else look_s
        self._own = threading.local()
        self._open: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        with self._named():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = self._connection()
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)

    def get_many(self, users: Sequence[str], namespace: str | None = None) -> list[bytes | None]:
        """Return each user's record in one namespace, by default the active one."""
        with self._looking() as c:
            name = self._active(c) if namespace is None else namespace
            if name is None:
                return [None] * len(users)
            found: dict[str, bytes] = {}
            for part in _parts(users):
                marks = ",".join("?" * len(part))
                query = f"SELECT user, record FROM records WHERE namespace = ? AND user IN ({marks})"
                found.update(c.execute(query, (name, *part)).fetchall())
        return [found.get(user) for user in users]

    def put_many(self, records: Mapping[str, bytes], namespace: str) -> int:
        """Write records, each only over one that it supersedes; all in one transaction."""
        rows = [(namespace, user, *order(raw), raw) for user, raw in records.items()]
        with self._writing() as c:
            before = c.total_changes
            c.executemany(_PUT, rows)
            return c.total_changes - before

    def active(self) -> str | None:
        """Return the namespace that servers read."""
        with self._named():
            return self._active(self._connection())

    def namespaces(self) -> list[Namespace]:
        """List all namespaces."""
        with self._reading() as c:
            name = self._active(c)
            rows = c.execute("SELECT namespace, COUNT(*) FROM records GROUP BY namespace ORDER BY namespace").fetchall()
        return [Namespace(n, count, n == name) for n, count in rows]

    def activate(self, namespace: str) -> None:
        """Let servers read another namespace; the one before is remembered."""
        with self._writing() as c:
            if self._active(c) != namespace:
                c.execute("UPDATE pointer SET previous = active, active = ?", (namespace,))

    def rollback(self) -> str:
        """Activate the namespace that was active before."""
        with self._writing() as c:
            previous = c.execute("SELECT previous FROM pointer").fetchone()[0]
            if previous is None:
                raise UserError("No namespace was active before this one; there is nothing to go back to.")
            c.execute("UPDATE pointer SET previous = active, active = ?", (previous,))
        return str(previous)

    def purge(self, namespace: str) -> int:
        """Remove a namespace that is not active."""
        with self._writing() as c:
            if self._active(c) == namespace:
                raise UserError(f"The namespace {namespace} is active. Activate another before purging it.")
            c.execute("UPDATE pointer SET previous = NULL WHERE previous = ?", (namespace,))
            return c.execute("DELETE FROM records WHERE namespace = ?", (namespace,)).rowcount

    def append(self, events: Iterable[tuple[str, str]], key: str = "") -> int:
        """Add items to histories, in order; all of one key or, where it was told before, none."""
        with self._writing() as c:
            count = 0
            if key and not self._is_told_first(c, key):
                return 0
            for user, item in events:
                row = c.execute("SELECT items, length FROM histories WHERE user = ?", (user,)).fetchone()
                items, length = (json.loads(row[0]), row[1]) if row else ([], 0)
                self._set(c, user, Past((*items, item), length + 1))
                count += 1
        return count

    def put_histories(self, histories: Mapping[str, Past], *, replace: bool = False) -> None:
        """Set histories, unless a longer one is known, or whatever is known."""
        with self._writing() as c:
            for user, past in histories.items():
                row = c.execute("SELECT items, length FROM histories WHERE user = ?", (user,)).fetchone()
                if replace and row != (json.dumps(past.items[-KEPT:]), past.length):
                    c.execute("DELETE FROM records WHERE user = ?", (user,))
                    self._set(c, user, past)
                elif row is None or row[1] < past.length:
                    self._set(c, user, past)

    def forget(self, users: Sequence[str], *, histories: bool = True) -> int:
        """Remove users' records in all namespaces, and their histories."""
        removed = 0
        with self._writing() as c:
            for part in _parts(users):
                marks = ",".join("?" * len(part))
                removed += c.execute(f"DELETE FROM records WHERE user IN ({marks})", part).rowcount
                if histories:
                    c.execute(f"DELETE FROM histories WHERE user IN ({marks})", part)
        return removed

    def histories(self, users: Sequence[str]) -> list[Past | None]:
        """Return users' histories."""
        found: dict[str, Past] = {}
        with self._looking() as c:
            for part in _parts(users):
                query = f"SELECT user, items, length FROM histories WHERE user IN ({','.join('?' * len(part))})"
                found.update((u, Past(tuple(json.loads(i)), n)) for u, i, n in c.execute(query, part))
        return [found.get(user) for user in users]

    def changed(self, after: int, limit: int = 1000) -> list[tuple[int, str]]:
        """Return users whose history has changed since, in order of change."""
        with self._named():
            query = "SELECT changed, user FROM histories WHERE changed > ? ORDER BY changed LIMIT ?"
            return self._connection().execute(query, (after, limit)).fetchall()

    def memo(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return what was remembered under keys."""
        found: dict[bytes, bytes] = {}
        with self._reading() as c:
            for part in _parts(keys):
                query = f"SELECT key, value FROM remembered WHERE key IN ({','.join('?' * len(part))})"
                found.update(c.execute(query, part).fetchall())
        return [found.get(key) for key in keys]

    def remember(self, entries: Mapping[bytes, bytes]) -> None:
        """Remember bytes under keys, for 30 days."""
        now = int(time.time())
        with self._writing() as c:
            c.execute("DELETE FROM remembered WHERE at < ?", (now - MEMO_S,))
            rows = [(key, value, now) for key, value in entries.items()]
            c.executemany("INSERT OR REPLACE INTO remembered VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            for connection in self._open:
                connection.close()
            self._open.clear()
        self._own = threading.local()

    def _set(self, c: sqlite3.Connection, user: str, past: Past) -> None:
        # counted beside the histories: a number that a forgotten user had is never given again
        c.execute("UPDATE counter SET last = last + 1")
        number = c.execute("SELECT last FROM counter").fetchone()[0]
        row = (user, json.dumps(past.items[-KEPT:]), past.length, number)
        c.execute("INSERT OR REPLACE INTO histories VALUES (?, ?, ?, ?)", row)

    def _is_told_first(self, c: sqlite3.Connection, key: str) -> bool:
        now = int(time.time())
        c.execute("DELETE FROM told WHERE at < ?", (now - TOLD_S,))
        return c.execute("INSERT OR IGNORE INTO told VALUES (?, ?)", (key, now)).rowcount == 1

    def _active(self, c: sqlite3.Connection) -> str | None:
        name = c.execute("SELECT active FROM pointer").fetchone()[0]
        return None if name is None else str(name)

    def _connection(self, timeout_s: float | None = None) -> sqlite3.Connection:
        """Return this thread's connection of some patience: SQLite's may not be shared."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        held: dict[float, sqlite3.Connection] = vars(self._own).setdefault("held", {})
        if (found := held.get(timeout_s)) is None:
            found = sqlite3.connect(
                self._path, timeout=timeout_s, isolation_level=None, check_same_thread=False
            )  # closed by another thread
            found.execute("PRAGMA synchronous = NORMAL")
            held[timeout_s] = found
            with self._lock:
                self._open.append(found)
        return found

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Read one state, even if a writer commits in between."""
        with self._named(), _transaction(self._connection(), "BEGIN") as connection:
            yield connection

    @contextmanager
    def _looking(self) -> Iterator[sqlite3.Connection]:
        """Read one state for somebody who waits for an answer."""
        with self._named(), _transaction(self._connection(self._look_s), "BEGIN") as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._named(), _transaction(self._connection(), "BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreDown(f"The store {self._path} does not answer: {error}. See whether the file is a knowledge "
                            "store that can be written, and whether another process holds it.") from error  # fmt: skip


@contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[sqlite3.Connection]:
    connection.execute(begin)
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # of a full disk SQLite has gone back by itself
            connection.execute("ROLLBACK")
        raise


def _parts(keys: Sequence[K]) -> Iterator[Sequence[K]]:
    for start in range(0, len(keys), _MANY):
        yield keys[start : start + _MANY]
