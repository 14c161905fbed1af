"""From item texts' vectors to the codes of a catalogue: a tokeniser's codes and one last digit that tells equals apart.

A tokeniser (`rq_kmeans`, `rq_vae`, `opq`) gives items of like text like codes, so some items share all of them. The
digit counts such items. It also makes room for new items: they take the next free digit and nobody's codes change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from .. import store
from ..errors import StoreError, UserError, unknown
from .trie import Ints, Trie

if TYPE_CHECKING:
    from torch import Tensor

    from .data import Interactions
    from .new_items import Shares
    from .splits import Splits

__all__ = [
    "Catalogue",
    "Codes",
    "Fitted",
    "Tokeniser",
    "Vectors",
    "assign",
    "digit_size",
    "digits",
    "first_seen",
    "load_tokeniser",
    "sharing",
    "tokenise",
]

Vectors = NDArray[np.floating[Any]]
Codes = NDArray[np.int32]
_LEAST_DIGITS = 16


class Fitted(Protocol):
    """A tokeniser that knows a catalogue's vectors. The same vector gets the same codes, alone or in company."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many codes each level has."""
        ...

    def encode(self, vectors: Vectors) -> Codes:
        """Return the codes of each vector.

        Shapes: [items, width] -> [items, levels]
        """
        ...

    def residual_shares(self, vectors: Vectors) -> tuple[float, ...]:
        """Return for each level how much of the vectors the codes up to it do not explain, between 0 and about 1."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that makes it, by names that begin with the tokeniser's."""
        ...

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Make it again from `tensors`.

        Raises:
            StoreError: They are not those of this tokeniser.
        """
        ...

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file."""
        store.save_tensors(path, self.tensors())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StoreError: The file is missing or damaged, or holds something else.
        """
        return cls.from_tensors(store.load_tensors(path))


class Tokeniser(Protocol):
    """The settings of a tokeniser; fitting gives what encodes."""

    def fit(self, vectors: Vectors, seed: int = 0) -> Fitted:
        """Learn codes from the vectors of items.

        Shapes: [items, width]
        """
        ...


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Hold the codes of all items, and the tree of them.

    Args:
        codes: Row i - 1 holds the codes of item i, the digit last; [items, levels].
        sizes: How many codes there may be on each level.
        trie: The tree of these codes.
        n_trained: Items up to this number are those that the recommender was trained on; later ones are new.
    """

    codes: Ints
    sizes: tuple[int, ...]
    trie: Trie
    n_trained: int

    @classmethod
    def of(cls, codes: NDArray[np.integer], sizes: Sequence[int], n_trained: int | None = None) -> Catalogue:
        """Make a catalogue of codes that tell all items apart.

        Raises:
            UserError: Two items have the same codes, or a code is too large for its level.

        Example:
            >>> Catalogue.of(np.array([[0, 1], [2, 0]]), (3, 2)).trie.n_nodes
            (1, 2, 2)
        """
        rows: Ints = np.array(codes, np.int32)
        trie, sizes = Trie.of(rows), tuple(int(size) for size in sizes)
        if len(sizes) != rows.shape[1]:
            raise UserError(f"{len(sizes)} sizes were given for {rows.shape[1]} levels of codes.")
        for level, (most, size) in enumerate(zip(rows.max(0), sizes)):
            if most >= size:
                raise UserError(f"Level {level} has codes from 0 to {size - 1}, and an item has {most}.")
        rows.flags.writeable = False
        return cls(rows, sizes, trie, len(rows) if n_trained is None else n_trained)

    @property
    def n_items(self) -> int:
        """How many items there are."""
        return len(self.codes)

    @cached_property
    def is_new(self) -> NDArray[np.bool_]:
        """Tell for each item number whether it came after the training; [items + 1]."""
        return np.arange(self.n_items + 1) > self.n_trained

    @cached_property
    def shares(self) -> Shares:
        """What the last digit of new items, which was never trained, is worth; see `new_items`."""
        from .new_items import Shares

        return Shares.of(self)

    def grown(self, codes: NDArray[np.integer]) -> Catalogue:
        """Add new items; the codes of those that are there stay as they are.

        Args:
            codes: What the tokeniser says of the new items, without digit; [new items, levels - 1]. Each takes the next
                free digit, in this order.

        Returns:
            The larger catalogue; the new items have the numbers after the old ones.

        Raises:
            UserError: A group of items with equal codes outgrew the digit.
        """
        codes = np.asarray(codes, np.int32)
        if codes.ndim != 2 or codes.shape[1] != len(self.sizes) - 1:
            raise UserError(f"New items need {len(self.sizes) - 1} codes each; got an array of shape {codes.shape}.")
        known = np.concatenate([self.codes[:, :-1], codes])
        groups = _groups(known)
        taken = np.full(groups.max() + 1, -1, np.int64)
        np.maximum.at(taken, groups[: self.n_items], self.codes[:, -1])
        new = groups[self.n_items :]
        digit = taken[new] + 1 + _ranks(new, np.arange(len(new)))
        _fits(int(digit.max(initial=0)), self.sizes[-1])
        larger = np.concatenate([self.codes, np.column_stack([codes, digit]).astype(np.int32)])
        return Catalogue.of(larger, self.sizes, self.n_trained)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that makes the catalogue."""
        import torch

        numbers = torch.tensor([*self.sizes, self.n_trained], dtype=torch.int64)
        return {"catalogue.codes": torch.from_numpy(self.codes.copy()), "catalogue.sizes": numbers}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Catalogue:
        """Make the catalogue again from `tensors`.

        Raises:
            StoreError: They are not those of a catalogue.
        """
        try:
            *sizes, n_trained = tensors["catalogue.sizes"].tolist()
            return cls.of(tensors["catalogue.codes"].numpy(), sizes, n_trained)
        except (KeyError, ValueError, IndexError, UserError) as error:
            raise StoreError(
                f"These tensors are not those of a catalogue: {error}. Make the catalogue again."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the catalogue to a safetensors file."""
        store.save_tensors(path, self.tensors())

    @classmethod
    def load(cls, path: str | Path) -> Catalogue:
        """Read what `save` wrote.

        Raises:
            StoreError: The file is missing or damaged, or holds something else.
        """
        return cls.from_tensors(store.load_tensors(path, ("catalogue.codes", "catalogue.sizes")))


