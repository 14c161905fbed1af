"""Which files of a folder, or splits of a data set on the hub, are train, valid, calib and test.

A folder holds ``train.*`` and the like, perhaps each with the set's name in front (``TREC.train.all``). Folders of GLUE
are read as published: their test files have no labels, so that dev is what is reported on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError, absent
from ..store import sha256_file
from ._layouts import LAYOUTS, Layout, Rows, rows_of
from ._reading import Table, few, label_text, read_table

__all__ = ["GLUE", "SPLITS", "glue_task", "hub_splits", "read_file", "read_splits"]

SPLITS = ("train", "valid", "calib", "test")
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
_WORDS = {"validation": "valid", "val": "valid", "calibration": "calib", "dev": "dev"} | {s: s for s in SPLITS}
_SPLIT = re.compile(rf"(?P<set>.*?)(^|[._-])(?P<split>{'|'.join(_WORDS)})(\d+k?)?(?P<rest>([._-].*)?)", re.IGNORECASE)
_FORMS = {".tsv", ".csv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".all"}
_NO_DATA = re.compile(r"[._-](ids|mismatched)\b", re.IGNORECASE)  # MRPC's list of dev rows; MNLI's second dev set
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

Columns = Mapping[str, str] | None


def read_file(path: Path, columns: Columns = None) -> Rows:
    """Read one file, with its hash."""
    rows = rows_of(read_table(path), columns)
    return replace(rows, sha256=sha256_file(path))


def glue_task(path: str | Path) -> str | None:
    """Name the GLUE task that a folder, a file's folder or a hub id is called after.

    Example:
        >>> glue_task("glue/SST-2"), glue_task("data/train.tsv")
        ('sst2', None)
    """
    parts = re.split(r"[/:\\]", str(path))[-2:]
    folded = [re.sub(r"[^a-z0-9]", "", part.casefold()) for part in reversed(parts)]
    return next((part for part in folded if part in GLUE), None)


def read_splits(source: str | Path, columns: Columns = None) -> dict[str, Rows]:
    """Read all splits of a folder, of files that share the beginning of their names, or of a set on the hub.

    Args:
        source: A folder; ``FOLDER/NAME`` for its files ``NAME.train.tsv`` and so on; or a hub id, with the
            configuration after a colon if it has several (``nyu-mll/glue:sst2``).
        columns: As for `rows_of`.

    Returns:
        The splits that are there, ``train`` always.

    Raises:
        UserError: Nothing is there, or not one file for a split.
    """
    path = Path(source)
    files = _files(path)
    if files:
        rows = {split: read_file(file, columns) for split, file in files.items() if split == "train"}
        if "train" not in rows:
            raise UserError(f"{path} has no file for training; found {few([f.name for f in files.values()])}.")
        return rows | {
            split: read_file(file, columns)
            for split, file in _parts(files, _is_glue(source, rows["train"].layout, files.get("test"))).items()
            if split != "train"
        }
    if path.is_dir():
        raise UserError(f"{path} holds no file train.tsv, .csv, .jsonl or .parquet.")
    local = path.is_absolute() or (path.parent != Path() and path.parent.is_dir())
    if local or not _HUB.fullmatch(str(source)):
        raise absent(path)
    return _hub(str(source), columns)


def _is_glue(source: str | Path, layout: Layout, test: Path | None) -> bool:
    """Say whether the test file is one of GLUE, without labels: by the folder's name, or by its columns."""
    if glue_task(source) is not None or test is None or not layout.glue:
        return glue_task(source) is not None
    table = read_table(test)
    names = table.columns or table.rows[0]
    return not layout.label or layout.label not in {str(name).strip().casefold() for name in names}


