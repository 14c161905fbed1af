"""Which items may be recommended, and in which order a shop wants them.

The first is hard and exact: a map over items, the same for all requests, and the items that one request hides, as a
rule those that the user has seen. Both take part in the search, so that it never spends a beam on what cannot be shown.
The second comes after the search: it moves what was found, says what it moved, and proves nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..settings import Settings, setting
from .trie import Ints, Trie

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .base import Item

__all__ = ["Living", "Ranked", "Rules", "allowed", "rerank"]


# ---------------------------------------------------------------- hard filters


def allowed(
    items: Sequence[Item],
    *,
    categories: Collection[str] = (),
    allow: Collection[str] | None = None,
    deny: Collection[str] = (),
) -> NDArray[np.bool_]:
    """Say which items pass a filter by category and by lists of raw ids.

    Args:
        items: The catalogue; item i stands at place i - 1.
        categories: An item needs one of these; empty: any.
        allow: Only these ids; None: all.
        deny: Not these ids, such as what is out of stock.

    Returns:
        By item number, number 0 is never allowed; [items + 1].

    Raises:
        UserError: A category or id is not in the catalogue.
    """
    _known("category", categories, {name for item in items for name in item.categories})
    ids = {item.id for item in items}
    _known("item", {*(allow or ()), *deny}, ids)
    wanted, passing, out = set(categories), ids if allow is None else set(allow), set(deny)
    rows = [item.id in passing - out and (not wanted or not wanted.isdisjoint(item.categories)) for item in items]
    return np.array([False, *rows])


def _known(what: str, names: Collection[str], known: Collection[str]) -> None:
    if missing := sorted(set(names) - set(known)):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"A filter names {what} {', '.join(map(repr, missing[:3]))}{more}, and the catalogue has none such."
        )


@dataclass(frozen=True, eq=False)
class Living:
    """Hold which items of a catalogue each request may find.

    Args:
        sums: How many allowed leaves stand before each leaf; [items + 1].
        hidden: Places of allowed leaves that a request must not find, ascending, filled up with the number of items;
            [requests, most], or None.
    """

    sums: Ints
    hidden: Ints | None = None

    @classmethod
    def of(
        cls, trie: Trie, allowed: NDArray[np.bool_] | None = None, seen: NDArray[np.integer] | None = None
    ) -> Living:
        """Prepare filters for a search.

        Args:
            trie: The catalogue's codes.
            allowed: By item number; [items + 1]. None: all items.
            seen: Item numbers that each request hides, 0 for none, in any order; [requests, any].

        Raises:
            UserError: A shape or an item number does not belong to this catalogue.
        """
        n = trie.n_items
        if allowed is None:
            allowed = np.ones(n + 1, bool)
        if allowed.shape != (n + 1,):
            raise UserError(
                f"A filter over {n} items needs {n + 1} entries, the first for no item; got {allowed.shape}."
            )
        leaves = allowed[trie.item]
        sums = np.append(0, np.cumsum(leaves)).astype(np.int32)
        return cls(sums, None if seen is None else _hidden(trie, leaves, seen))

    def check(self, trie: Trie, n_requests: int) -> None:
        """Refuse filters that were made for something else.

        Raises:
            UserError: They belong to another catalogue or number of requests.
        """
        if len(self.sums) != trie.n_items + 1:
            raise UserError(f"These filters are for {len(self.sums) - 1} items, and the catalogue has {trie.n_items}.")
        if self.hidden is not None and len(self.hidden) != n_requests:
            raise UserError(f"These filters are for {len(self.hidden)} requests, and {n_requests} are searched.")

    def tensors(self, device: torch.device) -> _LivingTensors:
        """Return the filters where a search runs."""
        import torch

        sums = torch.from_numpy(self.sums).to(device=device, dtype=torch.int64)
        if self.hidden is None or not self.hidden.shape[1]:
            return _LivingTensors(sums, None)
        return _LivingTensors(sums, torch.from_numpy(self.hidden).to(device=device, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class _LivingTensors:
    sums: Tensor
    hidden: Tensor | None

    def below(self, leaves: Tensor) -> Tensor:
        """Count the living leaves before each of these. Shapes: [requests, any] -> the same."""
        import torch

        counted = self.sums[leaves]
        return counted if self.hidden is None else counted - torch.searchsorted(self.hidden, leaves.contiguous())


def _hidden(trie: Trie, leaves: NDArray[np.bool_], seen: NDArray[np.integer]) -> Ints:
    """Turn item numbers into ascending leaves, each once; what is not alive anyway must not count twice."""
    n = trie.n_items
    if seen.ndim != 2 or (seen.size and not 0 <= seen.min() <= seen.max() <= n):
        raise UserError(f"Seen items are numbers from 1 to {n} (0 for none) in rows, one a request; got {seen.shape}.")
    at = trie.place[seen]
    at = np.where((at >= 0) & leaves[at], at, n)
    at.sort(axis=1)
    at[:, 1:][at[:, 1:] == at[:, :-1]] = n
    at.sort(axis=1)
    most = int((at < n).sum(1).max(initial=0))
    return at[:, :most].astype(np.int32)


# ---------------------------------------------------------------- rules after the search


@dataclass(frozen=True)
class Rules(Settings):
    """What a shop wants of a list beyond likelihood. It is re-ranking: the proof of the search does not cover it."""

    per_category: int = setting(0, "Most items of one category in the list; 0: any number.", ge=0)
    reserved_for_new: int = setting(0, "Places kept for new items, the last of the list.", ge=0)


@dataclass(frozen=True)
class Ranked:
    """Hold a list after the rules.

    Args:
        items: Item numbers, best first.
        scores: Log-likelihoods in nats, boosts not included.
        moved: Whether each place holds another item than the search put there.
    """

    items: tuple[int, ...]
    scores: tuple[float, ...]
    moved: tuple[bool, ...]


def rerank(
    items: Sequence[int],
    scores: Sequence[float],
    k: int,
    rules: Rules,
    *,
    categories: Mapping[int, Sequence[str]] | None = None,
    new: Collection[int] = (),
    boosts: Mapping[int, float] | None = None,
) -> Ranked:
    """Choose k items of a longer list by a shop's rules.

    Known problems: not exact; an item that the search did not find cannot enter. Search with more beams than k.

    Args:
        items: Item numbers of one request, best first; 0 is skipped.
        scores: Their log-likelihoods.
        k: How many are wanted.
        rules: The rules.
        categories: The categories of each item number.
        new: Item numbers of new items.
        boosts: Nats added to an item's score before ranking.

    Returns:
        At most k items.

    Example:
        >>> rerank([4, 7, 2], [-1.0, -2.0, -3.0], 2, Rules(reserved_for_new=1), new={2})
        Ranked(items=(4, 2), scores=(-1.0, -3.0), moved=(False, True))
    """
    found = [(int(item), float(score)) for item, score in zip(items, scores) if item]
    if not (boosts or rules.per_category or rules.reserved_for_new):
        first = found[:k]
        return Ranked(tuple(i for i, _ in first), tuple(score for _, score in first), (False,) * len(first))
    ranked = sorted(found, key=lambda pair: -(pair[1] + (boosts or {}).get(pair[0], 0.0)))
    chosen = _choose(ranked, k, rules, categories or {}, set(new))
    moved = tuple(pair != before for pair, before in zip(chosen, found))
    return Ranked(tuple(item for item, _ in chosen), tuple(score for _, score in chosen), moved)


def _choose(
    ranked: list[tuple[int, float]], k: int, rules: Rules, categories: Mapping[int, Sequence[str]], new: set[int]
) -> list[tuple[int, float]]:
    counts: Counter[str] = Counter()
    held: list[tuple[int, float]] = []

    def take(pairs: list[tuple[int, float]], most: int) -> None:
        for pair in pairs:
            names = categories.get(pair[0], ())
            full = rules.per_category and any(counts[name] >= rules.per_category for name in names)
            if len(held) < most and pair not in held and not full:
                counts.update(names)
                held.append(pair)

    fresh = [pair for pair in ranked if pair[0] in new]
    top = [pair for pair in ranked[:k] if pair[0] in new]  # these need no reserved place
    reserved = max(0, min(rules.reserved_for_new, len(fresh), k) - len(top))
    take(ranked, k - reserved)
    take(fresh, k)
    take(ranked, k)
    return held
