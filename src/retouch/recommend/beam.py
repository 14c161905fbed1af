"""The search for the best items of a catalogue, code by code, with a proof of what it did not miss.

A generator scores the next code of each prefix that is still in the race; the tree of codes says which may follow. No
answer can be anything but an item, none stands there twice, and a score is the item's true log-likelihood: codes that
lead nowhere keep their probability, unless `renormalise` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import RetouchError, UserError
from .filters import Living
from .trie import Trie

__all__ = ["Found", "Stepper", "search"]


class Stepper(Protocol):
    """What a search asks of a generator."""

    def step(self, level: int, rows: Tensor, prefix: Tensor) -> Tensor:
        """Return the log-probabilities of the next code, over all codes of the level.

        Shapes: rows [n], prefix [n, level] -> [n, codes of the level]

        Args:
            level: Which code comes next, from 0.
            rows: Which request each prefix belongs to, ascending.
            prefix: The codes before it.
        """
        ...


@dataclass(frozen=True, eq=False)
class Found:
    """Hold what a search found.

    Args:
        items: Item numbers, best first; 0 where there is none; [requests, beams].
        scores: Log-likelihoods in nats per item, minus infinity where there is none; [requests, beams].
        dropped: The best score that the search gave up on the way, minus infinity for none; [requests].
    """

    items: Tensor
    scores: Tensor
    dropped: Tensor

    def exact(self, k: int) -> Tensor:
        """Tell for which requests the first k items are proved to be the best k of all.

        A prefix is never less likely than what follows it. So where the k-th item beats everything that was given up,
        nothing better was lost.

        Shapes: [requests], bool

        Raises:
            UserError: `k` is larger than the number of beams.
        """
        beams = self.items.shape[1]
        if not 1 <= k <= beams:
            raise UserError(f"A search with {beams} beams knows its best {beams} items; {k} were asked for.")
        return (self.scores[:, k - 1] > self.dropped) | self.dropped.isneginf()

    @property
    def invalid_mass(self) -> Tensor:
        """The probability of all that was not found; with as many beams as items, of words that are no item.

        Shapes: [requests]
        """
        return 1 - self.scores.double().exp().sum(1)


@dataclass(frozen=True, eq=False)
class _Race:
    """The prefixes still in the race after some codes, in the order of their nodes; score -inf marks an empty place."""

    nodes: Tensor
    scores: Tensor
    codes: Tensor
    dropped: Tensor


@torch.no_grad()
def search(
    stepper: Stepper,
    trie: Trie,
    n_requests: int,
    *,
    beams: int = 50,
    living: Living | None = None,
    renormalise: bool = False,
    device: torch.device | str = "cpu",
) -> Found:
    """Find the most likely items for each request.

    Source: beam search over the flattened prefix tree of STATIC, arXiv 2602.22647; the proof is ours.

    Use when: the items of a catalogue are ranked by a model that writes codes.

    Shapes: see `Found`.

    Args:
        stepper: The generator with its requests.
        trie: The catalogue's codes.
        n_requests: How many requests there are.
        beams: How many prefixes are kept on each level; at least as many as items are wanted.
        living: Which items may be found; None: all. A prefix without a living item takes no beam.
        renormalise: Divide each code's probability by that of all codes that lead to an item. Ranks differently.
        device: Where `rows` and `prefix` are made.

    Returns:
        The items of each request: fewer than `beams` where fewer are alive, never an invalid or a hidden one.

    Raises:
        UserError: `beams` is below 1, or `living` was made for another number of requests.
        RetouchError: The generator gave something that is no log-probability.

    Example:
        >>> class Fair:
        ...     def step(self, level, rows, prefix):
        ...         return torch.tensor([0.1, 0.9]).log().expand(len(rows), 2)
        >>> trie = Trie.of(np.array([[0, 1], [1, 0], [1, 1]]))
        >>> search(Fair(), trie, 1, beams=2).items.tolist()
        [[3, 1]]
    """
    if beams < 1:
        raise UserError(f"A search needs at least one beam; got {beams}.")
    if living is not None:
        living.check(trie, n_requests)
    tree = _Tree(trie, living, torch.device(device))
    race = _start(n_requests, tree.device)
    for level in range(trie.n_levels):
        race = _step(stepper, tree, race, level, beams, renormalise)
    order = race.scores.sort(dim=1, descending=True, stable=True).indices
    scores = race.scores.gather(1, order)
    items = tree.item[race.nodes.gather(1, order)].masked_fill(scores.isneginf(), 0)
    short = (0, beams - items.shape[1])
    return Found(functional.pad(items, short), functional.pad(scores, short, value=-torch.inf), race.dropped)


def _start(n_requests: int, device: torch.device) -> _Race:
    nodes = torch.zeros(n_requests, 1, dtype=torch.int64, device=device)
    scores = torch.zeros(n_requests, 1, device=device)
    return _Race(nodes, scores, nodes.new_zeros(n_requests, 1, 0), scores.new_full((n_requests,), -torch.inf))


def _step(stepper: Stepper, tree: _Tree, race: _Race, level: int, beams: int, renormalise: bool) -> _Race:
    """Write one more code behind each prefix and keep the best."""
    alive = ~race.scores.isneginf()
    rows, places = alive.nonzero(as_tuple=True)
    if not len(rows):
        return race
    children, exists = tree.children(level, race.nodes)
    codes = tree.code[level][children]
    log_probs = stepper.step(level, rows, race.codes[rows, places]).to(race.scores.dtype)
    _check(log_probs, level, len(rows), tree.code[level])
    following = log_probs.gather(1, codes[rows, places])
    if renormalise:
        valid = following.masked_fill(~exists[rows, places], -torch.inf)
        following = (valid - valid.logsumexp(1, keepdim=True)).clamp_(max=0).nan_to_num_(-torch.inf)
    scores = race.scores.new_full(children.shape, -torch.inf)
    scores[rows, places] = following
    scores += race.scores.unsqueeze(2)
    scores.masked_fill_(~tree.alive(level, race.nodes, exists), -torch.inf)
    return _keep(race, scores.flatten(1), children.flatten(1), codes.flatten(1), beams)


def _check(log_probs: Tensor, level: int, n: int, codes: Tensor) -> None:
    if log_probs.ndim != 2 or log_probs.shape[0] != n or log_probs.shape[1] <= int(codes.max()):
        raise RetouchError(
            f"The generator gave an array of shape {tuple(log_probs.shape)} for {n} prefixes on level {level}; the "
            f"catalogue has codes up to {int(codes.max())} there. Generator and catalogue do not belong together."
        )
    if not bool((log_probs <= 0).all()):  # also NaN
        raise RetouchError(
            f"On level {level} the generator gave values that are no log-probabilities (above 0, or not a number). "
            "A stepper must end in log_softmax; if it does, look for weights that are not finite."
        )


def _keep(race: _Race, scores: Tensor, children: Tensor, codes: Tensor, beams: int) -> _Race:
    """Keep the best candidates in the order of their nodes; among equal scores the smaller node wins."""
    width = scores.shape[1]
    best = scores.topk(min(beams + 1, width), dim=1)
    dropped, picked = race.dropped, best.indices
    if width > beams:
        edge = best.values[:, beams - 1]
        dropped = torch.maximum(dropped, best.values[:, beams])
        tied = (best.values[:, beams] == edge) & ~edge.isneginf()
        picked = picked[:, :beams]
        if bool(tied.any()):  # topk takes any of them
            picked[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :beams]
    picked = picked.sort(1).values
    kept = scores.gather(1, picked)
    before = race.codes[torch.arange(len(scores), device=scores.device).unsqueeze(1), picked // _span(race, width)]
    written = torch.cat([before, codes.gather(1, picked).unsqueeze(2)], 2)
    return _Race(children.gather(1, picked), kept, written, dropped)


def _span(race: _Race, width: int) -> int:
    return width // race.nodes.shape[1]


class _Tree:
    """A trie and its living items as tensors."""

    def __init__(self, trie: Trie, living: Living | None, device: torch.device) -> None:
        self.device, self.living = device, None if living is None else living.tensors(device)
        self.item = _index(trie.item, device)
        self.start = [_index(start, device) for start in trie.start]
        self.code = [_index(code, device) for code in trie.code]
        self.leaf = [_index(leaf, device) for leaf in trie.leaf]

    def children(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the children of each node, padded to the widest node, and which of them are real.

        Shapes: [requests, beams] -> [requests, beams, widest] twice
        """
        begin, end = self.start[level][nodes], self.start[level][nodes + 1]
        widest = int((end - begin).max())
        children = begin.unsqueeze(2) + torch.arange(widest, device=self.device)
        exists = children < end.unsqueeze(2)
        return children.clamp_(max=len(self.code[level]) - 1), exists

    def alive(self, level: int, nodes: Tensor, exists: Tensor) -> Tensor:
        """Return which children have an item that may be found. Shapes: as `children`."""
        if self.living is None:
            return exists
        requests, n_beams, widest = exists.shape
        edges = self.start[level][nodes].unsqueeze(2) + torch.arange(widest + 1, device=self.device)
        leaf = self.leaf[level + 1]
        counted = self.living.below(leaf[edges.clamp_(max=len(leaf) - 1)].view(requests, -1))
        return exists & (counted.view(requests, n_beams, widest + 1).diff(dim=2) > 0)


def _index(array: np.ndarray, device: torch.device) -> Tensor:  # type: ignore[type-arg]
    return torch.from_numpy(array).to(device=device, dtype=torch.int64)
