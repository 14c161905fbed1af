"""What composed prompts say of a model, and how sure that is: bundles are drawn again, the same for both systems."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from ..errors import UserError, unknown
from .compose import Answers, Instance

__all__ = [
    "Interval",
    "Measures",
    "Statistic",
    "assemble",
    "chance",
    "contrast",
    "interval",
    "measure",
    "no_signal",
    "paired",
    "require_signal",
]

Statistic = Literal["all_correct", "part_correct", "macro", "format_failure"]
Floats = NDArray[np.float64]
DRAWS = 10_000
_POWER = 1.959964 + 0.841621
"""Standard errors that an effect needs to be seen in four of five runs, at a level of 5 % on two sides."""


@dataclass(frozen=True)
class Measures:
    """What a model's answers amount to; shares are from 0 to 1.

    Attributes:
        all_correct: Instances of which every part is right.
        part_correct: Parts that are right.
        by_domain: Of each domain's parts.
        macro: Mean over domains.
        by_position: Of the parts at each place.
        worst_domain: The lowest of the domains.
        coupling: How much more often all parts are right together than if they were right by chance.
        format_failure: Instances whose text was not in the format.
        chance_all: `all_correct` of who guesses.
        chance_part: `part_correct` of who guesses.
        n_instances: Instances.
        n_bundles: Groups that share no question.
        composition_cost: What the same questions lose by standing together; None if they were not asked alone.
        retention: Of each domain: its share here by that of its own adapter; None if that was not asked.
    """

    all_correct: float
    part_correct: float
    by_domain: Mapping[str, float]
    macro: float
    by_position: tuple[float, ...]
    worst_domain: float
    coupling: float
    format_failure: float
    chance_all: float
    chance_part: float
    n_instances: int
    n_bundles: int
    composition_cost: float | None = None
    retention: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Interval:
    """A number and where it would lie had other questions been drawn.

    Attributes:
        value: The number.
        low: Lower end.
        high: Upper end.
        standard_error: Of the number.
        smallest: The smallest effect that such a run sees in four of five cases.
        n_bundles: Groups that were drawn again.
    """

    value: float
    low: float
    high: float
    standard_error: float
    smallest: float
    n_bundles: int

    def holds(self, number: float) -> bool:
        """Tell whether a number lies inside."""
        return self.low <= number <= self.high


def chance(instances: Sequence[Instance]) -> tuple[float, float]:
    """Return the shares of instances and of parts that who guesses gets right."""
    each = [[1 / len(q.options) for q in i.parts] for i in instances]
    return _mean([math.prod(parts) for parts in each]), _mean([p for parts in each for p in parts])


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def measure(answers: Answers, *, alone: Answers | None = None, own: Mapping[str, Answers] | None = None) -> Measures:
    """Measure answers.

    Args:
        answers: A model's answers.
        alone: The same model's answers to the same questions, each asked alone (`compose.singles`).
        own: For a domain the answers that its own adapter gives to the same instances.

    Raises:
        UserError: Nothing was asked, or `alone` lacks a question.
    """
    if not answers.instances:
        raise UserError("Nothing was asked, so there is nothing to measure.")
    right = _right(answers)
    domains = list(dict.fromkeys(q.domain for i in answers.instances for q in i.parts))
    by_domain = {d: _of_domain(answers, right, d) for d in domains}
    n_places = max(map(len, right))
    part = _mean([float(r) for row in right for r in row])
    every = _mean([float(all(row)) for row in right])
    alone_part = None if alone is None else _asked_alone(answers, alone)
    retention = None if own is None else _retained(by_domain, own)
    together = _mean([math.prod(by_domain[q.domain] for q in i.parts) for i in answers.instances])
    chance_all, chance_part = chance(answers.instances)
    return Measures(
        all_correct=every,
        part_correct=part,
        by_domain=by_domain,
        macro=_mean(list(by_domain.values())),
        by_position=tuple(_mean([float(row[p]) for row in right if p < len(row)]) for p in range(n_places)),
        worst_domain=min(by_domain.values()),
        coupling=every - together,
        format_failure=_mean([float(-1 in row) for row in answers.chosen]),
        chance_all=chance_all,
        chance_part=chance_part,
        n_instances=len(answers.instances),
        n_bundles=len({i.bundle for i in answers.instances}),
        composition_cost=None if alone_part is None else alone_part - part,
        retention=retention,
    )


def _right(answers: Answers) -> list[list[bool]]:
    return [[c == q.answer for c, q in zip(row, i.parts)] for row, i in zip(answers.chosen, answers.instances)]


def _of_domain(answers: Answers, right: Sequence[Sequence[bool]], domain: str) -> float:
    pairs = ((r, q) for row, i in zip(right, answers.instances) for r, q in zip(row, i.parts))
    return _mean([float(r) for r, q in pairs if q.domain == domain])


def _retained(by_domain: Mapping[str, float], own: Mapping[str, Answers]) -> dict[str, float]:
    each = {d: _of_domain(a, _right(a), d) for d, a in own.items() if d in by_domain}
    return {d: _ratio(by_domain[d], share) for d, share in each.items()}


def _ratio(one: float, other: float) -> float:
    return one / other if other else math.nan


def _asked_alone(answers: Answers, alone: Answers) -> float:
    """Return the share of right answers of the same parts, as often as they are asked together."""
    known = {(i.parts[0].domain, i.parts[0].key): row[0] for i, row in zip(alone.instances, _right(alone))}
    parts = [(q.domain, q.key) for i in answers.instances for q in i.parts]
    if missing := [part for part in parts if part not in known]:
        raise UserError(
            f"{len(missing)} questions of {missing[0][0]} were not asked alone. Ask compose.singles(instances)."
        )
    return _mean([float(known[part]) for part in parts])


def assemble(instances: Sequence[Instance], alone: Mapping[str, Answers]) -> Answers:
    """Put answers to single questions together as if they had been asked in one prompt.

    With each domain's questions answered by its own adapter this is the oracle: what there is without fusion.

    Args:
        instances: The prompts.
        alone: For each domain answers to its questions, each asked alone.

    Raises:
        UserError: A question was not asked.
    """
    known = {(d, i.parts[0].key): c[0] for d, a in alone.items() for i, c in zip(a.instances, a.chosen)}
    try:
        chosen = tuple(tuple(known[q.domain, q.key] for q in i.parts) for i in instances)
    except KeyError as error:
        raise UserError(
            f"A question of {error.args[0][0]} was not asked alone. Ask compose.singles(instances)."
        ) from error
    return Answers(tuple(instances), chosen, "assembled")


# How sure


def contrast(
    terms: Sequence[tuple[float, Answers]], statistic: Statistic = "all_correct", *,
    level: float = 0.95, draws: int = DRAWS, seed: int = 0,
) -> Interval:  # fmt: skip
    """Bound a weighted sum of systems' numbers by drawing bundles again, the same ones for all systems.

    Source: paired cluster bootstrap, percentile intervals with the tails of Hesterberg 2015 for few clusters.

    So ``[(1, fused), (-1, base)]`` is a difference, and with answers to single questions in it the cost that is
    fusion's own: ``[(1, fused_alone), (-1, fused), (-1, base_alone), (1, base)]``.

    Args:
        terms: Weights and answers; all of the same bundles.
        statistic: The number of each system.
        level: How often the interval is to hold the truth.
        draws: How often bundles are drawn.
        seed: Of the draws.

    Raises:
        UserError: The answers are of different bundles, or of fewer than two.
    """
    numbers = sorted({i.bundle for _, a in terms for i in a.instances})
    if len(numbers) < 2:
        raise UserError(f"An interval needs two bundles of questions or more; there are {len(numbers)}.")
    if any({i.bundle for i in a.instances} != set(numbers) for _, a in terms):
        raise UserError("The systems were asked different bundles, so they cannot be compared pair by pair.")
    place = {bundle: row for row, bundle in enumerate(numbers)}
    tables = [(weight, _table(a, place, statistic)) for weight, a in terms]
    value = sum(w * float(_statistic(t.sum(0)[None])[0]) for w, t in tables)
    drawn = np.zeros(draws)
    for start, counts in _drawn(len(numbers), draws, seed):
        for weight, table in tables:
            drawn[start : start + len(counts)] += weight * _statistic(np.tensordot(counts, table, axes=1))
    return _bounded(value, drawn[np.isfinite(drawn)], level, len(numbers))


def _bounded(value: float, drawn: Floats, level: float, n_bundles: int) -> Interval:
    # Drawn again, few bundles vary too little; tails as much smaller as Student's are wider make up for it.
    reach = math.sqrt(n_bundles / (n_bundles - 1)) * special.stdtrit(n_bundles - 1, (1 + level) / 2)
    tail = special.ndtr(-reach)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    error = float(drawn.std(ddof=1))
    return Interval(value, float(low), float(high), error, _POWER * error, n_bundles)


def paired(one: Answers, other: Answers, statistic: Statistic = "all_correct", **how: Any) -> Interval:
    """Bound how much better one system is than another on the same bundles; see `contrast`."""
    return contrast([(1.0, one), (-1.0, other)], statistic, **how)


def interval(answers: Answers, statistic: Statistic = "all_correct", **how: Any) -> Interval:
    """Bound one system's number; see `contrast`."""
    return contrast([(1.0, answers)], statistic, **how)


