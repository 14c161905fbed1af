"""The generative recommender: an encoder-decoder that reads a history and writes the next item as a word of codes.

It is T5 in small, with a table of code embeddings and a head for each level, and no token for the user, which is why
people it has never seen can be served. All that a request costs is computed once: the encoder, and for each decoder
block the keys and values of the history; beams only add their own codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RetouchError, UserError
from ._layers import MASKED, DecoderBlock, Dropout, EncoderBlock, Grouping, PositionBias, RMSNorm

__all__ = ["SIZES", "Generator", "GeneratorSize", "Memory", "Steps", "Tokens"]

Tokens = Literal["item", "code"]
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GeneratorSize:
    """The sizes of a generator.

    Attributes:
        d_model: Width of its states.
        n_blocks: Blocks of the encoder, and of the decoder.
        heads: Attention heads.
        d_head: Width of a head.
        d_ff: Width inside the feed-forward part.
        learning_rate: The peak that suits this size.
    """

    d_model: int
    n_blocks: int
    heads: int
    d_head: int
    d_ff: int
    learning_rate: float


SIZES = {
    "tiny": GeneratorSize(32, 1, 2, 16, 64, 3e-3),
    "small": GeneratorSize(64, 2, 4, 16, 256, 1e-3),
    "base": GeneratorSize(128, 4, 6, 64, 1024, 5e-4),
    "tiger": GeneratorSize(384, 4, 6, 64, 1024, 3e-4),
}
"""The sizes by name: for tests, for a CPU, for a GPU, and the one of the TIGER paper."""

_CACHED = 640
"""Positions that are read at once without gradients: what a block makes of them stays in a core's cache."""


@dataclass(frozen=True, eq=False)
class Memory:
    """What the encoder made of a batch of histories.

    Shapes:
        states: (batch, positions, d_model), zero where there is padding.
        mask: (batch, positions), True where an item stands.
    """

    states: Tensor
    mask: Tensor

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.states)

    @property
    def bias(self) -> Tensor:
        """What attention adds to hide the padding."""
        return torch.where(self.mask, 0.0, MASKED)[:, None, None]


