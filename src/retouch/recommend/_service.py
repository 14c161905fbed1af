"""One server's state: the bundles it holds, the store, which namespace is active, and what is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RetouchError, StoreDown, UserError
from ._metrics import Metrics
from .answers import Answer, Request
from .ladder import Ladder, Serving

if TYPE_CHECKING:
    from .bundle import Bundle
    from .stores import Store

__all__ = ["Service"]

_PROBE = 5
_REMEMBERED_S = 1.0


class Service:
    """Answer with the bundle whose namespace is active, and with the first one where that is none of ours.

    Args:
        bundles: What may answer; two while a new one is rolled out.
        store: Where knowledge is; None: nowhere yet.
        settings: How answers are made.
        connect: Opens the store when there is none; tried again until it succeeds.
        stock: A file of raw ids, one a line, of what nobody can have now; read again when it changes.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        store: Store | None,
        settings: Serving,
        *,
        connect: Callable[[], Store] | None = None,
        stock: Path | None = None,
    ) -> None:
        if not bundles:
            raise UserError("A server needs a bundle.")
        self.ladders = {bundle.fingerprint: Ladder(bundle, store, settings) for bundle in bundles}
        for ladder in self.ladders.values():
            ladder.looker.probed = True
        self.current = self.ladders[bundles[0].fingerprint]
        self.store, self.connect, self.stock, self.metrics = store, connect, stock, Metrics()
        self.store_answers: bool | None = None
        self._read_at = -1.0
        self._told: tuple[float, dict[str, Any]] | None = None
        self._tests = {name: _self_test(ladder) for name, ladder in self.ladders.items()}
        self._expected = {name: self._probe(name) for name in self._tests}
        self.metrics.serving(self.current.bundle.fingerprint)
        self.poll()

    # ------------------------------------------------------------ every second

    def poll(self) -> None:
        """Look at the store's pointer and at the stock."""
        self._look_at_store()
        self._look_at_stock()

    def _look_at_store(self) -> None:
        if self.store is None and self.connect is None:
            return
        try:
            if self.store is None and self.connect is not None:
                self._connected(self.connect())
            assert self.store is not None
            active = self.store.active()
        except StoreDown:
            self.store_answers = False
            self.metrics.store_errors.labels("active").inc()
            return
        self.store_answers = True
        for ladder in self.ladders.values():
            ladder.looker.probe()
        if active in self.ladders and self.ladders[active] is not self.current:
            before, self.current = self.current, self.ladders[active]
            self.metrics.serving(active, before.bundle.fingerprint)

    def _connected(self, store: Store) -> None:
        self.store = store
        for ladder in self.ladders.values():
            ladder.looker.store = store

    def _look_at_stock(self) -> None:
        try:
            if self.stock is None or (at := self.stock.stat().st_mtime) == self._read_at:
                return
            ids = self.stock.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError):  # being replaced, or gone: what was read stays
            return
        self._read_at = at
        for ladder in self.ladders.values():
            ladder.allowed.out_of_stock([line.strip() for line in ids])

    # ------------------------------------------------------------ answers

    def work(self, requests: Sequence[Request], until: float) -> list[Answer]:
        """Answer a batch with one bundle, and count."""
        told = self.current.answer(requests, until=until)
        self.metrics.answered(told)
        return told.answers

    def check(self, request: Request) -> None:
        """Refuse what no answer can be given to.

        Raises:
            UserError: A filter or k cannot be met; the message says why.
        """
        self.current.allowed.check(request.filters)
        beams = self.current.settings.beams
        if request.k > beams:
            raise UserError(f"k must be a whole number from 1 to {beams}, the beams of this server; got {request.k}.")

    def append(self, events: Sequence[tuple[str, str]], key: str = "") -> int:
        """Put events into the queue of the nearline writer; return how many name an item that is not known.

        With a key they are added once, however often they are sent.

        Raises:
            StoreDown: There is no store, or it does not answer.
        """
        if self.store is None:
            raise StoreDown("This server has no store to keep events in. Start it with a store.")
        try:
            self.store.append(events, key)
        except StoreDown:
            self.metrics.store_errors.labels("events").inc()
            raise
        return sum(self.current.bundle.number(item) is None for _, item in events)

    # ------------------------------------------------------------ is it well?

    def ready(self) -> dict[str, Any]:
        """Say whether a stored history still gives the stored items, and whether the store answers.

        A store that is down does not make a server unready: it answers by lower rungs.
        """
        if self._told is not None and time.monotonic() - self._told[0] < _REMEMBERED_S:
            return self._told[1]  # anybody may ask, and it costs a search
        told = self._examined()
        self._told = (time.monotonic(), told)
        return told

    def _examined(self) -> dict[str, Any]:
        name = self.current.bundle.fingerprint
        try:
            same = self._probe(name) == self._expected[name]
        except RetouchError:
            same = False
        told = {None: "none", True: "answers", False: "down"}[self.store_answers]
        return {"ready": same, "self_test": same, "store": told, "bundle": name, "serves": self.current.bundle.serves}

    def _probe(self, name: str) -> list[str]:
        alone, request = self._tests[name]
        return [place.id for place in alone.answer([request], until=time.monotonic() + 60).answers[0].items]


def _self_test(ladder: Ladder) -> tuple[Ladder, Request]:
    """Return who answers a self-test, the reference with no store, and its question: what follows the most popular items.

    Made once: what a ladder needs to know of its items takes longer than an answer where there are many.
    """
    bundle = ladder.bundle
    most = np.argsort(-bundle.counts[1:], kind="stable")[:_PROBE]
    request = Request(history=tuple(bundle.items[i].id for i in most.tolist()), k=1)
    return Ladder(bundle.undone(), None, ladder.settings), request
