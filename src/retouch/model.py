"""Open a model: a folder, a hub id, a ``.gguf`` file or a bundled name; and prove that we know its parts.

A `Model` is never altered in place. Editing works in float32 whatever the file holds; the file's own type is kept
beside, for saving.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _bundled, store, tokens
from . import anatomy as anatomies
from ._bundled import BUNDLED, Bundled
from ._gguf import dequantise
from ._positions import longest_row, refuse_longer
from .anatomy import Anatomy
from .errors import ModelError, UnknownName, unknown

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["BUNDLED", "Bundled", "Model", "open_model", "quiet", "wrap"]

_NOT_SHAPE = {
    "_name_or_path", "name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "id2label", "label2id", "quantization_config",
}  # fmt: skip
"""What a configuration says that decides no activation; saving alone changes some of it."""


@dataclass(frozen=True, eq=False)
class Model:
    """An opened model.

    Attributes:
        network: The Hugging Face module, in eval mode, in float32, without gradients.
        tokenizer: Its tokenizer.
        anatomy: Which weight is which.
        source: What it was opened from, for people.
        file_dtype: The type its weights have on disk, e.g. ``"bfloat16"``.
        base: Fingerprint of the model before any change; None when this is that model.
    """

    network: nn.Module
    tokenizer: Any
    anatomy: Anatomy
    source: str
    file_dtype: str = "float32"
    base: str | None = None
    known_digests: Mapping[str, str] = field(default_factory=dict, repr=False)

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every parameter and buffer that is saved, by its path. Costs one read of the weights."""
        known = dict(self.known_digests)
        for name, tensor in self.network.state_dict(keep_vars=True).items():
            if name not in known:
                known[name] = store.digest_tensor(tensor)
        return known

    @cached_property
    def fingerprint(self) -> str:
        """What this model is: family, sizes and every weight."""
        return store.key(family=self.anatomy.family, shape=self._shape(), weights=self.digests)

    @property
    def base_fingerprint(self) -> str:
        """What the model was before any change."""
        return self.base or self.fingerprint

    def fingerprint_below(self, block: int) -> str:
        """What everything is that decides the activations up to and including `block`."""
        blocks = self.anatomy.places["blocks"] + "."
        above = tuple(f"{blocks}{i}." for i in range(block + 1, self.anatomy.n_blocks))
        ends = tuple(f"{step.removesuffix('?')}." for step in self.anatomy.steps)
        embed = self.digests.get(self.anatomy.weight("embed"))
        used = {
            n: d for n, d in self.digests.items() if not n.startswith(above) and (not n.startswith(ends) or d == embed)
        }
        return store.key(family=self.anatomy.family, shape=self._shape(), weights=used)

    def _shape(self) -> dict[str, Any]:
        config: Any = self.network.config
        plain = json.loads(json.dumps(config.to_dict(), default=str))  # rotary settings lie in a dict of their own
        return {k: v for k, v in plain.items() if k not in _NOT_SHAPE and v is not None}

    @property
    def device(self) -> torch.device:
        """Where the first weight lives; rows are sent there."""
        return next(self.network.parameters()).device

    @property
    def pad_id(self) -> int:
        """The token that fills rows; always masked, so any id will do where there is none."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(i for i in ids if i is not None))

    def weight(self, name: str) -> nn.Parameter:
        """Return the parameter behind one of our names, e.g. ``blocks.5.mlp.down``, in its own orientation.

        Raises:
            UnknownName: The anatomy has no such weight.
        """
        return self.network.get_parameter(self.anatomy.weight(name))

    def matrix(self, name: str) -> Tensor:
        """Return a weight as (outputs, inputs), whatever the family's orientation. A view: never write to it."""
        weight = self.weight(name).detach()
        return weight.T if self.anatomy.transposed(name) else weight

    def module(self, name: str) -> nn.Module:
        """Return the module behind one of our names."""
        return self.network.get_submodule(self.anatomy.path(name))

    @cached_property
    def longest(self) -> int | None:
        """Most tokens of a decoder's row; None where there is no such end."""
        return longest_row(self.network) if self.anatomy.kind == "decoder" else None

    def batch(self, rows: list[tuple[int, ...]], **how: Any) -> tokens.Batch:
        """Pad token rows and send them to the model's device."""
        refuse_longer(max(map(len, rows), default=0), self.longest, self.source)
        b = tokens.pad(rows, self.pad_id, **how)
        return tokens.Batch(*(t.to(self.device) for t in (b.ids, b.mask, b.positions, b.first)))

    def inputs(self, batch: tokens.Batch) -> dict[str, Tensor]:
        """Name a batch's tensors as the network's forward wants them."""
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if self.anatomy.kind == "decoder":
            inputs["position_ids"] = batch.positions
        return inputs

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the final norm and the head to states after the last block.

        Shapes:
            hidden: (..., d_model) -> (..., classes)
        """
        return self.anatomy.read_out(self.network, hidden)

    def with_weights(self, values: Mapping[str, Tensor], base: str | None = None) -> Model:
        """Return a new model in which some weights have other values; all others are shared.

        Args:
            values: New values by parameter path, in the parameter's own shape.
            base: Fingerprint of the unchanged model; by default this model's.
        """
        import torch

        shared = [*self.network.parameters(), *self.network.buffers()]
        network = copy.deepcopy(self.network, {id(t): t for t in shared})
        digests = dict(self.digests)
        for path, value in values.items():
            old = self.network.get_parameter(path)
            new = torch.nn.Parameter(value.to(old.device, old.dtype).contiguous(), requires_grad=False)
            for other, parameter in self.network.named_parameters(remove_duplicate=False):
                if parameter is old:  # tied weights stay tied
                    parent, _, leaf = other.rpartition(".")
                    setattr(network.get_submodule(parent), leaf, new)
                    digests[other] = store.digest_tensor(new)
        return replace(self, network=network, base=base or self.base_fingerprint, known_digests=digests)

    def save_files(self, folder: Path, dtype: str) -> None:
        """Write the network and the tokenizer as a Hugging Face folder (safetensors) with weights of type `dtype`."""
        import torch

        network = self.network
        if dtype != "float32":
            network = copy.deepcopy(network).to(getattr(torch, dtype))
        with quiet():
            network.save_pretrained(folder)  # type: ignore[operator]
            self.tokenizer.save_pretrained(folder)


def open_model(source: str | Path, *, device: str | None = None) -> Model:
    """Open a model for editing and prove its anatomy on a dummy batch.

    Args:
        source: A folder, a ``.gguf`` file, a bundled name (``smollm2``, ``gemma3-270m``, ``minilm``), or a
            hub id.
        device: A torch device; by default the first accelerator, else the CPU.

    Returns:
        The model, in float32, in eval mode.

    Raises:
        UnknownName: There is no such folder, file or bundled name, and it does not look like a hub id.
        ModelError: The family is unknown, or the weights are quantised, pickled, offloaded or not finite.
    """
    name = str(source)
    if name in BUNDLED:
        first, digest = _bundled.find(name)[0], BUNDLED[name].digest
        if digest:
            return _open_gguf(digest, lambda: _bundled.whole(name), name, device)
        return _open_folder(first, name, device)
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnknownName(f"There is no file {name!r}.")
        return _open_gguf(store.sha256_file(path), lambda: path, name, device)
    if path.is_dir() and name.strip():
        return _open_folder(path, name, device)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        what = f"{name!r} is a file of another kind" if path.is_file() else f"There is no model folder {name!r}"
        raise UnknownName(f"{what}. Give a folder, a .gguf file, a hub id or a bundled name ({', '.join(BUNDLED)}).")
    if difflib.get_close_matches(name, BUNDLED, 1, 0.8):
        raise unknown("bundled model", name, BUNDLED)  # at once, not after half a minute of asking the hub
    return _load(name, name, device)


def wrap(network: nn.Module, tokenizer: Any, source: str = "a network in memory") -> Model:
    """Make a `Model` of a Hugging Face network and tokenizer that are already in memory.

    The network must be in float32. It is set to eval mode and its gradients are switched off; weights are shared.

    Raises:
        ModelError: As `open_model`.
    """
    import torch

    config: Any = network.config
    _refuse_quantised(config, source)
    anatomy = anatomies.describe(config, network)
    if any(p.is_meta for p in network.parameters()) or "disk" in set(
        map(str, getattr(network, "hf_device_map", {}).values())
    ):
        raise ModelError(
            f"Parts of {source} are offloaded to disk, so they cannot be edited. Load it whole (no device_map), "
            "on a machine with enough memory."
        )
    for name, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            raise ModelError(
                f"{source}: {name} is {str(parameter.dtype)[6:]}; editing happens in float32. Call .float() on it first."
            )
        if not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise ModelError(f"{source}: {name} holds {bad} values that are not finite. The file is damaged.")
        parameter.requires_grad_(False)
    network.eval()
    ids = torch.tensor([[1 % config.vocab_size, 2 % config.vocab_size, 3 % config.vocab_size, 5 % config.vocab_size]])
    anatomies.prove(anatomy, network, ids.to(next(network.parameters()).device))
    return Model(network, tokenizer, anatomy, source)


def _open_gguf(digest: str, locate: Callable[[], Path], name: str, device: str | None) -> Model:
    import transformers

    key = store.key(file=digest, transformers=transformers.__version__.split(".")[0], format=1, dtype="float32")

    def write(target: Path) -> None:
        path = locate()
        with quiet():
            dequantise(path, target)

    return _load(str(store.cached("gguf", key, write)), name, device)


def _open_folder(path: Path, name: str, device: str | None) -> Model:
    if not (path / "config.json").is_file():
        raise ModelError(f"{name}: the folder has no config.json, so it is not a Hugging Face model.")
    if store.read_json(path / "config.json").get("model_type") == "retouch_slim":
        raise ModelError(
            f"{name} is a slim classifier. Let it answer with: retouch slim {path} --predict FILE, or open it with "
            "retouch.slim.predict.open_classifier."
        )
    weights = list(path.glob("*.safetensors"))
    pickles = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    if not weights:
        what = f"only pickled weights ({pickles[0]}), which can run code when read" if pickles else "no weights"
        raise ModelError(
            f"{name}: the folder has {what}. Save it as safetensors first: model.save_pretrained(FOLDER) with a "
            "current transformers does."
        )
    base = None
    if (path / "manifest.json").is_file():
        store.check_folder(path)
        base = store.read_json(path / "retouch.json").get("base")
    model = _load(str(path), name, device)
    return replace(model, base=base if base != model.fingerprint else None) if base else model


def _load(path: str, name: str, device: str | None) -> Model:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            _refuse_quantised(config, name)
            anatomies.describe(config)  # an unknown family is refused before its weights are read
            names = config.architectures or [""]
            if anatomies.describe(config).kind == "decoder":
                kind = AutoModelForCausalLM
            else:
                kind = AutoModelForMaskedLM if "MaskedLM" in names[0] else AutoModel
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            how = {
                "trust_remote_code": False,
                "use_safetensors": True,
                "ignore_mismatched_sizes": True,
                "output_loading_info": True,
            }
            network, loading = kind.from_pretrained(path, dtype=torch.float32, **how)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        if not Path(path).exists() and name not in BUNDLED:
            raise UnknownName(
                f"No model {name!r}: it is no folder, no .gguf file and no bundled name ({', '.join(BUNDLED)}), and as a "
                f"hub id it could not be loaded: {first}"
            ) from error
        raise ModelError(f"{name} cannot be opened: {first}") from error
    _refuse_incomplete(network, loading, name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = wrap(network.to(device), tokenizer, name)
    file_dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return replace(model, file_dtype=file_dtype)


def _refuse_incomplete(network: Any, loading: Mapping[str, Any], name: str) -> None:
    """Transformers fills a weight that is absent, or of another size, with random numbers."""
    what = type(network).__name__
    if missing := sorted(n for n in loading["missing_keys"] if "pooler" not in n):  # nothing here reads a pooler
        raise ModelError(
            f"{name} lacks {len(missing)} weights of a {what}, e.g. {missing[0]!r}. Copy the model again, or save the "
            "whole network, with its language-model head."
        )
    if loading["mismatched_keys"]:
        path, held, wanted = min(loading["mismatched_keys"])
        raise ModelError(
            f"{name} cannot be opened: {path} is {'x'.join(map(str, held))}, and its config.json wants "
            f"{'x'.join(map(str, wanted))}. Copy both files again from one source."
        )


def _refuse_quantised(config: Any, name: str) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised.quant_method
        raise ModelError(
            f"{name} is stored quantised ({method}), so its weights cannot be edited exactly. Open the unquantised "
            "original, or a .gguf file (it is de-quantised into the cache)."
        )


_quiet_lock = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars and advice of transformers and the hub off the user's screen; errors still come as exceptions."""
    from transformers.utils import logging as hf

    hub = logging.getLogger("huggingface_hub")
    with _quiet_lock:
        level, bars, hub_level = hf.get_verbosity(), hf.is_progress_bar_enabled(), hub.level
        hf.set_verbosity_error()
        hub.setLevel(logging.ERROR)
        hf.disable_progress_bar()
        try:
            yield
        finally:
            hf.set_verbosity(level)
            hub.setLevel(hub_level)
            if bars:
                hf.enable_progress_bar()
