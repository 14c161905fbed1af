"""A recommender as a folder: everything that serving and nearline need, written whole or not at all.

The policy's tensors are stored as values beside the reference's, so the reference comes back bit for bit by leaving them
out. Opening checks all there is before anything is used; serving needs no language model.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import store
from ..change import versions as packages
from ..errors import StoreError, UserError
from ..settings import with_settings
from . import _bundle_files as files
from . import _bundle_parts as parts
from ._seen import Seen
from .base import Item, Run
from .generator import Generator
from .groups import Group, read_groups, training_groups, write_groups
from .lwgr import LWGR
from .policy import Policy
from .prototypes import Prototypes, book_sizes, fit_prototypes, residuals_of
from .record import Versions
from .tokenise import Catalogue, load_tokeniser

if TYPE_CHECKING:
    from ..model import Model
    from .certificate import Certified
    from .data import Interactions
    from .fitted import PolicyScorer
    from .splits import Splits
    from .tokenise import Fitted

__all__ = ["Bundle", "open_bundle", "save_bundle", "seal"]

_NEAR = 5
_OUTSIDE = {files.RECORD, files.CARD, files.TRAINING, files.GROUPS, files.CERTIFICATE, files.ARRAYS, files.SEEN}
"""Files that decide neither an answer nor a record: the fingerprint does not count them."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle.

    Attributes:
        path: Its folder.
        fingerprint: Names all that decides answers and records; the namespace of its records.
        items: The catalogue; item i stands at place i - 1.
        counts: Training count of each item number, [items + 1].
        catalogue: The items' codes and their tree.
        n_history: How many of the latest items are read.
        reference: The recommender without knowledge.
        policy: The policy's generator, or the reference where the certificate refused the policy.
        instructions: Chooses codes by a user's state; None where the policy has no knowledge.
        fusion: Turns knowledge into what is added; None likewise.
        knowing: The whole policy. It chooses codes always, and asks only where a language model was given.
        versions: What a record must have been made by.
        makers: The same, as whole fingerprints.
        prototypes: What stands in for knowledge.
        settings: What it was made with.
        certificate: The certificate as plain values; empty where there is none.
        serves: What the certificate lets it serve.
    """

    path: Path
    fingerprint: str
    items: tuple[Item, ...]
    counts: NDArray[np.int64]
    catalogue: Catalogue
    n_history: int
    reference: Generator
    policy: Generator
    instructions: nn.Module | None
    fusion: nn.Module | None
    knowing: Policy | None
    versions: Versions
    makers: Mapping[str, str]
    prototypes: Prototypes
    settings: Mapping[str, Any]
    certificate: Mapping[str, Any]
    serves: Literal["policy", "reference"]

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The number of each raw id."""
        return {item.id: number for number, item in enumerate(self.items, 1)}

    @cached_property
    def titles(self) -> Mapping[str, tuple[Item, ...]]:
        """The items of each title, in small letters."""
        found: dict[str, list[Item]] = {}
        for item in self.items:
            found.setdefault(item.title.casefold(), []).append(item)
        return {title: tuple(items) for title, items in found.items()}

    @cached_property
    def groups(self) -> Mapping[tuple[int, int], Group]:
        """The names of the groups of users, by book and word."""
        return read_groups(self.path / files.GROUPS)

    @property
    def d_model(self) -> int:
        """Width of the vector of a record."""
        return self.reference.size.d_model

    @property
    def asks(self) -> bool:
        """Whether it can make records: there is knowledge, and its source is at hand."""
        return self.knowing is not None and self.knowing.source is not None

    def number(self, raw_id: str) -> int | None:
        """Return an item's number; None where the catalogue has no such id."""
        return self.numbers.get(raw_id)

    def find(self, title: str) -> list[Item]:
        """Return the items of exactly this title, else a few with the nearest titles, the nearest first."""
        asked = title.strip().casefold()
        if asked in self.titles:
            return list(self.titles[asked])
        inside = sorted((t for t in self.titles if asked and asked in t), key=lambda t: (not t.startswith(asked), t))
        near = difflib.get_close_matches(asked, self.titles, n=_NEAR, cutoff=0.5) if len(inside) < _NEAR else []
        return [item for t in dict.fromkeys([*inside[:_NEAR], *near]) for item in self.titles[t]][:_NEAR]

    def windows(self, histories: Sequence[Sequence[str]]) -> NDArray[np.int32]:
        """Return the latest known items of some histories of raw ids, oldest first, padded on the left.

        Shapes: [histories, n_history], item numbers
        """
        found = np.zeros((len(histories), self.n_history), np.int32)
        for row, history in enumerate(histories):
            known = [n for n in map(self.numbers.get, history) if n is not None][-self.n_history :]
            if known:
                found[row, -len(known) :] = known
        return found

    @torch.no_grad()
    def codes(self, windows: NDArray[np.int32]) -> Tensor:
        """Return which instruction words people with these histories get; no language model is asked.

        Shapes: [n, history] -> [n, books]

        Raises:
            UserError: The policy has no knowledge.
        """
        if self.knowing is None:
            raise UserError(f"{self.path} holds a recommender without knowledge, so nobody has codes.")
        return self.knowing.codes(torch.from_numpy(windows).to(self.reference.first.device))

    def from_prototypes(self, windows: NDArray[np.int32]) -> Tensor:
        """Return what prototypes add for some histories; zeros for an empty one.

        Shapes: [n, history] -> [n, d_model]
        """
        if self.knowing is None:
            return self.reference.first.new_zeros(len(windows), self.d_model)
        return residuals_of(self.knowing, self.prototypes, windows)

    def tokeniser(self) -> Fitted:
        """Open what gives new items their codes.

        Raises:
            StoreError: The bundle was saved without.
        """
        return load_tokeniser(self.path / files.TOKENISER)

    def seen(self) -> Seen | None:
        """Open the note of who had a part in training; None where there is none.

        Raises:
            StoreError: It is damaged.
        """
        place = self.path / files.SEEN
        return Seen.load(place) if place.is_file() else None

    def undone(self) -> Bundle:
        """Return the bundle without its change: the reference serves everybody."""
        return replace(self, policy=self.reference, serves="reference")


# ---------------------------------------------------------------- writing


def save_bundle(
    path: str | Path,
    *,
    data: Interactions,
    splits: Splits,
    catalogue: Catalogue,
    tokeniser: Fitted | None,
    reference: Generator,
    fitted: PolicyScorer,
    certificate: Certified | None,
    settings: Mapping[str, Any],
    llm: Model | None = None,
    prototypes: Prototypes | None = None,
    salt: str = "",
) -> None:
    """Write a bundle; equal input gives equal bytes.

    Args:
        path: Where the folder is to be; a bundle that is there is replaced.
        data: What it was trained on; only the items are kept.
        splits: Who trained.
        catalogue: The items' codes.
        tokeniser: What gives new items codes; None where codes came from elsewhere.
        reference: The recommender without knowledge.
        fitted: What fitting the policy returned.
        certificate: The proof. Without one that holds, the bundle serves its reference.
        settings: What it was made with, as plain values.
        llm: The language model that the policy asks; it is named in the bundle, not stored.
        prototypes: From `fit_prototypes`; None makes them, which asks the language model about training users.
        salt: A secret, to note who had a part in training; empty: nobody is noted.

    Raises:
        UserError: The parts are not of one run.
        StoreError: The folder cannot be written.
    """
    store.refuse_inside(path)
    policy, method = _parts_of(fitted, reference)
    _check_run(data, catalogue, reference, policy, llm)
    titles = parts.titles_read(policy.source, method, Run(data, splits))
    told = parts.describe_knowledge(policy, method)
    counts = np.zeros(len(data.items) + 1, np.int64)
    counts[: len(splits.counts)] = splits.counts
    shelf = files.Shelf(data.items, counts, titles)
    prototypes = prototypes or fit_prototypes(fitted, splits)
    record = {
        "format": files.FORMAT, "kind": files.KIND, "fingerprint": "", "serves": "reference",
        "generator": files.describe_generator(reference), "knowledge": told, "makers": {},
        "data": {"name": data.name, "fingerprint": data.fingerprint, "n_users": data.n_users},
        "settings": files.plain(settings), "packages": packages(),
    }  # fmt: skip
    if certificate is not None and certificate.holds:
        record["serves"] = "policy"
    training = files.plain({"reference": reference.record, "policy": fitted.record})
    with store.writing(path) as folder:
        catalogue.save(folder / files.TRIE)
        files.write_items(folder / files.ITEMS, shelf, catalogue)
        store.save_tensors(folder / files.REFERENCE, reference.state_dict())
        store.save_tensors(folder / files.CHANGE, policy.generator.state_dict())
        store.save_tensors(folder / files.KNOWLEDGE, parts.knowledge_tensors(policy))
        prototypes.save(folder / files.PROTOTYPES)
        if tokeniser is not None:
            tokeniser.save(folder / files.TOKENISER)
        if certificate is not None:
            certificate.save(folder)
        store.write_json_atomic(folder / files.TRAINING, training)
        write_groups(folder / files.GROUPS, training_groups(fitted, splits))
        if salt:
            Seen.of(data, splits, salt).save(folder / files.SEEN)
        seal(folder, record, shelf, catalogue, certificate.sentence() if certificate else "It has no certificate.")


