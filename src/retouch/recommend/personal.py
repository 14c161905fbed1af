"""One person, one bundle: recommend for a history that is typed in, look up an item, certify on fresh histories."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import UserError
from ..model import open_model
from ..store import check_folder
from ._bundle_files import read_record
from .answers import Answer, Request
from .base import Item
from .bundle import Bundle
from .certificate import Certified, Terms, certify
from .data import Interactions, fingerprint
from .evidence import collect
from .ladder import answer
from .nearline import read_histories, records
from .scorer import GenerativeScorer
from .splits import CERTIFICATE, Samples, Splits, windows
from .stores import Past, Store, open_store

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..model import Model

__all__ = ["answer_for", "certify_on", "codes_of", "items_of", "language_model"]


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


_YEAR = re.compile(r"\s*\((1[89]|20)\d\d\)$")
"""The year behind a film's or book's title, which people leave out."""


def items_of(bundle: Bundle, history: str) -> tuple[str, ...]:
    """Read titles or raw ids with semicolons between.

    Raises:
        UserError: A word is no id and no title; the message offers the nearest titles.
    """
    words = [word.strip() for word in history.split(";") if word.strip()]
    return tuple(_item(bundle, word).id for word in words)


def _item(bundle: Bundle, word: str) -> Item:
    if (number := bundle.number(word)) is not None:
        return bundle.items[number - 1]
    found = bundle.find(word)
    exact = [item for item in found if item.title.casefold() == word.casefold()]
    if exact:
        return exact[0]  # of equal titles the first in the catalogue
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
            kept = open_store(store)
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


def certify_on(bundle: Bundle, path: str | Path, limit: float | None = None, **columns: str) -> Certified:
    """Certify what a bundle serves on the last items of fresh histories: those of users after training.

    Args:
        bundle: Opened with its language model.
        path: Histories, as `read_histories` reads them.
        limit: The mean harm that is allowed; by default the bundle's own.
        **columns: Of `read_histories`: ``format``, ``user``, ``item``, ``time``.

    Raises:
        UserError: Nobody has two known items, the bundle cannot ask, or the limit is not above 0.
    """
    limit = float(bundle.certificate.get("bound", {}).get("limit", 0.03)) if limit is None else limit
    if not limit > 0:
        raise UserError(f"The limit of harm must be above 0, in nats per code; got {limit:g}.")
    if not bundle.asks or bundle.knowing is None:
        raise UserError(f"{bundle.path} was opened without its language model; fresh knowledge cannot be made.")
    data = _known(bundle, path, columns)
    splits = _all_held(bundle, data)
    base = GenerativeScorer(bundle.reference, bundle.catalogue, data)
    knowing: Any = bundle.knowing

    def told(samples: Samples) -> torch.Tensor:
        found: torch.Tensor = knowing.residuals(windows(data, samples, bundle.n_history)[0])
        return found

    fresh = GenerativeScorer(
        knowing.generator, bundle.catalogue, data, residuals=told, window_residuals=knowing.residuals
    )
    evidence = collect(data, splits, base, {"fresh": fresh}, len(bundle.catalogue.sizes))
    return certify(evidence, Terms(limit), {"data": data.fingerprint, "bundle": bundle.fingerprint})


def _known(bundle: Bundle, path: str | Path, columns: Mapping[str, str]) -> Interactions:
    rows: dict[str, NDArray[np.int32]] = {}
    for user, past in read_histories(path, **columns).items():
        numbers = [n for n in map(bundle.numbers.get, past.items) if n is not None]
        if len(numbers) >= 2:
            rows[user] = np.array(numbers, np.int32)
    if not rows:
        raise UserError(f"{path}: nobody has two items that the bundle's catalogue knows.")
    users, histories = tuple(rows), tuple(rows.values())
    return Interactions(
        Path(path).name, users, bundle.items, histories, None, fingerprint(users, bundle.items, histories, None)
    )


def _all_held(bundle: Bundle, data: Interactions) -> Splits:
    """Give every user the certificate's role: none of these histories was seen in training."""
    nobody = Samples(np.zeros(0, np.int32), np.zeros(0, np.int32))
    last = Samples(np.arange(1, data.n_users + 1, dtype=np.int32), (data.lengths - 1).astype(np.int32))
    roles = np.full(data.n_users, CERTIFICATE)
    activity = (data.lengths - 1).astype(np.int64)
    return Splits(roles, nobody, nobody, nobody, nobody, last, bundle.counts, activity, "leave-one-out", "users", 0)
