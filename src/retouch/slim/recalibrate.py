"""Choose the threshold of a saved slim model anew, on other rows, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry, store
from ..errors import ModelError, UserError
from .api import Exiting, Slim
from .base import Budget, Plan
from .data import Example, Rows, digest, read
from .encoded import batches, encode
from .points import Point
from .predict import Classifier, open_classifier
from .risk import Loss, Risk
from .rules import Rule
from .table import Costs, Table, flops_costs, read_table
from .thresholds import Threshold, choose
from .widths import base_cost

__all__ = ["calibration_rows", "costs_of", "recalibrated", "saved_record", "span_of", "table_of"]

_NEEDED = {"curve", "task", "plan", "method", "settings", "budget", "quality_base", "measured_on", "spent_128"}


def recalibrated(
    folder: str | Path,
    calib: str | Path,
    *,
    flops: str | float | None = None,
    max_harm: str | float | None = None,
    exiting: Exiting | None = None,
    columns: Mapping[str, str] | None = None,
) -> Slim:
    """Choose a saved model's threshold anew.

    Harm is measured against the slim model at full depth: the original is not at hand. What was measured when the model
    was made is told for the new threshold, of the same rows as then.

    Args:
        folder: A saved slim model.
        calib: Labelled rows that chose nothing else; of a folder its calib split.
        flops: Most FLOPs on average, as a share of the original's.
        max_harm: Largest certified harm.
        exiting: How harm is certified. The rule and the exits that are asked stay as saved.
        columns: Names of the columns, where they are others; see `retouch.slim.data.read`.

    Raises:
        UserError: Nothing is asked, rows and model do not fit each other, or another rule is asked for.
        ModelError: The folder was not written by `Slim.save`.
    """
    if flops is None and max_harm is None:
        raise UserError("--recalibrate needs --flops, --max-harm, or both: there is nothing to choose a threshold by.")
    classifier, ask, record = open_classifier(folder), exiting or Exiting(), saved_record(folder)
    budget, rule = _budget(record, flops, max_harm), _rule(classifier.network.config, ask)
    risk = None if budget.max_harm is None else _risk(classifier.network.config.task, budget.max_harm, ask)
    rows = calibration_rows(calib, record, columns)
    table = table_of(classifier, rows)
    found = choose(
        table,
        rule,
        np.array([p["threshold"] for p in record["curve"]]),
        budget=budget.flops,
        costs=costs_of(table, classifier.network, rule, record),
        risk=risk,
        span=span_of(record, classifier.network.config),
    )
    classifier.network.config.threshold = found.saved
    chosen_on = {"file": Path(calib).name, "rows": len(rows), "sha256": digest(rows)}
    return _slim(classifier, budget, found, rule, record | {"recalibrated_on": chosen_on})


# ---------------------------------------------------------------- what is asked, and of what


def saved_record(folder: str | Path) -> dict[str, Any]:
    """Read how a saved model was made, and what was measured.

    Raises:
        ModelError: The folder was not written by `Slim.save`.
    """
    path = Path(folder) / "retouch.json"
    found = store.read_json(path) if path.is_file() else {}
    record: dict[str, Any] = found if isinstance(found, dict) else {}
    if lacks := sorted(_NEEDED - set(record)):
        raise ModelError(f"{path} does not say how the model was made ({lacks[0]}). Make it again with retouch slim.")
    return record


def calibration_rows(
    calib: str | Path, record: Mapping[str, Any], columns: Mapping[str, str] | None = None
) -> list[Example]:
    """Read rows that may choose a threshold of a saved model.

    Args:
        calib: A file; or a folder or data set, whose calib split is read.
        record: What `saved_record` returned.
        columns: See `retouch.slim.data.read`.

    Raises:
        UserError: The model was trained on the other kind of single texts and pairs, a label is not one of the model's, or the model was trained, chosen or measured on these rows.
    """
    rows, task = read(calib, "calib", columns), record["task"]
    if (pair := rows[0].pair is not None) != task.get("pairs", pair):
        kinds = "single texts", "pairs of texts"
        raise UserError(f"{calib} holds {kinds[pair]}, and the model was trained on {kinds[not pair]}.")
    found = _labelled(rows, task["labels"])
    recipe, same = task.get("recipe", {}), digest(found)
    for split in ("train", "valid", "test"):
        file = recipe.get("files", {}).get(split, {}).get("sha256")
        if same == recipe.get("sha256", {}).get(split) or (file is not None and file == rows.sha256):
            raise UserError(f"{calib} holds the {split} rows of this model, and --calib needs rows that served for "
                            "nothing else. Give other ones.")  # fmt: skip
    return found


def _labelled(rows: Rows, names: Sequence[str] | None) -> list[Example]:
    value = _number if names is None else _class_among(names)
    labels = [value(str(row.label)) for row in rows]
    if bad := [i for i, label in enumerate(labels) if label is None]:
        wanted = "no finite number" if names is None else f"none of the model's: {', '.join(names)}"
        raise UserError(f"{rows.table.at(*bad)}: label {rows[bad[0]].label!r:.60} is {wanted}.")
    return [replace(row, label=label) for row, label in zip(rows, labels) if label is not None]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _class_among(names: Sequence[str]) -> Callable[[str], int | None]:
    """Find a class by its name, whatever the case unless that tells two apart."""
    exact = {name: i for i, name in enumerate(names)}
    folded = {name.casefold(): i for name, i in exact.items()}
    alike = folded if len(folded) == len(exact) else {}
    return lambda text: exact.get(text, alike.get(text.casefold()))


def _budget(record: Mapping[str, Any], flops: str | float | None, max_harm: str | float | None) -> Budget:
    return Budget(record["budget"]["params"] or min(1.0, record["params_ratio"]), flops, max_harm)


def _rule(config: Any, ask: Exiting) -> Rule:
    """Return the model's own rule: the saved curve and thresholds are of that one alone."""
    saved = {"rule": config.rule, "every": config.every, "min_block": config.min_block}
    usual = Exiting()
    for name, value in saved.items():
        if getattr(ask, name) not in (getattr(usual, name), value):
            raise UserError(
                f"{name} {getattr(ask, name)!r} is not the saved one, {value!r}, for which the thresholds to try were "
                "fixed. Leave it out, or make the model again: its trained stages are reused."
            )
    heat = tuple(config.temperatures) if config.temperatures else None
    if heat and not ask.temperatures:
        raise UserError("temperatures are part of the saved model and cannot be left out. Make the model again.")
    return Rule(config.rule, heat, config.every, config.min_block)


