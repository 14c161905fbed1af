"""Popularity and SASRec: what they must find, what must not reach them, and that a stop changes nothing."""

import dataclasses
import math

import numpy as np
import pytest
import recommend_made as made
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch import registry
from retouch.errors import SettingsError, UserError
from retouch.progress import listen
from retouch.recommend._full import best
from retouch.recommend.base import OUTSIDE, Run, Scorer
from retouch.recommend.data import load
from retouch.recommend.evaluate import evaluate
from retouch.recommend.popularity import Popularity
from retouch.recommend.sasrec import SASRec, training_windows
from retouch.recommend.splits import CERTIFICATE, Samples, split

SMALL = {"d_model": 16, "n_history": 8, "batch_size": 16, "n_epochs": 3, "dropout": 0.1}


def run_of(data, folder=None, **how):
    return Run(data, split(data, **how), folder=folder)


def same_weights(one, other):
    a, b = one.network.state_dict(), other.network.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def scrambled(data, roles):
    """Replace the items of certificate users at random."""
    chance = np.random.default_rng(9)
    drawn = [chance.integers(1, data.n_items + 1, len(h)).astype(np.int32) for h in data.histories]
    held = roles == CERTIFICATE
    return dataclasses.replace(data, histories=tuple(d if out else h for d, h, out in zip(drawn, data.histories, held)))


@pytest.mark.parametrize("name", ["popularity", "sasrec"])
def test_methods_are_found_documented_and_score(name):
    entry = registry.find("recommend", name)
    assert entry.source and "Use when" in entry.doc and "Known problems" in entry.doc
    method = registry.make("recommend", name, **({} if name == "popularity" else SMALL | {"n_epochs": 1}))
    assert method.name == name
    run = run_of(made.random_data())
    scorer = method.fit(run)
    assert isinstance(scorer, Scorer)
    test = run.splits.test
    assert (scorer.ranks(test) >= 1).all() and (scorer.ranks(test) <= 30).all()
    rows = scorer.log_probs(np.zeros((1, 8), np.int32))
    assert np.exp(rows).sum() == pytest.approx(1)
    assert len(scorer.ranks(test.take(slice(0, 0)))) == 0


# ---------------------------------------------------------------- one row of scores


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 15))
def test_best_equals_a_stable_sort(seed, items, k):
    chance = np.random.default_rng(seed)
    scores = chance.integers(0, 4, (5, items)).astype(float)
    scores[chance.random((5, items)) < 0.2] = -np.inf
    found = best(scores, k)
    for row, got in zip(scores, found):
        order = [i + 1 for i in np.argsort(-row, kind="stable") if np.isfinite(row[i])][:k]
        assert got.tolist() == order + [0] * (k - len(order))


def test_popularity_ranks_by_training_counts_with_ties_against_the_target():
    data = made.interactions([[1, 2, 3, 4, 5, 6]] * 4 + [[1, 2, 2, 4, 5, 7]] * 4, 8)
    run = run_of(data, holdout="targets")
    scorer = Popularity().fit(run)
    counts = run.splits.counts[1:]
    for rank, u, c in zip(scorer.ranks(run.splits.test), run.splits.test.users, run.splits.test.cuts):
        target = data.histories[u - 1][c]
        assert rank == 1 + sum(counts[j] >= counts[target - 1] for j in range(8) if j != target - 1)
    share = (counts + 0.5) / (counts + 0.5).sum()
    assert scorer.log_likelihood(run.splits.test)[0] == pytest.approx(math.log(share[5]))
    assert scorer.top(np.zeros((1, 5), np.int32), 2).tolist() == [[2, 1]]


def test_seen_items_are_hidden_on_request_only():
    data = made.interactions([[1, 2, 3, 4, 5, 1]] * 20, 6)
    run = run_of(data, holdout="targets")
    scorer = Popularity().fit(run)
    hiding = dataclasses.replace(scorer, filter_seen=True)
    assert (hiding.ranks(run.splits.test) == OUTSIDE).all()  # the target is an old item
    assert (scorer.ranks(run.splits.test) < OUTSIDE).all()
    window = np.array([[0, 0, 1, 2, 3, 4]], np.int32)
    assert hiding.top(window, 6).tolist() == [[5, 6, 0, 0, 0, 0]]
    assert (hiding.log_likelihood(run.splits.test) == scorer.log_likelihood(run.splits.test)).all()
    assert (hiding.ranks(run.splits.valid) == 2).all()  # items 5 and 6 were never trained on: tied


