"""Fusing as a user asks for it: report, scale, certificate, and folders that plain PEFT loads."""

from __future__ import annotations

import dataclasses

import fuse_asked as made
import pytest
import torch

from retouch import registry
from retouch.change import LowRank
from retouch.errors import BoundRefused, StoreError, UserError
from retouch.fuse.adapter_file import open_adapter, write_adapter
from retouch.fuse.asking import as_change, asked, right_by_domain
from retouch.fuse.base import Adapter, Kept
from retouch.fuse.compose import Instance
from retouch.fuse.cr_subspace import CRSubspace
from retouch.fuse.merging import conflict_report, merge, merge_to_folder, seen_by_edges
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
    kept = seen_by_edges(cut).kept
    assert kept[down] == Kept("columns", tuple(i for i in range(64) if i not in (1, 5)))
    assert kept[query].axis == "rows" and 3 not in kept[query].index and len(kept[query].index) == 31
    assert seen_by_edges(dataclasses.replace(cut, plan="")).kept == {}  # nothing says that it was pruned
    known = dataclasses.replace(cut, kept={down: Kept("rows", (0,))})
    assert seen_by_edges(known) is known


def test_a_weight_that_training_left_at_zero_was_seen_whole(model):
    """B begins at zero: an adapter whose whole left factor is 0 learnt nothing there, its edge saw all of it."""
    one = made.adapter(model, "one", 0, plan="p")
    query = made.WEIGHTS[1]
    idle = {**one.parts, query: LowRank(torch.zeros_like(one.parts[query].left), one.parts[query].right)}
    assert query not in seen_by_edges(dataclasses.replace(one, parts=idle)).kept


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


def test_a_density_that_was_given_is_kept_when_the_scale_is_tuned(model, suite, edges):
    quick = {"suite": suite, "tuned": True, "lams": (1.0,), "n_selection": 1}
    given = merge(model, edges, registry.make("fuse", "ties", density=0.35), **quick).tuned
    assert given.method.density == 0.35
    assert len({t.variant for t in merge(model, edges, registry.make("fuse", "ties"), **quick).tuned.tried}) > 1


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


def test_the_certificate_compares_with_the_base_and_each_domains_own_adapter(model, edges):
    many = made.suite({"test": 40})
    found = merge(model, edges, cat(), suite=many, limit=0.9, n_certify=30)
    pairs = {(d.domain, d.reference): d.certificate.n for d in found.proof.domains}
    assert pairs == {("law", "base"): 30, ("film", "base"): 30, ("news", "base"): 30, ("law", "adapter law"): 30,
                     ("film", "adapter film"): 30}  # fmt: skip
    alone = [Instance(0, (q,)) for q in sorted(many.test["law"], key=lambda q: q.key)[:30]]
    systems = (as_change(edges[0]), found.change)
    right = [right_by_domain(asked(model, c, alone, wording="synth"))["law"] for c in systems]
    own = next(d for d in found.proof.domains if d.reference == "adapter law")
    assert own.certificate.mean == pytest.approx(right[0].mean() - right[1].mean())
    assert found.proof.attempt == 1
    assert merge(model, edges, cat(), suite=many, limit=0.9, n_certify=30).proof.attempt == 2
    assert any(t.title == "Drop on held-out questions" for t in found.report.tables)


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
