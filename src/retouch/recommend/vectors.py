"""The items' texts as vectors: by a sentence encoder, or read from a file of your own."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import store
from ..errors import StoreError, UserError
from ..progress import report

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import Model

__all__ = ["load_vectors", "text_vectors"]

_NAME = "vectors.safetensors"


def text_vectors(
    texts: Sequence[str], encoder: Model | str = "minilm", *, max_tokens: int = 64, batch_tokens: int = 4096
) -> NDArray[np.float32]:
    """Turn each text into one vector of length one: the mean of an encoder's last states over its tokens.

    Texts are sorted by length and put into batches of about equal numbers of tokens; equal texts are read once. What
    was computed before comes from the cache, whose key is the texts, the encoder's weights and `max_tokens`.

    Shapes: [texts, d_model]

    Args:
        texts: One text an item; none is empty.
        encoder: An opened model, or what `retouch.model.open_model` takes.
        max_tokens: Where a text is cut.
        batch_tokens: Positions of a batch, padding included.

    Raises:
        UserError: A text is empty.
        ModelError: The encoder cannot be opened.
    """
    _check_texts(texts)
    model = _opened(encoder)
    key = store.key(texts=list(texts), encoder=model.fingerprint, max_tokens=max_tokens, pooling="mean", format=1)

    def build(folder: Path) -> None:
        store.save_tensors(folder / _NAME, {"vectors": _encoded(list(texts), model, max_tokens, batch_tokens)})

    folder = store.cached("vectors", key, build)
    found: NDArray[np.float32] = store.load_tensors(folder / _NAME, {"vectors"})["vectors"].numpy()
    return found


def load_vectors(path: str | Path, n_items: int) -> NDArray[np.float32]:
    """Read vectors from a ``.npy`` file, one row an item in the order of the items; pickles are refused.

    Shapes: [items, d]

    Args:
        path: The file.
        n_items: How many rows it must have.

    Raises:
        StoreError: The file is missing, damaged, or holds Python objects.
        UserError: It has another shape, numbers that are not real, or values that are not finite.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{path} cannot be read as a .npy file of numbers: {error}. Write it with "
            "numpy.save(PATH, vectors.astype('float32'))."
        ) from error
    if not isinstance(found, np.ndarray):
        raise StoreError(f"{path} is an archive of several arrays. Save the one array with numpy.save.")
    if found.ndim != 2 or len(found) != n_items or not found.shape[1]:
        raise UserError(f"{path} must hold one row for each of {n_items} items; its shape is {found.shape}.")
    if found.dtype.kind not in "fiu":
        raise UserError(f"{path} must hold real numbers; it holds {found.dtype}.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is named below
        numbers = found.astype(np.float32)
    bad = ~np.isfinite(numbers).all(1)
    if bad.any():
        raise UserError(
            f"{path}: {int(bad.sum())} rows hold values that are not finite, the first is row {int(bad.argmax())}."
        )
    return numbers


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise UserError("Give a list of texts, one an item; this is one text.")
    if not texts:
        raise UserError("There are no texts to turn into vectors.")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"Text {number} is empty. Give every item a text, or leave the item out.")


def _opened(encoder: Model | str) -> Model:
    if isinstance(encoder, str):
        from ..model import open_model

        return open_model(encoder)
    return encoder


def _encoded(texts: list[str], model: Model, max_tokens: int, batch_tokens: int) -> Tensor:
    import torch

    different = sorted(set(texts))
    coded = model.tokenizer(different, truncation=True, max_length=max_tokens, padding=False)["input_ids"]
    rows = [tuple(ids) for ids in coded]
    found: list[Any] = [None] * len(rows)
    done = 0
    for batch in _batches(rows, batch_tokens):
        for row, vector in zip(batch, _pooled(model, [rows[i] for i in batch])):
            found[row] = vector
        report("Reading the items' texts", done := done + len(batch), len(rows))
    place = {text: i for i, text in enumerate(different)}
    return torch.stack([found[place[text]] for text in texts])


def _batches(rows: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of rows of like length, so many that they fit the budget with their padding."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i)):
        if batch and len(rows[batch[0]]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _pooled(model: Model, rows: list[tuple[int, ...]]) -> Tensor:
    import torch
    import torch.nn.functional as F

    batch = model.batch(rows)
    network: Any = model.network
    with torch.inference_mode():
        states = network.base_model(**model.inputs(batch)).last_hidden_state
        mask = batch.mask[..., None].to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1)
        return F.normalize(mean, dim=-1).float().cpu()
