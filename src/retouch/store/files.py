"""Single files that appear in one step, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StoreError
from .manifest import refuse_inside
from .places import check_room, named, real, sibling, sweep, sync

__all__ = ["new_file", "write_json_atomic"]


@contextmanager
def new_file(path: str | Path, need_bytes: int = 0) -> Iterator[Path]:
    """Give the name of a file to write; when the ``with`` ends well, it takes the place of `path` in one step."""
    target = real(path)
    refuse_inside(target)
    if target.is_dir():
        raise StoreError(f"{target} is a folder, and a file is to be written there. Choose another name.")
    with named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target, alone=False)
    check_room(target, need_bytes)
    new = sibling(target, "new")
    try:
        with named(target, need_bytes, new):
            yield new
            sync(new)
            new.replace(target)
            sync(target.parent)
    finally:
        new.unlink(missing_ok=True)


def write_json_atomic(path: str | Path, obj: object) -> None:
    """Write one JSON file, whole or not at all.

    Raises:
        StoreError: `obj` is not strict JSON (NaN and infinity are not), or the file cannot be written.
    """
    try:
        data = (json.dumps(obj, allow_nan=False, ensure_ascii=False, indent=2) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}: cannot be stored as JSON: {error}. Pass plain, finite values.") from error
    with new_file(path, len(data)) as new:
        new.write_bytes(data)
