"""What crosses the network as Flower's records: plain bytes with their type and shape, checked when they are read."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import store
from ..errors import StoreError
from ._folder import exactly
from ._header import read_header
from .base import Example
from .edge import Capabilities, Task, Upload, settings_of

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, RecordDict

RAW = "bytes"
PACKED = "safetensors"
"""How our arrays are serialised. All factors travel as one array: one request instead of some for each weight."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "I8": torch.int8}
_SIZES = {name: dtype.itemsize for name, dtype in _DTYPES.items()}


# ---------------------------------------------------------------- arrays


def _packed(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    from flwr.app import Array, ArrayRecord
    from safetensors.torch import save

    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    return ArrayRecord({PACKED: Array("uint8", (len(data),), PACKED, data)})


def _unpacked(record: Any, where: str) -> dict[str, Tensor]:
    """Read factors by the header that must account for every byte."""
    array = record[PACKED] if list(record) == [PACKED] else None
    if array is None or (array.dtype, array.stype) != ("uint8", PACKED):
        raise StoreError(f"{where} does not hold its factors as one array of {PACKED}. Update whoever sent it.")
    place = Path(where)
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(array.data)
        entries = read_header(file, place, _SIZES)
        found = {}
        for name, entry in entries.items():
            if not 1 <= len(entry.shape) <= 2 or 0 in entry.shape:
                raise StoreError(
                    f"{where}: {name[:80]!r} has the shape {entry.shape}; a matrix or its scale is expected."
                )
            data = exactly(file, entry.start, entry.end - entry.start, place)
            found[name] = torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).reshape(entry.shape)
    return found


def _record(content: RecordDict, name: str, kind: str, where: str) -> Any:
    found = content.get(name)
    if type(found).__name__ != kind:
        raise StoreError(f"{where} lacks its {name}. Update the software of whoever sent it.")
    return found


# ---------------------------------------------------------------- capabilities


def from_capabilities(edge: Capabilities) -> RecordDict:
    """Write what an edge can do; 0 stands for what it does not state."""
    from flwr.app import ConfigRecord, RecordDict

    ratio = -1.0 if edge.ratio is None else float(edge.ratio)
    plain = {"name": edge.name, "budget_mib": float(edge.budget_mib or 0), "ratio": ratio, "rank": edge.rank or 0}
    plain |= {"cores": edge.cores, "n_examples": edge.n_examples, "privacy": edge.privacy}
    lists = {"cached": list(edge.cached), "versions": list(edge.versions)}
    return RecordDict({"capabilities": ConfigRecord({**plain, **lists})})


def to_capabilities(content: RecordDict, where: str) -> Capabilities:
    """Read what an edge can do.

    Raises:
        StoreError: Something is missing or of another type.
    """
    record = _record(content, "capabilities", "ConfigRecord", where)
    kinds = {"name": str, "budget_mib": float, "ratio": float, "rank": int, "cores": int, "n_examples": str,
             "privacy": str, "cached": list, "versions": list}  # fmt: skip
    if odd := next((n for n, kind in kinds.items() if type(record.get(n)) is not kind), None):
        raise StoreError(f"{where} lacks {odd!r} or holds something else there. Update the edge's software.")
    budget, ratio, rank = record["budget_mib"], record["ratio"], record["rank"]
    sound = (
        math.isfinite(budget)
        and budget >= 0
        and -1 <= ratio <= 1
        and 0 <= rank <= 1024
        and len(record["cached"]) < 10_000
    )
    if not sound or not all(isinstance(word, str) for word in (*record["cached"], *record["versions"])):
        raise StoreError(f"{where} states a budget, ratio or rank that none can have. Correct the edge's settings.")
    return Capabilities(
        record["name"], budget or None, None if ratio < 0 else ratio, rank or None, record["cores"],
        tuple(record["cached"]), tuple(record["versions"]), record["n_examples"],
        record["privacy"],
    )  # fmt: skip


# ---------------------------------------------------------------- tasks


def from_task(task: Task, package: Path | None) -> RecordDict:
    """Write a task; with the pruned model's files where the edge does not have them."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    plain = {
        "run": task.run, "plan": task.plan, "base": task.base, "package": task.package, "hash": task.hash,
        "settings": json.dumps(task.settings.to_dict()), "deadline_s": float(task.deadline_s or 0),
        "replay": json.dumps([[e.prompt, e.target] for e in task.replay]),
    }  # fmt: skip
    content = RecordDict({"task": ConfigRecord(plain), "initial": _packed(task.initial)})
    if package is not None:
        files = {name: (package / name).read_bytes() for name in store.check_folder(package)["files"]}
        content["package"] = ArrayRecord({n: Array("uint8", (len(d),), RAW, d) for n, d in files.items()})
    return content


def to_task(content: RecordDict) -> tuple[Task, dict[str, bytes] | None]:
    """Read a task, and the pruned model's files if they came with it.

    Raises:
        StoreError: Something is missing, of another type, or was altered on its way.
    """
    where = "the task from the cloud"
    record = _record(content, "task", "ConfigRecord", where)
    initial = _unpacked(_record(content, "initial", "ArrayRecord", where), where)
    try:
        replay = tuple(Example(str(p), str(t)) for p, t in json.loads(record["replay"]))
        settings = settings_of(json.loads(record["settings"]))
        run, plan, base, package = (str(record[n]) for n in ("run", "plan", "base", "package"))
        task = Task(run, plan, base, package, settings, initial, replay, float(record["deadline_s"]) or None)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{where} lacks a part or holds something else there: {error!r}. Update the software."
        ) from error
    if task.hash != record.get("hash"):
        raise StoreError(f"{where} is not what its hash names: cloud and edge differ in version. Update the older one.")
    files = None
    if content.get("package") is not None:
        sent = _record(content, "package", "ArrayRecord", where)
        files = {str(name): bytes(sent[name].data) for name in sent}
    return task, files


# ---------------------------------------------------------------- uploads


def from_upload(upload: Upload) -> RecordDict:
    """Write what leaves an edge."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({"facts": ConfigRecord(dict(upload.facts)), "factors": _packed(upload.tensors)})


def to_upload(content: RecordDict, where: str) -> Upload:
    """Read what an edge sent; whether it is what was agreed is the cloud's to check.

    Raises:
        StoreError: It holds something else, or an array is not plain.
    """
    if extra := sorted(set(content) - {"facts", "factors"}):
        raise StoreError(f"{where} also holds {str(extra[0])[:80]!r}. Do not use it.")
    facts = _record(content, "facts", "ConfigRecord", where)
    return Upload(
        _unpacked(_record(content, "factors", "ArrayRecord", where), where), {str(k): facts[k] for k in facts}
    )
