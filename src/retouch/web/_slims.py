"""Saved slim classifiers: what was measured and proved of them, and what they answer, as ``retouch slim --predict`` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import store
from .._texts import Text
from ..bound import Certificate
from ..errors import StoreError, UserError
from ..slim.base import Plan
from ..slim.compaction import rule_of
from ..slim.data import Example
from ..slim.predict import Classifier, Prediction, open_classifier
from ..slim.recalibrate import costs_of, saved_record, table_of
from ..slim.risk import ExpectedRisk, Guarantee
from ..slim.rules import Rule, fitting, log_softmax
from ..slim.table import Table, unsure
from ..slim.thresholds import Threshold
from . import _wire as wire
from ._folder import Folder
from ._job import Desk

__all__ = ["Slims"]


class Slims:
    """Hold one slim model and let it answer. Its public methods are routes of the API.

    Args:
        folder: Where they are.
        desk: Where work lies.
    """

    def __init__(self, folder: Folder, desk: Desk) -> None:
        self.folder, self.desk = folder, desk
        self._held: tuple[Any, Classifier, dict[str, Any]] | None = None

    def slims(self) -> list[str]:
        """List the slim models, the newest first."""
        return self.folder.slims()

    def slim(self, path: str) -> wire.SlimFacts:
        """Show what was measured and proved of one, after all of its files were checked."""
        folder = self.folder.inside(path)
        store.check_folder(folder)
        return _facts(path, folder)

    def classify(self, asked: wire.Classify) -> wire.Classified:
        """Answer texts: the label, where each left, what every exit would have said, what it cost."""
        folder, texts = self.folder.inside(asked.slim), _texts(asked)
        with self.desk.alone():
            classifier, record = self._opened(folder)
            config = classifier.network.config
            threshold = (config.threshold or 0.0) if asked.threshold is None else asked.threshold
            said = _at(classifier, texts, threshold)
            examples = [_example(text) for text in texts]
            table = table_of(classifier, examples)
        rule = rule_of(classifier.network)
        where = np.array([one.exit_block for one in said])[:, None]
        spent = costs_of(table, classifier.network, rule, record).ratios(where)[:, 0]
        exits = _exits(table, rule, config)
        return wire.Classified(
            threshold=threshold,
            said=[
                wire.Said(text=e.text, second=e.pair, **one.to_dict(), flops=float(share), exits=every)
                for e, one, share, every in zip(examples, said, spent, exits)
            ],
        )

    def _opened(self, folder: Path) -> tuple[Classifier, dict[str, Any]]:
        """Open a model, or take the one at hand unless its folder was written anew."""
        written = folder.stat()
        key = folder, written.st_ino, written.st_mtime_ns
        if self._held is None or self._held[0] != key:
            self.slim(folder.relative_to(self.folder.root).as_posix())  # all of it is checked
            self._held = key, open_classifier(folder), saved_record(folder)
        return self._held[1], self._held[2]


def _texts(asked: wire.Classify) -> list[Text]:
    if not asked.second:
        return list(asked.texts)
    if len(asked.second) != len(asked.texts):
        raise UserError(f"Pairs need a second text each; got {len(asked.texts)} and {len(asked.second)} second ones.")
    return list(zip(asked.texts, asked.second))


def _at(classifier: Classifier, texts: list[Text], threshold: float) -> list[Prediction]:
    """Predict at a threshold, and leave the model with its own."""
    config = classifier.network.config
    own, config.threshold = config.threshold, threshold
    try:
        return list(classifier.predict(texts))
    finally:
        config.threshold = own


def _example(text: Text) -> Example:
    first, second = (text, None) if isinstance(text, str) else text
    return Example(first, second, 0)


def _exits(table: Table, rule: Rule, config: Any) -> list[list[wire.Exit]]:
    """Return for each text what every exit says: the likeliest class with its probability, or the value."""
    fits = rule.name in fitting(table.classes)
    asked = dict(zip(rule.due(table.exits), unsure(table, rule))) if fits else {}

    def at(place: int, row: int) -> wire.Exit:
        block = table.exits[place]
        doubt = float(asked[block][row]) if block in asked and block != table.exits[-1] else None
        if table.classes == 1:
            value = float(table.logits[place, row, 0]) * config.target_scale + config.target_mean
            return wire.Exit(block=block, label=None, score=value, unsure=doubt)
        log_p = log_softmax(table.logits[place, row] / rule.temperature(table.exits, block))
        best = int(log_p.argmax())
        return wire.Exit(block=block, label=config.id2label[best], score=float(np.exp(log_p[best])), unsure=doubt)

    return [[at(place, row) for place in range(len(table.exits))] for row in range(table.n)]


# ---------------------------------------------------------------- in words of the API


def _facts(path: str, folder: Path) -> wire.SlimFacts:
    record = saved_record(folder)
    try:
        return _told(path, record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path}: its record was altered ({error!r}). Make the model again.") from error


def _told(path: str, record: Mapping[str, Any]) -> wire.SlimFacts:
    task, found, size = record["task"], record["threshold"], Plan.from_dict(record["plan"]).size
    metric, base = task["metric"], float(record["quality_base"])
    numbers = {
        "made from": str(record["source"]),
        "method": record["method"],
        "parameters": _times(record["params_ratio"]),
        "FLOPs a text": _times(record["flops_ratio"]),
        "blocks run, mean": f"{record['exit_layer']:.2f} of {size.blocks}",
        f"{metric}, original": f"{base:.4f}",
        f"{metric}, slim": f"{record['quality']:.4f}",
        "measured on": f"{record['measured_on']} rows",
        "texts are cut at": f"{record['max_tokens']} tokens",
    }
    proved = set((found or {}).get("certified", ()))
    leaves, right = record["leaves"], record["quality_at"]
    return wire.SlimFacts(
        path=path,
        task=task["name"],
        labels=task["labels"],
        pairs=task.get("pairs"),
        metric=metric,
        quality_base=base,
        numbers=numbers,
        threshold=0.0 if found is None else found["value"] or 0.0,
        curve=[wire.Point(**_only(p, wire.Point), certified=p["threshold"] in proved) for p in record["curve"]],
        exits=wire.Table(
            title="Exits",
            columns=["exit", "leave here", "right there"],
            rows=[[f"after block {l}", f"{share:.1%}", right[l]] for l, share in leaves.items()],
        ),
        says=[*_proofs(found), *filter(None, [record.get("likeness")])],
    )


def _only(point: Mapping[str, Any], cls: type[wire.Point]) -> dict[str, Any]:
    return {name: point[name] for name in cls.model_fields if name in point}


def _times(ratio: float) -> str:
    return f"1/{1 / ratio:.3g} of the original's"


def _proofs(found: Mapping[str, Any] | None) -> list[str]:
    """Say what was proved about the threshold, in the words of the command line."""
    if found is None:
        return ["No limit was asked for that would choose a threshold: nobody leaves early."]
    cost = None if found["cost_certificate"] is None else _certificate(found["cost_certificate"])
    harm = None if found["certificate"] is None else _guarantee(found["certificate"])
    told = Threshold(
        found["value"], found["reachable"], Rule(), found["reason"], certificate=harm, cost_certificate=cost
    )
    return told.sentences() + ([] if harm else ["No limit of harm was asked for, so no harm is certified."])


def _guarantee(found: Mapping[str, Any]) -> Guarantee:
    if found["method"] != "conformal":
        return _certificate(found)
    return ExpectedRisk(**{name: value for name, value in found.items() if name not in ("holds", "method")})


def _certificate(found: Mapping[str, Any]) -> Certificate:
    return Certificate(**{name: value for name, value in found.items() if name != "holds"})
