"""The report draws quality against cost, says what a little quality saves, and can be made of what was kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from slim_made import made

from retouch._tradeoffs import _steps, plot_exits, plot_tradeoff
from retouch.report import to_html, to_json, write_html
from retouch.slim.latency import Latency, Row
from retouch.slim.pareto import apart, called, interval, operating, points_of, record, report
from retouch.slim.points import Point, area, at_drop


@pytest.fixture(scope="module")
def slim():
    return made(flops="1/3", max_harm=0.5)


@pytest.fixture(scope="module")
def static(slim):
    """The same as a model of one cost: as a record, as a bench keeps it."""
    kept = record(slim)
    full = kept["curve"][0]
    return {**kept, **full, "curve": [full, full], "threshold": None}


def sheet(found, title):
    return next(t for t in found["tables"] if t["title"] == title)


def times(*names):
    return Latency(tuple(Row(n, 1, "shuffled", 9, 8.0 / (i + 1), 9.0, 100.0) for i, n in enumerate(names)), {}, True)


def test_a_record_survives_json_and_tells_the_same(slim):
    kept = json.loads(json.dumps(record(slim), allow_nan=False))
    assert operating(kept)["chosen"] == slim.point
    assert points_of(kept) == list(slim.curve)
    assert to_json(report({"costeff": kept})) == to_json(report(slim))


def test_operating_points_are_chosen_full_depth_and_a_small_drop(slim):
    found = operating(record(slim))
    assert list(found) == ["chosen", "full_depth", "drop_0.005"]
    assert found["full_depth"].exit_layer == 2.0
    assert found["drop_0.005"] == at_drop(slim.curve, 0.005)


def test_equal_points_are_shown_once(static):
    assert list(operating(static)) == ["chosen", "full_depth", "drop_0.005"]
    assert list(apart(static)) == ["chosen"]


def test_one_model_is_reported_with_its_curve_exits_drops_and_texts(slim):
    found = to_json(report(slim))
    assert found["model"] == "tiny/bert"
    rows = sheet(found, "What it costs and what it gives")["rows"]
    assert rows[0][:3] == ["original", "", slim.quality_base]
    assert rows[1][:3] == ["costeff", "chosen", slim.point.quality]
    drops = sheet(found, "What does 0.5 % cost?")["rows"]
    assert [row[1] for row in drops] == ["0 %", "0.5 %", "1 %", "2 %"]
    assert [row[3] for row in drops] == sorted((row[3] for row in drops), reverse=True)
    low, high = slim.curve[-1].flops_ratio, slim.curve[0].flops_ratio
    assert sheet(found, "Area under the curve")["rows"] == [["costeff", area(slim.curve, low, high)]]
    assert [row[1] for row in sheet(found, "Exits")["rows"]] == [0, 1]
    early, late = (sheet(found, t)["rows"] for t in ("Texts that leave first", "Texts that stay longest"))
    assert {row[3] for row in early} == {0}
    assert {row[3] for row in late} == {1}
    assert slim.threshold.certificate.sentence() in found["notes"]
    assert "2 exits: that is how finely costs can be chosen." in found["notes"]
    assert any("Shaded: certified" in p["caption"] for p in found["pictures"])


def test_a_model_of_one_cost_is_a_point_beside_the_curve(slim, static):
    found = to_json(report({"costeff": slim, "static": static}))
    assert f"static {static['quality']:.3g} at {static['flops_ratio']:.3g}" in found["pictures"][0]["caption"]
    assert [row[0] for row in sheet(found, "Area under the curve")["rows"]] == ["costeff"]
    assert {row[0] for row in sheet(found, "What does 0.5 % cost?")["rows"]} == {"costeff"}
    assert len([row for row in sheet(found, "What it costs and what it gives")["rows"] if row[0] == "static"]) == 1


def test_times_are_shown_where_they_were_measured(slim, static):
    names = ["original", "costeff", called("costeff", "full_depth"), "static"]
    found = to_json(report({"costeff": slim, "static": static}, times(*names)))
    rows = sheet(found, "What it costs and what it gives")["rows"]
    assert rows[1][-2:] == [2.0, 4.0]
    assert rows[3][:2] == ["costeff", "drop 0.005"]
    assert rows[3][-2:] == [None, None]
    assert any("milliseconds" in p["caption"] for p in found["pictures"])
    assert any("busy" in note for note in found["notes"])
    assert found["numbers"]["costeff"]["points"]["full_depth"]["speedup"] == 3.0
    assert len(to_json(report(slim, times("another")))["pictures"]) == len(to_json(report(slim))["pictures"])


def test_nobody_who_leaves_early_means_no_texts_to_show(slim):
    stays = replace(slim, shown={k: [{**t, "exit_block": 1} for t in v] for k, v in slim.shown.items()})
    assert not [t for t in to_json(report(stays))["tables"] if t["title"].startswith("Texts")]


def test_what_was_not_reached_is_said(slim):
    refused = replace(slim, threshold=replace(slim.threshold, value=None, reachable=False, reason="A cost is too low."))
    assert any("no threshold does what was asked" in note for note in report({"a": refused}).notes)


def test_the_page_holds_pictures_and_no_script(slim, static, tmp_path):
    hostile = {"<script>x</script>": slim, "static": static}
    page = to_html(report(hostile))
    assert page.count("<svg") == 2
    assert "<script" not in page
    write_html(report(hostile), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == page


def test_a_report_needs_a_model():
    with pytest.raises(ValueError, match="at least one"):
        report({})


def _curve(*places):
    return [Point(0.0, y, y, x, 1.0, {}, {}) for x, y in places]


def test_an_interval_is_what_the_first_curve_shares():
    ours, rival, full = _curve((0.1, 0.5), (0.3, 0.7)), _curve((0.15, 0.5), (0.4, 0.7)), _curve((0.35, 0.5), (1.0, 0.9))
    assert interval([ours, rival, full, _curve((0.2, 0.6))]) == (0.15, 0.3)
    assert interval([_curve((0.2, 0.6))]) is None


# ---------------------------------------------------------------- pictures


def test_steps_are_the_best_so_far():
    assert _steps([(0.3, 0.7), (0.2, 0.4), (0.1, 0.5), (0.1, 0.3)]) == [(0.1, 0.5), (0.3, 0.7)]


def test_a_trade_is_drawn_on_either_axis():
    near = plot_tradeoff({"a": [(0.1, 0.5), (0.3, 0.7)]}, {}, "cost", "gain", "A.", level=0.8)
    far = plot_tradeoff({"a": [(0.01, 0.5), (0.3, 0.7)]}, {"b": (1.0, 0.9)}, "cost", "gain", "A.", shaded=(0.05, 0.3))
    alone = plot_tradeoff({}, {"b": (1.0, 0.9)}, "cost", "gain", "A.")
    assert ">original<" in near.svg
    for tick in (">0.02<", ">0.1<", ">1<"):
        assert tick in far.svg
    assert "certified" in far.caption
    assert alone.svg != near.svg
    assert plot_tradeoff({"a": [(0.1, 0.5), (0.3, 0.7)]}, {}, "cost", "gain", "A.", level=0.8) == near


@pytest.mark.parametrize("places", [[], [(0.1, math.nan)], [(math.inf, 0.5)]])
def test_a_trade_without_finite_places_is_refused(places):
    with pytest.raises(ValueError, match="finite places"):
        plot_tradeoff({"a": places}, {}, "cost", "gain", "A.")


def test_exits_are_bars_with_who_is_right():
    found = plot_exits({"a": {0: 0.7, 1: 0.3}}, {"a": {0: 0.9, 1: None}}, "Most leave.")
    assert "block 0 70%, 90% right, block 1 30%" in found.caption
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        plot_exits({"a": {0: 1.5}}, {}, "Most leave.")
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        plot_exits({}, {}, "Most leave.")
