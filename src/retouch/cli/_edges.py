"""``retouch fuse simulate, keys, serve, join, submit``: edges on one machine or on many."""

from __future__ import annotations

import signal
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _options, _show
from ._settings import EXTRA, method_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..fuse._processes import Program
    from ..fuse.cloud import Outcome
    from ..fuse.edge import EdgeSpec, Sharing
    from ..fuse.runs import Run

__all__ = ["add_to"]

_METHOD = Annotated[str, typer.Option(help="How adapters are fused; settings behind colons: tsv:lam=1.5.")]
_HOW = Annotated[str, typer.Option("--run", help="Settings of the run: quorum=0.5:deadline_s=600:score=wanda.")]
_SHARE = Annotated[str, typer.Option("--share", help="What edges let out: loss=true:count=bucket:privacy=local-dp.")]
_REPLAY = Annotated[Path | None, typer.Option(help="Public examples that every edge mixes in.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to ``retouch fuse``."""
    app.command(context_settings=EXTRA)(simulate)
    app.command()(keys)
    app.command()(serve)
    app.command()(join)
    app.command(context_settings=EXTRA)(submit)


# ---------------------------------------------------------------- one machine


def simulate(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="The whole model: a folder, a .gguf file, or smollm2.")] = "smollm2",
    edge: Annotated[
        list[str] | None, typer.Option(help="NAME=EXAMPLES, with what it can hold: law=law.jsonl:ratio=0.4:rank=4.")
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Three made-up sites, pruned differently; needs no data.")
    ] = False,
    engine: Annotated[str, typer.Option(help="local (a loop) or flower (messages between processes).")] = "local",
    method: _METHOD = "cat",
    how: _HOW = "",
    share: _SHARE = "",
    replay: _REPLAY = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The run's folder; a run that was stopped goes on.")] = Path(
        "edges"
    ),
    json_: _options.Json = False,
) -> None:
    """Prune, train, recover and fuse with all edges on this machine. Training settings are flags: --rank 8 --epochs 3 …

    Example: retouch fuse simulate --demo -o edges
    """
    from ..errors import UserError
    from ..fuse.simulate import simulate as go

    if demo == bool(edge):
        raise UserError("Name edges (--edge NAME=EXAMPLES), or ask for the demonstration (--demo).")
    if demo:
        from ..fuse._edges_demo import demo_edges

        context.args[:0] = ["--n-steps", "40", "--learning-rate", "2e-3", "--dropout", "0", "--save-every", "10"]
        how = ":".join(filter(None, ["dtype=bfloat16:text_tokens=1024", how]))
        edges = demo_edges(out / "examples")
    else:
        edges = [_edge(text) for text in edge or ()]
    run = _run(context, how, method, replay)
    with _show.progress():
        outcome = go(base, edges, run, out, _engine(engine), sharing=_sharing(share))
        recalls = _recalls(base, edges, outcome) if demo else []
    _tell(outcome, json_)
    if recalls and not json_:
        _show.table(
            "Facts of each site answered rightly, of four possible answers (guessing: 0.25)",
            ["site", "base", "own adapter", "fused"],
            recalls,
        )


def _recalls(base: str, edges: list[EdgeSpec], outcome: Outcome) -> list[list[Any]]:
    from ..fuse._edges_demo import recall
    from ..fuse.adapter_file import open_adapter
    from ..fuse.train import read_examples
    from ..model import open_model

    model = open_model(base)
    fused, rows = open_adapter(outcome.fused, model), []
    for edge in edges:
        own = open_adapter(outcome.fused.parent / "adapters" / edge.name, model)
        facts = read_examples(edge.examples)
        rows.append([edge.name, *(recall(model, adapter, facts) for adapter in (None, own, fused))])
    return rows


# ---------------------------------------------------------------- many machines


