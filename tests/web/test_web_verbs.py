"""What the page shows of slim models, recommenders and adapters is what library and command line say, good and bad."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import time
from dataclasses import replace

import pytest
import slim_toy
import web_made
from web_client import client_of, done, ended, refused

from retouch import store
from retouch.fuse.merging import conflict_report, open_adapters
from retouch.model import open_model
from retouch.progress import track
from retouch.recommend.bundle import open_bundle
from retouch.recommend.personal import answer_for, language_model
from retouch.report import to_json
from retouch.slim.compaction import answer as answer_batch
from retouch.slim.encoded import collate, encode
from retouch.slim.predict import open_classifier
from retouch.web import _adapters
from retouch.web._folder import Folder
from retouch.web.serve import Workbench

TEXTS = [row.text for row in slim_toy.rows(12, 9)]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A folder with one artefact of each kind, and beside it what the page may not read."""
    folder = tmp_path_factory.mktemp("page") / "work"
    slim = web_made.slim(folder / "slim")
    web_made.slim(folder / "pairs", pairs=True)
    web_made.regression(folder / "number")
    web_made.bundle(tiny, folder / "shop")
    base = web_made.decoder(tiny, folder / "base")
    for seed, name in enumerate(("news", "law")):
        web_made.adapter(base, folder / name, seed)
    web_made.slim(folder.parent / "outside")
    return folder, slim


@pytest.fixture
def folder(made, tmp_path):
    """The test's own copy."""
    shutil.copytree(made[0].parent, tmp_path / "copy")
    return tmp_path / "copy" / "work"


@pytest.fixture
def client(folder):
    return client_of(Workbench(Folder(folder)))


@pytest.fixture(scope="module")
def steady(made):
    """A client for what changes nothing, with the recommender open."""
    client = client_of(Workbench(Folder(made[0])))
    done(client, "open_bundle", {"bundle": "shop"})
    return client


def failed(client, name, body):
    job = ended(client, name, body)
    assert (job["state"], job["status"], job["result"]) == ("failed", 422, None), job
    return job["error"]


def classify(client, slim, texts, **more):
    answer = client.post("/api/classify", json={"slim": slim, "texts": texts, **more})
    assert answer.status_code == 200, answer.json()
    return answer.json()


