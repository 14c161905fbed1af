"""What one edge does with a task: say what it can hold, train, and build the one message that leaves it.

The message holds `FACTS` and the adapter's factors, and nothing else: no text, no activations, no gradients, no state of
the optimiser. The edge, not the cloud, decides how much of that it shares (`Sharing`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import store
from ..change import versions
from ..errors import StoreError, UserError
from ..model import Model
from ..settings import Settings, setting, with_settings
from ._adapter_config import MAX_RANK
from ._dp import Private
from ._factors import shapes_of
from ._quantised import quantised, upload_bytes
from ._widths import LARGEST_RATIO
from .adapter_file import named_tensors
from .base import Adapter, Example
from .privacy import GUARANTEE, Released, check_privacy, refuse_unshipped, released
from .pruned import open_pruned
from .train import LoraSettings, read_examples, told_size, train

__all__ = [
    "FACTS", "Capabilities", "EdgeSpec", "Sharing", "Task", "Upload", "build_upload", "cached_packages", "capabilities",
    "check_name", "keep_package", "package_name", "perform", "settings_of", "work_folder",
]  # fmt: skip

FACTS = ("alphas", "base", "modules", "n_examples", "partial", "plan", "ranks", "settings", "versions")
"""What goes with the factors, always."""
PACKAGES = "fuse-package"
"""Kind of the cache in which an edge keeps the models that it was sent."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_DIGEST = re.compile("[0-9a-f]{32}")
_FILE = re.compile(r"[a-z][a-z_]{0,60}\.(json|jinja|model|safetensors|txt)")
_BUCKETS = ((100, "<100"), (1_000, "<1k"), (10_000, "<10k"))
_PRECISION = 1e-3
_log = logging.getLogger("retouch")


# ---------------------------------------------------------------- who an edge is and what it shares


@dataclass(frozen=True)
class EdgeSpec:
    """One edge: where its private examples are, and how much of the model it can hold.

    Attributes:
        name: What reports, folders and the journal call it; letters, digits, ``-`` and ``_``.
        examples: Its file of examples, as `read_examples` takes it.
        budget_mib: Memory that it has at the peak of training.
        ratio: In place of a budget: the share of the prunable numbers that it does without. Neither is the whole model.
        rank: Of its adapter; None is the run's.
    """

    name: str
    examples: str | Path
    budget_mib: float | None = None
    ratio: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Sharing(Settings):
    """What an edge lets out besides the adapter. The edge sets it in its own configuration; no task says anything of it."""

    loss: bool = setting(False, "Also tell the last training loss.")
    count: Literal["exact", "bucket"] = setting("exact", "Tell the number of examples, or only its order.")
    precision: Literal["half", "int8"] = setting(
        "half", "half: float16 where that changes little; int8: half of that, and about a hundredth of error."
    )
    privacy: str = setting(
        "none", "none; local-dp: A frozen, B clipped, noise added once; dp-sgd: noise on clipped gradients."
    )
    max_norm: float = setting(
        1.0,
        "local-dp: largest Frobenius norm of all B together; dp-sgd: largest length of an example's gradient.",
        gt=0,
    )
    noise: float = setting(1.0, "Standard deviation of the noise, as a multiple of max_norm.", gt=0)
    delta: float = setting(1e-5, "The delta of the stated guarantee.", gt=0, lt=1)
    public_size: int = setting(
        0, "dp-sgd: the number of examples that is told; 0: the power of two at or above the real one.", ge=0
    )

    def private(self) -> Private | None:
        """Return how training itself is made private, if it is."""
        if self.privacy != "dp-sgd":
            return None
        return Private(self.max_norm, self.noise, self.delta, public_size=self.public_size)


@dataclass(frozen=True)
class Capabilities:
    """What an edge answers when it is asked what it can do.

    Attributes:
        name: Of the edge.
        budget_mib: See `EdgeSpec`.
        ratio: See `EdgeSpec`.
        rank: See `EdgeSpec`.
        cores: Processor cores.
        cached: Names, by content, of the pruned models that it holds already.
        versions: Of the software, as ``torch 2.13``.
        n_examples: How many examples it has, the order of that number, or under dp-sgd its public size.
        privacy: What it asks for, see `Sharing`.
    """

    name: str
    budget_mib: float | None = None
    ratio: float | None = None
    rank: int | None = None
    cores: int = 1
    cached: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    n_examples: str = ""
    privacy: str = "none"


def capabilities(spec: EdgeSpec, sharing: Sharing | None = None) -> Capabilities:
    """Say what an edge can do.

    Raises:
        UserError: Its name cannot be one, both a budget and a ratio are given, or one of its numbers cannot be.
        FactError: Its examples cannot be read.
    """
    check_name(spec.name)
    _check_wishes(spec)
    if spec.budget_mib is not None and spec.ratio is not None:
        raise UserError(f"The edge {spec.name} states both a budget and a ratio; one of them decides. Leave one out.")
    sharing = sharing or Sharing()
    refuse_unshipped(sharing.privacy)
    count = _counted(told_size(len(read_examples(spec.examples)), sharing.private()), sharing)
    return Capabilities(
        spec.name, spec.budget_mib, spec.ratio, spec.rank, os.cpu_count() or 1, cached_packages(), _software(), count,
        sharing.privacy,
    )  # fmt: skip


