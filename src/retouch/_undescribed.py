"""The error for a family of models that no table describes: what is described, and how to describe another one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .errors import ModelError

__all__ = ["undescribed"]

_EXAMPLE = Path(__file__).parent / "anatomy" / "llama.yaml"
_TYPO = 2
"""Letters by which a misspelt name may differ from the one that was meant."""


def undescribed(family: str, known: Iterable[str]) -> ModelError:
    """Build the error for a family without a table.

    A described family is suggested for a misspelt name only: mixtral differs from mistral by a letter, and is another
    family.

    Args:
        family: ``config.model_type``.
        known: The families that have a table.

    Returns:
        The error, ready to be raised.

    Example:
        >>> print(str(undescribed("mixtral", ["llama", "mistral"])).split(" To describe")[0])
        No table describes the model family 'mixtral'. Described: llama, mistral.
    """
    names = sorted(known)
    near = _meant(family, names)
    hint = f" Did you mean {near!r}?" if near else ""
    return ModelError(
        f"No table describes the model family {family!r}.{hint} Described: {', '.join(names)}. To describe it, copy the "
        f"nearest table, e.g. {_EXAMPLE}, into a folder of your own as {family or 'NAME'}.yaml, set its model_types to "
        f"[{family or 'NAME'}], correct its paths, and set RETOUCH_ANATOMY to that folder. A dummy batch proves the table "
        "whenever a model is opened."
    )


def _meant(family: str, names: list[str]) -> str | None:
    """Return the described family that a misspelt name means; None for the name of another real family."""
    from transformers import CONFIG_MAPPING

    if family in CONFIG_MAPPING:
        return None
    distance, name = min((_distance(family, name), name) for name in names)
    return name if distance <= _TYPO and 2 * distance < len(family) else None


def _distance(one: str, other: str) -> int:
    """Count the letters to insert, remove or replace that turn one name into the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]
