"""Every rule of fusion equals itself written out on whole float64 matrices, whatever the ranks."""

from __future__ import annotations

import dataclasses
import math

import fuse_made as made
import pytest
import torch
from fuse_made import NAME, adapters, columns, deltas, gap, low, masked, module, rows

from retouch import registry
from retouch.change import LowRank
from retouch.errors import SettingsError, UserError
from retouch.fuse._blocks import draws
from retouch.fuse.base import Adapter, Ground, Resolver, modules, shares
from retouch.fuse.core import coordinates
from retouch.fuse.coverage import corrected, covered
from retouch.fuse.cr_subspace import CRSubspace
from retouch.fuse.fedex import next_round, residual
from retouch.fuse.fusing import stream
from retouch.fuse.tsv import polar
from retouch.stats import Moment

WEIGHTS = (0.5, 0.2, 0.3)
OWN = ["cat", "dare", "dare_ties", "della", "iso", "knots", "linear", "magnitude", "regmean", "svd", "ties", "tsv"]
FREE = [name for name in OWN if name not in ("linear", "regmean")]  # any ranks, nothing but adapters


def make(name, **settings):
    return registry.make("fuse", name, **settings)


def fused(method, given, weights=None, **more):
    return dict(stream(method, given, shares(given, weights), **more))[NAME]


@pytest.fixture
def three():
    return adapters()


def full(name, given=(12, 17), **settings):
    """A method of entries that cuts nothing: its rank is the weight's."""
    return make(name, rank=min(given), **settings)


# ---------------------------------------------------------------- each rule beside its formula


def test_all_methods_are_found_without_a_list():
    assert set(OWN) <= {e.name for e in registry.methods("fuse")}
    assert all(e.source for e in registry.methods("fuse") if e.name in OWN)


@pytest.mark.parametrize("shape", [(12, 17), (17, 12), (5, 17), (17, 5)])
def test_cat_is_the_mean_even_where_ranks_exceed_the_weight(shape):
    given = adapters(*shape, ranks=(2, 4, 3))
    out = fused(make("cat"), given, WEIGHTS)
    assert gap(out, made.mean(deltas(given), WEIGHTS)) < 1e-6
    assert out.rank == min(9, *shape)


def test_lam_scales_the_result(three):
    assert gap(fused(make("cat", lam=2.5), three), 2.5 * made.mean(deltas(three), [1 / 3] * 3)) < 1e-6


def test_svd_is_the_best_of_its_rank_and_says_what_it_keeps(three):
    truth = made.mean(deltas(three), WEIGHTS)
    out = fused(make("svd", rank=4), three, WEIGHTS)
    assert out.rank == 4
    assert gap(out, made.best(truth, 4)) < 1e-5
    assert out.notes["kept_energy"] == pytest.approx(float(made.best(truth, 4).norm() / truth.norm()) ** 2)
    assert fused(make("svd"), three).rank == 3  # of the largest adapter


@pytest.mark.parametrize("form, error", [("fedit", 1 - 1 / 4), ("peft", 3)])
def test_linear_has_cross_terms_and_tells_its_error(form, error):
    given = adapters(300, 300, ranks=(3,) * 4)
    out = fused(make("linear", form=form), given)
    truth = made.mean(deltas(given), [0.25] * 4)
    assert out.notes["relative_error"] == pytest.approx(gap(out, truth), rel=1e-4)
    assert out.notes["relative_error"] == pytest.approx(math.sqrt(error), rel=0.2)  # of independent A and B


def test_linear_is_exact_where_a_is_shared():
    one = low(12, 17, 3, 0)
    parts = [LowRank(low(12, 17, 3, i).left, one.right) for i in range(4)]
    out = make("linear").fuse(module(parts))
    assert out.notes["relative_error"] < 1e-6
    assert gap(out, made.mean([p.delta() for p in parts], [0.25] * 4)) < 1e-6


def test_linear_refuses_unequal_ranks_by_name(three):
    with pytest.raises(UserError, match=r"equal ranks.*edge 0: 2, edge 1: 3.*Use cat"):
        fused(make("linear"), three)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.8, 1.0])