def _risk(task: str, limit: float, ask: Exiting) -> Risk:
    if task == "regression" and ask.loss not in ("gap", "flip"):
        raise UserError(f"loss must be 'flip' for a regression, which is neither right nor wrong; got {ask.loss!r}.")
    loss: Loss = "flip" if task == "regression" else ask.loss
    return Risk(limit, loss, "full_depth", ask.how, delta=ask.delta)


# ---------------------------------------------------------------- what the model says, and costs


def table_of(classifier: Classifier, rows: Sequence[Example]) -> Table:
    """Run a saved model once over rows, at full depth."""
    network = classifier.network
    encoded = encode(classifier.tokenizer, rows, classifier.max_tokens, token_types=network.size.token_types)
    return read_table(network, batches(encoded, 32, seed=None, by_length=False))


def costs_of(table: Table, network: Any, rule: Rule, record: Mapping[str, Any]) -> Costs:
    """Count the FLOPs of rows as shares of the original's, which may have more blocks than the slim model."""
    original = Plan.from_dict(record["plan"]).size
    spent = flops_costs(table, network.size, network.widths, rule)
    return replace(spent, base=np.array([base_cost(original, int(t)) for t in table.lengths]))


def span_of(record: Mapping[str, Any], config: Any) -> float | None:
    """Return how far apart the training targets lie, in the unit of the logits; None for classes."""
    return record["target_range"] / config.target_scale if record.get("target_range") else None


# ---------------------------------------------------------------- what is true of it now


def _slim(
    classifier: Classifier, budget: Budget, found: Threshold, rule: Rule, record: Mapping[str, Any]
) -> Slim:  # fmt: skip
    """Tell what was measured when the model was made, at the new threshold; what was of the old one alone goes."""
    curve = tuple(map(_point, record["curve"]))
    made = Slim(
        classifier=classifier,
        plan=Plan.from_dict(record["plan"]),
        budget=budget,
        method=registry.make("slim", record["method"], **record["settings"]),
        threshold=found,
        rule=rule,
        quality_base=record["quality_base"],
        point=next(p for p in curve if p.threshold == found.saved),
        curve=curve,
        measured_on=record["measured_on"],
        likeness=None,
        shown={},
        record={},
        spent_128=tuple(record["spent_128"]),
    )
    anew = {"kind", "format", *made.to_dict()}
    return replace(made, record={name: value for name, value in record.items() if name not in anew})


def _point(values: Mapping[str, Any]) -> Point:
    by_block = {name: {int(l): v for l, v in values[name].items()} for name in ("leaves", "quality_at")}
    return Point(**{**values, **by_block})
