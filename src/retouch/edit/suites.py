"""The suites of the edit bench: public sets, drawn by a seeded recipe, split into subjects to tune on and to test on.

A hash of the subject decides its part in all suites, so that a subject seen while tuning is never tested on. What each
suite takes from where, and how many facts there are: ``docs/suites.md``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ..errors import FactError, StoreError, UserError
from ..model import Model
from ..store import read_json, sha256_file, write_json_atomic
from ._fact import Fact, Prompt
from ._groups import MIN_RELATED, Choice, group_facts, typed_prompts
from ._relations import Knowledge, Row, fold, read_knowledge, read_rows, table
from .facts import load

__all__ = ["RECIPE", "Split", "counterfact", "hashed_split", "knowedit", "read", "same_subject", "zsre"]

_log = logging.getLogger(__name__)

Split = Literal["dev", "test", "all"]
RECIPE = 1
"""Number of the recipe; another one draws other facts from the same data."""
SIZES = (1, 2, 4, 8)
_RELATED = 10


def hashed_split(subject: str) -> str:
    """Say to which part of every suite a subject belongs: ``dev`` (30 of 100) or ``test``.

    Example:
        >>> hashed_split("France") == hashed_split(" FRANCE")
        True
    """
    number = int(hashlib.sha256(fold(subject).encode()).hexdigest()[:8], 16)
    return "dev" if number % 100 < 30 else "test"


# Several facts of one subject


def same_subject(
    model: Model, data_dir: Path, n: int, n_subjects: int, seed: int, out: Path, *, split: Split = "test"
) -> list[list[Fact]]:
    """Draw groups of `n` facts of one subject that the model knows, and keep them in a file.

    A file that was drawn by the same recipe from the same data for the same model and arguments is read back. There may
    be fewer groups than asked for: ``counts.groups`` of the manifest says how many there are.

    Source:
        The recipe is ours, in the spirit of Shi et al. 2025 (S2RKE): see ``docs/suites.md``.

    Args:
        model: The unedited model; a fact is kept only if it prefers the truth to the new object.
        data_dir: The folder that holds ``lre_relations``, ``trex_pararel`` and ``counterfact``.
        n: Facts of one subject: 1, 2, 4 or 8.
        n_subjects: Groups to draw.
        seed: Of everything random.
        out: The JSON Lines file to write; its manifest stands beside it as ``*.manifest.json``.
        split: Which subjects to draw from.

    Raises:
        UserError: `n`, `n_subjects` or `split` is not allowed.
        FactError: A set is missing or damaged.
    """
    _check(n_subjects, split)
    if n not in SIZES:
        raise UserError(f"n must be one of {', '.join(map(str, SIZES))} facts of a subject; got {n}.")
    data = read_knowledge(data_dir)
    manifest = {
        "recipe": RECIPE,
        "arguments": {"n": n, "n_subjects": n_subjects, "seed": seed, "split": split},
        "model": model.fingerprint,
        "sources": {**data.sources, "relations.yaml": _table_hash()},
    }
    if _matches(out, manifest):
        return read(out)
    subjects = tuple(key for key in data.subjects if split in ("all", hashed_split(key)))
    groups, counts = group_facts(model, data, Choice(n, n_subjects, seed, subjects))
    if len(groups) < n_subjects:
        _log.warning("%s: %d subjects have %d usable facts; %d were asked for.", out.name, len(groups), n, n_subjects)
    _write(out, groups)
    more = {"facts": sha256_file(out), "filters": _FILTERS, "skipped": dict(data.skipped), "counts": counts}
    write_json_atomic(_manifest(out), {**manifest, **more})
    return groups


_FILTERS = [
    "relations that are not in relations.yaml are left out",
    "clozes that end in the object; those that ask for two relations alike are left out",
    "the model prefers the truth to the target after the prompt",
    "no two facts of a subject are of relations near each other",
    "a target has another first token than the truth and is no object of the subject in any relation",
    "targets that three or more subjects have are preferred, then targets of the truth's number of tokens",
    "twice as many groups as wanted are looked for; those with most facts that are the model's first choice are kept",
    "a group holds at least two facts from the data; the others may have the model's own answer as truth",
]


def read(out: Path) -> list[list[Fact]]:
    """Read the groups of facts that `same_subject` wrote.

    Raises:
        FactError: The file is missing or damaged, with the line.
    """
    groups: dict[int, list[Fact]] = {}
    try:
        lines = Path(out).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FactError(f"{str(out)!r} cannot be read: {error}. Draw the suite again.") from error
    for i, line in enumerate(lines, 1):
        if line.strip():
            number, fact = _read_line(line, f"{Path(out).name} line {i}")
            groups.setdefault(number, []).append(fact)
    return [groups[number] for number in sorted(groups)]


def _read_line(line: str, where: str) -> tuple[int, Fact]:
    try:
        record = json.loads(line)
        return int(record.pop("group")), Fact.from_dict(record)
    except (ValueError, KeyError, TypeError, AttributeError, FactError) as error:
        raise FactError(f"{where}: no fact with a group: {error}. Draw the suite again.") from error


def _write(out: Path, groups: Sequence[Sequence[Fact]]) -> None:
    lines = [
        json.dumps({"group": number, **fact.to_dict()}, ensure_ascii=False)
        for number, group in enumerate(groups)
        for fact in group
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)


def _manifest(out: Path) -> Path:
    return out.with_suffix(".manifest.json")


def _matches(out: Path, wanted: Mapping[str, Any]) -> bool:
    """Say whether `out` was drawn as wanted and is unaltered."""
    if not (out.is_file() and _manifest(out).is_file()):
        return False
    try:
        found = read_json(_manifest(out))
    except StoreError:
        return False
    same = isinstance(found, dict) and all(found.get(name) == value for name, value in wanted.items())
    return same and found.get("facts") == sha256_file(out)


def _table_hash() -> str:
    return hashlib.sha256((files("retouch") / "data" / "relations.yaml").read_bytes()).hexdigest()


# Published sets


def counterfact(data_dir: Path, n: int | None, seed: int, split: Split = "test") -> list[Fact]:
    """Draw CounterFact facts, at most one of a subject, each with at least four related prompts.

    Related prompts come from other records of the subject, then from LRE and T-REx, then from clozes that fit the type
    of the subject; the last have no answer, which R-specificity does not need.

    Source:
        Meng et al. 2022, CounterFact; the related prompts are ours, as the published set has none.

    Args:
        data_dir: The folder that holds ``counterfact``, ``lre_relations`` and ``trex_pararel``.
        n: Facts to draw; all if None.
        seed: Of the draw.
        split: Which subjects to draw from.

    Raises:
        UserError: `n` or `split` is not allowed.
        FactError: A set is missing or damaged.
    """
    _check(n, split)
    chosen = _drawn(load(_set(data_dir / "counterfact", "counterfact_full.json"), bad="skip"), n, seed, split)
    data, rows = read_knowledge(data_dir), _by_subject(read_rows(data_dir))
    return [_with_related(fact, data, rows.get(fold(fact.subject), ())) for fact in chosen]


def knowedit(data_dir: Path, n: int | None, seed: int, split: Split = "test") -> list[Fact]:
    """Draw facts of KnowEdit's counterfactual part, at most one of a subject; related prompts have gold answers.

    Source:
        Zhang et al. 2024, KnowEdit (WikiData counterfact).

    Args:
        data_dir: The folder that holds ``knowedit``.
        n: Facts to draw; all if None.
        seed: Of the draw.
        split: Which subjects to draw from.

    Raises:
        UserError: `n` or `split` is not allowed.
        FactError: The set is missing or damaged.
    """
    _check(n, split)
    return _drawn(load(_set(data_dir / "knowedit", "wiki_counterfact_train.json"), bad="skip"), n, seed, split)


def zsre(data_dir: Path, n: int | None, seed: int, split: Split = "test") -> list[Fact]:
    """Draw zsRE edits, at most one of a subject: questions, with unrelated questions as neighbours.

    Source:
        Levy et al. 2017, as repacked for MEND (Mitchell et al. 2022).

    Args:
        data_dir: The folder that holds ``zsre``.
        n: Facts to draw; all if None.
        seed: Of the draw.
        split: Which subjects to draw from.

    Raises:
        UserError: `n` or `split` is not allowed.
        FactError: The set is missing or damaged.
    """
    _check(n, split)
    return _drawn(load(_set(data_dir / "zsre", "zsre_mend_train-1k.json"), bad="skip"), n, seed, split)


def _set(folder: Path, name: str) -> Path:
    """Return a set's file: the one of the usual name, else the only JSON file of its folder."""
    found = list(folder.glob("*.json"))
    return found[0] if len(found) == 1 and not (folder / name).is_file() else folder / name


