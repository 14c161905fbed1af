"""The service: FastAPI on uvicorn, with no logic of its own.

It reads a question, asks the ladder, and writes the answer. What is refused is refused before anything is computed, with
a sentence that says why; questions of the same moment are computed together; a store that is down costs quality and no
answer; SIGTERM lets what is running end.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import StoreDown, UserError
from .answers import Answer, Request, check_id
from .ladder import Serving
from .stores import open_store

try:
    import uvicorn
    from fastapi import FastAPI, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    from .._gate import Gate, sentence
    from ._batching import Batcher, Late
    from ._limits import Limits
    from ._metrics import SHARED
    from ._service import Service
    from ._wire import Batch, Events, Question
except ImportError as error:
    raise UserError("The service needs FastAPI. Install it with: pip install 'retouch[serve]'") from error

if TYPE_CHECKING:
    from .bundle import Bundle
    from .stores import Store

__all__ = ["Limits", "app", "from_environment", "run"]

CONFIG = "RETOUCH_SERVE"
"""The environment variable by which `run` tells its workers what to serve."""
_POLL_S = 1.0
_PATIENCE = 10
_START_S = 120
"""How long a worker may be silent: opening a bundle takes its time, and a worker that is given up starts anew."""


def app(
    bundle: Bundle | Sequence[Bundle],
    store: Store | None = None,
    settings: Serving | None = None,
    *,
    limits: Limits | None = None,
    token: str = "",
    stock: Path | None = None,
    connect: Callable[[], Store] | None = None,
    threads: int = 0,
) -> FastAPI:
    """Build the application.

    Args:
        bundle: What answers; with several, the one whose namespace is active in the store, at first the first.
        store: Where knowledge and histories are; None: there are none.
        settings: How answers are made.
        limits: What is taken.
        token: What a client must send; empty: nothing.
        stock: A file of raw ids that nobody can have now; read again when it changes.
        connect: Opens the store where `store` is None, again and again until it succeeds.
        threads: Threads of torch; 0 leaves them.

    Returns:
        An ASGI application.
    """
    bundles = list(bundle) if isinstance(bundle, Sequence) else [bundle]
    service = Service(bundles, store, settings or Serving(), connect=connect, stock=stock)
    limits = limits or Limits()
    batcher = Batcher(service.work, limits.n_together, limits.wait_ms / 1000)
    reasons = Batcher(
        service.work, 1, 0.0
    )  # in a thread of their own: they cost many searches, and nobody waits behind

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if threads:
            import torch

            torch.set_num_threads(threads)
        batcher.start()
        reasons.start()
        polling = asyncio.get_running_loop().create_task(_poll(service))
        yield
        polling.cancel()
        with suppress(asyncio.CancelledError):
            await polling
        await asyncio.gather(batcher.stop(), reasons.stop())

    made = FastAPI(title="Retouch recommends", version=__version__, lifespan=lifespan)
    made.state.service = service
    _errors(made, service)
    _questions(made, service, (batcher, reasons), limits)
    _facts(made, service, batcher)
    made.add_middleware(Gate, limits=limits, token=token, refused=lambda status: _refused(service, status))
    return made


async def _poll(service: Service) -> None:
    while True:
        await asyncio.sleep(_POLL_S)
        await asyncio.to_thread(service.poll)


# ---------------------------------------------------------------- routes


def _questions(made: FastAPI, service: Service, batchers: tuple[Batcher, Batcher], limits: Limits) -> None:
    async def answered(requests: Sequence[Request]) -> list[Answer]:
        for request in requests:
            service.check(request)
        patience = _PATIENCE if any(request.explain for request in requests) else 1
        begin = time.monotonic()
        until = begin + patience * limits.deadline_ms / 1000
        answers = await asyncio.gather(*(batchers[request.explain].ask(request, until) for request in requests))
        for answer in answers:
            service.metrics.outcome(answer.rung, "ok", time.monotonic() - begin)
        return answers

    async def recommend(question: Question) -> JSONResponse:
        """Recommend items to one user, or for one history."""
        return JSONResponse((await answered([question.request()]))[0].to_dict())

    async def recommend_batch(batch: Batch) -> JSONResponse:
        """Answer several questions."""
        if len(batch.requests) > limits.n_batch:
            raise UserError(f"A batch holds at most {limits.n_batch} questions; got {len(batch.requests)}.")
        answers = await answered([_numbered(i, question) for i, question in enumerate(batch.requests)])
        return JSONResponse({"answers": [answer.to_dict() for answer in answers]})

    async def events(body: Events) -> dict[str, int]:
        """Tell what users took, for the nearline writer."""
        pairs = [(event.user, event.item) for event in body.events]
        for i, (user, item) in enumerate(pairs):
            check_id(f"events[{i}].user", user)
            check_id(f"events[{i}].item", item)
        unknown = await asyncio.to_thread(service.append, pairs, body.key)
        return {"accepted": len(pairs), "unknown_items": unknown}

    one: Any = {200: {"model": Answer}}
    many: Any = {200: {"model": dict[str, list[Answer]]}}
    made.add_api_route("/recommend", recommend, methods=["POST"], responses=one)
    made.add_api_route("/recommend/batch", recommend_batch, methods=["POST"], responses=many)
    made.add_api_route("/events", events, methods=["POST"])


def _numbered(i: int, question: Question) -> Request:
    try:
        return question.request()
    except UserError as error:
        raise UserError(f"requests[{i}]: {error}") from error


def _facts(made: FastAPI, service: Service, batcher: Batcher) -> None:
    async def health() -> dict[str, str]:
        """Say that the process lives."""
        return {"status": "alive", "version": __version__}

    async def ready() -> JSONResponse:
        """Say whether answers can be relied on: a self-test, and whether the store answers."""
        told: Any = await batcher.in_thread(service.ready)
        return JSONResponse(told, 200 if told["ready"] else 503)

    async def metrics() -> Response:
        """Return the numbers for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for route in (health, ready, metrics):
        made.add_api_route(f"/{route.__name__}", route, methods=["GET"])


