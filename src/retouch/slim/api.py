"""Make a classifier slim in one call: read, plan, train, choose thresholds, measure, certify, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..bound import Certificate
from ..errors import UserError
from ._asked import Exiting, check, needed_depth, planned, risk_of, task_of
from .base import Budget, Plan, SlimMethod
from .data import Task
from .encoded import encode
from .network import save
from .opening import Source, open_source
from .points import USUAL_TOKENS, Point, curve, flops_at, leavers, point
from .predict import Classifier
from .presets import TrainingSettings
from .readings import Tables
from .rules import Rule
from .stages import Fitted
from .stages import fit as fit_method
from .table import Table, fit_temperatures, grid, leaving, unsure
from .thresholds import Likeness, Threshold, choose, likeness

__all__ = ["LADDER", "Exiting", "Slim", "calibrated", "fit"]

_log = logging.getLogger(__name__)
LADDER = (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 12, 1 / 16)
"""Shares of the parameters that `max_drop` tries, from the largest down to the first that does not hold."""


@dataclass(frozen=True, eq=False)
class Slim:
    """A slim classifier, with what was planned, measured and proved.

    Attributes:
        classifier: The network with its threshold, and the tokenizer.
        plan: Its widths.
        budget: What was asked for.
        method: What trained it.
        threshold: What was chosen; None where nothing was asked of it (then nobody leaves early).
        rule: Which exits are asked, and how.
        quality_base: The original's quality on `measured_on`.
        point: The chosen threshold's quality and cost there.
        curve: Those of every threshold of the grid.
        measured_on: ``"test"``, or ``"calib"`` where there is no test split; that one chose the threshold.
        likeness: How alike those that chose it and those measured are.
        shown: Texts that left early and late.
        record: How it was made, as plain values.
        fitted: The networks that were trained.
        spent_128: By block, the FLOPs of a text of 128 tokens that leaves after it, as a share of the original's.
    """

    classifier: Classifier
    plan: Plan
    budget: Budget
    method: SlimMethod
    threshold: Threshold | None
    rule: Rule
    quality_base: float
    point: Point
    curve: tuple[Point, ...]
    measured_on: str
    likeness: Likeness | None
    shown: Mapping[str, list[dict[str, Any]]]
    record: Mapping[str, Any] = field(repr=False)
    fitted: Fitted | None = field(default=None, repr=False)
    spent_128: tuple[float, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether what was asked of the threshold holds."""
        return self.threshold is None or self.threshold.reachable

    @property
    def flops_ratio_128(self) -> float:
        """What the point costs if every text has 128 tokens and leaves where it does, as papers count."""
        return flops_at(self.point, self.spent_128)

    def to_dict(self) -> dict[str, Any]:
        """Return everything that was measured as plain values that JSON can hold."""
        return {
            "method": self.method.name,
            "settings": self.method.to_dict(),
            "budget": self.budget.to_dict(),
            "plan": self.plan.to_dict(),
            "params_ratio": self.plan.params_ratio,
            "quality_base": self.quality_base,
            "measured_on": self.measured_on,
            **{k: v for k, v in self.point.to_dict().items() if k != "threshold"},
            "flops_ratio_128": self.flops_ratio_128,
            "spent_128": list(self.spent_128),
            "max_tokens": self.classifier.max_tokens,
            "threshold": None if self.threshold is None else self.threshold.to_dict(),
            "passed": self.passed,
            "likeness": None if self.likeness is None else self.likeness.sentence(),
            "curve": [p.to_dict() for p in self.curve],
            "shown": dict(self.shown),
            **self.record,
        }

    def save(self, folder: str | Path, *, keep_refused: bool = False, command: str = "") -> None:
        """Write the model as a folder that transformers opens after ``import retouch.slim``.

        Args:
            folder: Where; one of ours that is already there gives way.
            keep_refused: Write it, never leaving early, although what was asked does not hold.
            command: The command that made it, for the card; those of before are told, too.

        Raises:
            BoundRefused: What was asked does not hold.
        """
        if self.threshold is not None and not keep_refused:
            self.threshold.require()
        from .card import card

        commands = [*self.record.get("commands", ()), *filter(None, [command])]
        record = {**self.to_dict(), "commands": commands}
        save(self.classifier.network, self.classifier.tokenizer, folder, record=record, card=card(self, command))


