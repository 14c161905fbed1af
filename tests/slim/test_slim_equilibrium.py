"""Gradients that leave a block are the mean over the exits above it, whatever the exits and the widths."""

import pytest
import torch
from torch.nn import functional

import families
from retouch.slim.equilibrium import counts, scale_gradient
from retouch.slim.network import SlimConfig, SlimForSequenceClassification

BLOCKS = 4
EXITS = [[0, 1, 2, 3], [1, 3], [3], [0, 3]]


def network(exits, family="bert"):
    base = families.build(family, n_blocks=BLOCKS, pad_token_id=1).config.to_dict()
    config = SlimConfig(
        base=base, heads=[4, 2, 1, 3], d_ff=[64, 24, 8, 40], rank=12, exits=exits, id2label={0: "a", 1: "b", 2: "c"}
    )
    torch.manual_seed(0)
    built = SlimForSequenceClassification(config).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def batch():
    torch.manual_seed(1)
    ids = torch.randint(5, 400, (3, 8))
    mask = (torch.arange(8) < torch.tensor([8, 3, 5])[:, None]).long()
    return ids, mask, torch.tensor([0, 2, 1])


def gradients(net, blocks, *, equilibrium):
    """The gradient of the summed losses of some exits, by name; an exit that is not charged is read all the same."""
    ids, mask, y = batch()
    levels = net.levels(ids, mask, equilibrium=equilibrium)
    net.zero_grad(set_to_none=True)
    torch.stack([functional.cross_entropy(levels.logits[block], y) for block in blocks]).sum().backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def block_of(name):
    return int(name.split(".layer.")[1].split(".")[0]) if ".layer." in name else None


def close(got, wanted):
    return (got - wanted).norm() <= 1e-12 * max(float(wanted.norm()), 1e-3)


def test_the_node_changes_the_gradient_and_not_the_value():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert y is not x and y.data_ptr() == x.data_ptr() and torch.equal(y, x)
    (y * torch.arange(4)).sum().backward()
    assert torch.equal(x.grad, torch.arange(4).double().expand(3, 4) / 4)


def test_counts_are_of_exits_and_not_of_blocks():
    assert counts(range(4), 4) == [4, 3, 2, 1]
    assert counts([1, 3], 4) == [2, 2, 1, 1]
    assert counts([3], 4) == [1, 1, 1, 1]
    assert counts([1], 4) == [1, 1, 1, 1]


@pytest.mark.parametrize("exits", EXITS, ids=str)
def test_a_blocks_gradient_is_the_mean_over_the_exits_at_or_above_it(exits):
    net = network(exits)
    got = gradients(net, exits, equilibrium=True)
    alone = {block: gradients(net, [block], equilibrium=False) for block in exits}
    seen = 0
    for name, gradient in got.items():
        block = block_of(name)
        if block is not None:
            above = [alone[exit_][name] for exit_ in exits if exit_ >= block]
            assert close(gradient, sum(above) / len(above)), name
            seen += 1
        elif name.startswith("exits."):
            assert close(gradient, alone[int(name.split(".")[1])][name]), name
        else:  # the embedding lies below every exit
            assert close(gradient, sum(a[name] for a in alone.values()) / len(exits)), name
    assert seen >= BLOCKS * 16


def test_without_the_nodes_gradients_add_up():
    net, exits = network([1, 3]), [1, 3]
    got = gradients(net, exits, equilibrium=False)
    alone = [gradients(net, [block], equilibrium=False) for block in exits]
    for name, gradient in got.items():
        assert close(gradient, sum(a[name] for a in alone if name in a)), name


def test_mpnets_blocks_are_balanced_too():
    net, exits = network([1, 3], "mpnet"), [1, 3]
    got = gradients(net, exits, equilibrium=True)
    alone = [gradients(net, [block], equilibrium=False) for block in exits]
    name = "body.encoder.layer.0.attention.attn.q.weight"
    assert close(got[name], sum(a[name] for a in alone) / 2)


@pytest.mark.parametrize("exits", EXITS, ids=str)
def test_values_are_the_same_bits_with_and_without_the_nodes(exits):
    net = network(exits)
    ids, mask, _ = batch()
    with torch.no_grad():
        on, off = net.levels(ids, mask, equilibrium=True), net.levels(ids, mask)
    assert all(torch.equal(a, b) for a, b in zip(on.hidden, off.hidden, strict=True))
    assert all(torch.equal(on.logits[block], off.logits[block]) for block in exits)


def test_a_hidden_loss_between_the_nodes_is_charged_at_its_level():
    net = network([0, 1, 2, 3])
    ids, mask, _ = batch()
    name = "body.encoder.layer.0.output.dense.weight"

    def gradient(level, equilibrium):
        net.zero_grad(set_to_none=True)
        net.levels(ids, mask, equilibrium=equilibrium).hidden[level].square().sum().backward()
        return net.get_parameter(name).grad.clone()

    for level in (1, 2, 4):  # h_0, h_1 and h_3: each reaches block 0 divided by its number of exits
        assert close(gradient(level, True), gradient(level, False) / 4)


def test_only_the_exits_that_are_read_count():
    net = network([0, 1, 2, 3])
    ids, mask, y = batch()
    found = []
    for equilibrium in (True, False):
        net.zero_grad(set_to_none=True)
        levels = net.levels(ids, mask, equilibrium=equilibrium, exits=[3])
        assert list(levels.logits) == [3]
        functional.cross_entropy(levels.logits[3], y).backward()
        found.append(net.body.encoder.layer[0].intermediate.dense.weight.grad.clone())
    assert torch.equal(*found)
