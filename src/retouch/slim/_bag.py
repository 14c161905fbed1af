"""A text as a bag of its tokens: classifiers without any block, in the clothes of a network with one exit.

They can be read, timed and asked like a slim network of one block, whose block does nothing. `n_numbers` and `flops`
say what they cost; the formulas of `widths` do not hold for them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ._classifier import Levels, SlimOutput
from ._config import SlimConfig
from .base import Size, Widths

__all__ = ["Bag", "MeanOfVectors", "TfIdf"]


class Bag(nn.Module):
    """A classifier that adds up one vector for each token.

    Attributes:
        config: As of a slim network, without a family.
        size: Its numbers in the place of an encoder's; only the vocabulary, the token types and the classes mean
            something.
        widths: One block with an exit.
        counted: Which tokens count; special ones do not. (vocab,)
    """

    counted: Tensor

    def __init__(self, config: SlimConfig, original: Size, counted: Tensor) -> None:
        super().__init__()
        self.config = config
        self.size = Size(1, 1, 1, 1, original.vocab, 0, original.token_types, original.classes, pooler=False)
        self.widths = Widths((1,), (1,), None, (0,))
        self.register_buffer("counted", counted.bool())

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return self.counted.device

    @property
    def n_numbers(self) -> int:
        """How many numbers it consists of."""
        return sum(p.numel() for p in self.parameters())

    @abstractmethod
    def flops(self, tokens: int) -> float:
        """Count the FLOPs of one text of so many tokens."""

    @abstractmethod
    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return each token's share of the sum, (batch, tokens, width); 0 where nothing counts."""

    @abstractmethod
    def read_exit(self, block: int, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Add up the shares, and answer: (batch, classes)."""

    def run_block(self, block: int, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the shares as they are."""
        return hidden

    def levels(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        equilibrium: bool = False,
        exits: Sequence[int] | None = None,
    ) -> Levels:
        """Answer at the one exit; the last two arguments change nothing."""
        shares = self.embed(input_ids, attention_mask)
        return Levels((shares,), {0: self.read_exit(0, shares, attention_mask)})

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SlimOutput:
        """Answer; a regression in the labels' units."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.levels(input_ids, mask).logits[0]
        if self.config.task == "regression":
            logits = logits * self.config.target_scale + self.config.target_mean
        return SlimOutput(logits=logits)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: this one is for comparison.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "The method linear is a yardstick and is not saved. If it is good enough, the text needs no encoder: train "
            "the same with model2vec or scikit-learn."
        )

    def _counts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return 1 at the tokens that count, (batch, tokens)."""
        return (attention_mask.bool() & self.counted[input_ids]).to(next(self.parameters()).dtype)


class MeanOfVectors(Bag):
    """The mean of the tokens' vectors, and a linear map.

    Args:
        config: See `Bag`.
        original: See `Bag`.
        counted: See `Bag`.
        vectors: (vocab, width).
        weight: (classes, width).
        bias: (classes,).
    """

    def __init__(
        self, config: SlimConfig, original: Size, counted: Tensor, vectors: Tensor, weight: Tensor, bias: Tensor
    ) -> None:
        super().__init__(config, original, counted)
        self.vectors, self.weight, self.bias = map(_solved, (vectors, weight, bias))

    def flops(self, tokens: int) -> float:
        """Count the FLOPs of one text: the additions of the mean, and 2 for each weight of the map."""
        return float(tokens * self.vectors.shape[1] + 2 * self.weight.numel())

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return the vectors over the number of tokens that count, (batch, tokens, width)."""
        counts = self._counts(input_ids, attention_mask)
        return self.vectors[input_ids] * (counts / counts.sum(1, keepdim=True).clamp(min=1))[..., None]

    def read_exit(self, block: int, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Add up and map, (batch, classes)."""
        return nn.functional.linear(hidden.sum(1), self.weight, self.bias)


class TfIdf(Bag):
    """Counts of tokens, each times its rarity, scaled to length 1, and a linear map.

    Args:
        config: See `Bag`.
        original: See `Bag`.
        counted: See `Bag`.
        rarity: (vocab,).
        weight: (vocab, classes).
        bias: (classes,).
    """

    def __init__(
        self, config: SlimConfig, original: Size, counted: Tensor, rarity: Tensor, weight: Tensor, bias: Tensor
    ) -> None:
        super().__init__(config, original, counted)
        self.rarity, self.weight, self.bias = map(_solved, (rarity, weight, bias))

    def flops(self, tokens: int) -> float:
        """Count the FLOPs of one text: for each token, 2 for the length of the row and 2 a class."""
        return float(2 * tokens * (1 + self.weight.shape[1]))

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return each token's part of the answer, (batch, tokens, classes)."""
        rare = self._counts(input_ids, attention_mask) * self.rarity[input_ids]
        same = (
            input_ids[:, :, None] == input_ids[:, None, :]
        )  # a token that comes twice has one entry of twice the size
        square = (rare[:, :, None] * rare[:, None, :] * same).sum((1, 2))
        return self.weight[input_ids] * (rare / square.clamp(min=1e-24).sqrt()[:, None])[..., None]

    def read_exit(self, block: int, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Add up, (batch, classes)."""
        return hidden.sum(1) + self.bias


def _solved(values: Tensor) -> nn.Parameter:
    """Hold numbers that were solved for, and do not train."""
    return nn.Parameter(values, requires_grad=False)
