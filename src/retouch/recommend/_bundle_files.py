"""The files of a bundle, one by one: what each holds, and what must be true of it before anything uses it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import store
from ..errors import StoreError, UserError
from .base import Item
from .generator import Generator, GeneratorSize

if TYPE_CHECKING:
    from .tokenise import Catalogue

__all__ = [
    "REQUIRED",
    "Shelf",
    "card",
    "describe_generator",
    "load_generator",
    "load_part",
    "makers",
    "plain",
    "read_items",
    "read_record",
    "write_items",
]

FORMAT, KIND = 1, "recommend"
RECORD, ITEMS = "retouch.json", "items.jsonl"
REFERENCE, CHANGE, KNOWLEDGE = "reference.safetensors", "change.safetensors", "knowledge.safetensors"
TRIE, PROTOTYPES, TOKENISER = "trie.safetensors", "prototypes.safetensors", "tokeniser.safetensors"
CERTIFICATE, ARRAYS = "certificate.json", "certificate.safetensors"
TRAINING, GROUPS, CARD = "training.json", "groups.json", "README.md"
SEEN = "seen.safetensors"
REQUIRED = (RECORD, CARD, ITEMS, REFERENCE, CHANGE, KNOWLEDGE, TRIE, PROTOTYPES, TRAINING)
AGAIN = "Copy it again from its source, or make it again."

Facts = Mapping[str, Any]


def plain(value: Any) -> Any:
    """Return plain values that strict JSON holds: numbers without a value are None, and times of work are left out."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items() if k != "seconds"}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---------------------------------------------------------------- items


@dataclass(frozen=True, eq=False)
class Shelf:
    """What ``items.jsonl`` holds.

    Attributes:
        items: The catalogue; item i stands at place i - 1.
        counts: Training count of each item number, [items + 1].
        titles: What the language model reads of each item.
    """

    items: tuple[Item, ...]
    counts: NDArray[np.int64]
    titles: tuple[str, ...]


_FIELDS: Mapping[str, type] = {
    "id": str, "title": str, "text": str, "read": str, "categories": list, "codes": list, "count": int,
}  # fmt: skip


def write_items(path: Path, shelf: Shelf, catalogue: Catalogue) -> None:
    """Write one line an item, for people and other programs too."""
    rows = zip(shelf.items, shelf.titles, catalogue.codes.tolist(), shelf.counts[1:].tolist())
    lines = [
        {"id": item.id, "title": item.title, "text": item.text, "read": title, "categories": list(item.categories),
         "codes": codes, "count": count}
        for item, title, codes, count in rows
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read_items(path: Path, catalogue: Catalogue) -> Shelf:
    """Read the items and check them against their codes.

    Raises:
        StoreError: With the line that is wrong.
    """
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} cannot be read: {error}. {AGAIN}") from error
    if lines.pop() or len(lines) != catalogue.n_items:
        raise StoreError(f"{path} has {len(lines)} whole lines and {catalogue.n_items} items have codes. {AGAIN}")
    rows = [_row(f"{path} line {number}", line) for number, line in enumerate(lines, 1)]
    known = catalogue.codes.tolist()
    first: dict[str, int] = {}
    for number, (row, codes) in enumerate(zip(rows, known), 1):
        if row["codes"] != codes:
            raise StoreError(f"{path} line {number}: the codes {row['codes']} are not those of {TRIE}: {codes}.")
        if first.setdefault(row["id"], number) != number:
            raise StoreError(f"{path} line {number}: item {row['id']!r} already stands on line {first[row['id']]}.")
    items = tuple(Item(r["id"], r["text"], r["title"], tuple(r["categories"])) for r in rows)
    counts = np.array([0, *(r["count"] for r in rows)], np.int64)
    return Shelf(items, counts, tuple(r["read"] for r in rows))


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} is not valid JSON: {error}. {AGAIN}") from error
    if not isinstance(row, dict) or row.keys() != _FIELDS.keys():
        raise StoreError(f"{where} must hold {', '.join(_FIELDS)}, and nothing else. {AGAIN}")
    for name, kind in _FIELDS.items():
        if type(row[name]) is not kind:
            raise StoreError(f"{where}: {name} must be {kind.__name__}; got {row[name]!r}.")
    if not row["id"] or row["count"] < 0 or not all(isinstance(c, str) for c in row["categories"]):
        raise StoreError(f"{where}: an item needs an id, a count from 0 on, and names of categories. {AGAIN}")
    return row


# ---------------------------------------------------------------- generators


def describe_generator(generator: Generator) -> dict[str, Any]:
    """Return what is needed to build a generator again."""
    return {
        "size": asdict(generator.size), "n_history": generator.n_history, "tokens": generator.tokens,
        "dropout": generator.dropout.p,
    }  # fmt: skip


def load_generator(path: Path, facts: Facts, catalogue: Catalogue) -> Generator:
    """Build a generator and put the values of a file in, in eval mode and without gradients.

    Raises:
        StoreError: The description or a tensor does not fit.
    """
    tensors = store.load_tensors(path)
    try:
        size = GeneratorSize(**facts["size"])
        width = (sum(catalogue.sizes), size.d_model)
        if tuple(tensors["embeddings"].shape) != width:
            raise UserError(f"embeddings are {tuple(tensors['embeddings'].shape)} and must be {width}")
        with torch.random.fork_rng(devices=[]):  # the drawn values are replaced at once
            codes = torch.from_numpy(catalogue.codes.copy())
            made = Generator(size, codes, catalogue.sizes, facts["n_history"], facts["tokens"], facts["dropout"])
    except (KeyError, TypeError, ValueError, RuntimeError, UserError) as error:
        raise StoreError(f"{path} does not fit the description in {RECORD}: {error}. {AGAIN}") from error
    load_part(path, made, tensors)
    return made.eval().requires_grad_(False)


