"""What neighbours will hear of a write is known before it is made, and is what they then hear."""

from __future__ import annotations

import pytest
import torch

from retouch import change as changes
from retouch import linalg
from retouch.change import LowRank
from retouch.edit.constraints import constraints, for_facts
from retouch.edit.contexts import Context
from retouch.edit.facts import Fact
from retouch.edit.neighbors import alone, neighbors
from retouch.edit.rome import Rome
from retouch.edit.rows import problems
from retouch.edit.value import Search, Start, optimise

FACTS = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("The capital of {} was for long", "France", "Tours"),
    Fact("The official language of {} is", "Brazil", "French"),
]
NAMES = ["blocks.0.mlp.down", "blocks.1.mlp.down"]
PLAIN = [Context("", 1.0)]
CONTEXTS = [Context("", 0.5), Context("I am the one. ", 0.5)]


@torch.no_grad()
def inputs(model, ids, name):
    seen = []
    handle = model.module(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.network(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0].reshape(len(ids), -1).double()


@torch.no_grad()
def next_logp(model, ids):
    return model.network(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def moment(size):
    vectors = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(1)).double()
    return vectors @ vectors.T / size


def test_a_listener_hears_its_own_key_once():
    keys = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    c = moment(8)
    heard = alone(keys, linalg.Covariance.from_moment(c, eta=0.0))
    for i in range(3):
        w = torch.linalg.solve(c, keys[:, i].double())
        assert torch.allclose(heard[:, i], w / (w @ keys[:, i].double()))
    assert torch.allclose((heard * keys).sum(0), torch.ones(3).double())


def test_nobody_listens_unless_drift_is_limited(llama):
    found = problems(llama, FACTS, PLAIN, "subject")
    metric = {n: linalg.Identity() for n in NAMES}
    assert neighbors(llama, found, [[0], [1], [2]], NAMES, Rome(), metric) == []


@pytest.mark.parametrize("names", [NAMES[1:], NAMES], ids=["one block", "two blocks"])
def test_each_token_hears_its_keys_share_of_the_write(llama, names):
    found = problems(llama, FACTS, CONTEXTS, "subject")
    method = Rome(max_drift=0.1, n_bystanders=6)
    metric = {n: linalg.Covariance.from_moment(moment(64)) for n in names}
    groups = [[0, 1], [2]]
    heard = neighbors(llama, found, groups, names, method, metric)
    texts = [llama.tokenizer.decode(list(b.row.ids)) for b in heard]
    chosen = [[c.prompt for c in for_facts([FACTS[i] for i in g], n=6)] for g in groups]
    assert texts == [p for ps in chosen for p in ps]
    assert [b.group for b in heard] == [0] * len(chosen[0]) + [1] * len(chosen[1])
    for b in heard:
        shares = []
        for name in names:
            first = found[groups[b.group][0]]  # the facts of a group share their rows up to the subject
            key = sum(inputs(llama, r.ids, name)[a] for r, a in zip(first.rows, first.anchors)) / 2
            w = metric[name].apply_inverse(key[:, None])[:, 0]
            shares.append(inputs(llama, b.row.ids, name) @ (w / (w @ key)))
        assert torch.allclose(b.hears.double(), torch.stack(shares).mean(0), atol=1e-3)


def test_the_edited_prompts_are_nobodys_neighbours(llama):
    facts = [FACTS[0], Fact("The capital of {} is", "Japan", "Oslo")]
    found = problems(llama, facts, PLAIN, "subject")
    heard = neighbors(
        llama, found, [[0, 1]], NAMES[:1], Rome(max_drift=1.0, n_bystanders=400), {NAMES[0]: linalg.Identity()}
    )
    texts = {llama.tokenizer.decode(list(b.row.ids)) for b in heard}
    assert len(texts) > 100 and not texts & {f.filled for f in facts}


def test_facts_that_share_a_value_are_not_each_others_neighbours(llama):
    asked = {"capital": "Lyon", "official language": "Latin", "currency": "franc"}
    facts = [Fact(f"The {what} of {{}} is", "France", target) for what, target in asked.items()]
    found = problems(llama, facts, PLAIN, "subject")
    method, metric = Rome(max_drift=1.0, n_bystanders=60), {NAMES[0]: linalg.Identity()}
    heard = neighbors(llama, found, [[0, 1, 2]], NAMES[:1], method, metric)
    own = [t for t in (llama.tokenizer.decode(list(b.row.ids)) for b in heard) if "France" in t]
    assert len(own) > 3 and not [t for t in own if any(word in t for word in ("capital", "language", "currency"))]


# The expected write is the real one.


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt2_square", "gpt_neox", "opt", "gemma2", "olmo2"])
def test_the_drift_in_the_search_is_that_of_the_written_weight(open_tiny, family):
    model = open_tiny(family)
    name, method = NAMES[1], Rome(max_drift=1.0, n_bystanders=8)
    found = problems(model, FACTS[::2], CONTEXTS, "subject")
    metric = {name: linalg.Covariance.from_moment(moment(model.matrix(name).shape[1]))}
    heard = neighbors(model, found, [[0], [1]], [name], method, metric)
    search = Search(model, found, 1, "down", method, bystanders=heard)
    way = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    delta = 2 * way / way.norm(dim=1, keepdim=True) * search.initial.norm(dim=1, keepdim=True)
    with torch.no_grad():
        drift = search.terms(delta).drift
    for g, problem in enumerate(found):
        key = sum(inputs(model, r.ids, name)[a] for r, a in zip(problem.rows, problem.anchors)) / 2
        w = alone(key[:, None], metric[name])[:, 0]
        part = LowRank(delta[g][:, None], w[None].float())
        new = changes.apply(model, method.change(model, [problem.fact], {name: part}))
        rows = [b.row.ids for b in heard if b.group == g]
        kls = []
        for ids in rows:
            before, after = next_logp(model, ids), next_logp(new, ids)
            kls.append(float((after.exp() * (after - before)).sum()))
        assert float(drift[g]) == pytest.approx(sum(kls) / len(kls), rel=1e-2, abs=1e-5)
        assert float(drift[g]) > 1e-3  # there is something to compare


def test_a_plan_reports_the_drift_that_its_change_has(llama):
    method = Rome(block=1, contexts="plain", max_drift=0.02, n_bystanders=8, n_steps=12)
    change = method.plan(llama, [FACTS[0]])
    new = changes.apply(llama, change)
    prompts = [c.prompt for c in constraints(FACTS[0], n=8)]
    rows = [llama.tokenizer(p)["input_ids"] for p in prompts]
    pairs = [(next_logp(llama, ids), next_logp(new, ids)) for ids in rows]
    drift = sum(float((after.exp() * (after - before)).sum()) for before, after in pairs) / len(pairs)
    (note,) = change.notes["facts"]
    assert note["drift"] == pytest.approx(drift, rel=2e-2, abs=1e-5)
    assert 0 < note["drift"] <= 0.02


# The limit is kept.


def bounded(model, limit, **more):
    found = problems(model, FACTS[::2], PLAIN, "subject")
    method = Rome(max_drift=limit, n_bystanders=8, n_steps=15, weight_decay=0.0, **more)
    heard = neighbors(model, found, [[0], [1]], NAMES[1:], method, {NAMES[1]: linalg.Identity()})
    values = optimise(model, found, 1, "down", method, bystanders=heard)
    search = Search(model, found, 1, "down", method, bystanders=heard)
    with torch.no_grad():
        terms = search.terms(torch.stack([v.delta for v in values]))
    return values, terms


def test_the_best_step_within_the_limit_is_returned(llama):
    free, terms = bounded(llama, 1e6)
    limit = 0.2 * float(terms.drift.min())
    values, held = bounded(llama, limit)
    for i, value in enumerate(values):
        assert float(held.drift[i]) <= limit * (1 + 1e-3)
        assert value.drift == pytest.approx(float(held.drift[i]), rel=1e-3, abs=1e-6)
        assert value.delta.any()
        assert float(held.nll[i]) < value.losses[0]  # it fits better than nothing
        assert value.margin == pytest.approx(float(held.margin[i]), abs=1e-3)
        assert free[i].drift > limit


def test_a_limit_that_allows_nothing_returns_nothing(llama):
    values, _ = bounded(llama, 1e-12)
    for value in values:
        assert not value.delta.any() and value.drift == 0


def test_a_start_beyond_the_limit_is_not_returned_as_within_it(llama):
    found = problems(llama, FACTS[:1], PLAIN, "subject")
    method = Rome(max_drift=1e-9, n_bystanders=4, n_steps=3, learning_rate=1e-3)
    heard = neighbors(llama, found, [[0]], NAMES[1:], method, {NAMES[1]: linalg.Identity()})
    (value,) = optimise(
        llama, found, 1, "down", method, bystanders=heard, start=Start(torch.ones(1, 32), torch.ones(1))
    )
    assert not value.delta.any() and value.drift == 0
