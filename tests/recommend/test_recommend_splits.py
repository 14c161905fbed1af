"""Splits against the slow obvious way: no target in two parts, kept-back users and targets in no count."""

import dataclasses

import numpy as np
import pytest
import recommend_made as made
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch.errors import UnknownName, UserError
from retouch.recommend.data import load
from retouch.recommend.splits import (
    CERTIFICATE,
    CONSTRAINT,
    FIT,
    Samples,
    role_numbers,
    seen_pairs,
    segments,
    split,
    targets,
    windows,
)

PARTS = ("train", "valid", "test", "constraint", "certificate")


def pairs(samples):
    return set(zip(samples.users.tolist(), samples.cuts.tolist()))


def slow_parts(data, holdout, roles):
    """Leave one out, user by user."""
    found = {name: set() for name in PARTS}
    for u, history in enumerate(data.histories, 1):
        n, role = len(history), roles[u - 1]
        if n < 3:
            found["train"] |= {(u, c) for c in range(1, n)}
            continue
        cuts = list(range(1, n - 2))
        found["test"].add((u, n - 1))
        found["certificate" if role == CERTIFICATE else "valid"].add((u, n - 2))
        if role == CONSTRAINT and cuts:
            found["constraint"].add((u, cuts.pop()))
        if role != CERTIFICATE or holdout == "targets":
            found["train"] |= {(u, c) for c in cuts}
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 50), st.sampled_from(["users", "targets"]), st.integers(1, 6))
def test_leave_one_out_equals_the_slow_way(seed, holdout, shortest):
    data = made.random_data(seed=seed, shortest=shortest, longest=shortest + 6)
    s = split(data, holdout=holdout, seed=seed)
    assert {name: pairs(s.of(name)) for name in PARTS} == slow_parts(data, holdout, s.roles)


@pytest.mark.parametrize("how", ["leave-one-out", "time"])
@pytest.mark.parametrize("holdout", ["users", "targets"])
def test_no_sample_is_in_two_parts_and_none_has_an_empty_prefix(how, holdout):
    s = split(made.random_data(300), how, holdout)
    found = [pairs(s.of(name)) for name in PARTS]
    assert sum(map(len, found)) == len(set().union(*found))
    assert all(len(s.of(name)) and s.of(name).cuts.min() >= 1 for name in PARTS)
    assert set(np.unique(s.roles)) == {FIT, CONSTRAINT, CERTIFICATE}
    assert set(s.roles[s.constraint.users - 1]) == {CONSTRAINT}
    assert set(s.roles[s.certificate.users - 1]) == {CERTIFICATE}
    assert CERTIFICATE not in s.roles[s.valid.users - 1]
    assert (CERTIFICATE in s.roles[s.train.users - 1]) == (holdout == "targets")


def test_time_puts_training_before_validation_before_test():
    data = made.random_data(200)
    s = split(data, "time")
    time = {name: data.flat_times[data.starts[s.of(name).users - 1] + s.of(name).cuts] for name in PARTS}
    first, second = s.cut_times
    assert (
        max(time["train"].max(), time["constraint"].max())
        < first
        <= min(time["valid"].min(), time["certificate"].min())
    )
    assert max(time["valid"].max(), time["certificate"].max()) < second <= time["test"].min()
    share = (data.flat_times < first).mean(), (data.flat_times < second).mean()
    assert share == pytest.approx((0.8, 0.9), abs=0.01)
    assert (np.unique(s.test.users, return_counts=True)[1] > 1).any()  # several targets of one user


def test_time_needs_a_clock_and_says_why():
    with pytest.raises(UserError, match=r"has no clock.*cannot be split by time"):
        split(made.random_data(clock=False), "time")


def test_other_choices_are_refused():
    with pytest.raises(UnknownName, match="No choice of how is called 'random'"):
        split(made.random_data(), "random")
    with pytest.raises(UnknownName, match="No part of a split is called 'dev'"):
        split(made.random_data()).of("dev")
    with pytest.raises(UserError, match=r"no interaction to stop training by|no interaction to train on"):
        split(made.interactions([[1, 2], [2, 1]], 2))


