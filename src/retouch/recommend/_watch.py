"""The targets that a constraint watches, with what the reference says of them, measured once and without dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import harm
from .scorer import GenerativeScorer
from .splits import Samples, segments, windows

if TYPE_CHECKING:
    from .data import Interactions
    from .generator import Generator
    from .splits import Splits
    from .tokenise import Catalogue

__all__ = ["SILENT", "Watch", "activity_groups"]

SILENT = "no-knowledge"
"""The group whose knowledge is left out, whoever they are: the policy alone must not harm either."""

RIVALS = 20
"""How many of the reference's best items a harm that compares items looks at."""

_ROWS = 1024


def activity_groups(data: Interactions, splits: Splits, samples: Samples) -> dict[str, NDArray[np.int64]]:
    """Return the rows of sparse and of active users; a group without rows is there, and empty."""
    known = segments(data, splits, samples)
    return {name: np.flatnonzero(known[name]) for name in ("sparse", "active")}


class Watch:
    """Compare a policy with the reference on fixed targets.

    Args:
        samples: The targets.
        reference: The recommender without knowledge.
        data: The histories.
        catalogue: The items' codes.
        kind: Which harm.
        slack: What is forgiven, in nats per code.
    """

    def __init__(
        self,
        samples: Samples,
        reference: Generator,
        data: Interactions,
        catalogue: Catalogue,
        kind: harm.Kind = "hinge",
        slack: float = 0.0,
    ) -> None:
        self.samples, self.kind, self.slack, self.n_levels = samples, kind, slack, reference.n_levels
        seen, targets = windows(data, samples, reference.n_history)
        self.windows, self.targets = torch.from_numpy(seen), torch.from_numpy(targets).long()
        self.rivals = self._rivals(GenerativeScorer(reference, catalogue, data, beams=RIVALS), seen)
        self.before = self._measured(reference)

    def __len__(self) -> int:
        return len(self.samples)

    def _rivals(self, scorer: GenerativeScorer, seen: NDArray[np.int32]) -> Tensor | None:
        """Return the reference's best items, without the target where a harm needs that; 0 where there is none."""
        if self.kind == "hinge":
            return None
        best = torch.from_numpy(scorer.top(seen, RIVALS)).long()
        return best.masked_fill(best == self.targets[:, None], 0) if self.kind == "margin" else best

    def _measured(self, reference: Generator) -> Tensor:
        reference.eval()
        with torch.no_grad():
            found = [self.scores(reference, rows, None) for rows in self._parts()]
        width = 1 + (RIVALS if self.rivals is not None else 0)
        return torch.cat(found) if found else torch.zeros(0, width)

    def _parts(self) -> tuple[Tensor, ...]:
        """Return the rows in batches; none where nobody is watched."""
        return torch.arange(len(self)).split(_ROWS) if len(self) else ()  # type: ignore[no-untyped-call]

    def scores(self, generator: Generator, rows: Tensor, residual: Tensor | None) -> Tensor:
        """Return the log-probability in nats of each target, in the first column, and of its rivals.

        Shapes:
            rows: which of the watched targets, (rows,); residual: (rows, d_model) -> (rows, 1 + rivals)
        """
        asked = self.targets[rows, None]
        if self.rivals is not None:
            asked = torch.cat([asked, self.rivals[rows]], 1)
        memory = generator.encode(self.windows[rows])
        scores = generator.code_log_probs(memory, asked, residual).sum(-1)
        return torch.where(asked.to(scores.device) > 0, scores, -torch.inf)

    def harm(self, generator: Generator, rows: Tensor, residual: Tensor | None) -> Tensor:
        """Return the harm of each target, with its gradient, not capped. The generator must be in eval mode.

        Shapes:
            rows: (rows,), residual: (rows, d_model) -> (rows,)
        """
        return self._harm_of(self.scores(generator, rows, residual), rows)

    def _harm_of(self, now: Tensor, rows: Tensor) -> Tensor:
        before = self.before[rows.to(self.before.device)]
        if self.kind == "kl":
            return harm.kl(before[:, 1:], now[:, 1:], self.n_levels, self.slack)
        if self.kind == "margin":
            return harm.margin((before[:, 0], before[:, 1:]), (now[:, 0], now[:, 1:]), self.n_levels, self.slack)
        return harm.hinge(before[:, 0] / self.n_levels, now[:, 0] / self.n_levels, self.slack)

    def measure(self, generator: Generator, residual: Tensor | None) -> Tensor:
        """Return the capped harm of all watched targets, (targets,)."""
        return self.compare(generator, residual)[0]

    @torch.no_grad()
    def compare(self, generator: Generator, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the capped harm of all watched targets, and by how many nats per code each became likelier.

        Shapes:
            residual: (targets, d_model) -> (targets,) and (targets,)
        """
        trained = generator.training
        generator.eval()
        harms, gains = [torch.zeros(0)], [torch.zeros(0)]
        for rows in self._parts():
            now = self.scores(generator, rows, None if residual is None else residual[rows.to(residual.device)])
            harms.append(self._harm_of(now, rows).cpu())
            gains.append(((now - self.before[rows.to(self.before.device)])[:, 0] / self.n_levels).cpu())
        generator.train(trained)
        return harm.capped(torch.cat(harms)), torch.cat(gains)


def means(harms: Tensor, groups: Mapping[str, NDArray[np.int64]]) -> dict[str, float]:
    """Return the mean harm of each group that has anybody."""
    return {name: float(harms[torch.from_numpy(rows)].mean()) for name, rows in groups.items() if len(rows)}
