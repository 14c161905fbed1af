"""Compare models weight by weight: what differs, and what a file type swallows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import change as changes
from .errors import NoEffect, StoreError, UnknownName
from .model import Model

if TYPE_CHECKING:
    from .ledger import Ledger

__all__ = ["difference", "survival"]


def survival(ledger: Ledger, dtype: str | None = None, *, accept_loss: bool = False) -> dict[str, float]:
    """Measure how much of the active changes a file type swallows.

    Args:
        ledger: The model and its changes.
        dtype: Type of the stored weights; by default the file type the model came in.
        accept_loss: Return the loss instead of refusing it.

    Returns:
        For each changed weight ‖cast(W) - W‖ / ‖W - W0‖; empty for float32, which loses nothing.

    Raises:
        NoEffect: More than one percent of a change would be lost.
        StoreError: There is no such type.
    """
    dtype = dtype or ledger.model.file_dtype
    if dtype not in ("float32", ledger.model.file_dtype):
        own = dict.fromkeys(["float32", ledger.model.file_dtype])
        raise StoreError(
            f"This model's weights can be stored as {' or '.join(own)}; got {dtype!r}, which would round every weight and "
            "not only the changed ones."
        )
    if dtype == "float32":
        return {}
    touched = {n for c in ledger.active for n in c.parts}
    lost = changes.cast_error(ledger.model, {n: ledger.originals[n] for n in touched}, dtype)
    if (
        (worst := max(lost, key=lambda n: lost[n], default=None))
        and lost[worst] > changes.TOLERANCE
        and not accept_loss
    ):
        raise NoEffect(
            f"Stored as {dtype}, {worst} would lose {lost[worst]:.0%} of its change. Store float32 (--dtype float32), keep "
            "the change beside the model (retouch ask --change, or as a LoRA adapter), or accept it (--accept-loss)."
        )
    return lost


def difference(one: Model, two: Model) -> list[dict[str, Any]]:
    """List the weights in which two models differ, largest share first.

    Raises:
        UnknownName: The models are not of one shape.
    """
    first = dict(one.network.named_parameters())
    second = dict(two.network.named_parameters())
    if {n: p.shape for n, p in first.items()} != {n: p.shape for n, p in second.items()}:
        raise UnknownName(f"{one.source} and {two.source} are not of one shape, so their weights cannot be compared.")
    rows = []
    for name, old in first.items():
        new = second[name]
        if torch.equal(old, new):
            continue
        delta = (new - old).double()
        size = float(delta.norm())
        share = size / float(old.double().norm()) if old.any() else float("inf")
        rows.append({"weight": name, "frobenius": size, "share": share, "largest": float(delta.abs().max())})
    return sorted(rows, key=lambda r: -float(r["share"]))
