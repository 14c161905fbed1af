"""Find a value by gradient: the one search that every locate-and-edit method shares.

A vector delta is added to an activation at one position of every row of a fact, and trained until the model says the
target. What lies below the block and before the position runs once; all facts of a chunk are searched together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import FactError, ModelError
from ..model import Model
from ..progress import report
from ..tokens import Bos, Row, Text, encode
from ..trace import Suffix, Trace
from .base import ValueEditMethod
from .contexts import Context
from .facts import Fact

__all__ = ["Problem", "Value", "optimise", "problems"]

Position = Literal["subject", "prompt"]


@dataclass(frozen=True)
class Problem:
    """One fact as rows.

    Attributes:
        fact: What is to become true.
        rows: One row a context, all targets included; the first is the bare prompt where it may be used.
        weights: Each row's weight in the mean key; they sum to 1.
        position: Where the value is added.
        kl: The row ``{subject} is a``, or None without a subject.
        notes: What a person should know: a merged token, a bare prompt that is not covered.
    """

    fact: Fact
    rows: tuple[Row, ...]
    weights: tuple[float, ...]
    position: Position
    kl: Row | None
    notes: tuple[str, ...] = ()

    def anchor(self, row: Row) -> int:
        """Return the index of the row's edited token."""
        index = row.subject if self.position == "subject" else row.prompt
        assert index is not None  # problems() has refused facts without a subject
        return index

    @property
    def anchors(self) -> list[int]:
        """The edited token of every row."""
        return [self.anchor(row) for row in self.rows]


def problems(
    model: Model, facts: Sequence[Fact], contexts: Sequence[Context], position: Position, bos: Bos = "tokenizer"
) -> list[Problem]:
    """Turn facts into rows.

    A row whose edited token is the very first token of the text is left out while another row exists: its key is the
    attention sink's and has nothing to do with the subject.

    Raises:
        FactError: The position is the subject's and a fact has none.
    """
    if position == "subject":
        for fact in facts:
            if not fact.subject:
                raise FactError(
                    f"The fact {fact.prompt!r} has no subject; this method writes at the subject's last token."
                )
    texts = [Text(f.before, f.subject, f.after, f.target, c.text) for f in facts for c in contexts]
    rows = encode(model.tokenizer, texts, bos)
    n = len(contexts)
    return [_problem(model, f, rows[i * n : (i + 1) * n], contexts, position, bos) for i, f in enumerate(facts)]


def _problem(
    model: Model, fact: Fact, rows: list[Row], contexts: Sequence[Context], position: Position, bos: Bos
) -> Problem:
    notes = []
    at = [r.subject if position == "subject" else r.prompt for r in rows]
    kept = [i for i, a in enumerate(at) if a != 0]
    if len(kept) < len(rows):
        left_out = (
            "that row is not covered" if kept else "the write reaches every text without a beginning-of-text token"
        )
        notes.append(
            f"The edited token opens the bare prompt, where its key is the attention sink's: {left_out}. "
            "Put a word before the subject, or use bos='always'."
        )
    kept = kept or list(range(len(rows)))
    if any(rows[i].merged for i in kept):
        notes.append("A token straddles the subject's or the prompt's end (merged_token).")
    total = sum(contexts[i].weight for i in kept)
    kl = None
    if fact.subject:
        lead = "" if at[0] != 0 else next((c.text for c in contexts if c.text), "")
        kl = encode(model.tokenizer, [Text("", fact.subject, " is a", context=lead)], bos)[0]
    return Problem(
        fact,
        tuple(rows[i] for i in kept),
        tuple(contexts[i].weight / total for i in kept),
        position,
        kl,
        tuple(notes),
    )


