"""Change a trained language model after its training, and prove what else changed.

    open -> observe -> plan -> apply -> measure -> certify -> save

Importing this package loads no torch; the names below load what they need when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Change",
    "Fact",
    "Ledger",
    "Model",
    "RetouchError",
    "apply",
    "edit_facts",
    "from_peft",
    "load_change",
    "open_ledger",
    "open_model",
    "plan",
    "save_change",
    "save_ledger",
    "to_peft",
]

_HOME = {
    "Change": "change.Change",
    "Fact": "edit.facts.Fact",
    "Ledger": "ledger.Ledger",
    "Model": "model.Model",
    "RetouchError": "errors.RetouchError",
    "apply": "change.apply",
    "edit_facts": "edit.api.edit_facts",
    "from_peft": "change.from_peft",
    "load_change": "change.load",
    "open_ledger": "ledger.open_ledger",
    "open_model": "model.open_model",
    "plan": "edit.api.plan",
    "save_change": "change.save",
    "save_ledger": "ledger.save_ledger",
    "to_peft": "change.to_peft",
}

if TYPE_CHECKING:
    from .change import Change as Change
    from .change import apply as apply
    from .change import from_peft as from_peft
    from .change import load as load_change
    from .change import save as save_change
    from .change import to_peft as to_peft
    from .edit.api import edit_facts as edit_facts
    from .edit.api import plan as plan
    from .edit.facts import Fact as Fact
    from .errors import RetouchError as RetouchError
    from .ledger import Ledger as Ledger
    from .ledger import open_ledger as open_ledger
    from .ledger import save_ledger as save_ledger
    from .model import Model as Model
    from .model import open_model as open_model


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'retouch' has no attribute {name!r}; it has: {', '.join(__all__)}")
    module, _, attribute = _HOME[name].rpartition(".")
    return getattr(importlib.import_module(f"retouch.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
