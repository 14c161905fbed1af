"""The scores against identities and slow loops; scoring leaves no trace."""

import copy

import pytest
import torch
from slim_networks import batch, inputs, network
from torch.nn import functional

from retouch.errors import UnknownName, UserError
from retouch.slim.losses import exit_loss, hard_loss
from retouch.slim.scores import LOSSES, SCORES, gate_gradients, score
from retouch.slim.shrink import Kept, sliced

HEAD = 8
FAMILIES = ["bert", "distilbert", "roberta", "mpnet"]


def pair(family="bert", **fields):
    """A student of uneven widths, and its teacher."""
    uneven = Kept([[0, 1, 3], [0, 1, 2, 3], [1, 2]], [list(range(20)), list(range(64)), list(range(40, 49))])
    return sliced(network(family, seed=0, **fields), uneven), network(family, seed=5, **fields)


def charge(net, teacher, rows, equilibrium=True):
    """The default loss, the long way."""
    taught = teacher.levels(**inputs(rows)).logits
    seen = net.levels(**inputs(rows), equilibrium=equilibrium).logits
    return sum(functional.cross_entropy(seen[l], taught[l].detach().softmax(-1)) for l in seen)


def gradients(net, loss):
    """Slopes of all weights, by `backward` on a copy's worth of clean fields."""
    net.zero_grad(set_to_none=True)
    loss.backward()
    found = {id(weight): weight.grad for weight in net.parameters()}
    net.zero_grad(set_to_none=True)
    return found


def columns(matrix):
    """The sum over each head's columns."""
    return torch.stack([part.sum() for part in matrix.split(HEAD, dim=1)])


def rows_of(weight):
    """The sum over each head's rows (or entries of a bias)."""
    return torch.stack([part.sum() for part in weight.split(HEAD, dim=0)])


def assert_close(got, wanted, rtol=1e-11):
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b.detach(), rtol=rtol, atol=1e-15)


def single(rows, i):
    """One example without its padding."""
    n = int(rows["attention_mask"][i].sum())
    return {k: v[i : i + 1, :n] if v.ndim == 2 else v[i : i + 1] for k, v in rows.items()}


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize("family", FAMILIES)
def test_the_slope_in_a_gate_is_that_of_the_weights_behind_and_before_it(family):
    net, teacher = pair(family)
    rows = batch(7, 2, 4)
    heads, neurons = gate_gradients(net, rows, lambda b: charge(net, teacher, b))
    slopes = gradients(net, charge(net, teacher, rows) * 3)
    for block in range(3):
        p = net.parts(block)
        behind = columns(p.out.weight * slopes[id(p.out.weight)])
        before = rows_of(p.value.weight * slopes[id(p.value.weight)]) + rows_of(p.value.bias * slopes[id(p.value.bias)])
        assert_close([heads[block].sum(0)] * 2, [behind, before])
        assert heads[block].shape == (3, net.widths.heads[block]) and float(behind.detach().abs().min()) > 1e-9
        assert_close([neurons[block].sum(0)], [(p.down.weight * slopes[id(p.down.weight)]).sum(0)])


def test_gates_are_those_of_each_example_alone_however_batched():
    net, teacher = pair()
    rows = batch(7, 2, 4, 1, 5)
    whole = score(net, teacher, [rows])
    alone = [score(net, teacher, [single(rows, i)]) for i in range(5)]
    split = score(net, teacher, [{k: v[:3] for k, v in rows.items()}, {k: v[3:] for k, v in rows.items()}])
    assert whole.n_examples == split.n_examples == 5
    for kind in ("heads", "neurons"):
        mean = [sum(getattr(a, kind)[b] for a in alone) / 5 for b in range(3)]
        assert_close(getattr(whole, kind), mean)
        assert_close(getattr(split, kind), mean)
        assert all(v.dtype == torch.float64 for v in getattr(whole, kind))


