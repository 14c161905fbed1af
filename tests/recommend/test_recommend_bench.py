"""The harness: its JSON, what it finds again, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest

import toy_shop
from retouch import attempts, registry
from retouch.errors import UserError
from retouch.model import wrap
from retouch.progress import listen
from retouch.recommend import api, bench
from retouch.recommend.generator_fit import fit_reference
from retouch.recommend.reference import ReferenceSettings

QUICK = ":".join(f"{name}={value}" for name, value in (toy_shop.POLICY | {"n_epochs": 1}).items())
METHODS = (
    "popularity,sasrec:n_epochs=1:d_model=8,reference:size=tiny:n_epochs=1,"
    f"continued:{QUICK},lwgr:{QUICK}:knowledge=shuffled"
)
CONTRACT = {"recall@5", "recall@10", "ndcg@5", "ndcg@10", "harm", "harm_limit", "seconds"}


def wanted(methods=METHODS, **changes):
    reference = ReferenceSettings(size="tiny", n_epochs=1)
    return bench.Bench(registry.parse("recommend", methods, seed=0), **{"reference": reference, "limit": 0.5} | changes)


def rows(prepared):
    """When each finished method was written, by file."""
    return {p: p.stat().st_mtime_ns for p in prepared.folder.glob("bench/*/*.json")}


@pytest.fixture(scope="module")
def llm(tiny):
    return wrap(*tiny("llama"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    encoder = str(toy_shop.vectors(folder / "vectors.npy"))
    return api.prepare(toy_shop.interactions(), folder / "work", tokens=api.Tokens(codes=4, encoder=encoder))


@pytest.fixture(scope="module")
def result(prepared, llm, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "bench.json"
    told = bench.run(prepared, wanted(), llm, out)
    assert json.loads(out.read_text()) == told
    return told


def test_the_object_follows_the_contract(result, prepared):
    assert set(result) == {"verb", "model", "data", "n", "seed", "environment", "methods"}
    assert (result["verb"], result["data"], result["n"], result["seed"]) == ("recommend", "shop", 130, 0)
    assert result["model"] == "a network in memory"
    assert {"torch", "processor", "reference", "splits"} <= result["environment"].keys()
    assert [*result["methods"]] == METHODS.split(",")
    for name, row in result["methods"].items():
        assert row.keys() >= CONTRACT, name
        assert all(isinstance(row[m], float) for m in CONTRACT)
        assert all(0 <= row[m] <= 1 for m in CONTRACT - {"seconds"})
        assert row["recall@5"] <= row["recall@10"] and row["ndcg@5"] <= row["recall@5"]
        assert row["harm_limit"] == 0.5 and row["harm"] >= row["harm_mean"] >= 0
        assert row["seconds"] > 0 and row["broken"] == []
        assert not row.keys() & {"users", "values"}, "nothing of single users"


def test_the_reference_does_itself_no_harm_and_took_its_time(result, prepared):
    row = result["methods"]["reference:size=tiny:n_epochs=1"]
    assert row["harm_mean"] == 0 and row["harm_test"] == 0
    p, how = prepared, wanted()
    again = fit_reference(p.data, p.splits, p.catalogue, how.reference, p.folder, n_history=how.n_history)
    assert row["seconds"] >= again.record["seconds"] > 0, "what its training took, though it was found again"
    assert result["methods"]["popularity"]["harm_mean"] > 0


def test_every_method_is_compared_with_reference_and_continued_by_user(prepared, llm, tmp_path):
    names = {
        "reference": "reference:size=tiny:n_epochs=1",
        "continued": f"continued:{QUICK}",
        "popularity": "popularity",
    }
    methods = {short: registry.parse("recommend", words, seed=0)[words] for short, words in names.items()}
    told = bench.run(prepared, dataclasses.replace(wanted(), methods=methods), llm, tmp_path / "b.json")["methods"]
    assert "against_reference" not in told["reference"] and "against_continued" not in told["continued"]
    for name, against in (("popularity", "reference"), ("popularity", "continued"), ("reference", "continued")):
        for metric in ("recall@5", "recall@10", "ndcg@5", "ndcg@10"):
            found = told[name][f"against_{against}"][metric]
            assert found["mean"] == pytest.approx(told[name][metric] - told[against][metric], abs=1e-5)
            assert found["low"] <= found["mean"] <= found["high"]


def test_what_is_finished_is_found_again(result, prepared, llm, tmp_path):
    before = rows(prepared)
    again = bench.run(prepared, wanted(), llm, tmp_path / "again.json")
    assert rows(prepared) == before
    assert again["methods"] == result["methods"], "also the seconds are those of the fit"


def test_an_interrupted_bench_goes_on(prepared, llm, tmp_path):
    only = "popularity,continued:" + QUICK
    job = wanted(only, seed=5)

    def stop(what, done, total):
        if what.startswith("Training") and "reference" not in what:
            raise KeyboardInterrupt

    before = rows(prepared)
    job = dataclasses.replace(job, methods=registry.parse("recommend", only, seed=5))
    with listen(stop), pytest.raises(KeyboardInterrupt):
        bench.run(prepared, job, llm, tmp_path / "b.json")
    finished = {name: at for name, at in rows(prepared).items() if before.get(name) != at}
    assert len(finished) == 1 and not (tmp_path / "b.json").exists()
    told = bench.run(prepared, job, llm, tmp_path / "b.json")
    assert [*told["methods"]] == only.split(",")
    assert finished.items() <= rows(prepared).items(), "popularity was not measured again"


def test_a_row_that_is_damaged_is_measured_again(prepared, llm, tmp_path):
    job = wanted("popularity", seed=9)
    first = bench.run(prepared, job, llm, tmp_path / "b.json")["methods"]["popularity"]
    place = max(prepared.folder.glob("bench/*/*.json"), key=lambda p: p.stat().st_mtime_ns)
    place.write_text('{"recall@5": ')
    second = bench.run(prepared, job, llm, tmp_path / "b.json")["methods"]["popularity"]
    assert {m: second[m] for m in CONTRACT - {"seconds"}} == {m: first[m] for m in CONTRACT - {"seconds"}}


@pytest.mark.parametrize(
    ("change", "same"), [({"limit": 0.25}, False), ({"seed": 3}, False), ({"device": "cpu"}, True)]
)
def test_what_decides_a_row_is_part_of_its_name(result, prepared, llm, tmp_path, change, same):
    before = rows(prepared)
    told = bench.run(prepared, wanted("popularity", **change), llm, tmp_path / "b.json")
    assert (rows(prepared) == before) is same
    assert told["methods"]["popularity"]["harm_limit"] == change.get("limit", 0.5)


def test_harms_of_a_bench_are_no_certificates_and_every_policy_counts_as_a_look(prepared, llm, tmp_path, result):
    assert all(row["certified"] is False for row in result["methods"].values())
    only = f"popularity,continued:{QUICK},lwgr:{QUICK}:knowledge=shuffled"
    bench.run(prepared, wanted(only, limit=0.31), llm, tmp_path / "b.json")
    assert attempts.count("another", prepared.data.fingerprint) == 3
    bench.run(prepared, wanted(only, limit=0.32), llm, tmp_path / "b.json")
    assert attempts.count("a third", prepared.data.fingerprint) == 4, "the same policies, the same looks"


def test_hidden_items_are_measured_beside(result):
    for name, row in result["methods"].items():
        assert set(row["filtered"]) >= {"recall@5", "ndcg@10"}, name
    assert any(row["filtered"]["recall@10"] != row["recall@10"] for row in result["methods"].values())


def test_the_bound_is_checked_on_halves_of_the_users(result):
    for row in result["methods"].values():
        found = row["coverage_check"]
        assert found["draws"] == 200 and 0 <= found["kept_and_broken"] <= found["misses"] <= 0.2


def test_a_policy_says_how_it_was_trained(result):
    told = result["methods"][METHODS.split(",")[-1]]["training"]
    assert 1 <= told["epoch"] <= 2 and told["settled"]["constraint"] == "slice" and "history" not in told
    assert "training" not in result["methods"]["popularity"]


def test_a_policy_without_a_model_is_refused(prepared, tmp_path):
    with pytest.raises(UserError, match="needs a language model"):
        bench.run(prepared, wanted(f"lwgr:{QUICK}"), None, tmp_path / "b.json")
    with pytest.raises(UserError, match="Device 'toaster' cannot be used"):
        bench.run(prepared, wanted("popularity", device="toaster"), None, tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


def test_a_bench_without_a_model_says_so(prepared, tmp_path):
    told = bench.run(prepared, wanted("popularity"), None, tmp_path / "b.json")
    assert told["model"] is None
    assert np.isfinite(told["methods"]["popularity"]["harm"])
