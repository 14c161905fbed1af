"""The store beyond one machine: Redis or Valkey, with the same records as SQLite."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import StoreDown, UserError
from .record import order
from .sqlite import KEPT, MEMO_S, TOLD_S
from .stores import Namespace, Past

__all__ = ["Redis"]

# history length and time stand at bytes 21-24 and 33-40 of a record, least significant first
_PUT = """
local old = redis.call('GET', KEYS[1])
if old and #old >= 40 then
    local length, at = struct.unpack('<I4', old, 21), struct.unpack('<I8', old, 33)
    local new_length, new_at = tonumber(ARGV[2]), tonumber(ARGV[3])
    if length > new_length or (length == new_length and at >= new_at) then return 0 end
end
redis.call('SET', KEYS[1], ARGV[1])
if tonumber(ARGV[4]) > 0 then redis.call('EXPIRE', KEYS[1], ARGV[4]) end
redis.call('SADD', KEYS[2], ARGV[5])
return 1
"""
_HISTORY = """
if KEYS[4] and not redis.call('SET', KEYS[4], 1, 'NX', 'EX', ARGV[6]) then return 0 end
local row = redis.call('GET', KEYS[1])
local items, length = {}, 0
if row then local past = cjson.decode(row); items = past.items; length = past.length end
if ARGV[1] ~= 'add' then
    if ARGV[1] == 'set' and row and length >= tonumber(ARGV[3]) then return 0 end
    items = cjson.decode(ARGV[2]); length = tonumber(ARGV[3])
else
    table.insert(items, ARGV[2]); length = length + 1
end
while #items > tonumber(ARGV[4]) do table.remove(items, 1) end
redis.call('SET', KEYS[1], cjson.encode({items = items, length = length}))
redis.call('ZADD', KEYS[2], redis.call('INCR', KEYS[3]), ARGV[5])
return 1
"""
_FLIP = """
local active = redis.call('HGET', KEYS[1], 'active')
local target = ARGV[1]
if target == '' then
    target = redis.call('HGET', KEYS[1], 'previous')
    if not target then return false end
elseif active == target then
    return target
