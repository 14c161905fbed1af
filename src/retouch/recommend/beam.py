"""The search for the best items of a catalogue, code by code, with a proof of what it did not miss.

A generator scores the next code of each prefix that is still in the race; the tree of codes says which may follow. No
answer can be anything but an item, none stands there twice, and a score is the item's true log-likelihood: codes that
lead nowhere keep their probability, unless `renormalise` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import RetouchError, UserError
from .filters import Living
from .trie import Trie

__all__ = ["Found", "Stepper", "search"]


class Stepper(Protocol):
    """What a search asks of a generator."""

    def step(self, level: int, rows: Tensor, prefix: Tensor, parents: Tensor) -> Tensor:
        """Return the log-probabilities of the next code, over all codes of the level.

        A search asks level after level, from the first.

        Shapes: rows [n], prefix [n, level], parents [n] -> [n, codes of the level]

        Args:
            level: Which code comes next, from 0.
            rows: Which request each prefix belongs to, ascending.
            prefix: The codes before it.
            parents: Where each prefix without its last code stood when the level before was asked for; on level 0 of
                no meaning.
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
    """The prefixes still in the race after some codes, in the order of their nodes; score -inf marks an empty place.

    Shapes: nodes, scores, parents [requests, beams]; codes [requests, beams, level]; dropped [requests]
    """

    nodes: Tensor
    scores: Tensor
    codes: Tensor
    parents: Tensor
    dropped: Tensor


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
        ...     def step(self, level, rows, prefix, parents):
        ...         return torch.tensor([0.1, 0.9]).log().expand(len(rows), 2)
        >>> trie = Trie.of(np.array([[0, 1], [1, 0], [1, 1]]))
        >>> search(Fair(), trie, 1, beams=2).items.tolist()
        [[3, 1]]
    """
    if beams < 1:
        raise UserError(f"A search needs at least one beam; got {beams}.")
    if living is not None:
        living.check(trie, n_requests)
    with torch.inference_mode():
        items, scores, dropped = _search(
            stepper, _Tree(trie, living, torch.device(device)), n_requests, beams, renormalise
        )
    return Found(items.clone(), scores.clone(), dropped.clone())  # outside, they are tensors like any other


def _search(
    stepper: Stepper, tree: _Tree, n_requests: int, beams: int, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    race = _start(n_requests, tree.device)
    for level in range(tree.n_levels):
        race = _step(stepper, tree, race, level, beams, renormalise)
    order = race.scores.sort(dim=1, descending=True, stable=True).indices
    scores = race.scores.gather(1, order)
    items = tree.item[race.nodes.gather(1, order)].masked_fill(scores.isneginf(), 0)
    short = (0, beams - items.shape[1])
    return functional.pad(items, short), functional.pad(scores, short, value=-torch.inf), race.dropped


def _start(n_requests: int, device: torch.device) -> _Race:
    nodes = torch.zeros(n_requests, 1, dtype=torch.int64, device=device)
    scores = torch.zeros(n_requests, 1, device=device)
    return _Race(nodes, scores, nodes.new_zeros(n_requests, 1, 0), nodes, scores.new_full((n_requests,), -torch.inf))


def _step(stepper: Stepper, tree: _Tree, race: _Race, level: int, beams: int, renormalise: bool) -> _Race:
    """Write one more code behind each prefix and keep the best."""
    scores = race.scores.flatten()
    asked = (~scores.isneginf()).nonzero()[:, 0]
    if not len(asked):
        return race
    full = len(asked) == len(scores)
    codes, exists = tree.children(level, race.nodes)
    prefix, parents = race.codes.flatten(0, 1), race.parents.flatten()
    if not full:
        prefix, parents, codes = prefix[asked], parents[asked], codes[asked]
    log_probs = stepper.step(level, asked // race.scores.shape[1], prefix, parents).to(scores.dtype)
    _check(log_probs, level, len(asked), tree.most[level])
    following = log_probs.gather(1, codes)
    if renormalise:
        valid = following.masked_fill(~(exists if full else exists[asked]), -torch.inf)
        following = (valid - valid.logsumexp(1, keepdim=True)).clamp_(max=0).nan_to_num_(-torch.inf)
    if not full:
        following = torch.full(exists.shape, -torch.inf, device=tree.device).index_copy_(0, asked, following)
    following += scores.unsqueeze(1)
    following.masked_fill_(~tree.alive(level, race.nodes, exists), -torch.inf)
    return _keep(tree, race, following.view(len(race.scores), -1), level, beams, None if full else asked)


def _check(log_probs: Tensor, level: int, n: int, most: int) -> None:
    if log_probs.ndim != 2 or log_probs.shape[0] != n or log_probs.shape[1] <= most:
        raise RetouchError(
            f"The generator gave an array of shape {tuple(log_probs.shape)} for {n} prefixes on level {level}; the "
            f"catalogue has codes up to {most} there. Generator and catalogue do not belong together."
        )
    if not float(log_probs.max()) <= 0:  # also NaN
        raise RetouchError(
            f"On level {level} the generator gave values that are no log-probabilities (above 0, or not a number). "
            "A stepper must end in log_softmax; if it does, look for weights that are not finite."
        )


def _keep(tree: _Tree, race: _Race, scores: Tensor, level: int, beams: int, asked: Tensor | None) -> _Race:
    """Keep the best candidates in the order of their nodes; among equal scores the smaller node wins."""
    requests, width = scores.shape
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
    before = race.nodes.shape[1]
    span = width // before
    places = picked // span + torch.arange(0, requests * before, before, device=tree.device).unsqueeze(1)
    nodes = tree.child(level, race.nodes.flatten()[places], picked % span)
    codes = torch.cat([race.codes.flatten(0, 1)[places], tree.code[level][nodes].unsqueeze(2)], 2)
    if asked is not None:
        places = torch.searchsorted(asked, places).clamp_(max=len(asked) - 1)
    return _Race(nodes, scores.gather(1, picked), codes, places, dropped)


class _Tree:
    """A trie and its living items as tensors."""

    def __init__(self, trie: Trie, living: Living | None, device: torch.device) -> None:
        self.device, self.living = device, None if living is None else living.tensors(device)
        self.n_levels = trie.n_levels
        self.item, self.start, self.code, self.leaf, self.most = trie.tensors(device)

    def children(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of the children of each node, padded to the widest node, and which of them are real.

        Shapes: [requests, beams] -> [requests * beams, widest] twice
        """
        begin, end = self.start[level][nodes].view(-1, 1), self.start[level][nodes + 1].view(-1, 1)
        children = begin + torch.arange(int((end - begin).max()), device=self.device)
        exists = children < end
        return self.code[level][children.clamp_(max=len(self.code[level]) - 1)], exists

    def child(self, level: int, nodes: Tensor, places: Tensor) -> Tensor:
        """Return a child of each node by its place; beyond the last it is any. Shapes: any, twice -> the same"""
        return (self.start[level][nodes] + places).clamp_(max=len(self.code[level]) - 1)

    def alive(self, level: int, nodes: Tensor, exists: Tensor) -> Tensor:
        """Return which children have an item that may be found. Shapes: as `children`."""
        if self.living is None:
            return exists
        edges = self.start[level][nodes].unsqueeze(2) + torch.arange(exists.shape[1] + 1, device=self.device)
        leaf = self.leaf[level + 1]
        counted = self.living.below(leaf[edges.clamp_(max=len(leaf) - 1)].flatten(1))
        return exists & (counted.view(len(exists), -1).diff(dim=1) > 0)
