"""RETS: edit at the relation, under constraints that keep it to the subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import linalg, stats
from ..change import Change
from ..errors import FactError, SolveError
from ..model import Model
from ..progress import report
from ..settings import setting
from ..tokens import Text, encode
from .base import block_at, down, rule
from .constraints import constraints, read_prompts
from .contexts import Context
from .facts import Fact
from .keys import mean_keys, read_all
from .neighbors import neighbors
from .rank_one import RankOneMethod
from .rows import Problem, problems
from .value import optimise

__all__ = ["Rets", "reworded"]

_PUBLISHED_CONSTRAINTS = 21_919  # the prompts of CounterFact


@dataclass(frozen=True)
class Rets(RankOneMethod):
    """Write each fact where recall gathers, at the prompt's last token, out of other subjects' hearing.

    Source: Liu et al., Relation Also Need Attention (RETS; arXiv 2408.15091, AAAI 2025); sunshower-liu/RETS (no
        licence: derived anew). Ours: the three parts of the metric have equal traces before they are weighed, the
        contexts' scatter is a part of it, constraint prompts are built from the fact's own template when none are
        given, and the subject stays the subject in the row that guards it. ``faithful`` takes the raw mean moment plus
        the raw sum over the constraints, the unprefixed key in the scale, and the whole prompt as the subject.

    Use when: one fact about a subject has to change and everything else about that subject has to stay.

    Known problems: one fact at a time. Paraphrases that end otherwise follow less often than with rome. A prompt that
        ends with its subject leaves no relation token: a paraphrase with the subject earlier is used if the fact has
        one, else it becomes an edit of the subject in a late block, and the report says so.

    Shapes: M = (alpha C0 + beta Cs + gamma S, each of trace d_ff) + eta I over keys (d_ff); rank one a fact. With N
        constraint prompts below d_ff the cost is one pass over them and N^2 d_ff, without a d_ff x d_ff matrix.

    Example:
        >>> Rets(block=24).subject_weight
        100.0
    """

    files: ClassVar[tuple[str, ...]] = ("text", "constraints")
    needs_subject: ClassVar[bool] = False

    kl_position: Literal["subject", "last"] = setting("last", "Where the drift of '{subject} is a' is read.")
    block: int = setting(
        -1,
        "Edited block; -1: the one from 0.55 to 0.85 of the depth where other subjects' keys are least like the "
        "fact's. See also: retouch locate.",
        ge=-1,
    )
    moment_weight: float = setting(0.0, "alpha: weight of ordinary text's second moment; above 0 collects it.", ge=0)
    subject_weight: float = setting(100.0, "beta: weight of the constraint prompts' second moment.", ge=0)
    drift_weight: float = setting(100.0, "gamma: weight of the scatter of the fact's own keys over its contexts.", ge=0)
    eta: float = setting(0.1, "Weight of the identity.", gt=0)
    max_amplification: float = setting(10.0, "eta is doubled until drifted keys hear no more than this.", ge=1)
    n_constraints: int = setting(200, "Constraint prompts a fact.", ge=1, le=30_000)
    constraints: str = setting("", "File of constraint prompts of your own, a line each; empty: built from the fact.")
    reword: bool = setting(True, "Edit through a paraphrase where the prompt ends with its subject.")

    def blind(self) -> Any:
        """Never edit through a paraphrase."""
        return replace(self, reword=False)

    def plan_each(self, model: Model, groups: Sequence[Sequence[Fact]]) -> list[Change]:
        """Plan each group alone on `model`; groups of one fact and one block are searched together."""
        method = self.as_published(model)
        facts = [f for g in groups for f in g]
        if method.block >= 0 or len(facts) != len(groups) or not all(groups):
            return super().plan_each(model, groups)
        self.ready(model, facts)
        chosen = [method._chosen(model, [f]) for f in facts]
        contexts = self._contexts(model)
        planned: dict[int, Change] = {}
        for block in sorted({at for at, _ in chosen}):
            numbers = [i for i, (at, _) in enumerate(chosen) if at == block]
            keys = {prompt: own for i in numbers for prompt, own in chosen[i][1].items()}
            shared = _Shared(block, keys, method._moment(model, block))
            changes = method.each(model, [facts[i] for i in numbers], contexts, shared)
            planned.update(zip(numbers, (replace(c, settings=self.to_dict()) for c in changes)))
        return [planned[i] for i in range(len(groups))]

    def as_published(self, model: Model) -> Any:
        """Under ``faithful`` the guarding row is read where the value goes in, and constraints are as many as published.

        The raw sum has no identity beside it: with fewer prompts than the width it leaves the edited prompt unheard.
        """
        row = super().as_published(model)
        if not self.faithful:
            return row
        default = type(self).__dataclass_fields__["n_constraints"].default
        n = _PUBLISHED_CONSTRAINTS if self.n_constraints == default else self.n_constraints
        return replace(row, kl_position="subject", n_constraints=n)

    def shared(self, model: Model, facts: Sequence[Fact]) -> _Shared:
        """Choose the block, read the constraints' keys there, and collect the moment if it is weighed."""
        report("Constraints", 0, len(facts))
        block, keys = self._chosen(model, facts)
        report("Constraints", len(facts), len(facts))
        return _Shared(block, keys, self._moment(model, block))

    def _chosen(self, model: Model, facts: Sequence[Fact]) -> tuple[int, dict[str, Tensor]]:
        """Return the edited block, and by filled prompt the constraints' keys there.

        The block is the setting's, or the one where constraints are least like the facts' own keys. For one fact the keys
        that choose it are those that are asked for, so that one pass does.
        """
        a = model.anatomy
        candidates = (
            [*range(rule(0.55, a), rule(0.85, a) + 1)] if self.block < 0 else [block_at(self.block, 0, a, self.name)]
        )
        block, names = candidates[0], [down(b) for b in candidates]
        if len(candidates) > 1:
            likeness = torch.zeros(len(candidates), dtype=torch.float64)
            for fact in facts:
                found = read_all(model, self._rows(model, self._asked(fact)), names)
                likeness += self._likeness(model, self._asked(fact), found)
            block = candidates[int(likeness.argmin())]
            if len(facts) == 1:
                return block, {facts[0].filled: found[down(block)].clone()}
        rows = [self._rows(model, self._asked(f)) for f in facts]
        read = read_all(model, [row for rs in rows for row in rs], [down(block)])[down(block)]
        return block, dict(zip((f.filled for f in facts), torch.split(read, [len(rs) for rs in rows])))

    def _likeness(self, model: Model, fact: Fact, others: Mapping[str, Tensor]) -> Tensor:
        """Return the mean cosine of the constraints' keys with the fact's own one at each weight."""
        found = problems(model, [fact], [Context("", 1.0)], "prompt", self.bos)
        own = mean_keys(model, found, [[0]], list(others))
        return torch.stack([torch.cosine_similarity(keys, own[n].T).mean() for n, keys in others.items()])

    def _moment(self, model: Model, block: int) -> Tensor | None:
        """Collect ordinary text's second moment where it is weighed."""
        if not self.moment_weight:
            return None
        name, n_tokens = down(block), self.n_tokens or None
        return stats.collect(model, [name], text=self.text or None, n_tokens=n_tokens, bos=self.bos)[name].mean

    def _asked(self, fact: Fact) -> Fact:
        """The fact as it is edited."""
        return reworded(fact) if self.reword and not self.faithful else fact

    def _rows(self, model: Model, fact: Fact) -> list[tuple[int, ...]]:
        return [row.ids for row in encode(model.tokenizer, [Text(p) for p in self._prompts(fact)], self.bos)]

    def _prompts(self, fact: Fact) -> list[str]:
        own = read_prompts(Path(self.constraints)) if self.constraints else []
        chosen = constraints(fact, n=0 if own else self.n_constraints, seed=self.seed, own=own)
        prompts = [*dict.fromkeys(c.prompt for c in chosen), *([fact.filled] if self.faithful else [])]
        if not prompts:
            raise FactError(f"{self.constraints}: every prompt asks for the fact {fact.filled!r} itself; none is left "
                            "to constrain its edit.")  # fmt: skip
        return prompts

    def each(self, model: Model, facts: Sequence[Fact], contexts: Sequence[Context], shared: Any) -> list[Change]:
        """Plan each fact alone on `model`; values are searched together."""
        asked = [self._asked(f) for f in facts]
        if (
            self.faithful
        ):  # the whole prompt as the subject: the guarding row repeats it, and drifts right where it ends
            found = problems(model, [Fact("{}", f.filled, f.target) for f in asked], contexts, "subject", self.bos)
        else:
            found = problems(model, asked, contexts, "prompt", self.bos)
        ends = [p.rows[0].subject == p.rows[0].prompt for p in problems(model, asked, contexts[:1], "prompt", self.bos)]
        found = [replace(p, fact=f) for p, f in zip(found, asked)]
        name = down(shared.block)
        chosen = [self._metric(model, p, shared, name, f) for p, f in zip(found, facts)]
        heard = [
            replace(b, group=i)
            for i, (p, (metric, _)) in enumerate(zip(found, chosen))
            for b in neighbors(model, [p], [[0]], [name], self, {name: metric})
        ]
        values = optimise(model, found, shared.block, "down", self, bystanders=heard)
        planned = []
        for fact, problem, value, (metric, eta), at_end in zip(facts, found, values, chosen, ends):
            notes: dict[str, Any] = {
                "eta": eta,
                "n_constraints": len(shared.keys[fact.filled]),
                "key_token": "prompt_last",
            }
            if problem.fact is not fact:
                notes["warnings"] = [f"The prompt ends with its subject; edited through {problem.fact.filled!r}."]
            elif at_end:
                notes["key_token"] = "subject_last"
                notes["warnings"] = ["The prompt ends with its subject, so that the edit stands at the subject's last "
                                     "token. A paraphrase with the subject earlier would help."]  # fmt: skip
            written = self.written(model, shared.block, metric, problem, value, contexts, **notes)
            planned.append(replace(written, facts=(fact.to_dict(),)))
        return planned

    def _metric(
        self, model: Model, problem: Problem, shared: _Shared, name: str, fact: Fact
    ) -> tuple[linalg.Metric, float]:
        """Build M for one fact, with eta doubled until the amplification is allowed."""
        own = read_all(model, [r.ids[: a + 1] for r, a in zip(problem.rows, problem.anchors)], [name])[name]
        key = torch.tensor(problem.weights, dtype=torch.float64) @ own
        others = shared.keys[fact.filled]
        if self.faithful:
            raw = others.T @ others + (0 if shared.moment is None else shared.moment.double())
            return linalg.Covariance.from_moment(raw, eta=1e-6), 0.0
        scatter = own - key
        parts = [(self.subject_weight, others), (self.drift_weight, scatter)]
        vectors = torch.cat([_of_trace(v, w) for w, v in parts if w and float(v.norm()) > 0] or [own[:0]]).T
        eta = self.eta
        for _ in range(60):
            try:
                metric = self._of(vectors, eta, shared.moment)
                if linalg.amplification(key, metric) <= self.max_amplification:
                    return metric, eta
            except SolveError:
                pass  # so small an eta drowns in rounding
            eta *= 2
        raise SolveError(f"No eta keeps the amplification within {self.max_amplification:g}.")

    def _of(self, vectors: Tensor, eta: float, moment: Tensor | None) -> linalg.Metric:
        """Put M together: dense with ordinary text's moment, else by its few vectors."""
        if moment is None:
            return linalg.Woodbury.of(eta, vectors)
        c = moment.double() * (len(vectors) / moment.double().trace()) * self.moment_weight
        return linalg.Covariance.from_moment(c + vectors @ vectors.T, eta=0.0, floor=eta)


@dataclass(frozen=True, eq=False)
class _Shared:
    """What all facts of a plan share.

    Attributes:
        block: The edited block.
        keys: By filled prompt the constraints' keys there, (constraints, d_ff).
        moment: Ordinary text's second moment there, if it is weighed.
    """

    block: int
    keys: Mapping[str, Tensor]
    moment: Tensor | None = field(default=None)


def _of_trace(vectors: Tensor, weight: float) -> Tensor:
    """Scale vectors (n, d_ff) so that their second moment has the trace weight * d_ff."""
    return vectors * (weight * vectors.shape[1] / vectors.square().sum()).sqrt()


def reworded(fact: Fact) -> Fact:
    """Return the fact through its first paraphrase with words after the subject, if its prompt ends with the subject."""
    if not fact.subject or fact.after.strip():
        return fact
    for text in fact.paraphrases:
        if fact.subject in text and not text.rstrip().endswith(fact.subject):
            prompts = (fact.filled, *(p for p in fact.paraphrases if p != text))
            return replace(fact, prompt=Fact.of(text, fact.subject, fact.target).prompt, paraphrases=prompts)
    return fact
