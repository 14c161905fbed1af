"""An edge's SuperNode that runs one program: Retouch's own, as it is installed here.

Flower's node fetches the program of every run from the cloud and runs it with the node's configuration, which names the
private examples. This one never fetches any: whatever program a run carries, the edge answers with its own. Run as
``python -m retouch.fuse._supernode``, with the options of ``flower-supernode``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from ._app import FILES, NAME, VERSION

if TYPE_CHECKING:
    from flwr.supercore.fab import Fab
    from flwr.supercore.run import Run

__all__ = ["main", "own_program", "own_run", "with_own_program"]

Connection = tuple[Any, ...]
_GET_RUN, _GET_FAB = 3, 4
"""Where Flower's connection holds these functions."""


def own_program() -> Fab:
    """Bundle the program that is installed here."""
    from flwr.cli.build import build_fab_from_files
    from flwr.supercore.fab import Fab

    content = build_fab_from_files({name: text.encode() for name, text in FILES.items()})[0]
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def own_run(run: Run, program: Fab) -> Run:
    """Return a run as if it carried the program that is installed here, with no setting of the cloud's."""
    return dataclasses.replace(
        run, fab_id=NAME, fab_version=VERSION, fab_hash=program.hash_str, override_config={}, primary_task_type=""
    )


def with_own_program(
    connect: Callable[..., AbstractContextManager[Connection]], program: Fab
) -> Callable[..., AbstractContextManager[Connection]]:
    """Return a way to connect to a SuperLink that fetches no program."""

    @contextmanager
    def connected(*arguments: Any, **named: Any) -> Iterator[Connection]:
        with connect(*arguments, **named) as found:
            parts = list(found)
            get_run = parts[_GET_RUN]
            parts[_GET_RUN] = lambda run_id: own_run(get_run(run_id), program)
            parts[_GET_FAB] = lambda digest, run_id: program
            yield tuple(parts)

    return connected


def main(arguments: Sequence[str]) -> None:
    """Do tasks until the process is ended."""
    from flwr.supernode import start_client_internal as node
    from flwr.supernode.cli.flower_supernode import flower_supernode

    node.http_request_response = with_own_program(node.http_request_response, own_program())  # type: ignore[assignment]
    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()


if __name__ == "__main__":
    main(sys.argv[1:])
