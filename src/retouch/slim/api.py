"""Make a classifier slim in one call: read, plan, train, choose thresholds, measure, certify, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import registry
from ..errors import UserError
from .base import Budget, Plan, SlimMethod
from .data import Task, make_task
from .encoded import encode
from .network import save
from .opening import Source, named_labels, open_source
from .points import Point, curve, leavers, point
from .predict import Classifier
from .presets import TrainingSettings
from .readings import Tables
from .risk import Risk
from .rules import Rule
from .stages import Fitted
from .stages import fit as fit_method
from .table import Table, fit_temperatures, grid, unsure
from .thresholds import Likeness, Threshold, choose, likeness
from .widths import search

__all__ = ["LADDER", "Exiting", "Slim", "calibrated", "fit"]

_log = logging.getLogger(__name__)
LADDER = (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 12, 1 / 16)
"""Shares of the parameters that `max_drop` tries, from the largest down to the first that does not hold."""


@dataclass(frozen=True)
class Exiting:
    """How the threshold is chosen and proved.

    Args:
        rule: See `retouch.slim.rules.Rule`.
        every: Likewise.
        min_block: Likewise.
        temperatures: Whether each exit's probabilities are fitted to the validation set first.
        loss: What counts as harm; see `retouch.slim.risk.Risk`. On a regression always ``flip``.
        reference: What early answers are compared with.
        how: How the limit is certified.
        delta: Probability of a wrong certificate.
    """

    rule: str = ""
    every: int = 1
    min_block: int = 0
    temperatures: bool = True
    loss: Any = "gap"
    reference: Any = "original"
    how: Any = "ucb"
    delta: float = 0.1


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

    @property
    def passed(self) -> bool:
        """Whether what was asked of the threshold holds."""
        return self.threshold is None or self.threshold.reachable

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
            command: The command that made it, for the card.

        Raises:
            BoundRefused: What was asked does not hold.
        """
        if self.threshold is not None and not keep_refused:
            self.threshold.require()
        from .card import card

        save(
            self.classifier.network, self.classifier.tokenizer, folder, record=self.to_dict(), card=card(self, command)
        )


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
    **data: Any,
) -> Slim:
    """Make a classifier slim within a budget.

    Args:
        source: A fine-tuned classifier or a bare encoder: a folder, a hub id, a bundled name, or one that is open.
        train: A file, a folder, a data set's id, or rows; see `make_task`. A `Task` is taken as it is.
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
        **data: More arguments of `make_task`.

    Raises:
        UserError: Data, model and budget do not fit each other; the message says where.
        RetouchError: Training diverged.
    """
    opened = source if isinstance(source, Source) else open_source(source)
    task = train if isinstance(train, Task) else _task(opened, train, valid, calib, test, data)
    limits = budget if isinstance(budget, Budget) else Budget(**budget)
    made = method if isinstance(method, SlimMethod) else registry.make("slim", method, **(settings or {}))
    ask = exiting or Exiting()
    _check(task, limits, ask)
    if limits.max_drop is not None:
        return _smallest(opened, task, limits, made, ask, exits, folder, ladder, told)
    size, lengths = opened.size(task.labels), _lengths(opened, task, made)
    plan = search(size, limits, lengths, exits, **dict(widths or {}))
    if told is not None:
        told(plan, task)
    return _made(opened, task, limits, plan, made, ask, folder)


def _task(opened: Source, train: Any, valid: Any, calib: Any, test: Any, data: Mapping[str, Any]) -> Task:
    if opened.labels is None or data.get("labels"):
        return make_task(train, valid, calib, test, **data)
    found = make_task(train, valid, calib, test, **data)
    if found.labels is None:
        raise UserError(
            f"{opened.name} tells classes apart ({', '.join(opened.labels)}), and the data has numbers to predict."
        )
    return make_task(train, valid, calib, test, **data, labels=named_labels(opened.labels, found.labels))


def _check(task: Task, budget: Budget, ask: Exiting) -> None:
    """Name what would fail only after the training."""
    if task.labels is None and ask.rule not in ("", "patience", "delta"):
        raise UserError(
            f"rule must be 'patience' or 'delta' for a regression, whose exits give no probabilities; got {ask.rule!r}."
        )
    if task.labels is None and ask.loss != "gap" and ask.loss != "flip":
        raise UserError(f"loss must be 'flip' for a regression, which is neither right nor wrong; got {ask.loss!r}.")
    wanted = (budget.flops, budget.max_harm, budget.max_drop)
    if any(w is not None for w in wanted) and not task.calib:
        raise UserError(
            "A threshold is chosen on calibration rows, and there are none. Give some, or let them be drawn from train."
        )
    limit = budget.max_harm if budget.max_drop is None else budget.max_drop
    if limit is not None:
        _risk(task, limit, ask)


def _risk(task: Task, limit: float, ask: Exiting) -> Risk:
    return Risk(limit, "flip" if task.labels is None else ask.loss, ask.reference, ask.how, delta=ask.delta)


