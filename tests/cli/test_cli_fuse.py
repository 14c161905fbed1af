"""``retouch fuse`` and ``retouch bench fuse``: what each command says and leaves behind, and how mistakes are named."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass

import pytest
import torch
import transformers
from safetensors.torch import load_file

from retouch.change import LowRank
from retouch.model import open_model

# Typer asks click 8.5 by old names; neither is ours to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'click.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

WEIGHTS = ("blocks.0.mlp.down", "blocks.1.attention.query")
DOMAINS = ("law", "film")


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
def retouch(monkeypatch, capsys, tmp_path):
    """Run a command in this process, in a folder of its own."""
    from retouch.cli import main

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("RETOUCH_DEBUG", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["retouch", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Said(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(retouch, tmp_path):
    """Run a command that is to fail: nothing on stdout, one error, nothing written where it ran."""

    def run(*words, code=2):
        said = retouch(*words)
        assert said.code == code, said
        assert said.out == ""
        assert re.match(r"(warning: .*\n)*error: ", said.err), said
        assert list((tmp_path / "here").iterdir()) == []
        return said.err

    return run


@pytest.fixture
def done(retouch):
    def run(*words):
        said = retouch(*words)
        assert said.code == 0, said.err
        return said

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuse")


@pytest.fixture(scope="module")
def base(tiny, place):
    """A tiny llama whose letters are single tokens."""
    _, words = tiny("llama")
    words.add_tokens([f" {letter}" for letter in "ABCD"])
    network, _ = tiny("llama", n_blocks=3, vocab_size=len(words), max_position_embeddings=1024)
    network.save_pretrained(place / "base")
    words.save_pretrained(place / "base")
    return place / "base"


@pytest.fixture(scope="module")
def other(tiny, place):
    network, words = tiny("llama", n_blocks=3, seed=1)
    network.save_pretrained(place / "other")
    words.save_pretrained(place / "other")
    return place / "other"


def random_parts(model, seed, rank=2, size=0.3):
    make = torch.Generator().manual_seed(seed)
    parts = {}
    for name in WEIGHTS:
        outputs, inputs = model.matrix(name).shape
        left, right = torch.randn(outputs, rank, generator=make), torch.randn(rank, inputs, generator=make)
        parts[name] = LowRank(left * size / (rank * inputs) ** 0.5, right)
    return parts


@pytest.fixture(scope="module")
def adapters(base, place):
    """Two adapters in folders, named as the domains."""
    from retouch.fuse.adapter_file import write_adapter

    model = open_model(base)
    for seed, name in enumerate(DOMAINS):
        parts = random_parts(model, seed, rank=2 + seed)
        ranks = {n: p.rank for n, p in parts.items()}
        write_adapter(place / name, iter(parts.items()), ranks, model, n_examples=10 * (seed + 1))
    return [place / name for name in DOMAINS]


@pytest.fixture(scope="module")
def data(place):
    for domain in DOMAINS:
        (place / "data" / domain).mkdir(parents=True)
        for split, n in (("train", 8), ("valid", 6), ("test", 12)):
            rows = "".join(f"{domain} {split} {i}\t{'yes' if i % 2 else 'no'}\n" for i in range(n))
            (place / "data" / domain / f"{split}.tsv").write_text("text\tlabel\n" + rows)
    return place / "data"


@pytest.fixture(scope="module")
def examples(place):
    rows = [json.dumps({"prompt": f"Is {i} law?", "target": "yes" if i % 2 else "no"}) for i in range(8)]
    (place / "examples.jsonl").write_text("\n".join(rows))
    return place / "examples.jsonl"


QUICK = ("--rank", 2, "--n-steps", 3, "--batch", 2)


# ---------------------------------------------------------------- the way of one adapter


def test_prune_train_recover_merge_and_plain_peft_loads_what_comes_out(done, base, examples, tmp_path):
    said = done(
        "fuse", "prune", base, "--ratio", 0.4, "--score", "magnitude", "--align", "none", "-o", tmp_path / "small"
    )
    assert re.match(r"\d+% of what can be pruned is gone", said.out)
    assert "fuse train" in said.out
    assert not (tmp_path / "small" / "small.plan.json").exists()
    for name in ("law", "film"):
        said = done("fuse", "train", tmp_path / "small", "--data", examples, "-o", tmp_path / name, *QUICK)
        assert "in 3 steps" in said.out and "fuse recover" in said.out
        assert not (tmp_path / f"{name}.work").exists()
        done("fuse", "recover", tmp_path / name, "--plan", tmp_path / "small.plan.json", "--model", base,
             "-o", tmp_path / f"full-{name}")  # fmt: skip
    said = done("fuse", "merge", base, tmp_path / "full-law", tmp_path / "full-film", "-o", tmp_path / "fused")
    assert f"Saved as {tmp_path / 'fused'}" in said.out
    equals_in_peft(base, [(tmp_path / f"full-{n}", 0.5) for n in DOMAINS], tmp_path / "fused")


def equals_in_peft(base, given, fused):
    """The fused adapter loads in plain PEFT, and changes the weights by the mean of those given."""
    from peft import PeftModel

    def merged(folder):
        network = transformers.AutoModelForCausalLM.from_pretrained(base)
        return dict(PeftModel.from_pretrained(network, folder).merge_and_unload().named_parameters())

    before = dict(transformers.AutoModelForCausalLM.from_pretrained(base).named_parameters())
    alone, together = [(merged(folder), w) for folder, w in given], merged(fused)
    moved = 0
    for name, weight in before.items():
        wanted = sum(w * (found[name] - weight) for found, w in alone)
        assert torch.allclose(together[name] - weight, wanted, atol=1e-5)
        moved += bool(wanted.any())
    assert moved >= 2


def test_what_was_not_recovered_or_twice_is_named_and_what_edges_saw_is_kept(done, retouch, base, examples, tmp_path):
    from retouch.fuse.adapter_file import open_adapter
    from retouch.fuse.prune import open_plan

    small, ad, full, plan = (tmp_path / name for name in ("small", "ad", "full", "small.plan.json"))
    done("fuse", "prune", base, "--ratio", 0.4, "--score", "magnitude", "--align", "none", "-o", small)
    done("fuse", "train", small, "--data", examples, "-o", ad, *QUICK)
    said = retouch("fuse", "merge", base, ad, "-o", tmp_path / "fused")
    assert said.code == 2 and f"Recover it first: retouch fuse recover {ad} --plan PLAN --model {base}" in said.err
    done("fuse", "recover", ad, "--plan", plan, "--model", base, "-o", full)
    said = retouch("fuse", "recover", full, "--plan", plan, "-o", tmp_path / "again")
    assert said.code == 2 and "Missing option '--model'" in said.err
    said = retouch("fuse", "recover", full, "--plan", plan, "--model", "nowhere", "-o", tmp_path / "again")
    assert said.code == 2 and "full is recovered already" in said.err
    another = random_plan(base, tmp_path / "another.json")
    said = retouch("fuse", "recover", ad, "--plan", another, "--model", "nowhere", "-o", tmp_path / "again")
    assert said.code == 2 and "was trained under plan" in said.err
    assert not (tmp_path / "again").exists() and not (tmp_path / "fused").exists()
    kept = open_adapter(full, open_model(base)).kept
    units = open_plan(plan).kept[1]
    assert kept["blocks.1.mlp.down"].index == units.ff and kept["blocks.1.mlp.down"].axis == "columns"
    assert kept["blocks.1.mlp.up"].index == units.ff and "blocks.0.mlp.up" not in kept


def test_a_deadline_stops_training_and_the_same_command_goes_on(done, base, examples, tmp_path):
    words = ("fuse", "train", base, "--data", examples, "--rank", 2, "--n-steps", 4, "--batch", 2, "-o", tmp_path / "a")
    said = done(*words, "--deadline", 1e-6)
    assert "marked partial" in said.out
    assert json.loads((tmp_path / "a" / "retouch.json").read_text())["notes"]["partial"] is True
    told = done(*words, "--deadline", 600, "--json").json
    assert told["notes"]["n_steps"] == 4 and told["notes"]["partial"] is False
    assert not (tmp_path / "a.work").exists()


def test_prune_for_programs_names_the_plan_and_the_memory(done, base, tmp_path):
    told = done("fuse", "prune", base, "--budget", "99.7%", "--score", "random", "--align", "none", "-o", tmp_path / "s",
                "--plan", tmp_path / "kept.json", "--json").json  # fmt: skip
    assert told["hash"] == json.loads((tmp_path / "s" / "retouch.json").read_text())["plan"]
    assert told["plan"] == str(tmp_path / "kept.json") and (tmp_path / "kept.json").is_file()
    assert 0 < told["ratio"] < 1
    assert told["peak_mib"]["total"] < told["whole_mib"]
    few = done("fuse", "prune", base, "--ratio", 0.4, "--align", "none", "-o", tmp_path / "t", "--batch", 2, "--n-tokens",
               64, "--checkpointing", "true", "--json").json  # fmt: skip
    assert few["whole_mib"] < told["whole_mib"]


def test_train_leaves_alone_what_else_lies_in_its_work_folder(done, base, examples, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    told = done("fuse", "train", base, "--data", examples, "--work", tmp_path / "mine", "-o", tmp_path / "a", *QUICK,
                "--name", "law", "--json").json  # fmt: skip
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert told["notes"]["n_steps"] == 3 and told["notes"]["curve"]
    record = json.loads((tmp_path / "a" / "retouch.json").read_text())
    assert set(record["notes"]) == {"settings", "n_steps", "partial"}  # the folder leaves, and losses stay


@pytest.mark.parametrize(
    "words, says",
    [
        (("prune", "BASE"), "Give one of --budget, --budget-mib and --ratio"),
        (("prune", "BASE", "--ratio", 0.3, "--budget", "50%"), "Give one of"),
        (("prune", "BASE", "--ratio", 0.99), "ratio must be at least 0 and at most 0.85"),
        (("prune", "BASE", "--budget", "600%"), "--budget is a share"),
        (("prune", "BASE", "--ratio", 0.3, "--n-token", 64), "n_tokens"),
        (("prune", "BASE", "--ratio", 0.3, "--batch", 0), "batch"),
        (("prune", "BASE", "--budget", "much"), "--budget must be a number"),
        (("prune", "BASE", "--budget-mib", 0.001), "."),
        (("prune", "BASE", "--ratio", 0.3, "--score", "wand"), "Did you mean 'wanda'"),
        (("prune", "BASE", "--ratio", 0.3, "--align", "biass"), "Did you mean 'bias'"),
        (("prune", "BASE", "--ratio", 0.3, "--dtype", "int8", "--align", "none", "--score", "random"), "int8"),
        (("prune", "nowhere", "--ratio", 0.3), "nowhere"),
        (("train", "BASE", "--data", "none.jsonl"), "none.jsonl"),
        (("train", "BASE", "--data", "DATA"), "is a folder. Name a file in it."),
        (("train", "BASE", "--data", "EXAMPLES", "--rank", 0), "rank must be"),
        (("train", "BASE", "--data", "EXAMPLES", "--rank", 999), "rank 999 is larger"),
        (("train", "BASE", "--data", "EXAMPLES", "--rnak", 2), "rank"),
        (("train", "BASE", "--data", "EXAMPLES", "--replay", "none.tsv"), "none.tsv"),
        (("train", "nowhere", "--data", "EXAMPLES"), "nowhere"),
        (("recover", "LAW", "--plan", "none.json", "--model", "BASE"), "none.json"),
        (("recover", "nowhere", "--plan", "PLAN", "--model", "BASE"), "nowhere"),
        (("recover", "LAW", "--plan", "PLAN", "--model", "BASE"), "law was trained on a whole model"),
        (("recover", "LAW", "--plan", "PLAN_OF_OTHER", "--model", "nowhere"), "law belongs to base"),
        (("train", "BASE", "--data", "EXAMPLES", "--deadline", 0), "--deadline is in seconds"),
        (("train", "BASE", "--data", "EXAMPLES", "--deadline", "nan"), "--deadline is in seconds"),
        (("prune", "nowhere", "--ratio", 0.3, "--batch", -8), "batch must be int >= 1; got -8"),
        (("prune", "nowhere", "--ratio", 0.3, "--rank", 0), "rank must be int >= 1"),
        (("prune", "nowhere", "--budget-mib", "nan"), "--budget-mib must be a finite number"),
        (("prune", "nowhere", "--budget-mib", -5), "--budget-mib must be a finite number"),
        (("recover", "LAW", "--plan", "EXAMPLES", "--model", "BASE"), "examples.jsonl"),
    ],
)
def test_mistakes_of_prune_train_and_recover_are_named(
    refused, base, other, data, examples, adapters, plan, place, words, says
):
    names = {"BASE": base, "DATA": data, "EXAMPLES": examples, "LAW": adapters[0], "PLAN": plan}
    if "PLAN_OF_OTHER" in words:
        names["PLAN_OF_OTHER"] = random_plan(other, place / "other.plan.json")
    assert says in refused("fuse", *(names.get(w, w) for w in words))


@pytest.fixture(scope="module")
def plan(base, place):
    return random_plan(base, place / "plan.json")


def random_plan(model, file):
    from retouch.fuse.prune import plan_prune, save_plan

    save_plan(plan_prune(open_model(model), ratio=0.3, score="random", align="none"), file)
    return file


# ---------------------------------------------------------------- merge


def merge(*words):
    return ("fuse", "merge", *words)


def test_merge_writes_an_adapter_that_peft_loads(done, base, adapters, tmp_path):
    said = done(*merge(base, *adapters, "--weights", "1,3", "-o", tmp_path / "fused"))
    assert "2 adapters" in said.out or "conflict" in said.out.lower()
    equals_in_peft(base, list(zip(adapters, (0.25, 0.75))), tmp_path / "fused")


@pytest.mark.parametrize("flags", [("--dry-run",), (), ("--as", "change")])
def test_without_a_page_merging_needs_nothing_that_draws(done, retouch, base, adapters, tmp_path, monkeypatch, flags):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done(*merge(base, *adapters, *flags, "-o", tmp_path / "fused"))
    assert (tmp_path / "fused").exists() == ("--dry-run" not in flags)
    said = retouch(*merge(base, *adapters, *flags, "--html", tmp_path / "page.html", "-o", tmp_path / "again"))
    assert said.code == 2 and "retouch[plot]" in said.err and not (tmp_path / "again").exists()


def test_merge_as_a_change_and_as_a_model_are_the_same_fusion(done, base, adapters, tmp_path):
    from retouch import load_change

    done(*merge(base, *adapters, "--as", "change", "--weights", "examples", "-o", tmp_path / "change"))
    done(*merge(base, *adapters, "--as", "model", "--weights", "examples", "-o", tmp_path / "model"))
    change = load_change(tmp_path / "change")
    assert change.method == "cat"
    assert change.notes["weights"] == pytest.approx([1 / 3, 2 / 3])
    model, before = open_model(tmp_path / "model"), open_model(base)
    for name, part in change.parts.items():
        assert torch.allclose(model.matrix(name) - before.matrix(name), part.delta().float(), atol=1e-5)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(plain.get_parameter(model.anatomy.path(WEIGHTS[0]) + ".weight"), model.weight(WEIGHTS[0]))


def test_what_the_type_of_a_merged_model_swallows_is_said(done, retouch, base, examples, data, tmp_path):
    network = transformers.AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16)
    network.save_pretrained(tmp_path / "half")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "half")
    for name in DOMAINS:
        done("fuse", "train", tmp_path / "half", "--data", examples, "-o", tmp_path / name, *QUICK)
    words = merge(tmp_path / "half", tmp_path / "law", tmp_path / "film", "--as", "model", "-o", tmp_path / "fused")
    said = done(*words)
    assert re.search(r"stored in bfloat16, which loses \d+\.\d% of the change in the mean", " ".join(said.out.split()))
    lost = done(*words, "--json").json["numbers"]["lost"]
    before, after = open_model(tmp_path / "half"), open_model(tmp_path / "fused")
    assert lost and all(0 < share < 1 for share in lost.values())
    assert any(not torch.equal(before.matrix(name), after.matrix(name)) for name in WEIGHTS)
    proven = retouch(*words[:-1], tmp_path / "proven", "--max-harm", 1, "--data", data)
    assert proven.code == 1 and "another model's" in proven.err and not (tmp_path / "proven").exists()


def test_a_scale_that_is_given_multiplies_and_json_is_for_programs(done, base, adapters, tmp_path):
    told = done(*merge(base, *adapters, "--scale", 2, "-o", tmp_path / "two", "--json")).json
    assert -1 <= told["numbers"]["conflict"]["excess"] <= 1 and told["pictures"] == []
    done(*merge(base, *adapters, "-o", tmp_path / "one"))
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    for name in one:
        factor = 2 if "lora_B" in name else 1
        assert torch.allclose(two[name], factor * one[name], atol=1e-6)


def test_dry_run_writes_only_the_report(done, base, adapters, tmp_path):
    said = done(*merge(base, *adapters, "--dry-run", "-o", tmp_path / "fused", "--html", tmp_path / "report.html"))
    assert "Saved" not in said.out
    assert not (tmp_path / "fused").exists()
    assert "<html" in (tmp_path / "report.html").read_text()
    assert "law" in said.out


def test_settings_of_the_method_and_a_resolver_are_options(done, base, adapters, tmp_path):
    done(*merge(base, *adapters, "--method", "ties", "--density", 0.4, "--resolve", "cr-sign:beta=1.0", "--as", "change",
                "-o", tmp_path / "c"))  # fmt: skip
    from retouch import load_change

    change = load_change(tmp_path / "c")
    assert change.settings["density"] == 0.4
    assert change.notes["resolver"]["name"] == "cr_sign" and change.notes["resolver"]["beta"] == 1.0


def test_settings_may_stand_between_the_adapters(done, base, adapters, tmp_path):
    from retouch import load_change

    law, film = adapters
    words = (
        "--method",
        "ties",
        "--coverage",
        law,
        "--density=0.3",
        "--rank",
        3,
        film,
        "--as",
        "change",
        "--coverage",
        "false",
    )
    done(*merge(base, *words, "-o", tmp_path / "c"))
    change = load_change(tmp_path / "c")
    assert change.notes["adapters"] == ["law", "film"]
    assert (change.settings["density"], change.settings["rank"], change.settings["coverage"]) == (0.3, 3, False)


def test_a_scale_is_tuned_on_the_questions_that_are_given(done, base, adapters, data, tmp_path):
    said = done(*merge(base, *adapters, "--scale", "tune", "--data", data, "-o", tmp_path / "fused"))
    assert "Scales that were tried" in said.out
    assert (tmp_path / "fused" / "adapter_model.safetensors").is_file()


def test_a_density_that_is_given_as_its_default_is_not_tuned(done, base, adapters, data, tmp_path):
    words = ("--method", "ties", "--scale", "tune", "--data", data, "--as", "change", "--json")
    kept = done(*merge(base, *adapters, *words, "--density", 0.2, "-o", tmp_path / "kept")).json["numbers"]
    assert kept["settings"]["density"] == 0.2 and {t["form"] for t in kept["tuned"]["tried"]} == {""}
    free = done(*merge(base, *adapters, *words, "-o", tmp_path / "free")).json["numbers"]
    assert len({t["form"] for t in free["tuned"]["tried"]}) == 4


def test_a_smaller_rank_is_announced_and_what_it_kept_is_told(done, base, adapters, tmp_path):
    said = done(*merge(base, *adapters, "--method", "svd", "--rank", 2, "-o", tmp_path / "fused"))
    assert "What a smaller rank has kept" in said.out
    assert json.loads((tmp_path / "fused" / "adapter_config.json").read_text())["r"] == 2
    record = json.loads((tmp_path / "fused" / "retouch.json").read_text())["notes"]
    assert record["method"] == "svd" and record["settings"]["rank"] == 2
    assert set(record["kept_energy"]) == set(WEIGHTS)


def test_lorahub_chooses_its_weights_on_the_questions_that_are_given(done, base, adapters, data, tmp_path):
    told = done(*merge(base, *adapters, "--method", "lorahub", "--n-evaluations", 6, "--data", data, "-o",
                       tmp_path / "fused", "--json")).json  # fmt: skip
    weights = told["numbers"]["adapters"]
    equals_in_peft(base, [(p, weights[p.name]) for p in adapters], tmp_path / "fused")


def test_a_drop_that_is_not_certified_has_its_exit_code_and_keeps_only_the_report(
    retouch, base, adapters, data, tmp_path
):
    out, html = tmp_path / "fused", tmp_path / "report.html"
    said = retouch(*merge(base, *adapters, "--max-harm", 0.05, "--data", data, "-o", out, "--html", html, "--json"))
    assert said.code == 3
    assert re.match(r"error: On .* the fused model may lose", said.err.splitlines()[-1])
    assert not said.json["numbers"]["proof"]["holds"]
    assert html.is_file()
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "here", "report.html"]


def test_a_refusal_leaves_an_earlier_fusion_as_it_was(done, retouch, base, adapters, data, tmp_path):
    out = tmp_path / "fused"
    done(*merge(base, *adapters, "-o", out))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert retouch(*merge(base, *adapters, "--scale", 2, "--max-harm", 0.01, "--data", data, "-o", out)).code == 3
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_drop_that_is_certified_is_kept_and_told(done, base, adapters, data, tmp_path):
    said = done(*merge(base, *adapters, "--scale", 0.001, "--max-harm", 1, "--data", data, "-o", tmp_path / "fused"))
    assert "Drop on held-out questions" in said.out and "Single adapters on selection questions" in said.out
    proof = json.loads((tmp_path / "fused" / "retouch.json").read_text())["notes"]["proof"]
    assert proof["holds"] and proof["limit"] == 1 and len(proof["domains"]) == 4


@pytest.mark.parametrize(
    "words, says",
    [
        (("BASE", "LAW", "FILM", "--method", "tias"), "Did you mean 'ties'"),
        (("BASE", "LAW", "FILM", "--resolve", "cr-sing"), "Did you mean"),
        (("BASE", "LAW", "FILM", "--resolve", "cr-sign:beta=7"), "beta must be"),
        (("BASE", "LAW", "FILM", "--resolve", "cr-sign:bet=1"), "beta"),
        (("BASE", "LAW", "FILM", "--resolve", "cr-sign:space=full", "--method", "tsv"), "cr_sign"),
        (("BASE", "LAW", "FILM", "--method", "linear"), "rank"),
        (("nowhere", "LAW", "FILM", "--method", "regmean"), "second moments"),  # said before anything is opened
        (("BASE", "LAW", "FILM", "-o", "LAW"), "The result would replace"),
        (("BASE", "LAW", "FILM", "-o", "BASE", "--as", "model"), "The result would replace"),
        (("BASE", "LAW", "FILM", "--as", "modle"), "Did you mean 'model'"),
        (("BASE", "LAW", "FILM", "--weights", "1,x"), "--weights must be a number"),
        (("BASE", "LAW", "FILM", "--weights", "1"), "2 adapters need as many weights; got 1"),
        (("BASE", "LAW", "FILM", "--weights", "1,-1"), "not negative"),
        (("BASE", "LAW", "FILM", "--weights", "0,0"), "not all 0"),
        (("BASE", "LAW", "FILM", "--weights", "nan,1"), "finite"),
        (("BASE", "LAW", "FILM", "--scale", "tune"), "--scale tune needs questions"),
        (("BASE", "LAW", "FILM", "--max-harm", 0.1), "--max-harm needs questions"),
        (("BASE", "LAW", "FILM", "--method", "bounded"), "--method bounded needs questions"),
        (("BASE", "LAW", "FILM", "--max-harm", -1, "--data", "DATA"), "--max-harm is a share"),
        (("BASE", "LAW", "FILM", "--max-harm", "nan", "--data", "DATA"), "--max-harm is a share"),
        (("BASE", "LAW", "FILM", "--max-harm", 0.1, "--data", "DATA", "--n-certify", 0), "--n-certify"),
        (("BASE", "LAW", "FILM", "--n-certify", 5), "--n-certify counts the questions of a certificate"),
        (("BASE", "LAW", "FILM", "--data", "DATA"), "Nothing here asks the questions"),
        (("BASE", "LAW", "FILM", "--scale", "tune", "--data", "nowhere"), "There is no folder 'nowhere'"),
        (("BASE", "LAW", "FILM", "--scale", "big"), "--scale must be a number"),
        (("BASE", "LAW", "FILM", "--scale", "0"), "lam must be"),
        (("BASE", "LAW", "FILM", "--scale", "nan"), "lam must be"),
        (("BASE", "LAW", "FILM", "--densty", "0.5"), "'cat' has no setting 'densty'"),
        (("BASE", "LAW", "LAW"), "Two adapters are called 'law'"),
        (("BASE", "LAW", "nowhere"), "nowhere"),
        (("BASE", "LAW", "EXAMPLES"), "examples.jsonl"),
        (("nowhere", "LAW", "FILM"), "nowhere"),
        (("OTHER", "LAW", "FILM"), "was trained for model"),
        (("BASE", "LAW", "FILM", "--html", "missing/report.html"), "--html"),
    ],
)
def test_mistakes_of_merge_are_named_and_nothing_is_written(
    refused, base, other, adapters, data, examples, words, says
):
    names = {"BASE": base, "OTHER": other, "LAW": adapters[0], "FILM": adapters[1], "DATA": data, "EXAMPLES": examples}
    assert says in refused(*merge(*(names.get(w, w) for w in words)))


def test_an_adapter_that_names_no_base_is_taken_only_when_told(refused, done, base, adapters, tmp_path):
    stranger = tmp_path / "stranger"
    shutil.copytree(adapters[0], stranger)
    for name in ("retouch.json", "manifest.json"):
        (stranger / name).unlink(missing_ok=True)
    assert "--base-unverified" in refused(*merge(base, stranger, adapters[1]))
    done(*merge(base, stranger, adapters[1], "--base-unverified", "-o", tmp_path / "fused"))


def test_a_damaged_adapter_is_refused(refused, base, adapters, tmp_path):
    torn = tmp_path / "torn"
    shutil.copytree(adapters[0], torn)
    tensors = torn / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    assert "torn" in refused(*merge(base, torn, adapters[1]))


def test_nothing_is_written_into_a_saved_folder(refused, base, adapters):
    assert "lies inside" in refused(*merge(base, *adapters, "-o", adapters[0] / "fused"))
    assert "lies inside" in refused("fuse", "prune", base, "--ratio", 0.3, "-o", adapters[0] / "small")


# ---------------------------------------------------------------- compose


def test_compose_asks_a_model_and_writes_a_recipe_without_texts(done, base, adapters, data, tmp_path):
    recipe = tmp_path / "recipe.json"
    words = ("fuse", "compose", "--data", data)
    first = done(*words, "-n", 2, "--seed", 3, "--split", "selection", "-o", recipe, "--model", base, "--json").json
    assert (
        first["instances"] == 18
        and json.loads(recipe.read_text())["notes"] == {"seed": 3, "split": "selection"}
        and first["domains"] == ["film", "law"]
    )
    assert first["composition_cost"] is not None
    assert "law test" not in recipe.read_text() and "law train" not in recipe.read_text()
    assert done(*words, "--recipe", recipe, "--model", base, "--json").json == first
    changed = done("fuse", "compose", "--data", data, "-n", 2, "--model", base, "--adapter", adapters[0], "--json").json
    assert changed["n_instances"] == 18
    said = done("fuse", "compose", "--data", data, "-n", 1, "--model", base, "--how", "free")
    assert "all correct" in said.out
    shown = done("fuse", "compose", "--data", data, "-n", 1, "--model", base, "--template", "two_shot", "--json").json
    assert shown["n_instances"] == 9 and shown["composition_cost"] is not None


def test_compose_writes_each_domains_examples(done, data, tmp_path):
    said = done("fuse", "compose", "--data", data, "--once", "--examples", tmp_path / "ex")
    assert "12 prompts" in said.out
    rows = [json.loads(line) for line in (tmp_path / "ex" / "law.jsonl").read_text().splitlines()]
    assert rows and all(set(row) == {"prompt", "target"} and "film" not in row["prompt"] for row in rows)


@pytest.mark.parametrize(
    "words, says",
    [
        (("--data", "nowhere"), "There is no folder"),
        (("--data", "DATA", "-k", 5), "asks 2 to 2 questions"),
        (("--data", "DATA", "-n", 0), "-n must be at least 1"),
        (("--data", "DATA", "--split", "tset"), "Did you mean 'test'"),
        (("--data", "DATA", "--adapter", "LAW"), "give --model"),
        (("--data", "DATA", "--model", "BASE", "--how", "freely"), "Did you mean 'free'"),
        (("--data", "DATA", "--model", "BASE", "--adapter", "nowhere"), "nowhere"),
        (("--data", "DATA", "--model", "BASE", "-o", "EXAMPLES"), "examples.jsonl"),
        (("--data", "DATA", "--model", "BASE", "--recipe", "EXAMPLES"), "examples.jsonl"),
        (("--data", "DATA", "--recipe", "RECIPE", "-k", 2), "so -k has nothing to say"),
        (("--data", "DATA", "--recipe", "RECIPE", "-n", 1), "so -n has nothing to say"),
        (("--data", "DATA", "--recipe", "RECIPE", "--once"), "so --once has nothing to say"),
        (("--data", "DATA", "--recipe", "RECIPE", "--seed", 0), "so --seed has nothing to say"),
        (("--data", "DATA", "--recipe", "RECIPE", "-o", "x.json"), "so -o has nothing to say"),
        (("--data", "DATA", "-n", 1, "-o", "RECIPE"), "exists already. To ask what it says: --recipe"),
        (("--data", "text-cd"), "RETOUCH_DATA"),
        (("--data", "DATA", "--template", "plane"), "Did you mean 'plain'"),
    ],
)
def test_mistakes_of_compose_are_named(refused, monkeypatch, base, adapters, data, examples, tmp_path, words, says):
    monkeypatch.delenv("RETOUCH_DATA", raising=False)
    (tmp_path / "recipe.json").write_text("mine")
    names = {"BASE": base, "LAW": adapters[0], "DATA": data, "EXAMPLES": examples, "RECIPE": tmp_path / "recipe.json"}
    assert says in refused("fuse", "compose", *(names.get(w, w) for w in words))
    assert (tmp_path / "recipe.json").read_text() == "mine"


# ---------------------------------------------------------------- bench


@pytest.fixture(scope="module")
def mmlu(place):
    """Questions in MMLU's layout, where a field has always the same right letter: quickly learnt."""
    for subject, letter in (("college_physics", "B"), ("philosophy", "C")):
        for part, n in (("test", 40), ("val", 2), ("dev", 1)):
            (place / "mmlu" / part).mkdir(parents=True, exist_ok=True)
            rows = [f"{subject} {part} {i}?,a,b,c,d,{letter}" for i in range(n)]
            (place / "mmlu" / part / f"{subject}_{part}.csv").write_text("\n".join(rows))
    return place / "mmlu"


