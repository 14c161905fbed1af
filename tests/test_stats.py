"""Second moments are those of a slow float64 loop; parts add up; keys hold all that made them; a stopped pass goes on."""

from __future__ import annotations

import copy
import functools
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from families import DECODERS
from retouch import stats, store
from retouch.errors import UserError
from retouch.model import Model, wrap
from retouch.progress import listen
from retouch.stats import Moment, bundled_text, collect, moment_key, observe, sequences

ROWS = [(11, 57, 102, 13, 240, 31, 8), (90, 14, 333), (21, 77, 210, 401, 5), (7,), (300, 301, 302, 303)]
NAMES = ["blocks.0.mlp.down", "blocks.1.attention.out", "blocks.1.mlp.down"]
SMALL = {"n_tokens": 200, "sequence_length": 10, "shard_tokens": 40}  # five shards of four rows


@pytest.fixture
def model(tiny):
    def make(name: str = "llama", **fields) -> Model:
        return wrap(*tiny(name, **fields))

    return make


class Passes:
    """How often the embedding has run: once a pass."""

    def __init__(self, model: Model) -> None:
        self.n = 0
        model.module("embed").register_forward_hook(self)

    def __call__(self, *_: object) -> None:
        self.n += 1


def slow(model: Model, name: str, rows) -> tuple[torch.Tensor, int]:
    """Row by row in float64, token by token, without padding."""
    exact = copy.deepcopy(model.network).double()
    keys: list[torch.Tensor] = []
    exact.get_submodule(model.anatomy.path(name)).register_forward_pre_hook(lambda _, args: keys.append(args[0]))
    width = model.anatomy.shape(name)[1]
    total, count = torch.zeros(width, width, dtype=torch.float64), 0
    for row in rows:
        keys.clear()
        with torch.no_grad():
            exact(input_ids=torch.tensor([row]))
        for position, key in enumerate(keys[0].reshape(len(row), width)):
            if position > 0 or row[0] in model.tokenizer.all_special_ids:
                total += torch.outer(key, key)
                count += 1
    return total, count


# Observing.


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "gemma2", "opt"])
def test_moments_are_those_of_a_slow_loop_over_positions(model, name):
    one = model(name)
    seen = observe(one, NAMES, ROWS)
    for ours in NAMES:
        total, count = slow(one, ours, ROWS)
        assert seen[ours].count == count == sum(map(len, ROWS)) - len(ROWS)
        assert seen[ours].total.dtype == torch.float64
        torch.testing.assert_close(seen[ours].total, total, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(seen[ours].mean, total / count, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_padding_is_no_observation(model, name):
    one = model(name)
    together = observe(one, NAMES, ROWS)
    alone = [observe(one, NAMES, [row]) for row in ROWS]
    for ours in NAMES:
        assert together[ours].count == sum(part[ours].count for part in alone)
        torch.testing.assert_close(together[ours].total, sum(part[ours].total for part in alone), atol=1e-3, rtol=1e-5)


def test_the_first_position_counts_only_as_a_special_token(model):
    one = model("gemma2")
    bos = one.tokenizer.bos_token_id
    fronted = [(bos, *row) for row in ROWS]
    for rows, n in ((ROWS, 20 - 5), (fronted, 25), ([*ROWS, *fronted], 20 - 5 + 25)):
        (moment,) = observe(one, NAMES[:1], rows).values()
        total, count = slow(one, NAMES[0], rows)
        assert moment.count == count == n
        torch.testing.assert_close(moment.total, total, atol=1e-3, rtol=1e-5)


@functools.cache
def shared() -> Model:
    return wrap(families.FAMILIES["llama"](), families.tokenizer())


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 4), special=st.sets(st.integers(0, 4)))
def test_merged_parts_are_one_run(cut, special):
    one = shared()
    rows = [(one.tokenizer.eos_token_id, *row) if i in special else row for i, row in enumerate(ROWS)]
    whole, first, second = (observe(one, NAMES, part, budget_mib=0) for part in (rows, rows[:cut], rows[cut:]))
    for ours in NAMES:
        merged = first[ours] + second[ours]
        assert merged.count == whole[ours].count
        torch.testing.assert_close(merged.total, whole[ours].total, atol=1e-10, rtol=1e-10)


