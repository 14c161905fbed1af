"""Save a slim model as a folder, and open it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .. import store
from ..errors import ModelError
from ..model import quiet
from ._classifier import SlimForSequenceClassification
from ._config import FORMAT, SlimConfig

__all__ = ["network_of", "open_slim", "plain_config", "prove", "save"]


def plain_config(network: SlimForSequenceClassification) -> dict[str, Any]:
    """Return a network's configuration as values that JSON can hold."""
    config: dict[str, Any] = json.loads(network.config.to_json_string(use_diff=False))
    return config


def network_of(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> SlimForSequenceClassification:
    """Build a network of a configuration and all its weights, evaluating.

    Raises:
        RuntimeError: A weight is missing, extra, or of another shape.
    """
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and replaced at once
        network = SlimForSequenceClassification(SlimConfig.from_dict(dict(config)))
    network.load_state_dict(dict(weights))
    network.eval()
    return network


def save(
    network: SlimForSequenceClassification,
    tokenizer: Any,
    folder: str | Path,
    *,
    record: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Write a network and its tokenizer as a folder, whole or not at all: safetensors and JSON, never a pickle.

    Args:
        network: The network.
        tokenizer: Its tokenizer; None writes none.
        folder: Where the folder is to be; one of ours that is already there gives way.
        record: How it was made, for ``retouch.json``; plain values.
        card: Text of ``README.md``; None writes a short one.

    Raises:
        StoreError: The folder cannot be written.
    """
    text = json.dumps({"kind": "slim", "format": FORMAT, **(record or {})}, indent=2, allow_nan=False)
    with store.writing(folder) as target:
        with quiet():
            network.save_pretrained(target)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, target, (record or {}).get("max_tokens"))
        (target / "retouch.json").write_text(text + "\n", encoding="utf-8")
        (target / "README.md").write_text(card or _card(network), encoding="utf-8")


def _save_tokenizer(tokenizer: Any, target: Path, max_tokens: int | None) -> None:
    """Write a tokenizer that cuts where the model's training did, for users of transformers' own pipelines."""
    usual = tokenizer.model_max_length
    tokenizer.model_max_length = max_tokens or usual
    try:
        tokenizer.save_pretrained(target)
    finally:
        tokenizer.model_max_length = usual


def open_slim(path: str | Path) -> SlimForSequenceClassification:
    """Open a saved slim model, in eval mode, and prove that it is what it says.

    Raises:
        StoreError: A file is missing, surplus or damaged.
        ModelError: The folder holds no slim model, or its weights do not fit its configuration.
    """
    path = Path(path).expanduser()
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: there is no config.json, so this is no folder of a slim model.")
    if (path / "manifest.json").is_file():
        store.check_folder(path)
    config = store.read_json(path / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != SlimConfig.model_type:
        raise ModelError(f"{path} holds a {kind!r} model, which is not slim. Slim it first: retouch slim {path} ...")
    network = _load(path)
    prove(network)
    return network


def prove(network: SlimForSequenceClassification) -> None:
    """Run a dummy batch through a network, and check that every map has the width that the configuration states.

    Raises:
        ModelError: A map has another width, or the answers are not finite.
    """
    size, widths = network.size, network.widths
    for block in range(size.blocks):
        parts, inner = network.parts(block), widths.heads[block] * size.head_dim
        got = [parts.query.out_features, parts.key.out_features, parts.value.out_features, parts.out.in_features]
        got += [parts.up.out_features, parts.down.in_features]
        if got != [inner] * 4 + [widths.d_ff[block]] * 2:
            raise ModelError(f"Block {block} has maps of width {got}; the configuration says {inner} and "
                             f"{widths.d_ff[block]}. Open the folder again, or make it again.")  # fmt: skip
    ids = torch.arange(1, 5, device=network.device)[None] % size.vocab
    training = network.training
    network.eval()
    with torch.no_grad():
        logits = network.levels(ids, torch.ones_like(ids)).logits
    network.train(training)
    if not all(bool(torch.isfinite(z).all()) for z in logits.values()):
        raise ModelError("The network answers a dummy batch with numbers that are not finite. Its file is damaged.")


def _load(path: Path) -> SlimForSequenceClassification:
    try:
        with quiet():
            network, loading = SlimForSequenceClassification.from_pretrained(
                path, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    if lost := sorted(loading["missing_keys"]):
        raise ModelError(
            f"{path} lacks {len(lost)} weights, e.g. {lost[0]!r}. Copy the folder again, or make it again."
        )
    opened: SlimForSequenceClassification = network.eval()
    return opened


def _card(network: SlimForSequenceClassification) -> str:
    widths, base = network.widths, network.config.base["model_type"]
    return (
        f"# A slim {base} classifier\n\n"
        f"Heads a block: {list(widths.heads)}. MLP neurons a block: {list(widths.d_ff)}. Rank of the embedding: "
        f"{widths.rank or 'full'}. Blocks with an exit: {list(widths.exits)}.\n\n"
        "```python\nimport retouch.slim  # registers the model with the Auto classes\n"
        "from transformers import AutoModelForSequenceClassification\n\n"
        'model = AutoModelForSequenceClassification.from_pretrained("FOLDER")\n```\n'
    )
