"""What every exit says about every example of a split: after one run at full depth, any threshold is a look-up.

`read_table` runs the network; the rest is arithmetic on arrays: temperatures, the grid of thresholds, who leaves where,
and what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .rules import ALWAYS, TOLERANCE, Floats, Ints, Rule, State, advance, log_softmax, uncertainty

if TYPE_CHECKING:
    from .base import Size, Widths

__all__ = ["Costs", "Table", "fit_temperatures", "flops_costs", "grid", "read_table", "scan", "unsure"]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Table:
    """The logits of all exits on one split, at full depth.

    Args:
        logits: (exits, n, classes); one class means a regression.
        exits: The blocks of the exits, ascending; the last is the network's last block.
        labels: (n): class numbers, or targets in the unit of the logits; None if unknown.
        lengths: (n): real tokens of each example.

    Raises:
        UserError: Shapes do not fit one another, or there is no example.
    """

    logits: Array
    exits: tuple[int, ...]
    labels: Array | None
    lengths: Ints

    def __post_init__(self) -> None:
        shape = np.shape(self.logits)
        if len(shape) != 3 or 0 in shape:
            raise UserError(f"A table of logits has the shape (exits, examples, classes), none of them 0; got {shape}.")
        counts = {"exits": (len(self.exits), shape[0]), "lengths": (len(self.lengths), shape[1])}
        if self.labels is not None:
            counts["labels"] = (len(self.labels), shape[1])
        for name, (got, wanted) in counts.items():
            if got != wanted:
                raise UserError(f"The table's {name} must have {wanted} entries to fit its logits {shape}; got {got}.")

    @property
    def n(self) -> int:
        """How many examples there are."""
        return int(self.logits.shape[1])

    @property
    def classes(self) -> int:
        """Width of the logits."""
        return int(self.logits.shape[2])

    @property
    def n_blocks(self) -> int:
        """Blocks of the network."""
        return self.exits[-1] + 1

    def answers(self) -> Array:
        """Return every exit's answer: the class, or the number of a regression; (exits, n)."""
        if self.classes == 1:
            return np.asarray(self.logits[..., 0], dtype=np.float64)
        return np.asarray(self.logits.argmax(axis=-1))

    def taken(self, where: Ints, values: Array | None = None) -> Array:
        """Pick each example's entry at the exit that it takes.

        Args:
            where: Blocks, (n) or (n, thresholds).
            values: (exits, n, ...), by default the logits.

        Returns:
            (n, ...) or (n, thresholds, ...).
        """
        picked = self.logits if values is None else values
        rows = np.arange(self.n).reshape(-1, *[1] * (where.ndim - 1))
        return np.asarray(picked[np.searchsorted(self.exits, where), rows])


def read_table(network: Any, batches: Iterable[Mapping[str, Any]]) -> Table:
    """Run a network once at full depth over a split.

    A regression's labels are brought into the unit of its logits.

    Args:
        network: A slim network; its dropout is off while it is read.
        batches: Dictionaries with `input_ids`, `attention_mask`, and where known `token_type_ids`, `labels`, and
            `index`: each example's place in the table, without which examples stand in the order of the batches.
    """
    import torch

    columns: dict[str, list[Array]] = {"logits": [], "labels": [], "lengths": [], "index": []}
    training, exits = network.training, tuple(network.widths.exits)
    network.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
                said = network.levels(**{k: v.to(network.device) for k, v in inputs.items()}).logits
                columns["logits"].append(torch.stack([said[l] for l in exits]).cpu().double().numpy())
                columns["lengths"].append(batch["attention_mask"].sum(1).cpu().numpy())
                for name in ("labels", "index"):
                    if batch.get(name) is not None:
                        columns[name].append(np.asarray(torch.as_tensor(batch[name]).cpu()))
    finally:
        network.train(training)
    if network.config.task == "regression":
        mean, scale = network.config.target_mean, network.config.target_scale
        columns["labels"] = [(np.asarray(y, dtype=np.float64) - mean) / scale for y in columns["labels"]]
    return _joined(columns, exits)


def _joined(columns: dict[str, list[Array]], exits: tuple[int, ...]) -> Table:
    if not columns["logits"]:
        raise UserError("There is no example to read a table from.")
    logits, lengths = np.concatenate(columns["logits"], axis=1), np.concatenate(columns["lengths"])
    labels = np.concatenate(columns["labels"]) if columns["labels"] else None
    if columns["index"]:
        order = np.concatenate(columns["index"]).argsort(kind="stable")
        logits, lengths = logits[:, order], lengths[order]
        labels = labels[order] if labels is not None else None
    return Table(logits, exits, labels, lengths)


# ---------------------------------------------------------------- temperatures

_LN_RANGE = 3.0
_GOLDEN = (math.sqrt(5) - 1) / 2


def fit_temperatures(valid: Table, n_steps: int = 40) -> tuple[float, ...]:
    """Find for each exit the temperature at which its probabilities fit the labels best.

    A temperature changes no answer; it makes one threshold mean the same at each exit. A regression gets ones.

    Source:
        Guo et al. (2017), On Calibration of Modern Neural Networks; golden section over ln T from -3 to 3.

    Args:
        valid: With labels. Not the split that the threshold is chosen on.
        n_steps: Each makes the interval shorter by 0.618.

    Raises:
        UserError: There are no labels.
    """
    if valid.classes == 1:
        return (1.0,) * len(valid.exits)
    if valid.labels is None:
        raise UserError("Temperatures are fitted to labels, and these examples have none.")
    labels = np.asarray(valid.labels, dtype=np.int64)
    return tuple(_temperature(np.asarray(z, dtype=np.float64), labels, n_steps) for z in valid.logits)


