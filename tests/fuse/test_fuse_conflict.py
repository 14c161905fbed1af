"""Conflict is measured above chance, and resolving it touches nothing else."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch.change import LowRank
from retouch.errors import UserError
from retouch.fuse._blocks import Blocks, collected
from retouch.fuse.base import Adapter, Module, modules, shares
from retouch.fuse.cat import Cat
from retouch.fuse.conflict import conflict_of, measure, report_of
from retouch.fuse.core import canonical, coordinates, factors
from retouch.fuse.cr_sign import CRSign
from retouch.fuse.cr_subspace import CRSubspace, _dealt
from retouch.fuse.fusing import resolved as before_method
from retouch.progress import listen
from retouch.report import to_json

OUTPUTS, INPUTS = 24, 20


def random_part(seed: int, rank: int = 3, outputs: int = OUTPUTS, inputs: int = INPUTS) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(outputs, rank, generator=draw), torch.randn(rank, inputs, generator=draw))


def module(*parts: LowRank, weights: tuple[float, ...] | None = None, name: str = "blocks.0.mlp.down") -> Module:
    n = len(parts)
    return Module(name, parts, weights or (1 / n,) * n, tuple(range(n)), n, (None,) * n)


def dense(core, i: int) -> torch.Tensor:
    return core.left @ core.middles[i] @ core.right


def resolved(resolver, *parts: LowRank) -> list[torch.Tensor]:
    core = resolver.resolve(canonical(coordinates(parts)), module(*parts))
    return [dense(core, i) for i in range(len(parts))]


# The core.


@given(seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=4, unique=True), rank=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_a_core_holds_every_adapter_exactly(seeds, rank):
    parts = [random_part(s, rank) for s in seeds]
    for core in (coordinates(parts), canonical(coordinates(parts))):
        for i, part in enumerate(parts):
            assert torch.allclose(dense(core, i), part.delta(), atol=1e-10)
            back = factors(core, core.middles[i])
            assert torch.allclose(back.delta(), part.delta(), atol=1e-4) and back.rank <= rank


def test_the_canonical_basis_does_not_see_how_factors_were_cut():
    parts = [random_part(i) for i in range(3)]
    mixer = torch.randn(3, 3, generator=torch.Generator().manual_seed(9)).double() + 3 * torch.eye(3)
    cut = [LowRank((p.left.double() @ mixer).float(), (mixer.inverse() @ p.right.double()).float()) for p in parts]
    one, other = canonical(coordinates(parts)), canonical(coordinates(cut))
    assert torch.allclose(one.middles, other.middles, atol=1e-4)
    plain, moved = coordinates(parts), coordinates(cut)
    assert not torch.allclose(plain.middles, moved.middles, atol=1e-2)


# Measuring.


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_independent_adapters_cancel_by_chance_alone(n):
    found = conflict_of(module(*(random_part(i, 8, 60, 60) for i in range(n))))
    assert abs(found.null - (1 - 1 / math.sqrt(n))) < 0.04
    assert abs(found.excess) < 0.03


def test_a_planted_conflict_is_found():
    common = random_part(0, 8, 60, 60)
    against = LowRank(-common.left, common.right)
    found = conflict_of(module(common, against))
    assert found.conflict == pytest.approx(1.0) and found.scaled > 0.9
    assert float(found.cosine[0, 1]) == pytest.approx(-1.0)
    assert float(found.output_overlap[0, 1]) == pytest.approx(1.0)
    agree = conflict_of(module(common, common))
    assert agree.conflict == pytest.approx(0.0, abs=1e-12) and agree.excess < -0.2


def test_the_numbers_do_not_depend_on_the_size_of_the_blocks():
    m = module(*(random_part(i) for i in range(3)))
    whole, cut = conflict_of(m), conflict_of(m, block=3 * INPUTS)
    assert whole.conflict == pytest.approx(cut.conflict, rel=1e-12)
    assert whole.null == pytest.approx(cut.null, rel=1e-6)


def test_the_order_of_the_adapters_changes_no_number():
    named = [Adapter(f"site{i}", {"blocks.0.mlp.up": random_part(i)}, "base") for i in range(4)]
    (one,), (other,) = measure(named), measure(named[::-1])
    assert one.null == pytest.approx(other.null, rel=1e-6)
    for resolver in (CRSign(), CRSign(space="core"), CRSign(random=True), CRSubspace(), CRSubspace(random=True)):
        a, b = (Cat().plan(x, resolver=resolver).parts["blocks.0.mlp.up"].delta() for x in (named, named[::-1]))
        assert (a - b).norm() < 1e-6 * a.norm(), resolver


PEAK = """
import resource
import torch
from retouch.change import LowRank
from retouch.fuse.base import Adapter, shares, modules
from retouch.fuse.conflict import measure
from retouch.fuse.cr_sign import CRSign
torch.set_num_threads(1)
draw = torch.Generator().manual_seed(0)
def made(size):
    part = lambda: LowRank(torch.randn(size, 2, generator=draw), torch.randn(2, size, generator=draw))
    return [Adapter(f"a{i}", {"blocks.0.mlp.up": part()}, "base") for i in range(24)]
