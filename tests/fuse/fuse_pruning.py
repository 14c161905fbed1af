"""Tiny models that can be pruned: five blocks, of which the first and the last stay whole."""

from __future__ import annotations

from typing import Any

import torch

from retouch.change import LowRank
from retouch.fuse._inputs import Text
from retouch.fuse.base import Adapter
from retouch.model import Model, wrap

# name: family and fields; all but `gemma_one` can lose head groups
PRUNABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma3_text", {}),
    "gemma_one": ("gemma3_text", {"num_key_value_heads": 1}),
}
TEXT = Text(n_tokens=512, sequence_length=64)


def opened(tiny: Any, name: str, **fields: Any) -> Model:
    family, own = PRUNABLE.get(name, (name, {}))
    network, tokenizer = tiny(family, n_blocks=4, **{"num_attention_heads": 4, **own, **fields})
    return wrap(network, tokenizer)


def rows(model: Model) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 400, (2, 9), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model: Model) -> torch.Tensor:
    return model.network(**rows(model), use_cache=False).logits


def random_adapter(model: Model, rank: int = 3, **known: Any) -> Adapter:
    """An adapter of all weights of the blocks, at the sizes that this model has."""
    generator = torch.Generator().manual_seed(5)
    parts = {}
    for block in range(model.anatomy.n_blocks):
        for part in ("attention.query", "attention.key", "attention.value", "attention.out", *MLP):
            n_out, n_in = model.matrix(f"blocks.{block}.{part}").shape
            left, right = torch.randn(n_out, rank, generator=generator), torch.randn(rank, n_in, generator=generator)
            parts[f"blocks.{block}.{part}"] = LowRank(left / 10, right / 10)
    return Adapter("random", parts, model.base_fingerprint, **known)


MLP = ("mlp.gate", "mlp.up", "mlp.down")


def added(model: Model, adapter: Adapter) -> Model:
    """A model with an adapter's difference in its weights; the sum is made in float64 and rounded once."""
    values = {}
    for name, part in adapter.parts.items():
        new = (model.matrix(name).double() + part.delta()).float()
        values[model.anatomy.weight(name)] = new.T if model.anatomy.transposed(name) else new
    return model.with_weights(values)
