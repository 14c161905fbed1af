"""From files to a saved, certified classifier: the library's one call, and the command line around it."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys

import pytest
import slim_toy as toy
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, pipeline

import families
from retouch.errors import BoundRefused, ModelError, UserError
from retouch.model import open_model
from retouch.slim.api import Exiting, fit
from retouch.slim.base import Budget
from retouch.slim.opening import named_labels, open_source
from retouch.slim.predict import open_classifier
from retouch.slim.recalibrate import recalibrated
from retouch.slim.widths import base_cost, cost
from retouch.store import write_folder

pytestmark = pytest.mark.filterwarnings("ignore:'click.*is deprecated:DeprecationWarning")

NAMES = ("paris", "rome")
QUICK = ("--length-factor", "0.0015", "--batch-size", "8", "--rate-factor", "10", "--n-cuts", "2")


def table(folder, name, n, seed, names=NAMES):
    rows = "".join(f"{e.text}\t{names[e.label]}\n" for e in toy.rows(n, seed))
    (folder / name).write_text("text\tlabel\n" + rows, encoding="utf-8")
    return folder / name


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, n, seed in (("train.tsv", 120, 1), ("valid.tsv", 32, 2), ("calib.tsv", 120, 3), ("test.tsv", 60, 4)):
        table(folder, name, n, seed)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bert"
    toy.model().network.save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return folder


def made(bert, data, work, budget, **more):
    sets = [data / f"{name}.tsv" for name in ("train", "valid", "calib", "test")]
    return fit(bert, *sets, budget=budget, method=toy.method(), folder=work, keep_overlap=True, **more)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def slim(bert, data, work):
    return made(bert, data, work, Budget("3/4", "1/2"))


def test_a_budget_becomes_a_model_within_it(slim):
    assert slim.plan.params_ratio <= 0.75
    assert slim.threshold.reachable
    assert slim.threshold.cost <= 0.5
    assert slim.measured_on == "test"
    parameters = sum(p.numel() for p in slim.classifier.network.parameters())
    original = sum(p.numel() for p in slim.fitted.original.parameters())
    assert slim.plan.params_ratio == pytest.approx(parameters / original)


def test_what_is_measured_is_what_the_model_does(slim, data):
    texts, labels = zip(*(line.split("\t") for line in (data / "test.tsv").read_text().splitlines()[1:]))
    said = list(slim.classifier.predict(texts))
    right = sum(p.label == label for p, label in zip(said, labels)) / len(texts)
    assert right == pytest.approx(slim.point.quality)
    assert sum(p.exit_block for p in said) / len(said) + 1 == pytest.approx(slim.point.exit_layer)


def test_flops_at_128_tokens_are_those_of_the_exits_taken(slim):
    network, size = slim.classifier.network, slim.plan.size
    each = [cost(size, network.widths, 128, block) for block in range(size.blocks)]
    spent = sum(share * each[block] for block, share in slim.point.leaves.items()) / base_cost(size, 128)
    assert slim.to_dict()["flops_ratio_128"] == pytest.approx(spent)
    assert slim.flops_ratio_128 != pytest.approx(slim.point.flops_ratio)  # the texts are shorter


def test_a_saved_model_opens_with_transformers_and_says_the_same(slim, tmp_path):
    slim.save(tmp_path / "small", command="retouch slim ...")
    texts = [e.text for e in toy.rows(9, 5)]
    ours = [p.label for p in slim.classifier.predict(texts)]
    assert [p.label for p in open_classifier(tmp_path / "small").predict(texts)] == ours
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    said = pipeline("text-classification", network, tokenizer=toy.tokenizer(), device="cpu")(texts)
    assert [s["label"] for s in said] == ours
    record = json.loads((tmp_path / "small" / "retouch.json").read_text())
    assert record["task"]["labels"] == list(NAMES)
    assert record["passed"] is True
    assert "retouch slim ..." in (tmp_path / "small" / "README.md").read_text()
    assert not list((tmp_path / "small").glob("*.bin"))


def test_predictions_come_as_texts_come(slim):
    seen = []

    def endless():
        while True:
            seen.append(1)
            yield "the capital of france is paris"

    stream = slim.classifier.predict(endless(), batch_size=2, ahead=1)
    assert next(stream).label in NAMES
    assert len(seen) == 2
    with pytest.raises(UserError, match="Text 2 is empty"):
        list(slim.classifier.predict(["paris", " "]))
    with pytest.raises(UserError, match="mixed"):
        list(slim.classifier.predict(["paris", ("paris", "rome")]))
    with pytest.raises(UserError, match="Put it into a list"):
        slim.classifier.predict("paris")


def test_a_limit_that_cannot_be_shown_is_refused_unless_it_is_kept(bert, data, work, tmp_path):
    found = made(bert, data, work, Budget("3/4", max_harm=0.001))
    assert not found.passed
    with pytest.raises(BoundRefused, match="120 examples cannot show"):
        found.save(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    found.save(tmp_path / "kept", keep_refused=True)
    record = json.loads((tmp_path / "kept" / "retouch.json").read_text())
    assert record["passed"] is False
    assert record["exit_layer"] == 2.0


def test_max_drop_walks_down_to_the_last_share_that_holds(bert, data, work):
    found = made(bert, data, work, Budget(max_drop=0.5), ladder=(0.9, 0.75))
    assert found.passed
    assert found.budget.max_drop == 0.5
    assert found.plan.params_ratio <= 0.75
    tight = made(bert, data, work, Budget(max_drop=0.001), ladder=(0.9, 0.75))
    assert not tight.passed


def test_seconds_may_be_the_cost(bert, data, work):
    found = made(bert, data, work, Budget("3/4", 0.9, cost="seconds"))
    assert found.threshold.cost is not None
    assert found.threshold.cost <= 0.9 or not found.threshold.reachable


def test_regression_leaves_by_steps_between_exits(bert, tmp_path):
    task = toy.regression()
    found = fit(bert, task, budget=Budget("3/4", 0.6), method=toy.method(), folder=tmp_path)
    assert found.rule.name == "delta"
    assert -1 <= found.point.quality <= 1
    values = [p.score for p in found.classifier.predict([e.text for e in task.calib])]
    assert all(30 < v < 60 for v in values)
    with pytest.raises(UserError, match="rule must be"):
        fit(bert, task, budget=Budget("3/4", 0.6), method=toy.method(), folder=tmp_path, exiting=Exiting("entropy"))
    with pytest.raises(UserError, match="loss must be 'flip'"):
        fit(bert, task, budget=Budget("3/4", max_harm=0.2), method=toy.method(), exiting=Exiting(loss="worse"))


def test_a_saved_model_is_calibrated_anew_without_training(slim, data, tmp_path):
    slim.save(tmp_path / "small")
    before = open_classifier(tmp_path / "small").network.state_dict()
    found = recalibrated(tmp_path / "small", data / "calib.tsv", flops=0.45)
    assert found.threshold.cost <= 0.45
    found.save(tmp_path / "again")
    after = open_classifier(tmp_path / "again")
    assert after.network.config.threshold == found.threshold.saved
    assert all(torch.equal(before[k], v) for k, v in after.network.state_dict().items())
    with pytest.raises(UserError, match="nothing to choose"):
        recalibrated(tmp_path / "small", data / "calib.tsv")
    odd = table(tmp_path, "odd.tsv", 8, 1, ("oslo", "bonn"))
    with pytest.raises(UserError, match=r"(?:oslo|bonn).*paris, rome"):
        recalibrated(tmp_path / "small", odd, flops=0.3)


# ---------------------------------------------------------------- what is opened


def test_a_fine_tuned_classifier_keeps_its_labels_and_is_not_fine_tuned_again(data, tmp_path):
    config = toy.model().network.config
    config.id2label, config.label2id = {0: "ROME", 1: "PARIS"}, {"ROME": 0, "PARIS": 1}
    BertForSequenceClassification(config).save_pretrained(tmp_path / "tuned")
    toy.tokenizer().save_pretrained(tmp_path / "tuned")
    found = made(tmp_path / "tuned", data, tmp_path / "work", Budget("3/4"))
    assert found.record["task"]["labels"] == ["rome", "paris"] or found.record["task"]["labels"] == ("rome", "paris")
    assert next(r["stage"] for r in found.record["history"]) == "assistant"
    with pytest.raises(UserError, match="labels are ROME, PARIS; the data's are bonn, oslo"):
        fit(tmp_path / "tuned", table(tmp_path, "odd.tsv", 80, 1, ("oslo", "bonn")), budget=Budget("3/4"))


def test_labels_match_by_name_or_by_number():
    assert named_labels(["A", "B"], ["b", "a"]) == ["a", "b"]
    assert named_labels(["no", "yes"], ["1"]) == ["0", "1"]
    with pytest.raises(UserError, match="Name them alike"):
        named_labels(["no", "yes"], ["2"])


def test_what_cannot_be_made_slim_is_named(slim, tmp_path):
    network, words = families.FAMILIES["llama"](), families.tokenizer()
    network.save_pretrained(tmp_path / "llama")
    words.save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelError, match="decoder"):
        open_source(tmp_path / "llama")
    slim.save(tmp_path / "small")
    with pytest.raises(ModelError, match="slim already"):
        open_source(tmp_path / "small")
    with pytest.raises(ModelError, match="--predict"):
        open_model(tmp_path / "small")


# ---------------------------------------------------------------- the command line


@pytest.fixture
def retouch(monkeypatch, capsys):
    from retouch.cli import main

    monkeypatch.setenv("COLUMNS", "200")

    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["retouch", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == code, said
        return said

    return run


def test_the_command_makes_saves_and_answers(retouch, bert, data, tmp_path, monkeypatch):
    out, work = tmp_path / "small", tmp_path / "work"
    sets = [w for name in ("train", "valid", "calib", "test") for w in (f"--{name}", data / f"{name}.tsv")]
    words = ("slim", bert, *sets, "--params", "3/4", "--flops", "1/2", "--work", work, *QUICK, "-o", out)
    said = retouch(*words, "--html", tmp_path / "report.html")
    assert "parameters" in said.out
    assert f"Saved as {out}" in said.out
    assert "<svg" in (tmp_path / "report.html").read_text() or "<img" in (tmp_path / "report.html").read_text()
    told = json.loads(retouch(*words, "--json").out)
    assert told["params_ratio"] <= 0.75
    assert told["threshold"]["cost"] <= 0.5

    monkeypatch.setattr(sys, "stdin", io.StringIO("the capital is paris\nthe tower in rome\n"))
    lines = [json.loads(line) for line in retouch("slim", out, "--predict", "-").out.splitlines()]
    assert [line["label"] in NAMES for line in lines] == [True, True]
    (tmp_path / "marked.txt").write_bytes("\ufeffparis\n".encode())
    (tmp_path / "plain.txt").write_bytes(b"paris\n")
    marked, plain = (retouch("slim", out, "--predict", tmp_path / f"{n}.txt").out for n in ("marked", "plain"))
    assert marked == plain
    (tmp_path / "latin.txt").write_bytes("paris caf\xe9\n".encode("latin-1"))
    assert "not UTF-8" in retouch("slim", out, "--predict", tmp_path / "latin.txt", code=2).err
    (tmp_path / "pair.txt").write_text("paris\trome\n", encoding="utf-8")
    assert "trained on single texts" in retouch("slim", out, "--predict", tmp_path / "pair.txt", code=2).err
    rows = f"{NAMES[0]},in france\n{NAMES[1]},in italy\n" * 2
    (tmp_path / "calib.csv").write_text(f"place,body\n{rows}", encoding="utf-8")
    others = ("--recalibrate", "--calib", tmp_path / "calib.csv", "--flops", "1/2", "--json")
    assert "no label column" in retouch("slim", out, *others, code=2).err
    assert json.loads(retouch("slim", out, *others, "--columns", "text=body,label=place").out)["model"] == str(out)
    told = json.loads(
        retouch("slim", out, "--recalibrate", "--calib", data / "calib.tsv", "--flops", "0.45", "--json").out
    )
    assert told["threshold"]["cost"] <= 0.45
    card = (out / "README.md").read_text()
    assert 0 < card.index(" --params 3/4 ") < card.index("--flops 1/2 --json") < card.index("--flops 0.45")
    told = json.loads(retouch("slim", out, "--measure", "--test", data / "test.tsv", "--json").out)
    assert {(r["model"], r["batch_size"]) for r in told["rows"]} == {("slim", 1), ("slim", 8), ("slim", 32)}
    assert told["note"] in retouch("slim", out, "--measure", "--test", data / "test.tsv").out


@pytest.mark.slow
def test_of_several_processes_one_writes_and_speaks(bert, data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out, html = tmp_path / "small", tmp_path / "report.html"
    sets = [str(w) for name in ("train", "valid", "calib", "test") for w in (f"--{name}", data / f"{name}.tsv")]
    files = ["--work", tmp_path / "work", "-o", out, "--html", html, "--json"]
    words = ["slim", bert, *sets, "--params", "3/4", *QUICK, *files]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "retouch", *map(str, words)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [child.communicate(timeout=280) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert json.loads(said[0][0])["model"] == str(out)
    assert said[1][0] == "" and "Plan for" not in said[1][1] and "Plan for" in said[0][1]
    assert (out / "manifest.json").is_file() and html.is_file()


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ((), "--train is missing"),
        (("--train", "{train}"), "-o FOLDER is missing"),
        (("--train", "{train}", "-o", "{out}"), "A budget needs params"),
        (("--train", "{train}", "-o", "{out}", "--params", "9"), "params must be above 0"),
        (("--train", "{train}", "-o", "{out}", "--params", "1/8", "--max-drop", "0.1"), "max_drop looks for"),
        (("--train", "{train}", "-o", "{out}", "--params", "1/900"), "nearest"),
        (("--train", "{train}", "-o", "{out}", "--params", "1/2", "--max-harm", "0.001", "--delta", "2"), "delta must"),
        (("--train", "nowhere.tsv", "-o", "{out}", "--params", "1/2"), "nowhere.tsv"),
        (("--train", "{train}", "-o", "{data}", "--params", "1/2"), "no slim model of ours"),
        (("--train", "{train}", "-o", "{out}", "--params", "1/2", "--scor", "gates"), "scor"),
        (("--predict", "nowhere.txt"), "no config.json|slim"),
        (("--export", "{out}", "--cuts", "a"), "--cuts are block numbers"),
        (("--export", "{data}"), "is no export"),
        (("--export", "{out}", "--test", "{train}"), "Leave out --test"),
        (("--predict", "-", "--max-drop", "0.1"), "Leave out --max-drop"),
        (("--recalibrate", "--train", "{train}", "--flops", "0.2"), "Leave out --train"),
        (("--measure", "--test", "{train}", "--batch", "3"), "Leave out --batch"),
        (("--train", "{train}", "-o", "{out}", "--params", "1/2", "--int8"), "Leave out --int8"),
        (("--train", "{train}", "-o", "{out}", "--params", "1/2", "--html", "/nowhere/x.html"), "--html"),
        (("--train", "{train}", "-o", "{train}/x", "--params", "1/2"), "cannot be written"),
        (("--train", "{train}", "-o", "{out}", "--params", "1/2", "--method", "linear"), "linear is a yardstick"),
        (("--recalibrate", "--flops", "0.2"), "needs --calib"),
        (("--recalibrate", "--calib", "{train}", "--flops", "0.2"), "which is not slim"),
        (("--train", "{train}", "-o", "{out}", "--params", "1/2", "--loss", "flip"), "Leave out --loss: .*--max-harm"),
        (("--train", "{train}", "-o", "{out}", "--params", "1/2", "--cost", "seconds"), "Leave out --cost: .*--flops"),
        (("--train", "{train}", "-o", "{out}", "--params", "1/2", "--columns", "review"), "--columns says what"),
        (("--train", "{train}", "-o", "{out}", "--params", "1/2", "--columns", "text=a,label=b"), "no column 'a'"),
        (("--measure",), "needs --test"),
        (("--measure", "--test", "{train}", "--scoring", "x"), "There is no option --scoring"),
    ],
)
def test_mistakes_are_named(retouch, bert, data, tmp_path, words, wrong):
    named = {"train": data / "train.tsv", "out": tmp_path / "out", "data": data}
    import re

    said = retouch("slim", bert, *(w.format(**named) for w in words), code=2)
    assert re.search(wrong, said.err), said.err
    assert said.out == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_kind_is_not_replaced(retouch, bert, data, tmp_path):
    write_folder(tmp_path / "change", {"retouch.json": '{"kind": "change"}'})
    for words in (("--train", data / "train.tsv", "--params", "1/2"), ("--recalibrate", "--calib", data / "calib.tsv")):
        assert "no slim model of ours" in retouch("slim", bert, *words, "-o", tmp_path / "change", code=2).err


def test_a_folder_whose_record_is_no_record_is_not_replaced(retouch, bert, data, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "retouch.json").write_text("[]")
    words = ("--train", data / "train.tsv", "--params", "1/2", "-o", tmp_path / "odd")
    assert "no slim model of ours" in retouch("slim", bert, *words, code=2).err


def test_stdin_is_read_as_a_file_is(retouch, slim, tmp_path, monkeypatch):
    slim.save(tmp_path / "small")

    def answers(data, code=0):
        held = io.TextIOWrapper(io.BytesIO(data), encoding="ascii", errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", held)
        return retouch("slim", tmp_path / "small", "--predict", "-", code=code)

    assert answers("\ufeffparis caf\xe9\n".encode()).out == answers("paris caf\xe9\n".encode()).out
    assert "not UTF-8" in answers("paris caf\xe9\n".encode("latin-1"), code=2).err


def test_what_cannot_be_recalibrated_is_refused_before_the_rows_are_read(retouch, slim, data, tmp_path, monkeypatch):
    monkeypatch.setattr("retouch.slim.recalibrate.table_of", lambda *_: pytest.fail("the model was run"))
    slim.save(tmp_path / "small")
    words = ("--recalibrate", "--calib", data / "calib.tsv", "--max-harm", "0.2")
    assert "delta must" in retouch("slim", tmp_path / "small", *words, "--delta", "7", code=2).err
    write_folder(tmp_path / "saved", {"retouch.json": '{"kind": "change"}'})
    slim.save(tmp_path / "inside")
    (tmp_path / "inside").rename(tmp_path / "saved" / "inside")
    assert "lies inside" in retouch("slim", tmp_path / "saved" / "inside", *words, code=2).err


def test_one_class_only_is_an_error_before_any_work(retouch, bert, tmp_path):
    rows = "".join(f"{e.text}\tparis\n" for e in toy.rows(60, 1))
    (tmp_path / "one.tsv").write_text("text\tlabel\n" + rows, encoding="utf-8")
    said = retouch("slim", bert, "--train", tmp_path / "one.tsv", "--params", "1/2", "-o", tmp_path / "out", code=2)
    assert "paris" in said.err
