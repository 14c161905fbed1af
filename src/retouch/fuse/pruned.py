"""Make the smaller network that a plan describes, save it for an edge, and open it there.

The network is the family's own class with smaller weights: its attention takes the number of heads from the tensors.
What an edge is given holds the weights, the tokenizer and the plan's hash, and never which units stayed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import anatomy as anatomies
from .. import store
from ..anatomy import Anatomy
from ..change import versions
from ..errors import ModelError, StoreError
from ..model import Model, quiet
from ._units import ATTENTION, Units, units_of
from .prune import PrunePlan, check_plan

__all__ = ["PrunedModel", "open_pruned", "pruned", "save_pruned"]

FORMAT = 1
_WEIGHTS = "weights.safetensors"
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, eq=False)
class PrunedModel(Model):
    """A model whose blocks have lost units. Its anatomy states the whole model's sizes.

    Attributes:
        plan: Hash of the plan.
        align: What was done to its weights after the cut.
    """

    plan: str = ""
    align: str = "none"

    def save_files(self, folder: Path, dtype: str) -> None:
        """Refuse: no Hugging Face folder can state unequal widths.

        Raises:
            ModelError: Always.
        """
        raise ModelError(f"{self.source} is pruned unevenly, which config.json cannot state. Use save_pruned.")


def pruned(model: Model, plan: PrunePlan) -> PrunedModel:
    """Return the smaller network of a plan; the model is left as it was and shares what is not cut.

    Raises:
        WrongBase: The plan was made for another model.
    """
    units = check_plan(plan, model)
    shared = [*model.network.parameters(), *model.network.buffers()]
    network = copy.deepcopy(model.network, {id(t): t for t in shared})
    digests = dict(model.digests)
    for block, kept in enumerate(plan.kept):
        for part in units.parts:
            name = f"blocks.{block}.{part}"
            index = units.index(part, kept)
            if index is not None:
                path = model.anatomy.path(name)
                _cut(network.get_submodule(path), units.axis(part), index, model.anatomy.transposed(name))
                digests = {n: d for n, d in digests.items() if not n.startswith(f"{path}.")}
    network.register_forward_pre_hook(_refuse_static_cache, with_kwargs=True)
    return PrunedModel(
        network, model.tokenizer, model.anatomy, f"{model.source}, pruned", model.file_dtype, plan.base, digests,
        plan=plan.hash,
    )  # fmt: skip


def _cut(module: nn.Module, axis: str, index: Tensor, transposed: bool) -> None:
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    index = index.to(weight.device)
    module.weight = _fixed(weight.index_select(int((axis == "columns") != transposed), index))
    if axis == "rows" and bias is not None:
        module.bias = _fixed(bias[index])
    _set_sizes(module, transposed)


def _set_sizes(module: nn.Module, transposed: bool) -> None:
    """Tell a layer its sizes: PEFT, and GPT-2's own layer, read them."""
    rows, columns = module.get_parameter("weight").shape[:: -1 if transposed else 1]
    for name, size in (("out_features", rows), ("nf", rows), ("in_features", columns), ("nx", columns)):
        if hasattr(module, name):
            setattr(module, name, size)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def _refuse_static_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    from transformers import StaticCache

    if isinstance(kwargs.get("past_key_values"), StaticCache):
        raise ModelError(
            "A static cache takes the number of heads from config.json; a pruned model has fewer. Use another."
        )


def with_bias(model: PrunedModel, biases: Mapping[str, Tensor]) -> PrunedModel:
    """Return a model whose named weights add a bias, or a larger one.

    Shapes:
        biases: (outputs,) each.
    """
    shared = [*model.network.parameters(), *model.network.buffers()]
    network = copy.deepcopy(model.network, {id(t): t for t in shared})
    digests = dict(model.digests)
    for name, bias in biases.items():
        module = network.get_submodule(model.anatomy.path(name))
        old = getattr(module, "bias", None)
        weight = module.get_parameter("weight")
        new = bias.to(weight.device, torch.float64) + (0 if old is None else old.double())
        module.bias = _fixed(new.to(weight.dtype))
        digests.pop(f"{model.anatomy.path(name)}.bias", None)
    return replace(model, network=network, known_digests=digests)


