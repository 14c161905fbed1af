"""The loop that trains a policy: a step on the weights against the constraint's price, a step on the price, and so on.

The new parts are trained alone first: a generator that moves before there is knowledge spends the limit of harm on
plain further training.

The constraint is measured on targets that cross-entropy never sees, with dropout off: with it on, a policy that equals
the reference looks harmful. After each epoch everything is saved; a run that goes on from there ends, on a CPU, with
the same bits as one that was never stopped.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import checkpoint
from ..errors import RetouchError
from ..progress import report
from . import _training
from ._draws import Asked, Epoch, Pool, balanced
from ._plan import Plan, Recorded
from ._watch import SILENT, Watch, activity_groups, means
from .instruction import WEIGHTS, Instructions, Usage
from .metrics import per_user, values
from .policy import Policy, Told
from .scorer import GenerativeScorer
from .splits import Samples, windows

if TYPE_CHECKING:
    from .data import Interactions
    from .tokenise import Catalogue

__all__ = ["Duality"]

_log = logging.getLogger(__name__)

REVIVE_STEPS = 100
SETTLED = 0.1
"""What the rate of new parts that were trained alone is multiplied by when all is trained."""

STUCK = 0.2
"""A price that stands at its maximum for this share of the steps means that the limit cannot be met."""


class Duality:
    """One training.

    Args:
        policy: What is trained.
        plan: Rates, lengths, the constraint.
        pool: What cross-entropy draws from.
        asked: Whose histories knowledge is made from.
        watched: The targets of the constraint: the constraint's slice, or the pool's for ``batch``.
        judges: Validation targets, which choose the epoch.
        catalogue: The items' codes.
        place: Where states are kept; None keeps none.
        key: Names everything that decides this training.
        judged: How knowledge is made when epochs are judged; None: as in training.
    """

    def __init__(
        self,
        policy: Policy,
        plan: Plan,
        pool: Pool,
        asked: Asked,
        watched: Watch,
        judges: Watch,
        catalogue: Catalogue,
        place: Path | None,
        key: str,
        judged: Asked | None = None,
    ) -> None:
        self.policy, self.plan, self.pool, self.asked, self.watched = policy, plan, pool, asked, watched
        self.judges, self.judged, self.catalogue, self.place, self.key = judges, judged or asked, catalogue, place, key
        self.data: Interactions = asked.data
        self.at = Recorded(alone=plan.n_alone > 0 and len(policy.new_parts) > 0)
        self._lengths = {alone: -(-pool.size(plan.cuts_per_epoch, alone) // plan.batch_size) for alone in (True, False)}
        self.prices = {name: plan.prices.make() for name in self._names()}
        self.steps: list[list[list[float]]] = []  # of each step and group: price, harm, smoothed harm
        self.groups = activity_groups(self.data, asked.splits, watched.samples)
        self.judge_groups = activity_groups(self.data, asked.splits, judges.samples)
        self.optimizer = self._optimizer()
        self.best: dict[str, Tensor] = {}

    def _names(self) -> tuple[str, ...]:
        if self.plan.constraint == "none":
            return ()
        return ("all",) if self.plan.constraint == "batch" else ("sparse", "active", SILENT)

    def _optimizer(self) -> torch.optim.AdamW:
        """Give the generator one rate and the new parts another; only matrices decay, and embeddings do not."""
        self.policy.generator.requires_grad_(not self.at.alone)
        settled = SETTLED if self.at.begun_epoch else 1.0
        old = _training.adamw(self.policy.generator, self.plan.weight_decay, ("embeddings", "positions"))
        new = _training.adamw(nn.ModuleList(self.policy.new_parts), self.plan.weight_decay, ())
        groups = [
            {**{k: g[k] for k in ("params", "weight_decay")}, "peak": peak}
            for optimizer, peak in ((old, self.plan.learning_rate), (new, self.plan.learning_rate_new * settled))
            for g in optimizer.param_groups
            if g["params"]
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)

    @property
    def n_steps(self) -> int:
        """Steps of the longest training that goes on: of the new parts alone, or of all."""
        return (self.plan.n_alone if self.at.alone else self.plan.n_epochs) * self._lengths[self.at.alone]

    @property
    def n_warm_up(self) -> int:
        """Steps in which its rates rise: a twentieth at most, so that what is kept has seen full rates."""
        return min(self.plan.warm_up_steps, self.n_steps // 20)

    # ------------------------------------------------------------ all epochs

    def run(self) -> Recorded:
        """Train until nothing better comes, put the chosen epoch's weights in, and say how it went."""
        self._resume()
        begun, before = time.monotonic(), self.at.seconds
        while not self.at.done:
            loss = self._epoch()
            self._judge(loss)
            self._advance()
            self.at.seconds = before + time.monotonic() - begun
            if self.at.done:
                self._conclude()
            self._save()
        self.policy.load_state_dict(self.best)
        self.policy.eval().requires_grad_(False)
        return self.at

    def _epoch(self) -> float:
        number, alone = self.at.epoch - self.at.begun_epoch, self.at.alone
        dropout = 0.0 if alone else self.plan.knowledge_dropout  # without knowledge the new parts learn nothing
        epoch = self.pool.epoch(number, self.plan.cuts_per_epoch, dropout, alone)
        lengths = np.minimum(self.pool.samples.cuts[epoch.rows], self.policy.generator.n_history)
        random = np.random.default_rng((self.plan.seed, 16 if alone else 13, number))
        total = 0.0
        for part in _training.parts(lengths, np.arange(len(epoch.rows)), self.plan.batch_size):
            batch = Epoch(epoch.rows[part], epoch.lags[part], epoch.silent[part])
            total += self.learn(batch, self._constrained(batch, random)) * len(part)
            what = "Training the new parts" if alone else "Training with knowledge"
            report(what, self.at.step - self.at.begun_step, self.n_steps)
        self.at.epoch += 1
        return total / len(epoch.rows)

    def _constrained(self, batch: Epoch, random: np.random.Generator) -> dict[str, NDArray[np.int64]]:
        """Draw the watched targets of a step: the batch itself, or a quarter of its size, balanced over the groups."""
        if self.plan.constraint == "none":
            return {}
        if self.plan.constraint == "batch":
            return {"all": batch.rows}
        n = max(4, len(batch.rows) // 4)
        known = balanced(tuple(self.groups.values()), n - n // 4, random)
        drawn = dict(zip(self.groups, known))
        if self.at.alone:  # without knowledge nothing has moved
            return drawn
        return drawn | {SILENT: random.integers(0, len(self.watched), n // 4)}

    # ------------------------------------------------------------ one step

    def learn(self, batch: Epoch, constrained: dict[str, NDArray[np.int64]]) -> float:
        """Take one step on the weights and one on the prices; return the recommender's own loss."""
        loss, harms, told, value = self.objective(batch, constrained)
        if not math.isfinite(value):
            raise RetouchError(
                f"The policy's loss is {value} at step {self.at.step}. Lower the learning rates "
                f"({self.plan.learning_rate:g} and {self.plan.learning_rate_new:g})."
            )
        step = self.at.step - self.at.begun_step
        for group in self.optimizer.param_groups:
            group["lr"] = _training.learning_rate(step, self.n_steps, group["peak"], self.n_warm_up)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.plan.clip)
        self.optimizer.step()
        if self.policy.fusion is not None:
            self.policy.fusion.follow(told.moved[: int((~batch.silent).sum())])
        self._move_prices(harms)
        self.at.step += 1
        self._tend_books(told)
        return value

    def objective(
        self, batch: Epoch, constrained: dict[str, NDArray[np.int64]]
    ) -> tuple[Tensor, dict[str, Tensor], Told, float]:
        """Return the Lagrangian, each group's harm, what knowledge said, and the recommender's own loss.

        All that needs knowledge, of the batch and of the constraint, is one pass through the language model.
        """
        samples = self.pool.samples.take(batch.rows)
        spoken = np.flatnonzero(~batch.silent)
        own = {} if self.plan.constraint == "batch" else {n: r for n, r in constrained.items() if n != SILENT}
        held = np.concatenate([np.zeros(0, np.int64), *own.values()])
        asked = np.concatenate([
            self.asked.windows(samples.take(spoken), batch.lags[spoken]),
            self.asked.windows(self.watched.samples.take(held)),
        ])  # fmt: skip
        self.policy.eval()  # the states that choose instructions, and the constraint, are without dropout
        told = self.policy.tell(torch.from_numpy(asked))
        residual = told.residual.new_zeros(len(samples), told.residual.shape[1])
        residual = residual.index_copy(0, torch.from_numpy(spoken).to(residual.device), told.residual[: len(spoken)])
        harms = self._harms(constrained, residual, told.residual[len(spoken) :])
        self.policy.train()  # a frozen generator, too: targets learnt by heart teach the new parts nothing
        seen, targets = windows(self.data, samples, self.policy.generator.n_history)
        log_probs = self.policy.code_log_probs(
            torch.from_numpy(seen), torch.from_numpy(targets).long(), residual if len(spoken) else None
        )
        loss = -log_probs.sum(1).mean()  # nats per item: the scale that prices count on
        extra = sum((WEIGHTS[name] * value for name, value in told.losses.items()), loss.new_zeros(()))
        prices = sum((self.prices[name].penalty(value) for name, value in harms.items()), loss.new_zeros(()))
        return loss + extra + prices, harms, told, float(loss.detach())

    def _harms(
        self, constrained: dict[str, NDArray[np.int64]], of_batch: Tensor, of_watched: Tensor
    ) -> dict[str, Tensor]:
        """Return each group's mean harm; all groups are scored in one pass."""
        drawn = {name: rows for name, rows in constrained.items() if len(rows)}
        if not drawn:
            return {}
        n_silent = len(drawn.get(SILENT, ()))
        residual = of_batch if self.plan.constraint == "batch" else torch.cat(
            [of_watched, of_watched.new_zeros(n_silent, of_watched.shape[1])]
        )  # fmt: skip
        rows = torch.from_numpy(np.concatenate(list(drawn.values())))
        harms = self.watched.harm(self.policy.generator, rows, residual)
        parts = torch.split_with_sizes(harms, [len(rows) for rows in drawn.values()])
        return {name: part.mean() for name, part in zip(drawn, parts)}

    def _move_prices(self, harms: dict[str, Tensor]) -> None:
        for name, value in harms.items():
            if self.plan.constraint == "fixed":
                self.prices[name].smoothed = float(value.detach())
            else:
                self.prices[name].update(float(value.detach()))
        self.steps.append([
            [price.value, float(harms[name].detach()) if name in harms else -1.0,
             -1.0 if price.smoothed is None else price.smoothed]
            for name, price in self.prices.items()
        ])  # fmt: skip

    def _tend_books(self, told: Told) -> None:
        books = self.policy.instructions
        if not isinstance(books, Instructions) or not books.quantise or not len(told.codes):
            return
        books.count(told.codes)
        step = self.at.step - self.at.begun_step
        first = not self.at.begun_epoch  # words that change hands late unsettle what was learnt of them
        if first and step % REVIVE_STEPS == 0 and step <= self.n_steps / 2:
            books.revive(told.state, self.optimizer)

    # ------------------------------------------------------------ judging an epoch

    def _judge(self, loss: float) -> None:
        """Measure the epoch on validation users, and keep it if it is the best so far."""
        self.policy.eval()
        samples = self.judges.samples
        told = self.policy.residuals(self.judged.windows(samples))
        ndcg = self._ndcg(samples, told)
        each, gains = self.judges.compare(self.policy.generator, told)
        harms, gain = means(each, self.judge_groups), float(gains.mean())
        harms[SILENT] = float(self.judges.measure(self.policy.generator, None).mean())
        worst = max(harms.values())
        self.at.epochs.append({
            "epoch": self.at.epoch, "step": self.at.step, "alone": self.at.alone, "loss": loss, "gain": gain,
            "ndcg@10": ndcg, "harm": harms,
            "price": {name: price.value for name, price in self.prices.items()},
            "books": [asdict(book) for book in self._books(samples)],
        })  # fmt: skip
        if self._is_better(gain, worst):
            self.at.chosen_epoch, self.at.chosen_gain, self.at.chosen_harm = self.at.epoch, gain, worst
            self.at.chosen_is_feasible = worst <= self.plan.prices.limit
            self.best = {name: value.detach().clone() for name, value in self.policy.state_dict().items()}
        _log.info("epoch %d: loss %.4f, gain %.4f, NDCG@10 %.4f, harm %.4f", self.at.epoch, loss, gain, ndcg, worst)

    def _advance(self) -> None:
        """End what goes on when nothing better comes: the new parts alone, then all from their best epoch on."""
        at, plan = self.at, self.plan
        warm = at.begun_epoch + -(-self.n_warm_up // self._lengths[at.alone])
        waited = at.epoch - max(at.chosen_epoch, warm)
        over = waited >= plan.patience or at.epoch - at.begun_epoch >= (plan.n_alone if at.alone else plan.n_epochs)
        if over and at.alone:
            self.policy.load_state_dict(self.best)
            at.alone, at.begun_epoch, at.begun_step = False, at.epoch, at.step
            self.optimizer = self._optimizer()
        else:
            at.done = over

    @torch.no_grad()
    def _books(self, samples: Samples) -> list[Usage]:
        """Return how validation users share the words of each book; no language model is needed."""
        books = self.policy.instructions
        if not isinstance(books, Instructions) or not books.quantise:
            return []
        return books.measure(self.policy.codes(torch.from_numpy(self.judged.windows(samples))))

    def _ndcg(self, samples: Samples, residual: Tensor) -> float:
        places = {pair: row for row, pair in enumerate(zip(samples.users.tolist(), samples.cuts.tolist()))}

        def look_up(part: Samples) -> Tensor:
            return residual[[places[pair] for pair in zip(part.users.tolist(), part.cuts.tolist())]]

        scorer = GenerativeScorer(
            self.policy.generator, self.catalogue, self.data, residuals=look_up, beams=self.plan.validation_beams
        )
        return float(per_user(samples.users, values(scorer.ranks(samples), ("ndcg@10",)))[1].mean())

    def _is_better(self, gain: float, worst: float) -> bool:
        """The last iterate swings around the limit, so an epoch within it comes before any that is not.

        Epochs are told apart by the likelihood of the true items: a difference of NDCG between two of them is far below
        what chance makes of a few hundred users.
        """
        if self.plan.choice == "best" or self.plan.constraint == "none":
            return gain > self.at.chosen_gain
        feasible = worst <= self.plan.prices.limit
        if feasible != self.at.chosen_is_feasible or not self.at.chosen_epoch:
            return feasible or not self.at.chosen_epoch
        return gain > self.at.chosen_gain if feasible else worst < self.at.chosen_harm

    def _conclude(self) -> None:
        """Say what the reader must know of a training that did not go as wished."""
        limit, maximum = self.plan.prices.limit, self.plan.prices.maximum
        if self.plan.choice == "feasible" and self.plan.constraint != "none" and not self.at.chosen_is_feasible:
            self.note(
                f"No epoch kept the harm of validation users within {limit:g} in every group; the least harmful one "
                f"({self.at.chosen_harm:.3g}) is kept."
            )
        if self.at.chosen_gain <= 0:
            self.note(
                "No epoch within the limit made the true items of validation users likelier than the reference does; the "
                f"one that is kept gains {self.at.chosen_gain:.3g} nats per code."
            )
        for k, book in enumerate(self._books(self.judges.samples)):
            if book.collapsed:
                self.note(f"Book {k} of the instructions has collapsed: {book.used:.0%} of its words are used.")
        at_top = np.mean([[row[0] >= maximum for row in step] for step in self.steps] or [[False]], axis=0)
        for name, share in zip(self.prices, np.atleast_1d(at_top)):
            if self.plan.constraint != "fixed" and share > STUCK:
                self.note(f"The limit cannot be met for group {name!r}: its price stood at {maximum:g} for "
                          f"{share:.0%} of the steps.")  # fmt: skip

    def note(self, text: str) -> None:
        """Log a warning and keep it in the record."""
        _log.warning("%s", text)
        self.at.notes.append(text)

    # ------------------------------------------------------------ saved states

    def history(self) -> dict[str, dict[str, list[float]]]:
        """Return price, harm and smoothed harm of every group at every step; -1 where a group was absent."""
        columns = ("price", "harm", "smoothed")
        return {
            name: {column: [step[g][c] for step in self.steps] for c, column in enumerate(columns)}
            for g, name in enumerate(self.prices)
        }

    def _save(self) -> None:
        if self.place is None:
            return
        tensors = checkpoint.under("best", self.best)
        tensors["steps"] = torch.tensor(self.steps, dtype=torch.float64).reshape(len(self.steps), len(self.prices), 3)
        if not self.at.done:
            tensors |= _training.snapshot(self.policy, self.optimizer)
        prices = {name: [price.value, price.smoothed] for name, price in self.prices.items()}
        checkpoint.save(self.place, tensors, {"key": self.key, "at": asdict(self.at), "prices": prices})

    def _resume(self) -> None:
        if (found := checkpoint.load(self.place, self.key)) is None:
            return
        tensors, facts = found
        self.at = Recorded(**facts["at"])
        self.optimizer = self._optimizer()
        self.best = checkpoint.select("best", tensors)
        self.steps = tensors["steps"].tolist()
        for name, (value, smoothed) in facts["prices"].items():
            self.prices[name].value, self.prices[name].smoothed = value, smoothed
        if not self.at.done:
            _training.restore(self.policy, self.optimizer, tensors)
