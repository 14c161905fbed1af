"""The one loop that trains: every stage of every method runs through it.

Devices, several processes and bfloat16 are Accelerate's business. Each process works off its rows of the same batch, so
that the number of processes decides nothing but speed and rounding. A cut replaces parameters: the optimiser and the
wrapper are then made anew. A stage that was interrupted goes on from its last saved state and, on a CPU, ends with the
same bits as one that never was.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checkpoint
from ..bound import Multiplier
from ..errors import RetouchError
from ..progress import report
from .base import Widths
from .encoded import Encoded, endless
from .network import SlimForSequenceClassification, network_of, plain_config
from .presets import Stage, TrainingSettings
from .schedule import Cycle, Timetable
from .teaching import Lesson, Teacher, numbered

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Course", "Position", "train"]

_log = logging.getLogger(__name__)
_POINTS = 20
"""Points of a stage's loss curve."""


@dataclass(frozen=True, eq=False)
class Course:
    """Everything that decides a stage, except the network that it starts from.

    Attributes:
        stage: What is learnt.
        timetable: Its cycles and checks.
        settings: Batch size and the like.
        seed: Of dropout, the order of the data and fresh weights.
        encoded: The training examples.
        teacher: Whom the student learns from.
        check: Gives the quality of each exit on the validation set, by block.
        cut: Makes a smaller network of a network, the widths that it is to have and the number of the cut, from 1.
        equilibrium: Whether gradients flow down as means over exits.
        watched: Blocks whose exits' harm the price follows.
        price: The price of that harm; None: nothing is watched.
    """

    stage: Stage
    timetable: Timetable
    settings: TrainingSettings
    seed: int
    encoded: Encoded
    teacher: Teacher
    check: Callable[[SlimForSequenceClassification], dict[int, float]]
    cut: Callable[[SlimForSequenceClassification, Widths, int], SlimForSequenceClassification] | None = None
    equilibrium: bool = True
    watched: tuple[int, ...] = ()
    price: Multiplier | None = None


@dataclass
class Position:
    """How far a stage is, in numbers that JSON can hold."""

    step: int = 0
    cycle: int = 0
    loss: float = 0.0
    n_losses: int = 0
    best: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    cuts: list[dict[str, Any]] = field(default_factory=list)


def train(
    accelerator: Accelerator, course: Course, start: Callable[[], SlimForSequenceClassification], saved: Path | None
) -> tuple[SlimForSequenceClassification, dict[str, Any]]:
    """Train one stage, from its beginning or from where it was interrupted.

    Args:
        accelerator: Where it runs.
        course: What is done.
        start: Makes the network to begin with; not called where the stage goes on.
        saved: Folder of the state that it goes on from; None saves nothing.

    Returns:
        The network of the chosen state, in eval mode, and the stage's record: its loss curve, checks, cuts, seconds.

    Raises:
        RetouchError: The loss or the gradient is not finite.
    """
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # the caller's generators are left as they were
        return _Training(accelerator, course, saved).run(start)


