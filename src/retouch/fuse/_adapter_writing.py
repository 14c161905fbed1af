"""Write an adapter as a folder that plain PEFT loads: tensors streamed, one weight in memory at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import store
from ..change import LowRank, versions
from ..errors import StoreError
from ..model import Model
from ..progress import track
from ._adapter_config import MAX_RANK
from ._factors import TENSORS, by_path, checked, norms_of, shapes_of
from ._folder import quoted
from ._header import SIZES
from ._kept import check_unseen, packed
from .base import MAX_EXAMPLES, Kept

CONFIG = "adapter_config.json"
RECORD = "retouch.json"
KIND = "adapter"
FORMAT = 1
MAX_RECORD = 1 << 20
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_adapter(
    path: str | Path,
    parts: Iterable[tuple[str, LowRank]],
    ranks: Mapping[str, int],
    model: Model,
    *,
    notes: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    plan: str = "",
    n_examples: int | None = None,
    dtype: str = "float32",
    kept: Mapping[str, Kept] | None = None,
) -> None:
    """Write factors as a LoRA adapter that plain PEFT loads, whole or not at all; one weight is in memory at a time.

    Rank and scale of every module are written so that the adapter adds exactly ``left @ right``. Factors of a lower
    rank than was announced are filled up with zeros, which changes nothing.

    Args:
        path: The folder.
        parts: Factors by our names of the weights, in any order; they are taken one by one.
        ranks: Rank of each weight, known beforehand: the file's header is written before the first part is asked for.
        model: The base that the adapter is a difference to.
        notes: What reports say of it; plain JSON. Or what gives it, asked when all parts are written.
        plan: Hash of the pruning plan it was trained under.
        n_examples: How many examples trained it.
        dtype: Of the file: ``float32``, ``float16`` or ``bfloat16``.
        kept: Of a recovered adapter: what its edge could see; what is not named was seen whole.

    Shapes:
        Each part: left (outputs, rank), right (rank, inputs).

    Raises:
        StoreError: Parts and ranks disagree, a weight does not exist, a value is not finite or too large, or the folder
            cannot be written.
    """
    layout = _Layout(path, ranks, model, dtype)
    record = {
        "format": FORMAT,
        "kind": KIND,
        "base": model.base_fingerprint,
        "plan": plan,
        "n_examples": n_examples,
        "notes": {} if callable(notes) else dict(notes or {}),
        "versions": versions(),
    }
    if kept is not None:
        record["kept"] = packed({name: kept[name] for name in layout.ranks if name in kept}, layout.shapes)
    _check_record(path, record)
    with store.writing(path, need_bytes=layout.n_bytes) as folder:
        store.write_json_atomic(folder / CONFIG, _config(layout, model))
        _stream(folder / TENSORS, layout, _honest(parts, kept or {}, str(path)))
        if callable(notes):
            _check_record(path, record := {**record, "notes": dict(notes())})
        files = {name: store.sha256_file(folder / name) for name in (CONFIG, TENSORS)}
        store.write_json_atomic(folder / RECORD, {**record, "files": files})
        (folder / "README.md").write_text(_card(layout, model, record), encoding="utf-8")


def _honest(
    parts: Iterable[tuple[str, LowRank]], kept: Mapping[str, Kept], where: str
) -> Iterator[tuple[str, LowRank]]:
    for name, part in parts:
        check_unseen(name, part, kept.get(name), where)
        yield name, part


class _Layout:
    """Where each factor is to lie in the file, and which weights there are."""

    def __init__(self, path: str | Path, ranks: Mapping[str, int], model: Model, dtype: str) -> None:
        self.path, self.ranks, self.model, self.dtype = path, dict(ranks), model, dtype
        self.shapes = shapes_of(model)
        self.paths = {name: where for where, name in by_path(model).items()}
        self._check()
        self.header, self.offsets, self.n_bytes = self._header()

    def _check(self) -> None:
        if self.dtype not in _CODES:
            raise StoreError(f"{self.path}: dtype must be one of {', '.join(_CODES)}; got {self.dtype!r}. Choose one.")
        if not self.ranks:
            raise StoreError(f"{self.path}: an adapter without a single weight changes nothing. Give it parts.")
        for name, rank in self.ranks.items():
            if name not in self.shapes:
                raise StoreError(
                    f"{self.path}: {name} is no linear layer in a block of {self.model.source}, so a LoRA adapter "
                    "cannot hold its change. Leave it out."
                )
            limit = min(*self.shapes[name], MAX_RANK)
            if not 1 <= rank <= limit:
                raise StoreError(
                    f"{self.path}: {name} is to have the rank {rank:,}; allowed are 1 to {limit:,}. Cut the rank."
                )

    def _header(self) -> tuple[bytes, dict[tuple[str, str], int], int]:
        told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name, rank in self.ranks.items():
            rows, columns = self.shapes[name]
            for half, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                offsets[name, half], end = end, end + shape[0] * shape[1] * SIZES[_CODES[self.dtype]]
                told[f"base_model.model.{self.paths[name]}.lora_{half}.weight"] = {
                    "dtype": _CODES[self.dtype],
                    "shape": list(shape),
                    "data_offsets": [offsets[name, half], end],
                }
        text = json.dumps(told, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return head, {key: len(head) + at for key, at in offsets.items()}, len(head) + end


def _stream(file: Path, layout: _Layout, parts: Iterable[tuple[str, LowRank]]) -> None:
    missing = set(layout.ranks)
    with file.open("wb") as out:
        out.write(layout.header)
        out.truncate(layout.n_bytes)  # parts may come in any order
        for name, part in track(parts, f"write {Path(layout.path).name}", len(layout.ranks)):
            if name not in missing:
                what = "was given twice" if name in layout.ranks else "was not announced in ranks"
                raise StoreError(f"{layout.path}: the part {name} {what}. Give each announced weight once.")
            missing.remove(name)
            _put(out, layout, name, part)
    if missing:
        raise StoreError(f"{layout.path}: {min(missing)} was announced in ranks and never given. Give all its parts.")


def _put(out: io.BufferedWriter, layout: _Layout, name: str, part: LowRank) -> None:
    rank = layout.ranks[name]
    if part.shape != layout.shapes[name] or part.rank > rank:
        rows, columns = layout.shapes[name]
        raise StoreError(
            f"{layout.path}: {name} is {rows}x{columns} and was announced with rank {rank}; the part is "
            f"{'x'.join(map(str, part.shape))} with rank {part.rank}. Announce what is given."
        )
    left, right = (factor.detach().to("cpu", torch.float32) for factor in (part.left, part.right))
    fill = rank - part.rank
    left = torch.nn.functional.pad(left, (0, fill)).to(getattr(torch, layout.dtype))
    right = torch.nn.functional.pad(right, (0, 0, 0, fill)).to(getattr(torch, layout.dtype))
    norm = norms_of(layout.model, {name: rank}).get(name)
    checked(name, LowRank(left.float(), right.float()), norm, f"{layout.path} (to be written)")
    for half, factor in (("A", right), ("B", left)):
        out.seek(layout.offsets[name, half])
        out.write(_raw(factor))


def _raw(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _check_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Refuse a record that could not be read again, before anything is written."""
    try:
        size = len(json.dumps(record, allow_nan=False, ensure_ascii=False, indent=2).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}: notes cannot be stored as JSON: {error}. Pass plain, finite values.") from error
    n = record["n_examples"]
    if n is not None and (type(n) is not int or not 0 <= n <= MAX_EXAMPLES):
        raise StoreError(f"{path}: n_examples must be a count or None; got {quoted(n)}. Count the examples.")
    if size > MAX_RECORD - 1024:
        raise StoreError(f"{path}: notes take {size:,} bytes; under {MAX_RECORD:,} are allowed. Shorten them.")


