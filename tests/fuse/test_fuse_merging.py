"""Fusing as a user asks for it: report, scale, certificate, and folders that plain PEFT loads."""

from __future__ import annotations

import dataclasses

import fuse_asked as made
import pytest
import torch
from fuse_pruning import random_adapter

from retouch import registry
from retouch.change import LowRank
from retouch.errors import BoundRefused, StoreError, UserError
from retouch.fuse.adapter_file import open_adapter, write_adapter
from retouch.fuse.asking import as_change, asked, likelihoods, right_by_domain
from retouch.fuse.base import Adapter, Kept
from retouch.fuse.compose import Instance
from retouch.fuse.cr_sign import CRSign
from retouch.fuse.cr_subspace import CRSubspace
from retouch.fuse.merging import conflict_report, fused_ranks, merge, merge_to_folder, seen_by_edges
from retouch.fuse.prune import plan_prune
from retouch.fuse.pruned import pruned
from retouch.fuse.recover import recover
from retouch.model import wrap
from retouch.report import to_json, to_terminal


@pytest.fixture(scope="module")
def model(tiny):
    return made.base(tiny)


@pytest.fixture(scope="module")
def suite():
    return made.suite()


@pytest.fixture(scope="module")
def edges(model):
    return [made.adapter(model, name, i) for i, name in enumerate(("law", "film"))]


def cat(**settings):
    return registry.make("fuse", "cat", **settings)


def deltas(parts):
    return {name: part.delta() for name, part in parts.items()}


# ---------------------------------------------------------------- what an edge could see


def test_what_an_edge_could_not_see_is_read_from_its_zeros(model):
    whole = made.adapter(model, "one", 0)
    left = {n: p.left.clone() for n, p in whole.parts.items()}
    right = {n: p.right.clone() for n, p in whole.parts.items()}
    down, query = made.WEIGHTS
    right[down][:, [1, 5]] = 0
    left[query][3] = 0
    cut = Adapter("one", {n: LowRank(left[n], right[n]) for n in left}, whole.base, plan="p")
    kept = seen_by_edges(cut, model).kept
    assert kept[down] == Kept("columns", tuple(i for i in range(64) if i not in (1, 5)))
    assert kept[query].axis == "rows" and 3 not in kept[query].index and len(kept[query].index) == 31
    assert seen_by_edges(dataclasses.replace(cut, plan=""), model).kept == {}  # nothing says that it was pruned
    known = dataclasses.replace(cut, kept={down: Kept("rows", (0,))})
    assert seen_by_edges(known, model) is known


def test_zeros_along_the_axis_that_is_never_pruned_say_nothing(model):
    """A gradient may leave one input of a query at zero; no plan cuts it there, and nobody could mend such a clash."""
    query = made.WEIGHTS[1]
    one, two = (made.adapter(model, name, i, plan="p") for i, name in enumerate(("one", "two")))
    one.parts[query].right[:, 2] = 0
    two.parts[query].left[3] = 0
    seen = [seen_by_edges(a, model) for a in (one, two)]
    assert query not in seen[0].kept and seen[1].kept[query].axis == "rows"
    assert merge(model, seen, cat()).change.parts


def test_what_the_record_says_is_not_guessed_again(model, tmp_path):
    plan = plan_prune(model, ratio=0.5, score="random", align="none", n_first=0, n_last=1)
    full = recover(random_adapter(pruned(model, plan), plan=plan.hash), plan, model)
    ranks = {n: p.rank for n, p in full.parts.items()}
    told = {"new": full.kept, "whole": {}, "old": None}
    for name, kept in told.items():
        write_adapter(tmp_path / name, iter(full.parts.items()), ranks, model, plan=full.plan, kept=kept)
    seen = {name: seen_by_edges(open_adapter(tmp_path / name, model), model).kept for name in told}
    assert dict(seen["new"]) == dict(seen["old"]) == dict(full.kept) != {}
    assert dict(seen["whole"]) == {}