def test_a_gate_measures_what_closing_it_a_little_does():
    net, teacher = pair()
    rows, step = batch(6), 1e-6
    found = score(net, teacher, [rows], equilibrium=False)
    weight = net.parts(1).down.weight
    change = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[:, 7] *= 1 + sign * step
            change.append(float(charge(net, teacher, rows)))
            weight[:, 7] /= 1 + sign * step
    assert float(found.neurons[1][7]) == pytest.approx(abs(change[0] - change[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("how", ["gates", "grain"])
@pytest.mark.parametrize("exits", [[0, 1, 2], [1, 2]])
def test_equilibrium_multiplies_a_block_by_one_constant(how, exits):
    net, teacher = pair(exits=exits)
    rows = batch(7, 2, 4)
    on, off = (score(net, teacher, [rows], how=how, equilibrium=e) for e in (True, False))
    for block in range(3):
        above = sum(e >= block for e in exits)
        assert_close([on.heads[block] * above], [off.heads[block]])
        assert_close([on.neurons[block] * above], [off.neurons[block]])


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("how", ["paper", "qkvo"])
def test_paper_adds_the_sizes_of_weight_times_slope(how):
    net, teacher = pair()
    both = [batch(7, 2, 4), batch(3, 3, seed=2)]
    slopes = [gradients(net, charge(net, teacher, rows)) for rows in both]
    found = score(net, teacher, both, how=how)
    for block in range(3):
        p = net.parts(block)

        def size(weight):
            return weight.detach().abs() * sum(s[id(weight)].abs() for s in slopes)

        heads = columns(size(p.out.weight))
        if how == "qkvo":
            for linear in (p.query, p.key, p.value):
                heads = heads + rows_of(size(linear.weight)) + rows_of(size(linear.bias))
        assert_close([found.heads[block]], [heads])
        assert_close([found.neurons[block]], [size(p.up.weight).sum(1) + size(p.down.weight).sum(0)])


def test_grain_is_a_gate_for_each_batch_and_a_running_mean():
    net, teacher = pair()
    rows = batch(7, 2, 4)
    one = [score(net, teacher, [single(rows, i)], how="grain") for i in range(2)]
    gates = score(net, teacher, [single(rows, 0)])
    assert_close(one[0].heads + one[0].neurons, gates.heads + gates.neurons)
    both = score(net, teacher, [single(rows, 0), single(rows, 1)], how="grain")
    mean = [(0.998 * a + b) / 1.998 for a, b in zip(one[0].heads, one[1].heads, strict=True)]
    assert_close(both.heads, mean)


def test_magnitude_is_all_that_would_go():
    net, teacher = pair()
    found = score(net, teacher, [], how="magnitude")
    for block in range(3):
        p = net.parts(block)
        heads = columns(p.out.weight.abs()) + sum(rows_of(m.weight.abs()) for m in (p.query, p.key, p.value))
        assert_close([found.heads[block]], [heads])
        assert_close([found.neurons[block]], [p.up.weight.abs().sum(1) + p.down.weight.abs().sum(0)])


def test_random_is_its_seed():
    net, teacher = pair()
    first, again, other = (score(net, teacher, [], how="random", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.heads + first.neurons, again.heads + again.neurons, strict=True))
    assert not torch.equal(first.neurons[0], other.neurons[0])
    assert [len(n) for n in first.neurons] == [20, 64, 9] and [len(h) for h in first.heads] == [3, 4, 2]


@pytest.mark.parametrize("how", ["gates", "paper", "grain"])
def test_a_silent_unit_scores_nothing(how):
    net, teacher = pair()
    with torch.no_grad():
        net.parts(1).out.weight[:, HEAD : 2 * HEAD] = 0
        net.parts(1).down.weight[:, 5] = 0
        net.parts(1).up.weight[5] = 0
    found = score(net, teacher, [batch(7, 2, 4)], how=how)
    assert float(found.heads[1][1]) == 0 == float(found.neurons[1][5])
    assert int((found.heads[1] == 0).sum()) == 1 == int((found.neurons[1] == 0).sum())


# ---------------------------------------------------------------- losses


def test_final_only_is_blind_to_the_lower_exits():
    net, teacher = pair()
    rows = batch(7, 2, 4)
    last = {k: v for k, v in net.state_dict().items() if k not in _lower(net)}
    alone = sliced(network(exits=[2]), Kept(net.config.kept_heads, net.config.kept_neurons))
    alone.load_state_dict(last)
    found = score(net, teacher, [rows], loss="final_only", equilibrium=False)
    assert_close(found.heads, score(alone, teacher, [rows]).heads)
    everything = score(net, teacher, [rows], equilibrium=False)
    assert not torch.allclose(found.heads[0], everything.heads[0], rtol=1e-2)


def _lower(net):
    return {name for name in net.state_dict() if name.startswith(("exits.0.", "exits.1."))}


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_papers_loss_is_its_three_parts(task):
    fields = {"task": task, "target_mean": 1.0, "target_scale": 2.0} if task == "regression" else {}
    net, teacher = pair(**fields)
    rows = batch(7, 2, 4)
    y = (rows["labels"] - 1.0) / 2.0 if task == "regression" else rows["labels"]
    seen, taught = net.levels(**inputs(rows), equilibrium=True), teacher.levels(**inputs(rows))
    mask = rows["attention_mask"][..., None]
    spread = sum(
        functional.mse_loss(s * mask, t.detach() * mask) for s, t in zip(seen.hidden, taught.hidden, strict=True)
    )
    loss = 0.9 * exit_loss(seen.logits, taught.logits, task) + 0.1 * hard_loss(seen.logits, y, task) + spread
    slopes = gradients(net, loss)
    found = score(net, teacher, [rows], how="paper", loss="paper")
    for block in range(3):
        weight = net.parts(block).out.weight
        assert_close([found.heads[block]], [columns(weight.abs() * slopes[id(weight)].abs())])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("how", SCORES)
def test_every_score_takes_every_loss(how, loss):
    net, teacher = pair()
    found = score(net, teacher, [batch(4, 2)], how=how, loss=loss)
    assert [len(h) for h in found.heads] == [3, 4, 2] and [len(n) for n in found.neurons] == [20, 64, 9]
    assert all(bool((v > 0).all()) for v in found.heads + found.neurons)


# ---------------------------------------------------------------- without a trace


def trace(net):
    """Everything that scoring could disturb."""
    return (
        {k: v.clone() for k, v in net.state_dict().items()},
        {k: None if p.grad is None else p.grad.clone() for k, p in net.named_parameters()},
        {k: p.requires_grad for k, p in net.named_parameters()},
        {k: m.training for k, m in net.named_modules()},
        {k: len(m._forward_pre_hooks) for k, m in net.named_modules()},
    )


def same(before, after):
    return all(torch.equal(v, after[0][k]) for k, v in before[0].items()) and (
        all(after[1][k] is v or torch.equal(v, after[1][k]) for k, v in before[1].items()) and before[2:] == after[2:]
    )


@pytest.mark.parametrize("how", SCORES)
def test_scoring_leaves_no_trace(how):
    net, teacher = pair()
    for module in (net, teacher):
        module.train()
        module.body.embeddings.eval()
        next(module.parameters()).requires_grad_(False)
        module.exits["0"].weight.grad = torch.ones_like(module.exits["0"].weight)
    before, noise = (trace(net), trace(teacher)), torch.get_rng_state()
    first, again = (score(net, teacher, [batch(4, 2)], how=how, seed=3) for _ in range(2))
    assert same(before[0], trace(net)) and same(before[1], trace(teacher))
    assert torch.equal(noise, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.heads, again.heads, strict=True))  # no dropout either
    assert not any(v.requires_grad for v in first.heads + first.neurons)


@pytest.mark.parametrize("how", ["gates", "paper"])
def test_an_error_leaves_no_trace(how):
    net, teacher = pair()
    net.train()
    before = trace(net)
    rows = {k: v for k, v in batch(4, 2).items() if k != "labels"}
    with pytest.raises(UserError, match="needs labels in every batch"):
        score(net, teacher, [rows], how=how, loss="paper")
    assert same(before, trace(net))


def test_a_network_may_be_its_own_teacher():
    net, _ = pair()
    before = trace(net)
    found = score(net, net, [batch(4, 2)])
    assert same(before, trace(net)) and float(max(h.max() for h in found.heads)) < 1e-12


def test_what_is_unknown_or_missing_is_named():
    net, teacher = pair()
    with pytest.raises(UnknownName, match="Did you mean 'gates'"):
        score(net, teacher, [], how="gate")
    with pytest.raises(UnknownName, match="Did you mean 'exits_ce'"):
        score(net, teacher, [], loss="exit_ce")
    with pytest.raises(UserError, match="at least one batch"):
        score(net, teacher, [])
    with pytest.raises(UserError, match="no exit after block 0"):
        score(net, copy.deepcopy(network(exits=[2])), [batch(3)])
