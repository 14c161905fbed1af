"""Commands over models that carry changes: apply, undo, log, show, diff, ask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import _options, _show

__all__ = ["add_to"]

FolderArgument = Annotated[Path, typer.Argument(help="A model folder that Retouch wrote.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (apply, undo, log, show, diff, ask):
        app.command()(command)


def apply(
    model: _options.ModelArgument,
    change: Annotated[Path, typer.Argument(help="A saved change.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the new model.")],
    dtype: Annotated[str | None, typer.Option(help="Type of the stored weights: float32, bfloat16, float16.")] = None,
    accept_loss: Annotated[bool, typer.Option(help="Store even if the type swallows part of the change.")] = False,
    superseded: Annotated[
        str | None,
        typer.Option(
            help="Facts in force that the change is about too: replace (it was planned without them) or stack (with "
            "them); by default as its own record says."
        ),
    ] = None,
    json_: _options.Json = False,
) -> None:
    """Write a new model folder that carries a change; any Hugging Face loader opens it."""
    from ..change import load
    from ..edit.api import apply_change
    from ..errors import UserError
    from ..ledger import carried, open_ledger, save_ledger, survival
    from ..store import refuse_place

    refuse_place(out)
    if superseded not in (None, "replace", "stack"):
        raise UserError(f"--superseded is replace or stack; got {superseded!r}.")
    policy: Any = superseded
    planned, there = load(change), carried(out)
    with _show.progress():
        after = apply_change(open_ledger(model), planned, policy)
        _refuse_loss(there, [e.change.id for e in after.entries], model, change, out)
        lost = survival(after, dtype, accept_loss=accept_loss)
        save_ledger(after, out, dtype=dtype, found=there)
    if json_:
        _show.emit({"model": str(out), "lost": lost, **after.to_dict()})
        return
    number = after.entries[-1].number
    _show.say(f"{out} carries {_show.count(len(after.active), 'change')} (the new one is number {number}).")
    for name, share in lost.items():
        _show.say(f"{name}: the stored type loses {share:.1%} of the change.")
    _show.say(f"Undo it: {_show.command('undo', out, number)}")


def _refuse_loss(there: list[dict[str, Any]], kept: list[str], model: str, change: Path, out: Path) -> None:
    """Refuse to put a model where another one is that carries changes which this one does not."""
    from ..errors import UserError

    lost = [line["id"] for line in there if line["status"] == "active" and line["id"] not in kept]
    if lost:
        raise UserError(
            f"{out} carries changes that {model} does not, and they would be lost: {', '.join(lost)}. Add to them: "
            f"{_show.command('apply', out, change, '-o', out)}; or name another folder."
        )


def undo(
    model: FolderArgument,
    number: Annotated[int, typer.Argument(help="Number of the change in the log.")],
    fact: Annotated[
        int | None, typer.Option(help="Only this fact of the change, counted from 0: retouch log --facts.")
    ] = None,
    resolve: Annotated[
        bool, typer.Option("--resolve", help="Solve the later changes again from their keys and targets.")
    ] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="A new folder; by default in place.")] = None,
    json_: _options.Json = False,
) -> None:
    """Take one change, or one fact of it, out of a model, bit for bit, in any order."""
    from ..ledger import carried, open_ledger, read_log, save_ledger
    from ..store import refuse_place

    refuse_place(out or model)
    read_log(model)  # no folder, or no model of ours: said before anything is opened
    there = carried(out or model)
    with _show.progress():
        ledger = open_ledger(str(model)).undo(number, fact)
        if resolve:
            from ..edit.resolve import resolve as solve_again

            ledger = solve_again(ledger, after=number if fact is None else number - 1)
        save_ledger(ledger, out or model, found=there)
    if json_:
        _show.emit({"model": str(out or model), **ledger.to_dict()})
        return
    is_base = "; the weights are the unchanged model's again, bit for bit" if not ledger.active else ""
    what = f"Change {number}" if fact is None else f"Fact {fact} of change {number}"
    _show.say(f"{what} is out of {out or model}; {len(ledger.active)} stay{is_base}.")


def log(
    model: FolderArgument,
    facts: Annotated[bool, typer.Option("--facts", help="A line for each fact.")] = False,
    json_: _options.Json = False,
) -> None:
    """List the changes that a model carries."""
    from ..entry import facts_in_words, status_in_words
    from ..ledger import read_log

    record = read_log(model)
    if json_:
        _show.emit(record)
        return
    if not record["changes"]:
        _show.say(f"No changes. {model} carries none.")
        return
    rows: list[list[Any]]
    if facts:
        columns = ["change", "fact", "prompt", "new answer", "status"]
        rows = [[c["number"], *row] for c in record["changes"] for row in _facts(c)]
    else:
        columns = ["number", "id", "method", "facts", "status", "when"]
        rows = [
            [c["number"], c["id"], c["method"], facts_in_words(c), status_in_words(c), c["when"]]
            for c in record["changes"]
        ]
    _show.table(f"Changes of {model}", columns, rows)


def _facts(line: Any) -> list[list[Any]]:
    """Rows of a change's facts by their number: those in force, and those taken out one by one."""
    from ..change import filled
    from ..entry import status_in_words

    removed = {r["fact"]: r for r in line.get("removed", ())}
    rest = iter(line["facts"])
    rows = []
    for i in range(len(line["facts"]) + len(removed)):
        fact = removed.get(i) or next(rest)
        status = (
            fact["status"] if i in removed else "superseded" if i in line.get("stale", ()) else status_in_words(line)
        )
        rows.append([i, filled(fact), fact.get("target"), status])
    return rows


