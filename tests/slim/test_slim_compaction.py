"""The law of compaction: in a batch, every row gets the exit and the logits that it gets alone."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from retouch.errors import SettingsError, UserError
from retouch.slim.compaction import answer, answer_one_by_one, right_padded
from retouch.slim.network import SlimConfig, SlimForSequenceClassification
from retouch.slim.rules import ALWAYS, RULES, Rule, advance, uncertainty
from retouch.slim.table import grid, leaving, read_table, unsure

N_BLOCKS = 4
RULES_OF = {"classification": [r for r in RULES if r != "delta"], "regression": ["patience", "delta"]}


@functools.cache
def network(family="bert", task="classification", exits=(0, 1, 2, 3), pooling="first", dtype=torch.float64):
    """A slim network of uneven widths whose exits disagree and differ in how sure they are."""
    base = families.FAMILIES[family](n_blocks=N_BLOCKS, headless=True).config.to_dict()
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}} if task == "classification" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = SlimConfig(
            base, [1, 2, 4, 3], [24, 64, 8, 40], 12, exits, pooling=pooling, pooler="tanh", task=task, **labels
        )
        built = SlimForSequenceClassification(config).to(dtype).eval()
        with torch.no_grad():
            for depth, exit in enumerate(built.exits.values()):
                exit.weight.normal_(0, 0.3 * (1 + depth) if task == "classification" else 0.05)
    return built


def texts(n, longest=12, seed=0, side="right", extra=0, pairs=True):
    """Random rows of random lengths, padded on one side."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=g)
    width = longest + extra
    ids = torch.randint(5, 400, (n, width), generator=g)
    types = torch.randint(0, 2, (n, width), generator=g) if pairs else None
    place = torch.arange(width)
    mask = place < lengths[:, None] if side == "right" else place >= width - lengths[:, None]
    return ids, mask.long(), types


def moved(batch, side="left", extra=3):
    """The same rows with other padding, whose ids are noise."""
    ids, mask, types = batch
    rows = [torch.nonzero(m)[:, 0] for m in mask]
    width = max(len(r) for r in rows) + extra
    out = [
        torch.randint(5, 400, (len(ids), width)),
        torch.zeros(len(ids), width).long(),
        torch.ones(len(ids), width).long(),
    ]
    for i, r in enumerate(rows):
        here = slice(0, len(r)) if side == "right" else slice(width - len(r), width)
        for new, old in zip(out, (ids, mask, types)):
            new[i, here] = old[i, r]
    return tuple(out)


@functools.cache
def thresholds(net, rule, n_points=7):
    """Thresholds at which some rows of other texts leave at every exit."""
    return grid(table_of(net, texts(30, seed=99)), rule, n_points).tolist()


def table_of(net, batch):
    return read_table(net, [dict(zip(("input_ids", "attention_mask", "token_type_ids"), batch))])


def same(one, two, atol=1e-12):
    assert one.where.tolist() == two.where.tolist()
    assert one.logits.shape == two.logits.shape and torch.allclose(one.logits, two.logits, rtol=0, atol=atol)


# ------------------------------------------------ the law


