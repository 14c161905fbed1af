"""The way down from the best answer to one that is always there: fresh, stale, prototype, reference.

Each user is served by the highest rung that is possible and certified. A record that is damaged, too old or of another
history counts as none; a store that is down counts as empty. The last rung is the recommender without knowledge, which
can do no harm by definition, and beside the ladder stand the most popular items, for whoever has no history at all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..settings import Settings, setting
from ._allowed import Allowed
from ._looked import Looker, lag_of
from .answers import Answer, Place, Request, Rung
from .beam import Found, search
from .filters import Living, Ranked, Rules, rerank
from .nearline import trigger
from .new_items import stepper
from .record import Record, decode

if TYPE_CHECKING:
    from .bundle import Bundle
    from .generator import Generator
    from .stores import Store

__all__ = ["Answered", "Ladder", "Serving", "answer", "routes"]

_FEW = 5
"""Users with at most so many items are the certificate's segment ``sparse``."""


@dataclass(frozen=True)
class Serving(Settings):
    """How a bundle answers."""

    beams: int = setting(50, "Prefixes that the search keeps; at least the k of a request.", ge=1)
    filter_seen: bool = setting(True, "Leave out what the user already took.")
    stale_lag: int = setting(8, "Most items that knowledge may not know yet; never more than was certified.", ge=0)
    stale_factor: float = setting(4.0, "Knowledge counts as stale up to so many times its time to live.", ge=1)
    per_category: int = setting(0, "Most items of one category in an answer; 0: any number.", ge=0)
    reserved_for_new: int = setting(0, "Places kept for new items, the last of an answer.", ge=0)
    n_explained: int = setting(5, "Items of an answer that get reasons, from the first.", ge=1)
    store_ms: float = setting(20.0, "Time for a look into a store over the network; then it goes on without.", gt=0)
    spare_ms: float = setting(20.0, "With less time left than this, no prototype is looked for.", ge=0)


@dataclass(frozen=True, eq=False)
class Answered:
    """Answers, and what is to be counted.

    Attributes:
        answers: One for each request, in their order.
        seconds: How long each stage took for the whole batch: ``lookup``, ``encode``, ``beam``.
        rejected: Records that did not count, by reason.
        store_errors: Failures of the store, by what was asked.
        n_invalid: Items that a filter should have kept out; always 0.
    """

    answers: list[Answer]
    seconds: Mapping[str, float]
    rejected: Counter[str]
    store_errors: Counter[str]
    n_invalid: int = 0


def answer(bundle: Bundle, store: Store | None, requests: Sequence[Request], **settings: Any) -> list[Answer]:
    """Answer some requests.

    Args:
        bundle: What recommends.
        store: Where knowledge and histories are; None: there are none.
        requests: The questions.
        **settings: Fields of `Serving`.
    """
    return Ladder(bundle, store, Serving(**settings)).answer(requests).answers


def routes(certificate: Mapping[str, Any], segment: str) -> frozenset[str]:
    """Return the rungs above the reference that a certificate, as plain values, allows a segment.

    A segment that was not tested goes by all users.
    """
    verdicts = {(line["rung"], line["segment"]): line["verdict"] for line in certificate.get("lines", ())}

    def kept(rung: str) -> bool:
        own = verdicts.get((rung, segment), "reported")
        return (verdicts.get((rung, "all")) if own == "reported" else own) == "kept"

    return frozenset(rung for rung in ("fresh", "stale", "prototype") if kept(rung))


def lags(certificate: Mapping[str, Any]) -> tuple[int, int]:
    """Return by how many items knowledge was too old where ``fresh`` and ``stale`` were certified; untold it is none."""
    told = certificate.get("about", {}).get("lags", {})
    return int(told.get("fresh", 0)), int(told.get("stale", 0))


