"""A split written as RecBole's benchmark files, so that another library trains and is measured on just our samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import store
from ..errors import UserError
from .data import Interactions
from .splits import CERTIFICATE, Samples, Splits, windows

__all__ = ["write_benchmark"]

_PARTS = ("train", "valid", "test")


def write_benchmark(data: Interactions, splits: Splits, folder: str | Path, n_history: int = 50) -> Path:
    """Write a split as files that RecBole reads with ``benchmark_filename: [train, valid, test]``.

    ``NAME`` is the folder's own name, as RecBole wants it. ``NAME.train.inter``, ``.valid.inter`` and ``.test.inter``
    have a row a sample: user, the items before the target, the target. RecBole makes no sequences of benchmark files,
    so each training target has a row of its own. ``NAME.plain.inter`` has a row for each interaction that
    `Splits.counts` counts, also the first of each history, which is nobody's target: for models without order.

    Args:
        data: The histories.
        splits: Their split.
        folder: Where to; a folder that was written so before gives way.
        n_history: How many of the latest items a row holds; RecBole's ``MAX_ITEM_LIST_LENGTH``.

    Returns:
        The folder.

    Raises:
        UserError: `n_history` is below 1, or a raw id cannot stand in such a file.
        StoreError: The folder cannot be written.
    """
    if n_history < 1:
        raise UserError(f"n_history must be at least 1; got {n_history}.")
    users, items = _names(data.users, "user"), _names([item.id for item in data.items], "item")
    target = Path(folder)
    name = target.resolve().name
    with store.writing(target) as place:
        for part in _PARTS:
            head = ("user_id:token", "item_id_list:token_seq", "item_id:token")
            _write(place / f"{name}.{part}.inter", head, _rows(data, splits.of(part), users, items, n_history))
        _write(place / f"{name}.plain.inter", ("user_id:token", "item_id:token"), _plain(data, splits, users, items))
    return target


def _names(ids: Sequence[str], kind: str) -> Sequence[str]:
    """Return ids as they are; blanks part the ids of a list and tabs the columns."""
    bad = next((i for i in ids if not i or i.split() != [i] or '"' in i), None)
    if bad is not None:
        raise UserError(
            f"The {kind} id {bad!r} is empty or has a blank or a quote in it, and RecBole's files use them."
        )
    return ids


def _rows(
    data: Interactions, samples: Samples, users: Sequence[str], items: Sequence[str], n_history: int
) -> Iterator[tuple[str, str, str]]:
    for user, window, target in zip(samples.users, *windows(data, samples, n_history)):
        yield users[user - 1], " ".join(items[i - 1] for i in window[window > 0]), items[target - 1]


def _plain(data: Interactions, splits: Splits, users: Sequence[str], items: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Give what is trained on, with the first interaction of each history, which is no target but counts."""
    for user, taken in zip(users, _counted(data, splits)):
        for item in taken:
            yield user, items[item - 1]


def _counted(data: Interactions, splits: Splits) -> Iterator[NDArray[np.int32]]:
    """Cut each history to what `Splits.counts` has counted."""
    n = splits.activity.copy()
    n[splits.constraint.users - 1] -= 1  # its last training target feeds the constraint alone
    if splits.holdout == "users":
        n[splits.roles == CERTIFICATE] = 0
    for history, length in zip(data.histories, n):
        yield history[:length]


def _write(path: Path, head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines("\t".join(row) + "\n" for row in (head, *rows))
