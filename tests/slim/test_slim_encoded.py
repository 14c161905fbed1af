"""Token ids, and batches of similar length."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from retouch.errors import ModelError, UserError
from retouch.slim.data import Example
from retouch.slim.encoded import Encoded, batches, collate, encode, order, padded

WORDS = ["the", "capital", "of", "France", "is", "Paris", "and", "Rome"]


@pytest.fixture(scope="module")
def words():
    return families.tokenizer("word")


def example(n, label=0, pair=None):
    return Example(" ".join(WORDS[i % 8] for i in range(n)), pair, label)


def lengths(*counts):
    return Encoded(tuple((7,) * n for n in counts), None, tuple(range(len(counts))))


def test_ids_are_the_tokenizer_s_and_long_texts_are_cut(words):
    rows = [example(3), example(300, 1), example(40)]
    encoded = encode(words, rows, max_tokens=32)
    assert encoded.ids[0] == tuple(words(rows[0].text)["input_ids"])
    assert encoded.ids[1] == (*words(rows[1].text)["input_ids"][:31], words.sep_token_id)
    assert max(encoded.lengths) == 32
    assert (encoded.truncated, encoded.labels, encoded.pad) == (2, (0, 1, 0), words.pad_token_id)
    assert len(words(rows[1].text)["input_ids"]) > 32, "the tokenizer must be left as it was"


def test_of_pairs_the_longer_text_is_cut_first(words):
    short = words("Paris", add_special_tokens=False)["input_ids"]
    encoded = encode(words, [example(300, pair="Paris"), Example("Paris", example(300).text, 1)], 32, token_types=2)
    for ids, types in zip(encoded.ids, encoded.types):
        assert len(ids) == len(types) == 32
        first = [i for i, t in zip(ids, types) if t == 0][1:-1]
        second = [i for i, t in zip(ids, types) if t == 1][:-1]
        assert min(first, second, key=len) == short


@pytest.mark.parametrize(("token_types", "wanted"), [(0, None), (1, {0}), (2, {0, 1})])
def test_token_types_are_those_that_the_network_has(words, token_types, wanted):
    encoded = encode(words, [example(4, pair="Rome")], token_types=token_types)
    assert (encoded.types and {*encoded.types[0]}) == wanted
    assert ("token_type_ids" in collate(encoded, [0])) == bool(token_types)


def test_without_a_number_the_tokenizer_decides_on_types(words):
    two = copy.deepcopy(words)
    two.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert encode(two, [example(4)]).types is not None
    words = copy.deepcopy(words)
    words.model_input_names = ["input_ids", "attention_mask"]
    assert encode(words, [example(4)]).types is None


def test_many_texts_are_tokenised_as_one_by_one(words):
    rows = [example(1 + i % 9, i % 2) for i in range(2500)]
    encoded = encode(words, rows)
    assert encoded.ids == tuple(tuple(words(r.text)["input_ids"]) for r in rows[:9]) * 277 + encoded.ids[:7]
    assert len(encoded) == 2500


def test_what_cannot_be_encoded_is_refused(words, tiny_tokenizer):
    with pytest.raises(ModelError, match="not a fast one"):
        encode(SimpleNamespace(is_fast=False), [example(3)])
    with pytest.raises(UserError, match="max_tokens=2 leaves no room"):
        encode(words, [example(3)], max_tokens=2)
    with pytest.raises(UserError, match="The label 'yes' is a text"):
        encode(words, [example(3, "yes")])
    with pytest.raises(UserError, match="Example 1 has no tokens"):
        encode(tiny_tokenizer, [example(3), Example("", None, 0)])
    with pytest.raises(UserError, match="Example 1 holds half of a character"):
        encode(words, [example(3), Example("paris", "ro\ud83dme", 0)])


def test_a_batch_is_padded_on_the_right():
    encoded = Encoded(((5, 6), (7,)), ((0, 1), (1,)), (1, 0), pad=9)
    batch = collate(encoded, [1, 0])
    assert {name: part.tolist() for name, part in batch.items()} == {
        "input_ids": [[7, 9], [5, 6]],
        "attention_mask": [[1, 0], [1, 1]],
        "token_type_ids": [[1, 0], [0, 1]],
        "labels": [0, 1],
    }
    assert {part.dtype for part in batch.values()} == {torch.int64}
    numbers = Encoded(((5,),), None, (0.5,))
    assert collate(numbers, [0])["labels"].dtype == torch.float32


@given(
    counts=st.lists(st.integers(1, 20), max_size=60),
    size=st.integers(1, 7),
    seed=st.sampled_from([None, 0, 1]),
    epoch=st.integers(0, 3),
    by_length=st.booleans(),
    by_tokens=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_row_is_in_one_batch_and_no_batch_is_too_large(counts, size, seed, epoch, by_length, by_tokens):
    encoded = lengths(*counts)
    limit = {"n_tokens": 6 * size} if by_tokens else {"batch_size": size}
    found = order(encoded, **limit, seed=seed, epoch=epoch, by_length=by_length)
    assert sorted(row for batch in found for row in batch) == list(range(len(counts)))
    for batch in found:
        assert (padded(encoded, batch) <= 6 * size or len(batch) == 1) if by_tokens else len(batch) <= size
    if not by_tokens:
        assert len(found) == -(-len(counts) // size), "only the last batch may be a partial one"
    assert found == order(encoded, **limit, seed=seed, epoch=epoch, by_length=by_length)


def test_seed_and_epoch_change_the_batches_and_length_saves_padding():
    encoded = lengths(*(1 + (i * 37) % 50 for i in range(400)))
    first = order(encoded, 16, seed=0)
    assert order(encoded, 16, seed=1) != first != order(encoded, 16, seed=0, epoch=1)
    plain = order(encoded, 16, seed=0, by_length=False)
    assert sum(padded(encoded, b) for b in first) < 0.7 * sum(padded(encoded, b) for b in plain)


def test_without_a_seed_rows_come_as_they_are_or_the_shortest_first():
    encoded = lengths(3, 1, 2)
    assert order(encoded, 2, seed=None, by_length=False) == [[0, 1], [2]]
    assert order(encoded, 2, seed=None) == [[1, 2], [0]]


def test_batches_are_the_order_collated():
    encoded = lengths(3, 1, 2, 5, 4)
    found = [batch["labels"].tolist() for batch in batches(encoded, n_tokens=8, seed=4)]
    assert found == order(encoded, n_tokens=8, seed=4)
    assert list(batches(lengths(), 4)) == []


@pytest.mark.parametrize("sizes", [{}, {"batch_size": 2, "n_tokens": 8}, {"batch_size": 0}, {"n_tokens": 0}])
def test_a_batch_needs_one_size(sizes):
    with pytest.raises(UserError, match=r"batch_size"):
        order(lengths(1, 2), **sizes) if sizes != {"n_tokens": 0} else order(lengths(1), 0)
