"""Which interactions are trained on, which decide, which are looked at once: splits, roles of users, windows, segments.

A sample is a user and a cut: the target is the item at the cut, the prefix is all that stands before it. Roles come
from a hash of the raw user id, so the same user has the same role in any order and any extract of equal size.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, unknown
from .data import Interactions

__all__ = ["CERTIFICATE", "CONSTRAINT", "FIT", "Holdout", "How", "Samples", "Splits", "role_numbers", "seen_pairs",
           "segments", "split", "targets", "windows"]  # fmt: skip

How = Literal["leave-one-out", "time"]
Holdout = Literal["users", "targets"]
Flags = NDArray[np.bool_]

FIT, CONSTRAINT, CERTIFICATE = "fit", "constraint", "certificate"

FEW = 5
"""Users with at most so many items to learn from are sparse; items with at most so many interactions are the tail."""

_LEAST_SPLIT, _LEAST_CONSTRAINT = 3, 5


@dataclass(frozen=True, eq=False)
class Samples:
    """Targets with the prefixes before them.

    Attributes:
        users: User numbers.
        cuts: Place of each target in its user's history, from 0; the prefix is ``history[:cut]``.
    """

    users: NDArray[np.int32]
    cuts: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.users)

    def take(self, index: NDArray[np.integer] | Flags | slice) -> Samples:
        """Keep some samples, by mask, number or slice."""
        return Samples(self.users[index], self.cuts[index])


@dataclass(frozen=True, eq=False)
class Splits:
    """Who is trained on, and with which targets.

    Attributes:
        roles: Of each user: ``fit``, ``constraint`` or ``certificate``.
        train: What cross-entropy may see.
        valid: What early stopping and choices may see.
        test: What is reported.
        constraint: Targets of constraint users that no cross-entropy sees: they feed the constraint only.
        certificate: Targets of certificate users, looked at once.
        counts: Training interactions of each item number; index 0 is 0. Kept-back users and targets do not count.
        activity: How many items of each user lie in the time that is trained on, whether they are used or not.
        how: ``leave-one-out`` or ``time``.
        holdout: Whether certificate users are kept back wholly (``users``) or only their target (``targets``).
        seed: Decides the roles.
        cut_times: The two times of ``time``: training before the first, test from the second on.
    """

    roles: NDArray[np.str_]
    train: Samples
    valid: Samples
    test: Samples
    constraint: Samples
    certificate: Samples
    counts: NDArray[np.int64]
    activity: NDArray[np.int64]
    how: How
    holdout: Holdout
    seed: int
    cut_times: tuple[int, int] | None = None

    def of(self, which: str) -> Samples:
        """Return samples by name.

        Raises:
            UnknownName: There is no such part.
        """
        known = ("train", "valid", "test", "constraint", "certificate")
        if which not in known:
            raise unknown("part of a split", which, known)
        found: Samples = getattr(self, which)
        return found

    @functools.cached_property
    def last(self) -> NDArray[np.int64]:
        """How much of each history is trained on: ``history[:last]``; 0 for users kept back wholly."""
        found = np.zeros(len(self.roles), np.int64)
        np.maximum.at(found, self.train.users - 1, self.train.cuts + 1)
        return found


# ---------------------------------------------------------------- splitting


def split(data: Interactions, how: How = "leave-one-out", holdout: Holdout = "users", seed: int = 0) -> Splits:
    """Split histories into training, validation, test, and the slices of the constraint and the certificate.

    Args:
        data: The histories.
        how: ``leave-one-out``: the last item is the test target, the one before it the validation target.
            ``time``: training lies before the 80 % quantile of all times, test from the 90 % quantile on.
        holdout: ``users``: no interaction of certificate users is trained on. ``targets``: they are trained on, and
            only their validation target is kept back; needed to compare with numbers that others publish.
        seed: Decides who has which role.

    Returns:
        All parts. Certificate users have no training sample under ``users``, constraint users none of their last
        training target.

    Raises:
        UserError: A part that is needed is empty, or ``time`` is asked for and the data has no clock.
    """
    for name, value, known in (("how", how, How), ("holdout", holdout, Holdout)):
        if value not in get_args(known):
            raise unknown(f"choice of {name}", value, get_args(known))
    users, cuts = _positions(data)
    part, activity, times = _by_time(data, cuts) if how == "time" else _by_place(data, users, cuts)
    roles = _roles(data, how, seed)
    role = roles[users - 1]
    kept = role == CONSTRAINT
    kept &= _last_of(users, part == _TRAIN)
    hidden = (role == CERTIFICATE) & (holdout == "users")
    learnt = (part == _TRAIN) | ((part == _FIRST) & (activity[users - 1] > 0))
    made = {
        "train": (part == _TRAIN) & ~kept & ~hidden,
        "valid": (part == _VALID) & (role != CERTIFICATE),
        "test": part == _TEST,
        "constraint": (part == _TRAIN) & kept,
        "certificate": (part == _VALID) & (role == CERTIFICATE),
    }
    samples = {name: Samples(users[mask], cuts[mask]) for name, mask in made.items()}
    _require(samples, how)
    counts = np.bincount(data.flat[learnt & ~kept & ~hidden], minlength=data.n_items + 1)
    return Splits(
        roles, **samples, counts=counts, activity=activity, how=how, holdout=holdout, seed=seed, cut_times=times
    )


_FIRST, _TRAIN, _VALID, _TEST = range(4)


def _positions(data: Interactions) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return user number and place in the history of every interaction."""
    users = np.repeat(np.arange(1, data.n_users + 1, dtype=np.int32), data.lengths)
    cuts = (np.arange(len(data.flat)) - np.repeat(data.starts, data.lengths)).astype(np.int32)
    return users, cuts


