"""Serve policy and reference in one: a mixture of their probabilities, with a bound on harm that needs no data.

With a share w of the policy, every item of every user keeps at least 1 - w of the probability that the reference gives
it. So the loss of log-probability is at most -ln(1 - w) nats, always.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

__all__ = ["harm_at_most", "is_exact", "largest_weight", "log_mixture"]

Floats = NDArray[np.float64]


def log_mixture(reference: Floats, policy: Floats, weight: float) -> Floats:
    """Return the log-probability of items under the mixture.

    Shapes: any, twice -> the same

    Args:
        reference: Log-probability of whole items under the reference, in nats.
        policy: Under the policy.
        weight: The policy's share, from 0 to 1.

    Raises:
        UserError: The share lies outside of 0 to 1.
    """
    _check(weight)
    with np.errstate(divide="ignore"):
        mixed: Floats = np.logaddexp(np.log1p(-weight) + reference, np.log(weight) + policy)
    return mixed


def largest_weight(slack: float, n_levels: int) -> float:
    """Return the largest share that never costs any item more than `slack` nats per code.

    Example:
        >>> round(largest_weight(0.05, 4), 2)
        0.18
    """
    return 1 - math.exp(-n_levels * slack)


def harm_at_most(weight: float, n_levels: int) -> float:
    """Return what a share costs any item at most, in nats per code; infinite for a share of 1."""
    _check(weight)
    return math.inf if weight == 1 else -math.log1p(-weight) / n_levels


def is_exact(kth: Floats, reference_bound: Floats, policy_bound: Floats, weight: float) -> NDArray[np.bool_]:
    """Tell whether the best items of the union of two searches are the mixture's best of the whole catalogue.

    An item that neither search kept has at most the larger of each one's worst kept and best dropped score.

    Shapes: [requests] each -> [requests]

    Args:
        kth: Log-probability of the k-th best item of the union under the mixture.
        reference_bound: The larger of the reference's worst kept and best dropped log-probability.
        policy_bound: The same of the policy.
        weight: The policy's share.
    """
    return np.asarray(kth > log_mixture(reference_bound, policy_bound, weight))


def _check(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise UserError(f"The policy's share of a mixture lies between 0 and 1; got {weight!r}.")
