"""What an answer must be before its factors are looked at: its size, and facts that are the task's, whole and finite."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import StoreError
from ._quantised import upload_bytes
from .edge import FACTS, Task, Upload
from .privacy import GUARANTEE
from .runs import counts

__all__ = ["check_facts", "check_size"]

_HALF = ("float16", "float32")
_WORDS = ("0", "<100", "<1k", "<10k", "more")


def check_size(upload: Upload, task: Task, shapes: Mapping[str, tuple[int, int]], where: str) -> None:
    """Refuse an upload that is not as large as its plan says, whatever it holds.

    Raises:
        StoreError: It is larger or smaller.
    """
    asked, how = [shapes[name] for name in task.initial], task.settings
    small, large = ("int8", "int8") if any(t.dtype == torch.int8 for t in upload.tensors.values()) else _HALF
    least, most = (upload_bytes(asked, how.rank, dtype, freeze_a=how.freeze_a) for dtype in (small, large))
    if not least <= upload.n_bytes <= most:
        wanted = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        raise StoreError(
            f"{where} holds {upload.n_bytes:,} bytes of factors, and its plan gives {wanted}. Do not use it."
        )


def check_facts(facts: Mapping[str, Any], task: Task, where: str, *, counted: bool = False) -> None:
    """Refuse facts that are incomplete, of another type, not finite, or of another task.

    Args:
        facts: As they came.
        task: What was asked.
        where: Whose they are, for messages.
        counted: Adapters are weighed by numbers of examples, so that this edge's must be a number.

    Raises:
        StoreError: They cannot be used.
    """
    allowed = {*FACTS, "loss", *GUARANTEE}
    odd = sorted((set(FACTS) - set(facts)) | (set(facts) - allowed))
    if odd:
        what = "lacks" if odd[0] in FACTS else "also holds"
        raise StoreError(f"{where} {what} {str(odd[0])[:80]!r}. Do not use it; update the edge's software.")
    n, lists = len(task.initial), {"modules": str, "ranks": int, "alphas": float}
    for name, kind in lists.items():
        values = facts[name]
        if not isinstance(values, list) or len(values) != n or not all(type(v) is kind for v in values):
            raise StoreError(f"{where}: {name} must be a list of {n} values of type {kind.__name__}. Do not use it.")
    for name, expected in (("plan", task.plan), ("base", task.base), ("settings", task.hash)):
        if facts[name] != expected:
            raise StoreError(
                f"{where}: its {name} is {str(facts[name])[:12]!r}, and {expected[:12]!r} was asked for. Do not use it."
            )
    _check_count(facts["n_examples"], where, counted)
    words = facts["versions"]
    if not isinstance(words, list) or len(words) > 32 or not all(isinstance(w, str) and len(w) < 100 for w in words):
        raise StoreError(f"{where}: its list of versions is none. Do not use it.")
    for name, kind in {"partial": bool, "loss": float, **GUARANTEE}.items():
        if name in facts and not _sound(facts[name], kind):
            what = "a finite number" if kind is float else f"of type {kind.__name__}"
            raise StoreError(f"{where}: {name} must be {what}; got {str(facts[name])[:40]!r}. Do not use it.")


def _sound(value: object, kind: type) -> bool:
    if isinstance(value, float):
        return kind is float and math.isfinite(value)
    return type(value) is kind and len(json.dumps(value)) <= 200


def _check_count(told: object, where: str, counted: bool) -> None:
    if not isinstance(told, str) or not (told in _WORDS or counts(told)):
        raise StoreError(f"{where}: its number of examples is {str(told)[:40]!r}. Do not use it.")
    if counted and not counts(told):
        raise StoreError(
            f"{where} tells {told!r} as its number of examples, and the run weighs adapters by that number. Set count=exact "
            "there, or weights=equal in the run."
        )
