"""Constraint sets: prompts whose answers an edit must leave alone, built for the user.

`constraints` makes them for a fact, `for_facts` for a batch, `read_prompts` reads the user's own. Names and wordings are those of ``data/subjects.yaml``.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, TypeVar

from ..errors import SettingsError
from ._constraint import Constraint, read_prompts
from ._subjects import common, content, fold, generic, key, stem, subject_type, types
from .facts import Fact, protected

__all__ = [
    "Constraint",
    "Half",
    "constraints",
    "for_facts",
    "half_of",
    "read_prompts",
    "subject_type",
]

Half = Literal["plan", "certify"]
T = TypeVar("T")

_log = logging.getLogger(__name__)
_SUBJECT_SHARE = 0.2
_RELATION_SHARE = 0.75  # of what the fact's own subject leaves: 60 to 20
_PLAN_TENTHS = 7
_ENOUGH = 20  # names with an article


def constraints(
    fact: Fact, *, n: int = 500, seed: int = 0, half: Half = "plan", own: Sequence[str] = ()
) -> list[Constraint]:
    """Build the prompts that an edit of one fact must leave alone.

    Source:
        Constraining other subjects of the edited relation: Liu et al., arXiv 2408.15091 (RETS). The mixture, the lists
        and the split are ours.

    Args:
        fact: The fact. Without a subject there are general prompts only.
        n: How many prompts, `own` among them; fewer where there are no more.
        seed: Same seed, same prompts.
        half: ``plan`` for planning an edit, ``certify`` for judging it; the two share no subject and no prompt.
        own: The user's own prompts: first and all of them, in whichever half is asked for.

    Returns:
        Own prompts, then 60 % of the same relation, 20 % of the same subject (``plan`` only) and 20 % general ones.
        What one kind cannot fill, the others do.

    Raises:
        SettingsError: `n` or `half` is wrong.

    Example:
        >>> found = constraints(Fact("The capital of {} is", "France", "Lyon"), n=100)
        >>> found[0].kind, found[0].prompt.startswith("The capital of ")
        ('relation', True)
        >>> any("France" in c.prompt for c in found if c.kind != "subject")
        False
    """
    return for_facts([fact], n=n, seed=seed, half=half, own=own)


def for_facts(
    facts: Sequence[Fact], *, n: int = 500, seed: int = 0, half: Half = "plan", own: Sequence[str] = ()
) -> list[Constraint]:
    """Build one set for facts that are edited together: each in turn gives a prompt, until there are `n`.

    No prompt contains a prompt or a paraphrase of a fact, none but those of the kind ``subject`` names an edited
    subject, and none shares a subject with the facts' neighbours. The arguments are those of `constraints`.

    Raises:
        SettingsError: `n` or `half` is wrong.
    """
    if n < 0:
        raise SettingsError(f"n must be 0 prompts or more; got {n}.")
    if half not in ("plan", "certify"):
        raise SettingsError(f"half must be 'plan' or 'certify'; got {half!r}.")
    guard = _Guard(facts)
    first = _own(own, guard)
    about = [fact for fact in facts if fact.subject]
    if len(about) < len(facts):
        _log.warning("Facts without a subject add general prompts only.")
    rest = max(0, n - len(first))
    take = partial(_take, guard=guard, seen={fold(c.prompt) for c in first})
    sources = [_same_subject(fact, about, seed) for fact in about] if half == "plan" else []
    subject = take(_in_turn(sources), round(_SUBJECT_SHARE * rest))
    share = round(_RELATION_SHARE * (rest - len(subject)))
    relation = take(_in_turn([_same_relation(fact, half, seed) for fact in about]), share)
    general = take(_general(about, half, seed), rest - len(subject) - len(relation))
    return [*first, *relation, *subject, *general]


def half_of(prompt: str, subject: str = "") -> Half:
    """Say to which half a prompt belongs: by SHA-256 of its subject, or of itself where no subject is known.

    Example:
        >>> half_of("The capital of France is", "France") == half_of("In France, people speak", "France")
        True
    """
    digest = hashlib.sha256(key(subject or prompt).encode()).digest()
    return "plan" if int.from_bytes(digest[:8], "big") % 10 < _PLAN_TENTHS else "certify"


# The three sources


def _same_relation(fact: Fact, half: Half, seed: int) -> Iterator[Constraint]:
    """Ask for the fact's relation of other subjects of its type: by turns in its own words and in other ones."""
    names = types()[_type_of(fact)].names
    with_article = tuple(name for name in names if name.startswith("the "))
    if _brings_article(fact.before) and len(with_article) >= _ENOUGH:
        names = with_article
    asked = [t for t in _templates_for(fact) if t in _asking(fact)]
    wordings = [(fact.before, fact.after), *((b, a) for b, _, a in (t.partition("{}") for t in asked))]

    def filled(before: str, after: str) -> Iterator[Constraint]:
        for name in _drawn(names, f"{seed} {fact.filled} {before}{after}"):
            if half_of("", name) == half and not _share_name(fact.subject, name):
                yield Constraint(_fill(before, name, after), "relation", _bare(name))

    return _in_turn([filled(*wording) for wording in wordings])


