"""The laws of the search on drawn catalogues: against the full ranking, under filters, and its proof of exactness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recommend_toy_codes import Writer, catalogues, full_ranking

from retouch.errors import RetouchError, UserError
from retouch.recommend.beam import search
from retouch.recommend.filters import Living
from retouch.recommend.new_items import NewItems
from retouch.recommend.tokenise import Catalogue, assign
from retouch.recommend.trie import Trie

REQUESTS = 3
seeds = st.integers(0, 2**31)


def found_items(found, request):
    return [item for item in found.items[request].tolist() if item]


@given(catalogues(), seeds)
def test_enough_beams_give_the_full_ranking_and_true_likelihoods(drawn, seed):
    codes, sizes = drawn
    writer, trie = Writer(REQUESTS, sizes, seed), Trie.of(codes)
    found = search(writer, trie, REQUESTS, beams=len(codes) + 3)
    for request in range(REQUESTS):
        wanted, scores = full_ranking(writer, codes, request)
        items = found_items(found, request)
        assert sorted(items) == sorted(wanted)
        assert np.allclose(found.scores[request][: len(items)], scores[np.array(items) - 1], atol=1e-5)
        assert np.allclose(scores[np.array(items) - 1], scores[np.array(wanted) - 1], atol=1e-5)
    assert bool(found.exact(1).all()) and bool(found.exact(len(codes)).all())


@given(catalogues(), seeds, st.integers(1, 12))
def test_what_is_proved_is_so(drawn, seed, beams):
    codes, sizes = drawn
    writer, trie = Writer(REQUESTS, sizes, seed), Trie.of(codes)
    found, full = (search(writer, trie, REQUESTS, beams=n) for n in (beams, len(codes)))
    for k in range(1, min(beams, len(codes)) + 1):
        proved = found.exact(k)
        assert torch.equal(found.items[proved, :k], full.items[proved, :k])
        assert torch.allclose(found.scores[proved, :k], full.scores[proved, :k], atol=1e-5)


@given(catalogues(), seeds, st.integers(1, 12), st.booleans())
def test_answers_are_items_and_none_stands_twice(drawn, seed, beams, renormalise):
    codes, sizes = drawn
    found = search(Writer(REQUESTS, sizes, seed), Trie.of(codes), REQUESTS, beams=beams, renormalise=renormalise)
    for request in range(REQUESTS):
        items = found_items(found, request)
        assert len(items) == len(set(items)) == min(beams, len(codes))
        assert all(1 <= item <= len(codes) for item in items)
        scores = found.scores[request][: len(items)]
        assert bool((scores <= 0).all()) and bool((scores[1:] <= scores[:-1]).all())


@given(catalogues(), seeds)
def test_probabilities_sum_to_at_most_one_and_to_one_when_renormalised(drawn, seed):
    codes, sizes = drawn
    writer, trie = Writer(REQUESTS, sizes, seed), Trie.of(codes)
    free, tied = (search(writer, trie, REQUESTS, beams=len(codes), renormalise=r) for r in (False, True))
    words = np.exp([writer.log_likelihoods(codes, request).astype(float) for request in range(REQUESTS)]).sum(1)
    assert np.allclose(free.invalid_mass, 1 - words, atol=1e-5) and bool((free.invalid_mass >= -1e-5).all())
    assert np.allclose(tied.invalid_mass, 0, atol=1e-5)


def test_renormalising_ranks_differently():
    codes = np.array([[0, 0], [1, 0], [1, 1]])

    class Wasteful:  # code 0 leads mostly to words that are no item
        def step(self, level, rows, prefix, parents=None):
            first = torch.tensor([0.6, 0.4, 0.0]) if level == 0 else torch.tensor([0.1, 0.8, 0.1])
            if level:
                return torch.stack([first if p == 0 else torch.tensor([0.7, 0.3, 0.0]) for p in prefix[:, 0]]).log()
            return first.log().expand(len(rows), 3)

    assert search(Wasteful(), Trie.of(codes), 1, beams=3).items.tolist() == [[2, 3, 1]]
    assert search(Wasteful(), Trie.of(codes), 1, beams=3, renormalise=True).items.tolist() == [[1, 2, 3]]


@given(catalogues(), seeds, st.integers(1, 6))
def test_a_request_does_not_depend_on_its_company(drawn, seed, beams):
    codes, sizes = drawn
    writer, trie = Writer(REQUESTS, sizes, seed), Trie.of(codes)
    together = search(writer, trie, REQUESTS, beams=beams)

    class Alone:
        def __init__(self, request):
            self.request = request

        def step(self, level, rows, prefix, parents=None):
            return writer.step(level, rows + self.request, prefix)

    for request in range(REQUESTS):
        alone = search(Alone(request), trie, 1, beams=beams)
        assert alone.items[0].tolist() == together.items[request].tolist()
        assert torch.allclose(alone.scores[0], together.scores[request], atol=1e-5)
        assert torch.equal(alone.exact(1)[0], together.exact(1)[request])


@given(catalogues(), seeds, st.integers(1, 12), st.data())
def test_filters_equal_filtering_the_full_ranking(drawn, seed, beams, data):
    codes, sizes = drawn
    n = len(codes)
    allowed = np.array([False, *data.draw(st.lists(st.booleans(), min_size=n, max_size=n))])
    row = st.lists(st.integers(0, n), min_size=5, max_size=5)  # an item twice and 0 for none are allowed
    seen = np.array(data.draw(st.lists(row, min_size=REQUESTS, max_size=REQUESTS)))
    writer, trie = Writer(REQUESTS, sizes, seed), Trie.of(codes)
    living = Living.of(trie, allowed, seen)
    full = search(writer, trie, REQUESTS, beams=n, living=living)
    found = search(writer, trie, REQUESTS, beams=beams, living=living)
    for request in range(REQUESTS):
        alive = allowed.copy()
        alive[seen[request]] = False
        wanted, scores = full_ranking(writer, codes, request, alive)
        assert sorted(found_items(full, request)) == sorted(wanted)
        items = found_items(found, request)
        assert len(items) == min(beams, len(wanted)) and set(items) <= set(wanted)
        assert np.allclose(found.scores[request][: len(items)], scores[np.array(items, int) - 1], atol=1e-5)
    proved = found.exact(1)
    assert torch.equal(found.items[proved, :1], full.items[proved, :1])


@given(catalogues(), seeds, st.data())
def test_no_beam_is_spent_where_nothing_lives(drawn, seed, data):
    codes, sizes = drawn
    n = len(codes)
    allowed = np.array([False, *data.draw(st.lists(st.booleans(), min_size=n, max_size=n))])
    writer, trie = Writer(1, sizes, seed), Trie.of(codes)
    search(writer, trie, 1, beams=4, living=Living.of(trie, allowed))
    living = [tuple(row) for row in codes[allowed[1:]].tolist()]
    for level, _, prefixes in writer.asked:
        if level:
            assert all(any(row[:level] == tuple(prefix) for row in living) for prefix in prefixes)


def test_equal_scores_go_to_the_smaller_node_at_every_width():
    codes = np.array([[a, b] for a in (3, 1, 2, 0) for b in (1, 0)])

    class Fair:
        def step(self, level, rows, prefix, parents=None):
            return torch.full((len(rows), 4), 0.25).log()

    for beams in range(1, 9):
        found = search(Fair(), Trie.of(codes), 2, beams=beams)
        wanted = [8, 7, 4, 3, 6, 5, 2, 1][:beams]  # by code: (0,0) (0,1) (1,0) ...
        assert found.items.tolist() == [wanted, wanted]
        assert found.exact(1).tolist() == [beams == 8] * 2  # a tie proves nothing


def test_nothing_alive_and_no_requests_give_nothing():
    trie, writer = Trie.of(np.array([[0, 1], [1, 0]])), Writer(2, (2, 2))
    living = Living.of(trie, np.zeros(3, bool))
    found = search(writer, trie, 2, beams=2, living=living)
    assert not found.items.any() and bool(found.exact(1).all())
    assert search(writer, trie, 0, beams=7).items.shape == (0, 7)


@pytest.mark.parametrize(
    ("value", "said"), [(1.0, "no log-probabilities"), (float("nan"), "no log-probabilities"), (None, "do not belong")]
)
def test_a_generator_that_gives_something_else_is_named(value, said):
    class Wrong:
        def step(self, level, rows, prefix, parents=None):
            return torch.zeros(len(rows), 1) if value is None else torch.full((len(rows), 2), value)

    with pytest.raises(RetouchError, match=said):
        search(Wrong(), Trie.of(np.array([[0], [1]])), 1)


def test_wrong_numbers_are_refused():
    trie, writer = Trie.of(np.array([[0, 1], [1, 0]])), Writer(2, (2, 2))
    with pytest.raises(UserError, match="at least one beam"):
        search(writer, trie, 2, beams=0)
    with pytest.raises(UserError, match="3 were asked for"):
        search(writer, trie, 2, beams=2).exact(3)
    with pytest.raises(UserError, match="for 1 requests, and 2"):
        search(writer, trie, 2, living=Living.of(trie, seen=np.array([[1]])))
    with pytest.raises(UserError, match="for 1 items"):
        search(writer, trie, 2, living=Living.of(Trie.of(np.array([[0, 0]]))))
    with pytest.raises(UserError, match="from 1 to 2"):
        Living.of(trie, seen=np.array([[3]]))
    with pytest.raises(UserError, match="needs 3 entries"):
        Living.of(trie, np.ones(2, bool))


def test_new_items_take_their_even_share_and_other_groups_are_untouched():
    old = Catalogue.of(np.array([[0, 0], [0, 1], [1, 0]]), (2, 16))
    grown = old.grown(np.array([[0], [0]]))  # a group of two old and two new items
    writer = Writer(2, (2, 16))
    before = search(writer, old.trie, 2, beams=5)
    after = search(NewItems(writer, grown), grown.trie, 2, beams=5)
    for request in range(2):
        was = dict(zip(before.items[request].tolist(), before.scores[request].tolist()))
        now = dict(zip(after.items[request].tolist(), after.scores[request].exp().tolist()))
        group = float(writer.step(0, torch.tensor([request]), torch.zeros(1, 0, dtype=torch.int64))[0, 0].exp())
        assert now[3] == pytest.approx(np.exp(was[3]))
        assert now[4] == now[5] == pytest.approx(group / 4)
        assert now[1] + now[2] + now[4] + now[5] == pytest.approx(group)
        assert now[1] / now[2] == pytest.approx(np.exp(was[1] - was[2]), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_shares_are_those_of_a_slow_loop_over_groups(seed):
    chance = np.random.default_rng(seed)
    codes = chance.integers(0, 3, (14, 2))
    old = assign(codes, (3, 3), np.arange(14), [str(i) for i in range(14)])
    grown = old.grown(chance.integers(0, 3, (6, 2)))
    log_probs = torch.from_numpy(chance.normal(size=(9, grown.sizes[-1]))).log_softmax(1)
    prefix = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    found = NewItems(Writer(1, grown.sizes), grown).corrected(prefix, log_probs)
    for row, (codes, before, after) in enumerate(zip(prefix.tolist(), log_probs, found)):
        group = np.flatnonzero((grown.codes[:, :-1] == codes).all(1))
        new = group[group >= grown.n_trained]
        if not len(new):
            assert torch.equal(before, after), row
            continue
        wanted = torch.full_like(before, -torch.inf)
        wanted[grown.codes[new, -1]] = -np.log(len(group))
        digits = grown.codes[group[group < grown.n_trained], -1]
        if len(digits):
            wanted[digits] = before[digits].log_softmax(0) + np.log(len(digits) / len(group))
        assert torch.allclose(wanted, after, atol=1e-6), row
    assert grown.shares is grown.shares  # made once, whatever is searched
