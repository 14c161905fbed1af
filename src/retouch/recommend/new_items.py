"""How likely an item is whose last digit was never trained.

A new item takes the next free digit behind its codes. The generator knows the codes but not that digit, so what it says
there is noise. Where a group of equals holds new items, each of them gets its even share and the trained ones divide the
rest as the generator says. Other groups are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .beam import Stepper
from .tokenise import Catalogue

if TYPE_CHECKING:
    from .generator import Generator, Memory

__all__ = ["NewItems", "Shares", "code_log_probs", "stepper"]


@dataclass(frozen=True, eq=False)
class Shares:
    """The groups of equals that hold new items; made once for a catalogue: see `Catalogue.shares`.

    Args:
        index: The group of each prefix, which is all codes but the digit.
        trained: Which digits are those of trained items; [groups, digits].
        new: Which are those of new items; [groups, digits].
        of_trained: Logarithm of what the trained items share; [groups, 1].
        of_new: Logarithm of what each new item gets; [groups, 1].
    """

    index: dict[tuple[int, ...], int]
    trained: Tensor
    new: Tensor
    of_trained: Tensor
    of_new: Tensor

    @classmethod
    def of(cls, catalogue: Catalogue) -> Shares:
        """Find the groups by the tree: what is looked at is their own items, however large the catalogue is."""
        prefixes = np.unique(catalogue.codes[catalogue.n_trained :, :-1], axis=0)
        begin, trie = catalogue.trie.start[-1], catalogue.trie
        nodes = trie.find(prefixes)
        sizes = begin[nodes + 1] - begin[nodes]
        group = np.repeat(np.arange(len(nodes)), sizes)
        leaves = np.arange(len(group)) + np.repeat(begin[nodes] - (np.cumsum(sizes) - sizes), sizes)
        new = catalogue.is_new[trie.item[leaves]]
        masks = np.zeros((2, len(nodes), catalogue.sizes[-1]), bool)
        masks[new.astype(np.int64), group, trie.code[-1][leaves]] = True
        trained, fresh = torch.from_numpy(masks)
        m = torch.from_numpy(sizes.astype(np.float32))[:, None]
        index = {tuple(prefix): number for number, prefix in enumerate(prefixes.tolist())}
        return cls(index, trained, fresh, (trained.sum(1, keepdim=True) / m).log(), -m.log())

    def groups(self, prefix: Tensor) -> Tensor:
        """Return the group of each prefix, -1 for none. Shapes: [n, levels - 1] -> [n]"""
        return torch.tensor([self.index.get(tuple(codes), -1) for codes in prefix.tolist()], dtype=torch.int64)

    def applied(self, groups: Tensor, log_probs: Tensor) -> Tensor:
        """Share out the digits of some groups. Shapes: groups [n], log_probs [n, digits] -> [n, digits]"""
        trained, new, of_trained, of_new = (
            part[groups].to(log_probs.device) for part in (self.trained, self.new, self.of_trained, self.of_new)
        )
        own = log_probs.masked_fill(~trained, -torch.inf)
        own = own - own.logsumexp(1, keepdim=True) + of_trained  # not a number where none is trained, and not taken
        nothing = torch.full_like(own, -torch.inf)
        return torch.where(new, of_new.expand_as(own), torch.where(trained, own, nothing))


class NewItems(NamedTuple):
    """Wrap a generator's stepper so that new items are found.

    Known problems: the even share is a guess; generators favour what they were trained on, so a shop that must show new
    items reserves places for them (`filters.Rules`).

    Args:
        stepper: The generator with its requests.
        catalogue: The codes, with those of the new items.
    """

    stepper: Stepper
    catalogue: Catalogue

    def step(self, level: int, rows: Tensor, prefix: Tensor, parents: Tensor) -> Tensor:
        """Return the generator's log-probabilities, corrected on the last level; see `beam.Stepper`."""
        log_probs = self.stepper.step(level, rows, prefix, parents)
        return log_probs if level < self.catalogue.trie.n_levels - 1 else self.corrected(prefix, log_probs)

    def corrected(self, prefix: Tensor, log_probs: Tensor) -> Tensor:
        """Give new items their share of the last digit.

        Shapes: prefix [n, levels - 1], log_probs [n, digits] -> [n, digits]
        """
        groups = self.catalogue.shares.groups(prefix)
        rows = (groups >= 0).nonzero()[:, 0]
        if not len(rows):
            return log_probs
        log_probs = log_probs.clone()
        log_probs[rows] = self.catalogue.shares.applied(groups[rows], log_probs[rows])
        return log_probs


def stepper(generator: Generator, memory: Memory, residual: Tensor | None, catalogue: Catalogue) -> Stepper:
    """Return what a search over a catalogue asks of a generator, which may know fewer items."""
    steps: Stepper = generator.stepper(memory, residual)
    return steps if catalogue.n_trained == catalogue.n_items else NewItems(steps, catalogue)


def code_log_probs(
    generator: Generator, memory: Memory, targets: Tensor, residual: Tensor | None, catalogue: Catalogue
) -> Tensor:
    """Score items code by code as a search over the catalogue does; see `Generator.code_log_probs`.

    Shapes: targets [batch] or [batch, candidates] -> the same and [levels]
    """
    found = generator.code_log_probs(memory, targets, residual)
    if catalogue.n_trained == catalogue.n_items:
        return found
    numbers = targets.reshape(len(memory), -1).cpu()
    scores = found.view(*numbers.shape, -1)
    for item in sorted(set(numbers.flatten().tolist())):
        group = catalogue.shares.index.get(tuple(catalogue.codes[item - 1, :-1].tolist()))
        if item and group is not None:
            rows, columns = (numbers == item).nonzero(as_tuple=True)
            scores[rows, columns, -1] = _digit(generator, memory, rows, item, residual, catalogue)
    return found


def _digit(
    generator: Generator, memory: Memory, rows: Tensor, item: int, residual: Tensor | None, catalogue: Catalogue
) -> Tensor:
    """Return the log-probability of an item's digit, shared out in its group, for some requests."""
    begin, trie = catalogue.trie.start[-1], catalogue.trie
    node = int(trie.find(catalogue.codes[item - 1 : item, :-1])[0])
    members = trie.item[begin[node] : begin[node + 1]]
    trained = members[~catalogue.is_new[members]]
    if catalogue.is_new[item]:
        return generator.first.new_full((len(rows),), -float(np.log(len(members))))
    part = type(memory)(memory.states[rows], memory.mask[rows])
    own = None if residual is None else residual[rows]
    asked = torch.from_numpy(trained.astype(np.int64)).expand(len(rows), -1)
    digits = generator.code_log_probs(part, asked, own)[..., -1].log_softmax(1)
    return digits[:, int(np.flatnonzero(trained == item)[0])] + float(np.log(len(trained) / len(members)))
