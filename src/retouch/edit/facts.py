"""Facts: what is to be true after an edit, and the prompts that show what else the edit changed.

`Fact` is checked when it is made, so every method may trust it. `load` reads the published data sets and our own
format, told apart by their field names.
"""

from __future__ import annotations

import functools
import json
import logging
import random
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

from ..errors import FactError
from ._fact import Fact, Prompt
from ._formats import FORMATS, read

__all__ = ["Fact", "Prompt", "demo", "disjoint", "formats", "is_stop", "load", "protected", "stop_words"]

_log = logging.getLogger(__name__)
_DATA = Path(__file__).parent.parent / "data"
_RELATED = 10  # as many as CounterFact has neighbours; also keeps the search linear


def load(
    path: str | Path, n: int | None = None, seed: int | None = None, *, bad: Literal["error", "skip"] = "error"
) -> list[Fact]:
    """Read facts from a JSON or JSON Lines file of any known format (see `formats`).

    If no record of the set has related prompts, other records of the same subject serve as such: then call `disjoint`
    before all facts are written into one model.

    Args:
        path: The file, UTF-8.
        n: How many facts to keep; all if not given. Related prompts are drawn from the whole file nevertheless.
        seed: Draw the `n` facts with this seed, in the order of the file; without it they are the first ones.
        bad: ``"error"`` stops at the first record that cannot be used; ``"skip"`` leaves such records out and logs
            how many and why.

    Raises:
        FactError: With file, line (JSON Lines, from 1) or record (JSON array, from 0), and field.
    """
    if n is not None and n < 1:
        raise FactError(f"n must be at least 1 fact; got {n}.")
    if bad not in ("error", "skip"):
        raise FactError(f"bad must be 'error' or 'skip'; got {bad!r}.")
    path = Path(path)
    facts = list(read(path, bad == "skip"))
    if not any(fact.related for fact in facts):
        facts = _relate(facts)
    if n is None or n >= len(facts):
        if n is not None and n > len(facts):
            _log.warning("%s holds %d facts; %d were asked for.", path.name, len(facts), n)
        return facts
    kept = range(n) if seed is None else sorted(random.Random(seed).sample(range(len(facts)), n))
    return [facts[i] for i in kept]


def disjoint(facts: Sequence[Fact]) -> list[Fact]:
    """Drop the neighbours and related prompts that another fact of the list edits.

    When many facts go into one model, such a prompt is meant to change and says nothing about harm.

    Example:
        >>> capital = Fact("The capital of {} is", "Peru", "Cusco", related=[Prompt("The language of Peru is")])
        >>> language = Fact("The language of {} is", "Peru", "Latin")
        >>> disjoint([capital, language])[0].related
        ()
    """
    edited = {text.strip() for fact in facts for text in (fact.filled, *fact.paraphrases)}

    def kept(prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
        return tuple(p for p in prompts if p.prompt.strip() not in edited)

    return [replace(fact, neighbors=kept(fact.neighbors), related=kept(fact.related)) for fact in facts]


def formats() -> dict[str, str]:
    """Describe the formats that `load` knows, by name."""
    return {name: form.about for name, form in FORMATS.items()}


def demo() -> list[Fact]:
    """Load the sample facts that ship with Retouch; a small model knows them."""
    return load(_DATA / "demo_facts.jsonl")


@functools.cache
def _protected() -> tuple[Prompt, ...]:
    records = map(json.loads, (_DATA / "protected_prompts.jsonl").read_text(encoding="utf-8").splitlines())
    return tuple(Prompt(r["prompt"], r["answer"]) for r in records)


def protected() -> list[Prompt]:
    """Load factual prompts that edits must leave alone; none is about a sample fact. See `constraints` for their halves."""
    return list(_protected())


@functools.cache
def stop_words() -> frozenset[str]:
    """Return the English words that name nothing: function words, contractions, single letters."""
    lines = (_DATA / "stop_words.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(word.casefold() for line in lines for word in line.partition("#")[0].split())


def is_stop(text: str) -> bool:
    """Say whether a piece of text names nothing: a stop word, or no letter and no digit in it.

    Example:
        >>> is_stop(" The"), is_stop("..."), is_stop(" Paris")
        (True, True, False)
    """
    word = text.strip().casefold().replace("’", "'")
    return word in stop_words() or not any(map(str.isalnum, word))


def _relate(facts: list[Fact]) -> list[Fact]:
    """Let other facts of the same subject serve as related prompts, in one pass over the subjects."""
    groups: dict[str, dict[str, Fact]] = {}
    for fact in facts:
        if fact.subject:
            groups.setdefault(_fold(fact.subject), {}).setdefault(fact.filled, fact)
    return [_with_related(fact, groups.get(_fold(fact.subject), {}).values()) for fact in facts]


def _with_related(fact: Fact, group: Iterable[Fact]) -> Fact:
    others = islice((other for other in group if _another_relation(fact, other)), _RELATED)
    related = tuple(Prompt(other.filled, other.truth) for other in others)
    return replace(fact, related=related) if related else fact


def _another_relation(fact: Fact, other: Fact) -> bool:
    if fact.filled == other.filled or other.filled in fact.paraphrases:
        return False
    if fact.relation and other.relation:
        return fact.relation != other.relation
    if fact.truth and other.truth:  # one answer: likely one relation in other words
        return _fold(fact.truth) != _fold(other.truth)
    return True


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
