"""``retouch recommend``: fit a recommender with a language model's knowledge, precompute, serve, ask, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _nearline, _options, _show
from ._settings import EXTRA, method_of

if TYPE_CHECKING:
    from ..model import Model
    from ..recommend.data import Interactions

__all__ = ["app", "read", "reference_of", "ways"]

app = typer.Typer(
    help="Let a language model's knowledge of the world help a recommender, and never harm it.", no_args_is_help=True
)

_DATA = Annotated[
    Path, typer.Argument(help="Atomic files, a sequence file, CSV, Parquet, or a folder with one of them.")
]


@app.callback()
def _() -> None:
    """Let a language model's knowledge of the world help a recommender, and never harm it."""


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="ml-100k.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder.")] = Path("ml-100k"),
) -> None:
    """Fetch a public data set that Retouch may not ship."""
    from ..recommend.fetch import SETS, fetch

    folder = fetch(name, out)
    _show.say(SETS[name])
    _show.say(f"Saved as {folder}. Next: {_show.command('recommend', 'fit', folder, '-o', 'bundle')}")


@app.command(context_settings=EXTRA)
def fit(
    context: typer.Context,
    data: _DATA,
    llm: _options.LanguageModel = "smollm2",
    max_harm: Annotated[
        float | None, typer.Option(help="Largest certified mean harm, nats per code; more is refused with exit code 3.")
    ] = None,
    format: _options.Format = "",
    user: _options.UserColumn = "user_id",
    item: _options.ItemColumn = "item_id",
    time: _options.TimeColumn = "timestamp",
    text: _options.TextColumns = "",
    title_map: _options.TitleMap = None,
    min_rating: _options.MinRating = None,
    min_count: _options.MinCount = 5,
    allow_missing_text: _options.AllowMissingText = False,
    split: _options.Split = "leave-one-out",
    holdout: _options.Holdout = "users",
    tokeniser: _options.Tokeniser = "rq_kmeans",
    codes: _options.Codes = None,
    encoder: _options.Encoder = "minilm",
    size: _options.Size = "small",
    reference_epochs: _options.ReferenceEpochs = 200,
    samples_per_epoch: _options.SamplesPerEpoch = None,
    dropout: _options.Dropout = 0.1,
    force: _options.Force = False,
    keep_refused: Annotated[bool, typer.Option("--keep-refused", help="Save even so; the reference serves.")] = False,
    device: _options.Device = "cpu",
    work: _options.Stages = None,
    html: _options.Html = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the bundle.")] = Path("bundle"),
    json_: _options.Json = False,
) -> None:
    """Train a recommender, let a language model's knowledge help it, and certify that it does no harm.

    Settings of the policy are flags too: --preset paper --n-llm-layers 8 … See: retouch methods recommend.

    Example: retouch recommend fit ml-100k --n-llm-layers 8 -o bundle
    """
    from .. import registry
    from ..recommend import api
    from ..recommend.certificate import require

    chosen = method_of(context, registry.load("recommend", "lwgr"))
    if max_harm is not None:
        chosen = registry.make("recommend", "lwgr", **{**chosen.to_dict(), "max_harm": max_harm})
    settings = reference_of(size, reference_epochs, samples_per_epoch, dropout, chosen.seed)
    how, kept = ways(split, holdout, tokeniser)
    _free(out)
    _show.writable("--html", html, "matplotlib", "jinja2")
    api.check_device(device)
    with _show.progress():
        found = read(data, format, user, item, time, text, title_map, min_rating, min_count, allow_missing_text)
        model = _model(llm, chosen)
        tokens = api.Tokens(tokeniser, codes, encoder, force)
        prepared = api.prepare(found, work, tokens=tokens, how=how, holdout=kept, seed=chosen.seed)
        made = api.fit(prepared, chosen, settings, llm=model, device=device)
    _show.report(made.report(pictures=html is not None), html, json_)
    if not made.certified.holds and not keep_refused:
        require(made.certified)
    made.save(out)
    if not json_:
        _show.say(f"Saved as {out}; {'the policy' if made.certified.holds else 'the reference'} serves.")
        words = ("recommend", "nearline", out, "--store", "sqlite:knowledge.db", "--histories", data)
        _show.say(f"Next: {_show.command(*words, *_columns(format, user, item, time, min_rating))}")


# ---------------------------------------------------------------- what a bundle does


_nearline.add_to(app)


@app.command("for")
def for_(
    bundle: _options.Bundle,
    history: Annotated[
        str, typer.Option(help="Titles or ids of what was taken, oldest first, semicolons between.")
    ] = "",
    user: Annotated[str, typer.Option(help="A user of the store.")] = "",
    store: _options.Store = "",
    item: Annotated[str, typer.Option(help="Only show this item's codes.")] = "",
    k: Annotated[int, typer.Option("-k", help="How many items.")] = 10,
    explain: Annotated[bool, typer.Option("--explain", help="Say why, for the first items.")] = False,
    knowledge: Annotated[
        str, typer.Option(help="now: ask the language model here; stored: what the store holds.")
    ] = "stored",
    llm: _options.FittedWith = "",
    json_: _options.Json = False,
) -> None:
    """Recommend for one history, with reasons; no user needs to be known.

    Example: retouch recommend for bundle --history "Toy Story; Fargo" --explain
    """
    from ..errors import UserError
    from ..recommend.bundle import open_bundle
    from ..recommend.personal import answer_for, codes_of, language_model

    _options.one_of("knowledge", knowledge, ("now", "stored"))
    asks = knowledge == "now" and not item
    if llm and not asks:
        raise UserError("--llm names who is asked with --knowledge now: give both, or leave it out.")
    with _show.progress():
        opened = open_bundle(bundle, knowledge=language_model(bundle, llm) if asks else None)
        if item:
            found, codes = codes_of(opened, item)
            if json_:
                _show.emit({"id": found.id, "title": found.title, "text": found.text, "codes": list(codes)})
            else:
                _show.say(f"{found.title} (id {found.id}): codes {' '.join(map(str, codes))}")
            return
        answer = answer_for(opened, history, user, store, k=k, explain=explain, ask=asks)
    if json_:
        _show.emit(answer.to_dict())
        return
    whom = "this history" if history else f"user {user}"
    _show.table(f"For {whom} ({answer.rung})", ["", "title", "id", "score"],
                [[i, p.title, p.id, p.score] for i, p in enumerate(answer.items, 1)])  # fmt: skip
    if answer.note:
        _show.say(answer.note, "yellow")
    for reason in answer.reasons:
        _show.say(str(reason["sentence"]))


@app.command()
def evaluate(
    bundle: Annotated[Path | None, typer.Argument(help="What `recommend fit` wrote.")] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute the certificate again from its arrays.")
    ] = False,
    check_table: Annotated[
        Path | None, typer.Option(help="A JSON or CSV of published numbers: say which are impossible.")
    ] = None,
    window: Annotated[
        Path | None, typer.Option(help="Fresh histories: certify what is served on their last items.")
    ] = None,
    max_harm: Annotated[float | None, typer.Option(help="Limit for --window; default: the bundle's own.")] = None,
    reasons: Annotated[
        Path | None, typer.Option(help="Histories: check that the items named as reasons matter more than others.")
    ] = None,
    format: Annotated[str, typer.Option(help="Of --window or --reasons; default: by the file.")] = "",
    user: Annotated[str, typer.Option(help="Column of users in --window or --reasons.")] = "user_id",
    item: Annotated[str, typer.Option(help="Column of items in --window or --reasons.")] = "item_id",
    time: Annotated[str, typer.Option(help="Column of times in --window or --reasons.")] = "timestamp",
    min_rating: _options.MinRating = None,
    llm: _options.FittedWith = "",
    json_: _options.Json = False,
) -> None:
    """Show a bundle's certificate and results, compute them again, or check somebody's table.

    Example: retouch recommend evaluate bundle --recompute
    """
    from ..errors import UserError

    if check_table is not None:
        from ..recommend.evaluate import check_table as check

        broken = check(check_table)
        if json_:
            _show.emit({"table": str(check_table), "impossible": broken})
        else:
            _show.say("\n".join(broken) if broken else "All rows are possible with one right item a user.")
        raise typer.Exit(2 if broken else 0)
    if bundle is None:
        raise UserError("Name a bundle, or a table with --check-table.")
    if max_harm is not None and window is None:
        raise UserError("--max-harm is the limit for --window; a saved certificate keeps its own.")
    if recompute and (window is not None or reasons is not None):
        raise UserError("--recompute is for the saved certificate: leave out --window and --reasons.")
    if min_rating is not None and window is None and reasons is None:
        raise UserError("--min-rating looks at the ratings of --window or --reasons: give one of them.")
    if llm and window is None:
        raise UserError("--llm names who is asked for --window: give both, or leave it out.")
    if window is not None and reasons is not None:
        raise UserError("--window and --reasons measure different things: give one of them.")
    from ..recommend.certificate import Certified, require
    from ..store import check_folder

    check_folder(bundle)
    columns: dict[str, Any] = {"format": format, "user": user, "item": item, "time": time, "min_rating": min_rating}
    if reasons is not None:
        _reasons(bundle, reasons, json_, **columns)
        return
    if window is not None:
        from ..recommend.bundle import open_bundle
        from ..recommend.personal import certify_on, language_model

        with _show.progress():
            opened = open_bundle(bundle, knowledge=language_model(bundle, llm))
            certified = certify_on(opened, window, max_harm, **columns)
    else:
        certified = Certified.load(bundle)  # proves that the arrays give the numbers
    if json_:
        _show.emit(certified.to_dict())
    else:
        _show.say(certified.sentence())
        table = certified.table()
        _show.table(table.title, list(table.columns), [list(row) for row in table.rows])
        if recompute:
            _show.say("Computed again from the arrays: equal.")
    if window is not None:
        require(certified)