def _same_subject(fact: Fact, facts: Sequence[Fact], seed: int) -> Iterator[Constraint]:
    """Ask for other relations of the fact's subject than those that are edited."""
    edited = [other for other in facts if key(other.subject) == key(fact.subject)]
    asked = frozenset[str]().union(*map(_asking, edited))
    subject = f"the {fact.subject}" if _brings_article(fact.before) else fact.subject
    for template in _drawn([t for t in _templates_for(fact) if t not in asked], f"{seed} {fact.filled}"):
        before, _, after = template.partition("{}")
        yield Constraint(_fill(before, subject, after), "subject", fact.subject)


def _general(facts: Sequence[Fact], half: Half, seed: int) -> Iterator[Constraint]:
    """Draw by turns a prompt that ships with Retouch, and a filled template of another type than the facts'."""
    families = {types()[_type_of(fact)].family for fact in facts}
    kinds = [t for t in types().values() if not t.wide]
    others = [t for t in kinds if t.family not in families] or kinds
    filled = [c for t in others for c in _filled(t.name, half)]
    return _in_turn([_drawn(_shipped(half), seed), _drawn(filled, seed)])


@functools.cache
def _shipped(half: Half) -> list[Constraint]:
    found = (Constraint(p.prompt, "general", _listed_in(p.prompt)) for p in protected())
    return [c for c in found if half_of(c.prompt, c.subject) == half]


def _listed_in(prompt: str) -> str:
    """Return the longest name of our lists that stands in a prompt, or ``""``."""
    bare = {_bare(name) for t in types().values() for name in t.names}
    found = [name for name in bare if name in prompt and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt)]
    return max(found, key=lambda name: (len(name), name), default="")


@functools.cache
def _filled(kind: str, half: Half) -> list[Constraint]:
    """Fill all templates of a type with all its names of one half."""
    names = [name for name in types()[kind].names if half_of("", name) == half]
    pieces = [template.partition("{}") for template in types()[kind].templates]
    return [Constraint(_fill(b, name, a), "general", _bare(name)) for b, _, a in pieces for name in names]


def _own(prompts: Sequence[str], guard: _Guard) -> list[Constraint]:
    """Keep the user's prompts, once each; one that asks for an edited fact cannot be kept and is told."""
    texts = dict.fromkeys(prompt.strip() for prompt in prompts)
    edited = [text for text in texts if guard.asks(text)]
    if edited:
        _log.warning("%d of your own prompts ask for an edited fact and are left out: %r.", len(edited), edited[0])
    return [Constraint(text, "general", "") for text in texts if text and text not in edited]


# Which relation a prompt asks for


def _type_of(fact: Fact) -> str:
    return subject_type(fact.subject, fact.prompt, fact.relation)


def _templates_for(fact: Fact) -> list[str]:
    """List the templates of the subject's type; a listed musician has more of them than 'a person'."""
    kind = types()[_type_of(fact)]
    narrow = [t for t in types().values() if kind.wide and t.family == kind.name and key(fact.subject) in t.keys]
    return list(dict.fromkeys(template for t in [*narrow, kind] for template in t.templates))


def _asking(fact: Fact) -> frozenset[str]:
    """Collect the templates that ask for the relation of a fact, or may do so."""
    return _same(fold(fact.relation or ""), frozenset(_wording(fact)))