def test_a_weight_that_training_left_at_zero_was_seen_whole(model):
    """B begins at zero: an adapter whose whole left factor is 0 learnt nothing there, its edge saw all of it."""
    one = made.adapter(model, "one", 0, plan="p")
    query = made.WEIGHTS[1]
    idle = {**one.parts, query: LowRank(torch.zeros_like(one.parts[query].left), one.parts[query].right)}
    assert query not in seen_by_edges(dataclasses.replace(one, parts=idle), model).kept


# ---------------------------------------------------------------- fusing


def test_the_report_says_what_was_fused_and_where_edges_disagree(model, edges):
    found = merge(model, edges, cat(lam=2.0), weights=[3, 1])
    assert found.tuned is None and found.proof is None
    for name, delta in deltas(found.change.parts).items():
        wanted = 2 * (0.75 * edges[0].parts[name].delta() + 0.25 * edges[1].parts[name].delta())
        assert torch.allclose(delta, wanted, atol=1e-6)
    told = to_json(found.report)
    assert told["numbers"]["adapters"] == {"law": 0.75, "film": 0.25}
    assert told["numbers"]["settings"]["lam"] == 2.0
    assert found.report.summary.startswith("2 adapters fused by cat.")
    assert found.report.tables and to_terminal(found.report)


def test_weights_by_numbers_of_examples(model, edges):
    found = merge(model, edges, cat(), weights="examples")
    assert found.change.notes["weights"] == pytest.approx([1 / 3, 2 / 3])


def test_one_adapter_alone_can_be_merged(model, edges):
    found = merge(model, edges[:1], cat())
    assert all(torch.allclose(d, edges[0].parts[n].delta(), atol=1e-6) for n, d in deltas(found.change.parts).items())
    assert to_terminal(found.report)
    assert conflict_report(model, edges[:1]).summary


def test_the_scale_is_chosen_on_selection(model, suite, edges):
    found = merge(model, edges, cat(), suite=suite, tuned=True, lams=(0.5, 4.0), n_selection=1)
    scores = {t.lam: t.score for t in found.tuned.tried}
    assert found.tuned.method.lam == max(scores, key=scores.get)
    assert found.change.settings["lam"] == found.tuned.method.lam
    assert any(t.title == "Scales that were tried" for t in found.report.tables)


def test_a_template_with_answered_examples_serves_tuning_and_the_certificate(model, suite, edges):
    few = {d: own[:3] for d, own in suite.train.items()}
    shown = dataclasses.replace(suite, template="two_shot", shots=few)
    found = merge(model, edges, cat(), suite=shown, tuned=True, lams=(0.5, 4.0), n_selection=1, limit=1.0)
    assert found.tuned is not None and found.proof is not None and found.proof.holds
    none_kept = dataclasses.replace(shown, shots={})
    with pytest.raises(UserError, match="2 answered examples of 1 question each are wanted in front, and 0 questions"):
        merge(model, edges, cat(), suite=none_kept, tuned=True)


def test_a_density_that_was_given_is_kept_when_the_scale_is_tuned(model, suite, edges):
    quick = {"suite": suite, "tuned": True, "lams": (1.0,), "n_selection": 1}
    given = merge(model, edges, registry.make("fuse", "ties", density=0.35), **quick).tuned
    assert given.method.density == 0.35
    assert len({t.variant for t in merge(model, edges, registry.make("fuse", "ties"), **quick).tuned.tried}) > 1
    default = merge(model, edges, registry.make("fuse", "ties"), fixed=("density",), **quick).tuned
    assert default.method.density == 0.2 and [t.variant for t in default.tried] == [""]


def test_chosen_weights_and_prices_stand_in_the_report(model, suite, edges):
    method = registry.make("fuse", "bounded", n_steps=4, n_rounds=1, reference="base")
    found = merge(model, edges, method, suite=suite)  # the suite's template, in which its labels are single tokens
    titles = [t.title for t in found.report.tables]
    assert "Weights that were chosen" in titles and "What the bounds cost" in titles
    assert to_json(found.report)["numbers"]["adapters"] == dict(zip(("law", "film"), found.change.notes["weights"]))
    assert set(found.report.numbers["weighing"]["multipliers"]) == set(made.RIGHT)
    with pytest.raises(UserError, match="needs questions"):
        merge(model, edges, method)


