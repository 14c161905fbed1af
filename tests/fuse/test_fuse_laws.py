"""What holds of fusion whatever the sizes, ranks and numbers of adapters."""

from __future__ import annotations

import dataclasses

import fuse_made as made
import pytest
import torch
from fuse_made import gap, low, module
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch import registry
from retouch.change import LowRank
from retouch.fuse.base import Adapter, shares
from retouch.fuse.core import canonical, coordinates, factors, spanned, weighted
from retouch.fuse.fusing import stream

QUICK = settings(max_examples=12, deadline=None, derandomize=True)
FREE = ["cat", "dare", "dare_ties", "della", "iso", "knots", "magnitude", "svd", "ties", "tsv"]
DETERMINISTIC = ["cat", "iso", "knots", "magnitude", "svd", "ties", "tsv"]
WHOLE = {
    "dare": {"density": 1.0}, "dare_ties": {"density": 1.0}, "della": {"density": 1.0, "epsilon": 0.0},
    "knots": {"density": 1.0}, "magnitude": {"density": 1.0}, "ties": {"density": 1.0},
}  # fmt: skip
"""The settings under which a rule neither trims nor draws."""
FULL_SPACE = ("dare", "dare_ties", "della", "magnitude", "ties")

cases = st.builds(
    lambda outputs, inputs, ranks, seed: (outputs, inputs, [min(r, outputs, inputs) for r in ranks], seed),
    st.integers(3, 14), st.integers(3, 14), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 999),
)  # fmt: skip
several = cases.filter(lambda c: len(c[2]) > 1)


def build(case):
    outputs, inputs, ranks, seed = case
    return made.adapters(outputs, inputs, ranks, seed)


def make(name, case=None, **more):
    """A method that cuts nothing, so that laws of its rule are not laws of a cut."""
    uncut = {"rank": min(case[:2])} if case is not None and name in (*FULL_SPACE, "svd") else {}
    return registry.make("fuse", name, **uncut, **more)


def fuse(method, adapters, weights=None):
    ((_, out),) = stream(method, adapters, shares(adapters, weights))
    return out


def uneven(n):
    return [1 + i % 3 for i in range(n)]


@QUICK
@given(cases)
def test_cat_equals_the_dense_sum(case):
    adapters = build(case)
    weights = shares(adapters, uneven(len(adapters)))
    assert gap(fuse(make("cat"), adapters, weights), made.mean(made.deltas(adapters), weights)) < 1e-6


@pytest.mark.parametrize("name", sorted({*FREE, "linear"} - {"iso"}))
@QUICK
@given(cases)
def test_one_adapter_alone_comes_out_as_it_is(name, case):
    adapters = build(case)[:1]
    assert gap(fuse(make(name, case, **WHOLE.get(name, {})), adapters), made.deltas(adapters)[0]) < 2e-6


@pytest.mark.parametrize("name", sorted({*FREE, "linear"} - {"iso"}))
@QUICK
@given(several)
def test_equal_adapters_give_that_adapter(name, case):
    first = build(case)[0]
    same = [dataclasses.replace(first, name=f"edge {i}") for i in range(len(case[2]))]
    assert gap(fuse(make(name, case, **WHOLE.get(name, {})), same), made.deltas(same)[0]) < 2e-6


@pytest.mark.parametrize("name", FREE)
@QUICK
@given(several, st.randoms(use_true_random=False))
def test_the_order_of_the_adapters_changes_nothing(name, case, random):
    adapters = build(case)
    weights = shares(adapters, uneven(len(adapters)))
    order = random.sample(range(len(adapters)), len(adapters))
    one = fuse(make(name, case), adapters, weights)
    two = fuse(make(name, case), [adapters[i] for i in order], [weights[i] for i in order])
    assert gap(two, one.delta()) < 1e-5


@pytest.mark.parametrize("name", FREE)
@QUICK
@given(cases)
def test_an_adapter_of_zeros_and_no_weight_changes_no_bit(name, case):
    adapters = build(case)
    outputs, inputs = case[:2]
    nothing = Adapter("nothing", {made.NAME: LowRank(torch.zeros(outputs, 2), torch.ones(2, inputs))}, made.BASE)
    weights = list(shares(adapters))
    one, two = fuse(make(name), adapters, weights), fuse(make(name), [*adapters, nothing], [*weights, 0.0])
    assert torch.equal(one.left, two.left) and torch.equal(one.right, two.right)