def _by_place(
    data: Interactions, users: NDArray[np.int32], cuts: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], None]:
    """Say what each interaction is by its distance from the end; short histories train only."""
    lengths = data.lengths
    short = lengths < _LEAST_SPLIT
    left = (lengths[users - 1] - 1) - cuts
    part = np.where(left == 0, _TEST, np.where(left == 1, _VALID, _TRAIN))
    part[short[users - 1]] = _TRAIN
    part[(cuts == 0) & (part == _TRAIN)] = _FIRST
    return part, np.where(short, lengths, lengths - 2), None


def _by_time(
    data: Interactions, cuts: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[int, int]]:
    """Say what each interaction is by its time. A first interaction has no prefix, so it is never a target."""
    times = data.flat_times
    if times is None:
        raise UserError(
            f"{data.name} has no clock: the order inside a history is known, but not what came before what across "
            "users, so it cannot be split by time. Use leave-one-out, or give data with a column of times."
        )
    first, second = (int(q) for q in np.quantile(times, (0.8, 0.9), method="higher"))
    part = np.where(times < first, _TRAIN, np.where(times < second, _VALID, _TEST))
    early = part == _TRAIN
    activity = np.add.reduceat(early.astype(np.int64), data.starts) if len(times) else np.zeros(0, np.int64)
    part[cuts == 0] = np.where(early[cuts == 0], _FIRST, -1)
    return part, activity, (first, second)


def _last_of(users: NDArray[np.int32], mask: Flags) -> Flags:
    """Mark the last interaction in the mask of each user."""
    rows = np.flatnonzero(mask)
    last = np.append(users[rows][1:] != users[rows][:-1], True) if len(rows) else np.zeros(0, bool)
    found = np.zeros(len(users), bool)
    found[rows[last]] = True
    return found


def _require(samples: dict[str, Samples], how: str) -> None:
    words = {"train": "to train on", "valid": "to stop training by", "test": "to test with"}
    for name, purpose in words.items():
        if not len(samples[name]):
            hint = "other quantiles of time or more data" if how == "time" else "users with at least 4 interactions"
            raise UserError(f"There is no interaction {purpose}; {how} needs {hint}.")


# ---------------------------------------------------------------- roles


def role_numbers(users: Sequence[str], seed: int) -> NDArray[np.float64]:
    """Hash raw user ids to numbers from 0 to 1 that decide their roles.

    Shapes: [users]

    Example:
        >>> bool(role_numbers(["ann"], 0)[0] == role_numbers(["bob", "ann"], 0)[1])
        True
    """
    words = (hashlib.blake2b(f"{seed}:{user}".encode(), digest_size=8).digest() for user in users)
    return np.fromiter((int.from_bytes(word, "big") / 2**64 for word in words), np.float64, len(users))


def _roles(data: Interactions, how: str, seed: int) -> NDArray[np.str_]:
    """Give at least a tenth and, of few users, up to three tenths to the certificate, the next tenth to the constraint."""
    x = role_numbers(data.users, seed)
    share = min(0.3, max(0.1, 1000 / max(data.n_users, 1)))
    roles = np.full(data.n_users, FIT, dtype="<U11")
    if how == "leave-one-out":
        roles[(x < share) & (data.lengths >= _LEAST_SPLIT)] = CERTIFICATE
    else:
        roles[x < share] = CERTIFICATE
    roles[(x >= share) & (x < share + 0.1) & (data.lengths >= _LEAST_CONSTRAINT)] = CONSTRAINT
    return roles


# ---------------------------------------------------------------- what samples stand for


def targets(data: Interactions, samples: Samples) -> NDArray[np.int32]:
    """Return the item number of each target.

    Shapes: [samples]
    """
    found: NDArray[np.int32] = data.flat[data.starts[samples.users - 1] + samples.cuts]
    return found


def windows(data: Interactions, samples: Samples, n_history: int = 20) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the latest items before each target, padded with 0 on the left, and the targets.

    Shapes: [samples, history] and [samples]

    Args:
        data: The histories.
        samples: Users and cuts.
        n_history: How many items a window has.
    """
    starts = data.starts[samples.users - 1]
    places = samples.cuts[:, None].astype(np.int64) + np.arange(-n_history, 0)
    found = data.flat[np.maximum(starts[:, None] + places, 0)]
    return np.where(places >= 0, found, 0).astype(np.int32), targets(data, samples)


def seen_pairs(data: Interactions, samples: Samples) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """List what stands before each target: the sample's row and the item, for every item of every prefix."""
    cuts = samples.cuts.astype(np.int64)
    rows = np.repeat(np.arange(len(samples)), cuts)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    return rows, data.flat[np.repeat(data.starts[samples.users - 1], cuts) + places]


def segments(data: Interactions, splits: Splits, samples: Samples) -> dict[str, Flags]:
    """Say to which reported groups each sample belongs.

    Returns:
        Masks over the samples: ``all``; ``sparse`` and ``active`` by how much the user did in the time trained on;
        ``tail`` (targets with at most 5 training interactions), ``head`` and ``new`` (none); ``certificate`` (users
        with that role).
    """
    counts = splits.counts[targets(data, samples)]
    sparse = splits.activity[samples.users - 1] <= FEW
    return {
        "all": np.ones(len(samples), bool),
        "sparse": sparse,
        "active": ~sparse,
        "tail": counts <= FEW,
        "head": counts > FEW,
        "new": counts == 0,
        "certificate": splits.roles[samples.users - 1] == CERTIFICATE,
    }