def seal(folder: Path, record: dict[str, Any], shelf: files.Shelf, catalogue: Catalogue, proof: str) -> None:
    """Write record and card, with fingerprints, into a folder that holds all else."""
    hashes = {p.name: store.sha256_file(p) for p in folder.iterdir()}
    record["makers"] = files.makers(hashes, record["knowledge"], shelf, catalogue)
    record["fingerprint"] = _fingerprint(hashes, record)
    text = json.dumps(record, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False)
    (folder / files.RECORD).write_text(text + "\n", encoding="utf-8")
    (folder / files.CARD).write_text(files.card(record, shelf, catalogue, proof, hashes), encoding="utf-8")


def _parts_of(fitted: PolicyScorer, reference: Generator) -> tuple[Policy, LWGR]:
    if fitted.policy is None:
        raise UserError("Only a fitted policy can be saved as a bundle; this recommender has none.")
    method = with_settings(LWGR, {k: v for k, v in fitted.record.get("settings", {}).items() if k != "name"})
    if method.knowledge.startswith("shuffled"):
        raise UserError("Knowledge of other users' histories is a control, which is measured and never served.")
    mine, theirs = reference.state_dict(), fitted.policy.reference.state_dict()
    if mine.keys() != theirs.keys() or any(not torch.equal(mine[n], theirs[n]) for n in mine):
        raise UserError("The policy was trained from another reference. Give the reference that it was fitted with.")
    return fitted.policy, method


def _check_run(
    data: Interactions, catalogue: Catalogue, reference: Generator, policy: Policy, llm: Model | None
) -> None:
    rows = reference.codes[1:].cpu() - torch.tensor(reference.starts[:-1])
    same = catalogue.n_items == len(data.items) and reference.n_items == catalogue.n_items
    if not same or tuple(catalogue.sizes) != reference.sizes or not np.array_equal(rows.numpy(), catalogue.codes):
        raise UserError(
            f"The data have {len(data.items)} items, the catalogue {catalogue.n_items}, the reference "
            f"{reference.n_items}; all must be the same, with the same codes. Give the parts of one run."
        )
    asked = parts.asked_of(policy.source)
    if llm is not None and asked is not None and llm.fingerprint != asked.model.fingerprint:
        raise UserError(f"The policy asks {asked.model.source} and {llm.source} was given. Give the model it asks.")


def _fingerprint(hashes: Mapping[str, str], record: Mapping[str, Any]) -> str:
    """Name everything that decides an answer; a new certificate for the same models changes nothing."""
    counted = {name: digest for name, digest in hashes.items() if name not in _OUTSIDE}
    told = {name: record[name] for name in ("format", "generator", "makers")}
    return store.key(files=counted, **told)


# ---------------------------------------------------------------- reading


