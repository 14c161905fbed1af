"""RecBole's side of recbole_check.py: run by the interpreter of another environment, which has no Retouch.

It reads one JSON object (a model, the exported folder, settings) and writes another (metrics, epochs, seconds).
Nothing of RecBole is changed on disk; what newer releases of NumPy and PyTorch took away is given back here.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

_GONE = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}
"""Names that RecBole 1.2.1 asks of NumPy and that NumPy 2 has no longer."""
_LOGGED = {"state": "WARNING", "show_progress": False}


class _Enough(Exception):
    """The time that was given is over."""


def restore() -> None:
    """Give NumPy its old names back, and let PyTorch read the checkpoint that RecBole has just written."""
    for name, kind in _GONE.items():
        if not hasattr(np, name):
            setattr(np, name, kind)
    torch.load = functools.partial(torch.load, weights_only=False)


def config(asked: dict[str, Any]) -> Any:
    """Say to RecBole what to read and how to train: full ranking, no sampled negatives, choice by NDCG@10."""
    from recbole.config import Config

    folder = Path(asked["folder"])
    ordered = asked["model"] != "Pop"
    columns = ["user_id", "item_id", *(["item_id_list"] if ordered else [])]
    return Config(
        model=asked["model"],
        dataset=folder.name,
        config_dict={
            "data_path": str(folder.parent),
            "benchmark_filename": ["train" if ordered else "plain", "valid", "test"],
            "load_col": {"inter": columns},
            "alias_of_item_id": ["item_id_list"] if ordered else None,
            "eval_args": {"group_by": None, "order": "TO", "mode": "full"},
            "train_neg_sample_args": None,
            "metrics": ["Recall", "NDCG"], "topk": [5, 10], "valid_metric": "NDCG@10", "metric_decimal_place": 6,
            "use_gpu": False,
            **_LOGGED,
            **asked["settings"],
        },
    )  # fmt: skip


def show_all(loader: Any) -> None:
    """Let a model without order rank what a user has already taken, as models of sequences do."""
    for user in loader.uid_list.tolist():
        loader.uid2history_item[user] = torch.zeros(0, dtype=torch.int64)


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """Train one model, and measure its best epoch on the test samples."""
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    told = config(asked)
    init_seed(told["seed"], told["reproducibility"])
    train, valid, test = data_preparation(told, create_dataset(told))
    if not test.is_sequential:
        show_all(valid), show_all(test)
    init_seed(told["seed"], told["reproducibility"])
    model = get_model(told["model"])(told, train.dataset).to(told["device"])
    trainer = get_trainer(told["MODEL_TYPE"], told["model"])(told, model)
    epochs, begin = [], time.process_time()

    def after(epoch: int, score: float) -> None:
        epochs.append(score)
        if time.process_time() - begin > 60 * asked["minutes"]:
            raise _Enough

    try:
        trainer.fit(train, valid, verbose=False, saved=True, show_progress=False, callback_fn=after)
        stopped = ""
    except _Enough:
        stopped = "time"
    seconds = time.process_time() - begin
    found = trainer.evaluate(test, load_best_model=True)
    return {
        "numbers": {name.lower(): float(value) for name, value in found.items()},
        "n_train": len(train.dataset), "n_test": len(test.dataset), "n_items": int(test.dataset.item_num) - 1,
        "valid_ndcg@10": epochs, "stopped": stopped, "cpu_seconds": seconds,
        "versions": {name: version(name) for name in ("recbole", "torch", "numpy")},
    }  # fmt: skip


if __name__ == "__main__":
    restore()
    Path(sys.argv[2]).write_text(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))))