def load_part(path: Path, part: nn.Module, tensors: Mapping[str, Tensor], inside: str = "") -> None:
    """Put values into a network, after a check of names, shapes and types; `inside` is where a file has them.

    Raises:
        StoreError: One is missing, extra, or of another shape or type.
    """
    wanted = part.state_dict()
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise StoreError(f"{path} {'lacks' if name in wanted else 'also holds'} {inside + name!r}. {AGAIN}")
    for name, value in wanted.items():
        got = tensors[name]
        if got.shape != value.shape or got.dtype != value.dtype:
            raise StoreError(
                f"{path}: {inside + name!r} is {tuple(got.shape)} {got.dtype} and must be {tuple(value.shape)} {value.dtype}. "
                f"{AGAIN}"
            )
    part.load_state_dict(tensors)


# ---------------------------------------------------------------- the record and the page


def makers(hashes: Mapping[str, str], knowledge: Facts | None, shelf: Shelf, catalogue: Catalogue) -> dict[str, str]:
    """Name what makes a knowledge record: the language model with what it reads, all that is trained, the codes.

    Items that came after the training change none of these, so records stay valid when a catalogue grows.
    """
    n, told = catalogue.n_trained, dict((knowledge or {}).get("source", {}))
    for name in ("llm_name", "text_cache_mib"):
        told.pop(name, None)
    trained = {name: hashes[name] for name in (REFERENCE, CHANGE, KNOWLEDGE)}
    rest = {name: part for name, part in (knowledge or {}).items() if name != "source"}
    codes = store.digest_tensor(torch.from_numpy(catalogue.codes[:n].copy()))
    return {
        "model": store.key(source=told, titles=list(shelf.titles[:n]), ids=[item.id for item in shelf.items[:n]]),
        "fusion": store.key(files=trained, knowledge=rest),
        "tokeniser": store.key(codes=codes, sizes=list(catalogue.sizes)),
    }


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "fingerprint": str, "serves": str, "generator": dict, "knowledge": (dict, type(None)), "makers": dict,
    "data": dict, "settings": dict, "packages": dict,
}  # fmt: skip


_CONTEXTS = ("reference", "policy")


def read_record(path: Path) -> dict[str, Any]:
    """Read ``retouch.json``.

    Raises:
        StoreError: It is of another kind or format, or lacks something.
    """
    record = store.read_json(path / RECORD)
    record = record if isinstance(record, dict) else {}
    kind, number = record.get("kind"), record.get("format")
    if kind != KIND:
        raise StoreError(f"{path} is no bundle of a recommender but of kind {kind!r}. Name the bundle's folder.")
    if number != FORMAT:
        newer = isinstance(number, int) and number > FORMAT
        what = "Update Retouch." if newer else AGAIN
        raise StoreError(f"{path} has format {number!r}; this Retouch reads format {FORMAT}. {what}")
    wrong = [name for name, kinds in _TYPES.items() if not isinstance(record.get(name, ...), kinds)]
    if wrong or record["serves"] not in ("policy", "reference"):
        raise StoreError(f"{path}: {RECORD} lacks {(wrong or ['serves'])[0]!r} or holds something else there. {AGAIN}")
    told = record["knowledge"]
    if told is not None and not (isinstance(told.get("source"), dict) and told.get("context") in _CONTEXTS):
        raise StoreError(f"{path}: {RECORD} does not describe its source of knowledge. {AGAIN}")
    return record


_WHAT = {
    ITEMS: "the items: raw id, texts, codes, training count",
    REFERENCE: "the recommender without knowledge",
    CHANGE: "the values that stand in for the reference's; without them it is the reference, bit for bit",
    KNOWLEDGE: "instructions, fusion and gate",
    TRIE: "the codes; the tree of them is built when the bundle is opened",
    PROTOTYPES: "what stands in for the knowledge of people who have no record",
    TOKENISER: "gives new items their codes",
    CERTIFICATE: "the proof",
    ARRAYS: "what the proof is computed from",
    TRAINING: "how it was trained",
    GROUPS: "names of the groups of users, for reasons",
    SEEN: "who had a part in training, as salted hashes; the salt is not here",
    RECORD: "settings, sizes, versions and fingerprints, for programs",
}


def card(record: Facts, shelf: Shelf, catalogue: Catalogue, proof: str, present: Collection[str]) -> str:
    """Write the page for people."""
    data, told = record["data"], record["knowledge"]
    source = (told or {}).get("source", {"kind": "none"})
    asks = {"text": "the items' text vectors; no language model", "none": "nothing"}.get(source["kind"])
    serves = {
        "policy": "the recommender with knowledge, on the rungs that the certificate allows",
        "reference": "the reference, which is without knowledge",
    }[record["serves"]]
    return "\n".join([
        f"# A recommender for {data['name']}",
        "",
        f"{len(shelf.items):,} items, each with {len(catalogue.sizes)} codes; trained on {data['n_users']:,} users. "
        f"Fingerprint {record['fingerprint']}.",
        "",
        f"- It serves {serves}.",
        f"- {proof}",
        f"- Knowledge comes from {asks or source.get('llm_name')}. Serving needs no language model; making records does.",
        "",
        '    retouch recommend for THIS --history "TITLE; TITLE"',
        "    retouch recommend nearline THIS --store sqlite:knowledge.db --histories histories.csv",
        "    retouch recommend serve THIS --store sqlite:knowledge.db",
        "",
        "| file | what it is |",
        "| --- | --- |",
        *(f"| {name} | {what} |" for name, what in _WHAT.items() if name in present or name == RECORD),
        "",
    ])  # fmt: skip
