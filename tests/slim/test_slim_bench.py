"""A bench trains every method alike, goes on where it was stopped, and writes what the contract says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import slim_toy as toy
import torch
from slim_made import source, task

import families
from retouch import registry
from retouch.errors import SettingsError, UnknownName, UserError
from retouch.model import wrap
from retouch.progress import listen
from retouch.slim import bench
from retouch.slim.base import Budget
from retouch.slim.costeff import CostEff
from retouch.slim.first_k import FirstK
from retouch.slim.linear import Linear
from retouch.slim.static import Static

SHORT = {"length_factor": 0.001, "batch_size": 8, "rate_factor": 10.0, "save_every": 0}
BUDGET = Budget(params="1/2", flops="1/3")
CONTRACT = {"quality", "quality_base", "params_ratio", "flops_ratio", "flops_ratio_128", "speedup", "exit_layer"}
TIMES = ("speedup", "p50", "p95", "examples_per")


def methods():
    return {"costeff": CostEff(**SHORT, n_cuts=1), "first_k:n_blocks=1": FirstK(**SHORT, n_blocks=1)}


def measured(out, stages, chosen=None, **more):
    more = {"n_calls": 3, "batch_sizes": (1, 2), "n_draws": 40, "folder": stages, **more}
    return bench.run(source(), more.pop("task", task()), chosen or methods(), BUDGET, out, **more)


def untimed(result):
    def kept(row):
        return {k: kept(v) if isinstance(v, dict) else v for k, v in row.items() if not k.startswith(TIMES)}

    return {k: kept(v) if k == "methods" else v for k, v in result.items() if k not in ("environment", "latency")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two seeds without interruption: the result, its file, its report, and the stages."""
    folder = tmp_path_factory.mktemp("whole")
    out, html = folder / "new" / "bench.json", folder / "bench.html"
    return measured(out, folder / "stages", seeds=(0, 1), html=html, data="toy rows"), out, html, folder / "stages"


# ---------------------------------------------------------------- what is written


def test_the_file_has_the_keys_of_the_contract(whole):
    read = json.loads(whole[1].read_text())
    assert read == whole[0]
    assert (read["verb"], read["model"], read["data"], read["n"], read["seed"]) == (
        "slim", "tiny/bert", "toy rows", 60, 0,
    )  # fmt: skip
    assert {"retouch", "torch", "processor", "load_before", "settings", "rows"} <= set(read["environment"])
    assert read["environment"]["rows"] == {"train": 96, "valid": 32, "calib": 60, "test": 60}
    assert list(read["methods"]) == list(methods())
    for row in read["methods"].values():
        assert set(row) >= CONTRACT | {"quality_auc", "p50_ms_b1", "p95_ms_b2", "points", "spread"}
        assert set(row["points"]) == {"chosen", "full_depth", "drop_0.005"}
        assert row["points"]["chosen"]["quality"] == row["quality"]
        for point in row["points"].values():
            assert set(point) >= CONTRACT
            assert 0 <= point["quality"] <= 1
    assert not whole[1].with_name("bench.json.partial").exists()


def test_numbers_are_those_of_the_test_rows(whole):
    result = whole[0]
    ours, short = result["methods"].values()
    assert ours["exit_layer"] <= 2.0 == ours["points"]["full_depth"]["exit_layer"]
    assert short["exit_layer"] == 1.0
    assert short["quality_auc"] is None
    assert short["points"]["full_depth"]["speedup"] == short["speedup"] > 0
    assert ours["p50_ms_b1"] == next(
        r["p50_ms"] for r in result["latency"]["rows"] if (r["model"], r["batch_size"]) == ("costeff", 1)
    )
    curve = result["curves"]["costeff"]
    assert len({len(column) for column in curve.values()}) == 1
    low, high = result["auc_interval"]
    assert min(curve["flops_ratio"]) <= low < high <= max(curve["flops_ratio"])


def test_several_seeds_are_averaged_with_their_spread(whole, tmp_path):
    both = whole[0]["methods"]["costeff"]
    one, other = (
        measured(tmp_path / f"{s}.json", whole[3], {"costeff": methods()["costeff"]}, seeds=(s,), latency=False)
        for s in (0, 1)
    )
    each = [r["methods"]["costeff"]["quality"] for r in (one, other)]
    assert both["n_seeds"] == 2
    assert both["quality"] == pytest.approx(sum(each) / 2)
    assert both["spread"]["quality"] == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    assert one["methods"]["costeff"]["speedup"] is None
    assert one["latency"] is None
    assert one["differences"] == []
    assert "n_seeds" not in one["methods"]["costeff"]