def look(given):
    measure(given, draws=1)
    CRSign().entries(next(modules(given, shares(given))))
look(made(16))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
look(made(768))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak's unit is Linux's")
def test_many_adapters_take_no_more_memory_than_few():
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 96  # MiB; the 24 whole differences alone would be 108, and each step copies them


def test_cosine_and_overlap_are_those_of_the_whole_differences():
    parts = [random_part(i, i + 2) for i in range(3)]
    found = conflict_of(module(*parts))
    d = [p.delta().flatten() for p in parts]
    expected = float(d[0] @ d[2] / (d[0].norm() * d[2].norm()))
    assert float(found.cosine[0, 2]) == pytest.approx(expected)
    assert found.norms[1] == pytest.approx(float(d[1].norm()))


def padded(part: LowRank, n: int, right: LowRank | None = None) -> LowRank:
    """The same difference with more columns of zeros in B; A is filled up with zeros, or with rows that do nothing."""
    rows = torch.zeros(n, part.shape[1]) if right is None else right.right
    return LowRank(torch.nn.functional.pad(part.left, (0, n)), torch.cat([part.right, rows]))


@pytest.mark.parametrize("filled", [None, random_part(9, 6, 200, 200)], ids=["zeros", "idle rows"])
def test_overlap_is_that_of_the_differences_however_their_factors_are_filled_up(filled):
    parts = [random_part(i, 2, 200, 200) for i in range(2)]
    plain, wide = conflict_of(module(*parts)), conflict_of(module(*(padded(p, 6, filled) for p in parts)))
    for what in ("output_overlap", "input_overlap"):
        assert torch.allclose(getattr(wide, what), getattr(plain, what), atol=1e-9)
        assert float(getattr(plain, what)[0, 1]) < 0.05
    for one, other in zip(wide.chance, plain.chance):
        assert torch.equal(one, other) and float(one[0, 1]) == 2 / 200


def test_a_difference_of_zero_overlaps_with_nothing():
    part = random_part(1)
    found = conflict_of(module(part, LowRank(torch.zeros(OUTPUTS, 2), torch.ones(2, INPUTS))))
    assert torch.allclose(found.output_overlap, torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double())
    assert torch.isfinite(found.cosine).all()


class Counted(Mapping):
    """Factors that are made when they are read, and note each reading."""

    def __init__(self, names, readings):
        self.names, self.readings = names, readings

    def __getitem__(self, name):
        self.readings.append(name)
        return random_part(len(name))

    def __iter__(self):
        return iter(self.names)

    def __contains__(self, name):
        return name in self.names

    def __len__(self):
        return len(self.names)