@pytest.mark.parametrize(("task", "rule"), [(task, rule) for task, rules in RULES_OF.items() for rule in rules])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("min_block", [0, 1])
def test_a_batch_answers_as_its_rows_do_alone(task, rule, every, min_block):
    net, batch = network(task=task), texts(7)
    heat = [0.6, 0.8, 1.0, 1.7]
    fields = {"rule": rule, "every": every, "min_block": min_block, "temperatures": heat}
    seen = set()
    points = thresholds(net, Rule(rule, tuple(heat), every, min_block), 5)
    for threshold in (0.0, *points[1:-1:2], ALWAYS):
        alone = answer_one_by_one(net, *batch, threshold=threshold, **fields)
        for compact in ("auto", "always", "never"):
            same(answer(net, *batch, threshold=threshold, compact=compact, **fields), alone)
        seen.update(alone.where.tolist())
    asked = Rule(rule, every=every, min_block=min_block).due(range(N_BLOCKS))
    assert seen <= set(asked) and {asked[0], asked[-1]} <= seen


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 8),
    rule=st.sampled_from(RULES_OF["classification"]),
    at=st.floats(0, 1),
    pooling=st.sampled_from(["first", "mean"]),
    side=st.sampled_from(["left", "right"]),
    extra=st.integers(0, 5),
    compact=st.sampled_from(["auto", "always", "never"]),
)
@settings(max_examples=25, deadline=None)
def test_order_and_padding_change_nothing(seed, n, rule, at, pooling, side, extra, compact):
    net, batch = network(pooling=pooling), texts(n, seed=seed)
    points = thresholds(net, Rule(rule))
    threshold = points[round(at * (len(points) - 1))]
    order = np.random.default_rng(seed).permutation(n)
    shuffled = moved(tuple(t[order] for t in batch), side, extra)
    one = answer(net, *batch, rule=rule, threshold=threshold)
    two = answer(net, *shuffled, rule=rule, threshold=threshold, compact=compact)
    assert two.where.tolist() == one.where[order].tolist()
    assert torch.allclose(two.logits, one.logits[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", families.ENCODERS)
def test_every_family_keeps_the_law(family):
    net, batch = network(family), texts(8, seed=3)
    seen = set()
    for threshold in thresholds(net, Rule())[1:-1:2]:
        one = answer(net, *moved(batch), threshold=threshold)
        same(one, answer_one_by_one(net, *batch, threshold=threshold))
        seen.update(one.where.tolist())
    assert len(seen) > 1


@pytest.mark.parametrize("rule", RULES_OF["classification"])
def test_the_table_says_who_leaves_where(rule):
    """The look-up that thresholds are chosen by, the batch, and the loop agree."""
    net, batch = network(), texts(25, seed=5)
    table, points = table_of(net, batch), thresholds(net, Rule(rule))
    where = leaving(table, Rule(rule), points)
    for k, threshold in enumerate(points):
        found = answer(net, *batch, rule=rule, threshold=threshold)
        assert found.where.tolist() == where[:, k].tolist()
        assert found.logits.numpy() == pytest.approx(table.taken(where[:, k]), abs=1e-12)


def test_float32_leaves_at_the_same_exits_off_the_threshold():
    net, batch = network(dtype=torch.float32), texts(16, seed=8)
    table = table_of(net, batch)
    for threshold in thresholds(net, Rule())[2:-1:2]:
        clear = np.abs(unsure(table, Rule())[:-1] - threshold).min(axis=0) > 1e-5
        one, two = answer(net, *batch, threshold=threshold), answer_one_by_one(net, *batch, threshold=threshold)
        assert clear.sum() > 12 and (one.where == two.where).numpy()[clear].all()
        assert (one.logits - two.logits).abs().numpy()[clear].max() < 1e-4


# ------------------------------------------------ work that is not done


def test_rows_that_left_are_not_run_and_their_padding_goes_with_them(monkeypatch):
    net, batch = network(), texts(16, longest=30, seed=2)
    threshold = thresholds(net, Rule())[5]
    shapes, run = [], net.run_block
    monkeypatch.setattr(net, "run_block", lambda l, h, m: (shapes.append(tuple(h.shape[:2])), run(l, h, m))[1])
    where = answer(net, *batch, threshold=threshold, compact="always").where
    lengths = batch[1].sum(1)
    wanted = [((where >= l).sum().item(), lengths[where >= l].max().item()) for l in range(int(where.max()) + 1)]
    assert shapes == wanted and len({n for n, _ in wanted}) > 1
    shapes.clear()
    answer(net, *batch, threshold=ALWAYS)
    assert len(shapes) == 1


def test_exits_that_are_not_asked_are_not_computed(monkeypatch):
    net, batch = network(), texts(4)
    read, run = [], net.read_exit
    monkeypatch.setattr(net, "read_exit", lambda l, h, m: (read.append(l), run(l, h, m))[1])
    for fields, asked in (
        ({"threshold": 0.0}, [3]),
        ({"threshold": 1e-300}, [0, 1, 2, 3]),
        ({"threshold": 1e-300, "every": 2}, [1, 3]),
        ({"threshold": 1e-300, "min_block": 2}, [2, 3]),
        ({"threshold": ALWAYS, "min_block": 1}, [1]),
    ):
        answer(net, *batch, **fields)
        assert read == asked
        read.clear()


# ------------------------------------------------ traps


@pytest.mark.parametrize("compact", ["auto", "always", "never"])
def test_none_or_all_leave_at_the_first_exit(compact):
    net, batch = network(), texts(6)
    full = net.levels(*batch).logits
    for threshold, block in ((0.0, 3), (ALWAYS, 0)):
        found = answer(net, *batch, threshold=threshold, compact=compact)
        assert found.where.tolist() == [block] * 6
        assert torch.allclose(found.logits, full[block], rtol=0, atol=1e-12)


def test_a_single_row_of_a_single_token_and_no_row_at_all():
    net = network()
    one = texts(1, longest=1)
    same(answer(net, *one, threshold=0.5), answer_one_by_one(net, *one, threshold=0.5))
    for width in (0, 7):
        none = (torch.zeros(0, width, dtype=torch.long),) * 3
        for found in (answer(net, *none, threshold=0.5), answer_one_by_one(net, *none, threshold=0.5)):
            assert found.logits.shape == (0, 3) and found.where.shape == (0,) and found.logits.dtype == torch.float64


def test_the_last_exit_alone():
    net, batch = network(exits=(3,)), texts(5)
    for rule in RULES_OF["classification"]:
        found = answer(net, *batch, rule=rule, threshold=ALWAYS)
        assert found.where.tolist() == [3] * 5
        same(found, answer_one_by_one(net, *batch, rule=rule, threshold=ALWAYS))


def test_sparse_exits_and_their_temperatures_are_told_apart_by_block():
    net, batch = network(exits=(1, 3)), texts(12, seed=4)
    for heat in ([0.2, 5.0], [5.0, 0.2]):
        for threshold in (0.3, 0.7, 0.95):
            fields = {"threshold": threshold, "temperatures": heat}
            same(answer(net, *batch, **fields), answer_one_by_one(net, *batch, **fields))
    cold, hot = (answer(net, *batch, threshold=0.7, temperatures=heat).where for heat in ([0.01, 1], [99, 1]))
    assert (cold == 1).sum() > (hot == 1).sum() == 0


@pytest.mark.parametrize("rule", ["entropy", "max_prob", "margin"])
def test_logits_of_ten_thousand_leave_and_ties_stay(rule):
    net = network(exits=(0, 1, 3))
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    try:
        with torch.no_grad():
            net.exits["0"].weight.zero_()
            net.exits["0"].bias.zero_()
            net.exits["1"].weight.zero_()
            net.exits["1"].bias.copy_(torch.tensor([0.0, 1e4, -1e4]))
        batch = texts(4)
        at = float(uncertainty(rule, advance(None, np.zeros((1, 3))), N_BLOCKS)[0])
        assert at == pytest.approx(1.0)
        tie = answer(net, *batch, rule=rule, threshold=at)
        assert tie.where.tolist() == [1] * 4 and tie.logits[0].tolist() == [0.0, 1e4, -1e4]
        assert answer(net, *batch, rule=rule, threshold=5e-324).where.tolist() == [1] * 4
        same(tie, answer_one_by_one(net, *batch, rule=rule, threshold=at))
    finally:
        net.load_state_dict(kept)


def test_right_padded_moves_tokens_and_drops_common_padding():
    ids = torch.tensor([[0, 0, 7, 8, 0], [0, 4, 5, 6, 0]])
    mask = (ids > 0).long()
    new, there, types = right_padded(ids, mask, ids * 10)
    assert new.tolist() == [[7, 8, 0], [4, 5, 6]] and there.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert types.tolist() == [[70, 80, 0], [40, 50, 60]]
    assert right_padded(ids, mask, None)[2] is None


# ------------------------------------------------ settings


def test_what_the_network_was_saved_with_is_used():
    net, batch = network(), texts(10, seed=6)
    saved = net.config.rule, net.config.threshold, net.config.every
    try:
        net.config.rule, net.config.threshold, net.config.every = "margin", thresholds(net, Rule("margin"))[4], 2
        fields = {"rule": "margin", "threshold": net.config.threshold, "every": 2}
        one = answer(net, *batch)
        same(one, answer_one_by_one(net, *batch, **fields))
        assert len(set(one.where.tolist())) > 1
        out = net(*batch)
        assert torch.equal(out.logits, one.logits) and torch.equal(out.exit_block, one.where)
        assert answer(net, *batch, threshold=0.0).where.tolist() == [3] * 10
    finally:
        net.config.rule, net.config.threshold, net.config.every = saved
    assert answer(net, *batch).where.tolist() == [3] * 10, "a threshold of None lets nobody leave early"


def test_wrong_settings_name_the_field():
    net, batch = network(), texts(2)
    with pytest.raises(SettingsError, match="compact must be"):
        answer(net, *batch, compact="sometimes")
    with pytest.raises(SettingsError, match="temperatures must hold one number for each of the 4 exits; got 1"):
        answer(net, *batch, threshold=0.5, temperatures=[1.0])
    with pytest.raises(UserError, match="No exit rule is called 'entropi'"):
        answer(net, *batch, rule="entropi")
    number = network(task="regression")
    for rule in ("entropy", "max_prob", "margin"):
        with pytest.raises(SettingsError, match="rule must be 'patience' or 'delta'"):
            answer(number, *batch, rule=rule, threshold=0.5)


# ------------------------------------------------ reading a table


def test_a_table_is_read_in_batches_in_the_order_of_the_index_with_dropout_off():
    net, (ids, mask, types) = network(task="regression"), texts(7, seed=1)
    net.config.target_mean, net.config.target_scale = 2.0, 4.0
    net.train()
    try:
        whole = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": torch.arange(7.0)}
        one = read_table(net, [whole])
        parts = [
            {k: v[at] for k, v in whole.items()} | {"index": at} for at in torch.tensor([5, 0, 6, 2, 1, 3, 4]).split(3)
        ]
        two = read_table(net, parts)
        assert net.training
    finally:
        net.eval()
        net.config.target_mean, net.config.target_scale = 0.0, 1.0
    assert one.logits.shape == (4, 7, 1) and one.exits == (0, 1, 2, 3)
    assert two.logits == pytest.approx(one.logits, abs=1e-12)
    assert two.lengths.tolist() == one.lengths.tolist() == mask.sum(1).tolist()
    assert two.labels.tolist() == one.labels.tolist() == [(y - 2) / 4 for y in range(7)]
    with pytest.raises(UserError, match="no example"):
        read_table(net, [])
