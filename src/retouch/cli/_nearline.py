"""``retouch recommend add, nearline, serve``: new items, knowledge made before anybody asks, answers over HTTP."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _options, _show
from ._settings import EXTRA, method_of, settings_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..recommend.bundle import Bundle
    from ..recommend.nearline import Done, NearlineSettings
    from ..recommend.stores import Past, Store

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add the commands to ``retouch recommend``."""
    app.command()(add)
    app.command(context_settings=EXTRA)(nearline)
    app.command(context_settings=EXTRA)(serve)


def add(
    bundle: _options.Bundle,
    items: Annotated[Path, typer.Option(help="New items with titles: a table with ids first, .item, or JSON.")],
    encoder: Annotated[
        str, typer.Option(help="As in `recommend fit`; a .npy file has a row for each new item.")
    ] = "minilm",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Another folder; default: in place.")] = None,
    json_: _options.Json = False,
) -> None:
    """Give new items codes in a saved bundle. Nothing is trained, and the codes of all other items stay.

    Example: retouch recommend add bundle --items new.tsv
    """
    from dataclasses import asdict

    from ..recommend.grow import add_items, read_new

    with _show.progress():
        told = add_items(bundle, read_new(items), encoder=encoder, out=out)
    if json_:
        _show.emit({"bundle": str(out or bundle), **asdict(told)})
        return
    known = f"; {len(told.known):,} were there already" if told.known else ""
    _show.say(f"{len(told.codes):,} new items in {out or bundle}{known}.")
    _show.say(
        f"Its records go to namespace {told.fingerprint[:12]}. Next: {_show.command('recommend', 'nearline', out or bundle)}"
    )