def test_one_weight_s_factors_are_in_memory_at_a_time():
    names = [f"blocks.{b}.mlp.down" for b in range(5)]
    readings = []
    adapters = [Adapter(f"site {i}", Counted(names, readings), "base") for i in range(3)]
    heard = []
    with listen(lambda what, done, total: heard.append((done, total, len(readings)))):
        found = measure(adapters)
    assert [c.name for c in found] == names
    assert heard == [(n, 5, 3 * n) for n in range(6)]  # nothing is read before it is its turn


def test_the_report_shows_the_shares_of_the_fusion():
    part = {"blocks.0.mlp.up": random_part(1)}
    adapters = [Adapter("small", part, "b", n_examples=10), Adapter("loud", part, "b", n_examples=10**12)]
    share = shares(adapters, "examples")
    table = report_of(measure(adapters, share), ["small", "loud"], "tiny", weights=share).tables[-1]
    assert table.rows == (("small", share[0]), ("loud", share[1])) and share[1] > 0.999


def test_the_report_names_the_worst_weight_and_pair():
    good, bad = random_part(1), random_part(2)
    parts = [
        {"blocks.0.mlp.up": good, "blocks.1.mlp.down": bad},
        {"blocks.0.mlp.up": random_part(3), "blocks.1.mlp.down": LowRank(-bad.left, bad.right)},
    ]
    adapters = [Adapter(f"site {i}", p, "base") for i, p in enumerate(parts)]
    report = report_of(measure(adapters), [a.name for a in adapters], "tiny")
    assert report.tables[0].rows[0][0] == "blocks.1.mlp.down"
    assert "site 0 and site 1 disagree most" in report.summary and "in block 1" in report.summary
    assert to_json(report)["numbers"]["weights"]["blocks.1.mlp.down"]["conflict"] > 0.99


def test_weights_of_one_adapter_have_no_conflict():
    report = report_of(measure([Adapter("alone", {"blocks.0.mlp.up": random_part(1)}, "b")]), ["alone"], "tiny")
    assert "nothing can contradict" in report.summary


# Resolving.

RESOLVERS = [CRSubspace(), CRSubspace(beta=0.5), CRSign(space="core"), CRSign(space="core", gate="module")]


@pytest.mark.parametrize("resolver", RESOLVERS, ids=repr)
def test_one_adapter_and_equal_adapters_are_left_alone(resolver):
    part = random_part(4)
    assert torch.allclose(resolved(resolver, part)[0], part.delta(), atol=1e-9)
    for d in resolved(resolver, part, part):
        assert torch.allclose(d, part.delta(), atol=1e-9)


@pytest.mark.parametrize("resolver", [CRSubspace(), CRSubspace(kappa=1.0)], ids=repr)
def test_orthogonal_adapters_are_left_alone(resolver):
    one = LowRank(torch.eye(OUTPUTS)[:, :3], torch.eye(INPUTS)[:3] * torch.tensor([[3.0], [2.0], [1.0]]))
    other = LowRank(torch.eye(OUTPUTS)[:, 3:6], torch.eye(INPUTS)[3:6] * torch.tensor([[2.5], [1.5], [0.5]]))
    for d, part in zip(resolved(resolver, one, other), (one, other)):
        assert torch.allclose(d, part.delta(), atol=1e-9)


def test_opposite_adapters_cancel_and_nothing_is_not_a_number():
    part = random_part(5)
    for d in resolved(CRSubspace(), part, LowRank(-part.left, part.right)):
        assert torch.isfinite(d).all() and d.norm() < 1e-6 * part.delta().norm()


@pytest.mark.parametrize("resolver", RESOLVERS[:3], ids=repr)
def test_the_order_and_the_cut_of_the_factors_change_nothing(resolver):
    parts = [random_part(i) for i in range(3)]
    forward = resolved(resolver, *parts)
    turned = replace(module(*parts[::-1]), owners=(2, 1, 0))
    core = resolver.resolve(canonical(coordinates(parts[::-1])), turned)
    for i, one in enumerate(forward):
        assert (one - dense(core, 2 - i)).norm() < 1e-6 * one.norm()
    mixer = torch.eye(3) + 0.5 * torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    cut = [LowRank(p.left @ mixer, mixer.inverse() @ p.right) for p in parts]
    for one, other in zip(forward, resolved(resolver, *cut)):
        assert (one - other).norm() < 1e-3 * one.norm()


