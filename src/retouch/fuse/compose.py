"""Prompts of several questions from several domains, drawn so that comparisons need few assumptions.

A bundle takes three questions of each domain and asks them in nine instances, so that each question is asked three
times and no two questions meet twice. Bundles share nothing: what varies together stays in one, and a bundle is what
`composed_metrics` draws again.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, cycle
from pathlib import Path
from typing import Any

from ..errors import FactError, UserError
from ..store import key, read_json, write_json_atomic
from .base import Question

__all__ = [
    "Answers",
    "Instance",
    "bundles",
    "composed",
    "drawn_as",
    "own_domain",
    "read_recipe",
    "shots",
    "singles",
    "write_recipe",
]

FORMAT = 1
PER_BUNDLE = 3
MOST_PARTS = 4
"""With three questions a domain, four is the most for which pairs meet at most once."""


@dataclass(frozen=True)
class Instance:
    """Questions that one prompt asks, in order.

    Attributes:
        bundle: Number of the group that it shares questions with; no other group holds any of them.
        parts: The questions.
    """

    bundle: int
    parts: tuple[Question, ...]


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        instances: What it was asked.
        chosen: For each instance the number of the option that it chose in each part; -1 where none could be read.
        how: How it was asked.
        scores: For each instance and part the log probabilities of the options; empty where text was written.
    """

    instances: tuple[Instance, ...]
    chosen: tuple[tuple[int, ...], ...]
    how: str = "constrained"
    scores: tuple[tuple[tuple[float, ...], ...], ...] = ()


def bundles(
    questions: Mapping[str, Sequence[Question]],
    k: int | None = None,
    seed: int = 0,
    once: bool = False,
    *,
    n_bundles: int | None = None,
) -> list[Instance]:
    """Compose prompts of `k` questions, each from another domain.

    With more domains than `k` the bundles go round all choices of `k` domains. The order of domains goes round as
    well, so that each domain stands equally often at each place. Questions are taken in the order of their hash with
    the seed; what is left of a larger pool is not asked.

    Args:
        questions: The domains' questions.
        k: Questions of a prompt; all domains, at most 4, if not given.
        seed: Of the drawing.
        once: Ask every question once: a bundle is then one instance, and instances are independent.
        n_bundles: The most bundles.

    Raises:
        UserError: `k` does not suit, or a domain has too few questions.
    """
    k = min(MOST_PARTS, len(questions)) if k is None else k
    if not 2 <= k <= min(MOST_PARTS, len(questions)):
        raise UserError(f"A composed prompt asks 2 to {min(MOST_PARTS, len(questions))} questions here; got {k}.")
    pools = {d: sorted(own, key=lambda q: _draw(seed, q.key)) for d, own in questions.items()}
    size = 1 if once else PER_BUNDLE
    found: list[Instance] = []
    turns: dict[tuple[str, ...], int] = {}
    for number, (domains, drawn) in enumerate(_rounds(pools, k, size)):
        if n_bundles is not None and number >= n_bundles:
            break
        for parts in [tuple(own[0] for own in drawn)] if once else _met(drawn):
            turn = turns.get(domains, 0)
            turns[domains] = turn + 1
            found.append(Instance(number, parts[turn % k :] + parts[: turn % k]))
    if not found:
        small = min(pools, key=lambda d: len(pools[d]))
        raise UserError(f"A bundle takes {size} questions of each domain; {small} has {len(pools[small])}.")
    return found


def _draw(seed: int, question: str) -> str:
    return hashlib.sha256(f"{seed} {question}".encode()).hexdigest()


def _rounds(
    pools: Mapping[str, Sequence[Question]], k: int, size: int
) -> Iterator[tuple[tuple[str, ...], list[Sequence[Question]]]]:
    """Go round the choices of domains, taking from their pools, until one is empty."""
    used = dict.fromkeys(pools, 0)
    for domains in cycle(combinations(pools, k)):
        if any(used[d] + size > len(pools[d]) for d in domains):
            return
        drawn = [pools[d][used[d] : used[d] + size] for d in domains]
        used |= {d: used[d] + size for d in domains}
        yield domains, drawn


def _met(drawn: Sequence[Sequence[Question]]) -> list[tuple[Question, ...]]:
    """Lay three questions of each domain into nine instances: an orthogonal array, so pairs meet at most once."""
    found = []
    for a in range(PER_BUNDLE):
        for b in range(PER_BUNDLE):
            which = ((a + j * b) % PER_BUNDLE if j < PER_BUNDLE else b for j in range(len(drawn)))
            found.append(tuple(own[i] for own, i in zip(drawn, which)))
    return found


def singles(instances: Sequence[Instance]) -> list[Instance]:
    """Ask the same questions alone, each once; they keep their bundle, so that both can be compared."""
    seen: dict[tuple[int, str, str], Question] = {}
    for instance in instances:
        for q in instance.parts:
            seen.setdefault((instance.bundle, q.domain, q.key), q)
    return [Instance(bundle, (q,)) for (bundle, _, _), q in seen.items()]


