"""MEMIT is its published formula, block by block, on a model that really carries what was written before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import spread_oracle as oracle
import torch
import transformers

from retouch import linalg, stats
from retouch.anatomy import describe
from retouch.edit.contexts import Context
from retouch.edit.facts import Fact
from retouch.edit.memit import Memit
from retouch.edit.rows import problems
from retouch.edit.spread import spread
from retouch.edit.value import optimise
from retouch.errors import FactError, SettingsError

N_BLOCKS = 4


FACTS = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("The official language of {} is", "Brazil", "French"),
    Fact("Answer the question: What is the mother tongue of {}?", "Danielle Darrieux", "Italian"),
]
OWN = ("", "I am the one. ", "Because. ")
QUICK = {"n_steps": 4, "contexts": OWN, "n_tokens": 400}


def down(block):
    return f"blocks.{block}.mlp.down"


@torch.no_grad()
def seen(model, ids, at, path, side):
    """What flows into or out of a module at one token: a plain hook on the whole network, one unpadded row."""
    found = []

    def keep(_, args, out=None):
        state = args[0] if side == "input" else out
        state = state[0] if isinstance(state, tuple) else state
        found.append(state.reshape(len(ids), -1)[at].double())

    module = model.network.get_submodule(path)
    handle = module.register_forward_pre_hook(keep) if side == "input" else module.register_forward_hook(keep)
    model.network(input_ids=torch.tensor([ids]))
    handle.remove()
    return found[0]


def covariance(model, name):
    c = stats.collect(model, [name], n_tokens=400)[name].mean
    return c + 1e-4 * c.trace() / len(c) * torch.eye(len(c), dtype=torch.float64)


def slow(model, method, facts, blocks, weight):
    """Algorithm 1 as it is written: m x m systems, and every block's weight written before the next one is read."""
    found = problems(model, facts, [Context(t, 1 / len(OWN)) for t in OWN], "subject")
    z = [v.target.double() for v in optimise(model, found, blocks[-1], "residual", method)]
    work, deltas = model, {}
    for j, block in enumerate(blocks):
        path, last = model.anatomy.path(down(block)), model.anatomy.path(f"blocks.{blocks[-1]}")
        k = torch.stack(
            [
                torch.stack([seen(work, r.ids, a, path, "input") for r, a in zip(p.rows, p.anchors)]).mean(0)
                for p in found
            ],
            1,
        )
        h = [seen(work, p.rows[0].ids, p.anchors[0], last, "output") for p in found]
        r = torch.stack([a - b for a, b in zip(z, h)], 1) / (len(blocks) - j)
        delta = r @ k.T @ torch.linalg.inv(weight(model, block, k) + k @ k.T)
        deltas[down(block)] = delta
        path = model.anatomy.weight(down(block))
        value = (work.matrix(down(block)).double() + delta).float()
        work = work.with_weights({path: value.T if model.anatomy.transposed(down(block)) else value})
    return deltas


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_covariance_memit_is_the_algorithm_with_written_weights(open_tiny, family):
    model = open_tiny(family)
    method = Memit(blocks=(0, 1, 3), **QUICK)
    change = method.plan(model, FACTS)
    wanted = slow(model, method, FACTS, (0, 1, 3), lambda m, b, k: m.anatomy.d_ff * covariance(m, down(b)))
    assert change.parts.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert change.parts[name].rank == 3
        assert (change.parts[name].delta() - delta).norm() < 1e-3 * delta.norm()


def test_a_published_moment_weight_and_the_identity_are_the_algorithm_too(llama):
    fixed = Memit(blocks=(1, 2), moment_weight=5.0, **QUICK)
    wanted = slow(llama, fixed, FACTS, (1, 2), lambda m, b, k: 5 * covariance(m, down(b)))
    for name, part in fixed.plan(llama, FACTS).parts.items():
        assert (part.delta() - wanted[name]).norm() < 1e-3 * wanted[name].norm()

    plain = Memit(blocks=(1, 2), metric="identity", **QUICK)
    wanted = slow(llama, plain, FACTS, (1, 2), lambda m, b, k: (k**2).sum(0).mean() * torch.eye(len(k)).double())
    for name, part in plain.plan(llama, FACTS).parts.items():
        assert (part.delta() - wanted[name]).norm() < 1e-3 * wanted[name].norm()


