"""Tiny models for the tests of editing: opened once a module, with its ``N_BLOCKS`` blocks (3 where it names none)."""

from __future__ import annotations

import functools

import pytest

from retouch.model import wrap


@pytest.fixture(scope="module")
def open_tiny(tiny, request):
    n = getattr(request.module, "N_BLOCKS", 3)
    return functools.cache(lambda family, n_blocks=n: wrap(*tiny(family, n_blocks=n_blocks)))


@pytest.fixture(scope="module")
def llama(open_tiny):
    return open_tiny("llama")
