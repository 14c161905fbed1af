"""All edges on one machine: the same functions as a deployment, in a plain loop or through Flower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..errors import StoreError, UserError
from ..model import Model, open_model
from ..progress import track
from .cloud import Cloud, Outcome
from .edge import EdgeSpec, Sharing, capabilities, perform
from .runs import Run, save_run
from .train import read_examples

__all__ = ["simulate"]


def simulate(
    model: Model | str, edges: Sequence[EdgeSpec], run: Run, out: str | Path, engine: Literal["local", "flower"] = "local",
    *, sharing: Sharing | None = None,
) -> Outcome:  # fmt: skip
    """Train an adapter at each edge and fuse them, on this machine; started again, it goes on.

    Both engines give the same adapters, bit for bit, on a CPU.

    Args:
        model: The whole model; for ``flower`` a name or folder, since other processes open it.
        edges: Who takes part.
        run: How.
        out: The run's folder: plans, pruned models, adapters, journal and the fused adapter.
        engine: ``local`` is a loop; ``flower`` starts a SuperLink that simulates the edges, and stops it.
        sharing: What the edges let out.

    Raises:
        UserError: An edge or a setting cannot be used.
        RetouchError: Too few edges have given an adapter; what came is kept.
    """
    if engine not in ("local", "flower"):
        raise UserError(f"engine must be local or flower; got {engine!r}.")
    if len(edges) < 1:
        raise UserError("There is no edge to simulate.")
    if engine == "flower":
        from .deployment import simulate_by_flower

        if isinstance(model, Model):
            raise UserError("The engine flower opens the model in other processes: give its name or folder.")
        return simulate_by_flower(model, edges, run, Path(out), sharing or Sharing())
    opened = open_model(model) if isinstance(model, str) else model
    if isinstance(model, str):
        save_run(run, model, Path(out))
    return _loop(Cloud(opened, run, out), edges, sharing or Sharing())


def _loop(cloud: Cloud, edges: Sequence[EdgeSpec], sharing: Sharing) -> Outcome:
    known = {e.name: e for e in edges}
    assignments = cloud.assign([capabilities(e, sharing) for e in edges])
    for a in track([a for a in assignments if not a.finished and a.name in known], "Edges"):
        cloud.sent(a)
        upload = perform(a.task, a.package, read_examples(known[a.name].examples), a.name, sharing)
        try:
            cloud.receive(a, upload)
        except StoreError:
            continue  # journalled; the quorum decides
    return cloud.fuse()
