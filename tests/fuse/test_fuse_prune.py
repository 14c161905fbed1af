from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from fuse_pruning import PRUNABLE, TEXT, logits, opened, rows

from retouch import store
from retouch.errors import ModelError, SettingsError, StoreError, UserError, WrongBase
from retouch.fuse import memory
from retouch.fuse._units import KeptUnits, dense_blocks, units_of
from retouch.fuse.memory import Load
from retouch.fuse.prune import PrunePlan, open_plan, plan_prune, save_plan
from retouch.fuse.pruned import open_pruned, pruned, save_pruned


def planned(model: Any, **how: Any) -> PrunePlan:
    return plan_prune(model, **{"ratio": 0.5, "score": "random", "align": "none", "text": TEXT} | how)


def zeroed(model: Any, plan: PrunePlan) -> Any:
    """The whole model whose pruned input columns of out and down are 0."""
    units, values = units_of(model), {}
    for block, kept in enumerate(plan.kept):
        for part in ("attention.out", "mlp.down"):
            index = units.index(part, kept) if part in units.parts else None
            if index is not None:
                name = f"blocks.{block}.{part}"
                matrix = torch.zeros_like(model.matrix(name))
                matrix[:, index] = model.matrix(name)[:, index]
                values[model.anatomy.weight(name)] = matrix.T if model.anatomy.transposed(name) else matrix
    return model.with_weights(values)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", PRUNABLE)
def test_pruned_model_is_the_whole_one_with_zeroed_columns(tiny: Any, name: str, attention: str) -> None:
    model = opened(tiny, name)
    model.network.set_attn_implementation(attention)
    plan = planned(model)
    small = pruned(model, plan)
    assert plan.attention == (name != "gemma_one") and bool(plan.notes) == (name == "gemma_one")
    assert small.matrix("blocks.1.mlp.down").shape[1] < model.matrix("blocks.1.mlp.down").shape[1]
    reference = zeroed(model, plan)
    # exact but for how a matrix product orders its sums, which in float32 depends on the width
    assert (logits(small) - logits(reference)).abs().max() < 1e-5 < (logits(small) - logits(model)).abs().max()
    written = [m.network.generate(**rows(m), max_new_tokens=6, do_sample=False) for m in (small, reference)]
    assert torch.equal(*written)
    double = dataclasses.replace(model, network=model.network.double(), known_digests={})
    plan = planned(double)
    assert torch.equal(logits(pruned(double, plan)), logits(zeroed(double, plan)))


def test_pruning_leaves_the_model_alone_and_shares_what_is_whole(tiny: Any) -> None:
    model = opened(tiny, "qwen2")
    before = model.fingerprint
    small = pruned(model, planned(model))
    assert dataclasses.replace(model, known_digests={}).fingerprint == before
    assert small.weight("blocks.0.mlp.up") is model.weight("blocks.0.mlp.up")
    assert small.fingerprint == dataclasses.replace(small, known_digests={}).fingerprint != before
    assert small.base_fingerprint == before


@pytest.mark.parametrize("name", ["gpt2", "phi3", "opt", "olmo2", "gptj"])
def test_families_whose_attention_stays_lose_neurons_only(tiny: Any, name: str) -> None:
    fields = {"num_key_value_heads": 2} if name in ("phi3", "olmo2") else {}
    network, tokenizer = tiny(name, n_blocks=4, **fields)
    from retouch.model import wrap

    model = wrap(network, tokenizer)
    plan = planned(model)
    assert not plan.attention and "feed-forward" in plan.notes[0]
    assert all(len(k.kv) == model.anatomy.kv_heads for k in plan.kept) and len(plan.kept[1].ff) == 32
    difference = (logits(pruned(model, plan)) - logits(zeroed(model, plan))).abs().max()
    assert difference < 1e-4


def test_a_static_cache_is_refused(tiny: Any) -> None:
    from transformers import StaticCache

    model = opened(tiny, "llama")
    small = pruned(model, planned(model))
    with pytest.raises(ModelError, match="static cache"):
        small.network(**rows(model), past_key_values=StaticCache(config=model.network.config, max_cache_len=16))


def test_encoders_are_refused(tiny: Any) -> None:
    from retouch.model import wrap

    with pytest.raises(ModelError, match="encoder"):
        planned(wrap(*tiny("bert", n_blocks=4)))


