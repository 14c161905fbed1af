"""What the flags of ``retouch fuse`` name: models, adapters, suites, resolvers, numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..fuse.suites import Suite
    from ..model import Model

__all__ = ["number", "open_any", "open_base", "parse_numbers", "parse_resolvers", "parse_suite", "resolver_of",
           "share_of", "whole_mib"]  # fmt: skip


def open_base(source: str) -> Model:
    from ..model import open_model

    return open_model(source)


def open_any(source: str) -> Model:
    """Open a pruned folder or a model."""
    from ..fuse.pruned import open_pruned
    from ..store import read_json

    record = Path(source) / "retouch.json"
    if record.is_file() and read_json(record).get("kind") == "pruned":
        return open_pruned(source)
    return open_base(source)


def parse_suite(data: str, seed: int = 0, wording: str = "") -> Suite:
    """Read a suite: own folders, MMLU, or the published sets of text-cd (text-cd:sst2,rte names some)."""
    from dataclasses import replace

    from ..fuse.templates import template

    suite = _suite(data, seed)
    return replace(suite, template=template(wording).name) if wording else suite


def _suite(data: str, seed: int) -> Suite:
    import os

    from ..errors import UserError
    from ..fuse.suites import TEXT_DOMAINS, folders, text_cd

    name, _, domains = data.partition(":")
    if name == "text-cd":
        if not os.environ.get("RETOUCH_DATA"):
            raise UserError(
                "text-cd reads published files: set RETOUCH_DATA to the folder that holds sentence_cls and glue."
            )
        return text_cd(os.environ["RETOUCH_DATA"], domains.split(",") if domains else TEXT_DOMAINS, seed=seed)
    return folders(data, seed=seed)


def number(flag: str, text: str) -> float:
    from ..errors import UserError

    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--{flag} must be a number; got {text!r}.") from error


def parse_numbers(flag: str, text: str) -> list[float]:
    """Read numbers with commas between."""
    return [number(flag, part) for part in text.split(",")]


def share_of(text: str) -> float:
    from ..errors import UserError

    share = number("budget", text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < share <= 1:
        raise UserError(f"--budget is a share of what the whole model needs, such as 60% or 0.6; got {text!r}.")
    return share


def whole_mib(model: Model, load: Any) -> float:
    """Return what training needs without pruning, in MiB."""
    from ..fuse._units import units_of
    from ..fuse.memory import predicted

    units = units_of(model)
    widths = {b: (len(units.whole.kv), len(units.whole.ff)) for b in range(model.anatomy.n_blocks)}
    return predicted(model, units, widths, load).mib


def parse_resolvers(text: str) -> dict[str, Any]:
    """Read resolvers with commas between, by the words that named them."""
    found = {word: resolver_of(word) for word in (part.strip() for part in text.split(","))}
    return {word: resolver for word, resolver in found.items() if resolver is not None}


def resolver_of(text: str) -> Any:
    """Read ``cr-sign:beta=0.5`` as a resolver."""
    if text in ("", "none"):
        return None
    from ..errors import unknown
    from ..fuse.cr_sign import CRSign
    from ..fuse.cr_subspace import CRSubspace
    from ..settings import from_flags

    known: dict[str, Any] = {"cr_sign": CRSign, "cr_subspace": CRSubspace}
    name, *settings = text.split(":")
    key = name.strip().lower().replace("-", "_")
    if key not in known:
        raise unknown("resolver", name, known)
    return from_flags(known[key], [f"--{s}" for s in settings])
