"""JSON read strictly: numbers are finite, and no name is given twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import StoreError

__all__ = ["AGAIN", "parse_json", "read_json"]

AGAIN = "Copy it again from its source, or make it again."
"""What to do about a damaged file."""


def read_json(path: str | Path) -> Any:
    """Read a JSON file strictly: NaN, infinity and a name given twice are refused.

    Raises:
        StoreError: The file is missing, or is not JSON.
    """
    try:
        return parse_json(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not valid JSON: {error}. {AGAIN}") from error


def parse_json(text: str) -> Any:
    """Parse JSON as strictly as `read_json` does.

    Raises:
        ValueError: It is not JSON.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_once)


def _finite(text: str) -> float:
    if text.lstrip("-") in {"NaN", "Infinity"} or float(text) in (float("inf"), -float("inf")):
        raise ValueError(f"{text} is no finite number")
    return float(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found
