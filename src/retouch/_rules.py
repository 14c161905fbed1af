"""When a row may leave: how unsure an exit is, from 0 (sure) to 1, and which exits are asked.

A row leaves at the first exit that is asked and whose uncertainty lies below the threshold, strictly. A threshold of 0
lets nobody leave early, one above 1 lets everybody leave at the first exit that is asked. All is float64 on the CPU,
for tables of logits, a running network and an exported one alike, so that a threshold means the same in all. Loads no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import SettingsError, unknown

__all__ = ["ALWAYS", "RULES", "TOLERANCE", "Rule", "State", "advance", "due", "fitting", "log_softmax", "uncertainty"]

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

RULES = ("entropy", "max_prob", "margin", "patience", "delta")
"""How a row's uncertainty may be read from an exit."""

SOFTMAX = ("entropy", "max_prob", "margin")

ALWAYS = 2.0
"""A threshold above every uncertainty: all leave at the first exit that is asked. Finite, so that JSON can hold it."""

TOLERANCE = 0.05
"""How far two exits' predictions may lie apart and still agree, for `patience` on a regression; in the unit of z."""


@dataclass(frozen=True)
class Rule:
    """How a row decides to leave; together with a threshold it is the whole of it.

    Args:
        name: ``entropy`` (of the probabilities, over its largest value), ``max_prob`` (what the likeliest class lacks),
            ``margin`` (one minus the lead of the first class over the second), ``patience`` (exits in a row that agree,
            as a share of the blocks, taken from one) or, on a regression, ``delta`` (the step since the exit before).
        temperatures: By exit, in the order of the network's exits; its logits are divided by it. None: all are 1.
        every: Ask only exits after every so many blocks, and the last.
        min_block: The first block whose exit is asked.
        tolerance: See `TOLERANCE`.

    Raises:
        SettingsError: A field has a value that it does not allow.
    """

    name: str = "entropy"
    temperatures: tuple[float, ...] | None = None
    every: int = 1
    min_block: int = 0
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise unknown("exit rule", self.name, RULES)
        if self.every < 1:
            raise SettingsError(f"every must be at least 1; got {self.every!r}.")
        if self.min_block < 0:
            raise SettingsError(f"min_block must be at least 0; got {self.min_block!r}.")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise SettingsError(f"tolerance must be a finite number from 0; got {self.tolerance!r}.")
        self._take_temperatures()

    def _take_temperatures(self) -> None:
        if self.temperatures is None:
            return
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        if not all(math.isfinite(t) and t > 0 for t in self.temperatures):
            raise SettingsError(f"temperatures must be finite and above 0; got {list(self.temperatures)}.")

    def due(self, exits: Sequence[int]) -> tuple[int, ...]:
        """Return the blocks whose exits are asked; the last always is."""
        return due(exits, self.every, self.min_block)

    def temperature(self, exits: Sequence[int], block: int) -> float:
        """Return the temperature of one exit."""
        return 1.0 if self.temperatures is None else self.temperatures[list(exits).index(block)]

    def check(self, exits: Sequence[int], classes: int) -> None:
        """Refuse a rule that says nothing about such a network.

        Raises:
            SettingsError: The message names the field.
        """
        if self.name not in fitting(classes):
            raise SettingsError(
                f"rule must be 'patience' or 'delta' where an exit gives one number; got {self.name!r}: the softmax of "
                "one number is always 1, so every row would leave at once."
                if classes < 2
                else "rule 'delta' is for regression; choose 'patience' to compare classes between exits."
            )
        if self.temperatures is not None and len(self.temperatures) != len(exits):
            raise SettingsError(
                f"temperatures must hold one number for each of the {len(exits)} exits; got {len(self.temperatures)}."
            )


def fitting(classes: int) -> tuple[str, ...]:
    """Return the rules that say something where an exit gives so many numbers.

    Example:
        >>> fitting(1), fitting(2)
        (('patience', 'delta'), ('entropy', 'max_prob', 'margin', 'patience'))
    """
    return tuple(rule for rule in RULES if rule not in (SOFTMAX if classes < 2 else ("delta",)))


