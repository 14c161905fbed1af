"""One task, one opened model, one plan: what all stages share, and the one function that trains, resumes or reuses."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .. import checkpoint, store
from ..bound import Multiplier
from ..errors import SettingsError, UserError
from ..model import Model
from ._assignment import Assignment, Trained
from ._originals import pooling_of
from .base import Plan, SlimMethod, Widths
from .cutting import cut, token_counts
from .data import Task
from .encoded import Encoded, encode, endless, padded
from .network import SlimForSequenceClassification, network_of, plain_config
from .presets import Stage, Stages, TrainingSettings, stages
from .processes import state
from .schedule import steps, timetable
from .table import Table
from .teaching import Hidden, Teacher, answers, hidden_bytes, hidden_states, qualities
from .training import Course, train

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Assignment", "BaseRun", "Trained"]

_FORMAT = 2
"""Raised whenever the same settings no longer lead to the same weights, so that older stages are not reused."""

_DECIDING = {"batch_size", "n_parts", "weight_decay", "clip"}
"""Settings of training that decide weights and are not said by the stage or the data."""


class BaseRun:
    """What every run has; see `retouch.slim.stages.Run`, which adds the stages.

    Args:
        task: The task.
        model: An opened encoder, or a classifier for the task's labels.
        tokenizer: Its tokenizer.
        plan: The widths to reach.
        method: The method; its training settings hold for every stage.
        folder: Where stages are kept; None: in the cache.
        max_harm: The limit of the constraint, for methods that train with one.
        accelerator: Where it runs; None makes one.
        deepen: Gives a plan for what the exits of a trained network say about the validation rows; None: the plan stays.

    Raises:
        UserError: Task, model and plan do not fit each other.
        StoreError: Nothing can be kept in `folder`.
    """

    def __init__(
        self,
        task: Task,
        model: Model | SlimForSequenceClassification,
        tokenizer: Any,
        plan: Plan,
        method: SlimMethod,
        folder: str | Path | None = None,
        max_harm: float | None = None,
        accelerator: Accelerator | None = None,
        deepen: Callable[[Table], Plan] | None = None,
    ) -> None:
        self.task, self.model, self.tokenizer, self.plan, self.method = task, model, tokenizer, plan, method
        self.deepen = deepen
        self.settings = method if isinstance(method, TrainingSettings) else TrainingSettings()
        self.folder = Path(folder) if folder is not None else store.cache_dir() / "slim"
        self.max_harm = max_harm
        self.history: list[dict[str, Any]] = []
        self._encoded: dict[str, Encoded] = {}
        self._hidden: tuple[Any, Hidden] | None = None
        self._check()
        self.accelerator = accelerator or _accelerator(self.settings.precision)

    # ------------------------------------------------------------ what is given

    @cached_property
    def stages(self) -> Stages:
        """The preset's stages, their lengths and rates multiplied as the settings say."""
        kept = sum(self.plan.widths.heads) / (self.plan.size.heads * self.plan.size.blocks)
        found = stages(self.method.preset, self.task.name, len(self.task.train), kept, self.settings.batch_size)
        return found.scaled(self.settings.length_factor, self.settings.rate_factor)

    def encoded(self, split: str) -> Encoded:
        """Return a split of the task as token ids."""
        if split not in self._encoded:
            types = self.plan.size.token_types
            rows = getattr(self.task, split)
            self._encoded[split] = encode(self.tokenizer, rows, self.settings.max_tokens, token_types=types)
        return self._encoded[split]

    @cached_property
    def data_key(self) -> str:
        """Of everything in the data that decides weights."""
        splits = {split: _digest(self.encoded(split)) for split in ("train", "valid")}
        return store.key(metric=self.task.metric, labels=self.task.labels, **splits)

    @cached_property
    def model_key(self) -> str:
        """Of the model as it was opened, and of how its exits read it."""
        if isinstance(self.model, Model):
            found = self.settings.pooling == "auto" and self.pooling == "mean"  # its old word: such stages stay valid
            return store.key(model=self.model.fingerprint, pooling="auto" if found else self.pooling)
        config = deciding(self.model)
        weights = {name: store.digest_tensor(tensor) for name, tensor in self.model.state_dict().items()}
        return store.key(config=config, weights=weights)

    @cached_property
    def pooling(self) -> str:
        """How exits read: as the settings say, or as the opened model does."""
        if isinstance(self.model, SlimForSequenceClassification):
            return str(self.model.config.pooling)
        return pooling_of(self.model.network) if self.settings.pooling == "auto" else self.settings.pooling

    @cached_property
    def counts(self) -> Tensor:
        """How often each token stands in the training set, (vocab,)."""
        return token_counts(self.encoded("train").ids, self.plan.size.vocab)

    def n_steps(self, stage: Stage) -> int:
        """Return how many steps a stage takes on this task, counted before it starts."""
        encoded, size, seed = self.encoded("train"), self.settings.batch_size, self.seed(stage.name)
        return steps(stage, (padded(encoded, rows) for rows in endless(encoded, size, seed)), -(-len(encoded) // size))

    def seed(self, name: str) -> int:
        """Give each stage its own seed, so that a reused stage leaves the later ones as they would be."""
        return int(store.key(seed=self.method.seed, stage=name)[:7], 16)

    # ------------------------------------------------------------ one stage

    def train(
        self, work: Assignment, start: Callable[[], SlimForSequenceClassification], made_of: Sequence[Any]
    ) -> Trained:
        """Train one stage, or go on with it, or read it where it is done.

        Args:
            work: What it does.
            start: Makes the network to begin with; fresh weights come from torch's global generator.
            made_of: What `start` depends on, as values for a key.

        Raises:
            RetouchError: The loss or the gradient is not finite.
        """
        n_steps = self.n_steps(work.stage)
        key = self._key(work, n_steps, made_of)
        done, saved = (self.folder / f"{work.stage.name}-{key}{more}" for more in ("", "-partial"))
        if (found := checkpoint.load(done)) is not None:
            network = network_of(found[1]["config"], found[0]).to(self.accelerator.device)
            record = found[1]["record"]
        else:
            network, record = train(self.accelerator, self._course(work, n_steps), start, saved)
            if self.accelerator.is_main_process:
                config = plain_config(network)
                checkpoint.save(done, network.state_dict(), {"config": config, "record": record})
                checkpoint.remove(saved)
            self.accelerator.wait_for_everyone()
        self.history.append(record)
        return Trained(network, key, record)

    def answers(self, trained: Trained | None, n_batches: int | None = None, seed: int = 0) -> dict[int, Tensor]:
        """Return every exit's logits on the training set, by block, on the run's device; computed once and kept.

        Args:
            trained: Whose.
            n_batches: Only the rows of so many batches of a stage are needed; the others stay 0. None: all.
            seed: Of that stage.

        Raises:
            UserError: There is no teacher.
        """
        if trained is None:
            raise UserError("A stage that learns from a teacher's answers needs a teacher.")
        encoded, size = self.encoded("train"), self.settings.batch_size
        rows = None
        if n_batches is not None and n_batches < -(-len(encoded) // size):  # less than one pass
            batches = itertools.islice(endless(encoded, size, seed), n_batches)
            rows = sorted(itertools.chain.from_iterable(batches))
        made_of = {"trained": trained.key, "data": _digest(encoded), "rows": rows}
        folder = self.folder / f"answers-{store.key(precision=self.accelerator.mixed_precision, **made_of)}"
        found = checkpoint.load(folder)
        if found is None:
            logits = answers(self.accelerator, trained.network, encoded, rows)
            found = {str(block): z for block, z in logits.items()}, {}
            if self.accelerator.is_main_process:
                checkpoint.save(folder, *found)
            self.accelerator.wait_for_everyone()
        return {int(block): z.to(self.accelerator.device) for block, z in found[0].items()}

    def keeps(self, work: Assignment, n_steps: int) -> bool:
        """Whether the teacher's hidden states are computed once for a stage: it visits all rows, and they fit."""
        if not work.stage.hidden or work.teacher is None:
            return False
        encoded, levels = self.encoded("train"), work.stage.levels(self.plan.size.blocks)
        fits = hidden_bytes(self.plan.size, encoded, levels) <= self.settings.hidden_mib * 2**20
        return fits and n_steps * self.settings.batch_size >= len(encoded)

    def hidden(self, trained: Trained, levels: Sequence[int] | None) -> Hidden:
        """Return a teacher's hidden states on the training set; those of the last one asked for are kept in memory."""
        key = (trained.key, levels)
        if self._hidden is None or self._hidden[0] != key:
            self._hidden = None  # before the next ones are made
            self._hidden = key, hidden_states(self.accelerator, trained.network, self.encoded("train"), levels)
        return self._hidden[1]

    def qualities(self, network: SlimForSequenceClassification) -> dict[int, float]:
        """Return how good each exit is on the validation set, by block."""
        valid = self.encoded("valid")
        return qualities(answers(self.accelerator, network, valid), np.asarray(valid.labels), self.task.metric)

    def replan(self, trained: Trained) -> None:
        """Widths give way where a full-size network's exits are too weak for the depth that was planned."""
        if self.deepen is None or self.plan.mean_depth >= self.plan.size.blocks:
            return
        valid = self.encoded("valid")
        said = answers(self.accelerator, trained.network, valid)
        logits = np.stack([said[block].double().numpy() for block in sorted(said)])
        self.plan = self.deepen(Table(logits, tuple(sorted(said)), np.asarray(valid.labels), np.asarray(valid.lengths)))

    def _key(self, work: Assignment, n_steps: int, made_of: Sequence[Any]) -> str:
        return store.key(
            format=_FORMAT,
            work=work.to_dict(),
            harm=None if work.original is None else [self.max_harm, self.plan.mean_depth],
            n_steps=n_steps,
            n_checks=self.stages.n_checks,
            made_of=list(made_of),
            data=self.data_key,
            seed=self.method.seed,
            settings={k: v for k, v in asdict(self.settings).items() if k in _DECIDING},
            precision=self.accelerator.mixed_precision,
            **({"hidden": "float16"} if self.keeps(work, n_steps) else {}),
        )

    def _course(self, work: Assignment, n_steps: int) -> Course:
        stage, teacher = work.stage, work.teacher
        visited, levels = (n_steps, self.seed(stage.name)), stage.levels(self.plan.size.blocks)
        shown = {} if stage.answers in ("none", "labels") else self.answers(teacher, *visited)
        against = None if work.original is None else self.answers(work.original, *visited)
        n_checks = max(self.stages.n_checks, round(stage.epochs or 0))
        return Course(
            stage=stage,
            timetable=timetable(stage, n_steps, n_checks, work.cuts),
            settings=self.settings,
            seed=self.seed(stage.name),
            encoded=self.encoded("train"),
            teacher=Teacher(
                None if teacher is None else teacher.network.eval(),
                shown,
                None if against is None else against[max(against)],
                self.hidden(teacher, levels) if teacher is not None and self.keeps(work, n_steps) else None,
            ),
            check=self.qualities,
            cut=self._cut(work),
            equilibrium=work.equilibrium,
            watched=tuple(block for block in self.plan.widths.exits if block + 1 >= self.plan.mean_depth),
            price=None if work.original is None else self._price(work.price_step),
        )

    def _cut(
        self, work: Assignment
    ) -> Callable[[SlimForSequenceClassification, Widths, int], SlimForSequenceClassification]:
        def make(network: SlimForSequenceClassification, widths: Widths, number: int) -> SlimForSequenceClassification:
            assert work.scoring is not None and work.teacher is not None
            return cut(
                self.accelerator,
                network,
                widths,
                work.teacher.network,
                self.encoded("train"),
                work.scoring,
                counts=self.counts if work.scoring.weighted else None,
                batch_size=self.settings.batch_size,
                seed=self.seed(f"{work.stage.name} {number}"),
                equilibrium=work.equilibrium,
            )

        return make

    def _price(self, step: float) -> Multiplier:
        if self.max_harm is None:
            raise SettingsError("A constraint needs a limit: state max_harm in the budget, for example 0.03.")
        return Multiplier(limit=self.max_harm, step_size=step, maximum=10.0, smoothing=0.9)

    def _check(self) -> None:
        classes, name, size = len(self.task.labels or ("value",)), self.task.name, self.plan.size
        if not self.task.valid:
            raise UserError(f"Task {name!r} has no validation rows, by which states are chosen. Give some.")
        if size.classes != classes:
            raise UserError(f"The plan is for {size.classes} classes; task {name!r} has {classes}. Plan again for it.")
        seen = {example.label for example in self.task.train}
        if len(seen) < 2:
            only = next(iter(seen), None)
            shown = self.task.labels[int(only)] if self.task.labels and only is not None else only
            raise UserError(f"All training rows of {name!r} have the label {shown!r}: there is nothing to tell apart.")
        if isinstance(self.model, SlimForSequenceClassification) and self.model.size.classes != classes:
            raise UserError(
                f"The classifier tells {self.model.size.classes} classes apart and task {name!r} has {classes}. Give "
                "the encoder that it was trained from, or a task with its labels."
            )
        if self.settings.pooling not in ("auto", self.pooling):
            raise SettingsError(
                f"pooling is {self.settings.pooling!r}, and the classifier that is made slim pools {self.pooling!r}, as it "
                "was trained. Leave pooling out, or give the encoder."
            )
        if getattr(self.method, "constrained", False):
            self._price(1.0)  # it needs a limit
        store.refuse_place(self.folder / "stage")


_NOT_WEIGHTS = {"_name_or_path", "transformers_version", "architectures", "dtype"}


def deciding(network: SlimForSequenceClassification) -> dict[str, Any]:
    """Return what a classifier's configuration says that decides what it answers."""
    return {k: v for k, v in plain_config(network).items() if k not in _NOT_WEIGHTS}


def _digest(encoded: Encoded) -> str:
    """Hash token ids, token types and labels, in order."""
    found = hashlib.sha256(np.asarray(encoded.lengths, dtype=np.int64).tobytes())
    for rows in (encoded.ids, encoded.types or ()):
        found.update(np.fromiter((i for row in rows for i in row), dtype=np.int64).tobytes() + b"|")
    found.update(np.asarray(encoded.labels, dtype=np.float64).tobytes())
    return found.hexdigest()


def mixed_precision(precision: str) -> str:
    """Return Accelerate's word for a setting of precision, where this process runs.

    Raises:
        SettingsError: This process has begun with another one.
    """
    from accelerate.state import AcceleratorState

    bf16 = precision == "bfloat16" or (precision == "auto" and state().device.type == "cuda")
    word, begun = "bf16" if bf16 else "no", AcceleratorState._shared_state.get("_mixed_precision")
    if begun not in (None, word):
        names = {"no": "float32", "bf16": "bfloat16"}
        raise SettingsError(
            f"precision is {names[word]}, and this process has begun to train in {names.get(begun, begun)}; it can train "
            "in one only. Run the two one after the other, each in a process of its own."
        )
    return word


def one_precision(methods: Iterable[SlimMethod]) -> None:
    """Refuse methods that one process cannot train.

    Raises:
        SettingsError: They have two precisions, or another one than this process has begun with.
    """
    words = {mixed_precision(m.precision): m.precision for m in methods if isinstance(m, TrainingSettings)}
    if len(words) > 1:
        raise SettingsError(
            f"precision must be the same for all methods of a bench, whose process trains in one only; got "
            f"{' and '.join(words.values())}."
        )


def _accelerator(precision: str) -> Accelerator:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # an exit has no gradient in a stage that compares hidden states only
    joined = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(mixed_precision=mixed_precision(precision), kwargs_handlers=[joined])
