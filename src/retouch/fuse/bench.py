"""Compare fusion methods in one harness: edges train on their own domain, the cloud fuses, composed questions judge.

Every system is asked the same instances, composed and one by one. Scales are tuned on selection for all alike. What is
finished stays in a folder, so an interrupted run goes on; adapters are trained once for all methods.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import store
from .._likelihood import perplexity
from ..change import Change, side_by_side
from ..measure import environment, watched
from ..model import Model
from ..stats import bundled_text
from .align import aligned
from .asking import as_change, asked, judge, likelihoods, right_by_domain
from .base import Adapter, Example, FuseMethod, Ground, Resolver, shares
from .certificate import prove
from .compose import Answers, Instance, bundles, singles
from .composed_metrics import assemble, measure, paired, require_signal
from .memory import Load
from .prune import plan_prune
from .recover import recover
from .suites import Suite, answered, examples
from .train import LoraSettings, initial_a, train
from .tuning import LAMS, Tuned, tune, variants

__all__ = ["METHODS", "Bench", "Row", "edges", "run"]

_log = logging.getLogger("retouch")
NEUTRAL_TOKENS = 1024
METHODS = "cat,linear:form=fedit,ties,dare_ties,knots,tsv,iso,ties:space=core"


@dataclass(frozen=True, eq=False)
class Bench:
    """What is compared, and on how much.

    Attributes:
        methods: Fusion methods by the words that named them.
        resolvers: Resolvers by their words; each stands before each method that can follow it.
        k: Questions of a composed prompt.
        form: Whether edges see composed prompts of their own domain (``aware``) or single questions (``blind``).
        per_edge: Examples that each edge trains on; 0 is all.
        ratios: Share that each edge's model is pruned by, in turn over the edges.
        score: How units to prune are compared.
        lora: How edges train.
        joint: Also train one adapter on all domains' examples: what no fusion could beat.
        n_selection: Bundles for choosing scales.
        n_test: Bundles for the result; 9 instances each.
        lams: Scales that are tried.
        first: Instances of the first round of tuning.
        limit: The drop of the certificate that is printed.
        chat: Ask through the chat template.
        seed: Of everything random.
        replay: Public examples that every edge mixes in.
    """

    methods: Mapping[str, FuseMethod]
    resolvers: Mapping[str, Resolver] = field(default_factory=dict)
    k: int = 3
    form: str = "aware"
    per_edge: int = 400
    ratios: tuple[float, ...] = (0.0,)
    score: str = "wanda"
    lora: LoraSettings = field(default_factory=LoraSettings)
    joint: bool = True
    n_selection: int = 6
    n_test: int = 30
    lams: tuple[float, ...] = LAMS
    first: int = 50
    limit: float = 0.2
    chat: bool = False
    seed: int = 0
    replay: tuple[Example, ...] = ()


@dataclass(frozen=True, eq=False)
class Row:
    """One system: what it answered composed and alone, and what it cost."""

    name: str
    composed: Answers
    alone: Answers
    facts: Mapping[str, Any]


# ---------------------------------------------------------------- edges


def edges(model: Model, suite: Suite, wanted: Bench, work: Path) -> tuple[list[Adapter], dict[str, Adapter]]:
    """Train an adapter for each domain on its edge's pruned model and recover it; and one on all domains.

    Returns:
        The recovered adapters in the order of the domains, and by name those that are only compared with.
    """
    own = {
        d: examples(suite, d, _form(wanted), wanted.per_edge or None, wanted.seed, k=wanted.k) for d in suite.domains
    }
    found = []
    for i, domain in enumerate(suite.domains):
        ratio = wanted.ratios[i % len(wanted.ratios)]
        found.append(_edge(model, domain, own[domain], ratio, i, len(own), wanted, work))
    if not wanted.joint:
        return found, {}
    pooled = _shuffled([e for rows in own.values() for e in rows], wanted.seed)
    settings = _settings(wanted, 0)
    if settings.n_steps is not None:  # as many steps on each domain as its own edge had
        settings = replace(settings, n_steps=settings.n_steps * len(own))
    joint = train(
        model,
        pooled,
        settings,
        work / "edges" / "joint",
        replay=wanted.replay,
        initial=initial_a(model, None, _settings(wanted, 0)),
        name="joint",
    )
    return found, {"joint": joint}


def _form(wanted: Bench) -> Any:
    return wanted.form


def _settings(wanted: Bench, number: int) -> LoraSettings:
    return replace(wanted.lora, seed=wanted.seed * 1000 + number, a_seed=wanted.seed)


def _edge(
    model: Model,
    domain: str,
    rows: Sequence[Example],
    ratio: float,
    number: int,
    n_edges: int,
    wanted: Bench,
    work: Path,
) -> Adapter:
    settings, among = _settings(wanted, number), {"edge": number, "n_edges": n_edges}
    place = work / "edges" / f"{number}-{domain}-{ratio:g}"
    if ratio == 0:
        first = initial_a(model, None, settings, **among)
        return train(model, rows, settings, place, replay=wanted.replay, initial=first, name=domain)
    load = Load(rank=settings.rank, batch=settings.batch)
    plan = plan_prune(model, ratio=ratio, score=wanted.score, load=load, seed=wanted.seed)  # type: ignore[arg-type]
    small = aligned(model, plan)
    first = initial_a(model, plan, settings, **among)
    trained = train(small, rows, settings, place, replay=wanted.replay, initial=first, name=domain)
    _log.info("%s: trained on %.0f %% of the model, %s", domain, 100 * (1 - plan.ratio), dict(trained.notes))
    return recover(trained, plan, model)


def _shuffled(rows: list[Example], seed: int) -> list[Example]:
    import random

    random.Random(seed).shuffle(rows)
    return rows


# ---------------------------------------------------------------- rows


def run(model: Model, suite: Suite, wanted: Bench, out: Path, work: Path | None = None) -> dict[str, Any]:
    """Train, fuse, ask and measure; write one JSON object.

    Args:
        model: The base.
        suite: Questions by domain.
        wanted: What to compare.
        out: The result's file.
        work: Where finished parts stay; by default in the cache, under a name made of all that decides them.

    Returns:
        What was written: ``methods`` holds for each system its metrics, ``contrasts`` paired intervals.

    Raises:
        UserError: Nothing is above chance, so nothing could be told apart; or the input cannot be used.
    """
    work = work or store.cache_dir() / "fuse" / "bench" / _key(model, suite, wanted)[:16]
    test = bundles(suite.test, wanted.k, wanted.seed, n_bundles=wanted.n_test)
    select = bundles(suite.selection, wanted.k, wanted.seed, n_bundles=wanted.n_selection)
    asking = _Asking(model, test, work / "rows", suite, wanted)
    adapters, others = edges(model, suite, wanted, work)
    rows = {"base": asking.row("base", None)}
    for adapter in adapters:
        rows[f"single:{adapter.name}"] = asking.row(f"single:{adapter.name}", as_change(adapter), dict(adapter.notes))
    for name, adapter in others.items():
        rows[name] = asking.row(name, as_change(adapter), dict(adapter.notes))
    require_signal({name: row.alone for name, row in rows.items()})
    for name, method, resolver in _pairs(wanted):
        found = asking.kept(name)
        if found is None:
            tuned, cost = _tuned(model, suite, adapters, _forms(name, method), resolver, select, wanted)
            facts = cost | {"lam": tuned.method.lam, "form": tuned.variant, "note": tuned.note,
                            "tried": [asdict(t) for t in tuned.tried]}  # fmt: skip
            found = asking.row(name, tuned.change, facts)
        rows[name] = found
    result = _result(model, suite, wanted, rows, [a.name for a in adapters])
    store.write_json_atomic(out, result)
    return result


def _pairs(wanted: Bench) -> Iterator[tuple[str, FuseMethod, Resolver | None]]:
    for words, method in wanted.methods.items():
        yield words, method, None
    for before, resolver in wanted.resolvers.items():
        for words, method in wanted.methods.items():
            if _follows(method, resolver):
                yield f"{before}>{words}", method, resolver


def _forms(words: str, method: FuseMethod) -> Mapping[str, FuseMethod]:
    """Tune a density only where the words that named the method leave it open."""
    return {"": method} if "density=" in words else variants(method)


def _follows(method: FuseMethod, resolver: Resolver) -> bool:
    """Say whether a method can follow a resolver: one of entries leaves no low rank for most."""
    whole = getattr(resolver, "space", "core") == "full"
    return method.resolvable and (not whole or method.takes_entries())


def _tuned(
    model: Model, suite: Suite, adapters: Sequence[Adapter], forms: Mapping[str, FuseMethod], resolver: Resolver | None,
    select: Sequence[Instance], wanted: Bench,
) -> tuple[Tuned, dict[str, Any]]:  # fmt: skip
    ground = Ground(model, suite.selection, wording=suite.template, chat=wanted.chat, shots=answered(suite, 1))
    seconds: list[float] = []
    peak: list[float] = []
    equal = shares(adapters)

    def plan(form: FuseMethod) -> Change:
        start = time.perf_counter()
        with watched(model.device) as cost:
            change = form.plan(adapters, equal, ground, resolver)
        seconds.append(time.perf_counter() - start)
        peak.append(cost.peak_mib)
        return change

    tuned = tune(
        forms, plan, judge(model, select, chat=wanted.chat, wording=suite.template, shots=answered(suite, wanted.k)), len(select),
        first=wanted.first, lams=wanted.lams,
    )  # fmt: skip
    return tuned, {"seconds": min(seconds), "peak_mib": max(peak)}


class _Asking:
    """Asks systems the test's instances, composed and one by one, and keeps every finished system in a file."""

    def __init__(self, model: Model, test: Sequence[Instance], folder: Path, suite: Suite, wanted: Bench) -> None:
        self.model, self.test, self.alone = model, list(test), singles(test)
        self.folder, self.how = folder, {"chat": wanted.chat, "wording": suite.template}
        self.shown, self.shown_alone = answered(suite, wanted.k), answered(suite, 1)
        self.run = _key(model, suite, wanted)  # a folder that the user named may hold another run's systems
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


