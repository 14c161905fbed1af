"""How often held-out examples were looked at, and what each look may err: trying until it passes is paid for.

Counts stand in the cache under a hash of the examples; they survive the process, and of looks at one time each gets its
own number. Whoever removes them begins anew, and the confidence of later certificates is no longer what they say.
"""

from __future__ import annotations

from pathlib import Path

from . import store
from .errors import StoreError, UserError

__all__ = ["count", "share"]

_FILE = "looks.json"


def count(look: str, *examples: str) -> int:
    """Count a look at held-out examples, and return its number, from 1; the same look again keeps its number.

    Call it before looking: a look that was not counted voids the confidence.

    Args:
        look: Names what is looked at and how: a key of everything that decides the true mean.
        *examples: Names the sets of examples that are looked at. Each has its own count, and the highest is returned: to
            look at a part of a set, or at it beside another one, begins no count.

    Raises:
        StoreError: A count is damaged, or cannot be written.
    """
    return max(_counted(store.cache_dir() / "attempts" / store.key(examples=name), look) for name in examples)


def share(error: float, attempt: int) -> float:
    """Return what attempt k may spend of an error, 1 / (k (k + 1)) of it: all that there may ever be spend all of it.

    Raises:
        UserError: Attempts count from 1.

    Example:
        >>> [round(share(0.06, k), 3) for k in (1, 2, 3)]
        [0.03, 0.01, 0.005]
    """
    if attempt < 1:
        raise UserError(f"Attempts count from 1; got {attempt!r}.")
    return error / (attempt * (attempt + 1))


def _counted(place: Path, look: str) -> int:
    if look not in (looks := _looks(place)):
        with store.writing(place) as folder:  # one at a time
            looks = list(dict.fromkeys([*_looks(place), look]))
            store.write_json_atomic(folder / _FILE, {"looks": looks})
    return looks.index(look) + 1


def _looks(place: Path) -> list[str]:
    if not place.is_dir():
        return []
    told = store.read_json(place / _FILE)
    looks = told.get("looks") if isinstance(told, dict) else None
    if not isinstance(looks, list) or not looks or not all(isinstance(look, str) for look in looks):
        raise StoreError(f"{place} holds no count of attempts. Restore it: without it the confidence is not known.")
    return looks
