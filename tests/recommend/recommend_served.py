"""A small bundle in memory: random networks, a certificate that allows what a test wants, and records for its users."""

from __future__ import annotations

import copy
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import recommend_made as made
import torch

from retouch.errors import StoreDown
from retouch.recommend.base import Item
from retouch.recommend.bundle import Bundle, save_bundle
from retouch.recommend.fitted import PolicyScorer
from retouch.recommend.fusion import Fusion
from retouch.recommend.generator import SIZES, Generator
from retouch.recommend.instruction import Instructions
from retouch.recommend.policy import Policy
from retouch.recommend.prototypes import Prototypes
from retouch.recommend.record import Record, Versions, encode, history_hash, tail_hash
from retouch.recommend.splits import split
from retouch.recommend.stores import open_store
from retouch.recommend.tokenise import assign


@contextmanager
def redis_server(folder):
    """Run a server of this machine: its address and its process."""
    server = shutil.which("redis-server") or shutil.which("valkey-server")
    if server is None:
        pytest.skip("no redis-server or valkey-server is installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    url = f"redis://127.0.0.1:{port}/0"
    for _ in range(100):
        try:
            open_store(url).close()
            break
        except StoreDown:
            time.sleep(0.05)
    try:
        yield url, process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(10)


NOW = 1_700_000_000_000
DAY = 86_400_000
ALL = ("fresh", "stale", "prototype")


def certificate(kept=ALL, segment="all"):
    verdicts = [(rung, "kept" if rung in kept else "refused") for rung in ALL]
    lines = [{"rung": rung, "segment": segment, "verdict": verdict} for rung, verdict in verdicts]
    return {"lines": lines, "about": {"lags": {"fresh": 4, "stale": 8}}}


def catalogue(n_items, seed=0, size=4):
    codes = np.random.default_rng(seed).integers(0, size, (n_items, 3))
    return assign(codes, (size,) * 3, np.arange(n_items), [f"i{i}" for i in range(1, n_items + 1)])


def bundle(n_items=40, kept=ALL, seed=0, serves="policy", n_history=6, fingerprint="a1", names=("red", "blue")):
    """Nothing is trained: the policy is the reference with noise on its weights."""
    torch.manual_seed(seed)
    items = tuple(Item(i.id, i.text, i.title, (names[n % len(names)],)) for n, i in enumerate(made.items(n_items)))
    held = catalogue(n_items, seed)
    reference = Generator(SIZES["tiny"], torch.from_numpy(held.codes.copy()), held.sizes, n_history).eval()
    instructions, fusion = Instructions(32, 16, n_books=2, n_codewords=4, d_code=8), Fusion(32, 16)
    torch.nn.init.normal_(fusion.out.weight)
    knowing = Policy(reference, instructions, fusion, None).eval()
    with torch.no_grad():
        for weight in knowing.generator.parameters():
            weight += 0.05 * torch.randn_like(weight)
    for part in (reference, knowing):
        part.requires_grad_(False)
    chance = np.random.default_rng(seed)
    prototypes = Prototypes.fit(chance.integers(0, 4, (60, 2)), chance.normal(size=(60, 32)).astype(np.float32), (4, 4))
    counts = np.append(0, chance.permutation(n_items) + 1)
    policy = knowing.generator if serves == "policy" else copy.deepcopy(reference)
    return Bundle(
        Path("nowhere"), fingerprint, items, counts, held, n_history, reference, policy, instructions, fusion,
        knowing, Versions(1, 2, 3), {"model": "1"}, prototypes, {}, certificate(kept), serves,
    )  # fmt: skip


def saved(path, n_items=24):
    """Write a bundle without knowledge, which serves its reference."""
    data = made.cyclic_data(n_items=n_items)
    held = catalogue(n_items)
    torch.manual_seed(0)
    reference = Generator(SIZES["tiny"], torch.from_numpy(held.codes.copy()), held.sizes, 6).eval()
    policy = Policy(reference, None, None, None).eval()
    fitted = PolicyScorer(policy.generator, held, data, policy=policy)
    nothing = Prototypes.fit(np.zeros((5, 0), np.int64), np.zeros((5, 32), np.float32), ())
    save_bundle(
        path, data=data, splits=split(data), catalogue=held, tokeniser=None, reference=reference, fitted=fitted,
        certificate=None, settings={}, prototypes=nothing,
    )  # fmt: skip
    return path


def record(held, history, *, at=NOW, ttl=7 * 86_400, length=None, seed=0, versions=None):
    vector = np.random.default_rng(seed).normal(size=held.d_model).astype(np.float16)
    length = len(history) if length is None else length
    made = Record(
        versions or held.versions, length, history_hash(history), at, ttl, 0.5, (1, 2), vector, tail_hash(history)
    )
    return encode(made)


def ids(*numbers):
    return tuple(f"i{n}" for n in numbers)