# ---------------------------------------------------------------- the digit


def _groups(codes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Number the groups of equal rows, in the order of their codes."""
    order = np.lexsort(codes.T[::-1])
    rows = codes[order]
    found = np.zeros(len(codes), np.int64)
    found[order] = np.append(0, np.cumsum((rows[1:] != rows[:-1]).any(1)))
    return found


def _ranks(groups: NDArray[np.int64], order: NDArray[np.integer]) -> NDArray[np.int64]:
    """Count each row's place in its group, by ascending `order`."""
    if not len(groups):
        return np.zeros(0, np.int64)
    rows = np.lexsort((order, groups))
    ordered = groups[rows]
    begin = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    found = np.zeros(len(groups), np.int64)
    found[rows] = np.arange(len(rows)) - np.repeat(begin, np.diff(np.append(begin, len(rows))))
    return found


def sharing(codes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Count for each item how many items have its codes, itself included.

    Shapes: [items, levels] -> [items]

    Example:
        >>> sharing(np.array([[0, 1], [2, 2], [0, 1]])).tolist()
        [2, 1, 2]
    """
    groups = _groups(codes)
    counted: NDArray[np.int64] = np.bincount(groups)[groups]
    return counted


def digits(codes: NDArray[np.integer], first: NDArray[Any], ids: Sequence[str]) -> Codes:
    """Count the items that share all codes: 0, 1, 2, ... in the order of their first training interaction.

    Args:
        codes: The tokeniser's codes; [items, levels].
        first: When each item was first taken in training, in any unit; infinity for never; [items].
        ids: Raw ids, which decide between equal times.

    Returns:
        The digit of each item; [items].
    """
    by_id = np.argsort(np.argsort(np.array(ids, dtype=np.str_), kind="stable"), kind="stable")
    order = np.lexsort((by_id, first))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return _ranks(_groups(codes), place).astype(np.int32)


def digit_size(largest: int) -> int:
    """Return how many digits there shall be when the largest group of equals has this many items.

    Example:
        >>> digit_size(3), digit_size(15), digit_size(16), digit_size(17)
        (16, 32, 32, 64)
    """
    return max(_LEAST_DIGITS, 1 << (2 * largest - 1).bit_length())


def _fits(digit: int, size: int) -> None:
    if digit >= size:
        raise UserError(
            f"{digit + 1} items share all codes and the last digit tells only {size} apart. "
            "Tokenise the catalogue again, which also needs a new recommender, or use more codes a level."
        )


def assign(codes: NDArray[np.integer], sizes: Sequence[int], first: NDArray[Any], ids: Sequence[str]) -> Catalogue:
    """Make a catalogue of a tokeniser's codes by adding the digit.

    Args:
        codes: The tokeniser's codes; [items, levels].
        sizes: How many codes each level has.
        first: When each item was first taken in training; see `digits`.
        ids: The items' raw ids.

    Example:
        >>> assign(np.array([[5], [5]]), (8,), np.array([2.0, 1.0]), ("a", "b")).codes.tolist()
        [[5, 1], [5, 0]]
    """
    digit = digits(codes, first, ids)
    return Catalogue.of(np.column_stack([codes, digit]), (*sizes, digit_size(int(digit.max()) + 1)))


def first_seen(data: Interactions, splits: Splits) -> NDArray[np.float64]:
    """Find when each item was first taken in training: its time, or its place in the file where there is no clock.

    Returns:
        Infinity for an item that training never sees; [items].
    """
    found = np.full(len(data.items) + 1, np.inf)
    last = np.full(len(data.users) + 1, -1, np.int64)
    np.maximum.at(last, splits.train.users, splits.train.cuts)
    passed = 0
    for user, history in enumerate(data.histories, 1):
        kept = history[: last[user] + 1]
        when = np.arange(passed, passed + len(kept)) if data.times is None else data.times[user - 1][: len(kept)]
        np.minimum.at(found, kept, when)
        passed += len(history)
    return found[1:]


# ---------------------------------------------------------------- all steps


def tokenise(
    tokeniser: Tokeniser, vectors: Vectors, first: NDArray[Any], ids: Sequence[str], seed: int = 0
) -> tuple[Fitted, Catalogue]:
    """Fit a tokeniser to the items that training sees, give all items codes, and tell equal ones apart.

    Args:
        tokeniser: Its settings.
        vectors: One row an item; [items, width].
        first: When each item was first taken in training, from `first_seen`; items with infinity are only encoded.
        ids: The items' raw ids.
        seed: Fixes every draw.

    Returns:
        The fitted tokeniser, for later items, and the catalogue.

    Raises:
        UserError: There are fewer items than codes on a level, or no item was taken in training.
    """
    seen = np.isfinite(first)
    if not len(vectors) == len(first) == len(ids):
        raise UserError(f"{len(vectors)} vectors, {len(first)} times and {len(ids)} ids were given; all must be equal.")
    fitted = tokeniser.fit(vectors[seen], seed)
    return fitted, assign(fitted.encode(vectors), fitted.sizes, first, ids)


def load_tokeniser(path: str | Path) -> Fitted:
    """Read a tokeniser that any of the fitted ones saved.

    Raises:
        StoreError: The file is missing or damaged.
        UnknownName: It holds no known tokeniser.
    """
    from .opq import FittedOPQ
    from .rq_kmeans import FittedRQKMeans
    from .rq_vae import FittedRQVAE

    kinds: dict[str, Any] = {"rq_kmeans": FittedRQKMeans, "rq_vae": FittedRQVAE, "opq": FittedOPQ}
    tensors = store.load_tensors(path)
    names = {name.partition(".")[0] for name in tensors}
    if len(names) != 1 or not names <= kinds.keys():
        raise unknown("tokeniser", " and ".join(sorted(names)), kinds)
    fitted: Fitted = kinds[names.pop()].from_tensors(tensors)
    return fitted