@dataclass(eq=False)
class _Asked:
    """One request on its way down."""

    request: Request
    history: Sequence[str] = ()
    length: int = 0
    numbers: list[int] = field(default_factory=list)
    unknown: int = 0
    record: Record | None = None
    lag: int | None = None
    age_s: float = 0.0
    rung: Rung = "reference"
    residual: Tensor | None = None
    note: str = ""


class Ladder:
    """Answer requests with one bundle and one store.

    Args:
        bundle: What recommends.
        store: Where knowledge and histories are; None: there are none.
        settings: How.
        boosts: Nats that are added to items before ranking, by raw id.
    """

    def __init__(
        self,
        bundle: Bundle,
        store: Store | None,
        settings: Serving | None = None,
        *,
        boosts: Mapping[str, float] | None = None,
    ) -> None:
        self.bundle, self.settings = bundle, settings or Serving()
        self.looker = Looker(store, bundle.fingerprint)
        self.allowed = Allowed(bundle)
        served = bundle.serves == "policy"
        self._routes = {s: routes(bundle.certificate, s) if served else frozenset() for s in ("sparse", "active")}
        self._fresh_lag, self._stale_lag = lags(bundle.certificate)
        self.most_lag = min(self.settings.stale_lag, max(self._fresh_lag, self._stale_lag))
        numbered = {bundle.number(raw): nats for raw, nats in (boosts or {}).items()}
        self._boosts = {number: nats for number, nats in numbered.items() if number}
        self._rules = Rules(self.settings.per_category, self.settings.reserved_for_new)
        self._popular = np.argsort(-bundle.counts[1:], kind="stable") + 1
        bundle.reference.eval()
        bundle.policy.eval()

    @torch.no_grad()
    def answer(
        self,
        requests: Sequence[Request],
        *,
        records: Sequence[bytes | None] | None = None,
        now_ms: int | None = None,
        until: float | None = None,
    ) -> Answered:
        """Answer a batch.

        Args:
            requests: The questions.
            records: Knowledge that stands in for the store's, one for each request; for who has just made it.
            now_ms: The time, in milliseconds since 1970.
            until: When the answers are due, in the seconds of `time.monotonic`.

        Raises:
            UnknownName: A filter names a category that no item has.
        """
        for request in requests:
            self.allowed.check(request.filters)
        clock = _Clock()
        with clock.stage("lookup"):
            asked, raw, errors = self._looked(requests, records)
            now = int(time.time() * 1000) if now_ms is None else now_ms
            rejected = Counter(reason for a, r in zip(asked, raw) if (reason := self._admit(a, r, now)))
            hurried = until is not None and until - time.monotonic() < self.settings.spare_ms / 1000
            for a in asked:
                a.rung = self._rung(a, hurried)
        with clock.stage("encode"):
            self._prototypes([a for a in asked if a.rung == "prototype"])
            for a in asked:
                if a.rung in ("fresh", "stale") and a.record is not None:
                    a.residual = torch.from_numpy(a.record.vector).to(self.bundle.policy.first)
        found: dict[int, Answer] = {}
        n_invalid = 0
        for group in self._groups(asked):
            answers, n = self._search(group, clock)
            found |= {id(a): told for a, told in zip(group, answers)}
            n_invalid += n
        return Answered([found[id(a)] for a in asked], clock.seconds, rejected, errors, n_invalid)

    # ------------------------------------------------------------ what is known

    def _looked(
        self, requests: Sequence[Request], records: Sequence[bytes | None] | None
    ) -> tuple[list[_Asked], Sequence[bytes | None], Counter[str]]:
        known = [self._numbers(request.history or ()) for request in requests]
        looked = self.looker.look([request.user for request in requests], [not numbers for numbers in known])
        asked = []
        for request, numbers, past in zip(requests, known, looked.pasts):
            a = _Asked(request, request.history or (), len(request.history or ()), numbers)
            if not numbers and past is not None:
                a.history, a.length, a.numbers = past.items, past.length, self._numbers(past.items)
            self._count_unknown(a)
            asked.append(a)
        return asked, looked.raw if records is None else records, looked.errors

    def _numbers(self, history: Sequence[str]) -> list[int]:
        return [number for raw in history if (number := self.bundle.number(raw)) is not None]

    def _count_unknown(self, a: _Asked) -> None:
        filters = a.request.filters
        named = {*a.history, *(a.request.history or ()), *(filters.allow or ()), *filters.deny}
        a.unknown = sum(self.bundle.number(raw) is None for raw in named)
        if not a.numbers and a.history:
            a.note = "No item of the history is in the catalogue; these are the most popular items."
        elif not a.numbers and a.request.user is not None:
            a.note = "No history of this user is known; these are the most popular items. Send a history."
        elif not a.numbers:
            a.note = "The history is empty; these are the most popular items."

    def _admit(self, a: _Asked, raw: bytes | None, now_ms: int) -> str:
        """Keep a record that counts; otherwise return why it does not, and nothing where there is none."""
        record = decode(raw, self.bundle.versions, self.bundle.d_model)
        if isinstance(record, str):
            return "" if record == "absent" else record
        lag = lag_of(record, a.history, a.length, self.most_lag)
        age_s = max(0.0, (now_ms - record.computed_at_ms) / 1000)
        if lag is None:
            return "history"
        if lag > self.most_lag:
            return "lag"
        if age_s > self.settings.stale_factor * record.ttl_s:
            return "age"
        a.record, a.lag, a.age_s = record, lag, age_s
        return ""

    def _rung(self, a: _Asked, hurried: bool) -> Rung:
        if not a.numbers:
            return "popular"
        allowed = self._routes["sparse" if a.length <= _FEW else "active"]
        if a.record is not None and a.lag is not None:
            if "fresh" in allowed and a.lag <= min(trigger(a.length), self._fresh_lag) and a.age_s <= a.record.ttl_s:
                return "fresh"
            if "stale" in allowed and a.lag <= self._stale_lag:
                return "stale"
        can = self.bundle.knowing is not None and not hurried
        return "prototype" if "prototype" in allowed and can else "reference"

    # ------------------------------------------------------------ what is answered

    def _prototypes(self, asked: Sequence[_Asked]) -> None:
        """Give users without a record the mean knowledge of users with the same codes; no language model is needed."""
        if not asked:
            return
        vectors = self.bundle.from_prototypes(self.windows(asked)).to(self.bundle.policy.first)
        for a, vector in zip(asked, vectors):
            a.residual = vector

    def windows(self, asked: Sequence[_Asked]) -> NDArray[np.int32]:
        """Return the latest known items of each, padded on the left. Shapes: [requests, history]"""
        size = self.bundle.n_history
        found = np.zeros((len(asked), size), np.int32)
        for row, a in zip(found, asked):
            latest = a.numbers[-size:]
            row[size - len(latest) :] = latest
        return found

    def _groups(self, asked: Sequence[_Asked]) -> Iterator[list[_Asked]]:
        """Yield requests that one search can answer: one network, one map of items that may be found."""
        groups: dict[Any, list[_Asked]] = {}
        for a in asked:
            network = "popular" if a.rung == "popular" else "reference" if a.residual is None else "policy"
            groups.setdefault((network, self.allowed.key(a.request.filters)), []).append(a)
        yield from groups.values()

    def _search(self, group: list[_Asked], clock: _Clock) -> tuple[list[Answer], int]:
        allowed = self.allowed.mask(group[0].request.filters)
        hidden = self.allowed.hidden([(a.request.filters, self._seen(a)) for a in group])
        if group[0].rung == "popular":
            ranked = [self._popular_for(a, allowed, row) for a, row in zip(group, hidden)]
            exact = [True] * len(group)
        else:
            windows, living = self.windows(group), Living.of(self.bundle.catalogue.trie, allowed, hidden)
            beams = max(self.settings.beams, *(a.request.k for a in group))
            found = self._found(group, windows, living, beams, clock)
            ranked = [self._ranked(a, found, i) for i, a in enumerate(group)]
            proved = {k: found.exact(k).tolist() for k in {a.request.k for a in group}}
            exact = [proved[a.request.k][i] and not any(ranked[i].moved) for i, a in enumerate(group)]
        answers, n_invalid = [], 0
        for a, order, is_exact, row in zip(group, ranked, exact, hidden):
            shown = np.array(order.items, np.int64)
            n_invalid += int((~allowed[shown] | np.isin(shown, row)).sum())
            answers.append(self._told(a, order, is_exact, allowed, row))
        return answers, n_invalid

    def _seen(self, a: _Asked) -> Sequence[int]:
        return a.numbers if self.settings.filter_seen else ()

    def _found(
        self, group: list[_Asked], windows: NDArray[np.int32], living: Living, beams: int, clock: _Clock
    ) -> Found:
        residuals = [a.residual for a in group]
        knows = residuals[0] is not None
        network: Generator = self.bundle.policy if knows else self.bundle.reference
        with clock.stage("encode"):
            memory = network.encode(torch.from_numpy(windows))
            residual = torch.stack([r for r in residuals if r is not None]) if knows else None
            steps = stepper(network, memory, residual, self.bundle.catalogue)
        with clock.stage("beam"):
            return search(
                steps, self.bundle.catalogue.trie, len(group), beams=beams, living=living, device=memory.mask.device
            )

    def _ranked(self, a: _Asked, found: Found, row: int) -> Ranked:
        items, scores = found.items[row].tolist(), found.scores[row].tolist()
        catalogue, rules = self.bundle.catalogue, self._rules
        new = [i for i in items if i and catalogue.is_new[i]] if rules.reserved_for_new else []
        names = {i: self.bundle.items[i - 1].categories for i in items if i} if rules.per_category else None
        return rerank(items, scores, a.request.k, rules, categories=names, new=new, boosts=self._boosts)

    def _popular_for(self, a: _Asked, allowed: NDArray[np.bool_], hidden: NDArray[np.int32]) -> Ranked:
        order = self._popular[allowed[self._popular] & ~np.isin(self._popular, hidden)][: a.request.k].tolist()
        return Ranked(tuple(order), tuple(float(self.bundle.counts[i]) for i in order), (False,) * len(order))

    def _told(
        self, a: _Asked, order: Ranked, exact: bool, allowed: NDArray[np.bool_], hidden: NDArray[np.int32]
    ) -> Answer:
        items = [self.bundle.items[i - 1] for i in order.items]
        codes = self.bundle.catalogue.codes[[i - 1 for i in order.items]].tolist() if items else []
        places = tuple(
            Place(item.id, item.title, score, tuple(sid), moved)
            for item, sid, score, moved in zip(items, codes, order.scores, order.moved)
        )
        knows = a.rung in ("fresh", "stale")
        reasons: tuple[Mapping[str, Any], ...] = ()
        if a.request.explain and a.rung != "popular":
            from .explain import why, with_parts

            first, window = order.items[: self.settings.n_explained], self.windows([a])[0]
            told = why(
                self.bundle, window, first, a.residual, allowed=allowed, hidden=hidden, beams=self.settings.beams
            )
            if self.bundle.asks and a.rung == "fresh" and a.lag == 0:  # what is asked now is what was heard
                told = with_parts(self.bundle, window, first, told)
            reasons = tuple(reason.to_dict(self.bundle.groups) for reason in told)
        return Answer(
            places, a.rung, exact, a.age_s if knows else None, a.lag if knows else None, self.bundle.fingerprint,
            a.unknown, a.note, reasons,
        )  # fmt: skip


class _Clock:
    """How long each stage took, over all groups of a batch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"lookup": 0.0, "encode": 0.0, "beam": 0.0}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin
