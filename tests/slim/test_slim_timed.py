"""A saved slim model is timed with its export, and only with its own. No time is judged."""

from __future__ import annotations

import pytest
import torch

import families
from retouch.errors import ModelError, StoreError, UserError
from retouch.slim.export import export
from retouch.slim.network import SlimConfig, SlimForSequenceClassification, save
from retouch.slim.timed import timed

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

TEXTS = ["Paris is the capital.", "a", "the official language of Brazil " * 40]


def saved(folder, d_ff):
    base = families.build("bert", n_blocks=2).config.to_dict()
    torch.manual_seed(0)
    network = SlimForSequenceClassification(SlimConfig(base=base, d_ff=[d_ff, d_ff], threshold=0.5)).eval()
    save(network, families.tokenizer("word"), folder)
    return network


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("timed")
    export(saved(place / "slim", 8), families.tokenizer("word"), place / "onnx", cuts=[1])
    saved(place / "other", 16)
    return place


def test_the_model_and_its_export_are_timed_at_every_size_and_order(place):
    found = timed(place / "slim", TEXTS, export=place / "onnx", batch_sizes=(1, 2), n_calls=3)
    assert [(r.batch_size, r.order, r.model) for r in found.rows] == [
        (size, order, model)
        for size, order in ((1, "shuffled"), (2, "shuffled"), (2, "by_length"))
        for model in ("slim", "export")
    ]
    assert {"torch", "onnxruntime", "load_before", "load_after"} <= set(found.environment)
    alone = timed(place / "slim", [("a", "b")], batch_sizes=(1,), n_calls=3)
    assert [r.model for r in alone.rows] == ["slim"]


def test_what_does_not_belong_together_is_refused(place, tmp_path):
    with pytest.raises(UserError, match="another model: its widths differ"):
        timed(place / "other", TEXTS, export=place / "onnx")
    with pytest.raises(UserError, match="no text to time"):
        timed(place / "slim", [])
    with pytest.raises(StoreError, match="no export"):
        timed(place / "slim", TEXTS, export=place / "other")
    with pytest.raises(ModelError):
        timed(tmp_path, TEXTS)