def test_the_first_method_is_compared_with_the_others(whole):
    result = whole[0]
    assert {(d["method"], d["rival"]) for d in result["differences"]} == {("costeff", "first_k:n_blocks=1")}
    found = next(d for d in result["differences"] if d["metric"] == "quality")
    ours, short = (row["quality"] for row in result["methods"].values())
    assert found["difference"] == pytest.approx(ours - short)
    assert found["standard_error"] > 0
    assert found["verdict"] in ("higher", "lower", "no difference")


def test_the_page_shows_all_methods_and_their_differences(whole):
    page = whole[2].read_text()
    for words in ("Is it better?", "Over seeds", "first_k:n_blocks=1", "What does 0.5 % cost?", "milliseconds a text"):
        assert words in page


# ---------------------------------------------------------------- going on


def stop_before(number):
    def listener(said, done, total):
        if (said, done) == ("Methods", number):
            raise KeyboardInterrupt

    return listener


def test_an_interrupted_bench_goes_on_and_gives_the_same(whole, tmp_path):
    straight = measured(tmp_path / "straight.json", whole[3], n_calls=2)
    out = tmp_path / "bench.json"
    with pytest.raises(KeyboardInterrupt), listen(stop_before(1)):
        measured(out, tmp_path / "b", n_calls=2)
    assert not out.exists()
    assert len(list(out.with_name("bench.json.partial").iterdir())) == 1
    shutil.rmtree(tmp_path / "b")
    resumed = measured(out, tmp_path / "b", n_calls=2)
    assert not list((tmp_path / "b").glob("slenderise-*"))  # the finished method was read and not trained
    assert list((tmp_path / "b").glob("first_k-*"))
    assert untimed(resumed) == untimed(straight)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, whole):
    """A bench of one short method that was stopped when all were trained."""
    out = tmp_path_factory.mktemp("stopped") / "bench.json"
    chosen = {"first": FirstK(**SHORT, n_blocks=1)}
    with pytest.raises(KeyboardInterrupt), listen(stop_before(1)):
        measured(out, whole[3], chosen, latency=False)
    return out, chosen


@pytest.mark.parametrize("what", ["settings", "rows", "budget", "model", "damage"])
def test_what_was_kept_is_used_for_the_same_question_only(stopped, what, tmp_path):
    out, chosen = stopped
    shutil.copytree(out.with_name("bench.json.partial"), tmp_path / "bench.json.partial")
    opened, budget, rows = source(), BUDGET, task()
    if what == "settings":
        chosen = {"first": replace(chosen["first"], max_tokens=64)}
    if what == "rows":
        rows = task(test=toy.rows(61, 5))
    if what == "budget":
        budget = Budget(params="1/2", flops="1/4")
    if what == "model":
        network = families.FAMILIES["bert"](n_blocks=2, headless=True)
        with torch.no_grad():
            next(network.parameters())[0, 0] += 1
        opened = replace(opened, model=wrap(network, opened.tokenizer))
    if what == "damage":
        for file in tmp_path.rglob("*.safetensors"):
            file.write_bytes(b"")
    said = []
    with (
        pytest.raises(KeyboardInterrupt),
        listen(lambda what, done, total: said.append(what) or stop_before(1)(what, done, total)),
    ):
        bench.run(opened, rows, chosen, budget, tmp_path / "bench.json", latency=False, folder=tmp_path / "stages")
    assert any(what.startswith("Training") for what in said)


def test_what_was_kept_is_read_without_training(stopped, tmp_path):
    shutil.copytree(stopped[0].with_name("bench.json.partial"), tmp_path / "bench.json.partial")
    said = []
    with listen(lambda what, done, total: said.append(what)):
        found = measured(tmp_path / "bench.json", tmp_path / "stages", stopped[1], latency=False)
    assert not any(what.startswith("Training") for what in said)
    assert found["methods"]["first"]["exit_layer"] == 1.0


def test_what_has_no_format_is_made_anew_to_be_timed(whole, tmp_path):
    out, html = tmp_path / "bench.json", tmp_path / "bench.html"
    chosen = {"first": FirstK(**SHORT, n_blocks=1), "linear": Linear(**SHORT, features="tfidf")}

    def before_the_clock(said, done, total):
        if said == "latency":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listen(before_the_clock):
        measured(out, whole[3], chosen)
    assert len(list(out.with_name("bench.json.partial").iterdir())) == 2
    result = measured(out, whole[3], chosen, html=html)
    assert result["methods"]["linear"]["speedup"] > 0
    assert result["methods"]["linear"]["flops_ratio"] < 0.01
    assert "this task needs no encoder" in html.read_text()


# ---------------------------------------------------------------- what is asked


