"""The loss of a search for values: what a value added at one position makes of everything after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .._packing import Strip, lay_out
from ..model import Model
from ..tokens import Row
from ..trace import Suffix, Trace
from ._lines import Line, Reads, distinct, heard, living, placed, reads_of
from .rows import Problem

if TYPE_CHECKING:
    from .base import ValueEditMethod

__all__ = ["Aim", "Bystander", "Search", "Side", "Terms", "divergence"]


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


Side = Literal["down", "residual", "both"]


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
        side: Side,
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
        self.lines = self._lines(owner, bystanders)
        rows, self.row_of = distinct(self.lines)
        suffix = Suffix.of(model, [ids for ids, _ in rows], [anchor for _, anchor in rows], block)
        with torch.no_grad():
            at, self.whole, self.through_down = _activation(suffix, block, side)
        self.both = side == "both"
        self.initial = self._initial(at)
        self.hears = heard(self.lines, bystanders, suffix.state.shape[1])
        self.reads = self._reads()
        self.live = torch.ones(len(self.groups), dtype=torch.bool, device=model.device)
        self.before, self.ends_before = self._unchanged()
        self.pack(range(len(self.lines)))

    def _lines(self, owner: dict[int, int], bystanders: Sequence[Bystander]) -> list[Line]:
        lines = []
        for i, problem in enumerate(self.found):
            for row in problem.rows:
                ids = row.seen if self.asks else row.ids[: row.prompt + 1]
                lines.append(Line("target", i, owner[i], ids, problem.anchor(row)))
        if self.s.kl_factor and not self.aim and not self.n_bystanders:
            of_group = {(owner[i], p.kl.ids): (i, p) for i, p in enumerate(self.found) if p.kl is not None}
            for (g, ids), (i, p) in of_group.items():
                end = None if self.s.kl_position == "last" else p.kl_at + 1
                lines.append(Line("kl", i, g, ids[:end], p.kl_at))
        lines += [Line("bystander", self.groups[b.group][0], b.group, b.row.ids, 0) for b in bystanders]
        return lines

    def _initial(self, at: Tensor) -> Tensor:
        """Average the first rows' activations over each group's distinct left contexts.

        Shapes:
            at (rows, d_model).
        """
        first: dict[tuple[int, tuple[int, ...]], int] = {}
        seen = set()
        for line, row in zip(self.lines, self.row_of):
            if line.kind == "target" and line.fact not in seen:
                seen.add(line.fact)
                first.setdefault((line.group, line.ids[: line.anchor + 1]), row)
        where = torch.tensor([g for g, _ in first], device=at.device)
        states = at[torch.tensor(list(first.values()), device=at.device)].float()
        total = torch.zeros(len(self.groups), states.shape[1], device=states.device).index_add(0, where, states)
        return total / torch.bincount(where, minlength=len(self.groups))[:, None]

    def _reads(self) -> dict[str, Reads]:
        found: dict[str, list[tuple[int, int, int, int, float]]] = {n: [] for n in ("target", "kl", "drift", "end")}
        row_of = {i: iter(p.rows) for i, p in enumerate(self.found)}
        n_of = Counter((line.kind, line.group) for line in self.lines)
        for number, line in enumerate(self.lines):
            last, share = len(line.ids) - 1 - line.anchor, 1 / n_of[line.kind, line.group]
            if line.kind == "bystander":
                found["drift"].append((number, last, line.group, 0, share))
            elif line.kind == "kl":
                found["kl"].append((number, last, line.group, 0, share))
            else:
                row, n = next(row_of[line.fact]), len(self.found[line.fact].rows)
                if self.aim:
                    found["end"].append((number, row.prompt - line.anchor, line.fact, 0, 1 / n))
                at, share = row.prompt - line.anchor, 1 / (len(row.target) * n)
                said = [(number, at + t, line.fact, token, share) for t, token in enumerate(row.target)]
                found["target"] += said if self.asks else []
        return {name: reads_of(reads, self.model.device) for name, reads in found.items()}

    def pack(self, lines: Sequence[int]) -> None:
        """Lay the lines that are to run side by side, so that nothing is computed twice or for padding."""
        a, device = self.model.anatomy, self.model.device
        strips = []
        for n in lines:
            kind, _, group, ids, anchor = self.lines[n]
            alone = (group, n) if kind == "bystander" else group  # each hears its own share of the value
            strips.append(Strip(self.row_of[n], ids, anchor, alone))
        layout = lay_out(strips, 6 / (4 * a.d_model + 3 * a.d_ff))  # attention runs at a third of a product's speed
        self.suffix = self.whole.pack(layout)
        running = [(n, self.lines[n].group) for n in lines]
        places = placed(running, layout.places, self.hears, layout.row.shape)
        self.owner, self.share, table = (t.to(device) for t in places)
        self.now = {name: living(reads, table) for name, reads in self.reads.items()}
        written = torch.tensor([line.kind != "bystander" for line in self.lines])
        self.seeks = placed(running, layout.places, self.hears * written[:, None], layout.row.shape)[1].to(device)

    def _unchanged(self) -> tuple[dict[str, Tensor], Tensor]:
        """Run what is to be compared with the unchanged model: its distributions, and the states aimed at."""
        names = [name for name in ("kl", "drift") if len(self.reads[name].line)]
        needed = sorted({int(n) for name in (*names, "end") for n in self.reads[name].line})
        if not needed:
            return {}, self.initial
        self.pack(needed)
        with torch.no_grad():
            states, at_aim = self._states(torch.zeros_like(self.initial), whole=bool(names))
            logits = self._logits(states, names) if names else {}
            before = {name: found.log_softmax(-1) for name, found in logits.items()}
            return before, at_aim[self.now["end"].place].float()

    def narrow(self, active: Tensor) -> None:
        """Drop finished groups once they are a tenth of the batch; until then nobody asks for their gradient."""
        if int(active.sum()) > 0.9 * int(self.live.sum()):
            return
        self.live = active
        going = active.tolist()
        self.pack([n for n, line in enumerate(self.lines) if going[line.group]])

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

    def _states(self, delta: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
        """Run the blocks above with each place's share of its delta added, all of them or up to the aim.

        Returns:
            The last states and those aimed at, (places, d_model).
        """
        state, aimed = self.suffix.state, list[Tensor]()
        own, *attention = delta[self.owner].chunk(2, dim=-1) if self.both else [delta[self.owner]]
        added = self.share[:, :, None] * own

        def add(out: Tensor, more: Tensor = added) -> Tensor:  # some families flatten rows and columns in the MLP
            return (out.reshape(*state.shape[:2], -1) + more.to(out.dtype)).reshape(out.shape)

        with Trace(self.model) as trace:
            for part in attention:  # only searched, never written: no bystander hears it
                trace.edit(f"blocks.{self.block}.attention.out", partial(add, more=self.seeks[:, :, None] * part))
            if self.through_down:
                trace.edit(f"blocks.{self.block}.mlp.down", add)
            else:
                state = state + added.to(state.dtype)
            if self.aim:
                trace.watch(f"blocks.{self.aim.block}", aimed.append)
            last = self.suffix.run(state, upto=None if whole or not self.aim else self.aim.block)
        return last.flatten(0, 1), (aimed[0] if aimed else last).flatten(0, 1)

    def _logits(self, states: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Ask the head once for all that is read: its weight is by far the largest."""
        places = [self.now[name].place for name in names]
        logits = self.model.logits(states[torch.cat(places)]).float()
        return dict(zip(names, torch.split(logits, list(map(len, places)))))

    def terms(self, delta: Tensor) -> Terms:
        """Measure the loss's parts at one delta of each group; differentiable.

        Shapes:
            delta (groups, d_model).
        """
        names = [name for name in ("target", "kl", "drift") if len(self.now[name].place)]
        states, at_aim = self._states(delta, whole=bool(names))
        fact = torch.zeros(len(self.found), device=delta.device)
        group = torch.zeros(len(self.groups), device=delta.device)
        distance = self._distance(at_aim, self.aim) if self.aim else group
        logits = self._logits(states, names) if names else {}
        moved = {name: self._divergence(logits[name], name) if name in logits else group for name in ("kl", "drift")}
        if not self.asks:
            return Terms(fact, moved["kl"], fact, moved["drift"], distance)
        reads, logits_of = self.now["target"], logits["target"]
        said = logits_of.gather(1, reads.token[:, None])[:, 0]
        nll = fact.index_add(0, reads.owner, (logits_of.logsumexp(-1) - said) * reads.weight)
        with torch.no_grad():
            others = logits_of.scatter(1, reads.token[:, None], -torch.inf).amax(1)
            margin = torch.full_like(fact, torch.inf).scatter_reduce(0, reads.owner, said - others, "amin")
        return Terms(nll, moved["kl"], margin, moved["drift"], distance)

    def _divergence(self, logits: Tensor, name: str) -> Tensor:
        reads, zero = self.now[name], torch.zeros(len(self.groups), device=logits.device)
        away = divergence(logits.log_softmax(-1), self.before[name][reads.kept])
        return zero.index_add(0, reads.owner, away * reads.weight)

    def _distance(self, states: Tensor, aim: Aim) -> Tensor:
        reads = self.now["end"]
        before = self.ends_before[reads.kept]
        wanted = before + aim.gains.to(states.device)[reads.owner]
        away = (states[reads.place].float() - wanted).norm(dim=1)
        fact = torch.zeros(len(self.found), device=states.device)
        if aim.scale is None:
            return self.per_group(fact.index_add(0, reads.owner, away / before.norm(dim=1) * reads.weight))
        first = torch.ones_like(reads.owner, dtype=torch.bool)
        first[1:] = reads.owner[1:] != reads.owner[:-1]
        return self.per_group(fact.index_add(0, reads.owner[first], away[first] * aim.scale))