# ---------------------------------------------------------------- scores


def test_scores_choose_differently_and_the_same_again(tiny: Any) -> None:
    model = opened(tiny, "llama")
    scores = ("random", "magnitude", "wanda", "taylor", "flap")
    plans = {s: planned(model, score=s, ratio=0.6) for s in scores}
    assert len({p.kept for p in plans.values()}) == 5
    assert all(planned(model, score=s, ratio=0.6).hash == plans[s].hash for s in scores)
    assert planned(model, seed=1).kept != planned(model, seed=0).kept
    second = planned(model, score="taylor", ratio=0.6, second_order=True)
    assert second.hash != plans["taylor"].hash


def test_scores_match_the_obvious_formulas(tiny: Any) -> None:
    from retouch.fuse._inputs import Inputs
    from retouch.fuse._scores import unit_scores

    model = opened(tiny, "qwen3")
    units, generator = units_of(model), torch.Generator().manual_seed(0)
    seen = {}
    for name in ("blocks.1.attention.out", "blocks.1.mlp.down"):
        x = torch.randn(50, model.matrix(name).shape[1], generator=generator, dtype=torch.float64)
        seen[name] = x, Inputs(50, x.mean(0), (x**2).mean(0))
    inputs = {n: i for n, (_, i) in seen.items()}
    wanda = unit_scores(model, units, "wanda", [1], inputs=inputs)[1]
    flap = unit_scores(model, units, "flap", [1], inputs=inputs)[1]
    magnitude = unit_scores(model, units, "magnitude", [1])[1]
    x, weight = seen["blocks.1.attention.out"][0], model.matrix("blocks.1.attention.out").double()
    for group, lines in ((0, slice(0, 32)), (1, slice(32, 64))):  # two heads of 16 each
        assert torch.isclose(wanda[0][group], (x.norm(dim=0) * weight.abs().mean(0))[lines].sum())
        assert torch.isclose(flap[0][group], ((x.var(0, unbiased=False) * (weight**2).sum(0)) ** 2)[lines].sum())
    x, down = seen["blocks.1.mlp.down"][0], model.matrix("blocks.1.mlp.down").double()
    assert torch.isclose(flap[1][7], x[:, 7].var(unbiased=False) * (down[:, 7] ** 2).sum())
    gate, up = (model.matrix(f"blocks.1.mlp.{p}").double()[7].norm() for p in ("gate", "up"))
    assert torch.isclose(magnitude[1][7], gate + up + down[:, 7].norm())


def test_taylor_is_the_summed_product_of_weight_and_gradient(tiny: Any) -> None:
    from retouch.fuse._scores import unit_scores

    model = opened(tiny, "llama")
    row = (5, 9, 33, 12, 80, 7)
    found = unit_scores(model, units_of(model), "taylor", [2], rows=[row])[2][1]
    weights = [model.weight(f"blocks.2.mlp.{p}") for p in ("gate", "up", "down")]
    ids = torch.tensor([row])
    for w in weights:
        w.requires_grad_(True)
    loss = model.network(input_ids=ids, labels=ids).loss
    gate, up, down = torch.autograd.grad(loss, weights)
    expected = (weights[0] * gate).abs().sum(1) + (weights[1] * up).abs().sum(1) + (weights[2] * down).abs().sum(0)
    assert torch.allclose(found.float(), expected, rtol=1e-4)


def test_flap_gives_blocks_widths_of_their_own(tiny: Any) -> None:
    model = opened(tiny, "llama", intermediate_size=1024, num_key_value_heads=4)
    plan = planned(model, score="flap", n_first=0, n_last=0)
    assert len(set(plan.widths.values())) > 1
    assert all(len(k.ff) % 16 == 0 and k.kv for k in plan.kept)
    assert abs(plan.ratio - 0.5) < 0.01


# ---------------------------------------------------------------- the budget