def due(exits: Sequence[int], every: int = 1, min_block: int = 0) -> tuple[int, ...]:
    """Return the blocks whose exits are asked.

    Args:
        exits: Blocks that have an exit, ascending.
        every: Ask only after every so many blocks, and at the last.
        min_block: The first block whose exit is asked.

    Example:
        >>> due([0, 1, 2, 3, 4], every=2), due([0, 1, 2], min_block=9)
        ((1, 3, 4), (2,))
    """
    return tuple(l for l in exits if l == exits[-1] or (l >= min_block and (l + 1) % every == 0))


@dataclass(frozen=True, eq=False)
class State:
    """What the exits that were asked so far said about each row.

    Attributes:
        last: The last exit's logits, (rows, classes).
        count: For how many exits the prediction has stayed the same, (rows).
        step: How far the prediction moved since the exit before, (rows); infinite at the first.
    """

    last: Floats
    count: Ints
    step: Floats

    def take(self, rows: NDArray[Any]) -> State:
        """Keep some rows, chosen by index or by a mask."""
        return State(self.last[rows], self.count[rows], self.step[rows])


def advance(state: State | None, logits: Any, tolerance: float = TOLERANCE) -> State:
    """Let one more exit speak; None stands before the first one.

    Shapes: logits (rows, classes); a class agrees if it is the same, a single number if it moved less than `tolerance`.
    """
    z = _floats(logits)
    if state is None:
        return State(z, np.zeros(len(z), dtype=np.int64), np.full(len(z), np.inf))
    step = np.abs(z - state.last).max(axis=1, initial=0.0)
    same = step < tolerance if z.shape[1] == 1 else z.argmax(axis=1) == state.last.argmax(axis=1)
    return State(z, np.where(same, state.count + 1, 0), step)


def uncertainty(rule: str, state: State, n_blocks: int, temperature: float = 1.0) -> Floats:
    """Return how unsure the exit that spoke last is about each row, from 0 to 1.

    Source:
        Entropy: Xin et al. (2020), DeeBERT. Patience: Zhou et al. (2020), PABEE, its counter turned into a number.

    Args:
        rule: One of `RULES`.
        state: Of `advance`.
        n_blocks: Of the network; patience is counted in its units.
        temperature: Of the exit that spoke.

    Returns:
        Shape (rows).

    Example:
        >>> uncertainty("entropy", advance(None, [[0.0, 0.0], [0.0, 1e4]]), 2).tolist()
        [1.0, 0.0]
    """
    if rule == "patience":
        return np.asarray(np.clip(1 - state.count / n_blocks, 0.0, 1.0))
    if rule == "delta":
        return np.asarray(np.minimum(1.0, state.step))
    if rule not in SOFTMAX:
        raise unknown("exit rule", rule, RULES)
    return np.asarray(np.clip(_SPREADS[rule](log_softmax(state.last / temperature)), 0.0, 1.0))


def log_softmax(logits: Floats) -> Floats:
    """Return log-probabilities over the last axis; every one is finite if the logits are."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _entropy(log_p: Floats) -> Floats:
    # from log-probabilities: a probability that underflows to 0 meets a finite number and adds 0, never NaN
    return np.asarray((np.exp(log_p) * -log_p).sum(axis=-1) / math.log(log_p.shape[-1]))


def _max_prob(log_p: Floats) -> Floats:
    classes = log_p.shape[-1]
    return np.asarray((1 - np.exp(log_p.max(axis=-1))) * classes / (classes - 1))


def _margin(log_p: Floats) -> Floats:
    first_two = np.exp(np.partition(log_p, -2, axis=-1)[..., -2:])
    return np.asarray(1 - (first_two[..., 1] - first_two[..., 0]))


_SPREADS = {"entropy": _entropy, "max_prob": _max_prob, "margin": _margin}


def _floats(values: Any) -> Floats:
    """Take numbers or a tensor of any device and type."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
