"""Edit facts batch after batch into one model, with a guard: previous keys kept, stale facts taken out first.

Every finished batch is on the disk before the next one begins, so that a run that was killed goes on where it stopped.
What is measured on the way, and the collapse curve, stand in `retouch.edit.collapse`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .. import change as changes
from .. import store
from ..change import Change
from ..errors import BoundRefused, NoEffect, SolveError, UserError
from ..ledger import Ledger, Policy, save_ledger
from ..measure import environment, perplexity
from ..model import Model
from ..progress import report
from .base import EditMethod
from .collapse import Point, Watch, distinct, watch
from .facts import Fact

__all__ = ["Run", "Stopped", "check", "distinct", "plan_next", "run", "run_bench"]

Guard = Literal["stop", "record"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Run:
    """What became of a sequence.

    Attributes:
        ledger: The model with all batches that were kept, one change each.
        points: What was measured on the way, in order.
        n_edits: Facts that were given to batches that were kept.
        n_superseded: Facts among them that a later one of the same subject and relation has replaced.
        bound_at: Edits after which the bound would first be passed; None when it never was.
        ratio: Perplexity ratio there; None likewise.
        ended: Why no further batch could be planned; empty where the sequence ran to its end or to the bound.
    """

    ledger: Ledger
    points: tuple[Point, ...]
    n_edits: int
    n_superseded: int = 0
    bound_at: int | None = None
    ratio: float | None = None
    ended: str = ""

    def numbers(self) -> dict[str, float]:
        """Return what was measured last, for a bench; times are totals."""
        found: dict[str, float] = {"n_edits": self.n_edits, "n_superseded": self.n_superseded}
        if self.points:
            found |= {k: v for k, v in self.points[-1].to_dict().items() if v is not None}
        if self.bound_at is not None:
            found["bound_at_edits"] = self.bound_at
        if self.ended:
            found["ended_at_edits"] = self.n_edits
        return found


class Stopped(BoundRefused):
    """The next batch would have passed the bound; `run` holds what was kept."""

    def __init__(self, message: str, run: Run) -> None:
        super().__init__(message)
        self.run = run


def plan_next(
    ledger: Ledger,
    facts: Sequence[Fact],
    method: EditMethod,
    *,
    policy: Policy = "replace",
    unedited: Model | None = None,
) -> tuple[Ledger, Change]:
    """Plan facts on top of a ledger: stale facts go first, keys of earlier edits are kept.

    Args:
        ledger: The model and what it carries.
        facts: What is to become true; of two about the same the last counts.
        method: How.
        policy: ``"replace"`` takes out facts that the new ones supersede; ``"stack"`` leaves them in the weights.
        unedited: The model without changes, for statistics; by default made from the ledger.

    Returns:
        The ledger without the stale facts, and the change to apply to it. Facts that had to go with a stale one because
        they shared its value are planned again.
    """
    wanted = distinct(facts)
    records = [f.to_dict() for f in wanted]
    stale = ledger.conflicts(records) if policy == "replace" else {}
    ids = [e.change.id for e in ledger.entries if e.number in stale]
    if stale:
        ledger, again = ledger.supersede(records)
        wanted = [*wanted, *(Fact.from_dict(f) for f in again)]
    change = method.plan(ledger.model, wanted, previous=ledger.previous(), unedited=unedited or ledger.base)
    return ledger, replace(change, notes={**change.notes, "supersedes": ids}) if ids else change


def run(
    start: Model | Ledger,
    facts: Sequence[Fact],
    method: EditMethod,
    *,
    batch_size: int,
    max_perplexity_ratio: float = 1.1,
    out: str | Path | None = None,
    every: int | None = None,
    policy: Policy = "replace",
    guard: Guard = "stop",
    journal: str | Path | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> Run:
    """Edit facts in batches, one after another, and stop before neutral perplexity passes a bound.

    Each batch is planned on the model that carries the earlier ones, with their keys to be kept by methods that do so,
    and becomes one change of the ledger. A run with ``out`` goes on where a killed one with the same arguments stopped.

    Args:
        start: A model, or one with the changes it carries already.
        facts: What is to become true, in order; a later fact about the same subject and relation replaces an earlier one.
        method: How.
        batch_size: Facts of one batch.
        max_perplexity_ratio: Most that the perplexity of neutral text may rise, as a ratio to the model at the start.
        out: Folder of the model that is written in the end, or when the guard stops.
        every: Edits between two measurements; by default a tenth of all.
        policy: What becomes of a superseded fact, see `plan_next`.
        guard: ``"stop"`` at the bound, or go on and ``"record"`` where it was passed.
        journal: Folder of the batches while it runs; by default beside ``out``. It stays when it is named here.
        dtype: Type of the stored weights; by default the file type the model came in.
        seed: Of the sample of neighbours that is watched.

    Raises:
        Stopped: The next batch would pass the bound; it was not kept. The model up to there is written and in the error.
        UserError: There are no facts, or a number is not allowed.
        FactError: The method cannot use one of the facts, for want of a subject.
    """
    facts = list(facts)
    ledger = start if isinstance(start, Ledger) else Ledger(start)
    check(facts, batch_size, max_perplexity_ratio, every)
    method.ready(ledger.model, facts)
    step = every or max(batch_size, len(facts) // 10)
    own = Path(journal) if journal else (_beside(Path(out)) if out else None)
    for place in (out, own):
        if place is not None:
            store.refuse_inside(place)
    key = store.key(
        start=ledger.model.fingerprint, lines=[c.id for c in ledger.active], facts=[f.to_dict() for f in facts],
        method=method.name, settings=method.decided_by(), batch=batch_size, ratio=float(max_perplexity_ratio), every=step,
        policy=policy, guard=guard, seed=seed,
    )  # fmt: skip
    runner = _Batches(ledger, facts, method, watch(ledger.model, facts, seed), Journal(own, key), policy)
    result = runner.run(batch_size, step, max_perplexity_ratio, guard)
    if out is not None:
        save_ledger(result.ledger, out, dtype=dtype, report={"sequence": [p.to_dict() for p in result.points]})
        if not journal:
            runner.journal.remove()
    if guard == "stop" and result.bound_at is not None:
        raise Stopped(_refusal(result, max_perplexity_ratio, len(facts), out), result)
    return result


def check(facts: Sequence[Fact], batch_size: int, ratio: float, every: int | None) -> None:
    """Refuse what no sequence can be made of, before a model is opened; the arguments are those of `run`.

    Raises:
        UserError: There are no facts, or a number is not allowed.
    """
    if not facts:
        raise UserError("There are no facts to edit.")
    if batch_size < 1 or (every is not None and every < 1):
        raise UserError(f"A batch and the distance of measurements need at least 1 fact; got {batch_size} and {every}.")
    if not 1 < ratio < math.inf:
        raise UserError(f"The bound is a ratio of perplexities above 1, e.g. 1.1; got {ratio:g}.")


def _beside(out: Path) -> Path:
    return out.with_name(out.name + ".sequence")


def _refusal(result: Run, bound: float, n: int, out: str | Path | None) -> str:
    where = f" The model with those is in {out}." if out is not None else ""
    return (
        f"After {result.bound_at} of {n} edits the perplexity of neutral text would be {result.ratio:.3f} times what it was "
        f"(allowed {bound:g}), so the last batch was not kept: {result.n_edits} edits stand.{where}"
    )


class _Batches:
    """A sequence on its way."""

    def __init__(
        self, ledger: Ledger, facts: Sequence[Fact], method: EditMethod, seen: Watch, journal: Journal, policy: Policy
    ) -> None:
        self.ledger, self.facts, self.method, self.policy = ledger, facts, method, policy
        self.watch, self.journal, self.unedited = seen, journal, ledger.base
        self.points: list[Point] = []
        self.bound: tuple[int, float] | None = None
        self.ended = ""

    def run(self, batch_size: int, step: int, limit: float, guard: Guard) -> Run:
        starts = range(0, len(self.facts), batch_size)
        kept = 0
        for batch, start in enumerate(starts):
            report(f"{self.method.name}: edits in sequence", start, len(self.facts))
            stop = min(start + batch_size, len(self.facts))
            line = self.journal.line(batch)
            try:
                after, change = self._again(line, start, stop) if line else self._next(start, stop)
            except (SolveError, NoEffect) as error:
                if guard == "stop":
                    raise
                self.ended = str(error)  # a model that has collapsed cannot be edited, nor can keys that are kept
                _log.warning("%s: the sequence ends after %d edits. %s", self.method.name, kept, error)
                break
            ratio = float(line["ratio"]) if line else self._ratio(after.model)
            if not ratio <= limit and self.bound is None:  # not a number is no pass
                self.bound = (stop, ratio)
                if guard == "stop":
                    break
            self.ledger, kept = after, stop
            point = Point(**line["point"]) if line and line["point"] else None
            if not line:
                last = stop == len(self.facts) or stop // step > start // step
                point = self.watch.point(after, self.facts[:stop], self.facts[start:stop], ratio) if last else None
                self.journal.add(batch, change, after.entries[-1].when if change else None, ratio, point)
            self.points += [point] if point else []
        if kept and (not self.points or self.points[-1].n_edits < kept):  # the guard came between two measurements
            first = starts[(kept - 1) // batch_size]
            now = self._ratio(self.ledger.model)
            self.points.append(self.watch.point(self.ledger, self.facts[:kept], self.facts[first:kept], now))
        report(f"{self.method.name}: edits in sequence", len(self.facts), len(self.facts))
        current = distinct(self.facts[:kept])
        at, ratio_there = self.bound or (None, None)
        return Run(self.ledger, tuple(self.points), kept, kept - len(current), at, ratio_there, self.ended)

    def _next(self, start: int, stop: int) -> tuple[Ledger, Change | None]:
        try:
            ledger, change = plan_next(
                self.ledger, self.facts[start:stop], self.method, policy=self.policy, unedited=self.unedited
            )
        except NoEffect:  # the model says all of it already, once what is stale is gone
            return self._fresh(start, stop), None
        return ledger.apply(change, policy="stack"), change

    def _again(self, line: Mapping[str, Any], start: int, stop: int) -> tuple[Ledger, Change | None]:
        ledger = self._fresh(start, stop)
        if line["change"] is None:
            return ledger, None
        change = self.journal.change(line)
        return ledger.apply(change, line["when"], policy="stack"), change

    def _fresh(self, start: int, stop: int) -> Ledger:
        if self.policy == "stack":
            return self.ledger
        return self.ledger.supersede([f.to_dict() for f in distinct(self.facts[start:stop])])[0]

    def _ratio(self, model: Model) -> float:
        neutral = self.watch.neutral
        return perplexity(model, neutral.text, neutral.n_tokens) / neutral.before


def run_bench(
    model: Model,
    facts: Sequence[Fact],
    methods: Mapping[str, EditMethod],
    batch_size: int,
    out: Path,
    *,
    data: str,
    seed: int = 0,
    guard: Guard = "record",
    max_perplexity_ratio: float = 1.1,
    every: int | None = None,
) -> dict[str, Any]:
    """Measure methods on one sequence and write the result; goes on where an interrupted run stopped.

    Args:
        model: The unedited model.
        facts: The facts, in order.
        methods: Methods by the name they have in the result.
        batch_size: Facts of one batch.
        out: The JSON file to write.
        data: Name of the facts' source, for the record.
        seed: Of the sample of neighbours.
        guard: ``"record"`` goes on past the bound and says where it would have stopped; ``"stop"`` stops there.
        max_perplexity_ratio: The bound.
        every: Edits between two measurements; by default a tenth of all.

    Returns:
        The JSON object: verb, model, data, n, seed, environment, methods (what was measured last), curves (all that
        was measured, by method), and ended (why a method stopped early, by method).
    """
    for method in methods.values():
        method.ready(model, facts)
    result: dict[str, Any] = {
        "verb": "edit", "model": model.source, "data": data, "n": len(facts), "seed": seed,
        "environment": {
            **environment(), "suite": "sequential", "batch": batch_size, "guard": guard, "bound": max_perplexity_ratio,
            "settings": {name: m.to_dict() for name, m in methods.items()},
        },
        "methods": {}, "curves": {}, "ended": {},
    }  # fmt: skip
    journals = []
    for name, method in methods.items():
        journals.append(out.with_name(f"{out.name}.{store.key(name=name)[:8]}.partial"))
        done = _benched(
            model, facts, method, batch_size=batch_size, max_perplexity_ratio=max_perplexity_ratio, every=every,
            guard=guard, journal=journals[-1], seed=seed,
        )  # fmt: skip
        result["methods"][name] = done.numbers()
        result["curves"][name] = [p.to_dict() for p in done.points]
        result["ended"] |= {name: done.ended} if done.ended else {}
    store.write_json_atomic(out, result)
    for folder in journals:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _benched(model: Model, facts: Sequence[Fact], method: EditMethod, **how: Any) -> Run:
    try:
        return run(model, facts, method, **how)
    except Stopped as stopped:
        return stopped.run


class Journal:
    """The finished batches of a run: a change folder and a line each, on the disk before the next batch begins.

    Args:
        folder: Where; None keeps nothing.
        key: Names the run: lines of another one are not read.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder, self.key = folder, key
        self._lines: dict[int, dict[str, Any]] = {}
        if folder is None or not (folder / "journal.jsonl").is_file():
            return
        for text in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # the torn line of a killed run, or the empty one that closed it
            if line.get("key") == key:
                self._lines[line["batch"]] = line

    def line(self, batch: int) -> dict[str, Any] | None:
        """Return what is known of a batch, if it was finished."""
        return self._lines.get(batch)

    def change(self, line: Mapping[str, Any]) -> Change:
        """Read the change of a finished batch."""
        assert self.folder is not None
        return changes.load(self.folder / line["change"])

    def add(self, batch: int, change: Change | None, when: str | None, ratio: float, point: Point | None) -> None:
        """Keep a finished batch."""
        if self.folder is None:
            return
        name = f"{batch:05d}-{change.id}" if change else None
        if change and name:
            changes.save(change, self.folder / name)
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"key": self.key, "batch": batch, "change": name, "when": when, "ratio": ratio}
        text = json.dumps({**line, "point": point.to_dict() if point else None})
        with (self.folder / "journal.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")  # the first line end closes a torn line, or this one would be lost with it
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Throw the journal away; the model is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
