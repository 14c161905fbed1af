"""``retouch bench``: all methods of a verb on one set, in one harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _show

__all__ = ["app"]

app = typer.Typer(help="Measure all methods of a verb on one set, in one harness.", no_args_is_help=True)


@app.callback()
def _() -> None:
    """Measure all methods of a verb on one set, in one harness."""


@app.command()
def edit(
    data: Annotated[Path, typer.Option(help="A file of facts in any known format.")],
    model: Annotated[str, typer.Option(help="A folder, a hub id, a .gguf file, or smollm2.")] = "smollm2",
    methods: Annotated[str, typer.Option(help="Names, with settings if you like: rome,memit:metric=identity")] = (
        "ft-l,ft-m,rome,memit"
    ),
    n: Annotated[int, typer.Option(help="How many facts.")] = 100,
    known: Annotated[bool, typer.Option(help="Only facts whose true answer the unedited model prefers.")] = False,
    batch: Annotated[int, typer.Option(help="Facts written into one model at once; 1 edits each alone.")] = 1,
    generations: Annotated[int, typer.Option(help="Generation prompts of a fact, for fluency; 0: none.")] = 2,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    skip_bad: Annotated[bool, typer.Option(help="Leave out records that cannot be used, and count them.")] = False,
    json_: Annotated[Path, typer.Option("--json", help="The result.")] = Path("bench-edit.json"),
) -> None:
    """Measure editing methods on real facts; an interrupted run goes on when the same command is given again."""
    from ..edit import bench
    from ..edit.facts import disjoint, load
    from ..errors import UserError

    chosen = bench.parse_methods(methods, seed)
    if batch < 1 or generations < 0 or n < 1:
        raise UserError("--n and --batch must be at least 1, --generations at least 0.")
    facts = load(data, None if known else n, bad="skip" if skip_bad else "error")
    from ..model import open_model

    with _show.progress():
        opened = open_model(model)
        if known:
            facts = bench.known_facts(opened, facts, n)
        if batch > 1:
            facts = disjoint(facts)
        asked = bench.Bench(chosen, batch, generations, seed)
        result = bench.run(opened, facts, asked, json_, data=data.name)
    names = ["efficacy", "paraphrase", "s_specificity", "r_specificity", "score", "score_classic", "fluency"]
    names += ["perplexity_ratio", "seconds_per_fact", "peak_mib"]
    rows = [[m, *(v.get(k) for k in names)] for m, v in result["methods"].items()]
    kept = [i for i in range(len(names) + 1) if i == 0 or any(r[i] is not None for r in rows)]
    heads = ["method", *names]
    _show.table(f"{len(facts)} facts of {data.name}", [heads[i] for i in kept], [[r[i] for i in kept] for r in rows])
    _show.console().print(f"Saved as {json_}.", markup=False)