def test_a_lone_fact_takes_a_of_one_plus_a_of_its_residual(llama):
    change = Memit(blocks=(2,), moment_weight=7.0, **QUICK).plan(llama, FACTS[:1])
    key = change.keys[down(2)][:, 0].double()
    a = float(key @ torch.linalg.solve(7 * covariance(llama, down(2)), key))
    residual = change.parts[down(2)].left[:, 0].double()
    assert torch.allclose(change.parts[down(2)].delta() @ key, a / (1 + a) * residual, rtol=1e-3, atol=1e-5)
    assert change.notes["blocks"][0]["delivered"] == pytest.approx(a / (1 + a), rel=1e-3)


def test_with_the_identity_a_lone_fact_takes_half_at_each_block(llama):
    change = Memit(blocks=(1, 2, 3), metric="identity", **QUICK).plan(llama, FACTS[:1])
    assert [b["delivered"] for b in change.notes["blocks"]] == pytest.approx([0.5] * 3)
    assert [b["block"] for b in change.notes["blocks"]] == [1, 2, 3]


def test_facts_that_share_a_key_share_the_write(llama):
    same = [
        Fact(f"The capital of {{}} {verb}", "France", city)
        for verb, city in (("is", "Lyon"), ("was", "Rome"), ("in", "Oslo"))
    ]
    change = Memit(blocks=(2,), moment_weight=1e-6, **QUICK).plan(llama, same)
    part, keys = change.parts[down(2)], change.keys[down(2)].double()
    assert torch.allclose(keys[:, 0], keys[:, 1], atol=1e-5) and torch.allclose(keys[:, 0], keys[:, 2], atol=1e-5)
    mean = part.left.double().mean(1)
    assert (part.delta() @ keys[:, 0] - mean).norm() < 1e-2 * mean.norm()
    assert change.notes["blocks"][0]["delivered"] == pytest.approx(1 / 3, rel=1e-2)


def test_together_and_each_are_one_for_a_lone_fact(llama):
    method = Memit(blocks=(1, 2), **QUICK)
    (each,) = method.plan_each(llama, [FACTS[:1]])
    assert method.plan(llama, FACTS[:1]).id == each.id


def test_each_fact_alone_has_its_own_write_of_rank_one(llama):
    method = Memit(blocks=(1, 2), **QUICK)
    for fact, change in zip(FACTS, method.plan_each(llama, [[f] for f in FACTS]), strict=True):
        alone = method.plan(llama, [fact])
        for name, part in change.parts.items():
            assert part.rank == 1
            wanted = alone.parts[name].delta()
            assert (part.delta() - wanted).norm() < 5e-3 * wanted.norm()


def test_what_is_missing_at_the_last_block_shrinks(llama):
    change = Memit(blocks=(1, 2, 3), moment_weight=0.01, **QUICK).plan(llama, FACTS)
    missing = [b["missing"] for b in change.notes["blocks"]]
    assert missing[-1] < missing[0]
    facts = change.notes["facts"]
    assert len(facts) == 3 and all(f["warnings"] == [] for f in facts)


@pytest.mark.parametrize("blocks", [(2, 1), (1, 1), (4,), (-1, 0), (0, 9)])
def test_blocks_must_ascend_within_the_model(llama, blocks):
    with pytest.raises(SettingsError, match=r"memit: blocks must ascend within 0 to 3; got \["):
        Memit(blocks=blocks, **QUICK).plan(llama, FACTS)


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        (transformers.GPT2Config(n_layer=48, n_embd=1600), (13, 14, 15, 16, 17)),
        (transformers.GPTJConfig(n_layer=28, n_embd=4096), (4, 5, 6, 7)),
        (transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096), (4, 5, 6, 7, 8)),
    ],
)
def test_the_default_blocks_are_the_published_depth(config, blocks):
    assert Memit().blocks_of(SimpleNamespace(anatomy=describe(config))) == blocks