def fit(
    source: str | Path | Source,
    train: Any,
    valid: Any = None,
    calib: Any = None,
    test: Any = None,
    *,
    budget: Budget | Mapping[str, Any],
    method: str | SlimMethod = "costeff",
    exiting: Exiting | None = None,
    exits: Sequence[int] | None = None,
    widths: Mapping[str, int | None] | None = None,
    folder: str | Path | None = None,
    ladder: Sequence[float] = LADDER,
    settings: Mapping[str, Any] | None = None,
    told: Callable[[Plan, Task], None] | None = None,
    keep_refused: bool = True,
    **data: Any,
) -> Slim:
    """Make a classifier slim within a budget.

    Args:
        source: A fine-tuned classifier or a bare encoder: a folder, a hub id, a bundled name, or one that is open.
        train: A file, a folder, a data set's id, or rows; see `make_task`. A `Task` is taken as it is; then
            nothing else about data can be given.
        valid: See `make_task`.
        calib: See `make_task`.
        test: See `make_task`.
        budget: Sizes and limits.
        method: A method's name, or a method.
        exiting: How the threshold is chosen.
        exits: Blocks with an exit; None: all.
        widths: Fixed ``heads``, ``d_ff`` or ``rank``, in place of searched ones.
        folder: Where stages are kept, so that an interrupted call goes on; by default in the cache.
        ladder: Shares of the parameters that `max_drop` walks down.
        settings: Settings of a method that is given by its name.
        told: Is shown each plan before it is trained.
        keep_refused: Train also where the calibration rows are too few to show the limit whatever comes out.
        **data: More arguments of `make_task`.

    Raises:
        UserError: Data, model and budget do not fit each other; the message says where.
        BoundRefused: The limit cannot be shown, and `keep_refused` is off.
        RetouchError: Training diverged.
    """
    opened = source if isinstance(source, Source) else open_source(source)
    task = task_of(opened, train, valid, calib, test, data)
    limits = budget if isinstance(budget, Budget) else Budget(**budget)
    made = method if isinstance(method, SlimMethod) else registry.make("slim", method, **(settings or {}))
    ask, fixed = exiting or Exiting(), dict(widths or {})
    if limits.max_drop is not None:
        return _smallest(opened, task, limits, made, ask, exits, fixed, folder, ladder, told, keep_refused)
    check(task, limits, ask, keep_refused=keep_refused)
    size, lengths = opened.size(task.labels), _lengths(opened, task, made)
    plan = planned(size, limits, lengths, exits, ask, made, fixed)
    if told is not None:
        told(plan, task)

    def deepen(table: Table) -> Plan:
        depth = needed_depth(table, _rule(table, task, ask), task.metric)
        if depth <= plan.mean_depth:
            return plan
        deeper = planned(size, limits, lengths, exits, ask, made, fixed, depth)
        _log.info("The assistant needs %.2f blocks on average to keep its quality: planned again.", depth)
        if told is not None:
            told(deeper, task)
        return deeper

    return _made(opened, task, limits, plan, made, ask, folder, deepen)


