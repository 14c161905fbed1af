"""Which process this one is, of those that work together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = ["state"]


def state() -> PartialState:
    """Return where this process stands among those of an `accelerate launch`; a process of its own is the main one."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # the state does not read this flag by itself, and once made without it, every CPU process is alone
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
