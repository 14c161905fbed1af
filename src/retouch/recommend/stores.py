"""Where knowledge is kept between the nearline writer and the servers: one contract, two stores.

Records live in namespaces, one for each bundle. Servers read the active one; activating another is one step that can
be taken back. A record replaces another only if it knows more of the history, or as much and is newer, so replayed and
reordered writes change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import urlsplit

from ..errors import UserError

__all__ = ["Namespace", "Past", "Store", "open_store"]


@dataclass(frozen=True)
class Namespace:
    """One bundle's records.

    Attributes:
        name: Fingerprint of the bundle.
        n_records: How many users it holds.
        active: Whether servers read it.
    """

    name: str
    n_records: int
    active: bool


@dataclass(frozen=True)
class Past:
    """What a store knows of a user's history.

    Attributes:
        items: The latest raw ids, oldest first.
        length: How many items the user has in all.
    """

    items: tuple[str, ...]
    length: int


@runtime_checkable
class Store(Protocol):
    """What every store can do. Every method raises `StoreDown` when the store does not answer."""

    def get_many(self, users: Sequence[str], namespace: str | None = None) -> list[bytes | None]:
        """Return each user's record in one namespace, by default the active one; all from the same."""
        ...

    def put_many(self, records: Mapping[str, bytes], namespace: str) -> int:
        """Write records of users, each only over one that it supersedes; return how many were written."""
        ...

    def active(self) -> str | None:
        """Return the namespace that servers read."""
        ...

    def namespaces(self) -> list[Namespace]:
        """List all namespaces."""
        ...

    def activate(self, namespace: str) -> None:
        """Let servers read another namespace, at once for all of them; the one before is remembered."""
        ...

    def rollback(self) -> str:
        """Activate the namespace that was active before, and return it."""
        ...

    def purge(self, namespace: str) -> int:
        """Remove a namespace that is not active; return how many records it held."""
        ...

    def append(self, events: Iterable[tuple[str, str]], key: str = "") -> int:
        """Add (user, raw item id) to users' histories, in order; return how many.

        With a key, the same events under the same key are added once, for a day: a caller may send them again.
        """
        ...

    def put_histories(self, histories: Mapping[str, Past], *, replace: bool = False) -> None:
        """Set users' histories, unless a longer one is known.

        With `replace` they stand whatever is known, and users whose history is another now lose their records.
        """
        ...

    def forget(self, users: Sequence[str], *, histories: bool = True) -> int:
        """Remove users' records in all namespaces, and their histories; return how many records there were."""
        ...

    def histories(self, users: Sequence[str]) -> list[Past | None]:
        """Return users' histories."""
        ...

    def changed(self, after: int, limit: int = 1000) -> list[tuple[int, str]]:
        """Return users whose history has changed since, as (position, user) in order of change."""
        ...

    def memo(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return what was remembered under keys."""
        ...

    def remember(self, entries: Mapping[bytes, bytes]) -> None:
        """Remember bytes under keys."""
        ...

    def close(self) -> None:
        """Release what is held."""
        ...


def open_store(
    url: str, *, timeout_s: float | None = None, look_s: float | None = None, existing: bool = False
) -> Store:
    """Open a store by its address.

    Args:
        url: ``sqlite:PATH``, ``redis://HOST:PORT/NUMBER`` or ``rediss://…``.
        timeout_s: How long a call may take; by default 5 s with SQLite and 1 s with Redis.
        look_s: How long reading records and histories may take, for servers; by default the same.
        existing: Do not make an empty SQLite file where there is none.

    Raises:
        UserError: The address is not understood, a package is missing, or there is no such file and there should be.
        StoreDown: The store cannot be reached.
    """
    kind = urlsplit(url).scheme
    if kind == "sqlite":
        from .sqlite import SQLite

        path = url.removeprefix("sqlite:").removeprefix("//")
        if not path:
            raise UserError("sqlite: needs a path: sqlite:knowledge.db")
        if existing and not Path(path).is_file():
            raise UserError(f"There is no store at {path}. Check the path, or make one: retouch recommend nearline.")
        return SQLite(Path(path), timeout_s or 5.0, look_s)
    if kind in ("redis", "rediss", "unix"):
        from .redis import Redis

        return Redis(url, timeout_s or 1.0, look_s)
    raise UserError(f"The store {url!r} is not understood. Allowed: sqlite:PATH, redis://HOST:PORT/NUMBER, rediss://…")
