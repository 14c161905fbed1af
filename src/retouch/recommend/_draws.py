"""Which targets a training with knowledge draws, how old the knowledge is, and whose history it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .splits import CERTIFICATE, Samples, windows

if TYPE_CHECKING:
    from .data import Interactions
    from .splits import Splits

__all__ = ["LAGS", "Asked", "Epoch", "Pool", "partners"]

Ints = NDArray[np.int64]

LAGS = ((0, 1, 2, 4), (0.55, 0.2, 0.15, 0.1))
"""How many items too old knowledge is in training, and how often: records are not renewed at every click."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Say whose history knowledge is made from.

    Attributes:
        data: All histories.
        splits: Decides what may be read of another user's.
        n_history: Items of a window.
        partner: Number of the user whose history stands for each user's; None: their own.
    """

    data: Interactions
    splits: Splits
    n_history: int
    partner: NDArray[np.int32] | None = None

    def windows(self, samples: Samples, lags: Ints | int = 0) -> NDArray[np.int32]:
        """Return the windows that knowledge of these targets is made from, `lags` items too old.

        At least one item is kept.

        Shapes: [samples, history]
        """
        users, cuts = samples.users, samples.cuts.astype(np.int64)
        if self.partner is not None:
            users, cuts = self.partner[users - 1], self._same_place(samples)
        late = np.maximum(cuts - lags, np.minimum(cuts, 1)).astype(np.int32)
        return windows(self.data, Samples(users, late), self.n_history)[0]

    def _same_place(self, samples: Samples) -> Ints:
        """Return where the other history is cut: as far from its end, or at the same time where a split has times."""
        assert self.partner is not None
        other = self.partner[samples.users - 1]
        times = self.data.times
        if self.splits.how == "time" and times is not None:
            when = [times[user - 1][cut] for user, cut in zip(samples.users, samples.cuts)]
            return np.array([np.searchsorted(times[o - 1], t) for o, t in zip(other, when)], np.int64)
        lengths = self.data.lengths
        return np.maximum(lengths[other - 1] - (lengths[samples.users - 1] - samples.cuts), 1)


def partners(splits: Splits, lengths: NDArray[np.integer], seed: int) -> NDArray[np.int32]:
    """Give each user another one, nobody themselves; users of the certificate stay among themselves.

    Histories of like length stand for each other, two and two: cut as far from its end, a much shorter one would have
    nothing left, and the control would be starved where it should be misled.

    Shapes: [users], user numbers
    """
    found = np.arange(1, len(splits.roles) + 1, dtype=np.int32)
    certified = splits.roles == CERTIFICATE
    for part in (np.flatnonzero(certified), np.flatnonzero(~certified)):
        drawn = np.random.default_rng((seed, 77)).random(len(part))
        by_length = part[np.lexsort((drawn, lengths[part]))]
        for pair in np.array_split(by_length, max(len(part) // 2, 1)):  # of an odd number, one group has three
            found[pair] = np.roll(pair, 1) + 1
    return found


@dataclass(frozen=True, eq=False)
class Epoch:
    """What one epoch sees.

    Attributes:
        rows: Rows of the pool, in random order.
        lags: How old knowledge is, beside `rows`.
        silent: Where knowledge is left out, beside `rows`.
    """

    rows: Ints
    lags: Ints
    silent: NDArray[np.bool_]


class Pool:
    """The targets that a training may draw.

    Of users whose history is longer than a window, knowledge is asked for a few cuts only, each with one lag, drawn
    once: the windows of a longer history have no beginning in common, and each costs a pass of the language model. Their
    other cuts take part without knowledge, so that no target is lost. Shorter histories are asked at all their cuts and
    any lag, as one pass serves them all.

    Args:
        train: All training samples.
        n_history: Items of a window.
        n_cuts: Cuts of a user with a longer history that knowledge is asked for; 0: all.
        lagged: Whether knowledge may be old.
        seed: Of what is drawn once.
        others: Whether the other cuts take part.
    """

    def __init__(
        self, train: Samples, n_history: int, n_cuts: int, lagged: bool, seed: int, others: bool = True
    ) -> None:
        random = np.random.default_rng((seed, 11))
        longest = np.zeros(int(train.users.max(initial=0)) + 1, np.int64)
        np.maximum.at(longest, train.users, train.cuts)
        long = (longest[train.users] > n_history) & (n_cuts > 0)
        read = ~long
        read[_few(train.users, np.flatnonzero(long), n_cuts, random)] = True
        rows = np.arange(len(train)) if others else np.flatnonzero(read)
        self.samples, self.read = train.take(rows), read[rows]
        self.lagged, self.seed = lagged, seed
        self.lags = np.full(len(rows), -1)
        fixed = np.flatnonzero(long[rows] & self.read)
        self.lags[fixed] = _lags(len(fixed), random) if lagged else 0

    def __len__(self) -> int:
        return len(self.samples)

    def epoch(self, number: int, cuts_per_epoch: int, dropout: float, spoken: bool = False) -> Epoch:
        """Draw an epoch: some cuts of each user, in random order; the same for the same number.

        Args:
            number: Which epoch.
            cuts_per_epoch: Cuts of each user. Where knowledge is asked for some of them only, half are such.
            dropout: Share of the targets whose knowledge is left out.
            spoken: Draw only targets that knowledge is asked for.
        """
        random = np.random.default_rng((self.seed, 15 if spoken else 12, number))
        rows = random.permutation(self._drawn(cuts_per_epoch, spoken, random))
        drawn = _lags(len(rows), random) if self.lagged else np.zeros(len(rows), np.int64)
        lags = np.where(self.lags[rows] >= 0, self.lags[rows], drawn)
        return Epoch(rows, lags, ~self.read[rows] | (random.random(len(rows)) < dropout))

    def _drawn(self, most: int, spoken: bool, random: np.random.Generator) -> Ints:
        users, read, rest = self.samples.users, np.flatnonzero(self.read), np.flatnonzero(~self.read)
        if spoken or not len(rest):
            return _few(users, read, most, random)
        mixed = np.isin(users[read], users[rest])
        known = [_few(users, read[~mixed], most, random), _few(users, read[mixed], -(-most // 2), random)]
        return np.concatenate([*known, _few(users, rest, most // 2, random)])

    def size(self, cuts_per_epoch: int, spoken: bool = False) -> int:
        """Return how many targets an epoch has."""
        return len(self._drawn(cuts_per_epoch, spoken, np.random.default_rng(0)))


def _few(users: NDArray[np.int32], rows: Ints, most: int, random: np.random.Generator) -> Ints:
    """Keep at most so many of each user's rows, drawn at random."""
    order = rows[np.lexsort((random.random(len(rows)), users[rows]))]
    if not len(order):
        return order
    begins = np.flatnonzero(np.append(True, users[order][1:] != users[order][:-1]))
    place = np.arange(len(order)) - np.repeat(begins, np.diff(np.append(begins, len(order))))
    return order[place < most]


def _lags(n: int, random: np.random.Generator) -> Ints:
    return random.choice(np.array(LAGS[0], np.int64), n, p=LAGS[1])


def balanced(groups: Sequence[Ints], n: int, random: np.random.Generator) -> list[Ints]:
    """Draw `n` rows in all, the same number of each group that has any."""
    held = sum(len(group) > 0 for group in groups)
    return [random.choice(group, n // held) if len(group) else group for group in groups]