def test_methods_are_read_with_their_settings():
    found = registry.parse("slim", "costeff, static,static:match=flops:seed=3,first-k:n_blocks=2", preset="paper")
    assert list(found) == ["costeff", "static", "static:match=flops:seed=3", "first-k:n_blocks=2"]
    assert found["static:match=flops:seed=3"] == Static(preset="paper", match="flops", seed=3)
    assert found["first-k:n_blocks=2"] == FirstK(preset="paper", n_blocks=2)
    assert len(registry.parse("slim", bench.METHODS)) == 8


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("costef", UnknownName, "Did you mean 'costeff'"),
        ("static:macth=flops", SettingsError, "macth"),
        ("first_k:n_blocks=0", SettingsError, "n_blocks"),
        ("static,static", UserError, "named twice"),
        (" , ", UserError, "No method was named"),
    ],
)
def test_a_wrong_method_is_named(text, error, says):
    with pytest.raises(error, match=says):
        registry.parse("slim", text)


def test_seeds_are_read():
    assert bench.parse_seeds("0, 2,1") == (0, 2, 1)
    for text in ("", "a", "1,1", "-1"):
        with pytest.raises(UserError, match=r"such as 0,1,2"):
            bench.parse_seeds(text)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"task": task(test=())}, "no test rows"),
        ({"seeds": ()}, "needs methods and seeds"),
        ({"seeds": (1, 1)}, "each once"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(more, says, tmp_path):
    with pytest.raises(UserError, match=says):
        measured(tmp_path / "bench.json", tmp_path / "stages", **more)
    assert not list(tmp_path.iterdir())


def test_a_bench_has_one_precision(tmp_path):
    mixed = {f"linear:precision={p}": Linear(precision=p) for p in ("float32", "bfloat16")}
    with pytest.raises(SettingsError, match="precision"):
        bench.run(source(), task(), mixed, Budget("1/2"), tmp_path / "bench.json")
    assert not list(tmp_path.iterdir())


def test_a_bench_has_one_size(tmp_path):
    with pytest.raises(UserError, match="max_drop"):
        bench.run(source(), task(), methods(), Budget(max_drop=0.1), tmp_path / "bench.json")


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved tiny bert, and a folder of rows."""
    folder = tmp_path_factory.mktemp("folders")
    families.FAMILIES["bert"](n_blocks=2, headless=True).save_pretrained(folder / "model")
    families.tokenizer("word").save_pretrained(folder / "model")
    (folder / "toy").mkdir()
    for split, n, seed in (("train", 60, 1), ("valid", 20, 2), ("calib", 30, 3), ("test", 30, 4)):
        lines = [f"{e.text}\t{('paris', 'rome')[int(e.label)]}" for e in toy.rows(n, seed)]
        (folder / "toy" / f"{split}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return folder


@pytest.fixture
def retouch(monkeypatch, capsys):
    """Run a command in this process."""
    import sys

    from retouch.cli import main

    def run(*words):
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setattr(sys, "argv", ["retouch", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.filterwarnings("ignore:'click.*is deprecated:DeprecationWarning")
def test_the_command_writes_its_file_and_shows_a_table(retouch, folders, tmp_path):
    out, html = tmp_path / "bench.json", tmp_path / "bench.html"
    words = ("--data", folders / "toy", "--model", folders / "model", "--params", "1/2", "--flops", "1/3")
    chosen = "first_k:n_blocks=1:length_factor=0.0005:batch_size=8,full_exits:length_factor=0.0005:batch_size=8"
    code, said, err = retouch(
        "bench", "slim", *words, "--methods", chosen, "--no-latency", "--draws", 20, "--html", html, "--json", out
    )
    assert code == 0, err
    result = json.loads(out.read_text())
    assert list(result["methods"]) == chosen.split(",")
    assert result["environment"]["budget"]["flops"] == pytest.approx(1 / 3)
    assert result["environment"]["settings"][chosen.split(",")[0]]["preset"] == "fast"
    assert "30 test rows" in said
    assert "standard error" in said
    assert f"Saved as {out}." in said
    assert "<svg" in html.read_text()


@pytest.mark.filterwarnings("ignore:'click.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--methods", "costef"), "Did you mean 'costeff'"),
        (("--seeds", "one"), "such as 0,1,2"),
        (("--params", "8"), "Did you mean 1/8"),
        (("--draws", "1"), "--draws"),
        (("--html", "no/such/folder/x.html"), "--html"),
        (("--data", "no-such-folder"), "no-such-folder"),
    ],
)
def test_the_command_names_a_mistake(retouch, folders, tmp_path, words, says):
    given = {"--data": folders / "toy", "--model": folders / "model", "--json": tmp_path / "b.json"}
    given |= dict([words])
    code, said, err = retouch("bench", "slim", *(w for pair in given.items() for w in pair))
    assert (code, said) == (2, "")
    assert says in err
