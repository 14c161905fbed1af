"""What a trace reads and writes is what the network computes, and a suffix is the full pass without its constant part."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from families import DECODERS, ENCODERS, FAMILIES
from retouch.errors import ModelError, UnknownName
from retouch.model import Model, wrap
from retouch.trace import Suffix, Trace, first_tensor

ROWS = [(11, 57, 102, 13, 240, 31, 8), (90, 14, 333), (21, 77, 210, 401, 5)]
ANCHORS = [(0, 0, 0), (6, 2, 4), (3, 1, 0), (1, 2, 3)]
N_BLOCKS = 3
FLOAT64 = ("gpt2", "gpt2_square", "gpt_neox", "opt")
"""Families that compute in float64 when they are in float64; the others' norms or attention pass through float32."""


@pytest.fixture(scope="module")
def model(tiny):
    """``model("llama")``: a tiny model that the tests share; none of them may change it."""

    @functools.cache
    def make(name: str = "llama", n_blocks: int = N_BLOCKS, **fields) -> Model:
        return wrap(*tiny(name, n_blocks=n_blocks, **fields))

    return make


@contextmanager
def added(model: Model, block: int, token: int, delta: torch.Tensor) -> Iterator[None]:
    """Add `delta` to one token of what flows into a block: the plain way."""

    def hook(_, args, kwargs):
        state = args[0].clone()
        state[:, token] += delta
        return (state, *args[1:]), kwargs

    handle = model.module(f"blocks.{block}").register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def full(model: Model, row: tuple[int, ...], block: int = N_BLOCKS - 1) -> torch.Tensor:
    """One row alone through the whole network: the state after a block, (tokens, d_model)."""
    states = []
    handle = model.module(f"blocks.{block}").register_forward_hook(
        lambda _, a, out: states.append(first_tensor(out)[0])
    )
    try:
        model.network(input_ids=torch.tensor([row]))
    finally:
        handle.remove()
    return states[0]


def check(suffix: Suffix, got: torch.Tensor, rows, expected) -> None:
    for i, (row, states) in enumerate(zip(rows, expected, strict=True)):
        kept = states[int(suffix.offset[i]) : len(row)]
        torch.testing.assert_close(got[i, : len(kept)], kept, atol=1e-5, rtol=1e-5)


def n_hooks(model: Model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.network.modules())


@contextmanager
def counted(model: Model) -> Iterator[Counter]:
    """Count the passes through each block, the embedding and the head."""
    calls: Counter = Counter()
    places = [*(f"blocks.{i}" for i in range(model.anatomy.n_blocks)), "embed", "head"]
    handles = [model.module(p).register_forward_hook(lambda *_, place=p: calls.update([place])) for p in places]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# Suffix.


@pytest.mark.parametrize("first", range(N_BLOCKS))
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_suffix_is_the_full_pass(model, name, first):
    one = model(name)
    expected = [full(one, row) for row in ROWS]
    for anchors in ANCHORS:
        suffix = Suffix.of(one, ROWS, anchors, first)
        check(suffix, suffix.run(), ROWS, expected)
        assert suffix.offset.tolist() == list(anchors)
        assert suffix.state.shape == (3, max(len(r) - a for r, a in zip(ROWS, anchors)), 32)
    assert n_hooks(one) == 0


@pytest.mark.parametrize("first", range(N_BLOCKS))
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_suffix_with_something_added_is_the_full_pass_with_a_hook(model, name, first):
    one = model(name)
    deltas = torch.randn(3, 32, generator=torch.Generator().manual_seed(first))
    for anchors in ANCHORS[1:3]:
        suffix = Suffix.of(one, ROWS, anchors, first)
        state = suffix.state.clone()
        state[:, 0] += deltas
        expected = []
        for row, anchor, delta in zip(ROWS, anchors, deltas):
            with added(one, first, anchor, delta):
                expected.append(full(one, row))
        check(suffix, suffix.run(state), ROWS, expected)