@pytest.mark.parametrize("how", ["leave-one-out", "time"])
def test_counts_come_from_training_alone(how):
    data = made.random_data(200)
    s = split(data, how)
    slow = np.zeros(data.n_items + 1, int)
    for user, history in enumerate(data.histories, 1):
        for item in history[: s.last[user - 1]]:
            slow[item] += 1
    assert s.last[s.roles == CERTIFICATE].max() == 0
    # users whose only training interaction is the first have no training target and still count
    assert (s.counts >= slow).all() and (s.counts - slow).sum() <= 200
    chance = np.random.default_rng(1)
    held = s.roles == CERTIFICATE
    scrambled = tuple(
        chance.integers(1, 31, len(h)).astype(np.int32) if out else h for h, out in zip(data.histories, held)
    )
    assert (split(dataclasses.replace(data, histories=scrambled), how).counts == s.counts).all()
    after = tuple(np.append(h[:-2], [1, 1]).astype(np.int32) for h in data.histories)
    if how == "leave-one-out":
        assert (split(dataclasses.replace(data, histories=after)).counts == s.counts).all()


def test_roles_are_stable_shares_of_a_hash():
    names = [f"user {k}" for k in range(20_000)]
    x = role_numbers(names, 0)
    assert np.histogram(x, 10, (0, 1))[0] / 20_000 == pytest.approx(np.full(10, 0.1), abs=0.01)
    assert (role_numbers(names[::-1], 0)[::-1] == x).all()
    assert (role_numbers(names, 1) != x).all()
    roles = split(made.random_data(2000)).roles
    assert (roles == CERTIFICATE).mean() == pytest.approx(0.3, abs=0.03)
    assert (roles == CONSTRAINT).mean() == pytest.approx(0.1, abs=0.03)


def test_short_histories_are_never_constraint_users():
    data = made.random_data(400, shortest=1, longest=6)
    roles = split(data).roles
    assert data.lengths[roles == CONSTRAINT].min() == 5
    assert data.lengths[roles == CERTIFICATE].min() == 3


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(0, 5))
def test_windows_hold_the_latest_items_padded_on_the_left(n_history, seed):
    data = made.random_data(20, seed=seed)
    samples = split(data, holdout="targets").train
    found, wanted = windows(data, samples, n_history)
    for row, (u, c) in enumerate(zip(samples.users, samples.cuts)):
        history = data.histories[u - 1]
        prefix = history[:c][-n_history:].tolist()
        assert found[row].tolist() == [0] * (n_history - len(prefix)) + prefix
        assert wanted[row] == history[c] == targets(data, samples)[row]
    assert found.dtype == np.int32


def test_seen_pairs_list_each_prefix_whole():
    data = made.random_data(10)
    samples = split(data).test
    rows, items = seen_pairs(data, samples)
    for row, (u, c) in enumerate(zip(samples.users, samples.cuts)):
        assert items[rows == row].tolist() == data.histories[u - 1][:c].tolist()


def test_segments_by_what_is_known():
    histories = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]] * 30 + [[1, 2, 3, 4, 5]] * 30 + [[1, 2, 3, 4, 11]]
    data = made.interactions(histories, 11)
    s = split(data, holdout="targets")
    parts = segments(data, s, s.test)
    assert parts["sparse"].sum() == 31 and (parts["sparse"] ^ parts["active"]).all()
    assert parts["new"].sum() == 31  # item 10 and item 11 are only ever test targets
    assert (parts["tail"] ^ parts["head"]).all() and parts["tail"][-1]
    assert (parts["certificate"] == (s.roles == CERTIFICATE)).all()


def test_samples_are_taken_by_mask_number_and_slice():
    samples = Samples(np.array([1, 2, 3], np.int32), np.array([4, 5, 6], np.int32))
    assert pairs(samples.take(np.array([True, False, True]))) == {(1, 4), (3, 6)}
    assert len(samples.take(slice(1, None))) == 2


def test_beauty_as_published(data_dir):
    data = load(data_dir / "amazon-beauty")
    s = split(data, holdout="targets")
    assert len(s.train) + len(s.constraint) == 131_413
    assert len(s.test) == 22_363
    assert 0.28 <= segments(data, s, s.test)["tail"].mean() <= 0.32
    assert (s.roles == CERTIFICATE).mean() == pytest.approx(0.1, abs=0.005)
    s = split(data)
    assert 0.28 <= segments(data, s, s.test)["tail"].mean() <= 0.32


def test_movielens_has_almost_no_tail(data_dir):
    data = load(data_dir / "ml-100k")
    s = split(data, holdout="targets")
    assert segments(data, s, s.test)["tail"].mean() == pytest.approx(0.005, abs=0.001)
    assert (s.roles == CERTIFICATE).mean() == pytest.approx(0.3, abs=0.03)