class Generator(nn.Module):
    """Read a history, write the next item's codes.

    Source: TIGER, "Recommender Systems with Generative Retrieval" (Rajput et al., arXiv 2305.05065), section 3.2. Here
        each level has its own embedding table and head, the first decoder input is a parameter of its own, and an item
        of the history is by default one position, the sum of its codes (``tokens="item"``), not four.

    Shapes:
        windows: (batch, history) item numbers, 0 = padding on the left; the latest item stands last.
        codes: (items, levels), row ``i - 1`` is item ``i``.

    Args:
        size: Its widths; see `SIZES`.
        catalogue_codes: The codes of all items.
        sizes: Vocabulary of each level.
        n_history: How many items of a history it sees, the latest ones.
        tokens: ``item``: one position an item. ``code``: one position a code, as published, four times the work.
        dropout: Share of the activations that training drops.

    Raises:
        UserError: The codes do not fit the vocabulary.
    """

    codes: Tensor
    record: Mapping[str, Any]
    """How it was made: filled by whoever trains it."""

    def __init__(
        self,
        size: GeneratorSize,
        catalogue_codes: Tensor,
        sizes: tuple[int, ...],
        n_history: int = 20,
        tokens: Tokens = "item",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        _check(catalogue_codes, sizes)
        self.size, self.sizes, self.n_history, self.tokens = size, tuple(sizes), n_history, tokens
        self.starts, self.record = (0, *accumulate(sizes)), {}
        d, width = size.d_model, (size.heads, size.d_head, size.d_ff, dropout)
        offsets = torch.tensor(self.starts[:-1])
        rows = catalogue_codes.long().cpu() + offsets
        # row 0 is the padding item; where its codes point is never seen
        self.register_buffer("codes", torch.cat([offsets[None], rows]), persistent=False)
        self.embeddings = nn.Parameter(torch.empty(self.starts[-1], d))
        self.heads = nn.Parameter(torch.empty(self.starts[-1], d))
        self.first = nn.Parameter(torch.empty(d))
        self.positions = nn.Parameter(torch.empty(n_history, d)) if tokens == "item" else None
        self.item_norm = nn.LayerNorm(d)
        self.encoder_bias = PositionBias(size.heads, two_sided=True)
        self.decoder_bias = PositionBias(size.heads, two_sided=False)
        self.encoder = nn.ModuleList(EncoderBlock(d, *width) for _ in range(size.n_blocks))
        self.decoder = nn.ModuleList(DecoderBlock(d, *width) for _ in range(size.n_blocks))
        self.encoder_norm, self.decoder_norm = RMSNorm(d), RMSNorm(d)
        self.dropout = Dropout(dropout)
        self._draw()

    @property
    def n_items(self) -> int:
        """How many items the catalogue has."""
        return len(self.codes) - 1

    @property
    def n_levels(self) -> int:
        """How many codes name an item."""
        return len(self.sizes)

    def _draw(self) -> None:
        """Draw the weights so that every part starts with outputs of about one."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for free in (self.embeddings, self.heads, self.first, self.positions):
            if free is not None:
                nn.init.normal_(free, std=self.size.d_model**-0.5)

    # ------------------------------------------------------------ reading

    def encode(self, windows: Tensor) -> Memory:
        """Read a batch of histories; columns that are padding for all of them are left out.

        Shapes:
            windows: (batch, history) -> Memory of (batch, positions, d_model)
        """
        windows = self._trimmed(windows.to(self.codes.device))
        if torch.is_grad_enabled() or self.training:
            return self._encode(windows)
        many = max(1, _CACHED // (windows.shape[1] * (1 if self.tokens == "item" else self.n_levels)))
        parts = [self._encode(part) for part in torch.split(windows, many)]
        if len(parts) == 1:
            return parts[0]
        return Memory(torch.cat([part.states for part in parts]), torch.cat([part.mask for part in parts]))

    def _encode(self, windows: Tensor) -> Memory:
        mask = windows > 0
        if self.tokens == "item":
            states = self._items(windows)
        else:
            states = F.embedding(self.codes[windows], self.embeddings).flatten(1, 2)
            mask = mask.repeat_interleave(self.n_levels, 1)
        length = states.shape[1]
        bias = self.encoder_bias(length, length)
        if not bool(mask.all()):
            bias = bias + torch.where(mask, 0.0, MASKED)[:, None, None]
        states = self.dropout(states)
        for block in self.encoder:
            states = block(states, bias)
        return Memory(self.dropout(self.encoder_norm(states)) * mask[..., None], mask)

    def _trimmed(self, windows: Tensor) -> Tensor:
        windows = windows[:, -self.n_history :]
        held = (windows > 0).any(0).nonzero()
        first = int(held[0]) if len(held) else max(windows.shape[1] - 1, 0)
        return windows[:, first:]

    def _items(self, windows: Tensor) -> Tensor:
        """Return one state an item: its codes' sum, normalised, and how long ago it was."""
        assert self.positions is not None
        rows = self.codes[windows].flatten(0, 1)
        sums = F.embedding_bag(rows, self.embeddings, mode="sum").view(*windows.shape, -1)
        return self.item_norm(sums) + self.positions[self.n_history - windows.shape[1] :]  # type: ignore[no-any-return]

    def pooled(self, memory: Memory) -> Tensor:
        """Return the state of each user: the mean over the history, zero for an empty one.

        Shapes:
            memory -> (batch, d_model)
        """
        return memory.states.sum(1) / memory.mask.sum(1, keepdim=True).clamp(min=1)

    # ------------------------------------------------------------ writing

    def code_log_probs(self, memory: Memory, targets: Tensor, residual: Tensor | None = None) -> Tensor:
        """Score items code by code, each code given the true ones before it, over the whole vocabulary of its level.

        Shapes:
            targets: (batch,) item numbers, or (batch, candidates) when each request has several.
            residual: (batch, d_model), added to the first decoder input.
            Returns (batch, levels) or (batch, candidates, levels), natural logarithms.
        """
        rows = self.codes[targets.to(self.codes.device).reshape(-1)]
        per_request = rows.shape[0] // max(len(memory), 1)
        starts = self._starts(len(memory), residual).repeat_interleave(per_request, 0)
        inputs = torch.cat([starts[:, None], F.embedding(rows[:, :-1], self.embeddings)], 1)
        states = self.decode(inputs, memory)
        found = [
            self.log_probs(level, states[:, level]).gather(1, rows[:, level : level + 1] - self.starts[level])
            for level in range(self.n_levels)
        ]
        return torch.cat(found, 1).reshape(*targets.shape, self.n_levels)

    def stepper(self, memory: Memory, residual: Tensor | None = None) -> Steps:
        """Return what beam search asks for the next code's log-probabilities; it computes no gradients."""
        return Steps(self, memory, residual)

    def memory_keys(self, memory: Memory) -> list[KeysValues]:
        """Return each decoder block's keys and values of the memory."""
        return [block.cross.keys_values(memory.states) for block in self.decoder]  # type: ignore[union-attr,operator]

    def decode(self, inputs: Tensor, memory: Memory) -> Tensor:
        """Run the decoder over all positions of some rows, as many for each request.

        Shapes:
            inputs: (rows, positions, d_model) -> the same
        """
        length = inputs.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=inputs.device).triu(1)
        bias = self.decoder_bias(length, length).masked_fill(later, MASKED)
        states, memory_bias = self.dropout(inputs), memory.bias
        for block, keys_values in zip(self.decoder, self.memory_keys(memory)):
            states = block(states, bias, keys_values, memory_bias)
        return self.dropout(self.decoder_norm(states))  # type: ignore[no-any-return]

    def log_probs(self, level: int, states: Tensor) -> Tensor:
        """Return the log-probabilities of a level's codes.

        Shapes:
            states: (rows, d_model) -> (rows, codes of the level)
        """
        return (states @ self.heads[self.starts[level] : self.starts[level + 1]].T).log_softmax(-1)

    def _starts(self, requests: int, residual: Tensor | None) -> Tensor:
        return self.first.expand(requests, -1) if residual is None else self.first + residual.to(self.first)


