"""What every server of ours refuses before anything is computed, and how it says what is wrong with a body."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from retouch._gate import Gate, Limits, depth, sentence, shown
from retouch.errors import SettingsError


def ask(limits, body=b"{}", *, method="POST", path="/do", token="", headers=()):
    """Send one request through a gate: its status, and what it was told."""
    sent, reached = [], []
    parts = [{"type": "http.request", "body": part, "more_body": True} for part in (body[:5], body[5:])]
    parts[-1]["more_body"] = False

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    async def behind(scope, receive, send):
        reached.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": ""}'})

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers), "client": ("127.0.0.1", 1)}
    asyncio.run(Gate(behind, limits, token)(scope, receive, send))
    assert bool(reached) == (sent[0]["status"] == 200)
    assert not reached or method == "GET" or reached == [body]
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"a": [1, 2]}', 200, ""),
        (b'{"a": "' + b"x" * 2000 + b'"}', 413, "larger than 1 KiB"),
        (b'{"a": [[[1]]]}', 422, "4 deep in one another; at most 3"),
        (b'{"a": NaN}', 422, "NaN is no number"),
        (b"{", 422, "no JSON that can be read"),
    ],
)
def test_a_body_is_read_whole_or_refused_with_a_sentence(body, status, says):
    got = ask(Limits(body_kib=1, n_deep=3), body)
    assert got[0] == status
    assert says in got[1]


def test_a_token_is_asked_of_everybody_but_who_asks_for_health():
    right = [(b"authorization", b"Bearer secret")]
    asked = [((), "/do"), ([(b"authorization", b"Bearer secre")], "/do"), (right, "/do"), ((), "/health")]
    told = [ask(Limits(), method="GET", path=path, token="secret", headers=headers)[0] for headers, path in asked]
    assert told == [401, 401, 200, 200]


def test_depth_does_not_count_what_stands_in_texts():
    assert depth(rb'["\"[[[", {"a": "\\"}]') == 2
    assert depth(b'"[[[') == 3
    assert depth(b"") == 0


def test_a_text_of_quotes_without_an_end_costs_no_time():
    begin = time.process_time()
    assert depth(b'"' + b'\\"' * 20_000 + b"[") == 1
    assert depth(b'""' * 20_000 + b"[") == 1
    assert time.process_time() - begin < 1


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")
    n: int
    words: list[str] = []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "n is missing; see /docs."),
        ({"n": 1, "m": 2}, "m is no field of this request; see /docs."),
        ({"n": 1, "words": ["a", 3]}, "words[1]: should be a valid string; got 3."),
        (
            {"n": "x", "words": 3},
            "n: should be a valid integer, unable to parse string as an integer; got 'x'. (1 more)",
        ),
    ],
)
def test_the_first_thing_that_is_wrong_is_said(body, says):
    with pytest.raises(ValidationError) as error:
        _Asked(**body)
    assert sentence(error.value.errors()) == says


def test_a_value_of_the_outside_is_shown_short():
    assert shown(10**100_000) == "a number of 332193 bits"
    assert len(shown("x" * 10_000)) == 60


def test_limits_name_what_is_not_allowed():
    with pytest.raises(SettingsError, match="body_kib must be int >= 1"):
        Limits(body_kib=0)


def test_the_core_loads_no_verb():
    code = "import sys, retouch._gate; print([m for m in sys.modules if m.startswith('retouch.recommend')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
