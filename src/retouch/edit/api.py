"""Plan and keep edits: what the command line calls, and what programs call."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import registry
from ..bound import certify
from ..change import Change, with_report
from ..change import apply as carry
from ..errors import BoundRefused, NoEffect, UserError
from ..ledger import Ledger, Policy
from ..measure import answers, continuations, watched
from ..model import Model
from ..tokens import Text
from .base import EditMethod, ValueEditMethod
from .facts import Fact
from .harm import Harm, bystanders, measure_harm
from .neighbors import stopped
from .sequence import distinct, plan_next

__all__ = ["Edited", "apply_change", "ask", "check_effect", "edit_facts", "plan"]

_SAID = 0.5
"""An answer that is likelier than this comes first."""

_log = logging.getLogger(__name__)


def plan(model: Model, facts: Sequence[Fact], method: str | EditMethod = "rome", **settings: Any) -> Change:
    """Plan a change that makes facts true; the model is not altered.

    Args:
        model: A decoder.
        facts: What is to become true.
        method: A method, or its name (``retouch methods edit``).
        settings: The method's settings, when it is named.

    Raises:
        UnknownName: No such method.
        SettingsError: A setting is unknown or not allowed.
        FactError: A fact cannot be used.
    """
    return _method(method, settings).plan(model, facts)


def _method(method: str | EditMethod, settings: dict[str, Any]) -> EditMethod:
    chosen: EditMethod = registry.make("edit", method, **settings) if isinstance(method, str) else method
    return chosen


def check_effect(before: Model, after: Model, facts: Sequence[Fact]) -> list[dict[str, float]]:
    """Prove that every fact became likelier.

    Returns:
        For each fact the mean -log P of its target before and after, nats.

    Raises:
        NoEffect: A fact's target is not likelier than it was.
    """
    texts = [Text(f.before, f.subject, f.after, f.target) for f in facts]
    old, new = answers(before, texts), answers(after, texts)
    for fact, a, b in zip(facts, old, new):
        if not b.nll < a.nll:
            raise NoEffect(
                f"After the edit {fact.target!r} is not likelier after {fact.filled!r}: -log P {a.nll:.3f} before, "
                f"{b.nll:.3f} after. Try another method or block, or leave this fact out."
            )
    return [{"nll_before": a.nll, "nll_after": b.nll} for a, b in zip(old, new)]


@dataclass(frozen=True, eq=False)
class Edited:
    """An edited model, the change that made it, and what else changed.

    Attributes:
        model: The edited model.
        change: What made it.
        effect: For each of `facts` the mean -log P of its target before and after, nats.
        harm: The certified harm; None without a limit.
        facts: The facts that were asked for, without those that a later one of the same call supersedes.
    """

    model: Model
    change: Change
    effect: list[dict[str, float]]
    harm: Harm | None
    facts: tuple[Fact, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """What the method warned of, each once."""
        return list(dict.fromkeys(w for f in self.change.notes.get("facts", ()) for w in f.get("warnings", ())))

    @property
    def unsure(self) -> str:
        """A sentence about answers that the model may still not give; empty if there are none."""
        n, unsure = len(self.effect), sum(math.exp(-e["nll_after"]) < _SAID for e in self.effect)
        if not unsure:
            return ""
        return (
            f"{unsure} of {n:,} new answer{'' if n == 1 else 's'} stayed below a probability of {_SAID:g}, so the model may "
            "still say something else. Ask it, or try another method."
        )


def edit_facts(
    model: Model | Ledger,
    facts: Sequence[Fact],
    method: str | EditMethod = "rome",
    *,
    max_harm: float | None = None,
    confidence: float = 0.95,
    **settings: Any,
) -> Edited:
    """Plan, apply, measure and, with a limit, certify an edit.

    Args:
        model: A decoder, or a ledger whose edits stay: their keys are kept, and facts that the new ones supersede are
            planned out. Never altered.
        facts: What is to become true; of two about the same (`retouch.edit.sequence.distinct`) the last counts.
        method: A method, or its name.
        max_harm: Largest harm that is allowed (see `retouch.edit.harm.measure_harm`); None asks for no certificate. A
            method that finds values by gradient keeps it for its neighbours while it searches (its ``max_drift``).
        confidence: Of the certificate.
        settings: The method's settings, when it is named.

    Returns:
        The edited model and the change, its report filled in.

    Raises:
        UserError: The limit or the confidence is no number that is allowed.
        BoundRefused: The certified harm exceeds the limit, or the search found no step within it.
        NoEffect: The edit did not do what was planned.
    """
    if max_harm is not None:
        certify([0.0], max_harm, confidence=confidence)  # a limit that is none is refused before any work
    chosen = _method(method, settings)
    if max_harm is not None and isinstance(chosen, ValueEditMethod) and not chosen.max_drift:
        chosen = replace(chosen, max_drift=max_harm)  # the search keeps the limit that is certified afterwards
    before = model if isinstance(model, Ledger) else Ledger(model)
    asked, facts = len(facts), distinct(facts)
    if asked > len(facts):
        _log.warning(
            "%d of %d facts are left out: later ones are about the same or repeat them.", asked - len(facts), asked
        )
    with watched() as cost:
        below, change = plan_next(before, facts, chosen)
    _refuse_stopped(change, chosen, max_harm)
    edited = below.apply(change).model
    effect = check_effect(before.model, edited, facts)
    harm = None
    report: dict[str, Any] = {
        "effect": effect,
        "seconds": round(cost.seconds, 2),
        "peak_mib": round(cost.peak_mib),
        "norms": change.norms(below.model),
    }
    if max_harm is not None:
        harm = measure_harm(edited, bystanders(before.model, facts), max_harm, confidence)
        report["harm"] = harm.to_dict()
        harm.require()
    return Edited(edited, with_report(change, report), effect, harm, tuple(facts))


def apply_change(before: Ledger, change: Change, policy: Policy | None = None) -> Ledger:
    """Add a change to a model, and prove that its facts became likelier.

    Args:
        before: The model, with what it carries.
        change: What is added.
        policy: What becomes of facts in force that the change is about too; see `Ledger.apply`.

    Raises:
        WrongBase: The change was planned for another model.
        StoreError: It is in force already.
        NoEffect: The weights or the answers did not become what was planned.
    """
    after = before.apply(change, policy=policy)
    if change.facts:
        check_effect(before.model, after.model, [Fact.from_dict(f) for f in change.facts])
    return after


def ask(model: Model, text: str, change: Change | None = None, n_tokens: int = 16) -> dict[str, str]:
    """Let a model continue a text, before and after a change.

    Returns:
        ``answer``; or, with a change, ``before`` and ``after``.

    Raises:
        UserError: The text is empty, or there are more tokens than the model can hold.
        WrongBase: The change was planned for another model.
    """
    longest = getattr(model.network.config, "max_position_embeddings", n_tokens)
    if n_tokens > longest:
        raise UserError(f"{n_tokens:,} new tokens are more than {model.source} can hold: {longest:,} with the text.")
    said = {"before" if change else "answer": continuations(model, [text], n_tokens)[0].strip()}
    if change:
        said["after"] = continuations(carry(model, change), [text], n_tokens)[0].strip()
    return said


def _refuse_stopped(change: Change, method: EditMethod, max_harm: float | None) -> None:
    """Refuse a change in which the search's limit left a fact without a value."""
    if not (without := stopped(change)):
        return
    assert isinstance(method, ValueEditMethod)  # no other search has a limit
    fact, limit = Fact.from_dict(without[0]), method.max_drift
    name = "max_harm" if limit == max_harm else "max_drift"
    raise BoundRefused(
        f"No step of the search for {fact.target!r} after {fact.filled!r} kept the drift of neighbouring prompts within "
        f"{limit:g} nats, the limit of {name}. The change is refused. Allow a higher {name}, or choose another method or "
        "block."
    )
