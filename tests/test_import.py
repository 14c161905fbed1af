"""Importing the package costs nothing and touches nothing; its names are few and all are there."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import retouch

HEAVY = ("torch", "transformers", "peft", "pydantic", "scipy", "ray", "matplotlib", "yaml", "numpy", "fastapi")


def fresh(code: str) -> str:
    """Run code in a process of its own, in which every warning is an error."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_nothing_heavy_and_changes_nothing():
    code = f"""
import logging, os, random, signal, sys, threading, warnings
def state():
    loggers = [logging.root, *(logging.getLogger(n) for n in sorted(logging.root.manager.loggerDict) if n != "retouch")]
    return (random.getstate(), dict(os.environ), list(warnings.filters), sys.excepthook, threading.active_count(),
            signal.getsignal(signal.SIGINT), [(l.name, l.level, list(l.handlers)) for l in loggers])
before = state()
import retouch, retouch.errors, retouch.registry, retouch.settings, retouch.progress, retouch.scale, retouch.store
dir(retouch)
after = state()
assert before[:-1] == after[:-1]
assert not any(handlers or (name != "root" and level) for name, level, handlers in after[-1]), after[-1]
print([m for m in {HEAVY} if m in sys.modules])
"""
    assert fresh(code).strip() == "[]"


def test_using_it_leaves_the_random_numbers_and_the_log_alone():
    code = """
import logging, random
import numpy, torch
def state():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), logging.root.handlers[:]
before = state()
import retouch
for name in dir(retouch):
    getattr(retouch, name)
assert state() == before
assert not logging.getLogger("retouch").handlers
"""
    assert fresh(code) == ""


def test_the_public_names_are_at_most_fifteen():
    assert len(dir(retouch)) <= 15
    assert sorted(dir(retouch)) == sorted(retouch.__all__) == dir(retouch)
    assert not [name for name in dir(retouch) if name.startswith("_")]


@pytest.mark.parametrize("name", retouch.__all__)
def test_each_public_name_is_what_it_says_and_has_a_docstring(name):
    thing = getattr(retouch, name)
    assert callable(thing)
    assert thing.__name__ in name or name in ("load_change", "save_change")
    assert thing.__doc__.split()
    assert thing.__module__.startswith("retouch.")


def test_no_public_name_is_hidden_by_a_module_of_the_same_name():
    for name in retouch.__all__:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"retouch.{name}")


def test_a_star_import_gives_exactly_the_public_names():
    names: dict[str, object] = {}
    exec("from retouch import *", names)
    assert set(names) - {"__builtins__"} == set(retouch.__all__)


def test_a_name_that_is_not_there_says_what_is():
    with pytest.raises(AttributeError, match=r"no attribute 'modle'; it has: .*Model"):
        _ = retouch.modle


def test_the_version_is_that_of_the_package():
    assert retouch.__version__.count(".") == 2
    assert all(part.isdecimal() for part in retouch.__version__.split("."))