# ---------------------------------------------------------------- sasrec


def test_training_windows_hold_every_target_once_behind_its_own_past():
    data = made.random_data(40, longest=30)
    splits = split(data)
    inputs, targets = training_windows(data, splits, 8)
    want = {(int(u), int(c)) for u, c in zip(splits.train.users, splits.train.cuts)}
    assert (targets > 0).sum() == len(want)
    assert ((inputs > 0) == (targets > 0)).all()
    got = sorted(zip(inputs[inputs > 0].tolist(), targets[targets > 0].tolist()))
    assert got == sorted((int(data.histories[u - 1][c - 1]), int(data.histories[u - 1][c])) for u, c in want)


def test_sasrec_learns_a_rule_and_popularity_does_not():
    data = made.cyclic_data()
    run = run_of(data)
    found = {}
    for method in (
        SASRec(d_model=32, n_history=8, batch_size=16, n_epochs=25, learning_rate=3e-3, dropout=0.1),
        Popularity(),
    ):
        found[method.name] = evaluate(method.fit(run), data, run.splits, n_boot=0, n_history=8).numbers
    assert found["sasrec"]["recall@5"] > 0.9 > 0.5 > found["popularity"]["recall@5"]


def test_ranks_and_likelihoods_depend_neither_on_batches_nor_on_padding():
    data = made.random_data(longest=30)
    run = run_of(data)
    one = SASRec(**SMALL).fit(run)
    test = run.splits.test
    for size in (1, 7):
        other = dataclasses.replace(one, batch_size=size)
        assert np.allclose(other.log_likelihood(test), one.log_likelihood(test), atol=1e-5)
        assert (other.ranks(test) == one.ranks(test)).all()
    window = np.array([[3, 4, 5]], np.int32)
    wide = np.pad(window, ((0, 0), (20, 0)))
    assert (one.top(window, 5) == one.top(wide, 5)).all()
    assert (one.top(np.concatenate([window, window + 1]), 5)[:1] == one.top(window, 5)).all()


def test_likelihood_is_that_of_the_whole_catalogue_and_agrees_with_ranks():
    data = made.random_data()
    run = run_of(data)
    scorer = SASRec(**SMALL).fit(run)
    samples = run.splits.test.take(slice(0, 9))
    top = scorer.top(
        np.stack(
            [np.pad(data.histories[u - 1][:c][-8:], (max(8 - c, 0), 0)) for u, c in zip(samples.users, samples.cuts)]
        ),
        30,
    )
    target = [data.histories[u - 1][c] for u, c in zip(samples.users, samples.cuts)]
    assert scorer.ranks(samples).tolist() == [row.tolist().index(t) + 1 for row, t in zip(top, target)]
    assert np.exp(scorer.log_likelihood(samples)).max() < 1


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    run = run_of(made.random_data())
    before = torch.get_rng_state()
    one, two, other = (SASRec(**SMALL, seed=s).fit(run) for s in (0, 0, 1))
    assert same_weights(one, two) and not same_weights(one, other)
    assert one.history == two.history
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_held_back_never_reaches_the_weights():
    data = made.random_data(120)
    splits = split(data)
    changed = scrambled(data, splits.roles)
    assert any((a != b).any() for a, b in zip(data.histories, changed.histories))
    for method in (SASRec(**SMALL), Popularity()):
        one, other = method.fit(Run(data, splits)), method.fit(Run(changed, split(changed)))
        if isinstance(method, SASRec):
            assert same_weights(one, other) and one.history == other.history
        else:
            assert (one.row == other.row).all()


