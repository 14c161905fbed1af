"""Make a network with exits from what a user has: a bare encoder, or a classifier that transformers trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn

from ..errors import ModelError
from ..model import Model
from ._classifier import SlimForSequenceClassification
from ._config import SlimConfig
from ._families import Family, family_of, plain

__all__ = ["from_classifier", "from_encoder", "pooling_of", "with_exits"]


def from_encoder(
    model: Model,
    labels: Sequence[str] | None,
    *,
    exits: Sequence[int] | None = None,
    pooling: str | None = None,
    pooler: str | None = "tanh",
) -> SlimForSequenceClassification:
    """Put fresh exits on an encoder, at its full widths.

    Args:
        model: An opened encoder. It is copied.
        labels: Names of the classes; None: a regression.
        exits: Blocks with an exit; None: all. The last always has one.
        pooling: ``"first"`` or ``"mean"``; None: mean where the model's folder says that it pools by the mean.
        pooler: ``"tanh"`` puts a dense map in front of the last exit's classifier, the encoder's own where it has one;
            None: none.

    Returns:
        The network, in train mode as any new one; its fresh weights come from torch's global generator.

    Raises:
        ModelError: The family cannot be slimmed, or there are fewer than two labels.
    """
    network: Any = model.network
    family_of(network.config)
    if labels is not None and len(labels) < 2:
        raise ModelError(f"A classifier needs at least two labels; got {list(labels)}.")
    names = ["LABEL_0"] if labels is None else [str(label) for label in labels]
    new = _built(
        network,
        network.base_model,
        exits=exits,
        pooling=pooling or pooling_of(network),
        pooler=pooler,
        task="regression" if labels is None else "classification",
        names=names,
    )
    own = getattr(getattr(network.base_model, "pooler", None), "dense", None)
    if new.pooler is not None and pooler == "tanh" and isinstance(own, nn.Linear):
        new.pooler.load_state_dict(own.state_dict())
    return new


def from_classifier(network: nn.Module, tokenizer: Any = None) -> SlimForSequenceClassification:
    """Turn a classifier of transformers into a network of full widths whose one exit, the last, gives the same logits.

    A single output that tells two classes apart (trained with binary cross-entropy) becomes the logits (0, z).

    Args:
        network: A ``BertForSequenceClassification`` or the like. It is copied.
        tokenizer: Its tokenizer; where given, it is checked against the embedding.

    Returns:
        The network, in eval mode.

    Raises:
        ModelError: It is no classifier of a family that can be slimmed, or one of several labels at once.
    """
    config: Any = network.config
    family = family_of(config)
    if not isinstance(network, getattr(transformers, family.classifier)):
        raise ModelError(f"A {family.classifier} is expected; this is a {type(network).__name__}. Fine-tune it first.")
    _check_tokenizer(tokenizer, config)
    names = [config.id2label[i] for i in range(config.num_labels)]
    problem, binary = getattr(config, "problem_type", None), False
    if problem == "multi_label_classification":
        if len(names) > 1:
            raise ModelError(
                f"This classifier gives each of its {len(names)} labels a yes or no of its own (multi-label), which "
                "exits cannot answer for yet. Train one class per text, or one classifier per label."
            )
        names, binary = [f"not {names[0]}", names[0]], True
    regression = not binary and len(names) == 1
    task = "regression" if regression else "classification"
    last = family_last(network)
    body: Any = network.base_model  # type: ignore[union-attr]
    new = _built(network, body, exits=[last], pooling="first", pooler=family.activation, task=task, names=names)
    _copy_head(family, network, new, binary)
    return cast(SlimForSequenceClassification, new.eval())


def with_exits(
    network: SlimForSequenceClassification, exits: Sequence[int] | None = None
) -> SlimForSequenceClassification:
    """Return a copy of a network with the same encoder and fresh exits, without a pooler.

    Args:
        network: A network of any widths; it is left as it is.
        exits: Blocks with an exit; None: all. The last always has one.
    """
    values = network.config.to_dict() | {
        "exits": list(network.size.exits(exits)), "pooler": None, "temperatures": None, "threshold": None,
    }  # fmt: skip
    new = _placed_like(SlimForSequenceClassification(SlimConfig.from_dict(values)), network)
    new.body.load_state_dict(network.body.state_dict())
    return new


def family_last(network: Any) -> int:
    """Return the number of the last block."""
    return int(network.config.num_hidden_layers) - 1


def _built(
    network: Any, body: Any, *, exits: Sequence[int] | None, names: list[str], **fields: Any
) -> SlimForSequenceClassification:
    blocks = int(network.config.num_hidden_layers)
    config = SlimConfig(
        base=plain(network.config),
        exits=list(range(blocks)) if exits is None else sorted({*exits, blocks - 1}),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        **fields,
    )
    new = _placed_like(SlimForSequenceClassification(config), network)
    new.body.load_state_dict({k: v for k, v in body.state_dict().items() if not k.startswith("pooler.")})
    return new


def _placed_like(new: SlimForSequenceClassification, network: Any) -> SlimForSequenceClassification:
    weight = next(network.parameters())
    placed: SlimForSequenceClassification = new.to(weight.device, weight.dtype)
    return placed


def _copy_head(family: Family, network: nn.Module, new: SlimForSequenceClassification, binary: bool) -> None:
    linear: Any = network.get_submodule(family.linear)
    exit_: Any = new.exits[str(new.size.blocks - 1)]
    assert new.pooler is not None  # every family has a dense map there
    new.pooler.load_state_dict(network.get_submodule(family.dense).state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            value = getattr(linear, name)
            getattr(exit_, name).copy_(torch.cat([torch.zeros_like(value), value]) if binary else value)


def _check_tokenizer(tokenizer: Any, config: Any) -> None:
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size} rows of embedding. Give the "
            "tokenizer that the model was trained with."
        )


def pooling_of(network: Any) -> str:
    """Read the pooling out of the folder that an encoder was opened from, as sentence encoders keep it there."""
    from transformers.utils import cached_file

    source = str(getattr(network.config, "_name_or_path", "") or "")
    if not source:
        return "first"
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        found = cached_file(source, "1_Pooling/config.json", **quiet)
    except OSError:
        found = None
    if found is None:
        return "first"
    says = json.loads(Path(found).read_text(encoding="utf-8"))
    return "mean" if says.get("pooling_mode_mean_tokens") else "first"
