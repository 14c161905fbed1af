"""The spread methods as their papers write them: unpadded rows, hooks, m x m systems, weights really written."""

from __future__ import annotations

import torch

from retouch import stats
from retouch.edit.contexts import Context
from retouch.edit.facts import Fact
from retouch.edit.rows import problems

OWN = ("", "I am the one. ", "Because. ")
QUICK = {"n_steps": 4, "contexts": OWN, "n_tokens": 400, "weight_decay": 0.0}
APART = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("The official language of {} is", "Brazil", "French"),
    Fact("They all looked at {} in", "Big Ben", "Rome"),
]
SAME = [  # the prompts share what stands before the subject, so the facts of one subject have one key
    Fact("In {} the capital is", "France", "Lyon"),
    Fact("In {} the people speak", "France", "Italian"),
    Fact("In {} one pays with the", "France", "yen"),
]


def down(block):
    return f"blocks.{block}.mlp.down"


def found_for(model, facts, texts=OWN):
    return problems(model, facts, [Context(t, 1 / len(texts)) for t in texts], "subject")


@torch.no_grad()
def seen(model, ids, path, side):
    """What flows into or out of a module at a row's last token."""
    kept = []

    def keep(_, args, out=None):
        state = args[0] if side == "input" else out
        state = state[0] if isinstance(state, tuple) else state
        kept.append(state.reshape(len(ids), -1)[-1].double())

    module = model.network.get_submodule(path)
    handle = module.register_forward_pre_hook(keep) if side == "input" else module.register_forward_hook(keep)
    model.network(input_ids=torch.tensor([ids]))
    handle.remove()
    return kept[0]


def moment(model, block):
    return stats.collect(model, [down(block)], n_tokens=400)[down(block)].mean


def covariance(model, block):
    c = moment(model, block)
    return c + 1e-4 * c.trace() / len(c) * torch.eye(len(c), dtype=torch.float64)


def null_projector(model, block, energy=0.02, threshold=None):
    values, vectors = torch.linalg.eigh(moment(model, block))
    small = values < threshold if threshold else values.cumsum(0) <= energy * values.sum()
    return vectors[:, small] @ vectors[:, small].T


def written(model, block, delta):
    """The model with a difference added to one weight."""
    name = down(block)
    value = (model.matrix(name).double() + delta).float()
    return model.with_weights({model.anatomy.weight(name): value.T if model.anatomy.transposed(name) else value})


def prefixes(found, group):
    """The distinct texts of a group up to the subject, and those of them without a context."""
    every = {r.ids[: a + 1]: None for i in group for r, a in zip(found[i].rows, found[i].anchors)}
    bare = {found[i].rows[0].ids[: found[i].anchors[0] + 1]: None for i in group}
    return list(every), list(bare)


def mean_key(model, found, group, block):
    path = model.anatomy.path(down(block))
    return torch.stack([seen(model, ids, path, "input") for ids in prefixes(found, group)[0]]).mean(0)


def mean_state(model, found, group, block):
    path = model.anatomy.path(f"blocks.{block}")
    return torch.stack([seen(model, ids, path, "output") for ids in prefixes(found, group)[1]]).mean(0)


def slow(model, found, groups, targets, blocks, formula):
    """Bring states about block by block; `formula` takes block, keys (m x n) and residuals (d x n) to a difference."""
    work, deltas = model, {}
    for j, block in enumerate(blocks):
        k = torch.stack([mean_key(work, found, g, block) for g in groups], 1)
        h = torch.stack([mean_state(work, found, g, blocks[-1]) for g in groups], 1)
        deltas[down(block)] = formula(block, k, (targets.double().T - h) / (len(blocks) - j))
        work = written(work, block, deltas[down(block)])
    return deltas


def close(one, two, tolerance=1e-3):
    assert float((one.double() - two.double()).norm()) <= tolerance * float(two.double().norm())
