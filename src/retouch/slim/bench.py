"""One harness for all slimming methods: same rows, same splits, same seeds, same clock; resumable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import checkpoint, store
from ..errors import UserError
from ..progress import report as say
from ..report import Table as Sheet
from ..report import write_html
from ._asked import task_of
from ._parts import Part, keep, part_key, recall
from ._run import one_precision
from .api import Exiting, fit
from .base import Budget, SlimMethod
from .data import Task
from .encoded import encode
from .latency import Call, Latency, call_network, machine, measure
from .opening import Source, open_source
from .paired import Difference, Draws, compare, draw
from .pareto import BASE, apart, called, interval, operating, points_of, report
from .points import Point, area, best_so_far, flops_at
from .table import leaving

__all__ = ["METHODS", "parse_seeds", "read_task", "run"]

METHODS = "costeff,static,static:match=flops,plugged,full_exits,first_k:n_blocks=1,first_k:n_blocks=2,linear"
"""What is compared where nothing is named: the method, and the rivals that hurt."""

Row = dict[str, Any]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read ``0,1,2``.

    Raises:
        UserError: It is no list of whole numbers from 0, each once.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise UserError(f"Seeds are whole numbers from 0, each once, with commas between, such as 0,1,2; got {text!r}.")
    return tuple(map(int, words))


def read_task(source: Source, data: str | Path, **more: Any) -> Task:
    """Read a folder with its splits as a task; a classifier's labels keep the classifier's order.

    Args:
        source: What is made slim.
        data: See `retouch.slim.data.make_task`.
        **more: More of its arguments.

    Raises:
        UserError: The rows cannot be used, or do not fit the model.
    """
    return task_of(source, data, None, None, None, more)


@dataclass(frozen=True, eq=False)
class _Bench:
    """What is measured, and where it is kept."""

    source: Source
    task: Task
    methods: Mapping[str, SlimMethod]
    budget: Budget
    seeds: tuple[int, ...]
    exiting: Exiting
    exits: Sequence[int] | None
    timed: bool
    kept: Path
    folder: Path | None

    def parts(self) -> dict[str, list[Part]]:
        """Return every method at every seed; what an interrupted run finished is read."""
        jobs = [(name, seed) for name in self.methods for seed in self.seeds]
        found: dict[str, list[Part]] = {name: [] for name in self.methods}
        for done, (name, seed) in enumerate(jobs):
            say("Methods", done, len(jobs))
            found[name].append(self._part(name, seed))
        say("Methods", len(jobs), len(jobs))
        return found

    def _part(self, name: str, seed: int) -> Part:
        method = replace(self.methods[name], seed=seed)
        timed = self.timed and seed == self.seeds[0]
        with_original = timed and name == next(iter(self.methods))
        more = {"exits": None if self.exits is None else list(self.exits), "kept": [timed, with_original]}
        key = part_key(self.source, self.task, method, self.budget, self.exiting, **more)
        found = recall(self.kept / key)
        if found is not None and not (timed and found.network is None):
            return found
        made = fit(
            self.source,
            self.task,
            budget=self.budget,
            method=method,
            exiting=self.exiting,
            exits=self.exits,
            folder=self.folder,
        )
        return keep(self.kept / key, made, self.task, timed=timed, with_original=with_original)


def run(
    source: str | Path | Source,
    task: Task,
    methods: Mapping[str, SlimMethod],
    budget: Budget,
    out: Path,
    *,
    data: str = "",
    seeds: Sequence[int] = (0,),
    latency: bool = True,
    exiting: Exiting | None = None,
    exits: Sequence[int] | None = None,
    folder: Path | None = None,
    html: Path | None = None,
    batch_sizes: Sequence[int] = (1, 8, 32),
    n_calls: int = 500,
    n_draws: int = 1000,
    threads: int = 1,
) -> dict[str, Any]:
    """Train and measure every method on one task and write the result; goes on where an interrupted run stopped.

    Every method gets the same rows, the same seeds and the same budget; thresholds are chosen on `calib`, numbers are
    those of `test`. A finished method is kept in ``OUT.partial``, stages of an unfinished one in `folder`. The first
    method is compared with all others, on the same draws of the test rows.

    Args:
        source: What is made slim.
        task: With test rows.
        methods: By the name that they have in the result.
        budget: Sizes and limits of all of them.
        out: The JSON file to write.
        data: Name of the rows' source, for the record; by default the task's.
        seeds: Each method is trained once with each.
        latency: Whether times are taken, of the first seed's networks.
        exiting: How thresholds are chosen.
        exits: Blocks with an exit; None: all.
        folder: Where stages are kept; by default in the cache.
        html: Where a report with pictures is written.
        batch_sizes: Texts of a timed call.
        n_calls: Timed calls of one text.
        n_draws: Draws of the test rows, for the standard errors.
        threads: Threads of a timed call.

    Returns:
        The JSON object: verb, model, data, n, seed, environment, methods; and auc_interval, differences, latency, curves.

    Raises:
        UserError: There are no test rows, no method or no seed, or the budget names no size.
    """
    _check(task, methods, budget, seeds)
    opened, kept = source if isinstance(source, Source) else open_source(source), out.with_name(out.name + ".partial")
    bench = _Bench(
        opened,
        task,
        methods,
        budget,
        tuple(seeds),
        exiting or Exiting(),
        exits,
        latency and 1 in batch_sizes,
        kept,
        folder,
    )
    parts = bench.parts()
    times = _times(bench, parts, batch_sizes, n_calls, threads) if latency else None
    differences = _differences(parts, task.metric, n_draws, seeds[0])
    over = interval([points_of(p.record) for some in parts.values() for p in some])
    result = {
        "verb": "slim",
        "model": opened.name,
        "data": data or task.name,
        "n": len(task.test),
        "seed": seeds[0],
        "environment": _environment(bench, times),
        "methods": {name: _row(name, some, over, times) for name, some in parts.items()},
        "auc_interval": None if over is None else list(over),
        "differences": [d.to_dict() for d in differences],
        "latency": None if times is None else times.to_dict(),
        "curves": {name: _curve(some[0]) for name, some in parts.items()},
    }
    if html is not None:
        shown = {name: some[0].record for name, some in parts.items()}
        write_html(report(shown, times, tables=[_seeds_sheet(result), _differences_sheet(differences)]), html)
    store.write_json_atomic(out, result)
    checkpoint.remove(kept)
    return result


def _check(task: Task, methods: Mapping[str, SlimMethod], budget: Budget, seeds: Sequence[int]) -> None:
    if not task.test:
        raise UserError(
            f"Task {task.name!r} has no test rows, and a bench measures on rows that chose nothing. Give some."
        )
    if not methods or not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"A bench needs methods and seeds, each once; got {list(methods)} and {list(seeds)}.")
    one_precision(methods.values())
    if budget.max_drop is not None:
        raise UserError(
            "max_drop looks for a size of its own for each method. A bench compares at one: give params, flops."
        )


# ---------------------------------------------------------------- times


def _times(
    bench: _Bench, parts: Mapping[str, Sequence[Part]], batch_sizes: Sequence[int], n_calls: int, threads: int
) -> Latency:
    """Time the original and every method at its operating points, all in turn."""
    first = next(iter(parts.values()))[0]
    assert first.original is not None
    calls: dict[str, Call] = {BASE: call_network(first.original)}
    for name, some in parts.items():
        for point, at in apart(some[0].record).items():
            assert some[0].network is not None
            calls[called(name, point)] = _at(some[0].network, at.threshold)
    method = next(iter(bench.methods.values()))
    types = first.original.size.token_types
    encoded = encode(bench.source.tokenizer, bench.task.test, getattr(method, "max_tokens", 128), token_types=types)
    return measure(
        calls, encoded.ids, types=encoded.types, pad=encoded.pad, batch_sizes=batch_sizes, n_calls=n_calls,
        threads=threads,
    )  # fmt: skip


def _at(network: Any, threshold: float) -> Call:
    """Make a call at one threshold; several may share a network, since calls come in turn."""
    call = call_network(network)

    def at(batch: Any) -> object:
        network.config.threshold = threshold
        return call(batch)

    return at


# ---------------------------------------------------------------- numbers


def _row(name: str, parts: Sequence[Part], over: tuple[float, float] | None, times: Latency | None) -> Row:
    """Return the numbers of one method: the mean over seeds, and their spread where there are several."""
    each = [_numbers(part, over) for part in parts]
    row: Row = _mean(each) | _clock(name, operating(parts[0].record)["chosen"], parts[0], times)
    points = [{p: _measured(part, at) for p, at in operating(part.record).items()} for part in parts]
    row["points"] = {
        point: _mean([of[point] for of in points]) | _clock(name, operating(parts[0].record)[point], parts[0], times)
        for point in points[0]
    }
    if len(parts) > 1:
        row["n_seeds"] = len(parts)
        row["spread"] = {k: v for k in each[0] if (v := _spread([one[k] for one in each])) is not None}
    return row


def _numbers(part: Part, over: tuple[float, float] | None) -> Row:
    found, points = part.record, points_of(part.record)
    reaches = over is not None and len({p.flops_ratio for p in points}) > 1 and best_so_far(points)[0][0] <= over[0]
    return {
        **_measured(part, operating(found)["chosen"]),
        "reached": float(found["passed"]),
        "quality_auc": area(points, *over) if reaches and over is not None else None,
        "parameters": found["n_parameters"],
    }


def _measured(part: Part, at: Point) -> Row:
    return {
        "quality": at.quality,
        "quality_base": part.record["quality_base"],
        "quality_kept": at.quality_kept,
        "params_ratio": part.record["params_ratio"],
        "flops_ratio": at.flops_ratio,
        "flops_ratio_128": flops_at(at, part.record["spent_128"]),
        "exit_layer": at.exit_layer,
    }


def _clock(name: str, at: Point, part: Part, times: Latency | None) -> Row:
    """Look up the times of an operating point; equal points share theirs."""
    if times is None:
        return {"speedup": None}
    same = next(
        p for p, q in apart(part.record).items() if (q.flops_ratio, q.exit_layer) == (at.flops_ratio, at.exit_layer)
    )
    rows = [r for r in times.rows if r.model == called(name, same) and r.order == "shuffled"]
    single = any(r.batch_size == 1 for r in rows)
    found: Row = {"speedup": times.speedup(BASE, called(name, same)) if single else None}
    for r in rows:
        found |= {f"p50_ms_b{r.batch_size}": r.p50_ms, f"p95_ms_b{r.batch_size}": r.p95_ms}
        found[f"examples_per_second_b{r.batch_size}"] = r.examples_per_second
    return found


def _mean(rows: Sequence[Row]) -> Row:
    known = {k: [row[k] for row in rows if row[k] is not None] for k in rows[0]}
    return {k: sum(v) / len(v) if len(v) == len(rows) else None for k, v in known.items()}


def _spread(values: Sequence[Any]) -> float | None:
    return None if None in values else float(np.std(values, ddof=1))


def _curve(part: Part) -> Row:
    """Return the first seed's curve in columns, for pictures."""
    points = points_of(part.record)
    return {name: [getattr(p, name) for p in points] for name in ("threshold", "quality", "flops_ratio", "exit_layer")}


