"""Choose the threshold of a saved slim model anew, on other rows, without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import store
from ..errors import ModelError, UserError
from .api import Exiting
from .base import fraction
from .data import Example, read
from .encoded import batches, encode
from .network import save
from .predict import Classifier, open_classifier
from .risk import Loss, Risk
from .rules import Rule
from .table import flops_costs, read_table
from .thresholds import Threshold, choose

__all__ = ["Recalibrated", "recalibrated"]


@dataclass(frozen=True, eq=False)
class Recalibrated:
    """A slim model with a threshold of its own rows.

    Attributes:
        classifier: With the new threshold.
        threshold: What was chosen, and what is proved about it.
        record: What ``retouch.json`` is to hold.
    """

    classifier: Classifier
    threshold: Threshold
    record: Mapping[str, Any]

    def save(self, folder: str | Path, *, keep_refused: bool = False) -> None:
        """Write the model with its new threshold.

        Raises:
            BoundRefused: What was asked does not hold.
        """
        if not keep_refused:
            self.threshold.require()
        save(self.classifier.network, self.classifier.tokenizer, folder, record=self.record)


def recalibrated(
    folder: str | Path,
    calib: str | Path,
    *,
    flops: str | float | None = None,
    max_harm: str | float | None = None,
    exiting: Exiting | None = None,
) -> Recalibrated:
    """Choose a saved model's threshold anew.

    Harm is measured against the slim model at full depth: the original is not at hand.

    Args:
        folder: A saved slim model.
        calib: Labelled rows that chose nothing else.
        flops: Most FLOPs on average, as a share of the original's.
        max_harm: Largest certified harm.
        exiting: The rule, and how harm is certified.

    Raises:
        UserError: Nothing is asked, or rows and model do not fit each other.
        ModelError: The folder was not written by `Slim.save`.
    """
    if flops is None and max_harm is None:
        raise UserError("--recalibrate needs --flops, --max-harm, or both: there is nothing to choose a threshold by.")
    classifier, ask = open_classifier(folder), exiting or Exiting()
    record = store.read_json(Path(folder) / "retouch.json")
    if "curve" not in record or "task" not in record:
        raise ModelError(f"{folder} does not say which thresholds were tried. Make it again with retouch slim.")
    network = classifier.network
    rule = _rule(network, ask)
    encoded = encode(
        classifier.tokenizer, _rows(calib, record["task"]), classifier.max_tokens, token_types=network.size.token_types
    )
    table = read_table(network, batches(encoded, 32, seed=None, by_length=False))
    limit = None if max_harm is None else fraction(max_harm, "max_harm")
    loss: Loss = "flip" if network.config.task == "regression" else ask.loss
    found = choose(
        table,
        rule,
        np.array([p["threshold"] for p in record["curve"]]),
        budget=None if flops is None else fraction(flops, "flops"),
        costs=flops_costs(table, network.size, network.widths, rule),
        risk=None if limit is None else Risk(limit, loss, "full_depth", ask.how, delta=ask.delta),
        span=None if not record.get("target_range") else record["target_range"] / network.config.target_scale,
    )
    network.config.rule, network.config.threshold = rule.name, found.saved
    network.config.every, network.config.min_block = rule.every, rule.min_block
    told = {"threshold": found.to_dict(), "passed": found.reachable, "recalibrated_on": str(calib)}
    told["leaves"] = {str(l): share for l, share in found.leaves.items()}  # an export takes its cuts from it
    return Recalibrated(classifier, found, record | told)


def _rule(network: Any, ask: Exiting) -> Rule:
    """Keep the model's rule and temperatures where none is asked for."""
    config = network.config
    temperatures = tuple(config.temperatures) if config.temperatures and ask.temperatures else None
    return Rule(ask.rule or config.rule, temperatures, ask.every, ask.min_block)


def _rows(calib: str | Path, task: Mapping[str, Any]) -> list[Example]:
    names, found = task["labels"], []
    for row in read(calib).examples:
        if names is None:
            found.append(replace(row, label=float(row.label)))
        elif str(row.label) in names:
            found.append(replace(row, label=names.index(str(row.label))))
        else:
            raise UserError(f"{calib} has the label {row.label!r}; the model knows {', '.join(names)}.")
    return found