def show(change: Annotated[Path, typer.Argument(help="A saved change.")], json_: _options.Json = False) -> None:
    """Show what a change holds: facts, weights, sizes, how it was made, what was measured."""
    from ..change import load, measured_facts

    loaded = load(change)
    if json_:
        _show.emit(loaded.to_dict())
        return
    _show.say(f"Change {loaded.id} by {loaded.method}, of model {loaded.base[:12]}", "bold")
    names = {"prompt": "prompt", "target": "new answer", "truth": "old answer", "before": "probability before"}
    facts = measured_facts(loaded.facts, loaded.report.get("effect", ()))
    heads = [names.get(name, name) for name in (facts[0] if facts else list(names)[:3])]
    _show.table("Facts", heads, [list(fact.values()) for fact in facts])
    weights = [[n, int(v["rank"]), v["frobenius"], v["spectral"]] for n, v in loaded.norms().items()]
    _show.table("Weights", ["weight", "rank", "Frobenius norm", "spectral norm"], weights)
    settings: list[list[Any]] = [[k, str(v)] for k, v in loaded.settings.items()]
    _show.table("Settings", ["setting", "value"], settings)
    for certificate in loaded.report.get("harm", {}).get("certificates", ()):
        _show.say(
            f"Certified {certificate['what']}: at most {certificate['upper']:.4f} (limit {certificate['limit']:g}, "
            f"confidence {certificate['confidence']:g}, n = {certificate['n']})"
        )


def diff(
    one: _options.ModelArgument,
    two: Annotated[str, typer.Argument(help="The other model.")],
    json_: _options.Json = False,
) -> None:
    """Compare two models weight by weight."""
    from ..ledger import difference
    from ..model import open_model

    with _show.progress():
        rows = difference(open_model(one), open_model(two))
    if json_:
        _show.emit({"one": one, "two": two, "weights": rows})
        return
    if not rows:
        _show.say("Every weight is equal, bit for bit.")
        return
    _show.table(
        f"{_show.count(len(rows), 'weight')} {'differs' if len(rows) == 1 else 'differ'}: norm of the difference, its share of the "
        "weight, and its largest entry",
        ["weight", "norm", "share", "largest"],
        [[r["weight"], r["frobenius"], f"{r['share']:.3%}", r["largest"]] for r in rows],
    )


def ask(
    model: _options.ModelArgument,
    text: Annotated[str, typer.Argument(help="A text to continue.")],
    change: Annotated[Path | None, typer.Option(help="A saved change: answers before and after it.")] = None,
    n_tokens: Annotated[int, typer.Option(help="New tokens.")] = 16,
    json_: _options.Json = False,
) -> None:
    """Let a model continue a text, before and after a change, side by side."""
    from ..change import load
    from ..edit.api import ask as asked
    from ..ledger import open_ledger

    planned = load(change) if change else None
    with _show.progress():
        said = asked(open_ledger(model).model, text, planned, n_tokens)
    if json_:
        _show.emit({"text": text, **said})
        return
    _show.table(text, list(said), [list(said.values())])