def _parts(found: dict[str, Any], glue: bool) -> dict[str, Any]:
    """Give dev its part: of GLUE it is what is reported on; elsewhere it is `valid` unless no test is there."""
    if "dev" not in found:
        return found
    rest = {split: one for split, one in found.items() if split != "dev"}
    if "valid" in rest:
        return rest
    if glue or "test" not in rest:
        return rest | {"test": found["dev"]}
    return rest | {"valid": found["dev"]}


def _files(path: Path) -> dict[str, Path]:
    """Find the file of each split, dev included."""
    folder = path if path.is_dir() else path.parent
    wanted = None if path.is_dir() else path.name.casefold()
    found: dict[str, dict[str, list[Path]]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _SPLIT.fullmatch(file.name)
        if file.name.startswith(".") or _NO_DATA.search(file.name) or not file.is_file():
            continue
        if wanted and file.stem.casefold() == wanted and file.suffix.lower() in _FORMS:
            return {"train": file}
        if match and (file.suffix.lower() in _FORMS or match["rest"] == ""):
            split, name = _WORDS[match["split"].casefold()], match["set"].casefold()
            if wanted in (None, name):
                found.setdefault(split, {}).setdefault(name, []).append(file)
    return {split: _one(folder, split, named) for split, named in found.items()}


def _one(folder: Path, split: str, named: dict[str, list[Path]]) -> Path:
    """Choose the file of a split: the one without a name in front, or the only one."""
    files = named.get("") or (next(iter(named.values())) if len(named) == 1 else [])
    if len(files) == 1:
        return files[0]
    names = few([file.name for files in named.values() for file in files])
    if files or not all(named):
        raise UserError(f"{folder} holds several files for {split}: {names}. Keep one, or give the files one by one.")
    raise UserError(f"{folder} holds several data sets ({names}). Name one: {folder / min(named)}")


# The hub


def _hub(source: str, columns: Columns) -> dict[str, Rows]:
    if Path(source).suffix.lower() in _FORMS:  # the name of a file, and of no data set
        raise absent(Path(source))
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"There is no file or folder {source!r}. To read it as a data set from the hub, install the package "
            "datasets: pip install datasets"
        ) from error
    name, _, configuration = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the package's own errors have no common root
        raise UserError(f"{source!r} is neither a file nor a data set that the hub gives: {error}") from error
    return hub_splits(source, loaded, columns)


def hub_splits(source: str, loaded: Mapping[str, Any], columns: Columns = None) -> dict[str, Rows]:
    """Turn the splits of a set that `datasets` loaded into rows; splits without labels are left out."""
    found = {}
    for split, data in loaded.items():
        place = {"validation": "dev", "validation_matched": "dev"}.get(split) or _WORDS.get(split)
        if place and not _hidden(data):
            rows = rows_of(_hub_table(f"{source} {split}", data), columns)
            found[place] = replace(rows, names=_names(data, rows.layout))
    if "train" not in found:
        raise UserError(f"{source} has no split 'train' with labels; it has {few(list(loaded))}.")
    return _parts(found, glue_task(source) is not None)


def _hidden(data: Any) -> bool:
    """Say whether all labels of a split are -1, which stands for a label that is not published."""
    names = [name for name in data.column_names if name.casefold() in {layout.label for layout in LAYOUTS}]
    return bool(names) and all(set(data[name]) == {-1} for name in names)


def _names(data: Any, layout: Layout) -> tuple[str, ...] | None:
    """Return the names of the classes in the set's order, by which F1 knows the class that it is of."""
    column = next(name for name in data.column_names if name.strip().casefold() == layout.label)
    names = getattr(data.features[column], "names", None)
    return tuple(str(label_text(name)) for name in names) if names else None


def _hub_table(name: str, data: Any) -> Table:
    columns = []
    for column in data.column_names:
        names = getattr(data.features[column], "names", None)
        cells = list(data[column])
        columns.append([names[cell] if cell >= 0 else None for cell in cells] if names else cells)
    return Table(name, tuple(data.column_names), list(zip(*columns)), range(1, len(data) + 1), "row")
