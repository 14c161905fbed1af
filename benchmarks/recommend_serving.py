"""What knowledge costs when a recommendation is served, how many a server gives, and what its stores can take.

python benchmarks/recommend_serving.py                      # a random bundle of 12,000 items
python benchmarks/recommend_serving.py --bundle mine --seconds 20

The peer is a bare FastAPI application that answers at once: what is above it is ours. Clients and server share the
machine, so the rates are lower bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import _peer
import numpy as np
import torch

from retouch.recommend.answers import Request
from retouch.recommend.base import Item
from retouch.recommend.bundle import Bundle, open_bundle
from retouch.recommend.fusion import Fusion
from retouch.recommend.generator import SIZES, Generator
from retouch.recommend.instruction import Instructions
from retouch.recommend.ladder import Ladder, Serving
from retouch.recommend.policy import Policy
from retouch.recommend.prototypes import Prototypes
from retouch.recommend.record import Record, Versions, encode, history_hash
from retouch.recommend.stores import Store, open_store
from retouch.recommend.tokenise import assign

USERS = 2000
CLIENTS = (1, 32)
KEPT = {
    "lines": [{"rung": r, "segment": "all", "verdict": "kept"} for r in ("fresh", "stale", "prototype")],
    "about": {"lags": {"fresh": 4, "stale": 8}},
}


def random_bundle(n_items: int, size: str) -> Bundle:
    """Make a bundle with random weights; the time of an answer does not depend on their values."""
    torch.manual_seed(0)
    chance = np.random.default_rng(0)
    codes = np.minimum(chance.gamma(2.0, 40.0, (n_items, 3)).astype(np.int64), 255)
    ids = [f"i{i}" for i in range(1, n_items + 1)]
    catalogue = assign(codes, (256,) * 3, np.arange(n_items), ids)
    reference = Generator(SIZES[size], torch.from_numpy(catalogue.codes.copy()), catalogue.sizes).eval()
    d = reference.size.d_model
    instructions, fusion = Instructions(d, 64), Fusion(d, 64)
    knowing = Policy(reference, instructions, fusion, None).eval().requires_grad_(False)
    held = chance.integers(0, 64, (5000, 5)), chance.normal(size=(5000, d)).astype(np.float32)
    return Bundle(
        Path("random"), "0" * 16, tuple(Item(name, f"Item {name}", f"Item {name}") for name in ids),
        np.append(0, chance.integers(0, 100, n_items)), catalogue, reference.n_history, reference.requires_grad_(False),
        knowing.generator, instructions, fusion, knowing, Versions(1, 2, 3), {}, Prototypes.fit(*held, (64,) * 5), {},
        KEPT, "policy",
    )  # fmt: skip


def opened(path: str, n_items: int, size: str) -> Bundle:
    """Open a bundle, or make one; its knowledge counts as certified, whatever its certificate says."""
    if not path:
        return random_bundle(n_items, size)
    held = open_bundle(path)
    if held.knowing is None:
        return held
    return replace(held, certificate=KEPT, serves="policy", policy=held.knowing.generator)


def histories(bundle: Bundle, n: int = USERS) -> list[tuple[str, ...]]:
    """Draw a history for each user."""
    chance = np.random.default_rng(1)
    lengths = chance.integers(5, 40, n)
    return [tuple(bundle.items[i].id for i in chance.integers(0, len(bundle.items), length)) for length in lengths]


def records(bundle: Bundle, taken: Sequence[tuple[str, ...]]) -> dict[str, bytes]:
    """Make a record for each user, with a random vector."""
    chance, now = np.random.default_rng(2), int(time.time() * 1000)
    made = {}
    for i, history in enumerate(taken):
        vector = chance.normal(size=bundle.d_model).astype(np.float16)
        codes = (0,) * 5
        kept = Record(bundle.versions, len(history), history_hash(history), now, 604_800, 0.5, codes, vector)
        made[f"u{i}"] = encode(kept)
    return made


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99 in milliseconds."""
    return {f"p{q}_ms": float(np.percentile(seconds, q)) * 1e3 for q in (50, 95, 99)}


# ---------------------------------------------------------------- in process


