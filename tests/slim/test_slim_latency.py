"""Latency: all models see the same batches in turn, rows add up, and a busy machine is told. No time is judged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from retouch.errors import UnknownName, UserError
from retouch.slim import latency
from retouch.slim.latency import Batch, Row, batches, call_network, measure

ROWS = [[1] * n for n in (1, 5, 2, 7, 3, 4, 6, 2, 9, 8)]


class Recorder:
    """Writes down who was called with what; a model as far as the clock can see."""

    def __init__(self, name: str, log: list[tuple[str, Batch]]) -> None:
        self.name, self.log = name, log

    def __call__(self, batch: Batch) -> None:
        self.log.append((self.name, batch))


def test_models_take_turns_on_the_same_batches():
    log: list[tuple[str, Batch]] = []
    models = {name: Recorder(name, log) for name in "abc"}
    measure(models, ROWS, batch_sizes=(4,), n_calls=6, n_warm_up=2)
    warm, timed = log[: 2 * 3], log[2 * 3 : 2 * 3 + 6 * 3]
    assert [name for name, _ in warm] == list("abcabc")
    assert [name for name, _ in timed] == list("abcbcacab" * 2)
    for i in range(0, len(timed), 3):
        assert len({id(batch.input_ids) for _, batch in timed[i : i + 3]}) == 1


def test_every_size_and_order_has_a_row():
    found = measure({"a": len, "b": len}, ROWS, batch_sizes=(1, 8, 32), n_calls=100, n_warm_up=1)
    assert [(r.model, r.batch_size, r.order, r.n_calls) for r in found.rows] == [
        (name, size, order, calls)
        for size, order, calls in [
            (1, "shuffled", 100), (8, "shuffled", 50), (8, "by_length", 50), (32, "shuffled", 50), (32, "by_length", 50),
        ]
        for name in "ab"
    ]  # fmt: skip
    for row in found.rows:
        assert 0 < row.p50_ms <= row.p95_ms
        assert row.examples_per_second > 0
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {"torch", "processor", "cores", "torch_threads", "load_before", "load_after"} <= set(told["environment"])
    assert told["rows"][0]["model"] == "a"


def test_the_numbers_are_those_of_the_seconds():
    row = latency._row("a", 8, "shuffled", [0.001 * i for i in range(1, 101)])
    assert row.p50_ms == pytest.approx(50.5)
    assert row.p95_ms == pytest.approx(95.05)
    assert row.examples_per_second == pytest.approx(800 / 5.05)


def test_speedup_is_the_ratio_of_the_medians():
    rows = tuple(Row(name, 1, "shuffled", 9, ms, ms, 1.0) for name, ms in (("full", 6.0), ("slim", 1.5)))
    found = latency.Latency(rows, {}, False)
    assert found.speedup("full", "slim") == 4.0
    with pytest.raises(UnknownName, match=r"'full at batch 8 shuffled'\. Did you mean"):
        found.speedup("full", "slim", 8)


def test_batches_are_full_padded_and_repeatable():
    given = batches(ROWS, 4, 6, pad=9, seed=1)
    assert len(given) == 6
    drawn = []
    for batch in given:
        lengths = batch.attention_mask.sum(axis=1)
        assert batch.input_ids.shape == (4, lengths.max())
        np.testing.assert_array_equal(batch.input_ids, np.where(batch.attention_mask == 1, 1, 9))
        assert not batch.token_type_ids.any()
        drawn += lengths.tolist()
    assert sorted(drawn[:10]) == sorted(map(len, ROWS)) == sorted(drawn[10:20])
    again = batches(ROWS, 4, 6, pad=9, seed=1)
    other = batches(ROWS, 4, 6, pad=9, seed=2)
    assert [b.input_ids.tolist() for b in given] == [b.input_ids.tolist() for b in again]
    assert [b.input_ids.tolist() for b in given] != [b.input_ids.tolist() for b in other]


def test_sorting_by_length_keeps_the_texts_and_saves_padding():
    mixed, alike = (batches(ROWS, 5, 4, by_length=order) for order in (False, True))
    assert sum(b.attention_mask.sum() for b in mixed) == sum(b.attention_mask.sum() for b in alike)
    assert sum(b.input_ids.size for b in alike) < sum(b.input_ids.size for b in mixed)


def test_token_types_go_with_their_text():
    types = [[0] * (len(row) - 1) + [1] for row in ROWS]
    for batch in batches(ROWS, 3, 5, types=types):
        last = batch.attention_mask.sum(axis=1) - 1
        assert (batch.token_type_ids[range(3), last] == 1).all()
        assert batch.token_type_ids.sum() == 3


def test_a_network_is_called_for_its_logits_alone(tiny):
    for family, fields in (("bert", {}), ("distilbert", {}), ("roberta", {"type_vocab_size": 1})):
        takes, (network, _) = family == "bert", tiny(family, **fields)
        batch = Batch(np.array([[2, 5, 3]]), np.ones((1, 3), np.int64), np.array([[0, 0, 1]]))
        fields = {"input_ids": torch.tensor(batch.input_ids), "attention_mask": torch.tensor(batch.attention_mask)}
        if takes:
            fields["token_type_ids"] = torch.tensor(batch.token_type_ids)
        with torch.no_grad():
            want = network(**fields).logits
        got = call_network(network.train())(batch)
        assert torch.equal(got, want)
        assert not got.requires_grad


def test_threads_are_pinned_and_given_back():
    seen = []
    before = torch.get_num_threads()
    found = measure(
        {"a": lambda batch: seen.append(torch.get_num_threads())}, ROWS, batch_sizes=(1,), n_calls=2, threads=before + 1
    )
    assert set(seen) == {before + 1}
    assert found.environment["torch_threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("load", "noisy"), [((0.0, 0.2), False), ((0.0, 1e6), True), ((1e6, None), True), ((None, None), False)]
)
def test_a_busy_machine_is_told(load, noisy):
    assert latency._noisy(load) is noisy


@pytest.mark.parametrize(
    ("models", "rows", "fields", "message"),
    [
        ({}, ROWS, {}, "0 models, 10 texts"),
        ({"a": len}, [], {}, "1 models, 0 texts"),
        ({"a": len}, [[1], []], {}, "texts with tokens"),
        ({"a": len}, ROWS, {"batch_sizes": ()}, "at least 1"),
        ({"a": len}, ROWS, {"batch_sizes": (1, 0)}, "at least 1"),
        ({"a": len}, ROWS, {"n_calls": 0}, "at least 1"),
        ({"a": len}, ROWS, {"threads": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(models, rows, fields, message):
    with pytest.raises(UserError, match=message):
        measure(models, rows, **fields)
