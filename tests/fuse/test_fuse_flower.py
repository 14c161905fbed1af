"""One real deployment: a SuperLink and two SuperNodes with TLS and registered keys, on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fuse_edges
import pytest

from retouch import store
from retouch.errors import RetouchError, UserError
from retouch.fuse._app import FILES
from retouch.fuse._processes import Program, Programs, executable
from retouch.fuse._superlink import is_loopback
from retouch.fuse.cloud import Outcome
from retouch.fuse.deployment import Connection, environment, free_port, join, register, revoke, serve, submit
from retouch.fuse.edge import EdgeSpec
from retouch.fuse.journal import Journal
from retouch.fuse.keys import Keys, make_keys
from retouch.fuse.roster import Roster
from retouch.fuse.simulate import simulate

pytestmark = pytest.mark.slow


@pytest.fixture
def programs() -> Iterator[Programs]:
    with Programs() as started:
        yield started
    assert not any(p.left() for p in started.all)


class Deployment:
    """A SuperLink whose registered edges can be started and killed one by one."""

    def __init__(self, programs: Programs, folder: Path, keys: Keys) -> None:
        self.programs, self.folder, self.keys = programs, folder, keys
        self.link, self.cloud = serve(
            programs, folder / "cloud", port=free_port(), keys=keys.cloud, more=self._own("cloud")
        )

    def _own(self, name: str) -> dict[str, str]:
        return {"RETOUCH_CACHE": str(self.folder / name / "cache"), "OMP_NUM_THREADS": "1"}

    def edge(self, spec: EdgeSpec) -> Program:
        own = self.folder / spec.name
        there = Connection(self.cloud.address, own / "flower")
        return join(self.programs, there, spec, own, keys=self.keys.edges[spec.name], more=self._own(spec.name))


def test_deployment_gives_the_bits_of_the_loop_and_survives_losses(
    programs: Programs, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base, edges = fuse_edges.base(tiny, tmp_path / "base"), fuse_edges.specs(tmp_path)
    run = fuse_edges.run(min_edges=1, join_timeout_s=45.0, deadline_s=30.0, grace_s=60.0)
    alone = simulate(base, edges, run, tmp_path / "loop")
    keys = make_keys(tmp_path / "keys", ["localhost", "127.0.0.1"], [*fuse_edges.EDGES, "stranger"])
    deployment = Deployment(programs, tmp_path / "nodes", keys)
    for spec in edges:
        register(deployment.cloud, keys.edges[spec.name] / "node.pub")
    stranger = deployment.edge(EdgeSpec("stranger", edges[0].examples))
    nodes = {spec.name: deployment.edge(spec) for spec in edges}

    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(submit, deployment.cloud, run, base, tmp_path / "run")
        wait_for_task(tmp_path / "run" / "journal.jsonl", "news", started)
        nodes["news"].kill()
        half = started.result()
    assert half.edges == ("law",) and half.absent == ("news",)
    assert not stranger.running and stranger.process.poll() not in (None, 0)  # its key was never registered

    deployment.edge(edges[1])
    whole = submit(deployment.cloud, run, base, tmp_path / "run")
    assert whole.edges == ("law", "news") and whole.resumed == ("law",)
    digests = [store.sha256_file(o.fused / "adapter_model.safetensors") for o in (alone, whole)]
    assert digests[0] == digests[1]
    sent = [e.node for e in Journal(tmp_path / "run" / "journal.jsonl").entries() if e.state == "sent"]
    assert sorted(sent) == ["law", "news", "news"]


def wait_for_task(journal: Path, name: str, started: Future[Outcome]) -> None:
    """Wait until an edge was sent its task; it needs seconds to begin."""
    while not any(e.node == name and e.state == "sent" for e in Journal(journal).entries()):
        assert not started.done(), started.result()
        time.sleep(0.2)


def test_revoked_edge_is_turned_away_now_and_after_a_restart(
    programs: Programs, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    edges = fuse_edges.specs(tmp_path)
    keys = make_keys(tmp_path / "keys", ["cloud.example"], fuse_edges.EDGES)
    deployment = Deployment(programs, tmp_path / "nodes", keys)
    for spec in edges:
        assert register(deployment.cloud, keys.edges[spec.name] / "node.pub")
    assert revoke(deployment.cloud, "law")
    refused = deployment.edge(edges[0])
    ended = time.monotonic() + 60
    while refused.running and time.monotonic() < ended:
        time.sleep(0.2)
    assert refused.process.poll() not in (None, 0)

    deployment.link.stop()
    assert not revoke(deployment.cloud, "news")  # nothing runs: the next start turns it away
    again = Deployment(programs, tmp_path / "nodes", keys)
    assert not any(register(again.cloud, keys.edges[spec.name] / "node.pub") for spec in edges)
    assert [entry.node for entry in Roster(again.cloud.home).known] == [None, None]


FOREIGN = """
import time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.query("capabilities")
def steal(message, context):
    text = Path(context.node_config["data"]).read_text()
    return Message(RecordDict({"stolen": ConfigRecord({"text": text})}), reply_to=message)

