"""Budgets, sizes and the search against published numbers, real networks, a slow search and laws."""

import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from retouch.errors import SettingsError, UserError
from retouch.slim.base import Budget, Plan, Size, SlimMethod, Widths, fraction
from retouch.slim.published import paper, published
from retouch.slim.widths import (
    base_cost,
    base_parameters,
    block_flops,
    cost,
    flops_ratio,
    parameters,
    plan_of,
    rank_limit,
    search,
)

BERT = Size(12, 768, 12, 3072, vocab=30522, positions=512, token_types=2, classes=2)
MINILM = Size(6, 384, 12, 1536, vocab=30522, positions=512, token_types=2, classes=2)
SMALL = Size(3, 32, 4, 64, vocab=500, positions=64, token_types=2, classes=3)


@st.composite
def originals(draw):
    heads, blocks = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    d_model = heads * draw(st.sampled_from([4, 8, 16]))
    numbers = (
        draw(st.integers(8, 200)),
        draw(st.integers(50, 3000)),
        draw(st.integers(0, 64)),
        draw(st.integers(0, 2)),
    )
    return Size(
        blocks, d_model, heads, *numbers, draw(st.integers(1, 5)), draw(st.booleans()), draw(st.integers(0, 40))
    )


@st.composite
def shapes(draw):
    """An original and widths that can be cut from it."""
    size = draw(originals())
    heads = draw(st.tuples(*[st.integers(1, size.heads)] * size.blocks))
    d_ff = draw(st.tuples(*[st.integers(1, size.d_ff)] * size.blocks))
    rank = draw(st.none() | st.integers(1, min(size.d_model, size.vocab)))
    return size, Widths(heads, d_ff, rank, size.exits(draw(st.sets(st.integers(0, size.blocks - 1)))))


shares = st.integers(5, 996).map(lambda n: n / 997)  # of a prime: no limit lies within rounding of a ratio
token_counts = st.lists(st.integers(1, 200), min_size=1, max_size=20)


# ------------------------------------------------ shares and budgets


@pytest.mark.parametrize("text", ["1/8", "0.125", ".125", "12.5%", "12.5 %", "8x", "8X", " 1 / 8 ", "1.5/12", 0.125])
def test_all_ways_to_write_an_eighth_are_one_number(text):
    assert fraction(text, "params") == 0.125


@pytest.mark.parametrize(
    "text", ["", "x", "%", "1/", "/8", "1/0", "0x", "a lot", "1/8/2", "0,125", "1:8", None, [1], True]
)
def test_a_share_that_cannot_be_read_is_named(text):
    with pytest.raises(UserError, match=r"^params cannot be read from .*such as 1/8, 0\.125, 12\.5% or 8x"):
        fraction(text, "params")


@pytest.mark.parametrize(
    "text", ["0", 0, "0%", "-1/8", -0.5, "1.5", "9/8", "0.5x", "150%", "nan", "inf", "infx", 1e300]
)
def test_a_share_out_of_range_is_named(text):
    with pytest.raises(UserError, match=r"^flops must be above 0 and at most 1; got "):
        fraction(text, "flops")


def test_a_whole_number_is_asked_back():
    with pytest.raises(UserError, match=re.escape("Did you mean 1/8?")):
        Budget(params=8)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_quotient_is_read_as_python_divides(above, below):
    assume(above <= below)
    assert fraction(f"{above}/{below}", "params") == above / below == fraction(above / below, "params")