@dataclass(frozen=True, eq=False)
class Value:
    """What a search found for one fact.

    Attributes:
        delta: What is to be added to the activation, (d_model,), float32 on the CPU.
        initial: The unchanged activation of the first row, (d_model,).
        losses: The loss at each step.
        margin: Least lead of a target token over the best other one, in nats, over all rows at the last step.
        reached: Every target token was the likeliest in every row.
    """

    delta: Tensor
    initial: Tensor
    losses: tuple[float, ...]
    margin: float
    reached: bool

    @property
    def target(self) -> Tensor:
        """The value to write: initial + delta."""
        return self.initial + self.delta

    def notes(self) -> dict[str, float | bool | list[float]]:
        """Return what a report shows."""
        ratio = float(self.delta.norm() / self.initial.norm())
        return {
            "losses": [round(x, 5) for x in self.losses],
            "margin": self.margin,
            "ratio": ratio,
            "reached": self.reached,
        }


def optimise(
    model: Model, found: Sequence[Problem], block: int, side: Literal["down", "residual"], settings: ValueEditMethod
) -> list[Value]:
    """Search a value for every fact.

        L(delta) = mean_rows[ -(1/T) sum_t log P(target_t | row; delta) ]
                 + kl_factor KL(P_delta(. | "{s} is a") || P_before) + weight_decay |delta| / |v|^2

    Source:
        Meng et al. 2022 (arXiv 2202.05262), section 3.1 and kmeng01/rome; batching, cut passes and masked Adam: ours.

    Shapes:
        With F facts of R rows whose tail after the edited token is S long, a step costs 2 passes of F R S tokens
        through the blocks above `block`, and the head at the F R T places that enter the loss.

    Args:
        model: A decoder; its weights get no gradients.
        found: The facts as rows, all with one position.
        block: The edited block.
        side: Add to the output of ``mlp.down``, or to the block's output (the residual stream).
        settings: Of the method.

    Returns:
        One value a fact, in order. Facts do not see each other: together or alone they give the same values.

    Raises:
        ModelError: The family's blocks cannot be run from a cut, and say so.
    """
    order = sorted(range(len(found)), key=lambda i: _tail(found[i]))
    values: dict[int, Value] = {}
    what = f"Values for {len(found)} facts at block {block}"
    report(what, 0, len(found))
    for chunk in _chunks(model, [found[i] for i in order], block, settings.budget_mib):
        for i, value in zip(order[len(values) :], _Search(model, chunk, block, side, settings).run()):
            values[i] = value
        report(what, len(values), len(found))
    return [values[i] for i in range(len(found))]


def _tail(problem: Problem) -> int:
    return max(len(r.seen) - a for r, a in zip(problem.rows, problem.anchors))


def _chunks(model: Model, found: list[Problem], block: int, budget_mib: int) -> list[list[Problem]]:
    """Cut facts, sorted by length, into chunks whose activations fit the budget."""
    a = model.anatomy
    chunks: list[list[Problem]] = []
    used = 0.0
    for problem in found:
        rows = len(problem.rows) + 1
        longest = max(len(r.seen) for r in problem.rows)
        per_token = 4 * (a.n_blocks - block) * (10 * a.d_model + 5 * a.d_ff + 3 * a.heads * longest)
        head = 16 * a.vocab_size * (1 + sum(len(r.target) for r in problem.rows))
        need = float(rows * _tail(problem) * per_token + head)
        if not chunks or used + need > budget_mib * 2**20:
            chunks.append([])
            used = 0.0
        chunks[-1].append(problem)
        used += need
    return chunks


@dataclass(frozen=True, eq=False)
class _Reads:
    """Where the loss reads the states: row, column, fact, and for targets the token and its weight."""

    row: Tensor
    column: Tensor
    fact: Tensor
    token: Tensor
    weight: Tensor


