"""``retouch edit``: plan a change that makes facts true, and save it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _show

__all__ = ["add_to"]

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(context_settings=EXTRA)(edit)


def edit(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or smollm2.")],
    prompt: Annotated[str | None, typer.Option(help="The fact's prompt, with {} for the subject or filled.")] = None,
    subject: Annotated[str, typer.Option(help="What the fact is about.")] = "",
    target: Annotated[str | None, typer.Option(help="The new answer.")] = None,
    truth: Annotated[str | None, typer.Option(help="The old answer, if you know it.")] = None,
    facts: Annotated[Path | None, typer.Option(help="A file of facts instead, JSON or JSON Lines.")] = None,
    method: Annotated[str, typer.Option(help="See: retouch methods edit. Its settings are flags too.")] = "rome",
    max_harm: Annotated[
        float | None, typer.Option(help="Largest certified harm, 0 to 1; more is refused with exit code 3.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the certificate.")] = 0.95,
    sequence: Annotated[
        bool, typer.Option("--sequence", help="Edit batch after batch, under a guard; -o is the edited model's folder.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Facts of one batch (--sequence).")] = 10,
    max_perplexity: Annotated[
        float,
        typer.Option(help="Stop with exit code 3 before neutral perplexity rises by more than this (--sequence)."),
    ] = 1.1,
    every: Annotated[int | None, typer.Option(help="Edits between two measurements (--sequence).")] = None,
    html: Annotated[Path | None, typer.Option(help="A report with the collapse curve (--sequence).")] = None,
    png: Annotated[Path | None, typer.Option(help="The collapse curve as a picture (--sequence).")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the change.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Results for programs.")] = False,
) -> None:
    """Correct facts inside a model's weights: plan a change, prove it, save it. The model itself stays as it is.

    Example: retouch edit smollm2 --prompt "The capital of {} is" --subject France --target Lyon -o lyon
    """
    from .. import registry
    from ..errors import UserError
    from ..settings import from_flags

    chosen = from_flags(registry.load("edit", method), context.args)
    wanted = _facts(prompt, subject, target, truth, facts)
    if max_harm is not None and not 0 < max_harm < 1:
        raise UserError(f"--max-harm must lie between 0 and 1; got {max_harm:g}.")
    if max_harm is not None and not 0 < confidence < 1:
        raise UserError(f"--confidence must lie between 0 and 1; got {confidence:g}.")
    if sequence:
        if max_harm is not None or out is None:
            raise UserError("--sequence needs -o FOLDER for the edited model, and its guard is --max-perplexity.")
        from .sequence import sequence_command

        sequence_command(
            model, wanted, chosen, batch=batch, out=out, max_perplexity=max_perplexity, every=every, html=html, png=png,
            json_=json_,
        )  # fmt: skip
        return
    if out is not None and out.exists() and not (out / "change.safetensors").is_file():
        raise UserError(f"{out} exists and is no change of ours. Name another folder.")
    from ..change import save
    from ..edit.api import edit_facts
    from ..ledger import open_ledger

    with _show.progress():
        ledger = open_ledger(model)
        done = edit_facts(ledger, wanted, chosen, max_harm=max_harm, confidence=confidence)
    out = out or Path(f"{done.change.method}-{done.change.id}")
    save(done.change, out)
    if json_:
        _show.emit({"change": str(out), "id": done.change.id, "method": method, "report": dict(done.change.report)})
        return
    rows = [[f.filled, f.target, f"{_p(e['nll_before'])} -> {_p(e['nll_after'])}"] for f, e in zip(wanted, done.effect)]
    _show.table(f"{len(wanted)} facts by {method}", ["prompt", "new answer", "probability"], rows)
    for warning in dict.fromkeys(w for f in done.change.notes.get("facts", ()) for w in f.get("warnings", ())):
        _show.console().print(f"note: {warning}", style="yellow", markup=False)
    if done.harm is not None:
        for certificate in done.harm.certificates:
            _show.console().print(certificate.sentence(), markup=False)
        _show.console().print(f"Perplexity on neutral text: x {done.harm.perplexity_ratio:.4f}", markup=False)
    seconds = done.change.report["seconds"]
    _show.console().print(f"Saved as {out} ({done.change.n_numbers:,} numbers, planned in {seconds} s).", markup=False)
    _show.console().print(f'Next: retouch ask {model} "{wanted[0].filled}" --change {out}', markup=False)


def _p(nll: float) -> str:
    import math

    return f"{math.exp(-nll):.2g}"


def _facts(prompt: str | None, subject: str, target: str | None, truth: str | None, path: Path | None) -> list:  # type: ignore[type-arg]
    from ..edit.facts import Fact, load
    from ..errors import UserError

    if path is not None and (prompt or target):
        raise UserError("Give either --facts, or --prompt with --subject and --target.")
    if path is not None:
        return load(path)
    if prompt is None or target is None:
        raise UserError("Name a fact: --prompt, --subject and --target; or a file of them: --facts.")
    return [Fact.of(prompt, subject, target, truth)]
