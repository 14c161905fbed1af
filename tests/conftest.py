"""What all tests share: tiny models, no network, a cache of their own."""

from __future__ import annotations

import os

# Before anything imports the hub's client, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import contextlib
import copy
import functools
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; the tests interrupt their children
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)

Tiny = Callable[..., tuple[Any, Any]]
THREADS = os.cpu_count() or 1


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse every connection that leaves this machine."""
    own = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex")}

    def guarded(name: str) -> Callable[[socket.socket, Any], Any]:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and not _is_loopback(address[0]):
                raise RuntimeError(f"A test tried to reach {address!r}. Tests stay on this machine.")
            return own[name](self, address)

        return call

    patch = pytest.MonkeyPatch()
    for name in own:
        patch.setattr(socket.socket, name, guarded(name))
    yield
    patch.undo()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.hookimpl(tryfirst=True)  # before fixtures of any scope: other numbers of threads add in another order
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Use one thread: tiny models gain nothing from more and lose much where others compute beside them."""
    if "torch" in sys.modules:
        import torch

        alone = "PYTEST_XDIST_WORKER" not in os.environ
        real = item.get_closest_marker("real") is not None
        torch.set_num_threads(THREADS if alone and real else 1)


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test an empty cache, except those that open real models, and none the tables of who runs it."""
    monkeypatch.delenv("RETOUCH_ANATOMY", raising=False)
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("RETOUCH_CACHE", str(request.getfixturevalue("tmp_path") / "cache"))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The byte-level tokenizer. Shared: copy it before changing it."""
    import families

    return families.tokenizer()


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """``tiny("llama", n_blocks=2)``: a fresh copy of a tiny network, and its tokenizer."""
    import families

    built = functools.cache(lambda name, fields: families.FAMILIES[name](**dict(fields)))

    def make(name: str, **fields: Any) -> tuple[Any, Any]:
        network = copy.deepcopy(built(name, tuple(sorted(fields.items()))))
        return network, families.tokenizer(families.TOKENIZERS.get(name, "byte"))

    return make


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the published data sets: ``RETOUCH_DATA``, or ``shared/data`` beside the repository."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RETOUCH_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: set RETOUCH_DATA to the folder that holds them")
    return folder