def own_domain(questions: Sequence[Question], k: int, seed: int = 0, *, n: int | None = None) -> list[Instance]:
    """Compose prompts of `k` questions of one domain: what a single adapter loses on these, the format costs.

    Raises:
        UserError: There are fewer than `k` questions.
    """
    if len(questions) < k:
        raise UserError(f"{k} questions of one domain are needed; there are {len(questions)}.")
    order = sorted(questions, key=lambda q: _draw(seed, q.key))
    found = [Instance(i, tuple(order[i * k : (i + 1) * k])) for i in range(len(order) // k)]
    return found[:n]


def shots(
    questions: Mapping[str, Sequence[Question]], k: int, n: int = 2, seed: int = 0
) -> tuple[tuple[Question, ...], ...]:
    """Draw answered examples for the front of a prompt.

    Args:
        questions: Questions by domain that are in no split (`Suite.shots`).
        k: Questions of an example, as many as a prompt asks.
        n: How many examples.
        seed: Of the drawing.

    Raises:
        UserError: There are too few.
    """
    random_ = random.Random(f"{seed} shots")
    pools = {d: random_.sample(list(own), len(own)) for d, own in questions.items() if own}
    if not pools or sum(map(len, pools.values())) < n * k:
        raise UserError(
            f"{n} answered examples of {k} {'question' if k == 1 else 'questions'} each are wanted in front, and "
            f"{sum(map(len, pools.values()))} questions are kept for them. Take another template, or more rows to train."
        )
    turn = cycle(pools)
    found = []
    for _ in range(n):
        group: list[Question] = []
        while len(group) < k:
            if own := pools[next(turn)]:
                group.append(own.pop())
        found.append(tuple(group))
    return tuple(found)


def composed(
    questions: Sequence[Question], most: int, seed: str, *, n: int | None = None
) -> list[tuple[Question, ...]]:
    """Group one domain's questions by 1 to `most` each, going through all of them again and again.

    Args:
        questions: The questions.
        most: The largest group.
        seed: Of sizes and order.
        n: How many groups; if not given, one pass over the questions.

    Raises:
        UserError: There is no question.
    """
    if not questions:
        raise UserError("There is no question to make examples of.")
    random_ = random.Random(seed)
    found: list[tuple[Question, ...]] = []
    left: list[Question] = []
    while n is None or len(found) < n:
        if not left:
            if n is None and found:
                break
            left = random_.sample(list(questions), len(questions))
        size = random_.randint(1, most)
        found.append(tuple(left[:size]))
        left = left[size:]
    return found


# A draw on file: hashes, no data


def write_recipe(
    path: str | Path, suite: str, instances: Sequence[Instance], notes: Mapping[str, Any] | None = None
) -> None:
    """Write which questions stand together, by their hashes: the file holds no text of theirs.

    Args:
        path: The file.
        suite: The suite's name.
        instances: The instances.
        notes: How they were drawn, such as the seed and k.
    """
    store = {
        "kind": "composed recipe",
        "format": FORMAT,
        "suite": suite,
        "notes": dict(notes or {}),
        "digest": _digest(instances),
        "instances": [[i.bundle, *([q.domain, q.key] for q in i.parts)] for i in instances],
    }
    write_json_atomic(path, store)


def read_recipe(path: str | Path, questions: Mapping[str, Sequence[Question]]) -> list[Instance]:
    """Compose the instances of a file from questions that are at hand.

    Raises:
        StoreError: The file is missing or is not JSON.
        FactError: It is no such file, a question is not at hand, or has other options.
    """
    found = _recipe(path)
    known = {(q.domain, q.key): q for own in questions.values() for q in own}
    try:
        asked = [(int(row[0]), [(str(d), str(k)) for d, k in row[1:]]) for row in found["instances"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FactError(f"{path}: its instances are not lists of a bundle and pairs of domain and hash.") from error
    if missing := sorted({part for _, parts in asked for part in parts} - known.keys()):
        raise FactError(
            f"{path} asks {len(missing)} questions that are not at hand, the first of {missing[0][0]}. "
            "Give the data that it was drawn from."
        )
    instances = [Instance(bundle, tuple(known[part] for part in parts)) for bundle, parts in asked]
    if _digest(instances) != found.get("digest"):
        raise FactError(
            f"{path}: the questions are there, with other wording or order of options than it was drawn with."
        )
    return instances


def drawn_as(path: str | Path) -> dict[str, Any]:
    """Return the ``seed`` and the ``split`` that a recipe was drawn with; where it does not say, 0 and test.

    Raises:
        StoreError: The file is missing or is not JSON.
        FactError: It is no such file, or says something else there.
    """
    notes = _recipe(path).get("notes")
    told = notes if isinstance(notes, dict) else {}
    seed, split = told.get("seed", 0), told.get("split", "test")
    if type(seed) is not int or seed < 0 or split not in ("selection", "test"):
        raise FactError(
            f"{path} was drawn with the seed {seed!r} from {split!r}; a count, and selection or test, are known."
        )
    return {"seed": seed, "split": split}


def _recipe(path: str | Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") != "composed recipe" or found.get("format") != FORMAT:
        raise FactError(f"{path} is not a recipe of composed prompts in format {FORMAT}.")
    return found


def _digest(instances: Sequence[Instance]) -> str:
    distinct = {(q.domain, q.key): [q.subject, q.stem, *q.options, q.answer] for i in instances for q in i.parts}
    return key(instances=[[i.bundle, *(q.key for q in i.parts)] for i in instances], questions=list(distinct.values()))
