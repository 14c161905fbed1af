"""The loss of a search for values: what a value added at one position makes of everything after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..model import Model
from ..tokens import Row
from ..trace import Suffix, Trace
from .rows import Problem

if TYPE_CHECKING:
    from .base import ValueEditMethod

__all__ = ["Aim", "Bystander", "Search", "Terms", "divergence"]


@dataclass(frozen=True, eq=False)
class Aim:
    """A later state that a value is to bring about, in place of the targets' likelihood.

    Attributes:
        block: The state after this block, at each prompt's last token.
        gains: What that state is to gain over the unchanged one, (facts, d_model).
        stop: Distance at which a fact is done, in lengths of the state (or as `scale` measures it).
        nll: Weight of the targets' NLL beside the distance; 0 asks for the state alone, and nothing above it runs.
        scale: None: distance over the state's length, mean over the rows. A number: that times the absolute distance
            of the first row, as published.
    """

    block: int
    gains: Tensor
    stop: float = 0.05
    nll: float = 0.0
    scale: float | None = None

    def of(self, facts: Sequence[int]) -> Aim:
        """Keep only some facts."""
        return replace(self, gains=self.gains[list(facts)])


@dataclass(frozen=True, eq=False)
class Bystander:
    """A row that a write is to leave alone, and how loudly each of its tokens will hear the write.

    Attributes:
        group: The value whose write it hears.
        row: The prompt.
        hears: For each token the share of the value that the expected write delivers there, (tokens,).
    """

    group: int
    row: Row
    hears: Tensor

    def of(self, group: int) -> Bystander:
        """The same row under another group's number."""
        return replace(self, group=group)


class Terms(NamedTuple):
    """The parts of the loss at one delta.

    Shapes:
        nll and margin (facts,); kl, drift and distance (groups,). 0 where there is nothing to measure or no more: with
        an aim nobody asks for the targets.
    """

    nll: Tensor
    kl: Tensor
    margin: Tensor
    drift: Tensor
    distance: Tensor


class _Line(NamedTuple):
    """One row of the batch."""

    kind: Literal["target", "kl", "bystander"]
    fact: int
    group: int
    ids: tuple[int, ...]
    anchor: int


class _Reads(NamedTuple):
    """Where states are read: line and column of each read, whom it belongs to, for targets the token, and a weight."""

    row: Tensor
    column: Tensor
    owner: Tensor
    token: Tensor
    weight: Tensor


