"""The cache: what can be made again, in folders named by the key of all that made them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import StoreError
from .folders import put_back, replacing
from .locks import locked
from .manifest import check, check_name
from .places import real

_log = logging.getLogger(__name__)

__all__ = ["cache_dir", "cached"]


def cache_dir() -> Path:
    """Name the cache's folder: ``$RETOUCH_CACHE``, else ``$XDG_CACHE_HOME/retouch``, else ``~/.cache/retouch``."""
    if own := os.environ.get("RETOUCH_CACHE"):
        return Path(own).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "retouch"


def cached(kind: str, key: str, build: Callable[[Path], None], *, verify: bool = False) -> Path:
    """Give the folder of a cache entry, and build it first when it is absent or damaged.

    Whoever comes while an entry is built waits and then uses it. An entry may hold gigabytes, so an existing one is
    only compared by the names and sizes of its files.

    Args:
        kind: What is cached, e.g. ``"stats"``.
        key: What `key` made from all inputs.
        build: Fills the empty folder it is given.
        verify: Compare the files' hashes too.

    Raises:
        StoreError: The entry cannot be written, or the disk is full.
    """
    check_name(f"{kind}/{key}", "the cache")
    target = real(cache_dir() / kind / key)
    if _fault(target, verify) is None:
        return target
    with locked(target) as alone:
        put_back(target)
        if (fault := _fault(target, verify)) is None:
            return target
        if target.exists():
            _log.warning("built again, because the cache is damaged: %s", fault)
        with replacing(target, alone, replace=True, own=True) as folder:
            build(folder)
    return target


def _fault(target: Path, verify: bool) -> StoreError | None:
    try:
        check(target, verify)
    except StoreError as error:
        return error
    return None
