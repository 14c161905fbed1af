"""Tables of logits as a network with exits would give them: deeper exits are surer and more often right."""

from __future__ import annotations

import numpy as np

from retouch.slim.thresholds import Table


def make_table(n=40, exits=(0, 1, 2, 3), classes=3, seed=0, labelled=True):
    g = np.random.default_rng(seed)
    labels = g.integers(0, classes, n) if classes > 1 else g.normal(size=n)
    depth = np.arange(1, len(exits) + 1)[:, None, None]
    if classes > 1:
        truth = np.eye(classes)[labels] * g.gamma(2, size=(n, 1))
        logits = truth * depth + g.normal(size=(len(exits), n, classes))
    else:
        logits = labels[None, :, None] + g.normal(size=(len(exits), n, 1)) / depth**2
    return Table(logits, tuple(exits), labels if labelled else None, g.integers(1, 60, n))
