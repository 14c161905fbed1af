"""How long a row a network can read: where positions come from a table, the table ends."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["longest_row", "refuse_longer"]

_TABLES = {"wpe", "embed_positions", "position_embeddings"}
"""Names of modules and buffers that hold a row a position."""


def longest_row(network: nn.Module) -> int | None:
    """Return the most tokens of a decoder's row; None where positions are computed and have no end."""
    parts = itertools.chain(network.named_modules(), network.named_buffers())
    config: Any = network.config
    has_table = any(name.rpartition(".")[2] in _TABLES for name, _ in parts)
    return getattr(config, "max_position_embeddings", None) if has_table else None


def refuse_longer(n_tokens: int, longest: int | None, source: str) -> None:
    """Refuse a row that goes beyond the table of positions.

    Raises:
        UserError: With both lengths.
    """
    if longest is not None and n_tokens > longest:
        raise UserError(
            f"A text of {n_tokens:,} tokens, those to be written counted, is longer than {source} can read: {longest:,}. "
            "Shorten it, or take another model."
        )
