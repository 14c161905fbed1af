"""When what happens in a stage: its steps, cycles, cuts, learning rates and checks. Arithmetic only, no torch.

A stage is a row of cycles. An ordinary stage has one; the stage that slenderises has one before each cut, so that the
last cut falls at its end. Steps count from 0 inside a stage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UserError
from .base import Size, Widths
from .presets import Stage

__all__ = ["Cycle", "Timetable", "checks", "learning_rate", "n_cuts", "steps", "timetable", "widths_after"]


@dataclass(frozen=True)
class Cycle:
    """Steps between two cuts.

    Args:
        first: The stage's step that it begins with.
        n_steps: How many steps it has.
        peak: The learning rate after the warm-up.
        n_warmup: Steps of the warm-up.
        n_hidden: Steps, at its start, that compare hidden states only.
        cut: The widths that it ends with; None: nothing is cut.
    """

    first: int
    n_steps: int
    peak: float
    n_warmup: int
    n_hidden: int = 0
    cut: Widths | None = None

    @property
    def end(self) -> int:
        """The step after its last one."""
        return self.first + self.n_steps

    def rate(self, step: int) -> float:
        """Return the learning rate of the stage's `step`."""
        return learning_rate(step - self.first, self.n_steps, self.peak, self.n_warmup)


@dataclass(frozen=True)
class Timetable:
    """A stage's cycles, and after how many steps its state is checked on the validation set."""

    cycles: tuple[Cycle, ...]
    checks: tuple[int, ...]

    @property
    def n_steps(self) -> int:
        """Steps of the whole stage."""
        return self.cycles[-1].end


def learning_rate(step: int, n_steps: int, peak: float, n_warmup: int) -> float:
    """Return the rate of one step: linear up to `peak` in `n_warmup` steps, then linear towards 0 at the end.

    No step has a rate of 0, since such a step would teach nothing.

    Example:
        >>> [learning_rate(step, 5, 1.0, 2) for step in range(5)]
        [0.5, 1.0, 1.0, 0.6666666666666666, 0.3333333333333333]
    """
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    return peak * (n_steps - step) / (n_steps - n_warmup)


def checks(n_steps: int, n: int) -> tuple[int, ...]:
    """Return `n` equally distant numbers of finished steps, the last being `n_steps`; fewer where steps are few."""
    return tuple(sorted({math.ceil(n_steps * i / n) for i in range(1, n + 1)}))


def steps(stage: Stage, tokens_of: Iterable[int], batches_per_epoch: int) -> int:
    """Return how many steps a stage has.

    Args:
        stage: With its length in epochs or tokens.
        tokens_of: Padded tokens of each batch in the order of training, without end; read only for a length in tokens.
        batches_per_epoch: Batches of one pass through the data.

    Raises:
        UserError: There are no batches.
    """
    if batches_per_epoch < 1:
        raise UserError(f"Stage {stage.name!r} has no examples to train on.")
    if stage.epochs is not None:
        return max(1, round(stage.epochs * batches_per_epoch))
    seen = 0
    for done, tokens in enumerate(tokens_of, 1):
        seen += tokens
        if seen >= (stage.tokens or 0):
            return done
    raise UserError(f"Stage {stage.name!r} ran out of batches after {seen:,} of {stage.tokens:,} tokens.")


def timetable(stage: Stage, n_steps: int, n_checks: int, cuts: tuple[Widths, ...] = ()) -> Timetable:
    """Lay out a stage.

    Args:
        stage: Its rates and shares.
        n_steps: How long it is; at least one step a cut is made of it.
        n_checks: How often its state is checked, if the best one is kept.
        cuts: The widths after each cut; none for an ordinary stage.
    """
    n_steps = max(n_steps, len(cuts), 1)
    bounds = [n_steps * i // max(1, len(cuts)) for i in range(max(1, len(cuts)) + 1)]
    cycles = []
    for i, (first, end) in enumerate(itertools.pairwise(bounds)):
        length = end - first
        warmup = math.ceil(length / 10)
        if cuts:  # a fresh optimiser needs some steps, a short cycle the rest
            warmup = min(max(10, warmup), length // 2)
        hidden = math.floor(length * stage.hidden_share) if stage.hidden else 0
        peak = stage.learning_rate * stage.growth**i
        cycles.append(Cycle(first, length, peak, warmup, hidden, cuts[i] if cuts else None))
    return Timetable(tuple(cycles), checks(n_steps, n_checks) if stage.choose == "best" else ())


def n_cuts(size: Size, widths: Widths, asked: int | None = None) -> int:
    """Return in how many cuts widths are reached: as asked, else one a head, and 4 where no head goes; 0 if nothing goes.

    Source: Shen et al. 2022.
    """
    if (widths.heads, widths.d_ff, widths.rank) == ((size.heads,) * size.blocks, (size.d_ff,) * size.blocks, None):
        return 0
    return asked or (size.heads - min(widths.heads)) or 4


def widths_after(size: Size, widths: Widths, cut: int, of: int) -> Widths:
    """Return the widths after some of the cuts, on the straight line from the original to the goal, rounded.

    The embedding stays one table until its rank pays: below V d / (V + d).

    Source: Shen et al. 2022.

    Args:
        size: The original.
        widths: The goal.
        cut: How many cuts are made, 1 to `of`.
        of: Cuts in all.
    """
    if not 1 <= cut <= of:
        raise UserError(f"Cut {cut} does not exist: cuts count from 1 to {of}.")
    heads = tuple(size.heads - _nearest((size.heads - n) * cut, of) for n in widths.heads)
    d_ff = tuple(size.d_ff - _up((size.d_ff - f) * cut, of) for f in widths.d_ff)
    rank = None if widths.rank is None else size.d_model - _up((size.d_model - widths.rank) * cut, of)
    pays = rank is not None and rank * (size.vocab + size.d_model) < size.vocab * size.d_model
    return Widths(heads, d_ff, rank if pays or cut == of else None, widths.exits)


def _nearest(above: int, below: int) -> int:
    return (2 * above + below) // (2 * below)


def _up(above: int, below: int) -> int:
    """Divide and round up: what is cut is rounded up, so what is kept is rounded down."""
    return -(-above // below)
