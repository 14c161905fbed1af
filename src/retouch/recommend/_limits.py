"""What one server of recommendations takes, beside what every server of ours does."""

from __future__ import annotations

from dataclasses import dataclass

from .. import _gate
from ..settings import setting

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits(_gate.Limits):
    """What one server of recommendations takes."""

    n_batch: int = setting(64, "Questions in one batch.", ge=1)
    deadline_ms: float = setting(200.0, "Time for an answer, ms; ten times as much with reasons.", gt=0)
    n_together: int = setting(32, "Questions that are computed together at most.", ge=1)
    wait_ms: float = setting(3.0, "How long the first of them waits for others when there are any, ms.", ge=0)
