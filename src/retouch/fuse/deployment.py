"""Start, use and stop a Flower deployment: the cloud's SuperLink, an edge's SuperNode, and runs.

Nothing is told to others: no telemetry, no look-up of updates, no installation of packages, no download at edges. Every
process that is started here is stopped here, and writes its log to a file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__, store
from ..errors import RetouchError, UserError
from ._processes import Program, Programs, executable
from .cloud import Outcome
from .edge import EdgeSpec, Sharing, check_name
from .runs import Run, save_run

__all__ = [
    "Connection", "environment", "free_port", "join", "outcome_of", "register", "serve", "simulate_by_flower", "submit",
]  # fmt: skip

CONNECTION = "retouch"
_READY_S = 120.0
_END_S = 60.0
_PYPROJECT = """[project]
name = "retouch-edges"
version = "{version}"
description = "Edges and cloud of retouch fuse."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "retouch"

[tool.flwr.app.components]
serverapp = "retouch_edges:server"
clientapp = "retouch_edges:client"

[tool.flwr.app.config]
retouch-folder = ""
"""
_MODULE = '''"""The app that a run carries: it only names what is installed everywhere."""

from retouch.fuse.client_app import app as client
from retouch.fuse.server_app import app as server

__all__ = ["client", "server"]
'''


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

    Args:
        programs: What stops it.
        folder: For its log, its database and Flower's own files.
        host: Address to listen on.
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
    command = [executable("flower-superlink"), "--host", host, "--port", str(port),
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
    program = programs.start("The SuperLink", command, environment(home, more), folder / "superlink.log")
    reached = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    program.wait_until(lambda: _listens(reached, port), _READY_S, f"listening on {host}:{port}")
    connection = Connection(f"{reached}:{port}", home, None if keys is None else Path(keys) / "ca.pem")
    _configure(connection)
    return program, connection


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


def register(connection: Connection, public_key: str | Path) -> None:
    """Allow the edge of a public key to join.

    Raises:
        RetouchError: The SuperLink has refused it, or cannot be reached.
    """
    _configure(connection)
    command = ["supernode", "register", str(public_key), CONNECTION, "--format", "json"]
    with Programs() as programs:
        log = connection.home / f"register-{Path(public_key).absolute().parent.name}.log"
        log.unlink(missing_ok=True)
        program = programs.start("Registering", [executable("flwr"), *command], environment(connection.home), log)
        if program.process.wait(_READY_S) != 0 or '"success": false' in program.tail(40):
            raise RetouchError(f"{public_key} could not be registered at {connection.address}:\n{program.tail()}")


# ---------------------------------------------------------------- an edge


def join(
    programs: Programs, connection: Connection, spec: EdgeSpec, folder: str | Path, *, keys: Path | None = None,
    port: int | None = None, sharing: Sharing | None = None, more: Mapping[str, str] | None = None,
) -> Program:  # fmt: skip
    """Start an edge's SuperNode; it does tasks until it is stopped.

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
        UserError: A package or a key is missing, or the name cannot be one.
    """
    _require()
    check_name(spec.name)
    command = [executable("flower-supernode"), "--superlink", connection.address, "--port", str(port or free_port())]
    if keys is None:
        command.append("--insecure")
    else:
        files = {"root-certificates": "ca.pem", "auth-supernode-private-key": "node.key", "ssl-certfile": "runtime.pem",
                 "ssl-keyfile": "runtime.key", "ssl-ca-certfile": "ca.pem"}  # fmt: skip
        command += [word for flag, name in files.items() for word in (f"--{flag}", str(_file(keys, name)))]
    command += ["--node-config", " ".join(f"{k}={_toml(v)}" for k, v in _node(spec, sharing or Sharing()).items())]
    connection.home.mkdir(parents=True, exist_ok=True)
    log = Path(folder) / f"supernode-{spec.name}.log"
    return programs.start(f"The SuperNode of {spec.name}", command, environment(connection.home, more), log)


def _node(spec: EdgeSpec, sharing: Sharing) -> dict[str, Any]:
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
        RetouchError: Too few edges have answered, or the run could not be started.
    """
    _require()
    out = Path(out).absolute()
    save_run(run, model if not Path(model).exists() else str(Path(model).absolute()), out)
    for name in ("result.json", "error.json"):
        (out / name).unlink(missing_ok=True)
    _configure(connection)
    command = [executable("flwr"), "run", str(_app(out)), CONNECTION, "--stream"]
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


def _app(out: Path) -> Path:
    folder = out / "app"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(_PYPROJECT.format(version=__version__), encoding="utf-8")
    (folder / "retouch_edges.py").write_text(_MODULE, encoding="utf-8")
    return folder


# ---------------------------------------------------------------- a simulation


def simulate_by_flower(model: str, edges: Sequence[EdgeSpec], run: Run, out: Path, sharing: Sharing) -> Outcome:
    """Start a SuperLink that simulates the edges, carry out the run there, and stop it.

    Raises:
        RetouchError: As `submit`.
    """
    from .client_app import EDGES, THREADS

    n = len(edges)
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    store.write_json_atomic(out / "nodes.json", [_node(e, sharing) for e in edges])
    more = {EDGES: str(out / "nodes.json"), THREADS: str(_threads())}
    if importlib.util.find_spec("ray") is None:
        raise UserError("ray is not installed; simulating through Flower needs it: pip install 'retouch[edges]'.")
    with Programs() as programs:
        _, connection = serve(programs, out / "superlink", port=free_port(), simulation=True, more=more)
        all_here = replace(run, shared_cache=True, settings=replace(run.settings, n_edges=n))
        how = f"num-supernodes={n} client-resources-num-cpus={os.cpu_count() or 1}"  # one edge at a time
        return submit(connection, all_here, model, out, federation=how)


def _threads() -> int:
    import torch

    return torch.get_num_threads()