@pytest.mark.parametrize(("name", "fields"), [("gemma2", {}), ("gemma3_text", {}), ("mistral", {}), ("qwen3", {})])
@torch.no_grad()
def test_a_suffix_looks_back_no_farther_than_a_sliding_window(model, name, fields):
    window = {"sliding_window": 3} | ({"use_sliding_window": True, "max_window_layers": 0} if name == "qwen3" else {})
    one, wide = model(name, **window), model(name)
    row = tuple(range(20, 32))
    assert (full(one, row) - full(wide, row)).abs().max() > 1e-2  # the window is felt
    rows = [row, row[:6]]
    for anchors in ((2, 1), (8, 4)):
        suffix = Suffix.of(one, rows, anchors, 1)
        check(suffix, suffix.run(), rows, [full(one, r) for r in rows])


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_suffix_stops_where_it_is_told(model, name):
    one = model(name)
    suffix = Suffix.of(one, ROWS, (3, 1, 0), 0)
    check(suffix, suffix.run(upto=1), ROWS, [full(one, row, 1) for row in ROWS])


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_above_is_a_suffix_that_begins_one_block_later(model, name):
    one = model(name)
    above = Suffix.of(one, ROWS, (3, 1, 0), 0).above()
    later = Suffix.of(one, ROWS, (3, 1, 0), 1)
    assert above.first == later.first == 1
    check(above, above.run(), ROWS, [full(one, row) for row in ROWS])
    torch.testing.assert_close(above.state[0], later.state[0], atol=1e-5, rtol=1e-5)
    check(above.above(), above.above().run(), ROWS, [full(one, row) for row in ROWS])


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_selected_rows_are_those_of_the_whole(model, name):
    one = model(name)
    suffix = Suffix.of(one, ROWS, (3, 1, 3), 1)
    whole = suffix.run()
    for kept in ([1], [0, 2], [2, 1, 0], [1, 1]):
        part = suffix.select(torch.tensor(kept))
        assert part.offset.tolist() == [(3, 1, 3)[i] for i in kept]
        torch.testing.assert_close(part.run(), whole[kept], atol=1e-5, rtol=1e-5)
        twice = part.select(torch.tensor([0]))
        torch.testing.assert_close(twice.run(), whole[kept[:1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_as_many_rows_as_columns_are_still_told_apart(model, name):
    one = model(name)
    rows = [(11, 57, 102, 13), (90, 14, 333, 7), (21, 77, 210, 401)]
    for anchors in ((1, 1, 1), (0, 0, 0)):  # three columns are left, or three rows and four columns
        suffix = Suffix.of(one, rows, anchors, 1)
        torch.testing.assert_close(suffix.select(torch.tensor([2])).run(), suffix.run()[2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_the_gradient_is_that_of_float64_differences(tiny, name):
    one = wrap(*tiny(name, n_blocks=N_BLOCKS))
    one.network.to(torch.float64 if name in FLOAT64 else torch.float32)
    suffix = Suffix.of(one, ROWS, (3, 1, 0), 1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(suffix.state.shape, generator=generator, dtype=torch.float64)

    def loss(delta: torch.Tensor) -> torch.Tensor:
        state = torch.cat([suffix.state[:, :1] + delta[:, None], suffix.state[:, 1:]], dim=1)
        state = suffix.run(state.to(suffix.state.dtype)).double()
        return (state * weights)[0].sum() + state[1:, 0].square().sum()

    delta = (0.1 * torch.randn(3, 32, generator=generator, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(delta), delta)
    step, tolerance = (1e-5, 1e-7) if name in FLOAT64 else (1e-2, 1e-3)
    directions = torch.randn(5, 3, 32, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for d in directions / directions.flatten(1).norm(dim=1)[:, None, None]:
            slope = (loss(delta + step * d) - loss(delta - step * d)) / (2 * step)
            assert abs(slope - (gradient * d).sum()) < tolerance * gradient.norm()
    assert all(p.grad is None for p in one.network.parameters())


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_what_is_constant_does_not_run_again(model, name):
    one = model(name)
    for first in range(N_BLOCKS):
        with counted(one) as calls:
            suffix = Suffix.of(one, ROWS, (3, 1, 0), first)
        assert calls == {"embed": 1} | {f"blocks.{i}": 1 for i in range(N_BLOCKS)}
        with counted(one) as calls:
            suffix.run()
            suffix.run()
        assert calls == {f"blocks.{i}": 2 for i in range(first, N_BLOCKS)}
        with counted(one) as calls:
            suffix.run(upto=first)
        assert calls == {f"blocks.{first}": 1}


@torch.no_grad()
def test_a_suffix_computes_only_the_columns_from_the_anchor_on(model):
    one = model("llama")
    suffix = Suffix.of(one, ROWS, (6, 2, 4), 1)
    with Trace(one) as trace:
        trace.read("blocks.2")
        suffix.run()
    assert trace["blocks.2", "output"].shape == (3, 1, 32)


@torch.no_grad()
def test_a_suffix_can_be_run_again_and_again(model):
    suffix = Suffix.of(model("llama"), ROWS, (3, 1, 0), 1)
    assert torch.equal(suffix.run(), suffix.run())


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_no_suffix(model, name):
    with pytest.raises(ModelError, match="encoder"):
        Suffix.of(model(name), ROWS, (0, 0, 0), 0)


# Trace.


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_flows_into_a_weight_times_the_weight_flows_out(model, name):
    one = model(name, n_blocks=2)
    batch = one.batch(ROWS)
    for ours in ("blocks.1.mlp.down", "blocks.0.attention.out"):
        with Trace(one) as trace:
            trace.read(ours, "input")
            trace.read(ours)
            trace.run(batch)
        keys, values = trace[ours, "input"], trace[ours, "output"]
        assert keys.shape == (*batch.shape, one.anatomy.shape(ours)[1])
        assert values.shape == (*batch.shape, 32)
        bias = getattr(one.module(ours), "bias", None)
        torch.testing.assert_close(values, keys @ one.matrix(ours).T + (0 if bias is None else bias))


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_replacing_an_output_by_zeros_is_a_last_matrix_of_zeros(model, name, part):
    one = model(name, n_blocks=2)
    batch = one.batch(ROWS)
    with Trace(one) as trace:
        trace.edit(f"blocks.0.{part}", torch.zeros_like)
        edited = trace.run(batch)
    ours = "blocks.0.attention.out" if part == "attention" else "blocks.0.mlp.down"
    path = one.anatomy.path(ours)
    zeros = {f"{path}.{n}": torch.zeros_like(p) for n, p in one.module(ours).named_parameters(recurse=False)}
    with Trace(one.with_weights(zeros)) as trace:
        torch.testing.assert_close(edited, trace.run(batch))
    with Trace(one) as trace:
        assert not torch.allclose(edited, trace.run(batch))


def test_the_state_is_found_in_tuples_and_alone():
    state, more = torch.ones(1, 2, 3), object()
    for output in (state, (state, more), [state, more], (state,)):
        assert first_tensor(output) is state


@torch.no_grad()
def test_an_edited_tuple_keeps_what_came_with_the_state(model):
    one = model("gpt2", n_blocks=2, attn_implementation="eager")
    attention = one.module("blocks.0.attention")
    kept = []
    with Trace(one) as trace:
        trace.edit("blocks.0.attention", lambda state: state + 1)
        handle = attention.register_forward_hook(lambda _, args, out: kept.append(out))
        trace.run(one.batch(ROWS))
        handle.remove()
    (output,) = kept
    assert isinstance(output, tuple)
    assert output[1].shape == (3, 4, 7, 7)  # the attention's weights


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_side_branch_is_a_written_weight(model, name):
    one = model(name, n_blocks=2)
    batch = one.batch(ROWS)
    generator = torch.Generator().manual_seed(0)
    for ours in ("blocks.0.mlp.down", "blocks.1.attention.out"):
        outputs, inputs = one.anatomy.shape(ours)
        left = torch.randn(outputs, 2, generator=generator, dtype=torch.float64)
        right = torch.randn(2, inputs, generator=generator)
        with Trace(one) as trace:
            plain = trace.run(batch)
            trace.branch(ours, left, right)
            branched = trace.run(batch)
        step = left.float() @ right
        weight = one.weight(ours) + (step.T if one.anatomy.transposed(ours) else step)
        with Trace(one.with_weights({one.anatomy.weight(ours): weight})) as trace:
            written = trace.run(batch)
        torch.testing.assert_close(branched, written, atol=1e-4, rtol=1e-4)
        assert (branched - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_nothing_runs_after_the_part_that_a_pass_stops_after(model, name):
    one = model(name)
    with counted(one) as calls, Trace(one) as trace:
        trace.read("blocks.1")
        assert trace.run(one.batch(ROWS), stop_after="blocks.1") is None
    assert (calls["blocks.0"], calls["blocks.1"], calls["blocks.2"], calls["head"]) == (1, 1, 0, 0)
    assert trace["blocks.1", "output"].shape == (3, 7, 32)
    assert n_hooks(one) == 0


def test_hooks_are_gone_after_an_error(model):
    one = model("llama")
    batch = one.batch(ROWS)

    def burst(_: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Trace(one) as trace:
        trace.read("blocks.0.mlp.down", "input")
        trace.branch("blocks.0.mlp.down", torch.ones(32, 1), torch.ones(1, 64))
        trace.edit("blocks.1", burst)
        trace.run(batch, stop_after="blocks.2")
    assert n_hooks(one) == 0
    with pytest.raises(UnknownName), Trace(one) as trace:
        trace.read("blocks.0")
        trace.read("blocks.9")
    assert n_hooks(one) == 0
    with pytest.raises(IndexError):
        Suffix.of(one, [(9999,)], [0], 0)
    assert n_hooks(one) == 0


@torch.no_grad()
def test_two_traces_of_one_model_do_not_hear_each_others_end(model):
    one = model("llama")
    batch = one.batch(ROWS)
    with Trace(one) as outer:
        outer.edit("blocks.0", lambda state: state + 1)
        edited = outer.run(batch)
        with Trace(one) as inner:
            inner.edit("blocks.0", lambda state: state - 1)
            restored = inner.run(batch)
        assert torch.equal(outer.run(batch), edited)
    with Trace(one) as trace:
        torch.testing.assert_close(restored, trace.run(batch), atol=1e-4, rtol=1e-4)
