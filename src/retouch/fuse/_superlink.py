"""The cloud's SuperLink with a door: from other machines it answers edges alone.

Flower serves its Fleet API (edges), its Control API (who may join, which program runs) and its Runtime API at one address,
and in version 1.41 asks for keys at the first alone. So a request for anything else is answered only where both ends of
the connection lie on this machine. Run as ``python -m retouch.fuse._superlink HOST``, with the options of
``flower-superlink`` behind it, whose own ``--host`` must be 127.0.0.1.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]

__all__ = ["Door", "is_loopback", "main", "sockets"]

_OWN = "127.0.0.1"
_EDGES = re.compile("/v1/fleet/[a-z-]+")
_REFUSED = (
    b"Only edges may ask from another machine. Do this on the machine of the SuperLink, or through an SSH tunnel.\n"
)


class Door:
    """Pass on what edges ask, and whatever comes from this machine; refuse the rest."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        kind = scope["type"]
        if kind == "lifespan" or _is_here(scope) or (kind == "http" and _EDGES.fullmatch(scope["path"])):
            await self.app(scope, receive, send)
        elif kind == "http":
            headers = [
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"content-length", str(len(_REFUSED)).encode()),
            ]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSED})
        else:
            await send({"type": "websocket.close", "code": 1008})


def _is_here(scope: MutableMapping[str, Any]) -> bool:
    ends = (scope.get("client"), scope.get("server"))
    return all(end is not None and is_loopback(str(end[0])) for end in ends)


def is_loopback(address: str) -> bool:
    """Say whether an address, in numbers, is one that only this machine can reach."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def sockets(host: str, port: int) -> list[socket.socket]:
    """Listen where edges come from, and on this machine, where the SuperLink's own programs do."""
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    both = family == socket.AF_INET6 and host == "::"
    found = [socket.create_server(place[:2], family=family, dualstack_ipv6=both)]  # type: ignore[arg-type]
    if host not in ("0.0.0.0", "::") and place[0] != _OWN:
        found.append(socket.create_server((_OWN, port)))
    return found


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is ended."""
    import uvicorn
    from flwr.supercore.http_logging import get_uvicorn_log_config
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
    from flwr.superlink.main import create_app

    host, *rest = arguments
    sys.argv = ["flower-superlink", *rest]
    config = _parse_superlink_lifespan_config()
    how = uvicorn.Config(
        Door(create_app(config, SuperLinkLifespan)), host=_OWN, port=config.port, ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile, log_config=get_uvicorn_log_config(logging.INFO),
        proxy_headers=False,  # a header must not say where a request comes from
    )  # fmt: skip
    uvicorn.Server(how).run(sockets=sockets(host, config.port))


if __name__ == "__main__":
    main(sys.argv[1:])
