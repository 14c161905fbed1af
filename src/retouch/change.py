"""What is to be done to the weights: low-rank factors or whole differences, sized, applied, combined, saved.

A `Change` never touches a model in place: `apply` makes a new one that shares every untouched tensor. Changes recompose
from the unchanged base, so that undoing one is exact (see `ledger`).
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, linalg, store
from .errors import NoEffect, StoreError, WrongBase
from .lanes import Factors, Lanes
from .model import Model
from .trace import Trace

__all__ = [
    "Change",
    "Dense",
    "LowRank",
    "apply",
    "cast_error",
    "combine",
    "compose",
    "edited",
    "from_peft",
    "load",
    "save",
    "side_by_side",
    "to_peft",
    "versions",
]

FORMAT = 1
TOLERANCE = 0.01
"""How far the stored difference of a weight may be from the planned one, relative, before it is an error."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A difference ``left @ right`` of a weight seen as (outputs, inputs), in float32.

    Shapes:
        left: (outputs, rank); right: (rank, inputs).
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the weight."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Columns of the left factor."""
        return self.left.shape[1]

    def delta(self) -> Tensor:
        """Return the difference in float64."""
        return self.left.double() @ self.right.double()

    def norms(self) -> tuple[float, float]:
        """Frobenius and spectral norm, from the factors."""
        return linalg.frobenius_norm(self.left, self.right), linalg.spectral_norm(self.left, self.right)

    def tensors(self) -> dict[str, Tensor]:
        """Name the factors for a file."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True, eq=False)
class Dense:
    """A whole difference of a weight seen as (outputs, inputs), or of a bias (outputs, 1), in float32."""

    difference: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the weight."""
        return self.difference.shape[0], self.difference.shape[1]

    @property
    def rank(self) -> int:
        """The largest rank that the difference can have."""
        return min(self.shape)

    def delta(self) -> Tensor:
        """Return the difference in float64."""
        return self.difference.double()

    def norms(self) -> tuple[float, float]:
        """Frobenius and spectral norm."""
        values = torch.linalg.svdvals(self.difference.double())
        return float(values.norm()), float(values[0])

    def tensors(self) -> dict[str, Tensor]:
        """Name the difference for a file."""
        return {"difference": self.difference}


Part = LowRank | Dense


@dataclass(frozen=True, eq=False)
class Change:
    """A planned change of a model.

    Attributes:
        method: Name of the method that planned it.
        base: Fingerprint of the model it is a difference to.
        parts: A difference for each weight, by our names; ``NAME:bias`` is a bias.
        settings: The method's settings.
        facts: What it is to achieve, as plain records.
        keys: For each weight the inputs whose output it sets, (inputs, n); for later solves that must keep them.
        targets: For each weight what those keys' output was to gain, (outputs, n); what a re-solve starts from.
        notes: What the method wants known: contexts, traces, condition numbers.
        report: What was measured, once it was.
    """

    method: str
    base: str
    parts: Mapping[str, Part]
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: tuple[Mapping[str, Any], ...] = ()
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """A name made of the content: equal changes have equal ids. Reports do not count."""
        digests = {
            f"{name}/{kind}": store.digest_tensor(t)
            for name, p in self.parts.items()
            for kind, t in p.tensors().items()
        }
        return store.key(
            method=self.method,
            base=self.base,
            settings=dict(self.settings),
            facts=[dict(f) for f in self.facts],
            parts=digests,
        )[:12]

    @property
    def n_numbers(self) -> int:
        """How many numbers the parts hold."""
        return sum(t.numel() for p in self.parts.values() for t in p.tensors().values())

    def norms(self, model: Model | None = None) -> dict[str, dict[str, float]]:
        """Measure each part: Frobenius norm, spectral norm, rank, and the share of the weight's norm."""
        rows = {}
        for name, part in self.parts.items():
            frobenius, spectral = part.norms()
            rows[name] = {"frobenius": frobenius, "spectral": spectral, "rank": float(part.rank)}
            if model is not None:
                rows[name]["share_of_weight"] = frobenius / float(_matrix(model, name).norm())
        return rows


