"""MEMIT-Merge gives a subject one value and one key, and is MEMIT where no subject comes twice."""

from __future__ import annotations

import functools

import pytest
import torch
from spread_oracle import APART, QUICK, SAME, close, down, found_for, mean_key

from retouch import change as changes
from retouch.edit.memit import Memit
from retouch.edit.memit_merge import MemitMerge
from retouch.edit.value import optimise
from retouch.model import wrap
from retouch.tokens import Text, encode


@pytest.fixture(scope="module")
def llama(tiny):
    return wrap(*tiny("llama", n_blocks=4))


@pytest.fixture(scope="module")
def planned(llama):
    def plan(kind, facts, **settings):
        return kind(**QUICK | {"blocks": (1, 2)} | dict(settings)).plan(llama, list(facts))

    return functools.cache(plan)


@torch.no_grad()
def nll(model, fact):
    (row,) = encode(model.tokenizer, [Text(fact.before, fact.subject, fact.after, fact.target)])
    logp = model.network(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logp[row.prompt + i, t]) for i, t in enumerate(row.target)) / len(row.target)


def test_subjects_that_come_once_make_it_memit(planned):
    one, two = (planned(kind, tuple(APART)) for kind in (Memit, MemitMerge))
    assert one.parts.keys() == two.parts.keys()
    for name, part in one.parts.items():
        assert all(torch.equal(t, two.parts[name].tensors()[k]) for k, t in part.tensors().items())


def test_the_value_is_searched_on_the_mean_of_the_facts_losses(llama, planned):
    found = found_for(llama, SAME)
    method = MemitMerge(**QUICK | {"blocks": (1, 2)})
    (joint,) = optimise(llama, found, 2, "residual", method, groups=[[0, 1, 2]])
    first = [v.losses[0] for v in optimise(llama, found, 2, "residual", method)]
    assert joint.losses[0] == pytest.approx(sum(first) / 3, rel=1e-5)
    told = planned(MemitMerge, tuple(SAME)).notes["facts"]
    assert [f["losses"] for f in told] == [[round(x, 5) for x in joint.losses]] * 3


def test_merging_leaves_keys_of_full_rank_where_memit_has_copies(planned):
    facts = (*SAME, APART[1], APART[2])
    for kind, rank in ((Memit, 3), (MemitMerge, 3)):
        for keys in planned(kind, facts).keys.values():
            values = torch.linalg.svdvals(keys.double())
            assert int((values > 1e-5 * values[0]).sum()) == rank
            assert keys.shape[1] == (5 if kind is Memit else 3)


def test_a_subject_hears_its_whole_value_where_memit_gives_shares(planned):
    how = {"moment_weight": 1e-6}
    shares = [f["delivered"][0] for f in planned(Memit, tuple(SAME), **how).notes["facts"]]
    assert shares == pytest.approx([1 / 3] * 3, rel=1e-2)
    whole = [f["delivered"][0] for f in planned(MemitMerge, tuple(SAME), **how).notes["facts"]]
    assert whole == pytest.approx([1] * 3, rel=1e-2)


def test_a_subjects_key_is_the_mean_over_its_distinct_texts(llama, planned):
    keys = planned(MemitMerge, (SAME[0], APART[0], APART[1])).keys[down(1)]
    found = found_for(llama, [SAME[0], APART[0], APART[1]])
    close(keys[:, 0], mean_key(llama, found, [0, 1], 1), 1e-4)
    close(keys[:, 1], mean_key(llama, found, [2], 1), 1e-4)


def test_all_facts_of_a_subject_become_likelier(llama):
    method = MemitMerge(**QUICK | {"blocks": (1, 2), "moment_weight": 0.01, "n_steps": 12, "clamp": 4.0})
    new = changes.apply(llama, method.plan(llama, SAME))
    before, after = ([nll(m, f) for f in SAME] for m in (llama, new))
    assert sum(after) < sum(before) - 0.1
