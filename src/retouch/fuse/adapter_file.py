"""Adapters in files and over networks: those of strangers, read without trust, and ours, written for everyone.

A stranger's folder is read by us alone: a configuration by an allowlist of keys, tensors by a header that must account
for every byte, names that the anatomy knows, numbers that are finite and small. No pickle, no pattern and no code of it
is ever used, and what is refused says why. What we write, plain PEFT loads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import store
from ..change import LowRank
from ..errors import StoreError, WrongBase
from ..model import Model
from ..progress import track
from ._adapter_config import AdapterConfig, check_agreement, read_config
from ._adapter_writing import CONFIG, FORMAT, KIND, MAX_RECORD, RECORD, write_adapter
from ._factors import TENSORS, Factors, Place, by_path, check_shapes, checked, norms_of, paired, read_pair, shapes_of
from ._folder import KIB, Folder, opened, quoted
from ._header import Entry, read_header
from ._kept import check_unseen, unpacked
from .base import MAX_EXAMPLES, Adapter, Kept

__all__ = [
    "Origin",
    "check_tensors",
    "named_tensors",
    "open_adapter",
    "origin_of",
    "ranks_of",
    "weight_norms",
    "write_adapter",
]

_MANIFEST = "manifest.json"
_WRITTEN = {CONFIG, TENSORS, RECORD, _MANIFEST, "README.md"}
_LIMITS = {CONFIG: 64 * KIB, _MANIFEST: 64 * KIB}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def open_adapter(
    path: str | Path,
    model: Model,
    *,
    name: str | None = None,
    base_unverified: bool = False,
    targets_from_tensors: bool = False,
) -> Adapter:
    """Open a LoRA adapter of whatever origin, and check all of it without keeping it in memory.

    Its factors are read again, one weight at a time, when they are asked for, with every scale folded in.

    Source: the format is PEFT's; its reading is ours, because PEFT lets extra tensors overwrite the base, loads NaN,
        does not compare bases and compiles patterns of a stranger.

    Known problems: without the weights of `model` (on the meta device) the size of the change cannot be compared;
        ``notes["file"]["norms"]`` says so.

    Args:
        path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: The base; its anatomy tells which modules there are.
        name: What reports call the adapter; by default the folder's name.
        base_unverified: Take a folder that does not say which base it belongs to.
        targets_from_tensors: Let the tensors' names tell which modules are changed, where the configuration holds a
            pattern, which is never compiled.

    Returns:
        The adapter. ``notes["file"]`` tells where it came from and what was not checked.

    Raises:
        StoreError: Anything is damaged, hostile, unknown or no plain LoRA.
        WrongBase: It belongs to another model.
    """
    with opened(Path(path).absolute()) as folder:
        _check_names(folder)
        data = folder.read(CONFIG, _LIMITS[CONFIG])
        config = read_config(folder.parsed(data, CONFIG), folder.path / CONFIG, targets_from_tensors)
        with folder.file(TENSORS) as file:
            entries = read_header(file, folder.path / TENSORS)
            places = _fitting(folder, entries, config, model)
            _check_manifest(folder)
            record = _record(folder, {CONFIG: data, TENSORS: file})
            base = _base(folder, record, model, base_unverified)
            kept = _kept(folder, record, places)
            norms = norms_of(model, places)
            for weight in track(list(places), f"check {folder.path.name}"):
                place = replace(places[weight], norm=norms.get(weight))
                part, digest = read_pair(file, weight, place, folder.path / TENSORS)
                check_unseen(weight, part, kept.get(weight), str(folder.path / TENSORS))
                places[weight] = replace(place, digest=digest)
    facts = {
        "path": str(folder.path),
        "base": "verified" if record else "unverified: the folder does not say which base it belongs to",
        "norms": "checked" if len(norms) == len(places) else "not checked: the base's weights are not here",
        "dropped": list(config.dropped),
    }
    return Adapter(
        name or folder.path.name,
        Factors(folder.path, places),
        base,
        kept,
        plan=record.get("plan", ""),
        n_examples=record.get("n_examples"),
        notes={**record.get("notes", {}), **_seen(record, kept), "file": facts},
    )


@dataclass(frozen=True)
class Origin:
    """What a folder says of where its adapter comes from.

    Attributes:
        base: Fingerprint of the model before any change.
        plan: Hash of the pruning plan; empty if the model was whole.
        recovered: Whether it was brought to the whole model's sizes since.
    """

    base: str
    plan: str
    recovered: bool


def origin_of(path: str | Path) -> Origin:
    """Read where an adapter says it comes from, before any model is opened for it; no tensor is looked at.

    Raises:
        StoreError: The folder cannot be read, or Retouch did not write it.
    """
    with opened(Path(path).absolute()) as folder:
        record = _record(folder, {})
    if not record:
        raise StoreError(
            f"{folder.path} does not say which model and plan it was trained for (it has no {RECORD}). Use what "
            "`retouch fuse train` wrote."
        )
    return Origin(record["base"], record["plan"], "kept" in record)


def ranks_of(adapter: Adapter) -> dict[str, int]:
    """Return the rank of each weight's factors; an adapter in a file is not read for it."""
    if isinstance(adapter.parts, Factors):
        return adapter.parts.ranks
    return {name: part.rank for name, part in adapter.parts.items()}


