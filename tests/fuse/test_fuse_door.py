"""What a SuperLink answers from other machines, and which program an edge runs."""

from __future__ import annotations

import asyncio
import hashlib
import io
import socket
import zipfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.run import Run

from retouch.fuse._app import FILES, NAME, VERSION, write_app
from retouch.fuse._superlink import Door, is_loopback, sockets
from retouch.fuse._supernode import own_program, own_run, with_own_program
from retouch.fuse.deployment import free_port

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own
HERE, THERE = ("127.0.0.1", 5000), ("192.0.2.7", 5000)


def answer(path: str, client: Any, server: Any, kind: str = "http", **more: Any) -> int:
    """Ask through the door; 200 is what lies behind it."""
    said: list[dict[str, Any]] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    scope = {"type": kind, "path": path, "client": client, "server": server, **more}
    asyncio.run(Door(behind)(scope, None, send))
    return int(said[0].get("status") or said[0]["code"])


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/v1/fleet/get-run"])
def test_edges_may_ask_from_anywhere(path: str) -> None:
    assert answer(path, THERE, THERE) == answer(path, HERE, HERE) == 200


@pytest.mark.parametrize(
    "path",
    ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/health", "/docs", "/", "",
     "/v1/fleet/", "/v1/fleet/../control/start-run", "/v1/fleet/x/../../control/start-run", "//v1/fleet/get-run",
     "/V1/fleet/get-run", "/v1/fleet/get-run\n", "/v1/fleet/%2e%2e"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("client", "server"), [(THERE, THERE), (THERE, HERE), (HERE, THERE), (None, HERE), (HERE, None)]
)
def test_everything_else_is_for_this_machine(path: str, client: Any, server: Any) -> None:
    headers = [(b"x-forwarded-for", b"127.0.0.1"), (b"forwarded", b"for=127.0.0.1"), (b"host", b"localhost")]
    assert answer(path, client, server, headers=headers) == 403
    assert answer(path, HERE, HERE) == 200


def test_no_socket_of_the_web_from_elsewhere() -> None:
    assert answer("/v1/fleet/get-run", THERE, THERE, "websocket") == 1008


def test_addresses_of_this_machine_alone() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"]))
    assert not any(
        map(is_loopback, ["192.0.2.7", "::ffff:192.0.2.7", "0.0.0.0", "::", "localhost", "", "fe80::1%eth0"])
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "127.0.0.2"])
def test_it_always_listens_on_this_machine(host: str) -> None:
    port = free_port()
    listening = sockets(host, port)
    try:
        with closing(socket.create_connection(("127.0.0.1", port), 5)) as made:
            assert made.getpeername()[1] == port
        assert len(listening) == (2 if host == "127.0.0.2" else 1)
    finally:
        for one in listening:
            one.close()


# ---------------------------------------------------------------- the program of an edge


def foreign(**changes: Any) -> Run:
    run = Run.create_empty(7)
    for name, value in {"fab_id": "x/evil", "fab_version": "9.9", "fab_hash": "0" * 64, **changes}.items():
        setattr(run, name, value)
    return run


def test_edge_runs_its_own_program_whatever_a_run_carries() -> None:
    program, fetched = own_program(), []

    @contextmanager
    def connect(address: str) -> Any:
        yield (1, None, None, lambda n: foreign(override_config={"data": "/etc"}), fetched.append, None, None, None)

    with with_own_program(connect, program)("cloud:8000") as parts:
        assert parts[0] == 1 and len(parts) == 8
        run, given = parts[3](7), parts[4]("0" * 64, 7)
    assert given is program and not fetched
    assert (run.fab_id, run.fab_version, run.fab_hash) == (NAME, VERSION, program.hash_str)
    assert run.override_config == {} and run.run_id == 7


def test_a_run_for_an_agent_starts_none() -> None:
    assert own_run(foreign(primary_task_type="flwr-agentapp"), own_program()).primary_task_type == ""


def test_own_program_is_what_runs_carry(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.config import get_fab_config, get_metadata_from_config

    program = own_program()
    assert build_fab_from_disk(write_app(tmp_path / "app")) == program.content
    assert hashlib.sha256(program.content).hexdigest() == program.hash_str
    assert get_metadata_from_config(get_fab_config(program.content)) == (NAME, VERSION)
    with zipfile.ZipFile(io.BytesIO(program.content)) as bundle:
        assert bundle.read("retouch_edges.py").decode() == FILES["retouch_edges.py"]
