"""The layers of the reference generator: T5's block, without biases, with RMS norms before each part.

Rows of the decoder (beams, candidates) share the encoder's keys and values: a `Grouping` lays all rows of one request
side by side as queries, so nothing of the memory is ever copied for a beam.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "DecoderBlock", "Dropout", "EncoderBlock", "Grouping", "PositionBias", "RMSNorm"]

MASKED = -1e9
"""What is added where attention may not look; finite, so that a row with nothing to see stays a number."""


class RMSNorm(nn.Module):
    """Divide by the root mean square, and scale."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, states: Tensor) -> Tensor:
        """Return the normalised states."""
        return F.rms_norm(states, self.weight.shape, self.weight, 1e-6)


class Dropout(nn.Module):
    """Dropout that draws 16 bits for each number on a CPU, which halves its cost; elsewhere torch's own."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, states: Tensor) -> Tensor:
        """Return the states, some of them zero while training."""
        if not self.training or self.p == 0:
            return states
        return F.dropout(states, self.p) if states.device.type != "cpu" else states * _kept(states, self.p)


def _kept(states: Tensor, p: float) -> Tensor:
    """Draw what each number is multiplied by: 0, or what keeps the mean."""
    lost = round(p * 2**16)
    # from -2**63: the default range leaves the sign bit out, and with it half the values of every fourth draw
    drawn = torch.empty((states.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.int16)[: states.numel()].view(states.shape) >= lost - 2**15
    return kept.to(states.dtype).mul_(2**16 / (2**16 - lost))


class _ReluDropout(torch.autograd.Function):
    """ReLU and dropout that keep one tensor between them: a number that was dropped is a zero like any other."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, p: float) -> Tensor:
        out = F.relu(states).mul_(_kept(states, p))
        ctx.save_for_backward(out)
        ctx.scale = 2**16 / (2**16 - round(p * 2**16))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, out, 0.0).mul_(ctx.scale), None


class PositionBias(nn.Module):
    """T5's relative position bias: one number for each head and bucket of distances.

    Shapes:
        forward: (queries, keys) -> (1, heads, queries, keys)
    """

    def __init__(self, heads: int, *, two_sided: bool, buckets: int = 32, farthest: int = 128) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(buckets, heads))
        self.two_sided, self.farthest = two_sided, farthest

    def forward(self, queries: int, keys: int) -> Tensor:
        """Return the bias of `queries` positions, the last of which is the last key, towards `keys` positions."""
        device = self.weight.device
        here = torch.arange(keys - queries, keys, device=device)[:, None]
        return self.weight[self._bucket(torch.arange(keys, device=device)[None] - here)].permute(2, 0, 1)[None]

    def _bucket(self, distance: Tensor) -> Tensor:
        """Near distances have a bucket each, far ones share; a two-sided bias gives each side half."""
        buckets, after = len(self.weight), torch.zeros_like(distance)
        if self.two_sided:
            buckets //= 2
            after = (distance > 0) * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        near = buckets // 2
        share = (distance.clamp(min=1).float() / near).log() / math.log(self.farthest / near)
        far = (near + (share * (buckets - near)).long()).clamp(max=buckets - 1)
        return after + torch.where(distance < near, distance, far)


