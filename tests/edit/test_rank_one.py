"""A rank-one write gives its key its value, is the cheapest write that does, and joins with others."""

from __future__ import annotations

import pytest
import torch

from retouch import change as changes
from retouch import linalg, stats
from retouch.edit.contexts import Context, contexts_for
from retouch.edit.facts import Fact
from retouch.edit.rank_one import join, write
from retouch.edit.rome import Rome
from retouch.edit.rows import problems
from retouch.edit.value import Value

FACT = Fact("The capital of {} is", "France", "Lyon")
OTHER = Fact("The official language of {} is", "Brazil", "French")
THIRD = Fact("They all looked at {} in", "Big Ben", "Rome")
CONTEXTS = [Context("", 0.5), Context("I am the one. ", 0.3), Context("Because. ", 0.2)]
NAME = "blocks.1.mlp.down"
QUICK = {"block": 1, "n_steps": 3, "contexts": ("", "Because. "), "weight_decay": 0.0}


@torch.no_grad()
def keys_of(model, problem):
    """What flows into the weight at each row's edited token: a plain hook, one unpadded row after another."""
    keys = []
    hook = lambda _, args: keys.append(args[0].reshape(-1, args[0].shape[-1]).double())  # noqa: E731
    handle = model.module(NAME).register_forward_pre_hook(hook)
    for row in problem.rows:
        model.network(input_ids=torch.tensor([row.ids]))
    handle.remove()
    return torch.stack([k[a] for k, a in zip(keys, problem.anchors)])


def drawn(model, seed=0):
    """A problem, and a value that nobody searched."""
    make = torch.Generator().manual_seed(seed)
    (problem,) = problems(model, [FACT], CONTEXTS, "subject")
    return problem, Value(torch.randn(32, generator=make), torch.randn(32, generator=make), (1.0,), 0.0, False)


def metric_of(kind, size):
    vectors = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(1)).double()
    if kind == "covariance":
        return linalg.Covariance.from_moment(vectors @ vectors.T / len(vectors))
    return linalg.Woodbury.of(0.3, vectors[:, :7]) if kind == "woodbury" else linalg.Identity()


@pytest.mark.parametrize("kind", ["identity", "covariance", "woodbury"])
@pytest.mark.parametrize("family", ["llama", "llama_square", "gpt2", "gpt2_square", "opt"])
def test_the_written_weight_gives_the_mean_key_the_value(open_tiny, family, kind):
    model = open_tiny(family)
    problem, value = drawn(model)
    metric = metric_of(kind, model.matrix(NAME).shape[1])
    part, key, said = write(model, NAME, problem, value, metric)
    mean = torch.tensor([0.5, 0.3, 0.2]).double() @ keys_of(model, problem)
    assert torch.allclose(key, mean, atol=1e-4)
    new = changes.apply(model, Rome().change(model, [FACT], {NAME: part}))
    with torch.no_grad():
        out = new.module(NAME)(mean.float()[None])[0]
    assert (out - value.target).norm() < 1e-4 * value.target.norm()
    assert said["reach"] == pytest.approx(1) and said["bare"] == pytest.approx(
        float(part.right[0].double() @ keys_of(model, problem)[0]), rel=1e-3
    )


@pytest.mark.parametrize("kind", ["identity", "covariance"])
def test_as_published_it_gives_it_to_the_first_rows_key(llama, kind):
    problem, value = drawn(llama)
    metric = metric_of(kind, 64)
    part, key, said = write(llama, NAME, problem, value, metric, consistent=False)
    keys = keys_of(llama, problem)
    mean = torch.tensor([0.5, 0.3, 0.2]).double() @ keys
    assert torch.allclose(key, keys[0], atol=1e-4)
    # the direction is the mean key's, the scale the first row's
    along = metric.apply_inverse(mean[:, None])[:, 0]
    along /= along @ mean
    assert torch.allclose(part.right[0].double(), along, atol=1e-4 * float(along.norm()))
    assert said["reach"] == pytest.approx(float(along @ keys[0]), rel=1e-3)
    with torch.no_grad():
        before = llama.module(NAME)(keys[0].float()[None])[0]
    assert torch.allclose(before + part.delta().float() @ keys[0].float(), value.target, atol=1e-3)