def test_magnitude_trims_and_averages(three, density):
    truth = made.mean([made.trimmed(d, density) for d in deltas(three)], WEIGHTS)
    assert gap(fused(full("magnitude", density=density), three, WEIGHTS), truth) < 1e-5


@pytest.mark.parametrize("density", [0.05, 0.3, 0.8, 1.0])
def test_ties_trims_elects_and_averages(three, density):
    truth = made.elect([made.trimmed(d, density) for d in deltas(three)], WEIGHTS)
    assert gap(fused(full("ties", density=density), three, WEIGHTS), truth) < 1e-5


def dropped(given, density, seed=0):
    kept = [draws(seed, NAME, a.name, 0, *a.parts[NAME].shape) < density for a in given]
    return [d * k / density for d, k in zip(deltas(given), kept)]


def test_dare_and_dare_ties_share_their_masks(three):
    drawn = dropped(three, 0.6)
    assert gap(fused(full("dare", density=0.6), three, WEIGHTS), made.mean(drawn, WEIGHTS)) < 1e-5
    assert gap(fused(full("dare_ties", density=0.6), three, WEIGHTS), made.elect(drawn, WEIGHTS)) < 1e-5
    assert gap(fused(full("dare", density=0.6, seed=1), three, WEIGHTS), made.mean(drawn, WEIGHTS)) > 0.1


def test_dare_is_the_mean_in_expectation(three):
    every = [fused(full("dare", seed=seed), three).delta() for seed in range(100)]
    assert gap(sum(every) / len(every), made.mean(deltas(three), [1 / 3] * 3)) < 0.15


def test_della_keeps_the_larger_in_a_row_more_often():
    given = adapters(400, 9, ranks=(2,))
    out = fused(full("della", (400, 9), density=0.5, epsilon=0.3), given)
    d = deltas(given)[0]
    order = d.abs().argsort(1)
    stays = (out.delta().gather(1, order).abs() > 1e-6).double().mean(0)
    assert stays[0] == pytest.approx(0.2, abs=0.08)
    assert stays[4] == pytest.approx(0.5, abs=0.08)
    assert stays[-1] == pytest.approx(0.8, abs=0.08)
    at = out.delta().gather(1, order)[:, -1].nonzero().flatten()
    assert torch.allclose(out.delta().gather(1, order)[at, -1], d.gather(1, order)[at, -1] / 0.8, rtol=1e-4)


def test_della_refuses_probabilities_that_are_none():
    for wrong in ({"density": 0.1, "epsilon": 0.1}, {"density": 0.95, "epsilon": 0.1}):
        with pytest.raises(SettingsError, match="must lie in"):
            make("della", **wrong)


@pytest.mark.parametrize("rule", ["mean", "ties", "dare"])
def test_knots_merges_in_the_shared_output_basis(three, rule):
    ds = deltas(three)
    out = fused(make("knots", rule=rule, density=0.4), three, WEIGHTS)
    assert out.rank == 6
    if rule == "mean":
        assert gap(out, made.mean(ds, WEIGHTS)) < 1e-6
    elif rule == "ties":
        merge = lambda blocks, ws: made.elect([made.trimmed(b, 0.4) for b in blocks], ws)  # noqa: E731
        assert gap(out, made.knots(ds, WEIGHTS, merge)) < 1e-5
    else:
        u = made.triples(torch.cat(ds, 1), 1e-10)[0]
        assert gap(u @ (u.T @ out.delta()), out.delta()) < 1e-6  # nothing leaves the span of outputs


def test_tsv_is_its_formula_between_mean_and_sum(three):
    assert gap(fused(make("tsv"), three), made.tsv(deltas(three))) < 1e-5
    scales = [3 * w for w in WEIGHTS]
    assert gap(fused(make("tsv"), three, WEIGHTS), made.tsv(deltas(three), scales)) < 1e-5
    one = low(12, 17, 2, 5)
    assert gap(make("tsv").fuse(module([one] * 3)), one.delta()) < 1e-5
    eye = torch.eye(12, 17)
    apart = [LowRank(torch.eye(12)[:, [i]], eye[[i]]) for i in range(3)]
    assert gap(make("tsv").fuse(module(apart)), sum(p.delta() for p in apart)) < 1e-6


