"""What this machine has: versions, devices, the cache, bundled models, extras."""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__, store
from .._bundled import BUNDLED, find, install
from ..errors import ModelError

__all__ = ["examine"]

_CORE = (
    "torch",
    "transformers",
    "safetensors",
    "peft",
    "accelerate",
    "pydantic",
    "typer",
    "rich",
    "numpy",
    "scipy",
    "gguf",
)
_EXTRAS = {
    "plot": ("matplotlib", "jinja2"),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "redis": ("redis",),
    "ray": ("ray",),
    "edges": ("flwr", "cryptography", "psutil"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "data": ("pyarrow", "datasets"),
}


def examine() -> dict[str, dict[str, Any]]:
    """Collect what a person who asks for help would be asked for."""
    return {
        "versions": {"retouch": __version__, **{name: _version(name) for name in _CORE}},
        "devices": _devices(),
        "cache": _cache(),
        "extras and models": {**_extras(), **_models()},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _devices() -> dict[str, Any]:
    import torch

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "accelerators": ", ".join(cuda) or "none (everything runs on the CPU)",
        "cores": os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "memory": f"{memory:.1f} GiB",
    }


def _cache() -> dict[str, Any]:
    folder = store.cache_dir()
    used = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
    there = folder
    while not there.exists():
        there = there.parent
    return {
        "folder": str(folder),
        "used": f"{used / 2**20:.0f} MiB",
        "free": f"{shutil.disk_usage(there).free / 2**30:.1f} GiB",
        "writable": os.access(there, os.W_OK),
    }


def _extras() -> dict[str, str]:
    found = {}
    for extra, modules in _EXTRAS.items():
        absent = [m for m in modules if importlib.util.find_spec(m) is None]
        found[extra] = f"missing {', '.join(absent)}: pip install 'retouch[{extra}]'" if absent else "installed"
    return found


def _models() -> dict[str, str]:
    return {name: _model(name, ". ".join(filter(None, (b.what, b.terms)))) for name, b in BUNDLED.items()}


def _model(name: str, what: str) -> str:
    try:
        find(name)
    except ModelError:
        return f"missing ({what}): {install(name)}"
    return f"installed: {what}"