# ---------------------------------------------------------------- the result


def _result(model: Model, suite: Suite, wanted: Bench, rows: Mapping[str, Row], names: Sequence[str]) -> dict[str, Any]:
    own = {name: rows[f"single:{name}"].composed for name in names}
    oracle = assemble(rows["base"].composed.instances, {name: rows[f"single:{name}"].alone for name in names})
    methods = {name: _numbers(row, own, wanted, rows, names) for name, row in rows.items()}
    methods["oracle"] = measure(oracle).to_dict()
    for numbers in methods.values():
        numbers["by_position"] = list(numbers["by_position"])
    fused = [name for name, _, _ in _pairs(wanted)]
    plain = [name for name in fused if name in wanted.methods]
    best = max(plain, key=lambda n: (methods[n]["all_correct"], n), default=None)
    contrasts: dict[str, Any] = {}
    for name in fused:
        contrasts[name] = {"base": asdict(paired(rows[name].composed, rows["base"].composed))}
        if "joint" in rows:
            contrasts[name]["joint"] = asdict(paired(rows[name].composed, rows["joint"].composed))
        for against in dict.fromkeys(["cat", best, name.partition(">")[2]]):
            if against is not None and against in rows and against != name:
                contrasts[name][against] = asdict(paired(rows[name].composed, rows[against].composed))
    return {
        "verb": "fuse", "model": model.source, "data": suite.name, "n": len(rows["base"].composed.instances),
        "seed": wanted.seed, "environment": environment(model) | {"settings": _told(wanted), "suite": dict(suite.facts)},
        "best_plain": best, "methods": methods, "contrasts": contrasts,
    }  # fmt: skip


