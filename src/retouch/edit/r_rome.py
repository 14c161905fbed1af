"""R-ROME: ROME with one key in direction and scale."""

from __future__ import annotations

from dataclasses import dataclass

from .rome import Rome

__all__ = ["RRome"]


@dataclass(frozen=True)
class RRome(Rome):
    """Write each fact as rome does, always with the mean key in direction and scale.

    Source: Gupta et al., Rebuilding ROME (arXiv 2403.07175); scalable-model-editing/rebuilding-rome. Our rome does the
        same by default; the two differ under ``faithful``, where this one takes the 21 contexts and keeps the mean key.

    Use when: you compare with the authors' setting; otherwise rome is the same edit.

    Known problems: those of rome, without its exploding scale.

    Shapes: as rome.

    Example:
        >>> RRome().clamp
        4.0
    """

    @property
    def consistent(self) -> bool:
        """Always the mean key in both places."""
        return True
