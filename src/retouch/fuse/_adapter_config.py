"""A stranger's ``adapter_config.json``: an allowlist of keys, literal names, and the scale of each module.

PEFT takes the keys of patterns for regular expressions; here no text of a configuration is ever compiled. A name means
a module when it is the module's whole path or its last parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..anatomy import Anatomy
from ..errors import StoreError
from ._folder import quoted

MAX_RANK = 1_024
MAX_ALPHA = 1e4
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,300}")

_SAFE_STARTS = {True, False, None, "gaussian", "eva", "orthogonal", "mica"}
"""Ways to start an adapter that leave the base alone (read in PEFT 0.21.2); the others move the weights below it."""

_NOT_PLAIN = {
    "use_dora": "DoRA also rescales the weight, which no product of two factors does",
    "lora_bias": "biases are trained too",
    "modules_to_save": "whole modules of the base are replaced",
    "trainable_token_indices": "rows of the embedding are replaced",
    "target_parameters": "parameters outside of linear layers are changed",
    "layer_replication": "blocks of the base are repeated",
    "alora_invocation_tokens": "it acts on some tokens only",
    "use_qalora": "inputs are pooled before the factors",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes among adapters",
    "kasa_config": "singular values of the base are cut off",
    "monteclora_config": "its factors are sampled",
    "velora_config": "its activations are compressed",
    "megatron_config": "it names code to load",
    "auto_mapping": "it names code to load",
    "enable_lora": "only parts of a fused projection are changed",
    "merge_weights": "it may be merged into its base already",
}
"""Keys that must be empty, and why."""

_HARMLESS: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,), "revision": (str,), "task_type": (str,), "inference_mode": (bool,),
    "lora_dropout": (int, float), "peft_version": (str,), "qalora_group_size": (int,), "ensure_weight_tying": (bool,),
    "loftq_config": (dict,), "eva_config": (dict,), "corda_config": (dict,), "lora_ga_config": (dict,),
    "runtime_config": (dict,), "fan_in_fan_out": (bool,),
}  # fmt: skip
"""Keys that change nothing in a trained adapter. Which axis is which comes from the anatomy."""

_USED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """What a configuration says that is used.

    Attributes:
        where: The file, for messages.
        rank: Of modules that `ranks` does not name.
        alpha: Of modules that `alphas` does not name.
        rank_stabilised: Whether the scale is alpha over the root of the rank.
        ranks: Ranks by a module's path or its last parts.
        alphas: Likewise.
        targets: Names of the modules that it changes; None if tensors alone tell.
        excluded: Names of modules that it leaves alone.
        blocks: Numbers of the blocks that it changes; None is all.
        dropped: Keys that were present and mean nothing here.
    """

    where: Path
    rank: int
    alpha: float
    rank_stabilised: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: frozenset[str] | None
    excluded: frozenset[str]
    blocks: frozenset[int] | None
    dropped: tuple[str, ...]

    def scale(self, path: str, rank: int) -> float:
        """Return what the product of a module's factors is multiplied with.

        Raises:
            StoreError: The configuration tells another rank than the tensors, or two values for one module.
        """
        told = _looked_up(self.ranks, path, self.rank, self.where)
        if told != rank:
            raise StoreError(
                f"{self.where} gives {path} the rank {told}, and its tensors have {rank}. Do not use this adapter, or "
                "correct r or rank_pattern."
            )
        alpha = _looked_up(self.alphas, path, self.alpha, self.where)
        return float(alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def names_of(path: str) -> list[str]:
    """List the names that mean a module: its path and its last parts."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _looked_up(pattern: Mapping[str, Any], path: str, default: Any, where: Path) -> Any:
    found = {name: pattern[name] for name in names_of(path) if name in pattern}
    if len(set(found.values())) > 1:
        names = ", ".join(quoted(name) for name in found)
        raise StoreError(f"{where} gives {path} two different values ({names}). Leave one of these keys.")
    return next(iter(found.values()), default)


def read_config(told: Mapping[str, Any], where: Path, targets_from_tensors: bool = False) -> AdapterConfig:
    """Check a configuration key by key.

    Args:
        told: The parsed file.
        where: The file, for messages.
        targets_from_tensors: Take the tensors' names for what is changed, whatever the configuration says.

    Raises:
        StoreError: It is no plain LoRA, or a key is unknown or holds something else than it should.
    """
    _check_kind(told, where)
    loose = targets_from_tensors
    excluded = _names(told, "exclude_modules", where, loose)
    _names(told, "layers_pattern", where, loose, single=True)
    targets = _names(told, "target_modules", where, loose)
    if targets is None and not loose:
        raise _wrong(where, "target_modules", told.get("target_modules"), "a list of names")
    return AdapterConfig(
        where,
        rank=_rank(where, "r", told.get("r")),
        alpha=_alpha(where, "lora_alpha", told.get("lora_alpha")),
        rank_stabilised=_flag(where, told, "use_rslora"),
        ranks={k: _rank(where, "rank_pattern", v) for k, v in _pattern(where, told, "rank_pattern").items()},
        alphas={k: _alpha(where, "alpha_pattern", v) for k, v in _pattern(where, told, "alpha_pattern").items()},
        targets=None if loose else targets,
        excluded=frozenset() if loose else excluded or frozenset(),
        blocks=None if loose else _blocks(where, told.get("layers_to_transform")),
        dropped=tuple(sorted(k for k in told if k in _HARMLESS and told[k] not in (None, False, {}))),
    )


