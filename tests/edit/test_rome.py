"""ROME's write is exact where it is to be, and nowhere cheaper than its closed form."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from retouch import change as changes
from retouch import stats
from retouch.anatomy import describe
from retouch.edit.contexts import Context, contexts_for
from retouch.edit.facts import Fact
from retouch.edit.rome import Rome
from retouch.edit.rows import problems
from retouch.edit.value import optimise
from retouch.errors import FactError, SettingsError
from retouch.progress import listen

FACT = Fact("The capital of {} is", "France", "Lyon")
OTHER = Fact("The official language of {} is", "Brazil", "French")
NAME = "blocks.1.mlp.down"
OWN = ("", "I am the one. ", "Because. ")
QUICK = {"block": 1, "n_steps": 5, "contexts": OWN, "weight_decay": 0.0}


@torch.no_grad()
def key_of(model, row, at):
    """What flows into the weight at one token: a plain hook on the whole network, one unpadded row."""
    seen = []
    handle = model.module(NAME).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.network(input_ids=torch.tensor([row]))
    handle.remove()
    return seen[0].reshape(len(row), -1)[at]


def keys_of(model, fact, texts=OWN):
    (problem,) = problems(model, [fact], [Context(t, 1 / len(texts)) for t in texts], "subject")
    return torch.stack([key_of(model, row.ids, a) for row, a in zip(problem.rows, problem.anchors)])


def wanted(model, method, fact, texts=OWN):
    """The value that the search of these settings finds."""
    found = problems(model, [fact], [Context(t, 1 / len(texts)) for t in texts], "subject")
    return optimise(model, found, 1, "down", method)[0].target


def error(model, key, value):
    with torch.no_grad():
        return float((model.module(NAME)(key) - value).norm() / value.norm())


@pytest.mark.parametrize("family", ["llama", "llama_square", "gpt2", "gpt2_square", "gpt_neox", "opt", "gemma2"])
def test_the_edited_weight_says_the_value_at_the_mean_key(open_tiny, family):
    model = open_tiny(family)
    method = Rome(**QUICK)
    new = changes.apply(model, method.plan(model, [FACT]))
    key, value = keys_of(model, FACT).mean(0), wanted(model, method, FACT)
    assert error(new, key, value) < 1e-4
    assert error(model, key, value) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2_square"])
def test_faithful_says_it_at_the_bare_prompts_key(open_tiny, family):
    model = open_tiny(family)
    method = Rome(**QUICK, faithful=True)
    change = method.plan(model, [FACT])
    new = changes.apply(model, change)
    keys, value = keys_of(model, FACT), wanted(model, method, FACT)
    assert error(new, keys[0], value) < 1e-4
    assert error(new, keys.mean(0), value) > 1e-3

    note = change.notes["facts"][0]
    mean, bare = keys.mean(0).double(), keys[0].double()
    assert note["cosine"] == pytest.approx(float(mean @ bare / mean.norm() / bare.norm()), rel=1e-4)
    assert note["reach"] == pytest.approx(float(mean @ bare / (mean @ mean)), rel=1e-4)
    assert torch.allclose(change.keys[NAME][:, 0], keys[0], atol=1e-5)


def test_faithful_takes_the_authors_twenty_one_contexts(llama):
    change = Rome(block=1, n_steps=2, faithful=True).plan(llama, [FACT])
    assert change.notes["contexts"] == [c.text for c in contexts_for(llama, "rome", 0)]


def test_the_change_is_the_outer_product_of_residual_and_key(llama):
    method = Rome(**QUICK)
    part = method.plan(llama, [FACT]).parts[NAME]
    key = keys_of(llama, FACT).mean(0).double()
    with torch.no_grad():
        residual = wanted(llama, method, FACT).double() - llama.module(NAME)(key.float()).double()
    assert part.rank == 1
    assert torch.allclose(part.delta(), torch.outer(residual, key) / (key @ key), atol=1e-5)


def test_the_covariance_metric_is_the_direct_formula(llama):
    method = Rome(**QUICK, metric="covariance", n_tokens=400)
    change = method.plan(llama, [FACT])
    c = stats.collect(llama, [NAME], n_tokens=400)[NAME].mean
    c = c + 1e-4 * c.trace() / len(c) * torch.eye(len(c), dtype=torch.float64)
    key = keys_of(llama, FACT).mean(0).double()
    direction = torch.linalg.solve(c, key)
    direction /= key @ direction
    assert torch.allclose(change.parts[NAME].right[0].double(), direction, atol=1e-4 * float(direction.norm()))
    assert error(changes.apply(llama, change), key.float(), wanted(llama, method, FACT)) < 1e-4
    assert change.notes["facts"][0]["amplification"] == pytest.approx(float(direction.norm() * key.norm()), rel=1e-4)
    plain = Rome(**QUICK).plan(llama, [FACT])
    assert plain.notes["facts"][0]["amplification"] == pytest.approx(1)  # no write of this reach is smaller
    assert change.notes["facts"][0]["amplification"] > 1


def test_several_facts_are_written_one_after_another(llama):
    method = Rome(**QUICK)
    together = method.plan(llama, [FACT, OTHER])
    first = method.plan(llama, [FACT])
    carrying = changes.apply(llama, first)
    second = method.plan(carrying, [OTHER])

    assert together.parts[NAME].rank == 2
    parts = [first.parts[NAME].delta(), second.parts[NAME].delta()]
    assert torch.equal(together.parts[NAME].delta(), torch.cat([first.parts[NAME].left, second.parts[NAME].left], 1).double()
                       @ torch.cat([first.parts[NAME].right, second.parts[NAME].right]).double())  # fmt: skip
    assert torch.allclose(together.parts[NAME].delta(), sum(parts), atol=1e-6)
    assert torch.equal(together.keys[NAME], torch.cat([first.keys[NAME], second.keys[NAME]], 1))
    # the value of the second was found on the model with the first: so it is exact there
    assert error(changes.apply(llama, together), keys_of(llama, OTHER).mean(0), wanted(carrying, method, OTHER)) < 1e-4
    assert second.base == llama.fingerprint


def test_each_fact_alone_is_planned_as_if_the_other_did_not_exist(llama):
    method = Rome(**QUICK)
    for fact, change in zip((FACT, OTHER), method.plan_each(llama, [[FACT], [OTHER]]), strict=True):
        alone = method.plan(llama, [fact]).parts[NAME]
        assert torch.allclose(change.parts[NAME].delta(), alone.delta(), atol=1e-3 * float(alone.delta().norm()))


def test_moments_and_contexts_are_made_once_for_all_facts(llama):
    passes = []

    def hear(what, done, total):
        if what.startswith("Second moments") and done == 0:
            passes.append(total)

    method = Rome(block=1, n_steps=2, metric="covariance", n_tokens=300, seed=5)
    with listen(hear):
        change = method.plan(llama, [FACT, OTHER])
    assert len(passes) == 1
    # the texts that a report shows are those that every fact was planned with
    texts = [c.text for c in contexts_for(llama, "memit", 5)]
    assert change.notes["contexts"] == texts
    weights = torch.tensor([0.5, *[0.1] * 5])
    for column, fact in enumerate((FACT, OTHER)):
        assert torch.allclose(change.keys[NAME][:, column], weights @ keys_of(llama, fact, texts), atol=1e-4)


def test_a_fact_without_a_subject_is_refused(llama):
    with pytest.raises(FactError, match="has no subject"):
        Rome(**QUICK).plan(llama, [Fact("The currency of Japan is the", "", "franc")])


def test_a_block_that_the_model_lacks_is_refused(llama):
    with pytest.raises(SettingsError, match="rome: this model has blocks 0 to 2; got 3"):
        Rome(block=3).plan(llama, [FACT])


@pytest.mark.parametrize(
    ("config", "block"),
    [
        (transformers.GPT2Config(n_layer=24, n_embd=1024), 8),
        (transformers.GPT2Config(n_layer=48, n_embd=1600), 17),
        (transformers.GPTNeoXConfig(num_hidden_layers=44, hidden_size=6144, intermediate_size=24576), 15),
        (transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096), 6),
        (transformers.LlamaConfig(num_hidden_layers=30, hidden_size=576), 5),
    ],
)
def test_the_default_block_is_near_the_published_one(config, block):
    assert Rome().block_of(SimpleNamespace(anatomy=describe(config))) == block


def test_faithful_takes_the_published_row_but_not_over_a_setting_of_ones_own():
    model = SimpleNamespace(anatomy=describe(transformers.GPT2Config(n_layer=24, n_embd=1024)))
    method = Rome(faithful=True, clamp=2.0).as_published(model)
    assert (method.block, method.metric, method.clamp) == (8, "covariance", 2.0)
    assert Rome(clamp=2.0).as_published(model) == Rome(clamp=2.0)


@pytest.mark.parametrize(
    ("config", "vocab_size", "block"),
    [
        (transformers.LlamaConfig, 32_000, 5), (transformers.LlamaConfig, 128_256, 5),
        (transformers.LlamaConfig, 32_016, -1), (transformers.MistralConfig, 32_768, -1),
    ],
)  # fmt: skip
def test_a_published_row_is_for_its_own_models_only(config, vocab_size, block):
    sizes = config(num_hidden_layers=32, hidden_size=4096, vocab_size=vocab_size)
    assert Rome(faithful=True).as_published(SimpleNamespace(anatomy=describe(sizes))).block == block
