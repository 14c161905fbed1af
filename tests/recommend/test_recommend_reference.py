"""The reference: its training, what it may not see, how it goes on after a stop, and how its scorer ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from retouch import registry
from retouch.errors import RetouchError, SettingsError, UserError
from retouch.progress import listen
from retouch.recommend import _training
from retouch.recommend.base import OUTSIDE, Item, Run, Scorer
from retouch.recommend.data import Interactions, fingerprint
from retouch.recommend.generator_fit import fit_reference, reference_key
from retouch.recommend.reference import Reference, ReferenceSettings
from retouch.recommend.scorer import GenerativeScorer
from retouch.recommend.splits import CERTIFICATE, CONSTRAINT, Samples, split, windows
from retouch.recommend.tokenise import Catalogue

N_ITEMS, N_USERS = 30, 90
SETTINGS = ReferenceSettings(size="tiny", batch_size=64, n_epochs=4, warm_up_steps=5, learning_rate=0.01)


def interactions(change=None):
    """Most users take the item after their last one; `change` may replace histories."""
    draw = np.random.default_rng(0)
    histories = []
    for _ in range(N_USERS):
        walk = [int(draw.integers(1, N_ITEMS + 1))]
        for _ in range(int(draw.integers(5, 12))):
            jump = draw.random() < 0.1
            walk.append(int(draw.integers(1, N_ITEMS + 1)) if jump else walk[-1] % N_ITEMS + 1)
        histories.append(np.array(walk, np.int32))
    users = tuple(f"u{u}" for u in range(N_USERS))
    items = tuple(Item(f"i{i}", f"item {i}", f"item {i}") for i in range(N_ITEMS))
    if change is not None:
        histories = change(histories)
    return Interactions("toy", users, items, tuple(histories), None, fingerprint(users, items, tuple(histories), None))


DATA = interactions()
SPLITS = split(DATA)
CATALOGUE = Catalogue.of(np.stack([np.arange(N_ITEMS) // 6, np.arange(N_ITEMS) % 6 // 2, np.arange(N_ITEMS) % 2], 1),
                         (8, 4, 2))  # fmt: skip


def fitted(folder=None, data=DATA, splits=SPLITS, **changes):
    return fit_reference(data, splits, CATALOGUE, replace(SETTINGS, **changes), folder, n_history=6)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def straight():
    return fitted()


@pytest.fixture(scope="module")
def scorer():
    return GenerativeScorer(fitted(n_epochs=14), CATALOGUE, DATA, beams=10)


# ---------------------------------------------------------------- training


def test_the_loss_falls_and_targets_are_found(scorer):
    curve = scorer.generator.record["curve"]
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    assert (scorer.ranks(SPLITS.test) == 1).mean() > 0.6  # nine in ten follow the rule


def test_the_best_epoch_is_returned(scorer):
    record = scorer.generator.record
    best = max(record["curve"], key=lambda row: row["ndcg@10"])
    assert (record["best"], record["best_epoch"]) == (best["ndcg@10"], best["epoch"])
    ranks = replace(scorer, beams=20).ranks(SPLITS.valid)
    assert np.where(ranks <= 10, 1 / np.log2(ranks + 1.0), 0).mean() == pytest.approx(record["best"], abs=1e-9)


def test_training_ends_when_patience_does():
    record = fitted(n_epochs=200, patience=2, learning_rate=1e-9).record
    assert record["epoch"] == record["best_epoch"] + 2 < 20


def test_same_seed_same_bits_and_the_callers_generator_is_left_alone(straight):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = fitted()
    assert same(straight, again) and not same(straight, fitted(seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_can_be_a_share_of_the_samples():
    record = fitted(samples_per_epoch=100, n_epochs=2).record
    assert [row["step"] for row in record["curve"]] == [2, 4]


def test_a_loss_that_is_no_number_stops():
    with pytest.raises(RetouchError, match="Lower the learning rate"):
        fitted(learning_rate=1e30, warm_up_steps=0, clip=1e30)


# ---------------------------------------------------------------- what training may not see


def of_role(role, change):
    def changed(histories):
        return [change(h, u) if SPLITS.roles[u] == role else h for u, h in enumerate(histories)]

    return changed


def randomised(history, user):
    return np.random.default_rng(user).integers(1, N_ITEMS + 1, len(history)).astype(np.int32)


def with_other(place):
    def change(history, user):
        history = history.copy()
        history[place] = history[place] % N_ITEMS + 1
        return history

    return change


@pytest.mark.parametrize(
    ("role", "change"),
    [
        (CERTIFICATE, randomised),
        (CONSTRAINT, with_other(-3)),  # the target that feeds the constraint
        ("fit", with_other(-2)),  # the validation target
        ("fit", with_other(-1)),  # the test target
    ],
)
def test_training_sees_training_targets_only(straight, role, change):
    data = interactions(of_role(role, change))
    assert data.fingerprint != DATA.fingerprint
    before = fitted(n_epochs=1)
    assert same(fitted(n_epochs=1, data=data, splits=split(data)), before)
    assert not same(straight, before)


def test_training_sees_training_targets():
    data = interactions(of_role("fit", with_other(-3)))
    assert not same(fitted(n_epochs=1, data=data, splits=split(data)), fitted(n_epochs=1))


# ---------------------------------------------------------------- stopped and run again


class Stop:
    def __init__(self, step):
        self.step = step

    def __call__(self, what, done, total):
        if what == "Training the reference" and done == self.step:
            raise KeyboardInterrupt


def steps_heard(work):
    heard = []
    with listen(lambda what, done, total: heard.append(done) if what == "Training the reference" else None):
        work()
    return heard


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_a_stopped_training_ends_with_the_same_bits(straight, tmp_path, epoch):
    per_epoch = straight.record["step"] // 4
    with pytest.raises(KeyboardInterrupt), listen(Stop(epoch * per_epoch + 2)):
        fitted(tmp_path)
    heard = steps_heard(lambda: fitted(tmp_path))
    assert heard == list(range(epoch * per_epoch + 1, 4 * per_epoch + 1))
    finished = fitted(tmp_path)
    assert same(finished, straight)
    untimed = [{k: v for k, v in made.record.items() if k != "seconds"} for made in (finished, straight)]
    assert untimed[0] == untimed[1]


def test_a_finished_training_is_read_and_each_has_its_own_folder(straight, tmp_path):
    fitted(tmp_path)
    assert steps_heard(lambda: fitted(tmp_path)) == []
    fitted(tmp_path, seed=1)
    assert len(list(tmp_path.glob("reference-*"))) == 2
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.pkl"))


def test_a_damaged_state_is_told_and_begun_again(tmp_path, caplog):
    one = fitted(tmp_path, n_epochs=1)
    [folder] = tmp_path.glob("reference-*")
    numbers = folder / "state.safetensors"
    numbers.write_bytes(numbers.read_bytes()[:-1])
    assert same(fitted(tmp_path, n_epochs=1), one)
    assert "is damaged, so its run starts again" in caplog.text


# ---------------------------------------------------------------- order and rate


def test_an_epochs_batches_hold_each_sample_once_and_like_lengths():
    lengths = np.random.default_rng(0).integers(1, 21, 1000)
    order = _training.order(1000, seed=3, epoch=2)
    batches = list(_training.parts(lengths, order, 32))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert max(map(len, batches)) == 32
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 5 < np.mean([np.ptp(lengths[order[i : i + 32]]) for i in range(0, 1000, 32)])
    means = [lengths[batch].mean() for batch in batches[:16]]
    assert means != sorted(means)


def test_epochs_differ_and_a_cap_keeps_a_share():
    one, two = (_training.order(50, 0, epoch) for epoch in (0, 1))
    assert one.tolist() != two.tolist()
    assert _training.order(50, 0, 1, 7).tolist() == two[:7].tolist()


def test_the_learning_rate_rises_and_falls():
    rates = [_training.learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.01
    assert max(_training.learning_rate(step, 4, 2.0, 500) for step in range(4)) == pytest.approx(2.0)


def test_only_matrices_that_are_no_embeddings_decay(straight):
    decaying, still = _training.adamw(straight, 0.5, ("embeddings", "positions")).param_groups
    assert decaying["weight_decay"] == 0.5 and still["weight_decay"] == 0
    names = {id(p): name for name, p in straight.named_parameters()}
    kept = {names[id(p)] for p in still["params"]}
    assert {"embeddings", "positions", "first", "item_norm.bias", "encoder_norm.weight"} <= kept
    assert "heads" in {names[id(p)] for p in decaying["params"]}


# ---------------------------------------------------------------- the scorer


def scores_of_all(scorer, samples):
    seen, targets = windows(DATA, samples, 6)
    with torch.no_grad():
        memory = scorer.generator.encode(torch.from_numpy(seen))
        every = torch.arange(1, N_ITEMS + 1).repeat(len(samples), 1)
        return scorer.generator.code_log_probs(memory, every).sum(-1).numpy(), targets


def test_it_is_a_scorer(scorer):
    assert isinstance(scorer, Scorer)


def test_full_ranks_equal_counting_and_beams_agree_where_they_reach(scorer):
    scores, targets = scores_of_all(scorer, SPLITS.test)
    own = scores[np.arange(len(targets)), targets - 1]
    expected = (scores >= own[:, None] - 1e-6).sum(1)
    full = replace(scorer, full=True).ranks(SPLITS.test)
    assert (full == expected).all()
    narrow = replace(scorer, beams=3)
    ranks, exact = narrow.ranks(SPLITS.test), narrow.exact(SPLITS.test, 3)
    assert (ranks == OUTSIDE).any() and exact.any() and ranks.dtype == np.int64
    assert (ranks[exact & (full <= 3)] == full[exact & (full <= 3)]).all()


def test_likelihoods_are_the_targets_own(scorer):
    scores, targets = scores_of_all(scorer, SPLITS.certificate)
    found = scorer.log_likelihood(SPLITS.certificate)
    np.testing.assert_allclose(found, scores[np.arange(len(targets)), targets - 1], atol=1e-4)
    assert scorer.code_log_likelihood(SPLITS.certificate).shape == (len(targets), 3)


def test_ties_count_against_the_target(scorer, straight):
    level = fitted(n_epochs=1)
    with torch.no_grad():
        level.heads.zero_()
    ranks = GenerativeScorer(level, CATALOGUE, DATA, full=True).ranks(SPLITS.test)
    assert (ranks == N_ITEMS).all()


def test_top_holds_items_best_first_and_zero_where_there_are_none_left(scorer):
    seen, _ = windows(DATA, SPLITS.test, 6)
    best = scorer.top(seen, N_ITEMS + 2)
    scores, _ = scores_of_all(scorer, SPLITS.test)
    assert (best[:, :N_ITEMS] == np.argsort(-scores, 1, kind="stable") + 1).mean() > 0.99
    assert (best[:, N_ITEMS:] == 0).all() and best.dtype == np.int32


def test_seen_items_can_be_hidden(scorer):
    hiding, seen = replace(scorer, filter_seen=True), windows(DATA, SPLITS.test, 6)[0]
    best = hiding.top(seen, N_ITEMS)
    for window, row in zip(seen, best):
        assert not set(window[window > 0]) & set(row) and (row > 0).sum() == N_ITEMS - len(set(window[window > 0]))
    cuts, users = SPLITS.test.cuts, SPLITS.test.users
    again = np.array([DATA.histories[u - 1][c] in DATA.histories[u - 1][:c] for u, c in zip(users, cuts)])
    ranks = replace(hiding, full=True).ranks(SPLITS.test)
    assert again.any() and ((ranks == OUTSIDE) == again).all()
    assert (ranks[~again] <= replace(scorer, full=True).ranks(SPLITS.test)[~again]).all()


def test_knowledge_changes_scores_of_samples_and_windows(scorer):
    asked = []

    def residuals(samples):
        asked.append(len(samples))
        return torch.ones(len(samples), 32)

    knowing = replace(scorer, residuals=residuals, window_residuals=lambda w: torch.ones(len(w), 32))
    test, seen = SPLITS.test, windows(DATA, SPLITS.test, 6)[0]
    assert np.abs(knowing.log_likelihood(test) - scorer.log_likelihood(test)).max() > 0.01
    assert (knowing.ranks(test) != scorer.ranks(test)).any() and sum(asked) == 2 * len(test)
    assert (knowing.top(seen, 5) != scorer.top(seen, 5)).any()
    silent = replace(scorer, residuals=lambda samples: torch.zeros(len(samples), 32))
    np.testing.assert_array_equal(silent.log_likelihood(test), scorer.log_likelihood(test))
    with pytest.raises(UserError, match="window_residuals"):
        silent.top(seen, 5)


def test_the_batch_decides_nothing(scorer, monkeypatch):
    whole = scorer.ranks(SPLITS.test), scorer.log_likelihood(SPLITS.test)
    monkeypatch.setattr("retouch.recommend.scorer._ROWS", 70)
    np.testing.assert_array_equal(scorer.ranks(SPLITS.test), whole[0])
    alone = [scorer.log_likelihood(SPLITS.test.take(slice(i, i + 1)))[0] for i in range(len(SPLITS.test))]
    np.testing.assert_allclose(alone, whole[1], atol=1e-5)


def test_no_samples_give_no_numbers(scorer):
    none = Samples(np.zeros(0, np.int32), np.zeros(0, np.int32))
    assert scorer.ranks(none).shape == scorer.log_likelihood(none).shape == scorer.exact(none).shape == (0,)


def test_scoring_uses_no_dropout_and_leaves_training_as_it_was(scorer):
    before = scorer.log_likelihood(SPLITS.test)
    scorer.generator.train()
    np.testing.assert_array_equal(scorer.log_likelihood(SPLITS.test), before)
    assert scorer.generator.training
    scorer.generator.eval()


# ---------------------------------------------------------------- the method


def test_the_method_fits_a_run_and_takes_a_reference_made_exactly_so(tmp_path):
    method = registry.make("recommend", "reference", **SETTINGS.to_dict(), beams=7, full=True)
    assert isinstance(method, Reference) and method.name == "reference"
    run = Run(DATA, SPLITS, CATALOGUE, tmp_path, n_history=6)
    made = method.fit(run)
    assert (made.beams, made.full, made.generator.n_history) == (7, True, 6)
    given = replace(run, reference=made.generator, folder=None)
    assert method.fit(given).generator is made.generator
    assert replace(method, beams=9).fit(given).generator is made.generator
    assert replace(method, seed=1, n_epochs=1).fit(given).generator is not made.generator


def test_a_key_stands_for_everything(straight):
    def key(data=DATA, splits=SPLITS, catalogue=CATALOGUE, n_history=6, **changes):
        return reference_key(data, splits, catalogue, replace(SETTINGS, **changes), n_history)

    assert key() == straight.record["key"]
    other = Catalogue.of(CATALOGUE.codes[::-1].copy(), CATALOGUE.sizes)
    changed = interactions(of_role("fit", with_other(-1)))
    keys = [key(), key(data=changed), key(splits=split(DATA, seed=1)), key(splits=split(DATA, holdout="targets")),
            key(catalogue=other), key(n_history=7), key(seed=1), key(clip=2.0)]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_what_is_missing_or_wrong_is_named():
    with pytest.raises(UserError, match="the items' codes"):
        Reference().fit(Run(DATA, SPLITS))
    with pytest.raises(SettingsError, match="samples_per_epoch must be"):
        Reference(samples_per_epoch=0)
    assert Reference(samples_per_epoch=None, learning_rate=None).size == "small"
    few = Catalogue.of(CATALOGUE.codes[:5], CATALOGUE.sizes)
    with pytest.raises(UserError, match="codes of 5 items and the data has 30"):
        fit_reference(DATA, SPLITS, few, SETTINGS)
    with pytest.raises(UserError, match="no samples to validate with"):
        fit_reference(DATA, replace(SPLITS, valid=SPLITS.valid.take(slice(0))), CATALOGUE, SETTINGS)
    with pytest.raises(UserError, match="the catalogue holds"):
        GenerativeScorer(fitted(n_epochs=1), few, DATA)
