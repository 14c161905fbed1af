"""The tour behind ``retouch demo recommend``: public interactions, a real language model, a proof, a served answer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from .. import store
from ..model import open_model
from ..report import Report, Table, write_html
from . import api
from .bundle import open_bundle
from .data import Interactions, load
from .fetch import fetch
from .lwgr import LWGR
from .nearline import refresh
from .personal import answer_for
from .reference import ReferenceSettings
from .stores import Past, open_store

__all__ = ["POLICY", "REFERENCE", "tour"]

REFERENCE = ReferenceSettings(n_epochs=8, patience=3)
POLICY = LWGR(n_llm_layers=4, n_alone=4, n_epochs=2, cuts_per_epoch=4, cuts_pool=4, max_harm=0.06)
"""Short: enough to see every stage, not enough to claim anything. The limit is loose, because 280 held-out users leave an
upper bound several times the mean harm (measured: 0.0046, at most 0.027)."""
N_USERS = 40


def tour(out: Path, data: Path | None = None, llm: str = "smollm2") -> Report:
    """Fit, certify, precompute for a few users, and answer one of them with reasons.

    Args:
        out: Folder for ``report.html``, the bundle and the store.
        data: MovieLens 100K or any data; by default what ``RETOUCH_DATA`` holds, else it is fetched.
        llm: The language model.

    Returns:
        The report; its numbers are what ``--json`` writes.
    """
    out.mkdir(parents=True, exist_ok=True)
    store.refuse_inside(out / "bundle")
    found = _data(data)
    model = open_model(llm)
    made = api.fit(api.prepare(found), POLICY, REFERENCE, llm=model)
    made.save(out / "bundle")
    bundle = open_bundle(out / "bundle", knowledge=model)
    address = f"sqlite:{out / 'knowledge.db'}"
    kept = open_store(address)
    users = {found.users[u]: _past(found, u) for u in range(min(N_USERS, found.n_users))}
    kept.put_histories(users)
    done = refresh(bundle, kept, users, activate=True)
    kept.close()
    somebody = next(iter(users))
    answer = answer_for(bundle, "", somebody, address, explain=True)
    names = {item.id: item.title for item in found.items}
    latest = "; ".join(names[i] for i in users[somebody].items[-5:])
    rows = tuple((i, place.title, place.score) for i, place in enumerate(answer.items, 1))
    tables = (
        Table(f"For user {somebody} ({answer.rung})", ("", "title", "score"), rows, f"Who took last: {latest}."),
        Table("Why", ("reason",), tuple((str(r["sentence"]),) for r in answer.reasons)),
        Table("Nearline", ("", "users"), (("asked now", done.written), ("covered", done.covered))),
    )
    report = made.report()
    report = replace(
        report,
        tables=(*tables, *report.tables),
        notes=(*report.notes, "A short training: it shows every stage and claims nothing about quality."),
    )
    write_html(report, out / "report.html")
    return report


def _data(data: Path | None) -> Interactions:
    if data is not None:
        return load(data)
    own = os.environ.get("RETOUCH_DATA")
    if own and (Path(own) / "ml-100k").is_dir():
        return load(Path(own) / "ml-100k")
    place = store.cache_dir() / "data" / "ml-100k"
    return load(place if place.is_dir() else fetch("ml-100k", place))


def _past(data: Interactions, user: int) -> Past:
    items = tuple(data.items[i - 1].id for i in data.histories[user].tolist())
    return Past(items, len(items))