def keys(
    host: Annotated[
        str, typer.Option(help="Names and addresses of the cloud, with commas; localhost is always among them.")
    ] = "",
    edge: Annotated[list[str] | None, typer.Option(help="Name of an edge; once for each.")] = None,
    revoke: Annotated[
        list[str] | None, typer.Option(help="Name of an edge that may join no more; on the cloud's machine.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="To revoke: the folder of `fuse serve`.")] = Path("cloud"),
    days: Annotated[int, typer.Option(help="How long certificates are valid.")] = 90,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder; what is there already stays.")] = Path("keys"),
    json_: _options.Json = False,
) -> None:
    """Make keys and certificates for the cloud and for each edge that may join, or revoke an edge's key.

    Example: retouch fuse keys --host cloud.example --edge law --edge news -o keys
    """
    from ..errors import UserError
    from ..fuse.keys import make_keys

    if revoke:
        if host or edge:
            raise UserError("Make keys (--host, --edge) or revoke some (--revoke): one at a time.")
        _revoke(revoke, folder, out, json_)
        return
    if not edge:
        raise UserError("Name at least one edge: --edge NAME.")
    made = make_keys(out, host.split(","), edge, days=days)
    if json_:
        _show.emit({"cloud": str(made.cloud), "edges": {name: str(place) for name, place in made.edges.items()}})
        return
    _show.say(f"{made.folder / 'ca.key'} signs all others: it stays with you, offline.")
    _show.say(f"To the cloud: {made.cloud}, and node.pub of each edge.")
    for name, place in made.edges.items():
        _show.say(f"To {name}: {place}")


def _revoke(names: list[str], folder: Path, keys: Path, json_: bool) -> None:
    from ..fuse.deployment import Connection
    from ..fuse.deployment import revoke as take_away
    from ..fuse.edge import check_name
    from ..fuse.keys import retire

    told = {}
    for name in map(check_name, names):
        public = keys / "edges" / name / "node.pub"
        told[name] = take_away(Connection("", folder / "flower"), name, public if public.is_file() else None)
        retire(keys, name)
    if json_:
        _show.emit({name: {"revoked": True, "superlink_told": now} for name, now in told.items()})
        return
    for name, now in told.items():
        when = "now" if now else "when the SuperLink is started again (none runs)"
        _show.say(f"{name} is revoked: it is turned away {when}, and no later serve lets this key in.")


def serve(
    folder: Annotated[Path, typer.Option(help="For logs, the list of runs and Flower's own files.")] = Path("cloud"),
    host: Annotated[
        str, typer.Option(help="Address to listen on for edges; runs and keys are taken from this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    key_folder: _options.Keys = None,
    allow: Annotated[list[Path] | None, typer.Option(help="node.pub of an edge that may join; once for each.")] = None,
) -> None:
    """Let edges join, until Ctrl-C. Without keys only on this machine. Whoever has an account on it controls the cloud.

    Example: retouch fuse serve --host 0.0.0.0 --keys keys/cloud --allow keys/edges/law/node.pub
    """
    from ..fuse._processes import Programs
    from ..fuse.deployment import register
    from ..fuse.deployment import serve as start

    with _ended_by_signals(), Programs() as programs:
        program, connection = start(programs, folder, host=host, port=port, keys=key_folder)
        for public in allow or ():
            if not register(connection, public):
                _show.say(f"{public} was revoked and is not let in. Give the edge a new key: retouch fuse keys.")
        _show.say(f"Serving at {host}:{port}; log: {program.log}. Stop with Ctrl-C.")
        _until_stopped(program)


def join(
    address: Annotated[str, typer.Argument(help="HOST:PORT of the cloud.")],
    edge: Annotated[str, typer.Option(help="NAME=EXAMPLES, with what it can hold: law=law.jsonl:budget_mib=900.")],
    key_folder: Annotated[Path | None, typer.Option("--keys", help="This edge's folder that `fuse keys` made.")] = None,
    share: _SHARE = "",
    folder: Annotated[Path, typer.Option(help="For the log and Flower's own files.")] = Path("edge"),
) -> None:
    """Train what the cloud asks for, until Ctrl-C. Examples stay here; only the adapter leaves. No program is fetched.

    Example: retouch fuse join cloud.example:8000 --edge law=law.jsonl:budget_mib=900 --keys law
    """
    from ..fuse._processes import Programs
    from ..fuse.deployment import Connection
    from ..fuse.deployment import join as start

    spec, connection = _edge(edge), Connection(address, folder / "flower", key_folder and key_folder / "ca.pem")
    with _ended_by_signals(), Programs() as programs:
        program = start(programs, connection, spec, folder, keys=key_folder, sharing=_sharing(share))
        _show.say(f"{spec.name} joins {address}; log: {program.log}. Stop with Ctrl-C.")
        if not _answers(address):
            sys.stderr.write(
                f"warning: Nothing listens at {address} yet. The edge goes on trying; check the address.\n"
            )
        _until_stopped(program)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def submit(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="The whole model: a folder, a .gguf file, or smollm2.")],
    address: Annotated[
        str, typer.Option(help="HOST:PORT that `fuse serve` listens on, on this machine.")
    ] = "127.0.0.1:8000",
    key_folder: _options.Keys = None,
    folder: Annotated[Path, typer.Option(help="The folder of `fuse serve`.")] = Path("cloud"),
    method: _METHOD = "cat",
    how: _HOW = "",
    replay: _REPLAY = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The run's folder; started again, only what is missing is asked for.")
    ] = Path("run"),
    json_: _options.Json = False,
) -> None:
    """Ask all edges that have joined for an adapter, and fuse what comes. Training settings are flags.

    Example: retouch fuse submit smollm2 --keys keys/cloud --run n_edges=3:deadline_s=1800 --rank 8 -o run
    """  # fmt: skip
    from ..fuse.deployment import Connection
    from ..fuse.deployment import submit as go

    connection = Connection(address, folder / "flower", key_folder and key_folder / "ca.pem")
    with _ended_by_signals(), _show.progress():
        outcome = go(connection, _run(context, how, method, replay), base, out)
    _tell(outcome, json_)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a request to end the process unwind it, so that what it started is stopped."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _until_stopped(program: Program) -> None:
    from ..errors import RetouchError

    while program.running:
        time.sleep(1.0)
    raise RetouchError(f"{program.name} has ended. Its log, {program.log}, ends with:\n{program.tail()}")


# ---------------------------------------------------------------- reading what was asked


def _edge(text: str) -> EdgeSpec:
    """Read ``law=law.jsonl:ratio=0.4:rank=4``."""
    from ..errors import UserError
    from ..fuse.edge import EdgeSpec, check_name

    name, given, rest = text.partition("=")
    path, *settings = rest.split(":")
    kinds: dict[str, Any] = {"budget_mib": float, "ratio": float, "rank": int}
    known: dict[str, Any] = {}
    for word in settings:
        key, _, value = word.partition("=")
        try:
            known[key] = kinds[key](value)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"--edge {text}: {word!r} is none of budget_mib=, ratio= and rank= with a number."
            ) from error
    if not given or not path:
        raise UserError(f"--edge {text}: write NAME=EXAMPLES, such as law=law.jsonl.")
    return EdgeSpec(check_name(name), Path(path), **known)


