"""Interactions made in memory: random ones, and ones with a rule that a sequence model can learn."""

import numpy as np

from retouch.recommend.base import Item
from retouch.recommend.data import Interactions, fingerprint

WORDS = ("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "inlet", "jade", "kelp", "loam")


def items(n):
    return tuple(Item(f"i{i}", f"{WORDS[i % 12]} number {i}", f"{WORDS[i % 12]} {i}") for i in range(1, n + 1))


def interactions(histories, n_items, times=None):
    """Wrap histories of item numbers; users are u1, u2, ..."""
    found = tuple(np.asarray(h, np.int32) for h in histories)
    clock = None if times is None else tuple(np.asarray(t, np.int64) for t in times)
    users, catalogue = tuple(f"u{u}" for u in range(1, len(found) + 1)), items(n_items)
    return Interactions("made", users, catalogue, found, clock, fingerprint(users, catalogue, found, clock))


def random_data(n_users=60, n_items=30, seed=0, shortest=5, longest=14, clock=True):
    """Histories drawn evenly, each item at a time of its own."""
    chance = np.random.default_rng(seed)
    histories = [chance.integers(1, n_items + 1, chance.integers(shortest, longest + 1)) for _ in range(n_users)]
    times = [np.sort(chance.choice(10_000, len(h), replace=False)) for h in histories] if clock else None
    return interactions(histories, n_items, times)


def cyclic_data(n_users=80, n_items=24, length=9, seed=0):
    """Every user walks around the same circle of items from a place of its own."""
    chance = np.random.default_rng(seed)
    starts = chance.integers(0, n_items, n_users)
    return interactions([(s + np.arange(length)) % n_items + 1 for s in starts], n_items)
