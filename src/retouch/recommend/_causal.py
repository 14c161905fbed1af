"""A causal transformer over item numbers: pre-norm blocks, learnt positions, and one table for input and output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CausalItems"]


class CausalItems(nn.Module):
    """Read histories, and say at each place which item comes next.

    Shapes:
        windows: [batch, history], padded with 0 on the left; the latest item stands last.

    Args:
        n_items: Items of the catalogue.
        n_history: Most items of a window.
        d_model: Width.
        n_blocks: Transformer blocks.
        n_heads: Heads of each block; they divide `d_model`.
        dropout: Share of numbers set to zero in training.
    """

    def __init__(self, n_items: int, n_history: int, d_model: int, n_blocks: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Parameter(torch.empty(n_items + 1, d_model))
        self.places = nn.Parameter(torch.empty(n_history, d_model))
        self.blocks = nn.ModuleList(_Block(d_model, n_heads, dropout) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(d_model)
        self.dropout = dropout
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, windows: Tensor) -> Tensor:
        """Return the state at each place of windows that may be shorter than the longest.

        Shapes: [batch, history] -> [batch, history, d_model]
        """
        length = windows.shape[1]
        x = self.items[windows] + self.places[len(self.places) - length :]
        x = F.dropout(x, self.dropout, self.training) * (windows > 0)[..., None]
        mask = _causal(windows)
        for block in self.blocks:
            x = block(x, mask)
        state: Tensor = self.norm(x)
        return state

    def logits(self, states: Tensor) -> Tensor:
        """Score every item; column i - 1 is item i.

        Shapes: [..., d_model] -> [..., items]
        """
        return states @ self.items[1:].T


def _causal(windows: Tensor) -> Tensor:
    """Let a place see itself and the items before it; a padded place sees itself, so that no row is empty."""
    length = windows.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=windows.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=windows.device)
    return ((past & (windows > 0)[:, None, :]) | itself)[:, None]


class _Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self._drop(self._attend(self.norm_1(x), mask))
        return x + self._drop(self.down(self._drop(F.gelu(self.up(self.norm_2(x))))))

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        mixed: Tensor = self.out(found.transpose(1, 2).reshape(batch, length, width))
        return mixed

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