def test_validation_and_test_targets_only_choose_the_epoch():
    data = made.random_data(80)
    after = tuple(np.append(h[:-2], (h[-2:] % 30) + 1).astype(np.int32) for h in data.histories)
    changed = dataclasses.replace(data, histories=after)
    losses = [[e["loss"] for e in SASRec(**SMALL).fit(run_of(d)).history] for d in (data, changed)]
    assert losses[0] == losses[1]
    kept = [SASRec(**SMALL, patience=1).fit(run_of(d)).history for d in (data, changed)]
    assert kept[0] != kept[1]


def test_the_future_does_not_reach_a_place():
    data = made.random_data()
    scorer = SASRec(**SMALL).fit(run_of(data))
    window = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    changed = window.clone()
    changed[0, 5:] = 9
    with torch.no_grad():
        one, other = scorer.network(window), scorer.network(changed)
    assert torch.equal(one[:, :5], other[:, :5]) and not torch.equal(one[:, 5:], other[:, 5:])


def test_it_stops_when_validation_gains_no_more_and_keeps_the_best():
    data = made.random_data(40)
    run = run_of(data)
    scorer = SASRec(**{**SMALL, "n_epochs": 60}, patience=3).fit(run)
    scores = [e["ndcg@10"] for e in scorer.history]
    assert len(scores) == int(np.argmax(scores)) + 4 < 60
    evaluation = evaluate(scorer, data, run.splits, "valid", n_boot=0, n_history=8)
    assert evaluation.numbers["ndcg@10"] == pytest.approx(max(scores))


class Stopped(Exception):
    pass


def test_interrupted_and_called_again_is_as_never_interrupted(tmp_path):
    data = made.random_data()
    whole = SASRec(**SMALL).fit(run_of(data))

    def stop(what, done, total):
        if "epoch 3" in what and done > 20:
            raise Stopped

    with pytest.raises(Stopped), listen(stop):
        SASRec(**SMALL).fit(run_of(data, tmp_path))
    began = []
    with listen(lambda what, done, total: began.append(what)):
        resumed = SASRec(**SMALL).fit(run_of(data, tmp_path))
    assert not any("epoch 1 " in what or "epoch 2 " in what for what in began)
    assert same_weights(whole, resumed) and whole.history == resumed.history
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} <= {".safetensors", ".json"}
    longer = SASRec(**{**SMALL, "n_epochs": 4}).fit(run_of(data, tmp_path))
    assert longer.history[:3] == whole.history and len(longer.history) == 4
    assert same_weights(whole, SASRec(**SMALL).fit(run_of(data, tmp_path)))  # the state went further: begin again
    assert SASRec(**SMALL, seed=1).fit(run_of(data, tmp_path)).history != whole.history


def test_wrong_settings_and_divergence_are_named():
    with pytest.raises(SettingsError, match="3 n_heads do not divide a d_model of 16"):
        SASRec(d_model=16, n_heads=3)
    with pytest.raises(SettingsError, match="dropout must be"):
        SASRec(dropout=1)
    run = run_of(made.random_data())
    with pytest.raises(UserError, match=r"sasrec diverged in epoch 1.*Lower learning_rate"):
        SASRec(**SMALL, learning_rate=1e30).fit(run)
    with pytest.raises(UserError, match="needs a fitted reference"):
        run.needs_reference()


def test_popularity_of_movielens_as_known(data_dir):
    data = load(data_dir / "ml-100k")
    run = run_of(data, holdout="targets")
    found = evaluate(Popularity().fit(run), data, run.splits, n_boot=0).numbers
    got = [found[name] for name in ("recall@5", "ndcg@5", "recall@10", "ndcg@10")]
    assert got == pytest.approx([0.026, 0.014, 0.050, 0.022], abs=0.002)
    hiding = dataclasses.replace(Popularity().fit(run), filter_seen=True)
    assert evaluate(hiding, data, run.splits, n_boot=0).numbers["recall@10"] == pytest.approx(0.084, abs=0.004)


def test_popularity_of_beauty_as_published(data_dir):
    data = load(data_dir / "amazon-beauty")
    run = run_of(data, holdout="targets")
    samples = Samples(run.splits.test.users[::4], run.splits.test.cuts[::4])
    ranks = Popularity().fit(run).ranks(samples)
    assert (ranks <= 10).mean() == pytest.approx(0.0152, abs=0.004)
