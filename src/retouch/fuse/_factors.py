"""The factors of a stranger's adapter: pairs by our names, read when asked, checked each time.

Whoever sends factors controls every number of them, so names, shapes, finiteness and size are checked before a method
sees any.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..change import LowRank
from ..errors import StoreError
from ..linalg import frobenius_norm
from ._adapter_config import MAX_RANK
from ._folder import exactly, opened, quoted
from ._header import MAX_TENSORS, Entry

if TYPE_CHECKING:
    from ..model import Model

TENSORS = "adapter_model.safetensors"
MAX_GROWTH = 10.0
"""A difference with a norm of more than this many times its weight's is no fine-tuning."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PEFT = re.compile(r"base_model\.model\.([A-Za-z0-9_.]+)\.lora_([AB])\.weight")
_OURS = re.compile(r"([a-z0-9_.]+)\.lora_([AB])")
_FOREIGN = {
    "lora_embedding": "it changes an embedding",
    "lora_magnitude": "it is a magnitude vector of DoRA",
    "modules_to_save": "it replaces a module of the base",
    "bias": "it changes a bias",
    "lora_": "its name is not that of a factor",
    "": "it would overwrite a weight of the base",
}
"""Why a tensor is refused, by what its name holds; the first that fits."""


# ---------------------------------------------------------------- which tensors belong together


def by_path(model: Model) -> dict[str, str]:
    """Name the weights that an adapter may change, by their modules' paths: the matrices inside blocks."""
    anatomy = model.anatomy
    return {anatomy.path(name): name for name in anatomy.names() if name not in ("embed", "head")}


