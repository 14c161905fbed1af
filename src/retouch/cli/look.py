"""Commands to look around: methods, doctor, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _options, _show

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (methods, doctor, demo):
        app.command()(command)


def methods(
    verb: Annotated[str | None, typer.Argument(help="Whose methods: edit, slim, fuse or recommend.")] = None,
    name: Annotated[str | None, typer.Argument(help="One method: its settings.")] = None,
    json_: _options.Json = False,
) -> None:
    """List the methods of a verb, or one method's settings."""
    from .. import registry
    from ..settings import fields_of

    if verb and not name and verb not in registry.BASES:
        _is_method(verb)
    if verb and name:
        entry = registry.find(verb, name)
        rows = [
            [f"--{f.name.replace('_', '-')}", f.default, f.type, f.allowed, f.doc]
            for f in fields_of(registry.load(verb, name))
        ]
        if json_:
            keys = ("flag", "default", "type", "allowed", "doc")
            _show.emit({"name": entry.name, "doc": entry.doc, "settings": [dict(zip(keys, r)) for r in rows]})
            return
        _show.say(entry.doc)
        told = [
            [flag, str(default), f"{what} ({f'{kind} {allowed}'.strip()})"]
            for flag, default, kind, allowed, what in rows
        ]
        _show.table("Settings", ["flag", "default", "what"], told)
        return
    found = [e for v in ([verb] if verb else registry.BASES) for e in registry.methods(v)]
    if json_:
        _show.emit([{"verb": e.verb, "name": e.name, "summary": e.summary, "source": e.source} for e in found])
        return
    _show.table("Methods", ["verb", "name", "what it does"], [[e.verb, e.name, e.summary] for e in found])
    example = f"{found[0].verb} {found[0].name}" if verb else "edit rome"
    _show.say(f"Source, known problems and settings of one: retouch methods {example}")


def _is_method(word: str) -> None:
    """Tell where a method stands that was asked for without its verb."""
    from .. import registry
    from ..errors import UserError

    for verb in registry.BASES:
        if any(e.name == word.replace("-", "_") for e in registry.methods(verb)):
            raise UserError(f"{word!r} is a method of {verb}. See: retouch methods {verb} {word}")


def doctor(json_: _options.Json = False) -> None:
    """Tell versions, devices, the cache, and what is missing."""
    from ..edit.doctor import examine

    found = examine()
    if json_:
        _show.emit(found)
        return
    for title, values in found.items():
        _show.table(title, ["what", "value"], [[k, v] for k, v in values.items()])
    missing = [f"{k}: {v}" for k, v in found["extras and models"].items() if str(v).startswith("missing")]
    _show.say("\n".join(["", *missing]) if missing else "\nNothing is missing.")


def demo(
    what: Annotated[str, typer.Argument(help="edit or recommend.")] = "edit",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the report and what is saved.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="A decoder.")] = "smollm2",
    n: Annotated[int, typer.Option(help="Facts to edit, 1 to 14 (edit).")] = 8,
    max_harm: Annotated[float, typer.Option(help="Limit of the certificate (edit).")] = 0.05,
    data: Annotated[
        Path | None, typer.Option(help="Interactions; default: MovieLens 100K, fetched (recommend).")
    ] = None,
    json_: _options.Json = False,
) -> None:
    """See the main job of a verb on a real model in minutes: correct facts, or recommend films.

    Three sites that train and fuse: retouch fuse simulate --demo
    """
    from ..errors import unknown
    from ..report import to_terminal

    with _show.progress():
        if what == "edit":
            from ..edit.demo import tour

            report = tour(model, out, n=n, max_harm=max_harm)
        elif what == "recommend":
            from ..recommend.demo import tour as recommending

            report = recommending(out, data, model)
        else:
            raise unknown("demo", what, ("edit", "recommend"), "retouch fuse simulate --demo")
    if json_:
        _show.emit(dict(report.numbers))
        return
    _show.console().print(to_terminal(report))
    _show.say(f"The report with pictures: {out / 'report.html'}")
