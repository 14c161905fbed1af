"""Take some facts out of a change that wrote many at once.

A write of n facts at a weight is ``left @ right``: one column and one row a fact, or a group of facts that share one
value. In an equality write a column serves its own fact alone and is dropped. In a least-squares write every row also
answers to the other facts, so the rest is solved again; what that needs lies in the factors and the keys.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from .change import Change, LowRank
from .errors import UserError

__all__ = ["bound_facts", "columns_of", "delivered_whole", "identities", "without"]

TOLERANCE = 1e-3
"""How far a fact may be from its whole target before its write counts as least squares."""


def fold(text: str) -> str:
    """Make spellings of one name equal: NFKC, case, spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def identities(fact: Mapping[str, Any]) -> frozenset[tuple[str, str, str]]:
    """Say what a fact is about: two facts that share one of these cannot both hold.

    Example:
        >>> one = {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon"}
        >>> two = {"prompt": "The capital of {} is", "subject": "FRANCE", "target": "Nice"}
        >>> bool(identities(one) & identities(two))
        True
    """
    relation = fact.get("relation")
    return _identities(str(fact.get("subject") or ""), str(fact.get("prompt") or ""), str(relation) if relation else "")


@lru_cache(maxsize=65536)
def _identities(subject: str, prompt: str, relation: str) -> frozenset[tuple[str, str, str]]:
    found = {("template", fold(subject), fold(prompt))}
    return frozenset(found | {("relation", fold(subject), fold(relation))} if relation else found)


def columns_of(change: Change) -> list[tuple[int, ...]] | None:
    """Return for each column of the factors the facts that it serves; None when the change has no such columns."""
    widths = {t.shape[1] for t in change.keys.values()}
    fits = all(isinstance(p, LowRank) and n in change.keys and {p.rank} == widths for n, p in change.parts.items())
    if len(widths) != 1 or not fits:
        return None
    n = widths.pop()
    if n == len(change.facts):
        return [(i,) for i in range(n)]
    told = [tuple(g) for g in change.notes.get("groups", ())]
    if len(told) == n and sorted(i for g in told for i in g) == list(range(len(change.facts))):
        return told
    groups: dict[str, list[int]] = {}
    for i, fact in enumerate(change.facts):  # methods that group do it by subject, in order of appearance
        groups.setdefault(str(fact.get("subject", "")).strip(), []).append(i)
    return [tuple(g) for g in groups.values()] if len(groups) == n else None


def bound_facts(change: Change, fact: int) -> tuple[int, ...]:
    """Return the facts that stand and fall with one: itself, and those that share its value."""
    columns = columns_of(change)
    if columns is None:
        return tuple(range(len(change.facts)))
    return next(group for group in columns if fact in group)


def without(change: Change, facts: Collection[int]) -> Change:
    """Return the change as if some of its facts had not been in it; keys and targets of the others stay.

    Source:
        Least squares gives right = K^T (M + K K^T)^-1, so that right @ K = H tells all that the metric M does among the
        keys: without the facts g the others' rows are right + H_g (I - H_gg)^-1 right_g (the leave-one-out formula).

    Shapes:
        K: (inputs, n); right: (n, inputs); H: (n, n).

    Args:
        change: A change of several facts.
        facts: Numbers of the facts to take out, from 0.

    Raises:
        UserError: They share their value with others, or the change keeps no targets.
    """
    gone = set(facts)
    for fact in sorted(gone):
        if odd := set(bound_facts(change, fact)) - gone:
            raise UserError(_inseparable(change, fact, odd))
    columns = columns_of(change) or []
    kept = [j for j, group in enumerate(columns) if not gone & set(group)]
    if not kept:
        raise UserError(f"Nothing of change {change.id} would be left. Undo it whole.")
    rest = [i for i in range(len(change.facts)) if i not in gone]
    parts = {name: _rest(change, name, kept) for name in change.parts}
    return replace(
        change,
        parts=parts,
        facts=tuple(change.facts[i] for i in rest),
        keys={n: t[:, kept] for n, t in change.keys.items()},
        targets={n: t[:, kept] for n, t in change.targets.items()},
        notes=_notes(change, rest),
        report={},
    )


def _notes(change: Change, rest: Sequence[int]) -> dict[str, Any]:
    notes = dict(change.notes)
    if len(told := notes.get("facts", ())) == len(change.facts):
        notes["facts"] = [told[i] for i in rest]
    if "groups" in notes:
        place = {i: n for n, i in enumerate(rest)}
        notes["groups"] = [[place[i] for i in g] for g in notes["groups"] if set(g) <= place.keys()]
    return notes


def _rest(change: Change, name: str, kept: list[int]) -> LowRank:
    part = change.parts[name]
    assert isinstance(part, LowRank)  # columns_of has seen to it
    if delivered_whole(change, name):
        return LowRank(part.left[:, kept].clone(), part.right[kept].clone())
    right, keys = part.right.double(), change.keys[name].double()
    out = [j for j in range(part.rank) if j not in kept]
    reach = right @ keys[:, out]
    lent = torch.linalg.solve(torch.eye(len(out)).double() - reach[out], right[out])
    return LowRank(part.left[:, kept].clone(), (right[kept] + reach[kept] @ lent).float())


def delivered_whole(change: Change, name: str) -> bool:
    """Tell an equality write from a least-squares one.

    The change's notes say so (``mode``); else by the factors: each column alone gives its key the whole target.

    Raises:
        UserError: The change keeps no targets, and the factors alone do not tell.
    """
    part = change.parts[name]
    assert isinstance(part, LowRank)
    if "mode" in change.notes:
        return bool(change.notes["mode"] == "equality")
    share = (part.right.double() * change.keys[name].double().T).sum(1)
    if name in change.targets:
        wanted = change.targets[name].double()
        missing = (part.left.double() * share - wanted).norm(dim=0)
        return bool((missing <= TOLERANCE * wanted.norm(dim=0).clamp(min=1e-30)).all())
    if bool(((share - 1).abs() <= TOLERANCE).all()):
        return True
    raise UserError(
        f"Change {change.id} ({change.method}) keeps no targets, so its facts cannot be solved again one by one. Undo it "
        "whole, or plan its facts anew."
    )


def _inseparable(change: Change, fact: int, others: Collection[int]) -> str:
    names = ", ".join(map(str, sorted(others)[:8])) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    why = "whole weights" if columns_of(change) is None else "one value"
    return (
        f"Fact {fact} of change {change.id} ({change.method}) shares {why} with {'fact' if len(others) == 1 else 'facts'} "
        f"{names}. Undo the whole change, and plan anew what is to stay."
    )
