"""What ``exits.json`` holds: where a row may leave an exported slim model, and when. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ._rules import RULES, TOLERANCE, Rule, fitting
from .errors import StoreError, UserError
from .store import read_json

__all__ = ["FORMAT", "Exits", "read_exits", "stage_name"]

FORMAT = 1
"""The format number of ``exits.json``."""


def stage_name(stage: int) -> str:
    """Name the file of a stage."""
    return f"stage{stage}.onnx"


@dataclass(frozen=True)
class Exits:
    """What ``exits.json`` holds: where a row may leave, and when it does.

    Args:
        cuts: Blocks with an exit, ascending, the last block among them; each ends a stage.
        rule: How uncertainty is read; see `retouch.slim.rules.Rule`.
        threshold: A row leaves at the first exit whose uncertainty is below; None lets none leave early.
        temperatures: One a cut; logits are divided by it before the rule.
        blocks: Blocks of the whole network.
        classes: Width of the logits.
        task: ``"classification"`` or ``"regression"``.
        vocab: Token ids lie below it.
        positions: The longest row in tokens.
        token_types: Whether the first stage takes token types.
        max_tokens: Where `Router.predict` cuts texts.
        pad: Token id of the padding.
        labels: Names of the classes; None for regression.
        target_mean: Added to a regression's answer after `target_scale`.
        target_scale: Multiplies a regression's answer.
        tolerance: Under ``patience``, regression answers that differ by less count as equal; None: by
            less than 0.05.
        precision: ``"float32"`` or ``"int8"``.
        widths: Heads, neurons and rank, for the reader.
        made_with: Versions of what made the files, for the reader.
        pairs: Whether the model was trained on pairs of texts; None where that is not known, as in older files.
    """

    cuts: tuple[int, ...]
    rule: str
    threshold: float | None
    temperatures: tuple[float, ...]
    blocks: int
    classes: int
    task: str
    vocab: int
    positions: int
    token_types: bool
    max_tokens: int
    pad: int
    labels: tuple[str, ...] | None = None
    target_mean: float = 0.0
    target_scale: float = 1.0
    tolerance: float | None = None
    precision: str = "float32"
    widths: Mapping[str, Any] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict)
    pairs: bool | None = None

    def __post_init__(self) -> None:
        for name, right in self._rights().items():
            if not right:
                raise UserError(f"{name} cannot be {getattr(self, name)!r} in an export of {self.blocks!r} blocks.")

    def _rights(self) -> dict[str, bool]:
        cuts, regression = self.cuts, self.task == "regression"
        ascending = list(cuts) == sorted(set(cuts)) and all(map(_whole, cuts))
        return {
            **{name: _whole(getattr(self, name), 1) for name in ("blocks", "classes", "vocab", "positions")},
            "cuts": ascending and bool(cuts) and cuts[0] >= 0 and cuts[-1] == self.blocks - 1,
            "task": self.task == "classification" or (regression and self.classes == 1),
            "rule": self.rule in (RULES if self.threshold is None else fitting(self.classes)),
            "threshold": self.threshold is None or _number(self.threshold),
            "temperatures": len(self.temperatures) == len(cuts) and all(_number(t, 1e-30) for t in self.temperatures),
            "token_types": isinstance(self.token_types, bool),
            "max_tokens": _whole(self.max_tokens, 1) and self.max_tokens <= self.positions,
            "pad": _whole(self.pad) and self.pad < self.vocab,
            "labels": self.labels is None or (len(self.labels) == self.classes and _texts(self.labels)),
            "target_mean": _number(self.target_mean, -np.inf),
            "target_scale": _number(self.target_scale, -np.inf),
            "tolerance": self.tolerance is None or _number(self.tolerance),
            "precision": self.precision in ("float32", "int8"),
            "widths": isinstance(self.widths, Mapping),
            "made_with": isinstance(self.made_with, Mapping),
            "pairs": self.pairs is None or isinstance(self.pairs, bool),
        }

    def deciding(self) -> Rule:
        """Return how a row decides to leave; every cut is asked."""
        return Rule(self.rule, self.temperatures, tolerance=TOLERANCE if self.tolerance is None else self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``exits.json`` holds, the format number first."""
        return {"format": FORMAT, **asdict(self)}


def _whole(value: object, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _number(value: object, least: float = 0.0) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < np.inf


def _texts(values: Sequence[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def read_exits(path: str | Path) -> Exits:
    """Read ``exits.json``.

    Raises:
        StoreError: It is missing, of a newer format, or not what an export writes.
    """
    found = read_json(path)
    number = found.pop("format", None) if isinstance(found, dict) else None
    if _whole(number, FORMAT + 1):
        raise StoreError(f"{path} has format {number}; this Retouch reads up to {FORMAT}. Update Retouch.")
    if type(number) is not int or number != FORMAT:
        raise StoreError(f"{path} has the format {number!r}, which no Retouch writes. Export the model again.")
    known = {f.name for f in fields(Exits)}
    if odd := sorted(known.symmetric_difference({"pairs": None, **found})):
        raise StoreError(f"{path} lacks or adds {', '.join(map(repr, odd))}. Export the model again.")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
    try:
        return Exits(**values)
    except (UserError, TypeError) as error:
        raise StoreError(f"{path}: {error} Export the model again.") from error