def nearline(
    context: typer.Context,
    bundle: _options.Bundle,
    store: _options.Store = "sqlite:knowledge.db",
    histories: Annotated[
        Path | None,
        typer.Option(help="Who took what: any format of `recommend fit`, or JSON Lines; default: the store's."),
    ] = None,
    format: Annotated[str, typer.Option(help="Of the histories; default: by the file.")] = "",
    user: _options.UserColumn = "user_id",
    item: _options.ItemColumn = "item_id",
    time: _options.TimeColumn = "timestamp",
    min_rating: _options.MinRating = None,
    llm: _options.FittedWith = "",
    watch: Annotated[bool, typer.Option("--watch", help="Go on for as long as histories change.")] = False,
    metrics: Annotated[int, typer.Option(help="With --watch: the port for Prometheus; 0: none.")] = 0,
    activate: Annotated[
        bool, typer.Option(help="Let servers read these records once enough users are covered.")
    ] = True,
    replace: Annotated[
        bool, typer.Option("--replace", help="The histories stand, also where the store knows longer ones.")
    ] = False,
    forget: Annotated[
        list[str] | None, typer.Option(help="Only remove a user's history and records; may be given again.")
    ] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Only let servers read what they read before.")] = False,
    namespaces: Annotated[bool, typer.Option("--namespaces", help="Only list the bundles that have records.")] = False,
    purge: Annotated[
        str | None,
        typer.Option(help="Only remove a bundle's records that no server reads: the beginning of its namespace."),
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Spread over a Ray cluster; the records are the same.")] = False,
    json_: _options.Json = False,
) -> None:
    """Ask the language model about every user who needs it, and write what it knows to a store. Interrupted, it goes on.

    Example: retouch recommend nearline bundle --store sqlite:knowledge.db --histories ml-100k
    """
    from ..errors import UserError
    from ..recommend import nearline as work
    from ..recommend.bundle import open_bundle
    from ..recommend.personal import language_model
    from ..recommend.stores import open_store

    settings = method_of(context, work.NearlineSettings)
    if watch and (ray or json_):
        raise UserError("--watch works in this process and tells what it does on stderr: leave out --ray and --json.")
    if metrics and not watch:
        raise UserError("--metrics tells what a writer does over time: give --watch too.")
    if _only(store, json_, rollback, namespaces, purge, forget):
        return
    if min_rating is not None and histories is None:
        raise UserError("--min-rating needs --histories: the ratings that it looks at.")
    if replace and histories is None:
        raise UserError("--replace needs --histories: the histories that are to stand.")
    known = None
    if histories is not None:
        known = work.read_histories(histories, format=format, user=user, item=item, time=time, min_rating=min_rating)
    with _show.progress():
        opened = open_bundle(bundle, knowledge=language_model(bundle, llm))
        kept = open_store(store)
        try:
            if known is not None:
                kept.put_histories(known, replace=replace)
            if watch:
                _watch(opened, kept, settings, activate, metrics)
                return
            users = known or _all_histories(kept, store)
            done = work.refresh(
                opened, kept, users, settings, checkpoint=_mark(bundle, store), activate=activate,
                way="ray" if ray else "here", own=known is None,
            )  # fmt: skip
            active = kept.active()
        finally:
            kept.close()
    if json_:
        _show.emit({"store": store, "namespace": opened.fingerprint, "active": active, **done.to_dict()})
        return
    _show.say(_sentence(done))
    reads = "read" if active == opened.fingerprint else "do not yet read"
    _show.say(f"Servers {reads} these records (namespace {opened.fingerprint[:12]}).")
    _show.say(f"Next: {_show.command('recommend', 'serve', bundle, '--store', store)}")


def _only(
    store: str, json_: bool, rollback: bool, namespaces: bool, purge: str | None, forget: list[str] | None
) -> bool:
    """Do what is asked in place of the work; return whether there was such a thing."""
    from ..errors import UserError

    asked: dict[str, Callable[[], None]] = {}
    if rollback:
        asked["--rollback"] = lambda: _roll_back(store, json_)
    if namespaces:
        asked["--namespaces"] = lambda: _list(store, json_)
    if purge is not None:
        asked["--purge"] = lambda: _purge(store, purge, json_)
    if forget:
        asked["--forget"] = lambda: _forget(store, forget, json_)
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are each all that a call does. Give one of them.")
    for do in asked.values():
        do()
    return bool(asked)


def _roll_back(store: str, json_: bool) -> None:
    from ..recommend.stores import open_store

    with closing(open_store(store, existing=True)) as kept:
        namespace = kept.rollback()
    if json_:
        _show.emit({"store": store, "active": namespace})
    else:
        _show.say(f"Servers read namespace {namespace[:12]} again.")


def _list(store: str, json_: bool) -> None:
    from dataclasses import asdict

    from ..recommend.stores import open_store

    with closing(open_store(store, existing=True)) as kept:
        found = kept.namespaces()
    if json_:
        _show.emit({"store": store, "namespaces": [asdict(one) for one in found]})
        return
    rows = [[one.name[:12], one.n_records, "yes" if one.active else ""] for one in found]
    _show.table(f"Namespaces of {store}", ["namespace", "records", "servers read it"], rows)


def _purge(store: str, beginning: str, json_: bool) -> None:
    from ..errors import UserError
    from ..recommend.stores import open_store

    with closing(open_store(store, existing=True)) as kept:
        names = [one.name for one in kept.namespaces()]
        meant = [name for name in names if name.startswith(beginning)]
        if len(meant) != 1:
            known = ", ".join(name[:12] for name in names) or "none"
            raise UserError(f"{len(meant)} namespaces begin with {beginning!r}; one is needed. There are: {known}.")
        n_records = kept.purge(meant[0])
    if json_:
        _show.emit({"store": store, "namespace": meant[0], "records": n_records})
    else:
        _show.say(f"Removed {_show.count(n_records, 'record')} of namespace {meant[0][:12]}.")


def _forget(store: str, users: list[str], json_: bool) -> None:
    from ..recommend.stores import open_store

    with closing(open_store(store, existing=True)) as kept:
        n_histories = sum(past is not None for past in kept.histories(users))
        n_records = kept.forget(users)
    if json_:
        _show.emit({"store": store, "users": users, "histories": n_histories, "records": n_records})
    else:
        _show.say(f"Removed {n_histories:,} histories and {n_records:,} records of {len(users):,} users.")


def _mark(bundle: Path, store: str) -> Path:
    """Name the file that remembers how far a run over one store came."""
    from ..store import cache_dir, key

    place = cache_dir() / "recommend" / f"nearline-{key(bundle=str(bundle.absolute()), store=store)[:16]}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _sentence(done: Done) -> str:
    failed = f", {len(done.failed)} failed (first: {done.failed[0][1]})" if done.failed else ""
    return (
        f"{done.users:,} users: {done.written:,} asked, {done.memo:,} remembered, {done.unchanged:,} needed nothing, "
        f"{done.empty:,} without a known item{failed}; {done.coverage:.1%} covered."
    )


def _all_histories(kept: Store, store: str) -> dict[str, Past]:
    from ..errors import UserError

    position = 0
    found: dict[str, Past] = {}
    while page := kept.changed(position, 10_000):
        names = [user for _, user in page]
        found |= {user: past for user, past in zip(names, kept.histories(names)) if past is not None}
        position = page[-1][0]
    if not found:
        raise UserError(f"The store {store} knows no histories yet. Name a file of them with --histories.")
    return found


def _watch(opened: Bundle, kept: Store, settings: NearlineSettings, activate: bool, metrics: int) -> None:
    import signal
    import sys
    import threading

    from ..recommend.nearline import watch

    count = _counted(metrics)
    stop = threading.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: stop.set())
    for done in watch(opened, kept, settings, stop=stop, activate=activate, counted=count):
        sys.stderr.write(f"{_sentence(done)}\n")


