"""A method's fields, declared once: from them come the check, the error, the flag and the documentation.

A method is a frozen dataclass whose fields are made with `setting`. Pydantic does the checking, out of sight.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from .errors import SettingsError

__all__ = ["Field", "Settings", "fields_of", "from_flags", "setting", "with_settings"]

S = TypeVar("S", bound="Settings")


def setting(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Declare one field of a method: its default, what it is, and the bounds of its value."""
    bounds = {k: v for k, v in {"ge": ge, "gt": gt, "le": le, "lt": lt}.items() if v is not None}
    return dataclasses.field(default=default, metadata={"doc": doc, "bounds": bounds})


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting as a person reads it."""

    name: str
    type: str
    default: Any
    doc: str
    allowed: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a field that takes one of a few words; else none."""
        return tuple(self.type.split("|")) if re.fullmatch(r"[\w-]+(\|[\w-]+)+", self.type) else ()

    @property
    def written(self) -> str:
        """The default as a flag or a form takes it; empty for None."""
        if self.default is None:
            return ""
        if isinstance(self.default, tuple):
            return ",".join(map(str, self.default))
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of every dataclass whose fields are settings. A wrong value is an error when it is made.

    Raises:
        SettingsError: A field's value has the wrong type or lies outside its bounds; the message names the field.
    """

    def __post_init__(self) -> None:
        for name, adapter in _adapters(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            object.__setattr__(self, name, _check(type(self), name, adapter, value))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def fields_of(cls: type[Settings]) -> list[Field]:
    """List the settings of a method in their order of declaration."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rows = []
    for f in dataclasses.fields(cls):
        bounds: Mapping[str, float] = f.metadata.get("bounds", {})
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        allowed = " and ".join(f"{signs[k]} {v:g}" for k, v in bounds.items())
        rows.append(Field(f.name, _type_name(hints[f.name]), f.default, f.metadata.get("doc", ""), allowed))
    return rows


def with_settings(cls: type[S], values: Mapping[str, Any]) -> S:
    """Make a method from named values.

    Raises:
        SettingsError: A name is not a field of `cls`, or a value is not allowed.
    """
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingsError(f"{_name(cls)} has no setting {name!r}.{hint} Known: {', '.join(known)}.")
    return cls(**values)


def from_flags(cls: type[S], flags: Sequence[str]) -> S:
    """Make a method from command-line words such as ``--learning-rate 0.5`` or ``--faithful``.

    Raises:
        SettingsError: A word is not a flag of `cls`, has no value, or its value is not allowed.
    """
    types = {f.name: f.type for f in fields_of(cls)}
    values: dict[str, Any] = {}
    words = list(flags)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise SettingsError(f"{word!r} is not a flag. Settings are written as --name value.")
        name, given, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not given:
            alone = not words or words[0].startswith("--")
            if alone and types.get(name) != "bool":
                with_settings(cls, {} if name in types else {name: None})
                raise SettingsError(f"{word} needs a value.")
            value = "true" if alone else words.pop(0)
        values[name] = _parse(value, types.get(name, ""))
    return with_settings(cls, values)


def _parse(text: str, kind: str) -> Any:
    """Read a flag's value as its field's type wants it: a path of digits stays text, one block is a list of one."""
    import yaml

    kinds = [k for k in kind.split(" | ") if not k.startswith("tuple[")]
    is_list = text.startswith("[") or "," in text or not kinds
    if not (is_list and "tuple[" in kind) and not {*kinds} <= _NUMBERS:  # text, or one of the choices
        return text
    if is_list and "tuple[" in kind and not text.startswith("["):
        text = f"[{text}]"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):  # YAML 1.1 reads 5e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


_NUMBERS = {"int", "float", "bool", "None"}


@functools.cache
def _adapters(cls: type[Settings]) -> dict[str, Any]:
    from pydantic import ConfigDict, TypeAdapter
    from pydantic import Field as PydanticField

    hints = typing.get_type_hints(cls, include_extras=True)
    adapters = {}
    for f in dataclasses.fields(cls):
        bounds = f.metadata.get("bounds", {})
        hint: Any = hints[f.name]
        if bounds:
            hint = typing.Annotated[hint, PydanticField(**bounds, allow_inf_nan=False)]
        adapters[f.name] = TypeAdapter(hint, config=ConfigDict(strict=False, arbitrary_types_allowed=True))
    return adapters


def _check(cls: type[Settings], name: str, adapter: Any, value: Any) -> Any:
    from pydantic import ValidationError

    field = next(f for f in fields_of(cls) if f.name == name)
    try:
        if field.type == "bool" and not isinstance(value, bool):
            raise SettingsError(f"{_name(cls)}: {name} must be true or false; got {value!r}.")
        if field.type in ("int", "float") and isinstance(value, bool):  # pydantic would take True for 1
            raise SettingsError(f"{_name(cls)}: {name} must be {field.type}; got {value!r}.")
        return adapter.validate_python(value)
    except ValidationError as error:
        want = " ".join(filter(None, [field.type, field.allowed]))
        raise SettingsError(
            f"{_name(cls)}: {name} must be {want}; got {value!r}. {field.doc} (default {field.default!r})"
        ) from error


def _name(cls: type[Settings]) -> str:
    module = cls.__module__.rsplit(".", 1)[-1]
    return f"Method {module!r}" if cls.__name__.lower() == module.replace("_", "") else cls.__name__


def _type_name(hint: Any) -> str:
    """Write a type as a person does: ``int | tuple[int, ...]``; choices as ``a|b|c``."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "|".join(map(str, inside))
    names = ["..." if part is ... else _type_name(part) for part in inside]
    if origin in (typing.Union, types.UnionType):
        return " | ".join(names)
    if names:
        return f"{origin.__name__}[{', '.join(names)}]"
    return "None" if hint is type(None) else str(getattr(hint, "__name__", hint))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value