def test_projected_writes_no_longer_oppose_one_another():
    common = random_part(6, 4)
    one = LowRank(common.left, common.right + 0.3 * random_part(7, 4).right)
    other = LowRank(-common.left, common.right + 0.3 * random_part(8, 4).right)
    before = one.delta() + other.delta()
    after = sum(resolved(CRSubspace(), one, other))
    a, b = resolved(CRSubspace(), one, other)
    assert float((a * b).sum()) > float((one.delta() * other.delta()).sum())
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("resolver", RESOLVERS, ids=repr)
def test_a_weight_in_which_nobody_does_anything_stays_so(resolver):
    idle = LowRank(torch.zeros(OUTPUTS, 2), torch.ones(2, INPUTS))
    given = [Adapter(name, {"blocks.0.mlp.up": idle}, "base") for name in "ab"]
    ((_, fused),) = Cat().stream(given, (0.5, 0.5), None, resolver)
    assert not fused.delta().any()


def test_a_weight_of_zero_is_no_division_by_zero():
    parts = [random_part(i) for i in range(2)]
    core = CRSubspace().resolve(canonical(coordinates(parts)), module(*parts, weights=(1.0, 0.0)))
    assert torch.isfinite(core.middles).all()


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_strength_zero_is_the_identity(seed):
    parts = [random_part(seed + i) for i in range(3)]
    for resolver in (CRSubspace(beta=0.0), CRSign(beta=0.0, space="core")):
        for d, part in zip(resolved(resolver, *parts), parts):
            assert torch.allclose(d, part.delta(), atol=1e-9)


def test_full_space_masking_is_ties_election_at_full_strength():
    parts = [random_part(i) for i in range(3)]
    m = module(*parts)
    lessen = CRSign(floor="zero").entries(m)
    assert lessen is not None
    x = torch.stack([p.delta() for p in parts])
    done = lessen(x, 0)
    sign = x.sum(0).sign()
    kept = x.sign() == sign
    assert torch.equal(done[kept] != 0, x[kept] != 0)
    assert (done.abs()[~kept] < (2 * x.abs())[~kept] + 1e-12).all()
    assert torch.equal(torch.cat([lessen(x[:, :7], 0), lessen(x[:, 7:], 7)], 1), done)
    assert CRSign(space="core").entries(m) is None


@pytest.mark.parametrize("resolver", [CRSign(), CRSign(space="core"), CRSubspace()], ids=repr)
def test_the_control_of_the_norm_is_the_mean_itself_at_the_norm_that_resolving_gives(resolver):
    given = [Adapter(f"site{i}", {"blocks.0.mlp.up": random_part(i)}, "base") for i in range(3)]
    plain, solved, control = (
        Cat().plan(given, resolver=r).parts["blocks.0.mlp.up"].delta()
        for r in (None, resolver, replace(resolver, norm_matched=True))
    )
    assert abs(float(solved.norm() / plain.norm()) - 1) > 0.01
    assert (control - plain * (control.norm() / plain.norm())).norm() < 1e-5 * control.norm()
    assert float(control.norm() / solved.norm()) == pytest.approx(1, abs=0.01)  # entries are cut to the sum of ranks


