"""How likely an item is whose last digit was never trained.

A new item takes the next free digit behind its codes. The generator knows the codes but not that digit, so what it says
there is noise. Where a group of equals holds new items, each of them gets its even share and the trained ones divide the
rest as the generator says. Other groups are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .beam import Stepper
from .tokenise import Catalogue

__all__ = ["NewItems"]


@dataclass(eq=False)
class NewItems:
    """Wrap a generator's stepper so that new items are found.

    Known problems: the even share is a guess; generators favour what they were trained on, so a shop that must show new
    items reserves places for them (`filters.Rules`).

    Args:
        stepper: The generator with its requests.
        catalogue: The codes, with those of the new items.
    """

    stepper: Stepper
    catalogue: Catalogue
    _touched: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        new = self.catalogue.codes[self.catalogue.n_trained :, :-1]
        self._touched = {tuple(prefix): self._group(tuple(prefix)) for prefix in new.tolist()}

    def _group(self, prefix: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the digits of a group's trained and new items."""
        codes = self.catalogue.codes
        rows = (codes[:, :-1] == prefix).all(1)
        is_new = self.catalogue.is_new[1:]
        return torch.from_numpy(codes[rows & ~is_new, -1]).long(), torch.from_numpy(codes[rows & is_new, -1]).long()

    def step(self, level: int, rows: Tensor, prefix: Tensor, parents: Tensor) -> Tensor:
        """Return the generator's log-probabilities, corrected on the last level; see `beam.Stepper`."""
        log_probs = self.stepper.step(level, rows, prefix, parents)
        return log_probs if level < self.catalogue.trie.n_levels - 1 else self.corrected(prefix, log_probs)

    def corrected(self, prefix: Tensor, log_probs: Tensor) -> Tensor:
        """Give new items their share of the last digit.

        Shapes: prefix [n, levels - 1], log_probs [n, digits] -> [n, digits]
        """
        if not self._touched:
            return log_probs
        log_probs = log_probs.clone()
        for row, codes in enumerate(prefix.tolist()):
            if (group := self._touched.get(tuple(codes))) is not None:
                log_probs[row] = _shared(log_probs[row], *(digits.to(log_probs.device) for digits in group))
        return log_probs


def _shared(log_probs: Tensor, trained: Tensor, new: Tensor) -> Tensor:
    m = len(trained) + len(new)
    found = torch.full_like(log_probs, -torch.inf)
    found[new] = -torch.log(log_probs.new_tensor(float(m)))
    if len(trained):
        own = log_probs[trained].log_softmax(0)
        found[trained] = own + torch.log(log_probs.new_tensor(len(trained) / m))
    return found