def test_a_budget_reads_text_and_comes_back_from_its_values():
    budget = Budget("1/8", "1/19", max_harm="3%")
    assert budget == Budget(params=0.125, flops=1 / 19, max_harm=0.03, cost="flops")
    assert Budget(**json.loads(json.dumps(budget.to_dict()))) == budget == replace(budget)
    assert replace(budget, params="1/4").params == 0.25
    with pytest.raises(AttributeError):
        budget.params = 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"params": "1/0"}, "^params cannot be read"),
        ({"params": "1/8", "flops": 0}, "^flops must be above 0"),
        ({"params": "1/8", "max_harm": 0}, "^max_harm must be above 0 and below 1"),
        ({"params": "1/8", "max_harm": 1}, "^max_harm must be"),
        ({"params": "1/8", "max_harm": -0.1}, "^max_harm must be"),
        ({"params": "1/8", "max_harm": math.nan}, "^max_harm must be"),
        ({"params": "1/8", "max_harm": "3x"}, "^max_harm must be"),
        ({"params": "1/8", "max_harm": "little"}, "^max_harm must be"),
        ({"max_drop": 0}, "^max_drop must be above 0 and below 1"),
        ({"max_drop": "1%%"}, "^max_drop must be"),
        ({"max_drop": 0.01, "params": "1/8"}, "max_drop .* cannot be joined with params"),
        ({"max_drop": 0.01, "flops": "1/8"}, "max_drop .* cannot be joined with flops"),
        ({"max_drop": 0.01, "params": 0.5, "flops": "1/8"}, "cannot be joined with params and flops"),
        ({"max_drop": 0.01, "max_harm": 0.03}, "max_drop .* cannot be joined with max_harm"),
        ({}, "needs params, flops or max_drop"),
        ({"max_harm": 0.03}, "needs params, flops or max_drop"),
        ({"params": "1/8", "cost": "minutes"}, "cost must be 'flops' or 'seconds'; got 'minutes'"),
    ],
)
def test_a_wrong_budget_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        Budget(**fields)


# ------------------------------------------------ sizes and widths


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": 0}, "blocks must be a whole number of at least 1; got 0"),
        ({"d_ff": 2.5}, "d_ff must be a whole number"),
        ({"positions": -1}, "positions must be a whole number of at least 0"),
        ({"heads": 5}, "5 heads do not divide a width of 32"),
    ],
)
def test_a_wrong_size_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Widths((1, 1), (8,), None, (1,)), "2 of heads, 1 of d_ff"),
        (lambda: Widths((), (), None, ()), "one entry a block"),
        (lambda: Widths((1, 0), (8, 8), None, (1,)), "at least 1"),
        (lambda: Widths((1, 1), (8, 8), 0, (1,)), "at least 1"),
        (lambda: Widths((1, 1), (8, 8), None, (0,)), r"up to the last block 1; got \[0\]"),
        (lambda: Widths((1, 1), (8, 8), None, (1, 0)), "in order"),
        (lambda: Widths((1, 1), (8, 8), None, ()), "in order"),
        (lambda: Widths.uniform(SMALL, 5, 8, 4), "heads 5 is more than the original's 4"),
        (lambda: Widths.uniform(SMALL, 1, 65, 4), "d_ff 65 is more than the original's 64"),
        (lambda: Widths.uniform(SMALL, 1, 8, 33), "rank 33 is more than the original's 32"),
        (lambda: Widths.uniform(SMALL, 1, 8, 4, [3]), "no block 3 for an exit: blocks count from 0 to 2"),
        (lambda: Widths.full(SMALL, [-1]), "no block -1"),
        (lambda: Plan(MINILM, Widths.full(SMALL), 1.0, 1.0, 3.0), "for 3 blocks; the original has 6"),
        (lambda: parameters(MINILM, Widths.full(SMALL)), "for 3 blocks; the original has 6"),
    ],
)
def test_widths_that_cannot_be_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_last_block_always_has_an_exit():
    assert Widths.full(SMALL).exits == (0, 1, 2)
    assert Widths.full(SMALL, [0]).exits == (0, 2) and Widths.full(SMALL, []).exits == (2,)


@given(shapes())
def test_widths_and_plans_come_back_from_json(shape):
    size, widths = shape
    plan = Plan(size, widths, 0.25, 0.2, 1.5)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert Widths.from_dict(json.loads(json.dumps(widths.to_dict()))) == widths


# ------------------------------------------------ parameters and FLOPs: published tables

