"""Read the tables of families from their files. See llama.yaml for what a table says."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .._undescribed import undescribed
from ..errors import ModelError

__all__ = ["axes_of", "table_of", "tables"]

_REQUIRED = ("model_types", "kind", "body", "blocks", "embed", "head", "steps", "block", "sizes", "tied")
_OPTIONAL: dict[str, Any] = {
    "final_norm": None,
    "axes": "out_in",
    "parallel": False,
    "flat_mlp": False,
    "softcap": None,
    "mlp_norm": None,
    "d_ff_multiple": None,
    "groups": (),
}


def table_of(config: Any) -> dict[str, Any]:
    """Return the table of a configuration's family.

    Raises:
        ModelError: The family has no table; the message says how to write one.
    """
    family = getattr(config, "model_type", None) or ""
    known = tables()
    if family not in known:
        raise undescribed(family, known)
    return known[family]


def tables() -> dict[str, dict[str, Any]]:
    """Return all tables by model type: those beside this file, and over them those of ``RETOUCH_ANATOMY``."""
    folder = os.environ.get("RETOUCH_ANATOMY")
    return {**_own_tables(), **(_read(Path(folder)) if folder else {})}


def axes_of(table: Mapping[str, Any]) -> dict[str, str]:
    """Return how each part of a block is stored: ``out_in`` or ``in_out``.

    Raises:
        ModelError: The table says something else, or says it of a part that it does not have.
    """
    stated = table["axes"]
    axes = dict(stated) if isinstance(stated, Mapping) else dict.fromkeys(table["block"], stated)
    if wrong := set(axes.values()) - {"in_out", "out_in"}:
        raise ModelError(f"{table['file']}: axes must be in_out or out_in; got {', '.join(map(str, wrong))}.")
    if surplus := sorted(set(axes) - set(table["block"])):
        raise ModelError(
            f"{table['file']}: axes of {', '.join(surplus)}, but its blocks have {', '.join(table['block'])}."
        )
    return axes


@functools.cache
def _own_tables() -> dict[str, dict[str, Any]]:
    return _read(Path(__file__).parent)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    if not folder.is_dir():
        raise ModelError(f"RETOUCH_ANATOMY must name a folder of tables; there is no folder {folder}.")
    tables = [_load(path) for path in sorted(folder.glob("*.yaml"))]
    return {model_type: table for table in tables for model_type in table["model_types"]}


def _load(path: Path) -> dict[str, Any]:
    """Read one table; ``like: llama`` takes all that it does not say from llama.yaml."""
    table = _parse(path)
    if like := table.pop("like", None):
        beside, own = path.with_name(f"{like}.yaml"), Path(__file__).with_name(f"{like}.yaml")
        table = _load(beside if beside.is_file() and beside != path else own) | table
    table = _OPTIONAL | table | {"file": str(path)}
    missing = [key for key in _REQUIRED if key not in table]
    surplus = sorted(set(table) - {*_REQUIRED, *_OPTIONAL, "file"})
    if missing or surplus:
        says = "; ".join(
            f"{what} {', '.join(keys)}" for what, keys in (("missing", missing), ("unknown", surplus)) if keys
        )
        raise ModelError(f"{path}: {says}. Allowed: {', '.join([*_REQUIRED, *_OPTIONAL])}, like.")
    return table


def _parse(path: Path) -> dict[str, Any]:
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"{path} cannot be read as a table: {error}") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path} must be a table of names and values; got {type(table).__name__}.")
    return table
