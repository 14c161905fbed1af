"""What is to be done to the weights: low-rank factors or whole differences, sized, applied, combined, saved.

A `Change` never touches a model in place: `apply` makes a new one that shares every untouched tensor. Changes recompose
from the unchanged base, so that undoing one is exact (see `ledger`).
"""

from __future__ import annotations

from .adapter import from_peft, to_peft
from .applying import (
    TOLERANCE,
    apply,
    cast_error,
    check_base,
    combine,
    compose,
    edited,
    prove_stored,
    side_by_side,
)
from .folder import FORMAT, load, read_record, save, versions
from .parts import Change, Dense, LowRank, Part, filled, matrix_of, measured_facts, with_report

__all__ = [
    "FORMAT",
    "TOLERANCE",
    "Change",
    "Dense",
    "LowRank",
    "Part",
    "apply",
    "cast_error",
    "check_base",
    "combine",
    "compose",
    "edited",
    "filled",
    "from_peft",
    "load",
    "matrix_of",
    "measured_facts",
    "prove_stored",
    "read_record",
    "save",
    "side_by_side",
    "to_peft",
    "versions",
    "with_report",
]