def _check(n: int | None, split: str) -> None:
    if n is not None and n < 1:
        raise UserError(f"At least 1 must be drawn; got {n}.")
    if split not in ("dev", "test", "all"):
        raise UserError(f"split must be 'dev', 'test' or 'all'; got {split!r}.")


def _drawn(facts: Sequence[Fact], n: int | None, seed: int, split: Split) -> list[Fact]:
    """Shuffle, and keep the first fact of each subject of a split, up to `n`."""
    kept: dict[str, Fact] = {}
    for fact in random.Random(seed).sample(facts, len(facts)):
        subject = fact.subject or fact.filled
        if split in ("all", hashed_split(subject)):
            kept.setdefault(fold(subject), fact)
    if n is not None and n > len(kept):
        _log.warning("There are %d subjects in this split; %d were asked for.", len(kept), n)
    chosen = [_without_strangers(fact) for fact in list(kept.values())[:n]]
    if dropped := sum(_n_prompts(fact) for fact in list(kept.values())[:n]) - sum(map(_n_prompts, chosen)):
        _log.info("Left out %d paraphrases and related prompts that do not name their subject.", dropped)
    return chosen


def _without_strangers(fact: Fact) -> Fact:
    """Drop paraphrases and related prompts in which the subject does not stand."""
    if not fact.subject:
        return fact
    name = fold(fact.subject)
    return replace(
        fact,
        paraphrases=tuple(p for p in fact.paraphrases if name in fold(p)),
        related=tuple(p for p in fact.related if name in fold(p.prompt)),
    )


def _n_prompts(fact: Fact) -> int:
    return len(fact.paraphrases) + len(fact.related)


def _by_subject(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(fold(row.subject), []).append(row)
    return found


def _with_related(fact: Fact, data: Knowledge, rows: Sequence[Row]) -> Fact:
    """Collect prompts on the subject's other relations, one a relation."""
    own = table()
    closed = own.close(fact.relation)
    found: dict[str, Prompt] = {}
    for row in rows:
        if row.relation not in closed and fold(row.truth) != fold(fact.truth or ""):
            found.setdefault(row.relation, Prompt(row.prompt, row.truth))
    subject = data.subjects.get(fold(fact.subject))
    for name in subject.facts if subject else ():
        if subject and name not in closed:
            found.setdefault(name, subject.prompt(data.relations[name], fact.subject))
    relations = (fact.relation, *found)
    more = typed_prompts(fact.subject, own.type_of(relations), relations)
    prompts = [*fact.related, *found.values()][:_RELATED]
    asked = {fact.filled, *fact.paraphrases}
    prompts = [p for p in prompts if p.prompt not in asked]
    return replace(fact, related=tuple(prompts + more[: max(0, MIN_RELATED - len(prompts))]))
