"""The edge's Flower app: it moves records between messages and `edge`, and knows nothing else.

Where the private examples are stands in the node's own configuration (``--node-config``), or in a simulation in a file
that the simulating process names; a message never says a path. A node that `deployment.join` has started runs this program
for every run, whatever program the run carries (`_supernode`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from .. import store
from ..errors import RetouchError, UserError
from ..settings import with_settings
from ._records import from_capabilities, from_upload, to_task
from .edge import EdgeSpec, Sharing, capabilities, keep_package, perform
from .train import read_examples

__all__ = ["EDGES", "THREADS", "app", "kept_here", "of_node", "query", "same_threads", "train"]

EDGES = "RETOUCH_EDGES"
"""Names the file of a simulation's edges."""
THREADS = "RETOUCH_THREADS"
"""How many threads each edge of a simulation computes with, so that all engines round alike."""
app = ClientApp()
_log = logging.getLogger("retouch")


@contextmanager
def kept_here() -> Iterator[None]:
    """Keep what an error says in this edge's own log: it may quote an example or name a file, and Flower would send it.

    In a simulation all lies on one machine, and the whole error is told.

    Raises:
        RetouchError: In place of any error; it tells its kind alone.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get(EDGES):
            raise
        _log.error("This edge could not do what it was asked for.", exc_info=error)
        raise RetouchError(f"{type(error).__name__}: the log of the edge says more") from None


@app.query("capabilities")  # type: ignore[untyped-decorator]
def query(message: Message, context: Context) -> Message:
    """Answer what this edge can do."""
    with kept_here():
        spec, sharing = of_node(context.node_config)
        return Message(from_capabilities(capabilities(spec, sharing)), reply_to=message)


@app.train("adapter")  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Do a task and answer with what may leave the edge."""
    logging.basicConfig(level=logging.INFO)
    same_threads()
    with kept_here():
        spec, sharing = of_node(context.node_config)
        task, files = to_task(message.content)
        package = keep_package(task.package, files)
        upload = perform(task, package, read_examples(spec.examples), spec.name, sharing)
        return Message(from_upload(upload), reply_to=message)


def same_threads() -> None:
    """Compute with as many threads as the process that simulates, if one does."""
    import torch

    if threads := os.environ.get(THREADS):
        torch.set_num_threads(int(threads))


def of_node(config: Mapping[str, Any]) -> tuple[EdgeSpec, Sharing]:
    """Read who this edge is: ``domain="law" data="law.jsonl" budget_mib=900``.

    Raises:
        UserError: The configuration does not say where the examples are, or states something unknown.
        SettingsError: A value is not allowed.
    """
    if "partition-id" in config and os.environ.get(EDGES):
        known = store.read_json(os.environ[EDGES])
        config = known[int(config["partition-id"])]
    given = {k: v for k, v in config.items() if k not in ("partition-id", "num-partitions")}
    domain, data = given.pop("domain", None), given.pop("data", None)
    if not isinstance(domain, str) or not isinstance(data, str):
        raise UserError('The node configuration must state domain="NAME" and data="FILE".')
    numbers = {"budget_mib": float, "ratio": float, "rank": int}
    own = {name: kind(given.pop(name)) for name, kind in numbers.items() if name in given}
    return EdgeSpec(domain, data, **own), with_settings(Sharing, given)
