"""Start, use and stop a Flower deployment: the cloud's SuperLink, an edge's SuperNode, and runs.

Nothing is told to others: no telemetry, no look-up of updates, no installation of packages, no download at edges. Every
process that is started here is stopped here, and writes its log to a file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import store
from ..errors import RetouchError, UserError, unknown
from ._app import write_app
from ._processes import Program, Programs, executable
from .cloud import Outcome
from .edge import EdgeSpec, Sharing, capabilities
from .roster import Known, Roster, key_of
from .runs import Run, check_run, save_run

__all__ = [
    "Connection", "environment", "free_port", "join", "node_of", "outcome_of", "register", "revoke", "serve", "submit",
]  # fmt: skip

CONNECTION = "retouch"
_READY_S = 120.0
_END_S = 60.0


@dataclass(frozen=True)
class Connection:
    """How to reach a SuperLink.

    Attributes:
        address: ``HOST:PORT``.
        ca: Certificate of the authority that signed its own; None is unencrypted, for this machine alone.
        home: Folder of Flower's own files, kept apart from a user's.
    """

    address: str
    home: Path
    ca: Path | None = None


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of everything that is started here."""
    switches = {
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1", "FLWR_HOME": str(home), "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }  # fmt: skip
    return {**os.environ, **switches, **(more or {})}


def _require() -> None:
    for package in ("flwr", "psutil", "cryptography"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed. Edges and cloud need it: pip install 'retouch[edges]'.")


# ---------------------------------------------------------------- the cloud


def serve(
    programs: Programs, folder: str | Path, *, host: str = "127.0.0.1", port: int = 8000, keys: Path | None = None,
    simulation: bool = False, more: Mapping[str, str] | None = None,
) -> tuple[Program, Connection]:  # fmt: skip
    """Start a SuperLink and wait until it answers.

    From other machines it answers registered edges alone. Whoever can open connections from this machine, or whose
    connections a program on it forwards, may let edges in and start any program here: keep others' accounts off it.

    Args:
        programs: What stops it.
        folder: For its log, its database and Flower's own files.
        host: Address to listen on for edges; it listens on 127.0.0.1 in any case.
        port: Port to listen on.
        keys: The folder ``cloud`` of `make_keys`; edges must then be registered. None is unencrypted and open to all
            who reach the port, so it is allowed on this machine's own address alone.
        simulation: Simulate the edges.
        more: More of its environment.

    Raises:
        UserError: A package is missing, or it would be open to others without keys.
        RetouchError: It did not start.
    """
    _require()
    folder = Path(folder).absolute()
    if keys is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(
            f"Serving on {host} without keys would let anybody join and read. Make keys: retouch fuse keys."
        )
    command = [sys.executable, "-m", "retouch.fuse._superlink", host, "--host", "127.0.0.1", "--port", str(port),
               "--disable-runtime-dependency-installation"]  # fmt: skip
    if keys is None:
        command.append("--insecure")
    else:
        files = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.pem"}
        command += [word for flag, name in files.items() for word in (f"--ssl-{flag}", str(_file(keys, name)))]
        command.append("--enable-supernode-auth")
    command += ["--simulation"] if simulation else ["--database", str(folder / "superlink.db")]
    home = folder / "flower"
    home.mkdir(parents=True, exist_ok=True)
    fresh = not (folder / "superlink.db").exists()
    program = programs.start("The SuperLink", command, environment(home, more), folder / "superlink.log")
    program.wait_until(lambda: _listens("127.0.0.1", port), _READY_S, f"listening on {host}:{port}")
    connection = Connection(f"127.0.0.1:{port}", home, None if keys is None else Path(keys) / "ca.pem")
    _configure(connection)
    if keys is not None:
        _began(connection, fresh)
    return program, connection


def _began(connection: Connection, fresh: bool) -> None:
    """Note where the SuperLink listens, and turn away who was revoked while none ran."""
    roster = Roster(connection.home)
    roster.address, roster.ca = connection.address, str(connection.ca and connection.ca.absolute())
    if fresh:  # a new database knows nobody
        roster.known = [replace(entry, node=None) for entry in roster.known]
    roster.save()
    for entry in roster.known:
        if entry.state == "revoked" and entry.node is not None:
            _unregister(connection, roster, entry)


def _file(folder: Path, name: str) -> Path:
    path = Path(folder).absolute() / name
    if not path.is_file():
        raise UserError(f"{path} does not exist. Make keys first: retouch fuse keys.")
    return path


def _listens(host: str, port: int) -> bool:
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def _configure(connection: Connection) -> None:
    """Write Flower's list of connections: ours alone."""
    how = (
        "insecure = true"
        if connection.ca is None
        else f"root-certificates = {json.dumps(str(connection.ca.absolute()))}"
    )
    connection.home.mkdir(parents=True, exist_ok=True)
    text = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{connection.address}"\n{how}\n'
    )
    (connection.home / "config.toml").write_text(text, encoding="utf-8")


