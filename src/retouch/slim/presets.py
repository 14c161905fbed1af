"""The stages of training as data: how long each is, how fast it learns, what it learns from, which state it keeps.

``fast`` counts padded training tokens and fits a CPU; ``paper`` counts epochs as published, for a GPU. Nothing here
loads torch; a method takes these rows and changes what its own settings say.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ..errors import UserError, unknown
from ..settings import Settings, setting

__all__ = ["COLUMNS", "Answers", "Stage", "Stages", "TrainingSettings", "column", "stages"]

Answers = Literal["none", "labels", "assistant", "exits", "final"]
Choose = Literal["best", "last"]


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        name: What it is called in folders, progress and errors.
        learning_rate: The peak of the first cycle.
        epochs: How long it is; or
        tokens: how many padded tokens it may train on.
        hidden: Whether hidden states are compared with the teacher's.
        answers: What the exits learn from: the labels, half labels and half the original (``assistant``), the
            teacher's exit at the same block (``exits``), or the teacher's last exit for all (``final``).
        choose: Keep the state that is best on the validation set, or the last one.
        growth: What the peak is multiplied by after each cut.
        hidden_share: Share of each cycle's steps, at its start, that compares hidden states only.
        every_block: Whether the hidden loss looks at every block or, from the last downwards, at every second.
        only_exits: Train the exits alone, the rest frozen.
    """

    name: str
    learning_rate: float
    epochs: float | None = None
    tokens: int | None = None
    hidden: bool = False
    answers: Answers = "none"
    choose: Choose = "last"
    growth: float = 1.0
    hidden_share: float = 0.0
    every_block: bool = True
    only_exits: bool = False

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.tokens is None):
            raise UserError(f"Stage {self.name!r} needs its length in epochs or in tokens, one of the two.")
        if not self.hidden and self.answers == "none":
            raise UserError(f"Stage {self.name!r} has nothing to learn from: switch on `hidden`, or choose `answers`.")

    def levels(self, blocks: int) -> list[int] | None:
        """Return the places in ``(x, h_0, ..)`` that the hidden loss compares; None is all."""
        return None if self.every_block else [0, *sorted(range(blocks, 0, -2))]

    def scaled(self, length: float, rate: float) -> Stage:
        """Return this stage with its length and its learning rate multiplied."""
        tokens = None if self.tokens is None else max(1, round(self.tokens * length))
        epochs = None if self.epochs is None else self.epochs * length
        return replace(self, tokens=tokens, epochs=epochs, learning_rate=self.learning_rate * rate)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Stages:
    """A preset: the stages in their order, and what is not one stage's own."""

    finetune: Stage
    assistant_hidden: Stage | None
    assistant: Stage
    slenderise: Stage
    recover_hidden: Stage
    recover: Stage
    raw_assistant: bool
    n_cuts: int | None
    score_examples: int | None
    score_tokens: int | None
    n_checks: int

    def scaled(self, length: float, rate: float) -> Stages:
        """Return these with all lengths and learning rates multiplied."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        scaled: Any = {k: v.scaled(length, rate) for k, v in found.items() if isinstance(v, Stage)}
        return replace(self, **scaled)


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """The settings of every method that trains, whatever it trains."""

    batch_size: int = setting(32, "Examples a step, over all devices together.", ge=1)
    n_parts: int = setting(1, "Parts that a batch is worked off in: less memory, the same batch.", ge=1)
    max_tokens: int = setting(128, "Longer texts are cut to this many tokens.", ge=2)
    length_factor: float = setting(1.0, "Multiplies the length of every stage.", gt=0)
    rate_factor: float = setting(1.0, "Multiplies every learning rate.", gt=0)
    weight_decay: float = setting(0.01, "AdamW's decay; biases and LayerNorms have none.", ge=0)
    clip: float = setting(1.0, "Longest gradient.", gt=0)
    pooling: Literal["auto", "first", "mean"] = setting("auto", "What an exit reads; auto: as the opened model pools.")
    precision: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: bfloat16 on a GPU, else float32.")
    hidden_mib: int = setting(
        2048, "Memory for the teacher's hidden states, computed once; where they need more, at every step.", ge=0
    )
    save_every: int = setting(500, "Steps between two saved states, which are resumed from; 0: none.", ge=0)


# ---------------------------------------------------------------- as published

COLUMNS = {"mrpc": 3_668, "cola": 8_551, "sst2": 67_349, "qnli": 104_743, "qqp": 363_846, "mnli": 392_702}
"""The tasks with published epochs, and how many training examples each has."""

_FINETUNE = {"mrpc": 12, "sst2": 5, "qnli": 5, "mnli": 3, "cola": 8, "qqp": 3}
_BY_HEADS: dict[int, dict[str, dict[str, int]]] = {  # heads kept of 12
    2: {
        "slenderise": {"mrpc": 20, "sst2": 5, "qnli": 5, "mnli": 3, "cola": 20, "qqp": 3},
        "recover_hidden": {"mrpc": 20, "sst2": 10, "qnli": 8, "mnli": 5, "cola": 20, "qqp": 5},
        "recover": {"mrpc": 10, "sst2": 6, "qnli": 5, "mnli": 3, "cola": 10, "qqp": 3},
    },
    4: {
        "slenderise": {"mrpc": 16, "sst2": 4, "qnli": 4, "mnli": 3, "cola": 16, "qqp": 3},
        "recover_hidden": {"mrpc": 16, "sst2": 9, "qnli": 7, "mnli": 4, "cola": 16, "qqp": 4},
        "recover": {"mrpc": 7, "sst2": 4, "qnli": 4, "mnli": 2, "cola": 7, "qqp": 2},
    },
    6: {
        "slenderise": {"mrpc": 12, "sst2": 3, "qnli": 3, "mnli": 2, "cola": 12, "qqp": 2},
        "recover_hidden": {"mrpc": 12, "sst2": 8, "qnli": 6, "mnli": 3, "cola": 10, "qqp": 3},
        "recover": {"mrpc": 5, "sst2": 3, "qnli": 3, "mnli": 2, "cola": 5, "qqp": 2},
    },
}
_SMALL = 10_000
"""Below this many training examples half of a cycle compares hidden states only, else seven tenths."""


def column(name: str, n_train: int) -> str:
    """Name the published task whose epochs fit a task: of the same name, else of the nearest size.

    Example:
        >>> column("SST-2", 20_000), column("rte", 2_490), column("tickets", 300_000)
        ('sst2', 'mrpc', 'qqp')
    """
    plain = "".join(c for c in name.lower() if c.isalnum())
    named = [task for task in (*COLUMNS, "rte") if plain.startswith(task)]
    if named:
        return "mrpc" if named[0] == "rte" else named[0]
    return min(COLUMNS, key=lambda task: abs(math.log(COLUMNS[task] / max(1, n_train))))


def stages(preset: str, task: str, n_train: int, kept: float, batch_size: int = 32) -> Stages:
    """Return the stages of a preset.

    Args:
        preset: ``"fast"`` or ``"paper"``.
        task: The task's name, by which ``paper`` finds its epochs.
        n_train: Training examples.
        kept: Share of the heads that is kept; ``paper`` has rows for 2, 4 and 6 of 12.
        batch_size: Examples a step; ``paper`` has rates for 32 and, from 64, others.

    Raises:
        UnknownName: There is no such preset.

    Example:
        >>> stages("paper", "mrpc", 3_668, kept=2 / 12).slenderise.epochs
        20
    """
    if preset not in ("fast", "paper"):
        raise unknown("preset", preset, ("fast", "paper"))
    share = 0.5 if n_train < _SMALL else 0.7
    return _fast(share) if preset == "fast" else _paper(column(task, n_train), share, kept, batch_size >= 64)


def _fast(share: float) -> Stages:
    half: Any = {"every_block": False}
    return Stages(
        finetune=Stage("finetune", 5e-5, tokens=400_000, answers="labels", choose="best"),
        assistant_hidden=None,
        assistant=Stage("assistant", 5e-5, tokens=300_000, answers="assistant", choose="best"),
        slenderise=Stage("slenderise", 3e-5, tokens=400_000, hidden=True, answers="exits", growth=1.12,
                         hidden_share=share, **half),
        recover_hidden=Stage("recover_hidden", 2e-4, tokens=200_000, hidden=True, **half),
        recover=Stage("recover", 1e-4, tokens=3_000_000, hidden=True, answers="exits", choose="best", **half),
        raw_assistant=False, n_cuts=5, score_examples=None, score_tokens=20_000, n_checks=5,
    )  # fmt: skip


def _paper(task: str, share: float, kept: float, large: bool) -> Stages:
    epochs = _BY_HEADS[min(_BY_HEADS, key=lambda heads: abs(heads / 12 - kept))]
    first, rate = _FINETUNE[task], 3e-5 if large else 2e-5
    return Stages(
        finetune=Stage("finetune", rate, epochs=first, answers="labels", choose="best"),
        assistant_hidden=Stage("assistant_hidden", rate, epochs=max(1, first // 3), hidden=True),
        assistant=Stage("assistant", rate, epochs=first, answers="assistant", choose="best"),
        slenderise=Stage("slenderise", 1e-5, epochs=epochs["slenderise"][task], hidden=True, answers="exits",
                         growth=1.15 if large else 1.12, hidden_share=share),
        recover_hidden=Stage("recover_hidden", 4e-5 if large else 3e-5, epochs=epochs["recover_hidden"][task],
                             hidden=True),
        recover=Stage("recover", rate, epochs=epochs["recover"][task], hidden=True, answers="exits", choose="best"),
        raw_assistant=True, n_cuts=None, score_examples=4096, score_tokens=None, n_checks=1,
    )  # fmt: skip