# ---------------------------------------------------------------- files


def save_pruned(model: Model, plan: PrunePlan, folder: str | Path, *, dtype: str = "float32") -> None:
    """Write what an edge of this plan is given: weights, tokenizer, the plan's hash. The indices stay out.

    Args:
        model: The pruned and aligned model, or the whole one, which is then pruned and aligned as the plan says.
        plan: The plan.
        folder: Where to.
        dtype: ``"float32"`` or ``"bfloat16"``.

    Raises:
        WrongBase: The plan was made for another model.
        StoreError: The folder cannot be written, or `dtype` is another.
    """
    from .align import aligned

    if dtype not in _DTYPES:
        raise StoreError(f"Weights are stored as {' or '.join(_DTYPES)}; got {dtype!r}.")
    small = model if isinstance(model, PrunedModel) else aligned(model, plan)
    if (small.plan, small.align) != (plan.hash, plan.align):
        raise StoreError(
            f"This model was pruned by plan {small.plan[:8]} and aligned by {small.align!r}; the plan {plan.hash[:8]} says "
            f"{plan.align!r}. Prune and align it by this plan."
        )
    record = {
        "format": FORMAT, "kind": "pruned", "plan": plan.hash, "base": plan.base, "align": plan.align, "dtype": dtype,
        "tied": small.anatomy.tied, "widths": [[len(k.kv), len(k.ff)] for k in plan.kept],
        "versions": versions(),
    }  # fmt: skip
    tensors = {n: t.detach().to(getattr(torch, dtype)) for n, t in _stored(small.network).items()}
    with store.writing(folder, need_bytes=sum(t.nbytes for t in tensors.values())) as new:
        store.save_tensors(new / _WEIGHTS, tensors)
        with quiet():
            small.network.config.save_pretrained(new)  # type: ignore[union-attr, operator]
            small.tokenizer.save_pretrained(new)
        (new / "retouch.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def _stored(network: nn.Module) -> dict[str, Tensor]:
    """Name everything that is saved, a tied weight once."""
    parameters: dict[str, Tensor] = dict(network.named_parameters())
    tied = {n for n, _ in network.named_parameters(remove_duplicate=False)} - parameters.keys()
    buffers = {n: t for n, t in network.state_dict().items() if n not in parameters and n not in tied}
    return parameters | buffers


def open_pruned(folder: str | Path, *, device: str | None = None, dtype: str = "float32") -> PrunedModel:
    """Open a pruned model. Its memory is that of the small weights: the whole network is built without any.

    Args:
        folder: What `save_pruned` wrote.
        device: A torch device; by default the first accelerator, else the CPU.
        dtype: Type of the weights in memory; ``"bfloat16"`` is for training alone.

    Raises:
        StoreError: The folder is damaged, of another kind, `dtype` is unknown, or its weights do not fit the widths that it states.
        ModelError: The family is unknown.
    """
    folder = Path(folder)
    if dtype not in _DTYPES:
        raise StoreError(f"Weights are opened as {' or '.join(_DTYPES)}; got {dtype!r}.")
    store.check_folder(folder)
    record = _record(folder)
    with quiet():
        network, tokenizer = _empty(folder)
    anatomy = anatomies.describe(network.config, network)
    if record["tied"] and anatomy.has_head and not anatomy.tied:  # being built without memory has parted them
        _tie(network, anatomy)
        anatomy = anatomies.describe(network.config, network)
    tensors = {n: t.to(getattr(torch, dtype)) for n, t in store.load_tensors(folder / _WEIGHTS).items()}
    model = PrunedModel(
        network,
        tokenizer,
        anatomy,
        str(folder),
        record["dtype"],
        record["base"],
        plan=record["plan"],
        align=record["align"],
    )
    _fill(model, units_of(model), record, tensors, folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).eval().requires_grad_(False)
    network.register_forward_pre_hook(_refuse_static_cache, with_kwargs=True)
    return model


def _record(folder: Path) -> dict[str, Any]:
    record = store.read_json(folder / "retouch.json")
    record = record if isinstance(record, dict) else {}
    if record.get("kind") != "pruned" or record.get("format") != FORMAT:
        raise StoreError(f"{folder} is no pruned model of format {FORMAT}. Make it with retouch fuse prune.")
    kinds = {"plan": str, "base": str, "align": str, "dtype": str, "tied": bool, "widths": list}
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            raise StoreError(f"{folder}: retouch.json lacks {name!r} or holds something else there.")
    return record


def _empty(folder: Path) -> tuple[Any, Any]:
    """Build the whole network without memory for its parameters; what it computes from its settings is real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        anatomies.describe(config)
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return network, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise StoreError(f"{folder}: its config.json or tokenizer cannot be read: {error}") from error


def _fill(
    model: PrunedModel, units: Units, record: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path
) -> None:
    network, shapes = model.network, _shapes(model, units, record["widths"], folder)
    missing = set(shapes) - set(tensors)
    added = {
        f"{model.anatomy.path(f'blocks.{b}.{p}')}.bias" for b in range(model.anatomy.n_blocks) for p in units.parts
    }
    extra = set(tensors) - set(shapes) - added
    if missing or extra:
        raise StoreError(f"{folder}: {_WEIGHTS} {'lacks' if missing else 'also holds'} {min(missing or extra)!r}.")
    for path, tensor in tensors.items():
        expected = shapes.get(path)
        if expected is not None and tuple(tensor.shape) != expected:
            raise StoreError(f"{folder}: {path} is {tuple(tensor.shape)}, and the stated widths want {expected}.")
        _put(network, path, tensor)
    if record["tied"]:
        _tie(network, model.anatomy)
    for block in range(model.anatomy.n_blocks):
        for part in units.parts:
            name = f"blocks.{block}.{part}"
            _set_sizes(model.module(name), model.anatomy.transposed(name))


def _tie(network: nn.Module, anatomy: Anatomy) -> None:
    head, embed = (network.get_submodule(anatomy.path(name)) for name in ("head", "embed"))
    head.register_parameter("weight", embed.get_parameter("weight"))


def _put(network: nn.Module, path: str, tensor: Tensor) -> None:
    parent, _, leaf = path.rpartition(".")
    module = network.get_submodule(parent)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module.register_parameter(leaf, _fixed(tensor))


def _shapes(model: PrunedModel, units: Units, widths: list[Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """Say what size everything that is saved must have, given the widths of the blocks."""
    shapes = {n: tuple(t.shape) for n, t in _stored(model.network).items()}
    whole = isinstance(widths, list) and len(widths) == model.anatomy.n_blocks
    if not whole or not all(
        isinstance(w, list) and len(w) == 2 and all(type(n) is int for n in w)
        and 1 <= w[0] <= units.kv and 1 <= w[1] <= units.ff for w in widths
    ):  # fmt: skip
        raise StoreError(f"{folder}: retouch.json states widths that no {model.anatomy.family} of this size can have.")
    for block, (kv, ff) in enumerate(widths):
        for part in units.parts:
            path = model.anatomy.path(f"blocks.{block}.{part}")
            share, of = (kv, units.kv) if part in ATTENTION else (ff, units.ff)
            side = int((units.axis(part) == "columns") != model.anatomy.transposed(f"blocks.{block}.{part}"))
            shape = list(shapes[f"{path}.weight"])
            shape[side] = shape[side] // of * share
            shapes[f"{path}.weight"] = tuple(shape)
            if units.axis(part) == "rows" and f"{path}.bias" in shapes:
                shapes[f"{path}.bias"] = (shapes[f"{path}.bias"][0] // of * share,)
    return shapes