@pytest.mark.parametrize("asked_", [{"tuned": True}, {"limit": 0.1}])
def test_tuning_and_certifying_need_questions(model, edges, asked_):
    with pytest.raises(UserError, match="need questions of the domains"):
        merge(model, edges, cat(), **asked_)


# ---------------------------------------------------------------- the certificate


def test_the_certificate_compares_with_the_base_and_the_best_single_adapter_on_selection(model, edges):
    many = made.suite({"test": 40})
    found = merge(model, edges, cat(), suite=many, limit=0.9, n_certify=30)
    how = {"wording": "synth"}
    best = {}
    for domain in many.domains:  # by hand: most right answers, then the likelier ones
        rows = [Instance(i, (q,)) for i, q in enumerate(many.selection[domain])]
        told = [asked(model, as_change(a), rows, **how) for a in edges]
        marks = [(right_by_domain(t)[domain].mean(), likelihoods(t).mean()) for t in told]
        best[domain] = edges[marks.index(max(marks))].name
    pairs = {(d.domain, d.reference): d.certificate.n for d in found.proof.domains}
    assert pairs == {(d, r): 30 for d in many.domains for r in ("base", f"adapter {best[d]}")}
    own = next(a for a in edges if a.name == best["law"])
    alone = [Instance(0, (q,)) for q in sorted(many.test["law"], key=lambda q: q.key)[:30]]
    right = [right_by_domain(asked(model, c, alone, **how))["law"] for c in (as_change(own), found.change)]
    proof = next(d for d in found.proof.domains if (d.domain, d.reference) == ("law", f"adapter {own.name}"))
    assert proof.certificate.mean == pytest.approx(right[0].mean() - right[1].mean())
    assert {s.domain: s.adapter for s in found.proof.singles if s.best} == best
    titles = [t.title for t in found.report.tables]
    assert "Drop on held-out questions" in titles and "Single adapters on selection questions" in titles


def test_adapters_need_not_be_called_like_the_domains(model, edges):
    named = [dataclasses.replace(a, name=f"{a.name}_v2") for a in edges]
    found = merge(model, named, cat(), suite=made.suite(), limit=0.9).proof
    assert len(found.domains) == 6 and {d.reference for d in found.domains} > {"base"}
    alone = merge(model, named[:1], cat(), suite=made.suite(), limit=0.9).proof
    assert {d.reference for d in alone.domains} == {"base", "adapter law_v2"} and alone.singles == ()


def test_without_selection_questions_no_best_adapter_can_be_chosen(model, edges, suite):
    empty = dataclasses.replace(suite, selection={**suite.selection, "film": ()})
    with pytest.raises(UserError, match="film has no selection questions"):
        merge(model, edges, cat(), suite=empty, limit=0.9)


def test_other_questions_of_the_same_test_split_are_another_attempt(model, edges):
    many = made.suite({"test": 40})
    tries = [merge(model, edges, cat(), suite=many, limit=0.9, n_certify=n).proof.attempt for n in (30, 30, 29, None)]
    assert tries == [1, 1, 2, 3], "the same look again is none"
    two = {split: {d: own for d, own in many.questions(split).items() if d != "news"} for split in made.N}
    fewer = dataclasses.replace(many, domains=("law", "film"), **two)
    assert merge(model, edges, cat(), suite=fewer, limit=0.9).proof.attempt == 4


def test_too_few_questions_cannot_certify(model, suite, edges):
    found = merge(model, edges, cat(), suite=suite, limit=0.05)
    assert not found.proof.holds
    assert not to_json(found.report)["numbers"]["proof"]["holds"]
    with pytest.raises(BoundRefused, match="questions a domain are needed"):
        found.proof.require()


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("resolver", [None, CRSubspace()])
@pytest.mark.parametrize("name", ["cat", "tsv"])
def test_weight_by_weight_into_a_folder_equals_the_whole_change(model, edges, tmp_path, name, resolver):
    method = registry.make("fuse", name)
    merge_to_folder(model, edges, method, tmp_path / "fused", weights=[1, 3], resolver=resolver)
    back = open_adapter(tmp_path / "fused", model)
    whole = merge(model, edges, method, weights=[1, 3], resolver=resolver).change
    assert set(back.parts) == set(whole.parts)
    for weight, part in whole.parts.items():
        assert torch.allclose(back.parts[weight].delta(), part.delta(), atol=1e-6)
    assert back.notes["fused"] == {"law": 0.25, "film": 0.75}
    assert back.notes["method"] == name