def test_the_published_tsv_and_iso_leave_the_adapters_span(three):
    ds = deltas(three)
    u = made.triples(torch.cat(ds, 1), 1e-10)[0]
    for name in ("tsv", "iso"):
        ours, theirs = (fused(make(name, published=p), three).delta() for p in (False, True))
        assert gap(u @ (u.T @ ours), ours) < 1e-6
        assert gap(u @ (u.T @ theirs), theirs) > 0.05
    flat = torch.linalg.svdvals(fused(make("iso", published=True), three).delta())
    assert torch.allclose(flat, flat.mean().expand(12), rtol=1e-5)
    assert float(flat[0]) == pytest.approx(float(torch.linalg.svdvals(made.mean(ds, [1 / 3] * 3)).mean()), rel=1e-5)


def test_published_tsv_of_full_rank_adapters_is_ours_when_all_triples_are_taken():
    one = adapters(6, 6, ranks=(6,))
    assert gap(fused(make("tsv", published=True), one), fused(make("tsv"), one).delta()) < 1e-5


def test_iso_flattens_over_the_rank_only(three):
    out = fused(make("iso"), three, WEIGHTS)
    assert gap(out, made.iso(deltas(three), WEIGHTS)) < 1e-5
    assert torch.linalg.svdvals(out.delta())[6:].max() < 1e-5


def test_polar_ignores_directions_that_are_rounding():
    twice = torch.eye(5, 2).double().repeat(1, 2)
    assert torch.allclose(polar(twice), twice / math.sqrt(2))


def moments(n, inputs=17, seed=0):
    make_ = torch.Generator().manual_seed(seed)
    x = [torch.randn(40, inputs, generator=make_).double() * torch.rand(inputs, generator=make_) for _ in range(n)]
    return [v.T @ v / len(v) for v in x]


def test_regmean_is_its_formula_and_minimises_what_it_says(three):
    g = moments(3)
    ground = Ground(None, moments=[{NAME: m} for m in g])
    small = [m * 0.9 + torch.diag(m.diagonal()) * 0.1 for m in g]
    top = sum(w * d @ m for d, m, w in zip(deltas(three), small, WEIGHTS))
    truth = top @ torch.linalg.inv(sum(w * m for m, w in zip(small, WEIGHTS)))
    assert gap(fused(make("regmean"), three, WEIGHTS, ground=ground), truth) < 1e-5

    def loss(d):
        return sum(w * torch.trace((d - x) @ m @ (d - x).T) for x, m, w in zip(deltas(three), g, WEIGHTS))

    ours = fused(make("regmean", shrink=1.0), three, WEIGHTS, ground=ground).delta()
    assert loss(ours) < loss(made.mean(deltas(three), WEIGHTS))
    nudge = 1e-3 * torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).double()
    assert loss(ours) < loss(ours + nudge)


def test_regmean_asks_for_moments_and_refuses_a_common_one(three):
    with pytest.raises(UserError, match="second moments; 0 of 3"):
        fused(make("regmean"), three)
    with pytest.raises(UserError, match="one and the same"):
        fused(make("regmean"), three, ground=Ground(None, moments=[{NAME: moments(1)[0]}] * 3))
    with pytest.raises(UserError, match=f"No second moments of {NAME} were given for edge 1"):
        fused(make("regmean"), three, ground=Ground(None, moments=[{NAME: m} for m in moments(1)] + [{}, {}]))
    with pytest.raises(UserError, match="17 x 17"):
        fused(make("regmean"), three, ground=Ground(None, moments=[{NAME: m[:3, :3]} for m in moments(3)]))


def test_regmean_reads_moments_of_kept_inputs_and_of_the_core():
    kept = [columns(*range(0, 17, 2)), columns(*range(9))]
    given = [masked(a, k) for a, k in zip(adapters(ranks=(2, 3)), kept)]
    g = moments(2)
    cut = [m[list(k.index)][:, list(k.index)] for m, k in zip(g, kept)]
    small = fused(make("regmean"), given, ground=Ground(None, moments=[{NAME: Moment(m * 7, 7)} for m in cut]))
    for m, k in zip(g, kept):
        out = [i for i in range(17) if i not in k.index]
        m[out], m[:, out] = 0, 0
    assert gap(small, fused(make("regmean"), given, ground=Ground(None, moments=[{NAME: m} for m in g])).delta()) < 1e-5
    alone = [i for i in range(9, 17) if i % 2 == 0]  # seen by the first edge alone: its word stands
    assert gap(small.delta()[:, alone], deltas(given)[0][:, alone]) < 0.5
    assert float(small.delta()[:, [11, 13, 15]].abs().max()) == 0


