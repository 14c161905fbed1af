"""One harness for all editing methods: same facts, same contexts, same measure; resumable."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import registry, store
from ..change import Change, apply, versions
from ..errors import NoEffect, UserError
from ..measure import watched
from ..model import Model
from ..progress import report
from ..settings import from_flags
from .base import EditMethod
from .evaluate import Exam, Neutral, examine, generate, grade, known, neutral_of, summarise
from .facts import Fact

__all__ = ["Bench", "environment", "known_facts", "parse_methods", "run"]

CHUNK = 16
"""Facts planned together; what an interrupted bench repeats at most."""


@dataclass(frozen=True)
class Bench:
    """What is to be measured.

    Attributes:
        methods: Methods by the name they have in the result.
        batch_size: Facts written into one model at once; 1 edits each fact alone.
        n_generations: Generation prompts of a fact that are continued for fluency.
        seed: Of everything random.
    """

    methods: Mapping[str, EditMethod]
    batch_size: int = 1
    n_generations: int = 2
    seed: int = 0


def parse_methods(text: str, seed: int = 0) -> dict[str, EditMethod]:
    """Read ``rome,memit:metric=identity:n_steps=10`` as methods with settings.

    Raises:
        UnknownName: No such method.
        SettingsError: A setting is unknown or not allowed.
    """
    methods = {}
    for item in filter(None, (t.strip() for t in text.split(","))):
        name, *settings = item.split(":")
        cls = registry.load("edit", name)
        flags = [f"--{s}" for s in settings]
        methods[item] = from_flags(cls, ["--seed", str(seed), *flags])
    if not methods:
        raise UserError("No method was named. See: retouch methods edit")
    return methods


def known_facts(model: Model, facts: Sequence[Fact], n: int) -> list[Fact]:
    """Return the first `n` facts whose true answer the unedited model prefers."""
    kept: list[Fact] = []
    for start in range(0, len(facts), 64):
        part = facts[start : start + 64]
        kept += [f for f, k in zip(part, known(model, part)) if k]
        report("Facts that the model knows", min(len(kept), n), n)
        if len(kept) >= n:
            break
    return kept[:n]


def environment() -> dict[str, Any]:
    """Say on what the numbers were measured."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), processor)
    except OSError:
        pass
    return {
        **versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def run(model: Model, facts: Sequence[Fact], bench: Bench, out: Path, *, data: str) -> dict[str, Any]:
    """Measure every method on every fact and write the result; goes on where an interrupted run stopped.

    Each finished record is one line in ``OUT.partial``, flushed to disk; a run with the same model, facts, methods and
    settings reads it and goes on.

    Args:
        model: The unedited model.
        facts: The facts.
        bench: What to measure.
        out: The JSON file to write.
        data: Name of the facts' source, for the record.

    Returns:
        The JSON object: verb, model, data, n, seed, environment, methods.
    """
    if not facts:
        raise UserError("There are no facts to measure on.")
    key = store.key(
        model=model.fingerprint,
        facts=[f.to_dict() for f in facts],
        batch=bench.batch_size,
        generations=bench.n_generations,
        seed=bench.seed,
    )
    partial = _Partial(out.with_name(out.name + ".partial"), key)
    done = {name: partial.rows(name, m) for name, m in bench.methods.items()}
    result: dict[str, Any] = {
        "verb": "edit",
        "model": model.source,
        "data": data,
        "n": len(facts),
        "seed": bench.seed,
        "environment": {
            **environment(),
            "batch": bench.batch_size,
            "settings": {name: m.to_dict() for name, m in bench.methods.items()},
        },
        "methods": {},
    }
    neutral = neutral_of(model)
    exams = examine(model, facts, n_generations=bench.n_generations, seed=bench.seed)
    for name, method in bench.methods.items():
        rows = done[name]
        for i, row in _records(model, exams, method, bench, neutral, rows, name):
            rows[i] = row
            partial.add(name, method, i, row)
        ordered = [rows[i] for i in range(len(facts))]
        result["methods"][name] = summarise(ordered, [f.subject or f.filled for f in facts], bench.seed)
        result["methods"][name]["peak_mib"] = max(r["peak_mib"] for r in ordered)
    store.write_json_atomic(out, result)
    partial.path.unlink(missing_ok=True)
    return result


def _records(
    model: Model,
    exams: Sequence[Exam],
    method: EditMethod,
    bench: Bench,
    neutral: Neutral,
    done: Mapping[int, dict[str, float]],
    name: str,
) -> Iterator[tuple[int, dict[str, float]]]:
    alone = bench.batch_size == 1
    size = CHUNK if alone else bench.batch_size
    report(f"{name}: records", len(done), len(exams))
    for start in range(0, len(exams), size):
        numbers = range(start, min(start + size, len(exams)))
        if all(i in done for i in numbers):
            continue
        facts = [exams[i].fact for i in numbers]
        with watched() as cost:
            changes = _planned(method, model, facts, alone)
        joint = apply(model, changes[0]) if changes and not alone else model
        with_each = changes if alone else None
        texts = generate(joint, facts, with_each, n_generations=bench.n_generations, seed=bench.seed)
        for k, i in enumerate(numbers):
            edited = apply(model, changes[k]) if changes and alone else joint
            row = grade(edited, exams[i], generated=texts[k], neutral=neutral)
            row["seconds_per_fact"] = cost.seconds / len(facts)
            row["peak_mib"] = cost.peak_mib
            if changes:
                norms = changes[k if alone else 0].norms(model).values()
                row["share_of_weight"] = max(v["share_of_weight"] for v in norms)
                row["frobenius_norm"] = sum(v["frobenius"] ** 2 for v in norms) ** 0.5
            report(f"{name}: records", i + 1, len(exams))
            if i not in done:
                yield i, row


def _planned(method: EditMethod, model: Model, facts: Sequence[Fact], alone: bool) -> list[Change]:
    """Plan; empty when the method finds that the model says everything already."""
    try:
        return method.plan_each(model, facts) if alone else [method.plan(model, facts)]
    except NoEffect:
        return []


class _Partial:
    """Finished records of an unfinished run, one JSON line each."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.lines: list[dict[str, Any]] = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.lines.append(json.loads(line))
                except json.JSONDecodeError:
                    continue  # the torn line of a killed run

    def _mark(self, name: str, method: EditMethod) -> str:
        return store.key(run=self.key, name=name, settings=method.to_dict())

    def rows(self, name: str, method: EditMethod) -> dict[int, dict[str, float]]:
        """Return a method's finished records by number."""
        mark = self._mark(name, method)
        return {x["number"]: x["row"] for x in self.lines if x.get("mark") == mark}

    def add(self, name: str, method: EditMethod, number: int, row: Mapping[str, float]) -> None:
        """Append a record and flush it to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"mark": self._mark(name, method), "number": number, "row": dict(row)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # the first line end closes a torn line, or this record would be lost with it
            file.flush()
            os.fsync(file.fileno())