def versions() -> dict[str, str]:
    """Name the versions that a saved thing was made with."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"retouch": __version__, "python": platform.python_version(), **packages}


def _path(model: Model, name: str) -> str:
    if name.endswith(":bias"):
        return model.anatomy.path(name.removesuffix(":bias")) + ".bias"
    return model.anatomy.weight(name)


def _matrix(model: Model, name: str) -> Tensor:
    """A part's weight as (outputs, inputs), or its bias as (outputs, 1)."""
    if name.endswith(":bias"):
        return model.network.get_parameter(_path(model, name)).detach()[:, None]
    return model.matrix(name)


def _size(model: Model, name: str) -> str:
    bare = name.removesuffix(":bias")
    if bare not in model.anatomy.names() or (bare != name and getattr(model.module(bare), "bias", None) is None):
        return "no such weight"
    return "x".join(map(str, _matrix(model, name).shape))


def compose(model: Model, originals: Mapping[str, Tensor], changes: Iterable[Change]) -> dict[str, Tensor]:
    """Recompose weights from their unchanged values: cast(W0 + sum of all differences), once.

    The sum runs in float64 in the order of the changes' ids, not of their arrival, low-rank ones first and as one
    product: so it depends on the set alone, and a thousand small changes cost one multiplication.

    Args:
        model: Tells each weight's orientation.
        originals: Unchanged values by our names, as (outputs, inputs).
        changes: The changes that are in force.

    Returns:
        New values by parameter path, in the parameter's own shape.
    """
    ordered = sorted(changes, key=lambda c: c.id)
    values = {}
    for name, original in originals.items():
        parts = [c.parts[name] for c in ordered if name in c.parts]
        low = [p for p in parts if isinstance(p, LowRank)]
        deltas = [p.delta() for p in parts if not isinstance(p, LowRank)]
        if low:
            deltas.insert(0, LowRank(torch.cat([p.left for p in low], 1), torch.cat([p.right for p in low])).delta())
        total = original.double()
        for delta in deltas:
            total = total + delta.to(original.device)
        value = total.float() if deltas else original
        if name.endswith(":bias"):
            value = value[:, 0]
        elif model.anatomy.transposed(name):
            value = value.T
        values[_path(model, name)] = value
    return values


def check_base(model: Model, change: Change) -> None:
    """Refuse a change that was planned for another model.

    Raises:
        WrongBase: The fingerprints, a weight's name or a shape differ.
    """
    sizes = [(n, "x".join(map(str, p.shape)), _size(model, n)) for n, p in change.parts.items()]
    wrong = [row for row in sizes if row[1] != row[2]]
    if not wrong and change.base == model.base_fingerprint:
        return
    name, shape, here = [*wrong, *sizes, ("no weight", "nothing", "nothing")][0]
    raise WrongBase(
        f"This change was planned for model {change.base[:6]} ({shape} at {name}); "
        f"this model is {model.base_fingerprint[:6]} ({here}). Open the model it was planned for, or plan it anew."
    )


def apply(model: Model, change: Change) -> Model:
    """Return a new model that carries the change; all untouched tensors are shared.

    Raises:
        WrongBase: The change was planned for another model.
        NoEffect: The weights did not become what was planned.
    """
    check_base(model, change)
    values = compose(model, {n: _matrix(model, n) for n in change.parts}, [change])
    new = model.with_weights(values)
    prove_stored(model, new, change)
    return new


def prove_stored(before: Model, after: Model, change: Change) -> None:
    """Check that each weight moved by what was planned, to one percent.

    Raises:
        NoEffect: A part is zero, not finite, or lost in the cast.
    """
    if not change.parts:
        raise NoEffect(f"Change {change.id} ({change.method}) holds no weights, so it would do nothing.")
    for name, part in change.parts.items():
        planned = part.delta()
        size = float(planned.norm())
        moved = (_matrix(after, name).double() - _matrix(before, name).double()).cpu()
        if not math.isfinite(size) or not torch.isfinite(moved).all():
            raise NoEffect(
                f"The change of {name} is not finite. Plan it with a lower learning rate or a smaller clamp."
            )
        if name.endswith(":bias") and size == 0:
            continue
        error = float((moved - planned.cpu()).norm()) / size if size else math.inf
        if error > TOLERANCE:
            raise NoEffect(
                f"{name} was to move by {size:.3g} and the stored weight misses that by {error:.1%} (allowed {TOLERANCE:.0%})."
            )


