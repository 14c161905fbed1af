"""Solve a ledger's changes again after one was taken out: from stored keys and targets, without a new search.

Undo leaves the later changes as they were planned, with the undone one in place. What is solved again here is what they
would have been without it: the same keys are to have the same outputs, now with one change less to stand on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .. import linalg, registry
from ..change import Change, LowRank
from ..entry import Entry
from ..errors import UserError
from ..ledger import Ledger
from ..model import Model
from ..parting import columns_of, delivered_whole
from .contexts import Context
from .facts import Fact
from .rows import problems

__all__ = ["refit", "resolve"]

Again = Callable[[str, Tensor, Tensor, Tensor | None], linalg.Solution]
"""(weight, keys, residuals, kept keys) -> the write."""
TOLERANCE = 1e-6
"""A change whose keys see outputs as before, to this share, is left alone: bit for bit."""


def resolve(ledger: Ledger, after: int = 0) -> Ledger:
    """Solve the active changes behind a line again, in order, as if what is undone had never been there.

    Source:
        With fixed keys and wanted outputs, least squares in sequence with all earlier keys kept is the one-time solve of
        all facts (recursive least squares), so no later change needs a search of its own.

    Args:
        ledger: After one or more undos.
        after: Number of the line that was undone; changes before it never knew of it.

    Raises:
        UserError: A change behind it keeps no keys and targets, or was applied by a version that kept no outputs.
    """
    later = [e for e in ledger.entries if e.active and e.number > after]
    for entry in later:
        _check(entry)
    unedited = ledger.base
    for entry in later:
        shifts = {n: _shift(ledger, entry, n) for n in entry.change.keys}
        kept = ledger.previous(below=entry.number)
        if _is_as_planned(ledger, entry, shifts, kept):
            continue
        again = _method(entry.change, unedited)
        ledger = ledger.replaced(replace(entry, change=_solved(entry, shifts, kept, again)))
    return ledger


def _check(entry: Entry) -> None:
    planned = entry.planned
    lacks = [n for n in planned.parts if n not in planned.keys or n not in planned.targets]
    if not lacks and columns_of(planned) is not None and entry.seen.keys() >= planned.keys.keys():
        return
    what = f"keys and targets for {lacks[0]}" if lacks else "what its keys gave before it"
    raise UserError(
        f"Change number {entry.number} ({planned.method}) does not keep {what}, so it cannot be solved again. Undo without "
        "--resolve leaves it as planned; or undo it too and plan its facts anew."
    )


def _columns(entry: Entry) -> list[int]:
    """The planned columns that are still there."""
    groups = columns_of(entry.planned) or []
    return [j for j, group in enumerate(groups) if not set(group) & entry.removed.keys()]


def _shift(ledger: Ledger, entry: Entry, name: str) -> Tensor:
    """What a change's keys gave when it was planned, less what they give now without it and what came later."""
    keys = entry.change.keys[name].double()
    now = ledger.originals[name].double().cpu() @ keys
    for earlier in ledger.entries:
        if earlier.active and earlier.number < entry.number and name in earlier.change.parts:
            part = earlier.change.parts[name]
            now = now + (part.left.double() @ (part.right.double() @ keys) if isinstance(part, LowRank) else
                         part.delta() @ keys)  # fmt: skip
    return entry.seen[name][:, _columns(entry)].double() - now


def _is_as_planned(ledger: Ledger, entry: Entry, shifts: dict[str, Tensor], kept: dict[str, Tensor]) -> bool:
    if entry.change.notes.get("resolved") or entry.removed:
        return False
    moved = any(float(s.norm()) > TOLERANCE * float(entry.seen[n].norm()) for n, s in shifts.items())
    then = ledger.previous(entry.number)
    return not moved and all(_same(then.get(n), kept.get(n)) for n in shifts)


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    return one is two if one is None or two is None else torch.equal(one, two)


def _method(change: Change, unedited: Model) -> Again | None:
    """Return the solver that a method of joint writes plans with; None where each fact has its own rank-one write."""
    method = registry.make("edit", change.method, **change.settings).as_published(unedited)
    if not hasattr(method, "solver"):
        return None
    facts = [Fact.from_dict(f) for f in change.facts]
    texts = change.notes.get("contexts") or [""]
    found = problems(unedited, facts, [Context(t, 1 / len(texts)) for t in texts], "subject", method.bos)
    writer = method.solver(unedited, method.blocks_of(unedited), unedited)(found)

    def again(name: str, keys: Tensor, residuals: Tensor, keep: Tensor | None) -> linalg.Solution:
        metric = writer.scaled(name, keys)
        keep = keep if method.keeps_previous else None
        return linalg.solve(keys, residuals, metric, mode=writer.mode, ridge=writer.ridge, keep=keep)

    return again


def _solved(entry: Entry, shifts: dict[str, Tensor], kept: dict[str, Tensor], again: Again | None) -> Change:
    change, columns = entry.change, _columns(entry)
    parts, targets = dict(change.parts), {}
    for name, shift in shifts.items():
        keys, wanted = change.keys[name].double(), entry.planned.targets[name][:, columns].double()
        targets[name] = (wanted + shift).float()
        if again is not None:
            solution = again(name, keys, wanted + shift, kept.get(name))
            parts[name] = LowRank(solution.left.float(), solution.right.float())
        elif delivered_whole(change, name):
            parts[name] = refit(entry.planned, name, columns, shift)
        else:
            raise UserError(
                f"Change number {entry.number} ({change.method}) was solved by least squares with a metric that is not "
                "known here, so it cannot be solved again. Undo without --resolve leaves it as planned."
            )
    return replace(change, parts=parts, targets=targets, notes={**change.notes, "resolved": True}, report={})


def refit(change: Change, name: str, columns: list[int], shift: Tensor) -> LowRank:
    """Give the keys of rank-one writes their outputs on another model, each fact after the earlier ones.

    The rows of the right factor depend on keys and metric alone and stay. For the left one: each column was to bring its
    key to a value with the earlier columns in place, so the corrections D solve D triu(right @ K) = shift.

    Shapes:
        shift: (outputs, columns); returns rank = columns.
    """
    part = change.parts[name]
    assert isinstance(part, LowRank)
    left, right = part.left.double(), part.right[columns].double()
    keys = change.keys[name].double()
    gone = [j for j in range(part.rank) if j not in columns]
    # columns that are taken out no longer help the later ones of the same change
    lost = left[:, gone] @ torch.triu(part.right.double() @ keys)[gone][:, columns]
    reach = torch.triu(right @ keys[:, columns])
    correction = torch.linalg.solve_triangular(reach, shift + lost, upper=True, left=False)
    return LowRank((left[:, columns] + correction).float(), part.right[columns].clone())