def test_regmean_stands_inputs_that_depend_on_one_another(three):
    """Moments of rank 2 + 3 + 4 in 17 inputs, unshrunk: the answer of least size, from the pseudo-inverse."""
    draw = torch.Generator().manual_seed(3)
    x = [torch.randn(n, 17, generator=draw).double() for n in (2, 3, 4)]
    g = [v.T @ v / len(v) for v in x]
    out = fused(make("regmean", shrink=1.0), three, WEIGHTS, ground=Ground(None, moments=[{NAME: m} for m in g]))
    whole = sum(w * m for m, w in zip(g, WEIGHTS))
    truth = sum(w * d @ m for d, m, w in zip(deltas(three), g, WEIGHTS)) @ torch.linalg.pinv(whole, rtol=1e-9)
    assert gap(out, truth) < 1e-3


def test_regmean_names_moments_that_no_inputs_have(three):
    bad = [torch.diag(torch.ones(17)) + 3 * (torch.ones(17, 17) - torch.eye(17)) * s for s in (-1, -0.9, -0.8)]
    with pytest.raises(UserError, match=f"second moments of {NAME} add up .* larger ridge"):
        fused(make("regmean", shrink=1.0), three, ground=Ground(None, moments=[{NAME: m} for m in bad]))


def test_regmean_behind_a_resolver_keeps_to_the_sum_of_ranks(three):
    ground = Ground(None, moments=[{NAME: m} for m in moments(3)])
    out = fused(make("regmean"), three, WEIGHTS, ground=ground, resolver=CRSubspace())
    assert out.rank <= 6


@pytest.mark.parametrize("name", [n for n in OWN if n not in ("linear",)])
def test_a_weight_that_only_adapters_of_weight_0_change_stays_as_it_is(name):
    one, two = adapters(ranks=(2, 3))
    alone = dataclasses.replace(two, parts={**two.parts, "blocks.1.mlp.down": low(12, 17, 2, 9)})
    found = {k: Ground(None, moments=[{NAME: m} for m in moments(2)]) for k in ("regmean",)}
    out = dict(stream(make(name), [one, alone], (1.0, 0.0), found.get(name)))
    assert not out["blocks.1.mlp.down"].delta().any() and out[NAME].delta().any()


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("shape", [(12, 17), (4, 17)])
def test_no_difference_has_a_higher_rank_than_its_method_announces(name, shape):
    given = adapters(*shape, ranks=(2, 2, 2))
    settings = [{}, *({"published": True} for _ in range(name in ("iso", "tsv")))]
    settings += [{"rank": r} for r in (1, 5, 40) if name in ("svd", "ties", "dare", "magnitude")]
    ground = Ground(None, moments=[{NAME: m} for m in moments(3)])
    for values in settings:
        method = make(name, **values)
        announced = method.out_rank((2, 2, 2), shape)
        assert fused(method, given, ground=ground).rank == announced <= min(shape), values


# ---------------------------------------------------------------- coverage


def test_coverage_divides_by_those_who_could_see():
    kept = [rows(0, 1, 2, 3), rows(2, 3, 4, 5), None]
    given = [masked(a, k) if k else a for a, k in zip(adapters(8, 9), kept)]
    (asked,) = modules(given, WEIGHTS)
    share = torch.tensor([0.8, 0.8, 1.0, 1.0, 0.5, 0.5, 0.3, 0.3]).double()
    assert torch.allclose(covered(asked), share)
    truth = made.mean(deltas(given), WEIGHTS)
    assert gap(fused(make("cat"), given, WEIGHTS), truth / share[:, None]) < 1e-6
    assert gap(fused(make("cat", coverage=False), given, WEIGHTS), truth) < 1e-6


def test_disjoint_plans_give_the_block_diagonal_sum():
    kept = [columns(*range(9)), columns(*range(9, 17))]
    given = [masked(a, k) for a, k in zip(adapters(ranks=(2, 3)), kept)]
    for method in (make("cat"), make("knots", rule="mean"), full("ties", density=1.0), make("knots", density=1.0)):
        assert gap(fused(method, given), sum(deltas(given))) < 1e-5, method


