"""What a fusion is compared with, and on which questions: the base, and the best single adapter of each domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import attempts, store
from ..change import Change
from ..errors import UserError
from ..model import Model
from .asking import as_change, asked, likelihoods, right_by_domain
from .base import Adapter, Question
from .certificate import Proof, Single, prove
from .compose import Instance
from .suites import Suite, answered

__all__ = ["AT_MOST", "alone", "best_singles", "check_selection", "proved"]

AT_MOST = 200
"""Selection questions of a domain, the first by hash, on which single adapters are compared."""


def alone(questions: Mapping[str, Sequence[Question]], n: int | None = None) -> list[Instance]:
    """Ask questions one by one: the first `n` of each domain by hash, or all in their order."""
    picked = [sorted(own, key=lambda q: q.key)[:n] if n is not None else own for own in questions.values()]
    return [Instance(i, (q,)) for i, q in enumerate(q for own in picked for q in own)]


def check_selection(suite: Suite) -> None:
    """Refuse a suite on which no single adapter can be chosen.

    Raises:
        UserError: A domain has no selection question.
    """
    if lacking := [domain for domain in suite.domains if not suite.selection.get(domain)]:
        raise UserError(
            f"The domain {lacking[0]} has no selection questions, by which the best single adapter to compare with is "
            "chosen. Add a valid file, or more rows to train."
        )


def best_singles(model: Model, adapters: Sequence[Adapter], suite: Suite, *, chat: bool = False) -> tuple[Single, ...]:
    """Ask each adapter alone the selection questions, and mark the best of each domain.

    The best answers most questions rightly; of equals it is the one that finds the right answers likelier.

    Raises:
        UserError: A domain has no selection question.
    """
    check_selection(suite)
    rows, found, shown = alone(suite.selection, AT_MOST), [], answered(suite, 1)
    for adapter in adapters:
        answers = asked(model, as_change(adapter), rows, chat=chat, wording=suite.template, shots=shown)
        likely, right = likelihoods(answers), right_by_domain(answers)
        domains = np.array([i.parts[0].domain for i in answers.instances])
        for domain in suite.domains:
            told = float(right[domain].mean()), float(likely[domains == domain].mean()), len(right[domain])
            found.append(Single(domain, adapter.name, *told, False))
    best = [max((s for s in found if s.domain == d), key=lambda s: (s.right, s.likelihood)) for d in suite.domains]
    return tuple(replace(s, best=True) if any(s is b for b in best) else s for s in found)


def proved(
    model: Model, adapters: Sequence[Adapter], change: Change, suite: Suite, limit: float, *, delta: float = 0.05,
    n: int | None = None, chat: bool = False,
) -> Proof:  # fmt: skip
    """Bound each domain's drop against the base and against the adapter that is best there on selection.

    Every test question is asked once of the base, of its domain's reference and of the fused model.

    Args:
        model: The base.
        adapters: Those that were fused.
        change: The fused one.
        suite: Its selection questions choose the references, its test questions certify.
        limit: The drop that is allowed.
        delta: Probability that any bound is too low.
        n: Questions of each domain that certify, the first by hash; all if not given.
        chat: Ask through the chat template.

    Raises:
        UserError: A domain has no selection question.
    """
    how: dict[str, Any] = {"chat": chat, "wording": suite.template}
    singles = best_singles(model, adapters, suite, chat=chat) if len(adapters) > 1 else ()
    best = {s.domain: s.adapter for s in singles if s.best} or dict.fromkeys(suite.domains, adapters[0].name)
    rows = alone(suite.test, n)
    look = store.key(
        change=change.id, adapters=[as_change(a).id for a in adapters], best=best, asked=_keys(rows), how=how
    )
    how["shots"] = answered(suite, 1)
    number = attempts.count(look, *(store.key(split=sorted(q.key for q in own)) for own in suite.test.values()))
    references = {"base": right_by_domain(asked(model, None, rows, **how))}
    for adapter in adapters:
        if own := [i for i in rows if best[i.parts[0].domain] == adapter.name]:
            references[f"adapter {adapter.name}"] = right_by_domain(asked(model, as_change(adapter), own, **how))
    fused = right_by_domain(asked(model, change, rows, **how))
    return replace(prove(fused, references, limit, delta=delta, attempt=number), singles=singles)


def _keys(rows: Sequence[Instance]) -> list[str]:
    return sorted(row.parts[0].key for row in rows)
