"""The application, its routes and the process: FastAPI on uvicorn."""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from .. import __version__
from ..errors import RetouchError, UserError

try:
    import uvicorn
    from fastapi import FastAPI, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, RedirectResponse
    from starlette.exceptions import HTTPException

    from .._gate import Limits, sentence
    from . import _wire as wire
    from ._adapters import Adapters
    from ._bundles import Bundles
    from ._folder import Folder
    from ._guard import Guard, is_loopback
    from ._job import status_of
    from ._slims import Slims
    from ._workbench import Workbench
except ImportError as error:
    raise UserError("The page needs FastAPI. Install it with: pip install 'retouch[serve]'") from error

__all__ = ["Folder", "Workbench", "app", "is_loopback", "listening", "run"]

LIMITS = Limits(body_kib=2048, n_in_flight=8)
_SCRIPTS = ("page.js", "work.js", "draw.js", "edit.js", "slim.js", "fuse.js", "recommend.js")
_FILES = {
    "": ("page.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    **{name: (name, "text/javascript") for name in _SCRIPTS},
}
_FRAMED = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
"""What a report may do in its frame: be looked at."""


def app(bench: Workbench, token: str, *, host: str = "127.0.0.1", port: int = 8412) -> FastAPI:
    """Build the application.

    Args:
        bench: What does the work.
        token: What requests to the API must send.
        host: Where it listens, by which it must be called.
        port: Where it listens.

    Returns:
        An ASGI application.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        bench.end()

    made = FastAPI(title="Retouch", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _page(made)
    _api(made, bench)
    _reports(made, bench, token)
    _errors(made)
    made.add_middleware(Guard, host=host, port=port, token=token, limits=LIMITS)
    return made


def _page(made: FastAPI) -> None:
    def served(name: str, kind: str) -> Callable[[], Response]:
        data = (files("retouch.web") / "page" / name).read_bytes()
        return lambda: Response(data, media_type=f"{kind}; charset=utf-8")

    for path, (name, kind) in _FILES.items():
        made.add_api_route(f"/{path}", served(name, kind), methods=["GET"], include_in_schema=False)
    made.add_api_route("/docs", lambda: RedirectResponse("/openapi.json"), methods=["GET"], include_in_schema=False)


def _api(made: FastAPI, bench: Workbench) -> None:
    slims, bundles = Slims(bench.folder, bench.desk), Bundles(bench.folder, bench.desk, bench.source_of)
    adapters = Adapters(bench.folder, bench.desk, bench.source_of)
    told = (bench.state, bench.models, bench.methods, bench.changes, bench.change, bench.job, slims.slims, slims.slim,
            bundles.bundles, bundles.bundle, bundles.titles, adapters.adapters)  # fmt: skip
    done = (bench.ask, bench.cancel, slims.classify)
    begun = (bench.open, bench.edit, bench.apply, bench.undo, bundles.open_bundle, bundles.recommend, adapters.compare)
    for kind, status, routes in (("GET", 200, told), ("POST", 200, done), ("POST", 202, begun)):
        for route in routes:
            made.add_api_route(f"/api/{route.__name__}", route, methods=[kind], status_code=status)


def _reports(made: FastAPI, bench: Workbench, token: str) -> None:
    """Show reports in a frame, which can send no token: each has an address that nobody can make up."""

    def signed(path: str) -> str:
        return hmac.new(token.encode(), path.encode(), "sha256").hexdigest()

    def reports() -> list[wire.Page]:
        """List the HTML reports, the newest first."""
        found = bench.folder.reports()
        return [wire.Page(path=p, url=f"/report?path={quote(p)}&ticket={signed(p)}") for p in found]

    def report(path: str, ticket: str) -> Response:
        if not hmac.compare_digest(signed(path), ticket) or path not in bench.folder.reports():
            raise HTTPException(404, "There is no such report")
        data = bench.folder.inside(path).read_bytes()
        return Response(data, media_type="text/html; charset=utf-8", headers={"content-security-policy": _FRAMED})

    made.add_api_route("/api/reports", reports, methods=["GET"])
    made.add_api_route("/report", report, methods=["GET"], include_in_schema=False)


def _errors(made: FastAPI) -> None:
    def told(status: int, text: str) -> JSONResponse:
        return JSONResponse({"error": text}, status)

    async def invalid(_: Any, error: RequestValidationError) -> JSONResponse:
        return told(422, sentence(error.errors()))

    async def ours(_: Any, error: RetouchError) -> JSONResponse:
        return told(status_of(error), str(error))

    async def other(_: Any, error: HTTPException) -> JSONResponse:
        return told(error.status_code, f"{error.detail}. See /docs.")

    async def broken(_: Any, error: Exception) -> JSONResponse:
        return told(500, "Retouch failed at this; the server's log says why.")

    kinds = {RequestValidationError: invalid, RetouchError: ours, HTTPException: other, Exception: broken}
    for kind, answer in kinds.items():
        made.add_exception_handler(kind, answer)


# ---------------------------------------------------------------- the process


def run(bench: Workbench, listener: socket.socket, host: str, ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve the page until the process is told to end.

    Args:
        bench: What does the work.
        listener: From `listening`.
        host: Where it listens, as the user named it.
        ready: Told the page's address, token included, when it can be opened.
    """
    port, token = listener.getsockname()[1], secrets.token_urlsafe(24)
    made = app(bench, token, host=host, port=port)
    config = uvicorn.Config(
        made, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5
    )
    shown = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{port}/#{token}")
    with suppress(KeyboardInterrupt):  # how it is ended
        uvicorn.Server(config).run(sockets=[listener])


def listening(host: str = "127.0.0.1", port: int = 8412) -> socket.socket:
    """Take an address before any work; port 0 is any free one.

    Raises:
        UserError: It cannot be taken.
    """
    if not 0 <= port < 65_536:
        raise UserError(f"--port must lie between 0 and 65535; got {port}.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"Nothing can listen at {host}:{port}: {error.strerror}. Choose another --port.") from error
