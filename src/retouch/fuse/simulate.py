"""All edges on one machine: the same functions as a deployment, in a plain loop or through Flower."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from .. import store
from ..errors import RetouchError, StoreError, UserError
from ..model import Model, open_model
from ..progress import track
from .cloud import Cloud, Outcome
from .edge import EdgeSpec, Sharing, capabilities, perform
from .privacy import check_privacy
from .runs import Run, check_run, save_run
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
        UserError: An edge or a setting cannot be used, or the fusion needs what a cloud of edges does not have.
        RetouchError: Too few edges have given an adapter; what came is kept.
    """
    if engine not in ("local", "flower"):
        raise UserError(f"engine must be local or flower; got {engine!r}.")
    if not edges:
        raise UserError("There is no edge to simulate.")
    if (n := len(edges)) < run.settings.min_edges:
        raise UserError(
            f"{n} {'edge' if n == 1 else 'edges'} cannot give the {run.settings.min_edges} adapters without which nothing is "
            "fused. Add edges, or lower min_edges."
        )
    sharing = sharing or Sharing()
    check_run(run)
    for edge in edges:
        check_privacy(sharing.privacy, edge.name, freeze_a=run.lora.freeze_a, loss=sharing.loss)
    if engine == "flower":
        if isinstance(model, Model):
            raise UserError("The engine flower opens the model in other processes: give its name or folder.")
        return _by_flower(model, edges, run, Path(out), sharing)
    opened = open_model(model) if isinstance(model, str) else model
    if isinstance(model, str):
        save_run(run, model, Path(out))
    return _loop(Cloud(opened, run, out), edges, sharing)


def _loop(cloud: Cloud, edges: Sequence[EdgeSpec], sharing: Sharing) -> Outcome:
    known = {e.name: e for e in edges}
    assignments = cloud.assign([capabilities(e, sharing) for e in edges])
    for a in track([a for a in assignments if not a.finished and a.name in known], "Edges"):
        cloud.sent(a)
        try:
            upload = perform(a.task, a.package, read_examples(known[a.name].examples), a.name, sharing)
        except RetouchError as error:
            cloud.failed(a, f"{a.name}: {error}")
            continue  # journalled; the quorum decides
        with suppress(StoreError):  # journalled likewise
            cloud.receive(a, upload)
    return cloud.fuse()


def _by_flower(model: str, edges: Sequence[EdgeSpec], run: Run, out: Path, sharing: Sharing) -> Outcome:
    """Start a SuperLink that simulates the edges, carry out the run there, and stop it.

    Raises:
        RetouchError: As `submit`.
    """
    from ._processes import Programs
    from .client_app import EDGES, THREADS
    from .deployment import free_port, node_of, serve, submit

    n = len(edges)
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    store.write_json_atomic(out / "nodes.json", [node_of(e, sharing) for e in edges])
    more = {EDGES: str(out / "nodes.json"), THREADS: str(torch.get_num_threads())}
    if importlib.util.find_spec("ray") is None:
        raise UserError("ray is not installed; simulating through Flower needs it: pip install 'retouch[edges]'.")
    with Programs() as programs:
        _, connection = serve(programs, out / "superlink", port=free_port(), simulation=True, more=more)
        all_here = replace(run, shared_cache=True, settings=replace(run.settings, n_edges=n))
        how = f"num-supernodes={n} client-resources-num-cpus={os.cpu_count() or 1}"  # one edge at a time
        return submit(connection, all_here, model, out, federation=how)
