"""Second moments of what flows into a weight, over text: all wanted blocks in one pass, mergeable, cached.

C0 = mean of k kᵀ (not centred) at the input of a weight. Products are float32 within a batch and totals float64.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import store
from .errors import StoreError, UserError
from .model import Model
from .progress import report
from .tokens import Bos
from .trace import Trace

__all__ = ["Mapper", "Moment", "bundled_text", "collect", "observe", "sequences"]

Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Something that applies a function to shards, in order or not: `map`, or `retouch.scale.on_ray`."""

FORMAT = 1
STORE_EVERY_S = 20.0
"""Seconds between two stores of a running pass."""

logger = logging.getLogger("retouch")


@dataclass(frozen=True, eq=False)
class Moment:
    """A sum of outer products and how many there were. ``a + b`` is the moment over both texts.

    Shapes:
        total: (width, width), float64.
    """

    total: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """C0, float64."""
        return self.total / max(self.count, 1)

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.total + other.total, self.count + other.count)


def bundled_text(name: str = "corpus") -> str:
    """Return a text that ships with Retouch: ``corpus`` for moments, ``neutral`` for perplexity."""
    return (files("retouch") / "data" / f"{name}.txt").read_text(encoding="utf-8")


def sequences(
    model: Model, text: str, n_tokens: int, sequence_length: int = 512, bos: Bos = "tokenizer"
) -> list[tuple[int, ...]]:
    """Cut a text into token rows of at most `sequence_length`, until `n_tokens` are there.

    Raises:
        UserError: The text holds no tokens.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    front = [] if bos == "never" else model.tokenizer("")["input_ids"][:1]
    if bos == "always" and not front:
        front = [model.tokenizer.bos_token_id]
    flat: list[int] = []
    for start in range(0, len(lines), 64):
        if len(flat) >= n_tokens:  # a long text is not tokenised beyond what is read of it
            break
        few = [f"{line}\n" for line in lines[start : start + 64]]
        flat += [t for row in model.tokenizer(few, add_special_tokens=False)["input_ids"] for t in row]
    flat = flat[:n_tokens]
    if not flat:
        raise UserError("The text for second moments holds no tokens. Give a longer one.")
    step = sequence_length - len(front)
    return [(*front, *flat[i : i + step]) for i in range(0, len(flat), step)]


@torch.no_grad()
def observe(
    model: Model, names: Sequence[str], rows: Sequence[tuple[int, ...]], budget_mib: int = 256
) -> dict[str, Moment]:
    """Sum the outer products of what flows into each named weight, over token rows, in one pass.

    The first position of a row is left out unless it is a special token: without one it is an attention sink, whose
    key can be 3 to 20 times longer than all others and would rule the mean.

    Source:
        Meng et al., Locating and Editing Factual Associations in GPT (2022), section 3.1; totals, position rule: ours.

    Shapes:
        Per weight with inputs of width m: 2 tokens m² FLOPs, m² doubles of memory.
    """
    anatomy = model.anatomy
    special = torch.tensor(model.tokenizer.all_special_ids, device=model.device)
    totals = {n: Moment(torch.zeros(0, dtype=torch.float64), 0) for n in names}
    last = max(names, key=anatomy.block_of)
    mask: list[Tensor] = []

    def see(name: str, keys: Tensor) -> None:
        keep = keys[mask[0]].float()
        product = (keep.T @ keep).double().cpu()
        old = totals[name]
        totals[name] = Moment(old.total + product if old.count else product, old.count + keep.shape[0])

    # a token of a batch costs about its widest activation, a few times over, and one row of attention a head
    per_token = 4 * (6 * anatomy.d_ff + 8 * anatomy.d_model + anatomy.heads * max(map(len, rows), default=1))
    per_batch = max(1, (budget_mib << 20) // per_token // max(map(len, rows), default=1))
    with Trace(model) as trace:
        for name in names:
            trace.watch(name, partial(see, name), "input")
        for start in range(0, len(rows), per_batch):
            batch = model.batch(list(rows[start : start + per_batch]))
            mask[:] = [batch.mask.bool() & ((batch.positions > 0) | torch.isin(batch.ids, special))]
            trace.run(batch, stop_after=f"blocks.{anatomy.block_of(last)}")
    return totals


def collect(
    model: Model,
    names: Sequence[str],
    *,
    text: str | Path | None = None,
    n_tokens: int | None = None,
    sequence_length: int = 512,
    bos: Bos = "tokenizer",
    mapper: Mapper = map,
    shard_tokens: int = 8192,
) -> dict[str, Moment]:
    """Return the second moment at each named weight, from the cache where it is there.

    A run that is interrupted leaves its running totals in the cache, and the next one with the same arguments goes on
    from there.

    Args:
        model: The model.
        names: Our names of weights, e.g. ``["blocks.4.mlp.down"]``.
        text: A text file; by default the corpus that ships with Retouch.
        n_tokens: How many tokens to read; by default the larger of 20 widths and 30,000.
        sequence_length: Tokens of a row.
        bos: Beginning-of-text rule.
        mapper: Where the shards run, see `scale.mapper`.
        shard_tokens: Tokens of a shard, the unit of work that a mapper sends out.

    Returns:
        A `Moment` a name.
    """
    corpus = bundled_text() if text is None else _file_text(Path(text))
    width = max(model.matrix(n).shape[1] for n in names)
    n_tokens = n_tokens or max(20 * width, 30_000)
    config: Any = model.network.config
    sequence_length = min(sequence_length, getattr(config, "max_position_embeddings", None) or sequence_length)
    keys = {
        n: moment_key(model, n, corpus=corpus, n_tokens=n_tokens, sequence_length=sequence_length, bos=bos)
        for n in names
    }
    missing = [n for n in names if not _cached(keys[n])]
    if missing:
        rows = sequences(model, corpus, n_tokens, sequence_length, bos)
        per = max(1, shard_tokens // sequence_length)
        shards = [rows[i : i + per] for i in range(0, len(rows), per)]
        partial_key = store.key(keys={n: keys[n] for n in missing}, rows_of_a_shard=per)
        kept = store.cache_dir() / "moments-partial" / partial_key
        for name, moment in _pass(model, missing, shards, mapper, kept).items():
            store.cached("moments", keys[name], partial(_write, moment))
        shutil.rmtree(kept, ignore_errors=True)
    return {n: _read(store.cache_dir() / "moments" / keys[n]) for n in names}


def moment_key(
    model: Model, name: str, *, corpus: str, n_tokens: int, sequence_length: int, bos: str, dtype: str = "float32"
) -> str:
    """Make the key of a moment of everything that made it."""
    return store.key(
        model=model.fingerprint_below(model.anatomy.block_of(name)),
        weight=name,
        corpus=hashlib.sha256(corpus.encode()).hexdigest(),
        tokenizer=tokenizer_key(model.tokenizer),
        n_tokens=n_tokens,
        sequence_length=sequence_length,
        bos=bos,
        dtype=dtype,
        position_0="kept only as a special token",
        format=FORMAT,
    )


def tokenizer_key(tokenizer: Any) -> str:
    """Fingerprint a tokenizer: its whole fast-tokenizer state, or its vocabulary where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(state.encode()).hexdigest()