@pytest.mark.parametrize("score", ["random", "flap"])
@pytest.mark.parametrize("name", ["llama", "gemma_one", "qwen2"])
def test_ratio_and_budget_are_met_within_a_percent(tiny: Any, name: str, score: str) -> None:
    model = opened(tiny, name, intermediate_size=2048)
    assert abs(planned(model, score=score, ratio=0.4).ratio - 0.4) < 0.01
    load = Load(batch=2, n_tokens=32)
    whole = memory.predicted(model, units_of(model), {}, load).mib
    half = dict.fromkeys((1, 2), (1.0, 1024.0))
    budget = (whole + memory.predicted(model, units_of(model), half, load).mib) / 2
    plan = planned(model, ratio=None, budget_mib=budget, load=load, score=score)
    now = memory.predicted(model, units_of(model), plan.widths, load)
    assert plan.peak["total"] <= budget
    assert budget - now.mib < 0.01 * (budget - memory.RUNTIME_MIB)
    actual = sum(p.numel() for p in pruned(model, plan).network.parameters()) * 4
    assert now.weights == actual


def test_everything_fits(tiny: Any) -> None:
    model = opened(tiny, "llama")
    plan = planned(model, ratio=None, budget_mib=5000)
    assert plan.ratio == 0 and "nothing is pruned" in plan.notes[0]
    assert torch.equal(logits(pruned(model, plan)), logits(model))


def test_too_small_a_budget_names_the_smallest_that_works(tiny: Any) -> None:
    model = opened(tiny, "llama", intermediate_size=2048)
    load = Load(batch=2, n_tokens=256)
    with pytest.raises(UserError, match=r"smallest that works is [\d.]+ MiB") as caught:
        planned(model, ratio=None, budget_mib=351, load=load)
    found = re.search(r"works is ([\d.]+) MiB, ([\d.]+)% of the whole model's ([\d,]+) MiB", str(caught.value))
    assert found is not None
    smallest, share, whole = (float(x.replace(",", "")) for x in found.groups())
    assert whole == pytest.approx(memory.predicted(model, units_of(model), {}, load).mib, abs=1)
    assert share == pytest.approx(100 * smallest / whole, abs=0.2)
    plan = planned(model, ratio=None, budget_mib=smallest, load=load)
    assert 0.8 < plan.ratio <= 0.86 and plan.peak["total"] <= smallest
    with pytest.raises(UserError):
        planned(model, ratio=None, budget_mib=smallest - 0.2, load=load)
    with pytest.raises(UserError, match=r"at most 0\.85"):
        planned(model, ratio=0.9)


