"""What a causal language model keeps of the titles before the instructions: keys and values, computed once.

A state at a title depends on the titles before it and on nothing that is trained. One pass over a user's window
therefore serves every shorter history that begins alike: its rows are the first rows of the same entry. Windows that
were not prepared, or found no room, are computed whenever they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..progress import track

__all__ = ["Embedded", "TitleCache"]

_ROWS = 64


class Embedded:
    """The titles of a catalogue as rows of input for a language model.

    Args:
        rows: The input embeddings of all titles' positions, one title after the other, (all positions, d_llm).
        counts: Positions of each title, at least one; counts[i - 1] is item i's.
    """

    def __init__(self, rows: Tensor, counts: Sequence[int]) -> None:
        self.rows = rows
        self.counts = np.concatenate([[0], np.asarray(counts, np.int64)])
        self.starts = np.cumsum(self.counts) - self.counts

    def places(self, items: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the rows of these items' titles, in order."""
        counts = self.counts[items]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found: NDArray[np.int64] = np.repeat(self.starts[items], counts) + within
        return found

    def length(self, items: NDArray[np.int32]) -> int:
        """Return how many positions these items' titles take."""
        return int(self.counts[items].sum())

    def batch(self, histories: Sequence[NDArray[np.int32]], *, left: bool) -> tuple[Tensor, Tensor]:
        """Return the inputs of some histories, padded on one side, and which positions are real.

        Shapes:
            (batch, positions, d_llm), (batch, positions)
        """
        places = [self.places(items) for items in histories]
        width = max((len(p) for p in places), default=0)
        index = np.zeros((len(places), width), np.int64)
        mask = np.zeros((len(places), width), bool)
        for row, p in enumerate(places):
            at = slice(width - len(p), width) if left else slice(0, len(p))
            index[row, at], mask[row, at] = p, True
        device = self.rows.device
        held = torch.from_numpy(mask).to(device)
        return self.rows[torch.from_numpy(index).to(device)] * held[..., None], held


class TitleCache:
    """Keys and values of titles by the items of a window.

    Args:
        llm: A decoder without its head, as transformers calls it.
        embedded: The titles.
        budget_mib: Memory for what is kept; 0 keeps nothing.
        dtype: How it is kept.
    """

    def __init__(self, llm: Any, embedded: Embedded, budget_mib: float, dtype: torch.dtype) -> None:
        self.llm, self.embedded, self.dtype = llm, embedded, dtype
        self.budget = int(budget_mib * 2**20)
        self.n_computed = 0
        self._starts: dict[bytes, int] = {}
        self._pool: Tensor | None = None
        self._used = 0

    @property
    def used_mib(self) -> float:
        """How much memory the kept rows take."""
        return (
            0.0 if self._pool is None else (self._used - 1) * self._pool[0].numel() * self._pool.element_size() / 2**20
        )

    def prepare(self, histories: Sequence[NDArray[np.int32]]) -> None:
        """Compute and keep what these histories need, longest first, as far as the memory goes."""
        wanted: list[NDArray[np.int32]] = []
        planned: set[bytes] = set()
        for items in sorted(histories, key=len, reverse=True):
            if len(items) and items.tobytes() not in planned and items.tobytes() not in self._starts:
                planned.update(items[:n].tobytes() for n in range(1, len(items) + 1))
                wanted.append(items)
        batches = [wanted[i : i + _ROWS] for i in range(0, len(wanted), _ROWS)]
        for batch in track(batches, "Reading the titles with the language model"):
            if self._full(batch):
                break
            self._keep(batch, self.compute(batch))

    def gather(self, histories: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
        """Return the keys and values of some histories, padded on the left, and which positions are real.

        Shapes:
            (batch, positions, blocks, 2, heads, d_head), (batch, positions)
        """
        missing = [i for i, items in enumerate(histories) if len(items) and items.tobytes() not in self._starts]
        # not kept: what is kept was computed in the same batches in every run, so runs agree to the last bit
        fresh = self.compute([histories[i] for i in missing]) if missing else None
        return self._collect(histories, missing, fresh)

    def _collect(
        self, histories: Sequence[NDArray[np.int32]], missing: list[int], fresh: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        lengths = [self.embedded.length(items) for items in histories]
        width, skipped = max(lengths, default=0), set(missing)
        index = np.zeros((len(histories), width), np.int64)
        mask = np.zeros((len(histories), width), bool)
        for row, (items, length) in enumerate(zip(histories, lengths)):
            mask[row, width - length :] = True
            if length and row not in skipped:
                start = self._starts[items.tobytes()]
                index[row, width - length :] = np.arange(start, start + length)
        device = self.embedded.rows.device
        pool = self._pool if self._pool is not None else fresh[0, :1] if fresh is not None else self._nothing()
        past = pool[torch.from_numpy(index).to(device)].to(self.embedded.rows.dtype)
        for place, row in enumerate(missing):
            assert fresh is not None
            past[row, width - lengths[row] :] = fresh[place, : lengths[row]].to(past.dtype)
        return past, torch.from_numpy(mask).to(device)

    def _nothing(self) -> Tensor:
        """Return one row of the right shape, for histories that are all empty."""
        return self.compute([np.ones(1, np.int32)])[0, :1]

    @torch.no_grad()
    def compute(self, histories: Sequence[NDArray[np.int32]]) -> Tensor:
        """Run the language model over the titles of some histories; rows behind a history's end mean nothing.

        Shapes:
            (batch, positions, blocks, 2, heads, d_head)
        """
        from transformers import DynamicCache

        inputs, _ = self.embedded.batch(histories, left=False)  # causal: what follows a title does not reach it
        self.n_computed += len(histories)
        places = torch.arange(inputs.shape[1], device=inputs.device)[None].expand(len(inputs), -1)
        known = DynamicCache()
        self.llm(
            inputs_embeds=inputs,
            attention_mask=torch.ones_like(places),
            position_ids=places,
            past_key_values=known,
            use_cache=True,
        )
        layers = [torch.stack([layer.keys, layer.values], 1) for layer in known.layers]
        # rounded here too, so that what is kept and what is computed again are the same knowledge
        return torch.stack(layers, 1).permute(0, 4, 1, 2, 3, 5).to(self.dtype)

    def _full(self, histories: Sequence[NDArray[np.int32]]) -> bool:
        if self._pool is None:
            return self.budget == 0
        return self._used + sum(map(self.embedded.length, histories)) > len(self._pool)

    def _keep(self, histories: Sequence[NDArray[np.int32]], computed: Tensor) -> None:
        if self._pool is None:
            one = computed[0, 0]
            n_rows = self.budget // (one.numel() * self.dtype.itemsize)
            # the system hands out pages when they are first written, so a large budget costs nothing before
            self._pool = torch.empty((n_rows + 1, *one.shape), dtype=self.dtype, device=computed.device)
            self._pool[0] = 0  # where padding points: a weight of zero does not help against what is not a number
            self._used = 1
            if self._full(histories):
                return
        for row, items in enumerate(histories):
            length, start = self.embedded.length(items), self._used
            self._pool[start : start + length] = computed[row, :length]
            self._used += length
            for n in range(1, len(items) + 1):
                self._starts.setdefault(items[:n].tobytes(), start)
