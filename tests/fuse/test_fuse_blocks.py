"""Entries are trimmed, drawn and voted on block by block: the bits never depend on the blocks, and nothing large is kept."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import fuse_made as made
import numpy as np
import peft
import pytest
import torch
from fuse_made import NAME, adapters, gap, low, module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from retouch import registry
from retouch.change import LowRank
from retouch.fuse import _blocks
from retouch.fuse._blocks import Blocks, averaged, collected, draws, elected, refactored, whole
from retouch.fuse.base import shares
from retouch.fuse.fusing import stream

SIGN = ["dare", "dare_ties", "della", "magnitude", "ties"]


def tall(n=3, outputs=700, inputs=23, rank=3):
    return module([low(outputs, inputs, rank, i) for i in range(n)], [1 / n] * n)


@pytest.mark.parametrize("name", SIGN)
def test_any_number_of_rows_gives_the_same_bits(name, monkeypatch):
    monkeypatch.setattr(_blocks, "BYTES", 4 * 16 * 23 * 6)  # sixteen rows a tile, 44 tiles
    outs = [registry.make("fuse", name, rows=rows, rank=6).fuse(tall()) for rows in (None, 1, 100, 336, 699, 5000)]
    assert Blocks(tall()).tile == 16
    for out in outs[1:]:
        assert torch.equal(out.left, outs[0].left) and torch.equal(out.right, outs[0].right)
        assert out.notes == outs[0].notes


def test_blocks_are_the_differences():
    asked = tall()
    for row, values in Blocks(asked, rows=256):
        for part, value in zip(asked.parts, values):
            assert torch.allclose(value.double(), part.delta()[row : row + len(value)], atol=1e-5)


def test_random_numbers_belong_to_a_row():
    every = draws(3, NAME, "edge", 0, 50, 21)
    for row, n in ((0, 1), (7, 20), (49, 1)):
        assert torch.equal(draws(3, NAME, "edge", row, n, 21), every[row : row + n])
    others = [draws(4, NAME, "edge", 0, 50, 21), draws(3, "x", "edge", 0, 50, 21), draws(3, NAME, "other", 0, 50, 21)]
    for other in others:
        assert abs(float(np.corrcoef(every.flatten(), other.flatten())[0, 1])) < 0.12
    assert float(every.min()) >= 0 and float(every.max()) < 1
    many = draws(0, NAME, "edge", 0, 1000, 100)
    assert float(many.mean()) == pytest.approx(0.5, abs=0.005)
    assert torch.allclose(torch.histc(many, 10, 0, 1), torch.full((10,), 1e4), rtol=0.05)


@pytest.mark.parametrize("names", [("a", "a"), ("a", "b"), ()])
def test_adapters_draw_apart_even_where_they_share_a_name(names):
    blocks = Blocks(dataclasses.replace(module([low(40, 30, 2, 0)] * 2), names=names))
    assert not torch.equal(blocks.draws(0, 0, 0, 40), blocks.draws(0, 1, 0, 40))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.floats(0.001, 0.999), st.booleans())
def test_a_threshold_is_exact_whatever_repeats(seed, density, repeats):
    part = low(33, 29, 2, seed)
    if repeats:  # few distinct sizes, zeros among them
        part = LowRank(part.left.round(), part.right.round())
    blocks = Blocks(module([part]))
    (_, values), = list(blocks)  # fmt: skip
    n = max(1, round(density * values.numel()))
    wanted = values[0].abs().flatten().sort(descending=True).values[n - 1]
    assert float(blocks.thresholds(density)[0]) == float(wanted)


def test_a_threshold_is_found_across_blocks_and_for_zeros():
    asked = tall(2)
    one = Blocks(asked, rows=16).thresholds(0.1)
    ds = torch.cat([v for _, v in Blocks(asked)], 1)
    assert torch.equal(one, torch.stack([d.abs().flatten().sort(descending=True).values[1609] for d in ds]))
    zero = module([LowRank(torch.zeros(9, 1), torch.ones(1, 9))])
    assert float(Blocks(zero).thresholds(0.5)[0]) == 0.0


def test_an_election_without_majority_is_void():
    values = torch.tensor([[[1.0, 2.0, 0.0, 3.0]], [[-1.0, 1.0, 0.0, 0.0]]])
    assert elected(values, [0.5, 0.5]).tolist() == [[0.0, 1.5, 0.0, 3.0]]
    assert elected(values, [0.25, 0.75]).tolist() == [[-1.0, 1.25, 0.0, 3.0]]


def test_two_passes_find_nearly_the_best_factors():
    blocks = Blocks(module([low(160, 120, 5, i) for i in range(4)]))
    fused = collected(blocks, lambda x, _: elected(x, blocks.module.weights)).double()
    out = refactored(blocks, lambda x, _: elected(x, blocks.module.weights), 20)
    best = made.best(fused, 20)
    assert float((out.delta() - fused).norm()) < 1.03 * float((best - fused).norm())
    assert out.notes["kept_energy"] == pytest.approx(1 - gap(out, fused) ** 2, abs=1e-5)


def test_what_has_the_rank_is_found_exactly():
    blocks = Blocks(tall(3, 200, 90, 4))
    out = refactored(blocks, lambda x, _: averaged(x, blocks.module.weights), 12)
    assert gap(out, made.mean([p.delta() for p in blocks.module.parts], blocks.module.weights)) < 1e-6
    assert out.notes["kept_energy"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("rank", [5, 11, 12])
def test_ranks_near_the_weight_s_own_are_cut_from_the_whole(rank):
    blocks = Blocks(module([low(12, 40, 3, i) for i in range(3)]))
    fused = collected(blocks, lambda x, _: elected(x, blocks.module.weights)).double()
    out = refactored(blocks, lambda x, _: elected(x, blocks.module.weights), rank)
    assert gap(out, made.best(fused, rank)) < 1e-5


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_a_whole_difference_is_its_own_factor(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole(matrix).left @ whole(matrix).right, matrix)
    assert whole(matrix).rank == 3


PEAK = """
import resource
import torch
torch.set_num_threads(1)
from retouch import registry
from retouch.change import LowRank
from retouch.fuse.base import Module
method = registry.make("fuse", "dare_ties", rank=8)
def made(out, into):
    parts = tuple(LowRank(torch.randn(out, 2), torch.randn(2, into)) for _ in range(16))
    return Module("w", parts, (1 / 16,) * 16, tuple(range(16)), 16, (None,) * 16)
