"""The work of a bench: which records are planned and measured together, and the numbers of each.

What the unedited model says is asked once for all methods; many edited models are measured side by side in one pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..change import Change, LowRank, apply, check_base
from ..errors import BoundRefused, NoEffect, SolveError, UserError
from ..measure import Cost, watched
from ..model import Model
from ..progress import report
from .base import EditMethod
from .evaluate import Exam, Neutral, examine, generate, grade_all, look_again, neutral_of
from .facts import Fact
from .neighbors import stopped

if TYPE_CHECKING:
    from .bench import Bench

__all__ = ["Plan", "Work"]

_log = logging.getLogger(__name__)
Planned = Change | SolveError | BoundRefused | None
"""A change; None where the model says everything already; or why the method cannot write these facts together."""

CHUNK = {"cpu": 16}
"""Records measured together by device; what an interrupted bench repeats at most."""
OTHER_CHUNK = 128
KEPT = 2**28
"""Numbers of the distributions before the edits that are kept on the CPU, 1 GiB; eight times as many elsewhere."""


@dataclass(frozen=True)
class Plan:
    """Which records are one group, which groups go into one model, and which models are measured together.

    Attributes:
        facts: All records, group by group.
        groups: The numbers of each group's records.
        grouped: Whether a group's facts are counted together: where one has several, or instructions are asked.
        chunks: Models that are planned and measured together; each model as the numbers of its records.
        size: Records measured together at most.
    """

    facts: tuple[Fact, ...]
    groups: tuple[range, ...]
    grouped: bool
    chunks: tuple[tuple[range, ...], ...]
    size: int

    @classmethod
    def of(cls, model: Model, groups: Sequence[Fact] | Sequence[Sequence[Fact]], bench: Bench) -> Plan:
        grouped = bench.instructions or any(not isinstance(g, Fact) and len(g) > 1 for g in groups)
        lists = [[g] if isinstance(g, Fact) else list(g) for g in groups]
        facts = tuple(f for g in lists for f in g)
        if not facts or not all(lists):
            raise UserError("There are no facts to measure on.")
        ends = [sum(map(len, lists[: i + 1])) for i in range(len(lists))]
        ranges = tuple(range(end - len(g), end) for g, end in zip(lists, ends))
        b = bench.batch_size
        models = [range(ranges[i].start, ranges[min(i + b, len(ranges)) - 1].stop) for i in range(0, len(ranges), b)]
        size = bench.chunk or CHUNK.get(model.device.type, OTHER_CHUNK)
        return cls(facts, ranges, grouped, tuple(_packed(models, size)), size)

    @property
    def subjects(self) -> list[str]:
        return [f.subject or f.filled for f in self.facts]


def _packed(models: Sequence[range], size: int) -> Iterator[tuple[range, ...]]:
    """Put as many models together as have `size` records, and at least one."""
    chunk: list[range] = []
    for one in models:
        if chunk and one.stop - chunk[0].start > size:
            yield tuple(chunk)
            chunk = []
        chunk.append(one)
    yield tuple(chunk)


class Work:
    """Plans and measures; what the unedited model says is asked once for all methods."""

    def __init__(self, model: Model, plan: Plan, bench: Bench) -> None:
        self.model, self.plan, self.bench = model, plan, bench
        self.neutral: Neutral | None = None
        self.exams: dict[int, Exam] = {}
        self.sizes: dict[str, float] = {}

    def records(
        self, name: str, method: EditMethod, done: Mapping[int, Mapping[str, float]]
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield the records that are not done yet; a chunk is planned and measured as a whole."""
        report(f"{name}: records", len(done), len(self.plan.facts))
        for chunk in self.plan.chunks:
            numbers = range(chunk[0].start, chunk[-1].stop)
            if all(i in done for i in numbers):
                continue
            for i, row in zip(numbers, self._measured(method, chunk)):
                report(f"{name}: records", i + 1, len(self.plan.facts))
                if i not in done:
                    yield i, row

    def _measured(self, method: EditMethod, chunk: Sequence[range]) -> list[dict[str, float]]:
        facts = [[self.plan.facts[i] for i in one] for one in chunk]
        with watched(self.model.device) as cost:
            planned = _planned(method.blind(), self.model, facts, alone=self.bench.batch_size == 1)
        changes = [one if isinstance(one, Change) else None for one in planned]
        rows = self._graded(chunk, changes)
        for row, (change, place) in zip(rows, ((c, k) for c, own in zip(changes, facts) for k in range(len(own)))):
            row |= _cost(cost, sum(map(len, facts)))
            row |= _written_size(self.model, change, self.sizes) | _notes(change, place) if change else {}
        for row, one in zip(rows, (one for one, own in zip(planned, facts) for _ in own)):
            row |= {"refused": 1.0} if isinstance(one, SolveError | BoundRefused) else {}
        if self.plan.grouped:
            self._by_group(rows, chunk[0].start)
        return rows

    def _graded(self, chunk: Sequence[range], changes: Sequence[Change | None]) -> list[dict[str, float]]:
        """Measure one model alone, several side by side."""
        numbers = range(chunk[0].start, chunk[-1].stop)
        model, each = self.model, None
        if len(chunk) == 1:
            model = apply(model, changes[0]) if changes[0] else model
        elif any(changes):
            idle = Change("none", self.model.base_fingerprint, {})
            each = [change or idle for change, one in zip(changes, chunk) for _ in one]
        rows = []
        for start in range(0, len(numbers), self.plan.size):
            part = numbers[start : start + self.plan.size]
            rows += self._part(model, part, each and each[start : start + self.plan.size])
        return rows

    def _part(self, model: Model, numbers: range, changes: Sequence[Change] | None) -> list[dict[str, float]]:
        exams, bench = self._before(numbers), self.bench
        texts = generate(
            model,
            [e.fact for e in exams],
            changes,
            n_generations=bench.n_generations,
            instructions=bench.instructions,
            seed=bench.seed,
            batch_size=len(exams),
        )
        return grade_all(model, exams, changes, generated=texts, neutral=self.neutral)

    def _before(self, numbers: range) -> list[Exam]:
        """Ask the unedited model once; distributions that take too much memory are asked for again."""
        self.neutral = self.neutral or neutral_of(self.model)
        if not all(i in self.exams for i in numbers):
            facts = [self.plan.facts[i] for i in numbers]
            n = self.bench.n_generations
            exams = examine(self.model, facts, n_generations=n, seed=self.bench.seed, batch_size=len(facts))
        else:
            exams = [self.exams[i] for i in numbers]
            if any(len(e.logp) < len(e.gold) + len(e.fact.neighbors) for e in exams):
                return look_again(self.model, exams)
        limit = KEPT if self.model.device.type == "cpu" else 8 * KEPT
        held = sum(e.logp.numel() for i, e in self.exams.items() if i not in numbers)
        fits = held + sum(e.logp.numel() for e in exams) <= limit
        self.exams |= {i: e if fits else e.forgotten() for i, e in zip(numbers, exams)}
        return exams

    def _by_group(self, rows: Sequence[dict[str, float]], first: int) -> None:
        """Write what a whole group achieved into its first record."""
        for group in self.plan.groups:
            own = [rows[i - first] for i in group if 0 <= i - first < len(rows)]
            if own:
                own[0]["all_facts"] = float(all(r["edit_form"] for r in own))
                if self.bench.instructions:
                    own[0]["all_facts_instruction"] = float(all(r["instruction"] > 0.5 for r in own))


