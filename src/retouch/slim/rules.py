"""When a row may leave: how unsure an exit is, and which exits are asked.

The arithmetic has one home, ``retouch._rules``, from which the router takes it without loading torch.
"""

from __future__ import annotations

from .._rules import (
    ALWAYS,
    RULES,
    TOLERANCE,
    Floats,
    Ints,
    Rule,
    State,
    advance,
    due,
    fitting,
    log_softmax,
    uncertainty,
)

__all__ = [
    "ALWAYS",
    "RULES",
    "TOLERANCE",
    "Floats",
    "Ints",
    "Rule",
    "State",
    "advance",
    "due",
    "fitting",
    "log_softmax",
    "uncertainty",
]
