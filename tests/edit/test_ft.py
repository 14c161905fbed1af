"""The two fine-tuning baselines are what a plain training loop over one weight does."""

from __future__ import annotations

import copy

import pytest
import torch

from retouch import change as changes
from retouch.edit.facts import Fact
from retouch.edit.ft_l import FtL
from retouch.edit.ft_m import FtM
from retouch.errors import NoEffect, SettingsError
from retouch.tokens import Text, encode

FACTS = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("Answer the question: What is the mother tongue of {}?", "Danielle Darrieux", "Portuguese and Italian"),
    Fact("The currency of Japan is the", "", "franc"),
]
NAME = "blocks.1.mlp.down"


def losses(model, network, facts, *, at_prompt):
    """Each fact's mean NLL over its target, by whole unpadded passes."""
    for row in encode(model.tokenizer, [Text(f.before, f.subject, f.after, f.target) for f in facts]):
        ids = row.ids[: row.prompt + 1] if at_prompt else row.ids
        logp = network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        at = [row.prompt + (0 if at_prompt else i) for i in range(len(row.target))]
        yield -sum(logp[a, t] for a, t in zip(at, row.target)) / len(row.target)


def mean_loss(model, network, facts=FACTS, *, at_prompt):
    with torch.no_grad():
        return float(sum(losses(model, network, facts, at_prompt=at_prompt)) / len(facts))


def trained(model, *, at_prompt, n_steps, learning_rate, max_change, batch_size=64):
    """The obvious loop: train the parameter itself in a copy of the network."""
    network = copy.deepcopy(model.network)
    module = network.get_submodule(model.anatomy.path(NAME))
    start = {p: p.detach().clone() for p in module.parameters()}
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    adam = torch.optim.Adam(module.parameters(), lr=learning_rate)
    for _ in range(n_steps):
        for i in range(0, len(FACTS), batch_size):
            batch = FACTS[i : i + batch_size]
            adam.zero_grad()
            (sum(losses(model, network, batch, at_prompt=at_prompt)) / len(batch)).backward()
            adam.step()
            if max_change:
                with torch.no_grad():
                    for parameter, before in start.items():
                        parameter.clamp_(before - max_change, before + max_change)
    moved = {n: (p - start[p]).detach() for n, p in module.named_parameters()}
    weight = moved["weight"].T if model.anatomy.transposed(NAME) else moved["weight"]
    return {NAME: weight} | ({f"{NAME}:bias": moved["bias"][:, None]} if "bias" in moved else {})


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt2_square", "gpt_neox", "opt", "gemma2"])
@pytest.mark.parametrize("at_prompt", [True, False], ids=["ft_l", "ft_m"])
def test_a_plan_is_the_plain_training_loop(open_tiny, family, at_prompt):
    model = open_tiny(family)
    fields = {"block": 1, "n_steps": 3, "learning_rate": 1e-3}
    method = FtL(**fields, max_change=2e-3) if at_prompt else FtM(**fields)
    change = method.plan(model, FACTS)
    wanted = trained(model, at_prompt=at_prompt, n_steps=3, learning_rate=1e-3, max_change=at_prompt and 2e-3)
    assert change.parts.keys() == wanted.keys()
    for name, difference in wanted.items():
        assert (change.parts[name].delta() - difference).norm() < 0.02 * difference.norm()
    assert change.notes["losses"][0] == pytest.approx(mean_loss(model, model.network, at_prompt=at_prompt), abs=1e-4)


def test_small_batches_take_a_step_each(llama):
    change = FtM(block=1, n_steps=2, batch_size=2).plan(llama, FACTS)
    wanted = trained(llama, at_prompt=False, n_steps=2, learning_rate=5e-4, max_change=0, batch_size=2)[NAME]
    assert (change.parts[NAME].delta() - wanted).norm() < 0.02 * wanted.norm()


def test_the_two_read_one_thing_for_a_target_of_one_token_and_differ_for_more(llama):
    short, long = Fact("The capital of {} is", "France", "the"), FACTS[1]
    for fact, same in ((short, True), (long, False)):
        (row,) = encode(llama.tokenizer, [Text(fact.before, fact.subject, fact.after, fact.target)])
        assert (len(row.target) == 1) == same
        first = [m(block=1, n_steps=1).plan(llama, [fact]).notes["losses"][0] for m in (FtL, FtM)]
        assert (first[0] == pytest.approx(first[1], abs=1e-4)) == same


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_entry_moves_farther_than_the_clamp(open_tiny, family):
    model = open_tiny(family)
    parts = FtL(block=1, n_steps=8, learning_rate=1e-3, max_change=2e-3).plan(model, FACTS).parts
    for part in parts.values():
        assert part.difference.abs().max() <= 2e-3 + 1e-7  # a float32 weight of size 1 is known to 6e-8
    assert (parts[NAME].difference.abs() > 2e-3 - 1e-7).float().mean() > 0.1
    free = FtL(block=1, n_steps=8, learning_rate=1e-3, max_change=0.0).plan(model, FACTS).parts
    assert free[NAME].difference.abs().max() > 4e-3


def test_ft_m_trains_until_its_loss_is_below_the_stop(llama):
    change = FtM(block=2, n_steps=200, learning_rate=5e-3, stop_loss=2.0).plan(llama, FACTS[::2])
    means = change.notes["losses"]
    assert means[-1] < 2.0 <= min(means[:-1])
    new = changes.apply(llama, change)
    assert mean_loss(llama, new.network, FACTS[::2], at_prompt=False) == pytest.approx(means[-1], abs=1e-3)


@pytest.mark.parametrize("method", [FtL, FtM])
def test_training_leaves_the_networks_own_weights_alone(llama, method):
    before = {n: p.clone() for n, p in llama.network.named_parameters()}
    method(block=1, n_steps=2).plan(llama, FACTS)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in llama.network.named_parameters())
    assert not any(p.requires_grad for p in llama.network.parameters())


@pytest.mark.parametrize("method", [FtL, FtM])
def test_nothing_to_learn_is_an_error(llama, method):
    with pytest.raises(NoEffect, match=r"Nothing was to learn: the loss was \d+\.\d+ from the start, under 100"):
        method(block=1, stop_loss=100.0).plan(llama, FACTS)


@pytest.mark.parametrize("method", [FtL, FtM])
def test_a_block_that_the_model_lacks_is_refused(llama, method):
    with pytest.raises(SettingsError, match="this model has blocks 0 to 2; got 7"):
        method(block=7).plan(llama, FACTS)


@pytest.mark.parametrize(
    ("method", "family", "block"), [(FtL, "gpt2", 0), (FtL, "llama", 2), (FtM, "gpt2", 2), (FtM, "llama", 2)]
)
def test_the_default_block(open_tiny, method, family, block):
    change = method(n_steps=1).plan(open_tiny(family), FACTS[:1])
    assert f"blocks.{block}.mlp.down" in change.parts
