"""One harness for all editing methods: same facts, same contexts, same measure; resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import store
from ..measure import environment
from ..model import Model
from ..progress import report
from ._records import Plan, Work
from .base import EditMethod
from .evaluate import known
from .facts import Fact
from .score import summarise

__all__ = ["Bench", "known_facts", "run"]

PEAKS = ("peak_mib", "device_peak_mib")
"""Of these the result gives the largest; of everything else the mean."""


@dataclass(frozen=True)
class Bench:
    """What is to be measured.

    Attributes:
        methods: Methods by the name they have in the result.
        batch_size: Groups written into one model at once; 1 edits each group (each fact, where facts come alone) alone.
        n_generations: Generation prompts of a fact that are continued for fluency.
        seed: Of everything random.
        instructions: Ask for each fact in the five forms of `retouch.edit.instructions` too.
        chunk: Records that are planned and measured together; 0: 16 on the CPU, else 128. Sampled texts depend on it.
        keep_rows: Keep every record's numbers beside the result, as ``OUT.rows.json``; see `score.read_rows`.
    """

    methods: Mapping[str, EditMethod]
    batch_size: int = 1
    n_generations: int = 2
    seed: int = 0
    instructions: bool = False
    chunk: int = 0
    keep_rows: bool = False


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


def run(
    model: Model, groups: Sequence[Fact] | Sequence[Sequence[Fact]], bench: Bench, out: Path, *, data: str
) -> dict[str, Any]:
    """Measure every method on every fact and write the result; goes on where an interrupted run stopped.

    Each finished record is one line in ``OUT.partial``, flushed to disk; a run with the same model, facts, methods and
    settings reads it and goes on.

    Args:
        model: The unedited model.
        groups: The facts; or groups of facts, e.g. those of one subject, that are written together.
        bench: What to measure.
        out: The JSON file to write.
        data: Name of the facts' source, for the record.

    Returns:
        The JSON object: verb, model, data, n, seed, environment, methods.

    Raises:
        FactError: A method cannot use one of the facts, for want of a subject.
    """
    plan = Plan.of(model, groups, bench)
    for method in bench.methods.values():
        method.ready(model, plan.facts)
    partial = _Partial(out.with_name(out.name + ".partial"), _key(model, plan, bench))
    done = {name: partial.rows(name, m) for name, m in bench.methods.items()}
    result: dict[str, Any] = {
        "verb": "edit",
        "model": model.source,
        "data": data,
        "n": len(plan.facts),
        "seed": bench.seed,
        "environment": {
            **environment(model),
            "batch": bench.batch_size,
            "chunk": plan.size,
            "groups": len(plan.groups),
            "settings": {name: m.to_dict() for name, m in bench.methods.items()},
        },
        "methods": {},
    }
    work = Work(model, plan, bench)
    kept = []
    for name, method in bench.methods.items():
        rows = done[name]
        for i, row in work.records(name, method, rows):
            rows[i] = row
            partial.add(name, i, row)
        ordered = [rows[i] for i in range(len(plan.facts))]
        if any("refused" in row for row in ordered):
            ordered = [{"refused": 0.0, **row} for row in ordered]
        kept += [
            {"method": name, "number": i, "subject": s, "row": row}
            for i, (s, row) in enumerate(zip(plan.subjects, ordered))
        ]
        result["methods"][name] = summarise(ordered, plan.subjects, bench.seed)
        result["methods"][name] |= {n: max(r[n] for r in ordered) for n in ordered[0] if n in PEAKS}
    if bench.keep_rows:
        store.write_json_atomic(out.with_name(out.name.removesuffix(".json") + ".rows.json"), kept)
    store.write_json_atomic(out, result)
    partial.path.unlink(missing_ok=True)
    return result


def _key(model: Model, plan: Plan, bench: Bench) -> str:
    return store.key(
        model=model.fingerprint,
        facts=[f.to_dict() for f in plan.facts],
        groups=[len(g) for g in plan.groups] if plan.grouped else [],
        batch=bench.batch_size,
        generations=bench.n_generations,
        instructions=bench.instructions,
        chunk=plan.size,
        seed=bench.seed,
    )


class _Partial:
    """Finished records of an unfinished run, one JSON line each."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.marks: dict[str, str] = {}
        self.lines: list[dict[str, Any]] = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.lines.append(json.loads(line))
                except json.JSONDecodeError:
                    continue  # the torn line of a killed run

    def rows(self, name: str, method: EditMethod) -> dict[int, dict[str, float]]:
        """Return a method's finished records by number."""
        self.marks[name] = mark = store.key(run=self.key, name=name, settings=method.decided_by())
        return {x["number"]: x["row"] for x in self.lines if x.get("mark") == mark}

    def add(self, name: str, number: int, row: Mapping[str, float]) -> None:
        """Append a record and flush it to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"mark": self.marks[name], "number": number, "row": dict(row)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # the first line end closes a torn line, or this record would be lost with it
            file.flush()
            os.fsync(file.fileno())
