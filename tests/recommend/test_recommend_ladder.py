"""Each user gets the highest rung that is possible and certified, and the last one is the reference to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3

import numpy as np
import pytest
import torch
from recommend_served import ALL, DAY, NOW, bundle, certificate, ids, record

from retouch.errors import UnknownName, UserError
from retouch.recommend._looked import lag_of
from retouch.recommend.answers import Filters, Request
from retouch.recommend.beam import search
from retouch.recommend.filters import Living
from retouch.recommend.ladder import Ladder, Serving, answer, routes
from retouch.recommend.record import decode
from retouch.recommend.sqlite import SQLite
from retouch.recommend.stores import Past

HISTORY = ids(3, 5, 7, 9, 11, 13, 15)


@pytest.fixture(scope="module")
def held():
    return bundle()


@pytest.fixture
def store(tmp_path):
    made = SQLite(tmp_path / "knowledge.db")
    yield made
    made.close()


def searched(network, held, window, hidden, residual=None, beams=50):
    """The obvious way: one history, one network, one search."""
    with torch.no_grad():
        memory = network.encode(torch.from_numpy(window[None]))
        living = Living.of(held.catalogue.trie, seen=np.array([hidden]))
        steps = network.stepper(memory, None if residual is None else torch.from_numpy(residual)[None].float())
        return search(steps, held.catalogue.trie, 1, beams=beams, living=living)


def window(*numbers, size=6):
    return np.array([0] * (size - len(numbers[-size:])) + list(numbers[-size:]), np.int32)


def told(held, store, request, **how):
    return Ladder(held, store, Serving(**how)).answer([request], now_ms=NOW).answers[0]


def pairs(found, k):
    return [(f"i{i}", s) for i, s in zip(found.items[0, :k].tolist(), found.scores[0, :k].tolist())]


# The last rung.


def test_with_no_record_and_no_prototype_the_answer_is_the_references_to_the_bit(held):
    alone = dataclasses.replace(held, certificate=certificate(("fresh", "stale")))
    got = told(alone, None, Request(history=HISTORY, k=10))
    want = searched(held.reference, held, window(3, 5, 7, 9, 11, 13, 15), [3, 5, 7, 9, 11, 13, 15])
    assert got.rung == "reference" and got.lag is None and got.knowledge_age_s is None
    assert [(p.id, p.score) for p in got.items] == pairs(want, 10)
    assert got.exact == bool(want.exact(10)[0])


@pytest.mark.parametrize("serves", ["policy", "reference"])
def test_without_a_certificate_or_refused_by_it_the_reference_answers(serves, held, store):
    refused = dataclasses.replace(bundle(serves=serves), certificate={} if serves == "policy" else certificate())
    store.put_many({"u": record(refused, HISTORY)}, refused.fingerprint)
    assert told(refused, store, Request("u", HISTORY)).rung == "reference"


def test_a_store_that_is_down_is_counted_and_costs_no_answer(held, tmp_path):
    store = SQLite(tmp_path / "knowledge.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "knowledge.db")) as broken:
        broken.execute("DROP TABLE records")
    alone = dataclasses.replace(held, certificate=certificate(("fresh", "stale")))
    ladder = Ladder(alone, store)
    first = ladder.answer([Request("u", HISTORY)])
    assert first.store_errors == {"records": 1} and ladder.looker.resting
    assert ladder.answer([Request("u", HISTORY)]).store_errors == {}, "a store at rest is not asked"
    assert len(ladder.answer([Request("u", HISTORY)] * 3).answers) == 3
    assert first.answers[0] == told(alone, None, Request(history=HISTORY))
    store.close()


# The rungs above it.


def test_a_fresh_record_is_added_to_the_policys_first_input(held, store):
    raw = record(held, HISTORY, at=NOW - DAY)
    store.put_many({"u": raw}, held.fingerprint)
    got = told(held, store, Request("u", HISTORY, k=5))
    vector = decode(raw).vector
    want = searched(held.policy, held, window(3, 5, 7, 9, 11, 13, 15), [3, 5, 7, 9, 11, 13, 15], vector)
    assert (got.rung, got.lag, got.knowledge_age_s) == ("fresh", 0, 86_400.0)
    assert [(p.id, p.score) for p in got.items] == pairs(want, 5)
    none = told(held, None, Request("u", HISTORY, k=5))
    assert none.rung == "prototype" and none.items != got.items


@pytest.mark.parametrize(
    ("lag", "days", "rung", "rejected"),
    [
        (0, 0, "fresh", {}),
        (2, 7, "fresh", {}),  # 9 items: fresh up to 2 missing
        (3, 0, "stale", {}),
        (0, 8, "stale", {}),
        (5, 28, "stale", {}),
        (0, 29, "prototype", {"age": 1}),
        (6, 0, "prototype", {"lag": 1}),
    ],
)
def test_lag_and_age_decide_the_rung(held, store, lag, days, rung, rejected):
    history = ids(*range(1, 10))
    store.put_many({"u": record(held, history[: 9 - lag], at=NOW - days * DAY)}, held.fingerprint)
    found = Ladder(held, store, Serving(stale_lag=5)).answer([Request("u", history)], now_ms=NOW)
    assert found.answers[0].rung == rung and found.rejected == rejected
    assert found.answers[0].lag == (lag if rung in ("fresh", "stale") else None)


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (lambda b, h: record(b, h)[:-1], "checksum"),
        (lambda b, h: b"short", "short"),
        (lambda b, h: record(b, h, versions=dataclasses.replace(b.versions, fusion=99)), "version"),
        (lambda b, h: record(b, ids(1, 2, 3, 4, 5, 6, 8)), "history"),
        (lambda b, h: record(b, h, length=30), "history"),
    ],
)
def test_a_record_that_does_not_count_is_none_and_counted(held, spoilt, reason):
    raw = spoilt(held, HISTORY)
    found = Ladder(held, None).answer([Request("u", HISTORY)], records=[raw], now_ms=NOW)
    assert found.answers[0].rung == "prototype" and found.rejected == {reason: 1}


def test_prototypes_are_those_of_the_users_codes(held):
    got = told(held, None, Request(history=HISTORY, k=5))
    at = window(3, 5, 7, 9, 11, 13, 15)
    vector, _ = held.prototypes.of(held.codes(at[None]))
    want = searched(held.policy, held, at, [3, 5, 7, 9, 11, 13, 15], vector[0])
    assert got.rung == "prototype" and [(p.id, p.score) for p in got.items] == pairs(want, 5)


def test_in_a_hurry_no_prototype_is_looked_for(held):
    hurried = Ladder(held, None).answer([Request(history=HISTORY)], until=0.0)
    assert hurried.answers[0].rung == "reference"


@pytest.mark.parametrize("kept", [ALL, ("stale", "prototype"), ("prototype",), ()])
def test_a_rung_that_is_not_certified_is_skipped(kept):
    held = bundle(kept=kept)
    got = Ladder(held, None).answer([Request("u", HISTORY)], records=[record(held, HISTORY)], now_ms=NOW).answers[0]
    assert got.rung == (kept[0] if kept else "reference")


def test_segments_have_rungs_of_their_own():
    lines = [*certificate()["lines"], {"rung": "fresh", "segment": "sparse", "verdict": "undecided"}]
    lines.append({"rung": "stale", "segment": "sparse", "verdict": "reported"})
    assert routes({"lines": lines}, "sparse") == {"stale", "prototype"} and routes({}, "active") == frozenset()
    held = dataclasses.replace(bundle(), certificate={**certificate(), "lines": lines})
    few, many = ids(1, 2, 3, 4, 5), ids(1, 2, 3, 4, 5, 6)
    requests, raws = [Request("a", few), Request("b", many)], [record(held, few), record(held, many)]
    answers = Ladder(held, None).answer(requests, records=raws, now_ms=NOW).answers
    assert [a.rung for a in answers] == ["stale", "fresh"]


def test_lag_is_found_in_the_end_of_a_long_history(held):
    whole = [f"x{i}" for i in range(60)]
    known = decode(record(held, whole[:57], length=57))
    assert lag_of(known, whole, 60, 8) == 3
    assert lag_of(known, whole[-30:], 30, 8) == 3, "an end of a history"
    assert [lag_of(known, whole[-n:], n, 8) for n in (22, 20, 11, 10)] == [3, 3, 3, None]
    assert lag_of(known, [*whole[-20:-4], "x", *whole[-3:]], 20, 8) is None, "another end"
    assert lag_of(dataclasses.replace(known, tail_hash=0), whole[-22:], 22, 8) is None, "a record of an older Retouch"
    assert lag_of(known, whole[-30:], 60, 8) == 3, "the store knows the length"
    assert lag_of(known, ["other", *whole[1:57]], 57, 8) == 0, "only the latest 20 are compared"


def test_a_client_that_sends_its_last_20_items_keeps_its_knowledge(held):
    whole = ids(*range(1, 31))
    raw = record(held, whole)
    for new in range(5):
        sent = (*whole, *ids(31, 32, 33, 34, 35)[:new])[-20:]
        got = Ladder(held, None).answer([Request("u", sent)], records=[raw], now_ms=NOW).answers[0]
        assert (got.rung, got.lag) == ("fresh", new)


@pytest.mark.parametrize(
    ("lags", "lag", "rung"),
    [
        ({"fresh": 4, "stale": 8}, 4, "fresh"),
        ({"fresh": 4, "stale": 8}, 8, "stale"),
        ({"fresh": 4, "stale": 8}, 9, "prototype"),
        ({"fresh": 2, "stale": 8}, 4, "stale"),
        ({"fresh": 4, "stale": 5}, 6, "prototype"),
        ({"fresh": 4}, 5, "prototype"),
        ({}, 0, "fresh"),
        ({}, 1, "prototype"),
    ],
)
def test_no_knowledge_is_older_than_where_it_was_certified(held, lags, lag, rung):
    whole = ids(*range(1, 31))
    bound = dataclasses.replace(held, certificate={**certificate(), "about": {"lags": lags}})
    ladder = Ladder(bound, None, Serving(stale_lag=50))
    found = ladder.answer([Request("u", whole)], records=[record(bound, whole[: 30 - lag])], now_ms=NOW)
    assert found.answers[0].rung == rung


# Histories.


def test_the_store_knows_the_history_that_a_request_leaves_out(held, store):
    store.put_histories({"u": Past(HISTORY, 40)})
    store.put_many({"u": record(held, HISTORY, length=40)}, held.fingerprint)
    got = told(held, store, Request("u"))
    assert (got.rung, got.lag) == ("fresh", 0) and not {p.id for p in got.items} & set(HISTORY)
    assert told(held, store, Request("u", ids(99))).rung == "fresh", "nothing known was sent"
    assert told(held, store, Request("u", ids(2, 4))).rung == "prototype", "what was sent counts"


def test_nobody_and_nothing_known_gets_what_is_popular(held):
    order = [f"i{i}" for i in np.argsort(-held.counts[1:], kind="stable") + 1]
    for request, words in [(Request(), "empty"), (Request(history=()), "empty"), (Request("u"), "Send a history"),
                           (Request(history=("?",)), "catalogue")]:  # fmt: skip
        got = told(held, None, request)
        assert got.rung == "popular" and words in got.note and [p.id for p in got.items] == order[:10]
    denied = told(held, None, Request(filters=Filters(deny=(order[0],)), k=2))
    assert [p.id for p in denied.items] == order[1:3]


def test_unknown_ids_are_counted_once_and_left_out(held):
    history = ("?", *HISTORY, "?", "??")
    request = Request(history=history, filters=Filters(deny=("gone", "i1")))
    got, clean = told(held, None, request), told(held, None, Request(history=HISTORY, filters=Filters(deny=("i1",))))
    assert got.unknown_items == 3 and clean.unknown_items == 0
    assert got.items == clean.items


# Filters and rules.


def test_filters_hold_and_few_living_items_give_few_answers(held):
    red = {item.id for item in held.items if item.categories == ("red",)}
    got = told(held, None, Request(history=HISTORY, k=10, filters=Filters(categories=("red",), deny=ids(17, 19))))
    assert {p.id for p in got.items} <= red - set(HISTORY) - set(ids(17, 19)) and len(got.items) == 10
    only = told(held, None, Request(history=HISTORY, filters=Filters(allow=(*ids(3, 20, 21), "?"))))
    assert sorted(p.id for p in only.items) == ["i20", "i21"] and only.exact and only.unknown_items == 1
    again = told(held, None, Request(history=HISTORY, filters=Filters(allow=ids(3))), filter_seen=False)
    assert [p.id for p in again.items] == ["i3"]
    with pytest.raises(UnknownName, match=r"reed.*Did you mean 'red'"):
        told(held, None, Request(history=HISTORY, filters=Filters(categories=("reed",))))


def test_what_is_out_of_stock_is_not_shown_unless_asked_for(held):
    ladder = Ladder(held, None)
    first = ladder.answer([Request(history=HISTORY, k=1)]).answers[0].items[0].id
    ladder.allowed.out_of_stock([first, "not known"])
    asked = [Request(history=HISTORY, k=1), Request(history=HISTORY, k=1, filters=Filters(in_stock=False))]
    without, with_it = ladder.answer(asked).answers
    assert without.items[0].id != first and with_it.items[0].id == first


def test_of_many_categories_the_nearest_are_told(held):
    many = bundle(n_items=60, names=tuple(f"kind {n}" for n in range(60)))
    for name, says in (("knd 57", "Did you mean 'kind 57'"), ("zzzz", "Known: kind 0, kind 1, ")):
        with pytest.raises(UnknownName) as wrong:
            Ladder(many, None).allowed.check(Filters(categories=(name,)))
        assert says in str(wrong.value) and str(wrong.value).count("kind ") <= 21


def test_categories_and_lists_filter_as_a_loop_over_items_would(held):
    many = bundle(n_items=60, names=("red", "blue", "green"))
    filters = Filters(("red", "green"), allow=("i1", "i2", "i3", "i60", "?"))
    mask = Ladder(many, None).allowed.mask(filters)
    wanted = [item.id in filters.allow and item.categories[0] in filters.categories for item in many.items]
    assert mask.tolist() == [False, *wanted]


def test_rules_move_items_and_say_so(held):
    plain = told(held, None, Request(history=HISTORY, k=4))
    ruled = told(held, None, Request(history=HISTORY, k=4), per_category=2)
    kinds = [held.items[int(p.id[1:]) - 1].categories[0] for p in ruled.items]
    assert kinds.count("red") == kinds.count("blue") == 2
    assert [p.moved for p in ruled.items] == [a.id != b.id for a, b in zip(ruled.items, plain.items)]
    if any(p.moved for p in ruled.items):
        assert not ruled.exact
    last = plain.items[3].id
    boosted = Ladder(held, None, boosts={last: 100.0, "?": 5.0}).answer([Request(history=HISTORY, k=4)]).answers[0]
    assert boosted.items[0].id == last and boosted.items[0].moved and boosted.items[0].score == plain.items[3].score


def test_a_new_item_takes_its_share_of_the_digit(held):
    grown = held.catalogue.grown(held.catalogue.codes[:1, :-1])
    items = (*held.items, dataclasses.replace(held.items[0], id="new"))
    network = (
        bundle()
        .reference.__class__(held.reference.size, torch.from_numpy(grown.codes.copy()), grown.sizes, held.n_history)
        .eval()
    )
    network.load_state_dict(held.reference.state_dict())
    larger = dataclasses.replace(
        held, items=items, catalogue=grown, reference=network, policy=network, serves="reference",
        counts=np.append(held.counts, 0),
    )  # fmt: skip
    got = Ladder(larger, None, Serving(beams=100)).answer([Request(history=HISTORY, k=100)]).answers[0]
    scores = {p.id: p.score for p in got.items}
    group = [i for i in range(1, 41) if (held.catalogue.codes[i - 1, :-1] == held.catalogue.codes[0, :-1]).all()]
    share = torch.tensor([scores[f"i{i}"] for i in group if f"i{i}" in scores] + [scores["new"]]).softmax(0)[-1]
    assert float(share) == pytest.approx(1 / (len(group) + 1), abs=1e-4)


# Batches.


def test_a_batch_answers_everybody_as_alone(held, store):
    store.put_many({"u": record(held, HISTORY)}, held.fingerprint)
    requests = [
        Request("u", HISTORY, k=3), Request(history=ids(1)), Request(), Request("u", HISTORY, k=7),
        Request(history=ids(2, 4, 6), filters=Filters(categories=("blue",))), Request("v", ids(8)),
    ]  # fmt: skip
    ladder = Ladder(held, store)
    together = ladder.answer(requests, now_ms=NOW).answers
    for request, one in zip(requests, together):
        alone = ladder.answer([request], now_ms=NOW).answers[0]
        assert [p.id for p in one.items] == [p.id for p in alone.items] and one.rung == alone.rung
        assert [p.score for p in one.items] == pytest.approx([p.score for p in alone.items], abs=1e-5)
    assert together[0].items == together[3].items[:3]


def test_records_of_another_namespace_are_not_seen(held, store):
    store.put_many({"u": record(held, HISTORY)}, "other")
    store.activate("other")
    assert told(held, store, Request("u", HISTORY)).rung == "prototype"


def test_the_door_answers_and_nothing_that_is_hidden_is_shown(held):
    chance = np.random.default_rng(0)
    requests = [Request(history=ids(*chance.integers(1, 41, 12)), k=50) for _ in range(20)]
    found = Ladder(held, None, Serving(beams=50)).answer(requests)
    assert found.n_invalid == 0 and set(found.seconds) == {"lookup", "encode", "beam"}
    for request, got in zip(requests, answer(held, None, requests)):
        assert len(got.items) == 40 - len(set(request.history)) and not {p.id for p in got.items} & set(request.history)
        assert got.exact, "with as many beams as items nothing is given up"


# Questions.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"k": -1}, "k must be .* from 1 to 100; got -1"),
        ({"k": 10**5000}, "a number of 16610 bits"),
        ({"k": True}, "got True"),
        ({"k": float("nan")}, "got nan"),
        ({"history": "i1"}, "history must be a list of texts"),
        ({"history": [1]}, r"history\[0\] must be text; got 1"),
        ({"history": ["i1"] * 1001}, "at most 1000 ids; got 1001"),
        ({"history": ["\ud800"]}, "no valid Unicode"),
        ({"history": [""]}, "1 to 256 characters; got 0"),
        ({"user": "u" * 257}, "user must have"),
        ({"explain": 1}, "explain must be true or false"),
        ({"filters": {"deny": []}}, "filters must be Filters"),
    ],
)
def test_a_wrong_question_is_refused_with_its_field(fields, words):
    with pytest.raises(UserError, match=words):
        Request(**fields)
