"""One cut: score on training examples, choose, slice, factorise the embedding. All processes cut alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from .base import Widths
from .encoded import Encoded, order, padded
from .presets import Stages
from .scores import Scores, score
from .shrink import choose, choose_globally, factorised, sliced
from .teaching import Spoken, numbered

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .network import SlimForSequenceClassification

__all__ = ["How", "Loss", "Scoring", "cut", "token_counts"]

How = Literal["gates", "paper", "qkvo", "grain", "magnitude", "random"]
Loss = Literal["exits_ce", "paper", "final_only"]


@dataclass(frozen=True)
class Scoring:
    """What is cut, and how it is found.

    Args:
        how: The score.
        loss: The loss that the score is the slope of.
        spread: ``uniform`` widths in all blocks, or the blocks compete for the same total (``global``).
        weighted: Whether the embedding's factors mind how often a token occurs.
        n_cuts: Cuts in all; None: the preset's.
        n_examples: Examples scored before a cut; None: by tokens.
        n_tokens: Padded tokens scored before a cut.
    """

    how: How = "gates"
    loss: Loss = "exits_ce"
    spread: Literal["uniform", "global"] = "uniform"
    weighted: bool = True
    n_cuts: int | None = None
    n_examples: int | None = None
    n_tokens: int | None = None

    def limited(self, stages: Stages) -> Scoring:
        """Return this with the preset's number of examples or tokens, where none is stated."""
        if self.n_examples is not None or self.n_tokens is not None:
            return self
        return replace(self, n_examples=stages.score_examples, n_tokens=stages.score_tokens)


def token_counts(ids: Iterable[Sequence[int]], vocab: int) -> Tensor:
    """Count how often each token occurs, (vocab,) float64."""
    flat = torch.tensor(list(itertools.chain.from_iterable(ids)), dtype=torch.long)
    return torch.bincount(flat, minlength=vocab).double()


def cut(
    accelerator: Accelerator,
    network: SlimForSequenceClassification,
    widths: Widths,
    teacher: SlimForSequenceClassification,
    encoded: Encoded,
    scoring: Scoring,
    *,
    counts: Tensor | None,
    batch_size: int,
    seed: int,
    equilibrium: bool,
) -> SlimForSequenceClassification:
    """Return a smaller network of the given widths.

    Args:
        accelerator: Where it runs.
        network: What is cut; it is left as it is.
        widths: The widths to reach with this cut.
        teacher: Whose answers the scores compare with; of its last exit for all where it has not the network's exits.
        encoded: The training examples.
        scoring: How the units are found.
        counts: How often each token occurs; None: all alike.
        batch_size: Examples a batch.
        seed: Of which examples are scored, and of random scores.
        equilibrium: Whether the slopes flow down as means over exits.
    """
    shown: Any = teacher
    if set(network.widths.exits) - set(teacher.widths.exits):
        shown = Spoken(teacher, network.widths.exits)
    scores = _scores(accelerator, network, shown, _rows(encoded, scoring, batch_size, seed), encoded, scoring, seed,
                     equilibrium)  # fmt: skip
    uniform = scoring.spread == "uniform"
    kept = choose(scores, widths) if uniform else choose_globally(scores, network.size, widths)
    smaller = sliced(network, kept)
    return smaller if widths.rank is None else factorised(smaller, widths.rank, counts)


def _rows(encoded: Encoded, scoring: Scoring, batch_size: int, seed: int) -> list[list[int]]:
    """Draw the batches to score: each example once at most, as many as fit."""
    seen, chosen = 0, []
    limit = scoring.n_tokens if scoring.n_examples is None else scoring.n_examples
    for rows in order(encoded, batch_size, seed=seed):
        if limit is not None and seen >= limit:
            break
        seen += len(rows) if scoring.n_examples is not None else padded(encoded, rows)
        chosen.append(rows)
    return chosen


def _scores(
    accelerator: Accelerator,
    network: SlimForSequenceClassification,
    teacher: Any,
    work: list[list[int]],
    encoded: Encoded,
    scoring: Scoring,
    seed: int,
    equilibrium: bool,
) -> Scores:
    """Score, each process its batches; all end with the same numbers."""
    world, me = accelerator.num_processes, accelerator.process_index
    # a running mean depends on the order, and a process without a batch has no score
    shared = world > 1 and scoring.how in ("gates", "paper", "qkvo") and len(work) >= world
    mine = work[me::world] if shared else work
    batches = [numbered(encoded, rows, accelerator.device) for rows in mine]
    with accelerator.autocast():
        found = score(network, teacher, batches, how=scoring.how, loss=scoring.loss, seed=seed, equilibrium=equilibrium)
    return _summed(accelerator, found, mean=scoring.how == "gates") if shared else found


def _summed(accelerator: Accelerator, scores: Scores, mean: bool) -> Scores:
    """Add up the processes' scores; means are weighted by their examples."""
    sizes = [len(unit) for unit in (*scores.heads, *scores.neurons)]
    weight = float(scores.n_examples) if mean else 1.0
    flat = torch.cat([*scores.heads, *scores.neurons]) * weight
    packed = torch.cat([flat, torch.tensor([weight, scores.n_examples], dtype=flat.dtype)]).to(accelerator.device)
    total = cast(Tensor, accelerator.reduce(packed, "sum")).cpu()
    units = list(torch.split(total[:-2] / (total[-2] if mean else 1.0), sizes))
    half = len(scores.heads)
    return Scores(units[:half], units[half:], int(total[-1]))