def cast_error(model: Model, originals: Mapping[str, Tensor], dtype: str) -> dict[str, float]:
    """Measure how much of a change is lost when weights are cast to a file's type.

    Args:
        model: The changed model.
        originals: The unchanged values by our names, as (outputs, inputs).
        dtype: Of the file, e.g. ``"bfloat16"``.

    Returns:
        For each weight ‖cast(W) - W‖ / ‖W - W0‖: 0 when all survives, 1 when the loss is as large as the change.
    """
    kind = getattr(torch, dtype)
    errors = {}
    for name, old in originals.items():
        new = _matrix(model, name)
        moved = float((new - old).norm())
        errors[name] = float((new.to(kind).float() - new).norm()) / moved if moved else 0.0
    return errors


@contextmanager
def edited(model: Model, change: Change) -> Iterator[Model]:
    """Give the changed model inside a ``with``; the model itself is never altered.

    Example:
        >>> with edited(model, change) as new:  # doctest: +SKIP
        ...     new.network(...)
    """
    yield apply(model, change)


@contextmanager
def side_by_side(model: Model, changes: Sequence[Change]) -> Iterator[Lanes]:
    """Run n changes of one model at once: each row of a pass sees the change that it carries.

    Equal to applying each change and running its rows alone, at the price of one model: decoding is bound by reading
    the weights, and these are read once for all. Rows come in n equal groups, in order, unless the `Lanes` are told
    otherwise; a change that occurs several times in the list is kept once.

    Example:
        >>> with side_by_side(model, changes) as lanes, lanes.carrying([0, 0, 1]):  # doctest: +SKIP
        ...     model.network(...)  # three rows: two of the first edited model, one of the second
    """
    distinct = list({id(c): c for c in changes}.values())
    lane = {id(c): i for i, c in enumerate(distinct)}
    lanes = Lanes([lane[id(c)] for c in changes], model.device)
    with Trace(model) as trace:
        for name in dict.fromkeys(n for c in distinct for n in c.parts):
            parts = {i: c.parts[name] for i, c in enumerate(distinct) if name in c.parts}
            if name.endswith(":bias"):
                trace.edit(name.removesuffix(":bias"), _shift(parts, lanes, len(distinct), model.device))
            else:
                trace.branches(name, {i: _factors(part) for i, part in parts.items()}, lanes)
        yield lanes


def _factors(part: Part) -> Factors:
    return (part.left, part.right) if isinstance(part, LowRank) else (part.delta().float(), None)


