"""mergekit beside us: run as a program of its own environment on merged full models, and never imported.

It is licensed under the LGPL and takes whole models, so each adapter is first merged into a copy of the base and saved;
what that takes is counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from retouch.fuse.base import Adapter

METHODS = {"cat": "task_arithmetic", "ties": "ties", "dare_ties": "dare_ties"}
"""What mergekit calls the same rule."""
_PATHS = {
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
_LIMIT_S = 3600


def rows(
    program: Path | None, words: Sequence[str], given: Sequence[Adapter], size: Mapping[str, int],
    densities: Mapping[str, float], threads: int, error: Callable[[str, Callable[[str], Tensor]], float | None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Measure mergekit on the same adapters; one row says so where it is not installed.

    Args:
        program: Its ``mergekit-yaml``; None where it is not installed.
        words: Our methods.
        given: The adapters.
        size: ``width``, ``ffn``, ``kv`` and ``blocks`` of the model.
        densities: Of each method that has one.
        threads: To compute with.
        error: From a method and what gives a weight's change, how far that is from the truth.
    """
    if program is None:
        yield {"method": "mergekit", "adapters": len(given), "status": "not installed"}
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        begun = time.perf_counter()
        _save(folder, given, size)
        prepared = {"prepare_seconds": time.perf_counter() - begun, "disk_mib": _size(folder)}
        for word in words:
            if word in METHODS:
                about = {"method": f"mergekit {METHODS[word]}", "adapters": len(given), "version": _version(program)}
                config = _config(folder, given, word, densities.get(word))
                done = _run(program, config, folder / word, threads)
                if done["status"] == "done":
                    done["error"] = error(word, lambda name, word=word: _change(folder, folder / word, name))
                yield {**about, **prepared, **done}


def _save(folder: Path, given: Sequence[Adapter], size: Mapping[str, int]) -> None:
    """Write the base, and the base with each adapter in its weights."""
    head = 64
    config = LlamaConfig(
        hidden_size=size["width"], intermediate_size=size["ffn"], num_hidden_layers=size["blocks"], vocab_size=128,
        num_attention_heads=size["width"] // head, num_key_value_heads=size["kv"] // head,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    for adapter in given:
        for name, part in adapter.parts.items():
            model.get_submodule(_path(name)).weight.data += part.left @ part.right
        model.save_pretrained(folder / adapter.name)
        for name, part in adapter.parts.items():
            model.get_submodule(_path(name)).weight.data -= part.left @ part.right


def _path(name: str) -> str:
    _, block, part = name.split(".", 2)
    return f"model.layers.{block}.{_PATHS[part]}"


def _config(folder: Path, given: Sequence[Adapter], word: str, density: float | None) -> Path:
    """Write what mergekit reads; JSON is YAML."""
    elects = "ties" in word
    more = {} if density is None else {"density": density}
    weight = 1.0 if elects else 1 / len(given)
    models = [{"model": str(folder / a.name), "parameters": {"weight": weight, **more}} for a in given]
    config = {
        "merge_method": METHODS[word], "base_model": str(folder / "base"), "models": models, "dtype": "float32",
        "parameters": {"normalize": elects},
    }  # fmt: skip
    path = folder / f"{word}.yml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def _run(program: Path, config: Path, out: Path, threads: int) -> dict[str, Any]:
    words = [str(program), str(config), str(out), "--no-copy-tokenizer"]
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    own |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    begun = time.perf_counter()
    with out.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(words, env=own, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    cost = {"seconds": time.perf_counter() - begun, "peak_mib": usage.ru_maxrss / 1024}
    if process.returncode == 0:
        return {"status": "done", **cost}
    return {"status": f"failed: {out.with_suffix('.log').read_text(errors='replace')[-300:]}", **cost}


def _change(folder: Path, out: Path, name: str) -> Tensor:
    """Read by how much a merged model differs from the base."""
    return _weight(out, name) - _weight(folder / "base", name)


def _weight(folder: Path, name: str) -> Tensor:
    wanted = f"{_path(name)}.weight"
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            if wanted in opened.keys():  # noqa: SIM118 - it is no mapping
                return opened.get_tensor(wanted).double()
    raise SystemExit(f"{folder} holds no {wanted}: mergekit wrote something else than was asked for.")


def _size(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20


def _version(program: Path) -> str:
    code = "from importlib.metadata import version; print(version('mergekit'))"
    python = program.parent / "python"
    if not python.exists():
        return "unknown"
    told = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"
