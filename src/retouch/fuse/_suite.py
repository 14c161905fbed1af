"""What every suite is: questions by domain and split, none of them in two."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UserError
from .base import Question

__all__ = ["Split", "Suite", "check", "gather", "normal", "question_key", "share"]

Split = Literal["train", "selection", "test"]
SELECTION = 0.2
"""Share of published training rows that serve for choosing."""
FEW = 3
"""Questions of a domain that are kept for examples in the prompt, where no set of their own is published."""


@dataclass(frozen=True)
class Suite:
    """Questions by domain and split; no question stands in two splits.

    Attributes:
        name: What tables call it.
        domains: Its domains, in the order of the edges.
        train: Questions that a domain's edge learns from.
        selection: Questions by which settings are chosen.
        test: Questions for the end.
        shots: Questions for answered examples in a prompt; in no split.
        template: Name of the template that it is asked with.
        facts: How it came about, as plain values: what was read, dropped and left out.
    """

    name: str
    domains: tuple[str, ...]
    train: Mapping[str, tuple[Question, ...]]
    selection: Mapping[str, tuple[Question, ...]]
    test: Mapping[str, tuple[Question, ...]]
    shots: Mapping[str, tuple[Question, ...]] = field(default_factory=dict)
    template: str = "plain"
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def questions(self, split: Split) -> Mapping[str, tuple[Question, ...]]:
        """Return a split's questions by domain."""
        return {"train": self.train, "selection": self.selection, "test": self.test}[split]


def question_key(stem: str, options: Sequence[str]) -> str:
    """Hash a question so that it is the same in any case, spacing and order of options.

    Example:
        >>> question_key("Is  it?", ["yes", "no"]) == question_key("is it?", ["No", "Yes"])
        True
    """
    text = "\n".join([normal(stem), *sorted(map(normal, options))])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def normal(text: str) -> str:
    """Return a text without what does not make it another one: case, spacing, form of characters."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def share(key: str) -> float:
    """Return a number from 0 to below 1 that hangs on a question's hash alone."""
    return int(key[:12], 16) / 16**12


def gather(
    name: str, rows: Mapping[str, Mapping[str, Sequence[Question]]], facts: Mapping[str, Any], template: str = "plain"
) -> Suite:
    """Make a suite of published splits: each question once, in test rather than before it.

    Args:
        name: The suite's name.
        rows: For each domain the questions of ``train``, ``test`` and, if published, ``selection``.
        facts: How it came about.
        template: The template that it is asked with.

    Raises:
        UserError: There are fewer than two domains, or a split is empty.
    """
    seen: set[str] = set()
    test = {d: _once(parts["test"], seen) for d, parts in rows.items()}
    chosen = {d: _once(parts.get("selection", ()), seen) for d, parts in rows.items()}
    left = {d: _once(parts["train"], seen) for d, parts in rows.items()}
    for d, parts in rows.items():
        if "selection" not in parts:
            chosen[d] = tuple(q for q in left[d] if share(q.key) < SELECTION)
            left[d] = tuple(q for q in left[d] if share(q.key) >= SELECTION)
    shots = {d: tuple(sorted(own, key=lambda q: q.key)[: FEW if len(own) > 2 * FEW else 0]) for d, own in left.items()}
    train = {d: tuple(q for q in own if q not in set(shots[d])) for d, own in left.items()}
    given = {d: sum(map(len, parts.values())) for d, parts in rows.items()}
    kept = {d: sum(len(part[d]) for part in (train, chosen, test, shots)) for d in rows}
    dropped = {d: given[d] - kept[d] for d in rows if given[d] > kept[d]}
    suite = Suite(name, tuple(rows), train, chosen, test, shots, template, {**facts, "dropped": dropped})
    check(suite)
    return suite


def _once(questions: Iterable[Question], seen: set[str]) -> tuple[Question, ...]:
    """Keep questions that were not seen before, and see them."""
    found = []
    for question in questions:
        if question.key not in seen:
            seen.add(question.key)
            found.append(question)
    return tuple(found)


def check(suite: Suite) -> None:
    """Refuse a suite that has too few domains, or a split without questions.

    Raises:
        UserError: It has.
    """
    if len(suite.domains) < 2:
        raise UserError(f"{suite.name} needs at least two domains; there is {', '.join(suite.domains) or 'none'}.")
    for split in ("train", "selection", "test"):
        if empty := [d for d in suite.domains if not suite.questions(split)[d]]:
            raise UserError(f"{suite.name}: {empty[0]} has no question left for {split}. Give more rows of it.")
