"""Serve an exported slim model: run a stage, let sure rows leave, call the next stage only if rows remain.

Needs numpy, onnxruntime and tokenizers, and never loads torch or transformers. A stage that is not called is work that
is not done: `Router.calls` counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._exits import FORMAT, Exits, read_exits, stage_name
from ._rules import Ints, Rule, State, advance, log_softmax, uncertainty
from ._texts import Prediction, Text, check_texts, refuse_bare
from .errors import StoreError, UserError
from .store import check_folder

__all__ = ["FORMAT", "Answers", "Exits", "Prediction", "Router", "open_router", "read_exits"]

Floats: TypeAlias = NDArray[np.floating[Any]]
Bools: TypeAlias = NDArray[np.bool_]


# ---------------------------------------------------------------- answers


@dataclass(frozen=True)
class Answers:
    """The answers to a batch.

    Attributes:
        logits: Of the exit that each row took, (batch, classes).
        where: The block of that exit, (batch).
    """

    logits: Floats
    where: Ints


# ---------------------------------------------------------------- the router


class Router:
    """An exported slim model, ready to answer. Made by `open_router`.

    Attributes:
        exits: Where rows may leave, and when.
        calls: How often each stage's session was called.
        rows: How many rows each stage worked on.
    """

    def __init__(self, exits: Exits, sessions: Sequence[Any], tokenizer: Any) -> None:
        self.exits = exits
        self.calls = [0] * len(sessions)
        self.rows = [0] * len(sessions)
        self._sessions = tuple(sessions)
        self._tokenizer = tokenizer

    def answer(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Answers:
        """Answer a batch; rows leave as soon as they are sure, and the others go on without them and their padding.

        Shapes: all (batch, tokens), whole numbers; padding may stand on either side.

        Args:
            input_ids: Token ids.
            attention_mask: 1 for tokens, 0 for padding.
            token_type_ids: The text of a pair that a token belongs to; None for single texts.

        Raises:
            UserError: Shapes differ, a row has no token or too many, or an id is not in the vocabulary.
        """
        ids, mask, types = self._checked(input_ids, attention_mask, token_type_ids)
        answers = Answers(np.zeros((len(ids), self.exits.classes), np.float32), np.full(len(ids), -1, np.int64))
        rows, feed = np.arange(len(ids)), self._first(ids, mask, types)
        rule, state = self.exits.deciding(), None
        for stage in range(len(self._sessions) if len(ids) else 0):
            hidden, logits = self._run(stage, feed)
            state = advance(state, logits, rule.tolerance)
            left = self._leaving(stage, state, rule)
            answers.logits[rows[left]] = logits[left]
            answers.where[rows[left]] = self.exits.cuts[stage]
            if left.all():
                break
            rows, mask, state = rows[~left], mask[~left], state.take(~left)
            n_tokens = mask.sum(axis=1).max()
            mask = np.ascontiguousarray(mask[:, :n_tokens])
            feed = {"hidden": np.ascontiguousarray(hidden[~left, :n_tokens]), "attention_mask": mask}
        return answers

    def every_exit(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Floats:
        """Ask all exits, so that thresholds can be chosen from what they say; nobody leaves.

        Shapes: the inputs (batch, tokens), as in `answer`.

        Returns:
            Logits, (cuts, batch, classes).

        Raises:
            UserError: As `answer`.
        """
        ids, mask, types = self._checked(input_ids, attention_mask, token_type_ids)
        found = np.zeros((len(self._sessions), len(ids), self.exits.classes), np.float32)
        feed = self._first(ids, mask, types)
        for stage in range(len(self._sessions) if len(ids) else 0):
            hidden, found[stage] = self._run(stage, feed)
            feed = {"hidden": hidden, "attention_mask": mask}
        return found

    def _leaving(self, stage: int, state: State, rule: Rule) -> Bools:
        """Say which rows leave at the exit of a stage."""
        block = self.exits.cuts[stage]
        if block == self.exits.cuts[-1]:
            return np.ones(len(state.last), dtype=np.bool_)
        if self.exits.threshold is None:
            return np.zeros(len(state.last), dtype=np.bool_)
        heat = rule.temperature(self.exits.cuts, block)
        return np.asarray(uncertainty(rule.name, state, self.exits.blocks, heat) < self.exits.threshold)

    def _first(self, ids: Ints, mask: Ints, types: Ints) -> dict[str, Any]:
        return {"input_ids": ids, "attention_mask": mask} | (
            {"token_type_ids": types} if self.exits.token_types else {}
        )

    def _run(self, stage: int, feed: dict[str, Any]) -> tuple[Floats, Floats]:
        found = self._sessions[stage].run(None, feed)
        self.calls[stage] += 1
        self.rows[stage] += len(feed["attention_mask"])
        return found[0], found[-1]

    def _checked(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> tuple[Ints, Ints, Ints]:
        ids, mask = np.asarray(input_ids, np.int64), np.asarray(attention_mask, np.int64)
        types = np.zeros_like(ids) if token_type_ids is None else np.asarray(token_type_ids, np.int64)
        if ids.ndim != 2 or not ids.shape == mask.shape == types.shape:
            raise UserError(
                f"input_ids, attention_mask and token_type_ids must all be (batch, tokens); got {ids.shape}, "
                f"{mask.shape} and {types.shape}."
            )
        if not len(ids):
            return ids, mask, types
        if not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
            raise UserError("attention_mask must hold 1 for tokens and 0 for padding, with a token in every row.")
        if (n_tokens := int(mask.sum(axis=1).max())) > self.exits.positions:
            raise UserError(f"A row has {n_tokens} tokens; the model reads at most {self.exits.positions}. Cut it.")
        order = np.argsort(1 - mask, axis=1, kind="stable")[:, :n_tokens]
        ids, mask, types = (np.take_along_axis(array, order, axis=1) for array in (ids, mask, types))
        ids = np.where(mask == 1, ids, self.exits.pad)
        if ids.min() < 0 or ids.max() >= self.exits.vocab:
            raise UserError(f"input_ids must lie from 0 to {self.exits.vocab - 1}. Use the model's own tokenizer.")
        return ids, mask, types * mask

    def encode(self, texts: Sequence[Text]) -> tuple[Ints, Ints, Ints]:
        """Turn texts, or pairs of texts, into ids, mask and token types, padded to the longest.

        Shapes: all (texts, tokens).
        """
        return self._padded(self._tokenizer.encode_batch(list(texts)))

    def _padded(self, rows: Sequence[Any]) -> tuple[Ints, Ints, Ints]:
        shape = len(rows), max((len(row.ids) for row in rows), default=0)
        ids = np.full(shape, self.exits.pad, np.int64)
        mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for i, row in enumerate(rows):
            n_tokens = len(row.ids)
            ids[i, :n_tokens], mask[i, :n_tokens], types[i, :n_tokens] = row.ids, 1, row.type_ids
        return ids, mask, types

    def predict(self, texts: Sequence[Text], batch_size: int = 32) -> list[Prediction]:
        """Answer texts, or pairs of texts; similar lengths share a batch, and the order is kept.

        Raises:
            UserError: One is no text, empty, or holds half of a character, texts and pairs are mixed, the model was
                trained on the other kind, or `batch_size` is below 1.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1; got {batch_size}.")
        refuse_bare(texts)
        check_texts(texts, pairs=self.exits.pairs)
        rows = self._tokenizer.encode_batch(list(texts))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        found: dict[int, Prediction] = {}
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            found.update(zip(part, self._named(self.answer(*self._padded([rows[i] for i in part])))))
        return [found[i] for i in range(len(order))]

    def _named(self, answers: Answers) -> list[Prediction]:
        logits, blocks = answers.logits.astype(np.float64), answers.where.tolist()
        if self.exits.task == "regression":
            values = logits[:, 0] * self.exits.target_scale + self.exits.target_mean
            return [Prediction(None, float(value), block) for value, block in zip(values, blocks)]
        best = logits.argmax(axis=1)
        rule = self.exits.deciding()
        heat = np.array([rule.temperature(self.exits.cuts, block) for block in blocks])[:, None]
        p = np.exp(log_softmax(logits / heat))
        labels = self.exits.labels or tuple(map(str, range(self.exits.classes)))
        return [Prediction(labels[b], float(row[b]), block) for b, row, block in zip(best, p, blocks)]