def test_the_control_of_directions_has_as_many_conflicts_of_each_pair_elsewhere():
    parts = [random_part(i, 6) for i in range(3)]
    draw = torch.Generator().manual_seed(0)
    shared = torch.rand(3, 3, 40, generator=draw) < 0.8
    shared = shared & shared.transpose(0, 1) & ~torch.eye(3, dtype=torch.bool)[..., None]
    against = shared & (torch.rand(40, generator=draw) < 0.3)
    dealt = _dealt(against, shared, 0, module(*parts))
    assert torch.equal(dealt.sum(2), against.sum(2)) and not torch.equal(dealt, against)
    assert torch.equal(dealt, dealt.transpose(0, 1)) and not (dealt & ~shared).any()
    assert not torch.equal(dealt, _dealt(against, shared, 1, module(*parts)))
    rule, control = (sum(resolved(CRSubspace(random=r), *parts)) for r in (False, True))
    plain = sum(p.delta() for p in parts)
    assert all((d - plain).norm() > 0.01 * plain.norm() for d in (rule, control))
    assert (rule - control).norm() > 0.01 * plain.norm()


def cut_columns(part: LowRank, columns: list[int]) -> LowRank:
    right = part.right.clone()
    right[:, columns] = 0
    return LowRank(part.left, right)


@pytest.mark.parametrize("space", ["full", "core"])
def test_the_random_control_takes_as_much_as_the_rule_from_each_row_and_elsewhere(space):
    parts = [random_part(0), random_part(1), cut_columns(random_part(2), [0, 7, 11])]
    x, m = torch.stack([p.delta() for p in parts]) / 3, module(*parts)
    rule, control = (CRSign(random=r, space=space)._masked(x, (0.3, 1.0), 0, m) for r in (False, True))
    assert torch.equal(control.sort(2).values, rule.sort(2).values)
    assert (control[2][:, [0, 7, 11]] == 1).all()  # what the edge could not see has nothing to be taken away
    assert float((control != rule).double().mean()) > 0.2
    assert torch.equal(control, CRSign(random=True)._masked(x, (0.3, 1.0), 0, m))
    assert not torch.equal(control, CRSign(random=True, seed=1)._masked(x, (0.3, 1.0), 0, m))


def test_the_random_control_has_the_same_bits_for_any_number_of_rows_at_once():
    m = before_method(module(*(random_part(i, outputs=600) for i in range(3))), Cat(), CRSign(random=True))
    one, other = (collected(Blocks(m, rows), lambda v, _: v.sum(0)) for rows in (256, 600))
    assert torch.equal(one, other)


def test_a_weight_at_chance_level_is_left_alone_by_the_module_gate():
    parts = [random_part(i) for i in range(3)]
    agreeing = [LowRank(parts[0].left, parts[0].right + 0.05 * p.right) for p in parts]
    x = torch.stack([p.delta() for p in agreeing])
    lessen = CRSign(gate="module").entries(module(*agreeing))
    assert lessen is not None and torch.allclose(lessen(x, 0), x)


def test_modules_and_shares_refuse_what_does_not_belong_together():
    a = Adapter("a", {"blocks.0.mlp.up": random_part(1)}, "one", n_examples=100)
    b = Adapter("b", {"blocks.0.mlp.up": random_part(2)}, "two")
    with pytest.raises(UserError, match="different base models"):
        list(modules([a, b], shares([a, b])))
    c = Adapter("c", {"blocks.0.mlp.up": random_part(2, outputs=5)}, "one", n_examples=300)
    with pytest.raises(UserError, match="disagree about the size"):
        list(modules([a, c], shares([a, c])))
    assert shares([a, c], "examples") == (0.25, 0.75)
    with pytest.raises(UserError, match="does not say how many examples"):
        shares([a, b], "examples")
    for wrong in ([1.0], [1.0, -1.0], [0.0, 0.0], [math.nan, 1.0]):
        with pytest.raises(UserError):
            shares([a, c], wrong)
    with pytest.raises(UserError, match="no adapter"):
        shares([])
    loud = Adapter("loud", a.parts, "one", n_examples=10**400)
    with pytest.raises(UserError, match="loud says that over 1,000,000,000,000 examples"):
        shares([a, loud], "examples")
    assert shares([a, loud]) == (0.5, 0.5)
