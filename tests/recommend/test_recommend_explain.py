"""Reasons are what the model says when it is asked again, each one checked by asking it the slow way."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from recommend_served import NOW, bundle, ids, record

from retouch.errors import UserError
from retouch.recommend.answers import Request
from retouch.recommend.explain import Part, parts, sanity, why
from retouch.recommend.groups import Group, name_groups
from retouch.recommend.ladder import Ladder, Serving

WINDOW = np.array([0, 0, 3, 5, 7, 9], np.int32)


@pytest.fixture(scope="module")
def held():
    return bundle()


def score(network, window, item, residual=None):
    with torch.no_grad():
        memory = network.encode(torch.tensor(np.array([window])))
        return float(network.code_log_probs(memory, torch.tensor([item]), residual).sum())


def place(network, window, item, residual=None, hidden=()):
    """One more than the items that score higher, over the whole catalogue."""
    with torch.no_grad():
        memory = network.encode(torch.tensor(np.array([window])))
        scores = network.code_log_probs(memory, torch.arange(1, 41)[None], residual).sum(-1)[0]
    return 1 + sum(bool(scores[i - 1] > scores[item - 1]) for i in range(1, 41) if i not in hidden)


def test_every_number_is_the_models_own_answer(held):
    residual = torch.randn(32, generator=torch.Generator().manual_seed(1))
    found = why(held, WINDOW, [11, 20], residual)
    for reason, item in zip(found, (11, 20)):
        told = [reason.served, reason.without_knowledge, reason.reference]
        asked = [(held.policy, residual[None]), (held.policy, None), (held.reference, None)]
        for standing, (network, r) in zip(told, asked):
            assert standing.score == pytest.approx(score(network, WINDOW, item, r), abs=1e-5)
            assert standing.place == place(network, WINDOW, item, r)
        without = {"i3": [0, 0, 0, 5, 7, 9], "i5": [0, 0, 0, 3, 7, 9], "i7": [0, 0, 0, 3, 5, 9],
                   "i9": [0, 0, 0, 3, 5, 7]}  # fmt: skip
        drops = {
            name: reason.served.score - score(held.policy, other, item, residual[None])
            for name, other in without.items()
        }
        assert [w.id for w in reason.history] == sorted(drops, key=lambda name: -drops[name])[:3]
        for w in reason.history:
            assert w.drop == pytest.approx(drops[w.id], abs=1e-5)
            assert w.place == place(held.policy, without[w.id], item, residual[None])


def test_without_knowledge_all_three_are_the_reference(held):
    (reason,) = why(held, WINDOW, [11])
    assert reason.served == reason.without_knowledge == reason.reference and not reason.with_knowledge
    assert reason.served.score == pytest.approx(score(held.reference, WINDOW, 11), abs=1e-5)


def test_places_count_what_may_be_shown(held):
    hidden = np.array([3, 5, 7, 9, 1, 2, 4], np.int32)
    allowed = np.ones(41, bool)
    allowed[30:] = False
    (reason,) = why(held, WINDOW, [20], allowed=allowed, hidden=hidden)
    gone = {*hidden.tolist(), *range(30, 41)}
    assert reason.served.place == place(held.reference, WINDOW, 20, hidden=gone)
    (few,) = why(held, WINDOW, [20], beams=1)
    assert few.served.place is None or few.served.place == 1


def test_the_sentence_says_what_would_have_been(held):
    residual = torch.randn(32, generator=torch.Generator().manual_seed(1))
    (reason,) = why(held, WINDOW, [11], residual)
    reason = dataclasses.replace(reason, parts=(Part(1, 3, 0.5), Part(0, 2, -0.1)))
    text = reason.sentence({(1, 3): Group(1, 3, 30, ("Fargo",), ("crime", "noir", "1940s", "rain"))})
    assert text.startswith("loam 11: place ") and "group 2-4 (crime, noir, 1940s)" in text
    assert f"at {reason.without_knowledge.place}" in text and reason.history[0].title in text
    assert "group 2-4." in reason.sentence(), "a group without a name"
    far = dataclasses.replace(reason, served=dataclasses.replace(reason.served, place=None), beams=7)
    assert "place 8 or later" in far.sentence()
    assert "knowledge" not in why(held, WINDOW, [11])[0].sentence()


def test_no_history_explains_nothing(held):
    with pytest.raises(UserError, match="empty history"):
        why(held, np.zeros(6, np.int32), [1])
    assert why(held, WINDOW, []) == []


def test_answers_carry_reasons_for_their_first_items(held):
    history = ids(3, 5, 7, 9)
    ladder = Ladder(held, None, Serving(n_explained=2))
    raw = record(held, history)
    got = ladder.answer([Request("u", history, k=4, explain=True)], records=[raw], now_ms=NOW).answers[0]
    assert [reason["id"] for reason in got.reasons] == [p.id for p in got.items[:2]]
    for i, reason in enumerate(got.reasons):
        assert reason["served"]["place"] == i + 1 and reason["with_knowledge"]
        assert reason["served"]["score"] == pytest.approx(got.items[i].score, abs=1e-5)
    assert ladder.answer([Request(explain=True)]).answers[0].reasons == ()


# Which knowledge.


def test_the_part_that_matters_is_found_by_not_hearing_it(held):
    states = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    (found,) = parts(held, WINDOW, [11], states, [1, 3])
    with torch.no_grad():
        whole = held.fusion(held.policy.first, states[None])
        alone = [held.fusion(held.policy.first, states[None, [other]]) for other in (1, 0)]
    all_heard = score(held.policy, WINDOW, 11, whole)
    want = {k: all_heard - score(held.policy, WINDOW, 11, r) for k, r in enumerate(alone)}
    assert {p.book: p.drop for p in found} == pytest.approx(want, abs=1e-5)
    assert found[0].drop >= found[1].drop and {(p.book, p.word) for p in found} == {(0, 1), (1, 3)}


def test_the_only_part_is_all_there_is(held):
    states = torch.randn(1, 16, generator=torch.Generator().manual_seed(2))
    ((only,),) = parts(held, WINDOW, [11], states, [2])
    with torch.no_grad():
        whole = held.fusion(held.policy.first, states[None])
    want = score(held.policy, WINDOW, 11, whole) - score(held.policy, WINDOW, 11)
    assert only.drop == pytest.approx(want, abs=1e-5)


def test_parts_need_the_fusion_and_a_state_for_each_code(held):
    with pytest.raises(UserError, match="without its fusion"):
        parts(dataclasses.replace(held, fusion=None), WINDOW, [1], torch.zeros(1, 16), [0])
    with pytest.raises(UserError, match="1 states were given for 2"):
        parts(held, WINDOW, [1], torch.zeros(1, 16), [0, 1])


def test_groups_are_named_by_what_their_users_like_more_than_others(held):
    chance = np.random.default_rng(0)
    codes = np.stack([np.repeat([0, 1, 2], [40, 40, 5]), np.zeros(85, int)], 1)
    liked = {0: [1, 13, 25], 1: [2, 14, 26], 2: [3]}  # items 1, 13, 25 are called birch, 2, 14, 26 cedar
    histories = [[*liked[c], *chance.integers(5, 10, 4)] for c in codes[:, 0]]
    found = name_groups(codes, histories, held.items)
    assert found.keys() == {(0, 0), (0, 1), (1, 0)}, "5 users are too few for a name"
    birch, cedar = found[0, 0], found[0, 1]
    assert set(birch.items[:3]) == {"birch 1", "birch 13", "birch 25"} and birch.words[0] == "birch"
    assert cedar.words[0] == "cedar" and cedar.n_users == 40
    assert str(birch).startswith("group 1-1 (birch") and found[1, 0].items == ()


# Are they any good?


def test_named_items_matter_more_than_random_ones(held):
    chance = np.random.default_rng(0)
    windows = chance.integers(1, 41, (12, 6)).astype(np.int32)
    found = sanity(held, windows)
    assert found.holds and 0 < found.lower <= found.mean <= found.upper and found.n == 12


def test_a_recommender_that_does_not_read_fails_the_check():
    held = bundle()
    for block in held.policy.decoder:
        block.cross.out.weight.zero_()
    found = sanity(held, np.random.default_rng(0).integers(1, 41, (5, 6)).astype(np.int32))
    assert not found.holds and found.mean == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="two items"):
        sanity(held, np.array([[0, 0, 0, 0, 0, 4]], np.int32))
