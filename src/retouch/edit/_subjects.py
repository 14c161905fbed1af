"""Types of subjects: well-known names, templates that ask about them, and which type a subject is of.

The lists are ``data/subjects.yaml``; `constraints` fills the templates.
"""

from __future__ import annotations

import functools
import itertools
import re
import shlex
import unicodedata
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from .facts import is_stop

__all__ = ["Ask", "SubjectType", "common", "content", "fold", "generic", "key", "stem", "subject_type", "types"]


@dataclass(frozen=True)
class Ask:
    """A relation: the identifiers and words that name it, and the templates that ask for it."""

    words: frozenset[str]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class SubjectType:
    """A type of ``subjects.yaml``.

    Attributes:
        name: What it is called there.
        family: Its parent, else itself: ``musician`` and ``person`` are one family.
        phrases: Phrases of a prompt that tell it.
        relations: Identifiers and names of relations whose subjects are of this type.
        asks: Its relations and its parent's.
        names: Well-known subjects; a wider type has those of all its children.
        wide: Whether other types are its children.
    """

    name: str
    family: str
    phrases: tuple[str, ...]
    relations: frozenset[str]
    asks: tuple[Ask, ...]
    names: tuple[str, ...]
    wide: bool

    @functools.cached_property
    def keys(self) -> frozenset[str]:
        """The names as `key` makes them."""
        return frozenset(map(key, self.names))

    @functools.cached_property
    def templates(self) -> tuple[str, ...]:
        """All templates, each once."""
        return tuple(dict.fromkeys(t for ask in self.asks for t in ask.templates))


@functools.cache
def types() -> dict[str, SubjectType]:
    """Return all types by name, in the order of the file."""
    rows = _data()["types"]
    return {name: _type(name, rows) for name in rows}


def _type(name: str, rows: dict[str, Any]) -> SubjectType:
    row = rows[name]
    parent = rows.get(row.get("parent"), {})
    asks = [*row["asks"].items(), *parent.get("asks", {}).items()]
    children = [other["names"] for other in rows.values() if other.get("parent") == name]
    return SubjectType(
        name=name,
        family=row.get("parent", name),
        phrases=tuple(map(fold, row["words"])),
        relations=frozenset(map(fold, shlex.split(row["relations"]))),
        asks=tuple(Ask(frozenset(fold(words).split()), tuple(templates)) for words, templates in asks),
        names=tuple(dict.fromkeys(itertools.chain(row.get("names", ()), *children))),
        wide=bool(children),
    )


def subject_type(subject: str, prompt: str, relation: str | None = None) -> str:
    """Say of which type a subject is.

    1. Phrases of the prompt give candidates. If some of them have the relation, only those remain; then those with
       the longest phrase.
    2. Without a phrase, the types that have the relation are the candidates.
    3. Of several candidates the one whose list holds the subject wins, else the first of ``subjects.yaml``.
    4. Without candidates, the first type whose list holds the subject; else ``other``.

    Args:
        subject: The subject, which need not be in any list.
        prompt: A template with ``{}``, or a filled prompt.
        relation: An identifier such as ``P36`` or a name such as ``capital``.

    Example:
        >>> subject_type("Danielle Darrieux", "The mother tongue of {} is", "P103")
        'person'
        >>> subject_type("Toko Yasuda", "{} plays the instrument")
        'musician'
    """
    found = _by_phrase(subject, prompt)
    related = [t.name for t in types().values() if relation and fold(relation) in t.relations]
    listed = [t.name for t in types().values() if not t.wide and key(subject) in t.keys]
    if narrowed := {name: size for name, size in found.items() if name in related}:
        found = narrowed
    candidates = [name for name, size in found.items() if size == max(found.values())] or related
    holding = [name for name in candidates if key(subject) in types()[name].keys]
    return next(iter(holding or candidates or listed or ["other"]))


def _by_phrase(subject: str, prompt: str) -> dict[str, int]:
    """Return the length of the longest phrase of each type that stands in a prompt."""
    if "{}" not in prompt and subject:
        prompt = "{}".join(prompt.rsplit(subject, 1))
    text = f" {fold(prompt)} "
    sizes = {t.name: max((len(p) for p in t.phrases if _stands(p, text)), default=0) for t in types().values()}
    return {name: size for name, size in sizes.items() if size}


def _stands(phrase: str, text: str) -> bool:
    """Say whether a phrase stands in a text with no letter right before or after it."""
    at = text.find(phrase)
    while at >= 0:
        if not (text[at - 1].isalnum() or text[at + len(phrase)].isalnum()):
            return True
        at = text.find(phrase, at + 1)
    return False


# Words


def fold(text: str) -> str:
    """Return a text for comparison: NFKC, without case, one space between words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def key(name: str) -> str:
    """Return a name for comparison, without its article."""
    return fold(name).removeprefix("the ")


def content(text: str) -> list[str]:
    """Return the folded words of a text that say something.

    Example:
        >>> content("The capital of {} is")
        ['capital']
    """
    return [word for word in re.findall(r"\w+", fold(text)) if not is_stop(word)]


def stem(word: str) -> str:
    """Cut a word to its first five letters, so that its forms compare equal."""
    return word[:5]


@functools.cache
def generic() -> frozenset[str]:
    """Return words that say what kind of thing a name is, such as 'mount'."""
    return frozenset(_data()["generic"].split())


@functools.cache
def common() -> frozenset[str]:
    """Return the stems of words that stand in prompts of many relations, such as 'city'."""
    return frozenset(map(stem, _data()["common"].split()))


@functools.cache
def _data() -> dict[str, Any]:
    text = (files("retouch") / "data" / "subjects.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
    data: dict[str, Any] = yaml.load(text, Loader=loader)
    return data
