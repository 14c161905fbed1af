"""The service: clear answers to good and bad questions, nothing computed for what is refused, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from recommend_served import bundle as bundle_of
from recommend_served import ids, record, redis_server, saved

from retouch.errors import StoreDown, UserError
from retouch.recommend import serve
from retouch.recommend._batching import Batcher, Late
from retouch.recommend._looked import Looker
from retouch.recommend._metrics import NearlineMetrics
from retouch.recommend._nearline import Done
from retouch.recommend.answers import Request
from retouch.recommend.bundle import open_bundle
from retouch.recommend.ladder import Serving, answer
from retouch.recommend.serve import Limits, _readable, app
from retouch.recommend.sqlite import SQLite
from retouch.recommend.stores import open_store

HISTORY = ids(3, 5, 7, 9, 11, 13, 15)
PATIENT = Limits(deadline_ms=60_000)


@pytest.fixture(scope="module")
def held():
    return bundle_of()


@pytest.fixture
def store(tmp_path):
    made = SQLite(tmp_path / "knowledge.db")
    yield made
    made.close()


def talk(application, conversation):
    """Run a conversation with an application, from its start to its end."""

    async def run():
        transport = httpx.ASGITransport(application, raise_app_exceptions=False)
        async with (
            application.router.lifespan_context(application),
            httpx.AsyncClient(transport=transport, base_url="http://shop") as client,
        ):
            return await conversation(client)

    return asyncio.run(run())


def ask(application, *bodies, to="/recommend", **how):
    async def conversation(client):
        return [
            await client.post(to, **({"json": body} if isinstance(body, dict) else {"content": body}), **how)
            for body in bodies
        ]

    return talk(application, conversation)


def numbers(text):
    """Read the numbers of a metrics page."""
    rows = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


# Answers.


def test_the_service_says_what_the_library_says(held, store):
    store.put_many({"u": record(held, HISTORY, at=int(time.time() * 1000))}, held.fingerprint)
    body = {"user": "u", "history": list(HISTORY), "k": 5, "filters": {"deny": ["i1", "gone"]}}
    (got,) = ask(app(held, store, limits=PATIENT), body)
    want = answer(held, None, [Request("u", HISTORY, 5)])[0]
    told = got.json()
    assert got.status_code == 200 and told["rung"] == "fresh" and told["lag"] == 0 and told["unknown_items"] == 1
    assert told["bundle"] == held.fingerprint and len(told["items"]) == 5 and 0 <= told["knowledge_age_s"] < 60
    assert told["items"][0].keys() == {"id", "title", "score", "sid", "moved"}
    assert [p["id"] for p in told["items"]] != [p.id for p in want.items], "knowledge was used"


def test_the_last_rung_is_the_references_answer_to_the_bit(held):
    (got,) = ask(app(held.undone(), limits=PATIENT), {"history": list(HISTORY), "k": 7})
    want = answer(held.undone(), None, [Request(history=HISTORY, k=7)])[0]
    assert got.json() == json.loads(json.dumps(want.to_dict()))


def test_a_batch_is_answered_in_order(held):
    questions = [{"history": [f"i{i}"], "k": 3} for i in range(1, 30)]
    (got,) = ask(app(held, limits=PATIENT), {"requests": [*questions, {}]}, to="/recommend/batch")
    answers = got.json()["answers"]
    want = [answer(held, None, [Request(history=(f"i{i}",), k=3)])[0] for i in range(1, 30)]
    assert [[p["id"] for p in a["items"]] for a in answers[:-1]] == [[p.id for p in a.items] for a in want]
    assert answers[-1]["rung"] == "popular" and "empty" in answers[-1]["note"]


def test_reasons_come_when_they_are_asked_for(held):
    (got,) = ask(app(held, limits=PATIENT), {"history": list(HISTORY), "k": 2, "explain": True})
    reasons = got.json()["reasons"]
    assert [r["id"] for r in reasons] == [p["id"] for p in got.json()["items"]] and "place 1" in reasons[0]["sentence"]


def test_a_store_that_is_down_costs_no_answer(held, tmp_path):
    def connect():
        raise StoreDown("away")

    async def conversation(client):
        answers = [await client.post("/recommend", json={"user": "u", "history": list(HISTORY)})]
        event = {"events": [{"user": "u", "item": "i1"}]}
        return [*answers, await client.post("/events", json=event), await client.get("/ready")]

    got, events, ready = talk(app(held, limits=PATIENT, connect=connect), conversation)
    assert got.status_code == 200 and got.json()["rung"] == "prototype"
    assert events.status_code == 503 and "no store" in events.json()["error"] and events.headers["retry-after"] == "1"
    assert ready.status_code == 200 and ready.json()["store"] == "down"


def test_a_store_that_hangs_costs_knowledge_and_no_answer(held, tmp_path):
    """A server that is stopped takes connections and says nothing: nobody may wait for it but the first."""
    with redis_server(tmp_path) as (url, process):
        writer = open_store(url)
        writer.put_many({"u": record(held, HISTORY, at=int(time.time() * 1000))}, held.fingerprint)
        writer.close()
        limits = Limits(deadline_ms=800)
        application = app(held, settings=Serving(), limits=limits, connect=lambda: open_store(url, look_s=0.02))
        service = application.state.service
        body = {"user": "u", "history": list(HISTORY), "k": 3}

        async def conversation(client):
            told = [await client.post("/recommend", json=body)]
            process.send_signal(signal.SIGSTOP)
            told += [await client.post("/recommend", json=body) for _ in range(30)]
            process.send_signal(signal.SIGCONT)
            for _ in range(200):
                await asyncio.sleep(0.05)
                if not service.current.looker.resting:
                    break
            return [*told, await client.post("/recommend", json=body)]

        told = talk(application, conversation)
    assert {answer.status_code for answer in told} == {200}
    rungs = [answer.json()["rung"] for answer in told]
    assert rungs[0] == rungs[-1] == "fresh" and set(rungs[1:-1]) == {"prototype"}
    failures = numbers(service.metrics.text().decode())
    assert failures['retouch_store_errors_total{kind="records"}'] == 1, "asked once, then left to the poll"


class Flaky:
    """A store that fails when told to, and counts who asks."""

    def __init__(self):
        self.down, self.asked = True, 0

    def get_many(self, users, namespace=None):
        self.asked += 1
        if self.down:
            raise StoreDown("away")
        return [None] * len(users)

    def histories(self, users):
        return self.get_many(users)


def test_a_store_that_failed_is_asked_again_by_the_poll_alone_and_ever_more_rarely():
    store = Flaky()
    looker = Looker(store, "a1", rest_s=0.0, probed=True)
    for _ in range(5):
        looker.look(["u"], [False])
    assert store.asked == 1 and looker.resting
    looker.probe()
    assert store.asked == 2 and looker.resting
    store.down = False
    looker.probe()
    assert not looker.resting and looker.look(["u"], [False]).errors == {}
    patient, store.down, store.asked = Looker(store, "a1", rest_s=100.0, probed=True), True, 0
    patient.look(["u"], [False])
    patient.probe()
    assert store.asked == 1, "it rests"
    alone = Looker(store, "a1", rest_s=1.0)
    lengths = [alone._failed() or alone._rest_s for _ in range(7)]
    assert lengths == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_events_that_are_sent_again_are_added_once(held, store):
    body = {"events": [{"user": "u", "item": "i1"}, {"user": "u", "item": "i2"}], "key": "order 7"}
    first, again, other = ask(app(held, store, limits=PATIENT), body, body, {**body, "key": ""}, to="/events")
    assert {first.status_code, again.status_code, other.status_code} == {200} and first.json() == again.json()
    assert store.histories(["u"])[0].items == ("i1", "i2", "i1", "i2")
    (long,) = ask(app(held, store, limits=PATIENT), {**body, "key": "k" * 300}, to="/events")
    assert long.status_code == 422 and "key" in long.json()["error"]


def test_reasons_hold_up_nobody(held, monkeypatch):
    """While reasons are computed, the thread that answers is free."""
    begun, go_on = threading.Event(), threading.Event()
    application = app(held, limits=PATIENT)
    service, work = application.state.service, application.state.service.current.answer

    def slowly(requests, **how):
        if requests[0].explain:
            begun.set()
            assert go_on.wait(60)
        return work(requests, **how)

    monkeypatch.setattr(service.current, "answer", slowly)

    async def conversation(client):
        body = {"history": list(HISTORY), "k": 2}
        asked = asyncio.create_task(client.post("/recommend", json={**body, "explain": True}))
        await asyncio.to_thread(begun.wait, 60)
        quick = await client.post("/recommend", json=body)
        go_on.set()
        return quick, await asked

    quick, slow = talk(application, conversation)
    assert quick.status_code == slow.status_code == 200 and slow.json()["reasons"] and not quick.json()["reasons"]


def test_events_go_to_the_nearline_queue_and_into_the_next_answer(held, store):
    async def conversation(client):
        events = {"events": [{"user": "u", "item": name} for name in (*HISTORY, "?")]}
        told = (await client.post("/events", json=events)).json()
        return told, (await client.post("/recommend", json={"user": "u"})).json()

    told, got = talk(app(held, store, limits=PATIENT), conversation)
    assert told == {"accepted": 8, "unknown_items": 1} and store.changed(0) != []
    assert got["rung"] == "prototype" and got["unknown_items"] == 1
    assert not {p["id"] for p in got["items"]} & set(HISTORY)


def test_the_pointer_decides_which_bundle_answers(held, store):
    new = bundle_of(seed=1, fingerprint="b2")
    application = app([held, new], store, limits=PATIENT)
    service = application.state.service

    async def conversation(client):
        names = []
        for step in (None, "b2", "somebody else's", "a1"):
            if step is not None:
                store.activate(step)
                service.poll()
            got = await client.post("/recommend", json={"history": list(HISTORY)})
            names.append(got.json()["bundle"])
        return names, (await client.get("/metrics")).text

    names, text = talk(application, conversation)
    assert names == ["a1", "b2", "b2", "a1"]
    found = numbers(text)
    assert found['retouch_namespace_info{namespace="a1"}'] == 1
    assert found['retouch_namespace_info{namespace="b2"}'] == 0


def test_a_stock_of_another_editor_is_read_and_one_that_is_no_text_is_refused(held, tmp_path):
    stock = tmp_path / "out.txt"
    (first,) = ask(app(held, limits=PATIENT), {"history": ["i3"], "k": 1})
    best = first.json()["items"][0]["id"]
    stock.write_bytes(f"\ufeff{best}\r\n".encode())
    (second,) = ask(app(held, limits=PATIENT, stock=stock), {"history": ["i3"], "k": 1})
    assert second.json()["items"][0]["id"] != best
    stock.write_bytes("köln".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot be read.*Save it as UTF-8"):
        _readable(stock)


def test_what_runs_out_of_stock_disappears(held, tmp_path):
    stock = tmp_path / "out.txt"
    stock.write_text("", encoding="utf-8")
    application = app(held, limits=PATIENT, stock=stock)

    async def conversation(client):
        first = (await client.post("/recommend", json={"history": ["i3"], "k": 1})).json()["items"][0]["id"]
        stock.write_text(f"{first}\n", encoding="utf-8")
        os.utime(stock, (1, 1))
        application.state.service.poll()
        stock.unlink()
        application.state.service.poll()
        return first, (await client.post("/recommend", json={"history": ["i3"], "k": 1})).json()["items"][0]["id"]

    first, second = talk(application, conversation)
    assert first != second


# Refusals.


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"history": ["i1"], "k": -1}, "k must be a whole number from 1 to 100; got -1"),
        ({"history": ["i1"], "k": 60}, "from 1 to 50, the beams of this server; got 60"),
        ({"history": ["i1"], "k": "10"}, "k: should be a valid integer; got '10'"),
        ({"history": ["i1"], "k": 1.5}, "k: should be a valid integer; got 1.5"),
        ({"history": [1]}, r"history[0]: should be a valid string; got 1"),
        ({"history": "i1"}, "history: should be a valid list; got 'i1'"),
        ({"history": ["i1"] * 1001}, "history may hold at most 1000 ids; got 1001"),
        ({"user": ""}, "user must have 1 to 256 characters; got 0"),
        ({"users": "u"}, "users is no field of this request"),
        ({"filters": {"categories": ["reed"]}}, "Did you mean 'red'"),
        ({"filters": {"deny": ["x"] * 1001}}, "filters.deny may hold at most 1000"),
        (b'{"k": NaN}', "NaN is no number"),
        (b'{"k": 1' + b"0" * 5000 + b"}", "is no JSON that can be read"),
        (b'{"k": 1' + b"0" * 400 + b"}", "k must be a whole number"),
        (b'{"user": "\\ud800"}', "valid Unicode"),
        (b'{"history": ' + b"[" * 5000 + b"]" * 5000 + b"}", "5001 deep"),
        (b"{", "is no JSON"),
        (b'\xff\xfe"', "is no JSON"),
        (b"", "is no JSON"),
        (b"[]", "The body: should be"),
    ],
)
def test_a_bad_question_gets_422_and_a_sentence(held, body, words):
    (got,) = ask(app(held, limits=PATIENT), body, headers={"content-type": "application/json"})
    assert got.status_code == 422 and words in got.json()["error"]


def test_a_bad_question_in_a_batch_is_named(held):
    application = app(held, limits=PATIENT)
    (got,) = ask(application, {"requests": [{}, {"k": 0}]}, to="/recommend/batch")
    assert got.status_code == 422 and got.json()["error"].startswith("requests[1]: k must be")
    (got,) = ask(application, {"requests": [{}] * 65}, to="/recommend/batch")
    assert got.status_code == 422 and "at most 64 questions; got 65" in got.json()["error"]
    (got,) = ask(application, {"events": [{"user": "u"}]}, to="/events")
    assert got.status_code == 422 and "events[0].item is missing" in got.json()["error"]


def test_a_million_items_are_refused_before_they_are_read(held):
    read = 0

    async def chunks():
        nonlocal read
        for _ in range(200):
            read += 1
            yield b'"i1",' * 10_000

    async def conversation(client):
        whole = json.dumps({"history": ["i1"] * 10**6}).encode()
        return await client.post("/recommend", content=whole), await client.post("/recommend", content=chunks())

    said, streamed = talk(app(held, limits=PATIENT), conversation)
    assert said.status_code == streamed.status_code == 413
    assert "larger than 64 KiB" in said.json()["error"] == streamed.json()["error"] and read <= 3


def test_a_body_that_never_ends_is_left(held):
    async def slow():
        yield b"{"
        await asyncio.sleep(30)

    (got,) = ask(app(held, limits=Limits(body_s=0.05)), slow())
    assert got.status_code == 408 and "0.05 s" in got.json()["error"]


def test_too_many_at_once_are_told_to_come_back(held):
    limits = Limits(n_in_flight=1, deadline_ms=60_000)
    begun = asyncio.Event

    async def conversation(client):
        started, release = begun(), begun()

        async def body():
            started.set()
            await release.wait()
            yield b'{"history": ["i1"]}'

        headers = {"content-type": "application/json"}
        first = asyncio.ensure_future(client.post("/recommend", content=body(), headers=headers))
        await started.wait()
        second = await client.post("/recommend", json={})
        release.set()
        return await first, second, await client.post("/recommend", json={}), await client.get("/metrics")

    first, second, third, metrics = talk(app(held, limits=limits), conversation)
    assert first.status_code == third.status_code == 200
    assert second.status_code == 429 and second.headers["retry-after"] == "1" and "1 requests" in second.json()["error"]
    assert numbers(metrics.text)['retouch_requests_total{outcome="busy",rung="none"}'] == 1


def test_a_client_that_asks_too_often_waits(held):
    got = ask(app(held, limits=Limits(rate_per_s=2, deadline_ms=60_000)), {}, {}, {})
    assert [g.status_code for g in got] == [200, 200, 429] and "More than 2 requests a second" in got[2].json()["error"]


def test_a_late_answer_is_not_given(held):
    (got,) = ask(app(held, limits=Limits(deadline_ms=0.001)), {"history": ["i1"]})
    assert got.status_code == 503 and "not ready in time" in got.json()["error"]


def test_a_token_opens_everything_but_health(held):
    application = app(held, limits=PATIENT, token="secret")

    async def conversation(client):
        right = {"Authorization": "Bearer secret"}
        wrong = {"Authorization": "Bearer secre"}
        return [
            (await client.post("/recommend", json={})).status_code,
            (await client.post("/recommend", json={}, headers=wrong)).status_code,
            (await client.get("/metrics")).status_code,
            (await client.post("/recommend", json={}, headers=right)).status_code,
            (await client.get("/health")).status_code,
            (await client.get("/ready")).status_code,
        ]

    assert talk(application, conversation) == [401, 401, 401, 200, 200, 200]


def test_a_failure_is_told_without_its_inside_and_the_server_goes_on(held):
    broken = dataclasses.replace(held, counts=np.zeros(3, np.int64))
    application = app(held, limits=PATIENT)
    ladder = application.state.service.current
    whole, ladder.bundle = ladder.bundle, broken

    async def conversation(client):
        bad = await client.post("/recommend", json={})
        ladder.bundle = whole
        return bad, await client.post("/recommend", json={})

    bad, good = talk(application, conversation)
    assert bad.status_code == 500 and bad.json() == {"error": "The server failed at this request; its log says why."}
    assert good.status_code == 200


def test_what_does_not_exist_is_said_so(held):
    async def conversation(client):
        return await client.get("/nothing"), await client.get("/recommend")

    nothing, wrong = talk(app(held), conversation)
    assert nothing.status_code == 404 and "Not Found. See /docs." in nothing.json()["error"]
    assert wrong.status_code == 405


# Numbers and health.


def test_metrics_parse_and_count(held, store):
    application = app(held, store, Serving(beams=3), limits=PATIENT)
    raw = record(held, HISTORY, at=int(time.time() * 1000))
    store.put_many({"u": raw[:-1] + bytes([raw[-1] ^ 1]), "v": raw}, held.fingerprint)

    async def conversation(client):
        for body in ({"user": "u", "history": list(HISTORY)}, {"user": "v", "history": list(HISTORY)}, {}, {"k": 0}):
            await client.post("/recommend", json={"k": 2, **body})
        return (await client.get("/metrics")).text

    text = talk(application, conversation)
    from prometheus_client.parser import text_string_to_metric_families

    assert {f.name for f in text_string_to_metric_families(text)} >= {
        "retouch_requests", "retouch_request_seconds", "retouch_knowledge_age_seconds", "retouch_knowledge_lag_items",
        "retouch_store_errors", "retouch_records_rejected", "retouch_inexact", "retouch_invalid_items",
        "retouch_namespace_info",
    }  # fmt: skip
    found = numbers(text)
    for rung in ("prototype", "fresh", "popular"):
        assert found[f'retouch_requests_total{{outcome="ok",rung="{rung}"}}'] == 1
    assert found['retouch_requests_total{outcome="refused",rung="none"}'] == 1
    assert found['retouch_records_rejected_total{reason="checksum"}'] == 1 and found["retouch_invalid_items_total"] == 0
    assert found["retouch_knowledge_lag_items_count"] == 1
    for stage in ("lookup", "encode", "beam", "total"):
        assert found[f'retouch_request_seconds_count{{stage="{stage}"}}'] == 3


def test_a_nearline_writer_tells_its_numbers():
    counting = NearlineMetrics()
    counting.done(Done(written=3, memo=2, unchanged=5, failed=(("u", "why"),)), 0.4)
    counting.done(Done(written=1), 0.2)
    found = numbers(httpx.get(f"http://127.0.0.1:{counting.listen(0)}/metrics").text)
    users = {
        result: found[f'retouch_nearline_users_total{{result="{result}"}}'] for result in ("written", "memo", "failed")
    }
    assert users == {"written": 4, "memo": 2, "failed": 1} and found["retouch_nearline_seconds_count"] == 2


_TWO_LIVES = """
import os, sys
from retouch.recommend._metrics import Metrics
metrics = Metrics()
metrics.serving(sys.argv[1])
if sys.argv[2] == "tell":
    sys.stdout.write(metrics.text().decode())