def in_process(bundle: Bundle, store: Store, taken: Sequence[tuple[str, ...]], n: int, beams: int) -> dict[str, Any]:
    """Time single answers with and without knowledge, turn by turn, so that both see the same machine."""
    how = Serving(beams=beams)
    ways = {
        "with knowledge": (Ladder(bundle, store, how), True),
        "prototype": (Ladder(bundle, None, how), True),
        "without": (Ladder(bundle.undone(), None, how), False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    lookups: list[float] = []
    rungs: dict[str, str] = {}
    for i in range(-5, n):  # the first few warm up
        at = i % len(taken)
        names = list(ways)
        for name in names[i % 3 :] + names[: i % 3]:  # each is as often the first
            ladder, named = ways[name]
            request = Request(f"u{at}" if named else None, taken[at])
            begin = time.perf_counter()
            told = ladder.answer([request])
            if i >= 0:
                seconds[name].append(time.perf_counter() - begin)
                rungs[name] = told.answers[0].rung
                if name == "with knowledge":
                    lookups.append(told.seconds["lookup"])
    found: dict[str, Any] = {name: {**percentiles(s), "rung": rungs[name]} for name, s in seconds.items()}
    found["look-up alone"] = percentiles(lookups)
    added = np.array(seconds["with knowledge"]) - np.array(seconds["without"])  # the same request, one after the other
    found["added_at_p50_ms"] = float(np.median(added)) * 1e3
    return found


# ---------------------------------------------------------------- over HTTP


def bare() -> Any:
    """Build the peer: FastAPI with a body of the same fields and a fixed answer."""
    from fastapi import FastAPI
    from pydantic import BaseModel

    class Body(BaseModel):
        user: str | None = None
        history: list[str] | None = None
        k: int = 10

    made = FastAPI()

    async def recommend(body: Body) -> dict[str, Any]:
        return {"items": [], "k": body.k}

    recommend.__annotations__["body"] = Body
    made.add_api_route("/recommend", recommend, methods=["POST"])
    return made


def child(kind: str, port: int, arguments: argparse.Namespace) -> None:
    """Be a server until killed."""
    import uvicorn

    from retouch.recommend.serve import Limits, app

    if kind == "bare":
        made = bare()
    else:
        bundle = opened(arguments.bundle, arguments.items, arguments.size)
        limits = Limits(deadline_ms=60_000, n_in_flight=1000)
        knows = kind == "with knowledge"
        how = Serving(beams=arguments.beams)
        made = app(
            bundle if knows else bundle.undone(), open_store(arguments.store) if knows else None, how, limits=limits,
            threads=1,
        )  # fmt: skip
    uvicorn.run(made, host="127.0.0.1", port=port, log_level="error", access_log=False)


@contextmanager
def server(kind: str, arguments: argparse.Namespace, store: str) -> Iterator[int]:
    """Start a server of this file in a process of its own; yield its port once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [
        sys.executable, __file__, "--child", kind, "--port", str(port), "--store", store, "--bundle", arguments.bundle,
        "--items", str(arguments.items), "--size", arguments.size, "--beams", str(arguments.beams),
    ]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(1200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None:
                raise SystemExit(f"The server {kind!r} ended at its start.")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


async def load(port: int, bodies: Sequence[bytes], clients: int, seconds: float) -> tuple[list[float], int]:
    """Ask from several connections, each as soon as it has its answer; return the times and the failures."""
    end = time.perf_counter() + seconds
    times: list[float] = []
    failed = 0

    async def client(place: int) -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        at = place
        while (begin := time.perf_counter()) < end:
            body = bodies[at % len(bodies)]
            at += clients
            head = (
                f"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            )
            writer.write(head.encode() + b"\r\n\r\n" + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            failed += b" 200 " not in answer.partition(b"\r\n")[0]
            times.append(time.perf_counter() - begin)
        writer.close()

    await asyncio.gather(*(client(i) for i in range(clients)))
    return times, failed


def over_http(arguments: argparse.Namespace, store: str, taken: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """Measure the bare peer and ours, with and without knowledge, in one run."""
    bodies = [json.dumps({"user": f"u{i}", "history": list(h), "k": 10}).encode() for i, h in enumerate(taken)]
    found: dict[str, Any] = {}
    for kind in ("bare", "without knowledge", "with knowledge"):
        with server(kind, arguments, store) as port:
            asyncio.run(load(port, bodies, 4, 1.0))
            for clients in CLIENTS:
                times, failed = asyncio.run(load(port, bodies, clients, arguments.seconds))
                rate = len(times) / arguments.seconds
                found[f"{kind}, {clients} clients"] = {"per_second": rate, "failed": failed, **percentiles(times)}
    return found


# ---------------------------------------------------------------- stores


def rate(work: Callable[[int], int], seconds: float) -> float:
    """Call work with 0, 1, 2, ... for a while; return how much it did in a second."""
    begin, done, i = time.perf_counter(), 0, 0
    while (passed := time.perf_counter() - begin) < seconds:
        done += work(i)
        i += 1
    return done / passed


def of_store(store: Store, raw: bytes, seconds: float) -> dict[str, float]:
    """Measure writes of 1,000, of 1, and reads of 1 and of 32 of 50,000 users."""
    names = [f"user{i}" for i in range(50_000)]

    def write(many: int) -> Callable[[int], int]:
        """Each round goes into a namespace of its own, so that nothing is superseded."""

        def work(i: int) -> int:
            first = i * many % len(names)
            part = dict.fromkeys(names[first : first + many], raw)
            return store.put_many(part, f"round{i * many // len(names)}")

        return work

    def read(many: int) -> Callable[[int], int]:
        def work(i: int) -> int:
            first = i * 7919 % (len(names) - many)
            return sum(found is not None for found in store.get_many(names[first : first + many], "round0"))

        return work

    found = {"writes_per_second_by_1000": rate(write(1000), seconds)}
    for first in range(0, len(names), 1000):
        store.put_many(dict.fromkeys(names[first : first + 1000], raw), "round0")
    found |= {f"reads_per_second_by_{many}": rate(read(many), seconds) for many in (1, 32)}
    found["writes_per_second_by_1"] = rate(lambda i: store.put_many({f"single{i}": raw}, "singles"), seconds)
    return found


@contextmanager
def redis_server(folder: Path) -> Iterator[str | None]:
    """Start a Redis or Valkey of this machine; None where there is none."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        yield None
        return
    path = folder / "redis.sock"
    command = [binary, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            if path.exists():
                break
            time.sleep(0.05)
        yield f"unix://{path}"
    finally:
        process.terminate()
        process.wait(10)


def stores(folder: Path, raw: bytes, seconds: float) -> dict[str, Any]:
    """Measure both stores."""
    sqlite = open_store(f"sqlite:{folder / 'speed.db'}")
    found: dict[str, Any] = {"sqlite": of_store(sqlite, raw, seconds)}
    sqlite.close()
    with redis_server(folder) as url:
        if url is not None:
            redis = open_store(url)
            found["redis, unix socket"] = of_store(redis, raw, seconds)
            redis.close()
    return found


# ---------------------------------------------------------------- all of it


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="", help="a bundle's folder; empty: a random one")
    parser.add_argument("--items", type=int, default=12_000, help="items of the random bundle")
    parser.add_argument("--size", default="small", choices=sorted(SIZES), help="generator of the random bundle")
    parser.add_argument("--beams", type=int, default=50)
    parser.add_argument("--requests", type=int, default=500, help="single answers of each kind in process")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each rate is measured")
    parser.add_argument("--out", type=Path, default=_peer.RESULTS / "recommend_serving.json")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.port, arguments)
        return
    torch.set_num_threads(1)
    bundle = opened(arguments.bundle, arguments.items, arguments.size)
    taken = histories(bundle)
    made = records(bundle, taken)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        address = f"sqlite:{folder / 'knowledge.db'}"
        store = open_store(address)
        store.put_many(made, bundle.fingerprint)
        result = {
            "machine": _peer.machine(),
            "what": {"bundle": arguments.bundle or "random", "items": len(bundle.items), "d_model": bundle.d_model,
                     "beams": arguments.beams, "torch_threads": 1, "requests": arguments.requests,
                     "seconds": arguments.seconds},
            "in_process": in_process(bundle, store, taken, arguments.requests, arguments.beams),
            "http": over_http(arguments, address, taken),
            "stores": stores(folder, made["u0"], arguments.seconds / 2),
        }  # fmt: skip
        store.close()
    _peer.write(arguments.out, result)
    _print(result)


def _print(result: dict[str, Any]) -> None:
    spans = ("p50_ms", "p95_ms", "p99_ms")
    inside = [(n, *(f"{r[s]:.2f}" for s in spans)) for n, r in result["in_process"].items() if isinstance(r, dict)]
    note = f"Knowledge adds {result['in_process']['added_at_p50_ms']:.2f} ms at the median."
    _peer.show("One answer in process, ms", ("how", "p50", "p95", "p99"), inside, [note])
    rows = [(n, f"{r['per_second']:,.0f}", *(f"{r[s]:.1f}" for s in spans)) for n, r in result["http"].items()]
    _peer.show("Over HTTP, one worker", ("server", "a second", "p50 ms", "p95 ms", "p99 ms"), rows)
    kept = [(n, k.replace("_per_second_", " "), f"{v:,.0f}") for n, r in result["stores"].items() for k, v in r.items()]
    _peer.show("Stores, records a second", ("store", "what", "a second"), kept)


if __name__ == "__main__":
    main()