BERT_ROWS = [
    ((6, 1536, 384), 54_984_984, 1.99, (1.99,), (5.9, 2.9, 1.9, 1.2)),
    ((3, 768, 192), 27_727_512, 3.95, (3.97,), (11.9, 5.9, 3.9, 2.4)),
    ((4, 512, 256), 27_370_008, 4.00, (4.40,), (12, 6.5, 4.3, 2.7)),
    ((2, 512, 128), 18_641_688, 5.87, (5.96,), (12, 8.9, 5.9, 3.7)),
    ((2, 256, 128), 13_920_024, 7.87, (8.79,), (12, 12, 8.8, 5.5)),
]
MINILM_ROWS = [
    ((6, 768, 192), 11_467_020, 1.98, (1.97, 1.97), (2.9, 1.4, None, None)),
    ((4, 512, 128), 7_716_876, 2.94, (2.96, 2.96), (4.4, 2.2, 1.4, None)),
    ((3, 384, 96), 5_841_804, 3.89, (3.95, 3.95), (5.9, 2.9, 1.9, 1.2)),
    ((2, 256, 64), 3_966_732, 5.73, (5.92, 5.92), (6, 4.4, 2.9, 1.8)),
    ((2, 128, 48), 2_881_644, 7.88, (8.81, 8.65), (6, 6, 4.4, 2.7)),
]
ROWS = [(BERT, (128,), *row) for row in BERT_ROWS] + [(MINILM, (32, 128), *row) for row in MINILM_ROWS]


def test_the_originals_have_their_known_sizes():
    assert base_parameters(BERT) == 109_483_778 and base_parameters(MINILM) == 22_713_986
    assert round(base_cost(BERT, 128) / 1e9, 2) == 22.35 and round(base_cost(MINILM, 32) / 1e6) == 689


@pytest.mark.parametrize(("size", "lengths", "row", "count", "params", "flops", "depths"), ROWS)
def test_the_table_of_widths(size, lengths, row, count, params, flops, depths):
    widths = Widths.uniform(size, *row)
    assert parameters(size, widths) == count
    assert round(base_parameters(size) / count, 2) == params
    for tokens, want in zip(lengths, flops, strict=True):
        assert round(1 / flops_ratio(size, widths, [tokens], size.blocks - 1), 2) == want
    for below, depth in zip((4, 8, 12, 19), depths, strict=True):
        if depth is None:
            with pytest.raises(UserError, match="first exit, after block 0, already costs"):
                plan_of(size, widths, lengths[:1], 1 / below)
        else:
            assert round(plan_of(size, widths, lengths[:1], 1 / below).mean_depth, 1) == depth


@pytest.mark.parametrize(
    ("size", "tokens", "params", "flops", "widths", "depth"),
    [
        (BERT, 128, "1/4", None, (4, 512, 256), 12),
        (BERT, 128, "1/8", None, (2, 256, 120), 12),
        (BERT, 128, "1/8", "1/19", (2, 192, 152), 6.2),
        (MINILM, 32, "1/2", "1/4", (9, 576, 188), 2.9),
        (MINILM, 32, "1/3", "1/6", (6, 352, 128), 3.0),
        (MINILM, 32, "1/4", "1/8", (5, 320, 80), 2.6),
        (MINILM, 32, "1/6", "1/12", (3, 224, 52), 2.7),
        (MINILM, 32, "1/8", "1/19", (2, 160, 40), 2.4),
    ],
)
def test_the_plans_of_known_budgets(size, tokens, params, flops, widths, depth):
    plan = search(size, Budget(params, flops), [tokens])
    assert plan.widths == Widths.uniform(size, *widths) and round(plan.mean_depth, 1) == depth
    assert plan.params_ratio == parameters(size, plan.widths) / base_parameters(size)
    assert plan.flops_ratio == pytest.approx(flops_ratio(size, plan.widths, [tokens], size.blocks - 1), rel=1e-12)


def test_an_eighth_of_minilm_has_as_many_parameters_as_was_said():
    plan = search(MINILM, Budget("1/8", "1/19"), [32])
    assert parameters(MINILM, plan.widths) == 2_782_044 and plan.mean_depth == pytest.approx(2.447, abs=5e-4)


def test_the_authors_widths():
    assert paper(BERT, 2) == Widths.uniform(BERT, 2, 256, 128)
    assert paper(BERT, 2, half=False) == Widths.uniform(BERT, 2, 512, 128)
    assert paper(BERT, 4) == Widths.uniform(BERT, 4, 512, 256)
    assert paper(BERT, 6) == Widths.uniform(BERT, 6, 1536, 384)
    assert paper(MINILM, 3, half=False) == Widths.uniform(MINILM, 3, 384, 96)
    assert paper(BERT, 12) == Widths.full(BERT)
    with pytest.raises(UserError, match="heads 13 is more than the original's 12"):
        paper(BERT, 13)


