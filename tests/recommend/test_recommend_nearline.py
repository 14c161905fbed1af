import dataclasses
import gc
import importlib.util
import json
import threading

import numpy as np
import pytest
import torch
from recommend_bundles import fitted, histories, save, world

from retouch import progress
from retouch.errors import StoreDown, StoreError, UserError
from retouch.model import wrap
from retouch.recommend.bundle import open_bundle
from retouch.recommend.nearline import (
    Memo,
    NearlineSettings,
    batches,
    coverage,
    due,
    read_histories,
    records,
    refresh,
    trigger,
    watch,
)
from retouch.recommend.record import decode, encode, history_hash
from retouch.recommend.stores import Past, open_store
from retouch.scale import on_ray

AT = 1_700_000_000_000
WEEK = 7 * 86_400_000
SMALL = NearlineSettings(range_users=16, positions=40)


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Two bundles of one run, and the run."""
    run, tokeniser = world(wrap(*tiny("llama")))
    place = tmp_path_factory.mktemp("nearline")
    save(place / "blue", run, tokeniser)
    save(place / "green", run, tokeniser, fitted(run, seed=2))
    return place, run


@pytest.fixture(scope="module")
def bundle(folders):
    return open_bundle(folders[0] / "blue", knowledge=folders[1].model)


@pytest.fixture(scope="module")
def green(folders):
    return open_bundle(folders[0] / "green", knowledge=folders[1].model)


@pytest.fixture(scope="module")
def users(folders):
    return {user: Past(tuple(items), len(items)) for user, items in histories(folders[1]).items()}


@pytest.fixture
def knowledge(tmp_path):
    opened = open_store(f"sqlite:{tmp_path / 'knowledge.db'}")
    yield opened
    opened.close()


def all_of(knowledge, bundle, users):
    return dict(zip(users, knowledge.get_many(list(users), bundle.fingerprint)))


def counting(calls):
    """A way to run batches that notes how many users each had."""

    def way(function, items):
        for number, batch in items:
            calls.append(len(batch))
            yield function((number, batch))

    return way


# ------------------------------------------------ records


def test_a_record_says_what_the_policy_says(bundle, users):
    rows = list(users.items())[:20]
    raws = records(bundle, rows, AT, 60)
    windows = bundle.windows([past.items for _, past in rows])
    told = bundle.knowing.tell(torch.from_numpy(windows))
    assert raws == records(bundle, [(user, past.items) for user, past in rows], AT, 60)
    for (_, past), raw, code, vector in zip(rows, raws, told.codes, told.residual):
        found = decode(raw, bundle.versions, bundle.d_model)
        assert (found.history_length, found.history_hash) == (past.length, history_hash(past.items))
        assert (found.computed_at_ms, found.ttl_s, found.codes) == (AT, 60, tuple(code.tolist()))
        np.testing.assert_array_equal(found.vector, vector.half().numpy())
        np.testing.assert_allclose(found.vector, vector.numpy(), rtol=1e-3, atol=1e-6)
    assert len({raw[-40:-4] for raw in raws}) > 5, "users differ"


def test_histories_of_any_kind_make_records_that_fit(bundle):
    kinds = {"empty": (), "unknown": ("x", "y"), "one": ("i1",), "mixed": ("x", "i1"), "long": tuple(f"i{1 + i % 24}" for i in range(300))}  # fmt: skip
    found = {name: decode(raw) for name, raw in zip(kinds, records(bundle, list(kinds.items()), AT))}
    assert not found["empty"].vector.any() and not found["unknown"].vector.any()
    assert found["mixed"].history_length == 2 and found["long"].history_length == 300
    np.testing.assert_allclose(found["mixed"].vector, found["one"].vector, atol=1e-3)
    assert records(bundle, [], AT) == []
    longer = records(bundle, [("u", Past(kinds["long"][-50:], 300))], AT)[0]
    assert decode(longer).history_length == 300


def test_without_the_language_model_it_says_how_to_open_one(folders, knowledge):
    alone = open_bundle(folders[0] / "blue")
    for call in (lambda: records(alone, [("u", ("i1",))], AT), lambda: refresh(alone, knowledge, {"u": ("i1",)})):
        with pytest.raises(UserError, match=r"opened without its language model.*open_model"):
            call()


# ------------------------------------------------ who needs one


@pytest.mark.parametrize(
    ("had", "has", "later", "word"),
    [
        (3, 4, 0, "items"), (4, 4, 0, None), (4, 5, 0, None), (4, 6, 0, "items"), (18, 19, 0, None), (18, 20, 0, None),
        (17, 20, 0, None), (16, 20, 0, "items"), (30, 33, 0, None), (30, 34, 0, "items"), (6, 6, WEEK, None),
        (6, 6, WEEK + 1, "age"), (9, 6, 2 * WEEK, None),
    ],
)  # fmt: skip
def test_a_record_is_due_after_new_items_or_when_it_is_old(bundle, had, has, later, word):
    ids = tuple(f"i{1 + i % 24}" for i in range(40))
    raw = records(bundle, [("u", ids[:had])], AT)[0]
    assert due(raw, Past(ids[:has], has), bundle, AT + later) == word


def test_a_record_is_due_when_it_cannot_be_used(bundle, green, users):
    past = users["u1"]
    raw = records(bundle, [("u1", past)], AT)[0]
    assert due(None, past, bundle, AT) == "absent" and due(raw, past, green, AT) == "version"
    assert due(raw[:-1] + bytes([raw[-1] ^ 1]), past, bundle, AT) == "checksum"
    other = Past((*past.items[:-1], "i24" if past.items[-1] != "i24" else "i23"), past.length)
    assert due(raw, other, bundle, AT) == "changed" and due(raw, past, bundle, AT) is None
    assert [trigger(n) for n in (1, 4, 5, 19, 20, 500)] == [1, 1, 2, 2, 4, 4]


# ------------------------------------------------ one run


def test_a_run_writes_what_records_says_and_a_second_one_writes_nothing(bundle, users, knowledge):
    done = refresh(bundle, knowledge, users, SMALL, at_ms=AT)
    assert done.users == len(users) and done.written + done.memo == len(users) and done.coverage == 1
    stored = all_of(knowledge, bundle, users)
    for user, raw in list(stored.items())[:25]:
        one, other = decode(raw), decode(records(bundle, [(user, users[user])], AT)[0])
        assert one.codes == other.codes and one.history_hash == other.history_hash
        np.testing.assert_allclose(one.vector, other.vector, atol=2e-3)
    again = refresh(bundle, knowledge, users, SMALL, at_ms=AT + 1)
    assert again.unchanged == len(users) and again.coverage == 1
    assert all_of(knowledge, bundle, users) == stored
    assert knowledge.active() is None


def test_the_order_of_the_input_changes_no_byte(bundle, users, knowledge, tmp_path):
    refresh(bundle, knowledge, users, SMALL, at_ms=AT)
    other = open_store(f"sqlite:{tmp_path / 'other.db'}")
    refresh(bundle, other, dict(reversed(users.items())), SMALL, at_ms=AT)
    assert all_of(other, bundle, users) == all_of(knowledge, bundle, users)
    other.close()


def test_batches_hold_users_of_like_length_within_their_positions(bundle, users):
    rows = list(users.items())
    found = batches(bundle, rows, 40)
    assert sorted(user for batch in found for user, _ in batch) == sorted(users)
    lengths = [[min(past.length, 6) + 2 for _, past in batch] for batch in found]
    assert all(max(row) * len(row) <= 40 for row in lengths) and len(found) > 10
    flat = [n for row in lengths for n in row]
    assert flat == sorted(flat)
    assert [len(batch) for batch in batches(bundle, rows[:3], 1)] == [1, 1, 1], "one at least"


def test_records_are_replaced_only_by_those_that_know_more(bundle, users, knowledge):
    past = users["u1"]
    longer = Past((*past.items, "i1", "i2"), past.length + 2)
    new, old = (records(bundle, [("u1", p)], AT)[0] for p in (longer, past))
    knowledge.put_many({"u1": new}, bundle.fingerprint)
    done = refresh(bundle, knowledge, {"u1": past}, SMALL, at_ms=AT + 5)
    assert done.unchanged == 1 and all_of(knowledge, bundle, ["u1"]) == {"u1": new}
    assert knowledge.put_many({"u1": old}, bundle.fingerprint) == 0
    aged = refresh(bundle, knowledge, {"u1": longer}, SMALL, at_ms=AT + WEEK + 1)
    assert aged.written + aged.memo == 1
    assert decode(all_of(knowledge, bundle, ["u1"])["u1"]).computed_at_ms == AT + WEEK + 1


def test_a_user_without_a_known_item_gets_no_record(bundle, knowledge):
    done = refresh(bundle, knowledge, {"new": (), "strange": ("x",), "u": ("i1",)}, SMALL, at_ms=AT)
    assert (done.empty, done.written, done.covered, done.coverage) == (2, 1, 1, 1.0)
    assert all_of(knowledge, bundle, ["new", "strange"]) == {"new": None, "strange": None}


# ------------------------------------------------ what is remembered


def test_what_is_remembered_is_byte_for_byte_what_would_be_computed(bundle, users, knowledge):
    calls = []
    refresh(bundle, knowledge, users, SMALL, at_ms=AT, way=counting(calls))
    n_asked = sum(calls)
    later = AT + WEEK + 1
    again = refresh(bundle, knowledge, users, SMALL, at_ms=later, way=counting(calls))
    assert sum(calls) == n_asked and again.memo == len(users) and again.memo_rate == 1
    stored = all_of(knowledge, bundle, users)
    fresh = refresh(bundle, knowledge, users, dataclasses.replace(SMALL, remember=False), at_ms=later + WEEK + 1)
    assert fresh.written > 0
    for user, raw in all_of(knowledge, bundle, users).items():
        one, other = decode(stored[user]), decode(raw)
        assert encode(dataclasses.replace(one, computed_at_ms=other.computed_at_ms)) == raw


def test_people_with_equal_histories_are_asked_about_once(bundle, knowledge):
    ids, calls = ("i1", "i5", "i9", "i2", "i3", "i4"), []
    people = {f"p{i}": (*(f"i{1 + i}" for _ in range(i % 3)), *ids) for i in range(9)}
    done = refresh(bundle, knowledge, people, SMALL, at_ms=AT, way=counting(calls))
    assert calls == [1] and (done.written, done.memo) == (1, 8)
    found = {user: decode(raw) for user, raw in all_of(knowledge, bundle, people).items()}
    assert len({record.vector.tobytes() for record in found.values()}) == 1
    for user, items in people.items():
        assert found[user].history_length == len(items) and found[user].history_hash == history_hash(items)


def test_nothing_is_remembered_across_versions_and_damage_is_forgotten(bundle, green, users, knowledge):
    pasts = list(users.values())[:5]
    one, other = Memo(bundle, knowledge), Memo(green, knowledge)
    keys = one.keys(pasts)
    assert not set(keys) & set(other.keys(pasts)) and len(set(keys)) == 5
    raws = records(bundle, [("u", past) for past in pasts], AT)
    one.remember(dict(zip(keys, raws)))
    knowledge.remember({keys[0]: raws[0][:-1], keys[1]: b""})
    assert set(Memo(bundle, knowledge).look_up(keys)) == set(keys[2:])
    assert set(one.look_up(keys)) == set(keys), "this process still knows"
    small = Memo(bundle, None, 2)
    small.remember(dict(zip(keys[:2], raws)))
    small.look_up(keys[:1])
    small.remember({keys[2]: raws[2]})
    assert set(small.look_up(keys)) == {keys[0], keys[2]}, "the least recently used went"


# ------------------------------------------------ failures and interruptions


def loud(bundle, by):
    """A policy that has nearly diverged: some vectors no longer fit half precision."""
    knowing = bundle.knowing
    fusion = type(knowing.fusion)(32, 32, heads=4)
    fusion.load_state_dict(knowing.fusion.state_dict())
    with torch.no_grad():
        fusion.out.weight *= by
    twin = dataclasses.replace(bundle)
    object.__setattr__(twin, "knowing", torch.nn.Module.__new__(type(knowing)))
    twin.knowing.__dict__.update(knowing.__dict__)
    twin.knowing.__dict__["_modules"] = {**knowing._modules, "fusion": fusion.eval()}
    return twin


def test_one_users_failure_is_tried_again_alone_and_listed(bundle, users, knowledge):
    windows = bundle.windows([past.items for past in users.values()])
    largest = bundle.knowing.residuals(windows).abs().amax(1)
    by = float(65504 / largest.quantile(0.9))
    calls = []
    done = refresh(loud(bundle, by), knowledge, users, SMALL, at_ms=AT, way=counting(calls))
    bad = {user for user, size in zip(users, largest) if size * by > 65520}
    assert {user for user, _ in done.failed} == bad and 3 < len(bad) < 20
    assert all("must be finite" in why for _, why in done.failed)
    assert done.written + done.memo == len(users) - len(bad) and done.covered == done.written + done.memo
    assert sum(n == 1 for n in calls) > len(bad), "their neighbours were tried again too"
    stored = all_of(knowledge, bundle, users)
    assert {user for user, raw in stored.items() if raw is None} == bad


def interrupted(after):
    seen = []

    def listener(what, done, total):
        seen.append(what)
        if sum("records" in w for w in seen) == after:
            raise KeyboardInterrupt

    return progress.listen(listener)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(bundle, users, knowledge, tmp_path):
    whole = open_store(f"sqlite:{tmp_path / 'whole.db'}")
    calls = []
    refresh(bundle, whole, users, SMALL, at_ms=AT, way=counting(calls))
    n_batches, n_calls = len(calls), sum(calls)
    calls.clear()
    place = tmp_path / "nearline.json"
    with pytest.raises(KeyboardInterrupt), interrupted(3):
        refresh(bundle, knowledge, users, SMALL, at_ms=AT, checkpoint=place, way=counting(calls))
    told = json.loads(place.read_text())
    assert told["n_ranges"] == 3 and 0 < len(calls) < n_batches and told["at_ms"] == AT
    first = told["done"]["written"] + told["done"]["memo"]
    done = refresh(bundle, knowledge, users, SMALL, checkpoint=place, way=counting(calls))
    assert sum(calls) == n_calls, "nobody was asked about twice"
    assert not place.exists() and done.users == len(users) > first and done.coverage == 1
    assert all_of(knowledge, bundle, users) == all_of(whole, bundle, users), "the time of the records too"
    whole.close()


def test_a_checkpoint_of_another_job_is_let_go_and_a_damaged_one_refused(bundle, users, knowledge, tmp_path):
    place = tmp_path / "nearline.json"
    with pytest.raises(KeyboardInterrupt), interrupted(2):
        refresh(bundle, knowledge, users, SMALL, at_ms=AT, checkpoint=place)
    some = dict(list(users.items())[:30])
    assert refresh(bundle, knowledge, some, SMALL, at_ms=AT, checkpoint=place).users == 30
    place.write_text("[]")
    with pytest.raises(StoreError, match="no checkpoint of nearline"):
        refresh(bundle, knowledge, some, SMALL, at_ms=AT, checkpoint=place)


def test_a_store_that_goes_down_stops_the_run_and_loses_nothing(bundle, users, knowledge, tmp_path):
    place, path = tmp_path / "nearline.json", tmp_path / "knowledge.db"
    with pytest.raises(KeyboardInterrupt), interrupted(2):
        refresh(bundle, knowledge, users, SMALL, at_ms=AT, checkpoint=place)
    knowledge.close()
    aside = path.rename(tmp_path / "aside.db")
    path.mkdir()
    with pytest.raises(StoreDown):
        refresh(bundle, knowledge, users, SMALL, checkpoint=place)
    path.rmdir()
    aside.rename(path)
    assert refresh(bundle, knowledge, users, SMALL, checkpoint=place).coverage == 1


# ------------------------------------------------ blue and green


def test_a_new_bundle_is_rolled_out_when_enough_users_are_covered_and_can_be_taken_back(
    bundle, green, users, knowledge
):
    refresh(bundle, knowledge, users, SMALL, at_ms=AT, activate=True)
    assert knowledge.active() == bundle.fingerprint
    served = knowledge.get_many(list(users))
    some = dict(list(users.items())[:60])
    refresh(green, knowledge, some, SMALL, at_ms=AT)
    assert coverage(green, knowledge, list(users)) == pytest.approx(60 / 90)
    assert knowledge.active() == bundle.fingerprint and knowledge.get_many(list(users)) == served
    refresh(green, knowledge, users, SMALL, at_ms=AT)
    assert knowledge.active() == bundle.fingerprint, "only when asked to"
    assert refresh(green, knowledge, users, SMALL, at_ms=AT, activate=True).coverage == 1
    assert knowledge.active() == green.fingerprint and knowledge.get_many(list(users)) != served
    assert knowledge.rollback() == bundle.fingerprint and knowledge.get_many(list(users)) == served


def test_a_run_does_not_roll_out_what_covers_too_few(bundle, users, knowledge):
    windows = bundle.windows([past.items for past in users.values()])
    by = float(65504 / bundle.knowing.residuals(windows).abs().amax(1).quantile(0.8))
    done = refresh(loud(bundle, by), knowledge, users, SMALL, at_ms=AT, activate=True)
    assert 0.5 < done.coverage < 0.95 and knowledge.active() is None


def test_a_few_users_of_a_new_bundle_are_no_roll_out(bundle, green, users, knowledge, caplog):
    refresh(bundle, knowledge, users, SMALL, at_ms=AT, activate=True)
    few = dict(list(users.items())[:3])
    done = refresh(green, knowledge, few, SMALL, at_ms=AT, activate=True)
    assert done.coverage == 1 and knowledge.active() == bundle.fingerprint
    assert f"which holds {len(users)} users; this one holds 3" in caplog.text
    refresh(green, knowledge, few, dataclasses.replace(SMALL, coverage=0.0), at_ms=AT, activate=True)
    assert knowledge.active() == green.fingerprint
    knowledge.rollback()
    refresh(green, knowledge, users, SMALL, at_ms=AT, activate=True)
    assert knowledge.active() == green.fingerprint


def test_a_watch_follows_the_stores_changes(bundle, users, knowledge):
    some = dict(list(users.items())[:40])
    knowledge.put_histories(some)
    stop, fast = threading.Event(), dataclasses.replace(SMALL, poll_s=0.01)
    watching = watch(bundle, knowledge, fast, stop=stop, limit=15)
    first = [next(watching) for _ in range(2)]
    assert [done.users for done in first] == [15, 15] and knowledge.active() is None
    assert next(watching).users == 10
    assert knowledge.active() == bundle.fingerprint, "all were covered after the first look"
    knowledge.append([("u3", "i1"), ("new", "i2")] + [("u3", "i4")] * 4)
    more = next(watching)
    assert more.users == 2 and more.written + more.memo == 2
    found = decode(all_of(knowledge, bundle, ["u3"])["u3"])
    assert found.history_length == users["u3"].length + 5
    other = threading.Timer(0.1, stop.set)
    other.start()
    assert list(watching) == [] and stop.is_set()
    other.join()


def test_a_history_of_the_store_that_is_shorter_than_its_record_gets_another(bundle, knowledge):
    long, short = Past(tuple(f"i{n}" for n in range(1, 9)), 8), Past(("i1", "i2"), 2)
    knowledge.put_histories({"u": short})
    refresh(bundle, knowledge, {"u": long}, SMALL, at_ms=AT)
    assert refresh(bundle, knowledge, {"u": short}, SMALL, at_ms=AT + 2 * WEEK).unchanged == 1, "a file may be old"
    seen, stop = [], threading.Event()
    watching = watch(bundle, knowledge, dataclasses.replace(SMALL, poll_s=0.01), stop=stop,
                     counted=lambda done, seconds: seen.append((done, seconds)))  # fmt: skip
    done = next(watching)
    stop.set()
    assert list(watching) == [] and (done.written + done.memo, seen[0][0]) == (1, done) and seen[0][1] > 0
    (raw,) = knowledge.get_many(["u"], bundle.fingerprint)
    assert decode(raw).history_hash == history_hash(short.items) and decode(raw).history_length == 2


def test_a_watch_looks_at_all_again_and_leaves_a_rollback_alone(bundle, green, users, knowledge):
    some = dict(list(users.items())[:10])
    knowledge.put_histories(some)
    refresh(green, knowledge, some, SMALL, activate=True)
    stop = threading.Event()
    often = dataclasses.replace(SMALL, poll_s=0.01, sweep_s=0.02, ttl_s=1)
    looks = watch(bundle, knowledge, often, stop=stop)
    assert next(looks).written == 10
    assert next(looks).users == 10 and knowledge.active() == bundle.fingerprint
    assert knowledge.rollback() == green.fingerprint
    seen = [next(looks) for _ in range(3)]
    assert all(done.users == 10 for done in seen) and knowledge.active() == green.fingerprint
    stop.set()
    assert list(looks) == []


# ------------------------------------------------ histories from files


def test_histories_are_read_from_all_kinds_of_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = {"9": Past(("a", "b", "a"), 3), "10": Past(("c",), 1)}
    rows = [("9", "b", 20), ("10", "c", 5), ("9", "a", 10), ("9", "a", 30), ("9", "a", 30)]
    (tmp_path / "h.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    users, items, times = zip(*rows)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), tmp_path / "h.parquet")
    lines = [{"user": user, "items": list(past.items)} for user, past in wanted.items()]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    (tmp_path / "h.txt").write_text("9 a b a\n10 c\n")
    for name in ("h.csv", "h.parquet", "h.jsonl", "h.txt"):
        assert read_histories(tmp_path / name) == wanted, name
    for text, words in (
        ('{"user": "a", "items": ["x"]}\n{"user": "a", "items": []}\n', "line 2: user 'a' already"),
        ('{"user": 3, "items": []}\n', "line 1 must be"), ("{\n", "line 1 is not valid JSON"),
        ('{"user": "a", "items": [3]}\n', "line 1: all items"),
        ('{"user": "a", "items": ["\\ud800"]}\n', "line 1: an id is no valid Unicode text"),
    ):  # fmt: skip
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(UserError, match=words):
            read_histories(tmp_path / "bad.jsonl")


# ------------------------------------------------ more machines


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_ray_writes_the_same_bytes(bundle, users, knowledge, tmp_path, monkeypatch):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is absent, so nothing is run on it: pip install 'retouch[ray]'")
    import ray

    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def way(function, items):
        return on_ray(function, items, n_cpus=1)

    some = dict(list(users.items())[:30])
    one_range = dataclasses.replace(SMALL, range_users=64)
    other = open_store(f"sqlite:{tmp_path / 'other.db'}")
    refresh(bundle, knowledge, some, one_range, at_ms=AT)
    try:
        done = refresh(bundle, other, some, one_range, at_ms=AT, way=way)
    finally:
        ray.shutdown()
        gc.collect()
    assert done.coverage == 1
    assert all_of(other, bundle, some) == all_of(knowledge, bundle, some)
    other.close()
