"""``retouch locate`` and ``retouch diagnose``: where a model recalls a fact, and why an edit of it holds or fails."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _options, _show
from ._facts import asked_facts

if TYPE_CHECKING:
    from ..report import Report

__all__ = ["add_to"]

Prompt = Annotated[str | None, typer.Option(help="A prompt, with {} for the subject or filled.")]
Samples = Annotated[int, typer.Option(help="Draws of the noise.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(locate)
    app.command()(diagnose)


def locate(
    model: _options.ModelArgument,
    prompt: Prompt = None,
    subject: _options.Subject = "",
    target: Annotated[str | None, typer.Option(help="The answer that the model gives.")] = None,
    facts: _options.Facts = None,
    n: _options.SomeFacts = None,
    attributes: Annotated[
        Path | None, typer.Option(help="A file with one answer of the relation a line, e.g. cities.")
    ] = None,
    part: Annotated[str, typer.Option(help="What is put back: mlp, attention or state.")] = "mlp",
    window: Annotated[int | None, typer.Option(help="Blocks put back together; default: a fifth of them.")] = None,
    samples: Samples = 10,
    seed: _options.Seed = 0,
    report: _options.Page = None,
    json_: _options.Json = False,
) -> None:
    """Find the tokens and blocks that carry a fact: causal trace, attribute rate, knock-outs.

    Example: retouch locate smollm2 --prompt "The capital of {} is" --subject France --target Paris --report page.html
    """
    wanted = asked_facts(prompt, subject, target, None, facts, n, needs_subject=True)
    words = _words(attributes)
    _check(samples, window)
    _show.writable("--report", report, "jinja2", "matplotlib")
    from ..edit._causal import site
    from ..edit.locate import locate as trace
    from ..ledger import open_ledger

    site(part, 0)  # type: ignore[arg-type]  # refuses what is no part before a model is opened
    with _show.progress():
        opened = open_ledger(model).model
        found = trace(opened, wanted, attributes=words, part=part, window=window, n_samples=samples, seed=seed)  # type: ignore[arg-type]
    _shown(found.report(pictures=report is not None), report, json_)


def diagnose(
    model: _options.ModelArgument,
    prompt: Prompt = None,
    subject: _options.Subject = "",
    target: _options.Target = None,
    facts: _options.Facts = None,
    n: _options.SomeFacts = None,
    change: Annotated[Path | None, typer.Option(help="A saved change of these facts: before and after it.")] = None,
    what: Annotated[str, typer.Option(help="Some of drift, delivery, landscape, shortcut.")] = (
        "drift,delivery,landscape,shortcut"
    ),
    block: Annotated[int, typer.Option(help="Block of the write; -1: the change's last, or 0.18 of the depth.")] = -1,
    statistics: Annotated[bool, typer.Option(help="Compare the metrics that need second moments, too.")] = True,
    samples: Samples = 10,
    seed: _options.Seed = 0,
    report: _options.Page = None,
    json_: _options.Json = False,
) -> None:
    """Find out why an edit holds or fails: drift of keys, delivered fraction, tolerance, sharpness, shortcut index.

    Example: retouch diagnose smollm2 --facts facts.jsonl --change lyon --report page.html
    """
    wanted = asked_facts(prompt, subject, target, None, facts, n, needs_subject=True)
    _check(samples, None, block)
    names = _named(what)
    _show.writable("--report", report, "jinja2", "matplotlib")
    from ..change import load
    from ..edit.diagnose import diagnose as examine
    from ..edit.diagnose import refuse_unknown
    from ..ledger import open_ledger

    refuse_unknown(names)
    planned = load(change) if change is not None else None
    with _show.progress():
        opened = open_ledger(model).model
        found = examine(
            opened, wanted, planned, what=names, block=block, statistics=statistics, n_samples=samples, seed=seed,  # type: ignore[arg-type]
        )  # fmt: skip
    _shown(found.report(pictures=report is not None), report, json_)


def _named(what: str) -> list[str]:
    from ..errors import UserError

    names = [w.strip() for w in what.split(",") if w.strip()]
    if not names:
        raise UserError("--what names no diagnostic. Give some of drift, delivery, landscape, shortcut.")
    return names


def _words(path: Path | None) -> list[str]:
    from ..errors import UserError

    if path is None:
        return []
    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--attributes {path} cannot be read as UTF-8 text: {error}.") from error
    if not words:
        raise UserError(f"--attributes {path} holds no word. Write one answer a line.")
    return words


def _check(samples: int, window: int | None, block: int = -1) -> None:
    from ..errors import UserError

    if samples < 1:
        raise UserError(f"--samples must be at least 1; got {samples}.")
    if window is not None and window < 1:
        raise UserError(f"--window must be at least 1; got {window}.")
    if block < -1:
        raise UserError(f"--block must be a block, counted from 0, or -1; got {block}.")


def _shown(made: Report, page: Path | None, json_: bool) -> None:
    from ..report import to_terminal, write_html

    if page is not None:
        write_html(made, page)
    if json_:
        from ..report import to_json

        _show.emit(to_json(made)["numbers"])
        return
    _show.console().print(to_terminal(made))
    if page is not None:
        _show.say(f"The report with pictures: {page}")
