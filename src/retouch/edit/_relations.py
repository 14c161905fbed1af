"""What the public data sets know: subjects, their relations, and the clozes and questions that ask for them.

LRE, T-REx with ParaRel's patterns, and CounterFact's certain rows are joined on the subject; one table
(``data/relations.yaml``) says which of their relations are the same. Recipe: ``docs/suites.md``.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..errors import FactError
from ..store import sha256_file
from ._fact import Prompt, as_items, missing
from ._formats import read_text

__all__ = ["Knowledge", "Relation", "Row", "Subject", "Table", "fold", "read_knowledge", "read_rows", "table"]

_ROWS = "counterfact/relation_ids.tsv"
_COLUMNS = ("case_id", "relation_id", "how", "subject", "template", "target_true")


def fold(text: str) -> str:
    """Return a name as names are compared: NFKC, without case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# Our own table


@dataclass(frozen=True)
class Table:
    """The table of relations that ships with Retouch.

    Attributes:
        relations: Fields of each relation: ``types``, ``questions``, and where given ``lre`` and ``templates``.
        near: For a relation those too close to it to bear witness, itself included.
        typed: For a type of subject its clozes by relation.
    """

    relations: Mapping[str, Mapping[str, Any]]
    near: Mapping[str, frozenset[str]]
    typed: Mapping[str, Mapping[str, str]]

    def close(self, relation: str | None) -> frozenset[str]:
        """Return a relation and those near it."""
        return self.near.get(relation or "", frozenset({relation or ""}))

    def type_of(self, relations: Iterable[str | None]) -> str:
        """Guess what a subject is from its relations: the type that most of them can have.

        On a tie the type counts that comes first in the relation with the fewest types.
        """
        lists = [list(self.relations[r]["types"]) for r in relations if r and r in self.relations]
        votes = Counter(kind for kinds in lists for kind in kinds)
        ordered = [kind for kinds in sorted(lists, key=len) for kind in kinds]
        return max(ordered, key=lambda kind: votes[kind], default="other")


@functools.cache
def table() -> Table:
    """Read the table of relations, once."""
    data = yaml.safe_load((files("retouch") / "data" / "relations.yaml").read_text(encoding="utf-8"))
    near = {name: frozenset(group) for group in data["near"] for name in group}
    return Table(data["relations"], near, data["typed"])


# What was read


@dataclass(frozen=True)
class Relation:
    """One relation, merged over the sets.

    Attributes:
        templates: Clozes with ``{}`` for the subject; those that begin with the subject come first.
        questions: Question forms with ``{}``.
        objects: Every object that it has in the data, in order.
        holders: For a folded object the keys of its subjects.
    """

    id: str
    templates: tuple[str, ...]
    questions: tuple[str, ...]
    objects: tuple[str, ...]
    holders: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Subject:
    """Somebody or something, and its objects by relation."""

    name: str
    facts: Mapping[str, tuple[str, ...]]

    def prompt(self, relation: Relation, name: str | None = None) -> Prompt:
        """Ask for one relation, with the answer; further objects count as right, too. `name` is another spelling."""
        first, *more = self.facts[relation.id]
        return Prompt(relation.templates[0].replace("{}", name or self.name), first, tuple(more))


@dataclass(frozen=True)
class Row:
    """A record of CounterFact as its list of relations has it."""

    case: str
    relation: str
    certain: bool
    subject: str
    template: str
    truth: str

    @property
    def prompt(self) -> str:
        """The filled prompt."""
        return self.template.replace("{}", self.subject)


@dataclass(frozen=True)
class Knowledge:
    """All relations and subjects.

    Attributes:
        relations: By their names in the table.
        subjects: By their folded names, in order.
        skipped: How many records could not be used, by reason.
        sources: SHA-256 of every file that was read, by its path in the data folder.
    """

    relations: Mapping[str, Relation]
    subjects: Mapping[str, Subject]
    skipped: Mapping[str, int]
    sources: Mapping[str, str]


