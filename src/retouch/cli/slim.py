"""``retouch slim``: make a classifier slender with exits; serve, recalibrate, export or time one that is."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _options, _show
from ._settings import EXTRA, method_of

if TYPE_CHECKING:
    from ..slim.api import Exiting, Slim
    from ..slim.base import Plan
    from ..slim.data import Task
    from ..slim.thresholds import Threshold

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(context_settings=EXTRA)(slim)


def slim(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A fine-tuned classifier or a bare encoder: a folder, a hub id, or minilm.")
    ],
    train: Annotated[
        str | None, typer.Option(help="TSV, CSV, JSONL or Parquet; a folder with splits; or a hub data set.")
    ] = None,
    valid: Annotated[str | None, typer.Option(help="Rows that choose states; default: drawn from train.")] = None,
    calib: Annotated[str | None, typer.Option(help="Rows that choose thresholds; default: drawn from train.")] = None,
    test: Annotated[str | None, typer.Option(help="Rows that are only measured on.")] = None,
    params: Annotated[str | None, typer.Option(help="Most parameters, as a share of the original's: 1/8.")] = None,
    flops: Annotated[
        str | None, typer.Option(help="Most FLOPs on average, likewise: 1/19. Exits make up what widths do not.")
    ] = None,
    max_harm: Annotated[
        str | None, typer.Option(help="Largest certified harm, 0 to 1; more is refused with exit code 3.")
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="In place of sizes: the smallest model that loses at most this.")
    ] = None,
    method: Annotated[str, typer.Option(help="See: retouch methods slim. Its settings are flags too.")] = "costeff",
    rule: Annotated[
        str, typer.Option(help="entropy, max_prob, margin, patience; on a regression delta or patience.")
    ] = "",
    loss: Annotated[str, typer.Option(help="What counts as harm: gap, worse or flip.")] = "gap",
    how: Annotated[str, typer.Option(help="How harm is certified: ucb, ltt or crc.")] = "ucb",
    delta: Annotated[float, typer.Option(help="Probability of a wrong certificate.")] = 0.1,
    every: Annotated[int, typer.Option(help="Ask only exits after every so many blocks, and the last.")] = 1,
    min_block: Annotated[int, typer.Option(help="The first block whose exit is asked, from 0.")] = 0,
    cost: Annotated[
        str, typer.Option(help="What --flops is a share of when thresholds are chosen: flops or seconds.")
    ] = "flops",
    heads: Annotated[int | None, typer.Option(help="Fixes the heads of every block.")] = None,
    d_ff: Annotated[int | None, typer.Option("--d-ff", help="Fixes the MLP neurons of every block.")] = None,
    rank: Annotated[int | None, typer.Option(help="Fixes the embedding's rank; 0 leaves the table whole.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="What columns of the rows are called: text=review,label=stars; text2 of pairs.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="accuracy, f1, mcc or spearman; default: as usual for the task.")
    ] = None,
    max_train: _options.MaxTrain = None,
    work: _options.Stages = None,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="MODEL is slim: choose its threshold anew, without training.")
    ] = False,
    predict: Annotated[
        str | None, typer.Option(help="MODEL is slim: answer the texts of a file, a line each; - is stdin.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Texts at once (--predict).")] = 32,
    export: Annotated[Path | None, typer.Option(help="MODEL is slim: write ONNX stages to this folder.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="MODEL is slim: time it, and the export that --export names, on --test.")
    ] = False,
    cuts: Annotated[str, typer.Option(help="Blocks after which a stage ends (--export): 1,3.")] = "",
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise the export; compared on the texts of --calib.")
    ] = False,
    keep_refused: Annotated[bool, typer.Option("--keep-refused", help="Save even so, never leaving early.")] = False,
    html: _options.Html = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the slim model.")] = None,
    json_: _options.Json = False,
) -> None:
    """Make a classifier a fraction of its size, with an exit after every block, within a stated cost and risk.

    Example: retouch slim minilm --train train.tsv --params 1/8 --flops 1/19 -o small
    """
    from ..errors import UserError

    if (measure or predict is not None or export is not None or recalibrate) and not _speaks():
        return
    _only(context)
    called = _columns(columns)
    if measure:
        _measure(model, test, export, called, json_)
        return
    if predict is not None:
        _predict(model, predict, batch)
        return
    if export is not None:
        _export(model, export, cuts, int8, calib, called, keep_refused, json_)
        return
    from ..slim.api import Exiting
    from ..slim.base import Budget

    exiting = Exiting(rule, every, min_block, True, loss, "original", how, delta)
    if recalibrate:
        _recalibrate(model, calib, called, flops, max_harm, exiting, out, keep_refused, json_)
        return
    if train is None:
        raise UserError("--train is missing: the rows that the slim model learns from. See retouch slim --help.")
    if out is None:
        raise UserError("-o FOLDER is missing: where the slim model is to be.")
    _free(out)
    _show.writable("--html", html, "matplotlib", "jinja2")
    from .. import registry

    chosen = method_of(context, registry.load("slim", method))
    if chosen.name == "linear":
        raise UserError("The method linear is a yardstick and is not saved: compare with it in retouch bench slim.")
    budget = Budget(params, flops, max_harm, max_drop, cost)
    from ..slim.api import fit

    speaks = _speaks()
    with _show.progress() if speaks else nullcontext():
        made = fit(
            model, train, valid, calib, test, budget=budget, method=chosen, exiting=exiting, folder=work,
            widths={k: v for k, v in {"heads": heads, "d_ff": d_ff, "rank": rank}.items() if v is not None},
            columns=called, metric=metric, max_train=max_train, seed=chosen.seed, keep_refused=keep_refused,
            told=_planned if speaks else None,
        )  # fmt: skip
    if not speaks:
        return
    _shown(made, out, json_)
    made.save(out, keep_refused=keep_refused, command=_command())
    if html is not None:
        from ..report import write_html
        from ..slim.pareto import report

        write_html(report(made), html)
    if not json_:
        _show.say(f"Saved as {out}.")
        text = 'printf "a text\\tanother\\n"' if made.classifier.pairs else 'echo "a text"'
        _show.say(f"Next: {text} | {_show.command('slim', out, '--predict', '-')}")


def _columns(text: str | None) -> dict[str, str] | None:
    """Read ``text=review,label=stars``."""
    from ..errors import UserError

    if text is None:
        return None
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and column.strip() for name, _, column in parts):
        raise UserError(f"--columns says what text, text2 and label are called: text=review,label=stars; got {text!r}.")
    return {name.strip(): column.strip() for name, _, column in parts}


def _command() -> str:
    return shlex.join(["retouch", *sys.argv[1:]])


def _speaks() -> bool:
    """Say whether this process writes and speaks: of those of an `accelerate launch` the main one alone."""
    from ..slim.processes import state

    return bool(state().is_main_process)


def _planned(plan: Plan, task: Task) -> None:
    """Say on stderr what will be trained, before it is."""
    w = plan.widths
    rank = "the embedding whole" if w.rank is None else f"rank {w.rank}"
    sys.stderr.write(
        f"Plan for {task.name} ({len(task.train):,} rows to train on, {len(task.valid):,} to choose states, "
        f"{len(task.calib):,} to choose thresholds, {len(task.test):,} to measure on): {w.heads[0]} of {plan.size.heads} heads, "
        f"{w.d_ff[0]} of {plan.size.d_ff} neurons a block, {rank}; 1/{1 / plan.params_ratio:.3g} of the parameters, "
        f"1/{1 / plan.flops_ratio:.3g} of the FLOPs at full depth, {plan.mean_depth:.2f} of {plan.size.blocks} blocks on average.\n"
    )


def _free(out: Path, mark: str = "retouch.json", what: str = "slim model of ours") -> None:
    """Refuse a place where a folder cannot be saved, before any work; one of the same kind may give way."""
    from ..errors import UserError
    from ..store import read_json, refuse_place

    refuse_place(out)
    record = read_json(out / mark) if (out / mark).is_file() else None
    ours = isinstance(record, dict) and (mark != "retouch.json" or record.get("kind") == "slim")
    if out.exists() and not ours and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is no {what}. Name another folder.")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"{out} cannot be made: {above} is no folder that can be written. Name another place.")


_JOBS = {
    "measure": {"test", "export", "columns"},
    "predict": {"batch"},
    "export": {"cuts", "int8", "calib", "columns", "keep_refused"},
    "recalibrate": {
        *("calib", "columns", "flops", "max_harm", "rule", "loss", "how", "delta", "every", "min_block"),
        *("out", "keep_refused"),
    },
}
"""What is done with models that are slim, and which options have a say in it."""


def _only(context: typer.Context) -> None:
    """Refuse options that would do nothing."""
    from ..errors import UserError

    given = {p.name: max(p.opts, key=len) for p in context.command.params if p.name and _is_given(context, p.name)}
    job = next((name for name in _JOBS if name in given), None)
    if job is None:
        surplus, where = set(given) & {"batch", "cuts", "int8"}, "where a model is made slim"
    else:
        surplus, where = set(given) - _JOBS[job] - {job, "model", "json_"}, f"with --{job}"
        if context.args:
            raise UserError(f"There is no option {context.args[0]} for a model that is slim already.")
    if not surplus and not {"max_harm", "max_drop"} & set(given):
        surplus, where = set(given) & {"loss", "how", "delta"}, "without --max-harm or --max-drop"
    if not surplus and "flops" not in given:
        surplus, where = set(given) & {"cost"}, "without --flops"
    if surplus:
        names = ", ".join(sorted(given[name] for name in surplus))
        raise UserError(f"Leave out {names}: it changes nothing {where}.")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _shown(made: Slim, out: Path, json_: bool) -> None:
    if json_:
        _show.emit({"model": str(out), **made.to_dict()})
        return
    at, on = (
        made.point,
        {"test": "test rows", "calib": "calibration rows, which chose the threshold", "valid": "validation rows"},
    )
    size = made.plan.size
    n = sum(p.numel() for p in made.classifier.network.parameters())
    rows = [
        ["parameters", f"{round(n / made.plan.params_ratio):,}", f"{n:,}", f"1/{1 / made.plan.params_ratio:.3g}"],
        ["FLOPs a text", "1", f"{at.flops_ratio:.4f}", f"1/{1 / at.flops_ratio:.3g}"],
        ["blocks run", str(size.blocks), f"{at.exit_layer:.2f}", ""],
        [made.record["task"]["metric"], f"{made.quality_base:.4f}", f"{at.quality:.4f}", f"{at.quality_kept:.1%} kept"],
    ]
    _show.table(f"{made.method.name} on {on[made.measured_on]}", ["", "original", "slim", ""], rows)
    exits = [
        [f"after block {l}", f"{share:.1%}", "" if at.quality_at[l] is None else f"{at.quality_at[l]:.3f}"]
        for l, share in at.leaves.items()
    ]
    _show.table("Exits", ["exit", "leave here", "right there"], exits)
    if made.threshold is not None:
        _proved(made.threshold)
    if made.likeness is not None:
        _show.say(made.likeness.sentence(), "" if made.likeness.alike else "yellow")


def _proved(found: Threshold) -> None:
    for sentence in found.sentences():
        _show.say(sentence, "yellow" if sentence == found.reason else "")


# ---------------------------------------------------------------- models that are slim


def _predict(model: str, source: str, batch: int) -> None:
    """Answer line after line, as they come: JSON Lines on stdout."""
    from ..errors import UserError
    from ..slim.predict import open_classifier

    classifier = open_classifier(model)
    if source != "-" and not Path(source).is_file():
        raise UserError(f"--predict {source}: there is no such file. Give a file with a text a line, or - for stdin.")
    if isinstance(sys.stdin, TextIOWrapper):  # read as a file is, whatever the locale says
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    with sys.stdin if source == "-" else Path(source).open(encoding="utf-8-sig") as lines:
        ahead = 1 if source == "-" else 8
        for found in classifier.predict(_texts(lines), batch, ahead):
            sys.stdout.write(json.dumps(found.to_dict(), ensure_ascii=False) + "\n")
            sys.stdout.flush()


def _texts(lines: Any) -> Iterator[str | tuple[str, str]]:
    """Read a text a line; a tab stands between the two texts of a pair."""
    from ..errors import UserError

    try:
        for line in lines:
            first, tab, second = line.rstrip("\r\n").partition("\t")
            yield (first, second) if tab else first
    except UnicodeDecodeError as error:
        raise UserError(f"--predict: the texts are not UTF-8: {error.reason}. Save the file as UTF-8.") from error


def _measure(
    model: str, test: str | None, export: Path | None, called: dict[str, str] | None, json_: bool
) -> None:  # fmt: skip
    from ..errors import UserError
    from ..slim.timed import NO_ORIGINAL, timed

    if test is None:
        raise UserError("--measure needs --test: rows whose texts are like those that will be answered.")
    texts = _texts_of(test, "test", called)
    with _show.progress():
        found = timed(model, texts, export=export, n_calls=max(50, min(500, len(texts))))
    if json_:
        _show.emit({"model": model, "export": export and str(export), "note": NO_ORIGINAL, **found.to_dict()})
        return
    columns = ["", "batch", "order", "calls", "p50, ms", "p95, ms", "texts a second"]
    rows = [
        [r.model, r.batch_size, r.order.replace("_", " "), r.n_calls, r.p50_ms, r.p95_ms, r.examples_per_second]
        for r in found.rows
    ]
    _show.table(f"{len(texts):,} texts of {test}, one thread", columns, rows)
    _show.say(NO_ORIGINAL)
    if found.noisy:
        _show.say("The machine was busy while times were taken: do not trust them, measure again.", "yellow")


def _texts_of(source: str, split: str, columns: dict[str, str] | None) -> list[str | tuple[str, str]]:
    from ..slim.data import read

    return [row.text if row.pair is None else (row.text, row.pair) for row in read(source, split, columns)]


def _recalibrate(
    model: str, calib: str | None, called: dict[str, str] | None, flops: str | None, max_harm: str | None,
    exiting: Exiting, out: Path | None, keep_refused: bool, json_: bool,
) -> None:  # fmt: skip
    from ..errors import UserError
    from ..slim.recalibrate import recalibrated
    from ..store import refuse_place

    if calib is None:
        raise UserError("--recalibrate needs --calib: labelled rows that chose nothing else.")
    if out is None:
        refuse_place(model)
    else:
        _free(out)
    with _show.progress():
        made = recalibrated(model, calib, flops=flops, max_harm=max_harm, exiting=exiting, columns=called)
    found, out = made.threshold, out or Path(model)
    assert found is not None
    if json_:
        _show.emit({"model": str(out), "threshold": found.to_dict()})
    else:
        columns = ["threshold", "cost", "blocks run"]
        _show.table(f"Threshold of {model}", columns, [[found.saved, found.cost, found.exit_layer]])
        _proved(found)
    made.save(out, keep_refused=keep_refused, command=_command())


def _export(
    model: str, folder: Path, cuts: str, int8: bool, calib: str | None, columns: dict[str, str] | None,
    keep_refused: bool, json_: bool,
) -> None:  # fmt: skip
    from ..errors import UserError
    from ..slim.exporting import export_saved

    try:
        blocks = [int(c) for c in cuts.split(",")] if cuts else None
    except ValueError:
        raise UserError(f"--cuts are block numbers with commas between, such as 1,3; got {cuts!r}.") from None
    if int8 and calib is None:
        raise UserError("--int8 is compared with float32 before it is trusted: give --calib, a file of rows.")
    _free(folder, "exits.json", "export")
    with _show.progress():
        made = export_saved(
            model, folder, cuts=blocks, int8=int8, calib=calib, keep_refused=keep_refused, columns=columns
        )
    if json_:
        _show.emit(made.to_dict())
        return
    _show.say(str(made.exported))
    for note in made.notes():
        _show.say(note, "yellow" if made.stale else "")
