"""Train the reference generator: cross-entropy over all training prefixes, stopped by NDCG on validation users."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import checkpoint, store
from ..errors import RetouchError, UserError
from ..progress import report
from . import _training, metrics
from .generator import SIZES, Generator
from .reference import ReferenceSettings
from .scorer import GenerativeScorer
from .splits import Samples, windows

if TYPE_CHECKING:
    from .data import Interactions
    from .splits import Splits
    from .tokenise import Catalogue

__all__ = ["fit_reference", "new_generator", "reference_key"]

_log = logging.getLogger(__name__)


def fit_reference(
    data: Interactions,
    splits: Splits,
    catalogue: Catalogue,
    settings: ReferenceSettings,
    folder: Path | None = None,
    *,
    n_history: int = 20,
    device: str = "cpu",
) -> Generator:
    """Train a generator on the training samples of a split, and on nothing else.

    After each epoch everything is written below `folder`, in a folder of its own for this data and these settings: the
    same call goes on from there, and on a CPU ends with the same bits; once finished it only reads the result. A damaged
    state is told and begun again.

    Args:
        data: The histories.
        splits: Whose targets train and whose judge an epoch.
        catalogue: The items' codes.
        settings: Sizes, rates, lengths.
        folder: Where states are kept; None keeps none.
        n_history: How many of the latest items are read.
        device: Where to compute.

    Returns:
        The generator of the best epoch, in eval mode. Its `record` says how it was made.

    Raises:
        UserError: There is nothing to train on or to validate with, or the codes are of another catalogue.
        StoreError: A state is damaged and beside other files, or cannot be written.
        RetouchError: The loss is not finite.
    """
    _check(data, splits, catalogue)
    key = reference_key(data, splits, catalogue, settings, n_history)
    place = None if folder is None else Path(folder) / f"reference-{key[:12]}"
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):  # the caller's generators are left as they were
        torch.manual_seed(settings.seed)
        generator = new_generator(catalogue, settings, n_history).to(device)
        return _Fit(generator, data, splits, catalogue, settings, place, key).run()


def new_generator(catalogue: Catalogue, settings: ReferenceSettings, n_history: int = 20) -> Generator:
    """Build a generator with fresh weights, drawn from torch's own random numbers."""
    codes = torch.from_numpy(np.array(catalogue.codes))
    size = SIZES[settings.size]
    return Generator(size, codes, catalogue.sizes, n_history, settings.tokens, settings.dropout)


def reference_key(
    data: Interactions, splits: Splits, catalogue: Catalogue, settings: ReferenceSettings, n_history: int
) -> str:
    """Name a reference by everything that decides it."""
    samples = {
        name: store.digest_tensor(torch.from_numpy(np.stack([part.users, part.cuts])))
        for name, part in (("train", splits.train), ("valid", splits.valid))
    }
    codes = store.digest_tensor(torch.from_numpy(np.array(catalogue.codes)))
    return store.key(
        data=data.fingerprint, samples=samples, codes=codes, sizes=list(catalogue.sizes), settings=_plain(settings),
        n_history=n_history, format=1,
    )  # fmt: skip


@dataclass
class _Position:
    """How far a training is, in numbers that JSON can hold."""

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    done: bool = False
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


