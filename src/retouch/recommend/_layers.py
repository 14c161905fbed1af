"""The layers of the reference generator: T5's block, without biases, with RMS norms before each part.

Rows of the decoder (beams, candidates) share the encoder's keys and values: all rows of one request lie side by side as
queries, so nothing of the memory is ever copied for a beam.
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

    mean: Tensor
    least: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.register_buffer("mean", torch.full((1, d_model), 1 / d_model), persistent=False)
        self.register_buffer("least", torch.tensor([1e-6]), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """Return the normalised states."""
        if torch.is_grad_enabled():
            return F.rms_norm(states, self.weight.shape, self.weight, 1e-6)
        scale = F.linear(states * states, self.mean, self.least).rsqrt_()
        return (states * scale).mul_(self.weight)  # the same, at half the price of torch's own on a CPU


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
        self._buckets: dict[tuple[int, int], Tensor] = {}

    def forward(self, queries: int, keys: int) -> Tensor:
        """Return the bias of `queries` positions, the last of which is the last key, towards `keys` positions."""
        found = self._buckets.get((queries, keys))
        if found is None or found.device != self.weight.device:
            with torch.inference_mode(False):  # what is kept must serve a training, too
                here = torch.arange(keys - queries, keys, device=self.weight.device)[:, None]
                found = self._bucket(torch.arange(keys, device=self.weight.device)[None] - here)
            self._buckets[queries, keys] = found
        return self.weight[found].permute(2, 0, 1)[None]

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
        return self.split(keys), self.split(values)

    def forward(self, states: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Let states look at keys, and return what they see."""
        return self.out(self.look(self.query(states), keys, values, bias))  # type: ignore[no-any-return]

    def look(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Attend with queries that are made already; the heads come back side by side."""
        split = self.split(queries)
        if self.training:  # the fused kernel takes no gradient of a bias
            scores = split @ keys.mT * split.shape[-1] ** -0.5
            weights = (scores if bias is None else scores + bias).softmax(-1)
            seen: Tensor = self.dropout(weights) @ values
        else:
            seen = F.scaled_dot_product_attention(split, keys, values, bias)
        return seen.transpose(1, 2).flatten(2)

    def step(self, states: Tensor, held: Tensor, bias: Tensor) -> Tensor:
        """Let one more position look at itself and those before it; its keys and values take the last place of `held`.

        Shapes:
            states: (rows, d_model); held: (rows, positions, 2, heads, d_head), keys before values; bias: (positions,
            heads). Returns (rows, d_model).
        """
        held[:, -1] = self.key_value(states).view(-1, *held.shape[2:])
        keys, values = held.unbind(2)
        if held.shape[1] == 1:
            return self.out(values.flatten(1))  # type: ignore[no-any-return]
        queries = self.query(states).view(-1, 1, *held.shape[3:])
        # a few keys a row: products of single numbers cost half of what matrices of this size do
        weights = torch.add(bias, (keys * queries).sum(-1), alpha=held.shape[-1] ** -0.5).softmax(1)
        return self.out((weights.unsqueeze(-1) * values).sum(1).flatten(1))  # type: ignore[no-any-return]

    def split(self, states: Tensor) -> Tensor:
        """Cut states into heads. Shapes: (rows, positions, all) -> (rows, heads, positions, d_head)"""
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
    """How decoder rows of one request are laid side by side.

    Args:
        rows: The request of each row.
        requests: How many requests there are.
    """

    def __init__(self, rows: Tensor, requests: int) -> None:
        self.rows, self.requests, self.width = rows, requests, len(rows) // max(requests, 1)
        even = torch.arange(requests, device=rows.device).repeat_interleave(self.width)
        self.even = len(even) == len(rows) and torch.equal(rows, even)
        if self.even:
            return
        counts = torch.bincount(rows, minlength=requests)
        self.width = int(counts.max())
        order = rows.argsort(stable=True)
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows[order]]
        self.slots = torch.empty_like(place)
        self.slots[order] = place

    def together(self, states: Tensor) -> Tensor:
        """Lay (rows, d) as (requests, most rows of a request, d)."""
        if self.even:
            return states.view(self.requests, self.width, -1)
        laid = states.new_zeros(self.requests, self.width, states.shape[-1])
        laid[self.rows, self.slots] = states
        return laid

    def apart(self, states: Tensor) -> Tensor:
        """Undo `together`."""
        return states.flatten(0, 1) if self.even else states[self.rows, self.slots]


class DecoderBlock(nn.Module):
    """Self-attention, attention to the memory, and feed-forward, each behind its norm."""

    def __init__(self, d_model: int, heads: int, d_head: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(d_model, heads, d_head, dropout)
        self.cross = Attention(d_model, heads, d_head, dropout)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)
        self.norms = nn.ModuleList(RMSNorm(d_model) for _ in range(3))
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor, bias: Tensor, memory: tuple[Tensor, Tensor], memory_bias: Tensor) -> Tensor:
        """Return the states after this block; all rows of a request ask one copy of its memory."""
        normed = self.norms[0](states)
        states = states + self.dropout(self.attention(normed, *self.attention.keys_values(normed), bias))
        queries = self.cross.query(self.norms[1](states))
        together = queries.view(len(memory_bias), -1, queries.shape[-1])
        seen = self.cross.look(together, *memory, memory_bias).view(queries.shape)
        states = states + self.dropout(self.cross.out(seen))
        return states + self.dropout(self.feed_forward(self.norms[2](states)))  # type: ignore[no-any-return]

    def step(
        self,
        states: Tensor,
        held: Tensor,
        bias: Tensor,
        memory: tuple[Tensor, Tensor],
        memory_bias: Tensor | None,
        grouping: Grouping,
    ) -> Tensor:
        """Return the states of one more position after this block, without dropout and gradients.

        Shapes:
            see `Attention.step`; memory: (requests, heads, positions, d_head)
        """
        states = self.attention.step(self.norms[0](states), held, bias).add_(states)
        queries = grouping.together(self.cross.query(self.norms[1](states)))
        seen = F.scaled_dot_product_attention(self.cross.split(queries), *memory, memory_bias)
        states += self.cross.out(grouping.apart(seen.transpose(1, 2).flatten(2)))
        states += self.feed_forward.down(self.feed_forward.up(self.norms[2](states)).relu_())
        return states
