"""``bounded``: a mean whose weights answer best while no domain loses more than it may."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ..bound import Multiplier
from ..progress import report
from ..settings import setting
from .base import Adapter, Ground
from .cat import Cat

if TYPE_CHECKING:
    from torch import Tensor

    from ._weighing import Asked, Mixture

__all__ = ["Bounded"]

_log = logging.getLogger("retouch")
MEANING = (
    "A domain's multiplier is the price of its bound: by how many nats the cross-entropy of the selection questions "
    "would fall for each nat of harm more that the domain were allowed. 0: its bound costs nothing."
)


@dataclass(frozen=True)
class Bounded(Cat):
    """Weigh the adapters for the best answers on selection, holding every domain's harm by a multiplier; fuse as `cat`.

    Minimises the cross-entropy of the right answers over weights w from -1.5 to 1.5 subject to ``h_j <= eps_j``, where
    h_j is the mean over domain j's questions of ``max(0, log p_reference(right) - log p_w(right))``. Each domain has a
    multiplier, which rises while its harm is above eps_j. Where the measured drop of right answers then exceeds half of
    `max_drop`, the domain's eps_j is halved and the search is done again.

    Source:
        Our own: learned weights (LoraHub, Huang et al., COLM 2024; LoRA Soups, Prabhakar et al., COLING 2025) under
        constraints by a primal-dual method.

    Use when:
        No domain may lose: certify afterwards with ``--max-harm``, whose limit `max_drop` should be.

    Known problems:
        It chooses on selection, so it proves nothing; that is the certificate's work. Where no weights keep the bounds
        it says so and gives those that exceed them least. The weights set the scale too, so `lam` is not tuned. All
        factors are in memory at once. ``per=module`` has as many weights as matrices times adapters and so fits the
        selection questions more closely; ask more of them, and let the certificate judge.

    Shapes:
        A step costs a forward and a backward pass over the questions' prompts, and the ranks of all adapters.

    Example:
        >>> Bounded(max_drop=0.02).reference
        'best'
    """

    max_drop: float = setting(
        0.05, "Share of right answers that any domain may lose; half of it is aimed at.", gt=0, le=1
    )
    reference: Literal["best", "base"] = setting(
        "best", "What a domain is compared with: the better of the base and any single adapter, or the base."
    )
    harm: float = setting(0.1, "Harm in nats that each domain is first allowed.", gt=0)
    n_rounds: int = setting(5, "How often allowed harms are halved, and weights sought again, at most.", ge=1)
    n_steps: int = setting(60, "Steps of Adam in a round.", ge=1)
    learning_rate: float = setting(0.05, "Of the weights.", gt=0)
    price_step: float = setting(0.5, "How far one nat of harm too many raises a multiplier in a step.", gt=0)
    box: float = setting(1.5, "Largest size of a weight.", gt=0)
    n_questions: int = setting(64, "Selection questions of each domain at most.", ge=1)
    per: Literal["adapter", "module"] = setting(
        "adapter", "One weight an adapter, or one for each adapter in every matrix of the model."
    )

    averages: ClassVar[bool] = False
    resolvable: ClassVar[bool] = False
    chooses: ClassVar[bool] = True
    needs: ClassVar[Literal["", "selection", "moments"]] = "selection"

    def takes_entries(self) -> bool:
        """The weights are chosen for the differences as they are."""
        return False

    def weigh(
        self, adapters: Sequence[Adapter], weights: Sequence[float], ground: Ground | None
    ) -> tuple[Sequence[float], Mapping[str, Any]]:
        """Search for the weights, round after round."""
        from ._weighing import Mixture

        assert ground is not None
        mixture = Mixture(adapters, ground, self.n_questions, self.seed)
        against = _References(mixture, [a.name for a in adapters], self.reference)
        limits, prices = [self.harm] * len(mixture.domains), [0.0] * len(mixture.domains)
        start = torch.tensor(weights, dtype=torch.float64)
        if self.per == "module":
            start = start.expand(len(mixture.modules), -1)
        rounds: list[_Round] = []
        for _ in range(self.n_rounds):
            report("weighing adapters", len(rounds), self.n_rounds)
            rounds.append(self._round(mixture, against, start, limits, prices))
            lost = [drop > self.max_drop / 2 for drop in rounds[-1].best.drops]
            if not any(lost):
                break
            limits = [limit / 2 if too_much else limit for limit, too_much in zip(limits, lost)]
            if rounds[-1].exceeded:  # stuck where every small step harms: begin nearer the base, at the price learnt
                start, prices = start / 4, list(rounds[-1].prices)
        chosen = min(rounds, key=lambda r: max(self.max_drop / 2, *r.best.drops))  # of equals the first: the loosest
        holds = max(chosen.best.drops) <= self.max_drop / 2
        if not holds:
            _log.warning(
                "bounded found no weights that keep every domain's drop on selection within %.3g, half of max_drop; "
                "the nearest lose %.3g on %s. Certify the result before using it.",
                self.max_drop / 2, *max(zip(chosen.best.drops, mixture.domains)),
            )  # fmt: skip
        told: dict[str, Any] = {"weighing": self._told(mixture, against, chosen, len(rounds), holds)}
        found = chosen.best.weights
        if found.dim() == 1:
            return found.tolist(), told
        told["weights_of"] = dict(zip(mixture.modules, found.tolist()))
        return found.mean(0).tolist(), told

    def _round(
        self, mixture: Mixture, against: _References, start: Tensor, limits: Sequence[float],
        values: Sequence[float],
    ) -> _Round:  # fmt: skip
        """Go down by Adam while the multipliers go up; return the best point on the way."""
        w = start.clamp(max=self.box).clone().requires_grad_(True)
        optimizer = torch.optim.Adam([w], lr=self.learning_rate)
        prices = [Multiplier(limit, self.price_step, value) for limit, value in zip(limits, values)]
        share, n = 1 / mixture.sizes, len(mixture.domain)

        def loss(rows: Tensor, likely: Tensor) -> Tensor:
            harms = against.harm(rows, likely) * share[mixture.domain[rows]]
            priced = [p.penalty(harms[mixture.domain[rows] == j].sum()) for j, p in enumerate(prices)]
            return -likely.sum() / n + torch.stack(priced).sum()

        points = []
        for step in range(self.n_steps + 1):
            optimizer.zero_grad()
            last = step == self.n_steps
            points.append(against.point(w, mixture.ask(w.detach() if last else w, None if last else loss)))
            if last:
                break
            for price, harm in zip(prices, points[-1].harms):
                price.update(harm)
            optimizer.step()
            with torch.no_grad():
                w.clamp_(-self.box, self.box)
        return _Round(min(points, key=lambda p: p.rank(limits)), tuple(limits), tuple(p.value for p in prices))

    def _told(
        self, mixture: Mixture, against: _References, chosen: _Round, n_rounds: int, holds: bool
    ) -> dict[str, Any]:
        prices = dict(zip(mixture.domains, chosen.prices))
        return {
            "multipliers": prices, "meaning": MEANING,
            "paying_for": max(prices, key=lambda d: prices[d]) if any(prices.values()) else None,
            "harm": dict(zip(mixture.domains, chosen.best.harms)),
            "harm_allowed": dict(zip(mixture.domains, chosen.limits)),
            "drop": dict(zip(mixture.domains, chosen.best.drops)),
            "reference": dict(zip(mixture.domains, against.names)),
            "max_drop": self.max_drop, "holds_on_selection": holds, "n_rounds": n_rounds,
            "n_questions": len(mixture.domain), "cross_entropy": chosen.best.entropy,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Point:
    """Weights, and what they do to each domain."""

    weights: Tensor
    entropy: float
    harms: tuple[float, ...]
    drops: tuple[float, ...]

    def rank(self, limits: Sequence[float]) -> tuple[float, float]:
        """Order points: within all bounds by cross-entropy, else by how far a bound is exceeded."""
        return max(0.0, *(h - limit for h, limit in zip(self.harms, limits))), self.entropy


@dataclass(frozen=True, eq=False)
class _Round:
    best: _Point
    limits: tuple[float, ...]
    prices: tuple[float, ...]

    @property
    def exceeded(self) -> bool:
        """Whether no point on the way was within all bounds."""
        return self.best.rank(self.limits)[0] > 0


class _References:
    """What each domain is compared with, by its answers to the same questions."""

    def __init__(self, mixture: Mixture, adapters: Sequence[str], which: Literal["best", "base"]) -> None:
        self.mixture = mixture
        zero = torch.zeros(len(adapters))
        systems = {"base": mixture.ask(zero)}
        if which == "best":
            eye = torch.eye(len(adapters))
            systems |= {f"adapter {name}": mixture.ask(eye[i]) for i, name in enumerate(adapters)}
        self.base, names = systems["base"], list(systems)
        right = torch.stack([mixture.mean(s.right) for s in systems.values()]).tolist()
        likely = torch.stack([mixture.mean(s.likely) for s in systems.values()]).tolist()
        best = [
            max(range(len(names)), key=lambda s: (right[s][j], likely[s][j], -s)) for j in range(len(mixture.domains))
        ]
        self.names = [names[s] for s in best]
        of = torch.tensor(best)[mixture.domain]
        rows = torch.arange(len(of))
        self.likely = torch.stack([s.likely for s in systems.values()])[of, rows]
        self.right = torch.stack([s.right for s in systems.values()])[of, rows]

    def harm(self, rows: Tensor, likely: Tensor) -> Tensor:
        """Return by how much less likely right answers are than the reference finds them, never below 0."""
        return (self.likely[rows] - likely).clamp_min(0)

    def point(self, weights: Tensor, asked: Asked) -> _Point:
        """Measure weights: the drop is the larger of that to the base and that to the reference."""
        harms = self.mixture.mean(self.harm(torch.arange(len(self.likely)), asked.likely)).tolist()
        drops = [self.mixture.mean(r.float() - asked.right.float()) for r in (self.right, self.base.right)]
        worse = torch.maximum(*drops).tolist()
        return _Point(weights.detach().clone(), asked.cross_entropy, tuple(harms), tuple(worse))