def register(connection: Connection, public_key: str | Path) -> bool:
    """Allow the edge of a public key to join; one that was allowed before stays so.

    Returns:
        Whether it may join; False if its key was revoked, which nothing undoes.

    Raises:
        StoreError: The file is no public key.
        RetouchError: The SuperLink has refused it, or cannot be reached.
    """
    roster, (name, key) = Roster(connection.home), key_of(public_key)
    known = roster.find(key)
    if known is not None and known.state == "revoked":
        return False
    if known is None or known.node is None:
        text = _asked(connection, "register", str(public_key), name)
        number = re.search(r'"node-id":\s*"?(\d+)', text)
        if number is None:
            raise RetouchError(f"{public_key} was registered at {connection.address} without a number:\n{text[-500:]}")
        roster.put(Known(name, key, node=int(number[1])))
    return True


def revoke(connection: Connection, name: str, public_key: str | Path | None = None) -> bool:
    """Take an edge's key away for good: at a SuperLink that runs now, else when it is started again.

    Args:
        connection: Its ``home`` is that of the SuperLink; the address is taken from the record there.
        name: Of the edge.
        public_key: One that was never registered and never may be.

    Returns:
        Whether a running SuperLink was told.

    Raises:
        UnknownName: No edge of that name was ever let in, and no key is given.
        RetouchError: The SuperLink runs and has refused.
    """
    roster = Roster(connection.home)
    if public_key is not None and roster.find(key := key_of(public_key)[1]) is None:
        roster.put(Known(name, key))
    own = roster.of(name)
    if not own:
        raise unknown("edge", name, sorted({e.name for e in roster.known}))
    for entry in own:
        roster.put(replace(entry, state="revoked"))
    host, _, port = roster.address.rpartition(":")
    if not host or not _listens(host, int(port)):
        return False
    there = Connection(roster.address, connection.home, Path(roster.ca))
    for entry in roster.of(name):
        if entry.node is not None:
            _unregister(there, roster, entry)
    return True


def _unregister(connection: Connection, roster: Roster, entry: Known) -> None:
    _asked(connection, "unregister", str(entry.node), entry.name)
    roster.put(replace(entry, node=None))


def _asked(connection: Connection, what: str, argument: str, name: str) -> str:
    """Let Flower change the list of nodes, and return what it said."""
    _configure(connection)
    command = [executable("flwr"), "supernode", what, argument, CONNECTION, "--format", "json"]
    with Programs() as programs:
        log = connection.home / f"{what}-{name}.log"
        log.unlink(missing_ok=True)
        program = programs.start("The list of edges", command, environment(connection.home), log)
        if program.process.wait(_READY_S) != 0 or '"success": false' in program.tail(40):
            raise RetouchError(f"{what} {name} has failed at {connection.address}:\n{program.tail()}")
        return program.tail(40)


# ---------------------------------------------------------------- an edge