# ---------------------------------------------------------------- tensors that came over a network


def named_tensors(parts: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Name factors for a message: ``NAME.lora_A`` (rank, inputs) and ``NAME.lora_B`` (outputs, rank) of each weight."""
    halves = (("A", "right"), ("B", "left"))
    return {f"{name}.lora_{half}": getattr(part, side) for name, part in parts.items() for half, side in halves}


def weight_norms(model: Model) -> dict[str, float]:
    """Return the Frobenius norm of every weight that an adapter may change; empty where their values are not here."""
    return norms_of(model, shapes_of(model))


def check_tensors(
    name: str,
    tensors: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    *,
    ranks: Mapping[str, int] | None = None,
    scales: Mapping[str, float] | None = None,
    norms: Mapping[str, float] | None = None,
) -> dict[str, LowRank]:
    """Check factors that came over a network as strictly as those of a file, and return them by weight.

    Args:
        name: Who sent them, for messages.
        tensors: Tensors or NumPy arrays, named as `named_tensors` does.
        shapes: Outputs and inputs of each weight that may be changed, by our names.
        ranks: If given, exactly these weights with exactly these ranks must be there.
        scales: What each weight's product is multiplied with; by default 1.
        norms: Of the weights themselves, as `weight_norms` gives them; without them sizes are not compared.

    Shapes:
        ``NAME.lora_A``: (rank, inputs); ``NAME.lora_B``: (outputs, rank).

    Raises:
        StoreError: A name, type, shape, rank, value or size is not what it should be.
    """
    where = f"the adapter from {name}"
    parts = {}
    pairs = paired(tensors, None, where)
    if stray := next((w for w in pairs if w not in shapes), None):
        raise StoreError(f"{where}: {quoted(stray)} is no weight that it may change. Do not use this adapter.")
    _check_ranks(pairs, ranks, where)
    for weight, halves in pairs.items():
        left, right = (_tensor(tensors[halves[half]], halves[half], where) for half in "BA")
        rank = check_shapes(weight, tuple(left.shape), tuple(right.shape), shapes[weight], where)
        if ranks is not None and rank != ranks[weight]:
            raise StoreError(f"{where}: {weight} has the rank {rank}, and {ranks[weight]} was agreed. Do not use it.")
        part = LowRank(left.float() * _scale(scales, weight, where), right.float())
        parts[weight] = checked(weight, part, (norms or {}).get(weight), where)
    return parts


def _check_ranks(pairs: Mapping[str, Any], ranks: Mapping[str, int] | None, where: str) -> None:
    if ranks is not None and (odd := sorted(set(pairs) ^ set(ranks))):
        what = "was agreed and is missing" if odd[0] in ranks else "was not agreed"
        raise StoreError(f"{where}: {odd[0]} {what}. Do not use this adapter; ask for it again.")


def _scale(scales: Mapping[str, float] | None, weight: str, where: str) -> float:
    scale = (scales or {}).get(weight, 1.0)
    if type(scale) not in (int, float) or not 0 < scale <= 1e4:
        raise StoreError(f"{where}: the scale of {weight} is {quoted(scale)}; it must be above 0. Do not use it.")
    return float(scale)


def _tensor(value: Any, name: str, where: str) -> Tensor:
    import numpy as np

    plain = isinstance(value, np.ndarray) and value.dtype in (np.float64, np.float32, np.float16)
    tensor = torch.from_numpy(np.ascontiguousarray(value)) if plain else value
    if (
        not isinstance(tensor, Tensor)
        or tensor.dtype not in _FLOATS
        or tensor.layout != torch.strided
        or tensor.is_meta
    ):
        raise StoreError(
            f"{where}: {quoted(name)} is no plain array of floating point numbers. Do not use this adapter."
        )
    return tensor.detach()


# ---------------------------------------------------------------- a folder


def _check_names(folder: Folder) -> None:
    """Refuse folders that hold another form of the adapter, before anything is opened."""
    pickles = sorted(n for n in folder.names if n.startswith("adapter_model.") and n.lower().endswith(_PICKLES))
    if pickles:
        raise StoreError(
            f"{folder.path / pickles[0]} may be a pickle, which runs code when it is read. Save the adapter as "
            "safetensors and remove this file."
        )
    if shards := sorted(n for n in folder.names if n.endswith(".index.json") or n.startswith("adapter_model-")):
        raise StoreError(
            f"{folder.path / shards[0]}: adapters in several files are not read, nor is an index, which may lead "
            f"anywhere. Save the adapter as one {TENSORS}."
        )


def _places(entries: Mapping[str, Entry], config: AdapterConfig, model: Model, where: Path) -> dict[str, Place]:
    known = by_path(model)
    pairs = paired(entries, known, str(where))
    shapes = shapes_of(model)
    paths = {weight: path for path, weight in known.items() if weight in pairs}
    check_agreement(config, paths.values(), model.anatomy, known)
    places = {}
    for weight, halves in pairs.items():
        left, right = entries[halves["B"]], entries[halves["A"]]
        rank = check_shapes(weight, left.shape, right.shape, shapes[weight], str(where))
        places[weight] = Place(left, right, config.scale(paths[weight], rank), None)
    return places


def _fitting(folder: Folder, entries: Mapping[str, Entry], config: AdapterConfig, model: Model) -> dict[str, Place]:
    """Find the factors; where they do not fit because recovering was left out, or is asked for twice, say that."""
    try:
        return _places(entries, config, model, folder.path / TENSORS)
    except StoreError as error:
        if told := _stage(folder, model):
            raise StoreError(f"{folder.path} {told}") from error
        raise


def _stage(folder: Folder, model: Model) -> str:
    record, plan = _record(folder, {}), getattr(model, "plan", "")
    if plan and "kept" in record:
        return "is recovered already: it has the whole model's sizes. Fuse it as it is."
    if plan or not record.get("plan") or "kept" in record:
        return ""
    return (
        f"was trained on a pruned model (plan {quoted(record['plan'][:8])}) and has its sizes. Recover it first: "
        f"retouch fuse recover {folder.path} --plan PLAN --model {model.source} -o FULL"
    )


def _check_manifest(folder: Folder) -> None:
    """A folder with our list of files must be exactly what was saved."""
    if _MANIFEST not in folder.names:
        return
    for name in sorted(folder.names & (_WRITTEN - {TENSORS})):  # within limits, before the core reads it whole
        folder.check_size(name, _LIMITS.get(name, MAX_RECORD))
    folder.json(_MANIFEST, _LIMITS[_MANIFEST])
    if extra := sorted(folder.names - _WRITTEN):
        raise StoreError(f"{folder.path / extra[0]} does not belong in an adapter of Retouch. Move it away.")
    store.check_folder(folder.path)


def _record(folder: Folder, files: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Retouch wrote beside the adapter, checked; empty if it did not write it."""
    where = folder.path / RECORD
    if RECORD not in folder.names:
        return {}
    record = folder.json(RECORD, MAX_RECORD)
    if record.get("kind") != KIND or type(record.get("format")) is not int or record["format"] != FORMAT:
        raise StoreError(
            f"{where} is no adapter of format {FORMAT} (kind {quoted(record.get('kind'))}, format "
            f"{quoted(record.get('format'))}). Update Retouch, or use another folder."
        )
    n = record.get("n_examples")
    kinds = {"base": str, "plan": str, "notes": dict, "files": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    wrong += ["n_examples"] if n is not None and (type(n) is not int or not 0 <= n <= MAX_EXAMPLES) else []
    if wrong:
        raise StoreError(f"{where} lacks {wrong[0]!r} or holds something else there. Copy the folder again.")
    for name, file in files.items():
        if record["files"].get(name) != _digest(file):
            raise StoreError(
                f"{folder.path / name} has other content than {RECORD} says (its hash differs). Copy the folder again."
            )
    return record


def _kept(folder: Folder, record: Mapping[str, Any], places: Mapping[str, Place]) -> dict[str, Kept]:
    if "kept" not in record:
        return {}
    shapes = {weight: (place.left.shape[0], place.right.shape[1]) for weight, place in places.items()}
    return unpacked(record["kept"], shapes, str(folder.path / RECORD))


def _seen(record: Mapping[str, Any], kept: Mapping[str, Kept]) -> dict[str, Any]:
    """Say which axis of a weight was pruned and how much of it stayed; that nothing was is known too."""
    told = {weight: [k.axis, len(k.index)] for weight, k in kept.items()}
    return {"kept": told} if "kept" in record else {}


def _digest(file: Any) -> str:
    if isinstance(file, bytes | bytearray):
        return hashlib.sha256(file).hexdigest()
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _base(folder: Folder, record: Mapping[str, Any], model: Model, unverified: bool) -> str:
    """Return the base's fingerprint, once it is known that the adapter belongs to it or the user takes the risk."""
    if not record and not unverified:
        raise StoreError(
            f"{folder.path} does not say which base model it was trained for (it has no {RECORD}), and a wrong base of "
            "equal shapes gives nonsense silently. If you know that it fits, say so (--base-unverified)."
        )
    if model.base is None and any(p.is_meta for p in model.network.parameters()):
        raise StoreError(
            f"{folder.path} cannot be compared with {model.source}, whose weights are not here. Open the model with its "
            "weights, or give its fingerprint."
        )
    if record and record["base"] != model.base_fingerprint:
        raise WrongBase(
            f"{folder.path} was trained for model {quoted(record['base'][:8])}; this model is "
            f"{model.base_fingerprint[:8]} ({model.source}). Open the model that it was trained for."
        )
    return model.base_fingerprint