def _shift(parts: Mapping[int, Part], lanes: Lanes, n: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what adds to each row the bias of the change that it carries."""
    some = next(iter(parts.values()))
    stacked = torch.stack(
        [parts[i].delta().float()[:, 0] if i in parts else torch.zeros(some.shape[0]) for i in range(n)]
    )
    stacked = stacked.to(device)
    return lambda out: (out.reshape(lanes.n_rows, -1, out.shape[-1]) + stacked[lanes.index][:, None]).reshape(out.shape)


def combine(changes: Iterable[Change]) -> Change:
    """Join changes of one base into one: low-rank factors are put side by side, whole differences are added.

    Raises:
        WrongBase: The changes have different bases.
    """
    every = sorted(changes, key=lambda c: c.id)
    if len({c.base for c in every}) != 1:
        raise WrongBase("Only changes that were planned for one model can be combined.")
    parts: dict[str, Part] = {}
    keys: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    for change in every:
        for name, part in change.parts.items():
            parts[name] = _joined(parts[name], part) if name in parts else part
        for columns, more in ((keys, change.keys), (targets, change.targets)):
            for name, column in more.items():
                columns[name] = torch.cat([columns[name], column], 1) if name in columns else column
    # where only some of the changes kept targets, nothing would say whose they are
    targets = {n: t for n, t in targets.items() if n in keys and t.shape[1] == keys[n].shape[1]}
    return Change(
        "+".join(dict.fromkeys(c.method for c in every)),
        every[0].base,
        parts,
        facts=tuple(f for c in every for f in c.facts),
        keys=keys,
        targets=targets,
        notes={"combined": [c.id for c in every]},
    )


def _joined(one: Part, two: Part) -> Part:
    if isinstance(one, LowRank) and isinstance(two, LowRank):
        return LowRank(torch.cat([one.left, two.left], 1), torch.cat([one.right, two.right], 0))
    return Dense((one.delta() + two.delta()).float())


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
    record = _record(path)
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


def _record(path: Path) -> dict[str, Any]:
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


def to_peft(change: Change, model: Model, path: str | Path) -> None:
    """Write a change as a LoRA adapter that plain PEFT loads onto the unchanged model.

    Rank and scale of each module are set so that the adapter adds exactly ``left @ right``.

    Raises:
        StoreError: A part is a whole difference or a bias; LoRA cannot hold it exactly.
    """
    from peft import LoraConfig

    check_base(model, change)
    if dense := [n for n, p in change.parts.items() if not isinstance(p, LowRank) or n in ("embed", "head")]:
        raise StoreError(
            f"The change of {dense[0]} (method {change.method}) is whole or not inside a block; a LoRA adapter holds "
            "low-rank changes of linear layers only."
        )
    tensors, ranks, conv = {}, {}, False
    for name, part in change.parts.items():
        assert isinstance(part, LowRank)
        target = model.anatomy.path(name)
        conv = conv or model.anatomy.transposed(name)
        ranks[target] = part.rank
        tensors[f"base_model.model.{target}.lora_A.weight"] = part.right.float().contiguous()
        tensors[f"base_model.model.{target}.lora_B.weight"] = part.left.float().contiguous()
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=sorted(ranks),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        fan_in_fan_out=conv,
        inference_mode=True,
        task_type="CAUSAL_LM" if model.anatomy.kind == "decoder" else None,
        base_model_name_or_path=model.source,
    )
    with store.writing(path) as folder:
        config.save_pretrained(folder)
        store.save_tensors(folder / "adapter_model.safetensors", tensors)


_NOT_PLAIN = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters"),
    *("alora_invocation_tokens", "trainable_token_indices", "arrow_config", "kasa_config", "monteclora_config"),
)
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start an adapter that also alter the weights below it, so that its difference is not ``left @ right``."""


def from_peft(path: str | Path, model: Model) -> Change:
    """Read a LoRA adapter as a change of `model`.

    Raises:
        StoreError: The adapter is pickled, is no plain LoRA, or does not fit the model.
    """
    path = Path(path)
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise StoreError(f"{path} has no adapter_model.safetensors. Pickled adapters (.bin) are not read.")
    config = store.read_json(path / "adapter_config.json")
    config = config if isinstance(config, dict) else {}
    odd = [n for n in _NOT_PLAIN if config.get(n)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    odd += ["init_lora_weights"] if str(config.get("init_lora_weights")).lower().startswith(_MOVES_BASE) else []
    if config.get("peft_type") != "LORA" or odd:
        raise StoreError(f"{path} is no plain LoRA adapter ({', '.join([str(config.get('peft_type')), *odd])}).")
    tensors = store.load_tensors(file)
    by_path = {model.anatomy.path(n): n for n in model.anatomy.names()}
    parts: dict[str, Part] = {}
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        left = tensors.pop(name.replace("lora_A", "lora_B"), None)
        right = tensors.pop(name)
        if module not in by_path or left is None:
            raise StoreError(
                f"{path}: {module} is no weight that Retouch knows in {model.anatomy.family}, or lacks lora_B."
            )
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise StoreError(
                f"{path}: the factors {tuple(left.shape)} and {tuple(right.shape)} of {module} do not fit."
            )
        parts[by_path[module]] = LowRank(left.float() * _scale(config, module, right.shape[0]), right.float())
    if tensors:
        raise StoreError(f"{path}: the tensor {next(iter(tensors))!r} does not belong in a LoRA adapter.")
    change = Change("peft", model.base_fingerprint, parts, notes={"adapter": path.name})
    check_base(model, change)
    return change


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT reads a pattern as a regular expression for the whole path or its last parts; the first one counts."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)


def with_report(change: Change, report: Mapping[str, Any]) -> Change:
    """Return the change with what was measured written into it."""
    return replace(change, report={**change.report, **report})