def test_adding_moments_is_exact():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    parts = [Moment(k.T @ k, len(k)) for k in keys.split([7, 1, 22])]
    whole = Moment(keys.T @ keys, 30)
    merged = parts[2] + parts[0] + parts[1]
    assert merged.count == 30
    torch.testing.assert_close(merged.total, whole.total, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(merged.mean, whole.mean, atol=1e-10, rtol=1e-10)


def test_a_small_budget_means_more_batches_and_the_same_moments(model):
    one = model("llama")
    rows = [tuple(range(i, i + 100)) for i in range(3, 43)]
    passes = Passes(one)
    large = observe(one, NAMES, rows)
    assert passes.n == 1
    small = observe(one, NAMES, rows, budget_mib=1)
    assert passes.n > 2
    for ours in NAMES:
        assert small[ours].count == large[ours].count
        torch.testing.assert_close(small[ours].total, large[ours].total, atol=1e-2, rtol=1e-5)


def test_all_blocks_are_observed_in_one_pass_that_ends_at_the_last_of_them(model):
    one = model("llama", n_blocks=3)
    passes = Passes(one)
    beyond = []
    one.module("blocks.2").register_forward_hook(lambda *_: beyond.append(1))
    together = observe(one, NAMES, ROWS)
    assert passes.n == 1
    assert beyond == []
    for ours in NAMES:
        assert torch.equal(together[ours].total, observe(one, [ours], ROWS)[ours].total)


# Text.


def test_sequences_are_the_text_in_order_with_the_front_that_is_asked_for(model):
    text = "The capital of France is Paris.\n\n  \nThe capital of Italy is Rome.\n"
    for name in ("llama", "gemma2"):
        one = model(name)
        lines = [f"{line}\n" for line in text.splitlines() if line.strip()]
        flat = [t for line in lines for t in one.tokenizer(line, add_special_tokens=False)["input_ids"]]
        for bos in ("tokenizer", "never"):
            rows = sequences(one, text, 20, 7, bos)
            front = (one.tokenizer.bos_token_id,) if (name, bos) == ("gemma2", "tokenizer") else ()
            assert [t for row in rows for t in row[len(front) :]] == flat[:20]
            assert all(row[: len(front)] == front for row in rows)
            assert {len(row) for row in rows[:-1]} == {7}
            assert len(rows[-1]) <= 7


def test_a_text_without_tokens_is_an_error(model):
    with pytest.raises(UserError, match="no tokens"):
        sequences(model(), " \n\n", 10)


def test_the_bundled_texts_are_there():
    assert len(bundled_text().split()) > 10_000
    assert bundled_text("neutral") != bundled_text()


# Keys.

BASE = {"corpus": "some text", "n_tokens": 100, "sequence_length": 10, "bos": "tokenizer"}


@pytest.mark.parametrize(
    "change",
    [
        {"corpus": "some Text"},
        {"n_tokens": 101},
        {"sequence_length": 11},
        {"bos": "never"},
        {"dtype": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_stated_input_is_in_the_key(model, change):
    one = model()
    assert moment_key(one, NAMES[0], **BASE) != moment_key(one, NAMES[0], **(BASE | change))


def test_the_name_the_model_the_tokenizer_and_the_format_are_in_the_key(model, monkeypatch):
    one = model()
    first = moment_key(one, NAMES[0], **BASE)
    assert first == moment_key(model(), NAMES[0], **BASE)
    keys = {first, moment_key(one, "blocks.0.attention.out", **BASE), moment_key(one, "blocks.1.mlp.down", **BASE)}
    changed = one.with_weights({one.anatomy.weight("embed"): one.weight("embed") * 2})
    keys.add(moment_key(changed, NAMES[0], **BASE))
    tokenizer = copy.deepcopy(one.tokenizer)
    tokenizer.add_tokens(["quokka"])
    keys.add(moment_key(replace(one, tokenizer=tokenizer), NAMES[0], **BASE))
    keys.add(moment_key(wrap(*(model("qwen2").network, one.tokenizer)), NAMES[0], **BASE))
    monkeypatch.setattr(stats, "FORMAT", stats.FORMAT + 1)
    keys.add(moment_key(one, NAMES[0], **BASE))
    assert len(keys) == 7


def test_what_lies_above_the_weight_is_not_in_the_key(model):
    one = model()
    changed = one.with_weights({one.anatomy.weight("blocks.1.mlp.down"): one.weight("blocks.1.mlp.down") * 2})
    assert moment_key(changed, NAMES[0], **BASE) == moment_key(one, NAMES[0], **BASE)
    assert moment_key(changed, NAMES[2], **BASE) != moment_key(one, NAMES[2], **BASE)


# Collecting.


def test_collected_moments_are_the_observed_ones_and_the_second_time_costs_no_pass(model, tmp_path):
    one = model()
    text = tmp_path / "text.txt"
    text.write_text(bundled_text()[:3000])
    rows = sequences(one, text.read_text(), 200, 10)
    direct = observe(one, NAMES, rows)
    passes = Passes(one)
    first = collect(one, NAMES, text=text, **SMALL)
    assert passes.n == 5  # one a shard, for all three weights
    again = collect(one, NAMES, text=text, **SMALL)
    assert passes.n == 5
    for ours in NAMES:
        assert torch.equal(first[ours].total, again[ours].total)
        assert first[ours].count == again[ours].count == direct[ours].count == 180
        torch.testing.assert_close(first[ours].total, direct[ours].total, atol=1e-3, rtol=1e-5)
    text.write_text(bundled_text()[100:3100])
    collect(one, NAMES, text=text, **SMALL)
    assert passes.n == 10


def test_only_what_is_missing_is_observed(model):
    one = model()
    collect(one, NAMES[:1], **SMALL)
    mapped = []

    def mapper(function, items):
        mapped.append(function.args[1])
        return map(function, items)

    collect(one, NAMES, mapper=mapper, **SMALL)
    assert mapped == [NAMES[1:]]


def test_enough_tokens_are_read_by_default(model, monkeypatch):
    one = model()
    asked = []
    monkeypatch.setattr(stats, "sequences", lambda m, text, n, *rest: asked.append(n) or sequences(m, text, 50, *rest))
    collect(one, NAMES[:1])
    assert asked == [30_000]


# Interruption.


class Stopped(BaseException):
    """Like Ctrl-C: no Exception."""


def stopping_after(k: int, seen: list[int]):
    """A mapper that ends the run after `k` shards."""

    def mapper(function, items) -> Iterator[object]:
        for done, item in enumerate(items):
            if done == k:
                raise Stopped
            seen.append(item[0])
            yield function(item)

    return mapper


def partials() -> list[object]:
    folder = store.cache_dir() / "moments-partial"
    return [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []


@pytest.mark.parametrize("k", [1, 3, 4])
def test_an_interrupted_pass_repeats_no_shard_and_ends_bit_equal(model, k, monkeypatch, tmp_path):
    one = model()
    whole = collect(one, NAMES, **SMALL)
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path / "other"))
    seen: list[int] = []
    with pytest.raises(Stopped):
        collect(one, NAMES, mapper=stopping_after(k, seen), **SMALL)
    assert seen == list(range(k))
    assert len(partials()) == 1
    heard = []
    with listen(lambda what, done, total: heard.append((done, total)) if "Second moments" in what else None):
        resumed = collect(one, NAMES, mapper=stopping_after(9, seen), **SMALL)
    assert seen == [0, 1, 2, 3, 4]
    assert heard == [(n, 5) for n in range(k, 6)]
    assert partials() == []
    for ours in NAMES:
        assert torch.equal(resumed[ours].total, whole[ours].total)
        assert resumed[ours].count == whole[ours].count


def test_interrupted_again_and_again_it_still_comes_to_its_end(model):
    one = model()
    seen: list[int] = []
    for _ in range(4):
        with pytest.raises(Stopped):
            collect(one, NAMES, mapper=stopping_after(1, seen), **SMALL)
    collect(one, NAMES, mapper=stopping_after(1, seen), **SMALL)
    assert seen == [0, 1, 2, 3, 4]


def test_shards_that_come_back_out_of_order_are_not_mixed_up(model, monkeypatch, tmp_path):
    one = model()
    whole = collect(one, NAMES, **SMALL)
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path / "other"))
    seen: list[int] = []

    def backwards(function, items):
        return stopping_after(2, seen)(function, items[::-1])

    with pytest.raises(Stopped):
        collect(one, NAMES, mapper=backwards, **SMALL)
    resumed = collect(one, NAMES, mapper=stopping_after(9, seen), **SMALL)
    assert seen == [4, 3, 0, 1, 2]
    assert resumed[NAMES[0]].count == whole[NAMES[0]].count
    torch.testing.assert_close(resumed[NAMES[0]].total, whole[NAMES[0]].total, atol=1e-9, rtol=1e-12)


def test_a_killed_process_leaves_what_it_had_stored_by_the_clock(model, monkeypatch, tmp_path):
    one = model()
    monkeypatch.setattr(stats, "STORE_EVERY_S", 0.0)
    now = iter(range(10**6))
    monkeypatch.setattr(stats.time, "monotonic", lambda: 20.0 * next(now))  # a store takes 20 s, so the next waits 200
    seen: list[int] = []

    def copying(function, items):
        for item in items:
            if item[0] == 3:  # what another process would find, were this one killed here
                shutil.copytree(store.cache_dir(), tmp_path / "found")
            yield function(item)

    collect(one, NAMES, mapper=copying, **SMALL)
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path / "found"))
    assert len(partials()) == 1
    collect(one, NAMES, mapper=stopping_after(9, seen), **SMALL)
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("other", [{"n_tokens": 190}, {"shard_tokens": 50}, {"bos": "never", "sequence_length": 12}])
def test_what_another_pass_left_is_not_used(model, other):
    one = model()
    seen: list[int] = []
    with pytest.raises(Stopped):
        collect(one, NAMES, mapper=stopping_after(2, seen), **SMALL)
    collect(one, NAMES, mapper=stopping_after(99, seen), **(SMALL | other))
    assert seen[2] == 0