end
if active then redis.call('HSET', KEYS[1], 'previous', active) end
redis.call('HSET', KEYS[1], 'active', target)
return target
"""
_GET = """
local name = ARGV[1]
if name == '' then name = redis.call('HGET', KEYS[1], 'active') end
if not name then return {} end
local keys = {}
for i = 2, #ARGV do keys[#keys + 1] = 'retouch:' .. name .. ':' .. ARGV[i] end
return redis.call('MGET', unpack(keys))
"""
POINTER, CHANGED, COUNTER = "retouch#pointer", "retouch#changed", "retouch#counter"
_MANY = 1000


class Redis:
    """Keep knowledge in Redis or Valkey.

    Args:
        url: ``redis://HOST:PORT/NUMBER``, ``rediss://…`` or ``unix://…``.
        timeout_s: How long one call may take.
        look_s: The same for reading records and histories; None: as long.

    Raises:
        UserError: The package redis is not installed.
        StoreDown: The server cannot be reached.
    """

    def __init__(self, url: str, timeout_s: float = 1.0, look_s: float | None = None) -> None:
        try:
            import redis
        except ImportError as error:
            raise UserError(
                "A Redis store needs the package redis. Install it with: pip install 'retouch[redis]'"
            ) from error
        self._url, self._failures = url, (redis.RedisError, OSError)
        with self._named():
            self._r = self._client(timeout_s, max(timeout_s, 1.0))
            self._looks = self._r if look_s is None else self._client(look_s, look_s)
            self._r.ping()
            self._put, self._history = self._script(_PUT), self._script(_HISTORY)
            self._flip, self._get = self._script(_FLIP), self._script(_GET)

    def get_many(self, users: Sequence[str], namespace: str | None = None) -> list[bytes | None]:
        """Return each user's record in one namespace, by default the active one."""
        found: list[bytes | None] = []
        with self._named():
            name = self.active() if namespace is None and len(users) > _MANY else namespace
            for start in range(0, len(users), _MANY):
                part = users[start : start + _MANY]
                got = self._get(keys=[POINTER], args=[name or "", *part], client=self._looks)
                found += got or [None] * len(part)
        return found

    def put_many(self, records: Mapping[str, bytes], namespace: str) -> int:
        """Write records, each only over one that it supersedes."""
        written = 0
        with self._named():
            for part in _parts(list(records.items())):
                pipe = self._r.pipeline(transaction=False)
                for user, raw in part:
                    ttl = 4 * int.from_bytes(raw[40:44], "little")
                    keys = [f"retouch:{namespace}:{user}", f"retouch#users:{namespace}"]
                    self._put(keys=keys, args=[raw, *order(raw), ttl, user], client=pipe)
                written += sum(pipe.execute())
        return written

    def active(self) -> str | None:
        """Return the namespace that servers read."""
        with self._named():
            return _text(self._r.hget(POINTER, "active"))

    def namespaces(self) -> list[Namespace]:
        """List all namespaces; records that have expired still count until they are purged."""
        with self._named():
            active = self.active()
            names = sorted(str(_text(k)).removeprefix("retouch#users:") for k in self._r.scan_iter("retouch#users:*"))
            return [Namespace(n, int(self._r.scard(f"retouch#users:{n}")), n == active) for n in names]

    def activate(self, namespace: str) -> None:
        """Let servers read another namespace; the one before is remembered."""
        with self._named():
            self._flip(keys=[POINTER], args=[namespace])

    def rollback(self) -> str:
        """Activate the namespace that was active before."""
        with self._named():
            name = _text(self._flip(keys=[POINTER], args=[""]))
        if name is None:
            raise UserError("No namespace was active before this one; there is nothing to go back to.")
        return name

    def purge(self, namespace: str) -> int:
        """Remove a namespace that is not active."""
        with self._named():
            if self.active() == namespace:
                raise UserError(f"The namespace {namespace} is active. Activate another before purging it.")
            if _text(self._r.hget(POINTER, "previous")) == namespace:
                self._r.hdel(POINTER, "previous")
            users = [str(_text(u)) for u in self._r.smembers(f"retouch#users:{namespace}")]
            for part in _parts(users):
                self._r.unlink(*(f"retouch:{namespace}:{user}" for user in part))
            self._r.unlink(f"retouch#users:{namespace}")
        return len(users)

    def append(self, events: Iterable[tuple[str, str]], key: str = "") -> int:
        """Add items to histories, in order; those of one key that were told before are left out one by one."""
        return self._histories((("add", user, item, 0) for user, item in events), key)

    def put_histories(self, histories: Mapping[str, Past], *, replace: bool = False) -> None:
        """Set histories, unless a longer one is known, or whatever is known."""
        kept = {user: Past(past.items[-KEPT:], past.length) for user, past in histories.items()}
        if replace:
            before = dict(zip(kept, self.histories(list(kept))))
            kept = {user: past for user, past in kept.items() if before[user] != past}
            self.forget(list(kept), histories=False)
        how = "replace" if replace else "set"
        self._histories((how, user, json.dumps(past.items), past.length) for user, past in kept.items())

    def forget(self, users: Sequence[str], *, histories: bool = True) -> int:
        """Remove users' records in all namespaces, and their histories."""
        removed = 0
        with self._named():
            names = [str(_text(k)).removeprefix("retouch#users:") for k in self._r.scan_iter("retouch#users:*")]
            for part in _parts(users):
                for name in names:
                    removed += int(self._r.unlink(*(f"retouch:{name}:{user}" for user in part)))
                    self._r.srem(f"retouch#users:{name}", *part)
                if histories:
                    self._r.unlink(*(f"retouch#history:{user}" for user in part))
                    self._r.zrem(CHANGED, *part)
        return removed

    def _histories(self, rows: Iterable[tuple[str, str, str, int]], key: str = "") -> int:
        count = 0
        with self._named():
            for part in _parts(list(enumerate(rows))):
                pipe = self._r.pipeline(transaction=False)
                for number, (how, user, value, length) in part:
                    keys = [f"retouch#history:{user}", CHANGED, COUNTER]
                    keys += [f"retouch#told:{key}:{number}"] if key else []
                    self._history(keys=keys, args=[how, value, length, KEPT, user, TOLD_S], client=pipe)
                count += sum(pipe.execute())
        return count

    def histories(self, users: Sequence[str]) -> list[Past | None]:
        """Return users' histories."""
        found: list[Past | None] = []
        with self._named():
            for part in _parts(users):
                for row in self._looks.mget([f"retouch#history:{user}" for user in part]):
                    past = json.loads(row) if row else None
                    found.append(Past(tuple(past["items"]), int(past["length"])) if past else None)
        return found

    def changed(self, after: int, limit: int = 1000) -> list[tuple[int, str]]:
        """Return users whose history has changed since, in order of change."""
        with self._named():
            rows = self._r.zrangebyscore(CHANGED, f"({after}", "+inf", start=0, num=limit, withscores=True)
        return [(int(score), str(_text(user))) for user, score in rows]

    def memo(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return what was remembered under keys."""
        with self._named():
            return list(self._r.mget([b"retouch#memo:" + key for key in keys])) if keys else []

    def remember(self, entries: Mapping[bytes, bytes]) -> None:
        """Remember bytes under keys, for 30 days."""
        with self._named():
            pipe = self._r.pipeline(transaction=False)
            for key, value in entries.items():
                pipe.set(b"retouch#memo:" + key, value, ex=MEMO_S)
            pipe.execute()

    def close(self) -> None:
        """Close all connections."""
        self._r.close()
        self._looks.close()

    def _client(self, timeout_s: float, connect_s: float) -> Any:
        """Open a client that tries once: a time limit that is kept, and nothing that is written twice."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        return redis.Redis.from_url(
            self._url, socket_timeout=timeout_s, socket_connect_timeout=connect_s, retry=Retry(NoBackoff(), 0),
            health_check_interval=30,
        )  # fmt: skip

    def _script(self, text: str) -> Callable[..., Any]:
        script: Callable[..., Any] = self._r.register_script(text)
        return script

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except self._failures as error:
            raise StoreDown(f"The store {_public(self._url)} does not answer: {error}. See whether the server runs and can be "
                            "reached from here.") from error  # fmt: skip


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def _parts(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), _MANY):
        yield rows[start : start + _MANY]


def _public(url: str) -> str:
    """Return an address without its password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