def _cached(key: str) -> bool:
    try:
        store.check_folder(store.cache_dir() / "moments" / key, verify_hashes=False)
    except StoreError:  # absent, or damaged: then it is written anew, and told
        return False
    return True


def _pass(
    model: Model, names: list[str], shards: list[list[tuple[int, ...]]], mapper: Mapper, kept: Path
) -> dict[str, Moment]:
    """Add up all shards, but those that an interrupted pass has left in `kept`."""
    what = f"Second moments of {len(names)} weights"
    total, done = _resume(names, kept)
    rest = [(i, shard) for i, shard in enumerate(shards) if i not in done]
    stored, pause = time.monotonic(), STORE_EVERY_S
    report(what, len(done), len(shards))
    try:
        for i, part in mapper(partial(_numbered, model, names), rest):
            # in one step, or an interruption between the two would count a shard twice
            total, done = {n: total[n] + m for n, m in part.items()} if total else part, done | {i}
            report(what, len(done), len(shards))
            if time.monotonic() - stored >= pause:
                pause = max(STORE_EVERY_S, 10 * _keep(total, done, kept))  # wide weights: gigabytes a store
                stored = time.monotonic()
    except BaseException:  # Ctrl-C too: what was done is not done again
        if done:
            _keep(total, done, kept)
        raise
    return total


def _numbered(
    model: Model, names: Sequence[str], shard: tuple[int, Sequence[tuple[int, ...]]]
) -> tuple[int, dict[str, Moment]]:
    return shard[0], observe(model, names, shard[1])


def _keep(total: dict[str, Moment], done: Collection[int], kept: Path) -> float:
    """Store the running totals; return the seconds that it took."""
    start = time.monotonic()
    tensors = {f"total.{n}": m.total for n, m in total.items()}
    tensors |= {f"count.{n}": torch.tensor([m.count]) for n, m in total.items()}
    try:
        with store.writing(kept) as folder:
            store.save_tensors(folder / "moments.safetensors", tensors | {"done": torch.tensor(sorted(done))})
    except StoreError as error:  # the pass itself is well, and worth more than its copy
        logger.warning("Second moments cannot be kept while they run: %s", error)
    return time.monotonic() - start


def _resume(names: Sequence[str], kept: Path) -> tuple[dict[str, Moment], set[int]]:
    if not kept.exists():
        return {}, set()
    wanted = {"done", *(f"{part}.{n}" for n in names for part in ("total", "count"))}
    try:
        store.check_folder(kept)
        tensors = store.load_tensors(kept / "moments.safetensors", wanted)
    except StoreError as error:
        logger.warning("Second moments start anew, because what was kept is damaged: %s", error)
        shutil.rmtree(kept, ignore_errors=True)
        return {}, set()
    moments = {n: Moment(tensors[f"total.{n}"], int(tensors[f"count.{n}"])) for n in names}
    return moments, set(tensors["done"].tolist())


def _write(moment: Moment, folder: Path) -> None:
    count = torch.tensor([moment.count])
    store.save_tensors(folder / "moment.safetensors", {"total": moment.total, "count": count})


def _read(folder: Path) -> Moment:
    tensors = store.load_tensors(folder / "moment.safetensors", {"total", "count"})
    return Moment(tensors["total"], int(tensors["count"]))


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"The text for second moments cannot be read: {path} ({error.strerror}).") from error
