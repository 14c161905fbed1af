"""What any verb measures: likelihoods, generation, perplexity, sizes, FLOPs, seconds, memory. Nothing here knows a method."""

from __future__ import annotations

import math
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._continuations import continuations
from ._likelihood import Answer, Before, Shift, answers, chunk_nll, look, next_logp, perplexities, perplexity
from .change import versions
from .model import Model

__all__ = [
    "Answer",
    "Before",
    "Cost",
    "Shift",
    "answers",
    "chunk_nll",
    "continuations",
    "environment",
    "flops_per_token",
    "look",
    "n_parameters",
    "next_logp",
    "ngram_entropy",
    "perplexities",
    "perplexity",
    "watched",
]


def ngram_entropy(text: str) -> float:
    """Return the weighted mean of 2/3 of the bigrams' and 4/3 of the trigrams' entropy, in bits.

    Source:
        The fluency of kmeng01/rome: repetitive text scores low. Papers print it times 100.

    Example:
        >>> ngram_entropy("a b a b a b a b") < ngram_entropy("one two three four five six seven eight")
        True
    """
    words = text.split()
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n))))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def n_parameters(model: Model) -> int:
    """Count parameters; tied ones once."""
    return sum(p.numel() for p in model.network.parameters())


def flops_per_token(model: Model, first: int = 0, head: bool = True) -> float:
    """Count the multiply-adds of one token through the blocks from `first` on, two FLOPs each; attention scores are left out."""
    a = model.anatomy
    per_block = sum(p.numel() for p in model.module(f"blocks.{a.n_blocks - 1}").parameters() if p.dim() == 2)
    return 2.0 * ((a.n_blocks - first) * per_block + (a.vocab_size * a.d_embed if head else 0))


@dataclass
class Cost:
    """What a piece of work took; filled in when its ``with`` ends."""

    seconds: float = 0.0
    peak_mib: float = 0.0
    device_mib: float = 0.0
    start_mib: float = field(default=0.0, repr=False)


@contextmanager
def watched(device: torch.device | None = None) -> Iterator[Cost]:
    """Measure wall-clock seconds and the process's peak memory of the work inside the ``with``.

    On Linux the peak is that of this piece alone; elsewhere it is the process's peak so far.

    Args:
        device: A CUDA device is waited for, and its own peak is measured as `Cost.device_mib`.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    if cuda:
        torch.cuda.synchronize(cuda)
        torch.cuda.reset_peak_memory_stats(cuda)
    cost = Cost(start_mib=_memory("VmRSS"))
    reset = _reset_peak()
    begin = time.perf_counter()
    try:
        yield cost
    finally:
        if cuda:
            torch.cuda.synchronize(cuda)
            cost.device_mib = torch.cuda.max_memory_allocated(cuda) / 2**20
        cost.seconds = time.perf_counter() - begin
        cost.peak_mib = _memory("VmHWM") if reset else _lifetime_peak()


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _memory(field_name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field_name + ":")), 0.0)


def _lifetime_peak() -> float:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


# ---------------------------------------------------------------- where it was measured


def environment(model: Model | None = None) -> dict[str, Any]:
    """Say on what the numbers were measured.

    Args:
        model: Tells its own device and type; without it the first accelerator is named, if there is one.
    """
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), processor)
    except OSError:
        pass
    on_cuda = torch.cuda.is_available() if model is None else model.device.type == "cuda"
    device = "cpu" if model is None else model.device.type
    return {
        **versions(),
        "device": torch.cuda.get_device_name(model.device if model else None) if on_cuda else device,
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({} if model is None else {"dtype": str(next(model.network.parameters()).dtype).removeprefix("torch.")}),
    }
