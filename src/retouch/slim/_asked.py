"""What is asked for, held against data and model before any training: what would fail hours later is named now."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BoundRefused, SettingsError, UserError
from ._quality import quality
from .base import Budget, Plan, Size, SlimMethod
from .data import Task, make_task
from .opening import Source, named_labels
from .published import published
from .risk import Risk, too_few
from .rules import Rule, due
from .table import Table, grid, leaving
from .widths import plan_of, search

__all__ = ["Exiting", "check", "needed_depth", "planned", "risk_of", "task_of"]

_log = logging.getLogger(__name__)


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

    def rule_for(self, task: Task, temperatures: tuple[float, ...] | None = None) -> Rule:
        """Return the rule, by default the usual one for a task.

        Raises:
            SettingsError: A field has a value that it does not allow.
        """
        name = self.rule or ("delta" if task.labels is None else "entropy")
        return Rule(name, temperatures, self.every, self.min_block)


# ---------------------------------------------------------------- data and model


def task_of(opened: Source, train: Any, valid: Any, calib: Any, test: Any, data: Mapping[str, Any]) -> Task:
    """Return the task with its classes in the model's order; see `retouch.slim.api.fit` for what may be given.

    Raises:
        UserError: The rows cannot be used, or do not fit the model.
    """
    if isinstance(train, Task):
        more = {"valid": valid, "calib": calib, "test": test, **data}
        if given := [name for name, value in more.items() if value is not None]:
            raise UserError(
                f"{', '.join(given)} cannot be given beside a Task, which has its rows. Give it to make_task."
            )
        return _in_order(opened, train)
    found = make_task(train, valid, calib, test, **data)
    if opened.labels is not None and found.labels is not None and not data.get("labels"):
        names = named_labels(opened.labels, found.labels)
        found = make_task(train, valid, calib, test, **dict(data) | {"labels": names})
    return _in_order(opened, found)


def _in_order(opened: Source, task: Task) -> Task:
    """Refuse a task whose classes a classifier would take for others."""
    if opened.labels is None:
        return task
    if task.labels is None:
        raise UserError(
            f"{opened.name} tells classes apart ({', '.join(opened.labels)}), and the data has numbers to predict."
        )
    order = tuple(named_labels(opened.labels, task.labels))
    if order != tuple(task.labels):
        raise UserError(
            f"{opened.name} has its classes in the order {', '.join(order)}, the task in the order "
            f"{', '.join(task.labels)}. Make the task with labels={list(order)}."
        )
    return task


# ---------------------------------------------------------------- budget and exits


def check(task: Task, budget: Budget, ask: Exiting, *, keep_refused: bool = True) -> None:
    """Name what would fail only after the training.

    Args:
        task: With all its rows.
        budget: What is asked for.
        ask: How the threshold is chosen.
        keep_refused: Go on where the calibration rows are too few to show the limit.

    Raises:
        UserError: Something does not fit; the message says what.
        BoundRefused: No outcome can show the limit, and nothing that is refused is to be kept.
    """
    if task.labels is None and ask.rule not in ("", "patience", "delta"):
        raise UserError(
            f"rule must be 'patience' or 'delta' for a regression, whose exits give no probabilities; got {ask.rule!r}."
        )
    if task.labels is None and ask.loss != "gap" and ask.loss != "flip":
        raise UserError(f"loss must be 'flip' for a regression, which is neither right nor wrong; got {ask.loss!r}.")
    ask.rule_for(task).check((0,), _classes(task))
    wanted = (budget.flops, budget.max_harm, budget.max_drop)
    if any(w is not None for w in wanted) and not task.calib:
        raise UserError(
            "A threshold is chosen on calibration rows, and there are none. Give some, or let them be drawn from train."
        )
    if budget.max_drop is not None:
        _check_drop(ask)
    limit = budget.max_harm if budget.max_drop is None else budget.max_drop
    if limit is not None:
        _check_enough(task, risk_of(task, limit, ask), keep_refused)


def _check_drop(ask: Exiting) -> None:
    if ask.how == "crc":
        raise SettingsError(
            "how must be 'ucb' or 'ltt' with max_drop: a bound in expectation does not survive the choice among sizes."
        )
    if ask.reference != "original":
        raise SettingsError(
            f"reference must be 'original' with max_drop, which looks for the smallest model that loses little against "
            f"it; got {ask.reference!r}, against which no size loses anything."
        )


def _check_enough(task: Task, risk: Risk, keep_refused: bool) -> None:
    least = None if risk.reference == "full_depth" else too_few(len(task.calib), risk, _classes(task))
    if least is None:
        return
    why = f"{len(task.calib)} examples cannot show a limit of {risk.limit:g} even without any loss: {least} are needed."
    if not keep_refused:
        raise BoundRefused(f"{why} Nothing was trained. Give more calibration rows, or allow more.")
    _log.warning("%s", why)


def risk_of(task: Task, limit: float, ask: Exiting) -> Risk:
    """Return the risk that a limit means."""
    return Risk(limit, "flip" if task.labels is None else ask.loss, ask.reference, ask.how, delta=ask.delta)


def _classes(task: Task) -> int:
    return 1 if task.labels is None else len(task.labels)


def planned(
    size: Size, budget: Budget, lengths: Sequence[int], exits: Sequence[int] | None, ask: Exiting, method: SlimMethod,
    widths: Mapping[str, int | None], depth: float = 0.0,
) -> Plan:  # fmt: skip
    """Return the plan of a budget: searched, or with the preset ``paper`` the published widths that it names.

    Where `depth` is given, examples may run so many blocks on average if the budget can reach it.

    Raises:
        UserError: Nothing fits; the message names the nearest that can be reached.
    """
    found = size.exits(exits)
    asked = due(found, ask.every, ask.min_block)
    fixed = {name: value for name, value in widths.items() if value is not None}
    known = published(size, budget, found) if method.preset == "paper" and not fixed else None
    if known is not None:
        return plan_of(size, known, lengths, budget.flops, asked)
    return search(size, budget, lengths, found, asked=asked, depth=depth, **fixed)


def needed_depth(table: Table, rule: Rule, metric: str, kept: float = 0.99) -> float:
    """Return how many blocks texts must run on average, at least, for a network's exits to keep its quality.

    Args:
        table: What its exits say, with labels.
        rule: Which exits are asked, and how.
        metric: The task's.
        kept: Share of the best quality of all thresholds that is to be kept.
    """
    assert table.labels is not None
    where = leaving(table, rule, grid(table, rule))
    answered = table.taken(where, table.answers())
    classes = table.classes if table.classes > 1 else None
    found = np.array([quality(metric, column, table.labels, classes) for column in answered.T])
    if found.max() <= 0:
        return float(table.n_blocks)
    return float((where.mean(axis=0) + 1)[found >= kept * found.max()].min())