class _Fit:
    """One training: its network, optimiser and position."""

    def __init__(
        self, generator: Generator, data: Interactions, splits: Splits, catalogue: Catalogue,
        settings: ReferenceSettings, place: Path | None, key: str,
    ) -> None:  # fmt: skip
        self.generator, self.data, self.samples, self.settings = generator, data, splits.train, settings
        self.place, self.key, self.at = place, key, _Position()
        self.lengths = np.minimum(self.samples.cuts, generator.n_history)
        self.judges = _judges(splits.valid, settings.n_validation, settings.seed)
        self.scorer = GenerativeScorer(generator, catalogue, data, beams=settings.validation_beams)
        self.optimizer = _training.adamw(generator, settings.weight_decay, ("embeddings", "positions"))
        self.peak = settings.learning_rate or generator.size.learning_rate
        self.best: dict[str, Tensor] = {}

    @property
    def n_steps(self) -> int:
        """Steps of the longest training."""
        samples = min(len(self.samples), self.settings.samples_per_epoch or len(self.samples))
        return self.settings.n_epochs * -(-samples // self.settings.batch_size)

    def run(self) -> Generator:
        self._resume()
        begun, before = time.monotonic(), self.at.seconds
        while not self.at.done:
            loss = self._epoch()
            ndcg = self._judge()
            self.at.seconds = before + time.monotonic() - begun
            self._note(loss, ndcg)
            self._save()
        self.generator.load_state_dict(self.best)
        self.generator.record = {
            "key": self.key,
            "settings": _plain(self.settings),
            **asdict(self.at),
        }
        return self.generator.eval()

    # ------------------------------------------------------------ one epoch

    def _epoch(self) -> float:
        """Train on one pass over the samples, and return its mean loss."""
        self.generator.train()
        order = _training.order(len(self.samples), self.settings.seed, self.at.epoch, self.settings.samples_per_epoch)
        total = 0.0
        for rows in _training.parts(self.lengths, order, self.settings.batch_size):
            total += self._learn(rows) * len(rows)
            self.at.step += 1
            report("Training the reference", self.at.step, self.n_steps)
        self.at.epoch += 1
        return total / len(order)

    def _learn(self, rows: NDArray[np.int64]) -> float:
        seen, targets = windows(self.data, self.samples.take(rows), self.generator.n_history)
        memory = self.generator.encode(torch.from_numpy(seen))
        # summed over the levels: nats an item, the scale that the multipliers of the constraint count on
        loss = -self.generator.code_log_probs(memory, torch.from_numpy(targets).long()).sum(1).mean()
        value = float(loss.detach())
        if not np.isfinite(value):
            raise RetouchError(
                f"The reference's loss is {value} at step {self.at.step}. Lower the learning rate ({self.peak:g})."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = _training.learning_rate(self.at.step, self.n_steps, self.peak, self.settings.warm_up_steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), self.settings.clip)
        self.optimizer.step()
        return value

    def _judge(self) -> float:
        """Return NDCG@10 on the validation users, each user's targets averaged first."""
        found = metrics.values(self.scorer.ranks(self.judges), ("ndcg@10",))
        return float(metrics.per_user(self.judges.users, found)[1].mean())

    def _note(self, loss: float, ndcg: float) -> None:
        self.at.curve.append({"epoch": self.at.epoch, "step": self.at.step, "loss": loss, "ndcg@10": ndcg})
        if ndcg > self.at.best:
            self.at.best, self.at.best_epoch = ndcg, self.at.epoch
            self.best = {name: value.detach().clone() for name, value in self.generator.state_dict().items()}
        waited = self.at.epoch - self.at.best_epoch
        self.at.done = waited >= self.settings.patience or self.at.epoch >= self.settings.n_epochs
        _log.info("epoch %d: loss %.4f, validation NDCG@10 %.4f", self.at.epoch, loss, ndcg)

    # ------------------------------------------------------------ saved states

    def _save(self) -> None:
        if self.place is None:
            return
        tensors = checkpoint.under("best", self.best)
        if not self.at.done:
            tensors |= _training.snapshot(self.generator, self.optimizer)
        checkpoint.save(self.place, tensors, {"key": self.key, "position": asdict(self.at)})

    def _resume(self) -> None:
        if (found := checkpoint.load(self.place, self.key)) is None:
            return
        tensors, facts = found
        self.at = _Position(**facts["position"])
        self.best = checkpoint.select("best", tensors)
        if not self.at.done:
            _training.restore(self.generator, self.optimizer, tensors)


def _plain(settings: ReferenceSettings) -> dict[str, Any]:
    """Return what decides the training; a subclass may add what only decides the search."""
    return {part.name: getattr(settings, part.name) for part in fields(ReferenceSettings)}


def _check(data: Interactions, splits: Splits, catalogue: Catalogue) -> None:
    if catalogue.n_items != len(data.items):
        raise UserError(
            f"The catalogue holds codes of {catalogue.n_items} items and the data has {len(data.items)}. Tokenise the "
            "items of this data."
        )
    for name, part in (("train on", splits.train), ("validate with", splits.valid)):
        if not len(part):
            raise UserError(f"There are no samples to {name}. The data needs users with more interactions.")


def _judges(valid: Samples, most: int, seed: int) -> Samples:
    """Choose the users who judge each epoch, the same for all epochs, with all of their targets."""
    users = np.unique(valid.users)
    if len(users) > most:
        users = np.random.default_rng(seed).choice(users, most, replace=False)
    return valid.take(np.isin(valid.users, users))