@dataclass
class _Heap:
    """What is collected while the sets are read."""

    triples: dict[str, dict[str, dict[str, None]]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    templates: dict[str, dict[str, None]] = field(default_factory=dict)
    questions: dict[str, dict[str, None]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    sources: dict[str, str] = field(default_factory=dict)

    def add(self, relation: str, subject: object, object_: object) -> None:
        """Keep a triple, unless a part of it is no usable text."""
        if not (_usable(subject) and _usable(object_)):
            self.skipped["triples without usable text"] += 1
            return
        name, answer = str(subject).strip(), str(object_).strip()
        self.names.setdefault(fold(name), name)
        answers = self.triples.setdefault(fold(name), {}).setdefault(relation, {})
        if fold(answer) not in map(fold, answers):
            answers[answer] = None

    def ask(self, relation: str, templates: Iterable[object]) -> None:
        """Keep clozes and questions, each with one place for the subject."""
        for template in templates:
            if not isinstance(template, str) or template.count("{}") != 1:
                self.skipped["templates without one {}"] += 1
                continue
            kind = self.questions if "?" in template else self.templates
            kind.setdefault(relation, {})[template] = None


def _usable(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "{}" not in value


def read_knowledge(data_dir: Path) -> Knowledge:
    """Read the sets that the data folder holds and join them.

    Source:
        LRE: Hernandez et al. 2024 (evandez/relations). T-REx: ElSahar et al. 2018, as in LAMA (Petroni et al. 2019).
        Patterns: ParaRel, Elazar et al. 2021. CounterFact: Meng et al. 2022.

    Raises:
        FactError: A folder is missing or empty, or a line cannot be read.
    """
    heap, own = _Heap(), table()
    for name, entry in own.relations.items():
        heap.ask(name, entry["questions"])
    _read_lre(data_dir, heap, {entry["lre"]: name for name, entry in own.relations.items() if "lre" in entry})
    for name, entry in own.relations.items():
        heap.ask(name, entry.get("templates", ()))
    _read_trex(data_dir, heap)
    heap.sources[_ROWS] = sha256_file(_file(data_dir / _ROWS))
    for row in read_rows(data_dir):
        if row.certain and row.relation in own.relations:
            heap.add(row.relation, row.subject, row.truth)
    return _joined(heap)


def _read_lre(data_dir: Path, heap: _Heap, wanted: Mapping[str, str]) -> None:
    for path in _folder(data_dir / "lre_relations" / "factual", "*.json"):
        if (name := wanted.get(path.stem)) is None:
            heap.skipped["LRE relations not in the table"] += 1
            continue
        heap.sources[_inside(path, data_dir)] = sha256_file(path)
        data = _loads(_unescaped(read_text(path)), path.name)
        heap.ask(name, [*_list(data, "prompt_templates", path), *(data.get("prompt_templates_zs") or ())])
        for sample in _list(data, "samples", path):
            known = sample if isinstance(sample, dict) else {}
            heap.add(name, known.get("subject"), known.get("object"))


def _list(data: Mapping[str, Any], name: str, path: Path) -> list[Any]:
    if name not in data:
        raise FactError(f"{path.name}: {missing(name, data)}")
    try:
        return as_items(name, data[name])
    except FactError as error:
        raise FactError(f"{path.name}: {error}") from error


def _unescaped(text: str) -> str:
    r"""Undo escapes that were escaped once more (``\\u00e1``), as some published files have them."""
    return re.sub(r"\\\\u([0-9a-fA-F]{4})", r"\\u\1", text)


def _read_trex(data_dir: Path, heap: _Heap) -> None:
    folder = data_dir / "trex_pararel"
    for path in _folder(folder / "trex_lms_vocab", "*.jsonl"):
        if path.stem not in table().relations:
            heap.skipped["T-REx relations not in the table"] += 1
            continue
        patterns = folder / "pattern_data" / "graphs_json" / path.name
        for source in (path, patterns):
            heap.sources[_inside(source, data_dir)] = sha256_file(_file(source))
        heap.ask(path.stem, filter(None, (_cloze(str(line.get("pattern"))) for line in _lines(patterns))))
        for line in _lines(path):
            heap.add(path.stem, line.get("sub_label"), line.get("obj_label"))


def _cloze(pattern: str) -> str | None:
    """Turn ``[X] was born in [Y].`` into ``{} was born in``; None where more than a full stop follows the object."""
    before, _, after = pattern.partition("[Y]")
    if before.count("[X]") != 1 or after.strip() not in ("", "."):
        return None
    cloze = " ".join(before.replace("[X]", "{}").split())
    return cloze[0].upper() + cloze[1:]


def read_rows(data_dir: Path) -> list[Row]:
    """Read CounterFact's list of relations; records of which the template lacks the subject are left out.

    Raises:
        FactError: The file or a column is missing.
    """
    text = io.StringIO(read_text(_file(data_dir / _ROWS)), newline="")
    lines = list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    lacking = set(_COLUMNS) - set(lines[0] if lines else ())
    if lacking:
        raise FactError(f"{_ROWS}: columns are missing: {', '.join(sorted(lacking))}.")
    rows = [
        Row(x["case_id"], x["relation_id"], x["how"] == "gold", x["subject"], x["template"], x["target_true"])
        for x in lines
        if None not in map(x.get, _COLUMNS)  # a line that was cut off
    ]
    return [row for row in rows if row.template.count("{}") == 1 and _usable(row.subject) and _usable(row.truth)]


def _joined(heap: _Heap) -> Knowledge:
    templates = _told_apart(heap.templates)
    subjects = {key: Subject(heap.names[key], _asked(heap.triples[key], templates)) for key in sorted(heap.triples)}
    held: dict[str, dict[str, list[str]]] = {name: {} for name in table().relations}
    objects: dict[str, dict[str, str]] = {name: {} for name in table().relations}
    for key, subject in subjects.items():
        for name, answers in subject.facts.items():
            for answer in answers:
                held[name].setdefault(fold(answer), []).append(key)
                objects[name].setdefault(fold(answer), answer)
    relations = {
        name: Relation(
            name,
            templates.get(name, ()),
            tuple(heap.questions[name]),
            tuple(objects[name][k] for k in sorted(objects[name])),
            {answer: tuple(keys) for answer, keys in held[name].items()},
        )
        for name in table().relations
    }
    return Knowledge(relations, subjects, dict(heap.skipped), heap.sources)


def _asked(
    triples: Mapping[str, Mapping[str, None]], templates: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    return {name: tuple(answers) for name, answers in triples.items() if templates.get(name)}


def _told_apart(templates: Mapping[str, Mapping[str, None]]) -> dict[str, tuple[str, ...]]:
    """Drop clozes that ask for several relations at once, unless a relation has no other; subject-first ones lead."""
    users = Counter(template for clozes in templates.values() for template in clozes)
    found = {}
    for name, clozes in templates.items():
        own = [t for t in clozes if users[t] == 1] or list(clozes)
        found[name] = tuple(sorted(own, key=lambda t: (not t.startswith("{}"), "," in t or "{} that" in t)))
    return found


# Files


def _folder(folder: Path, pattern: str) -> list[Path]:
    if not (paths := sorted(folder.glob(pattern))):
        raise FactError(f"there is no {pattern} in {folder}. docs/suites.md lists the sets and where they stand.")
    return paths


def _file(path: Path) -> Path:
    if not path.is_file():
        raise FactError(f"there is no file {str(path)!r}. docs/suites.md lists the sets and where they stand.")
    return path


def _inside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for i, line in enumerate(read_text(_file(path)).split("\n"), 1):
        if line.strip():
            yield _loads(line, f"{path.name} line {i}")


def _loads(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise FactError(f"{where}: broken JSON: {error}.") from error
    if not isinstance(data, dict):
        raise FactError(f"{where}: an object is needed; got {data!r:.80}.")
    return data
