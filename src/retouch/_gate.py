"""What a server of ours refuses before anything is computed: who is not let in, who asks too often, bodies that nobody needs.

Plain ASGI, so that a body is never read further than it is allowed to be. What is wrong with a body is said in a sentence.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from .settings import Settings, setting

__all__ = ["Gate", "Limits", "depth", "sentence", "shown"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN = ("/health", "/ready")
_CLIENTS = 10_000
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+"|(".*)', re.DOTALL)
"""A text, or one without an end and all that follows: no quote is tried twice, so time grows as the body does."""
_BRACKETS = re.compile(rb"[\[\]{}]")


@dataclass(frozen=True)
class Limits(Settings):
    """What one server takes."""

    body_kib: int = setting(64, "Largest body of a request, KiB.", ge=1)
    n_deep: int = setting(8, "How deep a body's lists and objects may lie in one another.", ge=1)
    n_in_flight: int = setting(64, "Requests that are worked on at once.", ge=1)
    rate_per_s: float = setting(0.0, "Requests a second of one client in the long run; 0: any number.", ge=0)
    body_s: float = setting(5.0, "Time for a body to arrive, s.", gt=0)


class Gate:
    """Let requests through that keep the limits, and answer the others.

    Args:
        app: What is behind it.
        limits: The limits.
        token: What a client must send as ``Authorization: Bearer …``; empty: nothing.
        refused: Told of each refusal by its status.
    """

    def __init__(self, app: App, limits: Limits, token: str = "", refused: Callable[[int], None] | None = None) -> None:
        self.app, self.limits, self.token = app, limits, token.encode()
        self.refused = refused or (lambda status: None)
        self.in_flight = 0
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self.app(scope, receive, send)
            return
        try:
            self._let_in(scope)
            if scope["method"] == "POST":
                await self._posted(scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except _Refused as refusal:
            self.refused(refusal.status)
            await _reply(send, refusal)

    def _let_in(self, scope: Scope) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self.token and not hmac.compare_digest(given, b"Bearer " + self.token):
            raise _Refused(
                401, "This server wants a token: Authorization: Bearer TOKEN.", {"WWW-Authenticate": "Bearer"}
            )
        if self.limits.rate_per_s and (wait := self._too_often(str((scope.get("client") or ("",))[0]))):
            _busy(f"More than {self.limits.rate_per_s:g} requests a second. Wait a moment.", wait)

    def _too_often(self, client: str) -> float:
        """Take one from the client's bucket; return how long it has to wait where it is empty."""
        now, rate = time.monotonic(), self.limits.rate_per_s
        most = max(1.0, rate)
        held, at = self._buckets.pop(client, (most, now))
        held = min(most, held + (now - at) * rate)
        enough = held >= 1
        self._buckets[client] = (held - enough, now)
        while len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if enough else (1 - held) / rate

    async def _posted(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.in_flight >= self.limits.n_in_flight:
            _busy(f"{self.limits.n_in_flight} requests are being worked on. Ask again in a moment.", 1)
        self.in_flight += 1
        try:
            body = await self._body(scope, receive)
            _check(body, self.limits.n_deep)
            await self.app(scope, _again(body, receive), send)
        finally:
            self.in_flight -= 1

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        most = self.limits.body_kib * 1024
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and (len(said) > 18 or int(said) > most):
            self._too_large()
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(self.limits.body_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Refused(400, "The connection was closed before the whole body had arrived.")
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if size > most:
                        self._too_large()
        except TimeoutError:
            raise _Refused(408, f"The body did not arrive within {self.limits.body_s:g} s.") from None
        return b"".join(parts)

    def _too_large(self) -> NoReturn:
        raise _Refused(413, f"The body is larger than {self.limits.body_kib} KiB. Send less at once.")


class _Refused(Exception):
    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers or {}


def _busy(sentence: str, wait_s: float) -> NoReturn:
    raise _Refused(429, sentence, {"Retry-After": str(max(1, math.ceil(wait_s)))})


def depth(body: bytes) -> int:
    """Return how deep lists and objects of a JSON text lie in one another; what stands in strings does not count.

    Example:
        >>> depth(b'{"a": ["[[["]}')
        2
    """
    at = most = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub(rb"\1", body)):
        at += 1 if bracket in b"[{" else -1
        most = max(most, at)
    return most


def _check(body: bytes, most: int) -> None:
    if (deep := depth(body)) > most:
        raise _Refused(422, f"The body's lists and objects lie {deep} deep in one another; at most {most} are read.")
    try:
        json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and numbers of thousands of digits
        raise _Refused(422, f"The body is no JSON that can be read: {error}.") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _again(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read once more, then whatever comes."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _reply(send: Send, refusal: _Refused) -> None:
    body = json.dumps({"error": str(refusal)}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


# ---------------------------------------------------------------- in words


def sentence(errors: Sequence[Mapping[str, Any]]) -> str:
    """Say the first thing that is wrong with a body, and how many others there are."""
    first = errors[0]
    where = _where([part for part in first["loc"] if part != "body"])
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where} is no field of this request; see /docs.{more}"
    if isinstance(first.get("input"), bytes):
        return "The body was not sent as JSON: add the header content-type: application/json."
    if first["type"] == "missing":
        return f"{where} is missing; see /docs.{more}"
    told = str(first["msg"]).removeprefix("Input ")
    return f"{where}: {told[:1].lower() + told[1:]}; got {shown(first.get('input'))}.{more}"


def _where(parts: Sequence[str | int]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "The body"


def shown(value: object) -> str:
    """Show a value of the outside, short: a number may have a million digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