def open_router(
    folder: str | Path, *, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",), verify: bool = True
) -> Router:
    """Open an exported folder.

    Args:
        folder: What ``retouch slim MODEL --export`` wrote.
        threads: Threads of one operation in onnxruntime; 0 takes all cores.
        providers: Where onnxruntime computes, in order of preference.
        verify: Compare the files' hashes; without it only names and sizes are compared.

    Raises:
        StoreError: The folder is damaged, of a newer format, or no export.
        UserError: onnxruntime or tokenizers is not installed.
    """
    place = Path(folder)
    files = check_folder(place, verify_hashes=verify)["files"]
    if "exits.json" not in files:
        raise StoreError(f"{place} has no exits.json, so it is no export. Make one: retouch slim MODEL --export DIR.")
    exits = read_exits(place / "exits.json")
    names = [stage_name(stage) for stage in range(len(exits.cuts))]
    if missing := sorted({*names, "tokenizer.json"} - set(files)):
        raise StoreError(f"{place} lacks {', '.join(map(repr, missing))}. Export the model again.")
    tokenizer = _open_tokenizer(place / "tokenizer.json", exits.max_tokens)
    sessions = [_open_session(place / name, threads, providers) for name in names]
    for stage, (name, session) in enumerate(zip(names, sessions)):
        _check_inputs(place / name, session, exits, stage)
    return Router(exits, sessions, tokenizer)


def _open_session(path: Path, threads: int, providers: Sequence[str]) -> Any:
    try:
        import onnxruntime  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise UserError("Serving an export needs onnxruntime: pip install 'retouch[export]'.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's own errors share no base
        raise StoreError(f"{path} cannot be opened by onnxruntime: {error}. Export the model again.") from error


def _check_inputs(path: Path, session: Any, exits: Exits, stage: int) -> None:
    types = ["token_type_ids"] if exits.token_types else []
    want = ["hidden", "attention_mask"] if stage else ["input_ids", "attention_mask", *types]
    if (got := [item.name for item in session.get_inputs()]) != want:
        raise StoreError(f"{path} takes {', '.join(got)}; {', '.join(want)} are expected. Export the model again.")


def _open_tokenizer(path: Path, max_tokens: int) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError("Serving an export needs tokenizers: pip install tokenizers.") from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # its errors are plain Exceptions
        raise StoreError(f"{path} is no tokenizer: {error}. Export the model again.") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens, direction=(tokenizer.truncation or {}).get("direction", "right"))
    return tokenizer
