from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse_pruning import PRUNABLE, TEXT, added, logits, opened, random_adapter

from retouch.change import LowRank
from retouch.errors import StoreError, UserError, WrongBase
from retouch.fuse._units import units_of
from retouch.fuse.adapter_file import Origin, open_adapter, origin_of, write_adapter
from retouch.fuse.merging import seen_by_edges
from retouch.fuse.prune import PrunePlan, plan_prune
from retouch.fuse.pruned import pruned
from retouch.fuse.recover import gamma, propagate, recover, restricted, scaled


def setup(tiny: Any, name: str, **how: Any) -> tuple[Any, PrunePlan, Any, Any]:
    model = opened(tiny, name)
    plan = plan_prune(model, **{"ratio": 0.5, "score": "random", "align": "none", "text": TEXT} | how)
    small = pruned(model, plan)
    return model, plan, small, random_adapter(small, plan=plan.hash)


def cut(model: Any, plan: PrunePlan) -> Any:
    """Prune by the same indices a model that is not the plan's."""
    return pruned(model, dataclasses.replace(plan, model=model.fingerprint))


@pytest.mark.parametrize("name", PRUNABLE)
def test_pruning_the_recovered_model_gives_the_edges_model(tiny: Any, name: str) -> None:
    model, plan, small, adapter = setup(tiny, name)
    full = recover(adapter, plan, model)
    one, other = cut(added(model, full), plan), added(small, adapter)
    for block in range(4):
        for part in units_of(model).parts:
            weight = f"blocks.{block}.{part}"
            assert torch.equal(one.matrix(weight), other.matrix(weight)), weight
    assert torch.equal(logits(one), logits(other))
    assert not torch.equal(logits(one), logits(small))


@pytest.mark.parametrize("name", PRUNABLE)
def test_recovered_factors_are_the_trained_ones_and_zeros(tiny: Any, name: str) -> None:
    model, plan, _, adapter = setup(tiny, name)
    full, units = recover(adapter, plan, model), units_of(model)
    assert set(full.kept) == {f"blocks.{b}.{p}" for b in (1, 2) for p in units.parts}
    for weight, part in full.parts.items():
        trained = adapter.parts[weight]
        assert part.shape == model.matrix(weight).shape and part.rank == trained.rank
        assert part.norms()[0] == pytest.approx(trained.norms()[0], rel=1e-6)
        kept = full.kept.get(weight)
        if kept is None:
            assert part is trained
            continue
        delta = part.delta() if kept.axis == "rows" else part.delta().T
        inside = torch.zeros(len(delta), dtype=torch.bool)
        inside[list(kept.index)] = True
        small = trained.delta() if kept.axis == "rows" else trained.delta().T
        assert torch.equal(delta[inside], small) and not delta[~inside].any()
    back = restricted(full, plan, model)
    assert all(torch.equal(back.parts[n].left, p.left) for n, p in adapter.parts.items())
    assert all(torch.equal(back.parts[n].right, p.right) for n, p in adapter.parts.items())