def regauged(part, seed):
    """The same difference cut into other factors."""
    make_ = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(part.rank, part.rank, generator=make_).double()).Q
    g = q * torch.linspace(0.7, 1.4, part.rank).double()
    return LowRank((part.left.double() @ g).float(), (torch.linalg.inv(g) @ part.right.double()).float())


@pytest.mark.parametrize("name", [*FREE, "ties@core", "dare_ties@core"])
@QUICK
@given(several)
def test_no_method_sees_how_a_difference_was_cut_into_factors(name, case):
    adapters = build(case)
    others = [
        dataclasses.replace(a, parts={n: regauged(p, i) for n, p in a.parts.items()}) for i, a in enumerate(adapters)
    ]
    name, _, space = name.partition("@")
    method = make(
        name,
        **({"space": space, "density": 0.5} if space else {}),
        **({"rank": min(case[:2])} if name in FULL_SPACE and not space else {}),
    )
    assert not method.gauge_dependent
    assert gap(fuse(method, others), fuse(method, adapters).delta()) < 1e-4


def test_linear_sees_it_and_says_so():
    parts = [low(12, 17, 3, i) for i in range(3)]
    method = make("linear")
    other = method.fuse(module([regauged(p, i) for i, p in enumerate(parts)]))
    assert method.gauge_dependent
    assert gap(other, method.fuse(module(parts)).delta()) > 0.1


@pytest.mark.parametrize("name", [*FREE, "ties@core", "dare_ties@core"])
@QUICK
@given(cases)
def test_the_rank_is_at_most_the_sum_of_the_ranks(name, case):
    adapters = build(case)
    name, _, space = name.partition("@")
    out = fuse(make(name, **({"space": space} if space else {})), adapters)
    assert out.rank <= min(sum(case[2]), *case[:2])
    assert out.left.dtype == out.right.dtype == torch.float32


@pytest.mark.parametrize("name", DETERMINISTIC)
@QUICK
@given(cases, st.sampled_from([0.25, 2.0, 16.0]))
def test_scaling_all_adapters_scales_the_result(name, case, scale):
    adapters = build(case)
    larger = [
        dataclasses.replace(a, parts={n: LowRank(p.left * scale, p.right) for n, p in a.parts.items()})
        for a in adapters
    ]
    one, two = (fuse(make(name, case), given_) for given_ in (adapters, larger))
    assert gap(two, scale * one.delta()) < 1e-5


@QUICK
@given(several)
def test_the_core_holds_the_adapters_and_their_mean(case):
    adapters = build(case)
    parts = [a.parts[made.NAME] for a in adapters]
    slow, fast = canonical(coordinates(parts)), spanned(parts)
    assert slow.middles.shape == fast.middles.shape
    for core in (coordinates(parts), slow, fast):
        for part, middle in zip(parts, core.middles):
            assert gap(core.left @ middle @ core.right, part.delta()) < 1e-10
        weights = shares(adapters, uneven(len(parts)))
        truth = made.mean([p.delta() for p in parts], weights)
        assert gap(factors(core, weighted(core, weights)), truth) < 1e-6


@QUICK
@given(several)
def test_spectral_rules_are_in_the_core_what_they_are_on_whole_matrices(case):
    adapters = build(case)
    ds, weights = made.deltas(adapters), shares(adapters)
    if torch.linalg.svdvals(made.mean(ds, weights)).min() < 1e-3 and sum(case[2]) >= min(case[:2]):
        return  # a spectrum so close to singular has no rank to speak of
    assert gap(fuse(make("tsv"), adapters), made.tsv(ds)) < 1e-4
    assert gap(fuse(make("iso"), adapters), made.iso(ds, weights)) < 1e-4
    assert gap(fuse(make("knots", rule="mean"), adapters), made.mean(ds, weights)) < 2e-6
