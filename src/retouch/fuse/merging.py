"""Fuse opened adapters as a user asks for it: report the conflict, tune, fuse, certify, and only then keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..change import Change
from ..errors import UserError
from ..model import Model
from ..report import Report, Table
from .adapter_file import ranks_of, write_adapter
from .asking import as_change, asked, judge, right_by_domain
from .base import Adapter, FuseMethod, Ground, Kept, Resolver, shares
from .certificate import Proof, attempt, prove
from .compose import Instance, bundles, singles
from .conflict import measure, report_of
from .screen import screen, screen_table
from .suites import Suite
from .tuning import LAMS, Tuned, tune, variants

__all__ = ["Merged", "conflict_report", "merge", "merge_to_folder", "seen_by_edges"]


@dataclass(frozen=True, eq=False)
class Merged:
    """A fusion with what was learnt on the way.

    Attributes:
        change: The fused change of the base.
        tuned: How the scale was chosen; None where it was given.
        proof: The certificate; None where none was asked for.
        report: All of it for people and programs.
    """

    change: Change
    tuned: Tuned | None
    proof: Proof | None
    report: Report


def seen_by_edges(adapter: Adapter) -> Adapter:
    """Fill in what the edge of a recovered adapter could see, where only its file is left.

    Recovering leaves exact zeros where an edge had no row or column, and training leaves none anywhere else.
    """
    if adapter.kept or not adapter.plan:
        return adapter
    kept: dict[str, Kept] = {}
    for name, part in adapter.parts.items():
        rows, columns = part.left.abs().amax(1) > 0, part.right.abs().amax(0) > 0
        for axis, held in (("rows", rows), ("columns", columns)):
            if bool(held.any()) and not bool(held.all()):  # all of it zero: nothing was learnt there
                kept[name] = Kept(axis, tuple(torch.nonzero(held).flatten().tolist()))  # type: ignore[arg-type]
    return dataclasses.replace(adapter, kept=kept)


def conflict_report(
    model: Model, adapters: Sequence[Adapter], weights: Sequence[float] | None = None, seed: int = 0
) -> Report:
    """Say where adapters contradict each other and which of them are unlike the others; nothing is fused."""
    names = [a.name for a in adapters]
    report = report_of(measure(adapters, weights, seed=seed), names, model.source)
    return dataclasses.replace(report, tables=(*report.tables, screen_table(screen(adapters))))


def merge(
    model: Model,
    adapters: Sequence[Adapter],
    method: FuseMethod,
    *,
    weights: Sequence[float] | Literal["examples"] | None = None,
    resolver: Resolver | None = None,
    suite: Suite | None = None,
    tuned: bool = False,
    lams: Sequence[float] = LAMS,
    n_selection: int = 6,
    limit: float | None = None,
    delta: float = 0.05,
    n_certify: int | None = None,
    chat: bool = False,
) -> Merged:
    """Fuse adapters into one change of their base.

    Args:
        model: The base.
        adapters: At least one, recovered to the base's sizes.
        method: How.
        weights: One a adapter, or ``examples``; equal if not given.
        resolver: What lessens conflict first.
        suite: Questions of the adapters' domains, for tuning and for the certificate.
        tuned: Choose the scale on the suite's selection questions.
        lams: Scales that are tried.
        n_selection: Bundles of selection questions.
        limit: The drop on any domain that is allowed, against the base and against the domain's own adapter.
        delta: Probability that the certificate is wrong.
        n_certify: Questions of each domain that certify; all of test if not given.
        chat: Ask through the chat template.

    Returns:
        The fusion. A limit that does not hold is not raised here: see `Merged.proof`.

    Raises:
        UserError: The adapters do not belong together, or tuning or a limit is asked for without a suite.
    """
    if (tuned or limit is not None) and suite is None:
        raise UserError("Tuning the scale, and certifying a drop, need questions of the domains: give --data.")
    share = shares(adapters, weights)
    ground = _ground(model, suite, chat)

    def plan(form: FuseMethod) -> Change:
        return form.plan(adapters, share, ground, resolver)

    chosen = None
    if tuned and suite is not None:
        k = min(4, len(suite.domains))
        rows = bundles(suite.selection, k, method.seed, n_bundles=n_selection) if k > 1 else _alone(suite.selection)
        asks = judge(model, rows, chat=chat, wording=suite.template)
        chosen = tune(_forms(method), plan, asks, len(rows), lams=lams)
    change = chosen.change if chosen else plan(method)
    proof = None
    if limit is not None and suite is not None:
        proof = _proved(model, adapters, change, suite, limit, delta, n_certify, chat)
    return Merged(change, chosen, proof, _report(model, adapters, share, change, chosen, proof))


def merge_to_folder(
    model: Model,
    adapters: Sequence[Adapter],
    method: FuseMethod,
    out: Path,
    *,
    weights: Sequence[float] | Literal["examples"] | None = None,
    resolver: Resolver | None = None,
) -> None:
    """Fuse into a PEFT folder weight by weight: one weight's factors are in memory at a time.

    Methods that choose the weights by questions need `merge`, and `write_adapter` after it.

    Raises:
        UserError: As `merge`.
        StoreError: The folder cannot be written.
    """
    share = shares(adapters, weights)
    ranks: dict[str, int] = {}
    for adapter in adapters:
        for name, rank in ranks_of(adapter).items():
            ranks[name] = ranks.get(name, 0) + rank
    ranks = {name: min(rank, *model.anatomy.shape(name)) for name, rank in ranks.items()}
    parts = method.stream(adapters, share, Ground(model), resolver)
    write_adapter(out, parts, ranks, model, notes=_notes(adapters, share, method, resolver))


def _ground(model: Model, suite: Suite | None, chat: bool) -> Ground:
    if suite is None:
        return Ground(model)
    return Ground(model, suite.selection, wording=suite.template, chat=chat)


def _forms(method: FuseMethod) -> Mapping[str, FuseMethod]:
    """Tune a density only where it was left as it is by default."""
    default = {f.name: f.default for f in dataclasses.fields(method)}.get("density")
    return variants(method) if getattr(method, "density", None) == default else {"": method}


def _notes(
    adapters: Sequence[Adapter], share: Sequence[float], method: FuseMethod, resolver: Resolver | None
) -> dict[str, Any]:
    return {
        "fused": {a.name: w for a, w in zip(adapters, share)},
        "plans": sorted({a.plan for a in adapters if a.plan}),
        "method": method.name,
        "settings": method.to_dict(),
        "resolver": None if resolver is None else {"name": resolver.name, **resolver.to_dict()},
    }


def _alone(questions: Mapping[str, Sequence[Any]]) -> list[Instance]:
    return [Instance(i, (q,)) for i, q in enumerate(q for own in questions.values() for q in own)]


def _proved(
    model: Model, adapters: Sequence[Adapter], change: Change, suite: Suite, limit: float, delta: float,
    n: int | None, chat: bool,
) -> Proof:  # fmt: skip
    """Ask every test question once: the base, each domain's own adapter and the fused model."""
    rows = singles(_alone({d: sorted(q, key=lambda x: x.key)[:n] for d, q in suite.test.items()}))
    how = {"chat": chat, "wording": suite.template}
    references = {"base": right_by_domain(asked(model, None, rows, **how))}
    for adapter in adapters:
        if adapter.name in suite.domains:
            own = [i for i in rows if i.parts[0].domain == adapter.name]
            references[f"adapter {adapter.name}"] = right_by_domain(asked(model, as_change(adapter), own, **how))
    fused = right_by_domain(asked(model, change, rows, **how))
    return prove(fused, references, limit, delta=delta, attempt=attempt([i.parts[0].key for i in rows]))