method.fuse(made(256, 256))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
method.fuse(made(6144, 512))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak's unit is Linux's")
def test_no_whole_difference_is_ever_held():
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 64  # MiB; all sixteen whole differences would be 192


# ---------------------------------------------------------------- beside PEFT, on the same adapters


@pytest.fixture(scope="module")
def peer():
    """A network of two linear layers that carries our adapters in PEFT."""
    given = [
        made.Adapter(f"edge{i}", {n: low(40, 30, 4, 10 * i + j, 0.1) for j, n in enumerate(("up", "gate"))}, made.BASE)
        for i in range(3)
    ]
    network = nn.ModuleDict({"up": nn.Linear(30, 40, bias=False), "gate": nn.Linear(30, 40, bias=False)})
    model = None
    for adapter in given:
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["up", "gate"])
        if model is None:
            model = peft.LoraModel(network, config, adapter.name)
        else:
            model.peft_config[adapter.name] = config
            model.inject_adapter(network, adapter.name)
        for name, part in adapter.parts.items():
            layer = network[name]
            layer.lora_A[adapter.name].weight.data.copy_(part.right)
            layer.lora_B[adapter.name].weight.data.copy_(part.left)
    return model, network, given


@pytest.mark.parametrize(
    "theirs, ours",
    [("cat", {}), ("svd", {"rank": 6}), ("linear", {"form": "peft"}), ("magnitude_prune_svd", {"rank": 6})],
)
def test_the_same_as_peft_from_the_same_adapters(peer, theirs, ours):
    model, network, given = peer
    weights = [0.5, 0.3, 0.2]
    extra = {"svd_rank": 6} if "svd" in theirs else {}
    if "prune" in theirs:
        extra["density"] = 0.5
    model.add_weighted_adapter([a.name for a in given], weights, f"fused {theirs}", theirs, **extra)
    name = theirs.partition("_")[0]
    for weight, out in stream(registry.make("fuse", name, **ours), given, weights):
        truth = network[weight].get_delta_weight(f"fused {theirs}").detach().double()
        tolerance = (
            0.02 if "prune" in theirs else 1e-5
        )  # two passes are near the best, PEFT's whole decomposition is it
        assert gap(out, truth) < tolerance


def test_a_sign_rule_is_cut_as_well_as_by_a_whole_decomposition(peer):
    """PEFT's ties_svd divides by counts where we divide by weights: at equal weights one is the other times N."""
    model, network, given = peer
    model.add_weighted_adapter([a.name for a in given], [1.0] * 3, "ties", "ties_svd", svd_rank=6, density=0.4)
    for weight, out in stream(registry.make("fuse", "ties", rank=6, density=0.4), given, shares(given)):
        assert gap(out, network[weight].get_delta_weight("ties").detach().double()) < 0.1


def test_every_weight_of_adapters_is_streamed_once():
    given = adapters(names=("a", "b", "c"))
    assert [n for n, _ in stream(registry.make("fuse", "ties"), given, shares(given))] == ["a", "b", "c"]