class _Search:
    """One chunk of facts, searched together."""

    def __init__(
        self, model: Model, found: Sequence[Problem], block: int, side: Literal["down", "residual"], s: ValueEditMethod
    ) -> None:
        self.model, self.found, self.block, self.side, self.s = model, found, block, side, s
        rows = [(i, r, p.anchor(r), False) for i, p in enumerate(found) for r in p.rows]
        if s.kl_factor:
            rows += [(i, p.kl, p.kl.subject or 0, True) for i, p in enumerate(found) if p.kl is not None]
        self.facts = torch.tensor([i for i, *_ in rows], device=model.device)
        suffix = Suffix.of(model, [r.seen for _, r, *_ in rows], [a for _, _, a, _ in rows], block)
        with torch.no_grad():
            self.at = self._activation(suffix)  # (rows, d_model), the activation before any change
        self.suffix = suffix.above() if side == "residual" else suffix
        self.targets, self.kl = self._reads(rows)

    def _activation(self, suffix: Suffix) -> Tensor:
        seen: list[Tensor] = []
        name = f"blocks.{self.block}.mlp.down" if self.side == "down" else f"blocks.{self.block}"
        with Trace(self.model) as trace:
            trace.watch(name, seen.append)
            suffix.run(upto=self.block)
        return seen[0].reshape(*suffix.state.shape[:2], -1)[:, 0].clone()

    def _reads(self, rows: Sequence[tuple[int, Row, int, bool]]) -> tuple[_Reads, _Reads]:
        targets, kl = [], []
        for number, (i, row, anchor, is_kl) in enumerate(rows):
            if is_kl:
                last = len(row.ids) - 1 if self.s.kl_position == "last" else anchor
                kl.append((number, last - anchor, i, 0, 1.0))
                continue
            share = 1 / (len(row.target) * len(self.found[i].rows))
            targets += [(number, row.prompt + t - anchor, i, token, share) for t, token in enumerate(row.target)]
        return self._tensors(targets), self._tensors(kl)

    def _tensors(self, reads: list[tuple[int, int, int, int, float]]) -> _Reads:
        row, column, fact, token = (
            torch.tensor([r[i] for r in reads], dtype=torch.long, device=self.model.device) for i in range(4)
        )
        weight = torch.tensor([r[4] for r in reads], dtype=torch.float32, device=self.model.device)
        return _Reads(row, column, fact, token, weight)

    @torch.enable_grad()  # a caller may plan inside torch.no_grad
    def run(self) -> list[Value]:
        """Search until every fact is done or the steps are used up."""
        n, s = len(self.found), self.s
        first_row = torch.tensor([int((self.facts == i).nonzero()[0]) for i in range(n)])
        initial = self.at[first_row]
        length = initial.norm(dim=1)
        delta = torch.zeros_like(initial)
        adam = _Adam(delta, s.learning_rate)
        active = torch.ones(n, dtype=torch.bool, device=delta.device)
        losses: list[list[float]] = [[] for _ in range(n)]
        margins = torch.zeros(n, device=delta.device)
        live = _Live(self, active)
        for step in range(s.n_steps):
            moved = delta.detach().requires_grad_(True)
            nll, kl, margin = live.terms(moved)
            size = moved.norm(dim=1)
            decay = size / length**2 if s.weight_decay_form == "published" else (size / length) ** 2
            loss = nll + s.kl_factor * kl + s.weight_decay * decay
            if not torch.isfinite(loss[active]).all():
                raise ModelError("The search's loss is not finite. Use a lower learning rate or a smaller clamp.")
            margins = torch.where(active, margin, margins)
            for i in active.nonzero()[:, 0].tolist():
                losses[i].append(float(loss[i].detach()))
            done = loss.detach() < s.stop_loss if s.stop == "loss" else margin >= s.min_margin
            active = active & ~done
            if step == s.n_steps - 1 or not active.any():
                break
            (gradient,) = torch.autograd.grad(loss[active].sum(), moved)
            delta = adam.step(delta, gradient, active)
            size = delta.norm(dim=1, keepdim=True)
            delta = delta * (s.clamp * length[:, None] / size.clamp(min=1e-12)).clamp(max=1)
            live = live.without(active)
        return [
            Value(delta[i].cpu(), initial[i].cpu(), tuple(losses[i]), float(margins[i]), bool(margins[i] > 0))
            for i in range(n)
        ]


