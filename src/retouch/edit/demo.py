"""The tour behind ``retouch demo``: real facts, a real model, two methods, the harm, an undo, a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import registry
from .._pictures import need
from ..bound import certify
from ..change import Change, combine
from ..errors import NoEffect, UserError
from ..ledger import Ledger, difference, open_ledger, save_ledger
from ..measure import continuations, next_logp, watched
from ..model import Model
from ..progress import report as tell
from ..report import Report, Table, plot_drift, plot_ranks, plot_where, write_html
from ..store import refuse_place
from ..tokens import Text, encode
from . import facts as samples
from .api import check_effect
from .facts import Fact
from .harm import Bystanders, Harm, bystanders, measure_harm

__all__ = ["tour"]

METHODS = ("rome", "memit")


@dataclass(frozen=True, eq=False)
class _Run:
    """One method's edit of all facts."""

    method: str
    ledger: Ledger
    seconds: float
    ranks: list[int]
    said: list[str]
    harm: Harm

    @property
    def change(self) -> Change:
        return combine(self.ledger.active)


def tour(source: str, out: Path, *, n: int = 8, max_harm: float = 0.05) -> Report:
    """Ask, edit with two methods, measure what else changed, undo, and write a report.

    Args:
        source: A decoder.
        out: Folder for ``report.html`` and the edited model.
        n: Facts to edit.
        max_harm: Limit of the certificate.

    Returns:
        The report; its numbers are what ``--json`` writes.

    Raises:
        UserError: A number is not allowed, or the folder or the pictures cannot be made.
        NoEffect: An edit did not take, or the undo was not exact.
    """
    every = samples.demo()
    if not 1 <= n <= len(every):
        raise UserError(f"The demo has {len(every)} facts; --n must lie between 1 and that, got {n}.")
    certify([0.0], max_harm)  # a limit that is none, and what cannot be written, are refused before any work
    need("jinja2")
    need("matplotlib")
    refuse_place(out / "model")
    if (out / "model").exists() and not (out / "model" / "ledger").is_dir():
        raise UserError(f"{out / 'model'} exists and is no model of ours. Name another folder with -o.")
    facts, asked = every[:n], every[: max(n, 12)]
    base = open_ledger(source)
    before = continuations(base.model, [f.filled for f in asked], 8)
    ranks = _ranks(base.model, facts)
    others = bystanders(base.model, facts)
    runs = [_run(method, base, facts, asked, others, max_harm) for method in METHODS]
    proof = _undo(runs[0].ledger, number=min(3, n))
    save_ledger(runs[0].ledger, out / "model")
    made = _report(base.model, facts, asked, before, ranks, runs, proof, others)
    write_html(made, out / "report.html")
    return made


def _run(
    method: str, base: Ledger, facts: Sequence[Fact], asked: Sequence[Fact], others: Bystanders, max_harm: float
) -> _Run:
    """Edit all facts: ROME as a change each, on the model with the earlier ones; MEMIT as one change of all."""
    chosen = registry.make("edit", method)
    ledger = base
    groups = [[f] for f in facts] if method == "rome" else [list(facts)]
    with watched() as cost:
        for k, group in enumerate(groups):
            tell(f"Editing with {method}", k, len(groups))
            ledger = ledger.apply(chosen.plan(ledger.model, group))
        tell(f"Editing with {method}", len(groups), len(groups))
    check_effect(base.model, ledger.model, facts)
    said = continuations(ledger.model, [f.filled for f in asked], 8)
    harm = measure_harm(ledger.model, others, max_harm)
    return _Run(method, ledger, cost.seconds, _ranks(ledger.model, facts), said, harm)


def _ranks(model: Model, facts: Sequence[Fact]) -> list[int]:
    """Rank of each new answer's first own token: the first one in which it differs from the old answer."""
    texts, wanted = [], []
    for fact in facts:
        new = encode(model.tokenizer, [Text(fact.before, fact.subject, fact.after, fact.target)])[0]
        old = encode(model.tokenizer, [Text(fact.before, fact.subject, fact.after, fact.truth or "")])[0]
        shared = next((i for i, (a, b) in enumerate(zip(new.target, old.target)) if a != b), 0)
        lead = model.tokenizer.decode(list(new.target[:shared]))
        texts.append(Text(fact.before, fact.subject, f"{fact.after}{lead}"))
        wanted.append(new.target[shared])
    logp = next_logp(model, texts)
    own = logp.gather(1, torch.tensor(wanted)[:, None])
    return [int(r) + 1 for r in (logp > own).sum(1)]


def _undo(ledger: Ledger, number: int) -> dict[str, Any]:
    """Undo one change, then all, and prove both exact.

    Raises:
        NoEffect: A weight differs in a single bit.
    """
    without = ledger.undo(number)
    fresh = Ledger(_undone(ledger).model)
    for entry in ledger.entries:
        if entry.number != number:
            fresh = fresh.apply(entry.change)
    none = _undone(ledger)
    if difference(without.model, fresh.model) or none.model.base is not None:
        raise NoEffect("After the undo a weight differs from what it would be had the change never been made.")
    return {
        "number": number,
        "fact": dict(ledger.entries[number - 1].change.facts[0]),
        "weights_compared": sum(1 for _ in without.model.network.parameters()),
        "equal_to_never_applied": True,
        "base_fingerprint": ledger.model.base_fingerprint,
        "fingerprint_after_undoing_all": none.model.fingerprint,
    }


