"""What every benchmark shares: the machine's facts, its float32 matrix-product rate, and the file of results."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from retouch import store
from retouch.measure import environment, watched
from retouch.model import Model

RESULTS = Path(__file__).parent / "results"
CALLS = 12
"""Timed calls a shape at least; each takes another block's weight, as a pass does, so that no cache flatters it."""


def machine() -> dict[str, Any]:
    """Say on what, with what and from which commit the numbers were measured."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {**environment(), "device": "cpu", "commit": commit(), "load_average_1_min": load}


def commit() -> str | None:
    """Return the commit of this checkout, with ``+changes`` when files differ from it."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        # a result that has just been rewritten is no change of the code
        status = ["git", "status", "--porcelain", "--", "../src", "*.py"]
        changes = subprocess.run(status, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def resident_mib() -> float:
    """Return the memory that the process holds now; 0 where the system does not tell."""
    with watched() as cost:
        pass
    return cost.start_mib


@torch.no_grad()
def rates(model: Model, n_tokens: int) -> dict[str, float]:
    """Measure the matrix products of a block on `n_tokens` tokens.

    Returns:
        For each weight that the anatomy names in a block: the fastest of several calls, GFLOP/s.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for part in sorted({n.split(".", 2)[2] for n in model.anatomy.names() if n.startswith("blocks.")}):
        weights = [model.matrix(f"blocks.{i}.{part}") for i in range(model.anatomy.n_blocks)]
        outputs, inputs = weights[0].shape
        tokens = torch.randn(n_tokens, inputs, generator=generator)
        functional.linear(tokens, weights[0])  # the first call makes the threads and the buffers
        rounds = -(-CALLS // len(weights))
        best = min(_seconds(tokens, weight) for _ in range(rounds) for weight in weights)
        found[f"{part} {n_tokens}x{inputs}->{outputs}"] = 2e-9 * n_tokens * inputs * outputs / best
    return found


def _seconds(tokens: torch.Tensor, weight: torch.Tensor) -> float:
    begin = time.perf_counter()
    functional.linear(tokens, weight)
    return time.perf_counter() - begin


def write(out: Path, result: Mapping[str, Any]) -> None:
    """Write a result, and make its folder where it is missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    store.write_json_atomic(out, dict(result))


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table and the sentences below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
