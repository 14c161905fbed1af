"""MMLU in its published files, gathered into domains by the official map of subjects."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError, unknown
from ._files import multiple_choice
from ._suite import Suite, check, question_key, share
from .base import Question

__all__ = ["read"]

_log = logging.getLogger(__name__)

FINE = ("law", "health", "math", "economics", "physics", "philosophy")
LEAST = 300
"""Questions that a field needs to be a domain."""
TRAIN, SELECTION = 0.60, 0.15


def read(
    folder: Path, level: Literal["cd4", "fine"], domains: Sequence[str] | None, max_characters: int | None, seed: int
) -> Suite:
    """Read the suite; see `suites.mmlu_cd`."""
    if level not in ("cd4", "fine"):
        raise unknown("level of mmlu-cd", level, ("cd4", "fine"))
    if not (folder / "test").is_dir() and (folder / "mmlu" / "test").is_dir():
        folder = folder / "mmlu"
    names = sorted(path.name.removesuffix("_test.csv") for path in (folder / "test").glob("*_test.csv"))
    if not names:
        raise UserError(f"{folder} has no test/SUBJECT_test.csv. Give MMLU's folder, with dev, val and test.")
    domain_of = _domains(names, level)
    pools, shots, facts = _read(
        folder, {n: d for n, d in domain_of.items() if _wanted(d, level, domains)}, max_characters
    )
    pools = _large(pools, level, domains)
    kept = {d: _capped(questions, seed) for d, questions in pools.items()}
    facts |= {
        "level": level,
        "subjects": {d: dict(Counter(q.subject for q in kept[d])) for d in kept},
        "capped": {d: len(pools[d]) - len(kept[d]) for d in kept if len(pools[d]) > len(kept[d])},
    }
    _log.info("MMLU-CD (reconstruction) of %d of MMLU's 57 subjects.", len(names))
    return _split(f"mmlu-cd-{level}", kept, shots, facts)


def _map() -> dict[str, Any]:
    text = (files(__package__) / "data" / "mmlu_categories.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _domains(subjects: Sequence[str], level: str) -> dict[str, str]:
    known = _map()
    fields = {subject: field for field, members in known["fields"].items() for subject in members}
    category = {field: name for name, members in known["categories"].items() for field in members}
    for subject in subjects:
        if subject not in fields:
            raise unknown("subject of MMLU", subject, fields)
    return {s: category[fields[s]] if level == "cd4" else fields[s] for s in subjects}


def _wanted(domain: str, level: str, domains: Sequence[str] | None) -> bool:
    asked = domains or (None if level == "cd4" else FINE)
    return asked is None or domain in asked


def _read(
    folder: Path, domain_of: Mapping[str, str], max_characters: int | None
) -> tuple[dict[str, list[Question]], dict[str, list[Question]], dict[str, Any]]:
    """Read test, val and dev; questions that read the same are kept once."""
    pools: dict[str, list[Question]] = {}
    shots: dict[str, list[Question]] = {}
    seen: set[str] = set()
    repeated = long = 0
    for part, into in (("test", pools), ("val", pools), ("dev", shots)):
        for subject, domain in domain_of.items():
            path = folder / part / f"{subject}_{part}.csv"
            if part != "test" and not path.is_file():
                continue
            for question in _questions(path, domain, subject):
                n_characters = len(question.stem) + sum(map(len, question.options))
                long += (skip := max_characters is not None and n_characters > max_characters)
                repeated += (again := not skip and question.key in seen)
                if not skip and not again:
                    seen.add(question.key)
                    into.setdefault(domain, []).append(question)
    return pools, shots, {"repeated": repeated, "too_long": long}


def _questions(path: Path, domain: str, subject: str) -> list[Question]:
    name = subject.replace("_", " ")
    return [
        Question(domain, name, c.stem, c.options, c.answer, question_key(c.stem, c.options))
        for c in multiple_choice(path)
    ]


def _large(pools: Mapping[str, list[Question]], level: str, domains: Sequence[str] | None) -> dict[str, list[Question]]:
    """Keep domains in the order asked for; fields that nobody asked for must be large enough."""
    if domains is not None:
        for name in domains:
            if name not in pools:
                raise unknown("domain on disk", name, pools)
        return {name: pools[name] for name in domains}
    if level == "cd4":
        return {name: pools[name] for name in _map()["categories"] if name in pools}
    return {name: pools[name] for name in FINE if len(pools.get(name, ())) >= LEAST}


def _capped(questions: Sequence[Question], seed: int) -> list[Question]:
    """Let no subject be more than a quarter of a domain of five subjects or more."""
    sizes = Counter(q.subject for q in questions)
    if len(sizes) < 5:
        return list(questions)
    most = next(c for c in range(max(sizes.values()), 0, -1) if 4 * c <= sum(min(n, c) for n in sizes.values()))
    found = []
    for subject in sizes:
        own = [q for q in questions if q.subject == subject]
        chosen = own if len(own) <= most else random.Random(f"{seed} {subject}").sample(own, most)
        found += chosen
    return found


def _split(
    name: str, pools: Mapping[str, Sequence[Question]], shots: Mapping[str, Sequence[Question]], facts: dict[str, Any]
) -> Suite:
    parts: dict[str, dict[str, tuple[Question, ...]]] = {"train": {}, "selection": {}, "test": {}}
    for domain, questions in pools.items():
        at = [(share(q.key), q) for q in questions]
        parts["train"][domain] = tuple(q for s, q in at if s < TRAIN)
        parts["selection"][domain] = tuple(q for s, q in at if TRAIN <= s < TRAIN + SELECTION)
        parts["test"][domain] = tuple(q for s, q in at if s >= TRAIN + SELECTION)
    few = {d: tuple(shots.get(d, ())) for d in pools}
    suite = Suite(name, tuple(pools), parts["train"], parts["selection"], parts["test"], few, "plain", facts)
    check(suite)
    return suite
