"""Change a trained language model after its training, and prove what else changed.

    open -> observe -> plan -> apply -> measure -> certify -> save

Importing this package loads no torch; the names below load what they need when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Change": "change",
    "Fact": "edit.facts",
    "Ledger": "ledger",
    "Model": "model",
    "RetouchError": "errors",
    "apply": "change",
    "edit": "edit.api",
    "from_peft": "change",
    "load_change": "change",
    "method": "edit.api",
    "open_ledger": "ledger",
    "open_model": "model",
    "save_change": "change",
    "save_ledger": "ledger",
    "to_peft": "change",
}
_RENAMED = {"load_change": "load", "save_change": "save"}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .change import Change, apply, from_peft, to_peft
    from .change import load as load_change
    from .change import save as save_change
    from .errors import RetouchError
    from .ledger import Ledger, open_ledger, save_ledger
    from .model import Model, open_model


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'retouch' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"retouch.{_HOME[name]}"), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return __all__