class _Training:
    network: SlimForSequenceClassification
    optimizer: torch.optim.Optimizer

    def __init__(self, accelerator: Accelerator, course: Course, saved: Path | None) -> None:
        self.accelerator, self.course, self.saved = accelerator, course, saved
        self.at = Position()
        self.lesson: Any = None
        self.best: dict[str, Tensor] = {}
        self.rows: Iterator[list[int]] = iter(())

    def run(
        self, start: Callable[[], SlimForSequenceClassification]
    ) -> tuple[SlimForSequenceClassification, dict[str, Any]]:
        if not self._resume():
            self._begin(start)
        begun, before = time.monotonic(), self.at.seconds
        name, n_steps = f"Training: {self.course.stage.name}", self.course.timetable.n_steps
        speaks = self.accelerator.is_main_process
        if speaks:
            report(name, self.at.step, n_steps)
        while self.at.step < n_steps:
            self._advance()
            self.at.seconds = before + time.monotonic() - begun
            if speaks:
                report(name, self.at.step, n_steps)
            self._save_if_due()
        return self._finish()

    # ------------------------------------------------------------ beginning and ending

    def _begin(self, start: Callable[[], SlimForSequenceClassification]) -> None:
        torch.manual_seed(self.course.seed)  # the same fresh weights in all processes,
        self._wrap(start())
        torch.manual_seed(self.course.seed + 1 + self.accelerator.process_index)  # but not the same dropout
        self.rows = self._rows(0)

    def _wrap(self, network: SlimForSequenceClassification) -> None:
        """Give a network a fresh optimiser, and join the gradients of all processes."""
        self._unwrap()
        self.network = network.to(self.accelerator.device)
        self._ready()
        decayed = [p for p in network.parameters() if p.ndim > 1]
        others = [p for p in network.parameters() if p.ndim <= 1]  # biases and norms
        groups = [{"params": decayed, "weight_decay": self.course.settings.weight_decay},
                  {"params": others, "weight_decay": 0.0}]  # fmt: skip
        fused = self.accelerator.device.type in ("cpu", "cuda")  # one pass over the weights in place of ten
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, eps=1e-8, fused=fused)
        lesson = Lesson(network, self.course.stage, self.course.teacher, self.course.equilibrium, self.course.watched)
        self.lesson = self.accelerator.prepare_model(lesson)

    def _unwrap(self) -> None:
        """Let the accelerator forget the network before a cut; `free_memory` would take the caller's with it."""
        held = self.accelerator._models
        held[:] = [module for module in held if module is not self.lesson]
        self.lesson = None

    def _ready(self) -> None:
        """Set what trains: all of the network, or its exits only, the rest resting."""
        alone = self.course.stage.only_exits
        self.network.requires_grad_(not alone).train(not alone)
        if alone:
            self.network.exits.requires_grad_(True)
            for part in (self.network.exits, self.network.dropout):
                part.train()

    def _finish(self) -> tuple[SlimForSequenceClassification, dict[str, Any]]:
        if self.best:
            self.network.load_state_dict(self.best)
        self._unwrap()
        self.network.requires_grad_(True).zero_grad(set_to_none=True)
        self.network.eval()
        at, stage = asdict(self.at), self.course.stage
        facts = {k: at[k] for k in ("curve", "checks", "cuts", "best", "best_step", "seconds")}
        return self.network, {
            "stage": stage.name,
            "n_steps": self.at.step,
            "learning_rate": stage.learning_rate,
            **facts,
        }

    # ------------------------------------------------------------ one step

    def _advance(self) -> None:
        cycle = self.course.timetable.cycles[self.at.cycle]
        self._learn(cycle)
        self.at.step += 1
        if self.at.step in self.course.timetable.checks:
            self._check()
        if self.at.step == cycle.end:
            if cycle.cut is not None:
                self._cut(cycle.cut)
            self.at.cycle += 1

    def _learn(self, cycle: Cycle) -> None:
        rate = cycle.rate(self.at.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, harm = self._backward(next(self.rows), self.at.step - cycle.first < cycle.n_hidden)
        weights = [p for p in self.network.parameters() if p.grad is not None]
        norm = self.accelerator.clip_grad_norm_(weights, self.course.settings.clip)
        self._require_finite(loss, float(norm), rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.course.price is not None:
            self.course.price.update(harm)
        self._note(loss)

    def _backward(self, rows: list[int], hidden_only: bool) -> tuple[float, float]:
        """Add the gradients of a batch, this process's share of it part by part; return its mean loss and harm."""
        world, me = self.accelerator.num_processes, self.accelerator.process_index
        n_parts = self.course.settings.n_parts
        price = 0.0 if self.course.price is None else self.course.price.value
        seen = torch.zeros(2, device=self.accelerator.device)
        for part in range(n_parts):
            mine = rows[part * world + me :: n_parts * world]
            share = len(mine) / len(rows)
            batch = numbered(self.course.encoded, mine or rows[:1], self.accelerator.device)  # all must join in
            joining = part == n_parts - 1
            with contextlib.nullcontext() if joining else self.accelerator.no_sync(self.lesson):
                loss, harm = self.lesson(batch, hidden_only, price)
                self.accelerator.backward(loss * (share * world))  # the processes' mean is taken
            seen += share * torch.stack([loss.detach().float(), harm])
        total = self.accelerator.reduce(seen, "sum").tolist()
        return total[0], total[1]

    def _require_finite(self, loss: float, norm: float, rate: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's length is {norm}"
        raise RetouchError(
            f"Stage {self.course.stage.name!r} diverged at step {self.at.step + 1} of {self.course.timetable.n_steps}: "
            f"{what} at learning rate {rate:.3g}. Nothing of this step was kept. Lower the rates (rate_factor 0.5), or "
            "take a larger batch_size; if it happens at the first steps, look for damaged weights in the model."
        )

    def _note(self, loss: float) -> None:
        self.at.loss, self.at.n_losses = self.at.loss + loss, self.at.n_losses + 1
        every = max(1, self.course.timetable.n_steps // _POINTS)
        if (self.at.step + 1) % every == 0 or self.at.step + 1 == self.course.timetable.n_steps:
            self.at.curve.append([self.at.step + 1, self.at.loss / self.at.n_losses])
            self.at.loss, self.at.n_losses = 0.0, 0

    def _check(self) -> None:
        """Measure all exits; keep the state whose mean is the best, of equals the first."""
        found = self.course.check(self.network)
        mean = sum(found.values()) / len(found)
        exits = {str(block): value for block, value in found.items()}
        self.at.checks.append({"step": self.at.step, "mean": mean, "exits": exits})
        if self.at.best is None or mean > self.at.best:
            self.at.best, self.at.best_step = mean, self.at.step
            self.best = {n: t.detach().cpu().clone() for n, t in self.network.state_dict().items()}
        self._ready()

    def _cut(self, widths: Widths) -> None:
        assert self.course.cut is not None
        smaller = self.course.cut(self.network, widths, self.at.cycle + 1)
        self.at.cuts.append({"step": self.at.step, **smaller.widths.to_dict()})
        self._wrap(smaller)

    def _rows(self, skip: int) -> Iterator[list[int]]:
        """Yield the rows of each batch, pass after pass, without end."""
        batches = endless(self.course.encoded, self.course.settings.batch_size, self.course.seed)
        return itertools.islice(batches, skip, None)

    # ------------------------------------------------------------ saved states

    def _save_if_due(self) -> None:
        every, step = self.course.settings.save_every, self.at.step
        after_cut = bool(self.at.cuts) and self.at.cuts[-1]["step"] == step
        if self.saved is None or not every or step == self.course.timetable.n_steps:
            return
        if step % every and not after_cut:
            return
        tensors = {
            **checkpoint.under("network", self.network.state_dict()),
            **checkpoint.under("moments", checkpoint.moments(self.optimizer, self.network.named_parameters())),
            **checkpoint.under("best", self.best),
            **checkpoint.under("generator", self._generators()),
        }
        facts = {
            "processes": self.accelerator.num_processes,
            "config": plain_config(self.network),
            "position": asdict(self.at),
            "price": None if self.course.price is None else [self.course.price.value, self.course.price.smoothed],
        }
        if self.accelerator.is_main_process:
            checkpoint.save(self.saved, tensors, facts)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> bool:
        if (found := checkpoint.load(self.saved)) is None:
            return False
        tensors, facts = found
        if facts["processes"] != self.accelerator.num_processes:
            _log.warning(
                "stage %s was interrupted with %d processes and now has %d: it starts again",
                self.course.stage.name, facts["processes"], self.accelerator.num_processes,
            )  # fmt: skip
            return False
        self._wrap(network_of(facts["config"], checkpoint.select("network", tensors)))
        moments = checkpoint.select("moments", tensors)
        checkpoint.restore_moments(self.optimizer, self.network.named_parameters(), moments)
        self.best = checkpoint.select("best", tensors)
        self.at = Position(**facts["position"])
        if self.course.price is not None:
            self.course.price.value, self.course.price.smoothed = facts["price"]
        self.rows = self._rows(self.at.step)
        rows = checkpoint.select("generator", tensors)  # last: building a network draws numbers
        own = {name: row[self.accelerator.process_index] for name, row in rows.items()}
        checkpoint.restore_generators(self.accelerator.device, own)
        return True

    def _generators(self) -> dict[str, Tensor]:
        """Return the states of all processes' generators, a row of bytes for each."""
        device = self.accelerator.device
        own = checkpoint.generators(device)
        return {name: self.accelerator.gather(state.to(device)[None]).cpu() for name, state in own.items()}
