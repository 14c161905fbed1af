"""A fitted policy: what ranks items, with the parts it is made of and the record of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ._draws import Asked
from .policy import Policy
from .scorer import GenerativeScorer
from .splits import Samples

__all__ = ["PolicyScorer"]


@dataclass(frozen=True, eq=False)
class PolicyScorer(GenerativeScorer):
    """Rank a catalogue with a policy.

    Attributes:
        policy: The trained policy, in eval mode.
        asked: Whose histories knowledge is made from.
        record: How it was trained: settings, epochs, notes; with ``history`` the price and harm of every step.
    """

    policy: Policy | None = None
    asked: Asked | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: Policy, asked: Asked, record: Mapping[str, Any], **how: Any) -> PolicyScorer:
        """Make the scorer whose knowledge is fresh."""
        made = cls(policy.generator, data=asked.data, policy=policy, asked=asked, record=record, **how)
        return made.at_lag(0)

    def at_lag(self, lag: int) -> PolicyScorer:
        """Return the scorer whose knowledge is `lag` items too old, as records are between two renewals."""
        assert self.policy is not None and self.asked is not None
        policy, asked = self.policy, self.asked

        def of_samples(samples: Samples) -> Tensor:
            return policy.residuals(asked.windows(samples, lag))

        return replace(self, residuals=of_samples, window_residuals=policy.residuals)

    def without_knowledge(self) -> PolicyScorer:
        """Return the scorer that never asks: the last rung of a server that holds no reference."""
        return replace(self, residuals=None, window_residuals=None)

    @torch.no_grad()
    def residual_table(self, samples: Samples, lag: int = 0) -> Tensor:
        """Return what knowledge adds for each sample, (samples, d_model)."""
        assert self.policy is not None and self.asked is not None
        return self.policy.residuals(self.asked.windows(samples, lag))
