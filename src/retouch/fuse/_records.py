"""What crosses the network as Flower's records: plain bytes with their type and shape, checked when they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import store
from ..errors import StoreError
from .base import Example
from .edge import Capabilities, Task, Upload, settings_of

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, RecordDict

RAW = "retouch.raw"
"""How our arrays are serialised: their bytes, nothing else, so that reading them runs no parser."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_ITEM = {"float32": 4, "float16": 2}


# ---------------------------------------------------------------- arrays


def _arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    from flwr.app import Array, ArrayRecord

    return ArrayRecord(
        {
            name: Array(str(t.dtype).removeprefix("torch."), tuple(t.shape), RAW, t.detach().cpu().contiguous().numpy().tobytes())
            for name, t in tensors.items()
        }
    )  # fmt: skip


def _tensors(record: Any, where: str) -> dict[str, Tensor]:
    return {str(name): _tensor(record[name], str(name)[:80], where) for name in record}


def _tensor(array: Any, name: str, where: str) -> Tensor:
    shape, size = array.shape, _ITEM.get(array.dtype)
    fits = (
        array.stype == RAW
        and size is not None
        and 1 <= len(shape) <= 2
        and all(type(n) is int and n > 0 for n in shape)
    )
    if not fits or math.prod(shape) * (size or 0) != len(array.data):
        raise StoreError(
            f"{where}: {name!r} says {str(array.dtype)[:20]!r}, {str(shape)[:40]} and {str(array.stype)[:20]!r}, and holds "
            f"{len(array.data):,} bytes; plain float16 or float32 is expected. Do not use it."
        )
    return torch.frombuffer(bytearray(array.data), dtype=_DTYPES[array.dtype]).reshape(shape)


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
    lists = {"cached": list(edge.cached), "versions": list(edge.versions)}
    return RecordDict(
        {"capabilities": ConfigRecord({**plain, **lists, "cores": edge.cores, "n_examples": edge.n_examples})}
    )


def to_capabilities(content: RecordDict, where: str) -> Capabilities:
    """Read what an edge can do.

    Raises:
        StoreError: Something is missing or of another type.
    """
    record = _record(content, "capabilities", "ConfigRecord", where)
    kinds = {"name": str, "budget_mib": float, "ratio": float, "rank": int, "cores": int, "n_examples": str,
             "cached": list, "versions": list}  # fmt: skip
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
    content = RecordDict({"task": ConfigRecord(plain), "initial": _arrays(task.initial)})
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
    initial = _tensors(_record(content, "initial", "ArrayRecord", where), where)
    try:
        replay = tuple(Example(str(p), str(t)) for p, t in json.loads(record["replay"]))
        settings = settings_of(json.loads(record["settings"]))
        names = [str(record[n]) for n in ("run", "plan", "base", "package")]
        task = Task(*names, settings, initial, replay, float(record["deadline_s"]) or None)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{where} lacks a part or holds something else there: {error!r}. Update the software."
        ) from error
    if task.hash != record.get("hash"):
        raise StoreError(f"{where} is not what its hash names: cloud and edge differ in version. Update the older one.")
    files = None
    if content.get("package") is not None:
        package = _record(content, "package", "ArrayRecord", where)
        files = {str(name): bytes(package[name].data) for name in package}
    return task, files


# ---------------------------------------------------------------- uploads


def from_upload(upload: Upload) -> RecordDict:
    """Write what leaves an edge."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({"facts": ConfigRecord(dict(upload.facts)), "factors": _arrays(upload.tensors)})


def to_upload(content: RecordDict, where: str) -> Upload:
    """Read what an edge sent; whether it is what was agreed is the cloud's to check.

    Raises:
        StoreError: It holds something else, or an array is not plain.
    """
    if extra := sorted(set(content) - {"facts", "factors"}):
        raise StoreError(f"{where} also holds {str(extra[0])[:80]!r}. Do not use it.")
    facts = _record(content, "facts", "ConfigRecord", where)
    return Upload(_tensors(_record(content, "factors", "ArrayRecord", where), where), {str(k): facts[k] for k in facts})