def _reasons(bundle: Path, histories: Path, json_: bool, **columns: Any) -> None:
    from dataclasses import asdict

    from ..recommend.bundle import open_bundle
    from ..recommend.personal import check_reasons

    with _show.progress():
        found = check_reasons(open_bundle(bundle), histories, **columns)
    if json_:
        _show.emit({**asdict(found), "holds": found.holds})
        return
    word = "matter more than" if found.holds else "are not told apart from"
    _show.say(
        f"The items named as reasons {word} random others: without them a score falls by {found.mean:.3f} nats more "
        f"({found.lower:.3f} to {found.upper:.3f}, {found.n:,} histories)."
    )


# ---------------------------------------------------------------- reading what was asked


def read(
    path: Path, format: str, user: str, item: str, time: str, text: str, title_map: Path | None, min_rating: float | None,
    min_count: int, allow_missing_text: bool,
) -> Interactions:  # fmt: skip
    """Read interactions as the flags say."""
    from ..recommend.data import load

    return load(
        path, format=format, user=user, item=item, time=time, text=tuple(t for t in text.split(",") if t), titles=title_map,
        min_rating=min_rating, min_count=min_count, allow_missing_text=allow_missing_text,
    )  # fmt: skip


def _columns(format: str, user: str, item: str, time: str, min_rating: float | None) -> list[str]:
    """Return the flags that read the same file again, without those that say what is so anyway."""
    asked = {"--format": (format, ""), "--user": (user, "user_id"), "--item": (item, "item_id"),
             "--time": (time, "timestamp"), "--min-rating": (min_rating, None)}  # fmt: skip
    return [str(word) for flag, (value, usual) in asked.items() if value != usual for word in (flag, value)]


def ways(split: str, holdout: str, tokeniser: str) -> tuple[Any, Any]:
    """Return how to split and what to hold out; a word that is none of those known is refused."""
    from ..recommend.api import TOKENISERS

    _options.one_of("tokeniser", tokeniser, TOKENISERS)
    how = _options.one_of("split", split, ("leave-one-out", "time"))
    return how, _options.one_of("holdout", holdout, ("users", "targets"))


def reference_of(size: str, epochs: int, samples: int | None, dropout: float, seed: int) -> Any:
    """Make the reference's settings of flags."""
    from ..recommend.reference import ReferenceSettings
    from ..settings import with_settings

    values = {"size": size, "n_epochs": epochs, "samples_per_epoch": samples, "dropout": dropout, "seed": seed}
    return with_settings(ReferenceSettings, values)


def _free(out: Path) -> None:
    """Refuse a place where a bundle cannot be saved, before any work; another bundle may give way."""
    from ..errors import UserError
    from ..store import read_json, refuse_place

    refuse_place(out)
    record = out / "retouch.json"
    if record.is_file():
        told = read_json(record)
        if isinstance(told, dict) and told.get("kind") == "recommend":
            return
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is no bundle of ours. Name another folder.")


def _model(source: str, method: Any) -> Model | None:
    from ..model import open_model

    return open_model(source) if method.knowledge not in ("text", "none") else None
