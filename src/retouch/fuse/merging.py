"""Fuse opened adapters as a user asks for it: report the conflict, tune, fuse, certify, and only then keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..change import Change
from ..errors import UserError
from ..model import Model
from ..report import Report, Table
from ._adapter_config import MAX_RANK
from ._notes import fusion_notes, notes_tables
from ._units import units_of
from .adapter_file import open_adapter, ranks_of, write_adapter
from .asking import judge
from .base import Adapter, FuseMethod, Ground, Kept, Resolver, shares
from .certificate import Proof
from .compose import bundles
from .conflict import measure, report_of
from .fusing import gathered
from .proving import alone, check_selection, proved
from .screen import screen, screen_table
from .suites import Suite, answered
from .tuning import LAMS, Tuned, tune, variants

__all__ = [
    "Merged",
    "conflict_report",
    "fused_ranks",
    "fused_report",
    "merge",
    "merge_to_folder",
    "open_adapters",
    "refuse_replacing",
    "seen_by_edges",
]

Moments = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Merged:
    """A fusion with what was learnt on the way.

    Attributes:
        change: The fused change of the base. Its notes say how it was made, with the certificate.
        tuned: How the scale was chosen; None where it was given.
        proof: The certificate; None where none was asked for.
        report: All of it for people and programs.
    """

    change: Change
    tuned: Tuned | None
    proof: Proof | None
    report: Report


# ---------------------------------------------------------------- before anything is fused


def open_adapters(
    paths: Sequence[Path], model: Model, *, base_unverified: bool = False, targets_from_tensors: bool = False
) -> list[Adapter]:
    """Open adapters of whatever origin as `open_adapter` does, each called after its folder.

    Raises:
        UserError: Two folders have one name.
        StoreError: As `open_adapter`.
    """
    names = [path.name for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"Two adapters are called {sorted(twice)[0]!r}; reports could not tell them apart. Rename a folder."
        )
    return [
        open_adapter(path, model, base_unverified=base_unverified, targets_from_tensors=targets_from_tensors)
        for path in paths
    ]


def seen_by_edges(adapter: Adapter, model: Model) -> Adapter:
    """Fill in what the edge of a recovered adapter could see, where its record does not say it, as older ones do not.

    The family's table says along which axis a weight is pruned; recovering leaves exact zeros there where an edge had no
    row or column.
    """
    if adapter.kept or not adapter.plan or "kept" in adapter.notes:
        return adapter
    units = units_of(model)
    kept: dict[str, Kept] = {}
    for name in (n for n in adapter.parts if n.split(".", 2)[2] in units.parts):
        axis, part = units.axis(name.split(".", 2)[2]), adapter.parts[name]
        held = (part.left.abs().amax(1) if axis == "rows" else part.right.abs().amax(0)) > 0
        if bool(held.any()) and not bool(held.all()):  # all of it zero: nothing was learnt there
            kept[name] = Kept(axis, tuple(torch.nonzero(held).flatten().tolist()))
    return dataclasses.replace(adapter, kept=kept)


def refuse_replacing(out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Refuse a place for the result that is, or holds, what is to be fused.

    Raises:
        UserError: It does.
    """
    place = Path(out).resolve()
    for given in map(Path, inputs):
        there = given.resolve()
        if given.exists() and (there == place or place in there.parents):
            raise UserError(
                f"The result would replace {given}, which it is made of. Choose another folder than {out} (-o)."
            )


def fused_ranks(
    model: Model,
    adapters: Sequence[Adapter],
    method: FuseMethod,
    weights: Sequence[float] | Literal["examples"] | None = None,
    resolver: Resolver | None = None,
) -> dict[str, int]:
    """Return the rank of every weight's fused difference as an adapter's file announces it; nothing is fused.

    Weights that only adapters of weight 0 change are left out.

    Raises:
        UserError: A rank is above what an adapter may have.
    """
    share = shares(adapters, weights)
    heard = [ranks_of(a) for a, w in zip(adapters, share) if w != 0 or method.chooses]
    found: dict[str, int] = {}
    for name in dict.fromkeys(name for ranks in heard for name in ranks):
        shape = model.anatomy.shape(name)
        found[name] = method.out_rank([r.get(name, 0) for r in heard], (shape[0], shape[1]), resolver)
        if found[name] > MAX_RANK:
            raise UserError(
                f"{method.label} gives {name} the rank {found[name]:,}, and an adapter may have {MAX_RANK:,}. Keep the "
                "result as a change or a model (--as), or fuse by svd with a rank."
            )
    return found


def conflict_report(
    model: Model,
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    *,
    pictures: bool = True,
) -> Report:
    """Say where adapters contradict each other and which of them are unlike the others; nothing is fused."""
    names, found = [a.name for a in adapters], measure(adapters, weights, seed=seed)
    report = report_of(found, names, model.source, weights=shares(adapters, weights), pictures=pictures)
    return dataclasses.replace(report, tables=(*report.tables, screen_table(screen(adapters))))


# ---------------------------------------------------------------- fusion


