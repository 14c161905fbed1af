"""The base with all adapters beside its weights, each times a number of its own, asked the same questions again and again.

Nothing is merged: an adapter costs its rank in every weight and one scalar, and gradients reach the numbers through the
factors. Methods that choose the adapters' weights stand on this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import store
from ..errors import ModelError, UserError
from ..trace import Trace
from ._decoding import batches, lines
from .base import Adapter, Ground, Question, modules
from .scoring import chatted
from .templates import render

__all__ = ["Asked", "Mixture"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""What is to be lessened of some questions, by their numbers and the log probabilities of their right answers."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What one mixture answers.

    Attributes:
        likely: Log probability of each question's right answer.
        right: Whether that answer was the likeliest.
    """

    likely: Tensor
    right: Tensor

    @property
    def cross_entropy(self) -> float:
        """Mean over the questions, in nats."""
        return -float(self.likely.mean())


class Mixture:
    """Adapters times numbers, and the questions by which the numbers are chosen, each asked alone.

    Args:
        adapters: Of one base.
        ground: The base and the selection questions.
        n_questions: Of each domain at most; which ones is drawn by `seed`.
        seed: Of the drawing.

    Attributes:
        domains: The domains' names.
        domain: The number of each question's domain.

    Raises:
        UserError: The adapters do not belong together or to the base, or a question cannot be asked.
        ModelError: The base predicts no next token.
    """

    def __init__(self, adapters: Sequence[Adapter], ground: Ground, n_questions: int, seed: int) -> None:
        self.model = ground.model
        if self.model.anatomy.kind != "decoder" or not self.model.anatomy.has_head:
            raise ModelError(f"{self.model.source} predicts no next token, so it cannot be asked. Open a decoder.")
        self.domains = tuple(d for d, own in ground.selection.items() if own)
        drawn = [_drawn(ground.selection[d], n_questions, seed) for d in self.domains]
        asked = [q for own in drawn for q in own]
        if not asked:
            raise UserError(
                "There is no selection question to choose weights by. Give the domains' questions (--data)."
            )
        shown = [render((q,), ground.wording, ground.shots) for q in asked]
        if ground.chat:
            shown = [chatted(self.model.tokenizer, r) for r in shown]
        self._rows = lines(self.model, shown, ground.wording, special=not ground.chat)
        self._chunks = list(batches(self.model, self._rows))
        self._answers = [q.answer for q in asked]
        self.domain = torch.tensor([j for j, own in enumerate(drawn) for _ in own])
        self._factors = self._beside(adapters)

    @property
    def modules(self) -> tuple[str, ...]:
        """Name the weights that any adapter changes, in order."""
        return tuple(self._factors)

    def _beside(self, adapters: Sequence[Adapter]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Put the factors of all adapters side by side, with the number of each column's adapter."""
        found, device = {}, self.model.device
        for module in modules(adapters, [1.0] * len(adapters)):
            left = torch.cat([p.left for p in module.parts], 1).float()
            right = torch.cat([p.right for p in module.parts]).float()
            owner = torch.tensor([i for i, p in zip(module.owners, module.parts) for _ in range(p.rank)])
            found[module.name] = (left.to(device), right.to(device), owner)
        return found

    def ask(self, weights: Tensor, loss: Loss | None = None) -> Asked:
        """Ask all questions; with a loss also add its gradient to that of the weights.

        Args:
            weights: A number for each adapter, or a row of them for each of `modules`; on the CPU.
            loss: Of a batch of questions; the batches' losses add up.
        """
        likely = torch.zeros(len(self._rows))
        right = torch.zeros(len(self._rows), dtype=torch.bool)
        for chunk in self._chunks:
            with torch.set_grad_enabled(loss is not None):
                options = self._options(chunk, weights)
                answers = torch.tensor([self._answers[i] for i in chunk])
                found = options.gather(1, answers[:, None])[:, 0]
                if loss is not None:
                    loss(torch.tensor(chunk), found).backward()  # type: ignore[no-untyped-call]
            likely[chunk], right[chunk] = found.detach(), options.argmax(1) == answers
        if not bool(likely.isfinite().all()):
            raise UserError(
                f"With the weights {', '.join(f'{w:.3g}' for w in weights.flatten()[:64].tolist())} the model's answers are not "
                "numbers; the adapters are too large."
            )
        return Asked(likely, right)

    def _options(self, chunk: Sequence[int], weights: Tensor) -> Tensor:
        """Return the log probabilities of the options, padded by impossible ones, on the CPU."""
        rows = [self._rows[i] for i in chunk]
        batch = self.model.batch([row.front for row in rows], side="left")
        rows_of = weights if weights.dim() == 2 else weights.expand(len(self._factors), -1)
        with Trace(self.model) as trace:
            for row, (name, (left, right, owner)) in zip(rows_of, self._factors.items()):
                trace.branch(name, left * row[owner].to(left.device, left.dtype), right)
            states = trace.states(batch)
        logp = self.model.logits(states[:, -1]).float().log_softmax(-1).cpu()
        most = max(len(row.labels[0]) for row in rows)
        ids = torch.tensor([[*row.labels[0], *[0] * (most - len(row.labels[0]))] for row in rows])
        beyond = torch.arange(most) >= torch.tensor([[len(row.labels[0])] for row in rows])
        return logp.gather(1, ids).masked_fill(beyond, -math.inf)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of each domain's questions."""
        total = torch.zeros(len(self.domains)).index_add(0, self.domain, values.float())
        return total / self.sizes

    @property
    def sizes(self) -> Tensor:
        """How many questions each domain has."""
        return torch.bincount(self.domain, minlength=len(self.domains)).float()


def _drawn(questions: Sequence[Question], n: int, seed: int) -> list[Question]:
    return sorted(questions, key=lambda q: store.key(seed=seed, question=q.key))[:n]
