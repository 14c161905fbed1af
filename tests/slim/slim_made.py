"""A slim model of the toy task, made once and shared: trained, with a threshold, measured on test rows."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from typing import Any

import slim_toy as toy

import families
from retouch.slim import api
from retouch.slim.data import Task
from retouch.slim.opening import Source


def source() -> Source:
    """The tiny bert, opened."""
    return Source(toy.model(), families.tokenizer("word"), "tiny/bert")


def task(**fields: Any) -> Task:
    """The toy task with rows to measure on."""
    return replace(toy.task(), **{"calib": toy.rows(60, 3), "test": toy.rows(60, 4)} | fields)


@cache
def made(**budget: Any) -> api.Slim:
    """COST-EFF on it, long enough to learn it."""
    method = toy.method(length_factor=0.01, rate_factor=100.0, save_every=0)
    with tempfile.TemporaryDirectory() as folder:
        return api.fit(source(), task(), budget={"params": "1/2", **budget}, method=method, folder=folder)
