"""An outside check of `recommend`: RecBole's Pop and SASRec on our own split, beside our popularity and SASRec.

RecBole pins an old Ray, so it lives in an environment of its own and is never imported here. Without ``--python`` the
script says that RecBole is not installed, and measures ours alone.

python benchmarks/recbole_check.py --data ml-100k --python recbole-env/bin/python --minutes 4
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import _peer

from retouch import store
from retouch.errors import UserError
from retouch.recommend.base import Recommender, Run
from retouch.recommend.data import Interactions, load
from retouch.recommend.evaluate import evaluate
from retouch.recommend.export import write_benchmark
from retouch.recommend.popularity import Popularity
from retouch.recommend.sasrec import SASRec
from retouch.recommend.splits import Splits, split

METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
NAME = "split"
"""Not the data's own name: RecBole takes some names, ml-100k among them, for data sets that it ships."""
PAIRS = {"Pop": "popularity", "SASRec": "sasrec"}


def settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Say how RecBole trains: as wide, as deep and with as long histories as ours."""
    ours = SASRec()
    return {
        # RecBole 1.2.1 counts an item once a batch, however often it stands in it (its issues 1844 and 2198)
        "Pop": {"seed": options.seed, "epochs": 1, "train_batch_size": 1},
        "SASRec": {
            "seed": options.seed, "epochs": options.epochs, "train_batch_size": 512, "stopping_step": ours.patience,
            "MAX_ITEM_LIST_LENGTH": options.history, "hidden_size": ours.d_model, "inner_size": 4 * ours.d_model,
            "n_layers": ours.n_blocks, "n_heads": ours.n_heads, "hidden_dropout_prob": ours.dropout,
            "attn_dropout_prob": ours.dropout, "learning_rate": ours.learning_rate,
        },
    }  # fmt: skip


def ours(data: Interactions, splits: Splits, method: Recommender) -> dict[str, Any]:
    """Fit and measure one of our methods; nothing is hidden from the ranking."""
    begin = time.process_time()
    scorer = method.fit(Run(data, splits))
    seconds = time.process_time() - begin
    numbers = evaluate(scorer, data, splits, n_boot=0).numbers
    return {
        "status": "done", "numbers": {name: numbers[name] for name in METRICS}, "cpu_seconds": seconds,
        "epochs": len(getattr(scorer, "history", ())) or None,
    }  # fmt: skip


def theirs(options: argparse.Namespace, folder: Path, model: str) -> dict[str, Any]:
    """Run one model of RecBole as a process of its environment, in a folder that takes what it writes."""
    asked = {"model": model, "folder": str(folder), "minutes": options.minutes, "settings": settings(options)[model]}
    question, answer = folder.parent / f"{model}.json", folder.parent / f"{model}-told.json"
    question.write_text(json.dumps(asked))
    command = [options.python, str(Path(__file__).with_name("_recbole.py")), str(question), str(answer)]
    try:
        done = subprocess.run(
            command, cwd=folder.parent, capture_output=True, text=True, check=False, timeout=options.limit
        )
    except subprocess.TimeoutExpired:
        return {"status": f"not finished after {options.limit} s"}
    except OSError as error:
        return {"status": f"cannot be run: {error}"}
    if done.returncode or not answer.is_file():
        return {"status": f"failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}"}
    told = dict(store.read_json(answer))
    return {"status": "done", **told, "epochs": len(told["valid_ndcg@10"]) if model == "SASRec" else None}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Export the split, run both sides, and return everything."""
    data = load(options.data)
    splits = split(data, holdout="targets", seed=options.seed)
    methods = {
        "popularity": Popularity(seed=options.seed),
        "sasrec": SASRec(seed=options.seed, n_history=options.history, n_epochs=options.epochs),
    }
    chosen = [model for model in PAIRS if model in options.models.split(",")]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = write_benchmark(data, splits, Path(place) / NAME, options.history)
        for model in chosen:
            rows[PAIRS[model]] = ours(data, splits, methods[PAIRS[model]])
            here = theirs(options, folder, model) if options.python else {"status": "not installed"}
            rows[f"RecBole {model}"] = here
    sizes = {"users": data.n_users, "items": data.n_items, "train": len(splits.train), "test": len(splits.test)}
    asked = {k: v for k, v in vars(options).items() if k not in ("python", "json", "data")}
    return {"machine": _peer.machine(), "data": data.name, **sizes, "options": asked, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """Print both sides, pair by pair."""
    table = []
    for name, row in result["rows"].items():
        numbers = row.get("numbers", {})
        cells = [f"{numbers[m]:.4f}" if m in numbers else "" for m in METRICS]
        seconds = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
        table.append([name, *cells, str(row.get("epochs") or ""), seconds, row.get("stopped") or row["status"]])
    title = f"{result['test']:,} users of {result['data']}, full ranking, nothing hidden"
    notes = ["Ties count against the target with us; with RecBole they fall as they come."]
    if any(row["status"] == "not installed" for row in result["rows"].values()):
        notes.append("RecBole is not installed: give --python, the interpreter of an environment that has it.")
    _peer.show(title, ("model", *METRICS, "epochs", "CPU s", "ended"), table, notes)


def main() -> None:
    """Read the flags, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("RETOUCH_DATA", ".")) / "ml-100k"
    parser.add_argument("--data", type=Path, default=default, help="interactions in any format that we read")
    parser.add_argument("--python", help="the interpreter that has RecBole; without it RecBole is not run")
    parser.add_argument("--models", default="Pop,SASRec", help="which pairs")
    parser.add_argument("--history", type=int, default=50, help="latest items that SASRec sees, on both sides")
    parser.add_argument("--epochs", type=int, default=200, help="most epochs of SASRec, on both sides")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="CPU minutes after which RecBole trains no further epoch"
    )
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds after which a run of RecBole is given up")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of both sides")
    parser.add_argument("--json", type=Path, default=_peer.RESULTS / "recbole_check.json", help="where the result goes")
    options = parser.parse_args()
    try:
        result = measure(options)
    except UserError as error:
        parser.error(str(error))
    show(result)
    _peer.write(options.json, result)


if __name__ == "__main__":
    main()
