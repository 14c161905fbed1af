"""The six pictures that reports are made of. Import them from `retouch.report`."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ._pictures import (
    BLUE,
    COLOURS,
    INK,
    RED,
    WIDTH,
    Picture,
    axes_at,
    axes_of_rows,
    beside,
    clean,
    draw,
    legend,
    log_x,
    margin,
    need,
    short,
    shown,
)

__all__ = ["plot_bars", "plot_curve", "plot_drift", "plot_heat", "plot_ranks", "plot_where"]

DASHES = ("-", "--", "-.", ":")
MARKS = "osD^vP"
_ROWS = 40
"""Beyond this many facts a picture shows the worst ones."""
_POINTS = 300
"""Beyond this many values of one group a picture shows evenly spaced order statistics, both ends among them."""
_FLOOR = 1e-6
"""Smallest drift that is drawn as such, in nats: below it float32 tells noise from drift no longer."""
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def plot_ranks(labels: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Picture:
    """Draw for each fact the rank of the new answer before and after the change.

    Args:
        labels: A name of each fact.
        before: The rank of the new answer in the unchanged model, from 1: 1 is the model's own answer.
        after: The same in the changed model.

    Raises:
        ValueError: The three differ in length, are empty, or a rank is below 1.
        UserError: matplotlib is not installed.
    """
    if not len(labels) == len(before) == len(after) or not labels:
        raise ValueError(f"Ranks need as many labels as values, got {len(labels)}, {len(before)} and {len(after)}.")
    if bad := [r for r in (*before, *after) if not 1 <= r < math.inf]:
        raise ValueError(f"A rank is at least 1 and finite, got {bad[0]}.")
    order = sorted(range(len(labels)), key=lambda i: (-after[i], -before[i], i))[:_ROWS] if len(labels) > _ROWS else (
        range(len(labels)))  # fmt: skip
    first, then = sum(r == 1 for r in before), sum(r == 1 for r in after)
    title = f"The new answer comes first for {then} of {len(labels)} {_facts(len(labels))} after the change; before: {first}."
    left_out = f" Only the {_ROWS} facts with the worst rank after the change are drawn." if len(labels) > _ROWS else ""
    caption = (
        "Rank of the new answer among all that the model could say, one row a fact, on a logarithmic axis; 1 is the model's "
        f"own answer. Rings: before, median {shown(statistics.median(before), 3)}. Dots: after, median "
        f"{shown(statistics.median(after), 3)}.{left_out}"
    )
    names = [short(labels[i]) for i in order]
    rows = [(float(before[i]), float(after[i])) for i in order]
    height = 24 * len(rows) + 100
    return draw(title, caption, height, lambda figure: _paint_ranks(figure, names, rows))


def _paint_ranks(figure: Any, names: list[str], rows: list[tuple[float, float]]) -> None:
    axes = axes_of_rows(figure, names, right=130)
    y = range(len(rows))
    before, after = zip(*rows)
    axes.hlines(y, before, after, colors=INK, alpha=0.5, linewidth=2)
    ring = axes.scatter(before, y, s=70, facecolors="none", edgecolors=RED, linewidths=2)
    dot = axes.scatter(after, y, s=30, color=BLUE)
    log_x(axes, 0.8, max(10.0, *before, *after) * 1.5)
    axes.set_xlabel("rank of the new answer, 1 = the model's answer (logarithmic)")
    axes.axvline(1, color=INK, linewidth=1)
    legend(axes, [ring, dot], ["before the change", "after"])
    for row, (old, new) in enumerate(rows):
        beside(axes, row, f"{shown(int(old))} → {shown(int(new))}")


def plot_drift(groups: Mapping[str, Sequence[float]], limit: float | None = None) -> Picture:
    """Draw how far the answers that were to stay have moved.

    Args:
        groups: For each kind of neighbour, the KL divergence in nats of each of its prompts.
        limit: The largest harm that was allowed, in nats.

    Raises:
        ValueError: There is no value, a value is NaN, or the limit is not positive.
        UserError: matplotlib is not installed.
    """
    values = [float(v) for group in groups.values() for v in group]
    if not values or any(math.isnan(v) for v in values) or (limit is not None and not 0 < limit < math.inf):
        raise ValueError(f"Drift needs values that are not NaN and a positive limit, got {len(values)} and {limit}.")
    over = sum(v > limit for v in values) if limit is not None else 0
    bound = "" if limit is None else f"; {over} of {len(values)} exceed {shown(limit, 3)} nats"
    title = f"The median neighbour moved by {shown(statistics.median(values), 2)} nats{bound}."
    sizes = ", ".join(f"{clean(n)} {len(g)}" for n, g in groups.items())
    few = " Large groups are thinned evenly." if any(len(g) > _POINTS for g in groups.values()) else ""
    marks = "Crosses are beyond the limit, the dashed line. " if limit is not None else ""
    caption = (
        "KL divergence between the answers before and after the change, one mark a neighbour, on a logarithmic axis; "
        f"values up to {_FLOOR:g} nats stand at the left edge. The vertical bar of a row is its median. {marks}"
        f"Prompts: {sizes}.{few}"
    )
    names, rows = [short(n) for n in groups], [sorted(map(float, g)) for g in groups.values()]
    return draw(title, caption, 46 * len(rows) + 100, lambda figure: _paint_drift(figure, names, rows, limit))


def _paint_drift(figure: Any, names: list[str], rows: list[list[float]], limit: float | None) -> None:
    axes = axes_of_rows(figure, names, right=130)
    finite = [v for row in rows for v in row if math.isfinite(v)]
    right = 3 * max([limit or 0.0, 1e-3, *finite])
    for y, row in enumerate(rows):
        thin = _thinned(row)
        x = [min(max(v, _FLOOR), right) for v in thin]
        spread = [y + 0.5 * ((i * 0.618034) % 1 - 0.5) for i in range(len(x))]  # golden ratio: even, and no dice
        for mark, colour, beyond in (("o", BLUE, False), ("x", RED, True)):
            part = [i for i, v in enumerate(thin) if (limit is not None and v > limit) is beyond]
            axes.scatter([x[i] for i in part], [spread[i] for i in part], s=22, marker=mark, color=colour, alpha=0.7)
        if row:
            median = statistics.median(row)
            axes.vlines(min(max(median, _FLOOR), right), y - 0.38, y + 0.38, colors=INK, linewidth=3)
        beside(axes, y, f"median {shown(median, 2)}" if row else "no values")
    log_x(axes, _FLOOR / 1.5, right * 1.1)
    axes.set_xlabel("drift of a neighbour's answer, KL in nats (logarithmic)")
    if limit is not None:
        axes.axvline(limit, color=RED, linestyle="--", linewidth=1.5)
        axes.annotate(f"limit {shown(limit, 3)}", (limit, 1.0), (0, 6), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="center", annotation_clip=False)  # fmt: skip


def plot_where(norms: Mapping[str, float], n_blocks: int) -> Picture:
    """Draw in which blocks the change sits, and how large it is there.

    Args:
        norms: For each changed weight by our names (``blocks.5.mlp.down``), ‖ΔW‖ / ‖W‖ as a fraction: the
            ``share_of_weight`` that `Change.norms` measures.
        n_blocks: Number of blocks of the model; blocks count from 0.

    Raises:
        ValueError: There is no weight, a share is negative or not finite, or a block is not in the model.
        UserError: matplotlib is not installed.
    """
    if not norms or not all(0 <= float(share) < math.inf for share in norms.values()):
        raise ValueError(f"Each weight needs a share that is finite and not negative, got {dict(norms)}.")
    found = {name: _BLOCK.fullmatch(name) for name in norms}
    blocks = sorted({int(m[1]) for m in found.values() if m})
    if blocks and blocks[-1] >= n_blocks:
        raise ValueError(f"Block {blocks[-1]} is not in a model of {n_blocks} blocks, which count from 0.")
    others = [name for name, m in found.items() if not m]
    bars: dict[str, dict[int, float]] = {}
    for name, match in found.items():
        kind, place = (match[2], int(match[1])) if match else ("outside the blocks", n_blocks + others.index(name))
        bars.setdefault(clean(kind), {})[place] = 100 * float(norms[name])
    largest = max(norms, key=lambda name: norms[name])
    title = (
        f"The change sits in {_places(blocks, n_blocks, len(others))}; the most moved weight is {clean(largest)}, "
        f"by {shown(100 * float(norms[largest]), 2)} % of its norm."
    )
    caption = (
        "Frobenius norm of the change of each weight, as a share of the norm of that weight in percent, over all blocks "
        f"of the model. Changed: {len(norms)} {'weight' if len(norms) == 1 else 'weights'}."
    )
    ticks = [str(b) for b in range(n_blocks)] + [short(n, 12) for n in others]
    return draw(title, caption, 300, lambda figure: _paint_where(figure, bars, ticks, n_blocks))


def _paint_where(figure: Any, bars: Mapping[str, Mapping[int, float]], ticks: list[str], n_blocks: int) -> None:
    axes = axes_at(figure, 62, 16, 34, 52)
    width = 0.8 / len(bars)
    drawn = []
    for i, places in enumerate(bars.values()):
        x = [place + width * _offset(bars, i, place) for place in places]
        drawn.append(axes.bar(x, places.values(), width, color=COLOURS[i % 5], hatch=["", "///", "...", "xx"][i % 4]))
        if sum(map(len, bars.values())) <= 12:
            for at, value in zip(x, places.values()):
                axes.annotate(shown(value, 2), (at, value), (0, 4), textcoords="offset points", ha="center")
    step = 1 if len(ticks) <= 24 else math.ceil(n_blocks / 16)
    shown_ticks = [i for i in range(len(ticks)) if i % step == 0 or i >= n_blocks]
    axes.set_xticks(shown_ticks, [ticks[i] for i in shown_ticks])
    axes.set_xlim(-0.7, len(ticks) - 0.3)
    axes.set_ylim(0, max(v for places in bars.values() for v in places.values()) * 1.15 or 1.0)
    axes.grid(axis="y")
    axes.set_xlabel("block")
    axes.set_ylabel("change in % of the weight's norm")
    legend(axes, drawn, list(bars))


def _offset(bars: Mapping[str, Mapping[int, float]], kind: int, place: int) -> float:
    """Centre the bars that stand at one place, counted in bar widths."""
    here = [i for i, places in enumerate(bars.values()) if place in places]
    return here.index(kind) - (len(here) - 1) / 2


def plot_curve(
    x: Sequence[float], series: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, title: str = ""
) -> Picture:
    """Draw one or more curves: a loss over steps, or a score as more and more facts are edited.

    Args:
        x: Where the values were taken.
        series: Values by the name of their curve; a value that is not finite leaves a gap.
        xlabel: What `x` counts, with its unit.
        ylabel: What is measured, with its unit.
        title: A sentence that says what is seen; by default one is made from the values.

    Raises:
        ValueError: A curve has another length than `x`, or there is nothing to draw.
        UserError: matplotlib is not installed.
    """
    if bad := [n for n, values in series.items() if len(values) != len(x)]:
        raise ValueError(f"The curve {bad[0]!r} has {len(series[bad[0]])} values for {len(x)} places.")
    curves = {clean(n): [float(v) if math.isfinite(v) else math.nan for v in values] for n, values in series.items()}
    known = {n: [v for v in values if not math.isnan(v)] for n, values in curves.items()}
    if not any(known.values()):
        raise ValueError(f"The curve of {ylabel!r} over {xlabel!r} has no finite value.")
    ends = ", ".join(f"{n} from {shown(v[0], 3)} to {shown(v[-1], 3)}" for n, v in known.items() if v)
    span = f"from {shown(min(x), 3)} to {shown(max(x), 3)}"
    caption = f"{_sentence(clean(ylabel))} against {clean(xlabel)}, {span}. First and last values: {ends}."
    title = title or _course(clean(ylabel), {n: v for n, v in known.items() if v})
    height = 320 + 20 * ((len(curves) - 1) // 3)
    labels = (clean(xlabel), clean(ylabel))
    return draw(title, caption, height, lambda figure: _paint_curve(figure, list(map(float, x)), curves, labels))


def _paint_curve(figure: Any, x: list[float], curves: Mapping[str, list[float]], labels: tuple[str, str]) -> None:
    axes = axes_at(figure, 74, 16, 36 + 20 * ((len(curves) - 1) // 3), 52)
    lines = []
    for i, values in enumerate(curves.values()):
        style = {"color": COLOURS[i % 6], "linestyle": DASHES[i % 4], "marker": MARKS[i % 6]}
        lines += axes.plot(x, values, **style, linewidth=2, markersize=5, markevery=max(1, len(x) // 12))
    finite = [v for values in curves.values() for v in values if not math.isnan(v)]
    if log := min(finite) > 0 and max(finite) > 1000 * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: shown(float(value), 3))
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    if min(x) > 0 and max(x) >= 100 * min(x) and len({round(b - a, 9) for a, b in pairwise(x)}) > 1:
        log_x(axes, min(x) / 1.2, max(x) * 1.2)
        labels = (labels[0] + " (logarithmic)", labels[1])
    elif all(map(float.is_integer, x)):  # blocks and edits have no halves
        axes.xaxis.set_major_locator(need("matplotlib.ticker").MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y")
    axes.set(xlabel=labels[0], ylabel=labels[1] + " (logarithmic)" * log)
    if len(curves) > 1:
        legend(axes, lines, list(curves), columns=3)


def plot_bars(values: Mapping[str, Mapping[str, float | None]], title: str = "") -> Picture:
    """Draw what a bench measured: a panel for each metric, a bar for each method.

    Args:
        values: metric -> method -> value; a missing, empty or not finite value is a dash. A metric whose values
            all lie from 0 to 1 is drawn on that scale, any other on its own.
        title: A sentence that says what is seen; by default one is made from ``score``, or else the first metric.

    Raises:
        ValueError: There is no finite value.
        UserError: matplotlib is not installed.
    """
    table = {
        m: {k: float(v) for k, v in row.items() if v is not None and math.isfinite(v)} for m, row in values.items()
    }
    table = {metric: row for metric, row in table.items() if row}
    if not table:
        raise ValueError(f"Bars need at least one finite value, got the metrics {list(values)}.")
    methods = list(dict.fromkeys(method for row in values.values() for method in row))
    metric = "score" if "score" in table else next(iter(table))
    row = table[metric]
    high, low = max(row, key=lambda k: row[k]), min(row, key=lambda k: row[k])
    best = f"{_words(metric)} is highest for {clean(high)} ({shown(row[high], 3)})"
    rest = f" and lowest for {clean(low)} ({shown(row[low], 3)})." if row[low] < row[high] else "."
    told = "; ".join(
        f"{_words(m)}: " + ", ".join(f"{clean(k)} {shown(v, 3)}" for k, v in r.items()) for m, r in table.items()
    )
    columns = min(3, len(table))
    height = math.ceil(len(table) / columns) * (22 * len(methods) + 62) + 8
    caption = f"One panel a metric, one bar a method. {told}."
    return draw(title or _sentence(best + rest), caption, height, lambda f: _paint_bars(f, table, methods, columns))


def _paint_bars(figure: Any, table: Mapping[str, Mapping[str, float]], methods: list[str], columns: int) -> None:
    names = [short(m, 20) for m in methods]
    left, high = margin(names), 22 * len(methods) + 62
    wide, total = (WIDTH - left) / columns, figure.get_figheight() * 72
    for i, (metric, row) in enumerate(table.items()):
        x0, top = left + wide * (i % columns), high * (i // columns) + 32
        box = (x0, total - top - 22 * len(methods), wide - 22, 22 * len(methods))
        axes = figure.add_axes((box[0] / WIDTH, box[1] / total, box[2] / WIDTH, box[3] / total))
        axes.barh([methods.index(k) for k in row], row.values(), 0.64, color=BLUE)
        axes.set_yticks(range(len(methods)), names if i % columns == 0 else [""] * len(methods))
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.set_title(_words(metric), loc="left", fontsize=13)
        _bar_scale(axes, row.values(), box[2])
        for y, method in enumerate(methods):
            value = row.get(method)
            at = max(value or 0.0, 0.0)
            axes.annotate(shown(value, 3), (at, y), (5, 0), textcoords="offset points", va="center")


def _bar_scale(axes: Any, values: Any, width: float) -> None:
    low, high = min(0.0, *values), max(0.0, *values)
    if low == 0 and high <= 1:
        high = 1.0
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    else:
        axes.locator_params(axis="x", nbins=3)
        axes.xaxis.set_major_formatter(lambda value, _: shown(float(value), 3))
    axes.set_xlim(low * 1.05, low + (high - low) * width / (width - 48))  # room for the number behind the longest bar
    axes.grid(axis="x")


def plot_heat(
    names: Sequence[str], values: Sequence[Sequence[float]], xlabel: str, title: str, caption: str
) -> Picture:
    """Draw a row of colours for each name: blue above 0, orange below; columns are counted from 0.

    Raises:
        ValueError: There is no number, one is not finite, or there are not as many rows as names, all of one length.
        UserError: matplotlib is not installed.
    """
    top = max((abs(v) for row in values for v in row), default=math.nan)
    if len(names) != len(values) or len({len(row) for row in values}) != 1 or not math.isfinite(top):
        raise ValueError(f"A heat map needs finite rows of one length, one a name; got {len(names)} names.")
    caption = f"{caption} Full colour: {shown(float(top), 3)}; blue is positive, orange negative."
    rows = [[float(v) / (top or 1.0) for v in row] for row in values]
    return draw(
        title, caption, 22 * len(rows) + 70, lambda f: _paint_heat(f, [short(n, 24) for n in names], rows, xlabel)
    )


def _paint_heat(figure: Any, names: list[str], rows: list[list[float]], xlabel: str) -> None:
    axes, colour = axes_at(figure, margin(names), 16, 12, 52), need("matplotlib.colors").to_rgba
    axes.pcolormesh([[colour(BLUE if v >= 0 else RED, abs(v)) for v in row] for row in rows])
    axes.set_yticks([i + 0.5 for i in range(len(names))], names)
    axes.set_ylim(len(names), 0)
    shown_ticks = range(0, len(rows[0]), math.ceil(len(rows[0]) / 24))
    axes.set_xticks([i + 0.5 for i in shown_ticks], [str(i) for i in shown_ticks])
    axes.tick_params(length=0)
    axes.set_xlabel(clean(xlabel))


# What they say.


def _thinned(row: list[float]) -> list[float]:
    if len(row) <= _POINTS:
        return row
    return [row[round(i * (len(row) - 1) / (_POINTS - 1))] for i in range(_POINTS)]


def _places(blocks: list[int], n_blocks: int, n_others: int) -> str:
    """Say in words where a change sits."""
    if not blocks:
        return "no block" if not n_others else "weights outside the blocks"
    runs = blocks[-1] - blocks[0] + 1 == len(blocks)
    if len(blocks) == 1:
        text = f"block {blocks[0]}"
    elif len(blocks) == n_blocks:
        text = "all blocks"
    elif runs:
        text = f"blocks {blocks[0]} to {blocks[-1]}"
    else:
        text = f"blocks {', '.join(map(str, blocks))}" if len(blocks) <= 6 else f"{len(blocks)} blocks"
    return f"{text} of {n_blocks}" + (" and outside the blocks" if n_others else "")


def _facts(n: int) -> str:
    return "fact" if n == 1 else "facts"


def _words(metric: str) -> str:
    return clean(metric).replace("_", " ").replace("mib", "MiB")


def _course(what: str, curves: Mapping[str, list[float]]) -> str:
    """Say in words how curves end."""
    ends = {name: values[-1] for name, values in curves.items()}
    low, high = min(ends, key=lambda n: ends[n]), max(ends, key=lambda n: ends[n])
    if len(curves) == 1:
        return _sentence(f"{what} goes from {shown(curves[low][0], 3)} to {shown(ends[low], 3)}.")
    return f"In the end, {what} is lowest for {low} ({shown(ends[low], 3)}) and highest for {high} ({shown(ends[high], 3)})."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
