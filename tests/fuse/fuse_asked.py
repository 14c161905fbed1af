"""A tiny base whose letters are single tokens, a suite that it can learn in seconds, and adapters of random factors."""

from __future__ import annotations

import torch

from retouch.change import LowRank
from retouch.fuse.base import Adapter, Question
from retouch.fuse.suites import Suite, question_key
from retouch.model import wrap

WEIGHTS = ("blocks.0.mlp.down", "blocks.1.attention.query")
RIGHT = {"law": 0, "film": 1, "news": 2}
N = {"train": 24, "selection": 6, "test": 12}


def base(tiny, **fields):
    _, words = tiny("llama")
    words.add_tokens([f" {letter}" for letter in "ABC"])
    network, _ = tiny("llama", vocab_size=len(words), max_position_embeddings=1024, **fields)
    return wrap(network, words)


def suite(n=None):
    """Each domain has one right answer, so that an adapter learns it in a few steps."""
    splits = {
        split: {
            d: tuple(
                Question(d, d, f"{d} {split} {i}", tuple("ABC"), right, question_key(f"{d} {split} {i}", "ABC"))
                for i in range(many)
            )
            for d, right in RIGHT.items()
        }
        for split, many in (N | (n or {})).items()
    }
    return Suite("made", tuple(RIGHT), **splits, template="synth")


def adapter(model, name, seed, size=0.3, rank=2, plan=""):
    make = torch.Generator().manual_seed(seed)
    parts = {}
    for weight in WEIGHTS:
        outputs, inputs = model.matrix(weight).shape
        left, right = torch.randn(outputs, rank, generator=make), torch.randn(rank, inputs, generator=make)
        parts[weight] = LowRank(left * size / (rank * inputs) ** 0.5, right)
    return Adapter(name, parts, model.base_fingerprint, plan=plan, n_examples=10 * (seed + 1))