"""


def test_a_worker_that_died_serves_no_namespace(tmp_path):
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    lives = [
        subprocess.run([sys.executable, "-c", _TWO_LIVES, *args], env=env, check=True, capture_output=True, text=True)
        for args in (("blue", "die"), ("green", "tell"))
    ]
    found = numbers(lives[1].stdout)
    assert found['retouch_namespace_info{namespace="green"}'] == 1
    assert 'retouch_namespace_info{namespace="blue"}' not in found


def test_ready_fails_when_the_network_no_longer_says_what_it_said():
    held = bundle_of()
    application = app(held, limits=PATIENT)

    async def conversation(client):
        before = await client.get("/ready")
        for weight in held.reference.parameters():
            weight.fill_(float("nan"))
        application.state.service._told = None
        return before, await client.get("/ready"), await client.get("/health")

    before, after, health = talk(application, conversation)
    assert before.json() == {"ready": True, "self_test": True, "store": "none", "bundle": "a1", "serves": "policy"}
    assert after.status_code == 503 and not after.json()["ready"] and health.json()["status"] == "alive"


def test_the_api_describes_itself(held):
    async def conversation(client):
        return (await client.get("/openapi.json")).json()

    told = talk(app(held), conversation)
    assert told["paths"].keys() == {"/recommend", "/recommend/batch", "/events", "/health", "/ready", "/metrics"}
    assert {"rung", "exact", "unknown_items"} <= told["components"]["schemas"]["Answer"]["properties"].keys()


# Batching.


def test_questions_of_one_moment_are_computed_together_and_a_lonely_one_at_once(held):
    sizes = []

    def work(requests, until):
        sizes.append(len(requests))
        return [answer(held, None, [r])[0] for r in requests]

    async def run():
        batcher = Batcher(work, 32, 0.05)
        batcher.start()
        far = time.monotonic() + 60
        await batcher.ask(Request(k=1), far)
        found = await asyncio.gather(*(batcher.ask(Request(k=1 + i), far) for i in range(40)))
        asked = asyncio.ensure_future(batcher.ask(Request(k=9), far))
        await asyncio.sleep(0)
        await batcher.stop()  # what was asked before is still answered
        with pytest.raises(Late):
            await batcher.ask(Request(), far)
        return found, await asked

    found, last = asyncio.run(run())
    assert [len(a.items) for a in found] == [min(40, 1 + i) for i in range(40)] and len(last.items) == 9
    assert sizes[0] == 1 and max(sizes) == 32 and sum(sizes) == 42 and len(sizes) <= 5


# The process.


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"port": 0}, "port from 1 to 65535"),
        ({"workers": 0}, "at least 1 worker"),
        ({"token": "missing"}, "The token cannot be read"),
    ],
)
def test_what_cannot_be_served_is_said_before_a_process_starts(how, words):
    with pytest.raises(UserError, match=words):
        serve.run("nowhere", **how)


def test_a_token_is_one_word(tmp_path):
    path = tmp_path / "token"
    path.write_text("two words\n", encoding="utf-8")
    with pytest.raises(UserError, match="one word"):
        serve.run("nowhere", token=path)


@pytest.mark.slow
def test_two_workers_serve_one_store_and_end_when_told(tmp_path):
    """Real processes: both answer and share the store, their numbers are added, and SIGTERM lets them drain."""
    folder = saved(tmp_path / "bundle")
    (tmp_path / "token").write_text("secret\n", encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "two.py"
    script.write_text(SCRIPT, encoding="utf-8")
    process = subprocess.Popen(
        [
            sys.executable,
            str(script),
            str(folder),
            f"sqlite:{tmp_path / 'knowledge.db'}",
            str(port),
            str(tmp_path / "token"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": "Bearer secret"}) as client:
            wait_for(lambda: client.get("/ready").json()["store"] == "answers", process)
            assert client.post("/events", json={"events": [{"user": "u", "item": "i3"}]}).json()["accepted"] == 1
        answers = [fresh_connection(port, {"user": "u", "k": 3}) for _ in range(30)]
        want = answer(open_bundle(folder), None, [Request(history=("i3",), k=3)])[0]
        assert {a["rung"] for a in answers} == {"reference"}
        assert all([p["id"] for p in a["items"]] == [p.id for p in want.items] for a in answers)
        with httpx.Client(headers={"Authorization": "Bearer secret"}) as client:
            found = numbers(client.get(f"http://127.0.0.1:{port}/metrics").text)
        assert found['retouch_requests_total{outcome="ok",rung="reference"}'] == 30, "of both workers"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


SCRIPT = """
import sys

