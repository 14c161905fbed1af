"""Ask systems a test's questions, and keep what each answered, so that a run that was killed goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import store
from .._likelihood import perplexity
from ..change import Change, side_by_side
from ..model import Model
from ..stats import bundled_text
from .asking import as_change, asked
from .base import Adapter
from .compose import Answers, Instance, singles
from .prune import PrunePlan
from .pruned import PrunedModel
from .suites import Suite, answered

__all__ = ["Asking", "Row"]

NEUTRAL_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Row:
    """One system: what it answered composed and alone, and what it cost."""

    name: str
    composed: Answers
    alone: Answers
    facts: Mapping[str, Any]


class Asking:
    """Asks systems the test's instances, composed and one by one, and keeps every finished system in a file."""

    def __init__(
        self, model: Model, suite: Suite, test: Sequence[Instance], folder: Path, run: str, k: int, chat: bool
    ) -> None:
        self.model, self.test, self.alone = model, list(test), singles(test)
        self.folder, self.how = folder, {"chat": chat, "wording": suite.template}
        self.shown, self.shown_alone = answered(suite, k), answered(suite, 1)
        self.run = run  # a folder that the user named may hold another run's systems
        self.edges: dict[str, tuple[PrunePlan, dict[str, Answers]]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def kept(self, name: str) -> Row | None:
        place = self._place(name)
        if not place.is_file():
            return None
        raw = store.read_json(place)
        if raw.get("instances") != self._mark() or raw.get("run", self.run) != self.run:
            return None
        return Row(name, _answers(self.test, raw["composed"]), _answers(self.alone, raw["alone"]), raw["facts"])

    def row(self, name: str, change: Change | None, facts: Mapping[str, Any] | None = None) -> Row:
        """Return what a system answers, asking it only if it was not asked before."""
        if (found := self.kept(name)) is not None:
            return found
        start = time.perf_counter()
        composed = asked(self.model, change, self.test, shots=self.shown, **self.how)
        alone = asked(self.model, change, self.alone, shots=self.shown_alone, **self.how)
        ask_s = time.perf_counter() - start
        known = {**(facts or {}), "ppl": self._perplexity(change), "ask_seconds": ask_s}
        plain = {
            "name": name,
            "run": self.run,
            "instances": self._mark(),
            "facts": known,
            "composed": _plain(composed),
            "alone": _plain(alone),
        }
        store.write_json_atomic(self._place(name), plain)
        return Row(name, composed, alone, known)

    def edge(self, domain: str, plan: PrunePlan, small: PrunedModel, trained: Adapter) -> None:
        """Ask an edge's own model, before and after training, its domain's questions."""
        mark = store.key(run=self.run, test=self._mark(), plan=plan.hash)
        place = self._place(f"edge:{domain}")
        kept = store.read_json(place) if place.is_file() else {}
        own = [i for i in self.alone if i.parts[0].domain == domain]
        if kept.get("mark") != mark:
            changes = {"pruned": None, "trained": as_change(trained)}
            found = {n: asked(small, c, own, shots=self.shown_alone, **self.how) for n, c in changes.items()}
            kept = {"mark": mark} | {n: _plain(a) for n, a in found.items()}
            store.write_json_atomic(place, kept)
        self.edges[domain] = plan, {n: _answers(own, kept[n]) for n in ("pruned", "trained")}

    def _perplexity(self, change: Change | None) -> float:
        text = bundled_text("neutral")
        if change is None:
            return perplexity(self.model, text, NEUTRAL_TOKENS)
        with side_by_side(self.model, [change]):
            return perplexity(self.model, text, NEUTRAL_TOKENS)

    def _place(self, name: str) -> Path:
        return self.folder / f"{store.key(name=name)[:16]}.json"

    def _mark(self) -> str:
        return store.key(test=[[q.key for q in i.parts] for i in self.test], **self.how)


def _plain(answers: Answers) -> dict[str, Any]:
    return {"how": answers.how, "chosen": [list(c) for c in answers.chosen],
            "scores": [[list(part) for part in row] for row in answers.scores]}  # fmt: skip


def _answers(instances: Sequence[Instance], raw: Mapping[str, Any]) -> Answers:
    scores = tuple(tuple(tuple(map(float, part)) for part in row) for row in raw["scores"])
    return Answers(tuple(instances), tuple(tuple(c) for c in raw["chosen"]), raw["how"], scores)
