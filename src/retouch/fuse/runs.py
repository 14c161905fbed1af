"""What a run of edges is, apart from the model and the edges: how it prunes, trains, waits and fuses; kept as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import registry, store
from ..errors import StoreError
from ..settings import Settings, setting, with_settings
from .base import Example, FuseMethod, Resolver
from .cat import Cat
from .edge import settings_of
from .train import LoraSettings

__all__ = ["Run", "RunSettings", "open_run", "save_run"]


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
