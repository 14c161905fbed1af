"""Find values by gradient: the one search that every locate-and-edit method shares.

A vector delta is added to an activation at one position of every row of a group of facts (usually one fact), and
trained until the model says the targets. What lies below the block and before the position runs once; all groups of a
chunk are searched together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..bound import Multiplier
from ..errors import ModelError
from ..model import Model
from ..progress import report
from ._search import Aim, Bystander, Search, Side
from .base import ValueEditMethod
from .rows import Problem

__all__ = ["Aim", "Bystander", "Search", "Settled", "Value", "optimise"]


@dataclass(frozen=True, eq=False)
class Value:
    """What a search found for one fact, or for the facts of one subject.

    Attributes:
        delta: What is to be added to the activation, (d_model,), float32 on the CPU.
        initial: The unchanged activation, (d_model,): the first row's, averaged over a group's distinct left contexts.
        losses: The loss at each step.
        margin: Least lead of a target token over the best other one, in nats, over all rows at the last step; 0 with
            an aim, which never asks for the targets.
        reached: Every target token was the likeliest in every row.
        drift: Mean KL of the bystanders under the expected write, nats; None when there were none.
        distance: How far the aimed-at state was at the start and at the end, in its own lengths; None without an aim.
        stopped: The limit on drift left no step but the one that changes nothing.
    """

    delta: Tensor
    initial: Tensor
    losses: tuple[float, ...]
    margin: float
    reached: bool
    drift: float | None = None
    distance: tuple[float, float] | None = None
    stopped: bool = False

    @property
    def target(self) -> Tensor:
        """The value to write: initial + delta."""
        return self.initial + self.delta

    def notes(self) -> dict[str, float | bool | list[float]]:
        """Return what a report shows."""
        found: dict[str, float | bool | list[float]] = {
            "losses": [round(x, 5) for x in self.losses],
            "margin": self.margin,
            "ratio": float(self.delta.norm() / self.initial.norm()),
            "reached": self.reached,
        }
        if self.drift is not None:
            found["drift"] = self.drift
        if self.distance is not None:
            found["distance"] = list(self.distance)
        if self.stopped:
            found["stopped"] = True
        return found


class Start(NamedTuple):
    """Where a search starts, and how it is held there: mu |d - d0|^2 / |v|^2, |d0| and |d| <= clamp * reach * |v|.

    Shapes:
        delta (groups, d_model), reach (groups,).
    """

    delta: Tensor
    reach: Tensor
    pull: float = 0.0


class Settled(NamedTuple):
    """What changes once a group says its targets everywhere: their NLL weighs less, and it is done by the KL term."""

    weight: float
    kl: float


def optimise(
    model: Model,
    found: Sequence[Problem],
    block: int,
    side: Side,
    settings: ValueEditMethod,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    start: Start | None = None,
    temperature: float | None = None,
    flat: float = 0.0,
    aim: Aim | None = None,
    bystanders: Sequence[Bystander] = (),
    settled: Settled | None = None,
) -> list[Value]:
    """Search a value for every fact, or one for all facts of a group.

        L(delta) = mean_facts mean_rows[ -(1/T) sum_t log P(target_t | row; delta) ]
                 + kl_factor KL(P_delta(. | "{s} is a") || P_before) + weight_decay |delta| / |v|^2

    With bystanders and ``max_drift`` the last two terms give way to ``lambda (drift - max_drift)``, lambda by dual
    ascent, and the best step within the limit is returned.

    Source:
        Meng et al. 2022 (arXiv 2202.05262), section 3.1 and kmeng01/rome; batching, cut passes, masked Adam and the
        multiplier: ours.

    Shapes:
        With F facts of R rows whose tail after the edited token is S long, a step costs 2 passes of F R S tokens
        through the blocks above `block`, and the head at the F R T places that enter the loss.

    Args:
        model: A decoder; its weights get no gradients.
        found: The facts as rows, all with one position.
        block: The edited block.
        side: Add to the output of ``mlp.down``, or to the block's output (the residual stream). ``both``: a value for
            ``mlp.down`` and one for ``attention.out`` at once; each value is the two, one behind the other.
        settings: Of the method.
        groups: Numbers of the facts that share one value; by default each fact has its own.
        start: Where to start; by default at 0.
        temperature: Weigh a group's facts by softmax(NLL / temperature) instead of equally.
        flat: Length of the noise on the value at each step, in the value's own lengths, which looks for wide minima.
        aim: Bring a later state somewhere instead of making the target likely.
        bystanders: Rows that the expected write must leave alone, with their group.
        settled: Let go of targets that are said already.

    Returns:
        One value a group, in order. Groups do not see each other: together or alone they give the same values.

    Raises:
        ModelError: The family's blocks cannot be run from a cut, or the loss is not finite.
    """
    groups = [[i] for i in range(len(found))] if groups is None else groups
    order = sorted(range(len(groups)), key=lambda g: max(_tail(found[i]) for i in groups[g]))
    values: dict[int, Value] = {}
    what = f"Values for {len(found)} fact{'s' * (len(found) != 1)} at block {block}"
    report(what, 0, len(groups))
    heard: dict[int, list[Bystander]] = {}
    for b in bystanders:
        heard.setdefault(b.group, []).append(b)
    for chunk in _chunks(model, found, groups, order, block, settings.budget_mib, heard):
        members = [i for g in chunk for i in groups[g]]
        place = {i: n for n, i in enumerate(members)}
        search = Search(
            model,
            [found[i] for i in members],
            block,
            side,
            settings,
            groups=[[place[i] for i in groups[g]] for g in chunk],
            aim=aim and aim.of(members),
            bystanders=[b.of(n) for n, g in enumerate(chunk) for b in heard.get(g, ())],
        )
        begin = start and Start(start.delta[chunk], start.reach[chunk], start.pull)
        told = _telling(what, len(values), len(chunk), len(groups))
        values.update(zip(chunk, _descend(search, settings, begin, temperature, flat, settled, told)))
        report(what, len(values), len(groups))
    return [values[g] for g in range(len(groups))]


def _telling(what: str, done: int, n: int, total: int) -> Callable[[float], None]:
    """Tell of a chunk that is being searched: after half of the steps, half of its groups."""
    return lambda share: report(what, done + share * n, total)


def _tail(problem: Problem) -> int:
    return max(len(r.seen) - a for r, a in zip(problem.rows, problem.anchors))


def _chunks(
    model: Model,
    found: Sequence[Problem],
    groups: Sequence[Sequence[int]],
    order: Sequence[int],
    block: int,
    budget_mib: int,
    heard: Mapping[int, Sequence[Bystander]],
) -> list[list[int]]:
    """Cut groups, sorted by length, into chunks whose activations fit the budget."""
    a = model.anatomy
    per_column = 4 * (a.n_blocks - block) * (10 * a.d_model + 5 * a.d_ff)
    chunks: list[list[int]] = []
    used = 0.0
    for g in order:
        need = 0.0
        for problem in (found[i] for i in groups[g]):
            longest = max(len(r.seen) for r in problem.rows)
            columns = sum(len(r.seen) - at for r, at in zip(problem.rows, problem.anchors)) + 3
            need += columns * (per_column + 12 * (a.n_blocks - block) * a.heads * 4 * longest)
            need += 16 * a.vocab_size * (1 + sum(len(r.target) for r in problem.rows))
        for b in heard.get(g, ()):
            need += len(b.row.ids) * per_column + 16 * a.vocab_size
        if not chunks or used + need > budget_mib * 2**20:
            chunks.append([])
            used = 0.0
        chunks[-1].append(g)
        used += need
    return chunks


@torch.enable_grad()  # a caller may plan inside torch.no_grad
def _descend(
    search: Search,
    s: ValueEditMethod,
    start: Start | None,
    temperature: float | None,
    flat: float,
    settled: Settled | None,
    told: Callable[[float], None],
) -> list[Value]:
    """Search until every group is done or the steps are used up."""
    initial = search.initial
    n, length, device = len(initial), initial.norm(dim=1), initial.device
    reach = torch.ones(n, device=device) if start is None else start.reach.to(device, torch.float32)
    longest = s.clamp * reach[:, None] * initial.view(n, 2 if search.both else 1, -1).norm(dim=2)
    anchor = torch.zeros_like(initial) if start is None else _within(start.delta.to(device, torch.float32), longest)
    delta, pull = anchor.clone(), start.pull if start else 0.0
    adam, limit = _Adam(delta, s.learning_rate), s.max_drift if search.n_bystanders else 0.0
    prices = [Multiplier(limit, s.price_step / limit) for _ in range(n)] if limit else []
    best = _Best(torch.zeros_like(delta))  # no value has no drift
    active = torch.ones(n, dtype=torch.bool, device=device)
    over = ~active
    losses: list[Tensor] = []
    live: list[Tensor] = []
    margins, distances = torch.zeros(n, device=device), list[Tensor]()
    for step in range(s.n_steps):
        told(step / s.n_steps)
        moved = delta.detach().requires_grad_(True)
        terms = search.terms(moved + flat * length[:, None] * _noise(moved, s.seed + step) if flat else moved)
        fit = search.per_group(terms.nll, temperature)
        if search.aim:
            fit = terms.distance + search.aim.nll * fit
        now = search.worst_margin(terms.margin)
        if settled:
            fit = torch.where(now > 0, settled.weight * fit, fit)
        penalties = [price.penalty(drift) for price, drift in zip(prices, terms.drift)]
        harm = torch.stack(penalties) if limit else s.kl_factor * terms.kl + _decay(moved, length, s)
        held = pull * ((moved - anchor).norm(dim=1) / length) ** 2
        loss = fit + harm + held
        if not torch.isfinite(loss[active]).all():
            raise ModelError("The search's loss is not finite. Use a lower learning rate or a smaller clamp.")
        margins = torch.where(active, now, margins)
        losses.append(loss.detach())
        live.append(active)
        away = terms.distance.detach()
        distances.append(away if not distances else torch.where(active, away, distances[-1]))
        within = terms.drift.detach() <= limit if limit else active
        over = over | (active & ~within)
        best.see(moved.detach(), fit.detach(), terms.drift.detach(), margins, away, active & within)
        if search.aim:
            done = (away < search.aim.stop) | (margins >= s.min_margin if search.asks else away < 0)
        elif settled:
            done = (now > 0) & (s.kl_factor * terms.kl.detach() <= settled.kl)
        elif s.stop == "loss":
            done = (fit if limit else loss).detach() < s.stop_loss
        else:
            done = margins >= s.min_margin
        active = active & ~(done & within)
        if step == s.n_steps - 1 or not active.any():
            break
        (gradient,) = torch.autograd.grad(loss[live[-1] & active].sum(), moved)
        delta = adam.step(delta, gradient, active)
        for price, drift in zip(prices, terms.drift.tolist()):
            price.update(drift)
        delta = _within(delta, longest)
        search.narrow(active)
    if limit:
        delta, margins = best.delta, best.margin
        distances.append(torch.where(best.fit.isfinite(), best.away, distances[0]))
        over = over & (delta == 0).all(1)
    history, kept = torch.stack(losses).cpu(), torch.stack(live).cpu()
    return [
        Value(
            delta[i].detach().cpu(),
            initial[i].cpu(),
            tuple(history[kept[:, i], i].tolist()),
            float(margins[i]),
            bool(margins[i] > 0),
            max(0.0, float(best.drift[i])) if limit else None,  # rounding takes no drift below 0
            (float(distances[0][i]), float(distances[-1][i])) if search.aim else None,
            bool(over[i]),
        )
        for i in range(n)
    ]


def _within(delta: Tensor, longest: Tensor) -> Tensor:
    """Shorten what is longer than allowed, each value that stands in a row by itself.

    Shapes:
        delta (groups, values x d_model), longest (groups, values).
    """
    each = delta.view(*longest.shape, -1)
    share: Tensor = longest[:, :, None] / each.norm(dim=2, keepdim=True).clamp(min=1e-12)
    return (each * share.clamp(max=1)).view(delta.shape)


def _decay(delta: Tensor, length: Tensor, s: ValueEditMethod) -> Tensor:
    """Weigh a value change's own length, as published (a length over a squared length) or squared and relative."""
    relative: Tensor = delta.norm(dim=1) / length
    return s.weight_decay * (relative / length if s.weight_decay_form == "published" else relative**2)


