"""``retouch edit --sequence``: many facts into one model, batch after batch, under a guard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _show

if TYPE_CHECKING:
    from ..edit.base import EditMethod
    from ..edit.facts import Fact
    from ..edit.sequence import Run
    from ..ledger import Policy

__all__ = ["sequence_command"]


def sequence_command(
    model: str,
    facts: list[Fact],
    method: EditMethod,
    *,
    batch: int,
    out: Path,
    max_perplexity: float = 1.1,
    every: int | None = None,
    policy: Policy = "replace",
    dtype: str | None = None,
    html: Path | None = None,
    png: Path | None = None,
    json_: bool = False,
) -> None:
    """Edit facts in sequence and write the model; at the bound it is written too, and the error says where it stands.

    Args:
        model: A folder, a hub id, a .gguf file, or a bundled name; a folder's own changes stay.
        facts: What is to become true, in order.
        method: How.
        batch: Facts of one batch.
        out: Folder of the new model.
        max_perplexity: Most that neutral perplexity may rise, as a ratio.
        every: Edits between two measurements.
        policy: What becomes of facts that later ones supersede.
        dtype: Type of the stored weights.
        html: A report with the collapse curve.
        png: The curve as a picture.
        json_: Results for programs.
    """
    from ..edit import sequence
    from ..errors import UserError
    from ..ledger import open_ledger

    _show.writable("--html", html, "jinja2", "matplotlib")
    _show.writable("--png", png, "matplotlib")
    if out.exists() and not (out / "ledger").is_dir():
        raise UserError(f"{out} exists and is no model of ours. Name another folder.")
    sequence.check(facts, batch, max_perplexity, every)
    _refuse_loss(model, facts, out)
    with _show.progress():
        try:
            done = sequence.run(
                open_ledger(model), facts, method, batch_size=batch, max_perplexity_ratio=max_perplexity, out=out,
                every=every, policy=policy, dtype=dtype,
            )  # fmt: skip
        except sequence.Stopped as stopped:
            _pictures(stopped.run, model, method.name, html, png)
            raise
    _pictures(done, model, method.name, html, png)
    if json_:
        _show.emit({"model": str(out), **_record(done)})
        return
    rows: list[list[Any]] = [list(p.to_dict().values()) for p in done.points]
    heads = ["edits", "efficacy", "efficacy of the last batch", "neighbours", "next token kept", "perplexity x"]
    _show.table(f"{_show.count(done.n_edits, 'edit')} by {method.name}, {batch} at a time", heads, rows)
    if done.n_superseded:
        _show.say(f"{done.n_superseded} facts were superseded by later ones and taken out.")
    _show.say(f"Saved as {out}: {_show.count(len(done.ledger.active), 'change')}. See: {_show.command('log', out)}")


def _refuse_loss(model: str, facts: list[Fact], out: Path) -> None:
    """Refuse to replace a model that carries changes of other facts, which the new one would not."""
    from ..errors import UserError
    from ..ledger import carried
    from ..parting import identities

    kept = {line["id"] for line in carried(Path(model))}
    asked = frozenset().union(*(identities(fact.to_dict()) for fact in facts))
    lost = [
        line["id"] for line in carried(out) if line["status"] == "active" and line["id"] not in kept
        and not (line["facts"] and all(asked & identities(fact) for fact in line["facts"]))
    ]  # fmt: skip
    if lost:
        raise UserError(
            f"{out} carries changes that {model} does not, and they would be lost: {', '.join(lost)}. Edit that model to add "
            f"to them (retouch edit {out} ...), or name another folder."
        )


def _record(done: Run) -> dict[str, Any]:
    return {**done.numbers(), "points": [p.to_dict() for p in done.points], "changes": len(done.ledger.active)}


def _pictures(done: Run, model: str, method: str, html: Path | None, png: Path | None) -> None:
    from ..edit import collapse

    if html is not None:
        stopped = f" The guard stopped before {done.bound_at}." if done.bound_at is not None else ""
        summary = f"{done.n_edits} edits stand.{stopped}"
        collapse.write_report(collapse.collapse_report(done.points, model, method, summary, _record(done)), html)
    if png is not None and done.points:
        collapse.save_png(done.points, png)
