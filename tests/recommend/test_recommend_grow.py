"""New items in a saved bundle: old codes stay, the folder is whole, and records of before are not taken for its own."""

import numpy as np
import pytest
from recommend_bundles import fitted, save, world

from retouch.errors import UserError
from retouch.model import wrap
from retouch.recommend.answers import Request
from retouch.recommend.base import Item
from retouch.recommend.bundle import open_bundle
from retouch.recommend.data import Interactions
from retouch.recommend.grow import add_items, read_new
from retouch.recommend.ladder import answer
from retouch.recommend.nearline import coverage, records
from retouch.recommend.scorer import GenerativeScorer
from retouch.recommend.splits import Samples
from retouch.recommend.stores import open_store

NEW = (Item("n1", "quartz river", "quartz river"), Item("n2", "raven on a stone", "raven"))


@pytest.fixture(scope="module")
def tiny_llama(tiny):
    return wrap(*tiny("llama"))


@pytest.fixture
def bundle(tmp_path, tiny_llama):
    run, tokeniser = world(tiny_llama)
    return save(tmp_path / "bundle", run, tokeniser)


@pytest.fixture
def vectors(tmp_path):
    np.save(tmp_path / "new.npy", np.random.default_rng(5).normal(size=(2, 8)).astype(np.float32))
    return str(tmp_path / "new.npy")


def test_old_codes_stay_and_new_items_can_be_recommended(bundle, vectors):
    before = open_bundle(bundle)
    told = add_items(bundle, [*NEW, before.items[3]], encoder=vectors)
    after = open_bundle(bundle)
    n = len(before.items)
    assert (after.catalogue.codes[:n] == before.catalogue.codes).all() and after.catalogue.n_trained == n
    assert after.items[:n] == before.items and after.items[n:] == NEW and after.counts[n + 1 :].tolist() == [0, 0]
    assert told.known == ("i4",) and told.codes["n2"] == tuple(after.catalogue.codes[n + 1].tolist())
    assert (told.before, told.fingerprint) == (before.fingerprint, after.fingerprint)
    (got,) = answer(after, None, [Request(history=("i1", "n1"), k=26)], beams=26)
    assert got.unknown_items == 0 and {"n2"} < {place.id for place in got.items} and len(got.items) == n


def test_reasons_and_likelihoods_of_new_items_and_their_groups_are_those_that_the_answer_goes_by(bundle, tmp_path):
    before = open_bundle(bundle)
    drawn = np.random.default_rng(1).normal(size=(500, 8)).astype(np.float32)
    likes = (before.tokeniser().encode(drawn)[:, None] == before.catalogue.codes[None, :, :-1]).all(2).any(1)
    np.save(tmp_path / "like.npy", drawn[likes][:2])
    add_items(bundle, NEW, encoder=str(tmp_path / "like.npy"))
    grown = open_bundle(bundle)
    history, n = ("i1", "n1", "i3"), len(grown.items)
    (got,) = answer(grown, None, [Request(history=history, k=n - 3, explain=True)], beams=n, n_explained=n)
    told = {reason["id"]: reason["served"] for reason in got.reasons}
    assert "n2" in told and [told[place.id]["place"] for place in got.items] == list(range(1, n - 2))
    assert [told[place.id]["score"] for place in got.items] == pytest.approx([p.score for p in got.items], abs=1e-4)
    taken = tuple(np.array([1, 3, number], np.int32) for number in range(1, n + 1))
    users = tuple(map(str, taken))
    data = Interactions("toy", users, grown.items, taken, None, "toy")
    scorer = GenerativeScorer(grown.reference, grown.catalogue, data, full=True)
    samples = Samples(np.arange(1, n + 1, dtype=np.int32), np.full(n, 2, np.int32))
    found = scorer.search(np.array([[0, 0, 0, 0, 1, 3]], np.int32))
    scores = dict(zip(found.items[0].tolist(), found.scores[0].tolist()))
    assert scorer.log_likelihood(samples) == pytest.approx([scores[number] for number in range(1, n + 1)], abs=1e-4)


def test_records_of_before_are_not_read_for_the_larger_bundle(bundle, vectors, tmp_path, tiny_llama):
    before, known = open_bundle(bundle, knowledge=tiny_llama), ("i1", "i5")
    kept = open_store(f"sqlite:{tmp_path / 'knowledge.db'}")
    kept.put_many({"u": records(before, [("u", known)], 1)[0]}, before.fingerprint)
    add_items(bundle, NEW, encoder=vectors)
    after = open_bundle(bundle, knowledge=tiny_llama)
    assert coverage(before, kept, ["u"]) == 1 and coverage(after, kept, ["u"]) == 0
    assert after.fingerprint != before.fingerprint and len(records(after, [("u", ("i1", "n1"))], 1)) == 1
    kept.close()


def test_a_mistake_leaves_the_bundle_as_it_was(bundle, vectors, tmp_path):
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    for items, encoder, said in (
        ([Item("i1", "old", "old")], vectors, "there is nothing to add"),
        ([Item("n9", "", "")], vectors, "'n9' has no text"),
        ([*NEW, Item("n3", "c", "c")], vectors, "one row for each of 3 items"),
    ):
        with pytest.raises(UserError, match=said):
            add_items(bundle, items, encoder=encoder)
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before
    add_items(bundle, NEW, encoder=vectors, out=tmp_path / "larger")
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before
    assert len(open_bundle(tmp_path / "larger").items) == 26


def test_without_a_tokeniser_nothing_can_be_added(tmp_path, vectors):
    run, _ = world()
    plain = save(tmp_path / "bundle", run, None, scorer=fitted(run, knowledge="none"))
    with pytest.raises(UserError, match="without its tokeniser"):
        add_items(plain, NEW, encoder=vectors)


def test_a_map_of_titles_is_read(tmp_path):
    file = tmp_path / "new.tsv"
    file.write_text("n1\tquartz river\nn2\traven on a stone\n", encoding="utf-8")
    assert [(item.id, item.text) for item in read_new(file)] == [("n1", "quartz river"), ("n2", "raven on a stone")]
