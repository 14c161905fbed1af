"""``retouch recommend``: fit a recommender with a language model's knowledge, precompute, serve, ask, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _show
from ._settings import EXTRA, method_of

if TYPE_CHECKING:
    from ..model import Model
    from ..recommend.data import Interactions

__all__ = ["app", "one_of", "read", "reference_of"]

app = typer.Typer(
    help="Let a language model's knowledge of the world help a recommender, and never harm it.", no_args_is_help=True
)

_DATA = Annotated[
    Path, typer.Argument(help="Atomic files, a sequence file, CSV, Parquet, or a folder with one of them.")
]
_BUNDLE = Annotated[Path, typer.Argument(help="What `recommend fit` wrote.")]
_STORE = Annotated[str, typer.Option(help="sqlite:PATH or redis://HOST:PORT/NUMBER.")]
_JSON = Annotated[bool, typer.Option("--json", help="Results for programs.")]


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
    _show.say(f"Saved as {folder}. Next: retouch recommend fit {folder} -o bundle")


@app.command(context_settings=EXTRA)
def fit(
    context: typer.Context,
    data: _DATA,
    llm: Annotated[
        str, typer.Option(help="The language model: a folder, a hub id, a .gguf file, or smollm2.")
    ] = "smollm2",
    max_harm: Annotated[
        float | None, typer.Option(help="Largest certified mean harm, nats per code; more is refused with exit code 3.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="inter, sequences, csv, parquet or movielens; default: by the file.")
    ] = "",
    user: Annotated[str, typer.Option(help="Column of users.")] = "user_id",
    item: Annotated[str, typer.Option(help="Column of items.")] = "item_id",
    time: Annotated[str, typer.Option(help="Column of times.")] = "timestamp",
    text: Annotated[str, typer.Option(help="Columns of an item's text: title,brand.")] = "",
    titles: Annotated[Path | None, typer.Option(help="A map of titles beside a sequence file.")] = None,
    min_rating: Annotated[float | None, typer.Option(help="Ratings below it are no interactions.")] = None,
    min_count: Annotated[int, typer.Option(help="Users and items with fewer interactions are left out; 0: none.")] = 5,
    allow_missing_text: Annotated[
        bool, typer.Option("--allow-missing-text", help="Go on with many items without text.")
    ] = False,
    split: Annotated[str, typer.Option(help="leave-one-out or time.")] = "leave-one-out",
    holdout: Annotated[str, typer.Option(help="What is kept for the certificate: users or targets.")] = "users",
    tokeniser: Annotated[str, typer.Option(help="rq_kmeans, rq_vae or opq.")] = "rq_kmeans",
    codes: Annotated[int | None, typer.Option(help="Codes of a level; default: by the number of items.")] = None,
    encoder: Annotated[
        str, typer.Option(help="Turns texts into vectors: minilm, a folder, or a .npy file.")
    ] = "minilm",
    size: Annotated[str, typer.Option(help="Of the reference: tiny, small, base or tiger.")] = "small",
    reference_epochs: Annotated[int, typer.Option(help="Most epochs of the reference.")] = 200,
    samples_per_epoch: Annotated[int | None, typer.Option(help="Samples of an epoch of the reference.")] = None,
    dropout: Annotated[float, typer.Option(help="Of the reference; 0.2 for sparse data.")] = 0.1,
    force: Annotated[bool, typer.Option("--force", help="Go on with codes that collapsed.")] = False,
    keep_refused: Annotated[bool, typer.Option("--keep-refused", help="Save even so; the reference serves.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    work: Annotated[
        Path | None, typer.Option(help="Folder of the stages, for going on; default: in the cache.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="A report with pictures.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the bundle.")] = Path("bundle"),
    json_: _JSON = False,
) -> None:
    """Train a recommender, let a language model's knowledge help it, and certify that it does no harm.

    Settings of the policy are flags too: --preset paper --n-llm-layers 8 … See: retouch methods recommend.

    Example: retouch recommend fit ml-100k --n-llm-layers 8 -o bundle
    """
    from .. import registry
    from ..recommend import api
    from ..recommend.certificate import require
    from ..report import to_json, to_terminal, write_html
    from ..store import refuse_inside

    chosen = method_of(context, registry.load("recommend", "lwgr"))
    if max_harm is not None:
        chosen = registry.make("recommend", "lwgr", **{**chosen.to_dict(), "max_harm": max_harm})
    refuse_inside(out)
    _show.writable("--html", html, "matplotlib", "jinja2")
    with _show.progress():
        found = read(data, format, user, item, time, text, titles, min_rating, min_count, allow_missing_text)
        tokens = api.Tokens(tokeniser, codes, encoder, force)
        prepared = api.prepare(
            found, work, tokens=tokens, how=one_of("split", split, ("leave-one-out", "time")),
            holdout=one_of("holdout", holdout, ("users", "targets")), seed=chosen.seed,
        )  # fmt: skip
        settings = reference_of(size, reference_epochs, samples_per_epoch, dropout, chosen.seed)
        made = api.fit(prepared, chosen, settings, llm=_model(llm, chosen), device=device)
    report = made.report()
    if html is not None:
        write_html(report, html)
    if json_:
        _show.emit(to_json(report))
    else:
        _show.console().print(to_terminal(report))
    if not made.certified.holds and not keep_refused:
        require(made.certified)
    made.save(out)
    if not json_:
        _show.say(f"Saved as {out}; {'the policy' if made.certified.holds else 'the reference'} serves.")
        _show.say(f"Next: retouch recommend nearline {out} --store sqlite:knowledge.db --histories {data}")


def read(
    path: Path, format: str, user: str, item: str, time: str, text: str, titles: Path | None, min_rating: float | None,
    min_count: int, allow_missing_text: bool,
) -> Interactions:  # fmt: skip
    """Read interactions as the flags say."""
    from ..recommend.data import load

    return load(
        path, format=format, user=user, item=item, time=time, text=tuple(t for t in text.split(",") if t), titles=titles,
        min_rating=min_rating, min_count=min_count, allow_missing_text=allow_missing_text,
    )  # fmt: skip


def reference_of(size: str, epochs: int, samples: int | None, dropout: float, seed: int) -> Any:
    """Make the reference's settings of flags."""
    from ..recommend.reference import ReferenceSettings
    from ..settings import with_settings

    values = {"size": size, "n_epochs": epochs, "samples_per_epoch": samples, "dropout": dropout, "seed": seed}
    return with_settings(ReferenceSettings, values)


def _model(source: str, method: Any) -> Model | None:
    from ..model import open_model

    return open_model(source) if method.knowledge not in ("text", "none") else None


def one_of(flag: str, value: str, allowed: tuple[str, ...]) -> Any:
    """Refuse a value that is not among a few."""
    from ..errors import unknown

    if value not in allowed:
        raise unknown(f"value of --{flag}", value, allowed)
    return value