def _noise(like: Tensor, seed: int) -> Tensor:
    """One random vector of length about 1 for all groups, so that they give the same values together and alone."""
    xi: Tensor = torch.randn(like.shape[1], generator=torch.Generator().manual_seed(seed))
    return xi.to(like.device) / math.sqrt(like.shape[1])


class _Best:
    """The step within the limit that says the target best: what a bounded search returns."""

    def __init__(self, delta: Tensor) -> None:
        zero = torch.zeros(len(delta), device=delta.device)
        self.delta = delta.clone()
        self.fit = zero + torch.inf
        self.drift, self.margin, self.away = zero, zero, zero

    def see(self, delta: Tensor, fit: Tensor, drift: Tensor, margin: Tensor, away: Tensor, allowed: Tensor) -> None:
        better = allowed & (fit < self.fit)
        self.delta = torch.where(better[:, None], delta, self.delta)
        new, old = (fit, drift, margin, away), (self.fit, self.drift, self.margin, self.away)
        self.fit, self.drift, self.margin, self.away = (torch.where(better, n, o) for n, o in zip(new, old))


class _Adam:
    """Adam without decay (betas 0.9, 0.999), per coordinate, whose state moves for active groups only."""

    def __init__(self, like: Tensor, learning_rate: float) -> None:
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)
        self.rate, self.steps = learning_rate, 0

    def step(self, delta: Tensor, gradient: Tensor, active: Tensor) -> Tensor:
        """Return the moved delta; rows of inactive groups stay bit for bit."""
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first = self.first / (1 - 0.9**self.steps)
        second = self.second / (1 - 0.999**self.steps)
        return torch.where(active[:, None], delta - self.rate * first / (second.sqrt() + 1e-8), delta)