def damage(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


# ---------------------------------------------------------------- what is there


def test_each_kind_is_listed_where_it_belongs_and_nowhere_else(steady):
    def told(name):
        return sorted(steady.get(f"/api/{name}").json())

    assert told("slims") == ["number", "pairs", "slim"]
    assert told("bundles") == ["shop"]
    assert told("adapters") == ["law", "news"]
    assert {"base"} == set(told("models")) - {"smollm2", "minilm", "gemma3-270m"}
    assert told("changes") == []  # a bundle holds a file of that name


def test_an_empty_folder_holds_nothing(tmp_path):
    client = client_of(Workbench(Folder(tmp_path)))
    assert [client.get(f"/api/{name}").json() for name in ("slims", "bundles", "adapters")] == [[], [], []]
    assert client.get("/api/bundle").json() is None


def test_links_are_not_listed(folder):
    for name in ("slim", "shop", "news"):
        (folder / f"linked-{name}").symlink_to(folder / name)
        (folder / f"half-{name}").mkdir()
        for file in (folder / name).iterdir():
            (folder / f"half-{name}" / file.name).symlink_to(file)
    found = Folder(folder)
    assert not [
        name for name in (*found.slims(), *found.bundles(), *found.adapters()) if name.startswith(("linked", "half"))
    ]


# ---------------------------------------------------------------- slim


def test_a_slim_model_is_shown_as_it_was_measured_and_proved(steady, made):
    slim = made[1]
    told = steady.get("/api/slim", params={"path": "slim"}).json()
    assert (told["task"], told["labels"], told["pairs"], told["metric"]) == (
        "toy",
        ["paris", "rome"],
        False,
        "accuracy",
    )
    assert told["says"] == [*slim.threshold.sentences(), slim.likeness.sentence()]
    assert "within the limit of 0.3" in told["says"][0]
    assert (told["threshold"], told["quality_base"]) == (slim.threshold.value, slim.quality_base)
    assert told["numbers"]["accuracy, slim"] == f"{slim.point.quality:.4f}"
    assert told["numbers"]["parameters"] == f"1/{1 / slim.plan.params_ratio:.3g} of the original's"
    points = [(p["threshold"], p["quality"], p["flops_ratio"]) for p in told["curve"]]
    assert points == [(p.threshold, p.quality, p.flops_ratio) for p in slim.curve]
    assert tuple(p["threshold"] for p in told["curve"] if p["certified"]) == slim.threshold.certified


def test_a_model_without_a_limit_says_that_nothing_is_proved(steady):
    told = steady.get("/api/slim", params={"path": "number"}).json()
    assert told["labels"] is None
    assert told["says"][0].startswith("No limit was asked for")


def test_it_answers_as_the_command_line_does(steady, made):
    told = classify(steady, "slim", TEXTS)
    predicted = [p.to_dict() for p in open_classifier(made[0] / "slim").predict(TEXTS)]
    assert [{name: said[name] for name in predicted[0]} for said in told["said"]] == predicted
    assert [said["text"] for said in told["said"]] == TEXTS


@pytest.mark.parametrize("threshold", [0.0, 1e-6, 0.3, 2.0])
def test_at_another_threshold_texts_leave_where_it_says(steady, made, threshold):
    told = classify(steady, "slim", TEXTS, threshold=threshold)
    classifier = open_classifier(made[0] / "slim")
    rows = collate(encode(classifier.tokenizer, slim_toy.rows(12, 9), classifier.max_tokens, token_types=2), range(12))
    right = answer_batch(classifier.network, **{k: v for k, v in rows.items() if k != "labels"}, threshold=threshold)
    assert [said["exit_block"] for said in told["said"]] == right.where.tolist()
    for said in told["said"]:
        taken = said["exits"][said["exit_block"]]
        assert (taken["label"], taken["score"]) == (said["label"], pytest.approx(said["score"], abs=1e-5))
        left = [e["block"] for e in said["exits"] if e["unsure"] is not None and e["unsure"] < threshold]
        assert said["exit_block"] == (left[0] if left else said["exits"][-1]["block"])
    assert told["threshold"] == threshold
    assert classify(steady, "slim", TEXTS)["threshold"] == made[1].threshold.value  # its own is left as it was


def test_leaving_early_is_cheaper_and_costs_what_was_measured(steady, made):
    early, late = (classify(steady, "slim", TEXTS, threshold=t)["said"] for t in (2.0, 0.0))
    assert all(0 < e["flops"] < l["flops"] < 1 for e, l in zip(early, late))
    texts = [row.text for row in slim_toy.rows(60, 4)]  # its test rows, all of one cost at full depth but for length
    mean = sum(said["flops"] for said in classify(steady, "slim", texts, threshold=0.0)["said"]) / len(texts)
    assert mean == pytest.approx(made[1].curve[0].flops_ratio, rel=0.02)


def test_pairs_and_numbers_are_answered(steady):
    (said,) = classify(steady, "pairs", ["the city"], second=["is in paris"])["said"]
    assert (said["text"], said["second"], said["label"]) == ("the city", "is in paris", "paris")
    (said,) = classify(steady, "number", ["the city is in paris"])["said"]
    assert (said["label"], said["exits"][-1]["score"]) == (None, pytest.approx(said["score"], abs=1e-4))


@pytest.mark.parametrize(
    ("slim", "texts", "more", "says"),
    [
        ("../outside", ["x"], {}, "There is no '../outside' below"),
        ("/etc", ["x"], {}, "There is no '/etc' below"),
        ("nothing", ["x"], {}, "There is no 'nothing' below"),
        ("shop", ["x"], {}, "does not say how the model was made"),
        ("base", ["x"], {}, "has no manifest.json"),
        ("slim", [], {}, "texts: list should have at least 1 item"),
        ("slim", ["x"] * 257, {}, "texts: list should have at most 256 items"),
        ("slim", ["a", " "], {}, "Text 2 is empty."),
        ("slim", ["x" * 20_001], {}, "texts[0]: string should have at most 20000 characters"),
        ("slim", ["a"], {"second": ["b"]}, "Text 1 is a pair, and this model was trained on single texts"),
        ("slim", ["half \ud800"], {}, "texts[0]: should be a valid string"),
        ("pairs", ["a", "b"], {"second": ["c"]}, "Pairs need a second text each; got 2 and 1 second ones"),
        ("pairs", ["a"], {}, "Text 1 is a single text, and this model was trained on pairs"),
        ("slim", ["x"], {"threshold": -0.1}, "threshold: should be greater than or equal to 0"),
        ("slim", ["x"], {"threshold": 2.1}, "threshold: should be less than or equal to 2"),
        ("slim", ["x"], {"threshold": "1"}, "threshold: should be a valid number"),
    ],
)
def test_what_cannot_be_answered_is_said(steady, slim, texts, more, says):
    body = json.dumps({"slim": slim, "texts": texts, **more})
    assert says in refused(steady.post("/api/classify", content=body, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("path", ["../outside", "shop", "base", "", "nothing"])
def test_only_slim_models_below_the_folder_are_shown(steady, path):
    refused(steady.get("/api/slim", params={"path": path}))


def test_a_damaged_model_is_named_and_answers_nothing(client, folder):
    damage(folder / "slim" / "model.safetensors")
    assert "model.safetensors has other content" in refused(client.get("/api/slim", params={"path": "slim"}))
    assert "model.safetensors has other content" in refused(
        client.post("/api/classify", json={"slim": "slim", "texts": ["x"]})
    )
    (folder / "pairs" / "code.bin").write_bytes(b"x")
    assert "holds what it was not saved with" in refused(client.get("/api/slim", params={"path": "pairs"}))


def test_a_record_that_was_altered_is_named(client, folder):
    record = json.loads((folder / "slim" / "retouch.json").read_text())
    files = {p.name: p.read_bytes() for p in (folder / "slim").iterdir() if p.name != "manifest.json"}
    files["retouch.json"] = json.dumps({**record, "plan": {"size": {}}}).encode()
    store.write_folder(folder / "odd", files)
    assert "its record was altered" in refused(client.get("/api/slim", params={"path": "odd"}))
    assert "its record was altered" in refused(client.post("/api/classify", json={"slim": "odd", "texts": ["x"]}))


def test_a_model_that_was_written_anew_is_opened_anew(client, folder, made):
    assert classify(client, "slim", ["paris"])["threshold"] == made[1].threshold.value
    anew = replace(made[1], threshold=replace(made[1].threshold, value=0.0))
    config = anew.classifier.network.config
    own, config.threshold = config.threshold, 0.0
    try:
        anew.save(folder / "slim")
    finally:
        config.threshold = own
    assert classify(client, "slim", ["paris"])["threshold"] == 0.0


# ---------------------------------------------------------------- recommend


HISTORY = ["amber 12", "i5", "birch 1"]


def test_a_recommender_shows_its_certificate_and_the_health_of_its_codes(steady, made):
    told = steady.get("/api/bundle").json()
    bundle = open_bundle(made[0] / "shop")
    assert (told["path"], told["serves"], told["numbers"]["items"]) == ("shop", "policy", "24")
    assert told["says"][0].startswith("With 95% confidence the mean harm of fresh knowledge is at most")
    assert [t["title"] for t in told["tables"]] == ["Certified harm", "Codes by level", "Codes of all items"]
    assert ["items", len(bundle.items)] in told["tables"][2]["rows"]


def test_it_recommends_as_the_command_line_does(steady, made):
    found = done(steady, "recommend", {"history": HISTORY, "k": 4})["items"]
    bundle = open_bundle(made[0] / "shop")
    right = answer_for(bundle, "; ".join(HISTORY), k=4, explain=True).to_dict()
    assert found["answer"] == json.loads(json.dumps(right))
    assert [item["title"] for item in found["history"]] == ["amber 12", "fjord 5", "birch 1"]
    words = bundle.codes(bundle.windows([["i12", "i5", "i1"]]))[0].tolist()
    assert [code.split(" (")[0] for code in found["codes"]] == [f"group {b + 1}-{w + 1}" for b, w in enumerate(words)]


def test_a_language_model_can_be_asked_now(client, folder):
    done(client, "open_bundle", {"bundle": "shop", "llm": "base"})
    assert client.get("/api/bundle").json()["numbers"]["asked here"] == "base"
    found = done(client, "recommend", {"history": HISTORY, "k": 3})["items"]["answer"]
    bundle = open_bundle(folder / "shop", knowledge=language_model(folder / "shop", str(folder / "base")))
    right = answer_for(bundle, "; ".join(HISTORY), k=3, explain=True, ask=True)
    assert (found["rung"], right.rung) == ("fresh", "fresh")
    assert [r["sentence"] for r in found["reasons"]] == [r["sentence"] for r in right.reasons]
    assert all(part["group"].startswith("group") for r in found["reasons"] for part in r["parts"])


def test_titles_are_found_by_their_beginning(steady):
    assert {item["title"] for item in steady.get("/api/titles", params={"text": "amb"}).json()} == {
        "amber 12",
        "amber 24",
    }
    assert steady.get("/api/titles", params={"text": "Amber 12"}).json() == [{"id": "i12", "title": "amber 12"}]
    assert steady.get("/api/titles", params={"text": ""}).json() == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"history": []}, "history: list should have at least 1 item"),
        ({"history": [" ", ";"]}, "The history is empty"),
        (
            {"history": ["amber 13"]},
            "'amber 13' is neither an id nor a title of this catalogue. Nearest titles: 'amber",
        ),
        ({"history": ["x" * 1001]}, "at most 1000 characters"),
        ({"history": ["i1"], "k": 0}, "k: should be greater than or equal to 1"),
        ({"history": ["i1"], "k": 101}, "k: should be less than or equal to 100"),
        ({"history": "i1"}, "history: should be a valid list"),
    ],
)
def test_a_history_that_cannot_be_read_is_refused_before_the_work(steady, body, says):
    before = steady.get("/api/job").json()["number"]
    assert says in refused(steady.post("/api/recommend", json=body))
    assert steady.get("/api/job").json()["number"] == before