def _lengths(opened: Source, task: Task, method: SlimMethod) -> tuple[int, ...]:
    """Return the lengths of at most 1,000 training texts, evenly spaced, in tokens."""
    rows = task.train[:: max(1, len(task.train) // 1000)][:1000]
    return encode(opened.tokenizer, rows, _max_tokens(method)).lengths


def _max_tokens(method: SlimMethod) -> int:
    return method.max_tokens if isinstance(method, TrainingSettings) else 128


def _smallest(
    opened: Source, task: Task, budget: Budget, method: SlimMethod, ask: Exiting, exits: Sequence[int] | None,
    folder: str | Path | None, ladder: Sequence[float], told: Callable[[Plan, Task], None] | None,
) -> Slim:  # fmt: skip
    """Walk down the ladder to the last share that holds the drop.

    From the largest share down and never past a failure, so that the certificates hold together.
    """
    best: Slim | None = None
    size, lengths = opened.size(task.labels), _lengths(opened, task, method)
    for share in sorted(ladder, reverse=True):
        try:
            plan = search(size, Budget(params=share), lengths, exits)
        except UserError:
            if best is None:
                raise
            break
        if told is not None:
            told(plan, task)
        within = Budget(params=share, max_harm=budget.max_drop, cost=budget.cost)
        found = _made(opened, task, within, plan, method, ask, folder)
        _log.info("1/%.3g of the parameters: %s", 1 / share, "holds" if found.passed else "does not hold")
        if not found.passed:
            return best or replace(found, budget=budget)
        best = replace(found, budget=budget)
    if best is None:
        raise UserError("The ladder of shares is empty.")
    return best


def _made(
    opened: Source, task: Task, budget: Budget, plan: Plan, method: SlimMethod, ask: Exiting, folder: str | Path | None
) -> Slim:
    begun = time.monotonic()
    fitted = fit_method(task, opened.model, opened.tokenizer, plan, method, folder, max_harm=budget.max_harm)
    record = {
        "source": opened.name,
        "task": {"name": task.name, "labels": task.labels, "metric": task.metric, "recipe": task.recipe},
        "target_range": None if task.labels is not None else _range(task),
        "history": fitted.history,
        "seconds_training": round(time.monotonic() - begun, 1),
    }
    return calibrated(fitted, opened.tokenizer, task, budget, plan, method, ask, record)


def calibrated(
    fitted: Fitted, tokenizer: Any, task: Task, budget: Budget, plan: Plan, method: SlimMethod, ask: Exiting,
    record: Mapping[str, Any],
) -> Slim:  # fmt: skip
    """Choose the threshold of a trained network, prove it, and measure it on examples that chose nothing."""
    network, max_tokens = fitted.network, _max_tokens(method)
    tables = Tables(fitted, tokenizer, task, max_tokens)
    valid = tables.of("valid")
    rule = _rule(task, ask, valid)
    lambdas = grid(valid, rule)
    threshold = _threshold(tables, task, budget, rule, lambdas, ask, plan)
    network.config.rule, network.config.every, network.config.min_block = rule.name, rule.every, rule.min_block
    network.config.temperatures = list(rule.temperatures) if rule.temperatures else None
    network.config.threshold = None if threshold is None else threshold.saved
    split = "test" if task.test else "calib" if task.calib else "valid"
    table, base = tables.of(split), tables.base(split)
    costs = tables.costs(split, rule)
    asked = 0.0 if threshold is None else threshold.saved
    at = point(table, rule, asked, costs, task.metric, base)
    return Slim(
        Classifier(network, tokenizer, max_tokens),
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
    )


def _rule(task: Task, ask: Exiting, valid: Table) -> Rule:
    name = ask.rule or ("delta" if task.labels is None else "entropy")
    fitted = fit_temperatures(valid) if ask.temperatures and task.labels is not None else None
    return Rule(name, fitted, ask.every, ask.min_block)


def _threshold(
    tables: Tables, task: Task, budget: Budget, rule: Rule, lambdas: Any, ask: Exiting, plan: Plan
) -> Threshold | None:
    if budget.flops is None and budget.max_harm is None:
        return None
    risk = None if budget.max_harm is None else _risk(task, budget.max_harm, ask)
    calib = tables.of("calib")
    costs = tables.costs("calib", rule) if budget.cost == "flops" else tables.seconds("calib")
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
    from .table import leaving

    where, rows = leaving(table, rule, [threshold])[:, 0], getattr(task, split)
    said = table.taken(where, table.answers())

    def shown(i: int) -> dict[str, Any]:
        name = (lambda c: float(c)) if task.labels is None else (lambda c: task.labels[int(c)])  # type: ignore[index]
        text = rows[i].text if rows[i].pair is None else f"{rows[i].text} | {rows[i].pair}"
        return {"text": text, "said": name(said[i]), "right": name(rows[i].label), "exit_block": int(where[i])}

    return {name: [shown(i) for i in chosen] for name, chosen in leavers(where, unsure(table, rule)).items()}