class Unread(Mapping):
    """The factors of an adapter whose reading is an error."""

    def __init__(self, parts: Mapping[str, LowRank]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> LowRank:
        raise AssertionError(f"{name} was read")

    def __contains__(self, name: object) -> bool:
        return name in self.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def test_asking_which_weights_there_are_reads_none(tiny: Any) -> None:
    model, plan, _, adapter = setup(tiny, "llama")
    full = recover(dataclasses.replace(adapter, parts=Unread(adapter.parts)), plan, model)
    assert "blocks.1.mlp.up" in full.parts and "blocks.9.mlp.up" not in full.parts
    assert set(full.parts) == set(adapter.parts) and len(full.parts) == len(adapter.parts)
    with pytest.raises(AssertionError, match="was read"):
        full.parts["blocks.1.mlp.up"]


def test_what_edges_saw_is_kept_in_the_file_also_where_training_left_zeros(tiny: Any, tmp_path: Path) -> None:
    model, plan, _, adapter = setup(tiny, "llama")
    up, down = "blocks.1.mlp.up", "blocks.1.mlp.down"
    left, right = adapter.parts[up].left.clone(), adapter.parts[down].right.clone()
    left[2], right[:, 5] = 0, 0  # a neuron that never fired
    parts = {
        **adapter.parts,
        up: LowRank(left, adapter.parts[up].right),
        down: LowRank(adapter.parts[down].left, right),
    }
    full = recover(dataclasses.replace(adapter, parts=parts), plan, model)
    write_adapter(tmp_path / "a", full.parts.items(), dict.fromkeys(parts, 3), model, plan=plan.hash, kept=full.kept)
    back = open_adapter(tmp_path / "a", model)
    assert back.kept == full.kept and seen_by_edges(back, model) is back
    assert back.notes["kept"][up] == ["rows", len(full.kept[up].index)]
    with pytest.raises(UserError, match="recovered already"):
        recover(back, plan, model)
    with pytest.raises(StoreError, match="recovered already"):
        open_adapter(tmp_path / "a", pruned(model, plan))


def test_a_file_says_that_nothing_was_pruned(tiny: Any, tmp_path: Path) -> None:
    model, plan, _, adapter = setup(tiny, "llama", ratio=0.0)
    left = adapter.parts["blocks.1.mlp.up"].left.clone()
    left[2] = 0
    parts = {**adapter.parts, "blocks.1.mlp.up": LowRank(left, adapter.parts["blocks.1.mlp.up"].right)}
    full = recover(dataclasses.replace(adapter, parts=parts), plan, model)
    write_adapter(tmp_path / "a", full.parts.items(), dict.fromkeys(parts, 3), model, plan=plan.hash, kept=full.kept)
    back = open_adapter(tmp_path / "a", model)
    assert back.kept == {} and seen_by_edges(back, model).kept == {}
    assert origin_of(tmp_path / "a") == Origin(model.base_fingerprint, plan.hash, recovered=True)


def test_a_change_where_the_edge_is_said_to_have_seen_nothing_is_not_written(tiny: Any, tmp_path: Path) -> None:
    model, plan, _, adapter = setup(tiny, "llama")
    full = recover(adapter, plan, model)
    narrower = {n: dataclasses.replace(k, index=k.index[1:]) for n, k in full.kept.items()}
    with pytest.raises(StoreError, match="said not to have had"):
        write_adapter(tmp_path / "a", full.parts.items(), dict.fromkeys(full.parts, 3), model, kept=narrower)
    assert not (tmp_path / "a").exists()


def test_nothing_pruned_is_the_identity_and_scaling_commutes(tiny: Any) -> None:
    model, plan, _, adapter = setup(tiny, "llama", ratio=0.0)
    full = recover(adapter, plan, model)
    assert not full.kept and all(full.parts[n] is p for n, p in adapter.parts.items())
    model, plan, _, adapter = setup(tiny, "llama")
    one, other = scaled(recover(adapter, plan, model), 0.5), recover(scaled(adapter, 0.5), plan, model)
    assert all(torch.equal(one.parts[n].left, other.parts[n].left) for n in adapter.parts)


def test_what_does_not_belong_together_is_refused(tiny: Any) -> None:
    model, plan, _, adapter = setup(tiny, "llama")
    other = dataclasses.replace(plan, seed=9)
    for wrong, its_plan, its_model, error in (
        (dataclasses.replace(adapter, base="x"), plan, model, WrongBase),
        (adapter, other, model, UserError),
        (dataclasses.replace(adapter, plan=""), plan, model, UserError),
        (adapter, plan, opened(tiny, "llama", seed=8), WrongBase),
        (recover(adapter, plan, model), plan, model, UserError),
    ):
        with pytest.raises(error):
            recover(wrong, its_plan, its_model)
    name = "blocks.1.mlp.up"
    misfit = dataclasses.replace(adapter, parts={name: LowRank(torch.ones(5, 1), torch.ones(1, 32))})
    with pytest.raises(StoreError, match=r"blocks\.1\.mlp\.up"):
        recover(misfit, plan, model).parts[name]


def test_propagate_fills_what_the_base_says_follows(tiny: Any) -> None:
    model, plan, _, adapter = setup(tiny, "llama")
    full = recover(adapter, plan, model)
    filled = propagate(full, model)
    assert not filled.kept and filled.notes["propagate"] == 1e-2
    units = units_of(model)
    for part, side in (("mlp.up", 0), ("mlp.down", 1)):
        name = f"blocks.1.{part}"
        kept = units.index(part, plan.kept[1])
        weight = model.matrix(name).double()
        weight = weight if side == 0 else weight.T
        gone = torch.tensor([i for i in range(64) if i not in kept.tolist()])
        gram = weight[kept] @ weight[kept].T
        mu = 1e-2 * gram.diagonal().mean()
        ridge = weight[gone] @ weight[kept].T @ torch.linalg.inv(gram + mu * torch.eye(len(gram)).double())
        before, after = (a.parts[name].delta() if side == 0 else a.parts[name].delta().T for a in (full, filled))
        assert torch.allclose(after[gone], ridge @ before[kept], atol=1e-5) and after[gone].abs().max() > 1e-3
        assert torch.equal(after[kept], before[kept])
    assert torch.equal(filled.parts["blocks.0.mlp.up"].left, full.parts["blocks.0.mlp.up"].left)


def test_gamma_finds_the_best_scale(tiny: Any) -> None:
    _, _, _, adapter = setup(tiny, "llama")
    norm = adapter.parts["blocks.0.mlp.up"].left.norm()
    seen = []

    def likelihood(one: Any) -> float:
        seen.append(float(one.parts["blocks.0.mlp.up"].left.norm() / norm))
        return -((seen[-1] - 0.8) ** 2)

    best, factor = gamma(adapter, likelihood)
    assert abs(factor - 0.8) < 0.02 and len(seen) == 12
    assert torch.equal(best.parts["blocks.1.mlp.up"].left, adapter.parts["blocks.1.mlp.up"].left * factor)
