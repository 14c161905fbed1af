"""One person, one bundle: recommend for a history that is typed in, look up an item, certify on fresh histories."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import attempts
from ..errors import UserError
from ..model import open_model
from ..store import check_folder, key
from ._bundle_files import read_record
from ._draws import Asked
from ._seen import own_salt
from .answers import Answer, Request
from .api import LAGS
from .base import Item
from .bundle import Bundle
from .certificate import Certified, Terms, certify
from .data import Interactions, fingerprint
from .evidence import collect
from .explain import Sanity, sanity
from .ladder import answer
from .nearline import read_histories, records, trigger
from .scorer import GenerativeScorer
from .splits import CERTIFICATE, Samples, Splits
from .stores import Past, Store, open_store

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..model import Model

__all__ = ["answer_for", "certify_on", "check_reasons", "codes_of", "items_of", "language_model"]


def language_model(bundle: str | Path, source: str = "") -> Model:
    """Open the language model that a bundle was fitted with, or another copy of it.

    Args:
        bundle: The folder; it need not be opened yet.
        source: What `retouch.model.open_model` takes; empty: what the bundle names.

    Raises:
        StoreError: The folder is no bundle.
        UserError: The bundle names no language model, or it cannot be opened.
    """
    check_folder(bundle)
    told = read_record(Path(bundle))["settings"].get("llm")
    if source:
        return open_model(source)
    if not isinstance(told, str):
        raise UserError(f"{bundle} does not say which language model it was fitted with; name it with --llm.")
    try:
        return open_model(told)
    except UserError as error:
        raise UserError(f"{bundle} was fitted with {told!r}, which does not open: {error} If it is elsewhere now, name "
                        "it with --llm.") from error  # fmt: skip


_REASONED = 200
"""Histories that a check of reasons takes at most."""

_YEAR = re.compile(r"\s*\((1[89]|20)\d\d\)$")
"""The year behind a film's or book's title, which people leave out."""


def items_of(bundle: Bundle, history: str) -> tuple[str, ...]:
    """Read titles or raw ids with semicolons between; a title may hold semicolons itself.

    Raises:
        UserError: A word is no id and no title, or the title of several items; the message offers what there is.
    """
    return tuple(_item(bundle, word).id for word in _words(bundle, history.split(";")))


def _words(bundle: Bundle, parts: Sequence[str]) -> Iterator[str]:
    """Cut at semicolons, but for those inside of the longest name that stands there."""
    most = 1 + max((name.count(";") for name in (*bundle.titles, *bundle.numbers)), default=0)
    at = 0
    while at < len(parts):
        joined = ((";".join(parts[at:end]).strip(), end) for end in range(min(len(parts), at + most), at + 1, -1))
        named = ((w, end) for w, end in joined if w.casefold() in bundle.titles or bundle.number(w) is not None)
        word, at = next(named, (parts[at].strip(), at + 1))
        if word:
            yield word


def _item(bundle: Bundle, word: str) -> Item:
    if (number := bundle.number(word)) is not None:
        return bundle.items[number - 1]
    found = bundle.find(word)
    exact = [item for item in found if item.title.casefold() == word.casefold()]
    if len(exact) == 1:
        return exact[0]
    if exact:
        ids = ", ".join(repr(item.id) for item in exact)
        raise UserError(f"{word!r} is the title of {len(exact)} items. Give the id of the one you mean: {ids}.")
    undated = [item for item in found if _YEAR.sub("", item.title).casefold() == word.casefold()]
    if len(undated) == 1:
        return undated[0]
    near = ", ".join(repr(item.title) for item in found) or "none is near"
    raise UserError(f"{word!r} is neither an id nor a title of this catalogue. Nearest titles: {near}.")


def codes_of(bundle: Bundle, word: str) -> tuple[Item, tuple[int, ...]]:
    """Return an item, found by id or title, with its codes.

    Raises:
        UserError: There is none.
    """
    item = _item(bundle, word)
    return item, tuple(bundle.catalogue.codes[bundle.numbers[item.id] - 1].tolist())


def answer_for(
    bundle: Bundle,
    history: str,
    user: str = "",
    store: str = "",
    *,
    k: int = 10,
    explain: bool = False,
    ask: bool = False,
) -> Answer:
    """Recommend for a typed history or a user of a store.

    Args:
        bundle: What recommends.
        history: Titles or ids with semicolons between; empty: the user's history in the store.
        user: Raw id of a user of the store.
        store: Address of the store; empty: none.
        k: How many items.
        explain: With reasons.
        ask: Ask the language model now, as nearline would; the bundle must have been opened with it.

    Raises:
        UserError: An item is unknown, or neither a history nor a user with a store is given.
        StoreDown: The store does not answer.
    """
    taken = items_of(bundle, history) if history.strip() else None
    if taken is None and not (user and store):
        raise UserError('Give a history, such as --history "title; title", or a user with --store.')
    with ExitStack() as held:
        kept: Store | None = None
        if store:
            kept = open_store(store, existing=True)
            held.callback(kept.close)
        if ask:
            known = taken if taken is not None else _stored(kept, user)
            user, taken = user or "asked now", known
            kept = _asked(bundle, user, known, held)
        return answer(bundle, kept, [Request(user or None, taken, k, explain=explain)])[0]


def _stored(kept: Store | None, user: str) -> tuple[str, ...]:
    past = kept.histories([user])[0] if kept is not None else None
    if past is None:
        raise UserError(f"The store knows no history of user {user!r}. Give one with --history.")
    return past.items


def _asked(bundle: Bundle, user: str, history: Sequence[str], held: ExitStack) -> Store:
    """Make the record of one history, in a store that ends with the question."""
    folder = held.enter_context(tempfile.TemporaryDirectory())
    kept = open_store(f"sqlite:{Path(folder) / 'now.db'}")
    held.callback(kept.close)
    past = Past(tuple(history), len(history))
    made = records(bundle, [(user, past)], int(time.time() * 1000))
    kept.put_many({user: made[0]}, bundle.fingerprint)
    kept.activate(bundle.fingerprint)
    return kept


# ---------------------------------------------------------------- fresh histories


def certify_on(
    bundle: Bundle, path: str | Path, limit: float | None = None, *, salt: str | None = None, **columns: Any
) -> Certified:
    """Certify what a bundle serves on the last items of fresh histories: those of users after training.

    Users who had a part in training count where their history is the known one and goes on, so that its last item is
    new; all others of them are left out. Each bundle that is measured on the same histories is one more look at them.

    Args:
        bundle: Opened with its language model.
        path: Histories, as `read_histories` reads them.
        limit: The mean harm that is allowed; by default the bundle's own.
        salt: What the bundle's users were hashed with; by default the secret of this machine's cache.
        **columns: Of `read_histories`: ``format``, ``user``, ``item``, ``time``, ``min_rating``.

    Raises:
        UserError: Nobody has two known items, all had a part in training, the bundle cannot ask, or the limit is not
            above 0.
    """
    limit = float(bundle.certificate.get("bound", {}).get("limit", 0.03)) if limit is None else limit
    if not limit > 0:
        raise UserError(f"The limit of harm must be above 0, in nats per code; got {limit:g}.")
    if not bundle.asks or bundle.knowing is None:
        raise UserError(f"{bundle.path} was opened without its language model; fresh knowledge cannot be made.")
    rows, told_users = _apart(
        bundle, Path(path).name, _known(bundle, path, columns), own_salt() if salt is None else salt
    )
    data = _interactions(bundle, Path(path).name, rows)
    splits = _all_held(bundle, data)
    base = GenerativeScorer(bundle.reference, bundle.catalogue, data)
    knowing: Any = bundle.knowing
    asked = Asked(data, splits, bundle.n_history)

    def told(samples: Samples) -> torch.Tensor:
        lags = np.array([trigger(int(cut)) for cut in samples.cuts], np.int64)  # as old as fresh knowledge may be
        found: torch.Tensor = knowing.residuals(asked.windows(samples, lags))
        return found

    fresh = GenerativeScorer(
        knowing.generator, bundle.catalogue, data, residuals=told, window_residuals=knowing.residuals
    )
    terms = Terms(limit, attempt=attempts.count(key(bundle=bundle.fingerprint), data.fingerprint))
    evidence = collect(data, splits, base, {"fresh": fresh}, len(bundle.catalogue.sizes), salt=own_salt())
    about = {
        "data": data.fingerprint,
        "bundle": bundle.fingerprint,
        "window": told_users,
        "lags": {"fresh": LAGS["fresh"]},
    }
    return certify(evidence, terms, about)


def check_reasons(bundle: Bundle, path: str | Path, **columns: Any) -> Sanity:
    """Check on some histories that the items named as reasons matter more than random others; see `explain.sanity`.

    Args:
        bundle: What recommends; no language model is needed.
        path: Histories, as `read_histories` reads them.
        **columns: Of `read_histories`: ``format``, ``user``, ``item``, ``time``, ``min_rating``.

    Raises:
        UserError: Nobody has two known items.
    """
    rows = list(_known(bundle, path, columns).values())[:_REASONED]
    windows = bundle.windows([[bundle.items[number - 1].id for number in row] for row in rows])
    return sanity(bundle, windows)


def _known(bundle: Bundle, path: str | Path, columns: Mapping[str, Any]) -> dict[str, NDArray[np.int32]]:
    rows: dict[str, NDArray[np.int32]] = {}
    for user, past in read_histories(path, **columns).items():
        numbers = [n for n in map(bundle.numbers.get, past.items) if n is not None]
        if len(numbers) >= 2:
            rows[user] = np.array(numbers, np.int32)
    if not rows:
        raise UserError(f"{path}: nobody has two items that the bundle's catalogue knows.")
    return rows


def _apart(
    bundle: Bundle, name: str, rows: Mapping[str, NDArray[np.int32]], salt: str
) -> tuple[Mapping[str, NDArray[np.int32]], dict[str, int | None]]:
    """Leave out whom nothing new is known of since training; tell how many, and how many trained and went on."""
    seen = bundle.seen()
    if seen is None or not seen.fits(salt):
        return rows, {"trained": None, "left_out": None}
    went_on, others = seen.sort(rows, salt)
    kept = {user: past for user, past in rows.items() if user not in others}
    if not kept:
        raise UserError(
            f"{name}: all {len(rows):,} users had a part in training, and no history is the known one and goes on. Give "
            "whole histories, from the first item to one that came after training, or those of other users."
        )
    return kept, {"trained": len(went_on), "left_out": len(others)}


def _interactions(bundle: Bundle, name: str, rows: Mapping[str, NDArray[np.int32]]) -> Interactions:
    users, histories = tuple(rows), tuple(rows.values())
    return Interactions(name, users, bundle.items, histories, None, fingerprint(users, bundle.items, histories, None))


def _all_held(bundle: Bundle, data: Interactions) -> Splits:
    """Give every user the certificate's role: none of these last items was seen in training."""
    nobody = Samples(np.zeros(0, np.int32), np.zeros(0, np.int32))
    last = Samples(np.arange(1, data.n_users + 1, dtype=np.int32), (data.lengths - 1).astype(np.int32))
    roles = np.full(data.n_users, CERTIFICATE)
    activity = (data.lengths - 1).astype(np.int64)
    return Splits(roles, nobody, nobody, nobody, nobody, last, bundle.counts, activity, "leave-one-out", "users", 0)
