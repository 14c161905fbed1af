"""File name = method name. Listing reads the source text, so it loads no torch.

A method of a verb is a file in that verb's folder that defines a class with a base named in `BASES`. Nothing else
has to be edited to add one.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError, unknown
from .settings import Settings, fields_of, from_flags, with_settings

__all__ = ["BASES", "Entry", "find", "load", "make", "methods", "parse"]

BASES = {
    "edit": ("EditMethod", "ValueEditMethod", "RankOneMethod", "SpreadMethod"),
    "slim": ("SlimMethod",),
    "fuse": ("FuseMethod",),
    "recommend": ("Recommender",),
}
"""The base classes of each verb's methods."""


@dataclass(frozen=True)
class Entry:
    """A method as a list shows it."""

    verb: str
    name: str
    class_name: str
    summary: str
    doc: str

    @property
    def source(self) -> str:
        """The ``Source:`` paragraph of the docstring."""
        _, _, rest = self.doc.partition("Source:")
        return " ".join(rest.strip().split("\n\n")[0].split())


@functools.cache
def methods(verb: str) -> tuple[Entry, ...]:
    """List the methods of a verb, by name.

    Raises:
        UnknownName: There is no such verb.
    """
    if verb not in BASES:
        raise unknown("verb", verb, BASES)
    classes = [
        (path, node)
        for path in sorted((Path(__file__).parent / verb).glob("[!_]*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name not in BASES[verb]
    ]
    bases = {node.name: {ast.unparse(b) for b in node.bases} for _, node in classes}

    def above(name: str) -> set[str]:
        return bases.get(name, set()).union(*(above(b) for b in bases.get(name, ())))

    entries = []
    for path, node in classes:
        if above(node.name) & set(BASES[verb]):  # a method may also be a method's variant
            doc = ast.get_docstring(node) or ""
            entries.append(Entry(verb, path.stem, node.name, " ".join(doc.split("\n\n")[0].split()), doc))
    return tuple(entries)


def find(verb: str, name: str) -> Entry:
    """Find a method by name; ``-`` and ``_`` are the same.

    Raises:
        UnknownName: With the nearest name that exists.
    """
    entries = {e.name: e for e in methods(verb)}
    if (key := name.strip().lower().replace("-", "_")) not in entries:
        raise unknown(f"{verb} method", name, entries, f"retouch methods {verb}")
    return entries[key]


def load(verb: str, name: str) -> type[Any]:
    """Import a method's class."""
    entry = find(verb, name)
    module = importlib.import_module(f"retouch.{verb}.{entry.name}")
    cls: type[Any] = getattr(module, entry.class_name)
    return cls


def make(verb: str, name: str, **settings: Any) -> Any:
    """Make a method with its settings checked."""
    return with_settings(load(verb, name), settings)


def parse(verb: str, text: str, like: Mapping[str, Settings] | None = None, **defaults: Any) -> dict[str, Any]:
    """Read ``rome,memit:metric=identity:blocks=3+4+5`` as methods with settings; ``+`` joins the parts of a tuple.

    Args:
        verb: Whose methods they are.
        text: Names with settings, commas between.
        like: Settings of a method by its name, for what its words do not say.
        **defaults: Settings of all of them where they do not say otherwise, such as ``seed``.

    Returns:
        The methods, by the words that named them.

    Raises:
        UnknownName: No such method.
        SettingsError: A setting is unknown or not allowed.
        UserError: No method is named, or one twice, or a comma stands inside a setting.
    """
    common = [word for name, value in defaults.items() for word in (f"--{name}", str(value))]
    taken = {n: [f"--{k}={v}" for k, v in s.to_dict().items() if v is not None] for n, s in (like or {}).items()}
    found: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, *settings = item.split(":")
        if item in found:
            raise UserError(f"Method {item!r} is named twice.")
        if found and name.isdecimal():
            raise UserError(f"{name!r} is no method. In a setting of several parts write + between them: blocks=3+4+5.")
        cls = load(verb, name)
        tuples = {f.name for f in fields_of(cls) if f.type.startswith("tuple[")}
        found[item] = from_flags(
            cls, [*common, *taken.get(name, ()), *(_flag(setting, tuples) for setting in settings)]
        )
    if not found:
        raise UserError(f"No method was named. See: retouch methods {verb}")
    return found


def _flag(setting: str, tuples: set[str]) -> str:
    name = setting.partition("=")[0].replace("-", "_")
    return f"--{setting.replace('+', ',') if name in tuples else setting}"