def test_faithful_takes_the_published_weight():
    model = SimpleNamespace(anatomy=describe(transformers.GPTJConfig(n_layer=28, n_embd=4096)))
    method = Memit(faithful=True).as_published(model)
    assert method.moment_weight == 15000 and method.blocks == (3, 4, 5, 6, 7, 8)


def sized(vocab_size, config=transformers.LlamaConfig):
    return SimpleNamespace(anatomy=describe(config(num_hidden_layers=32, hidden_size=4096, vocab_size=vocab_size)))


def test_each_of_two_models_of_one_size_has_the_row_published_for_it(caplog):
    two, three = (Memit(faithful=True).as_published(sized(n)) for n in (32_000, 128_256))
    assert (two.learning_rate, two.weight_decay, two.clamp) == (0.5, 0.001, 4.0)  # Llama-2
    assert (three.learning_rate, three.weight_decay, three.clamp) == (0.1, 0.5, 0.75)  # Llama-3
    assert two.blocks == three.blocks == (4, 5, 6, 7, 8)
    assert not caplog.records


def test_a_model_of_that_size_without_a_row_keeps_the_defaults_and_says_so(caplog):
    model = sized(32_016)
    method = Memit(faithful=True)
    assert method.as_published(model) == method
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "memit: no settings were published for this model (llama, 32 blocks of width 4096, vocabulary 32016)"
    )
    caplog.clear()
    assert Memit().as_published(model) == Memit()  # nobody asked for what was published
    assert not caplog.records


def test_a_fact_without_a_subject_is_refused(llama):
    with pytest.raises(FactError, match="has no subject"):
        Memit(**QUICK).plan(llama, [*FACTS, Fact("The currency of Japan is the", "", "franc")])


# Earlier keys, and facts that share one.


def test_earlier_keys_stand_beside_the_new_ones(llama):
    method = Memit(blocks=(0, 2), **QUICK)
    earlier = {down(b): torch.randn(64, 4, generator=torch.Generator().manual_seed(b)) for b in (0, 2)}
    found = oracle.found_for(llama, FACTS)
    z = torch.stack([v.target for v in optimise(llama, found, 2, "residual", method)])

    def formula(block, k, r):
        kept = earlier[down(block)].double()
        return r @ k.T @ torch.linalg.inv(64 * covariance(llama, down(block)) + k @ k.T + kept @ kept.T)

    wanted = oracle.slow(llama, found, [[0], [1], [2]], z, (0, 2), formula)
    for name, part in method.plan(llama, FACTS, previous=earlier).parts.items():
        oracle.close(part.delta(), wanted[name])


def test_a_change_of_one_weight_keeps_earlier_keys_of_that_weight_only(llama):
    method = Memit(blocks=(1, 2), **QUICK)
    earlier = {down(2): torch.randn(64, 4, generator=torch.Generator().manual_seed(0))}
    free, kept = method.plan(llama, FACTS), method.plan(llama, FACTS, previous=earlier)
    assert torch.equal(free.parts[down(1)].right, kept.parts[down(1)].right)
    assert not torch.equal(free.parts[down(2)].right, kept.parts[down(2)].right)


@pytest.mark.parametrize("n", [2, 3])
def test_n_facts_of_one_key_deliver_one_nth_of_orthogonal_residuals(llama, n):
    facts = oracle.SAME[:n]
    found = oracle.found_for(llama, facts, ("",))
    state = oracle.mean_state(llama, found, [0], 2)
    wanted = torch.linalg.qr(torch.randn(32, n, generator=torch.Generator().manual_seed(0)).double()).Q

    def solve(name, k, r):
        return linalg.solve(k, r, linalg.Identity(1e-8), mode="least_squares")

    done = spread(llama, found, [[i] for i in range(n)], state + wanted.T, [2], solve)
    heard = done.parts[down(2)].delta() @ done.keys[down(2)][:, 0].double()
    assert (wanted.T @ heard).tolist() == pytest.approx([1 / n] * n, rel=1e-4)
    assert done.notes[0]["delivered"] == pytest.approx([1 / n] * n, rel=1e-4)
