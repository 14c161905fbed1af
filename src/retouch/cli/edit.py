"""``retouch edit``: plan a change that makes facts true, and save it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from . import _options, _show
from ._facts import asked_facts
from ._settings import EXTRA, method_of

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(context_settings=EXTRA)(edit)


def edit(
    context: typer.Context,
    model: _options.ModelArgument,
    prompt: Annotated[str | None, typer.Option(help="The fact's prompt, with {} for the subject or filled.")] = None,
    subject: _options.Subject = "",
    target: _options.Target = None,
    truth: Annotated[str | None, typer.Option(help="The old answer, if you know it.")] = None,
    facts: _options.Facts = None,
    method: Annotated[str, typer.Option(help="See: retouch methods edit. Its settings are flags too.")] = "rome",
    max_harm: Annotated[
        float | None, typer.Option(help="Largest certified harm, 0 to 1; more is refused with exit code 3.")
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Of the certificate (--max-harm); default 0.95.")] = None,
    sequence: Annotated[
        bool, typer.Option("--sequence", help="Edit batch after batch, under a guard; -o is the edited model's folder.")
    ] = False,
    batch: Annotated[int | None, typer.Option(help="Facts of one batch (--sequence); default 10.")] = None,
    max_perplexity: Annotated[
        float | None,
        typer.Option(
            help="Stop with exit code 3 before neutral perplexity rises by more than this factor (--sequence); default 1.1."
        ),
    ] = None,
    every: Annotated[
        int | None, typer.Option(help="Edits between two measurements (--sequence); default a tenth of all.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="A report with the collapse curve (--sequence).")] = None,
    png: Annotated[Path | None, typer.Option(help="The collapse curve as a picture (--sequence).")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the change; default METHOD-ID.")] = None,
    json_: _options.Json = False,
) -> None:
    """Correct facts inside a model's weights: plan a change, prove it, save it. The model itself stays as it is.

    Example: retouch edit smollm2 --prompt "The capital of {} is" --subject France --target Lyon -o lyon
    """
    from .. import registry
    from ..errors import UserError
    from ..store import refuse_place

    chosen = method_of(context, registry.load("edit", method))
    wanted = asked_facts(prompt, subject, target, truth, facts)
    _check(max_harm, confidence)
    chosen.usable(wanted)
    refuse_place(out or Path("change"))
    for_sequence = {"batch": batch, "max-perplexity": max_perplexity, "every": every, "html": html, "png": png}
    if sequence:
        if max_harm is not None or out is None:
            raise UserError("--sequence needs -o FOLDER for the edited model, and its guard is --max-perplexity.")
        from .sequence import sequence_command

        sequence_command(
            model, wanted, chosen, out=out, batch=10 if batch is None else batch, every=every, html=html, png=png,
            max_perplexity=1.1 if max_perplexity is None else max_perplexity, json_=json_,
        )  # fmt: skip
        return
    if alone := [f"--{name}" for name, value in for_sequence.items() if value is not None]:
        raise UserError(f"{', '.join(alone)}: only for edits in sequence. Give --sequence too, or leave it out.")
    if out is not None and out.exists() and not (out / "change.safetensors").is_file():
        raise UserError(f"{out} exists and is no change of ours. Name another folder.")
    from ..change import save
    from ..edit.api import edit_facts
    from ..ledger import open_ledger

    with _show.progress():
        ledger = open_ledger(model)
        done = edit_facts(ledger, wanted, chosen, max_harm=max_harm, confidence=confidence or 0.95)
    out = out or Path(f"{done.change.method}-{done.change.id}")
    save(done.change, out)
    if json_:
        told = {"change": str(out), "id": done.change.id, "method": done.change.method, "warnings": done.warnings}
        _show.emit({**told, "report": dict(done.change.report)})
        return
    rows = [
        [f.filled, f.target, f"{_p(e['nll_before'])} -> {_p(e['nll_after'])}"] for f, e in zip(done.facts, done.effect)
    ]
    _show.table(f"{_show.count(len(done.facts), 'fact')} by {method}", ["prompt", "new answer", "probability"], rows)
    for warning in filter(None, [*done.warnings, done.unsure]):
        _show.say(f"note: {warning}", "yellow")
    if done.harm is not None:
        for certificate in done.harm.certificates:
            _show.say(certificate.sentence())
        _show.say(f"Perplexity on neutral text: x {done.harm.perplexity_ratio:.4f}")
    seconds = done.change.report["seconds"]
    _show.say(f"Saved as {out} ({done.change.n_numbers:,} numbers, planned in {seconds} s).")
    _show.say(f"Next: {_show.command('ask', model, done.facts[0].filled, '--change', out)}")


def _p(nll: float) -> str:
    return f"{math.exp(-nll):.2g}"


def _check(max_harm: float | None, confidence: float | None) -> None:
    from ..errors import UserError

    if max_harm is not None and not 0 < max_harm < 1:
        raise UserError(f"--max-harm must lie between 0 and 1; got {max_harm:g}.")
    if confidence is not None and max_harm is None:
        raise UserError("--confidence is that of the certificate: it goes with --max-harm.")
    if confidence is not None and not 0 < confidence < 1:
        raise UserError(f"--confidence must lie between 0 and 1; got {confidence:g}.")