# ---------------------------------------------------------------- refusals


def _refused(service: Service, status: int) -> None:
    service.metrics.outcome("none", "busy" if status == 429 else "refused")


def _errors(made: FastAPI, service: Service) -> None:
    def told(status: int, text: str, outcome: str, wait_s: int = 0) -> JSONResponse:
        service.metrics.outcome("none", outcome)
        return JSONResponse({"error": text}, status, {"Retry-After": str(wait_s)} if wait_s else None)

    async def invalid(_: Any, error: RequestValidationError) -> JSONResponse:
        return told(422, sentence(error.errors()), "refused")

    async def wrong(_: Any, error: UserError) -> JSONResponse:
        down = isinstance(error, StoreDown)
        return told(503, str(error), "store", 1) if down else told(422, str(error), "refused")

    async def late(_: Any, error: Late) -> JSONResponse:
        return told(503, "The answer was not ready in time; the server has too much to do. Ask again.", "late", 1)

    async def other(_: Any, error: HTTPException) -> JSONResponse:
        return told(error.status_code, f"{error.detail}. See /docs.", "refused")

    async def broken(_: Any, error: Exception) -> JSONResponse:
        return told(500, "The server failed at this request; its log says why.", "error")

    kinds = {RequestValidationError: invalid, UserError: wrong, Late: late, HTTPException: other, Exception: broken}
    for kind, answer in kinds.items():
        made.add_exception_handler(kind, answer)


# ---------------------------------------------------------------- the process


def run(
    bundle: str | Path,
    store: str = "",
    *,
    beside: Sequence[str | Path] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    token: str | Path | None = None,
    stock: str | Path | None = None,
    threads: int = 0,
    settings: Serving | None = None,
    limits: Limits | None = None,
) -> None:
    """Serve a bundle until the process is told to end.

    Args:
        bundle: Its folder.
        store: Address of the store; see `retouch.recommend.stores.open_store`. Empty: none.
        beside: Bundles that take over when the store's pointer names them.
        host: Where to listen; this machine alone unless told.
        port: Where to listen.
        workers: Processes; all share the store.
        token: A file that holds what clients must send.
        stock: A file of raw ids, one a line, of what nobody can have now.
        threads: Threads of torch in each worker; 0: the cores divided by the workers.
        settings: How answers are made.
        limits: What one worker takes.

    Raises:
        UserError: A file is missing, a number is out of range, or the store's address is not understood.
        StoreError: The bundle is damaged.
    """
    config = {
        "bundles": [str(path) for path in (bundle, *beside)], "store": store, "token": _token(token),
        "stock": None if stock is None else str(stock), "settings": asdict(settings or Serving()),
        "limits": asdict(limits or Limits()), "threads": threads or max(1, (os.cpu_count() or 1) // max(1, workers)),
    }  # fmt: skip
    _check(config, port, workers)
    with tempfile.TemporaryDirectory(prefix="retouch-serve-") as shared:
        os.environ[CONFIG] = json.dumps(config)
        if workers > 1:
            os.environ[SHARED] = shared
        try:
            uvicorn.run(
                f"{__name__}:from_environment", factory=True, host=host, port=port, workers=workers,
                log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=30,
                timeout_worker_healthcheck=_START_S,
            )  # fmt: skip
        finally:
            os.environ.pop(CONFIG, None)
            os.environ.pop(SHARED, None)


def _check(config: dict[str, Any], port: int, workers: int) -> None:
    """Find what is wrong before a process is started: a worker that fails is started again and again."""
    from .bundle import open_bundle

    if not 0 < port < 65_536 or workers < 1:
        raise UserError(f"A server needs a port from 1 to 65535 and at least 1 worker; got {port} and {workers}.")
    for path in config["bundles"]:
        open_bundle(path)
    if config["store"]:
        with suppress(StoreDown):  # it may come back while we serve
            open_store(config["store"]).close()
    if config["stock"] is not None:
        _readable(Path(config["stock"]))


def _readable(stock: Path) -> None:
    """Find what is wrong with the file of what is out of stock now: later, what cannot be read is passed over."""
    if not stock.is_file():
        raise UserError(f"There is no file {stock} of what is out of stock. An empty one will do.")
    try:
        stock.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{stock}, what is out of stock, cannot be read: {error}. Save it as UTF-8, one id a line."
        ) from error


def _token(path: str | Path | None) -> str:
    if path is None:
        return ""
    try:
        token = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The token cannot be read from {path}: {error}.") from error
    if not token or not token.isascii() or len(token.split()) != 1:
        raise UserError(f"{path} must hold one word of ASCII characters, the token.")
    return token


def from_environment() -> FastAPI:
    """Build the application of one worker, as `run` described it; uvicorn calls this."""
    from .bundle import open_bundle

    config = json.loads(os.environ[CONFIG])
    bundles = [open_bundle(path) for path in config["bundles"]]
    address, stock, settings = config["store"], config["stock"], Serving(**config["settings"])
    return app(
        bundles,
        settings=settings,
        limits=Limits(**config["limits"]),
        token=config["token"],
        stock=None if stock is None else Path(stock),
        connect=(lambda: open_store(address, look_s=settings.store_ms / 1000)) if address else None,
        threads=config["threads"],
    )