@server.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.5)
    (reply,) = grid.send_and_receive([Message(RecordDict(), nodes[0], "query.capabilities", ttl=60)], timeout=60)
    Path(context.run_config["place"]).write_text(repr(reply.error) if reply.has_error() else ",".join(reply.content))
"""


def test_others_cannot_control_the_cloud_nor_bring_programs_to_an_edge(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if (outside := own_address()) is None:
        pytest.skip("this machine has no address that others could reach")
    edge = fuse_edges.specs(tmp_path)[0]
    keys, port = make_keys(tmp_path / "keys", [outside], ["law", "stranger"]), free_port()
    _, cloud = serve(programs, tmp_path / "cloud", host=outside, port=port, keys=keys.cloud)
    elsewhere = Connection(f"{outside}:{port}", tmp_path / "elsewhere", keys.edges["law"] / "ca.pem")
    with pytest.raises(RetouchError, match="403"):
        register(elsewhere, keys.edges["stranger"] / "node.pub")
    app, told = tmp_path / "foreign", tmp_path / "told"
    app.mkdir()
    (app / "pyproject.toml").write_text(
        FILES["pyproject.toml"].replace("retouch_edges:", "foreign:").replace("retouch-folder", "place")
    )
    (app / "foreign.py").write_text(FOREIGN)
    command = [executable("flwr"), "run", str(app), "retouch", "--run-config", f'place="{told}"', "--stream"]
    remote = programs.start("From elsewhere", command, environment(elsewhere.home), tmp_path / "remote.log")
    assert remote.process.wait(60) != 0 and "403" in remote.tail(40) and not told.exists()

    register(cloud, keys.edges["law"] / "node.pub")  # who controls the cloud may start any program there
    there = Connection(elsewhere.address, tmp_path / "law" / "flower")
    join(programs, there, edge, tmp_path / "law", keys=keys.edges["law"])
    run = programs.start("On the cloud", command, environment(cloud.home), tmp_path / "here.log")
    run.wait_until(told.exists, 120, "the edge has answered")
    assert told.read_text() == "capabilities"


def own_address() -> str | None:
    """Return an address of this machine that is not loopback."""
    import socket

    import psutil  # type: ignore[import-untyped]

    found = [a.address for some in psutil.net_if_addrs().values() for a in some if a.family == socket.AF_INET]
    return next((a for a in found if not is_loopback(a)), None)


def test_link_without_keys_stays_on_this_machine(programs: Programs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without keys"):
        serve(programs, tmp_path, host="0.0.0.0")
    with pytest.raises(UserError, match="Make keys first"):
        serve(programs, tmp_path, keys=tmp_path)


def test_programs_are_stopped_with_their_children(tmp_path: Path) -> None:
    import sys

    code = "import subprocess,sys,time; subprocess.Popen([sys.executable,'-c','import time; time.sleep(600)']); time.sleep(600)"
    with Programs() as started:
        program = started.start("Sleeper", [sys.executable, "-c", code], {}, tmp_path / "log")
        until = time.monotonic() + 20
        while len(program.left()) < 2 and time.monotonic() < until:
            program.look()
            time.sleep(0.1)
        assert len(program.left()) == 2
    assert program.left() == [] and not program.running
    with Programs() as started:
        broken = started.start(
            "Broken", [sys.executable, "-c", "raise SystemExit('no such port')"], {}, tmp_path / "why"
        )
        with pytest.raises(RetouchError, match="no such port"):
            broken.wait_until(lambda: False, 30, "never")
