"""Who is let in: this page, opened by whoever started the server, and no other site.

The page itself is public text. Everything under ``/api`` needs the token of this start, which stands in the address that
the command line prints, behind the ``#``: a browser keeps that part to itself. A request that came by another name than
the server's own (DNS rebinding) or from another site's page is refused before anything is read.
"""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

from .._gate import App, Gate, Limits, Message, Receive, Scope, Send

__all__ = ["Guard", "is_loopback"]

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "frame-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class Guard:
    """Let requests of our own page through, and answer the others.

    Args:
        app: What is behind it.
        host: Where the server listens.
        port: Where the server listens.
        token: What requests to ``/api`` send as ``Authorization: Bearer …``.
        limits: How large a body may be, and how many are worked on at once.
    """

    def __init__(self, app: App, host: str, port: int, token: str, limits: Limits) -> None:
        self.app, self.api = app, Gate(app, limits, token)
        self.host, self.port, self.alone = host.lower(), port, is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _adding(send)
        if problem := self._problem(scope):
            await JSONResponse({"error": problem}, 403)(scope, receive, send)
        else:
            await (self.api if scope["path"].startswith("/api/") else self.app)(scope, receive, send)

    def _problem(self, scope: Scope) -> str:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host):
            return f"This server is not called {host!r}. Use the address that retouch web printed."
        if origin is not None and origin != f"http://{host}":
            return f"Pages of {origin} may not ask this server."
        if scope["path"] != "/" and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return "Pages of other sites may not ask this server."
        return ""

    def _is_ours(self, host: str) -> bool:
        """Know our own address; a number cannot be bent to another machine's page, a name can."""
        try:
            parts = urlsplit(f"//{host}")
            name, port = parts.hostname or "", parts.port or 80
        except ValueError:
            return False
        if "@" in host or parts.netloc != host or port != self.port:
            return False
        return name in (self.host, "localhost") or (is_loopback(name) if self.alone else _is_number(name))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    return host == "localhost" or (_is_number(host) and ipaddress.ip_address(host).is_loopback)


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _adding(send: Send) -> Send:
    """Add our headers to an answer that does not bring its own."""

    async def added(message: Message) -> None:
        if message["type"] == "http.response.start":
            given: list[Any] = list(message.get("headers", ()))
            names = {name.lower() for name, _ in given}
            ours = [(n.encode(), v.encode()) for n, v in _HEADERS.items() if n.encode() not in names]
            message = {**message, "headers": given + ours}
        await send(message)

    return added
