"""Records are whole or absent, writes commute, and both stores do the same."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recommend_served import redis_server

from retouch.errors import StoreDown, UserError
from retouch.recommend.record import Record, Versions, decode, encode, history_hash, order, size
from retouch.recommend.sqlite import SQLite
from retouch.recommend.stores import Namespace, Past, Store, open_store

MADE = Versions.of("0123456789abcdef", "deadbeef00", "00000001ff")


def record(length: int = 7, at: int = 1_700_000_000_000, seed: int = 0, d: int = 128, ttl: int = 604_800) -> Record:
    vector = np.random.default_rng(seed).normal(size=d).astype(np.float16)
    return Record(MADE, length, history_hash(["a", "b"]), at, ttl, 0.5, (1, 2, 3, 60, 5), vector)


# Records.


def test_a_record_is_320_bytes_and_comes_back():
    raw = encode(record())
    assert len(raw) == size(5, 128) == 320
    back = decode(raw, MADE, 128)
    assert isinstance(back, Record)
    for field in dataclasses.fields(Record):
        if field.name != "vector":
            assert getattr(back, field.name) == getattr(record(), field.name)
    assert np.array_equal(back.vector, record().vector) and order(raw) == (7, 1_700_000_000_000)


@given(place=st.integers(0, 319), change=st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_any_damaged_byte_makes_it_absent(place, change):
    raw = bytearray(encode(record()))
    raw[place] ^= change
    assert isinstance(decode(bytes(raw)), str)


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_without_an_error(raw):
    assert isinstance(decode(raw), str)


def test_what_does_not_fit_is_absent_with_its_reason():
    raw = encode(record())
    assert decode(None) == "absent" and decode(raw[:30]) == "short"
    assert decode(raw, Versions(1, 2, 3)) == "version" and decode(raw, MADE, 64) == "width"


def test_what_cannot_be_written_is_named():
    with pytest.raises(UserError, match="finite"):
        encode(dataclasses.replace(record(), vector=np.array([np.inf], np.float16)))
    with pytest.raises(UserError, match="does not fit"):
        encode(dataclasses.replace(record(), history_length=-1))


def test_a_history_hash_sees_the_last_items_and_their_order():
    assert history_hash(["a", "bc"]) != history_hash(["ab", "c"]) != history_hash(["c", "ab"])
    many = [str(i) for i in range(40)]
    assert history_hash(many) == history_hash(["other", *many[1:]]) != history_hash(many[:-1])


# Stores.


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory) -> str:
    with redis_server(tmp_path_factory.mktemp("redis")) as (url, _):
        yield url


@pytest.fixture(params=["sqlite", "redis"])
def store(request, tmp_path) -> Store:
    if request.param == "sqlite":
        opened = open_store(f"sqlite:{tmp_path / 'knowledge.db'}")
    else:
        opened = open_store(request.getfixturevalue("redis_url"))
        opened._r.flushdb()
    yield opened
    opened.close()


def test_both_are_stores(store):
    assert isinstance(store, Store)


def test_records_are_read_from_the_active_namespace(store):
    one, two = encode(record(seed=1)), encode(record(seed=2))
    assert store.get_many(["u"]) == [None] and store.active() is None
    assert store.put_many({"u": one, "v": two}, "first") == 2
    assert store.get_many(["u"]) == [None]
    store.activate("first")
    assert store.get_many(["v", "nobody", "u"]) == [two, None, one]
    assert store.get_many(["u"], "second") == [None]
    assert store.namespaces() == [Namespace("first", 2, True)]


@pytest.mark.parametrize("turns", list(itertools.permutations(range(3))))
def test_writes_commute(store, turns):
    rows = [encode(record(length, at, seed=i)) for i, (length, at) in enumerate([(5, 900), (6, 100), (6, 200)])]
    for turn in turns:
        store.put_many({"u": rows[turn]}, "n")
    assert store.get_many(["u"], "n") == [rows[2]]
    assert store.put_many({"u": rows[2]}, "n") == 0


def test_a_flip_can_be_taken_back(store):
    with pytest.raises(UserError, match="nothing to go back to"):
        store.rollback()
    for i, name in enumerate(("blue", "green")):
        store.put_many({"u": encode(record(seed=i))}, name)
        store.activate(name)
    assert store.get_many(["u"]) == [encode(record(seed=1))]
    assert store.rollback() == "blue" and store.active() == "blue"
    assert store.get_many(["u"]) == [encode(record(seed=0))]
    with pytest.raises(UserError, match="is active"):
        store.purge("blue")
    assert store.purge("green") == 1 and [n.name for n in store.namespaces()] == ["blue"]
    with pytest.raises(UserError, match="nothing to go back to"):
        store.rollback()


def test_histories_grow_and_tell_who_changed(store):
    store.put_histories({"u": Past(("a", "b"), 2), "v": Past((), 0)})
    assert store.histories(["u", "w", "v"]) == [Past(("a", "b"), 2), None, Past((), 0)]
    last = store.changed(0)[-1][0]
    assert store.append([("v", "x"), ("u", "c"), ("v", "y")]) == 3
    assert store.histories(["u", "v"]) == [Past(("a", "b", "c"), 3), Past(("x", "y"), 2)]
    assert [user for _, user in store.changed(last)] == ["u", "v"]
    assert store.changed(store.changed(0)[-1][0]) == []
    store.put_histories({"u": Past(("a",), 1)})
    assert store.histories(["u"])[0].length == 3


def test_long_histories_keep_their_length_and_their_latest_items(store):
    store.put_histories({"u": Past(tuple(map(str, range(1500))), 1500)})
    past = store.histories(["u"])[0]
    assert past.length == 1500 and past.items[-1] == "1499" and len(past.items) == 1000


def test_a_very_long_history_is_cut_before_it_is_sent(store):
    store.put_histories({"u": Past(tuple(map(str, range(60_000))), 60_000)})
    assert store.histories(["u"]) == [Past(tuple(map(str, range(59_000, 60_000))), 60_000)]


def test_a_history_can_be_replaced_by_a_shorter_one_which_then_gets_its_record(store):
    past, other = Past(("a", "b", "c"), 3), Past(("x",), 1)
    store.put_histories({"u": past, "v": other})
    for name in ("blue", "green"):
        store.put_many({"u": encode(record(length=3)), "v": encode(record(length=1))}, name)
    last = store.changed(0)[-1][0]
    store.put_histories({"u": Past(("a",), 1), "v": other}, replace=True)
    assert store.histories(["u", "v"]) == [Past(("a",), 1), other]
    assert [user for _, user in store.changed(last)] == ["u"], "what is as it was has not changed"
    assert store.get_many(["u"], "blue") == store.get_many(["u"], "green") == [None]
    assert store.get_many(["v"], "blue") == [encode(record(length=1))]
    assert store.put_many({"u": encode(record(length=1))}, "blue") == 1


def test_a_user_is_forgotten_everywhere(store):
    store.put_histories({"u": Past(("a",), 1), "v": Past(("b",), 1)})
    for name in ("blue", "green"):
        store.put_many({"u": encode(record()), "v": encode(record())}, name)
    assert store.forget(["u"], histories=False) == 2 and store.histories(["u"]) == [Past(("a",), 1)]
    store.put_many({"u": encode(record())}, "blue")
    assert store.forget(["u", "nobody"]) == 1 and store.forget([]) == 0
    assert store.histories(["u", "v"]) == [None, Past(("b",), 1)]
    assert store.get_many(["u", "v"], "blue") == [None, encode(record())]
    assert [user for _, user in store.changed(0)] == ["v"]
    assert [n.n_records for n in store.namespaces()] == [1, 1]


def test_events_of_one_key_are_added_once(store):
    events = [("u", "a"), ("u", "a"), ("v", "b")]
    assert store.append(events, "k1") == 3 and store.append(events, "k1") == 0
    assert store.append(events[:1], "k2") == 1 and store.append(events[:1]) == 1
    assert store.histories(["u", "v"]) == [Past(("a",) * 4, 4), Past(("b",), 1)]


def test_what_a_cut_connection_left_out_is_added_by_the_same_key(redis_url):
    opened = open_store(redis_url)
    opened._r.flushdb()
    events = [("u", str(i)) for i in range(5)]
    opened.append(events[:2], "k")  # what was done before the answer got lost
    assert opened.append(events, "k") == 3
    assert opened.histories(["u"]) == [Past(tuple("01234"), 5)]
    opened.close()


def test_many_users_at_once(store):
    rows = {f"user {i}": encode(record(seed=i % 7, d=8)) for i in range(2500)}
    assert store.put_many(rows, "n") == 2500
    store.activate("n")
    assert store.get_many(list(rows)) == list(rows.values())


def test_memos(store):
    store.remember({b"\x00k": b"v", b"l": b""})
    assert store.memo([b"l", b"\x00k", b"m"]) == [b"", b"v", None]


def test_odd_names_are_only_names(store):
    for user in ("a:b", "*", "naïve 名", "'; DROP TABLE records;--", ""):
        store.put_many({user: encode(record())}, "n")
        assert store.get_many([user], "n") == [encode(record())]


def test_a_store_that_is_down_says_so(tmp_path):
    with pytest.raises(StoreDown, match="does not answer"):
        open_store("redis://:secret@127.0.0.1:1/0")
    try:
        open_store("redis://:secret@127.0.0.1:1/0")
    except StoreDown as error:
        assert "secret" not in str(error)
    (tmp_path / "no.db").write_text("this is no database, it is a text of some length" * 50)
    with pytest.raises(StoreDown, match="knowledge store"):
        open_store(f"sqlite:{tmp_path / 'no.db'}")
    with pytest.raises(UserError, match="not understood"):
        open_store("mysql://somewhere")
    with pytest.raises(UserError, match="needs a path"):
        open_store("sqlite:")
    with pytest.raises(UserError, match="There is no store at"):
        open_store(f"sqlite:{tmp_path / 'slip.db'}", existing=True)
    assert not (tmp_path / "slip.db").exists()


_WRITER = """
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
from retouch.recommend.record import Record, Versions, encode
from retouch.recommend.stores import open_store
store = open_store(sys.argv[1])
store.activate("n")
print("ready", flush=True)
for turn in range(1, 10**6):
    vector = np.full(128, turn % 1000, np.float16)
    made = Record(Versions(1, 2, 3), turn, turn, turn, 60, 0.5, (1, 2, 3, 4, 5), vector)
    store.put_many({f"u{i}": encode(made) for i in range(50)}, "n")
