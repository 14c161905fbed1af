"""What an edge may promise about its adapter, and the form that clips a trained factor and adds Gaussian noise once.

`local-dp` protects the whole adapter of an edge, released once: nobody can tell, better than (epsilon, delta) allows,
whether the edge has trained on its data or on any other; the number of examples is told beside it and not covered.
`dp-sgd` protects a single example, while training; what is told of the number of examples is a public size. That the edge
took part is covered by neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, unknown

__all__ = ["GUARANTEE", "PRIVACY", "Released", "check_privacy", "epsilon_of", "refuse_unshipped", "released"]

PRIVACY = ("none", "local-dp", "dp-sgd")
GUARANTEE = {"privacy": str, "epsilon": float, "delta": float, "max_norm": float, "noise": float, "unit": str}
"""What is told of a promise, and its types."""
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
            "Use local-dp or dp-sgd, or none with TLS."
        )
    if privacy not in PRIVACY:
        raise unknown("kind of privacy", privacy, PRIVACY)


def check_privacy(privacy: str, name: str, *, freeze_a: bool, loss: bool = False) -> None:
    """Refuse a kind of privacy that does not go with the run, or with what else the edge lets out.

    Args:
        privacy: The kind.
        name: Of the edge.
        freeze_a: Whether the run freezes A.
        loss: Whether the edge tells its training loss.

    Raises:
        UserError: They do not go together.
    """
    refuse_unshipped(privacy)
    if privacy == "local-dp" and not freeze_a:
        raise UserError(
            f"The edge {name} adds noise to its adapter, which needs a frozen A: noise on both factors multiplies. Set "
            "freeze_a in the run, or privacy=dp-sgd at the edge."
        )
    if privacy != "none" and loss:
        raise UserError(
            f"The edge {name} would tell its training loss without noise, which its privacy={privacy} does not cover. "
            "Leave loss=true out."
        )


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
