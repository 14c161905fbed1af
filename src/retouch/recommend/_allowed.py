"""Which items of a bundle a request may be shown: its filters, and what the shop has run out of."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import unknown
from .answers import Filters

if TYPE_CHECKING:
    from .bundle import Bundle

__all__ = ["Allowed"]

_KEPT, _TOLD = 64, 20


class Allowed:
    """Turn filters into maps over items, and remember the latest.

    Ids that are not in the catalogue are ignored: an old list must not cost an answer. A category that no item has is an
    error: it would silently leave nothing.

    Args:
        bundle: Whose items.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._number, self._n_items = bundle.number, len(bundle.items)
        self._categories: dict[str, list[int]] = {}  # the items of each: a mask for each would be items by categories
        for i, item in enumerate(bundle.items, 1):
            for name in item.categories:
                self._categories.setdefault(name, []).append(i)
        self._masks: OrderedDict[Any, NDArray[np.bool_]] = OrderedDict()
        self._out: NDArray[np.bool_] = np.zeros(self._n_items + 1, bool)

    def out_of_stock(self, ids: Iterable[str]) -> None:
        """Replace the list of what nobody can have; unknown ids are ignored."""
        out = np.zeros(self._n_items + 1, bool)
        out[[number for raw in ids if (number := self._number(raw)) is not None]] = True
        self._out, self._masks = out, OrderedDict()

    def check(self, filters: Filters) -> None:
        """Refuse filters by categories that no item has.

        Raises:
            UnknownName: With the nearest that exist.
        """
        for name in filters.categories:
            if name not in self._categories:  # whoever asks wrongly must not keep a server busy with thousands of names
                near = (
                    difflib.get_close_matches(name, self._categories, n=_TOLD) if len(self._categories) > _TOLD else ()
                )
                raise unknown("category", name, near or [*self._categories][:_TOLD])

    def key(self, filters: Filters) -> Any:
        """Return what two filters must share to be searched together."""
        allow = None if filters.allow is None else frozenset(filters.allow)
        return frozenset(filters.categories), allow, filters.in_stock

    def mask(self, filters: Filters) -> NDArray[np.bool_]:
        """Return the items that pass, but for `hidden`; by item number, [items + 1].

        Raises:
            UnknownName: No item has a category.
        """
        key, masks = self.key(filters), self._masks
        if (found := masks.get(key)) is None:
            self.check(filters)
            found = masks[key] = self._made(filters)
            while len(masks) > _KEPT:
                masks.popitem(last=False)
        return found

    def _made(self, filters: Filters) -> NDArray[np.bool_]:
        found = np.ones(self._n_items + 1, bool)
        found[0] = False
        if filters.categories:
            named = np.zeros(self._n_items + 1, bool)
            named[[number for name in filters.categories for number in self._categories[name]]] = True
            found &= named
        if filters.allow is not None:
            named = np.zeros(self._n_items + 1, bool)
            named[[number for raw in filters.allow if (number := self._number(raw)) is not None]] = True
            found &= named
        if filters.in_stock:
            found &= ~self._out
        return found

    def hidden(self, asked: Sequence[tuple[Filters, Sequence[int]]]) -> NDArray[np.int32]:
        """Return the item numbers that each request alone must not be shown, 0 for none. Shapes: [requests, most]"""
        rows = [
            sorted({*seen, *(number for raw in filters.deny if (number := self._number(raw)) is not None)})
            for filters, seen in asked
        ]
        found = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
        for row, numbers in zip(found, rows):
            row[: len(numbers)] = numbers
        return found
