"""TOP: bring about, from the subject, the state that an edit at the relation would make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import linalg
from ..change import Change, apply
from ..errors import SettingsError
from ..model import Model
from ..settings import setting
from .base import MetricName, block_at, down, metrics, rule
from .contexts import Context
from .facts import Fact
from .neighbors import neighbors, stopped
from .rank_one import RankOneMethod, join
from .rows import Problem, problems
from .value import Aim, Start, Value, optimise

__all__ = ["Top"]


@dataclass(frozen=True)
class Top(RankOneMethod):
    """Ask the subject for the state at the relation that says the new answer, never for the answer itself.

    Source: Liu et al., TOP: two-stage editing, aware of subject and relation (arXiv 2506.04042); sunshower-liu/TOP (no
        licence: derived anew). Stage 1 finds what the relation block's output at the prompt's end has to gain; stage 2
        finds a value at the subject that makes attention bring it about; the write is rome's. Ours: all contexts enter
        stage 2, the distance is relative, and a tenth of the target's own likelihood stands beside it (0 for the paper's
        objective), without which the state was out of reach on small models; stage 1 asks for a nearer state (slower
        steps, an earlier stop). ``faithful`` takes the first row, the absolute distance
        times `vec_factor`, and the published steps and stops.

    Use when: a single fact has to generalise like rome's but leave the subject's other relations alone.

    Known problems: a relation block that the subject cannot reach keeps the distance near its start (reported as
        ``distance``); then another `offset` is needed.

    Shapes: h at the relation block (d_model), v at the edited block (d_model); rank one a fact and block.

    Example:
        >>> Top().n_steps_subject
        45
    """

    blocks: tuple[int, ...] = setting((), "Edited blocks, each a complete edit; empty: rome's block.")
    offset: int = setting(
        -1, "Blocks from the edited to the relation block; -1: 0.18 of the depth (gpt2: 0.02).", ge=-1
    )
    metric: MetricName = setting("identity", "Norm that the write is smallest in.")
    relation_rate: float = setting(0.2, "Adam's step in stage 1.", gt=0)
    relation_stop: float = setting(0.3, "Loss at which stage 1 ends.", ge=0)
    n_steps_subject: int = setting(45, "Steps of stage 2.", ge=1, le=1000)
    stop_distance: float = setting(0.05, "Distance at which stage 2 ends, in lengths of the state.", ge=0)
    nll_weight: float = setting(0.1, "Weight of the target's own NLL beside the distance in stage 2.", ge=0)
    subject_decay: float = setting(0.0, "Weight of the value change's own length in stage 2.", ge=0)
    vec_factor: float = setting(0.1, "Scale of the absolute distance (faithful).", gt=0)

    def as_published(self, model: Model) -> Any:
        """Under ``faithful`` the published steps, rate, stops and decay."""
        row = super().as_published(model)
        if not self.faithful:
            return row
        published = {
            "relation_rate": 0.5,
            "relation_stop": 0.02,
            "n_steps_subject": row.n_steps,
            "subject_decay": 0.5,
            "nll_weight": 0.0,
        }
        fields = type(self).__dataclass_fields__
        return replace(row, **{k: v for k, v in published.items() if getattr(self, k) == fields[k].default})

    def _contexts(self, model: Model) -> list[Context]:
        """Under ``faithful`` no text with the word import, as in the authors' code."""
        return [c for c in super()._contexts(model) if not (self.faithful and "import" in c.text.split())]

    def shared(self, model: Model, facts: Sequence[Fact]) -> dict[str, linalg.Identity | linalg.Covariance]:
        """Make the metrics once."""
        names = [down(b) for b in self.blocks_of(model)]
        return metrics(model, names, self.metric, text=self.text, n_tokens=self.n_tokens, bos=self.bos)

    def each(self, model: Model, facts: Sequence[Fact], contexts: Sequence[Context], shared: Any) -> list[Change]:
        """Plan each fact alone on `model`; with one block, values are searched together."""
        blocks = self.blocks_of(model)
        if len(blocks) == 1:
            return self._block(model, facts, contexts, shared, blocks[0])
        planned = []
        for fact in facts:
            work, steps = model, list[Change]()
            for block in blocks:
                steps += self._block(work, [fact], contexts, shared, block)
                if stopped(steps[-1]):
                    break
                work = apply(work, steps[-1])
            joined = join(self, model, [fact], steps)
            told = joined.notes["facts"]
            planned.append(replace(joined, notes={**joined.notes, "facts": [{**told[-1], "blocks": told}]}))
        return planned

    def _block(
        self, model: Model, facts: Sequence[Fact], contexts: Sequence[Context], shared: Any, block: int
    ) -> list[Change]:
        at = self.relation_block(model, block)
        relation = [self._relation(p) for p in problems(model, facts, contexts, "prompt", self.bos)]
        first = replace(
            self, learning_rate=self.relation_rate, stop_loss=self.relation_stop, kl_position="last", max_drift=0.0
        )
        wanted = optimise(model, relation, at, "residual", first)
        found = problems(model, facts, contexts, "subject", self.bos)
        if self.faithful:
            found = [replace(p, rows=p.rows[:1], weights=(1.0,)) for p in found]
        gains = torch.stack([v.delta for v in wanted])
        aim = Aim(at, gains, self.stop_distance, self.nll_weight, self.vec_factor if self.faithful else None)
        second = replace(self, n_steps=self.n_steps_subject, weight_decay=self.subject_decay)
        name, metric = down(block), shared[down(block)]
        heard = neighbors(model, found, [[i] for i in range(len(found))], [name], self, {name: metric})
        values = optimise(model, found, block, "down", second, aim=aim, bystanders=heard)
        values = values if self.nll_weight else self._judged(model, found, block, values)
        if self.faithful:  # the write averages keys over all contexts, as published
            found = problems(model, facts, contexts, "subject", self.bos)
        return [
            self.written(model, block, metric, p, v, contexts, relation_block=at, stage_1=_stage(w))
            for p, v, w in zip(found, values, wanted)
        ]

    def _judged(self, model: Model, found: Sequence[Problem], block: int, values: Sequence[Value]) -> list[Value]:
        """Tell by one pass whether the values, which never heard of the targets, make the model say them."""
        look = replace(self, n_steps=1, kl_factor=0.0, max_drift=0.0)
        here = Start(torch.stack([v.delta for v in values]), torch.ones(len(values)))
        said = optimise(model, found, block, "down", look, start=here)
        return [replace(v, margin=s.margin, reached=s.reached) for v, s in zip(values, said)]

    def _relation(self, problem: Problem) -> Problem:
        """Under ``faithful`` the guarding row's token is shifted by the target's length less one, as in the code."""
        if not self.faithful or problem.kl is None:
            return problem
        return replace(problem, kl_at=max(0, problem.kl_at - len(problem.rows[0].target) + 1))

    def blocks_of(self, model: Model) -> tuple[int, ...]:
        """Return the edited blocks: the setting's, or rome's."""
        early = model.anatomy.groups & {"gpt2", "gpt_neox"}
        wanted = self.blocks or (block_at(-1, 0.35 if early else 0.18, model.anatomy, self.name),)
        if list(wanted) != sorted(set(wanted)) or not 0 <= wanted[0] <= wanted[-1] < model.anatomy.n_blocks - 1:
            raise SettingsError(
                f"top: blocks must ascend within 0 to {model.anatomy.n_blocks - 2} (the relation block comes after); "
                f"got {list(wanted)}."
            )
        return wanted

    def relation_block(self, model: Model, block: int) -> int:
        """Return the relation block that belongs to an edited block."""
        a = model.anatomy
        step = self.offset if self.offset > 0 else max(1, rule(0.02 if "gpt2" in a.groups else 0.18, a))
        if self.offset == 0 or (self.offset > 0 and block + step >= a.n_blocks):
            raise SettingsError(f"top: offset must lead to a later block of this model (0 to {a.n_blocks - 1}); from "
                                f"block {block} got {self.offset}.")  # fmt: skip
        return min(block + step, a.n_blocks - 1)


def _stage(value: Value) -> dict[str, Any]:
    notes = value.notes()
    return {k: notes[k] for k in ("losses", "margin", "ratio", "reached")}