def _table(answers: Answers, place: Mapping[int, int], statistic: str) -> Floats:
    """Sum up by bundle what is counted and out of how many; the statistic is the mean of the ratios.

    Shapes:
        (bundles, ratios, 2).
    """
    if statistic not in ("all_correct", "part_correct", "macro", "format_failure"):
        raise unknown("statistic", statistic, ("all_correct", "part_correct", "macro", "format_failure"))
    domains = sorted({q.domain for i in answers.instances for q in i.parts}) if statistic == "macro" else [""]
    column = {d: c for c, d in enumerate(domains)}
    found = np.zeros((len(place), len(domains), 2))
    for instance, chosen in zip(answers.instances, answers.chosen):
        row = found[place[instance.bundle]]
        right = [c == q.answer for c, q in zip(chosen, instance.parts)]
        if statistic == "all_correct":
            row[0] += (all(right), 1)
        elif statistic == "format_failure":
            row[0] += (-1 in chosen, 1)
        else:
            for q, r in zip(instance.parts, right):
                row[column[q.domain] if statistic == "macro" else 0] += (r, 1)
    return found


def _statistic(sums: Floats) -> Floats:
    """Return the mean of ratios; a draw that holds nothing of a domain says nothing.

    Shapes:
        sums: (draws, ratios, 2) -> (draws,).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = sums[..., 0] / sums[..., 1]
    found: Floats = ratios.mean(-1)
    return found


@functools.lru_cache(maxsize=2)
def _counts(n: int, draws: int, seed: int) -> NDArray[np.uint8]:
    """Draw `n` bundles with replacement, and count how often each came.

    Shapes:
        (draws, bundles).
    """
    random = np.random.default_rng([seed, n])
    found = np.empty((draws, n), dtype=np.uint8)
    for start in range(0, draws, 500):
        rows = min(500, draws - start)
        picked = random.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        found[start : start + rows] = np.bincount(picked.ravel(), minlength=rows * n).reshape(rows, n)
    return found


def _drawn(n: int, draws: int, seed: int) -> Iterator[tuple[int, Floats]]:
    counts = _counts(n, draws, seed)
    for start in range(0, draws, 500):  # as floats one part at a time: they take eight times as much
        yield start, counts[start : start + 500].astype(np.float64)


# Whether there is anything to see


def no_signal(systems: Sequence[Answers], *, level: float = 0.95, draws: int = DRAWS) -> bool:
    """Tell whether no system is told apart from guessing, all systems taken together.

    Args:
        systems: Answers of the base and of each single adapter.
        level: How often systems that guess are to be called so.
        draws: How often bundles are drawn.
    """
    each = 1 - (1 - level) / max(1, len(systems))
    bounds = [(interval(a, "part_correct", level=each, draws=draws), chance(a.instances)[1]) for a in systems]
    return all(bound.low <= guess for bound, guess in bounds)


def require_signal(systems: Mapping[str, Answers]) -> None:
    """Refuse to go on where every system guesses: a table of them would be noise.

    Raises:
        UserError: There is no signal.
    """
    if no_signal(list(systems.values())):
        best = max(systems, key=lambda name: measure(systems[name]).part_correct)
        found = measure(systems[best])
        raise UserError(
            f"No signal: neither the base nor any adapter is told apart from guessing ({best} is best, "
            f"{found.part_correct:.3f} of parts right; guessing gives {found.chance_part:.3f}). "
            "Take a stronger model, an easier suite such as text-cd, or more questions."
        )
