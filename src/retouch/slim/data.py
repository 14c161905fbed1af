"""Labelled texts for training and measuring: reading them, and fixing which row serves for what.

`train` fits weights; `valid` chooses states, temperatures and the grid of thresholds; `calib` chooses thresholds and
nothing else; `test` is read once, for the report. A row that chose something can no longer certify it, so `make_task`
keeps the four apart and writes down how. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

from ..errors import UserError, unknown
from ._folders import SPLITS, glue_task, read_file, read_splits
from ._layouts import LAYOUTS, Layout, Rows
from ._quality import METRICS, Metric, quality
from ._reading import Example, Table, few
from .splits import carve

__all__ = ["METRICS", "Example", "Metric", "Rows", "Task", "digest", "make_task", "quality", "read"]

_log = logging.getLogger(__name__)

Source = str | Path | Rows | Sequence[Example]
Columns = Mapping[str, str] | None

HELD = {"sst2": (1000, 500), "mrpc": (500, 250), "rte": (400, 200)}
"""Rows for calib and valid where the numbers are settled; elsewhere `SHARE` of the rows and half of that."""
SHARE, MOST = 0.15, 1000
_METRICS: dict[str | None, Metric] = {"mrpc": "f1", "qqp": "f1", "cola": "mcc", "stsb": "spearman"}


@dataclass(frozen=True)
class Task:
    """What a classifier is to learn, with all its rows.

    Attributes:
        name: Such as ``sst2-20k``.
        labels: Names of the classes, in the order of the indices; None for regression.
        metric: What `quality` measures it by.
        train, valid, calib, test: The rows; `test` may be empty.
        recipe: How the rows came about, as plain values for ``retouch.json``: seed, counts, hashes of the files, what
            was drawn and dropped.
    """

    name: str
    labels: tuple[str, ...] | None
    metric: Metric
    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    calib: tuple[Example, ...]
    test: tuple[Example, ...]
    recipe: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


def read(source: str | Path, split: str | None = None, columns: Columns = None) -> Rows:
    """Read labelled texts as they stand in a file, labels as texts.

    Files are TSV (without quoting), CSV, JSON Lines, Parquet (with pyarrow), or lines of a label, a space and a text.
    The columns are ``text``, ``text2`` for pairs, and ``label``, or named as in the sets of GLUE.

    Args:
        source: A file; or a folder, the common beginning of several files, or a data set on the hub, and then:
        split: Which of its splits: train (if not given), valid, calib or test.
        columns: Names of the columns where they are others: ``{"text": "review", "label": "stars"}``.

    Raises:
        UserError: The rows cannot be used; with file, line and reason.
    """
    if Path(source).is_file():
        return read_file(Path(source), columns)
    found = read_splits(source, columns)
    if (split or "train") not in found:
        raise UserError(f"{source} has no split {split!r}; it has {few(list(found))}.")
    return found[split or "train"]


def make_task(
    train: Source,
    valid: Source | None = None,
    calib: Source | None = None,
    test: Source | None = None,
    *,
    metric: Metric | None = None,
    labels: Sequence[str] | None = None,
    n_calib: int | None = None,
    n_valid: int | None = None,
    max_train: int | None = None,
    seed: int = 0,
    columns: Columns = None,
    keep_overlap: bool = False,
    name: str | None = None,
) -> Task:
    """Make a task, and draw from the training rows what is not given.

    `calib` and `valid` are drawn so that none of their texts, and no run of words of one, is trained on: of single
    texts whole rows that are part of no other, of pairs groups connected by shared texts. Training rows that overlap
    with a given `valid` or `calib` are dropped as well; overlaps with `test` are only counted. See `splits`.

    Args:
        train: A file, rows, or examples whose labels are texts or numbers; or a folder (or a set on the hub), whose
            other splits then serve where none is given. In a folder of GLUE `test` is dev, as published.
        valid: A file, rows or examples, as `train`.
        calib: Likewise.
        test: Likewise.
        metric: What to measure by. If not given: as usual for tasks of GLUE, spearman for regression, else accuracy.
            ``spearman`` makes it a regression.
        labels: Names of the classes in the order wanted, such as that of a classifier at hand; sorted if not given.
        n_calib: Rows to draw for `calib`: 1,000 of SST-2, 500 of MRPC, 400 of RTE, else 15 % up to 1,000. 0 for none.
        n_valid: Likewise for `valid`; half as many if not given.
        max_train: Training rows to keep at most, drawn by the seed after everything else.
        seed: Decides all draws.
        columns: As for `read`.
        keep_overlap: Keep training rows that overlap with a given `valid` or `calib`.
        name: The task's name; that of the folder or file if not given.

    Raises:
        UserError: The rows cannot be used, there are too few, training rows have a single class, a split has a label
            that training has not, or two splits are the same rows.
    """
    if metric is not None and metric not in get_args(Metric):
        raise unknown("metric", metric, METRICS)
    given, title, key = _gathered({"train": train, "valid": valid, "calib": calib, "test": test}, columns)
    wanted = {"calib": n_calib, "valid": n_valid}
    counts = _counts(wanted, given, key)
    regression = _is_regression(given["train"], metric, labels)
    metric = metric or ("spearman" if regression else _METRICS.get(key, "accuracy"))
    names = None if regression else _classes(given["train"], labels)
    rows = {split: _labelled(one, names) for split, one in given.items()}
    _check_apart(rows)
    _check_kinds(rows)
    held = carve(
        rows["train"],
        n_calib=counts["calib"],
        n_valid=counts["valid"],
        seed=seed,
        given=[e for split in ("valid", "calib") for e in rows.get(split, ())],
        test=rows.get("test", ()),
        keep_overlap=keep_overlap,
    )
    kept = _fewer(held.train, max_train, seed)
    parts: dict[str, Any] = {s: rows.get(s, ()) for s in ("valid", "calib", "test")} | {
        "train": _at(rows["train"], kept)
    }
    parts |= {split: _at(rows["train"], getattr(held, split)) for split in counts if split not in rows}
    _check_left(rows["train"], parts, names)
    title = name or title
    if len(kept) < len(held.train):
        title += f"-{len(kept) // 1000}k" if len(kept) % 1000 == 0 else f"-{len(kept)}"
    task = Task(title, names, metric, **parts)
    asked = {"seed": seed, "n_calib": counts["calib"], "n_valid": counts["valid"], "max_train": max_train}
    return replace(task, recipe=_recipe(task, given, asked, held.facts))


def digest(examples: Sequence[Example]) -> str:
    """Hash examples, in order: 64 hexadecimal digits, the same for the same rows of any file.

    Example:
        >>> digest([Example("a", None, 0)]) == digest([Example("a", None, 1)])
        False
    """
    found = hashlib.sha256()
    for example in examples:
        line = json.dumps([example.text, example.pair, example.label], ensure_ascii=False)
        found.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()


# What is given


def _gathered(sources: dict[str, Source | None], columns: Columns) -> tuple[dict[str, Rows], str, str | None]:
    """Read everything; with the task's name, and which task of GLUE it is."""
    train = sources["train"]
    found: dict[str, Rows] = {}
    key = title = None
    if isinstance(train, str | Path):
        key = glue_task(train)
        path = Path(train)
        title = key or (path.parent.name if path.stem in SPLITS else path.name.removesuffix(path.suffix))
        if not path.is_file():
            found = read_splits(train, columns)
    for split, source in sources.items():
        if source is not None and not (split == "train" and found):
            found[split] = _rows(source, split, columns)
    key = found["train"].layout.task or key
    return {split: found[split] for split in SPLITS if split in found}, title or key or "task", key


