"""Adapters of random factors and the slow, whole, float64 version of what fusion does to them."""

from __future__ import annotations

import torch

from retouch.change import LowRank
from retouch.fuse.base import Adapter, Kept, Module

BASE = "0" * 64
NAME = "blocks.0.mlp.down"


def low(outputs, inputs, rank, seed, size=1.0):
    """A random difference of a norm near `size` times the root of its entries."""
    make = torch.Generator().manual_seed(seed)
    left, right = torch.randn(outputs, rank, generator=make), torch.randn(rank, inputs, generator=make)
    return LowRank(left * size / max(rank, 1) ** 0.5, right)


def adapters(outputs=12, inputs=17, ranks=(2, 3, 1), seed=0, names=(NAME,), kept=None):
    """One adapter a rank, each with a difference of every weight named."""
    return [
        Adapter(f"edge {i}", {n: low(outputs, inputs, r, 1000 * seed + 31 * i + j) for j, n in enumerate(names)}, BASE,
                kept={} if kept is None or kept[i] is None else dict.fromkeys(names, kept[i]))
        for i, r in enumerate(ranks)
    ]  # fmt: skip


def masked(adapter, kept):
    """The adapter as an edge trains it that could see only the kept rows or columns."""
    parts = {}
    for name, part in adapter.parts.items():
        left, right = part.left.clone(), part.right.clone()
        side = left if kept.axis == "rows" else right.T
        side[[i for i in range(len(side)) if i not in kept.index]] = 0
        parts[name] = LowRank(left, right)
    return Adapter(adapter.name, parts, adapter.base, dict.fromkeys(parts, kept))


def module(parts, weights=None, kept=None, **more):
    """One weight as a method is given it."""
    n = len(parts)
    weights = weights or (1 / n,) * n
    names = tuple(f"edge {i}" for i in range(n))
    return Module(NAME, tuple(parts), tuple(weights), tuple(range(n)), n, tuple(kept or (None,) * n), names, **more)


def deltas(given, name=NAME):
    return [a.parts[name].delta() for a in given]


def gap(found, wanted):
    """Distance as a share of what is wanted."""
    found = found.delta() if isinstance(found, LowRank) else found
    return float((found - wanted).norm() / wanted.norm())


def best(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def rows(*index):
    return Kept("rows", index)


def columns(*index):
    return Kept("columns", index)


# ---------------------------------------------------------------- rules as they are written, on whole matrices


def mean(ds, ws):
    return sum(w * d for d, w in zip(ds, ws))


def trimmed(d, density, n=None):
    """Keep the largest entries by sorting."""
    n = max(1, round(density * (n or d.numel())))
    size = d.abs().flatten().sort(descending=True).values[n - 1]
    return torch.where(d.abs() >= size, d, 0.0)


def elect(ds, ws):
    """Entry by entry."""
    out = torch.zeros_like(ds[0])
    for p in range(out.shape[0]):
        for q in range(out.shape[1]):
            vote = sum(w * float(d[p, q]) for d, w in zip(ds, ws))
            agree = [(float(d[p, q]), w) for d, w in zip(ds, ws) if float(d[p, q]) * vote > 0]
            if agree:
                out[p, q] = sum(x * w for x, w in agree) / sum(w for _, w in agree)
    return out


def triples(d, tolerance=1e-6):
    u, s, vh = torch.linalg.svd(d, full_matrices=False)
    k = int((s > tolerance * s[0]).sum())
    return u[:, :k], s[:k], vh[:k]


def nearest(x, tolerance=1e-6):
    p, s, q = torch.linalg.svd(x, full_matrices=False)
    k = int((s > tolerance * s[0]).sum())
    return p[:, :k] @ q[:k]


def tsv(ds, scales=None):
    found = [triples(d) for d in ds]
    s = torch.cat([t[1] * w for t, w in zip(found, scales or [1.0] * len(ds))])
    return nearest(torch.cat([t[0] for t in found], 1)) * s @ nearest(torch.cat([t[2].T for t in found], 1)).T


def iso(ds, ws):
    u, s, vh = triples(mean(ds, ws))
    return s.mean() * u @ vh


def knots(ds, ws, rule):
    u, s, vh = triples(torch.cat(ds, 1), 1e-10)
    blocks = list((s[:, None] * vh).split(ds[0].shape[1], 1))
    return u @ rule(blocks, ws)
