"""The harness of fusion: what it measures, and that an interrupted run goes on to the same result."""

from __future__ import annotations

import dataclasses
import json
import math

import fuse_asked as made
import pytest
import torch

from retouch import registry
from retouch.errors import UserError
from retouch.fuse import bench
from retouch.fuse.asking import as_change, asked, judge, likelihoods, right_by_domain
from retouch.fuse.bench import Bench
from retouch.fuse.compose import Answers, Instance, bundles, singles
from retouch.fuse.cr_sign import CRSign
from retouch.fuse.cr_subspace import CRSubspace
from retouch.fuse.train import LoraSettings
from retouch.progress import listen

TIMES = ("seconds", "peak_mib", "ask_seconds", "device_mib")


@pytest.fixture(scope="module")
def model(tiny):
    return made.base(tiny)


@pytest.fixture(scope="module")
def suite():
    return made.suite()


def wanted(methods="cat,ties:density=0.5", resolvers=None, **more):
    lora = LoraSettings(rank=2, alpha=4, learning_rate=0.02, n_steps=14, dropout=0)
    return Bench(
        registry.parse("fuse", methods), resolvers or {}, k=2, per_edge=24, lora=lora, n_selection=1, n_test=3, first=5,
        **{"lams": (1.0, 2.0)} | more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def whole(model, suite, work):
    """A run that nothing interrupts."""
    return bench.run(model, suite, wanted(), work / "whole.json", work / "whole")


def plain(result):
    """The result without what differs from run to run."""
    found = json.loads(json.dumps(result))
    for numbers in found["methods"].values():
        for name in TIMES:
            numbers.pop(name, None)
    return {name: found[name] for name in ("methods", "contrasts", "n", "best_plain")}


def test_all_systems_are_asked_the_same_and_what_they_learnt_is_seen(whole, work):
    assert json.loads((work / "whole.json").read_text()) == json.loads(json.dumps(whole))
    rows = whole["methods"]
    assert list(rows) == [
        "base", "single:law", "single:film", "single:news", "joint", "cat", "ties:density=0.5", "oracle",
    ]  # fmt: skip
    assert whole["n"] == 27
    assert rows["joint"]["single_correct"] > 0.5
    assert all(rows[f"single:{d}"]["single_by_domain"][d] == 1.0 for d in made.RIGHT)
    assert rows["oracle"]["all_correct"] == 1.0
    assert {rows[name]["n_instances"] for name in rows} == {27}
    assert all(math.isfinite(rows[name]["ppl"]) and rows[name]["ppl"] > 1 for name in rows if name != "oracle")


def test_a_fused_row_has_its_scale_its_certificate_and_its_contrasts(whole):
    row = whole["methods"]["cat"]
    assert row["lam"] in {t["lam"] for t in row["tried"]} >= {1.0, 2.0}
    asked_ = {(d["domain"], d["reference"]) for d in row["certificate"]["domains"]}
    assert asked_ == {(d, r) for d in made.RIGHT for r in ("base", f"single:{d}")}
    assert set(whole["contrasts"]["cat"]) >= {"base", "joint"}
    assert "cat" in whole["contrasts"]["ties:density=0.5"]
    assert "cat" not in whole["contrasts"]["cat"]


def test_a_density_that_was_named_is_not_tuned(whole):
    assert {t["variant"] for t in whole["methods"]["ties:density=0.5"]["tried"]} == {""}


class Stop(KeyboardInterrupt):
    """Somebody pressed Ctrl-C."""


def test_an_interrupted_run_goes_on_to_the_same_result(model, suite, whole, tmp_path):
    def stop(what, done, total):
        if what == "fusing weights" and done:
            raise Stop

    with pytest.raises(Stop), listen(stop):
        bench.run(model, suite, wanted(), tmp_path / "out.json", tmp_path / "work")
    assert not (tmp_path / "out.json").exists()
    rows = {p: p.stat().st_mtime_ns for p in (tmp_path / "work" / "rows").iterdir()}
    assert len(rows) == 5
    again = bench.run(model, suite, wanted(), tmp_path / "out.json", tmp_path / "work")
    assert plain(again) == plain(whole)
    assert all(p.stat().st_mtime_ns == t for p, t in rows.items())


def test_edges_that_were_interrupted_train_on_to_the_same_adapters(model, suite, whole, work, tmp_path):
    def stop(what, done, total):
        if what == "Training film" and done:
            raise Stop

    with pytest.raises(Stop), listen(stop):
        bench.edges(model, suite, wanted(joint=False), tmp_path)
    trained = []
    with listen(lambda what, done, total: trained.append((what, done))):
        adapters, _ = bench.edges(model, suite, wanted(joint=False), tmp_path)
    assert ("Training law", 0) not in trained  # it had ended
    for adapter, other in zip(adapters, bench.edges(model, suite, wanted(), work / "whole")[0]):
        assert all(torch.equal(adapter.parts[n].left, p.left) for n, p in other.parts.items())


def test_a_finished_run_asks_nothing_again(model, suite, whole, work):
    said = []
    with listen(lambda what, done, total: said.append(what)):
        again = bench.run(model, suite, wanted(), work / "again.json", work / "whole")
    assert again == whole
    assert not {"Asking", "fusing weights"} & set(said)


def test_a_folder_of_another_run_gives_its_adapters_and_none_of_its_answers(model, suite, whole, work):
    trained = []
    with listen(lambda what, done, total: trained.append(done) if what.startswith("Training") else None):
        other = bench.run(model, suite, wanted("cat", lams=(0.25,)), work / "other.json", work / "whole")
    assert {t["lam"] for t in other["methods"]["cat"]["tried"]} == {0.25}
    assert 0 not in trained


def test_methods_that_weigh_are_asked_by_the_suites_own_template(model, suite, whole, work):
    """Its labels are single tokens in that template alone."""
    asked_ = wanted(
        "lorahub:n_evaluations=6,bounded:n_steps=3:n_rounds=1", {"cr-sign:space=core": CRSign(space="core")}
    )
    rows = bench.run(model, suite, asked_, work / "weighed.json", work / "whole")["methods"]
    for name in asked_.methods:
        assert [t["lam"] for t in rows[name]["tried"]] == [1.0]
    assert not any(">" in name for name in rows)  # no resolver stands before them


def test_resolvers_stand_before_the_methods_that_can_follow():
    resolvers = {"cr-sign": CRSign(), "cr-subspace": CRSubspace()}
    names = [name for name, _, _ in bench._pairs(wanted("cat,tsv,linear", resolvers))]
    assert names == ["cat", "tsv", "linear", "cr-sign>cat", "cr-subspace>cat", "cr-subspace>tsv"]


def test_guessing_is_no_result(model, suite, tmp_path):
    idle = dataclasses.replace(wanted("cat"), joint=False, lora=LoraSettings(rank=1, n_steps=1, learning_rate=1e-9))
    mixed = {d: tuple(dataclasses.replace(q, answer=i % 3) for i, q in enumerate(own)) for d, own in suite.test.items()}
    with pytest.raises(UserError, match="No signal"):
        bench.run(model, dataclasses.replace(suite, test=mixed), idle, tmp_path / "out.json", tmp_path / "work")
    assert not (tmp_path / "out.json").exists()


def test_pruned_edges_are_recovered(tiny, suite, tmp_path):
    model = made.base(tiny, n_blocks=3)
    adapters, others = bench.edges(model, suite, wanted(ratios=(0.4, 0.0), joint=False, score="magnitude"), tmp_path)
    assert others == {}
    assert [bool(a.kept) for a in adapters] == [True, False, True]
    assert all(p.shape == tuple(model.matrix(n).shape) for a in adapters for n, p in a.parts.items())


def test_a_pruned_edge_is_asked_at_every_step_on_the_way(tiny, suite, tmp_path):
    model = made.base(tiny, n_blocks=3)
    how = wanted("cat", ratios=(0.4, 0.0, 0.0), unpruned=True, score="magnitude", align="none")
    result = bench.run(model, suite, how, tmp_path / "out.json", tmp_path / "work")
    (domain,) = result["transfer"]
    told, names = result["transfer"][domain], ("base", "pruned", "trained", "recovered", "unpruned")
    assert domain == suite.domains[0] and told["ratio"] == pytest.approx(0.4, abs=0.1)
    assert told["edge_mib"] < told["whole_mib"]
    for name, row in (("base", "base"), ("recovered", f"single:{domain}"), ("unpruned", f"unpruned:{domain}")):
        assert told[name] == result["methods"][row]["single_by_domain"][domain]
    assert told["trained"] > told["pruned"] and told["unpruned"] > told["base"], [told[n] for n in names]
    assert told["gap"]["value"] == pytest.approx(told["trained"] - told["recovered"])
    assert told["kept"] == pytest.approx((told["recovered"] - told["base"]) / (told["unpruned"] - told["base"]))
    said = []
    with listen(lambda what, done, total: said.append(what)):
        again = bench.run(model, suite, how, tmp_path / "again.json", tmp_path / "work")
    assert again["transfer"] == result["transfer"] and "Asking" not in said


def test_a_run_without_pruned_edges_tells_nothing_of_transfer(whole):
    assert "transfer" not in whole


def test_too_many_questions_a_prompt_are_refused_before_any_training(model, suite, tmp_path):
    with pytest.raises(UserError, match="2 to 3 questions"):
        bench.run(model, suite, dataclasses.replace(wanted(), k=4), tmp_path / "out.json", tmp_path / "work")
    assert not (tmp_path / "work" / "edges").exists()


# ---------------------------------------------------------------- asking


def test_a_change_beside_the_weights_answers_as_the_changed_model(model, suite):
    change = as_change(made.adapter(model, "one", 0, size=2.0), lam=1.5)
    rows = bundles(suite.test, 2, n_bundles=2)
    weights = {model.anatomy.path(n) + ".weight": model.matrix(n) + p.delta().float() for n, p in change.parts.items()}
    beside = asked(model, change, rows, wording="synth")
    inside = asked(model.with_weights(weights), None, rows, wording="synth")
    assert beside.chosen == inside.chosen
    assert likelihoods(beside) == pytest.approx(likelihoods(inside), abs=1e-4)
    assert asked(model, None, rows, wording="synth").scores != beside.scores


def test_the_likelihood_of_a_tuple_is_the_sum_over_its_parts(model, suite):
    rows = bundles(suite.test, 2, n_bundles=1)
    found = asked(model, None, rows, wording="synth")
    for i, (row, scores) in enumerate(zip(rows, found.scores)):
        assert likelihoods(found)[i] == pytest.approx(sum(s[q.answer] for s, q in zip(scores, row.parts)))
    some = judge(model, rows, wording="synth")(as_change(made.adapter(model, "zero", 0, size=0.0)), [3, 1])
    assert some == pytest.approx(likelihoods(found)[[3, 1]], abs=1e-5)


def test_right_answers_stand_in_the_order_of_the_questions_whatever_the_order_of_asking(model, suite):
    rows = singles(bundles(suite.test, 2, n_bundles=2))
    found = asked(model, None, rows, wording="synth")
    turned = Answers(found.instances[::-1], found.chosen[::-1], found.how, found.scores[::-1])
    for domain, right in right_by_domain(found).items():
        assert right.tolist() == right_by_domain(turned)[domain].tolist()
        questions = sorted((i.parts[0] for i in rows if i.parts[0].domain == domain), key=lambda q: q.key)
        of = {i.parts[0].key: c[0] for i, c in zip(found.instances, found.chosen)}
        assert right.tolist() == [of[q.key] == q.answer for q in questions]
    assert right_by_domain(Answers((Instance(0, rows[0].parts),), ((-1,),)))[rows[0].parts[0].domain].tolist() == [
        False
    ]