def _report(
    model: Model, adapters: Sequence[Adapter], share: Sequence[float], change: Change, chosen: Tuned | None,
    proof: Proof | None,
) -> Report:  # fmt: skip
    names = [a.name for a in adapters]
    found = report_of(measure(adapters, share), names, model.source)
    tables: list[Table] = list(found.tables)
    if chosen is not None:
        rows = tuple((t.variant or "as given", t.lam, t.n, t.score) for t in chosen.tried)
        tables.append(
            Table("Scales that were tried", ("form", "scale", "instances", "log-likelihood"), rows, chosen.note)
        )
    if proof is not None:
        tables.append(proof.table())
    tables += _weighed(change)
    tables.append(screen_table(screen(adapters)))
    numbers = {
        "method": change.method, "settings": dict(change.settings), "conflict": found.numbers,
        "adapters": dict(zip(names, change.notes.get("weights", share))), "weighing": change.notes.get("weighing"),
        "proof": None if proof is None else proof.to_dict(),
    }  # fmt: skip
    sentence = f"{len(adapters)} adapters fused by {change.method}. {found.summary}"
    return Report("Fused adapters", sentence, model.source, tuple(tables), found.pictures, numbers)


def _weighed(change: Change) -> list[Table]:
    """Show the weights that a method has chosen, and what each domain's bound costs."""
    told = change.notes.get("weighing")
    if not told:
        return []
    rows = tuple(zip(change.notes["adapters"], change.notes["weights"]))
    tables = [Table("Weights that were chosen", ("adapter", "weight"), rows, "Chosen on selection questions.")]
    if "multipliers" in told:
        columns = ("multipliers", "harm", "harm_allowed", "drop", "reference")
        prices = tuple((domain, *(told[c][domain] for c in columns)) for domain in told["multipliers"])
        heads = ("domain", "multiplier", "harm in nats", "allowed", "drop", "against")
        tables.append(Table("What the bounds cost", heads, prices, told["meaning"]))
    return tables
