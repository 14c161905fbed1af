"""What a change is: a difference for each weight, low-rank or whole, with where it comes from and what it achieved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import linalg, store
from ..model import Model

__all__ = [
    "Change",
    "Dense",
    "LowRank",
    "Part",
    "filled",
    "matrix_of",
    "measured_facts",
    "path_of",
    "size_of",
    "with_report",
]


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

    def to_dict(self) -> dict[str, Any]:
        """Return for programs what it holds, how it was made and what was measured; of the weights only sizes."""
        return {
            "id": self.id,
            "method": self.method,
            "base": self.base,
            "settings": dict(self.settings),
            "facts": [dict(f) for f in self.facts],
            "weights": self.norms(),
            "numbers": self.n_numbers,
            "report": dict(self.report),
        }

    def norms(self, model: Model | None = None) -> dict[str, dict[str, float]]:
        """Measure each part: Frobenius norm, spectral norm, rank, and the share of the weight's norm."""
        rows = {}
        for name, part in self.parts.items():
            frobenius, spectral = part.norms()
            rows[name] = {"frobenius": frobenius, "spectral": spectral, "rank": float(part.rank)}
            if model is not None:
                rows[name]["share_of_weight"] = frobenius / float(matrix_of(model, name).norm())
        return rows


def filled(fact: Mapping[str, Any]) -> str:
    """Return the prompt of a fact's record with the subject in it."""
    return str(fact.get("prompt", "")).replace("{}", str(fact.get("subject", "")), 1)


def measured_facts(
    facts: Sequence[Mapping[str, Any]], effect: Sequence[Mapping[str, float]] = ()
) -> list[dict[str, Any]]:
    """Return ``prompt``, ``target`` and ``truth`` of facts, and the target's probability if it was measured.

    Args:
        facts: Their records.
        effect: The measured mean -log P of each target, nats; ``before`` and ``after`` are left out unless all have one.
    """
    rows = [{"prompt": filled(f), "target": f.get("target"), "truth": f.get("truth")} for f in facts]
    if len(effect) != len(rows):
        return rows
    pairs = [{"before": math.exp(-e["nll_before"]), "after": math.exp(-e["nll_after"])} for e in effect]
    return [row | pair for row, pair in zip(rows, pairs)]


def with_report(change: Change, report: Mapping[str, Any]) -> Change:
    """Return the change with what was measured written into it."""
    return replace(change, report={**change.report, **report})


def path_of(model: Model, name: str) -> str:
    """Return the parameter's path in the network."""
    if name.endswith(":bias"):
        return model.anatomy.path(name.removesuffix(":bias")) + ".bias"
    return model.anatomy.weight(name)


def matrix_of(model: Model, name: str) -> Tensor:
    """A part's weight as (outputs, inputs), or its bias as (outputs, 1)."""
    if name.endswith(":bias"):
        return model.network.get_parameter(path_of(model, name)).detach()[:, None]
    return model.matrix(name)


def size_of(model: Model, name: str) -> str:
    """Say a weight's shape here, or that there is none of that name."""
    bare = name.removesuffix(":bias")
    if bare not in model.anatomy.names() or (bare != name and getattr(model.module(bare), "bias", None) is None):
        return "no such weight"
    return "x".join(map(str, matrix_of(model, name).shape))
