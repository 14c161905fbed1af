"""Pictures of early exits: what is gained at which cost, and who leaves where. Import them from here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ._pictures import BLUE, COLOURS, INK, RED, WIDTH, Picture, axes_at, clean, draw, legend, short, shown
from ._plots import DASHES, MARKS

__all__ = ["plot_exits", "plot_tradeoff"]

Place = tuple[float, float]
_TICKS = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5)]


def plot_tradeoff(
    curves: Mapping[str, Sequence[Place]],
    points: Mapping[str, Place],
    xlabel: str,
    ylabel: str,
    title: str,
    *,
    chosen: Mapping[str, Place] | None = None,
    level: float | None = None,
    shaded: Place | None = None,
) -> Picture:
    """Draw what is gained against what it costs: dots for all that was measured, steps for the best at each cost.

    Args:
        curves: By name, places (cost, gain) of one model at several operating points, in any order.
        points: By name, the one place of a model that has no others.
        xlabel: What the cost is, with its unit.
        ylabel: What the gain is.
        title: A sentence that says what is seen.
        chosen: By name of a curve, the place that was chosen on it; drawn as a ring.
        level: The gain of the original model, a dashed line.
        shaded: The interval of costs that is certified.

    Raises:
        ValueError: There is no place, or a number is not finite.
        UserError: matplotlib is not installed.
    """
    places = [p for part in (*curves.values(), points.values(), (chosen or {}).values()) for p in part]
    if not places or not all(map(math.isfinite, (v for p in places for v in p))):
        raise ValueError(f"A trade needs finite places, at least one; got {len(places)}.")
    told = [f"{clean(n)} from {_told(min(c))} to {_told(max(c))}" for n, c in curves.items() if c]
    told += [f"{clean(n)} {_told(p)}" for n, p in points.items()]
    marks = (
        "Dots are thresholds, steps the best at a cost of at most so much." if any(map(len, curves.values())) else ""
    )
    marks += " Rings: the chosen threshold." if chosen else ""
    marks += " Large marks: models without a choice." if points else ""
    marks += f" Dashed: the original, {shown(level, 3)}." if level is not None else ""
    marks += f" Shaded: certified, costs from {shown(shaded[0], 3)}." if shaded else ""
    head = clean(ylabel)
    caption = f"{head[:1].upper() + head[1:]} against {clean(xlabel)}. {marks.strip()} " + "; ".join(told) + "."
    rows = math.ceil((len(curves) + len(points)) / 3)
    labels = clean(xlabel), clean(ylabel)
    return draw(
        title, caption, 340 + 20 * rows,
        lambda figure: _paint(figure, curves, points, labels, chosen or {}, level, shaded, rows),
    )  # fmt: skip


def _told(place: Place) -> str:
    return f"{shown(float(place[1]), 3)} at {shown(float(place[0]), 3)}"


def _paint(
    figure: Any,
    curves: Mapping[str, Sequence[Place]],
    points: Mapping[str, Place],
    labels: tuple[str, str],
    chosen: Mapping[str, Place],
    level: float | None,
    shaded: Place | None,
    rows: int,
) -> None:
    axes = axes_at(figure, 74, 16, 16 + 20 * rows, 52)
    every = [p for part in (*curves.values(), points.values(), chosen.values()) for p in part]
    low, high = min(x for x, _ in every), max(x for x, _ in every)
    left, right = _scale(axes, low, high)
    handles = []
    if shaded:
        axes.axvspan(shaded[0], min(shaded[1], right), color=INK, alpha=0.12, linewidth=0)
    for i, (name, places) in enumerate(curves.items()):
        style = {"color": COLOURS[i % 6], "linestyle": DASHES[i % 4]}
        x, y = zip(*_steps(places), (right, max(q for _, q in places)))
        handles += axes.step(x, y, where="post", linewidth=2, **style)
        axes.scatter(*zip(*places), s=14, color=COLOURS[i % 6], alpha=0.45, linewidths=0)
        if name in chosen:
            axes.scatter(*chosen[name], s=110, facecolors="none", edgecolors=COLOURS[i % 6], linewidths=2, zorder=4)
    for i, place in enumerate(points.values(), len(curves)):
        handles.append(axes.scatter(*place, s=70, marker=MARKS[i % 6], color=COLOURS[i % 6], zorder=4))
    if level is not None:
        axes.axhline(level, color=INK, linestyle="--", linewidth=1.5)
        axes.annotate("original", (right, level), (0, 4), textcoords="offset points", ha="right")
    axes.set_xlim(left, right)
    axes.grid()
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    legend(axes, handles, [*curves, *points], columns=3)


def _steps(places: Sequence[Place]) -> list[Place]:
    """Keep the places that are better than all cheaper ones."""
    kept: list[Place] = []
    for x, y in sorted(places, key=lambda p: (p[0], -p[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept


def _scale(axes: Any, low: float, high: float) -> tuple[float, float]:
    """Choose the horizontal axis, and return its ends: logarithmic where costs differ by more than eight times."""
    if not (low > 0 and high > 8 * low):
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return low - room, high + room
    axes.set_xscale("log")
    left, right = low / 1.2, high * 1.2
    ticks = [t for t in _TICKS if left <= t <= right]
    axes.set_xticks(ticks, [f"{t:,.0f}" if t >= 1 else f"{t:g}" for t in ticks])
    axes.minorticks_off()
    return left, right


def plot_exits(
    leaves: Mapping[str, Mapping[int, float]], right: Mapping[str, Mapping[int, float | None]], title: str
) -> Picture:
    """Draw for each model the share that leaves after each block, and how good the answers there are.

    Args:
        leaves: By model and block, the share of all texts that leave there.
        right: By model and block, the share of right answers among them; None where there are none.
        title: A sentence that says what is seen.

    Raises:
        ValueError: There is no model, or a share does not lie between 0 and 1.
        UserError: matplotlib is not installed.
    """
    shares = [v for part in (*leaves.values(), *right.values()) for v in part.values() if v is not None]
    if not leaves or not all(map(len, leaves.values())) or not all(0 <= v <= 1 for v in shares):
        raise ValueError(f"Exits need shares from 0 to 1 for each model; got {dict(leaves)}.")
    told = "; ".join(f"{clean(name)}: {_left(part, right.get(name, {}))}" for name, part in leaves.items())
    caption = "Bars: the share of all texts that leave after a block. Dots: the share of right answers among them. "
    height = 130 * len(leaves) + 60
    return draw(title, caption + told + ".", height, lambda figure: _paint_exits(figure, leaves, right))


def _left(leaves: Mapping[int, float], right: Mapping[int, float | None]) -> str:
    words = []
    for block, share in leaves.items():
        good = right.get(block)
        words.append(f"block {block} {share:.0%}" + ("" if good is None else f", {good:.0%} right"))
    return ", ".join(words)


def _paint_exits(
    figure: Any, leaves: Mapping[str, Mapping[int, float]], right: Mapping[str, Mapping[int, float | None]]
) -> None:
    total, blocks = figure.get_figheight() * 72, sorted({b for part in leaves.values() for b in part})
    for i, (name, part) in enumerate(leaves.items()):
        bottom = total - 130 * (i + 1) - 6
        axes = figure.add_axes((74 / WIDTH, bottom / total, (WIDTH - 90) / WIDTH, 90 / total))
        axes.bar(list(part), list(part.values()), 0.64, color=BLUE)
        good = {b: q for b, q in right.get(name, {}).items() if q is not None}
        axes.scatter(list(good), list(good.values()), s=36, color=RED, zorder=3)
        axes.set_title(short(name, 40), loc="left", fontsize=13)
        axes.set_ylim(0, 1.05)
        axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        axes.set_xlim(blocks[0] - 0.6, blocks[-1] + 0.6)
        axes.set_xticks(blocks, [str(b) for b in blocks] if i == len(leaves) - 1 else [""] * len(blocks))
        axes.grid(axis="y")
    axes.set_xlabel("block that texts leave after")
