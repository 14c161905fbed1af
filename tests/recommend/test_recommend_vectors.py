"""Texts as vectors: what pooling means, that batches decide nothing, the cache, and files of one's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retouch import store
from retouch.errors import StoreError, UserError
from retouch.model import wrap
from retouch.recommend.vectors import load_vectors, text_vectors

TEXTS = ["The capital of France is Paris.", "Big Ben", "The currency of Japan is the yen, and more besides.", "Big Ben"]


@pytest.fixture(params=["bert", "llama"])
def encoder(request, tiny):
    return wrap(*tiny(request.param))


def test_a_vector_is_the_normalised_mean_of_the_last_states(encoder):
    found = text_vectors(TEXTS, encoder)
    assert found.shape == (4, 32) and found.dtype == np.float32
    for text, vector in zip(TEXTS, found):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = encoder.network.base_model(input_ids=ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    np.testing.assert_array_equal(found[1], found[3])
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_batches_and_neighbours_decide_nothing(encoder):
    whole = text_vectors(TEXTS, encoder)
    one_by_one = text_vectors(TEXTS[::-1], encoder, batch_tokens=1)[::-1]
    np.testing.assert_allclose(whole, one_by_one, atol=1e-5)


def test_long_texts_are_cut(encoder):
    long = "the yen " * 200
    cut = text_vectors([long], encoder, max_tokens=8)
    np.testing.assert_allclose(cut, text_vectors([long + "and London"], encoder, max_tokens=8), atol=1e-6)
    assert np.abs(cut - text_vectors([long[:80]], encoder, max_tokens=32)).max() > 1e-4


def test_vectors_come_from_the_cache_and_new_texts_do_not(encoder):
    first = text_vectors(TEXTS, encoder)
    [entry] = [path for path in (store.cache_dir() / "vectors").iterdir() if path.is_dir()]
    file = entry / "vectors.safetensors"
    before = file.stat().st_mtime_ns
    np.testing.assert_array_equal(text_vectors(tuple(TEXTS), encoder), first)
    assert file.stat().st_mtime_ns == before
    text_vectors([*TEXTS, "new"], encoder)
    text_vectors(TEXTS, encoder, max_tokens=16)
    assert len([path for path in entry.parent.iterdir() if path.is_dir()]) == 3


@pytest.mark.parametrize(("texts", "said"), [([], "no texts"), (["a", " "], "Text 2 is empty"), ("abc", "one text")])
def test_texts_that_cannot_be_read_are_refused(tiny, texts, said):
    with pytest.raises(UserError, match=said):
        text_vectors(texts, wrap(*tiny("bert")))


def test_a_file_of_ones_own(tmp_path):
    vectors = np.arange(6, dtype=np.float64).reshape(3, 2)
    np.save(tmp_path / "v.npy", vectors)
    found = load_vectors(tmp_path / "v.npy", 3)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, vectors)


def _object(path):
    np.save(path, np.array([[{"a": 1}]], dtype=object), allow_pickle=True)


def _archive(path):
    with path.open("wb") as file:
        np.savez(file, a=np.ones((3, 2)))


@pytest.mark.parametrize(
    ("write", "error", "said"),
    [
        (_object, StoreError, "cannot be read"),
        (_archive, StoreError, "several arrays"),
        (lambda path: path.write_bytes(b"\x80\x04K\x01."), StoreError, "cannot be read"),
        (lambda path: path.write_bytes(b""), StoreError, "cannot be read"),
        (lambda path: None, StoreError, "cannot be read"),
        (lambda path: np.save(path, np.ones((2, 2))), UserError, r"each of 3 items; its shape is \(2, 2\)"),
        (lambda path: np.save(path, np.ones(3)), UserError, "its shape"),
        (lambda path: np.save(path, np.full((3, 2), "x")), UserError, "real numbers"),
        (lambda path: np.save(path, np.array([[1, 2], [3, np.nan], [1, 1e300]])), UserError, "2 rows .* row 1"),
    ],
)
def test_a_file_that_is_no_vectors_is_refused(tmp_path, write, error, said):
    write(tmp_path / "v.npy")
    with pytest.raises(error, match=said):
        load_vectors(tmp_path / "v.npy", 3)