class Steps:
    """One code after the other for the beams of some requests, as `retouch.recommend.beam.search` asks for them.

    The keys and values of the histories are computed here, once, and shared by all beams of a request; those of a
    beam's own codes are kept from step to step, and a beam takes over its parent's.
    """

    def __init__(self, generator: Generator, memory: Memory, residual: Tensor | None) -> None:
        self.generator = generator
        with torch.inference_mode():
            self.starts = generator._starts(len(memory), residual)
            self.memory = generator.memory_keys(memory)
            self.bias = None if bool(memory.mask.all()) else memory.bias
        self._held: Tensor | None = None

    @torch.inference_mode()
    def step(self, level: int, rows: Tensor, prefix: Tensor, parents: Tensor) -> Tensor:
        """Return the log-probabilities of the next code of each beam; see `retouch.recommend.beam.Stepper`.

        Shapes:
            rows: (beams,), the request of each.
            prefix: (beams, level), its codes so far.
            parents: (beams,), where the prefix but one code stood in the step before; of no meaning on level 0.
            Returns (beams, codes of the level).

        Raises:
            RetouchError: The step before was not that of the level before.
        """
        generator = self.generator
        held = self._grown(level, len(rows), parents)
        if level:
            states = generator.embeddings[prefix[:, -1] + generator.starts[level - 1]]
        else:
            states = self.starts[rows]
        grouping = Grouping(rows, len(self.starts))
        bias = generator.decoder_bias(1, level + 1)[0, :, 0].T
        for i, block in enumerate(generator.decoder):
            states = block.step(states, held[:, i], bias, self.memory[i], self.bias, grouping)  # type: ignore[operator]
        self._held = held
        return generator.log_probs(level, generator.decoder_norm(states))

    def _grown(self, level: int, rows: int, parents: Tensor) -> Tensor:
        """Return what each beam takes over, with room for one position more.

        Shapes:
            (beams, blocks, level + 1, keys and values, heads, d_head)
        """
        size = self.generator.size
        found = self.starts.new_empty(rows, size.n_blocks, level + 1, 2, size.heads, size.d_head)
        if level:
            if self._held is None or self._held.shape[2] != level:
                raise RetouchError(f"Step {level} was asked for, and the step before was another. Begin with step 0.")
            found[:, :, :level] = self._held[parents]
        return found


def _check(codes: Tensor, sizes: tuple[int, ...]) -> None:
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or not len(codes):
        raise UserError(
            f"The catalogue's codes must be one row an item and one column for each of {len(sizes)} levels; "
            f"got {tuple(codes.shape)}."
        )
    for level, size in enumerate(sizes):
        low, high = int(codes[:, level].min()), int(codes[:, level].max())
        if low < 0 or high >= size:
            raise UserError(
                f"Level {level} of the codes has {size} codes, 0 to {size - 1}; the catalogue holds {low} to {high}. "
                "Tokenise the items again."
            )