def _check_wishes(spec: EdgeSpec) -> None:
    most = {"budget_mib": (1.0, 1e9), "ratio": (0.0, LARGEST_RATIO), "rank": (1, MAX_RANK)}
    for name, (low, high) in most.items():
        if (value := getattr(spec, name)) is not None and not low <= value <= high:
            raise UserError(
                f"The edge {spec.name}: {name} must be from {low:g} to {high:g}; got {value!r}. Correct it."
            )


def check_name(name: object) -> str:
    """Return an edge's name, which becomes a folder's.

    Raises:
        UserError: It is too long or holds other characters than letters, digits, ``-`` and ``_``.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"An edge is called {str(name)[:80]!r}; names are made of at most 64 letters, digits, - and _, and begin with "
            "a letter or digit. Rename it."
        )
    return name


def _software() -> tuple[str, ...]:
    return tuple(f"{package} {number}" for package, number in sorted(versions().items()))


def _counted(n: int, sharing: Sharing) -> str:
    if sharing.count == "exact":
        return str(n)
    return next((word for limit, word in _BUCKETS if n < limit), "more")


# ---------------------------------------------------------------- the pruned models that it was sent


def cached_packages() -> tuple[str, ...]:
    """Name the pruned models in this machine's cache by their content."""
    folder = store.cache_dir() / PACKAGES
    return tuple(sorted(p.name for p in folder.glob("*") if _DIGEST.fullmatch(p.name))) if folder.is_dir() else ()


def package_name(folder: Path) -> str:
    """Name a saved pruned model by its files' content; they are checked first."""
    return store.key(files={name: entry["sha256"] for name, entry in store.check_folder(folder)["files"].items()})


def keep_package(name: str, files: Mapping[str, bytes] | None) -> Path:
    """Return the folder of a pruned model in the cache, writing it there if it came with the task.

    Raises:
        StoreError: It is not there and did not come, a file's name leaves the folder, or its content is not `name`.
    """
    if not _DIGEST.fullmatch(name):
        raise StoreError(f"A pruned model is named by 32 hexadecimal digits; got {name[:80]!r}. Do not use it.")
    if files is not None:
        if odd := [file for file in files if not _FILE.fullmatch(file)]:
            raise StoreError(f"The pruned model holds a file called {odd[0][:80]!r}, which none does. Do not use it.")
        if store.key(files={file: hashlib.sha256(data).hexdigest() for file, data in files.items()}) != name:
            raise StoreError(f"The pruned model that was sent is not {name[:12]}, which the task names. Do not use it.")

    def build(folder: Path) -> None:
        if files is None:
            raise StoreError(f"The pruned model {name[:12]} is not in the cache and was not sent. Ask for it again.")
        for file, data in files.items():
            (folder / file).write_bytes(data)

    return store.cached(PACKAGES, name, build)


# ---------------------------------------------------------------- the task


