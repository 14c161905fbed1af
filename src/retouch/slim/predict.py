"""Answer texts with a saved slim model: batch after batch, as they come in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import store
from .._texts import Prediction, Text, check_texts, refuse_bare
from ..errors import ModelError, UserError
from ._reading import Example
from .compaction import answer
from .encoded import collate, encode
from .network import SlimForSequenceClassification, open_slim

__all__ = ["Classifier", "Prediction", "open_classifier"]


@dataclass(frozen=True, eq=False)
class Classifier:
    """A slim network and its tokenizer, ready to answer.

    Args:
        network: In eval mode.
        tokenizer: Its fast tokenizer.
        max_tokens: Longer texts are cut.
        pairs: Whether it was trained on pairs of texts; None where that is not known.
    """

    network: SlimForSequenceClassification
    tokenizer: Any
    max_tokens: int = 128
    pairs: bool | None = None

    def predict(self, texts: Iterable[Text], batch_size: int = 32, ahead: int = 8) -> Iterator[Prediction]:
        """Answer texts, or pairs of texts, in their order. Reads as far ahead as it needs and no further.

        Args:
            texts: May be endless.
            batch_size: Texts that are worked off at once.
            ahead: So many batches are read at once and sorted by length among themselves, which saves padding.

        Raises:
            UserError: It is one text and no list; or, as it comes, one is no text, empty, or holds half of a character,
                texts and pairs are mixed, or the model was trained on the other kind.
        """
        if batch_size < 1 or ahead < 1:
            raise UserError(f"batch_size and ahead must be at least 1; got {batch_size} and {ahead}.")
        refuse_bare(texts)
        return self._stream(iter(texts), batch_size, ahead)

    def _stream(self, texts: Iterator[Text], batch_size: int, ahead: int) -> Iterator[Prediction]:
        n_done = 0
        while window := list(itertools.islice(texts, batch_size * ahead)):
            check_texts(window, n_done, self.pairs)
            yield from self._window([_example(text) for text in window], batch_size)
            n_done += len(window)

    def _window(self, examples: list[Example], batch_size: int) -> list[Prediction]:
        types = self.network.size.token_types
        encoded = encode(self.tokenizer, examples, self.max_tokens, token_types=types)
        by_length = sorted(range(len(examples)), key=lambda i: encoded.lengths[i])
        found: dict[int, Prediction] = {}
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            found |= dict(zip(rows, self._batch(collate(encoded, rows))))
        return [found[i] for i in range(len(examples))]

    def _batch(self, batch: dict[str, Any]) -> list[Prediction]:
        inputs = {k: v.to(self.network.device) for k, v in batch.items() if k != "labels"}
        said, config = answer(self.network, **inputs), self.network.config
        where = said.where.tolist()
        if config.task == "regression":
            values = (said.logits[:, 0] * config.target_scale + config.target_mean).tolist()
            return [Prediction(None, value, block) for value, block in zip(values, where)]
        scores, classes = (said.logits / self._temperatures()[said.where, None]).softmax(-1).max(-1)
        names = [config.id2label[c] for c in classes.tolist()]
        return [Prediction(*one) for one in zip(names, scores.tolist(), where)]

    def _temperatures(self) -> Tensor:
        """Return what each block's exit divides its logits by."""
        found = torch.ones(self.network.size.blocks)
        if self.network.config.temperatures:
            found[list(self.network.widths.exits)] = torch.tensor(self.network.config.temperatures)
        return found.to(self.network.device)


def _example(text: Text) -> Example:
    first, second = (text, None) if isinstance(text, str) else text
    return Example(first, second, 0)


def open_classifier(folder: str | Path, *, max_tokens: int | None = None) -> Classifier:
    """Open a saved slim model with its tokenizer.

    Args:
        folder: As `Slim.save` wrote it.
        max_tokens: Longer texts are cut; None: as in training, else at 128 tokens.

    Raises:
        ModelError: The folder holds no slim model, or no tokenizer.
    """
    from transformers import AutoTokenizer

    network = open_slim(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no tokenizer that can be opened: {str(error).splitlines()[0]}") from error
    record = Path(folder) / "retouch.json"
    found = store.read_json(record) if record.is_file() else {}
    says = found if isinstance(found, dict) else {}
    pairs = says.get("task", {}).get("pairs")
    return Classifier(network, tokenizer, max_tokens or says.get("max_tokens") or 128, pairs)