"""


def killed_writer(url: str, kills: int) -> None:
    source = str(Path(__file__).parents[2] / "src")
    reader, draw = open_store(url), np.random.default_rng(0)
    for _ in range(kills):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, url, source], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        end = time.monotonic() + float(draw.uniform(0.01, 0.15))
        while time.monotonic() < end:
            check_one_turn(reader)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait(10)
        writer.stdout.close()
        check_one_turn(reader)
    reader.close()


def check_one_turn(reader: Store) -> None:
    found = [decode(raw, Versions(1, 2, 3), 128) for raw in reader.get_many([f"u{i}" for i in range(50)])]
    for r in found:
        assert r == "absent" or (isinstance(r, Record) and (r.vector == np.float16(r.history_length % 1000)).all())


def test_readers_never_see_a_part_of_a_record_while_writers_are_killed(tmp_path):
    killed_writer(f"sqlite:{tmp_path / 'k.db'}", 4)


@pytest.mark.slow
def test_readers_never_see_a_part_of_a_record_at_100_kills(tmp_path):
    killed_writer(f"sqlite:{tmp_path / 'k.db'}", 100)


def test_who_changes_after_somebody_was_forgotten_is_told(store):
    store.append([("ann", "i1"), ("bob", "i2")])
    position = store.changed(0)[-1][0]
    store.forget(["bob"])
    store.append([("cat", "i3")])
    assert [user for _, user in store.changed(position)] == ["cat"]


def test_a_memo_is_kept_for_a_month(tmp_path, monkeypatch):
    kept = open_store(f"sqlite:{tmp_path / 'k.db'}")
    kept.remember({b"old": b"1"})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 31 * 86_400)
    kept.remember({b"new": b"2"})
    assert kept.memo([b"old", b"new"]) == [None, b"2"]
    kept.close()


def test_a_full_disk_is_told_and_the_store_goes_on_when_there_is_room(tmp_path):
    kept = SQLite(tmp_path / "k.db")
    own = kept._connection()
    own.execute(f"PRAGMA max_page_count = {own.execute('PRAGMA page_count').fetchone()[0] + 2}")
    with pytest.raises(StoreDown, match="disk is full"):
        kept.put_histories({f"u{n}": Past(("item" * 50,) * 50, 50) for n in range(50)})
    assert kept.histories(["u0"]) == [None]
    own.execute("PRAGMA max_page_count = 100000")
    assert kept.append([("ann", "i1")]) == 1
    kept.close()
