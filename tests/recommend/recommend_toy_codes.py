"""Catalogues that hypothesis draws, a small random generator over codes, and the obvious slow versions of the search."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st


@st.composite
def catalogues(draw, most_items=40):
    """Draw different rows of codes and the number of codes on each level."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    row = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    rows = draw(st.lists(row, min_size=1, max_size=most_items, unique=True))
    return np.array(rows, np.int32), tuple(sizes)


class Writer:
    """A random autoregressive generator: what it says of a code depends on the request and on all codes before it."""

    def __init__(self, n_requests, sizes, seed=0, spread=2.0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator) * spread

        self.sizes = sizes
        self.own = [draw(n_requests, size) for size in sizes]
        self.after = [[draw(before, size) for before in sizes[:level]] for level, size in enumerate(sizes)]
        self.asked = []

    def step(self, level, rows, prefix, parents=None):
        self.asked.append((level, rows.tolist(), prefix.tolist()))
        logits = self.own[level][rows]
        for place, table in enumerate(self.after[level]):
            logits = logits + table[prefix[:, place]].roll(place, 1)
        return logits.log_softmax(1)

    def log_likelihoods(self, codes, request):
        """The teacher-forced log-likelihood of each row of codes, in float64."""
        codes = torch.as_tensor(np.array(codes, np.int64))
        total = torch.zeros(len(codes), dtype=torch.float64)
        rows = torch.full((len(codes),), request)
        for level in range(codes.shape[1]):
            total += self.step(level, rows, codes[:, :level]).gather(1, codes[:, level : level + 1])[:, 0].double()
        return total.numpy()


def full_ranking(writer, codes, request, alive=None):
    """All living items of one request by score, then by code: the answer that a search must give."""
    scores = writer.log_likelihoods(codes, request)
    items = [i for i in range(len(codes)) if alive is None or alive[i + 1]]
    order = sorted(items, key=lambda i: (-scores[i], tuple(codes[i])))
    return [i + 1 for i in order], scores
