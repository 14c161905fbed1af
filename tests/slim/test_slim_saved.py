"""A saved model gets another threshold, or is exported, and all that is said of it afterwards is true."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import slim_toy as toy
from transformers import pipeline

from retouch.errors import BoundRefused, ModelError, UserError
from retouch.router import open_router
from retouch.slim import exporting
from retouch.slim.api import Exiting, fit
from retouch.slim.exporting import export_saved
from retouch.slim.first_k import FirstK
from retouch.slim.network import save
from retouch.slim.predict import open_classifier
from retouch.slim.recalibrate import calibration_rows, recalibrated, saved_record
from retouch.slim.table import flops_costs, read_table
from retouch.slim.thresholds import choose

pytestmark = pytest.mark.filterwarnings("ignore:'click.*is deprecated:DeprecationWarning")

NAMES = ("paris", "rome")
LONG = " ".join(["paris"] * 3 + ["rome"] * 140)


def table(path, n, seed, names=NAMES):
    rows = "".join(f"{e.text}\t{names[e.label]}\n" for e in toy.rows(n, seed))
    path.write_text("text\tlabel\n" + rows, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, n, seed in (("train", 120, 1), ("valid", 32, 2), ("calib", 120, 3), ("test", 60, 4)):
        table(folder / f"{name}.tsv", n, seed)
    return folder


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """Make models of one training: by cost, and with a certificate."""
    work, models = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("models")
    toy.model(3).network.save_pretrained(models / "bert")
    toy.tokenizer().save_pretrained(models / "bert")

    def make(**budget):
        sets = [data / f"{name}.tsv" for name in ("train", "valid", "calib", "test")]
        method = toy.method(max_tokens=9, length_factor=0.01, rate_factor=100.0, save_every=0)
        budget = {"params": "3/4", **budget}
        return fit(models / "bert", *sets, budget=budget, method=method, folder=work, keep_overlap=True)

    return make


@pytest.fixture(scope="module")
def cheap(made, tmp_path_factory):
    slim = made(flops=0.5)
    slim.save(tmp_path_factory.mktemp("cheap") / "model")
    return slim


@pytest.fixture
def saved(cheap, tmp_path):
    cheap.save(tmp_path / "model")
    return tmp_path / "model"


# ---------------------------------------------------------------- another threshold


def test_of_a_folder_the_calib_rows_are_read(saved, data):
    rows = calibration_rows(data, saved_record(saved))
    assert [row.text for row in rows] == [e.text for e in toy.rows(120, 3)]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_rows_that_served_for_something_else_are_refused(saved, data, tmp_path, split):
    with pytest.raises(UserError, match=f"the {split} rows of this model"):
        recalibrated(saved, data / f"{split}.tsv", flops=0.5)
    turned = ["\t".join(reversed(line.split("\t"))) for line in (data / f"{split}.tsv").read_text().splitlines()]
    (tmp_path / "same.tsv").write_text("\n".join(turned) + "\n")  # another file of the same rows
    with pytest.raises(UserError, match=f"the {split} rows of this model"):
        calibration_rows(tmp_path / "same.tsv", saved_record(saved))


def test_labels_match_whatever_the_case_and_others_are_named_with_their_line(saved, tmp_path):
    record = saved_record(saved)
    rows = calibration_rows(table(tmp_path / "upper.tsv", 20, 6, ("PARIS", "Rome")), record)
    assert [row.label for row in rows] == [e.label for e in toy.rows(20, 6)]
    (tmp_path / "odd.tsv").write_text("text\tlabel\nthe tower\tparis\nthe city\toslo\n")
    with pytest.raises(UserError, match=r"odd.tsv line 3: label 'oslo' is none of the model's: paris, rome"):
        calibration_rows(tmp_path / "odd.tsv", record)
    numbers = {**record, "task": {**record["task"], "labels": None, "recipe": {}}}
    with pytest.raises(UserError, match=r"odd.tsv line 2, 3: label 'paris' is no finite number"):
        calibration_rows(tmp_path / "odd.tsv", numbers)


def test_what_is_measured_is_that_of_the_new_threshold(cheap, saved, data, tmp_path):
    found = recalibrated(saved, data / "calib.tsv", max_harm=0.4, exiting=Exiting(loss="worse"))
    assert found.threshold.value != cheap.threshold.value
    found.save(tmp_path / "again", command="retouch slim --recalibrate")
    record, card = saved_record(tmp_path / "again"), (tmp_path / "again" / "README.md").read_text()
    texts, labels = zip(*(line.split("\t") for line in (data / "test.tsv").read_text().splitlines()[1:]))
    said = list(open_classifier(tmp_path / "again").predict(texts))
    assert record["quality"] == pytest.approx(np.mean([p.label == label for p, label in zip(said, labels)]))
    assert record["exit_layer"] == pytest.approx(np.mean([p.exit_block for p in said]) + 1)
    assert record["leaves"] == {str(l): np.mean([p.exit_block == l for p in said]) for l in (0, 1, 2)}
    assert record["budget"] == {**cheap.budget.to_dict(), "flops": None, "max_harm": 0.4}
    assert record["likeness"] is None and record["shown"] == {} and record["passed"]
    assert record["recalibrated_on"]["file"] == "calib.tsv"
    assert record["history"] == json.loads((saved / "retouch.json").read_text())["history"]
    assert "retouch slim --recalibrate" in card and f"{record['quality']:.4g}" in card
    assert "the original was not at hand" in card and "on the 120 rows of calib" in card
    assert recalibrated(tmp_path / "again", data / "calib.tsv", flops=0.5).threshold.cost <= 0.5


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ({"max_harm": "1"}, "max_harm must be above 0 and below 1"),
        ({"max_harm": "8x"}, "max_harm must be"),
        ({"max_harm": 0.2, "exiting": Exiting(loss="gain")}, "loss"),
        ({"flops": 0.5, "exiting": Exiting("patience")}, "rule 'patience' is not the saved one, 'entropy'"),
        ({"flops": 0.5, "exiting": Exiting(every=2)}, "every 2 is not the saved one, 1"),
        ({"flops": 0.5, "exiting": Exiting(temperatures=False)}, "temperatures are part of"),
    ],
)
def test_what_fit_refuses_is_refused_here_too(saved, data, asked, wrong):
    with pytest.raises(UserError, match=wrong):
        recalibrated(saved, data / "calib.tsv", **asked)


def test_the_cost_is_a_share_of_the_original_and_not_of_its_first_blocks(data, tmp_path):
    toy.model(3).network.save_pretrained(tmp_path / "bert")
    toy.tokenizer().save_pretrained(tmp_path / "bert")
    task = dataclasses.replace(toy.task(), calib=toy.rows(60, 3))
    method = FirstK(n_blocks=1, length_factor=0.0015, batch_size=8)
    made = fit(tmp_path / "bert", task, budget={"flops": 1.0}, method=method, folder=tmp_path / "work")
    made.save(tmp_path / "one")
    found = recalibrated(tmp_path / "one", data / "calib.tsv", flops=0.9)
    assert found.threshold.cost < 0.5


def test_a_record_that_is_no_record_is_named(saved):
    (saved / "manifest.json").unlink()
    (saved / "retouch.json").write_text("[]")
    with pytest.raises(ModelError, match="does not say how the model was made"):
        saved_record(saved)
    assert len(list(open_classifier(saved).predict(["the tower in paris"]))) == 1
    (saved / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="which is not slim"):
        open_classifier(saved)


# ---------------------------------------------------------------- for others to use


def test_a_pipeline_cuts_long_texts_where_the_classifier_does(cheap, saved):
    classifier = open_classifier(saved)
    assert (classifier.max_tokens, classifier.tokenizer.model_max_length) == (9, 9)
    assert cheap.classifier.tokenizer.model_max_length != 9
    assert "truncation=True" in (saved / "README.md").read_text()
    said = pipeline("text-classification", str(saved), device="cpu")([LONG], truncation=True)
    assert [s["label"] for s in said] == [p.label for p in classifier.predict([LONG])]


# ---------------------------------------------------------------- the export


@pytest.fixture
def onnx():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


def changed(slim, folder, threshold, leaves):
    """Save a model as if few had left at some exits."""
    slim.classifier.network.config.threshold, before = threshold, slim.classifier.network.config.threshold
    save(slim.classifier.network, slim.classifier.tokenizer, folder, record=slim.to_dict() | {"leaves": leaves})
    slim.classifier.network.config.threshold = before
    return folder


def test_the_export_cuts_texts_and_answers_as_the_model(onnx, saved, tmp_path):
    made = export_saved(saved, tmp_path / "onnx", cuts=[0, 1])
    assert made.exported.exits.max_tokens == 9 and not made.lost and not made.stale and made.notes() == []
    texts = [e.text for e in toy.rows(20, 7)] + [LONG]
    ours, theirs = list(open_classifier(saved).predict(texts)), open_router(tmp_path / "onnx", threads=1).predict(texts)
    assert type(ours[0]) is type(theirs[0])
    assert [(a.label, a.exit_block) for a in ours] == [(b.label, b.exit_block) for b in theirs]
    assert [a.score for a in ours] == pytest.approx([b.score for b in theirs], abs=1e-4)
    for predict in (open_router(tmp_path / "onnx").predict, lambda texts: list(open_classifier(saved).predict(texts))):
        with pytest.raises(UserError, match="Text 1 is a pair, and this model was trained on single texts"):
            predict([("the tower", "in rome")])
        with pytest.raises(UserError, match="Text 2 holds half of a character"):
            predict(["the tower", "r\ud800me"])


def test_exits_that_are_lost_are_told_and_the_threshold_is_chosen_anew(onnx, cheap, data, tmp_path):
    few = {"0": 0.02, "1": 0.5, "2": 0.48}
    model = changed(cheap, tmp_path / "few", cheap.threshold.value, few)
    made = export_saved(model, tmp_path / "old")
    assert (made.lost, made.exported.exits.cuts, made.stale) == ((0,), (1, 2), True)
    assert made.notes()[0] == "Exits after blocks 0 are left out." and "--calib" in made.notes()[1]
    assert made.exported.exits.threshold == cheap.threshold.value

    made = export_saved(model, tmp_path / "new", calib=data / "calib.tsv")
    router = open_router(tmp_path / "new", threads=1)
    assert (made.lost, made.stale, router.exits.threshold) == ((0,), False, made.threshold.value)
    rows = [e.text for e in toy.rows(120, 3)]
    where = np.array([p.exit_block for p in router.predict(rows)])
    network = open_classifier(model).network
    said = dataclasses.replace(_read(network, model, rows), exits=(0, 1, 2))
    spent = flops_costs(said, network.size, network.widths, dataclasses.replace(made.threshold.rule, temperatures=None))
    assert made.threshold.leaves == {1: np.mean(where == 1), 2: np.mean(where == 2)}
    assert made.threshold.cost <= 0.5 < spent.share(np.full((120, 1), 2))[0]


def _read(network, model, texts):
    from retouch.slim.data import Example
    from retouch.slim.encoded import batches, encode

    encoded = encode(open_classifier(model).tokenizer, [Example(t, None, 0) for t in texts], 9, token_types=2)
    return read_table(network, batches(encoded, 32, seed=None, by_length=False))


@pytest.mark.slow
def test_a_certified_model_keeps_all_exits_or_is_certified_again(onnx, made, data, tmp_path):
    slim = made(max_harm=0.4)
    assert slim.passed
    few = {"0": 0.02, "1": 0.5, "2": 0.48}
    model = changed(slim, tmp_path / "few", slim.threshold.value, few)
    found = export_saved(model, tmp_path / "all")
    assert (found.lost, found.exported.exits.cuts, found.stale) == ((), (0, 1, 2), False)
    found = export_saved(model, tmp_path / "some", calib=data / "calib.tsv")
    assert found.lost == (0,) and found.threshold.certificate.holds
    proof = found.threshold.certificate
    assert (proof.limit, proof.what, proof.confidence) == (0.4, "answers lost less answers gained", 0.9)
    assert any("at full depth" in note for note in found.notes())


def test_a_certificate_is_not_tried_twice_on_the_same_rows(onnx, cheap, data, tmp_path, monkeypatch):
    """With a cost beside the risk fewer exits may be refused, and a second try would take the confidence."""
    looks = []
    monkeypatch.setattr(exporting, "choose", lambda *args, **more: looks.append(args) or choose(*args, **more))
    risk = {"limit": 0.4, "what": "answers spoilt", "method": "binomial", "confidence": 0.9}
    record = cheap.to_dict() | {"leaves": {"0": 0.02, "1": 0.5, "2": 0.48}}
    record["budget"] = {**record["budget"], "flops": 0.01}
    record["threshold"] = {**record["threshold"], "certificate": risk}
    save(cheap.classifier.network, cheap.classifier.tokenizer, tmp_path / "both", record=record)
    with pytest.raises(BoundRefused, match="exclude one another"):
        export_saved(tmp_path / "both", tmp_path / "no", calib=data / "calib.tsv")
    assert [look[0].exits for look in looks] == [(0, 1, 2)]


def test_one_row_is_too_few_for_int8_and_told_before_the_work(onnx, saved, tmp_path):
    (tmp_path / "one.tsv").write_text("text\tlabel\nthe tower\tparis\n")
    with pytest.raises(UserError, match=r"one.tsv holds one row; int8 fits"):
        export_saved(saved, tmp_path / "int8", int8=True, calib=tmp_path / "one.tsv")


@pytest.mark.slow
def test_int8_gets_temperatures_and_a_threshold_of_its_own(onnx, cheap, saved, data, tmp_path):
    made = export_saved(saved, tmp_path / "int8", int8=True, calib=data / "calib.tsv")
    exits = open_router(tmp_path / "int8", threads=1).exits
    assert exits.precision == "int8" and made.exported.quantised.n_texts == 120
    assert exits.threshold == made.threshold.value != cheap.threshold.value
    assert exits.temperatures != tuple(cheap.rule.temperatures)
    assert made.threshold.cost <= 0.5


def test_what_does_not_hold_is_not_written(onnx, cheap, data, tmp_path):
    model = tmp_path / "dear"
    record = cheap.to_dict()
    record["budget"] = {**record["budget"], "flops": 0.01}
    save(cheap.classifier.network, cheap.classifier.tokenizer, model, record=record)
    with pytest.raises(BoundRefused, match="out of reach"):
        export_saved(model, tmp_path / "no", calib=data / "calib.tsv")
    assert not (tmp_path / "no").exists()
    made = export_saved(model, tmp_path / "kept", calib=data / "calib.tsv", keep_refused=True)
    assert made.exported.exits.threshold == 0.0


def test_the_command_tells_what_is_lost(onnx, cheap, tmp_path, monkeypatch, capsys):
    from retouch.cli import main

    few = {"0": 0.02, "1": 0.5, "2": 0.48}
    model = changed(cheap, tmp_path / "few", cheap.threshold.value, few)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["retouch", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    assert "Exits after blocks 0 are left out." in run("slim", model, "--export", tmp_path / "onnx")[1]
    told = json.loads(run("slim", model, "--export", tmp_path / "onnx", "--json")[1])
    assert told["lost_exits"] == [0] and "--calib" in told["notes"][1]
    code, _, wrong = run("slim", model, "--export", model)
    assert code == 2 and "is no export" in wrong and (model / "model.safetensors").is_file()


def test_rows_of_the_other_kind_choose_no_threshold(tmp_path):
    (tmp_path / "pairs.tsv").write_text("text\ttext2\tlabel\na\tb\tyes\nc\td\tno\n", encoding="utf-8")
    task = {"labels": ["no", "yes"]}
    assert len(calibration_rows(tmp_path / "pairs.tsv", {"task": task | {"pairs": True}})) == 2
    assert len(calibration_rows(tmp_path / "pairs.tsv", {"task": task})) == 2  # made before kinds were kept
    with pytest.raises(UserError, match="holds pairs of texts, and the model was trained on single texts"):
        calibration_rows(tmp_path / "pairs.tsv", {"task": task | {"pairs": False}})
    with pytest.raises(UserError, match="no column 'body'"):
        calibration_rows(tmp_path / "pairs.tsv", {"task": task}, {"text": "body", "label": "label"})