from retouch.recommend.ladder import Serving
from retouch.recommend.serve import Limits, run

if __name__ == "__main__":
    bundle, store, port, token = sys.argv[1:]
    run(bundle, store, port=int(port), workers=2, token=token, threads=1, limits=Limits(deadline_ms=60_000))
"""


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        time.sleep(0.1)
    raise AssertionError("the server did not start")


def fresh_connection(port, body):
    """Ask over a connection of its own, so that any worker may take it."""
    headers = {"Authorization": "Bearer secret"}
    return httpx.post(f"http://127.0.0.1:{port}/recommend", json=body, headers=headers, timeout=60).json()


def test_a_body_that_was_not_sent_as_json_is_told_the_header(held):
    (got,) = ask(app(held, limits=PATIENT), b'{"history": ["i1"]}', headers={"content-type": "text/plain"})
    assert got.status_code == 422 and "add the header content-type: application/json" in got.json()["error"]


def test_an_event_that_is_wrong_is_named_by_its_place(held, store):
    events = [{"user": "ann", "item": "i1"}, {"user": "ann", "item": ""}]
    (got,) = ask(app(held, store, limits=PATIENT), {"events": events}, to="/events")
    assert got.status_code == 422 and got.json()["error"].startswith("events[1].item must have 1 to 256 characters")
    assert store.histories(["ann"]) == [None]