class Search:
    """A chunk of facts whose values are searched together.

    Attributes:
        initial: The unchanged activation of each group, (groups, d_model), on the model's device.
        aim: See `Aim`.
        asks: Whether the targets' likelihood is a part of the loss.
        n_bystanders: Rows that the write is to leave alone.
    """

    def __init__(
        self,
        model: Model,
        found: Sequence[Problem],
        block: int,
        side: Literal["down", "residual"],
        settings: ValueEditMethod,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        aim: Aim | None = None,
        bystanders: Sequence[Bystander] = (),
    ) -> None:
        self.model, self.found, self.block, self.s, self.aim = model, found, block, settings, aim
        self.groups = [[i] for i in range(len(found))] if groups is None else groups
        self.asks = aim is None or aim.nll > 0
        self.n_bystanders = len(bystanders)
        owner = {i: g for g, members in enumerate(self.groups) for i in members}
        self.group_of = torch.tensor([owner[i] for i in range(len(found))], device=model.device)
        lines = self._lines(owner, bystanders)
        suffix = Suffix.of(model, [line.ids for line in lines], [line.anchor for line in lines], block)
        with torch.no_grad():
            self.at, suffix, self.through_down = _activation(suffix, block, side)
        self.initial = self._initial(lines)
        self.hears = _hears(lines, bystanders, suffix)
        self.owners = torch.tensor([line.group for line in lines], device=model.device)
        self.targets, self.kl, self.drift, self.ends = self._reads(lines)
        self.whole, self.suffix = suffix, suffix
        self.rows = torch.arange(len(lines), device=model.device)
        self.live = torch.ones(len(self.groups), dtype=torch.bool, device=model.device)
        with torch.no_grad():
            states, at_aim = self._states(torch.zeros_like(self.initial))
            self.before = {n: self._logp(states, r) for n, r in (("kl", self.kl), ("drift", self.drift))}
            self.ends_before = at_aim[self.ends.row, self.ends.column].float()

    def _lines(self, owner: dict[int, int], bystanders: Sequence[Bystander]) -> list[_Line]:
        lines = []
        for i, problem in enumerate(self.found):
            for row in problem.rows:
                ids = row.seen if self.asks else row.ids[: row.prompt + 1]
                lines.append(_Line("target", i, owner[i], ids, problem.anchor(row)))
        if self.s.kl_factor and not self.aim and not self.n_bystanders:
            of_group = {(owner[i], p.kl.ids): (i, p) for i, p in enumerate(self.found) if p.kl is not None}
            lines += [_Line("kl", i, g, ids, p.kl_at) for (g, ids), (i, p) in of_group.items()]
        lines += [_Line("bystander", self.groups[b.group][0], b.group, b.row.ids, 0) for b in bystanders]
        return lines

    def _initial(self, lines: Sequence[_Line]) -> Tensor:
        """Average the first rows' activations over each group's distinct left contexts."""
        first: dict[tuple[int, tuple[int, ...]], int] = {}
        seen = set()
        for number, line in enumerate(lines):
            if line.kind == "target" and line.fact not in seen:
                seen.add(line.fact)
                first.setdefault((line.group, line.ids[: line.anchor + 1]), number)
        where = torch.tensor([g for g, _ in first], device=self.at.device)
        states = self.at[torch.tensor(list(first.values()), device=self.at.device)].float()
        total = torch.zeros(len(self.groups), states.shape[1], device=states.device).index_add(0, where, states)
        return total / torch.bincount(where, minlength=len(self.groups))[:, None]

    def _reads(self, lines: Sequence[_Line]) -> tuple[_Reads, _Reads, _Reads, _Reads]:
        targets, kl, drift, ends = [], [], [], []
        row_of = {i: iter(p.rows) for i, p in enumerate(self.found)}
        n_kl = torch.zeros(len(self.groups))
        n_drift = torch.zeros(len(self.groups))
        for line in lines:
            n_kl[line.group] += line.kind == "kl"
            n_drift[line.group] += line.kind == "bystander"
        for number, line in enumerate(lines):
            last = len(line.ids) - 1 - line.anchor
            if line.kind == "bystander":
                drift.append((number, last, line.group, 0, 1 / float(n_drift[line.group])))
            elif line.kind == "kl":
                column = last if self.s.kl_position == "last" else 0
                kl.append((number, column, line.group, 0, 1 / float(n_kl[line.group])))
            else:
                row, n = next(row_of[line.fact]), len(self.found[line.fact].rows)
                if self.aim:
                    ends.append((number, row.prompt - line.anchor, line.fact, 0, 1 / n))
                if not self.asks:
                    continue
                share = 1 / (len(row.target) * n)
                targets += [
                    (number, row.prompt + t - line.anchor, line.fact, w, share) for t, w in enumerate(row.target)
                ]
        return self._tensors(targets), self._tensors(kl), self._tensors(drift), self._tensors(ends)

    def _tensors(self, reads: list[tuple[int, int, int, int, float]]) -> _Reads:
        row, column, owner, token = (
            torch.tensor([r[i] for r in reads], dtype=torch.long, device=self.model.device) for i in range(4)
        )
        weight = torch.tensor([r[4] for r in reads], dtype=torch.float32, device=self.model.device)
        return _Reads(row, column, owner, token, weight)

    def narrow(self, active: Tensor) -> None:
        """Drop finished groups once they are a quarter of the batch; until then nobody asks for their gradient."""
        if int(active.sum()) > 0.75 * int(self.live.sum()):
            return
        self.live = active
        self.rows = active[self.owners].nonzero()[:, 0]
        self.suffix = self.whole.select(self.rows)

    def per_group(self, nll: Tensor, temperature: float | None = None) -> Tensor:
        """Take facts to groups: the mean, or weighted by softmax(NLL / temperature)."""
        found = torch.zeros(len(self.groups), device=nll.device)
        if temperature is None:
            return found.index_add(0, self.group_of, nll) / torch.bincount(self.group_of)
        scaled = nll.detach() / temperature
        most = torch.full_like(found, -torch.inf).scatter_reduce(0, self.group_of, scaled, "amax")
        rise = (scaled - most[self.group_of]).exp()
        total = found.index_add(0, self.group_of, rise)[self.group_of]
        return found.index_add(0, self.group_of, nll * rise / total)

    def worst_margin(self, margin: Tensor) -> Tensor:
        """Return the least margin of each group's facts, (groups,)."""
        least = torch.full((len(self.groups),), torch.inf, device=margin.device)
        return least.scatter_reduce(0, self.group_of, margin, "amin")

    def _states(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Run the blocks above with each row's share of its delta added; return the last states and those aimed at."""
        suffix, rows = self.suffix, self.rows
        upto = self.aim.block if self.aim and not self.asks and not self.n_bystanders else None
        added = self.hears[rows][:, :, None] * delta[self.owners[rows]][:, None]
        state, aimed = suffix.state, list[Tensor]()

        def add(out: Tensor) -> Tensor:  # some families flatten rows and columns in the MLP
            return (out.reshape(*state.shape[:2], -1) + added.to(out.dtype)).reshape(out.shape)

        with Trace(self.model) as trace:
            if self.through_down:
                trace.edit(f"blocks.{self.block}.mlp.down", add)
            else:
                state = state + added.to(state.dtype)
            if self.aim:
                trace.watch(f"blocks.{self.aim.block}", aimed.append)
            last = suffix.run(state, upto=upto)
        return last, aimed[0] if aimed else last

    def _logits(self, states: Tensor, reads: _Reads) -> Tensor:
        return self.model.logits(states[reads.row, reads.column]).float()

    def _logp(self, states: Tensor, reads: _Reads) -> Tensor:
        return self._logits(states, reads).log_softmax(-1)

    def _living(self, reads: _Reads, group: Tensor) -> tuple[_Reads, Tensor]:
        """Keep the reads of rows that still run, by their place among those rows; and which they were."""
        if len(self.rows) == len(self.owners):
            return reads, torch.arange(len(group), device=group.device)
        place = torch.full((len(self.owners),), -1, device=group.device)
        place[self.rows] = torch.arange(len(self.rows), device=group.device)
        kept = self.live[group].nonzero()[:, 0]
        return _Reads(place[reads.row[kept]], *(t[kept] for t in reads[1:])), kept

    def terms(self, delta: Tensor) -> Terms:
        """Measure the loss's parts at one delta of each group; differentiable.

        Shapes:
            delta (groups, d_model).
        """
        states, at_aim = self._states(delta)
        fact = torch.zeros(len(self.found), device=delta.device)
        group = torch.zeros(len(self.groups), device=delta.device)
        distance = self._distance(at_aim, self.aim) if self.aim else group
        if not self.asks:
            return Terms(fact, group, fact, self._divergence(states, group, "drift", self.drift), distance)
        reads, _ = self._living(self.targets, self.group_of[self.targets.owner])
        logits = self._logits(states, reads)
        said = logits.gather(1, reads.token[:, None])[:, 0]
        nll = fact.index_add(0, reads.owner, (logits.logsumexp(-1) - said) * reads.weight)
        with torch.no_grad():
            others = logits.scatter(1, reads.token[:, None], -torch.inf).amax(1)
            margin = torch.full_like(fact, torch.inf).scatter_reduce(0, reads.owner, said - others, "amin")
        kl, drift = (self._divergence(states, group, n, r) for n, r in (("kl", self.kl), ("drift", self.drift)))
        return Terms(nll, kl, margin, drift, distance)

    def _divergence(self, states: Tensor, zero: Tensor, name: str, reads: _Reads) -> Tensor:
        reads, kept = self._living(reads, reads.owner)
        if not len(kept):
            return zero
        now = self._logp(states, reads)
        return zero.index_add(0, reads.owner, divergence(now, self.before[name][kept]) * reads.weight)

    def _distance(self, states: Tensor, aim: Aim) -> Tensor:
        reads, kept = self._living(self.ends, self.group_of[self.ends.owner])
        wanted = self.ends_before[kept] + aim.gains.to(states.device)[reads.owner]
        away = (states[reads.row, reads.column].float() - wanted).norm(dim=1)
        fact = torch.zeros(len(self.found), device=states.device)
        if aim.scale is None:
            return self.per_group(
                fact.index_add(0, reads.owner, away / self.ends_before[kept].norm(dim=1) * reads.weight)
            )
        first = torch.ones_like(reads.owner, dtype=torch.bool)
        first[1:] = reads.owner[1:] != reads.owner[:-1]
        return self.per_group(fact.index_add(0, reads.owner[first], away[first] * aim.scale))


def _activation(suffix: Suffix, block: int, side: Literal["down", "residual"]) -> tuple[Tensor, Suffix, bool]:
    """Read the unchanged activation of every row's edited token; say whether a value must go in inside the block.

    In most families what is added to ``mlp.down`` arrives in the block's output as it is. Where nothing stands between
    (tried out, not assumed), the search starts after the block and never runs it again.
    """
    name = f"blocks.{block}.mlp.down"
    above = suffix.above()
    if side == "residual":
        return above.state[:, 0].clone(), above, False
    seen: list[Tensor] = []
    with Trace(suffix.model) as trace:
        trace.watch(name, seen.append)
        suffix.run(upto=block)
    out = seen[0].reshape(*suffix.state.shape[:2], -1)
    probe = torch.linspace(-1, 1, out.shape[-1], device=out.device, dtype=out.dtype) * out.abs().mean()
    with Trace(suffix.model) as trace:
        trace.edit(name, lambda o: (o.reshape(out.shape) + probe).reshape(o.shape))
        moved = suffix.run(upto=block)
    rounding = 1e-3 * probe.abs().max() + 1e-6 * above.state.abs()  # the sink's state is a thousand times the others'
    plain = bool(((moved - above.state - probe).abs() <= rounding).all())
    return out[:, 0].clone(), above if plain else suffix, not plain


def _hears(lines: Sequence[_Line], bystanders: Sequence[Bystander], suffix: Suffix) -> Tensor:
    """The share of its value that each row hears in each column: all of it at the edited token; bystanders as told."""
    shares = torch.zeros(suffix.state.shape[:2], device=suffix.state.device)
    told = iter(bystanders)
    for i, line in enumerate(lines):
        if line.kind == "bystander":
            hears = next(told).hears
            shares[i, : len(hears)] = hears.to(shares)
        else:
            shares[i, 0] = 1
    return shares


def divergence(edited: Tensor, original: Tensor) -> Tensor:
    """Return KL(edited || original) of log-probabilities: edited first, as in the authors' code.

    Shapes:
        (..., classes) twice -> (...)
    """
    return functional.kl_div(original, edited, reduction="none", log_target=True).sum(-1)