def test_nothing_is_recommended_before_a_recommender_is_open(client):
    for answer in (
        client.post("/api/recommend", json={"history": ["i1"]}),
        client.get("/api/titles", params={"text": "a"}),
    ):
        assert refused(answer) == "No recommender is open. Open one first."


@pytest.mark.parametrize("bundle", ["../outside", "/etc", "nothing", ""])
def test_only_recommenders_below_the_folder_are_opened(steady, bundle):
    assert "There is no" in refused(steady.post("/api/open_bundle", json={"bundle": bundle}))


def test_only_models_of_the_page_are_asked(steady):
    for llm in ("../outside", "/etc", "some/hub-id"):
        body = {"bundle": "shop", "llm": llm}
        assert "No model is called" in refused(steady.post("/api/open_bundle", json=body))


def test_what_is_no_whole_recommender_is_named_and_the_open_one_stays(client, folder):
    done(client, "open_bundle", {"bundle": "shop"})
    assert "is no bundle of a recommender but of kind 'slim'" in failed(client, "open_bundle", {"bundle": "slim"})
    shutil.copytree(folder / "shop", folder / "bad")
    damage(folder / "bad" / "change.safetensors")
    assert "change.safetensors has other content" in failed(client, "open_bundle", {"bundle": "bad"})
    assert client.get("/api/bundle").json()["path"] == "shop"
    assert done(client, "recommend", {"history": ["i1"], "k": 1})["items"]["answer"]["items"]


