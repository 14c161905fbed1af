"""What a run of edges is, apart from the model and the edges: how it prunes, trains, waits and fuses; kept as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import registry, store
from ..errors import StoreError, UserError
from ..settings import Settings, setting, with_settings
from .base import MAX_EXAMPLES, Example, FuseMethod, Resolver
from .cat import Cat
from .edge import Capabilities, settings_of
from .privacy import check_privacy
from .train import LoraSettings

__all__ = ["Run", "RunSettings", "check_run", "counts", "open_run", "refused_edges", "save_run"]


@dataclass(frozen=True)
class RunSettings(Settings):
    """How a run prunes, waits and fuses."""

    score: Literal["random", "magnitude", "wanda", "taylor", "flap"] = setting("wanda", "How units are compared.")
    align: Literal["none", "bias", "lstsq", "distil"] = setting("bias", "What makes up for the pruned weights.")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "Type of the pruned weights that edges are given.")
    text_tokens: int = setting(16_384, "Tokens of public text that scores and alignment look at.", ge=1)
    max_tokens: int = setting(256, "Tokens of a training row, for the prediction of an edge's memory.", ge=2)
    seed: int = setting(0, "Seed of the pruning.", ge=0)
    n_edges: int = setting(2, "Edges that are waited for.", ge=1)
    min_edges: int = setting(2, "Adapters without which nothing is fused.", ge=1)
    quorum: float = setting(0.5, "Share of the edges without whose adapters nothing is fused.", gt=0, le=1)
    join_timeout_s: float = setting(120.0, "Seconds to wait for edges.", gt=0)
    deadline_s: float = setting(3600.0, "Seconds after which edges stop training and send what is there.", gt=0)
    grace_s: float = setting(300.0, "Seconds beyond the deadline in which answers are taken.", gt=0)
    weights: Literal["equal", "examples"] = setting("equal", "Share of each adapter in the fusion.")


@dataclass(frozen=True, eq=False)
class Run:
    """Everything that decides a run, besides the model and the edges.

    Attributes:
        name: Of the run; the journal keeps runs apart by it.
        settings: How it prunes, waits and fuses.
        lora: How edges train.
        method: How adapters are fused.
        resolver: What stands before the method.
        replay: Public examples that edges mix in.
        shared_cache: The edges see this machine's cache, so that pruned models are put there and never sent.
    """

    name: str = "run"
    settings: RunSettings = field(default_factory=RunSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    method: FuseMethod = field(default_factory=Cat)
    resolver: Resolver | None = None
    replay: tuple[Example, ...] = ()
    shared_cache: bool = False


def check_run(run: Run) -> None:
    """Refuse a fusion that could not be done once the adapters are here: the cloud has them, the base, and no data.

    Raises:
        UserError: The method needs questions or moments, or the resolver cannot stand before it.
    """
    method, resolver = run.method, run.resolver
    if method.needs:
        what = "questions of the domains" if method.needs == "selection" else "second moments of every edge's inputs"
        then = (
            f"Let the run fuse by cat; then fuse its adapters again where the questions are: retouch fuse merge MODEL "
            f"RUN/adapters/… --method {method.name} --data QUESTIONS."
            if method.needs == "selection"
            else "Edges do not send them, since they tell something of the data. Fuse by cat."
        )
        raise UserError(f"{method.name} needs {what}, which the cloud of a run does not have. {then}")
    if resolver is None:
        return
    if not method.resolvable:
        raise UserError(f"{method.name} fuses factors, so no resolver can stand before it. Leave {resolver.name} out.")
    if getattr(resolver, "space", "core") != "core" and not method.takes_entries():
        raise UserError(
            f"{resolver.name} changes single entries, at which {method.label} does not look. Set space=core for it, or "
            "fuse by cat or a method of entries such as ties."
        )


def refused_edges(run: Run, edges: Sequence[Capabilities]) -> dict[str, str]:
    """Say which edges ask for what the run cannot do, before any of them trains; the others go on without them.

    Returns:
        The reason for each of them, by name.
    """
    found = {edge.name: why for edge in edges if (why := _refused(run, edge))}
    ranks = {edge.name: edge.rank or run.lora.rank for edge in edges if edge.name not in found}
    if run.method.gauge_dependent and ranks:
        told = sorted(ranks.values())
        usual = max(told, key=told.count)
        for name in (name for name, rank in ranks.items() if rank != usual):
            found[name] = (
                f"{run.method.name} fuses factors and so needs equal ranks; most edges have {usual}, and {name} has "
                f"{ranks[name]}. Use cat, or rank={usual} there."
            )
    return found


def _refused(run: Run, edge: Capabilities) -> str:
    try:
        check_privacy(edge.privacy, edge.name, freeze_a=run.lora.freeze_a)
    except UserError as error:
        return str(error)
    if run.settings.weights == "examples" and edge.n_examples and not counts(edge.n_examples):
        return (
            f"The edge {edge.name} tells only the order of its number of examples (count=bucket) or none at all, and the run "
            "weighs adapters by that number. Set count=exact there, or weights=equal in the run."
        )
    return ""


def counts(told: str) -> bool:
    """Say whether an edge has told a number of examples by which its adapter can be weighed."""
    return told.isascii() and told.isdecimal() and len(told) <= len(str(MAX_EXAMPLES)) and 0 < int(told) <= MAX_EXAMPLES


def save_run(run: Run, model: str, folder: Path) -> None:
    """Write a run, and which model it is about, to its folder.

    Raises:
        StoreError: It cannot be written.
    """
    record = {
        "kind": "run", "format": 1, "model": model, "name": run.name, "settings": run.settings.to_dict(),
        "lora": run.lora.to_dict(), "method": _named(run.method), "resolver": run.resolver and _named(run.resolver),
        "replay": [asdict(e) for e in run.replay], "shared_cache": run.shared_cache,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    store.write_json_atomic(folder / "run.json", record)


def _named(item: FuseMethod | Resolver) -> dict[str, Any]:
    return {"name": item.name, "settings": item.to_dict()}


def open_run(folder: Path) -> tuple[Run, str]:
    """Read a run and the name of its model.

    Raises:
        StoreError: The folder holds none, or a damaged one.
    """
    record = store.read_json(folder / "run.json")
    if not isinstance(record, dict) or record.get("kind") != "run" or record.get("format") != 1:
        raise StoreError(f"{folder / 'run.json'} is no run of format 1. Start the run again.")
    try:
        method, resolver = record["method"], record["resolver"]
        run = Run(
            record["name"], with_settings(RunSettings, record["settings"]), settings_of(record["lora"]),
            registry.make("fuse", method["name"], **method["settings"]),
            resolver and _resolver(resolver["name"], resolver["settings"]),
            tuple(Example(**e) for e in record["replay"]), record["shared_cache"],
        )  # fmt: skip
        return run, record["model"]
    except (KeyError, TypeError) as error:
        raise StoreError(f"{folder / 'run.json'} lacks a part of a run: {error!r}. Start the run again.") from error


def _resolver(name: str, settings: Mapping[str, Any]) -> Resolver:
    from .cr_sign import CRSign
    from .cr_subspace import CRSubspace

    known: dict[str, type[Resolver]] = {"cr_sign": CRSign, "cr_subspace": CRSubspace}
    return with_settings(known[name], settings)
