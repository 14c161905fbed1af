"""The model at hand and what is done with it: what ``retouch edit``, ``ask``, ``apply`` and ``undo`` call."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__, _bundled, registry
from ..bound import Certificate
from ..change import Change, filled, measured_facts, read_record
from ..change import load as load_change
from ..change import save as save_change
from ..edit.api import Edited, apply_change, edit_facts
from ..edit.api import ask as ask_model
from ..edit.base import EditMethod
from ..edit.facts import Fact
from ..edit.facts import load as load_facts
from ..entry import facts_in_words, status_in_words
from ..errors import ModelError, RetouchError, StoreError, UserError, unknown
from ..ledger import Ledger, open_ledger, save_ledger, survival
from ..measure import n_parameters
from ..settings import fields_of, from_flags
from . import _wire as wire
from ._folder import Folder
from ._job import Desk

__all__ = ["Workbench"]


class Workbench:
    """Hold one model and work on it. Its public methods are the routes of the API.

    Args:
        folder: What is read and written.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder, self.desk = folder, Desk()
        self._source = ""
        self._ledger: Ledger | None = None
        self._about: wire.ModelFacts | None = None
        self._given: tuple[str, ...] = ()

    def open_now(self, source: str) -> None:
        """Open the model that the user named at the start; the page may come back to it."""
        self._given = (source,)
        self._open(source, source)

    def end(self, timeout_s: float = 30.0) -> None:
        """Stop what is being worked on, and wait for its end."""
        self.desk.end(timeout_s)

    # ---------------------------------------------------------------- what is there

    def state(self) -> wire.State:
        """Tell what is at hand: the model with its ledger, and the latest work."""
        return wire.State(version=__version__, folder=str(self.folder.root), model=self._about, job=self.desk.job)

    def models(self) -> list[str]:
        """List what can be opened: what the server was started with, bundled models, model folders."""
        return list(dict.fromkeys([*self._given, *_installed(), *self.folder.models()]))

    def source_of(self, name: str) -> str:
        """Return what `retouch.model.open_model` takes for one of the models.

        Raises:
            UnknownName: It is none of them.
        """
        if name not in (known := self.models()):
            raise unknown("model", name, known)
        return name if name in (*self._given, *_installed()) else str(self.folder.inside(name))

    def methods(self) -> list[wire.Method]:
        """List the editing methods and their settings."""
        return [
            wire.Method(
                name=e.name, summary=e.summary, source=e.source, settings=_fields(registry.load("edit", e.name))
            )
            for e in registry.methods("edit")
        ]

    def changes(self) -> list[wire.ChangeRow]:
        """List the saved changes, the newest first."""
        return [self._listed(path) for path in self.folder.changes()]

    def change(self, path: str) -> wire.ChangeRow:
        """Show one change, after all of it was checked."""
        return self._row(path, load_change(self.folder.inside(path)).to_dict())

    def _listed(self, path: str) -> wire.ChangeRow:
        try:
            return self._row(path, read_record(self.folder.inside(path)))
        except RetouchError as error:
            return wire.ChangeRow(path=path, error=str(error))

    def _row(self, path: str, record: Mapping[str, Any]) -> wire.ChangeRow:
        try:
            size = (self.folder.inside(path) / "change.safetensors").stat().st_size
            return _change_row(path, -(-size // 1024), record)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise StoreError(f"{path}: its record was altered ({error!r}). Plan the change again.") from error

    # ---------------------------------------------------------------- what is done

    def open(self, asked: wire.Open) -> wire.Job:
        """Begin to open a model."""
        source = self.source_of(asked.model)
        return self.desk.begin(f"Opening {asked.model}", lambda: self._open(source, asked.model))

    def ask(self, asked: wire.Ask) -> wire.Answers:
        """Let the model continue a text, before and after a change."""
        change = load_change(self.folder.inside(asked.change)) if asked.change else None
        with self.desk.alone():
            return wire.Answers(
                text=asked.text, said=ask_model(self._at_hand().model, asked.text, change, asked.n_tokens)
            )

    def edit(self, asked: wire.Edit) -> wire.Job:
        """Begin to plan, prove and save a change."""
        ledger, facts = self._at_hand(), _facts(asked)
        method = self._method(asked.method, asked.settings)
        count = f"{len(facts)} fact{'' if len(facts) == 1 else 's'}"
        return self.desk.begin(
            f"Editing {count} by {asked.method}",
            lambda: self._edit(ledger, facts, method, asked.max_harm, asked.confidence),
        )

    def apply(self, asked: wire.Apply) -> wire.Job:
        """Begin to write a new model that carries a change."""
        ledger, change = self._at_hand(), load_change(self.folder.inside(asked.change))
        out = self.folder.new(asked.name or f"{self._stem()}-{change.id}")
        return self.desk.begin(f"Writing {out.name}", lambda: self._apply(ledger, change, out, asked.dtype))

    def undo(self, asked: wire.Undo) -> wire.Job:
        """Begin to write a new model without a change, or without one fact of it."""
        ledger = self._at_hand()
        out = self.folder.new(asked.name or f"{self._stem()}-without-{asked.number}")
        return self.desk.begin(f"Writing {out.name}", lambda: self._write(ledger.undo(asked.number, asked.fact), out))

    def job(self) -> wire.Job | None:
        """Tell how far the latest work is, and how it ended."""
        return self.desk.job

    def cancel(self) -> wire.Job:
        """Stop the work, at its next step."""
        return self.desk.cancel()

    # ---------------------------------------------------------------- the work itself

    def _at_hand(self) -> Ledger:
        if self._ledger is None:
            raise UserError("No model is open. Open one first.")
        return self._ledger

    def _method(self, name: str, settings: Mapping[str, str]) -> EditMethod:
        """Make a method as flags do. Free text among its settings names a file, which must lie below the folder."""
        cls: type[EditMethod] = registry.load("edit", name)
        names = {f.name for f in fields_of(cls) if f.type == "str"}
        given = {n: str(self.folder.inside(v)) if n.replace("-", "_") in names else v for n, v in settings.items()}
        return from_flags(cls, [f"--{n}={v}" for n, v in given.items()])

    def _stem(self) -> str:
        """What new folders are called after."""
        return re.sub(r"[^\w.+-]+", "-", Path(self._source).name.removesuffix(".gguf")).strip("-.") or "model"

    def _open(self, source: str, name: str) -> wire.Saved:
        ledger = open_ledger(source)
        self._about = _model_facts(ledger, name)
        self._ledger, self._source = ledger, name
        return wire.Saved(model=name, says=[f"{name} is open."])

    def _edit(
        self, ledger: Ledger, facts: list[Fact], method: EditMethod, max_harm: float | None, confidence: float
    ) -> wire.Saved:
        done = edit_facts(ledger, facts, method, max_harm=max_harm, confidence=confidence)
        out = self.folder.new(f"{done.change.method}-{done.change.id}")
        save_change(done.change, out)
        return wire.Saved(
            change=out.name,
            facts=_measured(done.change.to_dict()),
            says=[*_proved(done), f"Saved as {out.name}, planned in {done.change.report['seconds']} s."],
            notes=[note for note in [*done.warnings, done.unsure] if note],
        )

    def _apply(self, ledger: Ledger, change: Change, out: Path, dtype: str | None) -> wire.Saved:
        after = apply_change(ledger, change)
        lost = survival(after, dtype)
        written = self._write(after, out, dtype)
        notes = [f"{name}: the stored type loses {share:.1%} of the change." for name, share in lost.items()]
        return written.model_copy(update={"notes": notes})

    def _write(self, ledger: Ledger, out: Path, dtype: str | None = None) -> wire.Saved:
        save_ledger(ledger, out, dtype=dtype, found=[])
        n = len(ledger.active)
        base = "; its weights are the unchanged model's, bit for bit" if not n else ""
        return wire.Saved(
            model=out.name,
            says=[f"{out.name} carries {n} change{'' if n == 1 else 's'}{base}."],
        )


def _installed() -> list[str]:
    found = []
    for name in _bundled.BUNDLED:
        try:
            _bundled.find(name)
        except ModelError:
            continue
        found.append(name)
    return found


def _facts(asked: wire.Edit) -> list[Fact]:
    """Make the fact that was written, or read those that were pasted as if they were a file."""
    if asked.facts is not None:
        if asked.prompt or asked.subject or asked.target or asked.truth:
            raise UserError("Give either one fact by its parts, or pasted facts.")
        with tempfile.TemporaryDirectory(prefix="retouch-web-") as folder:
            path = Path(folder) / "facts.jsonl"
            path.write_text(asked.facts, encoding="utf-8", newline="")
            return load_facts(path)
    if not asked.prompt or not asked.target:
        raise UserError("Name a fact: a prompt, its subject and the new answer; or paste facts as JSON Lines.")
    return [Fact.of(asked.prompt, asked.subject, asked.target, asked.truth or None)]


# ---------------------------------------------------------------- in words of the API


def _fields(cls: type[EditMethod]) -> list[wire.SettingField]:
    return [
        wire.SettingField(
            name=f.name, type=f.type, default=f.written, doc=f.doc, allowed=f.allowed, choices=list(f.choices)
        )
        for f in fields_of(cls)
    ]


def _model_facts(ledger: Ledger, name: str) -> wire.ModelFacts:
    a, record = ledger.model.anatomy, ledger.to_dict()
    numbers = {
        "parameters": f"{n_parameters(ledger.model):,}",
        "blocks": f"{a.n_blocks}",
        "width": f"{a.d_model:,}",
        "MLP width": f"{a.d_ff:,}",
        "heads": f"{a.heads} of {a.head_dim}" + (f", {a.kv_heads} with own keys" if a.kv_heads != a.heads else ""),
        "vocabulary": f"{a.vocab_size:,}",
        "stored as": ledger.model.file_dtype,
        "device": str(ledger.model.device),
    }
    reports = {entry.number: entry.planned.report for entry in ledger.entries}
    lines = [_line(line, reports[line["number"]]) for line in record["changes"]]
    return wire.ModelFacts(
        name=name, family=f"{a.family} {a.kind}", base=record["base"], numbers=numbers, changes=lines
    )


def _line(line: Mapping[str, Any], report: Mapping[str, Any]) -> wire.LedgerLine:
    return wire.LedgerLine(
        **{name: line[name] for name in ("number", "id", "method", "when")},
        facts=facts_in_words(line),
        prompts=[f"{filled(fact)} {fact.get('target', '')}" for fact in line["facts"]],
        status=status_in_words(line),
        active=line["status"] == "active" or bool(line.get("in_force")),
        certified=_certified(report),
    )


def _measured(record: Mapping[str, Any]) -> list[wire.MeasuredFact]:
    return [wire.MeasuredFact(**fact) for fact in measured_facts(record["facts"], record["report"].get("effect", ()))]


def _certified(report: Mapping[str, Any]) -> list[str]:
    found = report.get("harm", {}).get("certificates", ())
    return [Certificate(**{name: c[name] for name in c if name != "holds"}).sentence() for c in found]


def _proved(done: Edited) -> list[str]:
    if done.harm is None:
        return []
    ratio = f"Perplexity on neutral text: x {done.harm.perplexity_ratio:.4f}."
    return [*(certificate.sentence() for certificate in done.harm.certificates), ratio]


def _change_row(path: str, kib: int, record: Mapping[str, Any]) -> wire.ChangeRow:
    return wire.ChangeRow(
        path=path,
        id=record.get("id", ""),
        method=record["method"],
        kib=kib,
        facts=_measured(record),
        certified=_certified(record["report"]),
        settings=record["settings"],
        weights=record.get("weights", {}),
    )