def _activation(suffix: Suffix, block: int, side: Side) -> tuple[Tensor, Suffix, bool]:
    """Read the unchanged activation of every row's edited token; say whether a value must go in inside the block.

    In most families what is added to ``mlp.down`` arrives in the block's output as it is. Where nothing stands between
    (tried out, not assumed), the search starts after the block and never runs it again.
    """
    name = f"blocks.{block}.mlp.down"
    above = suffix.above()
    if side == "residual":
        return above.state[:, 0].clone(), above, False
    with Trace(suffix.model) as trace:
        trace.read(name)
        trace.read(f"blocks.{block}.attention.out")
        suffix.run(upto=block)
        out, attention = (
            trace[part, "output"].reshape(*suffix.state.shape[:2], -1)
            for part in (name, f"blocks.{block}.attention.out")
        )
    if side == "both":
        return torch.cat([out[:, 0], attention[:, 0]], 1), suffix, True
    probe = torch.linspace(-1, 1, out.shape[-1], device=out.device, dtype=out.dtype) * out.abs().mean()
    with Trace(suffix.model) as trace:
        trace.edit(name, lambda o: (o.reshape(out.shape) + probe).reshape(o.shape))
        moved = suffix.run(upto=block)
    rounding = 1e-3 * probe.abs().max() + 1e-6 * above.state.abs()  # the sink's state is a thousand times the others'
    plain = bool(((moved - above.state - probe).abs() <= rounding).all())
    return out[:, 0].clone(), above if plain else suffix, not plain


def divergence(edited: Tensor, original: Tensor) -> Tensor:
    """Return KL(edited || original) of log-probabilities: edited first, as in the authors' code.

    Shapes:
        (..., classes) twice -> (...)
    """
    return functional.kl_div(original, edited, reduction="none", log_target=True).sum(-1)
