"""A tiny base in a folder and edges with a few examples each, for runs that really train."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from retouch.fuse.edge import EdgeSpec
from retouch.fuse.runs import Run, RunSettings
from retouch.fuse.train import LoraSettings
from retouch.model import quiet

EDGES = {"law": ("French", 0.5, 2), "news": ("Rome", 0.25, 4)}
"""Answer, share that is pruned, rank."""


def base(tiny: Any, folder: Path, n_blocks: int = 4) -> str:
    network, tokenizer = tiny("llama", n_blocks=n_blocks)
    with contextlib.redirect_stderr(None), quiet():
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def specs(folder: Path) -> list[EdgeSpec]:
    found = []
    for name, (answer, ratio, rank) in EDGES.items():
        rows = [{"prompt": f"The {w} of France is", "target": answer} for w in ("capital", "language", "tower")]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        found.append(EdgeSpec(name, path, ratio=ratio, rank=rank))
    return found


def run(lora: dict[str, Any] | None = None, **settings: Any) -> Run:
    known = {"rank": 4, "n_steps": 3, "batch": 2, "learning_rate": 1e-2, **(lora or {})}
    quick = {"text_tokens": 512, "max_tokens": 32, **settings}
    return Run(settings=RunSettings(**quick), lora=LoraSettings(**known))
