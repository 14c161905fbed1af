"""Saved recommenders: what was proved of them, and what they recommend, as ``retouch recommend for`` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError
from ..recommend.bundle import Bundle, open_bundle
from ..recommend.certificate import Certified
from ..recommend.groups import Group
from ..recommend.health import examine_catalogue
from ..recommend.personal import answer_for, items_of, language_model
from ..report import Report, to_json
from ..report import Table as Told
from . import _wire as wire
from ._folder import Folder
from ._job import Desk

__all__ = ["Bundles"]


class Bundles:
    """Hold one recommender and ask it. Its public methods are routes of the API.

    Args:
        folder: Where they are.
        desk: Where work lies.
        source_of: Turns a model's name into what is opened, or refuses it.
    """

    def __init__(self, folder: Folder, desk: Desk, source_of: Callable[[str], str]) -> None:
        self.folder, self.desk, self._source_of = folder, desk, source_of
        self._bundle: Bundle | None = None
        self._about: wire.BundleFacts | None = None
        self._asks = False

    def bundles(self) -> list[str]:
        """List the recommenders, the newest first."""
        return self.folder.bundles()

    def bundle(self) -> wire.BundleFacts | None:
        """Show the one at hand."""
        return self._about

    def open_bundle(self, asked: wire.OpenBundle) -> wire.Job:
        """Begin to open one, to check all of it, and to compute its certificate again."""
        folder, llm = self.folder.inside(asked.bundle), self._source_of(asked.llm) if asked.llm else ""
        return self.desk.begin(f"Opening {asked.bundle}", lambda: self._open(asked, folder, llm))

    def titles(self, text: str) -> list[wire.Title]:
        """List the items with a title, or with the nearest ones."""
        return [wire.Title(id=item.id, title=item.title) for item in self._at_hand().find(text[:1000])]

    def recommend(self, asked: wire.Recommend) -> wire.Job:
        """Begin to recommend for one history, with reasons."""
        bundle, history = self._at_hand(), "; ".join(asked.history)
        if not items_of(bundle, history):
            raise UserError("The history is empty. Give titles or ids, oldest first.")
        asks, what = self._asks, f"Recommending from {bundle.path.name}"
        return self.desk.begin(what, lambda: _recommend(bundle, history, asked, asks))

    def _at_hand(self) -> Bundle:
        if self._bundle is None:
            raise UserError("No recommender is open. Open one first.")
        return self._bundle

    def _open(self, asked: wire.OpenBundle, folder: Path, llm: str) -> wire.Saved:
        bundle = open_bundle(folder, knowledge=language_model(folder, llm) if llm else None)
        self._about = _facts(bundle, asked)
        self._bundle, self._asks = bundle, bool(llm)
        return wire.Saved(says=[f"{asked.bundle} is open."])


def _recommend(bundle: Bundle, history: str, asked: wire.Recommend, asks: bool) -> wire.Saved:
    answer = answer_for(bundle, history, k=asked.k, explain=asked.explain, ask=asks)
    taken = items_of(bundle, history)
    titles = [wire.Title(id=raw, title=bundle.items[bundle.numbers[raw] - 1].title) for raw in taken]
    notes = [answer.note] if answer.note else []
    found = wire.Items(history=titles, codes=_groups(bundle, taken), answer=answer.to_dict())
    return wire.Saved(items=found, notes=notes)


def _groups(bundle: Bundle, history: Sequence[str]) -> list[str]:
    """Name the word of each book of instructions that a history gets."""
    if bundle.instructions is None:
        return []
    words = bundle.codes(bundle.windows([history]))[0].tolist()
    return [str(bundle.groups.get(held, Group(*held, 0, (), ()))) for held in enumerate(words)]


def _facts(bundle: Bundle, asked: wire.OpenBundle) -> wire.BundleFacts:
    health = examine_catalogue(
        bundle.catalogue, texts=[i.text for i in bundle.items], categories=[i.categories for i in bundle.items]
    )
    certified = Certified.load(bundle.path) if bundle.certificate else None
    proof = "It has no certificate: the reference, which is without knowledge, serves."
    knows = bundle.knowing is not None
    return wire.BundleFacts(
        path=asked.bundle,
        serves=bundle.serves,
        numbers={
            "items": f"{len(bundle.items):,}",
            "codes of an item": f"{len(bundle.catalogue.sizes)}",
            "items of a history that are read": f"{bundle.n_history}",
            "knowledge": f"of {bundle.settings.get('llm') or 'a language model'}" if knows else "none",
            "asked here": asked.llm or "no language model",
            "serves": "the policy, where the certificate allows" if bundle.serves == "policy" else "the reference",
            "fingerprint": bundle.fingerprint[:12],
        },
        says=[proof if certified is None else certified.sentence(), *health.problems, *health.warnings],
        tables=_tables([*([] if certified is None else [certified.table()]), *health.tables()]),
    )


def _tables(tables: list[Told]) -> list[wire.Table]:
    """Write tables as plain values that JSON can hold."""
    told = to_json(Report("", "", "", tuple(tables), environment={}))["tables"]
    return [wire.Table(**table) for table in told]
