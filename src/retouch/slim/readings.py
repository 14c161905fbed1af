"""What a slim network and its original say on each split, and what they cost there; each is run once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..progress import report
from ._bag import Bag
from .clock import between, block_seconds, spread, whole_seconds
from .data import Task, quality
from .encoded import Encoded, collate, encode, order
from .network import SlimForSequenceClassification
from .rules import Rule
from .stages import Fitted
from .table import Costs, Table, flops_costs, read_table
from .widths import base_parameters, parameters

__all__ = ["Tables"]


@dataclass(eq=False)
class Tables:
    """What the slim network and its original say on each split; each is run once."""

    fitted: Fitted
    tokenizer: Any
    task: Task
    max_tokens: int
    found: dict[tuple[str, str], Table] = field(default_factory=dict)

    def of(self, split: str) -> Table:
        """Return what the slim network says."""
        return self._read("slim", self.fitted.network, split)

    def original(self, split: str) -> Table:
        """Return what the original says."""
        return self._read("original", self.fitted.original, split)

    def _read(self, who: str, network: SlimForSequenceClassification, split: str) -> Table:
        if (who, split) not in self.found:
            encoded = self._encoded(split)
            report(f"Reading {split} ({who})", 0, None)
            batch = ({**b, "index": rows} for b, rows in _batches(encoded))
            self.found[who, split] = read_table(network, batch)
        return self.found[who, split]

    def _encoded(self, split: str) -> Encoded:
        types = self.fitted.network.size.token_types
        return encode(self.tokenizer, getattr(self.task, split), self.max_tokens, token_types=types)

    def base(self, split: str) -> float:
        """Return the original's quality."""
        table = self.original(split)
        assert table.labels is not None
        return quality(
            self.task.metric, table.answers()[-1], table.labels, table.classes if table.classes > 1 else None
        )

    @property
    def parameters(self) -> int:
        """Return how many numbers the slim network has."""
        network: Any = self.fitted.network
        return network.n_numbers if isinstance(network, Bag) else parameters(network.size, network.widths)

    @property
    def base_parameters(self) -> int:
        """Return how many numbers the original has."""
        return base_parameters(self.fitted.original.size)

    def costs(self, split: str, rule: Rule, tokens: int | None = None) -> Costs:
        """Return what examples cost in FLOPs: at their own lengths, or as if each had so many tokens."""
        network, original = self.fitted.network, self.fitted.original
        said, reference = (_of_length(t, tokens) for t in (self.of(split), self.original(split)))
        base = flops_costs(reference, original.size, original.widths, Rule())
        if isinstance(network, Bag):
            return replace(base, spent=np.array([[network.flops(int(t))] for t in said.lengths]))
        spent = flops_costs(said, network.size, network.widths, rule)
        return replace(spent, base=base.base)

    def seconds(self, split: str, rule: Rule) -> Costs:
        """Return what examples cost in seconds, measured on batches of several lengths and read off in between."""
        asked = rule.due(self.fitted.network.widths.exits)
        encoded, lengths = self._encoded(split), self.of(split).lengths
        spent, base, at = [], [], []
        for rows in spread(lengths):
            batch = collate(encoded, rows)
            embed, blocks = block_seconds(self.fitted.network, batch, asked=asked)
            spent.append(embed + np.cumsum(blocks))
            base.append([whole_seconds(self.fitted.original, batch)])
            at.append(float(lengths[rows].mean()))
        return Costs(between(lengths, at, spent), between(lengths, at, base)[:, 0])


def _of_length(table: Table, tokens: int | None) -> Table:
    return table if tokens is None else replace(table, lengths=np.full(table.n, tokens))


def _batches(encoded: Encoded) -> Iterator[tuple[dict[str, Any], NDArray[np.int64]]]:
    """Yield batches of similar length with the rows in them."""
    for rows in order(encoded, 32, seed=None):
        yield collate(encoded, rows), np.asarray(rows)