def test_requests_that_make_no_sense(tiny: Any) -> None:
    model = opened(tiny, "llama")
    for how in ({"ratio": None}, {"budget_mib": 100}):
        with pytest.raises(UserError, match="budget_mib or ratio"):
            planned(model, **how)
    for budget in (float("nan"), float("inf"), -5.0, 0.0):
        with pytest.raises(UserError, match="finite number above 0"):
            planned(model, ratio=None, budget_mib=budget)
    with pytest.raises(UserError, match="all of them stay whole"):
        planned(model, n_first=4)
    assert dense_blocks(80, None, None) == [*range(7), 76, 77, 78, 79]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"batch": -8}, "batch must be int >= 1; got -8"),
        ({"rank": 0}, "rank must be int >= 1"),
        ({"n_tokens": 0}, "n_tokens must be"),
        ({"n_answer_tokens": -1}, "n_answer_tokens must be"),
        ({"bytes_per_weight": 3}, "bytes_per_weight must be 1|2|4"),
        ({"dropout": float("nan")}, "dropout must be"),
    ],
)
def test_a_load_that_no_edge_can_have_is_refused(how: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Load(**how)
    assert says in str(caught.value)


# ---------------------------------------------------------------- plans and folders


def test_hash_changes_with_any_field(tiny: Any) -> None:
    plan = planned(opened(tiny, "llama"))
    other = {
        "base": "x", "model": "x", "family": "x", "units": (2, 64, 2, 9), "attention": False, "score": "x", "align": "x",
        "kept": (*plan.kept[:-1], KeptUnits((0,), (1,))), "settings": {}, "seed": 9, "stats": "x", "ratio": 0.1,
        "peak": {}, "notes": ("x",),
    }  # fmt: skip
    assert set(other) == {f.name for f in dataclasses.fields(plan)}
    hashes = {dataclasses.replace(plan, **{name: value}).hash for name, value in other.items()}
    assert len(hashes | {plan.hash}) == len(other) + 1


def test_plan_file_round_trip_and_tampering(tiny: Any, tmp_path: Any) -> None:
    model = opened(tiny, "llama")
    plan = planned(model, score="wanda")
    save_plan(plan, tmp_path / "plan.json")
    again = open_plan(tmp_path / "plan.json")
    assert again.hash == plan.hash and again.kept == plan.kept and again.stats
    record = json.loads((tmp_path / "plan.json").read_text())
    for change in ({"seed": 3}, {"kept": {}}, {"kind": "x"}, {"units": 3}):
        (tmp_path / "plan.json").write_text(json.dumps(record | change))
        with pytest.raises(StoreError):
            open_plan(tmp_path / "plan.json")
    record["kept"]["1"]["ff"][0] = 999
    (tmp_path / "plan.json").write_text(json.dumps(record))
    with pytest.raises(StoreError, match="block 1: ff"):
        open_plan(tmp_path / "plan.json")


def test_a_plan_of_another_model_is_refused(tiny: Any) -> None:
    plan = planned(opened(tiny, "llama"))
    with pytest.raises(WrongBase):
        pruned(opened(tiny, "llama", seed=4), plan)


@pytest.mark.parametrize("name", [*PRUNABLE, "gpt2"])
def test_saved_model_reloads_equal_and_holds_no_indices(tiny: Any, tmp_path: Any, name: str) -> None:
    if name == "gpt2":
        from retouch.model import wrap

        model = wrap(*tiny("gpt2", n_blocks=4))
    else:
        model = opened(tiny, name)
    plan = planned(model, score="wanda", align="bias")
    save_pruned(model, plan, tmp_path / "edge")
    again = open_pruned(tmp_path / "edge", device="cpu")
    from retouch.fuse.align import aligned

    small = aligned(model, plan)
    assert torch.equal(logits(again), logits(small))
    assert again.plan == plan.hash and again.base_fingerprint == model.fingerprint and again.align == "bias"
    assert not any(p.is_meta for p in [*again.network.parameters(), *again.network.buffers()])
    assert "kept" not in (tmp_path / "edge" / "retouch.json").read_text()
    assert again.anatomy.tied == model.anatomy.tied


def test_bfloat16_folder_is_half_and_damage_is_refused(tiny: Any, tmp_path: Any) -> None:
    model = opened(tiny, "llama")
    plan = planned(model)
    for dtype in ("float32", "bfloat16"):
        save_pruned(model, plan, tmp_path / dtype, dtype=dtype)
    sizes = [(tmp_path / d / "weights.safetensors").stat().st_size for d in ("float32", "bfloat16")]
    assert 0.45 < sizes[1] / sizes[0] < 0.65
    assert open_pruned(tmp_path / "bfloat16", device="cpu").file_dtype == "bfloat16"
    record = store.read_json(tmp_path / "float32" / "retouch.json")
    tensors = store.load_tensors(tmp_path / "float32" / "weights.safetensors")
    bad = {
        "widths": (record | {"widths": [[2, 64]] * 4}, tensors),
        "many": (record | {"widths": [[3, 64]] * 4}, tensors),
        "kind": (record | {"kind": "x"}, tensors),
        "extra": (record, tensors | {"evil.weight": torch.ones(1)}),
        "missing": (record, {n: t for n, t in tensors.items() if "norm" not in n}),
    }
    for what, (facts, values) in bad.items():
        with store.writing(tmp_path / what) as folder:
            for file in (tmp_path / "float32").iterdir():
                if file.suffix == ".json" and file.name not in ("manifest.json", "retouch.json"):
                    (folder / file.name).write_bytes(file.read_bytes())
            (folder / "retouch.json").write_text(json.dumps(facts))
            store.save_tensors(folder / "weights.safetensors", values)
        with pytest.raises(StoreError):
            open_pruned(tmp_path / what, device="cpu")


def test_an_uneven_model_is_not_saved_as_an_even_one(tiny: Any, tmp_path: Any) -> None:
    model = opened(tiny, "llama")
    plan = planned(model)
    with pytest.raises(ModelError, match="save_pruned"):
        pruned(model, plan).save_files(tmp_path, "float32")
    with pytest.raises(StoreError, match="plan"):
        save_pruned(pruned(model, plan), planned(model, seed=7), tmp_path / "x")


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.6, 0.8])
def test_a_coarse_number_of_head_groups_does_not_waste_the_budget(tiny: Any, ratio: float) -> None:
    model = opened(tiny, "llama", intermediate_size=1024)
    plan = planned(model, ratio=ratio)
    assert abs(plan.ratio - ratio) < 0.01