@functools.lru_cache(maxsize=1024)
def _same(relation: str, wording: frozenset[str]) -> frozenset[str]:
    found: set[str] = set()
    for ask in {ask for t in types().values() for ask in t.asks}:
        named = bool(ask.words & {relation, *relation.split()} or set(map(stem, ask.words)) & wording)
        found.update(t for t in ask.templates if named or (_stems(t) - common()) & wording)
    return frozenset(found)


def _wording(fact: Fact) -> Iterator[str]:
    """Yield the stems of the words that ask for the fact, without its subject and an unrelated lead-in."""
    for text in (fact.prompt, *fact.paraphrases):
        before, _, after = text.rpartition("{}" if "{}" in text else fact.subject)
        sentence = re.split(r"[.!?:]\s|\n", before)[-1]
        yield from _stems(f"{sentence} {after}")


@functools.lru_cache(maxsize=8192)
def _stems(text: str) -> frozenset[str]:
    return frozenset(map(stem, content(text)))


# What must not be in a set


class _Guard:
    """Refuses prompts that ask for an edited fact, name an edited subject, or serve the evaluation."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.edited = [fold(text) for fact in facts for text in (fact.filled, *fact.paraphrases)]
        self.evaluated = {fold(p.prompt) for fact in facts for p in (*fact.neighbors, *fact.related)}
        self.evaluated |= {fold(text) for fact in facts for text in (*fact.instructions, *fact.generation)}
        self.nearby = "\n".join(fold(p.prompt) for fact in facts for p in fact.neighbors)
        self.subjects = {_spaced(fact.subject) for fact in facts if fact.subject}

    def asks(self, prompt: str) -> bool:
        """Say whether a prompt contains a prompt of an edited fact."""
        text = fold(prompt)
        return any(edited in text for edited in self.edited)

    def allows(self, constraint: Constraint) -> bool:
        """Say whether a prompt may be in the set."""
        if fold(constraint.prompt) in self.evaluated or self.asks(constraint.prompt):
            return False
        if constraint.subject and fold(constraint.subject) in self.nearby:
            return False
        text = _spaced(constraint.prompt)
        return constraint.kind == "subject" or not any(subject in text for subject in self.subjects)


def _share_name(subject: str, name: str) -> bool:
    """Say whether two names are one, contain one another, or have a telling word in common."""
    if _spaced(subject) in _spaced(name) or _spaced(name) in _spaced(subject):
        return True
    return bool(_telling(subject) & _telling(name))


@functools.lru_cache(maxsize=8192)
def _telling(name: str) -> frozenset[str]:
    return frozenset(content(name)) - generic()


@functools.lru_cache(maxsize=8192)
def _spaced(text: str) -> str:
    """Return the folded words of a text with spaces around each, without a leading article."""
    words = " ".join(re.findall(r"\w+", key(text)))
    return f" {words} "


# Filling and drawing


def _brings_article(before: str) -> bool:
    return re.search(r"\b[Tt]he\s+$", before) is not None


def _bare(name: str) -> str:
    return name.removeprefix("the ")


def _fill(before: str, name: str, after: str) -> str:
    """Put a name into a template: one article, and a capital at the beginning."""
    if _brings_article(before):
        name = _bare(name).removeprefix("The ")
    elif not before.strip() and (name.startswith("the ") or name.islower()):
        name = name[0].upper() + name[1:]
    return before + name + after


def _drawn(pool: Sequence[T], seed: int | str) -> Iterator[T]:
    """Yield a pool in random order, shuffled only as far as it is read."""
    rng = random.Random(seed)
    moved: dict[int, int] = {}
    for i in range(len(pool)):
        j = rng.randrange(i, len(pool))
        yield pool[moved.get(j, j)]
        moved[j] = moved.get(i, i)


def _in_turn(sources: Sequence[Iterator[T]]) -> Iterator[T]:
    """Yield one item of each source after another, until all have ended."""
    waiting = list(sources)
    while waiting:
        left = []
        for source in waiting:
            for item in source:
                yield item
                left.append(source)
                break
        waiting = left


def _take(source: Iterable[Constraint], n: int, guard: _Guard, seen: set[str]) -> list[Constraint]:
    """Take up to `n` new prompts that the guard allows."""
    found: list[Constraint] = []
    for constraint in source if n > 0 else ():
        text = fold(constraint.prompt)
        if text not in seen and guard.allows(constraint):
            seen.add(text)
            found.append(constraint)
            if len(found) == n:
                break
    return found
