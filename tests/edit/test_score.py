"""Means, scores, intervals over subjects, and the paired comparison of two methods."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retouch import store
from retouch.edit.score import harmonic, paired, read_rows, summarise


def test_the_harmonic_mean_is_that_of_the_statistics_module_and_0_with_a_0():
    assert harmonic([0.9, 0.5, 0.25]) == pytest.approx(statistics.harmonic_mean([0.9, 0.5, 0.25]))
    assert harmonic([1.0, 1.0, 0.0]) == 0


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_the_harmonic_mean_lies_between_the_least_and_the_plain_mean(values):
    assert min(values) - 1e-9 <= harmonic(values) <= statistics.fmean(values) + 1e-9


def test_intervals_are_drawn_over_subjects_and_not_over_records():
    rows = [{"efficacy": v} for v in (1.0, 0.0) * 10]
    same = summarise(rows, ["one", "one"] * 10)  # a single subject: nothing to draw
    assert (same["efficacy_low"], same["efficacy"], same["efficacy_high"]) == (0.5, 0.5, 0.5)
    pairs = summarise(rows, [f"s{i // 2}" for i in range(20)])  # each subject has a 1 and a 0
    assert (pairs["efficacy_low"], pairs["efficacy_high"]) == (0.5, 0.5)
    apart = summarise(rows, [f"s{i}" for i in range(20)])
    assert apart["efficacy_low"] < 0.35 < 0.65 < apart["efficacy_high"]
    assert summarise(rows, [f"s{i}" for i in range(20)]) == apart


def test_a_subject_with_more_records_weighs_more():
    found = summarise([{"efficacy": 1.0}] * 3 + [{"efficacy": 0.0}], ["big"] * 3 + ["small"])
    assert found["efficacy"] == 0.75
    assert (found["efficacy_low"], found["efficacy_high"]) == (0.0, 1.0)


def test_missing_metrics_are_counted_and_do_not_weigh():
    found = summarise([{"efficacy": 1.0, "paraphrase": 1.0}, {"efficacy": 0.0}, {"efficacy": 0.0}], ["a", "b", "c"])
    assert found["paraphrase"] == 1.0
    assert found["paraphrase_n"] == 1
    assert "efficacy_n" not in found
    assert (found["paraphrase_low"], found["paraphrase_high"]) == (1.0, 1.0)  # where nobody has it, nothing is said


def test_scores_are_harmonic_means_of_what_was_measured():
    row = {"efficacy": 1.0, "paraphrase": 0.5, "s_specificity": 0.25}
    assert summarise([row], ["a"])["score_classic"] == pytest.approx(statistics.harmonic_mean(row.values()))
    assert "score" not in summarise([row], ["a"])
    whole = row | {"r_specificity": 0.8}
    found = summarise([whole], ["a"])
    assert found["score"] == pytest.approx(statistics.harmonic_mean(whole.values()))
    assert found["score_classic"] == pytest.approx(statistics.harmonic_mean(row.values()))
    assert summarise([whole | {"r_specificity": 0.0}], ["a"])["score"] == 0
    assert "score_classic" not in summarise([{"efficacy": 1.0}], ["a"])


# Two methods on the same records


def rows(*values):
    return [{"x": v} for v in values]


def test_what_is_hard_for_both_cancels():
    hard = [0.1 * i for i in range(10)]
    a, b = rows(*(h + 0.05 for h in hard)), rows(*hard)
    subjects = [f"s{i}" for i in range(10)]
    found = paired(a, b, subjects, "x")
    assert found["difference"] == pytest.approx(0.05)
    assert (found["low"], found["high"]) == pytest.approx((0.05, 0.05))  # alone, each mean moves by a multiple of it
    apart = summarise(a, subjects)
    assert apart["x_high"] - apart["x_low"] > 0.2
    assert found["relative"] == pytest.approx(0.5 / 4.5)
    assert found["relative_low"] < found["relative"] < found["relative_high"]


def test_subjects_are_drawn_and_not_records():
    a, b = rows(1, 1, 1, 0, 0, 0), rows(0, 0, 0, 0, 0, 0)
    one = paired(a, b, ["one"] * 6, "x")
    assert (one["low"], one["high"]) == (0.5, 0.5)
    two = paired(a, b, ["one"] * 3 + ["two"] * 3, "x")
    assert (two["low"], two["difference"], two["high"]) == (0, 0.5, 1)
    assert paired(a, b, ["one"] * 3 + ["two"] * 3, "x") == two


def test_the_interval_holds_the_difference_of_noise_about_as_often_as_it_says():
    draw = random.Random(0)
    inside = 0
    for _ in range(60):
        a, b = ([{"x": draw.gauss(m, 1)} for _ in range(40)] for m in (0.3, 0.0))
        found = paired(a, b, [str(i) for i in range(40)], "x")
        inside += found["low"] <= 0.3 <= found["high"]
    assert 51 <= inside <= 60


def test_the_roles_may_be_exchanged():
    a, b = rows(0.9, 0.4, 0.7), rows(0.2, 0.5, 0.6)
    one, other = paired(a, b, "abc", "x"), paired(b, a, "abc", "x")
    assert one["difference"] == -other["difference"]
    assert (one["low"], one["high"]) == pytest.approx((-other["high"], -other["low"]))


def test_records_that_lack_the_metric_on_one_side_are_left_out():
    a = [{"x": 1.0}, {"y": 0.0}, {"x": 0.0}]
    b = [{"x": 0.5}, {"x": 0.0}, {}]
    assert paired(a, b, ["a", "b", "c"], "x")["difference"] == 0.5
    with pytest.raises(KeyError, match="z"):
        paired(a, b, ["a", "b", "c"], "z")
    with pytest.raises(ValueError, match="shorter"):
        paired(a, b[:2], ["a", "b", "c"], "x")


def test_a_ratio_to_nothing_is_infinite_and_of_nothing_to_nothing_no_change():
    found = paired(rows(1.0, 0.5), rows(0.0, 0.0), ["a", "b"], "x")
    assert found["relative"] == found["relative_high"] == math.inf
    assert not math.isnan(found["relative_low"])
    assert paired(rows(0.0), rows(0.0), ["a"], "x")["relative"] == 0


def test_kept_rows_are_read_by_method_and_in_order(tmp_path):
    path = tmp_path / "b.rows.json"
    lines = [{"method": m, "number": i, "subject": "s", "row": {"x": float(i)}} for m in "ab" for i in (1, 0)]
    store.write_json_atomic(path, lines)
    assert read_rows(path) == {m: [{"x": 0.0}, {"x": 1.0}] for m in "ab"}
