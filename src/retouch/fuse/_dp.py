"""Train so that no single example shows: gradients clipped example by example, noise on their sum, and what that promises.

Rows are drawn by chance at every step, each by itself, since the stated epsilon holds for such draws and for no fixed
order. Draws and noise come from the system, not from the run's seed, which the cloud knows. How often a row is drawn and
how many steps there are follow from a public size and not from the number of examples, which would be told with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..tokens import Row

__all__ = ["UNIT", "Private", "Steps", "epsilon_of_steps", "public_size_of"]

UNIT = "one example of the edge, there or not, among data of the same public size"
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
Loss = Callable[[Sequence[Row]], Tensor]


@dataclass(frozen=True)
class Private:
    """How much each example may move the adapter, and how much noise hides it.

    Attributes:
        max_norm: Largest length of one example's gradient, over all weights together.
        noise: Standard deviation of the noise, as a multiple of `max_norm`.
        delta: Of the guarantee.
        seed: Of draws and noise; None, from the system, is the only private one.
        public_size: A number of examples that everybody may know, from which draws and steps follow; 0 is the power of two
            at or above the real one.
    """

    max_norm: float = 1.0
    noise: float = 1.0
    delta: float = 1e-5
    seed: int | None = None
    public_size: int = 0

    def size_of(self, n: int) -> int:
        """Return what may be told of a number of examples."""
        return public_size_of(n, self.public_size)


def public_size_of(n: int, chosen: int = 0) -> int:
    """Return the number of examples that an edge says it has: the one chosen, or the power of two at or above its own.

    Args:
        n: How many it has.
        chosen: Known to everybody beforehand; 0 lets the number itself decide, so that only its order is told.
    """
    return chosen or 1 << max(0, n - 1).bit_length()


@dataclass(eq=False)
class Steps:
    """The private part of a training run.

    Source:
        Abadi et al., Deep Learning with Differential Privacy (2016), with Poisson sampling.

    Attributes:
        how: Clipping and noise.
        rows: The own examples.
        expected: How many a step would draw on average from as many rows as the public size says.
        weights: What is trained.
        loss: Sums the loss over the answers' tokens of rows.
        share: Of own examples in a step; the rest is public and needs no noise.
    """

    how: Private
    rows: Sequence[Row]
    expected: int
    weights: Sequence[nn.Parameter]
    loss: Loss
    share: float = 1.0
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.size = self.how.size_of(len(self.rows))
        self.expected = min(self.expected, self.size)
        self.generator.seed() if self.how.seed is None else self.generator.manual_seed(self.how.seed)

    @property
    def rate(self) -> float:
        """With what probability a step takes an example."""
        return self.expected / self.size

    def gradient(self, public: Sequence[Sequence[Row]] = ()) -> float:
        """Write the step's gradient into the weights.

        Args:
            public: Batches of public rows; their gradient is added as it is.

        Returns:
            The public rows' mean loss; that of the own ones would be told without noise.
        """
        total = self._noisy(self._clipped())
        loss, n_answers = 0.0, sum(len(row.target) for batch in public for row in batch)
        for batch in filter(None, public):
            part = self.loss(batch) / n_answers
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        share = self.share if n_answers else 1.0
        for weight, own in zip(self.weights, total):
            others = 0 if weight.grad is None else weight.grad * (1 - share)
            weight.grad = own * share + others
        return loss

    def _clipped(self) -> list[Tensor]:
        """Sum the gradients of the drawn examples, each cut to the largest length."""
        drawn = torch.rand(len(self.rows), generator=self.generator) < self.rate
        total = [torch.zeros_like(w) for w in self.weights]
        for number in drawn.nonzero().flatten().tolist():
            row = self.rows[number]
            (self.loss([row]) / len(row.target)).backward()  # type: ignore[no-untyped-call]
            own = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights]
            length = float(torch.stack([g.norm() for g in own]).norm())
            scale = min(1.0, self.how.max_norm / length) if length else 1.0
            for sum_, gradient, weight in zip(total, own, self.weights):
                sum_.add_(gradient, alpha=scale)
                weight.grad = None
        return total

    def _noisy(self, total: Sequence[Tensor]) -> list[Tensor]:
        """Add noise and divide by the expected number: the drawn one is not told."""
        deviation = self.how.noise * self.how.max_norm
        noise = [torch.randn(t.shape, generator=self.generator).to(t.device) * deviation for t in total]
        return [(t + n) / self.expected for t, n in zip(total, noise)]

    def facts(self, n_steps: int) -> Mapping[str, Any]:
        """Say what the steps so far promise."""
        how = self.how
        epsilon = epsilon_of_steps(how.noise, self.rate, n_steps, how.delta)
        return {
            "privacy": "dp-sgd", "epsilon": epsilon, "delta": how.delta, "max_norm": how.max_norm, "noise": how.noise,
            "unit": UNIT,
        }  # fmt: skip


def epsilon_of_steps(noise: float, rate: float, n_steps: int, delta: float) -> float:
    """Return the epsilon of steps of DP-SGD, for one example more or less.

    Source:
        Renyi divergence of the Gaussian mechanism under Poisson sampling at whole orders (Mironov, Talwar and Zhang
        2019), turned into epsilon as Canonne, Kamath and Steinke (2020) do.

    Args:
        noise: Standard deviation as a multiple of the clipping norm.
        rate: Probability with which a step takes an example.
        n_steps: How many steps.
        delta: The probability that is left out.
    """
    if n_steps == 0 or rate == 0:
        return 0.0
    if noise == 0:
        return math.inf
    found: list[float] = [
        n_steps * _divergence(order, noise, rate) + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order in _ORDERS
    ]
    return max(0.0, min(found))


def _divergence(order: int, noise: float, rate: float) -> float:
    if rate >= 1:
        return order / (2 * noise * noise)
    terms = [
        math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * noise * noise)
        for k in range(order + 1)
    ]  # fmt: skip
    most = max(terms)
    return (most + math.log(math.fsum(math.exp(t - most) for t in terms))) / (order - 1)