def _config(layout: _Layout, model: Model) -> dict[str, Any]:
    """Return PEFT's configuration: alpha equals rank everywhere, so every scale is 1."""
    ranks = {layout.paths[name]: rank for name, rank in layout.ranks.items()}
    most = max(ranks.values())
    other = {where: rank for where, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.anatomy.kind == "decoder" else None,
        "base_model_name_or_path": model.source,
        "revision": None,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(model.anatomy.transposed(name) for name in layout.ranks),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(ranks),
        "modules_to_save": None,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
    }


def _card(layout: _Layout, model: Model, record: Mapping[str, Any]) -> str:
    ranks = layout.ranks
    lines = [
        f"# A LoRA adapter for {model.source}",
        "",
        f"It changes {len(ranks)} weights of model {record['base'][:12]}, with ranks {min(ranks.values())} to "
        f"{max(ranks.values())}; the file's type is {layout.dtype}.",
        *([f"It was trained on {record['n_examples']:,} examples."] if record["n_examples"] is not None else []),
        *([f"It was trained under the pruning plan {record['plan'][:12]}."] if record["plan"] else []),
        "",
        "Plain PEFT loads it:",
        "",
        "```python",
        'PeftModel.from_pretrained(model, "THIS FOLDER")',
        "```",
        "",
        f"`{RECORD}` says how it was made and for which base; `manifest.json` holds the hash of every file.",
        "",
        "| weight | rank |",
        "| --- | --- |",
        *(f"| {name} | {rank} |" for name, rank in ranks.items()),
        "",
    ]
    return "\n".join(lines)