def _undone(ledger: Ledger) -> Ledger:
    for entry in ledger.entries:
        if entry.active:
            ledger = ledger.undo(entry.number)
    return ledger


def _short(text: str) -> str:
    return text.strip().split("\n")[0].strip()


def _report(
    model: Model,
    facts: Sequence[Fact],
    asked: Sequence[Fact],
    before: Sequence[str],
    ranks: Sequence[int],
    runs: Sequence[_Run],
    proof: dict[str, Any],
    others: Bystanders,
) -> Report:
    names = [r.method for r in runs]
    answers = Table(
        "Answers before and after",
        ("prompt", "asked for", "before", *names),
        tuple(
            (
                f.filled,
                f.target if i < len(facts) else "(left alone)",
                _short(before[i]),
                *(_short(r.said[i]) for r in runs),
            )
            for i, f in enumerate(asked)
        ),
        f"Greedy continuations, 8 tokens. The first {len(facts)} facts were edited, the rest were not.",
    )
    counted = Table(
        "What else changed",
        ("prompts", "how many", *(f"{m}: answer changed" for m in names), *(f"{m}: mean drift, nats" for m in names)),
        tuple(
            (
                g,
                len(ps),
                *(_percent(r.harm.changed[g]) for r in runs),
                *(round(float(r.harm.drift[g].mean()), 4) for r in runs),
            )
            for g, ps in others.prompts.items()
        ),
        "Changed: another likeliest next token. Drift: KL(before, after) of the next token.",
    )
    certified = Table(
        "Certificates",
        ("harm", "limit", *(f"{m}: at most (95 %)" for m in names), *(f"{m}: verdict" for m in names)),
        tuple(
            (
                c.what,
                c.limit,
                *(round(r.harm.certificates[k].upper, 4) for r in runs),
                *("kept" if r.harm.certificates[k].holds else "would be refused" for r in runs),
            )
            for k, c in enumerate(runs[0].harm.certificates)
        ),
        "One-sided upper bounds of the mean harm on held-out prompts and on neutral text.",
    )
    measured = Table(
        "Numbers",
        ("method", "facts first", "perplexity ratio", "seconds a fact", "numbers in the change"),
        tuple(
            (
                r.method,
                f"{sum(k == 1 for k in r.ranks)} of {len(facts)}",
                round(r.harm.perplexity_ratio, 4),
                round(r.seconds / len(facts), 2),
                r.change.n_numbers,
            )
            for r in runs
        ),
    )
    undone = Table(
        "Undo",
        ("what", "result"),
        (
            (f"Undo change {proof['number']} ({proof['fact']['subject']} -> {proof['fact']['target']})", "done"),
            (f"{proof['weights_compared']} weights against a model that never had it", "equal, bit for bit"),
            ("Undo all: fingerprint of the model", proof["fingerprint_after_undoing_all"][:16]),
            ("Fingerprint before any edit", proof["base_fingerprint"][:16]),
        ),
    )
    pictures = [plot_ranks([f"{f.subject} -> {f.target}" for f in facts], ranks, runs[0].ranks)]
    pictures.append(plot_drift({f"{r.method}: {g}": d.tolist() for r in runs for g, d in r.harm.drift.items()}))
    pictures += [plot_where(_shares(r.change, model), model.anatomy.n_blocks) for r in runs]
    first = sum(k == 1 for k in runs[0].ranks)
    return Report(
        title=f"Retouch demo: {len(facts)} facts corrected in {model.source}",
        summary=(
            f"{first} of {len(facts)} new answers come first after ROME, {sum(k == 1 for k in runs[1].ranks)} after MEMIT; "
            f"one edit was undone bit for bit."
        ),
        model=f"{model.source} ({model.anatomy.family}, {model.anatomy.n_blocks} blocks, {model.fingerprint[:12]})",
        tables=(answers, counted, certified, measured, undone),
        pictures=tuple(pictures),
        numbers=_numbers(facts, before, ranks, runs, proof),
        notes=(
            "ROME wrote each fact alone, one after another; MEMIT wrote all together over five blocks.",
            "A certificate that would be refused is shown as it is: `retouch edit --max-harm` stops there with exit code 3.",
        ),
    )


def _percent(changed: Tensor) -> str:
    return f"{float(changed.float().mean()):.1%}"


def _shares(change: Change, model: Model) -> dict[str, float]:
    return {n: v["share_of_weight"] for n, v in change.norms(model).items()}


def _numbers(
    facts: Sequence[Fact], before: Sequence[str], ranks: Sequence[int], runs: Sequence[_Run], proof: dict[str, Any]
) -> dict[str, Any]:
    return {
        "facts": [
            {
                "prompt": f.filled,
                "target": f.target,
                "before": _short(before[i]),
                "rank_before": ranks[i],
                **{f"{r.method}_answer": _short(r.said[i]) for r in runs},
                **{f"{r.method}_rank": r.ranks[i] for r in runs},
            }
            for i, f in enumerate(facts)
        ],
        "methods": {r.method: {"seconds": round(r.seconds, 1), **r.harm.to_dict()} for r in runs},
        "undo": proof,
    }
