"""A task that a tiny encoder can learn in a few steps, and a run on it."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

import families
from retouch.model import wrap
from retouch.slim.base import Plan, Size, Widths
from retouch.slim.costeff import CostEff
from retouch.slim.data import Example, Task
from retouch.slim.widths import base_parameters, parameters

WORDS = ["the", "capital", "of", "france", "is", "in", "city", "located", "official", "language", "tower", "question"]
SIDES = (["paris", "eiffel"], ["rome", "italy"])
VOCABULARY = 500


@cache
def tokenizer() -> Any:
    """One token a word, the same in every process; the trained one of the other tests is not."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*marks, *WORDS, *SIDES[0], *SIDES[1]])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def rows(n: int, seed: int, labels: int = 2) -> tuple[Example, ...]:
    """Texts of a few words, one of which tells the class."""
    chance = random.Random(seed)
    made = []
    for _ in range(n):
        label = chance.randrange(labels)
        words = [*chance.choices(WORDS, k=chance.randint(2, 8)), chance.choice(SIDES[label])]
        chance.shuffle(words)
        made.append(Example(" ".join(words), None, label))
    return tuple(made)


def task(n: int = 96, **fields: Any) -> Task:
    """The toy task, with `n` training rows."""
    return Task("toy", ("paris", "rome"), "accuracy", rows(n, 1), rows(32, 2), rows(16, 3), (), **fields)


def regression(n: int = 96) -> Task:
    """The toy task with numbers far from 0 for labels."""
    turned = [
        tuple(Example(e.text, None, 40.0 + 10 * float(e.label) + len(e.text) / 50) for e in rows(m, seed))
        for m, seed in ((n, 1), (32, 2), (16, 3))
    ]
    return Task("toy-numbers", None, "spearman", *turned, ())


@cache
def _network(n_blocks: int) -> Any:
    return families.FAMILIES["bert"](n_blocks=n_blocks, headless=True, vocab_size=VOCABULARY)


def model(n_blocks: int = 2, network: Any = None) -> Any:
    """A tiny bert of 4 heads, width 32 and 64 neurons, opened."""
    return wrap(_network(n_blocks) if network is None else network, tokenizer())


def plan(
    n_blocks: int = 2, heads: int = 2, d_ff: int = 24, rank: int | None = 12, classes: int = 2, **more: Any
) -> Plan:
    """A plan for it."""
    size = Size(n_blocks, 32, 4, 64, VOCABULARY, 128, 2, classes)
    widths = Widths.uniform(size, heads, d_ff, rank, more.pop("exits", None))
    ratio = parameters(size, widths) / base_parameters(size)
    return Plan(size, widths, ratio, 0.3, more.pop("mean_depth", float(n_blocks)))


SHORT: dict[str, Any] = {"length_factor": 0.0015, "batch_size": 8, "rate_factor": 10.0, "n_cuts": 2, "save_every": 3}
"""Settings under which a run takes a second: stages of some ten steps."""


def method(**settings: Any) -> CostEff:
    """COST-EFF for a second."""
    return CostEff(**SHORT | settings)