def merge(
    model: Model,
    adapters: Sequence[Adapter],
    method: FuseMethod,
    *,
    weights: Sequence[float] | Literal["examples"] | None = None,
    resolver: Resolver | None = None,
    suite: Suite | None = None,
    moments: Moments = (),
    tuned: bool = False,
    fixed: Collection[str] = (),
    lams: Sequence[float] = LAMS,
    n_selection: int = 6,
    limit: float | None = None,
    delta: float = 0.05,
    n_certify: int | None = None,
    chat: bool = False,
    pictures: bool = True,
) -> Merged:
    """Fuse adapters into one change of their base.

    Args:
        model: The base.
        adapters: At least one, recovered to the base's sizes.
        method: How.
        weights: One a adapter, or ``examples``; equal if not given.
        resolver: What lessens conflict first.
        suite: Questions of the adapters' domains, for tuning and for the certificate.
        moments: For each adapter the second moments of what flows into each weight, for `regmean`.
        tuned: Choose the scale on the suite's selection questions, and with it the method's density.
        fixed: Settings that tuning leaves as they are, also where they have their default. Others than the default
            are left alone anyway.
        lams: Scales that are tried.
        n_selection: Bundles of selection questions.
        limit: The drop on any domain that is allowed, against the base and against the adapter that is best there.
        delta: Probability that the certificate is wrong.
        n_certify: Questions of each domain that certify; all of test if not given.
        chat: Ask through the chat template.
        pictures: With the heat map of the report, which needs matplotlib.

    Returns:
        The fusion. A limit that does not hold is not raised here: see `Merged.proof`.

    Raises:
        UserError: The adapters do not belong together, or tuning or a limit is asked for without a suite.
    """
    if (tuned or limit is not None) and suite is None:
        raise UserError("Tuning the scale, and certifying a drop, need questions of the domains: give --data.")
    if limit is not None and suite is not None:
        check_selection(suite)
    share = shares(adapters, weights)
    ground = _ground(model, suite, chat, moments)

    def plan(form: FuseMethod) -> Change:
        return form.plan(adapters, share, ground, resolver)

    chosen = None
    if tuned and suite is not None:
        k = min(4, len(suite.domains))
        rows = bundles(suite.selection, k, method.seed, n_bundles=n_selection) if k > 1 else alone(suite.selection)
        shown = answered(suite, len(rows[0].parts))
        asks = judge(model, rows, chat=chat, wording=suite.template, shots=shown)
        chosen = tune(_forms(method, fixed), plan, asks, len(rows), lams=lams)
    change = chosen.change if chosen else plan(method)
    proof = None
    if limit is not None and suite is not None:
        proof = proved(model, adapters, change, suite, limit, delta=delta, n=n_certify, chat=chat)
    final = chosen.method if chosen else method
    notes = fusion_notes(adapters, change.notes["weights"], final, resolver, change.notes, tuned=chosen, proof=proof)
    change = dataclasses.replace(change, notes=notes)
    found = conflict_report(model, adapters, share, method.seed, pictures=pictures)
    return Merged(change, chosen, proof, fused_report(found, notes, chosen, proof))


def merge_to_folder(
    model: Model,
    adapters: Sequence[Adapter],
    method: FuseMethod,
    out: str | Path,
    *,
    weights: Sequence[float] | Literal["examples"] | None = None,
    resolver: Resolver | None = None,
    moments: Moments = (),
) -> dict[str, Any]:
    """Fuse into a PEFT folder weight by weight: one weight's factors are in memory at a time.

    Methods that choose the weights by questions need `merge`, and `write_adapter` after it.

    Returns:
        What the folder's record says of the fusion.

    Raises:
        UserError: As `merge`; or the folder is one of those that are fused.
        StoreError: The folder cannot be written.
    """
    refuse_replacing(out, [f["path"] for a in adapters if isinstance(f := a.notes.get("file"), dict) and "path" in f])
    share = shares(adapters, weights)
    ranks = fused_ranks(model, adapters, method, share, resolver)
    told: dict[str, dict[str, float]] = {}
    parts = gathered(method.stream(adapters, share, _ground(model, None, False, moments), resolver), told)
    notes: dict[str, Any] = {}

    def said() -> dict[str, Any]:
        notes.update(fusion_notes(adapters, share, method, resolver, told))
        return notes

    write_adapter(out, (pair for pair in parts if pair[0] in ranks), ranks, model, notes=said)
    return notes


def _ground(model: Model, suite: Suite | None, chat: bool, moments: Moments) -> Ground:
    if suite is None:
        return Ground(model, moments=moments)
    return Ground(model, suite.selection, moments, suite.template, chat, answered(suite, 1))


def _forms(method: FuseMethod, fixed: Collection[str]) -> Mapping[str, FuseMethod]:
    """Tune a density only where it was left open."""
    default = {f.name: f.default for f in dataclasses.fields(method)}.get("density")
    left_open = "density" not in fixed and getattr(method, "density", None) == default
    return variants(method) if left_open else {"": method}


def fused_report(
    conflict: Report, notes: Mapping[str, Any], tuned: Tuned | None = None, proof: Proof | None = None
) -> Report:
    """Put what was fused, and what was found out on the way, beside the report of conflict.

    Args:
        conflict: What `conflict_report` gave.
        notes: Those of the fused change, or of the folder.
        tuned: How the scale was chosen.
        proof: The certificate.
    """
    tables: list[Table] = list(conflict.tables[:-1])
    if tuned is not None:
        rows = tuple((t.variant or "as given", t.lam, t.n, t.score) for t in tuned.tried)
        columns = ("form", "scale", "instances", "log-likelihood")
        tables.append(Table("Scales that were tried", columns, rows, tuned.note))
    if proof is not None:
        tables += proof.tables()
    tables += [*notes_tables(notes), conflict.tables[-1]]
    numbers = {**notes, "adapters": notes["fused"], "conflict": conflict.numbers}
    sentence = f"{len(notes['adapters'])} adapters fused by {notes['method']}. {conflict.summary}"
    report = dataclasses.replace(conflict, title="Fused adapters", summary=sentence, tables=tuple(tables))
    return dataclasses.replace(report, numbers=numbers)
