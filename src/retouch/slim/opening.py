"""Open what is to be made slim: a fine-tuned classifier, or a bare encoder that is fine-tuned first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, UserError
from ..model import BUNDLED, Model, open_model, quiet
from .base import Size
from .network import SlimForSequenceClassification, from_classifier, from_encoder

__all__ = ["Source", "named_labels", "open_source"]


@dataclass(frozen=True, eq=False)
class Source:
    """What was opened.

    Attributes:
        model: A bare encoder, or a classifier's network of full widths.
        tokenizer: Its tokenizer.
        name: What it was opened by.
        labels: Names of a classifier's classes; None for a bare encoder and for a regression.
    """

    model: Model | SlimForSequenceClassification
    tokenizer: Any
    name: str
    labels: tuple[str, ...] | None = None

    def size(self, labels: Sequence[str] | None) -> Size:
        """Return the original in numbers, with the classes of a task.

        Raises:
            ModelError: Such a model cannot be made slim.
        """
        if isinstance(self.model, SlimForSequenceClassification):
            return self.model.size
        last = [self.model.anatomy.n_blocks - 1]
        with torch.random.fork_rng(devices=[]):  # its fresh weights are thrown away
            return from_encoder(self.model, labels, exits=last, pooler=None).size


def open_source(source: str | Path) -> Source:
    """Open a folder, a hub id or a bundled name.

    Raises:
        ModelError: It is no encoder that can be made slim, or it is slim already.
    """
    name = str(source)
    kind = None if name in BUNDLED else _architecture(name)
    if kind == "SlimForSequenceClassification":
        raise ModelError(f"{name} is slim already. Start from the model that it was made of, or use --recalibrate.")
    if kind is not None and kind.endswith("ForSequenceClassification"):
        return _classifier(name)
    model = open_model(source)
    if model.anatomy.kind != "encoder":
        raise ModelError(f"{name} is a decoder ({model.anatomy.family}); only encoders (bert, distilbert, roberta, mpnet) "
                         "can be made slim.")  # fmt: skip
    return Source(model, model.tokenizer, name)


def _architecture(name: str) -> str | None:
    from transformers import AutoConfig

    try:
        names = AutoConfig.from_pretrained(name, trust_remote_code=False).architectures or [None]
    except (OSError, ValueError):
        return None  # open_model says what is wrong
    return str(names[0]) if names[0] else None


def _classifier(name: str) -> Source:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        with quiet():
            network = AutoModelForSequenceClassification.from_pretrained(
                name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    made = from_classifier(network, tokenizer)
    labels = (
        None if made.config.task == "regression" else tuple(made.config.id2label[i] for i in range(made.size.classes))
    )
    return Source(made, tokenizer, name, labels)


def named_labels(model: Sequence[str], data: Sequence[str]) -> list[str]:
    """Return the data's names of a classifier's classes, in the classifier's order.

    They match by name, whatever the case, or by number where the data has numbers.

    Raises:
        UserError: They do not match.

    Example:
        >>> named_labels(["NEGATIVE", "POSITIVE"], ["positive", "negative"]), named_labels(["no", "yes"], ["0", "1"])
        (['negative', 'positive'], ['0', '1'])
    """
    by_name = {label.casefold(): label for label in data}
    if all(label.casefold() in map(str.casefold, model) for label in data):
        return [by_name.get(name.casefold(), name) for name in model]
    if all(label.isdigit() and int(label) < len(model) for label in data):
        return [str(i) for i in range(len(model))]
    raise UserError(f"The classifier's labels are {', '.join(model)}; the data's are {', '.join(sorted(data))}. Name them "
                    "alike, or number them from 0 in the classifier's order.")  # fmt: skip
