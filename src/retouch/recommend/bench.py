"""Compare recommenders in one harness: same data, splits, codes and evaluation, and harm against one reference."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import store
from ..errors import StoreError
from ..measure import environment
from ..model import Model
from ._bundle_files import plain
from ._fitting import require_watched
from .api import Prepared, check_device, look
from .base import Recommender, Run, Scorer
from .certificate import Terms, certify
from .evaluate import evaluate
from .evidence import Evidence, collect, require_kept
from .fitted import PolicyScorer
from .generator_fit import fit_reference
from .lwgr import LWGR
from .metrics import paired
from .reference import ReferenceSettings
from .scorer import GenerativeScorer

__all__ = ["METHODS", "Bench", "run"]

METHODS = "popularity,sasrec,reference,reference:seed=1,continued,lwgr,lwgr:constraint=none,lwgr:knowledge=shuffled,kar"
_METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")


@dataclass(frozen=True, eq=False)
class Bench:
    """What is compared.

    Attributes:
        methods: By the words that named them.
        reference: How the reference is trained that all policies start from and are measured against.
        limit: The harm that is allowed, nats per code.
        n_history: How many of the latest items are read.
        filter_seen: Also measure with items hidden that a history already holds.
        device: Where to compute.
        seed: Of the resampling.
    """

    methods: Mapping[str, Recommender]
    reference: ReferenceSettings
    limit: float = 0.03
    n_history: int = 20
    filter_seen: bool = True
    device: str = "cpu"
    seed: int = 0


def run(prepared: Prepared, wanted: Bench, model: Model | None, out: Path) -> dict[str, Any]:
    """Fit and measure every method, and write one JSON object. What is finished is found again.

    The harms of many methods on the same users are for comparison: each stands at the confidence of one look, so none
    is a certificate, and a row says so (``certified``). Every policy that is measured counts as a look at these users.

    Returns:
        What was written: ``methods`` by name, with paired differences from the reference under ``against_reference``
        and from ``continued`` under ``against_continued``.

    Raises:
        UserError: There is no such device, or a method lacks something, such as the language model.
    """
    check_device(wanted.device)
    p = prepared
    require_kept(p.splits)
    for method in wanted.methods.values():
        if isinstance(method, LWGR):
            require_watched(method, p.data, p.splits)
    generator = fit_reference(
        p.data, p.splits, p.catalogue, wanted.reference, p.folder, n_history=wanted.n_history, device=wanted.device
    ).eval()
    base = GenerativeScorer(generator, p.catalogue, p.data)
    given = Run(p.data, p.splits, p.catalogue, p.folder, generator, model, wanted.n_history, wanted.device)
    work = p.folder / "bench" / _key(p, wanted, model)[:12]
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for words, method in wanted.methods.items():
        place = work / f"{store.key(method=method.name, settings=method.to_dict())[:16]}.json"
        if (kept := _kept(place)) is None:
            kept = _measured(p, wanted, method, given, base)
            store.write_json_atomic(place, kept)
        rows[words] = kept
    result = {
        "verb": "recommend", "model": None if model is None else model.source, "data": p.data.name,
        "n": len(p.data.users), "seed": wanted.seed,
        "environment": environment(model) | {
            "reference": wanted.reference.to_dict(), "splits": {"how": p.splits.how, "holdout": p.splits.holdout,
            "seed": p.splits.seed}, "notes": dict(p.data.notes),
        },
        "methods": {name: _told(name, row, rows) for name, row in rows.items()},
    }  # fmt: skip
    store.write_json_atomic(out, result)
    return result


def _kept(place: Path) -> dict[str, Any] | None:
    try:
        return dict(store.read_json(place)) if place.is_file() else None
    except StoreError:
        return None


def _measured(p: Prepared, wanted: Bench, method: Recommender, given: Run, base: Scorer) -> dict[str, Any]:
    start = time.perf_counter()
    scorer = method.fit(given)
    record = getattr(scorer, "record", None) or getattr(getattr(scorer, "generator", None), "record", None) or {}
    seconds = max(time.perf_counter() - start, record.get("seconds", 0.0))  # also where training was found again
    found = evaluate(scorer, p.data, p.splits, seed=wanted.seed, n_history=wanted.n_history)
    if isinstance(scorer, PolicyScorer) and "key" in scorer.record:
        look(p, scorer)  # whoever chooses among these policies has seen how they do on the certificate's users
    evidence = collect(p.data, p.splits, base, {"fresh": scorer}, len(p.catalogue.sizes))
    line = certify(evidence, Terms(wanted.limit, seed=p.splits.seed)).line()
    row: dict[str, Any] = {
        **found.numbers, "harm": line.upper, "harm_limit": wanted.limit, "harm_mean": line.mean, "verdict": line.verdict,
        "certified": False,
        "harm_test": _harm_on_test(p, scorer, base), "seconds": seconds, "segments": found.to_json(),
        "broken": list(found.broken), "settings": method.to_dict(), "users": found.users.tolist(),
        "values": np.round(found.values, 6).tolist(), "coverage_check": _covers(evidence, wanted),
    }  # fmt: skip
    if isinstance(method, LWGR):
        row["training"] = plain({k: v for k, v in record.items() if k not in ("history", "settings")})
    if wanted.filter_seen and hasattr(scorer, "filter_seen"):
        fitted: Any = scorer
        hidden = evaluate(replace(fitted, filter_seen=True), p.data, p.splits, n_boot=0, n_history=wanted.n_history)
        row["filtered"] = hidden.numbers
    return row


def _harm_on_test(p: Prepared, scorer: Scorer, base: Scorer) -> float:
    """Return the mean harm on the test targets of users who were kept for the certificate."""
    from .splits import CERTIFICATE

    keep = p.splits.roles[p.splits.test.users - 1] == CERTIFICATE
    samples = p.splits.test.take(np.flatnonzero(keep))
    lost = (base.log_likelihood(samples) - scorer.log_likelihood(samples)) / len(p.catalogue.sizes)
    return float(np.clip(lost, 0, 1).mean())


def _covers(evidence: Evidence, wanted: Bench, draws: int = 200) -> dict[str, float]:
    """Split the certificate's users in halves again and again: how often is the bound of one below the other's mean?"""
    from ..bound import upper_bound

    harms = evidence.harms(evidence.after["fresh"], 0.0)[0]
    generator, missed, kept_and_broken = np.random.default_rng(wanted.seed), 0, 0
    for _ in range(draws):
        order = generator.permutation(len(harms))
        one, other = order[: len(order) // 2], order[len(order) // 2 :]
        upper, mean = upper_bound(harms[one], confidence=0.95), float(harms[other].mean())
        missed += upper < mean
        kept_and_broken += upper <= wanted.limit < mean
    return {"draws": draws, "misses": missed / draws, "kept_and_broken": kept_and_broken / draws}


def _told(name: str, row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    told = {k: v for k, v in row.items() if k not in ("users", "values")}
    for against in ("reference", "continued"):
        rival = next((n for n in rows if n.partition(":")[0] == against), None)  # the first, whatever its settings
        if rival is not None and rival != name:
            told[f"against_{against}"] = _difference(row, rows[rival])
    return told


def _difference(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    from .metrics import METRICS

    rows = paired(np.array(new["values"]), np.array(old["values"]))
    by_name = dict(zip(METRICS, rows.tolist()))
    return {m: {"mean": v[0], "low": v[1], "high": v[2], "relative": v[0] / old[m] if old[m] else None}
            for m, v in by_name.items() if m in _METRICS}  # fmt: skip


def _key(p: Prepared, wanted: Bench, model: Model | None) -> str:
    return store.key(
        data=p.data.fingerprint, codes=store.key(codes=p.catalogue.codes.tolist()), reference=wanted.reference.to_dict(),
        splits=[p.splits.how, p.splits.holdout, p.splits.seed], model=None if model is None else model.fingerprint,
        n_history=wanted.n_history, limit=wanted.limit, filter_seen=wanted.filter_seen, seed=wanted.seed, format=2,
    )  # fmt: skip
