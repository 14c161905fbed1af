"""How a base with a fused change is asked: its answers, how likely it finds the right ones, and what both cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..change import Change, LowRank, side_by_side
from ..model import Model
from .base import Adapter
from .compose import Answers, Instance
from .scoring import answer

__all__ = ["as_change", "asked", "judge", "likelihoods", "right_by_domain"]

Ask = Callable[[Model, Sequence[Instance]], Answers]


def as_change(adapter: Adapter, lam: float = 1.0) -> Change:
    """Return one adapter as a change of its base."""
    parts = {name: LowRank(p.left * lam, p.right) for name, p in adapter.parts.items()}
    return Change("adapter", adapter.base, parts, settings={"lam": lam}, notes={"adapter": adapter.name})


def asked(model: Model, change: Change | None, instances: Sequence[Instance], **how: Any) -> Answers:
    """Ask the base, or the base with a change beside its weights.

    The change runs as a side branch of each weight: for a change of rank R of a weight (outputs, inputs) that costs
    R (outputs + inputs) more multiplications than the weight's outputs x inputs, and no copy of the model.

    Args:
        model: The base.
        change: Of its weights; None asks the base.
        instances: What to ask.
        **how: As `scoring.answer` takes it.
    """
    if change is None:
        return answer(model, instances, **how)
    with side_by_side(model, [change]):
        return answer(model, instances, **how)


def likelihoods(answers: Answers) -> NDArray[np.float64]:
    """Return for each instance the log-probability of its right options, summed over the parts.

    Later parts are asked behind the options that the model chose, as it is used.
    """
    rows = [sum(s[q.answer] for s, q in zip(scores, i.parts)) for scores, i in zip(answers.scores, answers.instances)]
    return np.array(rows, dtype=np.float64)


def judge(
    model: Model, instances: Sequence[Instance], **how: Any
) -> Callable[[Change, Sequence[int]], NDArray[np.float64]]:
    """Return what judges a change on selection instances, for `tuning.tune`."""
    return lambda change, rows: likelihoods(asked(model, change, [instances[i] for i in rows], **how))


def right_by_domain(answers: Answers) -> dict[str, NDArray[np.bool_]]:
    """Return whether each question of each domain was answered rightly, ordered by the questions' keys."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for instance, chosen in zip(answers.instances, answers.chosen):
        for question, option in zip(instance.parts, chosen):
            found.setdefault(question.domain, []).append((question.key, option == question.answer))
    return {d: np.array([right for _, right in sorted(rows)]) for d, rows in found.items()}
