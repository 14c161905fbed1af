"""Export a saved slim model so that its threshold holds for the exits that stay."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import store
from ..errors import UserError
from ..progress import track
from ..router import Router, open_router
from .data import Example
from .export import Exported, export, recalibrated
from .predict import Classifier, open_classifier
from .recalibrate import calibration_rows, costs_of, saved_record, span_of, table_of
from .risk import WORDS, Loss, Risk
from .rules import Floats, Rule, due
from .table import Table, fit_temperatures, grid
from .thresholds import Threshold, choose

__all__ = ["Handed", "export_saved"]


@dataclass(frozen=True)
class Handed:
    """What became of a saved model.

    Attributes:
        exported: What was written.
        lost: Blocks whose exits the saved model asks and the export has not.
        threshold: The one chosen anew; None where the saved one stays.
        stale: Whether the saved threshold stays although exits are lost or maps quantised.
    """

    exported: Exported
    lost: tuple[int, ...]
    threshold: Threshold | None
    stale: bool

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold."""
        made = self.exported
        return {
            "folder": str(made.folder),
            "cuts": list(made.exits.cuts),
            "bytes": made.n_bytes,
            "lost_exits": list(self.lost),
            "threshold": None if self.threshold is None else self.threshold.to_dict(),
            "quantised": None if made.quantised is None else asdict(made.quantised),
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """Say what is lost, and what holds for the rest."""
        told = []
        if self.lost:
            told.append(f"Exits after blocks {', '.join(map(str, self.lost))} are left out.")
        if self.stale:
            told.append("The threshold was chosen for the saved model and says nothing sure about this export: give "
                        "--calib to choose it anew" + (", or name all blocks in --cuts." if self.lost else "."))  # fmt: skip
        if (found := self.threshold) is None:
            return told
        at = "nobody leaves early" if not found.saved else f"texts leave below {found.saved:.6g}"
        told.append(f"The threshold was chosen anew on the export's own answers: {at}.")
        harm = ["Harm is measured against the saved model at full depth."] if found.certificate is not None else []
        return told + found.sentences() + harm


def export_saved(
    model: str | Path,
    folder: str | Path,
    *,
    cuts: Sequence[int] | None = None,
    int8: bool = False,
    calib: str | Path | None = None,
    keep_refused: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Handed:
    """Export a saved model; with calibration rows, choose its threshold anew on what the export says.

    A certificate is about all exits. So without rows a certified model keeps them all; else, where no cuts are named,
    exits that few texts take get no stage. Should the threshold then be refused, all exits are tried, unless a risk is
    to be certified: whoever tries twice with the same rows has no confidence left, so that all are kept at once.

    Args:
        model: A saved slim model.
        folder: Where the export is to be.
        cuts: See `export`.
        int8: See `export`; needs `calib`, half of whose rows then fit temperatures and the thresholds to try.
        calib: Labelled rows that chose nothing else; of a folder its calib split. The threshold is chosen at the
            cost, the risk, or both, that the model was made for.
        keep_refused: Write it, never leaving early, although that does not hold.
        columns: Names of the columns of `calib`, where they are others; see `retouch.slim.data.read`.

    Raises:
        UserError: As `export`, or rows and model do not fit each other.
        BoundRefused: The export does not hold what the model was made for.
    """
    classifier, record = open_classifier(model), _record(model, calib)
    rows = [] if calib is None else calibration_rows(calib, record, columns)
    asked = _asked(record) if rows else None
    if int8 and len(rows) == 1:
        raise UserError(f"{calib} holds one row; int8 fits temperatures on one half of the rows and chooses the threshold "
                        "on the other. Give more.")  # fmt: skip
    network, leaves = classifier.network, record.get("leaves")
    all_exits = _keeps_all(record, asked, int8)
    shares = None if cuts is not None or all_exits or not leaves else {int(l): s for l, s in leaves.items()}
    texts = [row.text if row.pair is None else (row.text, row.pair) for row in rows]
    with tempfile.TemporaryDirectory() as trial:
        for number, kept in enumerate([None] if shares is None else [shares, None]):
            place = Path(trial) / f"export{number}"
            made = export(
                network,
                classifier.tokenizer,
                place,
                cuts=cuts,
                shares=kept,
                max_tokens=classifier.max_tokens,
                int8=int8,
                texts=texts,
                pairs=classifier.pairs,
            )
            found = None if asked is None else _chosen(open_router(place, threads=1), classifier, rows, record, asked)
            if found is None or found.reachable:
                break  # otherwise once more with all exits: one that few left by may be what the cost needs
        if found is not None:
            if not keep_refused:
                found.require()
            recalibrated(place, threshold=found.saved, temperatures=found.rule.temperatures)
        store.write_folder(folder, {name: (place / name).read_bytes() for name in store.check_folder(place)["files"]})
        made = replace(made, folder=Path(folder), exits=open_router(place, threads=1).exits)
    lost = set(due(network.widths.exits, network.config.every, network.config.min_block)) - set(made.exits.cuts)
    stale = found is None and bool(network.config.threshold) and (bool(lost) or int8)
    return Handed(made, tuple(sorted(lost)), found, stale)


def _keeps_all(record: Mapping[str, Any], asked: tuple[float | None, Risk | None] | None, int8: bool) -> bool:
    """Whether a certificate allows no exit to be left out unasked."""
    if asked is None:
        return bool((record.get("threshold") or {}).get("certificate"))
    flops, risk = asked
    return risk is not None and (flops is not None or int8)  # a risk alone is never refused in float32


def _record(model: str | Path, calib: str | Path | None) -> dict[str, Any]:
    """Read how a model was made; only to choose its threshold anew it has to say all."""
    path = Path(model) / "retouch.json"
    if calib is None:
        return store.read_json(path) if path.is_file() else {}
    return saved_record(model)


def _asked(record: Mapping[str, Any]) -> tuple[float | None, Risk | None] | None:
    """Return the cost and the risk that the saved threshold was chosen for; None where it was for neither."""
    budget, proof = record["budget"], (record["threshold"] or {}).get("certificate")
    flops = budget["flops"] if budget["cost"] == "flops" else None  # seconds of the original cannot be measured here
    risk = None
    if proof is not None:
        loss: Loss = next((loss for loss, what in WORDS.items() if what == proof["what"]), "flip")  # type: ignore[misc]
        delta = round(1 - proof.get("confidence", 0.9), 9)
        risk = Risk(proof["limit"], loss, how="crc" if proof["method"] == "conformal" else "ucb", delta=delta)
    return None if record["threshold"] is None or (flops is None and risk is None) else (flops, risk)


# ---------------------------------------------------------------- the threshold


def _chosen(
    router: Router,
    classifier: Classifier,
    rows: Sequence[Example],
    record: Mapping[str, Any],
    asked: tuple[float | None, Risk | None],
) -> Threshold:
    """Choose the threshold on what the export's exits say, at the cost or risk asked for."""
    saved, (flops, risk) = table_of(classifier, rows), asked
    table, whole = _table(router, rows, saved), saved.logits[-1]
    rule, lambdas = router.exits.deciding(), np.array([p["threshold"] for p in record["curve"]])
    if router.exits.precision == "int8":
        rule, lambdas = _fitted(_part(table, 0), rule)
        table, whole = _part(table, 1), whole[1::2]
    if risk is not None and router.exits.precision == "float32":
        risk = replace(risk, reference="full_depth")  # where that is the same model, never leaving is harmless
    costs = costs_of(table, classifier.network, rule, record)
    span = span_of(record, classifier.network.config)
    return choose(table, rule, lambdas, budget=flops, costs=costs, risk=risk, original=whole, span=span)


def _table(router: Router, rows: Sequence[Example], saved: Table) -> Table:
    """Ask all exits about each text alone: int8 answers depend on batch mates."""
    said = router.encode([row.text if row.pair is None else (row.text, row.pair) for row in rows])
    each = track(range(len(rows)), "ask all exits")
    logits = [router.every_exit(*(part[i : i + 1] for part in said)) for i in each]
    joined = np.concatenate(logits, axis=1).astype(np.float64)
    return Table(joined, router.exits.cuts, saved.labels, said[1].sum(axis=1))


def _part(table: Table, first: int) -> Table:
    """Return every second row: rows that fit something cannot choose the threshold."""
    labels = None if table.labels is None else table.labels[first::2]
    return Table(table.logits[:, first::2], table.exits, labels, table.lengths[first::2])


def _fitted(table: Table, rule: Rule) -> tuple[Rule, Floats]:
    """Fit temperatures, where there are probabilities, and the thresholds to try."""
    if table.classes > 1:
        rule = replace(rule, temperatures=fit_temperatures(table))
    return rule, grid(table, rule)