def test_one_common_plan_changes_no_bit():
    given = [masked(a, rows(0, 3, 5)) for a in adapters(ranks=(2, 2, 2))]
    (asked,) = modules(given, shares(given))
    assert corrected(asked) is asked
    for name in FREE:
        on, off = (fused(make(name, coverage=c), given) for c in (True, False))
        assert torch.equal(on.left, off.left) and torch.equal(on.right, off.right), name
        assert on.delta()[[1, 2, 4, *range(6, 12)]].norm() < 1e-6 * on.delta().norm(), name


def test_what_no_edge_saw_stays_zero_and_few_are_not_blown_up():
    given = [masked(a, rows(0)) if i == 0 else masked(a, rows(1, 2)) for i, a in enumerate(adapters(ranks=(2, 2)))]
    out = fused(make("cat"), given, (0.01, 0.99)).delta()
    assert float(out[3:].abs().max()) == 0
    assert gap(out[0], 0.1 * deltas(given)[0][0]) < 1e-6  # 0.01 / max(0.01, 0.1)


def test_rows_of_one_edge_and_columns_of_another_are_refused():
    given = [masked(adapters()[0], rows(0)), masked(adapters()[1], columns(1))]
    with pytest.raises(UserError, match="part of the rows"):
        fused(make("cat"), given)


def test_trimming_counts_what_the_edge_could_see():
    given = [masked(a, rows(0, 1)) for a in adapters(ranks=(2,))]
    out = fused(full("ties", density=0.5), given).delta()
    assert int((out.abs() > 1e-6).sum()) == 17  # half of two rows


@pytest.mark.parametrize("name", FREE)
def test_weights_that_only_some_adapters_change(name):
    given = adapters(names=("a", NAME))
    given[0] = Adapter("edge 0", {"b": low(12, 17, 2, 7)}, made.BASE)
    method = make(name, **({"density": 1.0} if name in ("ties", "dare_ties", "dare", "magnitude", "knots") else {}))
    out = dict(stream(method, given, WEIGHTS))
    assert set(out) == {"a", "b", NAME}
    if name not in ("iso", "tsv", "della"):  # b has one owner: with coverage its word stands alone
        assert gap(out["b"], given[0].parts["b"].delta()) < 1e-5
    if name == "cat":
        off = dict(stream(dataclasses.replace(method, coverage=False), given, WEIGHTS))
        assert gap(off["b"], 0.5 * given[0].parts["b"].delta()) < 1e-6


# ---------------------------------------------------------------- resolvers, plans, rounds


class Halve(Resolver):
    """Halve the first adapter."""

    def resolve(self, core, module):
        middles = core.middles.clone()
        middles[0] *= 0.5
        return dataclasses.replace(core, middles=middles)


class HalveEntries(Halve):
    """The same, entry by entry."""

    def entries(self, module):
        def change(values, row):
            values[0] *= 0.5
            return values

        return change


class Broken(Halve):
    def resolve(self, core, module):
        return dataclasses.replace(core, middles=core.middles[:1])


@pytest.mark.parametrize("name", FREE)
def test_a_resolver_in_the_core_is_heard_by_every_method(name, three):
    settings = {"rank": 12} if name in ("ties", "dare", "dare_ties", "della", "magnitude") else {}
    half = [
        dataclasses.replace(three[0], parts={NAME: LowRank(three[0].parts[NAME].left / 2, three[0].parts[NAME].right)})
    ]
    wanted = fused(make(name, **settings), half + three[1:])
    found = fused(make(name, **settings), three, resolver=Halve())
    assert gap(found, wanted.delta()) < 1e-4
    assert found.rank <= 12
    if name in ("cat", "knots", "tsv", "iso", "svd"):
        assert found.rank == wanted.rank


@pytest.mark.parametrize("name", ["cat", "svd", "ties", "dare", "dare_ties", "della", "magnitude"])
def test_a_resolver_of_entries_is_heard_where_entries_are_looked_at(name, three):
    method = make(name, rank=12) if name != "cat" else make(name)
    wanted = fused(method, three, resolver=Halve())
    assert gap(fused(method, three, resolver=HalveEntries()), wanted.delta()) < 1e-4