# ------------------------------------------------ parameters and FLOPs: oracles


def shapes_of(size, widths):
    """Every weight of a slim model, one by one."""
    d = size.d_model
    yield from [(size.vocab, widths.rank), (widths.rank, d)] if widths.rank else [(size.vocab, d)]
    yield from [(size.positions, d), (size.token_types, d), (d,), (d,), (size.extra,)]
    for heads, d_ff in zip(widths.heads, widths.d_ff, strict=True):
        attended = heads * size.head_dim
        yield from [(attended, d), (attended,)] * 3 + [(d, attended), (d,), (d,), (d,)]
        yield from [(d_ff, d), (d_ff,), (d, d_ff), (d,), (d,), (d,)]
    yield from [(size.classes, d), (size.classes,)] * len(widths.exits)


@given(shapes())
@settings(deadline=None)
def test_parameters_are_the_sum_over_all_weights(shape):
    size, widths = shape
    assert parameters(size, widths) == sum(math.prod(s) for s in shapes_of(size, widths))
    full = sum(math.prod(s) for s in shapes_of(size, Widths.full(size, [])))
    assert base_parameters(size) == full + size.pooler * (size.d_model + 1) * size.d_model


ENCODERS = {  # the width, heads, neurons and blocks under each family's names
    "bert": (("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"), (60, 2), 0),
    "distilbert": (("dim", "n_heads", "hidden_dim", "n_layers"), (60, 0), 0),
    "roberta": (("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"), (60, 2), 0),
    "mpnet": (("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"), (60, 0), 32 * 4),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_real_classifiers_have_these_parameters_and_flops(family):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForSequenceClassification

    names, (positions, types), extra = ENCODERS[family]
    fields = dict(zip(names, (32, 4, 64, 3), strict=True)) | {"max_position_embeddings": positions, "num_labels": 3}
    config = AutoConfig.for_model(family, vocab_size=500, **fields, **({"type_vocab_size": types} if types else {}))
    network = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    size = Size(3, 32, 4, 64, 500, positions, types, 3, extra=extra)
    assert sum(p.numel() for p in network.parameters()) == base_parameters(size)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(input_ids=ids)
    assert counter.get_total_flops() == base_cost(size, 20)


@given(shapes(), token_counts, st.data())
@settings(deadline=None)
def test_the_ratio_is_the_sum_of_single_costs(shape, lengths, data):
    size, widths = shape
    where = [data.draw(st.integers(0, size.blocks - 1)) for _ in lengths]
    spent = sum(cost(size, widths, t, block) for t, block in zip(lengths, where, strict=True))
    total = sum(base_cost(size, t) for t in lengths)
    assert flops_ratio(size, widths, lengths, where) == pytest.approx(spent / total, rel=1e-12)
    one = flops_ratio(size, widths, lengths, where[0])
    assert one == flops_ratio(size, widths, lengths, [where[0]] * len(lengths))


@given(shapes(), st.integers(1, 300))
def test_each_block_adds_its_own_cost_and_its_exit(shape, tokens):
    size, widths = shape
    for block in range(1, size.blocks):
        added = cost(size, widths, tokens, block) - cost(size, widths, tokens, block - 1)
        own = block_flops(size, widths.heads[block], widths.d_ff[block], tokens)
        assert added == pytest.approx(own + 2 * size.d_model * size.classes * (block in widths.exits), rel=1e-9)


def test_a_block_and_an_exit_cost_what_a_person_counts():
    """4 heads of 8, 64 neurons, 10 tokens: four maps of 32 x 32, two of 32 x 64, and two products of scores."""
    by_hand = 2 * 10 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * (2 * 10 * 10 * 32)
    assert block_flops(SMALL, 4, 64, 10) == by_hand
    widths = Widths.uniform(SMALL, 4, 64, 8)
    assert cost(SMALL, widths, 10, 0) == 2 * 10 * 8 * 32 + by_hand + 2 * 32 * 3
    assert cost(SMALL, widths, 10, 2, n_exits=1) == 2 * 10 * 8 * 32 + 3 * by_hand + 2 * 32 * 3
    assert cost(SMALL, replace(widths, exits=(2,)), 10, 1) == 2 * 10 * 8 * 32 + 2 * by_hand


@pytest.mark.parametrize(
    ("lengths", "where", "message"),
    [
        ([], 0, "at least one example"),
        ([3, 0], 0, "each at least 1"),
        ([math.nan], 0, "each at least 1"),
        ([3, 4], [0], "There are 2 lengths and 1 blocks"),
        ([3, 4], [0, 3], r"block from 0 to 2; got \[0, 3\]"),
        ([3], -1, "block from 0 to 2; got -1"),
        ([3], 0.5, "block from 0 to 2"),
    ],
)
def test_wrong_lengths_and_blocks_are_named(lengths, where, message):
    with pytest.raises(UserError, match=message):
        flops_ratio(SMALL, Widths.full(SMALL), lengths, where)


# ------------------------------------------------ the search


def expected(plan, lengths):
    """What the plan costs on average when examples run its mean depth, as a share of the original's."""
    size, widths = plan.size, plan.widths
    embed = sum(2 * t * (widths.rank or 0) * size.d_model for t in lengths) / sum(base_cost(size, t) for t in lengths)
    return embed + plan.mean_depth / size.blocks * (plan.flops_ratio - embed)


def slow_search(size, budget, lengths, exits, depth):
    """The search as loops over all points and lengths."""
    step, rank_step = max(8, size.d_ff // 48 // 8 * 8), max(4, size.d_model // 96)
    d_ffs = sorted({*range(step, size.d_ff + 1, step), size.d_ff})
    ranks = [None] + [r for r in range(rank_step, size.d_model, rank_step) if r < rank_limit(size)]
    found, blocks = [], size.blocks
    base = sum(base_cost(size, t) for t in lengths)
    fewest = 1 if depth else max(1, size.heads // 6)
    for heads, d_ff, rank in itertools.product(range(fewest, size.heads + 1), d_ffs, ranks):
        widths = Widths.uniform(size, heads, d_ff, rank, exits)
        embed = sum(2 * t * (rank or 0) * size.d_model for t in lengths)
        run = sum(cost(size, widths, t, blocks - 1) for t in lengths) - embed
        share = min(1, ((budget.flops or math.inf) * base - embed) / run)
        count = parameters(size, widths)
        if count <= (budget.params or math.inf) * base_parameters(size) and share >= max(
            1 / 3, (widths.exits[0] + 1) / blocks
        ):
            kept = heads / size.heads * d_ff / size.d_ff * (rank or size.d_model) / size.d_model * share
            found.append((-round(math.log(kept), 9), count, share * blocks))
    most = max((depth for _, _, depth in found), default=0)
    return min((one for one in found if one[2] >= min(depth, 0.95 * most) - 1e-9), default=None)


@given(originals(), st.none() | shares, st.none() | shares, token_counts, st.sampled_from([0, 0, 1.7, 3.3]), st.data())
@settings(max_examples=40, deadline=None)
def test_the_search_equals_the_slow_one(size, params, flops, lengths, depth, data):
    assume(params or flops)
    exits = data.draw(st.none() | st.sets(st.integers(0, size.blocks - 1)))
    budget = Budget(params, flops)
    want = slow_search(size, budget, lengths, exits, depth)
    if want is None:
        with pytest.raises(UserError, match="No widths reach"):
            search(size, budget, lengths, exits, depth=depth)
        return
    plan = search(size, budget, lengths, exits, depth=depth)
    assert parameters(size, plan.widths) == want[1] and plan.mean_depth == pytest.approx(want[2], abs=1e-6)
    assert plan.widths.exits == size.exits(exits)


@pytest.mark.parametrize("depth", [3.0, 4.2, 5.4])
def test_width_gives_way_to_depth(depth):
    budget = Budget("1/8", "1/19")
    usual, deeper = search(MINILM, budget, [32]), search(MINILM, budget, [32], depth=depth)
    assert deeper.mean_depth >= depth > usual.mean_depth
    assert deeper.params_ratio <= 1 / 8 and expected(deeper, [32]) <= 1 / 19 + 1e-9
    kept = [w.heads[0] * w.d_ff[0] for w in (usual.widths, deeper.widths)]
    assert kept[1] < kept[0]


def found(size, budget, lengths):
    try:
        return search(size, budget, lengths)
    except UserError:
        return None


@given(originals(), shares, st.none() | shares, token_counts)
@settings(max_examples=60, deadline=None)
def test_a_plan_never_exceeds_a_limit(size, params, flops, lengths):
    plan = found(size, Budget(params, flops), lengths)
    assume(plan)
    assert parameters(size, plan.widths) <= params * base_parameters(size)
    assert plan.params_ratio <= params
    assert max(1, size.blocks / 3) - 1e-6 <= plan.mean_depth <= size.blocks
    if flops is None or plan.flops_ratio <= flops:
        assert plan.mean_depth == size.blocks
    else:
        assert expected(plan, lengths) == pytest.approx(flops, rel=1e-6)


@given(originals(), st.tuples(shares, shares), st.none() | shares, token_counts)
@settings(max_examples=60, deadline=None)
def test_fewer_parameters_allowed_never_give_more(size, params, flops, lengths):
    tight, loose = (found(size, Budget(share, flops), lengths) for share in sorted(params))
    assume(tight)
    assert loose is not None and parameters(size, tight.widths) <= parameters(size, loose.widths)


@given(originals(), shares, st.tuples(shares, shares), token_counts)
@settings(max_examples=60, deadline=None)
def test_fewer_flops_allowed_never_cost_more(size, params, flops, lengths):
    tight, loose = (found(size, Budget(params, share), lengths) for share in sorted(flops))
    assume(tight)
    assert loose is not None and expected(tight, lengths) <= expected(loose, lengths) + 1e-9


@given(originals(), st.floats(1e-4, 0.3), st.none() | st.floats(1e-4, 0.3), token_counts)
@settings(max_examples=60, deadline=None)
def test_an_impossible_budget_names_a_pair_that_can_be_reached(size, params, flops, lengths):
    try:
        search(size, Budget(params, flops), lengths)
        assume(False)
    except UserError as error:
        said = str(error).split("can be reached: ")[1]
    near = {name: float(share) for name, share in re.findall(r"(params|flops) ([\d.e-]*\d)", said)}
    assert set(near) == ({"params"} if flops is None else {"params", "flops"})
    assert near["params"] >= params * 0.999 and near.get("flops", 1) >= (flops or 0) * 0.999
    assume(max(near.values()) <= 1)  # a slim model of a tiny original may be the larger one, by its exits
    plan = search(size, Budget(**near), lengths)
    assert plan.params_ratio <= near["params"]


def test_an_impossible_budget_reads_as_a_sentence():
    with pytest.raises(UserError) as error:
        search(BERT, Budget("1/60", "1/200"), [128])
    assert str(error.value) == (
        "No widths reach params 0.01667 and flops 0.005. The nearest that can be reached: params 0.06051 (1/16.5) and "
        "flops 0.0241 (1/41.5), with 2 heads, d_ff 64, rank 8 and a mean depth of 4 of 12 blocks. Ask for that, or for "
        "more."
    )
    assert search(BERT, Budget(0.06051, 0.0241), [128]).widths == Widths.uniform(BERT, 2, 64, 8)


def test_a_reachable_limit_stays_as_it_was_asked():
    with pytest.raises(UserError, match=re.escape("can be reached: params 0.125 (1/8) and flops 0.0241")):
        search(BERT, Budget("1/8", "1/100"), [128])


def test_flops_alone_leave_the_embedding_whole_and_width_alone_needs_no_exits():
    plan = search(MINILM, Budget(flops="1/4"), [32])
    assert plan.widths.rank is None and plan.mean_depth < 6
    plan = search(MINILM, Budget("1/8", "1/4"), [32])
    assert plan.mean_depth == 6 and plan.flops_ratio < 0.25


def test_nothing_leaves_below_the_first_exit():
    plan = search(MINILM, Budget("1/8", "1/19"), [32], exits=[3])
    assert plan.widths.exits == (3, 5) and 4 <= plan.mean_depth < 6
    only_last = search(MINILM, Budget("1/8", "1/12"), [32], exits=[])
    assert only_last.mean_depth == pytest.approx(6) and only_last.flops_ratio <= 1 / 12 + 1e-9
    with pytest.raises(UserError, match=r"flops 0\.0709 .* mean depth of 6 of 6 blocks"):
        search(MINILM, Budget("1/8", "1/19"), [32], exits=[])


def test_exits_that_are_not_asked_serve_no_plan():
    free, asked = (search(SMALL, Budget(flops=0.4), [20], asked=a) for a in (None, (1, 2)))
    assert free.mean_depth < 2 <= asked.mean_depth
    assert asked.widths.exits == (0, 1, 2)
    with pytest.raises(UserError, match="first exit, after block 1"):
        plan_of(SMALL, Widths.full(SMALL), [20], 0.4, (1, 2))


def test_a_budget_names_published_widths():
    assert published(BERT, Budget("1/4")) == Widths.uniform(BERT, 4, 512, 256)
    assert published(BERT, Budget("1/8", "1/19"), [5]) == Widths.uniform(BERT, 2, 256, 128, [5])
    assert published(MINILM, Budget("1/2")) == Widths.uniform(MINILM, 6, 768, 192)
    assert published(BERT, Budget("1/10")) is None
    assert published(BERT, Budget(flops="1/4")) is None


def test_the_order_and_number_of_equal_lengths_do_not_matter():
    one = search(MINILM, Budget("1/8", "1/19"), [10, 20, 60])
    assert search(MINILM, Budget("1/8", "1/19"), np.array([60, 10, 20] * 400)).widths == one.widths


def test_fixed_widths_stay_and_the_rest_is_searched():
    plan = search(MINILM, Budget("1/8", "1/19"), [32], heads=3)
    assert set(plan.widths.heads) == {3} and plan.params_ratio <= 1 / 8
    plan = search(MINILM, Budget("3/4", "1/4"), [32], d_ff=100, rank=0)
    assert set(plan.widths.d_ff) == {100} and plan.widths.rank is None
    fixed = search(MINILM, Budget("1/7", "1/19"), [32], heads=2, d_ff=128, rank=48)
    assert fixed.widths == Widths.uniform(MINILM, 2, 128, 48)
    assert fixed == plan_of(MINILM, fixed.widths, [32], 1 / 19)
    for wrong, message in [({"heads": 13}, "heads must lie from 1 to 12"), ({"d_ff": 0}, "d_ff must lie from 1"),
                           ({"rank": 380}, "rank must lie from 0 to 379")]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            search(MINILM, Budget("1/8"), [32], **wrong)
    with pytest.raises(UserError, match=r"No widths reach params 0\.125"):
        search(MINILM, Budget("1/8"), [32], heads=12, d_ff=1536, rank=0)


def test_what_cannot_be_searched_is_said():
    with pytest.raises(UserError, match="max_drop is found by training"):
        search(MINILM, Budget(max_drop=0.01), [32])
    with pytest.raises(UserError, match="at least one example"):
        search(MINILM, Budget("1/8"), [])


# ------------------------------------------------ methods


def test_a_method_needs_a_fit_and_checks_its_settings():
    class Still(SlimMethod):
        def fit(self, run):
            return run

    assert Still().name == "test_slim_widths" and Still(seed=3).fit("run") == "run"
    assert Still(preset="paper").to_dict() == {"preset": "paper", "seed": 0}
    with pytest.raises(SettingsError, match=r"preset must be fast\|paper; got 'slow'"):
        Still(preset="slow")
    with pytest.raises(TypeError, match="abstract"):
        SlimMethod()


def test_numbers_load_no_torch_of_their_own():
    """The package may load torch; these two modules must not."""
    code = (
        "import sys, types; package = types.ModuleType('retouch.slim'); import retouch; "
        "package.__path__ = [retouch.__path__[0] + '/slim']; sys.modules['retouch.slim'] = package; "
        "import retouch.slim.widths; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
