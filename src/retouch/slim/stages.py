"""The stages that a slimming method is made of, for every method: fine-tune, assistant, slenderise, recover.

A `Run` holds one task, one opened model and one plan. Its stage functions return `Trained` networks, each with a key of
everything that made it. A finished stage whose key is known is read in place of being trained, so that another width
trains only what depends on the width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import store
from ..model import Model
from ._run import Assignment, BaseRun, Trained
from .base import Plan, SlimMethod, Widths
from .cutting import Scoring
from .data import Task
from .network import SlimForSequenceClassification, from_encoder, with_exits
from .presets import Stage
from .schedule import n_cuts, widths_after
from .table import Table

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Assignment", "Fitted", "Run", "Scoring", "Stage", "Trained", "fit"]


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a method leaves, before thresholds are chosen.

    Attributes:
        network: The slim network, at full depth (no threshold), on the CPU.
        assistant: The full-size network with all exits; None where the method has none.
        original: The fine-tuned original with its one exit.
        history: The record of each stage, in order.
        key: Of everything that made `network`.
        plan: Whose widths it has, or was made by.
    """

    network: SlimForSequenceClassification
    assistant: SlimForSequenceClassification | None
    original: SlimForSequenceClassification
    history: list[dict[str, Any]]
    key: str
    plan: Plan


def fit(
    task: Task,
    source: Model | SlimForSequenceClassification,
    tokenizer: Any,
    plan: Plan,
    method: SlimMethod,
    folder: str | Path | None = None,
    *,
    max_harm: float | None = None,
    accelerator: Accelerator | None = None,
    deepen: Callable[[Table], Plan] | None = None,
) -> Fitted:
    """Train what a method makes of a model.

    Started again after an interruption it goes on from the last saved state, and finished stages are reused.

    Args:
        task: Its `train` and `valid` are used, nothing else.
        source: An opened encoder, which is fine-tuned first; or a classifier for these labels, of full widths, made by
            `from_classifier`. It is left as it is.
        tokenizer: Its tokenizer.
        plan: The widths to reach.
        method: Which method, with its settings.
        folder: Where stages are kept; by default in the cache.
        max_harm: The limit of the constraint, for methods that train with one.
        accelerator: Where it runs; by default one is made: all devices that `accelerate launch` gives.
        deepen: See `Run`.

    Returns:
        The networks, before any threshold is chosen.

    Raises:
        UserError: Task, model and plan do not fit each other, or the task cannot be learnt.
        RetouchError: A stage diverged.
    """
    fitted: Fitted = method.fit(Run(task, source, tokenizer, plan, method, folder, max_harm, accelerator, deepen))
    return fitted