# ---------------------------------------------------------------- fuse


BOTH = {"model": "base", "adapters": ["news", "law"]}


def test_the_conflict_is_told_as_the_command_line_tells_it(client, folder):
    there = sorted(folder.rglob("*"))
    told = done(client, "compare", BOTH)
    model = open_model(folder / "base")
    right = conflict_report(model, open_adapters([folder / "news", folder / "law"], model), pictures=False)
    plain = {**to_json(right), "model": told["report"]["model"]}
    assert told["report"] == json.loads(json.dumps(plain))
    assert told["report"]["summary"].startswith("2 adapters cancel")
    assert (told["notes"], sorted(folder.rglob("*"))) == ([], there)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({**BOTH, "adapters": ["news"]}, "adapters: list should have at least 2 items"),
        ({**BOTH, "adapters": ["news", "news"]}, "An adapter is named twice"),
        ({**BOTH, "adapters": ["news", "../outside"]}, "There is no '../outside' below"),
        ({**BOTH, "model": "../outside"}, "No model is called"),
        ({**BOTH, "model": "some/hub-id"}, "No model is called"),
        ({"adapters": ["news", "law"]}, "model is missing"),
    ],
)
def test_a_wrong_comparison_is_refused_before_the_work(steady, body, says):
    assert says in refused(steady.post("/api/compare", json=body))


