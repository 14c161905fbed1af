"""New items in a bundle that is fitted already: the frozen tokeniser gives them codes, and nothing is trained."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import store
from ..errors import UserError
from . import _bundle_files as files
from ._items import title_map
from .base import Item
from .bundle import Bundle, open_bundle, seal
from .certificate import Certified
from .tokenise import Catalogue
from .vectors import load_vectors, text_vectors

__all__ = ["Grown", "add_items", "read_new"]


@dataclass(frozen=True)
class Grown:
    """What adding items did.

    Attributes:
        before: The bundle's fingerprint before; records under it are not read for the larger bundle.
        fingerprint: The fingerprint now.
        codes: The codes of each new item, by raw id.
        known: Ids that were there already; nothing of them changed.
    """

    before: str
    fingerprint: str
    codes: dict[str, tuple[int, ...]]
    known: tuple[str, ...]


def read_new(path: str | Path) -> tuple[Item, ...]:
    """Read items from a map of titles: a table with ids first, an atomic ``.item``, or a JSON object.

    Raises:
        UserError: The file is missing, or holds something else.
    """
    return tuple(title_map(Path(path), "item_id", (), ()).values())


def add_items(
    path: str | Path, items: Sequence[Item], *, encoder: str = "minilm", out: str | Path | None = None
) -> Grown:
    """Give new items codes in a saved bundle; the codes of all others stay.

    The folder is replaced whole or not at all. Its fingerprint changes, and with it the namespace of its records, so
    servers take up the larger bundle as they do any other: nearline fills the namespace first.

    Use when: a catalogue grew and the recommender need not be fitted again yet.

    Known problems: the digit of a new item was never trained, so it takes an even share of its group. The certificate
        speaks of the catalogue as it was.

    Args:
        path: The bundle.
        items: New and known items; of known ones nothing changes.
        encoder: What turned texts into vectors when the bundle was fitted, or a ``.npy`` with a row for each new item.
        out: Where the larger bundle goes; None: in the place of the old one.

    Raises:
        UserError: No item is new, the bundle has no tokeniser, its knowledge is made of text vectors, or a group of
            equal codes is full.
        StoreError: The bundle is damaged.
    """
    bundle, path = open_bundle(path), Path(path)
    record = files.read_record(path)
    new, known = _new(bundle, items)
    _check(path, record)
    texts = [item.text or item.title or item.id for item in new]
    vectors = load_vectors(encoder, len(new)) if encoder.endswith(".npy") else text_vectors(texts, encoder)
    catalogue = bundle.catalogue.grown(bundle.tokeniser().encode(vectors))
    _write(path, Path(out or path), record, _shelf(path, record, bundle, new), catalogue)
    first = bundle.catalogue.n_items
    codes = {item.id: tuple(row) for item, row in zip(new, catalogue.codes[first:].tolist())}
    return Grown(bundle.fingerprint, record["fingerprint"], codes, known)


def _new(bundle: Bundle, items: Sequence[Item]) -> tuple[list[Item], tuple[str, ...]]:
    by_id = {item.id: item for item in items}
    new = [item for raw, item in by_id.items() if bundle.number(raw) is None]
    if not new:
        raise UserError(f"None of the {len(by_id)} items is new to {bundle.path}; there is nothing to add.")
    bare = [item.id for item in new if not (item.text or item.title)]
    if bare:
        raise UserError(f"New item {bare[0]!r} has no text, and codes are made of text. Give each item a title.")
    return new, tuple(raw for raw in by_id if bundle.number(raw) is not None)


def _check(path: Path, record: dict[str, Any]) -> None:
    if not (path / files.TOKENISER).is_file():
        raise UserError(f"{path} was saved without its tokeniser, so new items cannot get codes. Fit it again.")
    if (record["knowledge"] or {}).get("source", {}).get("kind") == "text":
        raise UserError(
            f"The knowledge of {path} is made of the items' text vectors, which its records depend on. Fit it again "
            "with the new items, or use a language model."
        )


def _shelf(path: Path, record: dict[str, Any], bundle: Bundle, new: Sequence[Item]) -> files.Shelf:
    old = files.read_items(path / files.ITEMS, bundle.catalogue)
    text = record["settings"].get("method", {}).get("llm_text", "title")
    read = tuple(getattr(item, text) or item.title or item.text for item in new)
    counts = np.append(old.counts, np.zeros(len(new), np.int64))
    return files.Shelf((*old.items, *new), counts, (*old.titles, *read))


def _write(path: Path, out: Path, record: dict[str, Any], shelf: files.Shelf, catalogue: Catalogue) -> None:
    has = (path / files.CERTIFICATE).is_file()
    proof = Certified.load(path).sentence() if has else "It has no certificate."
    made = {files.TRIE, files.ITEMS, files.RECORD, files.CARD}
    kept = [name for name in store.check_folder(path)["files"] if name not in made]
    with store.writing(out) as folder:
        for name in kept:
            shutil.copyfile(path / name, folder / name)
        catalogue.save(folder / files.TRIE)
        files.write_items(folder / files.ITEMS, shelf, catalogue)
        seal(folder, record, shelf, catalogue, proof)
