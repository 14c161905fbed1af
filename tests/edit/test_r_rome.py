"""R-ROME keeps one key in direction and scale, also where it follows its authors in all else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from retouch import change as changes
from retouch.edit.contexts import Context, contexts_for
from retouch.edit.facts import Fact
from retouch.edit.r_rome import RRome
from retouch.edit.rome import Rome
from retouch.edit.rows import problems
from retouch.edit.value import optimise

FACT = Fact("The capital of {} is", "France", "Lyon")
NAME = "blocks.1.mlp.down"
OWN = ("", "I am the one. ", "Because. ")
QUICK = {"block": 1, "n_steps": 4, "contexts": OWN, "weight_decay": 0.0}


@torch.no_grad()
def outputs(model, problem):
    """Input and output of the weight at each row's edited token, one unpadded row after another."""
    seen = []
    hook = lambda _, args, out: seen.append((args[0][0], out[0]))  # noqa: E731
    handle = model.module(NAME).register_forward_hook(hook)
    for row in problem.rows:
        model.network(input_ids=torch.tensor([row.ids]))
    handle.remove()
    return tuple(torch.stack([s[i][a] for s, a in zip(seen, problem.anchors)]) for i in (0, 1))


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama_square", "gpt2", "gpt2_square"])
def test_the_mean_key_gets_the_value(open_tiny, family, faithful):
    model = open_tiny(family)
    method = RRome(**QUICK, faithful=faithful)
    (problem,) = problems(model, [FACT], [Context(t, 1 / 3) for t in OWN], "subject")
    target = optimise(model, [problem], 1, "down", method)[0].target
    new = changes.apply(model, method.plan(model, [FACT]))
    keys, before = outputs(model, problem)
    assert (outputs(new, problem)[1].mean(0) - target).norm() < 1e-4 * target.norm()
    assert (before.mean(0) - target).norm() > 1e-2 * target.norm()
    # rebuilding-rome: the residual is the value minus the mean output, over direction times mean key
    k = keys.double().mean(0)
    direct = torch.outer(target.double() - before.double().mean(0), k) / (k @ k)
    found = method.plan(model, [FACT]).parts[NAME].delta()
    assert (found - direct).norm() < 1e-3 * direct.norm()


def test_it_is_rome_by_default_and_not_under_faithful(open_tiny):
    model = open_tiny("llama")
    one, two = (cls(**QUICK).plan(model, [FACT]).parts[NAME] for cls in (Rome, RRome))
    assert torch.equal(one.left, two.left) and torch.equal(one.right, two.right)
    one, two = (cls(**QUICK, faithful=True).plan(model, [FACT]) for cls in (Rome, RRome))
    assert not torch.allclose(one.parts[NAME].left, two.parts[NAME].left, rtol=1e-3)
    assert two.notes["facts"][0]["reach"] == pytest.approx(1)


def test_faithful_takes_the_twenty_one_contexts(open_tiny):
    model = open_tiny("llama")
    change = RRome(block=1, n_steps=2, faithful=True).plan(model, [FACT])
    assert change.notes["contexts"] == [c.text for c in contexts_for(model, "rome", 0)]
    assert change.method == "r_rome"


def test_it_has_romes_settings():
    assert [f.name for f in dataclasses.fields(RRome)] == [f.name for f in dataclasses.fields(Rome)]
