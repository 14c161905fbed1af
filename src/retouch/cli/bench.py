"""``retouch bench``: all methods of a verb on one set, in one harness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _show

if TYPE_CHECKING:
    from ..edit._sets import Asked

__all__ = ["app"]

app = typer.Typer(help="Measure all methods of a verb on one set, in one harness.", no_args_is_help=True)
_COLUMNS = (
    *("efficacy", "paraphrase", "s_specificity", "r_specificity", "score", "score_classic", "edit_form"),
    *("instruction", "gap", "all_facts", "all_facts_instruction", "fluency", "neighbors_same"),
    *("perplexity_ratio", "seconds_per_fact", "peak_mib"),
)


@app.callback()
def _() -> None:
    """Measure all methods of a verb on one set, in one harness."""


@app.command()
def edit(
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A file of facts in any known format, several to mix them; or a suite's data folder."),
    ] = None,
    suite: Annotated[
        str, typer.Option(help="counterfact, same-subject, knowedit, zsre or sequential, from RETOUCH_DATA.")
    ] = "",
    model: Annotated[str, typer.Option(help="A folder, a hub id, a .gguf file, or smollm2.")] = "smollm2",
    methods: Annotated[str, typer.Option(help="Names, with settings if you like: rome,memit:metric=identity")] = (
        "ft-l,ft-m,rome,memit"
    ),
    n: Annotated[int, typer.Option(help="How many facts; same-subject: how many subjects.")] = 100,
    group_size: Annotated[int, typer.Option(help="Facts of one subject (same-subject): 1, 2, 4 or 8.")] = 4,
    known: Annotated[bool, typer.Option(help="Only facts whose true answer the unedited model prefers.")] = False,
    batch: Annotated[int, typer.Option(help="Facts, or groups, written into one model at once; 1: each alone.")] = 1,
    generations: Annotated[int, typer.Option(help="Generation prompts of a fact, for fluency; 0: none.")] = 2,
    instructions: Annotated[
        bool | None, typer.Option(help="Ask in five conversations too; by default with same-subject.")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Records measured at once; 0: 16 on a CPU, else 128.")] = 0,
    rows: Annotated[bool, typer.Option(help="Keep every record's numbers beside the result.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    skip_bad: Annotated[bool, typer.Option(help="Leave out records that cannot be used, and count them.")] = False,
    json_: Annotated[Path, typer.Option("--json", help="The result.")] = Path("bench-edit.json"),
) -> None:
    """Measure editing methods on real facts; an interrupted run goes on when the same command is given again."""
    from ..edit import bench
    from ..edit._sets import Asked, apart, draw
    from ..errors import UserError

    chosen = bench.parse_methods(methods, seed)
    if batch < 1 or generations < 0 or n < 1 or chunk < 0:
        raise UserError("--n and --batch must be at least 1, --generations at least 0, --chunk at least 0.")
    asked = Asked(suite, tuple(data or ()), n, group_size, known, seed, skip_bad)
    _check(asked, json_)
    from ..model import open_model

    with _show.progress():
        opened = open_model(model)
        groups = draw(opened, asked, json_)
        if suite == "sequential":
            from ..edit import sequence

            result = sequence.run_bench(
                opened, [f for g in groups for f in g], chosen, batch, json_, data=asked.name, seed=seed
            )
        else:
            ask = suite == "same-subject" if instructions is None else instructions
            wanted = bench.Bench(chosen, batch, generations, seed, ask, chunk, rows)
            result = bench.run(opened, apart(groups, batch), wanted, json_, data=asked.name)
    _shown(result, json_)


def _check(asked: Asked, out: Path) -> None:
    """Name what would fail only after the model is open, or after all the work."""
    from ..edit.facts import load
    from ..edit.suites import SIZES
    from ..errors import UserError

    if out.is_dir():
        raise UserError(f"--json {out} is a folder, and the result is a file. Choose another name.")
    if asked.suite == "same-subject" and asked.group_size not in SIZES:
        raise UserError(f"--group-size must be {', '.join(map(str, SIZES))}; got {asked.group_size}.")
    for path in asked.files():
        if not path.is_file():
            load(path)  # says what is near
    if asked.suite and not asked.files():
        asked.folder()


def _shown(result: dict[str, Any], out: Path) -> None:
    table = [[m, *(v.get(k) for k in _COLUMNS)] for m, v in result["methods"].items()]
    kept = [i for i in range(len(_COLUMNS) + 1) if i == 0 or any(row[i] is not None for row in table)]
    heads = ["method", *_COLUMNS]
    title = f"{result['n']} facts of {result['data']}"
    _show.table(title, [heads[i] for i in kept], [[row[i] for i in kept] for row in table])
    _show.say(f"Saved as {out}.")
