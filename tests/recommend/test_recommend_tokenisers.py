"""Tokenisers: the same codes from fitting and encoding, alone and in company; and the digit that tells equals apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retouch.errors import SettingsError, StoreError, UnknownName, UserError
from retouch.progress import listen
from retouch.recommend import _kmeans, rq_vae
from retouch.recommend.base import Item
from retouch.recommend.data import Interactions
from retouch.recommend.opq import OPQ
from retouch.recommend.rq_kmeans import RQKMeans
from retouch.recommend.rq_vae import RQVAE
from retouch.recommend.splits import split
from retouch.recommend.tokenise import (
    Catalogue,
    assign,
    digit_size,
    digits,
    first_seen,
    load_tokeniser,
    sharing,
    tokenise,
)
from retouch.store import save_tensors

TOKENISERS = {
    "rq_kmeans": RQKMeans(codes=8),
    "plain": RQKMeans(codes=8, normalise_residual=False),
    "opq": OPQ(codes=8, rounds=4),
    "rq_vae": RQVAE(hidden=(16,), width=8, codes=8, epochs=25, batch_size=100),
}
each = pytest.mark.parametrize("tokeniser", TOKENISERS.values(), ids=TOKENISERS)


def vectors(n=200, width=16, groups=12, seed=0):
    """Unit vectors around a few directions, as texts of some kinds give."""
    random = np.random.default_rng(seed)
    found = random.normal(size=(groups, width))[random.integers(groups, size=n)] + 0.3 * random.normal(size=(n, width))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@each
def test_codes_do_not_depend_on_company_or_on_the_file(tokeniser, tmp_path):
    x = vectors()
    fitted = tokeniser.fit(x, seed=3)
    codes = fitted.encode(x)
    assert codes.dtype == np.int32 and codes.shape == (200, len(fitted.sizes)) and (codes < fitted.sizes).all()
    assert (np.concatenate([fitted.encode(x[i : i + 1]) for i in range(20)]) == codes[:20]).all()
    assert (fitted.encode(x[::-1])[::-1] == codes).all()
    fitted.save(tmp_path / "t.safetensors")
    again = load_tokeniser(tmp_path / "t.safetensors")
    assert (again.encode(x) == codes).all() and again.sizes == fitted.sizes
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()


@each
def test_a_seed_fixes_everything_and_torch_s_own_is_left_alone(tokeniser):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, same, other = (tokeniser.fit(vectors(), seed).tensors() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@each
def test_codes_explain_the_vectors(tokeniser):
    x = vectors()
    fitted = tokeniser.fit(x)
    codes, shares = fitted.encode(x), fitted.residual_shares(x)
    assert len(shares) == len(fitted.sizes) and all(0 <= share < 0.9 for share in shares)
    same = [(x[i] @ x[codes[:, 0] == codes[i, 0]].T).mean() for i in range(len(x))]
    assert np.mean(same) > (x @ x.T).mean() + 0.1


@each
def test_unfit_vectors_are_refused(tokeniser):
    with pytest.raises(UserError, match="5 items cannot fill 8 codes"):
        tokeniser.fit(vectors(5))
    broken = vectors()
    broken[7, 1] = np.nan
    with pytest.raises(UserError, match="Vector 7"):
        tokeniser.fit(broken)
    with pytest.raises(UserError, match=r"\[items, 16\]"):
        tokeniser.fit(vectors()).encode(vectors(width=8))


def test_fitting_says_what_encoding_says():
    """The residuals that the next level was fitted to are those that encoding makes."""
    x = vectors()
    fitted = RQKMeans(codes=8).fit(x)
    codes, left = fitted.encode(x), x.astype(np.float64) - fitted.mean
    for level, book in enumerate(fitted.books.astype(np.float64)):
        rows = left / np.linalg.norm(left, axis=1, keepdims=True) if level else left
        for code in range(8):
            mine = rows[codes[:, level] == code]
            assert len(mine) == 0 or np.allclose(mine.mean(0), book[code], atol=1e-3)
        left = rows - book[codes[:, level]]


def test_normalising_evens_out_the_later_levels():
    x = vectors(600, groups=30)

    def used_evenly(normalise):
        codes = RQKMeans(codes=16, normalise_residual=normalise).fit(x).encode(x)
        p = np.bincount(codes[:, 2], minlength=16) / len(x)
        return np.exp(-(p[p > 0] * np.log(p[p > 0])).sum())

    assert used_evenly(True) > used_evenly(False)


def test_a_rotation_is_orthogonal_and_improves_on_none():
    x = vectors(400) @ np.diag(np.linspace(3, 0.1, 16))
    fitted, start = OPQ(codes=8, rounds=15).fit(x), OPQ(codes=8, rounds=0).fit(x)
    assert np.allclose(fitted.rotation @ fitted.rotation.T, np.eye(16), atol=1e-5)

    def miss(tokeniser):
        turned = (x - tokeniser.mean) @ tokeniser.rotation
        codes = tokeniser.encode(x)
        return ((np.concatenate([b[codes[:, i]] for i, b in enumerate(tokeniser.books)], 1) - turned) ** 2).sum()

    assert miss(fitted) < miss(start)
    with pytest.raises(UserError, match="5 equal blocks"):
        OPQ(blocks=5, codes=8).fit(x)


def test_training_ends_when_no_more_codes_differ_but_not_in_the_first_fall():
    told = []
    with listen(lambda what, done, total: told.append(done) if what == "auto-encoder" else None):
        RQVAE(hidden=(8,), width=4, codes=4, epochs=500, patience=6).fit(vectors(100))
    assert 12 <= told[-1] < 500 and told == list(range(1, len(told) + 1))


def test_a_code_that_nobody_chose_for_long_moves_onto_the_worst_row():
    network = rq_vae._Network((4, 3), 1, 4, 0)
    optimiser = torch.optim.AdamW(network.parameters())
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    loss, codes, miss = network(x, 0.25)
    loss.backward()
    optimiser.step()
    network.books.data[0] = torch.eye(4, 3) * 9
    before, chosen = network.books.detach().clone(), torch.zeros_like(codes)
    unused = torch.tensor([[500, 98, 99, 0]])
    rq_vae._reseed(network, x, chosen, miss, unused, optimiser)
    worst = network.encoder(x[miss.argmax()])
    assert torch.allclose(network.books[0, 2], worst) and torch.equal(network.books[0, [0, 1, 3]], before[0, [0, 1, 3]])
    assert unused.tolist() == [[0, 99, 0, 1]] and not optimiser.state[network.books]["exp_avg"][0, 2].any()


def test_k_means_finds_clear_clusters_and_survives_few_different_rows():
    centres = np.eye(4, dtype=np.float32) * 10
    x = np.repeat(centres, 25, axis=0) + np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32) * 0.1
    found = _kmeans.kmeans(x, 4, seed=0)
    assert np.allclose(sorted(found.tolist()), sorted(x.reshape(4, 25, 4).mean(1).tolist()), atol=1e-4)
    same = np.ones((10, 3), np.float32)
    assert np.allclose(_kmeans.kmeans(same, 4, seed=0), 1)


def test_an_empty_cluster_takes_the_row_that_is_served_worst():
    x = np.array([[0.0], [1.0], [2.0], [50.0]], np.float32)
    moved, miss = _kmeans.lloyd(x, np.array([[1.0], [999.0]], np.float32), 10)
    assert sorted(moved[:, 0].tolist()) == [1.0, 50.0] and miss == pytest.approx(2.0)


def test_wrong_settings_name_the_field():
    with pytest.raises(SettingsError, match="levels must be int >= 1"):
        RQKMeans(levels=0)


# ---------------------------------------------------------------- the digit and the catalogue


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=40))
def test_digits_count_equals_in_the_order_of_time_then_id(drawn):
    codes = np.array([row[:2] for row in drawn], np.int32)
    first = np.array([np.inf if row[2] == 3 else row[2] for row in drawn], float)
    ids = [f"{(7 * i) % 41:02d}" for i in range(len(drawn))]
    found = digits(codes, first, ids)
    for i, row in enumerate(codes.tolist()):
        before = [j for j, r in enumerate(codes.tolist()) if r == row and (first[j], ids[j]) < (first[i], ids[i])]
        assert found[i] == len(before)
    assert (sharing(codes) == [(codes == row).all(1).sum() for row in codes]).all()
    catalogue = assign(codes, (3, 2), first, ids)
    largest = int(sharing(codes).max())
    assert catalogue.sizes == (3, 2, digit_size(largest)) and digit_size(largest) >= max(16, 2 * largest)


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=20),
    st.lists(st.integers(0, 3), max_size=10),
    st.lists(st.integers(0, 3), max_size=10),
)
def test_new_items_take_free_digits_and_change_nobody(old, new, later):
    codes = np.array(old)[:, None]
    start = assign(codes, (4,), np.arange(len(old))[::-1], [str(i) for i in range(len(old))])
    start = Catalogue.of(start.codes, (4, 64))
    grown = start.grown(np.array(new, int)[:, None]).grown(np.array(later, int)[:, None])
    assert (grown.codes[: len(old)] == start.codes).all() and grown.sizes == start.sizes
    assert grown.codes[len(old) :, 0].tolist() == new + later  # all different, or it would not be a catalogue
    assert grown.is_new.sum() == len(new) + len(later) and not grown.is_new[: len(old) + 1].any()
    for code in range(4):
        group = grown.codes[grown.codes[:, 0] == code, 1]
        assert sorted(group.tolist()) == list(range(len(group)))


def test_outgrowing_the_digit_says_what_to_do():
    catalogue = assign(np.zeros((5, 1), int), (2,), np.arange(5), list("abcde"))
    full = catalogue.grown(np.zeros((11, 1), int))
    with pytest.raises(UserError, match=r"17 items share all codes .* only 16 apart\. Tokenise the catalogue again"):
        full.grown(np.zeros((1, 1), int))


def test_a_catalogue_survives_its_file(tmp_path):
    catalogue = assign(np.array([[1, 0], [1, 0], [0, 2]]), (2, 3), np.arange(3), list("abc")).grown(np.array([[1, 2]]))
    catalogue.save(tmp_path / "c.safetensors")
    again = Catalogue.load(tmp_path / "c.safetensors")
    assert (again.codes == catalogue.codes).all() and again.sizes == catalogue.sizes and again.n_trained == 3
    with pytest.raises(ValueError, match="read-only"):
        again.codes[0] = 0


def test_what_is_no_catalogue_is_refused(tmp_path):
    with pytest.raises(UserError, match="Level 1 has codes from 0 to 2, and an item has 3"):
        Catalogue.of(np.array([[0, 3]]), (1, 3))
    with pytest.raises(UserError, match="2 sizes were given for 1 levels"):
        Catalogue.of(np.array([[0]]), (1, 3))
    save_tensors(tmp_path / "x.safetensors", {"rq_kmeans.mean": torch.zeros(2)})
    with pytest.raises(StoreError, match="lacks"):
        load_tokeniser(tmp_path / "x.safetensors")
    with pytest.raises(StoreError):
        Catalogue.load(tmp_path / "x.safetensors")
    save_tensors(tmp_path / "y.safetensors", {"rq_mean.mean": torch.zeros(2)})
    with pytest.raises(UnknownName, match="Did you mean 'rq_kmeans'"):
        load_tokeniser(tmp_path / "y.safetensors")


def test_only_items_of_the_training_teach_the_tokeniser():
    x, first = vectors(), np.arange(200.0)
    first[150:] = np.inf
    ids = [str(i) for i in range(200)]
    fitted, catalogue = tokenise(RQKMeans(codes=8), x, first, ids)
    other = x.copy()
    other[150:] = vectors(50, seed=9)
    changed, moved = tokenise(RQKMeans(codes=8), other, first, ids)
    assert all(torch.equal(a, b) for a, b in zip(fitted.tensors().values(), changed.tensors().values()))
    assert (catalogue.codes[:150] == moved.codes[:150]).all() and (catalogue.codes != moved.codes).any()


@pytest.mark.parametrize("clock", [True, False])
def test_the_first_time_is_that_of_the_training(clock):
    random = np.random.default_rng(0)
    histories = tuple(random.permutation(30)[: random.integers(5, 9)].astype(np.int32) + 1 for _ in range(60))
    times = tuple(np.sort(random.integers(0, 1000, len(h))) for h in histories) if clock else None
    items = tuple(Item(f"i{n}", "", "") for n in range(30))
    data = Interactions("toy", tuple(f"u{n}" for n in range(60)), items, histories, times, "", {})
    splits = split(data)
    wanted, place = np.full(31, np.inf), 0
    for user, history in enumerate(histories, 1):
        cuts = splits.train.cuts[splits.train.users == user]
        for position, item in enumerate(history):
            if len(cuts) and position <= cuts.max():  # a target of the training, or before one
                wanted[item] = min(wanted[item], times[user - 1][position] if clock else place)
            place += 1
    assert (first_seen(data, splits) == wanted[1:]).all() and np.isfinite(wanted[1:]).any()
