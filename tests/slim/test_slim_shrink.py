"""What is cut: masked equals sliced over any number of cuts, choices are exact, and factors are the best there are."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slim_networks import batch, inputs, network
from torch.utils._python_dispatch import TorchDispatchMode

import families
from retouch.errors import UserError
from retouch.slim.base import Size, Widths
from retouch.slim.scores import Scores
from retouch.slim.shrink import (
    Kept,
    choose,
    choose_globally,
    factorised,
    masked,
    sliced,
    unit_parameters,
)
from retouch.slim.widths import parameters

SIZE = Size(blocks=3, d_model=32, heads=4, d_ff=64, vocab=500, positions=128, token_types=2, classes=3)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores(heads=4, d_ff=64, blocks=3, seed=0):
    return Scores(
        [normal(heads, seed=seed + b).abs() for b in range(blocks)],
        [normal(d_ff, seed=seed + 50 + b).abs() for b in range(blocks)],
    )


@torch.no_grad()
def levels(net, rows):
    found = net.levels(**inputs(rows))
    real = rows["attention_mask"][..., None]
    return [h * real for h in found.hidden] + list(found.logits.values())


def assert_equal(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- masked equals sliced

CUTS = (
    Kept([[0, 2, 3], [0, 1, 2, 3], [1, 2]], [list(range(0, 64, 2)), list(range(64)), [5, 6, 7, 40, 63]]),
    Kept([[1, 2], [0, 3], [0, 1]], [list(range(3, 30)), [0, 31, 63], [0, 2, 4]]),
    Kept([[0, 1], [1], [1]], [[0, 5, 26], [2], [0, 1, 2]]),
)


@pytest.mark.parametrize("family", families.ENCODERS)
def test_masked_equals_sliced_after_each_of_several_cuts(family):
    net, rows = network(family), batch(9, 4, 1, 6)
    for kept in CUTS:
        before = levels(net, rows)
        with masked(net, kept):
            wanted = levels(net, rows)
        assert_equal(levels(net, rows), before)
        net = sliced(net, kept)
        assert_equal(levels(net, rows), wanted)
        assert not torch.allclose(before[-1], wanted[-1], rtol=0, atol=1e-6)


two_blocks = functools.cache(lambda: network(blocks=2))


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_masked_equals_sliced_whatever_is_kept(data):
    def some(n):
        return data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True).map(sorted))

    kept = Kept([some(4) for _ in range(2)], [some(64) for _ in range(2)])
    net, rows = two_blocks(), batch(5, 3)
    with masked(net, kept):
        wanted = levels(net, rows)
    assert_equal(levels(sliced(net, kept), rows), wanted)


@pytest.mark.parametrize("family", families.ENCODERS)
def test_kept_ids_lead_straight_back_to_the_original(family):
    original = net = network(family)
    for kept in CUTS:
        net = sliced(net, kept)
    assert net.config.kept_heads == [[2, 3], [3], [2]]
    assert net.config.kept_neurons == [[6, 16, 58], [63], [5, 7, 63]]
    at_once = sliced(original, Kept(net.config.kept_heads, net.config.kept_neurons))
    assert at_once.config.to_dict() == net.config.to_dict()
    assert all(torch.equal(v, at_once.state_dict()[k]) for k, v in net.state_dict().items())


def test_slicing_leaves_the_network_and_the_generator_alone_and_keeps_its_settings():
    net = network(exits=[0, 2], pooling="mean", pooler="tanh").train()
    net.exits["0"].weight.requires_grad_(False)
    before, noise = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    new = sliced(net, CUTS[0])
    assert torch.equal(noise, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.widths.heads == (4, 4, 4) and net.config.kept_heads is None
    with torch.no_grad():
        for weight in new.parameters():
            weight.zero_()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert new.training and new.dtype == torch.float64 and new.config.pooling == "mean" and new.widths.exits == (0, 2)
    assert [n for n, p in new.named_parameters() if not p.requires_grad] == ["exits.0.weight"]


@pytest.mark.parametrize("family", families.ENCODERS)
def test_parameters_are_those_of_the_formula(family):
    net = sliced(factorised(sliced(network(family, exits=[1, 2]), CUTS[0]), 12), CUTS[1])
    assert net.widths == Widths((2, 2, 2), (27, 3, 3), 12, (1, 2))
    assert sum(p.numel() for p in net.parameters()) == parameters(net.size, net.widths)


def test_a_mask_is_lifted_bit_for_bit_and_even_after_an_error():
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(KeyError), masked(net, CUTS[0]):
        assert not torch.equal(net.parts(2).down.weight, before["body.encoder.layer.2.output.dense.weight"])
        raise KeyError
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("ids", [[], [1, 0], [0, 0], [-1, 0], [0, 4]])
def test_impossible_heads_are_named(ids):
    kept = Kept([[0], ids, [0]], [[0]] * 3)
    with pytest.raises(UserError, match="Block 1 must keep at least one head"):
        sliced(network(), kept)
    with pytest.raises(UserError, match="Block 1"), masked(network(), kept):
        pass


def test_another_depth_is_named():
    with pytest.raises(UserError, match=r"neurons of 2 blocks.*3 blocks"):
        sliced(network(), Kept([[0]] * 3, [[0]] * 2))


# ---------------------------------------------------------------- choosing


def test_the_best_stay_in_their_order_and_the_first_of_equals():
    found = Scores([tensor(0.1, 3.0, 2.0, 3.0)], [tensor(1, 1, 5, 1, 1)])
    assert choose(found, Widths((2,), (3,), None, (0,))) == Kept([[1, 3]], [[0, 1, 2]])
    assert choose(found, Widths((3,), (1,), None, (0,))) == Kept([[1, 2, 3]], [[2]])
    equal = Scores([torch.ones(4)], [torch.ones(64)])
    assert choose(equal, Widths((2,), (8,), None, (0,))) == Kept([[0, 1]], [list(range(8))])


def test_a_choice_too_wide_or_from_broken_scores_is_refused():
    with pytest.raises(UserError, match="4 heads of block 0, and 5"):
        choose(scores(blocks=1), Widths((5,), (8,), None, (0,)))
    with pytest.raises(UserError, match="scores are of 3 blocks"):
        choose(scores(), Widths((5,), (8,), None, (0,)))
    broken = scores()
    broken.neurons[1][3] = float("nan")
    with pytest.raises(UserError, match="neurons of block 1"):
        choose(broken, Widths.uniform(SIZE, 2, 8, None))
    with pytest.raises(UserError, match="neurons of block 1"):
        choose_globally(broken, SIZE, Widths.uniform(SIZE, 2, 8, None))


@given(
    seed=st.integers(0, 10**6), heads=st.integers(1, 4), eighths=st.integers(1, 8), d_ff=st.sampled_from([64, 61, 40])
)
@settings(max_examples=60, deadline=None)
def test_a_global_choice_meets_its_total(seed, heads, eighths, d_ff):
    found, plan = scores(d_ff=d_ff, seed=seed), Widths.uniform(SIZE, heads, 8 * eighths, None)
    kept = choose_globally(found, SIZE, plan)
    n_heads, n_neurons = [len(ids) for ids in kept.heads], [len(ids) for ids in kept.neurons]
    total = unit_parameters(SIZE, plan)
    spent = unit_parameters(SIZE, Widths(tuple(n_heads), tuple(n_neurons), None, (2,)))
    assert spent <= total
    everything = unit_parameters(SIZE, Widths((4,) * 3, (d_ff,) * 3, None, (2,)))
    largest = max(SIZE.head_dim * (4 * SIZE.d_model + 3), 8 * (2 * SIZE.d_model + 1))
    assert spent > total - largest or spent == everything  # nothing went that could have stayed
    assert min(n_heads) >= 1 and min(n_neurons) >= 8
    assert all(n % 8 == 0 or n == d_ff for n in n_neurons)
    exact = choose(found, Widths(tuple(n_heads), tuple(n_neurons), None, (2,)))
    assert kept == exact == choose_globally(found, SIZE, total)


def test_a_global_choice_drops_what_is_worth_least_and_not_what_is_in_a_quiet_block():
    found = scores()
    quiet = Scores([found.heads[0] * 1e-6, *found.heads[1:]], [found.neurons[0] * 1e-6, *found.neurons[1:]])
    plan = Widths.uniform(SIZE, 2, 32, None)
    assert choose_globally(quiet, SIZE, plan) == choose_globally(found, SIZE, plan)
    poor = Scores([tensor(9, 9, 9, 0), *[tensor(9, 9, 9, 9)] * 2], [torch.ones(64, dtype=torch.float64)] * 3)
    everything = unit_parameters(SIZE, Widths.full(SIZE))
    kept = choose_globally(poor, SIZE, everything - 1)
    assert kept.heads == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]] and kept.neurons == [list(range(64))] * 3


def test_an_impossible_total_names_the_least():
    least = unit_parameters(SIZE, Widths.uniform(SIZE, 1, 8, None))
    assert [len(ids) for ids in choose_globally(scores(), SIZE, least).heads] == [1, 1, 1]
    with pytest.raises(UserError, match=f"{least:,} already"):
        choose_globally(scores(), SIZE, least - 1)


# ---------------------------------------------------------------- the word embedding


@torch.no_grad()
def product(net):
    words = net.get_input_embeddings()
    return words.table.weight @ words.map.weight.T


@pytest.mark.parametrize("family", families.ENCODERS)
def test_factors_are_the_truncated_svd(family):
    net = network(family)
    whole = net.get_input_embeddings().weight.detach()
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    new = factorised(net, 12)
    assert torch.allclose(product(new), u[:, :12] * s[:12] @ v[:12], rtol=0, atol=1e-12)
    assert new.widths.rank == 12 and net.widths.rank is None
    rows = batch(9, 4, 1, 6)
    assert_equal(levels(factorised(net, 32), rows), levels(net, rows))  # nothing is lost at full rank
    assert not torch.allclose(levels(new, rows)[0], levels(net, rows)[0], atol=1e-3)


def counts(vocab):
    return (normal(vocab, seed=7).abs() * 100).pow(2).round() * (torch.arange(vocab) % 3 == 0)


def test_weights_lower_the_weighted_error_and_are_the_best_there_is():
    net = network()
    whole, seen = net.get_input_embeddings().weight.detach(), counts(net.size.vocab)
    w = seen / seen.sum() + 1e-6
    errors = [
        float((w[:, None] * (product(factorised(net, 8, c)) - whole).square()).sum())
        for c in (None, seen, seen.tolist())
    ]
    assert errors[1] < 0.95 * errors[0] and errors[1] == errors[2]
    assert errors[1] == pytest.approx(
        float(torch.linalg.svdvals(w.sqrt()[:, None] * whole)[8:].square().sum()), rel=1e-9
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_factors_can_be_factorised_again(weighted):
    net = network()
    seen = counts(net.size.vocab) if weighted else None
    first = factorised(net, 20, seen)
    with torch.no_grad():  # as training would
        first.get_input_embeddings().map.weight.add_(0.1 * normal(32, 20, seed=4))
    whole = product(first)
    root = (
        torch.ones(len(whole), 1, dtype=torch.float64) if seen is None else (seen / seen.sum() + 1e-6).sqrt()[:, None]
    )
    u, s, v = torch.linalg.svd(root * whole, full_matrices=False)
    assert torch.allclose(product(factorised(first, 9, seen)), (u[:, :9] * s[:9] @ v[:9]) / root, rtol=0, atol=1e-9)
    rows = batch(5, 3)
    assert_equal(levels(factorised(first, 20, seen), rows), levels(first, rows))


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that anything returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_matrix_of_vocabulary_times_vocabulary_is_formed():
    net = network(blocks=1)
    vocab, d = net.size.vocab, net.size.d_model
    with _Largest() as largest:
        factorised(factorised(net, 10, counts(vocab)), 5)
    assert vocab * 10 <= largest.numel <= vocab * d < vocab * vocab


def test_an_embedding_larger_than_a_piece_is_put_together_again(monkeypatch):
    net = network(blocks=1)
    wanted = product(factorised(net, 7, counts(net.size.vocab)))
    monkeypatch.setattr("retouch.slim.shrink._ROWS", 64)
    assert torch.allclose(product(factorised(net, 7, counts(net.size.vocab))), wanted, rtol=0, atol=1e-12)


def test_impossible_ranks_and_counts_are_named():
    net = network(blocks=1)
    for rank in (0, 33):
        with pytest.raises(UserError, match=f"from 1 to 32; got {rank}"):
            factorised(net, rank)
    with pytest.raises(UserError, match="from 1 to 8; got 9"):
        factorised(factorised(net, 8), 9)
    for wrong in (torch.zeros(net.size.vocab), torch.ones(3), -torch.ones(net.size.vocab)):
        with pytest.raises(UserError, match="counts must be"):
            factorised(net, 8, wrong)
