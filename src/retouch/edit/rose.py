"""RoSE, reconstructed from the abstract: facts about one subject, written so that they survive instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import linalg
from ..model import Model
from ..settings import setting
from .base import down, metrics, null_spaces
from .contexts import Context, contexts_for
from .keys import mean_keys, read_all
from .rows import Problem, grouped, problems
from .spread import SpreadMethod, Writer
from .value import Start, Value, optimise

__all__ = ["Rose", "least_norm"]

Integration = Literal["minnorm", "mean", "sum", "joint", "tree"]


@dataclass(frozen=True)
class Rose(SpreadMethod):
    """Write several facts about one subject as one value found in two steps, with an isotropic write.

    Source: RoSE, reconstructed from the abstract (arXiv 2603.15518; no code, tables or constants were public). The
        isotropic write stands for its Isotropic Geometric Alignment, a value for each fact first and their
        integration afterwards for its Hierarchical Knowledge Integration; the formulas are ours.

    Use when: several facts about one subject have to hold, also when they are asked as instructions. Needs no
        statistics.

    Known problems: what the switches are worth depends on the model: compare with ``retouch bench`` and ``retouch
        diagnose``. Not meant for long sequences of edits.

    Shapes: D = [d_1 .. d_n] (d_model x n) a subject; at each block K (d_ff x subjects), R (d_model x subjects).

    Example:
        >>> Rose().integrate, Rose().metric
        ('minnorm', 'identity')
    """

    merges: ClassVar[bool] = True

    stop: Literal["loss", "argmax"] = setting("argmax", "When a fact is done: loss small, or target first everywhere.")
    metric: Literal["identity", "covariance", "nullspace", "drift"] = setting(
        "identity", "Norm that the write is smallest in; drift: the scatter of the subject's keys under instructions."
    )
    integrate: Integration = setting("minnorm", "How a subject's values become one; joint: searched as one.")
    n_refine: int = setting(40, "Updates of the integrated value on all of the subject's facts.", ge=0, le=1000)
    mu: float = setting(0.1, "Weight of the distance from the integrated value while it is refined.", ge=0)
    temperature: float = setting(1.0, "Facts with a larger loss weigh more in the refinement.", gt=0)
    eta: float = setting(1e-3, "Ridge of the least-norm integration, relative to the values' squared lengths.", ge=0)
    lam_rel: float = setting(
        0.01, "Weight of the metric against the facts: 0.01 lets 99 % of a residual through.", gt=0
    )
    match_memit: bool = setting(False, "Let half of a lone residual through at each block, as memit does.")
    flat: float = setting(0.0, "Noise on the value while it is searched, in its own lengths.", ge=0)

    def values(
        self, model: Model, found: Sequence[Problem], groups: Sequence[Sequence[int]], block: int, **more: Any
    ) -> list[Value]:
        """Find each fact's value, integrate them by subject, refine."""
        sizes = torch.tensor([float(len(g)) for g in groups])
        if self.integrate == "joint":
            zero = Start(torch.zeros(len(groups), model.anatomy.d_model), sizes.sqrt())
            return optimise(model, found, block, "residual", self, groups=groups, start=zero, flat=self.flat, **more)
        bystanders = more.pop("bystanders", ())
        own = [replace(b, group=i) for b in bystanders for i in groups[b.group]]
        alone = optimise(model, found, block, "residual", self, flat=self.flat, bystanders=own, **more)
        several = [g for g, members in enumerate(groups) if len(members) > 1]
        if not several:
            return [alone[members[0]] for members in groups]
        numbers = [i for g in several for i in groups[g]]
        place = {i: n for n, i in enumerate(numbers)}
        deltas = [torch.stack([alone[i].delta for i in groups[g]], 1) for g in several]
        merged = _Merge(
            self, model, [found[i] for i in numbers], [[place[i] for i in groups[g]] for g in several], block
        )
        number = {g: n for n, g in enumerate(several)}
        kept = [replace(b, group=number[b.group]) for b in bystanders if b.group in number]
        refined = iter(merged.run(deltas, kept))
        return [next(refined) if len(members) > 1 else alone[members[0]] for members in groups]

    def solver(self, model: Model, blocks: Sequence[int], statistics: Model) -> Callable[[Sequence[Problem]], Writer]:
        """Make the metrics: identity at once, moments once, the drift metric for each set of facts."""
        names = [down(b) for b in blocks]
        how: dict[str, Any] = {"text": self.text, "n_tokens": self.n_tokens, "bos": self.bos}
        if self.metric == "drift":
            return lambda found: Writer(self._drift(model, found, names), self._weight)
        metric: dict[str, Any] = (
            null_spaces(statistics, names, **how) if self.metric == "nullspace"
            else metrics(statistics, names, self.metric, **how)
        )  # fmt: skip
        writer = Writer(metric, self._weight)
        return lambda found: writer

    def _weight(self, keys: Tensor, metric: linalg.Metric) -> float:
        """Scale the metric so that a lone fact's k' M^-1 k is 1 / lam_rel on average."""
        if self.match_memit and self.metric == "covariance":
            return float(len(keys))
        share = 1.0 if self.match_memit else self.lam_rel
        return share * float((keys * metric.apply_inverse(keys)).sum(0).mean())

    def _drift(self, model: Model, found: Sequence[Problem], names: Sequence[str]) -> dict[str, linalg.Metric]:
        """Measure how the subjects' keys move under instructions: S = mean eps eps' over wrappings, plus eta I."""
        wraps = contexts_for(model, "instruction", self.seed)[1:] + contexts_for(model, REQUESTS, self.seed)
        facts = [p.fact for p in found]
        groups = grouped(facts)
        home = {i: g for g, members in enumerate(groups) for i in members}
        wrapped = problems(model, facts, [Context(w.text, 1.0) for w in wraps], "subject", self.bos)
        moved = read_all(model, [r.ids[: a + 1] for p in wrapped for r, a in zip(p.rows, p.anchors)], names)
        owner = torch.tensor([home[i] for i, p in enumerate(wrapped) for _ in p.rows])
        keys = mean_keys(model, found, groups, names)
        return {n: _scatter((moved[n] - keys[n].T[owner]).T / len(owner) ** 0.5) for n in names}


