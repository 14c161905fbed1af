"""EMMET is its closed form: one weight, and each key gets the whole of its value or the facts are refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from spread_oracle import APART, QUICK, SAME, close, covariance, down, found_for, mean_key, mean_state, slow, written

from retouch.anatomy import describe
from retouch.edit.emmet import Emmet
from retouch.edit.facts import Fact
from retouch.edit.value import optimise
from retouch.errors import SettingsError, SolveError

NAME = down(1)


def emmet(**settings):
    return Emmet(**QUICK | {"blocks": (1,)} | settings)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt2_square"])
def test_the_write_is_the_closed_form(open_tiny, family):
    model, method = open_tiny(family), emmet()
    found = found_for(model, APART)
    z = torch.stack([v.target for v in optimise(model, found, 1, "residual", method)])

    def formula(block, k, r):
        x = torch.linalg.solve(covariance(model, block), k)
        return r @ torch.linalg.inv(k.T @ x) @ x.T

    wanted = slow(model, found, [[0], [1], [2]], z, (1,), formula)[NAME]
    part = method.plan(model, APART).parts[NAME]
    assert part.rank == 3
    close(part.delta(), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("metric", ["covariance", "identity"])
def test_every_key_gets_its_whole_value(open_tiny, family, metric):
    model = open_tiny(family)
    change = emmet(metric=metric).plan(model, APART)
    part, keys = change.parts[NAME], [mean_key(model, found_for(model, APART), [i], 1) for i in range(3)]
    got = part.delta() @ torch.stack(keys, 1)
    for column, wanted in zip(got.T, change.targets[NAME].double().T, strict=True):
        assert float((column - wanted).norm()) < 1e-4 * float(wanted.norm())
    assert [f["delivered"] for f in change.notes["facts"]] == [[pytest.approx(1, abs=1e-4)]] * 3


def test_the_state_is_reached_where_the_written_text_is_read(llama):
    method = emmet(contexts="plain")
    found = found_for(llama, APART, ("",))
    values = optimise(llama, found, 1, "residual", method)
    edited = written(llama, 1, method.plan(llama, APART).parts[NAME].delta())
    for i, value in enumerate(values):
        close(mean_state(edited, found, [i], 1), value.target, 1e-4)


def test_a_large_ridge_gives_each_key_less_than_its_value(llama):
    shares = [f["delivered"][0] for f in emmet(ridge=0.5).plan(llama, APART).notes["facts"]]
    assert all(share < 0.9 for share in shares)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("metric", ["covariance", "identity"])
def test_facts_that_share_a_key_are_refused_by_name(llama, metric, ridge):
    with pytest.raises(SolveError) as caught:
        emmet(metric=metric, ridge=ridge).plan(llama, [APART[1], SAME[0], SAME[2]])
    message = str(caught.value)
    assert "acts In France the capital is and In France one pays with the share one key" in message
    assert "rose or memit_merge" in message and "Brazil" not in message


def test_a_key_that_must_stay_is_refused_by_name(llama):
    earlier = emmet().plan(llama, SAME[:1]).keys
    with pytest.raises(SolveError, match="fact In France the people speak is also a key whose output must stay"):
        emmet().plan(llama, [APART[1], SAME[1]], previous=earlier)


@pytest.mark.parametrize("metric", ["covariance", "identity"])
def test_earlier_keys_keep_their_output_exactly(llama, metric):
    earlier = emmet().plan(llama, APART[1:]).keys[NAME]
    change = emmet(metric=metric).plan(llama, APART[:1], previous={NAME: earlier})
    part = change.parts[NAME]
    assert part.rank == 1
    assert float((part.delta() @ earlier.double()).norm()) < 1e-4 * float(part.left.norm())
    close(part.delta() @ change.keys[NAME].double(), change.targets[NAME], 1e-4)


def test_one_block_only(llama):
    with pytest.raises(SettingsError, match=r"emmet: blocks takes one block; got \[1, 2\]"):
        emmet(blocks=(1, 2)).plan(llama, APART)
    with pytest.raises(SettingsError, match="emmet: blocks must ascend within 0 to 2"):
        emmet(blocks=(3,)).plan(llama, APART)


@pytest.mark.parametrize(
    ("config", "block"),
    [
        (transformers.GPT2Config(n_layer=48, n_embd=1600), 17),
        (transformers.GPTJConfig(n_layer=28, n_embd=4096), 5),
        (transformers.LlamaConfig(num_hidden_layers=30, hidden_size=576, num_attention_heads=9), 5),
        (transformers.GPTNeoXConfig(num_hidden_layers=44, hidden_size=6144), 15),
    ],
)
def test_the_default_block_is_romes(config, block):
    assert Emmet().blocks_of(SimpleNamespace(anatomy=describe(config))) == (block,)


def test_facts_about_different_subjects_may_share_their_words(llama):
    facts = [SAME[0], Fact(SAME[0].prompt, "Brazil", "Rio")]
    assert emmet().plan(llama, facts).parts[NAME].rank == 2
