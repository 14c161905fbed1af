"""This function over these batches: in this process, or on a Ray cluster, with the same result.

Both ways take a function and its inputs and give the results in the order of the inputs, one at a time, so what was
done so far can be kept. Both fit `stats.collect(mapper=...)`.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import RetouchError, UserError, unknown

if TYPE_CHECKING:
    from .stats import Mapper

__all__ = ["here", "mapper", "on_ray"]

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 2
"""Inputs a worker has at hand, the one in work included: none waits for the next, none piles them up."""
_KNOCK_S = 10.0


def mapper(name: str) -> Mapper:
    """Return the way to run batches that has this name.

    Args:
        name: ``"here"`` or ``"ray"``.

    Raises:
        UnknownName: There is no such way.

    Example:
        >>> list(mapper("here")(abs, [-1, 2]))
        [1, 2]
    """
    ways: dict[str, Mapper] = {"here": here, "ray": on_ray}
    if name not in ways:
        raise unknown("way to run batches", name, ways)
    return ways[name]


def here(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Apply a function to inputs one after the other in this process.

    Args:
        function: What is done with one input.
        items: The inputs; each is taken only when its result is asked for.

    Example:
        >>> list(here(abs, [-1, 2]))
        [1, 2]
    """
    for item in items:
        yield function(item)


def on_ray(
    function: Callable[[T], R], items: Sequence[T], *, address: str | None = None, n_cpus: int | None = None
) -> Iterator[R]:
    """Apply a function to inputs on a Ray cluster; results come in the order of the inputs.

    Each worker is sent the function once, with all that it holds, e.g. a model. A Ray that runs already in this process
    is used and left running; one that is started here ends when the results do.

    Known problems:
        Workers ask for CPUs only, so what the function holds must not lie on a GPU.

    Args:
        function: What is done with one input. It and its results must be picklable.
        items: The inputs.
        address: The cluster, e.g. ``"ray://head:10001"``; by default ``$RAY_ADDRESS``, and without it this machine.
        n_cpus: Workers, of one CPU each; by default all CPUs of the cluster.

    Raises:
        UserError: Ray is not installed, or there is no cluster at `address`.
        RetouchError: A worker was lost.

    Example:
        >>> list(on_ray(abs, [-1, 2]))                              # doctest: +SKIP
        [1, 2]
    """
    return _run(_ray(), function, items, address or os.environ.get("RAY_ADDRESS") or "local", n_cpus)


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise UserError("Batches were to run on Ray, but ray is not installed: pip install 'retouch[ray]'") from error
    return ray  # type: ignore[no-any-return]


def _run(
    ray: ModuleType, function: Callable[[T], R], items: Sequence[T], address: str, n_cpus: int | None
) -> Iterator[R]:
    if not items:
        return
    with _started(ray, address, n_cpus):
        n_workers = min(n_cpus or int(ray.cluster_resources().get("CPU", 1)), len(items))
        shared = ray.put(function)
        workers = [ray.remote(_Worker).options(num_cpus=1).remote(shared) for _ in range(max(n_workers, 1))]
        try:
            yield from _results(ray, workers, items)
        finally:
            for worker in workers:
                ray.kill(worker)


class _Worker:
    """Runs in another process and keeps the function, so that its model travels once."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def call(self, item: Any) -> Any:
        return self.function(item)


def _results(ray: ModuleType, workers: Sequence[Any], items: Sequence[Any]) -> Iterator[Any]:
    waiting: deque[Any] = deque()
    for worker, item in zip(cycle(workers), items):
        waiting.append(worker.call.remote(item))
        if len(waiting) >= _AHEAD * len(workers):
            yield _get(ray, waiting.popleft())
    while waiting:
        yield _get(ray, waiting.popleft())


def _get(ray: ModuleType, result: Any) -> Any:
    try:
        return ray.get(result)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):  # what the function itself raised, as `here` would
            raise error.cause from error
        raise
    except ray.exceptions.RayActorError as error:
        raise RetouchError(
            f"A Ray worker was lost: {str(error).strip().splitlines()[-1].strip()} Every worker needs the driver's "
            "modules, and memory for all that the function holds: ask for fewer workers (n_cpus) if that ran out."
        ) from error


@contextmanager
def _started(ray: ModuleType, address: str, n_cpus: int | None) -> Iterator[None]:
    """Have a Ray for the ``with``; end it only if it was started here."""
    if ray.is_initialized():
        yield
        return
    own = {"num_cpus": n_cpus, "include_dashboard": False} if address == "local" else {}
    _knock(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's advice on settings of its own
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UserError:
    return UserError(
        f"No Ray cluster can be used at {address!r}: {str(error).strip().splitlines()[0]}. Correct the address, or "
        "leave it out (RAY_ADDRESS too) to run on this machine."
    )