def _check_kind(told: Mapping[str, Any], where: Path) -> None:
    if told.get("peft_type") != "LORA":
        raise _wrong(where, "peft_type", told.get("peft_type"), "'LORA'")
    for key, value in told.items():
        if key in _NOT_PLAIN:
            _check_empty(where, key, value, _NOT_PLAIN[key])
        elif key in _HARMLESS:
            if value is not None and not isinstance(value, _HARMLESS[key]):
                raise _wrong(where, key, value, " or ".join(kind.__name__ for kind in _HARMLESS[key]))
        elif key not in _USED:
            raise StoreError(
                f"{where}: the key {quoted(key)} is not known, so what it changes is not either. Remove it if it does "
                "nothing, or update Retouch."
            )
    if told.get("bias", "none") != "none":
        _check_empty(where, "bias", told["bias"], "biases are trained too")
    if told.get("megatron_core") not in (None, "megatron.core"):
        _check_empty(where, "megatron_core", told["megatron_core"], "it names code to load")
    start = told.get("init_lora_weights")
    if type(start) in (int, float, list, dict) or start not in _SAFE_STARTS:
        raise StoreError(
            f"{where}: init_lora_weights is {quoted(start)}, a start that may also move the base's weights, so that the "
            "factors are not the whole change. Convert the adapter with PEFT (path_initial_model_for_weight_conversion)."
        )


def _check_empty(where: Path, key: str, value: Any, why: str) -> None:
    if value not in (None, False, [], {}):
        raise StoreError(
            f"{where}: {key} is {quoted(value)}: {why}; only plain LoRA of linear layers can be fused. Train the "
            "adapter without it."
        )


def _wrong(where: Path, key: str, value: Any, allowed: str) -> StoreError:
    return StoreError(
        f"{where}: {key} must be {allowed}; it is {quoted(value)}. Correct it or do not use this adapter."
    )


def _rank(where: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _wrong(where, key, value, f"a rank from 1 to {MAX_RANK:,}")
    return value


def _alpha(where: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= MAX_ALPHA:
        raise _wrong(where, key, value, f"a number above 0 and at most {MAX_ALPHA:,.0f}")
    return float(value)


def _flag(where: Path, told: Mapping[str, Any], key: str) -> bool:
    if (value := told.get(key) or False) is not True and value is not False:
        raise _wrong(where, key, value, "true or false")
    return bool(value)


def _pattern(where: Path, told: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = told.get(key) or {}
    if not isinstance(value, dict):
        raise _wrong(where, key, value, "an object")
    _check_plain(where, key, value)
    return value


def _check_plain(where: Path, key: str, names: Iterable[Any]) -> None:
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise StoreError(
                f"{where}: {key} holds {quoted(name)}, and only literal names of modules are taken, never regular "
                "expressions. Write the modules' paths out."
            )


def _names(told: Mapping[str, Any], key: str, where: Path, loose: bool, single: bool = False) -> frozenset[str] | None:
    value = told.get(key)
    if value is None or (loose and isinstance(value, str)):
        return None
    if isinstance(value, str) and not single:
        raise StoreError(
            f"{where}: {key} is the pattern {quoted(value)}, and patterns are never compiled. Write the modules out as "
            "a list, or let the tensors' names tell (--targets-from-tensors)."
        )
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list):
        raise _wrong(where, key, value, "a list of names")
    if loose:
        return None
    _check_plain(where, key, names)
    return frozenset(names)


def _blocks(where: Path, value: Any) -> frozenset[int] | None:
    if value is None:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _wrong(where, "layers_to_transform", value, "a list of block numbers")
    return frozenset(numbers)


def check_agreement(
    config: AdapterConfig, found: Collection[str], anatomy: Anatomy, allowed: Mapping[str, str]
) -> None:
    """Make sure that a configuration tells of exactly the modules that have tensors.

    Args:
        config: The configuration.
        found: Paths of the modules with tensors.
        anatomy: Of the base.
        allowed: Our names of all modules that an adapter may change, by path.

    Raises:
        StoreError: A target has no tensors, tensors belong to no target, or a pattern's key belongs to no module.
    """
    known = {name for path in found for name in names_of(path)}
    for key, names in (("rank_pattern", config.ranks), ("alpha_pattern", config.alphas)):
        if idle := next((name for name in names if name not in known), None):
            raise StoreError(
                f"{config.where}: {key} names {quoted(idle)}, which is no module of this adapter. Remove that key."
            )
    if config.targets is None:
        return
    expected = {path for path, name in allowed.items() if _targeted(config, path, anatomy.block_of(name))}
    odd = sorted(set(config.targets) - known) or sorted(expected - set(found))
    extra = sorted(set(found) - expected)
    if odd or extra:
        told = f"{quoted(odd[0])}, which has no tensors" if odd else f"other modules than {extra[0]}, which has tensors"
        raise StoreError(
            f"{config.where}: target_modules names {told}. Correct the list, or let the tensors' names tell "
            "(--targets-from-tensors)."
        )


def _targeted(config: AdapterConfig, path: str, block: int) -> bool:
    names = set(names_of(path))
    named = not names.isdisjoint(config.targets or ()) and names.isdisjoint(config.excluded)
    return named and (config.blocks is None or block in config.blocks)