def _rows(source: Source, split: str, columns: Columns) -> Rows:
    if isinstance(source, Rows):
        return source
    if isinstance(source, str | Path):
        return read(source, split, columns)
    examples = tuple(source)
    if not examples:
        raise UserError(f"{split} holds no examples.")
    empty = [i for i, example in enumerate(examples, 1) if not example.text.strip()]
    if empty:
        raise UserError(f"{split} example {few([str(i) for i in empty])}: the text is empty.")
    pair = next((layout for layout in LAYOUTS if layout.pair), LAYOUTS[0])
    layout = pair if examples[0].pair is not None else Layout("text", None, "label", glue=False)
    return Rows(examples, Table(split, None, (), range(1, len(examples) + 1), "example"), layout)


def _counts(wanted: dict[str, int | None], given: Mapping[str, Rows], key: str | None) -> dict[str, int]:
    """Decide how many rows to draw for calib and valid."""
    for split, count in wanted.items():
        if count is not None and (count < 0 or (split in given and count)):
            why = f"{split} is given, and n_{split} says how many rows to draw for it. Give one of them"
            raise UserError(f"n_{split} must be 0 or more; got {count}." if count < 0 else f"{why}.")
    n = len(given["train"])
    share = min(MOST, max(1, round(SHARE * n)))
    usual = HELD.get(key or "", (share, max(1, share // 2)))
    usual = usual if sum(usual) < n / 2 else (share, max(1, share // 2))
    plain = zip(("calib", "valid"), usual)
    return {s: 0 if s in given else usual_n if wanted[s] is None else int(wanted[s] or 0) for s, usual_n in plain}


def _check_apart(rows: Mapping[str, Sequence[Example]]) -> None:
    for (one, examples), (other, others) in combinations(rows.items(), 2):
        if examples == others:
            raise UserError(
                f"{one} and {other} are the same rows. Rows that chose something cannot measure it: give other ones, "
                "or leave out valid and calib, which are then drawn from the training rows."
            )


def _check_kinds(rows: Mapping[str, Sequence[Example]]) -> None:
    """Refuse splits of single texts beside splits of pairs."""
    pairs = {split: example.pair is not None for split, examples in rows.items() for example in examples}
    if odd := [split for split, pair in pairs.items() if pair != pairs["train"]]:
        kinds = "pairs of texts", "single texts"
        raise UserError(
            f"{odd[0]} has {kinds[pairs['train']]}, and the training rows are {kinds[not pairs['train']]}. Give rows of "
            "one kind."
        )


# Labels


def _number(label: object) -> float | None:
    try:
        return float(label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _is_regression(train: Rows, metric: Metric | None, labels: Sequence[str] | None) -> bool:
    """Say whether labels are numbers to predict: so asked, so published, or most have a fractional part."""
    if metric is not None or labels is not None:
        return metric == "spearman"
    if train.layout.task == "stsb":
        return True
    numbers = [_number(example.label) for example in train]
    return sum(n is not None and math.isfinite(n) and not n.is_integer() for n in numbers) > len(numbers) / 2


def _classes(train: Rows, labels: Sequence[str] | None) -> tuple[str, ...]:
    seen = Counter(str(example.label) for example in train)
    if labels is not None:
        names = tuple(map(str, labels))
        if len({*names}) < len(names) or len(names) < 2:
            raise UserError(f"labels must be two names or more, all different; got {few(names)}.")
        if foreign := sorted({*seen} - {*names}):
            raise UserError(f"{train.table.name} has the labels {few(foreign)}, which are not among {few(names)}.")
        return names
    if len(seen) > max(2, len(train) / 2) and len(train) >= 20:
        raise UserError(
            f"{train.table.name} has {len(seen)} different labels in {len(train)} rows: is that the label's column? "
            "Numbers that are to be predicted need metric='spearman'."
        )
    numbers = {label: _number(label) for label in seen}
    if len(seen) == 1:
        raise UserError(f"All labels of {train.table.name} are {next(iter(seen))!r}: there is nothing to tell apart.")
    if train.names is not None and {*seen} <= {*train.names}:
        return tuple(name for name in train.names if name in seen)
    if None in numbers.values():
        return tuple(sorted(seen))
    return tuple(sorted(seen, key=lambda label: (numbers[label] or 0.0, label)))


def _check_left(
    train: Sequence[Example], parts: Mapping[str, Sequence[Example]], names: tuple[str, ...] | None
) -> None:
    """Check what is left to train on, and say which classes it has no more."""
    left = parts["train"]
    for rows, where in ((train, "the training rows"), (left, "the training rows that are left")):
        seen = {example.label for example in rows}
        if len(seen) == 1:
            only = seen.pop()
            name = only if names is None else names[int(only)]
            raise UserError(f"All labels of {where} are {name!r}: there is nothing to tell apart.")
    if names is None:
        return
    learnt = {int(e.label) for e in left}
    for split in ("valid", "calib", "test"):
        if unknown_ := sorted({int(e.label) for e in parts[split]} - learnt):
            raise UserError(
                f"{split} has rows of {few([names[i] for i in unknown_])}, and no training row of it is left after the "
                "draws. Give more rows of it, keep more (max_train), or leave the class out."
            )
    if gone := sorted({int(e.label) for e in train} - learnt):
        _log.warning("No training row of %s is left after the draws.", few([names[i] for i in gone]))


def _labelled(rows: Rows, names: tuple[str, ...] | None) -> tuple[Example, ...]:
    """Turn labels into indices of classes, or into numbers."""
    if names is None:
        numbers = [_number(example.label) for example in rows]
        bad = [i for i, number in enumerate(numbers) if number is None or not math.isfinite(number)]
        if bad:
            raise UserError(f"{rows.table.at(*bad)}: a label must be a finite number; got {rows[bad[0]].label!r:.60}.")
        return tuple(Example(e.text, e.pair, float(n or 0.0)) for e, n in zip(rows, numbers))
    index = {label: i for i, label in enumerate(names)}
    bad = [i for i, example in enumerate(rows) if str(example.label) not in index]
    if bad:
        foreign = sorted({str(rows[i].label) for i in bad})
        raise UserError(
            f"{rows.table.at(*bad)}: label {few(foreign)} does not occur in the training rows, which have "
            f"{few(names, 12)}."
        )
    return tuple(Example(e.text, e.pair, index[str(e.label)]) for e in rows)


# The rest


def _at(rows: Sequence[Example], numbers: Sequence[int]) -> tuple[Example, ...]:
    return tuple(rows[number] for number in numbers)


def _fewer(numbers: list[int], most: int | None, seed: int) -> list[int]:
    if most is not None and most < 1:
        raise UserError(f"max_train must be at least 1 row; got {most}.")
    if most is None or most >= len(numbers):
        return numbers
    return sorted(random.Random(f"{seed} train").sample(numbers, most))


def _recipe(task: Task, given: Mapping[str, Rows], asked: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    files = {
        split: {"file": Path(rows.table.name).name, "rows": len(rows), "skipped": rows.skipped, "sha256": rows.sha256}
        for split, rows in given.items()
    }
    parts = {split: getattr(task, split) for split in SPLITS}
    return {
        "name": task.name,
        "metric": task.metric,
        "labels": None if task.labels is None else list(task.labels),
        **asked,
        "files": files,
        "draw": facts,
        "rows": {split: len(rows) for split, rows in parts.items()},
        "sha256": {split: digest(rows) for split, rows in parts.items()},
    }
