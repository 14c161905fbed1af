"""How knowledge enters the recommender: as one vector that is added to the first input of its decoder.

The first input is the same for everybody, so the vector depends on the knowledge alone. That is why all the work of the
language model can be done long before a request, and a request only looks a vector up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Fusion"]

_DECAY = 0.9


class Fusion(nn.Module):
    """Let the first decoder input look at a user's knowledge, and return what is to be added to it.

    Source: arXiv 2605.18771 (cross-attention into the first input). The zero start, the gate and the residual are
        ours: with them the first policy equals the reference, so it begins within any limit of harm. So is that
        knowledge is standardised over users, and that the mean of what it moves is taken away: a language model's states
        are nearly the same for everybody, and what is the same for everybody is no knowledge.

    Shapes:
        forward: q0 (d_model,), states (batch, positions, d_llm), mask (batch, positions) -> (batch, d_model)

    Args:
        d_model: Width of the recommender.
        d_llm: Width of the knowledge.
        n_layers: How many times it looks.
        heads: Attention heads; they must divide `d_model`.
        residual: Whether each look is added to what it began with, and knowledge is counted from its mean over users;
            without, the input is replaced, as published.
        gate: Whether each user has a factor between 0 and 1, one half at the start.
    """

    mean: Tensor
    std: Tensor
    middle: Tensor

    def __init__(
        self, d_model: int, d_llm: int, *, n_layers: int = 2, heads: int = 4, residual: bool = True, gate: bool = True
    ) -> None:
        super().__init__()
        self.residual = residual
        self.norm_in = nn.LayerNorm(d_llm)
        self.narrow = nn.Linear(d_llm, d_model, bias=False)
        self.looks = nn.ModuleList(_Look(d_model, heads) for _ in range(n_layers))
        self.out = nn.Linear(d_model, d_model, bias=False) if residual else None
        self.gate = nn.Linear(2 * d_model, 1) if gate and residual else None
        for zero in (self.out, self.gate):  # only `out` decides the start; what feeds it must not be zero as well
            if zero is not None:
                nn.init.zeros_(zero.weight)
        if self.gate is not None:
            nn.init.zeros_(self.gate.bias)
        self.register_buffer("mean", torch.zeros(d_llm))
        self.register_buffer("std", torch.ones(d_llm))
        self.register_buffer("middle", torch.zeros(d_model))

    @torch.no_grad()
    def begin(self, q0: Tensor, states: Tensor, mask: Tensor | None = None) -> None:
        """Measure how knowledge is spread over users. Call once, before training, with training users only.

        Shapes:
            q0 (d_model,), states (users, positions, d_llm), mask (users, positions)
        """
        if not self.residual:
            return
        seen = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask
        self.mean.copy_(states[seen].mean(0))
        # without a mask each position is one instruction; what sets them apart is the same for everybody
        spread = states[seen].std(0, correction=0) if mask is not None else states.std(0, correction=0).mean(0)
        self.std.copy_(torch.where(spread > 1e-6, spread, torch.ones_like(spread)))
        self.middle.copy_(self._moved(q0, states, mask).mean(0))

    @torch.no_grad()
    def follow(self, moved: Tensor) -> None:
        """Let the mean over users follow what a batch of them was moved by, (batch, d_model)."""
        if self.residual and len(moved):
            self.middle.lerp_(moved.detach().mean(0), 1 - _DECAY)

    def forward(self, q0: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what knowledge adds to the first decoder input."""
        residual, _ = self.with_gate(q0, states, mask)
        return residual

    def with_gate(self, q0: Tensor, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what is added, and each user's gate: 1 where there is none."""
        residual, gate, _ = self.whole(q0, states, mask)
        return residual, gate

    def whole(self, q0: Tensor, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same, and how far each user's looks moved the input: what `follow` takes, (batch, d_model)."""
        moved = self._moved(q0, states, mask)
        if self.out is None:
            return moved, moved.new_ones(len(moved)), moved
        own = moved - self.middle
        gate = moved.new_ones(len(moved)) if self.gate is None else self._open(q0.expand_as(own), own)
        return gate[:, None] * self.out(own), gate, moved

    def _moved(self, q0: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        known = self.narrow(self.norm_in((states - self.mean) / self.std))
        looked = start = q0.expand(len(states), -1)
        for look in self.looks:
            seen = look(looked, known, mask)
            looked = looked + seen if self.residual else seen
        return looked - start

    def _open(self, start: Tensor, moved: Tensor) -> Tensor:
        assert self.gate is not None
        return torch.sigmoid(self.gate(torch.cat([start, moved], 1)))[:, 0]


class _Look(nn.Module):
    """One query for each user, attending to that user's knowledge."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(d_model)
        self.query, self.key, self.value, self.out = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))

    def forward(self, at: Tensor, known: Tensor, mask: Tensor | None) -> Tensor:
        query = self._split(self.query(self.norm(at))[:, None])
        seen = F.scaled_dot_product_attention(
            query, self._split(self.key(known)), self._split(self.value(known)), _rows(mask)
        )
        return self.out(seen.transpose(1, 2).flatten(1))  # type: ignore[no-any-return]

    def _split(self, states: Tensor) -> Tensor:
        return states.reshape(*states.shape[:2], self.heads, -1).transpose(1, 2)


def _rows(mask: Tensor | None) -> Tensor | None:
    """Return the mask as attention reads it; a row with nothing to see sees all, and is not used."""
    if mask is None:
        return None
    return (mask | ~mask.any(1, keepdim=True))[:, None, None]
