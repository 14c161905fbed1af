"""The same function over the same batches gives the same results, wherever it runs."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from retouch import stats
from retouch.errors import UnknownName, UserError
from retouch.model import Model, wrap
from retouch.scale import here, mapper, on_ray

NAMES = ["blocks.0.mlp.down", "blocks.1.mlp.down"]
SMALL = {"n_tokens": 200, "sequence_length": 10, "shard_tokens": 40}


@pytest.fixture
def model(tiny) -> Model:
    return wrap(*tiny("llama"))


def test_here_gives_results_in_order_and_takes_an_input_only_when_asked():
    taken: list[int] = []

    def inputs() -> Iterator[int]:
        for n in (3, 1, 2):
            taken.append(n)
            yield n

    results = here(lambda n: 10 * n, inputs())
    assert taken == []
    assert next(results) == 30
    assert taken == [3]
    assert list(results) == [10, 20]


def test_a_way_is_found_by_name():
    assert mapper("here") is here
    assert mapper("ray") is on_ray
    with pytest.raises(UnknownName, match=r"'rays'. Did you mean 'ray'\? Known: here, ray\."):
        mapper("rays")


def test_here_collects_what_the_plain_loop_collects(model, monkeypatch, tmp_path):
    plain = stats.collect(model, NAMES, **SMALL)
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path / "other"))
    through = stats.collect(model, NAMES, mapper=mapper("here"), **SMALL)
    assert all(torch.equal(plain[n].total, through[n].total) for n in NAMES)


def test_without_ray_the_error_says_how_to_install_it_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'retouch\[ray\]'"):
        on_ray(abs, [1])


@pytest.fixture
def ray(monkeypatch) -> Iterator[Any]:
    """Ray itself, not started; what it leaves to the garbage collector goes while its warnings are let pass."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is absent, so nothing is run on it: pip install 'retouch[ray]'")
    import ray

    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else the first test that starts Ray is warned
    yield ray
    ray.shutdown()
    gc.collect()


def on_real_ray(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts Ray, whose processes outlive their handles."""
    for message in ("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"):
        test = pytest.mark.filterwarnings(message)(test)
    return pytest.mark.slow(test)


def shifting(by: int) -> Callable[[int], int]:
    def shifted(n: int) -> int:  # no name of this module, which the workers cannot import
        if n < 0:
            raise UserError(f"{n} is below zero")
        return n + by

    return shifted


shifted = shifting(100)


@on_real_ray
def test_a_local_ray_gives_the_moments_of_here(ray, model, monkeypatch, tmp_path):
    local = stats.collect(model, NAMES, mapper=here, **SMALL)
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path / "other"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spread = stats.collect(model, NAMES, mapper=lambda f, items: on_ray(f, items, n_cpus=2), **SMALL)
    assert not ray.is_initialized()
    for name in NAMES:
        assert spread[name].count == local[name].count
        torch.testing.assert_close(spread[name].total, local[name].total, atol=1e-6, rtol=1e-6)


@on_real_ray
def test_a_ray_that_runs_already_is_used_and_left_running(ray):
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    assert list(on_ray(shifted, [])) == []
    assert list(on_ray(shifted, list(range(9)))) == list(range(100, 109))
    results = on_ray(shifted, [5, -1, 7], n_cpus=1)
    assert next(results) == 105
    with pytest.raises(UserError, match="-1 is below zero"):
        next(results)
    abandoned = on_ray(shifted, [1, 2, 3])
    next(abandoned)
    abandoned.close()
    assert list(on_ray(shifted, [1])) == [101]  # the workers that were left have given their CPUs back
    assert ray.is_initialized()


def test_a_cluster_that_is_not_there_is_an_error_that_names_it(ray):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1"):
        list(on_ray(shifted, [1], address="127.0.0.1:1"))
