"""Mean and mean square of what flows into a weight, channel by channel, over public text: one pass, cached.

Full second moments come from `retouch.stats`, over the same text and positions; scores need their diagonal only, which
is a width instead of its square.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import stats, store
from ..model import Model
from ..progress import track
from ..trace import Trace

__all__ = ["Inputs", "Text", "inputs_key", "observe_inputs"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What flows into a weight, channel by channel.

    Shapes:
        mean, square: (inputs,), float64; `square` is the mean of squares.
    """

    count: int
    mean: Tensor
    square: Tensor

    @property
    def variance(self) -> Tensor:
        """Mean squared distance from the mean."""
        return (self.square - self.mean**2).clamp(min=0)


@dataclass(frozen=True)
class Text:
    """Public text that activations and gradients are taken over.

    Attributes:
        text: The text itself; None is the corpus that ships with Retouch.
        n_tokens: How much of it is read.
        sequence_length: Tokens of a row.
    """

    text: str | None = None
    n_tokens: int = 16_384
    sequence_length: int = 256

    def rows(self, model: Model) -> list[tuple[int, ...]]:
        """Cut the text into token rows."""
        limit = getattr(model.network.config, "max_position_embeddings", None) or self.sequence_length
        return stats.sequences(model, self.words, self.n_tokens, min(self.sequence_length, limit))

    @property
    def key(self) -> dict[str, Any]:
        """Name the text by its content."""
        words = hashlib.sha256(self.words.encode()).hexdigest()
        return {"text": words, "n_tokens": self.n_tokens, "sequence_length": self.sequence_length}

    @property
    def words(self) -> str:
        """The text."""
        return stats.bundled_text() if self.text is None else self.text


@torch.no_grad()
def observe_inputs(model: Model, names: Sequence[str], text: Text) -> dict[str, Inputs]:
    """Measure what flows into weights, in one pass; from the cache where it is there.

    The first position of a row counts only if it is a special token, as in `retouch.stats`.
    """
    key = store.key(
        model=model.fingerprint,
        names=sorted(names),
        text=text.key,
        tokenizer=stats.tokenizer_key(model.tokenizer),
        format=1,
    )
    folder = store.cached("fuse-inputs", key, partial(_write, model, names, text))
    tensors = store.load_tensors(folder / "inputs.safetensors")
    count = int(tensors["count"])
    return {n: Inputs(count, tensors[f"{n}/mean"], tensors[f"{n}/square"]) for n in names}


def _write(model: Model, names: Sequence[str], text: Text, folder: Path) -> None:
    totals = {n: torch.zeros(2, model.matrix(n).shape[1], dtype=torch.float64) for n in names}
    mask: list[Tensor] = []

    def see(name: str, tensor: Tensor) -> None:
        kept = tensor[mask[0]].double()
        totals[name] += torch.stack([kept.sum(0), (kept**2).sum(0)]).cpu()

    count, special = 0, torch.tensor(model.tokenizer.all_special_ids, device=model.device)
    rows = text.rows(model)
    with Trace(model) as trace:
        for name in names:
            trace.watch(name, partial(see, name), "input")
        for row in track(rows, f"What flows into {len(names)} weights"):
            batch = model.batch([row])
            mask[:] = [batch.mask.bool() & ((batch.positions > 0) | torch.isin(batch.ids, special))]
            count += int(mask[0].sum())
            trace.run(batch, stop_after=f"blocks.{max(map(model.anatomy.block_of, names))}")
    tensors = {"count": torch.tensor(count)}
    for name, (total, squares) in totals.items():
        tensors |= {f"{name}/mean": total / count, f"{name}/square": squares / count}
    store.save_tensors(folder / "inputs.safetensors", tensors)


def inputs_key(inputs: Mapping[str, Inputs]) -> str:
    """Name measured inputs by their content."""
    return store.key(
        **{n: [i.count, store.digest_tensor(i.mean), store.digest_tensor(i.square)] for n, i in inputs.items()}
    )