def open_bundle(path: str | Path, *, knowledge: Model | None = None, device: str = "cpu") -> Bundle:
    """Open a bundle and check all of it: manifest, hashes, kind, names, shapes, numbers, fingerprints, every item.

    Args:
        path: The folder.
        knowledge: The opened language model, to make records; serving needs none.
        device: Where to compute.

    Raises:
        StoreError: Anything is missing, damaged, of a newer format, or made with another language model.
    """
    path = Path(path)
    hashes = {name: entry["sha256"] for name, entry in store.check_folder(path)["files"].items()}
    record = files.read_record(path)
    for name in files.REQUIRED:
        if name not in hashes:
            raise StoreError(f"{path} has no {name}, so it is no whole bundle. Copy it again, or make it again.")
    catalogue = Catalogue.load(path / files.TRIE)
    shelf = files.read_items(path / files.ITEMS, catalogue)
    _check_names(path, record, hashes, shelf, catalogue)
    reference, changed = (
        files.load_generator(path / name, record["generator"], catalogue).to(device)
        for name in (files.REFERENCE, files.CHANGE)
    )
    knowing = _knowing(path, record, reference, changed, knowledge, shelf)
    prototypes = _prototypes(path, reference, knowing)
    certificate, made = _certificate(path, record, hashes), record["makers"]
    return Bundle(
        path, record["fingerprint"], shelf.items, shelf.counts, catalogue, reference.n_history, reference,
        changed if record["serves"] == "policy" else reference, knowing and knowing.instructions,
        knowing and knowing.fusion, knowing, Versions.of(made["model"], made["fusion"], made["tokeniser"]), made,
        prototypes, record["settings"], certificate, record["serves"],
    )  # fmt: skip


def _check_names(
    path: Path, record: Mapping[str, Any], hashes: Mapping[str, str], shelf: files.Shelf, catalogue: Catalogue
) -> None:
    """Prove that the fingerprints are those of the content."""
    made = files.makers(hashes, record["knowledge"], shelf, catalogue)
    if made != record["makers"] or _fingerprint(hashes, record) != record["fingerprint"]:
        raise StoreError(
            f"{path}: the content does not match its fingerprint {record['fingerprint']!r}, so its records cannot be "
            "told from another bundle's. It was altered; make it again."
        )


def _knowing(
    path: Path, record: Mapping[str, Any], reference: Generator, changed: Generator, model: Model | None,
    shelf: files.Shelf,
) -> Policy | None:  # fmt: skip
    told, place = record["knowledge"], path / files.KNOWLEDGE
    if told is None:
        store.load_tensors(place, ())
        if model is not None:
            raise StoreError(f"{path} holds a recommender without knowledge; there is nothing to ask a model about.")
        return None
    instructions, fusion, rest = parts.load_parts(place, told, reference.size.d_model)
    try:
        source = parts.load_source(place, told, rest, model, shelf.titles, instructions, reference.n_history)
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path}: {files.RECORD} does not describe its source of knowledge: {error!r}.") from error
    policy = Policy(reference, instructions, fusion, source, told["context"])
    policy.generator = changed
    return policy.to(reference.first.device).eval().requires_grad_(False)


def _prototypes(path: Path, reference: Generator, knowing: Policy | None) -> Prototypes:
    found = Prototypes.load(path / files.PROTOTYPES)
    sizes = () if knowing is None else book_sizes(knowing)
    if found.d_model != reference.size.d_model or found.sizes.tolist() != [sizes[k] for k in found.books]:
        raise StoreError(
            f"{path / files.PROTOTYPES} is of width {found.d_model} with {len(found.sizes)} books, which does not fit "
            f"this recommender of width {reference.size.d_model} with {len(sizes)} books. Make the bundle again."
        )
    return found


def _certificate(path: Path, record: Mapping[str, Any], hashes: Mapping[str, str]) -> Mapping[str, Any]:
    found = store.read_json(path / files.CERTIFICATE) if files.CERTIFICATE in hashes else {}
    lines = found.get("lines", []) if isinstance(found, dict) else None
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise StoreError(f"{path / files.CERTIFICATE} is no certificate. Certify the policy again.")
    kept = any((x.get("rung"), x.get("segment"), x.get("verdict")) == ("fresh", "all", "kept") for x in lines)
    if record["serves"] == "policy" and not kept:
        raise StoreError(f"{path} serves its policy, which its certificate does not allow. Make the bundle again.")
    return dict(found)
