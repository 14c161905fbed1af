"""Every error that Retouch raises on purpose, and the exit code that the command line gives it.

RetouchError                     1
├── UserError                    2   the input is at fault; the message says what, where and what to do
│   ├── UnknownName                  a method, model or file that does not exist, with the nearest known one
│   ├── SettingsError                a method's field has a value that it does not allow
│   ├── FactError                    a fact or a line of a data file cannot be used
│   ├── ModelError                   the model cannot be opened or is not supported
│   ├── StoreError                   a saved folder is damaged, incomplete, hostile, or cannot be written
│   │   └── WrongBase                a change was planned for another model
│   └── StoreDown                    a knowledge store cannot be reached, or does not answer in time
├── BoundRefused                 3   the certificate exceeds the stated limit, or nothing keeps within it
├── SolveError                   1   a linear system is singular or ill-conditioned
└── NoEffect                     1   a change was applied and the model did not become what was planned
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "BoundRefused",
    "FactError",
    "ModelError",
    "NoEffect",
    "RetouchError",
    "SettingsError",
    "SolveError",
    "StoreDown",
    "StoreError",
    "UnknownName",
    "UserError",
    "WrongBase",
    "absent",
    "unknown",
]


class RetouchError(Exception):
    """The root: catch this to catch everything that Retouch raises on purpose."""

    exit_code = 1


class UserError(RetouchError):
    """The input is at fault."""

    exit_code = 2


class UnknownName(UserError):
    """A name that is not known here."""


class SettingsError(UserError):
    """A setting has a value that its field does not allow."""


class FactError(UserError):
    """A fact, or a line of a data file, cannot be used."""


class ModelError(UserError):
    """A model cannot be opened, or Retouch does not support it."""


class StoreError(UserError):
    """A saved folder is damaged, incomplete or hostile, or cannot be written."""


class StoreDown(UserError):
    """A knowledge store cannot be reached, or does not answer in time."""


class WrongBase(StoreError):
    """A change was planned for another model than the one at hand."""


class BoundRefused(RetouchError):
    """The certified harm exceeds the limit that was asked for, or nothing was found that keeps within it."""

    exit_code = 3


class SolveError(RetouchError):
    """A linear system is singular or too ill-conditioned to trust."""


class NoEffect(RetouchError):
    """A change was applied, and the weights or the answers did not change as planned."""


def unknown(what: str, name: str, known: Iterable[str], see: str = "") -> UnknownName:
    """Build the error for a name that is not in a list, with the nearest names of that list.

    Args:
        what: What kind of thing the name was to be, e.g. ``"edit method"``.
        name: What was asked for.
        known: The names that exist.
        see: A command that lists them.

    Returns:
        The error, ready to be raised.

    Example:
        >>> print(unknown("edit method", "memitt", ["memit", "rome"]))
        No edit method is called 'memitt'. Did you mean 'memit'? Known: memit, rome.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    tail = f" See: {see}" if see else ""
    return UnknownName(f"No {what} is called {name!r}.{hint} Known: {', '.join(names) or 'none'}.{tail}")


def absent(path: Path) -> UserError:
    """Build the error for a file that is not there, or is a folder, with the nearest name that is."""
    if path.is_dir():
        return UserError(f"{path} is a folder. Name a file in it.")
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return UserError(f"There is no file or folder {str(path)!r}.{f' Did you mean {near[0]!r}?' if near else ''}")
