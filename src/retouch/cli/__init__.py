"""The command line: one file a verb, no logic of its own. Results on stdout, progress and errors on stderr.

Exit codes: 0 done, 1 our fault, 2 the user's mistake, 3 a bound refused the change, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from . import _show, bench, edit, fuse, locate, look, model, recommend, slim, web

__all__ = ["app", "main"]

STOPPED = "Stopped. Nothing was half-written; the same command goes on or begins anew."
app = typer.Typer(
    name="retouch",
    help="Change a trained language model after its training, and prove what else changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        _show.say(f"retouch {__version__}")
        raise typer.Exit


for module in (edit, model, look, locate, slim, web):
    module.add_to(app)
app.add_typer(bench.app, name="bench")
app.add_typer(fuse.app, name="fuse")
app.add_typer(recommend.app, name="recommend")


@app.callback()
def retouch(
    version: Annotated[
        bool, typer.Option("--version", help="Say which Retouch this is.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Change a trained language model after its training, and prove what else changed."""


def main() -> None:
    """Run the command line and turn errors into a sentence and an exit code."""
    import click

    from ..errors import RetouchError

    try:
        with _show.warnings():
            code = app(standalone_mode=False)
    except RetouchError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        if getattr(error, "possibilities", None):  # Typer adds to the message what click 8.4 adds on its own
            vars(error)["message"] = error.message.partition(" Did you mean")[0]
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        _fail(STOPPED, 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("RETOUCH_DEBUG"):
            raise
        _fail(
            f"{type(error).__name__}: {error}\nThis is a fault of Retouch. RETOUCH_DEBUG=1 shows where it happened.", 1
        )
    else:
        if code == 130:  # typer has caught the interrupt
            _fail(STOPPED, 130)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)