def test_damaged_totals_are_not_used(model, caplog):
    one = model()
    seen: list[int] = []
    with pytest.raises(Stopped):
        collect(one, NAMES, mapper=stopping_after(2, seen), **SMALL)
    (kept,) = partials()
    data = bytearray((kept / "moments.safetensors").read_bytes())
    data[-100] ^= 1
    (kept / "moments.safetensors").write_bytes(data)
    with caplog.at_level(logging.WARNING, "retouch"):
        collect(one, NAMES, mapper=stopping_after(99, seen), **SMALL)
    assert seen == [0, 1, 0, 1, 2, 3, 4]
    assert "start anew" in caplog.text
    assert partials() == []


def test_a_damaged_moment_is_told_and_observed_again(model, caplog):
    one = model()
    whole = collect(one, NAMES[:1], **SMALL)[NAMES[0]].total.clone()  # the file stands behind the tensor itself
    (file,) = (store.cache_dir() / "moments").glob("*/moment.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        again = collect(one, NAMES[:1], **SMALL)[NAMES[0]].total
    assert torch.equal(again, whole)
    assert "the cache is damaged" in caplog.text


def test_a_place_that_cannot_be_written_does_not_stop_the_pass(model, caplog, monkeypatch):
    one = model()
    monkeypatch.setattr(stats, "STORE_EVERY_S", 0.0)
    store.cache_dir().mkdir(parents=True)
    (store.cache_dir() / "moments-partial").write_text("a file where a folder is to be")
    moments = collect(one, NAMES, **SMALL)
    assert moments[NAMES[0]].count == 180
    assert "cannot be kept" in caplog.text