def _temperature(logits: Floats, labels: Ints, n_steps: int) -> float:
    def nll(ln_temperature: float) -> float:
        log_p = log_softmax(logits * math.exp(-ln_temperature))
        return -float(log_p[np.arange(len(labels)), labels].mean())

    low, high = -_LN_RANGE, _LN_RANGE
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = nll(left), nll(right)
    for _ in range(n_steps):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = nll(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = nll(right)
    return math.exp((low + high) / 2)


# ---------------------------------------------------------------- thresholds


def unsure(table: Table, rule: Rule) -> Floats:
    """Return each example's uncertainty at each exit that is asked, (asked, n)."""
    rule.check(table.exits, table.classes)
    state: State | None = None
    found = []
    for block in rule.due(table.exits):
        state = advance(state, table.logits[table.exits.index(block)], rule.tolerance)
        found.append(uncertainty(rule.name, state, table.n_blocks, rule.temperature(table.exits, block)))
    return np.stack(found)


def grid(valid: Table, rule: Rule, n_points: int = 100) -> Floats:
    """Return thresholds to try, from never leaving early to always at the first exit, ascending.

    Between 0 and `ALWAYS` lie quantiles of the uncertainties at all exits but the last, for patience every count.

    Args:
        valid: Not the split that the threshold is chosen on: a grid has to stand before that one is looked at.
        rule: Which exits are asked, and how.
        n_points: How many quantiles.
    """
    early = unsure(valid, rule)[:-1]
    if rule.name == "patience":
        counts = np.arange(len(early) - 1, 0, -1)
        inner = 1 - (counts - 0.5) / valid.n_blocks  # between the uncertainties after `counts` exits and after one less
    else:
        inner = np.quantile(early, np.linspace(0, 1, n_points)) if early.size else np.empty(0)
    return np.unique(np.concatenate([[0.0], inner, [ALWAYS]]))


def scan(
    table: Table,
    rule: str,
    lambdas: Sequence[float] | Floats,
    every: int = 1,
    min_block: int = 0,
    *,
    temperatures: Sequence[float] | None = None,
    tolerance: float = TOLERANCE,
) -> Ints:
    """Return the block whose exit each example takes at each threshold, (n, thresholds).

    Args:
        table: Logits of all exits.
        rule: See `Rule`.
        lambdas: Thresholds.
        every: See `Rule`.
        min_block: See `Rule`.
        temperatures: See `Rule`.
        tolerance: See `Rule`.
    """
    given = None if temperatures is None else tuple(temperatures)
    return leaving(table, Rule(rule, given, every, min_block, tolerance), lambdas)


def leaving(table: Table, rule: Rule, lambdas: Sequence[float] | Floats) -> Ints:
    """Do as `scan`, for a rule that is whole."""
    thresholds = np.asarray(lambdas, dtype=np.float64)
    early = unsure(table, rule)[:-1]
    lowest = np.minimum.accumulate(np.where(np.isnan(early), np.inf, early), axis=0)
    stayed = np.zeros((table.n, thresholds.size), dtype=np.int64)
    for u in lowest:
        stayed += u[:, None] >= thresholds
    return np.asarray(rule.due(table.exits), dtype=np.int64)[stayed]


# ---------------------------------------------------------------- costs


@dataclass(frozen=True, eq=False)
class Costs:
    """What examples cost, in FLOPs or in seconds.

    Attributes:
        spent: Of leaving after each block, the exits asked on the way included, (n, blocks).
        base: Of the original model, (n).
    """

    spent: Floats
    base: Floats

    def share(self, where: Ints) -> Floats:
        """Return the total cost over the original's, (thresholds) for `where` of shape (n, thresholds)."""
        return np.asarray(np.take_along_axis(self.spent, where, axis=1).sum(axis=0) / self.base.sum())

    def ratios(self, where: Ints) -> Floats:
        """Return each example's cost over the original's, (n, thresholds)."""
        return np.asarray(np.take_along_axis(self.spent, where, axis=1) / self.base[:, None])

    def highest(self) -> float:
        """Return the largest ratio that an example can reach, at least 1."""
        return max(1.0, float((self.spent / self.base[:, None]).max()))


def flops_costs(table: Table, size: Size, widths: Widths, rule: Rule) -> Costs:
    """Count FLOPs of each example at its own length, without padding.

    Args:
        table: Its lengths are used.
        size: Of the original.
        widths: Of the slim network.
        rule: Which exits are asked.
    """
    from .widths import base_cost, cost

    asked = rule.due(table.exits)
    n_asked = [sum(a <= l for a in asked) for l in range(table.n_blocks)]
    lengths, place = np.unique(table.lengths, return_inverse=True)
    spent = [[cost(size, widths, int(t), l, n_asked[l]) for l in range(table.n_blocks)] for t in lengths]
    base = [base_cost(size, int(t)) for t in lengths]
    return Costs(np.asarray(spent, dtype=np.float64)[place], np.asarray(base, dtype=np.float64)[place])