def _numbers(
    row: Row, own: Mapping[str, Answers], wanted: Bench, rows: Mapping[str, Row], names: Sequence[str]
) -> dict[str, Any]:
    numbers = measure(row.composed, alone=row.alone, own=own).to_dict()
    alone = measure(row.alone)
    numbers |= {
        "single_correct": alone.part_correct, "single_by_domain": dict(alone.by_domain),
        "likelihood": float(likelihoods(row.composed).mean()), **row.facts,
    }  # fmt: skip
    if row.name != "base":
        right = {
            name: right_by_domain(r.alone) for name, r in rows.items() if name == "base" or name.startswith("single:")
        }
        against = {"base": right["base"]} | {f"single:{n}": {n: right[f"single:{n}"][n]} for n in names}
        numbers["certificate"] = prove(right_by_domain(row.alone), against, wanted.limit, seed=wanted.seed).to_dict()
    return numbers


def _told(wanted: Bench) -> dict[str, Any]:
    plain = {
        k: v
        for k, v in asdict(replace(wanted, methods={}, resolvers={}, replay=())).items()
        if k not in ("methods", "resolvers")
    }
    plain["replay"] = store.key(replay=[[e.prompt, e.target] for e in wanted.replay]) if wanted.replay else ""
    return {
        **plain, "methods": {n: m.to_dict() for n, m in wanted.methods.items()},
        "resolvers": {n: r.to_dict() for n, r in wanted.resolvers.items()},
    }  # fmt: skip


def _key(model: Model, suite: Suite, wanted: Bench) -> str:
    asked_ = {s: [q.key for d in suite.domains for q in suite.questions(s)[d]] for s in ("train", "selection", "test")}
    told = {k: v for k, v in _told(wanted).items() if k not in ("methods", "resolvers", "n_test", "limit")}
    told["template"] = suite.template
    return store.key(model=model.fingerprint, suite=asked_, settings=told)
