"""The slim network: a family's own encoder with narrower maps inside, and an exit after its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .. import anatomy as anatomies
from ..errors import ModelError, UserError
from ._config import SlimConfig
from ._families import Parts, bare_body, family_of, narrow, parts_of
from .base import Size, Widths
from .equilibrium import counts, scale_gradient
from .losses import hard_loss, targets

__all__ = ["Levels", "Parts", "SlimForSequenceClassification", "SlimOutput"]


@dataclass
class Levels:
    """What a network computes at full depth.

    Attributes:
        hidden: x, the embedding's output, then the output of every block; each (batch, tokens, d_model).
        logits: By block with an exit, (batch, classes); a regression's are in standardised units.
    """

    hidden: tuple[Tensor, ...]
    logits: dict[int, Tensor]


@dataclass
class SlimOutput(ModelOutput):  # type: ignore[misc]
    """What a slim network answers.

    Attributes:
        loss: While training, the sum over all exits; else that of `logits`. None without labels.
        logits: The answers, (batch, classes); a regression's are in the labels' units.
        exit_logits: By block, every exit's logits as `Levels` has them; None when exits answer early.
        exit_block: The block after which each example was answered, (batch,).
        hidden_states: As `Levels.hidden`, when asked for and no exit answers early.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: dict[int, Tensor] | None = None
    exit_block: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class SlimForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """A classifier that is narrow in every block and may answer after any block with an exit.

    An exit pools the output of its block, takes the tanh, drops out, and maps to the classes. Padding may stand on
    either side and be of any length: the answers are the same.

    Source: Shen et al. 2022. Masked mean pooling and widths that differ between blocks are ours.

    Attributes:
        size: The original in numbers.
        widths: What is kept of it.
        body: The family's own encoder, with narrower maps.
        exits: The classifiers, by block number as text.
        pooler: The dense map in front of the last exit's classifier, or None.

    Raises:
        UserError: The configuration is not one of a slim model, or its fields do not fit each other.
    """

    config_class = SlimConfig
    base_model_prefix = "body"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False
    _supports_sdpa = True

    def __init__(self, config: SlimConfig) -> None:
        super().__init__(config)
        config.check()
        self.size: Size = config.size
        self.widths: Widths = config.widths
        base = config.base_config
        self.family = family_of(base)
        self.body: Any = bare_body(base, config._attn_implementation)
        self.anatomy = anatomies.describe(base, self.body)
        narrow(self.body, self.anatomy, list(self.widths.heads), list(self.widths.d_ff), self.widths.rank)
        d = self.size.d_model
        self.pooler: nn.Linear | None = nn.Linear(d, d) if config.pooler else None
        self.dropout = nn.Dropout(config.exit_dropout)
        self.exits = nn.ModuleDict({str(block): nn.Linear(d, self.size.classes) for block in self.widths.exits})
        self.post_init()

    # ------------------------------------------------------------ pieces

    def parts(self, block: int) -> Parts:
        """Return the linear maps of a block."""
        return parts_of(self.body, self.anatomy, block)

    def kept_heads(self, block: int) -> list[int]:
        """Return the original numbers of a block's heads."""
        kept = self.config.kept_heads
        return list(range(self.widths.heads[block])) if kept is None else list(kept[block])

    def kept_neurons(self, block: int) -> list[int]:
        """Return the original numbers of a block's MLP neurons."""
        kept = self.config.kept_neurons
        return list(range(self.widths.d_ff[block])) if kept is None else list(kept[block])

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embedding: one table, or two factors (``table`` and ``map``)."""
        return self.body.get_submodule(self.anatomy.path("embed"))  # type: ignore[no-any-return]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refuse: the vocabulary of a slim model is that of its original."""
        raise ModelError(
            "A slim model keeps its vocabulary, whose embedding may be two factors, so it cannot be resized. Add the "
            "tokens to the original model (resize_token_embeddings there), fine-tune it, and slim that."
        )

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return x, the embedding's output after its norm.

        Shapes: all (batch, tokens); returns (batch, tokens, d_model).
        """
        return self.family.embed(self.body, input_ids, attention_mask, token_type_ids)

    def run_block(self, block: int, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Run one block.

        Shapes: `hidden` (batch, tokens, d_model), `attention_mask` (batch, tokens); returns as `hidden`.
        """
        kept = self.kept_heads(block) if self.widths.heads[block] < self.size.heads else None
        layer = self.body.get_submodule(self.anatomy.path(f"blocks.{block}"))
        visible = self.family.visible(self.body, attention_mask, hidden.dtype)
        out = layer(hidden, visible, *self.family.bias(self.body, hidden, kept))
        after: Tensor = out[0] if isinstance(out, tuple) else out
        return after

    def read_exit(self, block: int, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return what the exit after a block answers; a regression's answer is in standardised units.

        Shapes: `hidden` (batch, tokens, d_model), `attention_mask` (batch, tokens); returns (batch, classes).

        Raises:
            UserError: There is no exit after that block.
        """
        if block not in self.widths.exits:
            raise UserError(f"There is no exit after block {block}. Blocks with an exit: {list(self.widths.exits)}.")
        pooled = _pool(hidden, attention_mask, self.config.pooling)
        if self.pooler is not None and block == self.size.blocks - 1:
            dense = self.pooler(pooled)
            pooled = dense.relu() if self.config.pooler == "relu" else dense.tanh()
        else:
            pooled = pooled.tanh()
        logits: Tensor = self.exits[str(block)](self.dropout(pooled))
        return logits

    def levels(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        equilibrium: bool = False,
        exits: Sequence[int] | None = None,
    ) -> Levels:
        """Run all blocks and read the exits.

        Shapes: the inputs (batch, tokens).

        Args:
            input_ids: Token ids.
            attention_mask: 1 at real tokens, 0 at padding.
            token_type_ids: Which text of a pair; families without token types ignore it.
            equilibrium: Whether gradients flow down as means over exits and not as sums.
            exits: Which exits to read; None reads all.

        Raises:
            UserError: There is no such exit.
        """
        read = self.widths.exits if exits is None else tuple(exits)
        for block in read:
            if block not in self.widths.exits:
                raise UserError(f"There is no exit after block {block}. Exits: {list(self.widths.exits)}.")
        m = counts(read, self.size.blocks) if equilibrium else [1] * self.size.blocks
        at = self.embed(input_ids, attention_mask, token_type_ids)
        hidden, logits = [at], {}
        for block in range(self.size.blocks):
            at = self.run_block(block, at, attention_mask)
            at = _scaled(at, 1 / m[block])
            hidden.append(at)
            if block in read:
                logits[block] = self.read_exit(block, at, attention_mask)
            if block + 1 < self.size.blocks:
                at = _scaled(at, m[block + 1])
        return Levels(tuple(hidden), logits)

    # ------------------------------------------------------------ the whole

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SlimOutput | tuple[Any, ...]:
        """Answer. While training, all exits do; else the first that is sure enough, as the configuration says.

        Shapes: the inputs (batch, tokens); `labels` (batch,).

        Args:
            input_ids: Token ids.
            attention_mask: 1 at real tokens, 0 at padding; None: no padding.
            token_type_ids: Which text of a pair.
            labels: Indices of classes, or a regression's numbers in their own units.
            output_hidden_states: Whether to return all levels; only where no exit answers early.
            return_dict: False returns a tuple.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if self.training or self.config.threshold is None:
            keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            output = self._answer_at_full_depth(input_ids, attention_mask, token_type_ids, labels, bool(keep))
        else:
            output = self._answer_early(input_ids, attention_mask, token_type_ids, labels)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def _answer_at_full_depth(
        self, input_ids: Tensor, mask: Tensor, types: Tensor | None, labels: Tensor | None, keep: bool
    ) -> SlimOutput:
        levels = self.levels(input_ids, mask, types, equilibrium=self.training)
        last = self.size.blocks - 1
        charged = levels.logits if self.training else {last: levels.logits[last]}
        return SlimOutput(
            loss=self._loss(charged, labels),
            logits=self._in_units(levels.logits[last]),
            exit_logits=levels.logits,
            exit_block=torch.full((len(input_ids),), last, device=input_ids.device),
            hidden_states=levels.hidden if keep else None,
        )

    def _answer_early(self, input_ids: Tensor, mask: Tensor, types: Tensor | None, labels: Tensor | None) -> SlimOutput:
        from .compaction import answer  # it imports this module

        answers = answer(self, input_ids, mask, types)
        loss = self._loss({self.size.blocks - 1: answers.logits}, labels)
        return SlimOutput(loss=loss, logits=self._in_units(answers.logits), exit_block=answers.where)

    def _loss(self, logits: dict[int, Tensor], labels: Tensor | None) -> Tensor | None:
        return None if labels is None else hard_loss(logits, targets(labels, self.config), self.config.task)

    def _in_units(self, logits: Tensor) -> Tensor:
        if self.config.task != "regression":
            return logits
        scaled: Tensor = logits * self.config.target_scale + self.config.target_mean
        return scaled


def _pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    if how == "mean":
        real = mask.to(hidden.dtype)[..., None]
        return (hidden * real).sum(1) / real.sum(1).clamp(min=1)
    first = mask.long().argmax(1)[:, None, None]  # of equal values the first, so padding on the left is skipped
    return hidden.gather(1, first.expand(-1, 1, hidden.shape[-1]))[:, 0]


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else scale_gradient(x, factor)
