"""``continued``: the reference trained on, with the policy's loop and budget and without knowledge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import setting
from .lwgr import LWGR

__all__ = ["Continued"]


@dataclass(frozen=True)
class Continued(LWGR):
    """Train the reference for as long as a policy is trained, on the same targets, at the same rates: the honest rival.

    What a policy gains over it comes from knowledge; the rest comes from training longer.

    Source:
        The loop of ``lwgr`` with nothing added to the first input. With ``constraint="none"`` it is plain further
        training, and its harm is what any retraining brings.

    Use when:
        A policy is reported. Its line belongs beside the policy's.

    Known problems:
        Settings of instructions and of the language model do nothing here, nor does ``n_alone``: the generator moves as
        long and as fast as a policy's does, on all targets.

    Example:
        >>> Continued().knowledge
        'none'
    """

    knowledge: Literal["none"] = setting("none", "Nothing is added.")
