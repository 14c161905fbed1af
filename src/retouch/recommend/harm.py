"""How much worse a recommender with knowledge serves a user than the one without, as one number a target.

Every harm is 0 where nothing got worse and is measured per code, in nats, so that catalogues with words of different
length can be compared. Training follows the harm as it is; what is certified is cut at `CAP`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["CAP", "Kind", "capped", "hinge", "kl", "margin"]

Kind = Literal["hinge", "margin", "kl"]

CAP = 1.0
"""No user counts more than this in a mean: a certificate needs harms that are bounded."""


def hinge(reference: Tensor, served: Tensor, slack: float = 0.0) -> Tensor:
    """Return by how much the true item became less likely, beyond what is forgiven.

    Source: arXiv 2605.18771; the published harm, before its mean is taken.

    Shapes:
        reference, served: mean log-probability per code of each target, [targets] -> [targets]

    Example:
        >>> hinge(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -0.5]), 0.25).tolist()
        [0.25, 0.0]
    """
    return (reference - served - slack).clamp(min=0)


def margin(
    reference: tuple[Tensor, Tensor], served: tuple[Tensor, Tensor], n_levels: int, slack: float = 0.0
) -> Tensor:
    """Return by how much the true item lost against its rivals, beyond what is forgiven.

    An item that became less likely together with everything near it has lost nothing here.

    Shapes:
        reference, served: log-probability of each target, [targets], and of its rivals, [targets, rivals]; a rival of
            minus infinity does not count -> [targets]

    Args:
        reference: The recommender without knowledge; its best items but the target are the rivals.
        served: The one with knowledge, on the same rivals.
        n_levels: Codes an item has.
        slack: What is forgiven, per code.
    """
    # a floor in place of minus infinity: the gradient of a sum of nothing is not a number
    before, after = (target - rivals.clamp(min=-1e9).logsumexp(1) for target, rivals in (reference, served))
    alone = reference[1].isneginf().all(1)
    lost = torch.where(alone, torch.zeros_like(before), before - after)
    return (lost / n_levels - slack).clamp(min=0)


def kl(reference: Tensor, served: Tensor, n_levels: int, slack: float = 0.0) -> Tensor:
    """Return how far the probabilities of the reference's best items moved; it needs to know no true item.

    All other items together are one more event.

    Shapes:
        reference, served: log-probability of the same items, [targets, items] -> [targets]
    """
    with_rest = [torch.cat([p, _rest(p)], 1) for p in (reference, served)]
    before, after = with_rest
    terms = torch.where(before.isneginf(), torch.zeros_like(before), before.exp() * (before - after))
    return (terms.sum(1) / n_levels - slack).clamp(min=0)


def _rest(log_probs: Tensor) -> Tensor:
    """Return the logarithm of what the listed events leave of one, kept away from zero for the gradient's sake."""
    return (1 - log_probs.exp().sum(1, keepdim=True)).clamp(min=1e-6).log()


def capped(harm: Tensor) -> Tensor:
    """Return the harm as it is certified, from 0 to `CAP`."""
    return harm.clamp(max=CAP)