class Run(BaseRun):
    """One method on one task, with the stages that it may use.

    A baseline is a few lines of these. A rival of equal widths with one exit, for example:

        original = run.original()
        bare = run.exited(original, [])
        slim = run.slenderised(bare, original, Scoring())
        slim = run.recovered(slim, original, run.stages.recover)
    """

    def original(self, stage: Stage | None = None) -> Trained:
        """Return the fine-tuned original with its one exit: stage 0, or the model itself if it is a classifier.

        Args:
            stage: Stage 0; None: the preset's.
        """
        if isinstance(self.model, SlimForSequenceClassification):
            return self._given(self.model)
        last = (self.plan.size.blocks - 1,)
        work = Assignment(stage or self.stages.finetune)
        return self.train(work, self._raw(last, *self._units()), ["raw", self.model_key, last])

    def assistant(
        self,
        original: Trained,
        stage: Stage | None = None,
        before: Stage | None = None,
        *,
        raw: bool | None = None,
        equilibrium: bool = True,
    ) -> Trained:
        """Return the full-size network with all exits of the plan: stage 1.

        Args:
            original: Whom it learns from.
            stage: Its main stage; None: the preset's.
            before: A stage before it, that compares hidden states; None: the preset's, which may have none.
            raw: Whether it starts from the encoder before fine-tuning, where there is one; None: as the preset says.
            equilibrium: Whether gradients flow down as means over exits.
        """
        exits = self.plan.widths.exits
        raw = self.stages.raw_assistant if raw is None else raw
        if raw and isinstance(self.model, Model):
            config = original.network.config  # a regression answers in the units of its teacher
            start = self._raw(exits, config.target_mean, config.target_scale)
            made_of: list[Any] = ["raw", self.model_key, exits, original.key]
        else:
            begin = self.exited(original)
            start, made_of = _copied(begin), [begin.key]
        for one in (before or self.stages.assistant_hidden, stage or self.stages.assistant):
            if one is not None:
                found = self.train(Assignment(one, original, equilibrium), start, made_of)
                start, made_of = _copied(found), [found.key]
        return found

    def exited(self, begin: Trained, exits: Sequence[int] | None = None) -> Trained:
        """Put fresh, untrained exits on a copy of a network; a last exit that fits stays as it is.

        Args:
            begin: The network.
            exits: Blocks with an exit beside the last; None: the plan's.
        """
        exits = begin.network.size.exits(self.plan.widths.exits if exits is None else exits)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed("exits"))
            new = with_exits(begin.network, exits).eval()
        if begin.network.pooler is None:
            last = str(exits[-1])
            new.exits[last].load_state_dict(begin.network.exits[last].state_dict())
        return Trained(new, store.key(begin=begin.key, exits=exits, seed=self.method.seed), {})

    def slenderised(
        self,
        begin: Trained,
        teacher: Trained,
        scoring: Scoring,
        stage: Stage | None = None,
        widths: Widths | None = None,
        *,
        equilibrium: bool = True,
    ) -> Trained:
        """Cut a full-size network down while it learns: stage 2. Nothing happens where nothing is to be cut.

        Args:
            begin: The network to cut; its exits stay.
            teacher: Whom it learns from, and whose answers the scores compare with.
            scoring: What is cut, and how it is found.
            stage: The stage; None: the preset's.
            widths: The goal; None: the plan's.
            equilibrium: Whether gradients flow down as means over exits.
        """
        size, goal = self.plan.size, replace(widths or self.plan.widths, exits=begin.exits)
        of = n_cuts(size, goal, scoring.n_cuts or self.stages.n_cuts)
        if not of:
            return begin
        cuts = tuple(widths_after(size, goal, i, of) for i in range(1, of + 1))
        stage = stage or self.stages.slenderise
        work = Assignment(stage, teacher, equilibrium, cuts, scoring.limited(self.stages))
        return self.train(work, _copied(begin), [begin.key])

    def recovered(
        self,
        begin: Trained,
        teacher: Trained | None,
        stage: Stage,
        *,
        equilibrium: bool = True,
        original: Trained | None = None,
        price_step: float = 0.1,
    ) -> Trained:
        """Train a copy of a network further: stages 3 and 4, and whatever else a method needs.

        Args:
            begin: The network.
            teacher: Whom it learns from; None where it learns from labels alone.
            stage: What it learns.
            equilibrium: Whether gradients flow down as means over exits.
            original: Whom the harm is measured against; where given, the harm is held below the run's `max_harm`.
            price_step: How fast the price of the harm rises.
        """
        work = Assignment(stage, teacher, equilibrium, original=original, price_step=price_step)
        return self.train(work, _copied(begin), [begin.key])

    def fitted(self, network: Trained, original: Trained, assistant: Trained | None = None) -> Fitted:
        """Gather what a method returns."""
        for one in (network, original, assistant):
            if one is not None:
                one.network.cpu().eval()
        shown = None if assistant is None else assistant.network
        return Fitted(network.network, shown, original.network, list(self.history), network.key, self.plan)

    def _given(self, model: SlimForSequenceClassification) -> Trained:
        """Return a copy of a classifier; a regression's answers stay, in standardised units as after stage 0."""
        new = copy.deepcopy(model).to(self.accelerator.device).eval()
        if self.task.labels is not None:
            return Trained(new, self.model_key, {})
        mean, scale = units = self._units()
        config, exit_ = new.config, new.exits[str(new.size.blocks - 1)]
        with torch.no_grad():
            exit_.weight.mul_(config.target_scale / scale)
            exit_.bias.mul_(config.target_scale).add_(config.target_mean - mean).div_(scale)
        config.target_mean, config.target_scale = units
        return Trained(new, store.key(model=self.model_key, units=units), {})

    def _raw(self, exits: Sequence[int], mean: float, scale: float) -> Callable[[], SlimForSequenceClassification]:
        """Say how to put fresh exits on the opened encoder; `mean` and `scale` are a regression's units."""
        assert isinstance(self.model, Model)
        model, pooling = self.model, self.pooling

        def start() -> SlimForSequenceClassification:
            new = from_encoder(model, self.task.labels, exits=exits, pooling=pooling, pooler=None)
            new.config.target_mean, new.config.target_scale = mean, scale
            return new

        return start

    def _units(self) -> tuple[float, float]:
        """Return mean and standard deviation of a regression's labels."""
        if self.task.labels is not None:
            return 0.0, 1.0
        y = np.asarray(self.encoded("train").labels, dtype=float)
        return float(y.mean()), float(y.std())


def _copied(trained: Trained) -> Callable[[], SlimForSequenceClassification]:
    return lambda: copy.deepcopy(trained.network)
