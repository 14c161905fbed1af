"""What a bench keeps of each finished method, so that an interrupted one goes on: numbers, answers and, to time them, networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import checkpoint, store
from ..change import versions
from ..model import Model
from ._bag import Bag
from ._originals import pooling_of
from ._run import deciding
from .api import Exiting, Slim
from .base import Budget, SlimMethod
from .data import Task, digest
from .network import SlimForSequenceClassification, network_of, plain_config
from .opening import Source
from .pareto import record
from .readings import Tables
from .rules import Rule
from .table import Costs, Table

__all__ = ["Part", "keep", "part_key", "recall"]

_FORMAT = 2


@dataclass(frozen=True, eq=False)
class Part:
    """One method at one seed, measured.

    Attributes:
        record: See `retouch.slim.pareto.record`.
        table: The logits of its exits on the test rows.
        costs: What leaving costs there, in FLOPs.
        rule: With which it leaves.
        network: The slim network; None where it is not timed, or was not written.
        original: The network before it was made slim; only of the first part, and where it is timed.
    """

    record: Mapping[str, Any]
    table: Table
    costs: Costs
    rule: Rule
    network: SlimForSequenceClassification | None = None
    original: SlimForSequenceClassification | None = None

    @property
    def thresholds(self) -> list[float]:
        """Those of the curve, ascending, and the chosen one."""
        chosen = (self.record["threshold"] or {}).get("value") or 0.0
        return [*(p["threshold"] for p in self.record["curve"]), chosen]


def part_key(
    source: Source, task: Task, method: SlimMethod, budget: Budget, exiting: Exiting, **more: Any
) -> str:  # fmt: skip
    """Make the key of everything that decides a part."""
    splits = {split: digest(getattr(task, split)) for split in ("train", "valid", "calib", "test")}
    return store.key(
        format=_FORMAT,
        model=_source_key(source),
        task=[task.name, task.labels, task.metric, splits],
        method=[method.name, method.to_dict()],
        budget=budget.to_dict(),
        exiting=asdict(exiting),
        cuda=torch.cuda.is_available(),
        versions=versions(),
        more=more,
    )


def _source_key(source: Source) -> str:
    """Of a model and of how texts become its input."""
    model, tokenizer = source.model, source.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else backend.to_str()
    words = store.key(rules=rules, special=tokenizer.special_tokens_map, side=tokenizer.truncation_side)
    if isinstance(model, Model):
        return store.key(model=model.fingerprint, pooling=pooling_of(model.network), words=words)
    weights = {name: store.digest_tensor(tensor) for name, tensor in model.state_dict().items()}
    return store.key(model=weights, config=deciding(model), words=words)


def keep(folder: Path, slim: Slim, task: Task, *, timed: bool, with_original: bool) -> Part:
    """Write a part, whole or not at all, and return it.

    A network that has no format of its own is not written: it is made anew where it has to be timed.
    """
    assert slim.fitted is not None
    split, networks = slim.measured_on, _networks(slim, timed, with_original)
    tables = Tables(slim.fitted, slim.classifier.tokenizer, task, slim.classifier.max_tokens)
    part = Part(_plain(record(slim)), tables.of(split), tables.costs(split, slim.rule), slim.rule, **networks)
    arrays = {"logits": part.table.logits, "labels": part.table.labels, "lengths": part.table.lengths}
    arrays |= {"spent": part.costs.spent, "base": part.costs.base}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    stored = {name: network for name, network in networks.items() if not isinstance(network, Bag)}
    for name, network in stored.items():
        tensors |= checkpoint.under(name, network.state_dict())
    configs = {name: plain_config(network) for name, network in stored.items()}
    facts = {"record": part.record, "rule": asdict(slim.rule), "exits": list(part.table.exits), "configs": configs}
    checkpoint.save(folder, tensors, facts)
    return part


def _networks(slim: Slim, timed: bool, with_original: bool) -> dict[str, SlimForSequenceClassification]:
    assert slim.fitted is not None
    found = {"network": slim.classifier.network} if timed else {}
    return found | ({"original": slim.fitted.original} if timed and with_original else {})


def recall(folder: Path) -> Part | None:
    """Read a part, or None where there is none, or it is damaged."""
    if (found := checkpoint.load(folder)) is None:
        return None
    tensors, facts = found
    arrays = {name: tensors[name].numpy() for name in ("logits", "labels", "lengths", "spent", "base")}
    rule = facts["rule"]
    temperatures = None if rule["temperatures"] is None else tuple(rule["temperatures"])
    return Part(
        facts["record"],
        Table(arrays["logits"], tuple(facts["exits"]), arrays["labels"], arrays["lengths"]),
        Costs(arrays["spent"], arrays["base"]),
        Rule(**rule | {"temperatures": temperatures}),
        **{name: network_of(config, checkpoint.select(name, tensors)) for name, config in facts["configs"].items()},
    )


def _plain(value: Any) -> Any:
    """Turn tuples into lists and numbers that are not finite into None, as they come back from JSON."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
