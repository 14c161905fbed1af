"""A method's settings as flags of a command, beside the command's own options."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from ..settings import Settings

__all__ = ["EXTRA", "method_of", "settings_of"]

S = TypeVar("S", bound="Settings")
T = TypeVar("T", bound="Settings")
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
"""What a command needs so that words that are no option of its own reach `method_of`."""


def method_of(context: typer.Context, cls: type[S]) -> S:
    """Make the method of the words that are no option of the command: they are its settings."""
    from ..errors import UserError
    from ..settings import fields_of, from_flags

    settings = {f"--{f.name.replace('_', '-')}" for f in fields_of(cls)}
    options = [o for p in context.command.params for o in p.opts if o.startswith("--")]
    for word in (w.partition("=")[0].replace("_", "-") for w in context.args):
        is_setting = not word.startswith("--") or difflib.get_close_matches(word, settings, 1, 0.8)
        if not is_setting and (near := difflib.get_close_matches(word, options, 1, 0.8)):
            raise UserError(f"There is no option {word}. Did you mean {near[0]}?")
    return from_flags(cls, context.args)


def settings_of(context: typer.Context, one: type[S], other: type[T]) -> tuple[S, T]:
    """Make two settings of the words that are no option of the command; each word belongs to the one that knows it."""
    from ..errors import UserError, unknown
    from ..settings import fields_of, from_flags

    owners: dict[str, type[Settings]] = {f.name: cls for cls in (one, other) for f in fields_of(cls)}
    words: dict[type[Settings], list[str]] = {one: [], other: []}
    cls: type[Settings] | None = None
    for word in context.args:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            if (cls := owners.get(name)) is None:
                options = {o[2:] for p in context.command.params for o in p.opts if o.startswith("--")}
                raise unknown("option", word.partition("=")[0][2:], options | {n.replace("_", "-") for n in owners})
        if cls is None:
            raise UserError(f"{word!r} belongs to no option. Options are written as --name value.")
        words[cls].append(word)
    return from_flags(one, words[one]), from_flags(other, words[other])
