"""Metrics against ranks worked out by hand, intervals against formulas, and the guard against impossible tables."""

import json
import math

import numpy as np
import pytest
import recommend_made as made
from hypothesis import given
from hypothesis import strategies as st

from retouch.errors import UserError
from retouch.recommend.base import OUTSIDE, Scorer
from retouch.recommend.evaluate import check_table, compare, evaluate, measured
from retouch.recommend.metrics import (
    METRICS,
    bootstrap,
    coverage,
    guard,
    intervals,
    mrr,
    ndcg,
    paired,
    per_user,
    recall,
    values,
)
from retouch.recommend.splits import segments, split

RELAYED = [
    {"model": "TIGER", "R@5": 0.0534, "N@5": 0.0341, "R@10": 0.0912, "N@10": 0.0630},
    {"model": "prompts", "R@5": 0.0543, "N@5": 0.0347, "R@10": 0.0931, "N@10": 0.0642},
    {"model": "LWGR", "R@5": 0.0595, "N@5": 0.0376, "R@10": 0.1026, "N@10": 0.0701},
]
PUBLISHED = [
    {"model": "SASRec", "R@5": 0.0387, "N@5": 0.0249, "R@10": 0.0605, "N@10": 0.0318},
    {"model": "TIGER", "R@5": 0.0454, "N@5": 0.0321, "R@10": 0.0648, "N@10": 0.0384},
    {"model": "SASRec, full", "R@5": 0.0601, "N@5": 0.0420, "R@10": 0.0859, "N@10": 0.0503},
    {"model": "popularity", "R@5": 0.0080, "N@5": 0.0044, "R@10": 0.0152, "N@10": 0.0068},
]


def test_metrics_of_ranks_worked_out_by_hand():
    ranks = np.array([1, 2, 5, 6, 10, 11, OUTSIDE])
    assert recall(ranks, 5).tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert recall(ranks, 10).sum() == 5
    assert ndcg(ranks, 10).tolist() == pytest.approx(
        [1, 1 / math.log2(3), 1 / math.log2(6), 1 / math.log2(7), 1 / math.log2(11), 0, 0]
    )
    assert mrr(ranks).tolist() == pytest.approx([1, 0.5, 0.2, 1 / 6, 0.1, 0, 0])
    assert values(ranks).shape == (7, len(METRICS))
    with pytest.raises(UserError, match="'auc' is no metric"):
        values(ranks, ["auc"])


def test_several_targets_are_averaged_within_their_user_first():
    users, ranks = np.array([3, 1, 3, 3]), np.array([1, 7, 20, 20])
    names, found = per_user(users, values(ranks, ["recall@10"]))
    assert names.tolist() == [1, 3]
    assert found.ravel().tolist() == pytest.approx([1, 1 / 3])


def test_coverage_does_not_count_the_padding():
    assert coverage(np.array([[1, 2, 0], [2, 3, 0]], np.int32), 10) == pytest.approx(0.3)


# ---------------------------------------------------------------- intervals


def test_intervals_are_those_of_a_mean_and_repeat_with_the_seed():
    found = np.random.default_rng(0).normal(0.3, 1, (400, 2))
    ends = intervals(found, 2000, seed=3)
    error = 1.96 * found.std(axis=0) / 20
    assert ends == pytest.approx(np.stack([found.mean(axis=0) - error, found.mean(axis=0) + error], axis=1), abs=0.01)
    assert (intervals(found, 200, seed=3) == intervals(found, 200, seed=3)).all()
    assert bootstrap(found[:, :1], 50)[:, 0] == pytest.approx(bootstrap(found, 50)[:, 0])  # columns share the draw
    with pytest.raises(UserError, match="no user to resample"):
        intervals(found[:0])


def test_a_pair_is_surer_than_two_alone():
    chance = np.random.default_rng(0)
    old = chance.normal(0, 1, (300, 1))
    new = old + 0.05 + chance.normal(0, 0.01, (300, 1))
    (mean, low, high) = paired(new, old)[0]
    assert 0 < low < mean < high
    assert mean == pytest.approx(0.05, abs=0.005)
    assert intervals(new)[0, 0] < 0
    with pytest.raises(UserError, match="same users"):
        paired(new, old[1:])


# ---------------------------------------------------------------- arithmetic


@given(st.lists(st.integers(1, 40), min_size=1, max_size=50))
def test_true_rankings_always_pass_the_guard(ranks):
    numbers = dict(zip(METRICS, values(np.array(ranks)).mean(axis=0)))
    assert guard(numbers) == ()


