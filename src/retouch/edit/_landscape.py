"""The loss around a value: whether a subject's facts pull the same way, how sharp the minimum is, how much drift it bears.

Everything is a function of a vector that is added to the state after one block at the subject's last token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import FactError
from ..model import Model
from ..progress import track
from ..tokens import Row, Text, encode
from ..trace import Suffix
from ._drift import lead_of, wrappings
from ._search import Search
from .base import ValueEditMethod, block_at, require_decoder
from .contexts import Context
from .facts import Fact
from .rome import Rome
from .rows import Problem, grouped, problems
from .value import optimise

__all__ = ["FactLandscape", "Landscape", "SubjectLandscape", "auc", "crossing", "landscape", "top_curvature"]

N_DIRECTIONS = 16
REACH = 4.0
"""The largest drift that is tried, in lengths of the state."""


@dataclass(frozen=True)
class FactLandscape:
    """How much drift of its state one fact bears.

    Attributes:
        prompt: The filled prompt.
        lead: Logit of the answer's first token minus the best other one, at the solution.
        first_order: lead / ‖gradient of lead‖: the drift that a linear model says would end it; 0 when the lead is gone.
        least: Smallest drift that ends the lead, over random directions.
        median: Median of the same.
        n_capped: Directions in which nothing within 4 lengths of the state ends it; these count as that.
        ratios: median / ‖drift of the state‖ for each text before the prompt: above 1 predicts that the answer stays.
        hits: Whether the answer's first token stays the likeliest behind each of these texts.
    """

    prompt: str
    lead: float
    first_order: float
    least: float
    median: float
    n_capped: int
    ratios: tuple[float, ...]
    hits: tuple[bool, ...]


@dataclass(frozen=True)
class SubjectLandscape:
    """The loss of one subject's facts around their common value.

    Attributes:
        subject: The subject.
        n_facts: How many facts.
        cosines_before: Cosine between the gradients of each two facts' NLL with nothing added.
        cosines: The same at the solution.
        sharpness: Largest curvature of the subject's loss at the solution (the Hessian's eigenvalue of largest size).
        norm_ratio: Length of the value over the length of the state.
        loss: The subject's loss at the solution.
    """

    subject: str
    n_facts: int
    cosines_before: tuple[float, ...]
    cosines: tuple[float, ...]
    sharpness: float
    norm_ratio: float
    loss: float


@dataclass(frozen=True)
class Landscape:
    """The loss around the values of facts.

    Attributes:
        block: The block after which the value is added.
        subjects: One entry a subject.
        facts: One entry a fact, in the order of the subjects.
        aucs: How well tolerance over drift tells the texts behind which the answer stays, for each way to take the
            tolerance (first_order, least, median); 0.5 is chance, None when it stays behind all or none.
        accuracy: Share of (fact, text) pairs in which "ratio above 1" was right.
    """

    block: int
    subjects: tuple[SubjectLandscape, ...]
    facts: tuple[FactLandscape, ...]
    aucs: dict[str, float | None]
    accuracy: float

    @property
    def auc(self) -> float | None:
        """That of the median tolerance."""
        return self.aucs["median"]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        return {
            **vars(self),
            "auc": self.auc,
            "subjects": [dict(vars(s)) for s in self.subjects],
            "facts": [dict(vars(f)) for f in self.facts],
        }


def landscape(
    model: Model,
    facts: Sequence[Fact],
    block: int = -1,
    *,
    delta: Tensor | None = None,
    settings: ValueEditMethod | None = None,
    texts: Sequence[str] = (),
    seed: int = 0,
) -> Landscape:
    """Measure gradients, sharpness and tolerance around each subject's value.

    Args:
        model: A decoder: the unedited one with a value, or an edited one with a delta of zeros.
        facts: Facts with a subject; those of one subject share a value.
        block: The value is added to the state after this block; -1: 0.18 of the depth.
        delta: The solution, (subjects, d_model), subjects in order of first appearance; None searches one.
        settings: Of the search and its loss; by default ROME's with the bare prompt only.
        texts: What is put before the prompt for the prediction; by default `wrappings`.
        seed: Of the random directions.

    Raises:
        FactError: There are no facts, one has no subject, or `delta` has another number of rows than there are subjects.
        SettingsError: The model has no such block.
    """
    require_decoder(model, "diagnose")
    if not facts:
        raise FactError("There are no facts to diagnose.")
    at = block_at(block, 0.18, model.anatomy, "block")
    groups = grouped(facts)
    if delta is not None and delta.shape != (len(groups), model.anatomy.d_model):
        raise FactError(f"delta needs a row of {model.anatomy.d_model} for each of {len(groups)} subjects; "
                        f"got {tuple(delta.shape)}.")  # fmt: skip
    settings = Rome(contexts="plain") if settings is None else settings
    chosen = list(texts) or wrappings(model)
    subjects, found = [], []
    for number, members in enumerate(track(groups, "Landscapes")):
        own = [facts[i] for i in members]
        leads = [lead_of(model, fact, settings.bos) for fact in own]
        asked = [problems(model, [f], [Context(t, 1.0)], "subject", settings.bos)[0] for f, t in zip(own, leads)]
        value = _value(model, asked, at, settings) if delta is None else delta[number].to(model.device)
        subjects.append(_subject(model, asked, at, value, settings, seed))
        for fact in own:
            found.append(_fact(model, fact, at, value, chosen, settings, seed))
    hits = [h for f in found for h in f.hits]
    right = sum((r > 1) == h for f in found for r, h in zip(f.ratios, f.hits)) / len(hits)
    aucs = {name: auc(_scores(found, name), hits) for name in ("first_order", "least", "median")}
    return Landscape(at, tuple(subjects), tuple(found), aucs, right)


def _scores(found: Sequence[FactLandscape], name: str) -> list[float]:
    """Return another tolerance over the drift, for every fact and text."""
    return [r * (getattr(f, name) / f.median if f.median else 0.0) for f in found for r in f.ratios]


def _value(model: Model, asked: Sequence[Problem], block: int, settings: ValueEditMethod) -> Tensor:
    """Search one value for all facts of a subject."""
    (value,) = optimise(model, asked, block, "residual", settings, groups=[list(range(len(asked)))])
    return value.delta.to(model.device)


def _subject(
    model: Model, asked: Sequence[Problem], block: int, value: Tensor, settings: ValueEditMethod, seed: int
) -> SubjectLandscape:
    alone = Search(model, asked, block, "residual", settings)
    joint = Search(model, asked, block, "residual", settings, groups=[list(range(len(asked)))])

    def loss(delta: Tensor) -> Tensor:
        terms = joint.terms(delta)
        return joint.per_group(terms.nll) + settings.kl_factor * terms.kl

    at, size = value[None].float(), float(joint.initial.norm())
    slope = _gradient(loss)
    each = _gradient(lambda d: alone.terms(d).nll)
    before, after = (_pairs(each(d.expand(len(asked), -1))) for d in (torch.zeros_like(at), at))
    sharp = float(top_curvature(slope, at, step=1e-2 * size, seed=seed)[0])
    with torch.no_grad():
        lost = float(loss(at)[0])
    return SubjectLandscape(asked[0].fact.subject, len(asked), before, after, sharp, float(at.norm()) / size, lost)


def _gradient(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Turn a function of rows, one number a row, into the gradient of each row's number."""

    def slope(at: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = at.detach().clone().requires_grad_(True)
            (found,) = torch.autograd.grad(function(moved).sum(), moved)
        return found

    return slope


def _pairs(gradients: Tensor) -> tuple[float, ...]:
    unit = functional.normalize(gradients.double(), dim=1)
    return tuple(float(a @ b) for a, b in itertools.combinations(unit, 2))


def top_curvature(
    gradient: Callable[[Tensor], Tensor], at: Tensor, *, step: float, n_iterations: int = 10, seed: int = 0
) -> Tensor:
    """Find the Hessian's eigenvalue of largest size by power iteration, from gradients alone.

    The product of the Hessian with a vector is the central difference of gradients along it: attention kernels have no
    second derivatives.

    Args:
        gradient: The gradient of each row's own function, (rows, d) -> (rows, d).
        at: Where, (rows, d).
        step: Half the distance of the two gradients.
        n_iterations: Of the power iteration.
        seed: Of its start.

    Returns:
        An eigenvalue a row, with its sign, (rows,).

    Example:
        >>> values = torch.tensor([3.0, -1.0])
        >>> top_curvature(lambda x: x * values, torch.zeros(1, 2), step=1.0).round(decimals=4).tolist()
        [3.0]
    """
    start = torch.randn(at.shape, generator=torch.Generator().manual_seed(seed))
    vector = functional.normalize(start.to(at), dim=1)
    curvature = torch.zeros(len(at), device=at.device)
    for _ in range(n_iterations):
        bent = (gradient(at + step * vector) - gradient(at - step * vector)) / (2 * step)
        curvature = (bent * vector).sum(1)
        vector = functional.normalize(bent, dim=1)
    return curvature


# ---------------------------------------------------------------- tolerance


class _Leads:
    """Rows as a function of the state after one block at the subject's last token: the lead of the answer there."""

    def __init__(self, model: Model, rows: Sequence[Row], block: int) -> None:
        anchors = [row.subject or 0 for row in rows]
        ids = [row.ids[: row.prompt + 1] for row in rows]
        self.model, self.suffix = model, Suffix.of(model, ids, anchors, block).above()
        self.state = self.suffix.state[:, 0]
        self.column = torch.tensor([row.prompt - a for row, a in zip(rows, anchors)], device=model.device)
        self.token = torch.tensor([row.target[0] for row in rows], device=model.device)

    def __call__(self, state: Tensor) -> Tensor:
        """Return logit(answer) - best other logit for each row, (rows,)."""
        whole = torch.cat([state[:, None].to(self.suffix.state.dtype), self.suffix.state[:, 1:]], 1)
        last = self.suffix.run(whole)[torch.arange(len(self.column), device=state.device), self.column]
        logits = self.model.logits(last).float()
        own = logits.gather(1, self.token[:, None])[:, 0]
        return own - logits.scatter(1, self.token[:, None], -torch.inf).amax(1)


def _fact(
    model: Model, fact: Fact, block: int, value: Tensor, texts: Sequence[str], settings: ValueEditMethod, seed: int
) -> FactLandscape:
    (bare,) = _rows(model, fact, [lead_of(model, fact, settings.bos)], settings)
    leads = _Leads(model, [bare] * N_DIRECTIONS, block)
    state = leads.state[:1] + value
    one = _Leads(model, [bare], block)
    with torch.no_grad():
        lead = float(one(state)[0])
    slope = float(_gradient(one)(state).norm())
    first = max(0.0, lead) / slope if slope else 0.0
    size = REACH * float(leads.state[0].norm())
    tau = _tolerance(leads, state, size, seed) if lead > 0 else torch.zeros(N_DIRECTIONS)
    others = _Leads(model, _rows(model, fact, texts, settings), block)
    with torch.no_grad():
        hits = (others(others.state + value) > 0).tolist()
    drift = (others.state - leads.state[:1]).norm(dim=1)
    median = float(tau.median())
    ratios = (median / drift.clamp(min=1e-12)).tolist()
    capped = int((tau >= size).sum())
    return FactLandscape(fact.filled, lead, first, float(tau.min()), median, capped, tuple(ratios), tuple(hits))


def _rows(model: Model, fact: Fact, texts: Sequence[str], settings: ValueEditMethod) -> list[Row]:
    asked = [Text(fact.before, fact.subject, fact.after, fact.target, text) for text in texts]
    return encode(model.tokenizer, asked, settings.bos)


@torch.no_grad()
def _tolerance(leads: _Leads, state: Tensor, reach: float, seed: int) -> Tensor:
    drawn = torch.randn(N_DIRECTIONS, state.shape[1], generator=torch.Generator().manual_seed(seed))
    unit = functional.normalize(drawn, dim=1).to(state.device)
    return crossing(lambda rho: leads(state + rho[:, None] * unit), reach, N_DIRECTIONS).cpu()


def crossing(lead: Callable[[Tensor], Tensor], reach: float, n: int, n_steps: int = 12) -> Tensor:
    """Find by bisection how far one can go until a lead is gone.

    Args:
        lead: The leads at n distances, (n,) -> (n,); positive at 0.
        reach: The largest distance; returned where the lead still holds there.
        n: How many.
        n_steps: Halvings of the interval.

    Returns:
        Distances, (n,), at most reach / 2^n_steps above the place where the lead ends.

    Example:
        >>> crossing(lambda rho: 1 - rho, 4.0, 1).round(decimals=2).tolist()
        [1.0]
    """
    high = torch.full((n,), float(reach))
    low = torch.zeros(n)
    gone = lead(high).cpu() <= 0
    for _ in range(n_steps):
        middle = (low + high) / 2
        over = lead(middle).cpu() <= 0
        high, low = torch.where(over & gone, middle, high), torch.where(over | ~gone, low, middle)
    return high


def auc(scores: Sequence[float], hits: Sequence[bool]) -> float | None:
    """Return the chance that a hit has a higher score than a miss, ties half; None without hits or without misses.

    Example:
        >>> auc([0.9, 0.4, 0.6, 0.1], [True, True, False, False])
        0.75
    """
    good = torch.tensor([s for s, h in zip(scores, hits) if h], dtype=torch.float64)
    bad = torch.tensor([s for s, h in zip(scores, hits) if not h], dtype=torch.float64)
    if not len(good) or not len(bad):
        return None
    ahead = good[:, None] - bad
    return float(((ahead > 0).double() + 0.5 * (ahead == 0)).mean())