def _lengths(opened: Source, task: Task, method: SlimMethod) -> tuple[int, ...]:
    """Return the lengths of at most 1,000 training texts, evenly spaced, in tokens."""
    rows = task.train[:: max(1, -(-len(task.train) // 1000))]
    return encode(opened.tokenizer, rows, _max_tokens(method)).lengths


def _max_tokens(method: SlimMethod) -> int:
    return method.max_tokens if isinstance(method, TrainingSettings) else 128


def _smallest(
    opened: Source, task: Task, budget: Budget, method: SlimMethod, ask: Exiting, exits: Sequence[int] | None,
    widths: Mapping[str, int | None], folder: str | Path | None, ladder: Sequence[float],
    told: Callable[[Plan, Task], None] | None, keep_refused: bool,
) -> Slim:  # fmt: skip
    """Walk down the ladder to the last share that holds the drop.

    Each share is certified at delta over their number, so that all certificates hold together and the last one that
    was given may be chosen.
    """
    shares = sorted(set(ladder), reverse=True)
    if not shares:
        raise UserError("The ladder of shares is empty.")
    each = replace(ask, delta=ask.delta / len(shares))
    check(task, budget, each, keep_refused=keep_refused)
    best: Slim | None = None
    size, lengths = opened.size(task.labels), _lengths(opened, task, method)
    for share in shares:
        try:
            plan = planned(size, Budget(params=share), lengths, exits, each, method, widths)
        except UserError:
            if best is None:
                raise
            break
        if told is not None:
            told(plan, task)
        within = Budget(params=share, max_harm=budget.max_drop, cost=budget.cost)
        found = replace(_made(opened, task, within, plan, method, each, folder), budget=budget)
        _log.info("1/%.3g of the parameters: %s", 1 / share, "holds" if found.passed else "does not hold")
        if not found.passed:
            return found if best is None else _chosen(best, ask.delta)
        best = found
    assert best is not None
    return _chosen(best, ask.delta)


def _chosen(best: Slim, delta: float) -> Slim:
    """State the certificate at the confidence with which those of all shares hold together."""
    at = best.threshold
    if at is None or not isinstance(at.certificate, Certificate):
        return best
    return replace(best, threshold=replace(at, certificate=replace(at.certificate, confidence=1 - delta)))


def _made(
    opened: Source, task: Task, budget: Budget, plan: Plan, method: SlimMethod, ask: Exiting,
    folder: str | Path | None, deepen: Callable[[Table], Plan] | None = None,
) -> Slim:  # fmt: skip
    begun, harm = time.monotonic(), budget.max_harm
    fitted = fit_method(task, opened.model, opened.tokenizer, plan, method, folder, max_harm=harm, deepen=deepen)
    record = {
        "source": opened.name,
        "task": {
            "name": task.name,
            "labels": task.labels,
            "metric": task.metric,
            "pairs": task.train[0].pair is not None,
            "recipe": task.recipe,
        },
        "target_range": None if task.labels is not None else _range(task),
        "history": fitted.history,
        "seconds_training": round(time.monotonic() - begun, 1),
    }
    return calibrated(fitted, opened.tokenizer, task, budget, fitted.plan, method, ask, record)


def _rule(valid: Table, task: Task, ask: Exiting) -> Rule:
    return ask.rule_for(task, fit_temperatures(valid) if ask.temperatures and task.labels is not None else None)


def calibrated(
    fitted: Fitted, tokenizer: Any, task: Task, budget: Budget, plan: Plan, method: SlimMethod, ask: Exiting,
    record: Mapping[str, Any],
) -> Slim:  # fmt: skip
    """Choose the threshold of a trained network, prove it, and measure it on examples that chose nothing."""
    network, max_tokens = fitted.network, _max_tokens(method)
    tables = Tables(fitted, tokenizer, task, max_tokens)
    valid = tables.of("valid")
    rule = _rule(valid, task, ask)
    lambdas = grid(valid, rule)
    threshold = _threshold(tables, task, budget, rule, lambdas, ask)
    network.config.rule, network.config.every, network.config.min_block = rule.name, rule.every, rule.min_block
    network.config.temperatures = list(rule.temperatures) if rule.temperatures else None
    network.config.threshold = None if threshold is None else threshold.saved
    split = "test" if task.test else "calib" if task.calib else "valid"
    table, base = tables.of(split), tables.base(split)
    costs = tables.costs(split, rule)
    blocks = np.tile(np.arange(table.n_blocks), (table.n, 1))
    asked = 0.0 if threshold is None else threshold.saved
    at = point(table, rule, asked, costs, task.metric, base)
    return Slim(
        Classifier(network, tokenizer, max_tokens, task.train[0].pair is not None),
        replace(plan, params_ratio=tables.parameters / tables.base_parameters),
        budget,
        method,
        threshold,
        rule,
        base,
        at,
        curve(table, rule, lambdas, costs, task.metric, base),
        split,
        None if split != "test" or not task.calib else likeness(tables.of("calib"), table, rule),
        _shown(task, split, table, rule, asked),
        record,
        fitted,
        tuple(tables.costs(split, rule, USUAL_TOKENS).ratios(blocks)[0].tolist()),
    )


def _threshold(tables: Tables, task: Task, budget: Budget, rule: Rule, lambdas: Any, ask: Exiting) -> Threshold | None:
    if budget.flops is None and budget.max_harm is None:
        return None
    risk = None if budget.max_harm is None else risk_of(task, budget.max_harm, ask)
    calib = tables.of("calib")
    costs = tables.costs("calib", rule) if budget.cost == "flops" else tables.seconds("calib", rule)
    return choose(
        calib,
        rule,
        lambdas,
        budget=budget.flops,
        costs=costs,
        risk=risk,
        original=tables.original("calib").logits[-1],
        span=None if task.labels is not None else _range(task) / tables.fitted.network.config.target_scale,
    )


def _range(task: Task) -> float:
    """Return how far apart the training targets of a regression lie, in their own unit."""
    values = [float(e.label) for e in task.train]
    return max(values) - min(values)


def _shown(task: Task, split: str, table: Table, rule: Rule, threshold: float) -> dict[str, list[dict[str, Any]]]:
    """Pick texts that left early and late, with what was said and what was right."""
    where, rows = leaving(table, rule, [threshold])[:, 0], getattr(task, split)
    said = table.taken(where, table.answers())

    def shown(i: int) -> dict[str, Any]:
        name = (lambda c: float(c)) if task.labels is None else (lambda c: task.labels[int(c)])  # type: ignore[index]
        text = rows[i].text if rows[i].pair is None else f"{rows[i].text} | {rows[i].pair}"
        return {"text": text, "said": name(said[i]), "right": name(rows[i].label), "exit_block": int(where[i])}

    return {name: [shown(i) for i in chosen] for name, chosen in leavers(where, unsure(table, rule)).items()}
