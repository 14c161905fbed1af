"""A shop of 24 titles in four kinds, and 130 customers who mostly keep to one kind: as interactions and as files."""

import json

import numpy as np

from retouch.recommend.base import Item
from retouch.recommend.data import Interactions, fingerprint

N_ITEMS = 24
POLICY = {
    "n_books": 2, "n_codewords": 4, "d_code": 8, "n_alone": 1, "n_epochs": 2, "batch_size": 64, "warm_up_steps": 2,
    "cuts_per_epoch": 1, "text_cache_mib": 4, "n_validation": 40, "validation_beams": 10, "beams": 24,
}  # fmt: skip
"""Settings of a policy that is trained in two seconds."""


def taken(seed=0, n_users=130):
    """Return item numbers of each customer, oldest first."""
    chance = np.random.default_rng(seed)
    found = []
    for user in range(n_users):
        n = int(chance.integers(6, 15))
        near = (user % 4) * 6 + 1 + chance.integers(0, 6, size=n)
        found.append(np.where(chance.random(n) < 0.7, near, chance.integers(1, N_ITEMS + 1, size=n)).astype(np.int32))
    return tuple(found)


def title(number):
    return f"Title {number} of kind {(number - 1) // 6}"


def interactions(seed=0):
    histories = taken(seed)
    users = tuple(f"u{u}" for u in range(len(histories)))
    items = tuple(Item(f"i{i}", title(i), title(i)) for i in range(1, N_ITEMS + 1))
    return Interactions("shop", users, items, histories, None, fingerprint(users, items, histories, None))


def vectors(path, n=N_ITEMS):
    """Write one random vector an item."""
    np.save(path, np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32))
    return path


def csv_file(path, seed=0, names=("user_id", "item_id", "timestamp", "title")):
    """Write everything as one table."""
    lines = [",".join(names)]
    for user, history in enumerate(taken(seed)):
        lines += [f"u{user},i{i},{1000 * user + at},{title(i)}" for at, i in enumerate(history)]
    path.write_text("\n".join(lines) + "\n")
    return path


def json_lines(path, seed=0, n_users=20):
    """Write the histories of some customers as JSON Lines."""
    rows = [{"user": f"u{u}", "items": [f"i{i}" for i in h]} for u, h in enumerate(taken(seed, n_users))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def language_model(tiny, folder, seed=0):
    """Save a two-block language model with random weights."""
    network, words = tiny("llama", seed=seed)
    network.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
