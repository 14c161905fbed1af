"""What slimming has to know of a family beyond its anatomy: positions, relative bias, the shape of its classifier.

Paths of the matrices come from `anatomy`; the modelling code is the family's own and is never copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .. import anatomy as anatomies
from ..anatomy import Anatomy
from ..errors import ModelError

__all__ = ["FAMILIES", "Factors", "Family", "Parts", "bare_body", "family_of", "narrow", "parts_of", "plain"]

_LEFT_OUT = {
    "_name_or_path", "architectures", "attn_implementation", "dtype", "id2label", "label2id", "problem_type",
    "torch_dtype", "transformers_version",
}  # fmt: skip
"""What a family's configuration says of a file or a task, and not of the encoder."""


@dataclass(frozen=True)
class Family:
    """One family of encoders.

    Attributes:
        name: ``config.model_type``.
        body: The class of the encoder.
        classifier: The class that classifies a text.
        dense: Path in the classifier of the dense map in front of its last one.
        linear: Path in the classifier of its last map.
        activation: What stands between the two.
        token_types: Whether the embedding tells a pair's first text from its second.
        relative: Whether attention adds a learned bias by distance, one for each head.
    """

    name: str
    body: str
    classifier: str
    dense: str
    linear: str
    activation: str
    token_types: bool = False
    relative: bool = False

    def embed(self, body: Any, input_ids: Tensor, mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Return the embedding's output.

        Positions count real tokens, so padding on the left gives what padding on the right gives.

        Shapes: all (batch, tokens); returns (batch, tokens, d_model).
        """
        mask = mask.long()
        inputs = {"input_ids": input_ids}
        if (padding := getattr(body.embeddings, "padding_idx", None)) is None:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        else:  # these families count from the padding's row, which padding itself keeps
            inputs["position_ids"] = mask.cumsum(1) * mask + padding
        if self.token_types:
            inputs["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        embedded: Tensor = body.embeddings(**inputs)
        return embedded

    def visible(self, body: Any, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mask as this body's attention wants it: (batch, 1, 1, tokens)."""
        seen = mask[:, None, None, :].bool()
        if body.config._attn_implementation == "sdpa":
            return seen
        hidden = torch.zeros_like(seen, dtype=dtype)
        return hidden.masked_fill(~seen, torch.finfo(dtype).min)

    def bias(self, body: Any, hidden: Tensor, kept: list[int] | None) -> tuple[Tensor, ...]:
        """Return the bias by distance of the heads `kept`, as the one further input of a block; or nothing."""
        if not self.relative:
            return ()
        values: Tensor = body.encoder.compute_position_bias(hidden[:1])
        return (values if kept is None else values[:, kept],)


FAMILIES = {
    family.name: family
    for family in (
        Family("bert", "BertModel", "BertForSequenceClassification", "bert.pooler.dense", "classifier", "tanh", True),
        Family("distilbert", "DistilBertModel", "DistilBertForSequenceClassification", "pre_classifier", "classifier",
               "relu"),
        Family("roberta", "RobertaModel", "RobertaForSequenceClassification", "classifier.dense", "classifier.out_proj",
               "tanh", True),
        Family("mpnet", "MPNetModel", "MPNetForSequenceClassification", "classifier.dense", "classifier.out_proj",
               "tanh", relative=True),
    )
}  # fmt: skip
"""The families that can be slimmed; MiniLM is a BERT."""


def family_of(config: Any) -> Family:
    """Return the family of a configuration of transformers.

    Raises:
        ModelError: The family cannot be slimmed, or this configuration of it is a decoder.
    """
    name = str(getattr(config, "model_type", None) or "")
    if name == "retouch_slim":
        raise ModelError("This model is slim already. Open it with open_slim, or slim the model that it was made from.")
    if name not in FAMILIES:
        kind = anatomies.describe(config).kind if name in anatomies.families() else "unknown"
        what = f"a {name} model, which is a decoder" if kind == "decoder" else f"a model of the family {name!r}"
        raise ModelError(
            f"Only encoders of the families {', '.join(FAMILIES)} can be made slim; this is {what}. Fine-tune one of "
            "these families for the task."
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ModelError(f"This {name} model is configured as a decoder (is_decoder); only encoders can be made slim.")
    if getattr(config, "pruned_heads", None):
        raise ModelError(f"Heads of this {name} model are pruned already; slimming starts from the whole model.")
    return FAMILIES[name]


def plain(config: Any) -> dict[str, Any]:
    """Return a family's configuration as plain values that JSON can hold, without what says nothing of the encoder."""
    return {k: v for k, v in config.to_dict().items() if k not in _LEFT_OUT and v is not None}


def bare_body(config: Any, attention: str | None) -> nn.Module:
    """Build a family's encoder with random weights and without a pooler.

    Args:
        config: The family's own configuration.
        attention: ``"sdpa"`` or ``"eager"``; a family that has only the second takes that.
    """
    family = family_of(config)
    config._attn_implementation = "eager" if family.relative or attention == "eager" else "sdpa"
    how = {} if family.name == "distilbert" else {"add_pooling_layer": False}
    body: nn.Module = getattr(transformers, family.body)(config, **how)
    return body


# ---------------------------------------------------------------- narrower maps


@dataclass
class Parts:
    """The linear maps of one block that slimming cuts."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    up: nn.Linear
    down: nn.Linear


_PARTS = {
    "query": "attention.query", "key": "attention.key", "value": "attention.value", "out": "attention.out",
    "up": "mlp.up", "down": "mlp.down",
}  # fmt: skip


class Factors(nn.Module):
    """A word embedding as a table of low rank and a map to the stream's width."""

    def __init__(self, vocab: int, rank: int, d_model: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, rank, padding_idx)
        self.map = nn.Linear(rank, d_model, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look rows up and map them.

        Shapes: `input_ids` (batch, tokens); returns (batch, tokens, d_model).
        """
        embedded: Tensor = self.map(self.table(input_ids))
        return embedded


def parts_of(body: nn.Module, anatomy: Anatomy, block: int) -> Parts:
    """Return the linear maps of one block."""
    found: dict[str, Any] = {
        name: body.get_submodule(anatomy.path(f"blocks.{block}.{part}")) for name, part in _PARTS.items()
    }
    return Parts(**found)


def narrow(body: nn.Module, anatomy: Anatomy, heads: list[int], d_ff: list[int], rank: int | None) -> None:
    """Put narrower maps of random weights into an encoder, block by block, and tell its attention its heads."""
    for block in range(anatomy.n_blocks):
        d, inner, neurons = anatomy.d_model, heads[block] * anatomy.head_dim, d_ff[block]
        sizes = {"out": (inner, d), "up": (d, neurons), "down": (neurons, d)}
        sizes |= dict.fromkeys(("query", "key", "value"), (d, inner))
        for name, (into, out) in sizes.items():
            path = anatomy.path(f"blocks.{block}.{_PARTS[name]}")
            old: Any = body.get_submodule(path)
            if (old.in_features, old.out_features) != (into, out):
                body.set_submodule(path, nn.Linear(into, out))
        _count_heads(body, anatomy, block, heads[block])
    if rank is not None:
        table: Any = body.get_submodule(anatomy.path("embed"))
        factors = Factors(anatomy.vocab_size, rank, anatomy.d_model, table.padding_idx)
        body.set_submodule(anatomy.path("embed"), factors)


def _count_heads(body: nn.Module, anatomy: Anatomy, block: int, heads: int) -> None:
    attention: Any = body.get_submodule(anatomy.path(f"blocks.{block}.attention.query").rpartition(".")[0])
    known = {"num_attention_heads": heads, "n_heads": heads, "all_head_size": heads * anatomy.head_dim}
    for name, value in known.items():
        if hasattr(attention, name):
            setattr(attention, name, value)
