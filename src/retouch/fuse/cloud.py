"""The cloud's side of a run: a plan for each edge, its task, the check of what comes back, recovery and fusion.

Plain functions and folders: `simulate` calls them in a loop, the Flower app moves the same things in messages. What is
finished lies in the run's folder and its journal, so that the same run started again asks only for what is missing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import store
from ..errors import RetouchError, StoreError, UserError
from ..model import Model
from ._factors import shapes_of
from ._inputs import Inputs, Text
from ._lora import targets_of
from ._quantised import dequantised
from ._receipt import check_facts, check_size
from ._scores import NEEDS_INPUTS
from ._units import dense_blocks, units_of
from .adapter_file import check_tensors, open_adapter, ranks_of, weight_norms, write_adapter
from .align import aligned
from .base import Adapter
from .edge import Capabilities, Task, Upload, check_name, package_name
from .journal import Entry, Journal
from .memory import Load
from .merging import merge_to_folder
from .privacy import GUARANTEE
from .prune import PrunePlan, measured_inputs, plan_prune, save_plan
from .pruned import open_pruned, save_pruned
from .recover import recover, restricted
from .runs import Run, check_run, refused_edges
from .train import LoraSettings, initial_a

__all__ = ["Assignment", "Cloud", "Outcome"]

_log = logging.getLogger("retouch")


@dataclass(frozen=True, eq=False)
class Assignment:
    """What one edge is asked for.

    Attributes:
        name: Of the edge.
        plan: Its plan, which stays here.
        task: What it is sent.
        package: Folder of its pruned model.
        finished: Its adapter is here already.
    """

    name: str
    plan: PrunePlan
    task: Task
    package: Path
    finished: bool


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a run.

    Attributes:
        fused: Folder of the fused adapter, which plain PEFT loads.
        edges: Names whose adapters are in it.
        absent: Names that are not.
        partial: Names that were stopped by the deadline.
        resumed: Names that were done before.
        why: What went wrong with an edge, by name.
        facts: What each edge told of its adapter, and how many bytes it sent.
    """

    fused: Path
    edges: tuple[str, ...]
    absent: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    resumed: tuple[str, ...] = ()
    why: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "fused": str(self.fused), "edges": list(self.edges), "absent": list(self.absent),
            "partial": list(self.partial), "resumed": list(self.resumed), "why": dict(self.why),
            "facts": {name: dict(facts) for name, facts in self.facts.items()},
        }  # fmt: skip


# ---------------------------------------------------------------- the cloud