def _counted(port: int) -> Callable[[Done, float], None] | None:
    """Open the port for Prometheus, and return what counts."""
    from ..errors import UserError

    if not port:
        return None
    try:
        from ..recommend._metrics import NearlineMetrics

        counting = NearlineMetrics()
        counting.listen(port)
    except ImportError as error:
        raise UserError("--metrics needs prometheus-client. Install it with: pip install 'retouch[serve]'") from error
    except OSError as error:
        raise UserError(f"Nothing can listen at port {port} for --metrics: {error}.") from error
    return counting.done


def serve(
    context: typer.Context,
    bundle: _options.Bundle,
    store: Annotated[str, typer.Option(help="sqlite:PATH or redis://HOST:PORT/NUMBER; empty: no knowledge.")] = "",
    beside: Annotated[list[Path] | None, typer.Option(help="Bundles that take over when the store names them.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; this machine alone by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.")] = 8000,
    workers: Annotated[int, typer.Option(help="Processes over one store.")] = 1,
    token: Annotated[
        Path | None, typer.Option(help="A file that holds what clients must send as bearer token.")
    ] = None,
    stock: Annotated[Path | None, typer.Option(help="A file of raw ids that nobody can have now, one a line.")] = None,
) -> None:
    """Answer requests over HTTP: POST /recommend, GET /health, /ready, /metrics; the API is described at /docs.

    How it answers and what it takes are flags too: --beams 20 --filter-seen false --rate-per-s 5 --body-kib 128 …

    Example: retouch recommend serve bundle --store sqlite:knowledge.db --port 8000
    """
    import sys

    from ..recommend.ladder import Serving
    from ..recommend.serve import Limits, run
    from ..store import check_folder

    settings, limits = settings_of(context, Serving, Limits)
    for folder in (bundle, *(beside or ())):
        check_folder(folder, verify_hashes=False)  # before it is said that it is served
    sys.stderr.write(f"Serving {bundle} at http://{host}:{port} (Ctrl-C ends it; /docs describes the API).\n")
    run(
        bundle,
        store,
        beside=beside or (),
        host=host,
        port=port,
        workers=workers,
        token=token,
        stock=stock,
        settings=settings,
        limits=limits,
    )
