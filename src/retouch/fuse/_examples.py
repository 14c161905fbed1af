"""Read examples from a file, turn them into token rows, and say which rows make which step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from .. import store, tokens
from ..errors import FactError, absent
from ..model import Model
from ..tokens import broken
from .base import Example

__all__ = ["Order", "encoded", "read_examples", "rows_key"]


def read_examples(path: str | Path) -> tuple[Example, ...]:
    """Read what an edge trains on.

    ``.jsonl``: one object a line, with the texts ``prompt`` and ``target``; other names are left unread. ``.tsv``: a
    header line that names the columns ``prompt`` and ``target``, then one example a line.

    Raises:
        FactError: The file is missing, of another kind or empty, or a line cannot be used; the message names the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FactError(str(absent(path))) from error
    except OSError as error:
        raise FactError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise FactError(f"{path} is not UTF-8 text: byte {error.start}: {error.reason}. Save it as UTF-8.") from error
    if path.suffix not in (".jsonl", ".tsv"):
        raise FactError(f"{path}: examples are read from .jsonl (prompt and target a line) or .tsv files.")
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = _objects(path, lines) if path.suffix == ".jsonl" else _columns(path, lines)
    if not found:
        raise FactError(f"{path} holds no examples.")
    return tuple(found)


def _objects(path: Path, lines: Sequence[tuple[int, str]]) -> list[Example]:
    found = []
    for number, line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FactError(f"{path} line {number}: not valid JSON ({error}).") from error
        if not isinstance(record, dict):
            raise FactError(f'{path} line {number}: expected {{"prompt": …, "target": …}}; got {line[:60]!r}.')
        found.append(_example(path, number, record.get("prompt"), record.get("target")))
    return found


def _columns(path: Path, lines: Sequence[tuple[int, str]]) -> list[Example]:
    rows = [(number, line.rstrip("\r").split("\t")) for number, line in lines]
    header = rows[0][1] if rows else []
    if missing := [name for name in ("prompt", "target") if name not in header]:
        raise FactError(
            f"{path} line 1: the header must name the columns prompt and target; {missing[0]!r} is missing."
        )
    prompt, target = header.index("prompt"), header.index("target")
    for number, cells in rows:
        if len(cells) != len(header):
            raise FactError(f"{path} line {number}: {len(cells)} columns, and the header names {len(header)}.")
    return [_example(path, number, cells[prompt], cells[target]) for number, cells in rows[1:]]


def _example(path: Path, number: int, prompt: object, target: object) -> Example:
    for name, value in (("prompt", prompt), ("target", target)):
        if not isinstance(value, str) or not value.strip():
            raise FactError(f"{path} line {number}: {name} must be a text that is not empty; got {value!r}.")
        if broken(value):
            raise FactError(f"{path} line {number}: {name} holds half of a character (a lone surrogate). Correct it.")
    return Example(str(prompt), str(target))


# ---------------------------------------------------------------- token rows


def encoded(model: Model, examples: Sequence[Example], max_tokens: int) -> list[tokens.Row]:
    """Tokenise examples; prompts that are too long lose their beginning.

    Raises:
        FactError: There is none, or an answer alone is longer than `max_tokens`.
    """
    if not examples:
        raise FactError("There are no examples to train on.")
    rows = tokens.encode(model.tokenizer, [tokens.Text(before=e.prompt, target=e.target) for e in examples])
    return [_shortened(row, max_tokens, number, model) for number, row in enumerate(rows, 1)]


def _shortened(row: tokens.Row, limit: int, number: int, model: Model) -> tokens.Row:
    over = len(row.ids) - limit
    if over <= 0:
        return row
    front = row.ids[:1] if row.ids[0] == model.tokenizer.bos_token_id else ()
    over += len(front)
    if over > row.prompt:
        raise FactError(
            f"Example {number}: its answer has {len(row.target)} tokens, and a row holds {limit}. Raise max_tokens."
        )
    return tokens.Row((*front, *row.ids[over:]), None, row.prompt - over + len(front), row.merged)


def rows_key(rows: Sequence[tokens.Row]) -> str:
    """Name token rows by their content."""
    text = json.dumps([[*row.ids, row.prompt] for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()


class Order:
    """An endless order of rows: a new permutation each pass, known without going through the ones before."""

    def __init__(self, n: int, seed: int, what: str) -> None:
        self.n, self.seed, self.what = n, seed, what
        self._pass = cache(self._permuted)

    def _permuted(self, number: int) -> list[int]:
        seed = int(store.key(seed=self.seed, what=self.what, number=number)[:15], 16)
        order: list[int] = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed)).tolist()
        return order

    def take(self, start: int, count: int) -> list[int]:
        """Return `count` row numbers from position `start` on."""
        return [self._pass(j // self.n)[j % self.n] for j in range(start, start + count)]