def test_bench_writes_its_file_and_goes_on_where_it_was(done, base, mmlu, tmp_path):
    out, work = tmp_path / "bench.json", tmp_path / "work"
    words = ("bench", "fuse", "--data", mmlu, "--model", base, "--methods", "cat", "--resolvers", "none", "-k", 2,
             "--rank", 2, "--per-edge", 64, "--learning-rate", 0.05, "--n-selection", 1, "--n-test", 2, "--first", 4,
             "--lams", "1,2", "--work", work, "--json", out)  # fmt: skip
    said = done(*words)
    for name in ("base", "single:STEM", "single:humanities", "joint", "cat", "oracle"):
        assert name in said.out
    first = json.loads(out.read_text())
    assert first["methods"]["joint"]["part_correct"] > 0.5
    times = {p: p.stat().st_mtime_ns for p in (work / "rows").iterdir()}
    out.unlink()
    done(*words)
    assert json.loads(out.read_text()) == first
    assert {p: p.stat().st_mtime_ns for p in (work / "rows").iterdir()} == times


@pytest.mark.parametrize(
    "words, says",
    [
        (("--methods", "cta"), "Did you mean 'cat'"),
        (("--methods", "cat,cat"), "named twice"),
        (("--methods", "ties:density=7"), "density must be"),
        (("--resolvers", "cr-sing"), "resolver"),
        (("--form", "awre"), "--form must be"),
        (("--n-test", 0), "must be at least 1"),
        (("--per-edge", -1), "--per-edge at least 0"),
        (("--ratios", "0.2,x"), "--ratios must be a number"),
        (("--ratios", "0.99"), "--ratios are shares"),
        (("--unpruned", "--chat"), "--unpruned tells what pruning costs: give --ratios above 0 too"),
        (("--lams", "1,-2"), "--lams are scales"),
        (("--lams", "2,1"), "--lams are scales"),
        (("--lams", "nan"), "--lams are scales"),
        (("--limit", 0), "--limit is a share"),
        (("--score", "wand"), "Did you mean 'wanda'"),
        (("--align", "bais"), "Did you mean 'bias'"),
        (("--rank", 0), "rank must be"),
        (("--data", "nowhere"), "There is no folder"),
        (("--model", "nowhere"), "nowhere"),
        (("-k", 4), "asks 2 to 2 questions"),
        (("--json", "missing/bench.json"), "--json"),
        (("--json", "PLACE"), "--json"),
    ],
)
def test_mistakes_of_bench_are_named_before_any_training(refused, base, mmlu, place, words, says):
    given = {"--data": mmlu, "--model": base} | dict([words])
    flat = [x for pair in given.items() for x in pair]
    assert says in refused("bench", "fuse", *(place if w == "PLACE" else w for w in flat))


def test_answered_examples_that_no_split_keeps_are_missed_before_any_training(refused, base, mmlu, tmp_path):
    words = ("--data", mmlu, "--model", base, "-k", 2, "--template", "two_shot", "--work", tmp_path / "work")
    assert "2 answered examples of 2 questions each are wanted in front, and 2" in refused("bench", "fuse", *words)
    assert not list((tmp_path / "work").rglob("state"))