def _differences(
    parts: Mapping[str, Sequence[Part]], metric: str, n_draws: int, seed: int
) -> list[Difference]:  # fmt: skip
    """Compare the first method with every other."""
    draws = {name: [_draws(part, metric, n_draws, seed) for part in some] for name, some in parts.items()}
    first, *rivals = draws
    return [found for rival in rivals for found in compare(first, draws[first], rival, draws[rival])]


def _draws(part: Part, metric: str, n_draws: int, seed: int) -> Draws:
    where = leaving(part.table, part.rule, part.thresholds)
    return draw(part.table, where, part.costs, metric, n_draws=n_draws, seed=seed)


def _environment(bench: _Bench, times: Latency | None) -> Row:
    return {
        **(machine() if times is None else dict(times.environment)),
        "budget": bench.budget.to_dict(),
        "seeds": list(bench.seeds),
        "rows": {split: len(getattr(bench.task, split)) for split in ("train", "valid", "calib", "test")},
        "metric": bench.task.metric,
        "settings": {name: m.to_dict() for name, m in bench.methods.items()},
    }


# ---------------------------------------------------------------- for people


def _differences_sheet(differences: Sequence[Difference]) -> Sheet:
    words = {
        "quality": "quality",
        "quality_at_cost": "quality at the rival's FLOPs",
        "quality_auc": "area under the curve",
    }
    rows = [(d.method, d.rival, words[d.metric], d.difference, d.standard_error, d.verdict) for d in differences]
    columns = "method", "rival", "of", "difference", "standard error", "verdict"
    caption = "Paired over draws of the test rows. Below two standard errors it is no difference."
    return Sheet("Is it better?", columns, tuple(rows), caption)


def _seeds_sheet(result: Mapping[str, Any]) -> Sheet:
    names = ("quality", "flops_ratio", "exit_layer", "quality_auc")
    rows = [
        (method, row["n_seeds"], *(_told(row, name) for name in names))
        for method, row in result["methods"].items()
        if "spread" in row
    ]
    caption = "Mean over seeds, plus or minus the standard deviation. All else on this page is the first seed."
    return Sheet("Over seeds", ("method", "seeds", "quality", "FLOPs", "blocks run", "area"), tuple(rows), caption)


def _told(row: Row, name: str) -> str | None:
    value, spread = row[name], row["spread"].get(name)
    return None if value is None or not math.isfinite(value) else f"{value:.4g} ± {spread:.2g}"