@dataclass(frozen=True, eq=False)
class Task:
    """What the cloud asks an edge to train.

    Attributes:
        run: Name of the run.
        plan: Hash of the pruning plan.
        base: Fingerprint of the whole model.
        package: The pruned model's name, by content.
        settings: How to train.
        initial: Where A begins, at the edge's sizes.
        replay: Public examples that are mixed in.
        deadline_s: Seconds after which training stops with what is there.
    """

    run: str
    plan: str
    base: str
    package: str
    settings: LoraSettings
    initial: Mapping[str, Tensor]
    replay: tuple[Example, ...] = ()
    deadline_s: float | None = None

    @cached_property
    def hash(self) -> str:
        """Name everything that decides the adapter, besides the examples and the deadline."""
        return store.key(
            plan=self.plan, base=self.base, package=self.package, settings=self.settings.to_dict(),
            initial={n: store.digest_tensor(t) for n, t in self.initial.items()},
            replay=[[e.prompt, e.target] for e in self.replay],
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Upload:
    """The one message that leaves an edge.

    Attributes:
        tensors: ``NAME.lora_A`` and ``NAME.lora_B`` in float16 or float32, or in int8 with ``NAME.lora_A.scale``; with a
            frozen A only those of B.
        facts: `FACTS`, and ``loss`` and the guarantee of local-dp where the edge has allowed or asked for them.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Size of the factors."""
        return sum(t.nbytes for t in self.tensors.values())


def work_folder(task: Task, name: str) -> Path:
    """Name the folder in which an edge keeps the state of a task."""
    return store.cache_dir() / "fuse-edge" / store.key(run=task.run, name=name, task=task.hash)


def perform(
    task: Task, package: Path, examples: Sequence[Example], name: str, sharing: Sharing | None = None,
    work: Path | None = None,
) -> Upload:  # fmt: skip
    """Train as a task says and build what is sent; a task that was done before is answered without training again.

    Args:
        task: The task.
        package: Folder of the pruned model.
        examples: The edge's own.
        name: Of the edge.
        sharing: What it lets out.
        work: Where its state is kept; by default in the cache.

    Raises:
        UserError: The privacy that is asked for does not go with the task; or as `train`.
        StoreError: The pruned model is damaged or another than the task names.
    """
    sharing = sharing or Sharing()
    check_privacy(sharing.privacy, name, freeze_a=task.settings.freeze_a, loss=sharing.loss)
    work = work or work_folder(task, name)
    mark = store.key(task=task.hash, sharing=sharing.to_dict(), examples=[[e.prompt, e.target] for e in examples])
    if (kept := _kept(work / "upload", mark)) is not None:
        return kept
    model = open_pruned(package)
    _log.info("%s: the upload will hold about %s bytes of factors", name, f"{_expected_bytes(model, task, sharing):,}")
    if (model.plan, model.base_fingerprint) != (task.plan, task.base):
        raise StoreError(
            f"The pruned model in {package} was made by another plan than the task names. Ask for it again."
        )
    adapter = train(
        model, examples, task.settings, work / "training", replay=task.replay, initial=task.initial, name=name,
        deadline_s=task.deadline_s, private=sharing.private(),
    )  # fmt: skip
    upload = build_upload(adapter, task, sharing)
    _log.info("%s: the upload holds %s bytes of factors", name, f"{upload.n_bytes:,}")
    if not upload.facts["partial"] or sharing.privacy == "local-dp":  # a second draw of noise would weaken the first
        _keep(upload, work / "upload", mark)
    return upload


def _keep(upload: Upload, folder: Path, mark: str) -> None:
    with store.writing(folder) as new:
        store.save_tensors(new / "factors.safetensors", upload.tensors)
        store.write_json_atomic(new / "facts.json", {"mark": mark, "facts": dict(upload.facts)})


def _kept(folder: Path, mark: str) -> Upload | None:
    if not folder.exists():
        return None
    store.check_folder(folder)
    record = store.read_json(folder / "facts.json")
    if record["mark"] != mark:
        return None
    return Upload(store.load_tensors(folder / "factors.safetensors"), record["facts"])


# ---------------------------------------------------------------- what leaves the edge


def build_upload(adapter: Adapter, task: Task, sharing: Sharing | None = None, *, seed: int | None = None) -> Upload:
    """Build what is sent: factors and `FACTS`.

    Args:
        adapter: What was trained.
        task: What was asked.
        sharing: What the edge lets out.
        seed: Of the noise of local-dp; by default drawn from the system. Give it in tests alone.
    """
    sharing, guarantee = sharing or Sharing(), Released({}, {})
    parts = dict(adapter.parts)
    if sharing.privacy == "local-dp":
        left = {name: part.left for name, part in parts.items()}
        guarantee = released(left, sharing.max_norm, sharing.noise, sharing.delta, seed=seed)
        tensors = {f"{name}.lora_B": value for name, value in guarantee.left.items()}
    else:
        tensors = named_tensors(parts)
    if sharing.privacy == "dp-sgd":
        guarantee = Released({}, {key: adapter.notes[key] for key in GUARANTEE})
    if task.settings.freeze_a:  # the cloud has drawn A and knows it
        tensors = {name: t for name, t in tensors.items() if name.endswith(".lora_B")}
    ranks = [part.rank for part in parts.values()]
    facts: dict[str, Any] = {
        "modules": list(parts), "ranks": ranks, "alphas": [float(r) for r in ranks], "plan": adapter.plan,
        "base": adapter.base, "settings": task.hash, "n_examples": _counted(adapter.n_examples or 0, sharing),
        "versions": list(_software()), "partial": bool(adapter.notes.get("partial", False)), **guarantee.facts,
    }  # fmt: skip
    curve = adapter.notes.get("curve")
    if sharing.loss and curve:
        facts["loss"] = float(curve[-1][1])
    if sharing.precision == "int8":
        return Upload(quantised(tensors), facts)
    return Upload({name: _compact(t) for name, t in tensors.items()}, facts)


def _expected_bytes(model: Model, task: Task, sharing: Sharing) -> int:
    shapes, how = shapes_of(model), task.settings
    dtype = "int8" if sharing.precision == "int8" else "float16"
    return upload_bytes((shapes[name] for name in task.initial), how.rank, dtype, freeze_a=how.freeze_a)


def _compact(tensor: Tensor) -> Tensor:
    """Return float16 where that changes no entry by more than a thousandth of its row's norm."""
    half = tensor.half()
    error = (half.float() - tensor).abs().amax(1)
    fits = bool((error <= _PRECISION * tensor.norm(dim=1)).all())  # an overflow is infinite and does not fit
    return half.contiguous() if fits else tensor.to(torch.float32).contiguous()


def settings_of(record: Mapping[str, Any]) -> LoraSettings:
    """Read training settings that came as JSON."""
    plain = dict(record)
    if plain.get("targets") is not None:
        plain["targets"] = tuple(plain["targets"])
    return with_settings(LoraSettings, plain)