class Cloud:
    """One run of one model, in one folder.

    Raises:
        UserError: Its fusion needs what a cloud of edges does not have; the folder is inside a saved one.
    """

    def __init__(self, model: Model, run: Run, folder: str | Path) -> None:
        check_run(run)
        store.refuse_inside(folder)
        self.model, self.run, self.folder = model, run, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.folder / "journal.jsonl")
        self.assignments: dict[str, Assignment] = {}
        self.resumed: list[str] = []
        self.why: dict[str, str] = {}
        self.unfit: dict[str, str] = {}
        self._plans: dict[str, PrunePlan] = {}
        self._moments: dict[str, Inputs] | None = None

    # ------------------------------------------------------------ plans and tasks

    def assign(self, edges: Sequence[Capabilities]) -> list[Assignment]:
        """Give each edge a plan and a task; edges of an earlier start of this run keep their place.

        An edge that asks for what cannot be is journalled as refused and left out; the quorum decides about the rest.

        Returns:
            One for each edge of the run, those included that are not there now.

        Raises:
            UserError: Two edges have one name, or so many are refused that too few are left.
        """
        names = [check_name(e.name) for e in edges]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise UserError(f"Two edges are called {twice!r}; their adapters could not be told apart. Rename one.")
        known = self._roster()
        asked = {name: edge for name, (_, edge) in known.items()} | {e.name: e for e in edges}
        self.unfit = refused_edges(self.run, list(asked.values()))
        numbers = {name: number for name, (number, _) in known.items()}
        plans = {name: plan for name in sorted(asked) if (plan := self._planned(asked[name])) is not None}
        for name in plans:
            numbers.setdefault(name, max(numbers.values(), default=-1) + 1)
        n_edges = max(numbers.values(), default=-1) + 1
        starts = {name: self._start(asked[name], plan, numbers[name], n_edges) for name, plan in plans.items()}
        fit = {name: start for name, start in starts.items() if start is not None}
        self._require_enough(len(fit))
        self._enrol(known | {name: (numbers[name], asked[name]) for name in fit})
        self.assignments = {name: self._assigned(name, plans[name], *start) for name, start in fit.items()}
        for name, why in self.unfit.items():
            self._reject(name, why)
        self.resumed = [name for name, a in self.assignments.items() if a.finished]
        return list(self.assignments.values())

    def _roster(self) -> dict[str, tuple[int, Capabilities]]:
        """Read the edges of earlier starts; a number stays with its edge, since seeds follow from it."""
        path = self.folder / "edges.json"
        known: dict[str, dict[str, Any]] = store.read_json(path) if path.is_file() else {}
        return {
            name: (e["number"], Capabilities(name, e["budget_mib"], e["ratio"], e["rank"])) for name, e in known.items()
        }

    def _enrol(self, roster: Mapping[str, tuple[int, Capabilities]]) -> None:
        plain = {
            name: {"number": number, "budget_mib": edge.budget_mib, "ratio": edge.ratio, "rank": edge.rank}
            for name, (number, edge) in roster.items()
        }
        store.write_json_atomic(self.folder / "edges.json", plain)

    def _needed(self, n_edges: int) -> int:
        """Return how many adapters are enough."""
        return max(self.run.settings.min_edges, math.ceil(self.run.settings.quorum * n_edges - 1e-9))

    def _require_enough(self, n: int) -> None:
        """Refuse to let edges train where so many were refused that those left can never be enough."""
        needed = self._needed(n + len(self.unfit))
        if self.unfit and n < needed:
            told = "; ".join(self.unfit.values())
            raise UserError(f"{n} of {n + len(self.unfit)} edges can take part, and {needed} are needed. {told}")

    def _lora(self, edge: Capabilities) -> LoraSettings:
        return replace(self.run.lora, rank=edge.rank or self.run.lora.rank)

    def _planned(self, edge: Capabilities) -> PrunePlan | None:
        """Plan for an edge; one whose wishes cannot be met is noted as unfit."""
        if edge.name in self.unfit:
            return None
        try:
            targets_of(self.model, self._lora(edge))
            return self._plan(edge, self._lora(edge))
        except UserError as error:
            self.unfit[edge.name] = f"The edge {edge.name}: {error}"
            return None

    def _start(
        self, edge: Capabilities, plan: PrunePlan, number: int, n_edges: int
    ) -> tuple[LoraSettings, dict[str, Tensor]] | None:
        """Draw where an edge's A begins; an edge for which that cannot be done is noted as unfit."""
        lora = self._lora(edge)
        lora = replace(lora, seed=lora.seed * 1000 + number)
        try:
            return lora, initial_a(self.model, plan, lora, edge=number, n_edges=n_edges)
        except UserError as error:
            self.unfit[edge.name] = f"The edge {edge.name}: {error}"
            return None

    def _assigned(self, name: str, plan: PrunePlan, lora: LoraSettings, initial: dict[str, Tensor]) -> Assignment:
        run = self.run
        save_plan(plan, self.folder / "plans" / f"{plan.hash[:16]}.json")
        package = self._package(plan)
        task = Task(
            run.name, plan.hash, self.model.base_fingerprint, package_name(package), lora, initial, run.replay,
            run.settings.deadline_s,
        )  # fmt: skip
        done = self.journal.finished(run.name, name, plan.hash, task.hash)
        return Assignment(name, plan, task, package, done is not None)

    def _plan(self, edge: Capabilities, lora: LoraSettings) -> PrunePlan:
        """Plan for an edge; edges that ask for the same share a plan."""
        how = self.run.settings
        load = Load(
            lora.batch, how.max_tokens, rank=lora.rank, bytes_per_weight=4 if lora.dtype == "float32" else 2,
            checkpointing=lora.checkpointing, dropout=lora.dropout,
        )  # fmt: skip
        ratio = 0.0 if edge.budget_mib is None and edge.ratio is None else edge.ratio
        key = store.key(budget=edge.budget_mib, ratio=ratio, rank=lora.rank)
        if key not in self._plans:
            self._plans[key] = plan_prune(
                self.model, budget_mib=edge.budget_mib, ratio=ratio, score=how.score, align=how.align,
                moments=self._inputs() if ratio != 0 else None, text=self._text(), load=load, seed=how.seed,
            )  # fmt: skip
        return self._plans[key]

    def _text(self) -> Text:
        return Text(n_tokens=self.run.settings.text_tokens)

    def _inputs(self) -> dict[str, Inputs] | None:
        """Measure what flows into the weights, once for all plans."""
        how, n_blocks = self.run.settings, self.model.anatomy.n_blocks
        if how.score not in NEEDS_INPUTS and how.align not in ("bias", "lstsq"):
            return None
        if self._moments is None:
            dense = dense_blocks(n_blocks, None, None)
            blocks = [b for b in range(n_blocks) if b not in dense]
            self._moments = measured_inputs(self.model, units_of(self.model), blocks, self._text())
        return self._moments

    def _package(self, plan: PrunePlan) -> Path:
        """Save the pruned model of a plan, if it is not there."""
        dtype = self.run.settings.dtype
        place = self.folder / "packages" / f"{plan.hash[:16]}-{dtype}"
        if place.is_dir():
            store.check_folder(place)
        else:
            small = aligned(self.model, plan, moments=self._moments, text=self._text())
            save_pruned(small, plan, place, dtype=dtype)
        return place

    # ------------------------------------------------------------ what comes back

    def sent(self, assignment: Assignment) -> None:
        """Journal that an edge was asked."""
        self._note(assignment, "sent")

    def failed(self, assignment: Assignment, why: str) -> None:
        """Journal that an edge could not do its task."""
        self._note(assignment, "failed", why)

    def refused(self, assignment: Assignment, why: str) -> None:
        """Journal that an answer is not used."""
        self._note(assignment, "refused", why)

    def late(self, assignment: Assignment) -> None:
        """Journal an answer that came after the fusion; it is not used."""
        self._note(assignment, "late", "Its answer came after the deadline. Start the run again to use it.")

    def receive(self, assignment: Assignment, upload: Upload) -> None:
        """Check what an edge sent, recover it to the whole model's sizes, and keep it.

        Raises:
            StoreError: Anything in it is not as it was agreed; it is journalled as refused and not kept.
        """
        try:
            adapter = self._checked(assignment, upload)
            write_adapter(
                self.folder / "adapters" / assignment.name, iter(adapter.parts.items()), ranks_of(adapter), self.model,
                notes=adapter.notes, plan=adapter.plan, n_examples=adapter.n_examples, kept=adapter.kept,
            )  # fmt: skip
        except StoreError as error:
            self.refused(assignment, str(error))
            raise
        file = f"adapters/{assignment.name}/adapter_model.safetensors"
        told = {k: upload.facts[k] for k in upload.facts if k in ("n_examples", "partial", "loss", *GUARANTEE)}
        facts = {**told, "bytes": upload.n_bytes, "ratio": assignment.plan.ratio, "rank": assignment.task.settings.rank}
        self._note(assignment, "received", files={file: store.sha256_file(self.folder / file)}, facts=facts)

    def _reject(self, name: str, why: str) -> None:
        """Journal an edge that has no plan and so no task."""
        self.why[name] = why
        _log.warning("%s", why)
        self.journal.add(Entry(self.run.name, name, "", "", "refused", why=why))

    def _note(
        self, assignment: Assignment, state: str, why: str = "", files: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        task = assignment.task
        if why:
            self.why[assignment.name] = why
            _log.warning("%s: %s", assignment.name, why)
        self.journal.add(Entry(task.run, assignment.name, task.plan, task.hash, state, files or {}, why, facts or {}))

    def _checked(self, assignment: Assignment, upload: Upload) -> Adapter:
        task, facts, where = assignment.task, upload.facts, f"the answer from {assignment.name}"
        check_facts(facts, task, where, counted=self.run.settings.weights == "examples")
        small = open_pruned(assignment.package, device="cpu")
        check_size(upload, task, shapes_of(small), where)
        tensors = dequantised(upload.tensors, where)
        if task.settings.freeze_a:
            if odd := [n for n in tensors if not n.endswith(".lora_B")]:
                raise StoreError(f"{where}: it holds {odd[0][:80]!r}, and A was frozen. Do not use it.")
            tensors |= {f"{name}.lora_A": value for name, value in task.initial.items()}
        ranks = dict.fromkeys(task.initial, task.settings.rank)
        if (facts["modules"], facts["ranks"]) != (list(ranks), list(ranks.values())):
            raise StoreError(f"{where}: its list of weights or ranks is not what was agreed. Do not use it.")
        scales = {name: alpha / task.settings.rank for name, alpha in zip(ranks, facts["alphas"])}
        found = check_tensors(
            assignment.name, tensors, shapes_of(small), ranks=ranks, scales=scales, norms=weight_norms(small)
        )
        parts = {name: found[name] for name in ranks}  # messages keep no order
        count = facts["n_examples"]
        adapter = Adapter(
            assignment.name, parts, task.base, plan=task.plan, n_examples=int(count) if count.isdecimal() else None,
            notes={key: value for key, value in facts.items() if key in ("partial", "versions", "loss", *GUARANTEE)},
        )  # fmt: skip
        return recover(adapter, assignment.plan, self.model)

    # ------------------------------------------------------------ fusion

    def fuse(self) -> Outcome:
        """Fuse the adapters that are here.

        Raises:
            RetouchError: Too few are here; what came is kept, and the same run started again asks for the rest.
        """
        here = {name: entry for name, a in self.assignments.items() if (entry := self._here(a)) is not None}
        absent = [name for name in self.assignments if name not in here]
        for name in absent:
            self._note(self.assignments[name], "absent")
        absent += self.unfit
        how, n = self.run.settings, len(self.assignments) + len(self.unfit)
        needed = self._needed(n)
        if len(here) < needed:
            told = "; ".join(f"{name}: {self.why.get(name, 'no answer')}" for name in absent)
            raise RetouchError(
                f"{len(here)} of {n} edges have sent an adapter, and {needed} are needed. Missing: {told}. What came is kept "
                f"in {self.folder}; start the same run again and only the rest is asked for."
            )
        adapters = [self._opened(name) for name in here]
        weights: Any = None if how.weights == "equal" else "examples"
        fused = self.folder / "fused"
        merge_to_folder(self.model, adapters, self.run.method, fused, weights=weights, resolver=self.run.resolver)
        outcome = Outcome(
            fused, tuple(here), tuple(absent), tuple(n for n, e in here.items() if e.facts.get("partial")),
            tuple(n for n in self.resumed if n in here), {n: w for n, w in self.why.items() if n in absent},
            {n: e.facts for n, e in here.items()},
        )  # fmt: skip
        store.write_json_atomic(self.folder / "result.json", outcome.to_dict())
        return outcome

    def _here(self, assignment: Assignment) -> Entry | None:
        task = assignment.task
        return self.journal.received(task.run, assignment.name, task.plan, task.hash)

    def _opened(self, name: str) -> Adapter:
        """Read an adapter back, with what its edge could see."""
        adapter, plan = (
            open_adapter(self.folder / "adapters" / name, self.model, name=name),
            self.assignments[name].plan,
        )
        return recover(restricted(adapter, plan, self.model), plan, self.model)
