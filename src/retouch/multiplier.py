"""The price of a constraint while something is optimised: it steers, and proves nothing; see `bound` for what proves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from .errors import UserError

__all__ = ["Multiplier"]


T = TypeVar("T")


@dataclass
class Multiplier:
    """The price of a constraint E[harm] <= limit while something is optimised: it rises while the limit is exceeded.

    Each step, add `penalty` to the loss that is minimised, then `update` with the harm that was measured. The price
    settles at the constraint's Lagrange multiplier, or at 0 when the constraint costs nothing.

    Args:
        limit: The harm that is allowed.
        step_size: How far one unit of excess raises the price in one update.
        value: The price at the start.
        maximum: The price never exceeds it.
        smoothing: Share of the running mean that is kept at each update, from 0 (none) to below 1, for noisy harms.
        damping: How far a rise of the (smoothed) harm since the update before raises the price on top. A price that
            only adds up excess comes late and swings around the limit; this part answers at once and is gone again.

    Raises:
        UserError: An argument is outside of its range.

    Example:
        >>> price = Multiplier(limit=0.1, step_size=1.0)
        >>> round(price.update(0.3), 3), round(price.update(0.0), 3), price.update(0.0)
        (0.2, 0.1, 0.0)
    """

    limit: float
    step_size: float = 0.1
    value: float = 0.0
    maximum: float = math.inf
    smoothing: float = 0.0
    smoothed: float | None = field(default=None, repr=False)
    damping: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.step_size > 0 and math.isfinite(self.step_size)):
            raise UserError(f"A multiplier needs a finite limit and a step size above 0; got {self.limit!r} and "
                            f"{self.step_size!r}.")  # fmt: skip
        if not (0 <= self.smoothing < 1 and 0 <= self.value <= self.maximum):
            raise UserError(
                f"A multiplier needs 0 <= smoothing < 1 and 0 <= value <= maximum; got smoothing {self.smoothing!r}, "
                f"value {self.value!r}, maximum {self.maximum!r}."
            )
        if not 0 <= self.damping < math.inf:
            raise UserError(f"A multiplier needs a finite damping of at least 0; got {self.damping!r}.")

    def update(self, harm: float) -> float:
        """Move the price by the excess of `harm` over the limit, never below 0, and return it.

        Args:
            harm: A number, or a tensor or array that holds one; its gradient is not followed.

        Raises:
            UserError: `harm` is not finite; the price is unchanged.
        """
        harm = float(getattr(harm, "detach", lambda: harm)())
        if not math.isfinite(harm):
            raise UserError(f"The harm must be a finite number; got {harm!r}. The optimisation has diverged: lower its "
                            "learning rate.")  # fmt: skip
        kept = self.smoothing if self.smoothed is not None else 0.0
        before, self.smoothed = self.smoothed, kept * (self.smoothed or 0.0) + (1 - kept) * harm
        rise = 0.0 if before is None else self.smoothed - before
        moved = self.value + self.step_size * (self.smoothed - self.limit) + self.damping * rise
        self.value = min(self.maximum, max(0.0, moved))
        return self.value

    def penalty(self, harm: T) -> T:
        """Return value * (harm - limit), to be added to the loss; `harm` may be a number, an array or a tensor."""
        return cast(T, self.value * (cast(Any, harm) - self.limit))
