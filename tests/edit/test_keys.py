"""Keys depend on the text up to their token and on nothing else, and are read once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch.edit.contexts import Context
from retouch.edit.facts import Fact
from retouch.edit.keys import averages, batches, keys_at, mean_keys, output_at, prefixes, read_all
from retouch.edit.rows import problems

FAMILIES = ["llama", "gpt2", "opt", "gemma2", "gptj"]
NAMES = ["blocks.0.mlp.down", "blocks.2.mlp.down"]
CONTEXTS = [Context("", 0.5), Context("I am the one. ", 0.3), Context("Because. ", 0.2)]
SAME = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("The capital of {} was for a long time", "France", "Tours"),
    Fact("Everybody in {} speaks", "France", "Dutch"),
]
OTHER = Fact("The official language of {} is", "Brazil", "French")


@torch.no_grad()
def inputs(model, ids, name):
    """All inputs of a weight for one row: a plain hook on the whole network, nothing padded."""
    seen = []
    handle = model.module(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.network(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0].reshape(len(ids), -1).double()


def rows_of(model, fact, position="subject"):
    (problem,) = problems(model, [fact], CONTEXTS, position)
    return [(row.ids, anchor) for row, anchor in zip(problem.rows, problem.anchors)]


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_all_weights_are_those_of_each_row_alone(open_tiny, family):
    model = open_tiny(family)
    rows = [ids for fact in (*SAME, OTHER) for ids, _ in rows_of(model, fact)]
    rows = [rows[5], *rows, rows[5]]  # out of order of length, some twice
    found = read_all(model, rows, NAMES)
    for name in NAMES:
        wanted = torch.stack([inputs(model, row, name)[-1] for row in rows])
        assert torch.allclose(found[name], wanted, atol=1e-4)
        assert found[name].dtype == torch.float64


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_token_is_read_where_it_is_asked_for(open_tiny, family):
    model = open_tiny(family)
    rows = [rows_of(model, fact)[1][0] for fact in (SAME[1], OTHER, SAME[0])]
    found = read_all(model, rows, NAMES, every=True)
    for name in NAMES:
        assert torch.allclose(found[name], torch.cat([inputs(model, row, name) for row in rows]), atol=1e-4)


@pytest.mark.parametrize("n_tokens", [1, 20, 45])
def test_small_batches_change_nothing(llama, n_tokens):
    rows = [ids for fact in (*SAME, OTHER) for ids, _ in rows_of(llama, fact)]
    whole, cut = read_all(llama, rows, NAMES), read_all(llama, rows, NAMES, n_tokens=n_tokens)
    for name in NAMES:
        assert torch.allclose(whole[name], cut[name], atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple), min_size=1), st.integers(1, 30))
def test_batches_hold_each_row_once_within_the_limit(rows, n_tokens):
    cut = list(batches(rows, n_tokens))
    assert sorted(row for part in cut for row in part) == sorted(set(rows))
    assert all(len(part) == 1 or len(part) * max(map(len, part)) <= n_tokens for part in cut)


# The left-context law.


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_share_the_text_up_to_the_subject_share_its_key(open_tiny, family):
    model = open_tiny(family)
    for (one, at), (two, also) in zip(rows_of(model, SAME[0]), rows_of(model, SAME[1])):
        assert one[: at + 1] == two[: also + 1] and one != two
        for name in NAMES:
            assert torch.allclose(inputs(model, one, name)[at], inputs(model, two, name)[also], atol=1e-4)
            ours = keys_at(model, [one, two], [at, also], name)
            assert torch.equal(ours[0], ours[1])


def test_a_text_before_the_subject_moves_its_key(llama):
    (bare, at), (led, behind), *_ = rows_of(llama, SAME[0])
    one, two = keys_at(llama, [bare, led], [at, behind], NAMES[1])
    assert (one - two).norm() > 1e-2 * one.norm()


def test_what_facts_share_counts_once(llama):
    found = problems(llama, SAME, CONTEXTS, "subject")
    merged = prefixes(found, [0, 1, 2])
    assert len(merged) == 6  # the first two facts share their three rows
    assert [p.weight for p in merged] == pytest.approx([0.25, 0.15, 0.1] * 2)
    assert [p.bare for p in merged] == [True, False, False] * 2
    assert prefixes(found, [0]) == prefixes(found, [0, 1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_groups_key_is_the_weighted_mean_over_its_distinct_rows(open_tiny, family):
    model = open_tiny(family)
    facts = [*SAME, OTHER]
    found = problems(model, facts, CONTEXTS, "subject")
    keys = mean_keys(model, found, [[3], [0, 1, 2]], NAMES)

    def mean(fact, name):
        weights = [c.weight for c in CONTEXTS]
        return sum(w * inputs(model, ids, name)[at] for w, (ids, at) in zip(weights, rows_of(model, fact)))

    for name in NAMES:
        assert torch.allclose(keys[name][:, 0], mean(OTHER, name), atol=1e-4)
        assert torch.allclose(keys[name][:, 1], (mean(SAME[0], name) + mean(SAME[2], name)) / 2, atol=1e-4)


def test_bare_rows_can_be_averaged_alone(llama):
    found = problems(llama, [*SAME, OTHER], CONTEXTS, "subject")
    mean = averages([prefixes(found, [0, 1, 2]), prefixes(found, [3])], bare=True)
    assert mean.tolist() == [[0.5, 0, 0, 0.5, 0, 0, 0, 0, 0], [0] * 6 + [1, 0, 0]]


# What a weight makes of a key.


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt2_square", "opt"])
def test_the_output_at_a_key_is_the_modules_own(open_tiny, family):
    model = open_tiny(family)
    key = torch.randn(model.matrix(NAMES[0]).shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.module(NAMES[0])(key[None])[0].double()
    assert torch.allclose(output_at(model, NAMES[0], key.double()), wanted, atol=1e-5)