def _planned(method: EditMethod, model: Model, models: Sequence[Sequence[Fact]], *, alone: bool) -> list[Planned]:
    """Plan a change for each model."""
    if alone:
        try:
            return [_limited(change) for change in method.plan_each(model, models)]
        except (NoEffect, SolveError):
            pass  # one of them has nothing to do, or cannot be written: find out which
    return [_one(method, model, facts) for facts in models]


def _one(method: EditMethod, model: Model, facts: Sequence[Fact]) -> Planned:
    try:
        return _limited(method.plan(model, facts))
    except NoEffect:
        return None
    except SolveError as error:
        _log.warning("%s refuses facts, which are measured unedited: %s", method.name, error)
        return error


def _limited(change: Change) -> Change | BoundRefused:
    """Refuse a change in which the search's limit (``max_drift``) left no fact a value."""
    if not change.facts or len(stopped(change)) < len(change.facts):
        return change
    return BoundRefused(
        f"{change.method}: no step of the search kept the drift of neighbouring prompts within max_drift."
    )


def _cost(cost: Cost, n_facts: int) -> dict[str, float]:
    on_device = {"device_peak_mib": cost.device_mib} if cost.device_mib else {}
    return {"seconds_per_fact": cost.seconds / n_facts, "peak_mib": cost.peak_mib, **on_device}


def _written_size(model: Model, change: Change, weights: dict[str, float]) -> dict[str, float]:
    """Measure what a change writes; `weights` keeps the norms of the weights themselves.

    Raises:
        NoEffect: A part is not finite.
        WrongBase: The change does not fit the model.
    """
    check_base(model, change)
    found = []
    for name, part in change.parts.items():
        if name not in weights:
            weights[name] = float(_weight(model, name).norm())
        frobenius, spectral = part.norms() if isinstance(part, LowRank) else _dense_norms(part.difference, model.device)
        if not math.isfinite(frobenius):
            raise NoEffect(
                f"The change of {name} is not finite. Plan it with a lower learning rate or a smaller clamp."
            )
        found.append((frobenius, spectral, frobenius / weights[name], part.rank))
    return {
        "frobenius_norm": sum(f**2 for f, *_ in found) ** 0.5,
        "spectral_norm": max(s for _, s, *_ in found),
        "share_of_weight": max(share for *_, share, _ in found),
        "rank_of_change": float(max(rank for *_, rank in found)),
    }


def _weight(model: Model, name: str) -> torch.Tensor:
    bias = name.removesuffix(":bias")
    return model.matrix(name) if bias == name else model.module(bias).get_parameter("bias").detach()


def _dense_norms(difference: torch.Tensor, device: torch.device) -> tuple[float, float]:
    """Frobenius and spectral norm; the latter from the smaller Gram matrix, not from all singular values."""
    matrix = difference.to(device, torch.float32)
    if not torch.isfinite(norm := matrix.norm()) or not norm > 0:
        return float(norm), float(norm)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    largest = norm.double().cpu() ** 2 * torch.linalg.eigvalsh(((matrix / norm) @ (matrix / norm).T).double().cpu())[-1]
    return float(norm), float(largest.clamp(min=0).sqrt())


def _notes(change: Change, place: int) -> dict[str, float]:
    """Return what a method tells of one of its facts: the search's margin, and the share of the value that arrives."""
    told = change.notes.get("facts")
    if not isinstance(told, list | tuple) or len(told) != len(change.facts):
        return {}
    own: Mapping[str, Any] = told[place]
    found = {}
    if isinstance(margin := own.get("margin"), float | int) and math.isfinite(margin):
        found["margin_nats"] = float(margin)
    delivered = own.get("delivered")
    shares = delivered if isinstance(delivered, list | tuple) else [] if delivered is None else [delivered]
    if shares:
        found["delivered"] = sum(map(float, shares)) / len(shares)
    return found
