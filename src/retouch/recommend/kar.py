"""``kar``: the same knowledge path with one fixed prompt for everybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import setting
from .lwgr import LWGR

__all__ = ["KAR"]


@dataclass(frozen=True)
class KAR(LWGR):
    """Ask a language model the same fixed question about every user, and let its answer in as ``lwgr`` does.

    The question stands in front of the titles; the answer is the mean of the last states over the titles, adapted by a
    small network. Nothing in front of the adaptor is trained, so the language model reads each history once.

    Source:
        After KAR, "Towards Open-World Recommendation with Knowledge Augmentation from Large Language Models" (Xi et
        al., arXiv 2306.10933): fixed prompts and an adaptor. The fusion, loop and constraint are those of ``lwgr``, so
        that only the instructions differ.

    Use when:
        You want to know what personal instructions add to a fixed one.

    Known problems:
        KAR itself lets the language model write texts and encodes them; here its states are read.

    Example:
        >>> KAR().settled().order
        'prefix'
    """

    instruction: Literal["prompt"] = setting("prompt", "A fixed text.")
    order: Literal["prefix"] | None = setting("prefix", "The question stands in front.")
