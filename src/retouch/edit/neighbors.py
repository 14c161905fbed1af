"""Neighbours inside the search: prompts that hear a write before it is made, so that their drift can be limited.

A write of a value delta at a key k* adds ``(w . k) delta`` wherever a key k flows into the edited weight, with
``w = M^-1 k* / (k*' M^-1 k*)`` known before delta is. So a neighbour's every token hears a known share of delta, and
the search can see, and limit, what the finished write will do to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..change import Change
from ..model import Model
from ..tokens import Text, encode
from .base import ValueEditMethod
from .constraints import for_facts
from .keys import mean_keys, read_all
from .rows import Problem
from .value import Bystander

__all__ = ["alone", "neighbors", "stopped"]


def alone(keys: Tensor, metric: linalg.Metric) -> Tensor:
    """Return w = M^-1 k / (k' M^-1 k) of each key alone.

    Shapes:
        keys (d_ff, n) -> (d_ff, n), float64.
    """
    x = metric.apply_inverse(keys.double())
    return x / (keys.double() * x).sum(0)


def stopped(change: Change) -> list[Mapping[str, Any]]:
    """Return the facts of a planned change for which the limit on drift left no value to write."""
    return [fact for fact, told in zip(change.facts, change.notes.get("facts", ())) if told.get("stopped")]


def neighbors(
    model: Model,
    found: Sequence[Problem],
    groups: Sequence[Sequence[int]],
    names: Sequence[str],
    settings: ValueEditMethod,
    metric: Mapping[str, linalg.Metric],
) -> list[Bystander]:
    """Pick each group's neighbours and tell what their tokens will hear; none unless ``max_drift`` asks for them.

    With several edited blocks each is expected to bring an equal share, so that a token hears the mean over blocks.

    Shapes:
        One pass over the neighbours' tokens up to the last edited block.
    """
    if not settings.max_drift:
        return []
    prompts: list[list[str]] = []
    for group in groups:
        facts = [found[i].fact for i in group]  # one set for all: a neighbour of one fact must not ask for another
        chosen = for_facts(facts, n=max(len(facts), settings.n_bystanders), seed=settings.seed)
        prompts.append([c.prompt for c in chosen])
    rows = [encode(model.tokenizer, [Text(p) for p in ps], settings.bos) for ps in prompts]
    every = read_all(model, [r.ids for rs in rows for r in rs], names, every=True)
    keys = mean_keys(model, found, groups, names)
    heard = {n: alone(keys[n], metric[n]) for n in names}
    bystanders = []
    start = 0
    for g, own_rows in enumerate(rows):
        for row in own_rows:
            span = slice(start, start + len(row.ids))
            shares = torch.stack([every[n][span] @ heard[n][:, g] for n in names]).mean(0)
            bystanders.append(Bystander(g, row, shares.float()))
            start = span.stop
    return bystanders