def _scatter(eps: Tensor) -> linalg.Metric:
    """Return the metric eps eps' + eta I, eta a hundredth of the mean diagonal.

    Shapes:
        eps (d_ff, rows).
    """
    eta = max(1e-2 * float(eps.square().sum(1).mean()), 1e-12)
    if eps.shape[1] < eps.shape[0]:
        return linalg.Woodbury.of(eta, eps)
    return linalg.Covariance.from_moment(eps @ eps.T, eta=0.0, floor=eta)


REQUESTS = tuple(
    f"{opening} "
    for opening in (
        "Please answer briefly.",
        "Here is a question for you.",
        "You are a helpful assistant.",
        "Q:",
        "Fill in the missing words:",
        "Finish this sentence for me:",
        "According to the encyclopedia,",
        "As everybody knows,",
        "I was wondering about something.",
        "Let us play a quiz.",
        "Reply with one word only.",
        "My teacher asked:",
        "In today's news:",
        "Tell me the truth:",
        "Take your time.",
        "Continue the text:",
        "The following is a fact.",
        "Short answer:",
        "Instruction: complete what follows.",
        "Here is what I know:",
    )
)
"""Under these and the instruction contexts the drift metric sees a subject's key move; diagnose has others of its own."""


class _Merge:
    """The second step for subjects with several facts: integrate their values, then refine on all of them."""

    def __init__(
        self, s: Rose, model: Model, found: Sequence[Problem], groups: Sequence[Sequence[int]], block: int
    ) -> None:
        self.s, self.model, self.found, self.groups, self.block = s, model, found, groups, block

    def run(self, deltas: Sequence[Tensor], bystanders: Sequence[Any]) -> list[Value]:
        """Return one value a subject."""
        if self.s.integrate == "tree":
            return self._tree([[d[:, i] for i in range(d.shape[1])] for d in deltas], bystanders)
        how: dict[str, Callable[[Tensor], Tensor]] = {
            "mean": lambda d: d.mean(1),
            "sum": lambda d: d.sum(1),
            "minnorm": lambda d: least_norm(d, self.s.eta),
        }
        start = torch.stack([how[self.s.integrate](d) for d in deltas])
        return self._refined(self.groups, start, self.s.n_refine, bystanders)

    def _refined(
        self, groups: Sequence[Sequence[int]], start: Tensor, n: int, bystanders: Sequence[Any] = ()
    ) -> list[Value]:
        search = replace(self.s, n_steps=n + 1, weight_decay=0.0)
        reach = torch.tensor([float(len(g)) for g in groups]).sqrt()
        begin = Start(start.float(), reach, self.s.mu)
        return optimise(
            self.model, self.found, self.block, "residual", search, groups=groups, start=begin,
            temperature=self.s.temperature, flat=self.s.flat, bystanders=bystanders,
        )  # fmt: skip

    def _tree(self, deltas: list[list[Tensor]], bystanders: Sequence[Any]) -> list[Value]:
        """Join each subject's two most alike values, refine them on their facts, until one is left."""
        members = [[[i] for i in g] for g in self.groups]
        while any(len(ds) > 1 for ds in deltas):
            merged: list[tuple[int, list[int], Tensor]] = []
            for g, ds in enumerate(deltas):
                if len(ds) == 1:
                    continue
                stack = torch.stack(ds)
                alike = torch.cosine_similarity(stack[:, None], stack[None], dim=2).fill_diagonal_(-2)
                a, b = sorted(divmod(int(alike.argmax()), len(ds)))
                joined = least_norm(torch.stack([ds[a], ds[b]], 1), self.s.eta)
                merged.append((g, members[g][a] + members[g][b], joined))
                for many in (deltas[g], members[g]):
                    del many[b], many[a]
            found = self._refined([m for _, m, _ in merged], torch.stack([d for *_, d in merged]), 5)
            for (g, m, _), value in zip(merged, found):
                deltas[g].append(value.delta)
                members[g].append(m)
        return self._refined(self.groups, torch.stack([ds[0] for ds in deltas]), self.s.n_refine, bystanders)


_ROUNDING = 1e-6
"""Least eta: values are float32, and their angles mean no more than this."""


def least_norm(deltas: Tensor, eta: float = 1e-3) -> Tensor:
    """Return the shortest vector that says to every value what the value says to itself.

        d0 = D (D'D + eta diag(D'D))^-1 diag(D'D) 1

    With eta = 0, <d0, d_i> = |d_i|^2 for all i: orthogonal values are summed, equal ones are not counted twice. Values
    that are all but parallel ask different lengths of one direction, which only a far longer vector could satisfy: eta is
    raised until d0 is no longer than all values together.

    Shapes:
        deltas D (d_model, n) -> (d_model,).

    Example:
        >>> least_norm(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), eta=1e-9).tolist()[0] < 1.01
        True
    """
    d = deltas.double()
    gram = d.T @ d
    lengths = gram.diagonal().clamp(min=1e-12)
    ridge = max(eta, _ROUNDING)
    while True:
        found: Tensor = d @ torch.linalg.solve(gram + ridge * torch.diag(lengths), lengths)
        if not float(found.norm()) > float(lengths.sqrt().sum()):
            return found
        ridge *= 2
