"""The cloud's Flower app: wait for edges, ask what they can do, send tasks, take answers until the deadline, fuse.

It moves records between messages and `Cloud`; every decision and every check is there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from .. import store
from ..errors import RetouchError, StoreError, UserError
from ..model import open_model
from ._records import from_task, to_capabilities, to_upload
from .client_app import same_threads
from .cloud import Assignment, Cloud, Outcome
from .edge import Capabilities, check_name, keep_package
from .runs import open_run

__all__ = ["app", "main", "serve_run", "take", "told_error"]

FOLDER = "retouch-folder"
ERROR = "error.json"
_QUERY_S = 120.0
_LATE_S = 600.0
"""How long after the last moment an answer can still be seen and called late."""
_log = logging.getLogger("retouch")
_ERRORS = {
    1: "it could not load the app. Install the same version of Retouch there",
    2: "the app stopped with an error there. Look at the log of its node",
    3: "the message to it was gone before it was fetched. Raise deadline_s",
    4: "its answer was gone before it was fetched. Start the run again: the edge sends it again without training",
    5: "its node cannot be reached any more. Start the node again, then the run",
    8: "the app was killed there, most likely for want of memory. Give it a smaller budget",
}
app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Serve the run that lies in the folder which the run's configuration names."""
    logging.basicConfig(level=logging.INFO)
    same_threads()
    folder = Path(str(context.run_config[FOLDER]))
    try:
        run, source = open_run(folder)
        serve_run(grid, Cloud(open_model(source), run, folder))
    except RetouchError as error:
        store.write_json_atomic(folder / ERROR, {"error": str(error), "exit_code": error.exit_code})
        raise


def serve_run(grid: Grid, cloud: Cloud) -> Outcome:
    """Carry a run through.

    Raises:
        RetouchError: No edge came, or too few have answered.
    """
    nodes = _joined(grid, cloud)
    edges = _asked(grid, nodes)
    by_name = {edge.name: node for node, edge in edges.items()}
    for a in cloud.assign(list(edges.values())):
        if a.name in by_name and not a.finished:
            cloud.sent(a)
    sent = _send(grid, cloud, {by_name[a.name]: a for a in cloud.assignments.values() if a.name in by_name}, edges)
    waiting = _collected(grid, cloud, sent)
    outcome = cloud.fuse()
    for message in grid.pull_messages(list(waiting)) if waiting else ():
        cloud.late(waiting[message.metadata.reply_to_message_id])
    return outcome


# ---------------------------------------------------------------- the steps


def _joined(grid: Grid, cloud: Cloud) -> list[int]:
    """Wait until enough nodes are there; they register after this app has started."""
    how = cloud.run.settings
    until = time.monotonic() + how.join_timeout_s
    while len(nodes := list(grid.get_node_ids())) < how.n_edges and time.monotonic() < until:
        time.sleep(0.5)
    _log.info("%d of %d edges are there", len(nodes), how.n_edges)
    return nodes


def _asked(grid: Grid, nodes: Iterable[int]) -> dict[int, Capabilities]:
    """Ask nodes what they can do; those whose answer cannot be used are left out, and said."""
    messages = [Message(RecordDict(), node, "query.capabilities", ttl=_QUERY_S) for node in nodes]
    found: dict[int, Capabilities] = {}
    heard = 0
    for reply in grid.send_and_receive(messages, timeout=_QUERY_S) if messages else ():
        heard += 1
        node = reply.metadata.src_node_id
        try:
            if reply.has_error():
                raise StoreError(f"Node {node} was asked what it can do: {told_error(reply)}")
            edge = to_capabilities(reply.content, f"the answer of node {node}")
            check_name(edge.name)
            if edge.name in {e.name for e in found.values()}:
                raise StoreError(f"Node {node} calls itself {edge.name!r}, as another does. Rename one of them.")
            found[node] = edge
        except UserError as error:
            _log.warning("%s", error)
    if silent := len(messages) - heard:
        _log.warning(
            "%d nodes did not say what they can do; a node ignores a run of another version of Retouch", silent
        )
    return found


def _send(
    grid: Grid, cloud: Cloud, asked: Mapping[int, Assignment], edges: Mapping[int, Capabilities]
) -> dict[str, Assignment]:
    """Send tasks to those that are not done, and return who was sent which message."""
    how, sent = cloud.run.settings, {}
    for node, assignment in asked.items():
        if assignment.finished:
            continue
        package: Path | None = assignment.package
        if cloud.run.shared_cache:
            keep_package(assignment.task.package, _files(assignment.package))
        if cloud.run.shared_cache or assignment.task.package in edges[node].cached:
            package = None
        content = from_task(assignment.task, package)
        message = Message(content, node, "train.adapter", ttl=how.deadline_s + how.grace_s + _LATE_S)
        (name,) = grid.push_messages([message])
        sent[name] = assignment
        _log.info("%s was sent its task%s", assignment.name, "" if package is None else " and its pruned model")
    return sent


def _files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in store.check_folder(folder)["files"]}


def _collected(grid: Grid, cloud: Cloud, sent: Mapping[str, Assignment]) -> dict[str, Assignment]:
    """Take answers as they come, until all are here or the time is over; return who has not answered."""
    how, waiting = cloud.run.settings, dict(sent)
    until = time.monotonic() + how.deadline_s + how.grace_s
    while waiting and time.monotonic() < until:
        for reply in grid.pull_messages(list(waiting)):
            take(cloud, waiting.pop(reply.metadata.reply_to_message_id), reply)
        if waiting:
            time.sleep(1.0)
    return waiting


def take(cloud: Cloud, assignment: Assignment, reply: Message) -> bool:
    """Take one answer; what cannot be used is journalled with its reason.

    Returns:
        Whether its adapter is here now.
    """
    if reply.has_error():
        cloud.failed(assignment, f"{assignment.name}: {told_error(reply)}")
        return False
    try:
        upload = to_upload(reply.content, f"the answer from {assignment.name}")
    except StoreError as error:
        cloud.refused(assignment, str(error))
        return False
    try:
        cloud.receive(assignment, upload)
    except StoreError:
        return False
    _log.info("%s has sent %s bytes of factors", assignment.name, f"{upload.n_bytes:,}")
    return True


def told_error(reply: Message) -> str:
    """Say what a reply's error means and what to do."""
    error: Any = reply.error
    lines = [line for line in (error.reason or "").strip().splitlines() if line.strip()]
    return f"{_ERRORS.get(error.code, f'error {error.code}')}.{f' ({lines[-1].strip()[:300]})' if lines else ''}"
