"""``retouch web``: the same work on a page of one's own machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _show

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(web)


def web(
    model: Annotated[
        str | None, typer.Argument(help="A folder, a hub id, a .gguf file, or smollm2; default: chosen on the page.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; this machine alone by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen; 0: any free one.")] = 8412,
    folder: Annotated[Path, typer.Option(help="The one folder that is read and written.")] = Path(),
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """Show the folder's models on a page: edit and ask them, try slim ones and recommenders, compare adapters.

    Example: retouch web smollm2 --folder work --open
    """
    import sys
    import webbrowser

    from ..web.serve import Folder, Workbench, is_loopback, listening, run

    def ready(url: str) -> None:
        sys.stderr.write(f"Retouch is at {url}\nThe address is its key: keep it to yourself. Ctrl-C ends it.\n")
        if open_:
            webbrowser.open(url)

    if not is_loopback(host):
        sys.stderr.write("warning: there is no TLS, so whoever can read this network's traffic can read the key.\n")
    bench = Workbench(Folder(folder))
    with listening(host, port) as listener:
        if model is not None:
            with _show.progress():
                bench.open_now(model)
        run(bench, listener, host, ready)