def _run(context: typer.Context, how: str, method: str, replay: Path | None) -> Run:
    from .. import registry
    from ..fuse.runs import Run, RunSettings
    from ..fuse.train import LoraSettings, read_examples
    from ..settings import from_flags

    (chosen,) = registry.parse("fuse", method).values()
    settings = from_flags(RunSettings, _flags(how))
    public = read_examples(replay) if replay else ()
    return Run(settings=settings, lora=method_of(context, LoraSettings), method=chosen, replay=public)


def _sharing(text: str) -> Sharing:
    from ..fuse.edge import Sharing
    from ..fuse.privacy import refuse_unshipped
    from ..settings import from_flags

    sharing = from_flags(Sharing, _flags(text))
    refuse_unshipped(sharing.privacy)
    return sharing


def _flags(text: str) -> list[str]:
    return [f"--{word}" for word in text.split(":") if word]


def _engine(text: str) -> Any:
    from ..errors import unknown

    if text not in ("local", "flower"):
        raise unknown("engine", text, ("local", "flower"))
    return text


def _tell(outcome: Outcome, json_: bool) -> None:
    if json_:
        _show.emit(outcome.to_dict())
        return
    rows = []
    for name in outcome.edges:
        facts = outcome.facts[name]
        state = "partial" if name in outcome.partial else "from before" if name in outcome.resumed else ""
        rows.append([name, facts["n_examples"], facts["ratio"], facts["rank"], facts["bytes"] / 2**20, state])
    _show.table("Edges", ["edge", "examples", "pruned", "rank", "MiB sent", ""], rows)
    for name in outcome.absent:
        _show.say(f"{name} is not in it: {outcome.why.get(name, 'no answer')}")
    _show.say(f"Saved as {outcome.fused}; plain PEFT loads it.")