def test_a_comparison_needs_nothing_that_draws(client, monkeypatch):
    for module in ("matplotlib.style", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    assert done(client, "compare", BOTH)["report"]["pictures"] == []


def test_a_comparison_can_be_stopped(client, monkeypatch):
    def held(paths, model, **_):
        for _ in track(range(10**6), "check"):
            time.sleep(0.002)

    monkeypatch.setattr(_adapters, "open_adapters", held)
    assert client.post("/api/compare", json=BOTH).status_code == 202
    while not (client.get("/api/job").json()["progress"]):
        time.sleep(0.005)
    assert "is under way" in refused(client.post("/api/classify", json={"slim": "slim", "texts": ["x"]}), 409)
    assert client.post("/api/cancel", json={}).status_code == 200
    while client.get("/api/job").json()["state"] == "running":
        time.sleep(0.005)
    assert client.get("/api/job").json()["state"] == "stopped"


def test_while_a_model_answers_nothing_else_begins(folder):
    bench = Workbench(Folder(folder))
    with bench.desk.alone():
        assert refused(client_of(bench).post("/api/compare", json=BOTH), 409) == "An answer is under way. Wait for it."


def test_adapters_pass_the_checks_of_strangers_files_first(client, folder, tiny, tmp_path):
    assert "slim/adapter_config.json cannot be read" in failed(
        client, "compare", {**BOTH, "adapters": ["news", "slim"]}
    )

    shutil.copytree(folder / "law", folder / "bad")
    damage(folder / "bad" / "adapter_model.safetensors")
    assert "adapter_model.safetensors" in failed(client, "compare", {**BOTH, "adapters": ["news", "bad"]})

    (folder / "more").mkdir()
    shutil.copytree(folder / "law", folder / "more" / "news")
    told = failed(client, "compare", {**BOTH, "adapters": ["news", "more/news"]})
    assert "Two adapters are called 'news'" in told

    network, words = tiny("llama", seed=1)
    network.save_pretrained(folder / "other")
    words.save_pretrained(folder / "other")
    assert "was trained for model" in failed(client, "compare", {**BOTH, "model": "other"})


def test_an_adapter_of_other_origin_is_taken_only_if_asked_for(client, folder):
    (folder / "plain").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "law" / name, folder / "plain" / name)
    assert "plain" in client.get("/api/adapters").json()
    body = {**BOTH, "adapters": ["news", "plain"]}
    assert "does not say which base model it was trained for" in failed(client, "compare", body)
    (note,) = done(client, "compare", {**body, "base_unverified": True})["notes"]
    assert note.startswith("plain: unverified")


class _Spring:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_no_code_of_a_stranger_is_run(client, folder, tmp_path):
    sprung = tmp_path / "sprung"
    files = {p.name: p.read_bytes() for p in (folder / "slim").iterdir() if p.name != "manifest.json"}
    config = json.loads(files["tokenizer_config.json"])
    config |= {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    files["mine.py"] = f"open({str(sprung)!r}, 'w')\nclass Mine: pass\n".encode()
    store.write_folder(folder / "bad", files)
    told = refused(client.post("/api/classify", json={"slim": "bad", "texts": ["x"]}))
    assert "has no tokenizer that can be opened" in told
    assert not sprung.exists()


def test_no_pickle_is_ever_read(client, folder, tmp_path):
    sprung = tmp_path / "sprung"
    for name, file in (("news", "adapter_model.bin"), ("shop", "more.pkl"), ("slim", "pytorch_model.bin")):
        (folder / name / file).write_bytes(pickle.dumps(_Spring(sprung)))
    for name in ("slims", "bundles", "adapters", "models", "changes"):
        assert client.get(f"/api/{name}").status_code == 200
    assert "may be a pickle" in failed(client, "compare", BOTH)
    assert "holds what it was not saved with" in failed(client, "open_bundle", {"bundle": "shop"})
    assert "holds what it was not saved with" in refused(client.get("/api/slim", params={"path": "slim"}))
    assert not sprung.exists()
