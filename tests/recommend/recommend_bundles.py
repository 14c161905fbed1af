"""A fitted policy that says something, over a two-block random language model, and the bundle made of it."""

import numpy as np
import torch
from recommend_made import items

from retouch import store
from retouch.recommend._draws import Asked
from retouch.recommend._fitting import build
from retouch.recommend.base import Run
from retouch.recommend.bundle import save_bundle
from retouch.recommend.certificate import Terms, certify
from retouch.recommend.data import Interactions
from retouch.recommend.evidence import Evidence
from retouch.recommend.fitted import PolicyScorer
from retouch.recommend.generator import SIZES, Generator
from retouch.recommend.lwgr import LWGR
from retouch.recommend.rq_kmeans import RQKMeans
from retouch.recommend.splits import split
from retouch.recommend.tokenise import assign

N_ITEMS, N_HISTORY = 24, 6
SMALL = {"n_books": 2, "n_codewords": 4, "d_code": 8, "text_cache_mib": 4, "beams": 24}


def world(model=None, seed=0, n_users=90):
    """Return a run with a random reference, and the tokeniser of its codes."""
    chance = np.random.default_rng(seed)
    histories = tuple(
        chance.integers(1, N_ITEMS + 1, int(chance.integers(5, 12))).astype(np.int32) for _ in range(n_users)
    )
    users = tuple(f"u{u}" for u in range(n_users))
    data = Interactions("toy", users, items(N_ITEMS), histories, None, f"toy-{seed}")
    vectors = chance.normal(size=(N_ITEMS, 8)).astype(np.float32)
    tokeniser = RQKMeans(levels=2, codes=6).fit(vectors, seed)
    first = np.arange(N_ITEMS, dtype=np.float64)
    catalogue = assign(tokeniser.encode(vectors), tokeniser.sizes, first, [i.id for i in data.items])
    torch.manual_seed(seed)
    codes = torch.from_numpy(catalogue.codes.copy())
    reference = Generator(SIZES["tiny"], codes, catalogue.sizes, N_HISTORY).eval().requires_grad_(False)
    return Run(data, split(data), catalogue, None, reference, model, N_HISTORY), tokeniser


def fitted(run, seed=1, **settings):
    """Return what fitting would: a policy moved away from its start at random."""
    method = LWGR(**{**SMALL, **settings})
    torch.manual_seed(seed)
    policy = build(method, run).eval()
    chance = torch.Generator().manual_seed(seed)
    moved = [policy.generator.heads, *([policy.fusion.out.weight] if policy.fusion else [])]
    with torch.no_grad():
        for parameter in moved:
            parameter += 0.2 * torch.randn(parameter.shape, generator=chance)
    policy.requires_grad_(False)
    record = {"settings": method.to_dict(), "seconds": 1.5, "chosen_harm": float("inf")}
    asked = Asked(run.data, run.splits, N_HISTORY)
    return PolicyScorer.of(policy, asked, record, catalogue=run.catalogue, beams=24)


def proof(limit=0.9):
    """Return a certificate of made-up evidence: kept at the usual limit, refused at a tiny one."""
    chance = np.random.default_rng(0)
    n = 400
    before = -2 - chance.random(n)
    segments = {name: chance.random(n) < 0.5 for name in ("sparse", "active", "tail", "new")}
    ranks = chance.integers(1, 40, n)
    return certify(
        Evidence(
            chance.integers(0, 256, (n, 8), dtype=np.uint8), np.arange(n), segments, before,
            {"fresh": before - 0.1}, ranks, {"fresh": ranks}, {}, 3,
        ),
        Terms(limit),
    )  # fmt: skip


def save(path, run, tokeniser, scorer=None, **changes):
    """Save the bundle of a run."""
    parts = {
        "data": run.data, "splits": run.splits, "catalogue": run.catalogue, "tokeniser": tokeniser,
        "reference": run.reference, "fitted": scorer or fitted(run), "certificate": proof(),
        "settings": {"n_history": N_HISTORY}, "llm": run.model,
    }  # fmt: skip
    save_bundle(path, **parts | changes)
    return path


def histories(run):
    """Return all histories in raw ids."""
    return {user: run.data.history(number).items for number, user in enumerate(run.data.users, 1)}


def doctored(path, to, name, change):
    """Copy a bundle with one file's text changed, and a manifest that knows nothing better."""
    files = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"}
    files[name] = change(files[name])
    store.write_folder(to, {n: c for n, c in files.items() if c is not None})
    return to
