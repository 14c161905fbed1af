"""The report of slim models: quality against cost, who leaves where, and what a little quality would save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeAlias

from .._pictures import Picture, shown
from .._tradeoffs import plot_exits, plot_tradeoff
from ..report import Report, Table
from .card import measured, sentences
from .points import Point, area, at_drop, best_so_far

if TYPE_CHECKING:
    from .api import Slim
    from .latency import Latency

__all__ = ["BASE", "DROPS", "Record", "apart", "called", "interval", "operating", "points_of", "record", "report"]

Record: TypeAlias = Mapping[str, Any]
"""What `record` makes of a slim model."""

BASE = "original"
"""The name of the model before it was made slim, in a latency."""
DROPS = (0.0, 0.005, 0.01, 0.02)
_CHOSEN, _FULL, _DROP = "chosen", "full_depth", "drop_0.005"


def record(slim: Slim) -> dict[str, Any]:
    """Return all that a report needs of a model, as plain values: it can be made when the model is gone."""
    network = slim.classifier.network
    kept = {k: v for k, v in slim.to_dict().items() if k != "history"}
    more = {"widths": network.widths.to_dict(), "n_parameters": sum(p.numel() for p in network.parameters())}
    return {**kept, **more, "sentences": sentences(slim), "measured": measured(slim)}


# ---------------------------------------------------------------- points


def points_of(found: Record) -> list[Point]:
    """Return the curve of a record, from the slowest threshold to the fastest."""
    return [_point(values) for values in found["curve"]]


def operating(found: Record) -> dict[str, Point]:
    """Return the points that are told by name, timed, and compared.

    ``chosen`` is that of the budget or the risk, ``full_depth`` lets nobody leave early, and ``drop_0.005`` is the
    cheapest one at most half a point below the best; that one is read off the measured rows themselves.
    """
    curve, chosen = points_of(found), found["threshold"]
    at = _point({**found, "threshold": (chosen or {}).get("value") or 0.0})
    drop = at_drop(curve, 0.005)
    return {_CHOSEN: at, _FULL: curve[0], **({} if drop is None else {_DROP: drop})}


def apart(found: Record) -> dict[str, Point]:
    """Return the operating points that differ; of equal ones the first."""
    kept: dict[tuple[float, float], tuple[str, Point]] = {}
    for name, at in operating(found).items():
        kept.setdefault((at.flops_ratio, at.exit_layer), (name, at))
    return dict(kept.values())


def called(name: str, point: str) -> str:
    """Return what a model is called in a latency, at one of its operating points."""
    return name if point == _CHOSEN else f"{name} {point}"


def _point(values: Mapping[str, Any]) -> Point:
    found = {f.name: values[f.name] for f in fields(Point)}
    blocks = {name: {int(l): v for l, v in found[name].items()} for name in ("leaves", "quality_at")}
    return Point(**found | blocks)


def _is_curve(points: Sequence[Point]) -> bool:
    return len({p.flops_ratio for p in points}) > 1


def interval(curves: Sequence[Sequence[Point]]) -> tuple[float, float] | None:
    """Return the costs that are compared by an area: those that the first curve and the others have in common.

    A model with one cost is no curve. A curve that has no cost in common with those before it is left out.
    """
    low, high = 0.0, float("inf")
    for points in curves:
        costs = [p.flops_ratio for p in points]
        if _is_curve(points) and max(low, min(costs)) < min(high, max(costs)):
            low, high = max(low, min(costs)), min(high, max(costs))
    return (low, high) if high < float("inf") else None


def _area(points: Sequence[Point], over: tuple[float, float] | None) -> float | None:
    if over is None or not _is_curve(points) or best_so_far(points)[0][0] > over[0]:
        return None
    return area(points, *over)


# ---------------------------------------------------------------- the report


def report(
    slims: Slim | Mapping[str, Slim | Record], latency: Latency | None = None, *, tables: Sequence[Table] = ()
) -> Report:
    """Make the report of one slim model, or of several that were measured on the same rows.

    Args:
        slims: A model; or by name, models or their records. The first one is what the title speaks of.
        latency: Their times. Names are those of `called`, the original's is ``original``.
        tables: More of them, for the end.

    Raises:
        ValueError: There is no model.
        UserError: matplotlib is not installed.
    """
    named = slims if isinstance(slims, Mapping) else {slims.method.name: slims}
    found = {name: one if isinstance(one, Mapping) else record(one) for name, one in named.items()}
    if not found:
        raise ValueError("A report needs at least one model.")
    first = next(iter(found.values()))
    made = [_points_table(found, latency), _drops_table(found), _areas_table(found), _exits_table(found)]
    made += [_time_table(latency)] if latency is not None else []
    made += _texts_tables(first["shown"])
    return Report(
        f"Slim {first['task']['name']}",
        _summary(next(iter(found)), first),
        str(first["source"]),
        tuple(t for t in [*made, *tables] if t.rows),
        tuple(_pictures(found, latency)),
        {name: _numbers(one, latency, name) for name, one in found.items()},
        tuple(_notes(found, latency)),
    )


def _summary(name: str, found: Record) -> str:
    at = operating(found)[_CHOSEN]
    return (
        f"{name} has {_times(found['params_ratio'])} of the parameters and spends {_times(at.flops_ratio)} of the FLOPs "
        f"of the original; {found['task']['metric']} is {shown(at.quality, 3)}, the original's "
        f"{shown(float(found['quality_base']), 3)}."
    )


def _times(ratio: float) -> str:
    return f"1/{1 / ratio:.3g}" if ratio > 0 else "0"


def _numbers(found: Record, latency: Latency | None, name: str) -> dict[str, Any]:
    points = {
        point: {"speedup": _speedup(latency, called(name, point)), **at.to_dict()}
        for point, at in operating(found).items()
    }
    kept = {k: found[k] for k in ("quality_base", "params_ratio", "n_parameters", "widths", "passed")}
    return {**kept, "measured_on": found["measured_on"], "points": points}


def _notes(found: Mapping[str, Record], latency: Latency | None) -> list[str]:
    notes = []
    for name, one in found.items():
        said = one["sentences"] if len(found) == 1 else [s for s in one["sentences"] if _matters(s)]
        notes += [sentence if len(found) == 1 else f"{name}: {sentence}" for sentence in said]
        if not one["passed"]:
            notes.append(f"{name}: no threshold does what was asked; it is shown as it is without early exits.")
    first = next(iter(found.values()))
    notes += _needless(next(iter(found)), first, found)
    notes += [first["measured"], f"{len(first['widths']['exits'])} exits: that is how finely costs can be chosen."]
    notes.append(
        "FLOPs are matrix products at each text's own length, asked exits included, as a share of the original's."
    )
    notes.append("The point half a point below the best is read off these rows, so it flatters a little.")
    if latency is not None and latency.noisy:
        notes.append("The machine was busy while times were taken: do not trust them, measure again.")
    return list(dict.fromkeys(notes))


def _needless(name: str, first: Record, found: Mapping[str, Record]) -> list[str]:
    """Say when no encoder is needed at all."""
    best = max((float(one["quality"]) for one in found.values() if one["method"] == "linear"), default=float("-inf"))
    if first["method"] == "linear" or best < first["quality"] - 0.02:
        return []
    return [
        f"A linear classifier of the tokens is within two points of {name}: this task needs no encoder, slim or not."
    ]


def _matters(sentence: str) -> bool:
    return sentence.startswith(("With ", "In expectation", "What was asked", "A cost", "The cost"))


# ---------------------------------------------------------------- tables


def _speedup(latency: Latency | None, name: str) -> float | None:
    if latency is None or not {BASE, name} <= {row.model for row in latency.rows}:
        return None
    return latency.speedup(BASE, name)


def _p50(latency: Latency | None, name: str) -> float | None:
    return next((r.p50_ms for r in latency.rows if r.model == name and r.batch_size == 1), None) if latency else None


def _points_table(found: Mapping[str, Record], latency: Latency | None) -> Table:
    timed = latency is not None
    base = (BASE, "", float(next(iter(found.values()))["quality_base"]), 1.0, 1.0, None)
    rows: list[tuple[Any, ...]] = [(*base, 1.0, _p50(latency, BASE)) if timed else base]
    for name, one in found.items():
        for point, at in apart(one).items():
            row = name, point.replace("_", " "), at.quality, one["params_ratio"], at.flops_ratio, at.exit_layer
            times = _speedup(latency, called(name, point)), _p50(latency, called(name, point))
            rows.append((*row, *times) if timed else row)
    columns = ["model", "point", str(next(iter(found.values()))["task"]["metric"]), "parameters", "FLOPs", "blocks run"]
    columns += ["speed-up", "p50, ms"] if timed else []
    caption = "Parameters and FLOPs as shares of the original's. Blocks run: the mean over texts."
    return Table("What it costs and what it gives", tuple(columns), tuple(rows), caption)


def _drops_table(found: Mapping[str, Record]) -> Table:
    rows = []
    for name, one in found.items():
        points = points_of(one)
        for drop in DROPS if _is_curve(points) else ():
            at = at_drop(points, drop)
            assert at is not None
            saved = 1 - at.flops_ratio / points[0].flops_ratio
            rows.append((name, f"{100 * drop:g} %", at.quality, at.flops_ratio, at.exit_layer, f"{saved:.0%}"))
    columns = "model", "allowed drop", "quality", "FLOPs", "blocks run", "saved by exits"
    caption = "The cheapest threshold whose quality is within the drop of the model's own best. Read off these rows."
    return Table("What does 0.5 % cost?", columns, tuple(rows), caption)


def _areas_table(found: Mapping[str, Record]) -> Table:
    curves = {name: points_of(one) for name, one in found.items()}
    over = interval(list(curves.values()))
    rows = tuple((name, a) for name, points in curves.items() if (a := _area(points, over)) is not None)
    if over is None:
        return Table("Area under the curve", ("model", "area"), ())
    caption = f"Mean best quality at costs from {shown(over[0], 3)} to {shown(over[1], 3)} of the original's FLOPs."
    return Table("Area under the curve", ("model", "area"), rows, caption)


def _exits_table(found: Mapping[str, Record]) -> Table:
    rows = []
    for name, one in found.items():
        at = operating(one)[_CHOSEN]
        rows += [(name, l, f"{share:.1%}", at.quality_at[l]) for l, share in at.leaves.items()]
    columns = "model", "exit after block", "leave there", "right there"
    return Table("Exits", columns, tuple(rows), "At the chosen threshold. Blocks count from 0.")


def _time_table(latency: Latency | None) -> Table:
    rows = latency.rows if latency is not None else ()
    cells = tuple(
        (r.model, r.batch_size, r.order.replace("_", " "), r.p50_ms, r.p95_ms, r.examples_per_second) for r in rows
    )
    columns = "model", "batch", "order", "p50, ms", "p95, ms", "texts a second"
    return Table("Time", columns, cells, "Models are called in turn on the same batches; a row is one call's time.")


def _texts_tables(texts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Table]:
    """Show who left early and who late; where all leave at one exit there is nothing to see."""
    if len({t["exit_block"] for some in texts.values() for t in some}) < 2:
        return []
    columns, titles = ("text", "said", "right", "after block"), {"early": "leave first", "late": "stay longest"}
    rows = {
        which: tuple((_cut(t["text"]), t["said"], t["right"], t["exit_block"]) for t in texts.get(which, ()))
        for which in titles
    }
    return [Table(f"Texts that {title}", columns, rows[which]) for which, title in titles.items()]


def _cut(text: str, n: int = 200) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


# ---------------------------------------------------------------- pictures


def _pictures(found: Mapping[str, Record], latency: Latency | None) -> list[Picture]:
    pictures = [_against_flops(found)]
    if latency is not None:
        pictures += _against_time(found, latency)
    return pictures + _leaving(found)


def _against_flops(found: Mapping[str, Record]) -> Picture:
    curves, points, chosen = {}, {}, {}
    for name, one in found.items():
        places = [(p.flops_ratio, p.quality) for p in points_of(one)]
        at = operating(one)[_CHOSEN]
        if _is_curve(points_of(one)):
            curves[name], chosen[name] = places, (at.flops_ratio, at.quality)
        else:
            points[name] = places[0]
    first = next(iter(found.values()))
    return plot_tradeoff(
        curves, points, "FLOPs, as a share of the original's", first["task"]["metric"], _title(found),
        chosen=chosen, level=float(first["quality_base"]), shaded=_certified(first),
    )  # fmt: skip


def _title(found: Mapping[str, Record]) -> str:
    name, one = next(iter(found.items()))
    at = operating(one)[_CHOSEN]
    kept = f", {at.quality_kept:.1%} of the original's" if one["quality_base"] > 0 else ""
    return f"At {_times(at.flops_ratio)} of the FLOPs, {name} reaches {shown(at.quality, 3)}{kept}."


def _certified(found: Record) -> tuple[float, float] | None:
    """Return the costs of the thresholds whose harm is certified."""
    proved = set((found["threshold"] or {}).get("certified") or ())
    costs = [p.flops_ratio for p in points_of(found) if p.threshold in proved]
    return (min(costs), max(costs)) if costs else None


def _against_time(found: Mapping[str, Record], latency: Latency) -> list[Picture]:
    curves: dict[str, list[tuple[float, float]]] = {}
    points: dict[str, tuple[float, float]] = {}
    chosen: dict[str, tuple[float, float]] = {}
    for name, one in found.items():
        at = {p: (t, q.quality) for p, q in apart(one).items() if (t := _p50(latency, called(name, p))) is not None}
        if len(set(at.values())) > 1:
            curves[name] = list(at.values())
            chosen |= {name: at[_CHOSEN]} if _CHOSEN in at else {}
        elif at:
            points[name] = next(iter(at.values()))
    if not curves and not points:
        return []
    first = next(iter(found.values()))
    base = _p50(latency, BASE)
    if base is not None:
        points[BASE] = (base, float(first["quality_base"]))
    name, fast = next(iter(found)), _speedup(latency, next(iter(found)))
    said = (
        "Times were taken one text at a time."
        if fast is None
        else f"One text at a time, {name} is {fast:.2g} times as fast."
    )
    label = "milliseconds a text, batch 1, median"
    return [plot_tradeoff(curves, points, label, first["task"]["metric"], said, chosen=chosen)]


def _leaving(found: Mapping[str, Record]) -> list[Picture]:
    """Draw how many leave at each exit, and how many of them are answered right."""
    at = {name: operating(one)[_CHOSEN] for name, one in found.items()}
    at = {name: p for name, p in at.items() if len(p.leaves) > 1}
    if not at:
        return []
    name, first = next(iter(at.items()))
    most = max(first.leaves, key=lambda block: first.leaves[block])
    title = f"Most texts of {name} ({first.leaves[most]:.0%}) leave after block {most}."
    return [plot_exits({n: p.leaves for n, p in at.items()}, {n: p.quality_at for n, p in at.items()}, title)]
