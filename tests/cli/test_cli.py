"""The command line: what each command says and leaves behind, and how each mistake is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from retouch import __version__, registry
from retouch.progress import report

# Typer asks click 8.5 by old names; neither is ours to change.
pytestmark = pytest.mark.filterwarnings("ignore:'click.*is deprecated:DeprecationWarning")

PROMPT, SUBJECT, TARGET = "The capital of {}", "France", "is Lyon"
FACT = ("--prompt", PROMPT, "--subject", SUBJECT, "--target", TARGET)
QUICK = ("--method", "ft-m", "--n-steps", "6", "--learning-rate", "0.01")
ASKED = "The capital of France"


@dataclass
class Said:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def retouch(monkeypatch, capsys):
    """Run a command in this process."""
    from retouch.cli import main

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("RETOUCH_DEBUG", raising=False)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["retouch", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Said(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(retouch):
    """Run a command that is to fail: nothing on stdout, one error on stderr, after what it warned of."""

    def run(*words, code=2):
        said = retouch(*words)
        assert said.code == code, said
        assert said.out == ""
        assert re.match(r"(warning: .*\n)*error: ", said.err), said
        return said.err

    return run


@pytest.fixture
def done(retouch):
    def run(*words):
        said = retouch(*words)
        assert said.code == 0, said.err
        return said

    return run


def saved(tiny, folder, name="llama", dtype=torch.float32, **fields):
    network, words = tiny(name, **fields)
    network.to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    return saved(tiny, tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    return saved(tiny, tmp_path_factory.mktemp("models") / "half", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def bert(tiny, tmp_path_factory):
    return saved(tiny, tmp_path_factory.mktemp("models") / "bert", "bert")


def plan(model, out, learning_rate=0.01):
    """Make a change with the library, quicker than by a command."""
    from retouch import edit_facts, open_ledger, save_change
    from retouch.edit.facts import Fact

    facts = [Fact(PROMPT, SUBJECT, TARGET)]
    done = edit_facts(open_ledger(model).model, facts, "ft-m", n_steps=6, learning_rate=learning_rate)
    save_change(done.change, out)
    return out


@pytest.fixture(scope="module")
def change(base, tmp_path_factory):
    return plan(base, tmp_path_factory.mktemp("changes") / "lyon")


@pytest.fixture(scope="module")
def carrying(base, change, tmp_path_factory):
    """A model folder that carries the change."""
    from retouch import load_change, open_ledger, save_ledger

    folder = tmp_path_factory.mktemp("models") / "carrying"
    save_ledger(open_ledger(base).apply(load_change(change)), folder)
    return folder


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.jsonl"
    rows = [("France", "is Lyon", "is Paris"), ("Italy", "is Milan", "is Rome")]
    lines = [
        {"prompt": PROMPT, "subject": s, "target": t, "truth": o, "neighbors": ["Big Ben is in"]} for s, t, o in rows
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


# edit


def test_edit_saves_a_change_and_says_what_to_do_next(done, base, tmp_path):
    out = tmp_path / "lyon"
    said = done("edit", base, *FACT, *QUICK, "-o", out)
    assert ASKED in said.out
    assert TARGET in said.out
    assert "->" in said.out
    assert f"Saved as {out}" in said.out
    assert f'retouch ask {base} "{ASKED}" --change {out}' in said.out
    assert {p.name for p in out.iterdir()} == {"change.safetensors", "retouch.json", "README.md", "manifest.json"}


def test_edit_json(done, base, tmp_path):
    said = done("edit", base, *FACT, *QUICK, "-o", tmp_path / "lyon", "--max-harm", "0.999", "--json")
    assert set(said.json) == {"change", "id", "method", "warnings", "report"}
    assert (said.json["method"], said.json["warnings"]) == ("ft_m", [])
    assert said.json["change"] == str(tmp_path / "lyon")
    (effect,) = said.json["report"]["effect"]
    assert effect["nll_after"] < effect["nll_before"]
    assert [c["what"] for c in said.json["report"]["harm"]["certificates"]] == [
        "changed answers",
        "nats lost on neutral text",
    ]


@pytest.mark.parametrize("method", [e.name for e in registry.methods("edit")])
def test_every_method_is_a_command(done, base, tmp_path, method):
    name = method.replace("_", "-")
    out = tmp_path / name
    assert f"1 fact by {name}" in done("edit", base, *FACT, "--method", name, "--seed", 1, "-o", out).out
    record = done("show", out, "--json").json
    assert (record["method"], record["settings"]["seed"]) == (method, 1)
    (effect,) = record["report"]["effect"]
    assert effect["nll_after"] < effect["nll_before"]
    assert record["weights"]


def test_what_a_method_warns_of_is_told(done, base, tmp_path):
    said = done("edit", base, *FACT, "--method", "rets", "-o", tmp_path / "a").out
    warned = done("edit", base, *FACT, "--method", "rets", "-o", tmp_path / "b", "--json").json["warnings"]
    assert warned
    assert all(f"note: {warning}" in said for warning in warned)


def test_edit_tells_the_certificates_to_people(done, base, tmp_path):
    out = done("edit", base, *FACT, *QUICK, "-o", tmp_path / "lyon", "--max-harm", "0.999").out
    assert "With 95% confidence the mean of changed answers is at most" in out
    assert "Perplexity on neutral text: x" in out


def test_edit_takes_a_file_of_facts_and_names_the_change_itself(done, base, facts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = done("edit", base, "--facts", facts, *QUICK, "--json").json
    assert said["change"] == f"ft_m-{said['id']}"
    assert (tmp_path / said["change"] / "change.safetensors").is_file()
    assert len(said["report"]["effect"]) == 2


def test_edit_leaves_the_model_folder_alone(done, base, tmp_path):
    before = {p: p.read_bytes() for p in base.iterdir()}
    done("edit", base, *FACT, *QUICK, "-o", tmp_path / "lyon")
    assert {p: p.read_bytes() for p in base.iterdir()} == before


def test_a_filled_prompt_and_a_setting_with_an_equals_sign(done, base, tmp_path):
    filled = ("--prompt", ASKED, "--subject", SUBJECT, "--target", TARGET)
    one = done(
        "edit", base, *filled, "--method", "ft_m", "--n-steps=6", "--learning-rate=1e-2", "-o", tmp_path / "a", "--json"
    )
    two = done("edit", base, *FACT, *QUICK, "-o", tmp_path / "b", "--json")
    assert one.json["id"] == two.json["id"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("--prompt", "The Eiffel Tower is in", "--subject", "Eifel Tower", "--target", "Rome"),
            "subject 'Eifel Tower' is not in the prompt 'The Eiffel Tower is in'. Did you mean 'Eiffel Tower'?",
        ),
        (("--prompt", PROMPT, "--subject", SUBJECT, "--target", ""), "field 'target' is empty."),
        (
            ("--prompt", PROMPT, "--subject", SUBJECT),
            "Name a fact: --prompt, --subject and --target; or a file of them",
        ),
        (("--prompt", PROMPT, "--target", "x"), "has {} but no subject is given"),
        (
            ("--prompt", "a {} and {}", "--subject", "b", "--target", "c"),
            "needs exactly one {} for the subject; it has 2",
        ),
        (("--facts", "f.jsonl", *FACT), "Give either --facts, or --prompt with --subject and --target."),
        (("--facts", "nowhere.jsonl"), "there is no file 'nowhere.jsonl'"),
        ((*FACT, "--method", "memitt"), "No edit method is called 'memitt'. Did you mean 'memit'? Known: "),
        ((*FACT, "--n-stepz", "3"), "Method 'rome' has no setting 'n_stepz'. Did you mean 'n_steps'?"),
        ((*FACT, "--n-steps", "0"), "Method 'rome': n_steps must be int >= 1 and <= 1000; got 0."),
        ((*FACT, "--learning-rate", "fast"), "learning_rate must be float > 0; got 'fast'."),
        ((*FACT, "--metric", "euclid"), "metric must be identity|covariance; got 'euclid'."),
        ((*FACT, "--block", "9"), "this model has blocks 0 to 1; got 9."),
        ((*FACT, "stray"), "'stray' is not a flag. Settings are written as --name value."),
        ((*FACT, "--max-harm", "0"), "--max-harm must lie between 0 and 1; got 0."),
        ((*FACT, "--max-harm", "1.5"), "--max-harm must lie between 0 and 1; got 1.5."),
        ((*FACT, "--max-harm", "nan"), "--max-harm must lie between 0 and 1; got nan."),
        ((*FACT, "--max-harm", "-0.1"), "--max-harm must lie between 0 and 1; got -0.1."),
        ((*FACT, "--max-harm", "0.1", "--confidence", "1"), "--confidence must lie between 0 and 1; got 1."),
        ((*FACT, "--confidence", "0.9"), "--confidence is that of the certificate: it goes with --max-harm."),
        ((*FACT, "--max-harms", "0.1"), "There is no option --max-harms. Did you mean --max-harm?"),
        ((*FACT, "--learning-rate"), "--learning-rate needs a value."),
        (("--facts", "f.jsonl", "--subject", "x"), "Give either --facts, or --prompt with --subject and --target."),
        (("--facts", "f.jsonl", "--truth", "x"), "Give either --facts, or --prompt with --subject and --target."),
        ((*FACT, "--block", "-2"), "block must be int >= -1; got -2."),
        ((*FACT, "--method", "memit", "--blocks", "7"), "memit: blocks must ascend within 0 to 1; got [7]."),
        ((*FACT, "--method", "memit", "--blocks", "1,0"), "memit: blocks must ascend within 0 to 1; got [1, 0]."),
        ((*FACT, "--method", "memit", "--blocks", "-1"), "memit: blocks must ascend within 0 to 1; got [-1]."),
        ((*FACT, "--method", "memit", "--blocks", "first"), "blocks must be "),
        ((*FACT, "--method", "rose", "--blocks", "2"), "rose: blocks must ascend within 0 to 1; got [2]."),
        ((*FACT, "--method", "emmet", "--blocks", "0,1"), "emmet: blocks takes one block; got [0, 1]."),
        ((*FACT, "--method", "rets", "--block", "2"), "rets: this model has blocks 0 to 1; got 2."),
        ((*FACT, "--method", "rets", "--constraints", "no.txt"), "there is no file 'no.txt'"),
        ((*FACT, "--method", "top", "--blocks", "1"), "top: blocks must ascend within 0 to 0"),
        ((*FACT, "--method", "top", "--offset", "5"), "top: offset must lead to a later block of this model (0 to 1)"),
        (
            (*FACT, "--method", "rose", "--integrate", "average"),
            "integrate must be minnorm|mean|sum|joint|tree",
        ),
        ((*FACT, "--method", "alphaedit", "--energy", "2"), "energy must be float > 0 and <= 1; got 2."),
        ((*FACT, "--method", "ft-l", "--max-change", "-1"), "max_change must be float >= 0; got -1."),
        ((*FACT, "--max-drift", "-1"), "max_drift must be float >= 0; got -1."),
        ((*FACT, "--batch", "2", "--png", "c.png"), "--batch, --png: only for edits in sequence."),
        ((*FACT, "--sequence"), "--sequence needs -o FOLDER for the edited model"),
        ((*FACT, "--sequence", "-o", "m", "--max-harm", "0.1"), "its guard is --max-perplexity."),
        ((*FACT, "--sequence", "-o", "m", "--batch", "0"), "need at least 1 fact; got 0"),
        ((*FACT, "--sequence", "-o", "m", "--every", "-1"), "need at least 1 fact; got 10 and -1."),
        ((*FACT, "--sequence", "-o", "m", "--max-perplexity", "1"), "ratio of perplexities above 1, e.g. 1.1; got 1."),
        ((*FACT, "--sequence", "-o", "m", "--max-perplexity", "nan"), "above 1, e.g. 1.1; got nan."),
        (
            (*FACT, "--sequence", "-o", "m", "--html", "no/r.html"),
            "--html no/r.html must be a file in a folder that exi",
        ),
        ((*FACT, "--sequence", "-o", "m", "--png", "."), "--png . must be a file in a folder that exists."),
    ],
)
def test_edit_names_a_mistake_and_writes_nothing(refused, base, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused("edit", base, *words)
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []


def test_a_number_that_is_none_is_named_by_its_flag(retouch, base):
    said = retouch("edit", base, *FACT, "--max-harm", "much")
    assert said.code == 2
    assert "--max-harm" in said.err
    assert "'much' is not a valid float" in said.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "The capital of {}", "subject": ', "facts.jsonl line 2: broken JSON at column"),
        (
            '{"prompt": "Rome is in", "subject": "Milan", "target": "x"}',
            "facts.jsonl line 2: subject 'Milan' is not in",
        ),
        ('{"prompt": "Rome is in", "subject": "Rome"}', "facts.jsonl line 2: field 'target' is missing"),
        ('{"prompt": "Rome is in", "subject": "Rome", "target": 3}', "facts.jsonl line 2: field 'target' must be text"),
    ],
)
def test_a_broken_line_of_a_facts_file_is_named(refused, base, facts, line, says):
    rows = facts.read_text().splitlines()
    facts.write_text("\n".join([rows[0], line, rows[1]]))
    assert says in refused("edit", base, "--facts", facts)


def test_a_method_for_decoders_refuses_an_encoder(refused, bert):
    says = refused("edit", bert, *FACT)
    assert "Method 'rome' edits models that predict the next token" in says
    assert "is a bert encoder. Open a decoder" in says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "facts.json is empty."),
        ("[1, 2]", "facts.json: unknown format. Fields found: none. Known formats:"),
        ('[{"prompt": ', "facts.json: broken JSON at column 13"),
        ('[{"prompt": "Rome is in", "subject": "Rome"}]', "facts.json record 0 (from 0): field 'target' is missing"),
        ('{"place": "Rome"}', "facts.json: unknown format. Fields found: place."),
        (b"\xff\xfe", "facts.json is not UTF-8 text"),
    ],
)
def test_a_file_of_no_facts_is_named(refused, base, tmp_path, text, says):
    path = tmp_path / "facts.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for words in (("edit", base), ("locate", base), ("diagnose", base)):
        assert says in refused(*words, "--facts", path)
    assert says in refused("bench", "edit", "--model", base, "--data", path, "--json", tmp_path / "b.json")


SUBJECTLESS = {"ft_l", "ft_m", "rets"}


@pytest.mark.parametrize("method", [e.name for e in registry.methods("edit")])
def test_a_fact_without_a_subject_is_for_methods_that_need_none(retouch, base, tmp_path, method):
    words = ("--prompt", ASKED, "--target", TARGET, "--method", method, "-o", tmp_path / "c")
    said = retouch("edit", base, *words)
    if method in SUBJECTLESS:
        assert said.code == 0, said.err
    else:
        assert said.code == 2
        assert f"The fact {ASKED!r} has no subject; this method writes at the subject's last token." in said.err
        assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("method", [e.name for e in registry.methods("edit")])
def test_an_encoder_cannot_be_edited(refused, bert, tmp_path, method):
    says = refused("edit", bert, *FACT, "--method", method, "-o", tmp_path / "c")
    assert f"Method {method!r} edits models that predict the next token; {bert} is a bert encoder." in says
    assert "Open a decoder, e.g. smollm2." in says


def test_facts_whose_keys_coincide_are_named_by_emmet(retouch, base, tmp_path):
    rows = [("{} has its capital in", "Lyon"), ("{} is a land of", "kings")]
    lines = [json.dumps({"prompt": p, "subject": "France", "target": a}) for p, a in rows]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    said = retouch("edit", base, "--facts", tmp_path / "facts.jsonl", "--method", "emmet", "-o", tmp_path / "c")
    assert said.code == 1
    assert "France has its capital in and France is a land of share one key: group them by subject" in said.err
    assert "method rose or memit_merge" in said.err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("what", ["file", "folder", "model"])
def test_edit_replaces_nothing_that_is_no_change(refused, base, carrying, tmp_path, what):
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        shutil.copytree(carrying, out)
    assert f"{out} exists and is no change of ours. Name another folder." in refused(
        "edit", base, *FACT, *QUICK, "-o", out
    )
    assert out.read_text() == "mine" if what == "file" else any(out.iterdir())


def test_a_change_may_be_planned_anew_in_its_own_folder(done, base, change, tmp_path):
    out = shutil.copytree(change, tmp_path / "lyon")
    other = done(
        "edit", base, *FACT, "--method", "ft-m", "--n-steps", "3", "--learning-rate", "0.01", "-o", out, "--json"
    )
    assert (
        done("show", out, "--json").json["id"]
        == other.json["id"]
        != json.loads((change / "retouch.json").read_text())["id"]
    )


def test_a_refusal_has_its_own_exit_code_and_saves_nothing(refused, base, tmp_path):
    says = refused("edit", base, *FACT, *QUICK, "-o", tmp_path / "lyon", "--max-harm", "0.001", code=3)
    assert "above the limit of 0.001" in says
    assert "The change is refused." in says
    assert not (tmp_path / "lyon").exists()


def test_a_limit_that_no_step_keeps_is_refused_too(refused, base, tmp_path):
    quick = ("--method", "rome", "--n-steps", "3", "--contexts", "plain", "--n-bystanders", "2")
    says = refused("edit", base, *FACT, *quick, "-o", tmp_path / "lyon", "--max-harm", "1e-9", code=3)
    assert "No step of the search for 'is Lyon'" in says and "the limit of max_harm" in says
    assert not (tmp_path / "lyon").exists()


def test_nothing_is_written_inside_a_saved_folder(refused, carrying, change, facts, monkeypatch):
    before = sorted(carrying.rglob("*"))
    for words in (
        ("apply", "no-such-model", change, "-o", carrying / "sub"),  # refused before the model is opened
        ("edit", "no-such-model", *FACT, "-o", carrying / "sub"),
        ("edit", "no-such-model", *FACT, "--sequence", "-o", carrying / "ledger" / "sub"),
        ("undo", "no-such-model", 1, "-o", change / "sub"),
        ("bench", "edit", "--data", facts, "--model", "no-such-model", "--json", carrying / "b.json"),
        ("locate", "no-such-model", *FACT, "--report", carrying / "page.html"),
        ("demo", "--model", "no-such-model", "-o", carrying),
    ):
        assert "that Retouch saved and that must stay as it is. Choose a place outside" in refused(*words)
    monkeypatch.chdir(carrying)  # where a change without -o would be saved
    assert f"lies inside {carrying}" in refused("edit", "no-such-model", *FACT)
    assert sorted(carrying.rglob("*")) == before
    assert not (change / "sub").exists()


def test_what_several_steps_warn_of_is_told_once(done, base, tmp_path):
    fact = ("--prompt", "The capital of France", "--target", "is Lyon")
    said = done("edit", base, *fact, "--method", "rets", "--n-steps", "4", "-o", tmp_path / "a", "--max-harm", "0.999")
    assert said.err.count("Facts without a subject add general prompts only.") == 1
    again = done("edit", base, *fact, "--method", "rets", "--n-steps", "4", "-o", tmp_path / "a")
    assert again.err.count("Facts without a subject add general prompts only.") == 1  # the next command tells it, too


# Models that cannot be opened


def test_an_unknown_model_is_named(refused):
    says = refused("edit", "no-such-model", *FACT)
    assert (
        "No model 'no-such-model': it is no folder, no .gguf file and no bundled name (smollm2, gemma3-270m, minilm)"
        in says
    )
    assert "There is no model folder './nowhere'" in refused("ask", "./nowhere", "x")
    assert "There is no file 'no.gguf'" in refused("ask", "no.gguf", "x")


def test_weights_that_are_not_finite_are_refused(refused, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "nan")
    tensors = weights(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert f"{name} holds 1 values that are not finite. The file is damaged." in refused("edit", folder, *FACT)


def test_a_pickled_model_is_never_read(refused, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(Vtouch " + os.fsencode(trap) + b"\ntR.")
    says = refused("ask", folder, "x")
    assert "only pickled weights (pytorch_model.bin), which can run code when read" in says
    assert not trap.exists()


def test_a_family_that_is_not_described_is_refused(refused, tiny, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "mixture")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mixtral", "num_local_experts": 4}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MixtralForCausalLM"]}))
    says = refused("edit", folder, *FACT)
    assert "No table describes the model family 'mixtral'. Described: " in says
    assert "To describe it, copy the nearest table" in says and "Did you mean" not in says


def test_a_folder_without_a_model_says_so(refused, tmp_path):
    assert "the folder has no config.json" in refused("ask", tmp_path, "x")


# apply, log, undo


def test_apply_log_and_undo_bring_the_unchanged_weights_back(done, base, change, tmp_path):
    out = tmp_path / "model"
    said = done("apply", base, change, "-o", out)
    assert f"{out} carries 1 change (the new one is number 1)." in said.out
    assert f"Undo it: retouch undo {out} 1" in said.out
    assert not equal(weights(out), weights(base))
    lines = done("log", out).out
    assert "Changes of" in lines
    assert "active" in lines
    said = done("undo", out, "1")
    assert "Change 1 is out of" in said.out
    assert "the weights are the unchanged model's again, bit for bit" in said.out
    assert equal(weights(out), weights(base))
    assert "undone" in done("log", out).out


def test_apply_log_and_undo_for_programs(done, base, change, carrying, tmp_path):
    applied = done("apply", base, change, "-o", tmp_path / "m", "--json").json
    listed = done("log", tmp_path / "m", "--json").json
    assert applied["lost"] == {}
    assert applied["changes"] == listed["changes"]
    (entry,) = listed["changes"]
    assert {"number", "id", "method", "facts", "status", "when"} == set(entry)
    assert (entry["number"], entry["method"], entry["status"]) == (1, "ft_m", "active")
    undone = done("undo", tmp_path / "m", "1", "-o", tmp_path / "other", "--json").json
    assert undone["model"] == str(tmp_path / "other")
    assert undone["changes"][0]["status"] == "undone"
    assert equal(weights(tmp_path / "other"), weights(base))
    assert equal(weights(tmp_path / "m"), weights(carrying))  # the first folder stays


def test_the_first_of_two_changes_can_be_undone(done, base, change, carrying, tmp_path):
    more = ("--prompt", "The currency of {}", "--subject", "Japan", "--target", "is the pound")
    done("edit", carrying, *more, *QUICK, "-o", tmp_path / "pound")
    done("apply", carrying, tmp_path / "pound", "-o", tmp_path / "both")
    assert [c["number"] for c in done("log", tmp_path / "both", "--json").json["changes"]] == [1, 2]
    done("undo", tmp_path / "both", "1")
    done("undo", tmp_path / "both", "2")
    assert equal(weights(tmp_path / "both"), weights(base))


@pytest.fixture(scope="module")
def batched(base, tmp_path_factory):
    """A model with two changes of two facts each."""
    from retouch import open_ledger, save_ledger
    from retouch.edit.facts import Fact
    from retouch.edit.rome import Rome

    method = Rome(block=1, n_steps=3, contexts=("",))
    ledger = open_ledger(base)
    for places in ((("France", "is Lyon"), ("Italy", "is Milan")), (("Japan", "is Kobe"), ("Peru", "is Cusco"))):
        facts = [Fact(PROMPT, land, city) for land, city in places]
        ledger = ledger.apply(method.plan(ledger.model, facts))
    save_ledger(ledger, folder := tmp_path_factory.mktemp("models") / "batched")
    return folder


def test_one_fact_of_a_change_is_undone_and_listed(done, refused, base, batched, tmp_path):
    folder = shutil.copytree(batched, tmp_path / "m")
    assert f"Fact 1 of change 1 is out of {folder}; 2 stay." in done("undo", folder, 1, "--fact", 1).out
    first, second = done("log", folder, "--json").json["changes"]
    assert (first["status"], len(first["facts"]), first["removed"][0]["fact"]) == ("active", 1, 1)
    assert (second["status"], len(second["facts"])) == ("active", 2)
    assert "1 of 2" in done("log", folder).out
    lines = [line.replace("│", "").split() for line in done("log", folder, "--facts").out.splitlines()]
    assert [(x[0], x[1], x[-1]) for x in lines if x[:1] in (["1"], ["2"])] == [
        ("1", "0", "active"),
        ("1", "1", "undone"),
        ("2", "0", "active"),
        ("2", "1", "active"),
    ]
    assert "has no fact 1 in force. In force: 0." in refused("undo", folder, 1, "--fact", 1)
    for words in ((1,), (2, "--fact", 0), (2, "--fact", 1)):
        done("undo", folder, *words)
    assert equal(weights(folder), weights(base))


def test_undo_solves_the_later_changes_again_when_asked(done, refused, base, batched, carrying, tmp_path):
    plain = done("undo", batched, 1, "-o", tmp_path / "plain", "--json").json
    again = done("undo", batched, 1, "--resolve", "-o", tmp_path / "again", "--json").json
    assert plain["changes"][1]["id"] != again["changes"][1]["id"] == done("log", tmp_path / "again", "--json").json[
        "changes"
    ][1]["id"]  # fmt: skip
    assert again["changes"][1]["planned"] == plain["changes"][1]["id"]
    assert not equal(weights(tmp_path / "plain"), weights(tmp_path / "again"))
    done("undo", tmp_path / "again", 2)
    assert equal(weights(tmp_path / "again"), weights(base))


def test_a_fact_that_is_edited_again_is_shown_as_superseded(done, refused, base, change, carrying, tmp_path):
    plan(carrying, tmp_path / "second", learning_rate=0.02)
    done("apply", carrying, tmp_path / "second", "-o", tmp_path / "both")
    assert "superseded, below a later one" in done("log", tmp_path / "both").out
    first, second = done("log", tmp_path / "both", "--json").json["changes"]
    assert (first["status"], first["in_force"], second["status"]) == ("superseded", True, "active")
    done("apply", carrying, tmp_path / "second", "--superseded", "replace", "-o", tmp_path / "one")
    first, second = done("log", tmp_path / "one", "--json").json["changes"]
    assert (first["status"], "in_force" in first, second["status"]) == ("superseded", False, "active")
    done("undo", tmp_path / "one", 2)
    assert equal(weights(tmp_path / "one"), weights(base))
    says = refused("apply", carrying, tmp_path / "second", "--superseded", "merge", "-o", tmp_path / "x")
    assert "--superseded is replace or stack; got 'merge'" in says


def sequence_of(facts, base, out, **more):
    from retouch.cli.sequence import sequence_command
    from retouch.edit.ft_m import FtM

    method = FtM(block=1, n_steps=5, learning_rate=0.1)
    sequence_command(str(base), facts, method, **{"batch": 2, "out": out, "max_perplexity": 1e9} | more)


def test_a_sequence_writes_a_model_a_report_and_a_picture(base, capsys, tmp_path):
    from retouch.edit.facts import Fact
    from retouch.errors import BoundRefused, UserError

    facts = [Fact(PROMPT, land, f"is {land} Town", "is Paris") for land in ("France", "Italy", "Japan", "France")]
    sequence_of(facts, base, tmp_path / "m", html=tmp_path / "r.html", png=tmp_path / "c.png")
    said = capsys.readouterr().out
    assert "4 edits by ft_m, 2 at a time" in said and "1 facts were superseded" in said
    assert "<svg" in (tmp_path / "r.html").read_text() and (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"
    sequence_of(facts, base, tmp_path / "n", json_=True)
    record = json.loads(capsys.readouterr().out)
    assert (record["n_edits"], record["n_superseded"], record["changes"]) == (4, 1, 1)
    worst = max(p["perplexity_ratio"] for p in record["points"])
    with pytest.raises(BoundRefused, match=r"(0|2) edits stand"):
        sequence_of(facts, base, tmp_path / "o", max_perplexity=(1 + worst) / 2, html=tmp_path / "s.html")
    assert (tmp_path / "o" / "retouch.json").is_file() and (tmp_path / "s.html").is_file()
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="exists and is no model of ours"):
        sequence_of(facts, base, tmp_path / "taken")


def test_edit_in_sequence_by_the_command_line(done, retouch, base, facts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("edit", base, "--facts", facts, *QUICK, "--sequence", "--batch", 1, "--every", 1)
    said = done(*words, "--max-perplexity", 100, "-o", "m", "--html", "r.html", "--png", "c.png")
    assert "2 edits by ft_m, 1 at a time" in said.out
    assert "Saved as m: 2 changes. See: retouch log m" in said.out
    assert "<svg" in Path("r.html").read_text()
    assert Path("c.png").read_bytes()[1:4] == b"PNG"
    assert [c["status"] for c in done("log", "m", "--json").json["changes"]] == ["active", "active"]
    record = done(*words, "--max-perplexity", 100, "-o", "n", "--json").json
    assert (record["model"], record["n_edits"], record["changes"]) == ("n", 2, 2)
    assert [p["n_edits"] for p in record["points"]] == [1, 2]
    assert equal(weights(Path("m")), weights(Path("n")))
    done("undo", "m", 2)
    done("undo", "m", 1)
    assert equal(weights(Path("m")), weights(base))


def test_a_sequence_stops_at_its_bound_with_exit_code_3(retouch, refused, base, facts, tmp_path):
    words = ("edit", base, "--facts", facts, "--method", "ft-m", "--n-steps", 20, "--learning-rate", 0.3, "--sequence")
    says = refused(*words, "--batch", 1, "--max-perplexity", 1.0001, "-o", tmp_path / "m", code=3)
    assert "so the last batch was not kept: 0 edits stand." in says
    assert f"The model with those is in {tmp_path / 'm'}." in says
    assert equal(weights(tmp_path / "m"), weights(base))


def test_a_sequence_replaces_nothing_that_is_no_model_of_ours(refused, base, facts, tmp_path):
    (tmp_path / "mine").mkdir()
    says = refused("edit", base, "--facts", facts, "--sequence", "-o", tmp_path / "mine")
    assert f"{tmp_path / 'mine'} exists and is no model of ours. Name another folder." in says


def test_a_sequence_replaces_no_model_that_carries_other_facts(done, refused, base, facts, tmp_path):
    words = ("--facts", facts, *QUICK, "--sequence", "--max-perplexity", 100, "-o", tmp_path / "m")
    done("edit", base, *words)
    before = weights(tmp_path / "m")
    other = (
        "--prompt",
        PROMPT,
        "--subject",
        "Peru",
        "--target",
        "is Cusco",
        *QUICK,
        "--sequence",
        "-o",
        tmp_path / "m",
    )
    says = refused("edit", "no-such-model", *other)
    assert "carries changes that no-such-model does not, and they would be lost: " in says
    assert equal(weights(tmp_path / "m"), before)
    done("edit", base, *words)  # the same facts again
    done("edit", tmp_path / "m", *other, "--max-perplexity", 100)  # the facts that are there stay
    assert [c["facts"][0]["subject"] for c in done("log", tmp_path / "m", "--json").json["changes"]] == [
        "France",
        "Peru",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("edit", "{}", "--prompt", "It is", "--target", "x"), "has no subject"),
        (("edit", "{}", *FACT, "--sequence", "-o", "m", "--batch", "0"), "need at least 1 fact; got 0"),
        (("edit", "{}", *FACT, "--sequence", "-o", "m", "--max-perplexity", "1"), "above 1, e.g. 1.1; got 1."),
        (("locate", "{}", *FACT, "--part", "head"), "part must be one of mlp, attention, state; got 'head'."),
        (("diagnose", "{}", *FACT, "--what", "speed"), "There is no diagnostic 'speed'."),
        (("demo", "--model", "{}", "--max-harm", "0"), "limit"),
        (("demo", "--model", "{}", "-o", "taken"), "taken/model exists and is no model of ours."),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_opened(refused, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "model").mkdir(parents=True)
    assert says in refused(*("no-such-model" if word == "{}" else word for word in words))


def test_a_list_of_attributes_may_begin_with_a_byte_order_mark(tmp_path):
    from retouch.cli.locate import _words

    (tmp_path / "cities.txt").write_text("Paris\nLyon\n", encoding="utf-8-sig")
    assert _words(tmp_path / "cities.txt") == ["Paris", "Lyon"]


def test_a_model_without_changes_has_an_empty_log(done, base):
    assert "No changes." in done("log", base).out
    assert done("log", base, "--json").json == {"base": None, "changes": []}


def test_the_edited_folder_opens_with_plain_transformers(carrying, change):
    from retouch import apply, load_change, open_model

    network = transformers.AutoModelForCausalLM.from_pretrained(carrying)
    words = transformers.AutoTokenizer.from_pretrained(carrying)
    ids = words(ASKED, return_tensors="pt")["input_ids"]
    model = open_model(carrying)
    with torch.no_grad():
        torch.testing.assert_close(network(input_ids=ids).logits, model.network(input_ids=ids).logits)
    assert apply and load_change(change).id == json.loads((carrying / "retouch.json").read_text())["changes"][0]["id"]


@pytest.mark.parametrize(
    ("number", "says"), [(7, "does not exist. Active: 1."), (0, "does not exist"), (-1, "does not exist")]
)
def test_a_number_that_is_not_in_the_log(refused, carrying, number, says):
    assert f"Change number {number} {says}" in refused("undo", carrying, "--", number)


def test_what_is_undone_cannot_be_undone_again(done, refused, carrying, tmp_path):
    folder = shutil.copytree(carrying, tmp_path / "m")
    done("undo", folder, 1)
    assert "Change number 1 was undone already. Active: none." in refused("undo", folder, 1)


def test_undo_and_log_of_what_carries_nothing(refused, base, change, tmp_path):
    assert "Change number 1 does not exist. Active: none." in refused("undo", base, 1, "-o", tmp_path / "m")
    for command in (("log",), ("undo", "1")):
        name, *number = command
        assert "There is no model folder" in refused(name, tmp_path / "nowhere", *number)
        assert "holds no model of ours (kind 'change')" in refused(name, change, *number)
    assert "There is no model folder 'smollm2'" in refused("undo", "smollm2", 1)


def test_what_is_no_change_is_named(refused, base, facts, tmp_path):
    (tmp_path / "empty").mkdir()
    for what, says in ((tmp_path / "empty", "has no manifest.json"), (facts, "is a file; a folder that Retouch saved")):
        assert says in refused("show", what)
        assert says in refused("apply", base, what, "-o", tmp_path / "m")
        assert says in refused("ask", base, "x", "--change", what)
        assert says in refused("diagnose", base, "--facts", facts, "--change", what)
    assert not (tmp_path / "m").exists()


def test_changes_that_a_folder_carries_are_not_dropped(refused, done, base, carrying, tmp_path):
    other = plan(base, tmp_path / "other", learning_rate=0.02)
    shutil.copytree(carrying, folder := tmp_path / "model")
    says = refused("apply", base, other, "-o", folder)
    assert "carries changes" in says and "would be lost" in says and f"retouch apply {folder}" in says
    before = done("log", folder, "--json").json
    done("apply", folder, other, "-o", folder)
    assert len(done("log", folder, "--json").json["changes"]) == len(before["changes"]) + 1


def test_show_tells_what_was_measured_and_edit_what_is_unsure(done, base, change, tmp_path):
    assert "probability before" in done("show", change).out
    quick = ("--method", "ft-m", "--n-steps", "1", "--learning-rate", "0.0001")
    said = done("edit", base, *FACT, *quick, "-o", out := tmp_path / "a change")
    assert "note: 1 of 1 new answer stayed below a probability of 0.5" in said.out
    assert f'--change "{out}"' in said.out


def test_a_slip_is_told_at_once_and_once(refused, retouch):
    assert "Did you mean 'smollm2'?" in refused("ask", "smolm2", "x")
    assert retouch("edti").err.count("Did you mean 'edit'?") == 1
    said = retouch("--version")
    assert (said.code, said.out) == (0, f"retouch {__version__}\n")


def test_what_is_no_model_is_named(refused, base, facts, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no model: it has no config.json" in refused("log", tmp_path / "empty")
    assert "is a file of another kind" in refused("ask", facts, "x")
    assert "more than" in refused("ask", base, "x", "--n-tokens", 100_000)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(refused, base, change, facts):
    assert "cannot be written" in refused("edit", base, *FACT, "-o", facts / "out")
    assert "cannot be written" in refused("apply", base, change, "-o", facts / "out")


def test_a_change_is_applied_once(refused, carrying, change, tmp_path):
    says = refused("apply", carrying, change, "-o", tmp_path / "m")
    assert "is in force already, as number 1" in says


def test_a_change_of_another_model_is_refused(refused, tiny, change, tmp_path, capsys):
    other = saved(tiny, tmp_path / "other", seed=1)
    wide = saved(tiny, tmp_path / "wide", intermediate_size=48)
    capsys.readouterr()  # transformers draws a bar while it saves
    says = refused("apply", other, change, "-o", tmp_path / "m")
    assert "This change was planned for model" in says
    assert "Open the model it was planned for, or plan it anew." in says
    assert "32x64 at blocks.1.mlp.down" in refused("ask", wide, "x", "--change", change)
    assert not (tmp_path / "m").exists()


def truncate(folder):
    path = folder / "change.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder):
    path = folder / "change.safetensors"
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def lose(folder):
    (folder / "change.safetensors").unlink()


def rewrite(folder):
    path = folder / "retouch.json"
    path.write_text(path.read_text().replace("is Lyon", "is Nice"))


@pytest.mark.parametrize("damage", [truncate, flip, lose, rewrite])
def test_a_damaged_change_is_refused_by_every_command(refused, base, change, tmp_path, damage):
    folder = shutil.copytree(change, tmp_path / "lyon")
    damage(folder)
    for words in (
        ("apply", base, folder, "-o", tmp_path / "m"),
        ("show", folder),
        ("ask", base, "x", "--change", folder),
    ):
        says = refused(*words)
        assert "lyon" in says
        assert ("retouch.json" if damage is rewrite else "change.safetensors") in says
    assert not (tmp_path / "m").exists()


def test_there_is_no_such_change(refused, base, tmp_path):
    assert "nowhere" in refused("apply", base, tmp_path / "nowhere", "-o", tmp_path / "m")


# Types that swallow a change


def test_bfloat16_refuses_to_lose_the_change_and_says_how_much(refused, done, half, tmp_path):
    lyon = plan(half, tmp_path / "lyon", 0.001)
    out = tmp_path / "m"
    says = refused("apply", half, lyon, "-o", out, code=1)
    assert "Stored as bfloat16, blocks.1.mlp.down would lose" in says
    assert "% of its change. Store float32 (--dtype float32)" in says
    assert not out.exists()

    done("apply", half, lyon, "-o", out, "--dtype", "float32")
    assert {t.dtype for t in weights(out).values()} == {torch.float32}
    said = done("apply", half, lyon, "-o", tmp_path / "lossy", "--accept-loss")
    assert "the stored type loses" in said.out
    assert {t.dtype for t in weights(tmp_path / "lossy").values()} == {torch.bfloat16}
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lossy")
    assert network.dtype == torch.bfloat16
    done("undo", tmp_path / "lossy", 1)
    assert equal(weights(tmp_path / "lossy"), weights(half))


def test_a_type_that_is_none_is_named(refused, base, change, tmp_path):
    says = refused("apply", base, change, "-o", tmp_path / "m", "--dtype", "int8")
    assert "weights can be stored as float32; got 'int8'" in says
    assert not (tmp_path / "m").exists()


# show, diff, ask


def test_show_tells_people_and_programs_what_a_change_holds(done, change):
    out = done("show", change).out
    for text in (ASKED, TARGET, "blocks.1.mlp.down", "learning_rate", "by ft_m"):
        assert text in out
    record = done("show", change, "--json").json
    assert {"id", "method", "base", "settings", "facts", "weights", "numbers", "report"} == set(record)
    assert record["facts"][0]["target"] == TARGET
    assert record["weights"]["blocks.1.mlp.down"]["frobenius"] > 0


def test_show_tells_the_certificate(done, base, tmp_path):
    done("edit", base, *FACT, *QUICK, "-o", tmp_path / "lyon", "--max-harm", "0.999")
    assert "Certified changed answers: at most" in done("show", tmp_path / "lyon").out


def test_show_of_a_model_says_that_it_is_no_change(refused, carrying):
    assert "is no change of format 1 (kind 'model'" in refused("show", carrying)


def test_diff_names_the_weight_that_differs(done, base, carrying):
    assert "1 weight differs" in done("diff", base, carrying).out
    (row,) = done("diff", base, carrying, "--json").json["weights"]
    name = "model.layers.1.mlp.down_proj.weight"
    delta = (weights(carrying)[name] - weights(base)[name]).double()
    assert row["weight"] == name
    assert row["frobenius"] == pytest.approx(float(delta.norm()))
    assert row["largest"] == pytest.approx(float(delta.abs().max()))
    assert "Every weight is equal, bit for bit." in done("diff", base, base).out


def test_diff_of_two_shapes_is_refused(refused, base, bert):
    assert "are not of one shape, so their weights cannot be compared." in refused("diff", base, bert)


def test_ask_answers_before_and_after(done, base, change, carrying):
    plain = done("ask", base, ASKED, "--n-tokens", 5, "--json").json
    both = done("ask", base, ASKED, "--n-tokens", 5, "--change", change, "--json").json
    after = done("ask", carrying, ASKED, "--n-tokens", 5, "--json").json
    assert plain == {"text": ASKED, "answer": both["before"]}
    assert both["after"] == after["answer"] != both["before"]
    out = done("ask", base, ASKED, "--n-tokens", 5, "--change", change).out
    assert "before" in out
    assert "after" in out


def test_a_text_with_brackets_is_shown_as_it_is(done, base, change):
    out = done("ask", base, "[/b] [red]x", "--n-tokens", 2, "--change", change).out
    assert out.startswith("[/b]")
    assert "[red]x" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [(("",), "An empty text cannot be continued"), (("x", "--n-tokens", "0"), "n_tokens must be at least 1")],
)
def test_ask_needs_a_text_and_a_length(refused, base, words, says):
    assert says in refused("ask", base, *words)


# locate, diagnose


@pytest.mark.parametrize("command", ["locate", "diagnose"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "Name a fact: --prompt, --subject and --target; or a file of them: --facts."),
        (("--prompt", PROMPT, "--target", "x"), "Name a fact: --prompt, --subject and --target"),
        (("--facts", "f.jsonl", "--subject", "x"), "Give either --facts, or --prompt"),
        ((*FACT, "--n", "3"), "--n counts the facts of a file: it goes with --facts."),
        (("--facts", "nowhere.jsonl"), "there is no file 'nowhere.jsonl'"),
        (("--prompt", "Rome is in", "--subject", "Milan", "--target", "x"), "subject 'Milan' is not in the prompt"),
        ((*FACT, "--samples", "0"), "--samples must be at least 1; got 0."),
        ((*FACT, "--report", "no/page.html"), "--report no/page.html must be a file in a folder that exists."),
    ],
)
def test_locate_and_diagnose_name_a_mistake(refused, base, command, words, says):
    assert says in refused(command, base, *words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("locate", "--window", "0"), "--window must be at least 1; got 0."),
        (("locate", "--part", "head"), "part must be one of mlp, attention, state; got 'head'."),
        (("locate", "--attributes", "no.txt"), "--attributes no.txt cannot be read"),
        (("diagnose", "--what", " , "), "--what names no diagnostic. Give some of drift, delivery"),
        (("diagnose", "--what", "drift,speed"), "There is no diagnostic 'speed'. Known: drift"),
        (("diagnose", "--block", "9"), "block: this model has blocks 0 to 1; got 9."),
        (("diagnose", "--block", "-7"), "--block must be a block, counted from 0, or -1; got -7."),
    ],
)
def test_a_wrong_option_of_locate_and_diagnose(refused, base, words, says):
    command, *more = words
    assert says in refused(command, base, *FACT, *more)


def test_locate_and_diagnose_of_an_encoder(refused, bert):
    for command in ("locate", "diagnose"):
        assert "edits models that predict the next token" in refused(command, bert, *FACT)


def test_locate_and_diagnose_for_programs_and_people(done, base, change):
    found = done("locate", base, *FACT, "--samples", 1, "--json").json
    known = {"model", "causal_trace", "attribute_rate", "no_attribute_rate", "knock_outs", "left_out"}
    assert known == set(found)
    told = done("diagnose", base, *FACT, "--change", change, "--what", "drift", "--json").json
    assert (told["method"], told["block"]) == ("ft_m", 1)
    assert "Diagnosis of" in done("diagnose", base, *FACT, "--what", "drift").out


def test_an_encoder_cannot_be_asked(refused, bert):
    assert "is a bert encoder without a next token to predict" in refused("ask", bert, "x")


# methods, doctor


def test_methods_lists_all_of_them_and_one_with_its_settings(done):
    names = {e.name for e in registry.methods("edit")}
    every = {(e.verb, e.name) for verb in registry.BASES for e in registry.methods(verb)}
    assert {(row["verb"], row["name"]) for row in done("methods", "--json").json} == every
    assert {row["name"] for row in done("methods", "edit", "--json").json} == names
    text = done("methods").out
    assert all(name in text for name in names)
    one = done("methods", "edit", "ft-m", "--json").json
    assert one["name"] == "ft_m"
    flags = {s["flag"]: s for s in one["settings"]}
    assert flags["--learning-rate"]["default"] == 0.0005
    assert flags["--learning-rate"]["allowed"] == "> 0"
    assert "--learning-rate" in done("methods", "edit", "ft-m").out


def test_methods_names_what_is_unknown(refused):
    assert "No verb is called 'edti'. Did you mean 'edit'?" in refused("methods", "edti")
    assert "No edit method is called 'romee'. Did you mean 'rome'?" in refused("methods", "edit", "romee")
    assert "'memit-merge' is a method of edit. See: retouch methods edit memit-merge" in refused(
        "methods", "memit-merge"
    )


def test_doctor(done):
    found = done("doctor", "--json").json
    text = json.dumps(found)
    assert __version__ in text
    assert torch.__version__ in text
    assert all(title in done("doctor").out for title in found)


# bench


def test_bench_writes_its_file_and_shows_a_table(done, base, facts, tmp_path):
    out = tmp_path / "bench.json"
    words = ("--data", facts, "--model", base, "--n", 2, "--generations", 0, "--json", out)
    said = done("bench", "edit", *words, "--methods", "ft-m:n_steps=3:learning_rate=0.01")
    assert "2 facts of facts.jsonl" in said.out
    assert "efficacy" in said.out
    assert f"Saved as {out}" in said.out
    read = json.loads(out.read_text())
    assert (read["verb"], read["n"], read["data"], read["model"]) == ("edit", 2, "facts.jsonl", str(base))
    assert list(read["methods"]) == ["ft-m:n_steps=3:learning_rate=0.01"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--methods", "memitt"), "No edit method is called 'memitt'. Did you mean 'memit'?"),
        (("--methods", "rome:n_steps=0"), "n_steps must be int >= 1"),
        (("--n", "0"), "--n and --batch must be at least 1"),
        (("--batch", "0"), "--n and --batch must be at least 1"),
        (("--generations", "-1"), "--generations at least 0"),
        (("--chunk", "-1"), "--chunk at least 0"),
        (("--suite", "counter"), "No suite is called 'counter'"),
        (("--suite", "same-subject"), "drawn from the data sets: give their folder"),
        (("--group-size", "0"), "--group-size must be at least 1"),
        (("--methods", ""), "No method was named. See: retouch methods edit"),
        (("--methods", "rome:block"), "--block needs a value."),
        (("--methods", "rome:block=9"), "rome: this model has blocks 0 to 1; got 9."),
    ],
)
def test_bench_names_a_mistake(refused, base, facts, tmp_path, words, says):
    out = tmp_path / "bench.json"
    assert says in refused("bench", "edit", "--data", facts, "--model", base, "--json", out, *words)
    assert not out.exists()


def test_bench_asks_in_conversations_and_keeps_rows_when_told(done, base, facts, tmp_path):
    out = tmp_path / "bench.json"
    words = ("--data", facts, "--model", base, "--n", 2, "--generations", 0, "--json", out, "--instructions", "--rows")
    said = done("bench", "edit", *words, "--chunk", 1, "--methods", "ft-m:n_steps=3:learning_rate=0.01")
    assert "instruction" in said.out
    assert "gap" in said.out
    read = json.loads(out.read_text())
    assert read["environment"]["chunk"] == 1
    assert {"instruction", "instruction_dialogue", "gap"} <= set(read["methods"]["ft-m:n_steps=3:learning_rate=0.01"])
    assert len(json.loads((tmp_path / "bench.rows.json").read_text())) == 2


def test_bench_of_a_sequence_shows_what_was_measured_last(done, base, facts, tmp_path):
    out = tmp_path / "bench.json"
    words = ("--suite", "sequential", "--data", facts, "--model", base, "--n", 2, "--batch", 1, "--json", out)
    said = done("bench", "edit", *words, "--methods", "ft-m:n_steps=3:learning_rate=0.01")
    assert "2 facts of sequential/facts.jsonl" in said.out
    assert json.loads(out.read_text())["curves"]


def test_bench_of_a_sequence_refuses_what_it_would_not_do(refused, base, facts, tmp_path):
    words = ("--suite", "sequential", "--data", facts, "--model", base, "--json", tmp_path / "b.json")
    assert "--instructions, --rows: a sequence" in refused("bench", "edit", *words, "--rows", "--no-instructions")
    assert "--chunk: a sequence" in refused("bench", "edit", *words, "--chunk", 4)


def test_bench_without_facts_or_suite(refused, base, tmp_path):
    says = refused("bench", "edit", "--model", base, "--json", tmp_path / "b.json")
    assert "Name a file of facts with --data, or a suite with --suite" in says


def test_bench_names_what_would_fail_late_before_it_opens_a_model(refused, facts, tmp_path, monkeypatch):
    monkeypatch.delenv("RETOUCH_DATA", raising=False)
    words = ("bench", "edit", "--model", "no-such-model")
    out = ("--json", tmp_path / "b.json")
    folder = ("--suite", "same-subject", "--data", tmp_path)
    assert "is a folder, and the result is a file" in refused(*words, "--data", facts, "--json", tmp_path)
    assert "--group-size must be 1, 2, 4, 8; got 3." in refused(*words, *folder, "--group-size", 3, *out)
    assert "there is no file" in refused(*words, "--data", tmp_path / "no.jsonl", *out)
    assert "no folder is named. Set RETOUCH_DATA or give --data." in refused(*words, "--suite", "zsre", *out)


def test_bench_of_a_suite_whose_data_is_not_there(refused, base, tmp_path):
    for suite in ("counterfact", "same-subject", "knowedit", "zsre", "sequential"):
        says = refused("bench", "edit", "--model", base, "--suite", suite, "--data", tmp_path, "--json", tmp_path / "b")
        assert "there is no " in says


def test_bench_of_facts_that_are_not_there(refused, base, tmp_path):
    assert "there is no file" in refused("bench", "edit", "--data", tmp_path / "no.jsonl", "--model", base)


def test_bench_of_facts_that_the_model_does_not_know(refused, base, tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps({"prompt": PROMPT, "subject": SUBJECT, "target": TARGET}))
    says = refused("bench", "edit", "--data", path, "--model", base, "--known", "--json", tmp_path / "b.json")
    assert "There are no facts to measure on." in says
    assert "none of 1 is, and 1 have no true answer" in says


# The frame


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("edti",), "No such command 'edti'"),
        (("apply", "x"), "Missing argument 'CHANGE'"),
        (("apply", "x", "y"), "Missing option '-o'"),
        (("ask", "x", "y", "--nonsense"), "No such option"),
        (("undo", "x", "first"), "'first' is not a valid int"),
        (("bench",), "Usage"),
    ],
)
def test_a_command_that_is_misspelt_exits_with_2(retouch, words, says):
    said = retouch(*words)
    assert said.code == 2
    assert says in said.out + said.err


def test_our_own_fault_is_called_that(refused, base, monkeypatch):
    from retouch import ledger

    def broken(_):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(ledger, "open_ledger", broken)
    says = refused("ask", base, "x", code=1)
    assert "ZeroDivisionError: by nothing" in says
    assert "This is a fault of Retouch. RETOUCH_DEBUG=1 shows where it happened." in says


def test_progress_goes_to_stderr_as_lines_with_the_time_left(capsys, monkeypatch):
    from retouch.cli import _show

    monkeypatch.setattr(_show._Lines.__init__, "__defaults__", (0.0,))
    with _show.progress():
        report("Work", 0, 4)
        report("Work", 1, 4)
        report("Other", 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "Work: 0 of 4"
    assert err.splitlines()[1].startswith("Work: 1 of 4, ")
    assert err.splitlines()[1].endswith(" s left")
    assert err.splitlines()[2] == "Other: 2"


def test_the_time_left_is_that_of_this_work_also_when_it_goes_on_or_comes_again(capsys, monkeypatch):
    from retouch.cli import _show

    clock = iter([0, 0, 5, 10, 100, 103])
    monkeypatch.setattr(_show, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lines = _show._Lines(every_s=0.0)
    for done, total in ((10, 20), (15, 20), (20, 20), (0, 2), (1, 2)):
        lines("Work", done, total)
    assert capsys.readouterr().err.splitlines() == [
        "Work: 10 of 20", "Work: 15 of 20, 5 s left", "Work: 20 of 20, 0 s left", "Work: 0 of 2", "Work: 1 of 2, 3 s left",
    ]  # fmt: skip


# Other processes


def process(code, *words, **more):
    source = str(Path(__file__).parents[2] / "src")
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **more,
    )


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom retouch.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n"
        "    print(end.code, [m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    )
    with process(code, "--help") as running:
        out, err = running.communicate(timeout=60)
    assert out.splitlines()[-1] == "0 []", err
    known = (
        "edit",
        "apply",
        "undo",
        "log",
        "show",
        "diff",
        "ask",
        "locate",
        "diagnose",
        "methods",
        "doctor",
        "demo",
        "bench",
    )
    for name in known:
        assert name in out


def test_numbers_that_are_not_finite_are_null_for_programs(capsys):
    from retouch.cli import _show

    _show.emit({"ratio": float("inf"), "rows": [(1, float("nan"))]})
    assert json.loads(capsys.readouterr().out) == {"ratio": None, "rows": [[1, None]]}


def test_a_sentence_is_never_broken(capsys, monkeypatch):
    from retouch.cli import _show

    monkeypatch.setenv("COLUMNS", "20")
    sentence = "Next: retouch ask a/long/folder/of/a/model 'The capital of France' --change :car:[b]"
    _show.say(sentence)
    assert capsys.readouterr().out == sentence + "\n"


def test_ctrl_c_while_planning_leaves_nothing_half_written(base, tmp_path):
    code = "from retouch.cli import _show, main\n_show._Lines.__init__.__defaults__ = (0.0,)\nmain()"
    out = tmp_path / "lyon"
    words = ("edit", base, *FACT, "--n-steps", 1000, "--stop-loss", 0, "--block", 1, "--contexts", "plain", "-o", out)
    with process(code, *words, cwd=tmp_path) as running:
        watchdog = threading.Timer(100, running.kill)
        watchdog.start()
        for line in running.stderr:
            if line.startswith("Values for 1 fact at"):
                break
        running.send_signal(signal.SIGINT)
        said, error = running.stdout.read(), running.stderr.read()
        watchdog.cancel()
    assert running.returncode == 130, error
    assert said == ""
    assert error.strip().splitlines()[-1] == (
        "error: Stopped. Nothing was half-written; the same command goes on or begins anew."
    )
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []
