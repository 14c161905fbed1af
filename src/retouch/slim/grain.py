"""GRAIN-like: pruning by one gradient score, distillation apart, one exit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import setting
from .static import Static

__all__ = ["Grain"]


@dataclass(frozen=True)
class Grain(Static):
    """Cut by GRAIN's score: of heads and neurons, the slope of the answers' loss alone, averaged over batches.

    Source: Yang et al., Gradient-based Intra-attention Pruning on Pre-trained Language Models (ACL 2023). Reconstructed
        on whole heads: the published method cuts inside heads, and shares its budget over the whole network.

    Use when: as a static rival with a score of its own.

    Known problems: whole heads are coarser than its own units.

    Shapes: as in `retouch.slim.costeff`.

    Example:
        >>> Grain().score
        'grain'
    """

    score: Literal["gates", "paper", "qkvo", "grain", "magnitude", "random"] = setting(
        "grain", "How heads and neurons are scored."
    )