def test_resolvers_where_they_make_no_sense_are_refused(three):
    for name, settings in (("tsv", {}), ("iso", {}), ("knots", {}), ("ties", {"space": "core"})):
        with pytest.raises(UserError, match="space=core"):
            fused(make(name, **settings), three, resolver=HalveEntries())
    with pytest.raises(UserError, match="fuses factors"):
        fused(make("linear"), three, resolver=Halve())
    with pytest.raises(UserError, match=r"shape \(3, 6, 6\)"):
        fused(make("cat"), three, resolver=Broken())


def test_the_core_rule_is_another_rule_and_called_so(three):
    core, weight = (make("ties", density=0.5, space=s) for s in ("core", "full"))
    assert (core.label, weight.label) == ("ties@core", "ties")
    assert core.plan(three).method == "ties@core"
    assert gap(fused(core, three), fused(full("ties", density=0.5), three).delta()) > 0.05
    small = coordinates([a.parts[NAME] for a in three])
    out = fused(core, three).delta()
    assert gap(small.left @ (small.left.T @ out), out) < 1e-6


def test_adapters_in_spans_of_their_own_do_not_vote_on_each_other_in_the_core():
    parts = [LowRank(torch.eye(12)[:, [i]] * (i + 1), torch.eye(17)[[i]]) for i in range(3)]
    out = make("ties", density=1.0, space="core").fuse(module(parts))
    assert gap(out, sum(p.delta() for p in parts)) < 1e-6


def test_a_plan_says_how_it_was_made(three):
    change = make("svd", rank=2, lam=2.0).plan(three, [2, 1, 1], resolver=Halve())
    assert (change.method, change.base) == ("svd", made.BASE)
    assert change.settings["rank"] == 2
    assert change.notes["adapters"] == ["edge 0", "edge 1", "edge 2"]
    assert change.notes["weights"] == [0.5, 0.25, 0.25]
    assert 0 < change.notes["kept_energy"][NAME] < 1
    assert change.notes["resolver"]["seed"] == 0
    assert type(change.parts[NAME]) is LowRank


def test_a_plan_leaves_out_what_is_zero(three):
    nothing = LowRank(torch.zeros(12, 1), torch.ones(1, 17))
    some = [dataclasses.replace(a, parts={**a.parts, "blocks.1.mlp.up": nothing}) for a in three]
    for name in FREE:
        change = make(name).plan(some)
        assert set(change.parts) == {NAME} and change.notes["zero"] == ["blocks.1.mlp.up"], name
    with pytest.raises(UserError, match="Nothing is left"):
        make("cat").plan([dataclasses.replace(three[0], parts={NAME: nothing})])


def test_what_cannot_be_fused_is_said(three):
    with pytest.raises(UserError, match="different base models"):
        make("cat").plan([three[0], dataclasses.replace(three[1], base="f" * 64)])
    with pytest.raises(UserError, match="one weight for each"):
        make("cat").stream(three, [1.0])
    with pytest.raises(UserError, match="size"):
        make("cat").plan([three[0], *adapters(5, 5)])


def test_a_round_is_exact_with_its_residual():
    given = adapters(ranks=(3,) * 4)
    weights = (0.1, 0.2, 0.3, 0.4)
    closed = next_round(given, weights)
    truth = made.mean(deltas(given), weights)
    assert closed.residual.parts[NAME].rank == 9  # (N - 1) r
    assert gap(closed.adapter.parts[NAME].delta() + closed.residual.parts[NAME].delta(), truth) < 1e-6
    assert gap(closed.adapter.parts[NAME], truth) > 0.5
    assert not next_round(given[:1]).residual.parts
    assert residual(module([given[0].parts[NAME]] * 3)).delta().abs().max() < 1e-6


def test_a_round_needs_equal_ranks_and_weights(three):
    with pytest.raises(UserError, match=r"3 of 3 do, with ranks 2, 3, 1"):
        next_round(three)
    with pytest.raises(UserError, match="1 of 2 do"):
        next_round([three[0], Adapter("edge 9", {"x": low(12, 17, 2, 3)}, made.BASE)])
