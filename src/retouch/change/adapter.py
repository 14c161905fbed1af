"""Changes as LoRA adapters of PEFT, and LoRA adapters as changes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import store
from ..errors import StoreError
from ..model import Model
from .applying import check_base
from .parts import Change, LowRank, Part

__all__ = ["from_peft", "to_peft"]


def to_peft(change: Change, model: Model, path: str | Path) -> None:
    """Write a change as a LoRA adapter that plain PEFT loads onto the unchanged model.

    Rank and scale of each module are set so that the adapter adds exactly ``left @ right``.

    Raises:
        StoreError: A part is a whole difference or a bias; LoRA cannot hold it exactly.
    """
    from peft import LoraConfig

    check_base(model, change)
    if dense := [n for n, p in change.parts.items() if not isinstance(p, LowRank) or n in ("embed", "head")]:
        raise StoreError(
            f"The change of {dense[0]} (method {change.method}) is whole or not inside a block; a LoRA adapter holds "
            "low-rank changes of linear layers only."
        )
    tensors, ranks, conv = {}, {}, False
    for name, part in change.parts.items():
        assert isinstance(part, LowRank)
        target = model.anatomy.path(name)
        conv = conv or model.anatomy.transposed(name)
        ranks[target] = part.rank
        tensors[f"base_model.model.{target}.lora_A.weight"] = part.right.float().contiguous()
        tensors[f"base_model.model.{target}.lora_B.weight"] = part.left.float().contiguous()
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=sorted(ranks),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        fan_in_fan_out=conv,
        inference_mode=True,
        task_type="CAUSAL_LM" if model.anatomy.kind == "decoder" else None,
        base_model_name_or_path=model.source,
    )
    with store.writing(path) as folder:
        config.save_pretrained(folder)
        store.save_tensors(folder / "adapter_model.safetensors", tensors)


_NOT_PLAIN = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters"),
    *("alora_invocation_tokens", "trainable_token_indices", "arrow_config", "kasa_config", "monteclora_config"),
)


_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start an adapter that also alter the weights below it, so that its difference is not ``left @ right``."""


def from_peft(path: str | Path, model: Model) -> Change:
    """Read a LoRA adapter as a change of `model`.

    Raises:
        StoreError: The adapter is pickled, is no plain LoRA, or does not fit the model.
    """
    path = Path(path)
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise StoreError(f"{path} has no adapter_model.safetensors. Pickled adapters (.bin) are not read.")
    config = store.read_json(path / "adapter_config.json")
    config = config if isinstance(config, dict) else {}
    odd = [n for n in _NOT_PLAIN if config.get(n)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    odd += ["init_lora_weights"] if str(config.get("init_lora_weights")).lower().startswith(_MOVES_BASE) else []
    if config.get("peft_type") != "LORA" or odd:
        raise StoreError(f"{path} is no plain LoRA adapter ({', '.join([str(config.get('peft_type')), *odd])}).")
    tensors = store.load_tensors(file)
    by_path = {model.anatomy.path(n): n for n in model.anatomy.names()}
    parts: dict[str, Part] = {}
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        left = tensors.pop(name.replace("lora_A", "lora_B"), None)
        right = tensors.pop(name)
        if module not in by_path or left is None:
            raise StoreError(
                f"{path}: {module} is no weight that Retouch knows in {model.anatomy.family}, or lacks lora_B."
            )
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise StoreError(
                f"{path}: the factors {tuple(left.shape)} and {tuple(right.shape)} of {module} do not fit."
            )
        parts[by_path[module]] = LowRank(left.float() * _scale(config, module, right.shape[0]), right.float())
    if tensors:
        raise StoreError(f"{path}: the tensor {next(iter(tensors))!r} does not belong in a LoRA adapter.")
    change = Change("peft", model.base_fingerprint, parts, notes={"adapter": path.name})
    check_base(model, change)
    return change


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT reads a pattern as a regular expression for the whole path or its last parts; the first one counts."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)
