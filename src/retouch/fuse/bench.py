"""Compare fusion methods in one harness: edges train on their own domain, the cloud fuses, composed questions judge.

Every system is asked the same instances, composed and one by one. Scales are tuned on selection for all alike. What is
finished stays in a folder, so an interrupted run goes on; adapters are trained once for all methods.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import store
from ..change import Change
from ..measure import environment, watched
from ..model import Model
from ._rows import Asking, Row
from ._scores import Score
from ._units import units_of
from .align import aligned
from .asking import as_change, judge, likelihoods, right_by_domain
from .base import Adapter, Example, FuseMethod, Ground, Resolver, shares
from .certificate import prove
from .compose import Answers, Instance, bundles
from .composed_metrics import assemble, measure, paired, require_signal
from .memory import Load, predicted
from .prune import Align, PrunePlan, plan_prune
from .pruned import PrunedModel
from .recover import recover
from .suites import Suite, answered, examples
from .train import LoraSettings, initial_a, train
from .transfer import of_domain, transfer
from .tuning import LAMS, Tuned, tune, variants

__all__ = ["METHODS", "Bench", "edges", "run"]

Seen = Callable[[str, PrunePlan, PrunedModel, Adapter], None]
_log = logging.getLogger("retouch")
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
        align: What is done to pruned weights before an edge gets them.
        unpruned: Train pruned edges' adapters on the whole model too: what pruning costs.
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
    score: Score = "wanda"
    align: Align = "bias"
    unpruned: bool = False
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


# ---------------------------------------------------------------- edges


def edges(
    model: Model, suite: Suite, wanted: Bench, work: Path, seen: Seen | None = None
) -> tuple[list[Adapter], dict[str, Adapter]]:
    """Train an adapter for each domain on its edge's pruned model and recover it; and one on all domains.

    Args:
        model: The base.
        suite: What the edges learn from.
        wanted: How.
        work: Where finished parts stay.
        seen: Called with each pruned edge's domain, plan, model and adapter as they are at the edge.

    Returns:
        The recovered adapters in the order of the domains, and by name those that are only compared with.
    """
    own = {
        d: examples(suite, d, _form(wanted), wanted.per_edge or None, wanted.seed, k=wanted.k) for d in suite.domains
    }
    found, others = [], {}
    for i, domain in enumerate(suite.domains):
        ratio = wanted.ratios[i % len(wanted.ratios)]
        found.append(_edge(model, domain, own[domain], ratio, i, len(own), wanted, work, seen))
        if ratio and wanted.unpruned:
            others[f"unpruned:{domain}"] = _edge(model, domain, own[domain], 0.0, i, len(own), wanted, work)
    if not wanted.joint:
        return found, others
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
    return found, others | {"joint": joint}


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
    seen: Seen | None = None,
) -> Adapter:
    settings, among, load = _settings(wanted, number), {"edge": number, "n_edges": n_edges}, _load(wanted)
    how = f"{ratio:g}-{wanted.score}-{wanted.align}" if ratio else "0"
    place = work / "edges" / f"{number}-{domain}-{how}"
    if ratio == 0:
        first = initial_a(model, None, settings, **among)
        return train(model, rows, settings, place, replay=wanted.replay, initial=first, name=domain)
    plan = plan_prune(model, ratio=ratio, score=wanted.score, align=wanted.align, load=load, seed=wanted.seed)
    small = aligned(model, plan)
    first = initial_a(model, plan, settings, **among)
    trained = train(small, rows, settings, place, replay=wanted.replay, initial=first, name=domain)
    _log.info("%s: trained on %.0f %% of the model, %s", domain, 100 * (1 - plan.ratio), dict(trained.notes))
    if seen is not None:
        seen(domain, plan, small, trained)
    return recover(trained, plan, model)


def _load(wanted: Bench) -> Load:
    return Load(rank=wanted.lora.rank, batch=wanted.lora.batch)


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
    asking = Asking(model, suite, test, work / "rows", _key(model, suite, wanted), wanted.k, wanted.chat)
    adapters, others = edges(model, suite, wanted, work, asking.edge)
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
    result = _result(model, suite, wanted, rows, [a.name for a in adapters]) | _transfers(asking, rows, _load(wanted))
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


def _transfers(asking: Asking, rows: Mapping[str, Row], load: Load) -> dict[str, Any]:
    """Return for each pruned edge what its questions lose on the way, and the memory that pruning saves it."""
    told = {}
    for domain, (plan, steps) in asking.edges.items():
        names = {"base": "base", "recovered": f"single:{domain}", "unpruned": f"unpruned:{domain}"}
        steps |= {step: of_domain(rows[n].alone, domain) for step, n in names.items() if n in rows}
        whole = predicted(asking.model, units_of(asking.model), {}, load)
        sizes = {"ratio": plan.ratio, "edge_mib": plan.peak["total"], "whole_mib": round(whole.mib, 3)}
        told[domain] = sizes | transfer(steps)
    return {"transfer": told} if told else {}


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
