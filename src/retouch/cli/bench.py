"""``retouch bench``: all methods of a verb on one set, in one harness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _options, _show

if TYPE_CHECKING:
    from ..edit._sets import Asked

__all__ = ["app"]

app = typer.Typer(help="Measure all methods of a verb on one set, in one harness.", no_args_is_help=True)
_COLUMNS = (
    *("efficacy", "paraphrase", "s_specificity", "r_specificity", "score", "score_classic", "edit_form"),
    *("instruction", "gap", "all_facts", "all_facts_instruction", "fluency", "refused"),
    *("perplexity_ratio", "n_edits", "bound_at_edits", "ended_at_edits", "seconds_per_fact", "peak_mib"),
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
    methods: Annotated[
        str, typer.Option(help="Names, with settings if you like: rome,memit:metric=identity:blocks=3+4+5")
    ] = ("ft-l,ft-m,rome,memit"),
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
    seed: _options.Seed = 0,
    skip_bad: Annotated[bool, typer.Option(help="Leave out records that cannot be used, and count them.")] = False,
    json_: _options.Result = Path("bench-edit.json"),
) -> None:
    """Measure editing methods on real facts; an interrupted run goes on when the same command is given again."""
    from .. import registry
    from ..edit import bench
    from ..edit._sets import Asked, apart, draw
    from ..errors import UserError

    chosen = registry.parse("edit", methods, seed=seed)
    if batch < 1 or generations < 0 or n < 1 or chunk < 0:
        raise UserError("--n and --batch must be at least 1, --generations at least 0, --chunk at least 0.")
    asked = Asked(suite, tuple(data or ()), n, group_size, known, seed, skip_bad)
    idle = {"--instructions": instructions is not None, "--rows": rows, "--chunk": chunk > 0}
    if suite == "sequential" and (unused := [name for name, given in idle.items() if given]):
        raise UserError(f"{', '.join(unused)}: a sequence is measured on its way, not record by record. Leave it out.")
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
    from ..store import refuse_inside

    refuse_inside(out)
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


@app.command()
def slim(
    data: Annotated[
        str, typer.Option(help="A folder with train, valid and test files, or of a GLUE task; a data set.")
    ],
    model: Annotated[
        str, typer.Option(help="A fine-tuned classifier or a bare encoder: a folder, a hub id, or minilm.")
    ] = "minilm",
    methods: Annotated[
        str, typer.Option(help="Names, with settings if you like: costeff,static:match=flops. Default: all rivals.")
    ] = "",
    params: Annotated[str, typer.Option(help="Most parameters, as a share of the original's.")] = "1/8",
    flops: Annotated[
        str, typer.Option(help="Most FLOPs on average, likewise; thresholds are chosen by it. none: all blocks run.")
    ] = "1/19",
    seeds: Annotated[str, typer.Option(help="Each method is trained once with each: 0,1,2.")] = "0",
    max_train: _options.MaxTrain = None,
    preset: Annotated[str, typer.Option(help="fast: for a CPU; paper: as published, for a GPU.")] = "fast",
    latency: Annotated[bool, typer.Option(help="Take times, on the machine as it is.")] = True,
    draws: Annotated[int, typer.Option(help="Draws of the test rows, for standard errors.")] = 1000,
    work: Annotated[Path | None, typer.Option(help="Folder of the stages; default: in the cache.")] = None,
    html: _options.Html = None,
    json_: _options.Result = Path("bench-slim.json"),
) -> None:
    """Measure slimming methods on one task; an interrupted run goes on when the same command is given again.

    Example: retouch bench slim --data sst2 --methods costeff,static,plugged --seeds 0,1,2 --html sst2.html
    """
    from .. import registry
    from ..errors import UserError
    from ..slim import bench
    from ..slim.base import Budget
    from ..slim.opening import open_source

    chosen = registry.parse("slim", methods or bench.METHODS, preset=preset)
    asked = bench.parse_seeds(seeds)
    budget = Budget(params, None if flops == "none" else flops)
    if draws < 2:
        raise UserError(f"--draws must be at least 2; got {draws}.")
    _show.writable("--json", json_)
    _show.writable("--html", html, "matplotlib", "jinja2")
    with _show.progress():
        opened = open_source(model)
        task = bench.read_task(opened, data, max_train=max_train)
        result = bench.run(
            opened, task, chosen, budget, json_, data=data, seeds=asked, latency=latency, folder=work, html=html,
            n_draws=draws,
        )  # fmt: skip
    _shown_slim(result, json_)


def _shown_slim(result: dict[str, Any], out: Path) -> None:
    columns = (
        "quality",
        "quality_base",
        "params_ratio",
        "flops_ratio",
        "speedup",
        "exit_layer",
        "quality_auc",
        "p50_ms_b1",
    )
    kept = [c for c in columns if any(row.get(c) is not None for row in result["methods"].values())]
    table = [[name, *(row.get(c) for c in kept)] for name, row in result["methods"].items()]
    _show.table(f"{result['n']} test rows of {result['data']}", ["method", *kept], table)
    for one in result["differences"]:
        said = {"quality_at_cost": " at its FLOPs", "quality_auc": " over all costs both reach"}.get(one["metric"], "")
        _show.say(
            f"{one['method']} against {one['rival']}{said}: {one['difference']:+.4f} "
            f"(standard error {one['standard_error']:.4f}), {one['verdict']}."
        )
    missed = [name for name, row in result["methods"].items() if row["reached"] < 1]
    if missed:
        _show.say(f"The FLOPs asked for are out of reach of {', '.join(missed)}: shown without early exits.", "yellow")
    if result["latency"] and result["latency"]["noisy"]:
        _show.say("The machine was busy while times were taken: do not trust them, measure again.", "yellow")
    _show.say(f"Saved as {out}.")


@app.command()
def fuse(
    data: Annotated[
        str,
        typer.Option(
            help="A folder with a sub-folder for each domain, MMLU's layout, or text-cd (from RETOUCH_DATA), also text-cd:sst2,rte."
        ),
    ] = "text-cd",
    model: Annotated[str, typer.Option(help="The base: a folder, a hub id, a .gguf file, or smollm2.")] = "smollm2",
    methods: Annotated[
        str, typer.Option(help="Names, with settings if you like: cat,ties:density=0.5,tsv. Default: most.")
    ] = "",
    resolvers: Annotated[
        str, typer.Option(help="What stands before each method too: cr-sign,cr-subspace:beta=0.5; or none.")
    ] = "cr-sign,cr-sign:space=core,cr-subspace",
    k: Annotated[int, typer.Option("-k", help="Questions of a composed prompt: 2, 3 or 4.")] = 3,
    form: Annotated[
        str, typer.Option(help="aware: edges see composed prompts of their own domain; blind: single ones.")
    ] = "aware",
    per_edge: Annotated[int, typer.Option(help="Examples that each edge trains on; 0: all.")] = 400,
    ratios: Annotated[str, typer.Option(help="Share that the edges' models are pruned by, in turn: 0.25,0.4,0.")] = "0",
    score: _options.Score = "wanda",
    align: _options.Align = "bias",
    unpruned: Annotated[
        bool, typer.Option("--unpruned", help="Train pruned edges on the whole model too: what pruning costs.")
    ] = False,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 8,
    epochs: Annotated[float, typer.Option(help="Passes of an edge over its examples.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Examples of one step of an edge.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of the edges.")] = 1e-3,
    joint: Annotated[bool, typer.Option(help="Also train one adapter on all domains: what fusion could reach.")] = True,
    n_selection: Annotated[int, typer.Option(help="Bundles (9 prompts each) that choose the scales.")] = 6,
    n_test: Annotated[int, typer.Option(help="Bundles that measure.")] = 30,
    lams: Annotated[str, typer.Option(help="Scales that are tried.")] = "0.3,0.5,0.7,1,1.5,2,3,4.5",
    first: Annotated[int, typer.Option(help="Prompts of the first round of tuning.")] = 50,
    limit: Annotated[float, typer.Option(help="Drop of the certificate that is printed.")] = 0.2,
    chat: _options.Chat = False,
    template: Annotated[
        str,
        typer.Option(help="Wording: plain (letters), words (for small models), numbered, each, untagged, two_shot."),
    ] = "",
    work: _options.Work = None,
    seed: _options.Seed = 0,
    json_: _options.Result = Path("bench-fuse.json"),
) -> None:
    """Measure fusion methods on composed questions; an interrupted run goes on when the same command is given again.

    Example: retouch bench fuse --data text-cd --methods cat,ties,tsv --ratios 0.25,0.4,0 --json text-cd.json
    """
    from typing import get_args

    from .. import registry
    from ..errors import UserError
    from ..fuse import bench
    from ..fuse._scores import Score
    from ..fuse.prune import Align
    from ..fuse.train import LoraSettings
    from ._fuse_flags import parse_numbers, parse_resolvers, parse_suite

    chosen = registry.parse("fuse", methods or bench.METHODS, seed=seed)
    before = parse_resolvers(resolvers)
    if min(n_selection, n_test, first) < 1 or per_edge < 0:
        raise UserError("--n-selection, --n-test and --first must be at least 1, --per-edge at least 0.")
    scales, shares = parse_numbers("lams", lams), parse_numbers("ratios", ratios)
    _check_fuse(form, scales, shares, limit)
    if unpruned and not any(shares):
        raise UserError("--unpruned tells what pruning costs: give --ratios above 0 too.")
    _show.writable("--json", json_)
    suite = parse_suite(data, seed, template)
    wanted = bench.Bench(
        chosen, before, k, form, per_edge, tuple(shares),
        _options.one_of("score", score, get_args(Score)), _options.one_of("align", align, get_args(Align)), unpruned,
        LoraSettings(rank=rank, alpha=2.0 * rank, epochs=epochs, batch=batch, learning_rate=learning_rate, lean=False),
        joint, n_selection, n_test, tuple(scales), first, limit, chat, seed,
    )  # fmt: skip
    from ..model import open_model

    with _show.progress():
        result = bench.run(open_model(model), suite, wanted, json_, work)
    _shown_fuse(result, json_)


def _check_fuse(form: str, scales: list[float], shares: list[float], limit: float) -> None:
    """Name what would fail only after the model is open."""
    import math

    from ..errors import UserError

    if form not in ("aware", "blind"):
        raise UserError(f"--form must be aware or blind; got {form!r}.")
    if not all(0 < a < math.inf for a in scales) or sorted(set(scales)) != scales:
        raise UserError(f"--lams are scales above 0 that rise; got {_joined(scales)}.")
    if not all(0 <= share <= 0.85 for share in shares):
        raise UserError(f"--ratios are shares from 0 to 0.85; got {_joined(shares)}.")
    if not 0 < limit <= 1:
        raise UserError(f"--limit is a share of right answers, above 0 and at most 1; got {limit:g}.")


def _joined(numbers: list[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _shown_fuse(result: dict[str, Any], out: Path) -> None:
    columns = {"all_correct": "all", "part_correct": "parts", "single_correct": "alone", "worst_domain": "worst",
               "composition_cost": "cost", "ppl": "ppl", "lam": "scale"}  # fmt: skip
    rows = [[name, *(m.get(c) for c in columns)] for name, m in result["methods"].items()]
    _show.table(f"{result['n']:,} composed prompts of {result['data']}", ["system", *columns.values()], rows)
    if steps := result.get("transfer"):
        columns = {"base": "whole model", "pruned": "pruned", "trained": "trained", "recovered": "recovered",
                   "unpruned": "unpruned", "kept": "gain kept", "edge_mib": "edge MiB", "whole_mib": "whole MiB"}  # fmt: skip
        rows = [[name, *(m.get(c) for c in columns)] for name, m in steps.items()]
        _show.table("pruned edges, own questions one by one", ["edge", *columns.values()], rows)
    _show.say(
        "all, parts: right answers in composed prompts; alone: the same questions one by one; cost: alone less parts."
    )
    _show.say(f"Saved as {out}.")


@app.command()
def recommend(
    data: Annotated[
        Path, typer.Option(help="Atomic files, a sequence file, CSV, Parquet, or a folder with one of them.")
    ],
    model: _options.LanguageModel = "smollm2",
    methods: Annotated[
        str,
        typer.Option(help="Names, with settings if you like: sasrec,lwgr:n_books=3. Default: all rivals and controls."),
    ] = "",
    max_harm: Annotated[float, typer.Option(help="Limit of the mean harm, nats per code.")] = 0.03,
    format: _options.Format = "",
    user: _options.UserColumn = "user_id",
    item: _options.ItemColumn = "item_id",
    time: _options.TimeColumn = "timestamp",
    text: _options.TextColumns = "",
    title_map: _options.TitleMap = None,
    min_rating: _options.MinRating = None,
    min_count: _options.MinCount = 5,
    split: _options.Split = "leave-one-out",
    holdout: _options.Holdout = "users",
    tokeniser: _options.Tokeniser = "rq_kmeans",
    codes: _options.Codes = None,
    encoder: _options.Encoder = "minilm",
    allow_missing_text: _options.AllowMissingText = False,
    force: _options.Force = False,
    size: _options.Size = "small",
    reference_epochs: _options.ReferenceEpochs = 200,
    samples_per_epoch: _options.SamplesPerEpoch = None,
    dropout: _options.Dropout = 0.1,
    device: _options.Device = "cpu",
    export: Annotated[
        Path | None,
        typer.Option(help="Only write the split there, as benchmark files of RecBole, and measure nothing."),
    ] = None,
    work: _options.Work = None,
    seed: _options.Seed = 0,
    json_: _options.Result = Path("bench-recommend.json"),
) -> None:
    """Measure recommenders on one data set; an interrupted run goes on when the same command is given again.

    Example: retouch bench recommend --data ml-100k --methods popularity,sasrec,reference,lwgr --json ml-100k.json
    """
    from .. import registry
    from ..errors import UserError
    from ..model import open_model
    from ..recommend import api, bench, splits
    from ..recommend.export import write_benchmark
    from .recommend import read, reference_of, ways

    settings = reference_of(size, reference_epochs, samples_per_epoch, dropout, seed)
    chosen = registry.parse("recommend", methods or bench.METHODS, {"reference": settings}, seed=seed)
    if not max_harm > 0:
        raise UserError(f"--max-harm must be above 0, in nats per code; got {max_harm}.")
    _show.writable("--json", json_)
    how, kept = ways(split, holdout, tokeniser)
    api.check_device(device)
    asks = any(getattr(m, "knowledge", "none") not in ("text", "none") for m in chosen.values())
    with _show.progress():
        found = read(data, format, user, item, time, text, title_map, min_rating, min_count, allow_missing_text)
        if export is not None:
            written = write_benchmark(found, splits.split(found, how, kept, seed), export)
            _show.say(f"Saved as {written}: the split of {found.n_users:,} users for RecBole.")
            return
        opened = open_model(model) if asks else None
        tokens = api.Tokens(tokeniser, codes, encoder, force)
        prepared = api.prepare(found, work, tokens=tokens, how=how, holdout=kept, seed=seed)
        wanted = bench.Bench(chosen, settings, max_harm, device=device, seed=seed)
        result = bench.run(prepared, wanted, opened, json_)
    _shown_recommend(result, json_)


def _shown_recommend(result: dict[str, Any], out: Path) -> None:
    columns = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "harm", "verdict", "seconds")
    rows = [[name, *(m.get(c) for c in columns)] for name, m in result["methods"].items()]
    _show.table(f"{result['n']:,} users of {result['data']}, full ranking", ["method", *columns], rows)
    _show.say(f"Saved as {out}.")
