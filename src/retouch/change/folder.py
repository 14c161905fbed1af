"""A saved change: factors, a record for programs, a page for people."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__, store
from ..errors import StoreError
from .parts import Change, Dense, LowRank, Part

__all__ = ["FORMAT", "load", "read_record", "save", "versions"]

FORMAT = 1


def versions() -> dict[str, str]:
    """Name the versions that a saved thing was made with."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"retouch": __version__, "python": platform.python_version(), **packages}


def save(change: Change, path: str | Path) -> None:
    """Write a change as a folder: factors, a record for programs, a page for people; whole or not at all."""
    tensors = {f"{n}/{k}": t.float().contiguous() for n, p in change.parts.items() for k, t in p.tensors().items()}
    for kind, columns in (("keys", change.keys), ("targets", change.targets)):
        tensors |= {f"{n}/{kind}": t.float().contiguous() for n, t in columns.items()}
    record = {
        "format": FORMAT,
        "kind": "change",
        "id": change.id,
        "method": change.method,
        "settings": dict(change.settings),
        "base": change.base,
        "facts": [dict(f) for f in change.facts],
        "notes": dict(change.notes),
        "report": dict(change.report),
        "versions": versions(),
    }
    with store.writing(path) as folder:
        store.save_tensors(folder / "change.safetensors", tensors)
        (folder / "retouch.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        (folder / "README.md").write_text(_card(change), encoding="utf-8")


def load(path: str | Path) -> Change:
    """Read a change and check all of it: manifest, hashes, names, shapes, finite numbers, id.

    Raises:
        StoreError: Anything is missing, extra, damaged or of a newer format.
    """
    path = Path(path)
    store.check_folder(path)
    record = read_record(path)
    parts, columns = _parts(path, store.load_tensors(path / "change.safetensors"))
    change = Change(
        **{n: record[n] for n in _RECORD},
        parts=parts,
        facts=tuple(record["facts"]),
        keys=columns["keys"],
        targets=columns["targets"],
    )
    if change.id != record.get("id"):
        raise StoreError(f"{path}: the content does not match its id {record.get('id')!r}. The record was altered.")
    return change


_RECORD = {"method": str, "base": str, "settings": dict, "notes": dict, "report": dict}


def read_record(path: Path) -> dict[str, Any]:
    """Read what a saved change says of itself, without its factors: its facts, settings and measurements.

    Raises:
        StoreError: It is no change of ours, or its record is damaged.
    """
    record = store.read_json(path / "retouch.json")
    record = record if isinstance(record, dict) else {}
    if record.get("kind") != "change" or record.get("format") != FORMAT:
        raise StoreError(
            f"{path} is no change of format {FORMAT} (kind {record.get('kind')!r}, format {record.get('format')!r})."
        )
    facts = record.get("facts")
    wrong = [n for n, kind in _RECORD.items() if not isinstance(record.get(n), kind)]
    if wrong or not isinstance(facts, list) or not all(isinstance(f, dict) for f in facts):
        raise StoreError(f"{path}: retouch.json lacks {(wrong or ['facts'])[0]!r} or holds something else there.")
    return record


def _parts(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Part], dict[str, dict[str, Tensor]]]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        weight, _, kind = name.rpartition("/")
        if tensor.dim() != 2 or not weight:
            raise StoreError(f"{path}: the tensor {name!r} of shape {tuple(tensor.shape)} does not belong in a change.")
        grouped.setdefault(weight, {})[kind] = tensor
    parts: dict[str, Part] = {}
    columns: dict[str, dict[str, Tensor]] = {"keys": {}, "targets": {}}
    for weight, found in grouped.items():
        for kind in columns.keys() & found.keys():
            columns[kind][weight] = found.pop(kind)
        if found.keys() == {"left", "right"} and found["left"].shape[1] == found["right"].shape[0]:
            parts[weight] = LowRank(found["left"], found["right"])
        elif found.keys() == {"difference"}:
            parts[weight] = Dense(found["difference"])
        else:
            raise StoreError(
                f"{path}: {weight} has the tensors {sorted(found)}; left and right, or difference, belong."
            )
        _check_columns(path, weight, parts[weight].shape, {k: c[weight] for k, c in columns.items() if weight in c})
    return parts, columns


def _check_columns(path: Path, weight: str, shape: tuple[int, int], columns: Mapping[str, Tensor]) -> None:
    lengths = {"keys": shape[1], "targets": shape[0]}
    for kind, tensor in columns.items():
        if tensor.shape[0] != lengths[kind] or tensor.shape[1] != next(iter(columns.values())).shape[1]:
            shapes = ", ".join(f"{k} {'x'.join(map(str, t.shape))}" for k, t in sorted(columns.items()))
            raise StoreError(f"{path}: {weight} is {'x'.join(map(str, shape))}, to which {shapes} do not fit.")


def _card(change: Change) -> str:
    lines = [
        f"# A change of model {change.base[:12]}, planned by {change.method}",
        "",
        f"Id {change.id}; {len(change.facts)} facts, {len(change.parts)} weights, {change.n_numbers:,} numbers.",
        "",
        *(
            f"- {f.get('prompt', '').replace('{}', f.get('subject', ''))} **{f.get('target', '')}**"
            for f in change.facts[:50]
        ),
        *([f"- and {len(change.facts) - 50} more"] if len(change.facts) > 50 else []),
        "",
        "| weight | rank | Frobenius norm |",
        "| --- | --- | --- |",
        *(f"| {n} | {v['rank']:.0f} | {v['frobenius']:.4g} |" for n, v in change.norms().items()),
        "",
        'Use it with `retouch ask MODEL "text" --change THIS`, `retouch apply MODEL THIS -o OUT`, or as a LoRA adapter '
        "(`retouch.to_peft`).",
        "",
    ]
    return "\n".join(lines)