def test_relayed_rows_are_rejected_and_published_ones_are_not():
    broken = check_table(RELAYED)
    assert [sentence.split(":")[0] for sentence in broken] == ["TIGER", "prompts", "LWGR"]
    assert "ndcg@10 - ndcg@5 is 0.0289" in broken[0]
    assert check_table(PUBLISHED) == ()
    assert check_table([{"model": "x", "R@5": 0.05, "N@5": 0.06}]) == ("x: ndcg@5 is 0.0600; with recall@5 = 0.0500 it lies between 0.0193 and 0.0500.",)  # fmt: skip
    assert "recall@10 - recall@5 is -0.0100" in check_table([{"R@5": 0.05, "R@10": 0.04}])[0]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json"])
def test_tables_are_read_from_files(tmp_path, kind):
    path = tmp_path / f"table.{kind}"
    rows = [RELAYED[0], PUBLISHED[1]]
    if kind == "json":
        path.write_text(json.dumps(rows))
    else:
        sign = "," if kind == "csv" else "\t"
        lines = [sign.join(["Model", "HR@5", "NDCG@5", "Hit@10", "n@10"])]
        lines += [sign.join(str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join(lines))
    assert len(check_table(path)) == 1


def test_a_table_that_cannot_be_checked_is_refused(tmp_path):
    with pytest.raises(UserError, match="A: nothing to check"):
        check_table([{"model": "A", "AUC": 0.9}])
    with pytest.raises(UserError, match=r"Row 1: 'high' in column 'R@5' is no number"):
        check_table([{"R@5": "high", "N@5": 0.1}])
    assert check_table([{"R@5": "5%", "N@5": "3%"}]) == ()
    percent = [
        {"R@5": 5.34, "N@5": 3.41, "R@10": 9.12, "N@10": 4.6},
        {"R@5": 0.8, "N@5": 0.5, "R@10": 1.2, "N@10": 0.62},
    ]
    assert check_table(percent) == ()
    assert "ndcg@5 is 0.0060; with recall@5 = 0.0050" in check_table([*percent, {"R@5": 0.5, "N@5": 0.6}])[0]
    with pytest.raises(UserError, match="cannot be read"):
        check_table(tmp_path / "none.csv")


# ---------------------------------------------------------------- the whole table


class Fixed:
    """Gives ranks by a rule, so that everything that follows is known."""

    def __init__(self, rule):
        self.rule = rule

    def ranks(self, samples):
        return np.array([self.rule(u) for u in samples.users.tolist()], np.int64)

    def log_likelihood(self, samples):
        return np.zeros(len(samples))

    def top(self, windows, k):
        return np.tile(np.arange(1, k + 1, dtype=np.int32), (len(windows), 1))


def test_every_metric_of_every_segment_with_intervals():
    data = made.random_data(200, n_items=40)
    splits = split(data)
    assert isinstance(Fixed(None), Scorer)
    found = evaluate(Fixed(lambda u: 1 if u % 2 else 8), data, splits, n_boot=300)
    assert found.numbers["recall@5"] == 0.5 and found.numbers["recall@10"] == 1
    assert found.numbers["coverage@10"] == 0.25
    assert found.broken == ()
    kinds = {name for name, mask in segments(data, splits, splits.test).items() if mask.any()}
    assert {row.segment for row in found.rows} == kinds >= {"all", "sparse", "active", "certificate"}
    row = next(r for r in found.rows if (r.segment, r.metric) == ("all", "recall@5"))
    assert row.low == pytest.approx(0.5 - 1.96 * 0.5 / math.sqrt(200), abs=0.02)
    assert row.n_users == 200
    assert found.table().rows[0][:3] == ("all", 200, f"0.5000 ({row.low:.4f} to {row.high:.4f})")
    assert json.dumps(found.to_json())


def test_two_methods_are_compared_user_by_user():
    data = made.random_data(200)
    splits = split(data)
    good, bad = (evaluate(Fixed(rule), data, splits, n_boot=0) for rule in (lambda u: 1, lambda u: 1 if u % 4 else 9))
    rows = {row[0]: row[1:] for row in compare(good, bad, n_boot=300).rows}
    assert rows["recall@5"][0] == pytest.approx(0.25)
    assert rows["recall@5"][1] > 0 and rows["recall@10"] == (0, 0, 0)
    other = evaluate(Fixed(lambda u: 1), data, splits, "valid", n_boot=0)
    with pytest.raises(UserError, match="different users"):
        compare(good, other)


def test_several_targets_of_a_user_weigh_as_one_user():
    data = made.random_data(200)
    splits = split(data, "time")
    found = evaluate(Fixed(lambda u: 1 if u == splits.test.users[0] else 99), data, splits, n_boot=0)
    assert found.numbers["recall@10"] == pytest.approx(1 / len(np.unique(splits.test.users)))


def test_ranks_that_are_none_are_refused():
    data = made.random_data()
    splits = split(data)
    with pytest.raises(UserError, match="ranks of at least 1"):
        evaluate(Fixed(lambda u: 0), data, splits)
    with pytest.raises(UserError, match="60 ranks of at least 1"):
        measured(data, splits, splits.test, np.ones(3, np.int64))
