"""Release an adapter with noise: clip its trained factor, add Gaussian noise once, and say what that promises.

What is protected is the whole adapter of an edge, not a single example: from what is released nobody can tell, better
than (epsilon, delta) allows, whether the edge has trained on its data or on any other. The number of examples and the
fact that the edge took part are not covered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, unknown

__all__ = ["PRIVACY", "Released", "epsilon_of", "refuse_unshipped", "released"]

PRIVACY = ("none", "local-dp")
UNIT = "the whole adapter of an edge, released once"


@dataclass(frozen=True, eq=False)
class Released:
    """A factor that may be told to others.

    Attributes:
        left: B of each weight, clipped and with noise.
        facts: The guarantee, in words and numbers.
    """

    left: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def refuse_unshipped(privacy: str) -> None:
    """Refuse a kind of privacy that is not offered.

    Raises:
        UserError: It is secure aggregation, which is not shipped.
        UnknownName: There is no such kind.
    """
    if privacy == "secagg-linear":
        raise UserError(
            "secagg-linear is not offered: with masked sums the cloud sees no single adapter, so conflict reports, "
            "screening and every method but the plain mean would be blind, and edges that drop out are not handled yet. "
            "Use local-dp, or none with TLS."
        )
    if privacy not in PRIVACY:
        raise unknown("kind of privacy", privacy, PRIVACY)


def released(
    left: Mapping[str, Tensor], max_norm: float, noise: float, delta: float, *, seed: int | None = None
) -> Released:
    """Clip all B together to a Frobenius norm and add Gaussian noise to every entry.

    Source:
        The Gaussian mechanism; epsilon by Balle and Wang (2018), for any two data sets of an edge.

    Args:
        left: B of each weight; A must be frozen and the same for every data set.
        max_norm: Largest norm of all of it.
        noise: Standard deviation as a multiple of `max_norm`.
        delta: Of the guarantee.
        seed: By default drawn from the system.
    """
    total = math.sqrt(math.fsum(float(t.double().pow(2).sum()) for t in left.values()))
    scale = min(1.0, max_norm / total) if total else 1.0
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    noisy = {
        name: t.float() * scale + noise * max_norm * torch.randn(t.shape, generator=generator)
        for name, t in left.items()
    }
    facts = {
        "privacy": "local-dp", "epsilon": epsilon_of(noise, delta), "delta": delta, "max_norm": max_norm, "noise": noise,
        "unit": UNIT,
    }  # fmt: skip
    return Released(noisy, facts)


def epsilon_of(noise: float, delta: float) -> float:
    """Return the epsilon of one Gaussian release.

    Two data sets give factors that lie at most twice the clipping norm apart.

    Args:
        noise: Standard deviation as a multiple of the clipping norm.
        delta: The probability that is left out.
    """
    from scipy.special import log_ndtr, ndtr

    distance = 2 / noise

    def left_out(epsilon: float) -> float:
        first = float(ndtr(distance / 2 - epsilon / distance))
        return first - math.exp(min(700.0, epsilon + float(log_ndtr(-distance / 2 - epsilon / distance))))

    low, high = 0.0, 1.0
    if left_out(low) <= delta:
        return 0.0
    while left_out(high) > delta:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if left_out(middle) > delta else (low, middle)
    return high
