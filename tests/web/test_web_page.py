"""The page's API: every route, good and bad, over a tiny model; and who is let in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from importlib.resources import files

import httpx
import pytest
from web_client import HOST, TOKEN, TestClient, client_of, done, refused, wait

from retouch import registry
from retouch.edit.facts import Fact
from retouch.errors import BoundRefused, UserError
from retouch.ledger import open_ledger, read_log
from retouch.progress import report, track
from retouch.settings import fields_of, from_flags
from retouch.web._folder import Folder
from retouch.web._job import Work
from retouch.web._wire import Edit, Saved
from retouch.web._workbench import _facts
from retouch.web.serve import Workbench, app, listening

QUICK = {"method": "ft_m", "settings": {"n_steps": "6", "learning_rate": "0.01"}}
FACT = {"prompt": "The capital of {}", "subject": "France", "target": "is Lyon"}
SCRIPTS = {"page.js", "work.js", "draw.js", "edit.js", "slim.js", "fuse.js", "recommend.js"}
REPORT = '<html><head><meta name="generator" content="Retouch"></head><body>seen</body></html>'


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """A folder of models with a tiny decoder in it."""
    folder = tmp_path_factory.mktemp("models") / "work" / "tiny"
    network, tokenizer = tiny("gpt2")
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(base, tmp_path):
    """What the page may read and write: a copy of the decoder, and beside it what it may not."""
    shutil.copytree(base, tmp_path / "work" / "tiny")
    (tmp_path / "secret.html").write_text(REPORT)
    return tmp_path / "work"


@pytest.fixture
def bench(folder):
    made = Workbench(Folder(folder))
    yield made
    made.end()


@pytest.fixture
def client(bench):
    return client_of(bench)


@pytest.fixture(scope="module")
def steady(base):
    """A client with the model open, for what changes nothing. Beside its folder lies what it may not read."""
    (base.parent / "out").symlink_to("/etc")
    (base.parents[1] / "secret.html").write_text(REPORT)
    bench = Workbench(Folder(base.parent))
    bench.open_now(str(base))
    return client_of(bench)


@pytest.fixture
def opened(bench, client, folder):
    """A client with the model open."""
    bench.open_now(str(folder / "tiny"))
    return client


# ---------------------------------------------------------------- the way of a change


def test_the_whole_way_of_a_change(client, folder):
    assert client.get("/api/state").json()["model"] is None
    assert "tiny" in client.get("/api/models").json()
    done(client, "open", {"model": "tiny"})
    told = client.get("/api/state").json()["model"]
    assert (told["family"], told["numbers"]["blocks"], told["changes"]) == ("gpt2 decoder", "2", [])

    planned = done(client, "edit", {**FACT, **QUICK})
    (fact,) = planned["facts"]
    assert fact["prompt"] == "The capital of France"
    assert 0 < fact["before"] < fact["after"] < 1
    (row,) = client.get("/api/changes").json()
    assert (row["path"], row["method"], row["certified"]) == (planned["change"], "ft_m", [])
    shown = client.get("/api/change", params={"path": planned["change"]}).json()
    assert (shown["facts"], shown["settings"]["n_steps"]) == ([fact], 6)
    assert shown["weights"]

    asked = {"text": "The capital of France", "n_tokens": 4}
    before_and_after = client.post("/api/ask", json={**asked, "change": planned["change"]}).json()["said"]
    assert before_and_after["before"] != before_and_after["after"]
    assert client.post("/api/ask", json=asked).json()["said"] == {"answer": before_and_after["before"]}

    written = done(client, "apply", {"change": planned["change"]})["model"]
    assert [line["status"] for line in read_log(folder / written)["changes"]] == ["active"]
    assert done(client, "apply", {"change": planned["change"], "dtype": "float32"})["model"] == f"{written}-2"
    done(client, "open", {"model": written})
    (line,) = client.get("/api/state").json()["model"]["changes"]
    assert (line["number"], line["active"], line["prompts"]) == (1, True, ["The capital of France is Lyon"])
    assert client.post("/api/ask", json=asked).json()["said"]["answer"] == before_and_after["after"]

    back = done(client, "undo", {"number": 1, "name": "back"})
    assert back["model"] == "back"
    assert "bit for bit" in back["says"][0]
    assert open_ledger(folder / "back").model.fingerprint == open_ledger(folder / "tiny").model.fingerprint
    assert [line["status"] for line in read_log(folder / written)["changes"]] == [
        "active"
    ]  # a new folder, not this one


def test_what_is_there_is_never_overwritten(opened, folder):
    first, second = (done(opened, "edit", {**FACT, **QUICK})["change"] for _ in range(2))
    assert second == f"{first}-2"
    (folder / "mine").mkdir()
    assert done(opened, "apply", {"change": first, "name": "mine"})["model"] == "mine-2"
    assert not any((folder / "mine").iterdir())


def test_pasted_facts_are_read_as_a_file_would_be(opened):
    lines = [json.dumps(FACT), json.dumps({**FACT, "subject": "Italy", "target": "is Turin"})]
    result = done(opened, "edit", {"facts": "\n".join(lines), **QUICK})
    assert [f["prompt"] for f in result["facts"]] == ["The capital of France", "The capital of Italy"]
    said = refused(opened.post("/api/edit", json={"facts": lines[0] + "\n{", **QUICK}))
    assert said.startswith("facts.jsonl line 2: broken JSON")


def test_a_bound_that_refuses_says_so_and_leaves_nothing(opened, folder):
    there = set(folder.iterdir())
    harsh = {**FACT, "method": "ft_m", "settings": {"n_steps": "12", "learning_rate": "0.5"}, "max_harm": 0.0001}
    assert opened.post("/api/edit", json=harsh).status_code == 202
    job = wait(opened)
    assert (job["state"], job["status"], job["result"]) == ("refused", 409, None)
    assert "above the limit of 0.0001" in job["error"]
    assert set(folder.iterdir()) == there


def test_a_bound_that_holds_is_told_and_kept_with_the_change(opened):
    gentle = {**FACT, "method": "ft_m", "settings": {"n_steps": "1", "learning_rate": "1e-5"}, "max_harm": 0.99}
    result = done(opened, "edit", gentle)
    proved = [s for s in result["says"] if "within the limit of 0.99" in s]
    assert len(proved) == 2
    assert opened.get("/api/changes").json()[0]["certified"] == proved
    done(opened, "open", {"model": done(opened, "apply", {"change": result["change"]})["model"]})
    assert opened.get("/api/state").json()["model"]["changes"][0]["certified"] == proved


# ---------------------------------------------------------------- long work


class Held:
    """Work that goes on until it is let go."""

    def __init__(self, bench):
        self.go, self.steps = threading.Event(), 0
        bench.desk.begin("Waiting", self)

    def __call__(self):
        for self.steps in track(range(10**6), "Steps"):
            if self.go.wait(0.002):
                break
        return Saved(says=["let go"])


def test_one_thing_at_a_time(opened, bench):
    held = Held(bench)
    for name, body in (("edit", {**FACT, **QUICK}), ("ask", {"text": "x"}), ("open", {"model": "tiny"})):
        assert "Waiting is under way" in refused(opened.post(f"/api/{name}", json=body), 409)
    held.go.set()
    assert wait(opened)["result"]["says"] == ["let go"]
    assert opened.post("/api/ask", json={"text": "x", "n_tokens": 1}).status_code == 200


def test_progress_has_the_time_left_and_cancel_ends_it(opened, bench):
    Held(bench)
    while not (progress := opened.get("/api/job").json()["progress"]) or progress[0]["left_s"] is None:
        time.sleep(0.005)
    assert progress[0]["what"] == "Steps"
    assert progress[0]["left_s"] > 0
    assert opened.post("/api/cancel", json={}).json()["what"] == "Waiting"
    job = wait(opened)
    assert (job["state"], job["error"], job["progress"]) == ("stopped", "Stopped. Nothing was half-written.", [])
    assert refused(opened.post("/api/cancel", json={})) == "Nothing is being worked on."


def test_a_search_can_be_stopped_within_its_steps_and_leaves_nothing(opened, folder):
    there = set(folder.iterdir())
    slow = {**FACT, "method": "rome", "settings": {"n_steps": "1000", "stop_loss": "0", "contexts": "plain"}}
    assert opened.post("/api/edit", json=slow).status_code == 202
    while not opened.get("/api/job").json()["progress"]:
        time.sleep(0.005)
    opened.post("/api/cancel", json={})
    assert wait(opened)["state"] == "stopped"
    assert set(folder.iterdir()) == there


def test_the_end_of_the_server_ends_the_work(bench):
    with client_of(bench) as client:
        held = Held(bench)
        assert client.get("/api/job").json()["state"] == "running"
    assert bench.job().state == "stopped"
    assert held.steps < 10**5


@pytest.mark.parametrize(
    ("error", "state", "status"),
    [
        (UserError("so"), "failed", 422),
        (BoundRefused("so"), "refused", 409),
        (ZeroDivisionError("secret"), "failed", 500),
    ],
)
def test_an_end_in_words(error, state, status):
    def work():
        raise error

    ended = threading.Event()
    made = Work(1, "Work", work, ended.set)
    made.join(5)
    assert ended.is_set()
    assert (made.job.state, made.job.status) == (state, status)
    assert made.job.error == ("so" if status != 500 else "Retouch failed at this; the server's log says why.")


def test_warnings_of_the_work_and_of_no_other_thread_are_told(opened):
    twice = "\n".join([json.dumps(FACT), json.dumps({**FACT, "target": "is Nice"})])
    assert opened.post("/api/edit", json={"facts": twice, **QUICK}).status_code == 202
    assert wait(opened)["warnings"] == ["1 of 2 facts are left out: later ones are about the same or repeat them."]


def test_progress_of_another_thread_is_not_heard(bench, client):
    held = Held(bench)
    report("Elsewhere", 1, 2)
    assert all(p["what"] != "Elsewhere" for p in client.get("/api/job").json()["progress"])
    held.go.set()


# ---------------------------------------------------------------- what is asked wrongly


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({**FACT, "method": "memitt"}, "No edit method is called 'memitt'. Did you mean 'memit'?"),
        ({**FACT, "method": "ft_m", "settings": {"n_step": "3"}}, "has no setting 'n_step'. Did you mean 'n_steps'?"),
        ({**FACT, "method": "ft_m", "settings": {"n_steps": "0"}}, "n_steps must be int >= 1; got 0"),
        ({**FACT, "method": "ft_m", "settings": {"n_steps": ""}}, "n_steps must be int >= 1"),
        ({**FACT, "subject": "Gaul", "prompt": "The capital of France"}, "Gaul"),
        ({**FACT, "method": "memit", "settings": {"text": "/etc/passwd"}}, "There is no '/etc/passwd' below"),
        (
            {**FACT, "method": "rets", "settings": {"constraints": "../secret.html"}},
            "There is no '../secret.html' below",
        ),
        ({**FACT, "method": "memit", "settings": {"text=/etc/passwd#": "x"}}, "should match pattern"),
        ({"prompt": "The capital of {}", "subject": "France"}, "Name a fact"),
        ({**FACT, "facts": "{}"}, "either one fact by its parts, or pasted facts"),
        ({"facts": ""}, "facts.jsonl is empty"),
        ({**FACT, "max_harm": 2}, "max_harm: should be less than 1"),
        ({**FACT, "colour": "red"}, "colour is no field of this request"),
    ],
)
def test_a_wrong_edit_is_refused_before_the_work(steady, body, says):
    assert says in refused(steady.post("/api/edit", json=body))
    assert steady.get("/api/job").json() is None


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("ask", {"text": ""}, "An empty text cannot be continued"),
        ("ask", {"text": "x", "n_tokens": 200}, "200 new tokens are more than"),
        ("ask", {"text": "x", "change": "nothing"}, "There is no 'nothing' below"),
        ("apply", {"change": "tiny"}, "has no manifest.json"),
        ("open", {"model": "tinny"}, "Did you mean 'tiny'?"),
        ("open", {"model": "../work/tiny"}, "No model is called"),
        ("apply", {"change": "tiny", "dtype": "int8"}, "dtype: should be 'float32'"),
        ("cancel", {}, "Nothing is being worked on."),
    ],
)
def test_other_mistakes_are_named(steady, name, body, says):
    assert says in refused(steady.post(f"/api/{name}", json=body))


def test_without_a_model_nothing_is_done(client):
    for name, body in (("ask", {"text": "x"}), ("edit", {**FACT, **QUICK}), ("undo", {"number": 1})):
        assert refused(client.post(f"/api/{name}", json=body)) == "No model is open. Open one first."


def test_an_undo_of_nothing_is_told(opened):
    opened.post("/api/undo", json={"number": 7})
    job = wait(opened)
    assert (job["state"], job["status"]) == ("failed", 422)
    assert "Change number 7 does not exist" in job["error"]


def test_an_altered_record_is_named_and_hides_no_other(opened, folder):
    good, bad, odd = (done(opened, "edit", {**FACT, **QUICK})["change"] for _ in range(3))
    (folder / bad / "retouch.json").write_text("{")
    record = json.loads((folder / odd / "retouch.json").read_text())
    (folder / odd / "retouch.json").write_text(json.dumps({**record, "report": {"harm": {"certificates": [{"n": 1}]}}}))
    rows = {row["path"]: row for row in opened.get("/api/changes").json()}
    assert not rows[good]["error"]
    assert "not valid JSON" in rows[bad]["error"]
    assert "its record was altered" in rows[odd]["error"]
    assert "was saved with" in refused(opened.get("/api/change", params={"path": odd}))


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    "path", ["../secret.html", "/etc", "..", "a/../../secret.html", "", "out", "out/passwd", "x\0y"]
)
def test_no_path_leads_out(steady, path):
    assert "There is no" in refused(steady.get("/api/change", params={"path": path}))
    assert "There is no" in refused(steady.post("/api/apply", json={"change": path}))


@pytest.mark.parametrize("name", ["../up", "/tmp/up", ".hidden", "a/b", "dot.", " ", "x\0y", "..", "-o"])
def test_a_new_folder_has_a_plain_name(folder, name):
    with pytest.raises(UserError, match="is no name of a new folder"):
        Folder(folder).new(name)


def test_links_are_not_listed(folder, base):
    (folder / "linked").symlink_to(base)
    (folder / "half").mkdir()
    (folder / "half" / "config.json").symlink_to(base / "config.json")
    (folder / "half" / "model.safetensors").symlink_to(base / "model.safetensors")
    (folder / "seen.html").symlink_to(folder.parent / "secret.html")
    found = Folder(folder)
    assert (found.models(), found.reports()) == (["tiny"], [])


def test_only_our_reports_are_shown_and_only_by_their_ticket(client, folder):
    (folder / "a b").mkdir()
    (folder / "a b" / "run.html").write_text(REPORT)
    (folder / "other.html").write_text("<html>no report of ours</html>")
    (page,) = client.get("/api/reports").json()
    assert page["path"] == "a b/run.html"
    shown = client.get(page["url"], headers={"Authorization": ""})  # a frame sends no token
    assert shown.text == REPORT
    assert shown.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    forged = page["url"].replace("run.html", "../../secret.html")
    assert client.get(forged).status_code == client.get(page["url"][:-1]).status_code == 404


# ---------------------------------------------------------------- who is let in


def test_the_api_needs_the_token(bench):
    stranger = TestClient(app(bench, TOKEN), base_url=HOST)
    paths = [*stranger.get("/openapi.json").json()["paths"], "/api/none"]
    assert len(paths) > 20
    for path in paths:
        refused(stranger.get(path), 401)
        refused(stranger.post(path, json={}), 401)
    refused(stranger.get("/api/state", headers={"Authorization": "Bearer wrong"}), 401)
    assert stranger.get("/").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "https://127.0.0.1:8412"},
        {"Host": "evil.example:8412"},
        {"Host": "127.0.0.1:9999"},
        {"Host": "127.0.0.1"},
        {"Host": "203.0.113.7:8412"},
        {"Host": "evil.example@127.0.0.1:8412"},
        {"Host": "127.0.0.1:port"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_other_sites_are_refused_even_with_the_token(steady, headers):
    refused(steady.get("/api/state", headers=headers), 403)
    refused(steady.post("/api/cancel", json={}, headers=headers), 403)


@pytest.mark.parametrize("host", ["localhost:8412", "127.0.0.1:8412", "[::1]:8412", "127.0.0.2:8412"])
def test_our_own_names_are_known(steady, host):
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert steady.get("/api/state", headers=headers).status_code == 200


def test_a_server_for_a_network_is_called_by_number_or_by_its_name(bench):
    client = TestClient(app(bench, TOKEN, host="shop.example"), headers={"Authorization": f"Bearer {TOKEN}"})
    for host, status in (("shop.example:8412", 200), ("192.0.2.1:8412", 200), ("evil.example:8412", 403)):
        assert client.get("/api/state", headers={"Host": host}).status_code == status


def test_a_form_of_another_page_is_no_request(steady):
    answer = steady.post("/api/cancel", content="a=b", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert "no JSON" in refused(answer)


def test_a_body_has_an_end(steady):
    assert "larger than 2048 KiB" in refused(steady.post("/api/edit", json={"facts": "x" * 3_000_000}), 413)


def test_every_answer_says_what_the_browser_may_do(steady):
    for path in ("/", "/page.js", "/api/state", "/nothing"):
        headers = steady.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


# ---------------------------------------------------------------- the page


class Parts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.wanted, self.labels, self.inline, self.controlled = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.labels += [given["for"]] if "for" in given else []
        self.controlled += [given[n] for n in ("aria-controls", "aria-labelledby", "list") if n in given]
        self.wanted += [given[n] for n in ("src", "href") if n in given]
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in given) else []


def test_the_page_holds_what_its_script_asks_for_and_nothing_from_elsewhere(steady):
    parts = Parts()
    parts.feed(steady.get("/").text)
    assert not parts.inline
    assert set(parts.labels) <= set(parts.ids)
    for wanted in parts.wanted:
        assert wanted.startswith(("#", "data:")) or steady.get(f"/{wanted}").status_code == 200, wanted
    script = "".join(steady.get(f"/{name}").text for name in SCRIPTS)
    for marker in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "https:"):
        assert marker not in script
    asked = {word.split('"')[0] for cut in ('at("', 'fill("', 'offer("') for word in script.split(cut)[1:]}
    assert asked <= set(parts.ids), asked - set(parts.ids)
    assert set(parts.controlled) <= set(parts.ids)
    assert len(parts.ids) == len(set(parts.ids))


def test_the_page_is_packed_with_the_package():
    names = {f.name for f in (files("retouch.web") / "page").iterdir()}
    assert names == {"page.html", "page.css", *SCRIPTS}


def test_every_method_of_the_registry_has_a_form_that_gives_its_defaults_back(steady):
    told = steady.get("/api/methods").json()
    assert [m["name"] for m in told] == [e.name for e in registry.methods("edit")]
    for method in told:
        cls = registry.load("edit", method["name"])
        flags = [f"--{s['name']}={s['default']}" for s in method["settings"] if s["default"]]
        assert from_flags(cls, flags) == cls()
        assert [s["name"] for s in method["settings"]] == [f.name for f in fields_of(cls)]


def test_the_api_is_described(steady):
    paths = steady.get("/docs").json()["paths"]
    assert {"/api/state", "/api/edit", "/api/apply", "/api/undo", "/api/reports"} <= set(paths)
    assert "/report" not in paths


def test_an_address_that_is_taken_is_named_before_the_work():
    with listening(port=0) as held, pytest.raises(UserError, match="Nothing can listen at"):
        listening(port=held.getsockname()[1])
    with pytest.raises(UserError, match="between 0 and 65535"):
        listening(port=70_000)


def test_it_serves_at_the_address_it_tells_until_ctrl_c(tmp_path):
    words = [sys.executable, "-m", "retouch", "web", "--port", "0", "--folder", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            place, _, token = process.stderr.readline().split()[-1].partition("#")
            with httpx.Client(base_url=place, timeout=60) as client:
                assert client.get("/").text.startswith("<!doctype html>")
                told = client.get("/api/state", headers={"Authorization": f"Bearer {token}"}).json()
            assert (told["folder"], told["model"]) == (str(tmp_path), None)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert process.stderr.read() == "The address is its key: keep it to yourself. Ctrl-C ends it.\n"
        finally:
            process.kill()


@pytest.mark.filterwarnings("ignore:'click.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["no/such/model", "--port", "0"], "There is no model folder 'no/such/model'"),
        (["--port", "70000"], "--port must lie between 0 and 65535"),
        (["--folder", "file"], "cannot be used as a folder"),
    ],
)
def test_the_command_names_mistakes_before_it_serves(tmp_path, monkeypatch, capsys, words, says):
    from retouch.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["retouch", "web", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert says in err


def test_a_fact_of_the_form_is_that_of_the_library():
    assert _facts(Edit(**FACT, truth="")) == [Fact.of(**FACT)]