class Attention(nn.Module):
    """Attention of several heads; keys and values may be made once and used many times.

    Shapes:
        states: (rows, positions, d_model); keys, values: (rows, heads, positions, d_head)
    """

    def __init__(self, d_model: int, heads: int, d_head: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, heads * d_head, bias=False)
        self.key_value = nn.Linear(d_model, 2 * heads * d_head, bias=False)
        self.out = nn.Linear(heads * d_head, d_model, bias=False)
        self.dropout = Dropout(dropout)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return what others attend to."""
        keys, values = self.key_value(states).chunk(2, -1)
        return self._split(keys), self._split(values)

    def forward(self, states: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Let states look at keys, and return what they see."""
        return self.out(self.look(self.query(states), keys, values, bias))  # type: ignore[no-any-return]

    def look(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Attend with queries that are made already; the heads come back side by side."""
        split = self._split(queries)
        if self.training:  # the fused kernel takes no gradient of a bias
            scores = split @ keys.mT * split.shape[-1] ** -0.5
            weights = (scores if bias is None else scores + bias).softmax(-1)
            seen: Tensor = self.dropout(weights) @ values
        else:
            seen = F.scaled_dot_product_attention(split, keys, values, bias)
        return seen.transpose(1, 2).flatten(2)

    def _split(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], self.heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """Widen, cut below zero, narrow."""

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """Return the new part of the states."""
        wide, p = self.up(states), self.dropout.p
        if self.training and p and wide.device.type == "cpu":
            return self.down(_ReluDropout.apply(wide, p))  # type: ignore[no-any-return,no-untyped-call]
        return self.down(self.dropout(F.relu(wide)))  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward, each behind its norm."""

    def __init__(self, d_model: int, heads: int, d_head: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(d_model, heads, d_head, dropout)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)
        self.norms = nn.ModuleList(RMSNorm(d_model) for _ in range(2))
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        """Return the states after this block."""
        normed = self.norms[0](states)
        states = states + self.dropout(self.attention(normed, *self.attention.keys_values(normed), bias))
        return states + self.dropout(self.feed_forward(self.norms[1](states)))  # type: ignore[no-any-return]


class Grouping:
    """Which request each decoder row belongs to, and how rows of one request are laid side by side.

    Args:
        rows: The request of each row; None when each request has the same number of rows, in order.
        requests: How many requests there are.
    """

    def __init__(self, rows: Tensor | None, requests: int) -> None:
        self.rows, self.requests, self.width = rows, requests, 0
        if rows is None:
            return
        counts = torch.bincount(rows, minlength=requests)
        self.width = int(counts.max())
        even = torch.arange(requests, device=rows.device).repeat_interleave(self.width)
        if len(rows) == len(even) and torch.equal(rows, even):
            self.rows = None
            return
        order = rows.argsort(stable=True)
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows[order]]
        self.slots = torch.empty_like(place)
        self.slots[order] = place

    def together(self, states: Tensor) -> Tensor:
        """Lay (rows, positions, d) as (requests, rows of a request x positions, d)."""
        if self.rows is None:
            return states.reshape(self.requests, -1, states.shape[-1])
        laid = states.new_zeros(self.requests, self.width, *states.shape[1:])
        laid[self.rows, self.slots] = states
        return laid.flatten(1, 2)

    def apart(self, states: Tensor, positions: int) -> Tensor:
        """Undo `together`."""
        if self.rows is None:
            return states.reshape(-1, positions, states.shape[-1])
        return states.view(self.requests, self.width, positions, -1)[self.rows, self.slots]


class DecoderBlock(nn.Module):
    """Self-attention, attention to the memory, and feed-forward, each behind its norm."""

    def __init__(self, d_model: int, heads: int, d_head: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(d_model, heads, d_head, dropout)
        self.cross = Attention(d_model, heads, d_head, dropout)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)
        self.norms = nn.ModuleList(RMSNorm(d_model) for _ in range(3))
        self.dropout = Dropout(dropout)

    def forward(
        self,
        states: Tensor,
        bias: Tensor,
        memory: tuple[Tensor, Tensor],
        memory_bias: Tensor,
        grouping: Grouping,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the states after this block, and the keys and values of their positions with the `past` ones."""
        normed = self.norms[0](states)
        keys, values = self.attention.keys_values(normed)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        states = states + self.dropout(self.attention(normed, keys, values, bias))
        queries = grouping.together(self.cross.query(self.norms[1](states)))
        seen = grouping.apart(self.cross.look(queries, *memory, memory_bias), states.shape[1])
        states = states + self.dropout(self.cross.out(seen))
        return states + self.dropout(self.feed_forward(self.norms[2](states))), (keys, values)