class _Live:
    """The rows of the facts that are still searched; finished ones leave the batch."""

    def __init__(self, search: _Search, active: Tensor, before: Tensor | None = None) -> None:
        self.search = search
        keep = active[search.facts]
        self.rows = keep.nonzero()[:, 0]
        self.suffix = search.suffix if keep.all() else search.suffix.select(self.rows)
        self.facts = search.facts[self.rows]
        self.targets, self.kl = (self._kept(r, keep, active) for r in (search.targets, search.kl))
        self.n_active = int(active.sum())
        if before is None:
            with torch.no_grad():
                none = torch.zeros(len(search.found), self.suffix.state.shape[2], device=active.device)
                before = self._log_probabilities(self._states(none), search.kl)
        self.before = before

    def _kept(self, reads: _Reads, keep: Tensor, active: Tensor) -> _Reads:
        where = torch.full((len(keep),), -1, device=keep.device)
        where[self.rows] = torch.arange(len(self.rows), device=keep.device)
        chosen = active[reads.fact]
        return _Reads(
            where[reads.row[chosen]],
            reads.column[chosen],
            reads.fact[chosen],
            reads.token[chosen],
            reads.weight[chosen],
        )

    def without(self, active: Tensor) -> _Live:
        """Drop finished facts once they are a quarter of the batch; until then their gradient is masked."""
        n = int(active.sum())
        if n > 0.75 * self.n_active:
            return self
        return _Live(self.search, active, self.before)

    def _states(self, delta: Tensor) -> Tensor:
        """Run the blocks above with each row's delta added in column 0."""
        suffix, side = self.suffix, self.search.side
        added = delta[self.facts]
        if side == "residual":
            state = suffix.state
            return suffix.run(torch.cat([(state[:, 0] + added)[:, None], state[:, 1:]], 1))

        def add(out: Tensor) -> Tensor:
            shaped = out.reshape(*suffix.state.shape[:2], -1)  # some families flatten rows and columns in the MLP
            return (shaped + functional.pad(added[:, None], (0, 0, 0, shaped.shape[1] - 1))).reshape(out.shape)

        with Trace(suffix.model) as trace:
            trace.edit(f"blocks.{suffix.first}.mlp.down", add)
            return suffix.run()

    def _log_probabilities(self, states: Tensor, reads: _Reads) -> Tensor:
        return self.suffix.model.logits(states[reads.row, reads.column]).float().log_softmax(-1)

    def terms(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each fact's NLL, KL and least margin, (facts,) each; 0 where a fact is not live."""
        states = self._states(delta)
        zero = torch.zeros(delta.shape[0], device=delta.device)
        logp = self._log_probabilities(states, self.targets)
        said = logp.gather(1, self.targets.token[:, None])[:, 0]
        nll = zero.index_add(0, self.targets.fact, -said * self.targets.weight)
        with torch.no_grad():
            others = logp.scatter(1, self.targets.token[:, None], -torch.inf).amax(1)
            margin = torch.full_like(zero, torch.inf).scatter_reduce(0, self.targets.fact, said - others, "amin")
        kl = zero
        if len(self.kl.fact):
            now = self._log_probabilities(states, self.kl)
            before = self.before[torch.isin(self.search.kl.fact, self.kl.fact)]
            kl = zero.index_add(0, self.kl.fact, divergence(now, before))
        return nll, kl, margin


def divergence(edited: Tensor, original: Tensor) -> Tensor:
    """Return KL(edited || original) of log-probabilities: edited first, as in the authors' code.

    Shapes:
        (..., classes) twice -> (...)
    """
    return (edited.exp() * (edited - original)).sum(-1)


class _Adam:
    """Adam without decay (betas 0.9, 0.999), per coordinate, whose state moves for active facts only."""

    def __init__(self, like: Tensor, learning_rate: float) -> None:
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)
        self.rate, self.steps = learning_rate, 0

    def step(self, delta: Tensor, gradient: Tensor, active: Tensor) -> Tensor:
        """Return the moved delta; rows of inactive facts stay bit for bit."""
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first = self.first / (1 - 0.9**self.steps)
        second = self.second / (1 - 0.999**self.steps)
        return torch.where(active[:, None], delta - self.rate * first / (second.sqrt() + 1e-8), delta)
