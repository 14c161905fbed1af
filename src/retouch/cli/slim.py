"""``retouch slim``: make a classifier slender with exits; serve, recalibrate, export or time one that is."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _show
from ._settings import EXTRA, method_of

if TYPE_CHECKING:
    from ..slim.api import Exiting, Slim
    from ..slim.base import Plan
    from ..slim.data import Task

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
    metric: Annotated[
        str | None, typer.Option(help="accuracy, f1, mcc or spearman; default: as usual for the task.")
    ] = None,
    max_train: Annotated[int | None, typer.Option(help="Training rows to keep at most.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the stages, for going on; default: in the cache.")
    ] = None,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="MODEL is slim: choose its threshold anew, without training.")
    ] = False,
    predict: Annotated[
        str | None, typer.Option(help="MODEL is slim: answer the texts of a file, a line each; - is stdin.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Texts at once (--predict).")] = 32,
    export: Annotated[Path | None, typer.Option(help="MODEL is slim: write ONNX stages to this folder.")] = None,
    cuts: Annotated[str, typer.Option(help="Blocks after which a stage ends (--export): 1,3.")] = "",
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise the export; compared on the texts of --calib.")
    ] = False,
    keep_refused: Annotated[bool, typer.Option("--keep-refused", help="Save even so, never leaving early.")] = False,
    html: Annotated[Path | None, typer.Option(help="A report with pictures.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the slim model.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Results for programs.")] = False,
) -> None:
    """Make a classifier a fraction of its size, with an exit after every block, within a stated cost and risk.

    Example: retouch slim minilm --train train.tsv --params 1/8 --flops 1/19 -o small
    """
    from ..errors import UserError

    if predict is not None:
        _predict(model, predict, batch)
        return
    if export is not None:
        _export(model, export, cuts, int8, calib, json_)
        return
    from ..slim.api import Exiting
    from ..slim.base import Budget

    exiting = Exiting(rule, every, min_block, True, loss, "original", how, delta)
    if recalibrate:
        _no_settings(context)
        _recalibrate(model, calib or train, flops, max_harm, exiting, out or Path(model), keep_refused, json_)
        return
    if train is None:
        raise UserError("--train is missing: the rows that the slim model learns from. See retouch slim --help.")
    if out is None:
        raise UserError("-o FOLDER is missing: where the slim model is to be.")
    _free(out)
    from .. import registry

    chosen = method_of(context, registry.load("slim", method))
    budget = Budget(params, flops, max_harm, max_drop, cost)
    from ..slim.api import fit

    with _show.progress():
        made = fit(
            model, train, valid, calib, test, budget=budget, method=chosen, exiting=exiting, folder=work,
            widths={k: v for k, v in {"heads": heads, "d_ff": d_ff, "rank": rank}.items() if v is not None},
            metric=metric, max_train=max_train, seed=chosen.seed, told=_planned,
        )  # fmt: skip
    if html is not None:
        from ..report import write_html
        from ..slim.pareto import report

        write_html(report(made), html)
    _shown(made, out, json_)
    made.save(out, keep_refused=keep_refused, command=shlex.join(["retouch", *sys.argv[1:]]))
    if not json_:
        _show.say(f"Saved as {out}.")
        _show.say(f'Next: echo "a text" | retouch slim {out} --predict -')


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


def _free(out: Path) -> None:
    from ..errors import UserError

    if out.exists() and not (out / "retouch.json").is_file():
        raise UserError(f"{out} exists and is no slim model of ours. Name another folder.")


def _no_settings(context: typer.Context) -> None:
    from ..errors import UserError

    if context.args:
        raise UserError(f"There is no option {context.args[0]} for a model that is slim already.")


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
        for proof in (made.threshold.certificate, made.threshold.cost_certificate):
            if proof is not None:
                _show.say(proof.sentence())
        if made.threshold.reason:
            _show.say(made.threshold.reason, "yellow")
    if made.likeness is not None:
        _show.say(made.likeness.sentence(), "" if made.likeness.alike else "yellow")


# ---------------------------------------------------------------- models that are slim


def _predict(model: str, source: str, batch: int) -> None:
    """Answer line after line, as they come: JSON Lines on stdout."""
    from ..errors import UserError
    from ..slim.predict import open_classifier

    classifier = open_classifier(model)
    if source != "-" and not Path(source).is_file():
        raise UserError(f"--predict {source}: there is no such file. Give a file with a text a line, or - for stdin.")
    with sys.stdin if source == "-" else Path(source).open(encoding="utf-8") as lines:
        ahead = 1 if source == "-" else 8
        for found in classifier.predict(_texts(lines), batch, ahead):
            sys.stdout.write(json.dumps(found.to_dict(), ensure_ascii=False) + "\n")
            sys.stdout.flush()


def _texts(lines: Any) -> Iterator[str | tuple[str, str]]:
    """Read a text a line; a tab stands between the two texts of a pair."""
    for line in lines:
        first, tab, second = line.rstrip("\r\n").partition("\t")
        yield (first, second) if tab else first


def _recalibrate(
    model: str, calib: str | None, flops: str | None, max_harm: str | None, exiting: Exiting, out: Path,
    keep_refused: bool, json_: bool,
) -> None:  # fmt: skip
    from ..errors import UserError
    from ..slim.recalibrate import recalibrated

    if calib is None:
        raise UserError("--recalibrate needs --calib: labelled rows that chose nothing else.")
    with _show.progress():
        found = recalibrated(model, calib, flops=flops, max_harm=max_harm, exiting=exiting)
    told = found.threshold.to_dict()
    if json_:
        _show.emit({"model": str(out), "threshold": told})
    else:
        _show.table(
            f"Threshold of {model}", ["threshold", "cost", "blocks run"],
            [[found.threshold.saved, found.threshold.cost, found.threshold.exit_layer]],
        )  # fmt: skip
        if found.threshold.certificate is not None:
            _show.say(found.threshold.certificate.sentence())
        if found.threshold.reason:
            _show.say(found.threshold.reason, "yellow")
    found.save(out, keep_refused=keep_refused)


def _export(model: str, folder: Path, cuts: str, int8: bool, calib: str | None, json_: bool) -> None:
    from ..errors import UserError
    from ..slim.data import read
    from ..slim.export import export
    from ..slim.predict import open_classifier
    from ..store import read_json

    classifier = open_classifier(model)
    try:
        blocks = [int(c) for c in cuts.split(",")] if cuts else None
    except ValueError:
        raise UserError(f"--cuts are block numbers with commas between, such as 1,3; got {cuts!r}.") from None
    leaves = read_json(Path(model) / "retouch.json").get("leaves")
    shares = {int(l): float(s) for l, s in leaves.items()} if leaves and blocks is None else None
    if int8 and calib is None:
        raise UserError("--int8 is compared with float32 before it is trusted: give --calib, a file of rows.")
    texts = [r.text if r.pair is None else (r.text, r.pair) for r in read(calib).examples] if int8 and calib else ()
    lost = sorted(set(classifier.network.widths.exits) - set(blocks or shares or classifier.network.widths.exits))
    if lost and not json_:
        _show.say(
            f"note: exits after blocks {', '.join(map(str, lost))} are left out; --recalibrate for the rest.", "yellow"
        )
    with _show.progress():
        made = export(
            classifier.network, classifier.tokenizer, folder, cuts=blocks, shares=shares, int8=int8, texts=texts
        )
    if json_:
        _show.emit({"folder": str(made.folder), "cuts": list(made.exits.cuts), "bytes": made.n_bytes})
    else:
        _show.say(str(made))