def join(
    programs: Programs, connection: Connection, spec: EdgeSpec, folder: str | Path, *, keys: Path | None = None,
    port: int | None = None, sharing: Sharing | None = None, more: Mapping[str, str] | None = None,
) -> Program:  # fmt: skip
    """Start an edge's SuperNode; it does tasks until it is stopped, by the program that is installed here and no other.

    Args:
        programs: What stops it.
        connection: How to reach the cloud; its ``home`` is this edge's own.
        spec: Who the edge is and where its examples are. The path stays in the edge's own configuration.
        folder: For its log.
        keys: The edge's folder of `make_keys`; None for an unencrypted SuperLink on this machine.
        port: For the node's own processes, on this machine alone; by default a free one.
        sharing: What it lets out.
        more: More of its environment.

    Raises:
        UserError: A package or a key is missing, or the edge cannot be what it says.
        FactError: Its examples cannot be read.
    """
    _require()
    capabilities(spec, sharing)  # said here, where it helps: the cloud is told no more than that something is wrong
    command = [sys.executable, "-m", "retouch.fuse._supernode", "--superlink", connection.address]
    command += ["--port", str(port or free_port())]
    if keys is None:
        command.append("--insecure")
    else:
        files = {"root-certificates": "ca.pem", "auth-supernode-private-key": "node.key", "ssl-certfile": "runtime.pem",
                 "ssl-keyfile": "runtime.key", "ssl-ca-certfile": "ca.pem"}  # fmt: skip
        command += [word for flag, name in files.items() for word in (f"--{flag}", str(_file(keys, name)))]
    command += ["--node-config", " ".join(f"{k}={_toml(v)}" for k, v in node_of(spec, sharing or Sharing()).items())]
    connection.home.mkdir(parents=True, exist_ok=True)
    log = Path(folder) / f"supernode-{spec.name}.log"
    return programs.start(f"The SuperNode of {spec.name}", command, environment(connection.home, more), log)


def node_of(spec: EdgeSpec, sharing: Sharing) -> dict[str, Any]:
    """Write an edge as a node's configuration."""
    known = {"domain": spec.name, "data": str(Path(spec.examples).absolute()), "budget_mib": spec.budget_mib,
             "ratio": spec.ratio, "rank": spec.rank}  # fmt: skip
    return {k: v for k, v in {**known, **sharing.to_dict()}.items() if v is not None}


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # the same as TOML for texts, numbers and booleans


# ---------------------------------------------------------------- a run


def submit(
    connection: Connection,
    run: Run,
    model: str,
    out: str | Path,
    *,
    federation: str = "",
    timeout_s: float | None = None,
) -> Outcome:
    """Carry out a run on the SuperLink of this machine and wait for it; started again, it asks only for what is missing.

    Args:
        connection: How to reach the SuperLink.
        run: What to do.
        model: The whole model: a name or folder on this machine.
        out: The run's folder.
        federation: For a simulation: how many edges, and what each may use.
        timeout_s: When to give up; by default a while after the run's own deadlines.

    Raises:
        UserError: The fusion needs what a cloud of edges does not have.
        RetouchError: Too few edges have answered, or the run could not be started.
    """
    _require()
    check_run(run)
    out = Path(out).absolute()
    save_run(run, model if not Path(model).exists() else str(Path(model).absolute()), out)
    for name in ("result.json", "error.json"):
        (out / name).unlink(missing_ok=True)
    _configure(connection)
    command = [executable("flwr"), "run", str(write_app(out / "app")), CONNECTION, "--stream"]
    command += ["--run-config", f"retouch-folder={_toml(str(out))}"]
    command += ["--federation-config", federation] if federation else []
    how = run.settings
    limit = timeout_s or how.join_timeout_s + how.deadline_s + how.grace_s + 600
    with Programs() as programs:
        program = programs.start("The run", command, environment(connection.home), out / "run.log")
        _ended(program, out, limit)
    return outcome_of(out)


def _ended(program: Program, out: Path, limit: float) -> None:
    """Wait until the run has said how it ended, then a little for Flower to notice."""
    until = time.monotonic() + limit
    while program.running and time.monotonic() < until:
        if (out / "result.json").exists() or (out / "error.json").exists():
            until = min(until, time.monotonic() + _END_S)
        time.sleep(0.5)
    if not (out / "result.json").exists() and not (out / "error.json").exists():
        if "Connection to the SuperLink is unavailable" in program.tail(20):
            raise UserError(
                f"No cloud answers on this machine (log: {program.log}). Start it, retouch fuse serve, or name where it "
                "listens with --address."
            )
        raise RetouchError(
            f"The run ended without a result. Its log, {program.log}, ends with:\n{program.tail(20)}\nThe SuperLink's log "
            "may say more."
        )


def outcome_of(out: Path) -> Outcome:
    """Read how a run ended.

    Raises:
        RetouchError: It failed; the message is its own.
    """
    if (out / "error.json").exists():
        record = store.read_json(out / "error.json")
        kind = UserError if record["exit_code"] == 2 else RetouchError
        raise kind(record["error"])
    plain = store.read_json(out / "result.json")
    lists = {name: tuple(plain[name]) for name in ("edges", "absent", "partial", "resumed")}
    return Outcome(Path(plain["fused"]), **lists, why=plain["why"], facts=plain["facts"])