def shapes_of(model: Model) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of those weights, as they are: a pruned model's are smaller than its family's."""
    shapes = {}
    for name in by_path(model).values():
        rows, columns = model.weight(name).shape
        shapes[name] = (columns, rows) if model.anatomy.transposed(name) else (rows, columns)
    return shapes


def paired(names: Mapping[str, Any], known: Mapping[str, str] | None, where: str) -> dict[str, dict[str, str]]:
    """Group tensors' names into pairs: for our name of a weight, the name of each half (``A``, ``B``).

    Args:
        names: The tensors' names.
        known: Our names by modules' paths, for names as PEFT writes them; None for names made of ours.
        where: The file or sender, for messages.

    Raises:
        StoreError: A name is not that of a factor, belongs to no weight, or lacks its other half.
    """
    if not names:
        raise StoreError(f"{where} holds no factors, so it changes nothing. Send the adapter after training it.")
    if len(names) > MAX_TENSORS:
        raise StoreError(f"{where} holds {len(names):,} tensors; at most {MAX_TENSORS:,} are taken. Do not use it.")
    pairs: dict[str, dict[str, str]] = {}
    for name in names:
        weight, half = _parsed(name, known, where)
        pairs.setdefault(weight, {})[half] = name
    for halves in pairs.values():
        if len(halves) < 2:
            (half, name), other = next(iter(halves.items())), "B" if "A" in halves else "A"
            raise StoreError(f"{where}: {quoted(name)} (lora_{half}) has no lora_{other} beside it. Copy it again.")
    return pairs


def _parsed(name: str, known: Mapping[str, str] | None, where: str) -> tuple[str, str]:
    match = (_OURS if known is None else _PEFT).fullmatch(name)
    if match is None:
        why = next(reason for mark, reason in _FOREIGN.items() if mark in name)
        raise StoreError(
            f"{where}: the tensor {quoted(name)} does not belong in an adapter: {why}. Do not use this adapter."
        )
    weight, half = match.groups()
    if known is None:
        return weight, half
    if weight not in known:
        raise StoreError(
            f"{where}: {quoted(weight)} is no linear layer in a block of this model. Open the model that the adapter was "
            "trained for, or do not use it."
        )
    return known[weight], half


def check_shapes(weight: str, left: tuple[int, ...], right: tuple[int, ...], shape: tuple[int, int], where: str) -> int:
    """Return the rank of a pair of factors of a weight.

    Raises:
        StoreError: The factors do not fit each other or the weight, or the rank is too large.
    """
    limit = min(*shape, MAX_RANK)
    if len(left) != 2 or len(right) != 2 or (left[0], right[1]) != shape or left[1] != right[0]:
        raise StoreError(
            f"{where}: {weight} is {shape[0]}x{shape[1]}, to which lora_B {_sized(left)} and lora_A {_sized(right)} do "
            "not fit. Open the model that the adapter was trained for, or do not use it."
        )
    if not 1 <= left[1] <= limit:
        raise StoreError(
            f"{where}: {weight} has the rank {left[1]:,}; allowed are 1 to {limit:,}. Do not use this adapter, or "
            "compress it first."
        )
    return left[1]


def _sized(shape: tuple[int, ...]) -> str:
    return "x".join(f"{n}" for n in shape[:8]) or "()"


# ---------------------------------------------------------------- the numbers


def norms_of(model: Model, names: Mapping[str, Any]) -> dict[str, float]:
    """Return the Frobenius norm of weights; none for those whose values are not here."""
    weights = {name: model.weight(name).detach() for name in names}
    return {name: float(weight.norm()) for name, weight in weights.items() if not weight.is_meta}


def checked(weight: str, part: LowRank, norm: float | None, where: str) -> LowRank:
    """Return factors that are finite and no larger than a fine-tuning's.

    Args:
        weight: Our name of the weight.
        part: The factors, with the scale folded in.
        norm: Of the weight itself, if it is here.
        where: The file or sender, for messages.

    Raises:
        StoreError: A value is not finite, or the difference is too large.
    """
    for half, factor in (("B", part.left), ("A", part.right)):
        if bad := int((~torch.isfinite(factor)).sum()):
            raise StoreError(
                f"{where}: {bad:,} of the {factor.numel():,} values of lora_{half} of {weight} are not finite (NaN or "
                "infinity). Do not use this adapter; train it again with a lower learning rate."
            )
    if norm is not None and (size := frobenius_norm(part.left, part.right)) > MAX_GROWTH * norm:
        raise StoreError(
            f"{where}: the change of {weight} has the norm {size:.3g}, over {MAX_GROWTH:g} times the weight's {norm:.3g}. "
            "Do not use this adapter, or train it again."
        )
    return part


# ---------------------------------------------------------------- factors that stay in their file


@dataclass(frozen=True)
class Place:
    """Where one weight's factors lie in a file.

    Attributes:
        left: Of lora_B.
        right: Of lora_A.
        scale: What is folded into lora_B.
        norm: Of the weight itself, if known.
        digest: Of both factors' bytes, once they were checked.
    """

    left: Entry
    right: Entry
    scale: float
    norm: float | None
    digest: str = ""


class Factors(Mapping[str, LowRank]):
    """The factors of an adapter, read from its file one weight at a time and never kept.

    It holds no open file, so that it can be sent to other processes. What it gives is what was checked when the adapter
    was opened: another content is an error.
    """

    def __init__(self, folder: Path, places: Mapping[str, Place]) -> None:
        self._folder = folder
        self._places = dict(places)

    def __getitem__(self, name: str) -> LowRank:
        place = self._places[name]
        where = self._folder / TENSORS
        with opened(self._folder) as folder, folder.file(TENSORS) as file:
            part, digest = read_pair(file, name, place, where)
        if digest != place.digest:
            raise StoreError(f"{where} has changed since the adapter was opened ({name}). Open it again.")
        return part

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each weight's factors; nothing is read."""
        return {name: place.right.shape[0] for name, place in self._places.items()}


def read_pair(file: io.FileIO, weight: str, place: Place, where: Path) -> tuple[LowRank, str]:
    """Read one weight's factors, fold the scale in and check them.

    Returns:
        The factors, and the digest of their bytes.

    Raises:
        StoreError: As `checked`; or the file is shorter than it was.
    """
    digest = hashlib.sha256()
    left, right = (_read(file, entry, digest, where) for entry in (place.left, place.right))
    return checked(weight, LowRank(left * place.scale, right), place.norm, str(where)), digest.hexdigest()


def _read(file: io.FileIO, entry: Entry, digest: Any, where: Path) -> Tensor:
    data = exactly(file, entry.start, entry.end - entry.start, where)
    digest.update(data)
    return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).reshape(entry.shape).float()
