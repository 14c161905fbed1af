"""One way of choosing a scale for every fusion method, so that no method wins by a better guess.

Every scale of every variant is judged on a few selection questions, the best on all of them, always by the likelihood
of the right answers and never on test. A scale is a number before the change, so a variant is fused once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..change import Change, LowRank
from ..errors import UserError
from ..progress import report
from .base import FuseMethod

__all__ = ["LAMS", "Tried", "Tuned", "scaled", "tune", "variants"]

LAMS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.5)
DENSITIES = (0.2, 0.5, 0.8, 1.0)

Judge = Callable[[Change, Sequence[int]], NDArray[np.float64]]
"""The log-likelihood of the right answers of some selection instances, by their numbers, under a change."""


@dataclass(frozen=True)
class Tried:
    """One judgement: which variant at which scale, on how many instances, with what mean log-likelihood."""

    variant: str
    lam: float
    n: int
    score: float


@dataclass(frozen=True, eq=False)
class Tuned:
    """What was chosen.

    Attributes:
        variant: Its settings in words; empty for the method as given.
        method: The method with its settings and scale.
        change: The fused change at that scale.
        tried: All that was judged.
        note: What to say of the choice: that it lies at an end of the grid, say.
    """

    variant: str
    method: FuseMethod
    change: Change
    tried: tuple[Tried, ...]
    note: str = ""


def variants(method: FuseMethod, densities: Sequence[float] = DENSITIES) -> dict[str, FuseMethod]:
    """Return a method in the few forms that are tuned: by density where it has one, else as it is."""
    if "density" not in {f.name for f in dataclasses.fields(method)} or "density" in getattr(method, "idle", ()):
        return {"": method}
    room = getattr(method, "epsilon", 0.0)  # DELLA's probabilities lie around the density
    allowed = [d for d in densities if d - room > 0 and d + room <= 1] or [method.density]  # type: ignore[attr-defined]
    return {f"density={d:g}": dataclasses.replace(method, density=d) for d in allowed}  # type: ignore[call-arg]


def scaled(change: Change, factor: float) -> Change:
    """Return a low-rank change times a number."""
    if factor == 1.0:
        return change
    parts: dict[str, Any] = {}
    for name, part in change.parts.items():
        if not isinstance(part, LowRank):
            raise UserError(f"The fused change of {name} is not low-rank and cannot be scaled by its factors.")
        parts[name] = LowRank(part.left * factor, part.right)
    return dataclasses.replace(change, parts=parts)


def tune(
    forms: Mapping[str, FuseMethod],
    plan: Callable[[FuseMethod], Change],
    judge: Judge,
    n: int,
    *,
    first: int = 50,
    finalists: int = 2,
    lams: Sequence[float] = LAMS,
) -> Tuned:
    """Choose a method's form and scale by successive halving.

    Args:
        forms: The method's forms by words; their own scale is not used.
        plan: Fuses a form.
        judge: Judges a change on selection instances.
        n: How many selection instances there are.
        first: Instances for the first round.
        finalists: How many pairs of form and scale are judged on all.
        lams: The scales of the first round, rising. When the best lies at an end, one more step is tried. A method
            that chooses its weights has chosen its scale, and is judged at 1 alone.

    Returns:
        The best; of equals the smaller scale.

    Raises:
        UserError: There is no instance, or a score is not a number.
    """
    if n < 1 or not lams:
        raise UserError("Tuning needs selection instances and at least one scale.")
    if all(form.chooses for form in forms.values()):
        lams = (1.0,)
    some = list(range(min(first, n)))
    planned = {words: plan(dataclasses.replace(form, lam=1.0)) for words, form in forms.items()}
    tried: list[Tried] = []

    def score(words: str, lam: float, rows: Sequence[int]) -> Tried:
        values = judge(scaled(planned[words], lam), rows)
        if not np.isfinite(values).all():
            raise UserError(f"The likelihood at scale {lam:g} {words} is not a number; the adapters are too large.")
        tried.append(Tried(words, lam, len(rows), float(np.mean(values))))
        return tried[-1]

    for done, (words, lam) in enumerate([(w, x) for w in planned for x in lams]):
        report("Choosing the scale", done, len(planned) * len(lams))
        score(words, lam, some)
    note = ""
    for words, lam in _beyond(tried, lams):
        note = f"The best scale of the grid lies at its end; {lam:g} was tried too."
        score(words, lam, some)
    best = sorted(tried, key=lambda t: (-t.score, t.lam))[:finalists]
    if len(some) < n and len(best) > 1:
        best = [score(t.variant, t.lam, range(n)) for t in best]
    chosen = min(best, key=lambda t: (-t.score, t.lam))
    method = dataclasses.replace(forms[chosen.variant], lam=chosen.lam)
    change = dataclasses.replace(scaled(planned[chosen.variant], chosen.lam), settings=method.to_dict())
    return Tuned(chosen.variant, method, change, tuple(tried), note)


def _beyond(tried: Sequence[Tried], lams: Sequence[float]) -> Iterator[tuple[str, float]]:
    best = min(tried, key=lambda t: (-t.score, t.lam))
    if len(lams) < 2:
        return
    if best.lam == lams[0]:
        yield best.variant, lams[0] * lams[0] / lams[1]
    elif best.lam == lams[-1]:
        yield best.variant, lams[-1] * lams[-1] / lams[-2]
