"""How a fitted generator answers what the harness asks: ranks, likelihoods, the best items."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from .base import OUTSIDE
from .beam import Found, search
from .filters import Living
from .new_items import code_log_probs, stepper
from .splits import Samples, seen_pairs, windows

if TYPE_CHECKING:
    from .data import Interactions
    from .generator import Generator
    from .tokenise import Catalogue

__all__ = ["GenerativeScorer", "SampleResiduals", "WindowResiduals"]

SampleResiduals = Callable[[Samples], Tensor]
"""What knowledge adds to the first decoder input of each sample: [samples, d_model]."""
WindowResiduals = Callable[[NDArray[np.int32]], Tensor]
"""The same for windows of history: [n, history] -> [n, d_model]."""

_ROWS = 12_800
"""Decoder rows of one batch: requests times beams."""


@dataclass(frozen=True, eq=False)
class GenerativeScorer:
    """Rank a catalogue with a generator, for users of the data and for any window of history.

    Attributes:
        generator: The fitted network.
        catalogue: The items' codes and their tree.
        data: Whose histories the samples name.
        residuals: What knowledge adds for samples; None: nothing.
        window_residuals: What it adds for windows; needed by `top` where `residuals` is given.
        beams: Beams of the search; the number of items where `full` is set.
        full: Score every item, so that every target has a rank. Exact, and dear for large catalogues.
        filter_seen: Hide the items that a history already holds.
        renormalise: Rank by probabilities among items instead of the true likelihood.
    """

    generator: Generator
    catalogue: Catalogue
    data: Interactions
    residuals: SampleResiduals | None = None
    window_residuals: WindowResiduals | None = None
    beams: int = 50
    full: bool = False
    filter_seen: bool = False
    renormalise: bool = False

    def __post_init__(self) -> None:
        if self.catalogue.n_items < self.generator.n_items:
            raise UserError(
                f"The generator knows {self.generator.n_items} items and the catalogue holds "
                f"{self.catalogue.n_items}. Use the catalogue that the generator was fitted with."
            )

    def ranks(self, samples: Samples) -> NDArray[np.int64]:
        """Return each target's rank: one more than the number of other items that score at least as much.

        Shapes: [samples]; `OUTSIDE` where no beam reached the target.
        """
        found = [_ranks(found, targets) for found, targets in self._searched(samples)]
        return np.concatenate([np.empty(0, np.int64), *found])

    def exact(self, samples: Samples, k: int = 10) -> NDArray[np.bool_]:
        """Tell for which samples the first `k` items are proved to be the best of the catalogue.

        Shapes: [samples]
        """
        found = [found.exact(k).cpu().numpy() for found, _ in self._searched(samples)]
        return np.concatenate([np.empty(0, np.bool_), *found])

    def log_likelihood(self, samples: Samples) -> NDArray[np.float64]:
        """Return the log-probability of each target, in nats per item.

        Shapes: [samples]
        """
        found: NDArray[np.float64] = self.code_log_likelihood(samples).sum(1)
        return found

    def code_log_likelihood(self, samples: Samples) -> NDArray[np.float64]:
        """Return the log-probability of each code of each target, given the true codes before it, in nats.

        Shapes: [samples, levels]
        """
        found = [np.empty((0, self.generator.n_levels))]
        with self._still():
            for part in _parts(samples, 1024):
                seen, targets = windows(self.data, part, self.generator.n_history)
                memory = self.generator.encode(torch.from_numpy(seen))
                residual = None if self.residuals is None else self.residuals(part)
                asked = torch.from_numpy(targets).long()
                values = code_log_probs(self.generator, memory, asked, residual, self.catalogue)
                found.append(values.double().cpu().numpy())
        return np.concatenate(found)

    def top(self, windows: NDArray[np.int32], k: int) -> NDArray[np.int32]:
        """Return the best `k` items of each window, best first, 0 where there are fewer.

        Shapes: windows [n, history], 0 = padding on the left -> [n, k]

        Raises:
            UserError: The scorer knows what knowledge adds for samples, and not for windows.
        """
        if self.residuals is not None and self.window_residuals is None:
            raise UserError("This scorer's knowledge belongs to samples. Give it `window_residuals` to rank windows.")
        best = np.zeros((len(windows), k), np.int32)
        for first in range(0, len(windows), step := self._requests(k)):
            part = windows[first : first + step]
            residual = None if self.window_residuals is None else self.window_residuals(part)
            found = self.search(part, residual, self._seen_in(part), beams=max(k, self._beams)).items
            best[first : first + len(part), : found.shape[1]] = found[:, :k].cpu().numpy()
        return best

    def search(
        self,
        windows: NDArray[np.int32],
        residual: Tensor | None = None,
        living: Living | None = None,
        beams: int | None = None,
    ) -> Found:
        """Search the catalogue for some windows at once.

        Shapes:
            windows: [n, history]; residual: [n, d_model].
        """
        with self._still():
            memory = self.generator.encode(torch.from_numpy(windows))
            steps = stepper(self.generator, memory, residual, self.catalogue)
            return search(
                steps, self.catalogue.trie, len(windows), beams=beams or self._beams, living=living,
                renormalise=self.renormalise, device=memory.mask.device,
            )  # fmt: skip

    # ------------------------------------------------------------ parts

    @property
    def _beams(self) -> int:
        return self.catalogue.n_items if self.full else self.beams

    def _requests(self, k: int = 1) -> int:
        return max(1, min(1024, _ROWS // max(k, self._beams)))

    def _searched(self, samples: Samples) -> Iterator[tuple[Found, Tensor]]:
        """Yield what was found for a batch of samples, and their targets."""
        for part in _parts(samples, self._requests()):
            seen, targets = windows(self.data, part, self.generator.n_history)
            residual = None if self.residuals is None else self.residuals(part)
            found = self.search(seen, residual, self._seen_by(part))
            yield found, torch.from_numpy(targets).to(found.items)

    def _seen_by(self, samples: Samples) -> Living | None:
        """Hide all that stands before the cuts, however long ago."""
        if not self.filter_seen:
            return None
        rows, items = seen_pairs(self.data, samples)
        cuts = samples.cuts.astype(np.int64)
        seen = np.zeros((len(samples), int(cuts.max(initial=0))), np.int32)
        seen[rows, np.arange(len(rows)) - np.repeat(np.cumsum(cuts) - cuts, cuts)] = items
        return Living.of(self.catalogue.trie, seen=seen)

    def _seen_in(self, windows: NDArray[np.int32]) -> Living | None:
        return Living.of(self.catalogue.trie, seen=windows) if self.filter_seen else None

    def _still(self) -> _Still:
        return _Still(self.generator)


class _Still:
    """No gradients and no dropout inside the ``with``; afterwards the network trains again if it did."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network, self.trained = network, network.training
        self.no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self.no_grad.__enter__()
        self.network.eval()

    def __exit__(self, *error: object) -> None:
        self.network.train(self.trained)
        self.no_grad.__exit__(*error)


def _parts(samples: Samples, size: int) -> Iterator[Samples]:
    for first in range(0, len(samples), size):
        yield samples.take(slice(first, first + size))


def _ranks(found: Found, targets: Tensor) -> NDArray[np.int64]:
    hit = (found.items == targets[:, None]) & (found.items > 0)
    own = found.scores.masked_fill(~hit, -torch.inf).max(1, keepdim=True).values
    at_least = (found.scores >= own).sum(1)
    return torch.where(hit.any(1), at_least, OUTSIDE).cpu().numpy().astype(np.int64)