@pytest.mark.parametrize("kind", ["covariance", "woodbury"])
def test_no_other_write_that_does_the_same_is_cheaper(llama, kind):
    problem, value = drawn(llama)
    metric = metric_of(kind, 64)
    part, key, _ = write(llama, NAME, problem, value, metric)
    dense = torch.linalg.inv(metric.apply_inverse(torch.eye(64).double()))

    def cost(delta):
        return float((delta @ dense * delta).sum())

    make = torch.Generator().manual_seed(2)
    for _ in range(20):
        way = torch.randn(32, 64, generator=make).double()
        way -= torch.outer(way @ key, key) / (key @ key)  # it leaves the output at the key alone
        assert cost(part.delta() + 0.1 * way) > cost(part.delta())


def test_the_report_tells_reach_and_amplification(llama):
    problem, value = drawn(llama)
    metric = metric_of("woodbury", 64)
    part, key, said = write(llama, NAME, problem, value, metric)
    assert said["amplification"] == pytest.approx(linalg.amplification(key, metric), rel=1e-6)
    assert said["cosine"] == pytest.approx(1 / said["amplification"], rel=1e-6)
    assert part.rank == 1


# Plans of several facts.


def test_changes_planned_one_after_another_join_in_that_order(llama):
    method = Rome(**QUICK)
    first, second = method.plan(llama, [FACT]), method.plan(llama, [OTHER])
    both = join(method, llama, [FACT, OTHER], [first, second])
    assert both.parts[NAME].rank == 2
    assert torch.allclose(both.parts[NAME].delta(), first.parts[NAME].delta() + second.parts[NAME].delta(), atol=1e-6)
    assert torch.equal(both.keys[NAME][:, 1:], second.keys[NAME])
    assert torch.equal(both.targets[NAME][:, :1], first.targets[NAME])
    assert both.notes["facts"] == [*first.notes["facts"], *second.notes["facts"]]


def test_groups_of_several_facts_are_planned_as_alone(llama):
    method = Rome(**QUICK)
    groups = [[FACT, OTHER], [THIRD]]
    for group, change in zip(groups, method.plan_each(llama, groups), strict=True):
        assert change.id == method.plan(llama, group).id


@pytest.mark.parametrize("faithful", [False, True])
def test_each_alone_says_the_settings_that_were_given(llama, faithful):
    method = Rome(**QUICK, faithful=faithful)
    for change in method.plan_each(llama, [[FACT], [OTHER]]):
        assert change.settings == method.to_dict()


def test_statistics_and_contexts_are_those_of_the_unedited_model(llama):
    method = Rome(block=1, n_steps=2, metric="covariance", n_tokens=300)
    edited = changes.apply(llama, Rome(**{**QUICK, "block": 0}, learning_rate=2.0).plan(llama, [THIRD]))
    change = method.plan(edited, [FACT], unedited=llama)
    assert change.notes["contexts"] == [c.text for c in contexts_for(llama, "memit", 0)]
    key = change.keys[NAME][:, 0].double()
    direction = {}
    for source, model in (("unedited", llama), ("edited", edited)):
        metric = linalg.Covariance.from_moment(stats.collect(model, [NAME], n_tokens=300)[NAME].mean)
        w = metric.apply_inverse(key[:, None])[:, 0]
        direction[source] = w / (w @ key)
    found = change.parts[NAME].right[0].double()
    assert (found - direction["unedited"]).norm() < 1e-4 * found.norm()
    assert (found - direction["edited"]).norm() > 1e-2 * found.norm()
