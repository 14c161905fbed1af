"""De-quantise a ``.gguf`` file into a Hugging Face folder in float32, which is opened in its place."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ModelError
from .progress import report, track

__all__ = ["dequantise"]


def dequantise(path: Path, target: Path) -> None:
    """Write the model of a file, and its tokenizer, into a folder.

    Raises:
        ModelError: The file is damaged, or of a kind that transformers cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report(f"Reading the tokenizer of {path.name}", 0, None)
    with _progress(path.name):
        try:
            how = {"gguf_file": path.name, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **how)
            network = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **how)
        except (ValueError, KeyError, OSError, NotImplementedError, struct.error) as error:
            raise ModelError(f"{path} cannot be read as a GGUF model: {error}") from error
    # transformers refuses to save what it believes to be quantised; after de-quantising it no longer is
    network.config.__dict__.pop("quantization_config", None)
    network.hf_quantizer, network.is_quantized = None, False
    report(f"Writing {path.name} to the cache", 0, None)
    network.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _progress(name: str) -> Iterator[None]:
    """Send the bar that transformers draws while it de-quantises to our listener."""
    from transformers import modeling_gguf_pytorch_utils as module

    original = getattr(module, "tqdm", None)
    if original is None:
        yield
        return
    module.tqdm = lambda items, **_: track(items, f"De-quantising {name}")
    try:
        yield
    finally:
        module.tqdm = original