def test_adapters_in_files_give_the_same_folder_as_those_in_memory(model, edges, tmp_path):
    for adapter in edges:
        ranks = {n: p.rank for n, p in adapter.parts.items()}
        write_adapter(tmp_path / adapter.name, iter(adapter.parts.items()), ranks, model)
    opened = [open_adapter(tmp_path / a.name, model) for a in edges]
    merge_to_folder(model, opened, cat(), tmp_path / "one")
    merge_to_folder(model, edges, cat(), tmp_path / "two")
    tensors = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two")]
    assert tensors[0] == tensors[1]


def test_nothing_is_left_where_streaming_fails(model, edges, tmp_path):
    torn = dataclasses.replace(
        edges[1], parts={**edges[1].parts, made.WEIGHTS[1]: LowRank(torch.ones(3, 1), torch.ones(1, 3))}
    )
    with pytest.raises(UserError, match="disagree about the size"):
        merge_to_folder(model, [edges[0], torn], cat(), tmp_path / "fused")
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "cache"])
    with pytest.raises((UserError, StoreError)):
        merge_to_folder(model, edges, registry.make("fuse", "lorahub"), tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


CERTAIN = [("cat", {}), ("svd", {"rank": 1}), ("svd", {"rank": 20}), ("iso", {"published": True}),
           ("tsv", {"published": True}), ("ties", {"rank": 20}), ("ties", {"rank": 20, "space": "core"}),
           ("dare", {}), ("knots", {})]  # fmt: skip


@pytest.mark.parametrize("name, settings", CERTAIN)
def test_a_file_announces_the_rank_that_the_method_gives(model, tmp_path, name, settings):
    given = [made.adapter(model, n, i, rank=2 + i) for i, n in enumerate(("law", "film"))]
    method = registry.make("fuse", name, **settings)
    merge_to_folder(model, given, method, tmp_path / "fused")
    back, whole = open_adapter(tmp_path / "fused", model), merge(model, given, method).change
    for weight, part in back.parts.items():
        assert part.rank == whole.parts[weight].rank, weight
        assert bool(part.left.abs().sum(0).all()) and bool(part.right.abs().sum(1).all())  # none is filled up
        assert torch.allclose(part.delta(), whole.parts[weight].delta(), atol=1e-6)


def test_behind_a_resolver_of_entries_svd_may_keep_more_than_the_sum_of_ranks(model, edges, tmp_path):
    merge_to_folder(model, edges, registry.make("fuse", "svd", rank=9), tmp_path / "fused", resolver=CRSign())
    assert {p.rank for p in open_adapter(tmp_path / "fused", model).parts.values()} == {9}


@pytest.mark.parametrize("words", [{"resolver": None}, {"resolver": CRSubspace()}, {"resolver": CRSign(space="core")}])
@pytest.mark.parametrize("name, settings", [*CERTAIN, ("iso", {}), ("tsv", {})])
def test_what_is_announced_suffices_behind_every_resolver(model, edges, tmp_path, name, settings, words):
    merge_to_folder(model, edges, registry.make("fuse", name, **settings), tmp_path / "fused", **words)
    assert (tmp_path / "fused" / "retouch.json").is_file()


def test_a_rank_that_no_adapter_may_have_is_refused_before_any_work(tiny):
    network, words = tiny("llama", n_blocks=1, hidden_size=1056, intermediate_size=1060)
    wide, name = wrap(network, words), "blocks.0.mlp.down"
    tall = Adapter("tall", {name: LowRank(torch.ones(1056, 1), torch.ones(1, 1060))}, wide.base_fingerprint)
    with pytest.raises(UserError, match=r"iso gives blocks.0.mlp.down the rank 1,056, and an adapter may have 1,024"):
        fused_ranks(wide, [tall], registry.make("fuse", "iso", published=True))
    assert fused_ranks(wide, [tall], cat()) == {name: 1}


def test_weights_that_only_adapters_of_weight_0_change_are_left_out(model, edges, tmp_path):
    down = made.WEIGHTS[0]
    small = dataclasses.replace(edges[0], parts={down: edges[0].parts[down]})
    assert fused_ranks(model, [small, edges[1]], cat(), [1, 0]) == {down: 2}
    merge_to_folder(model, [small, edges[1]], cat(), tmp_path / "fused", weights=[1, 0])
    back = open_adapter(tmp_path / "fused", model)
    assert set(back.parts) == {down} and torch.allclose(back.parts[down].delta(), small.parts[down].delta(), atol=1e-6)


def test_a_result_never_takes_the_place_of_what_it_is_made_of(model, edges, tmp_path):
    for adapter in edges:
        write_adapter(tmp_path / adapter.name, iter(adapter.parts.items()),
                      {n: p.rank for n, p in adapter.parts.items()}, model)  # fmt: skip
    opened = [open_adapter(tmp_path / a.name, model) for a in edges]
    before = (tmp_path / "law" / "adapter_model.safetensors").read_bytes()
    for place in ("law", "film/../law", "."):
        with pytest.raises(UserError, match="would replace"):
            merge_to_folder(model, opened, cat(), tmp_path / place)
    assert (tmp_path / "law" / "adapter_model.safetensors").read_bytes() == before


# ---------------------------------------------------------------- what a result says of itself


def test_a_folder_and_a_change_say_the_same_of_how_they_were_made(model, edges, tmp_path):
    method = registry.make("fuse", "ties", density=0.5, rank=3)
    told = merge_to_folder(model, edges, method, tmp_path / "fused", weights=[1, 3], resolver=CRSign(beta=0.5))
    notes = open_adapter(tmp_path / "fused", model).notes
    change = merge(model, edges, method, weights=[1, 3], resolver=CRSign(beta=0.5)).change
    assert {k: v for k, v in notes.items() if k != "file"} == told == change.notes
    assert told["method"] == "ties" and told["settings"]["density"] == 0.5 and told["resolver"]["beta"] == 0.5
    assert set(told["kept_energy"]) == set(made.WEIGHTS) and all(0 < v < 1 for v in told["kept_energy"].values())
    linear = merge_to_folder(model, edges, registry.make("fuse", "linear"), tmp_path / "linear")
    assert all(v > 0.1 for v in linear["relative_error"].values())


def test_scale_and_certificate_are_kept_with_what_they_belong_to(model, suite, edges):
    method = registry.make("fuse", "svd", rank=1)
    found = merge(model, edges, method, suite=suite, tuned=True, lams=(0.5, 2.0), n_selection=1, limit=1.0)
    notes = found.change.notes
    assert notes["settings"]["lam"] == found.tuned.method.lam
    assert [t["scale"] for t in notes["tuned"]["tried"]] == [t.lam for t in found.tuned.tried]
    assert notes["proof"] == found.proof.to_dict()
    assert notes["kept_energy"] == to_json(found.report)["numbers"]["kept_energy"]
    table = next(t for t in found.report.tables if t.title == "What a smaller rank has kept")
    assert dict(table.rows) == notes["kept_energy"]


def test_regmean_takes_moments_from_python(model, edges):
    def moments(seed):
        draw = torch.Generator().manual_seed(seed)
        return {n: torch.diag(torch.rand(model.matrix(n).shape[1], generator=draw) + 0.1) for n in made.WEIGHTS}

    given = [moments(0), moments(1)]
    found = merge(model, edges, registry.make("fuse", "regmean"), moments=given).change.parts
    for name in made.WEIGHTS:
        sizes = [g[name].diagonal().double() for g in given]
        by_input = sum(e.parts[name].delta() * g for e, g in zip(edges, sizes)) / sum(sizes)
        assert torch.allclose(found[name].delta(), by_input, atol=1e-5)
