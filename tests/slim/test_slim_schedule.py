"""Presets as published, and the arithmetic of steps, cycles, cuts and rates."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retouch.errors import SettingsError, UnknownName, UserError
from retouch.slim import presets, schedule
from retouch.slim.base import Size, Widths
from retouch.slim.presets import Stage
from retouch.slim.widths import parameters

BERT = Size(12, 768, 12, 3072, 30522, 512, 2, 2)
MINILM = Size(6, 384, 12, 1536, 30522, 512, 2, 2)


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize(
    "task, n_train, kept, epochs",
    [
        ("mrpc", 3668, 2 / 12, (12, 4, 12, 20, 20, 10)),
        ("sst2", 67349, 2 / 12, (5, 1, 5, 5, 10, 6)),
        ("mnli", 392702, 4 / 12, (3, 1, 3, 3, 4, 2)),
        ("cola", 8551, 6 / 12, (8, 2, 8, 12, 10, 5)),
        ("rte", 2490, 2 / 12, (12, 4, 12, 20, 20, 10)),
    ],
)
def test_paper_epochs_are_the_published_ones(task, n_train, kept, epochs):
    s = presets.stages("paper", task, n_train, kept)
    rows = (s.finetune, s.assistant_hidden, s.assistant, s.slenderise, s.recover_hidden, s.recover)
    assert tuple(row.epochs for row in rows) == epochs


def test_paper_rates_follow_the_batch():
    small, large = (presets.stages("paper", "sst2", 67349, 2 / 12, size) for size in (32, 64))
    assert [s.learning_rate for s in (small.finetune, small.slenderise, small.recover_hidden)] == [2e-5, 1e-5, 3e-5]
    assert [s.learning_rate for s in (large.finetune, large.slenderise, large.recover_hidden)] == [3e-5, 1e-5, 4e-5]
    assert (small.slenderise.growth, large.slenderise.growth) == (1.12, 1.15)


def test_paper_compares_hidden_states_longer_on_large_sets():
    assert presets.stages("paper", "mrpc", 3668, 0.2).slenderise.hidden_share == 0.5
    assert presets.stages("paper", "qqp", 363846, 0.2).slenderise.hidden_share == 0.7


def test_fast_has_no_hidden_stage_before_the_assistant_and_five_cuts():
    fast = presets.stages("fast", "sst2-20k", 20_000, 0.2)
    assert fast.assistant_hidden is None
    assert fast.n_cuts == 5
    assert not fast.raw_assistant
    lengths = [s.tokens for s in (fast.finetune, fast.assistant, fast.slenderise, fast.recover_hidden, fast.recover)]
    assert lengths == [400_000, 300_000, 400_000, 200_000, 3_000_000]


def test_fast_looks_at_the_embedding_and_every_second_block_with_the_last():
    stage = presets.stages("fast", "sst2", 20_000, 0.2).recover
    assert stage.levels(6) == [0, 2, 4, 6]
    assert stage.levels(5) == [0, 1, 3, 5]
    assert presets.stages("paper", "sst2", 20_000, 0.2).recover.levels(6) is None


def test_states_are_chosen_by_validation_where_answers_are_learnt():
    s = presets.stages("paper", "mrpc", 3668, 0.2)
    chosen = {row.name: row.choose for row in (s.finetune, s.assistant_hidden, s.assistant, s.slenderise)}
    assert chosen == {"finetune": "best", "assistant_hidden": "last", "assistant": "best", "slenderise": "last"}
    assert (s.recover_hidden.choose, s.recover.choose) == ("last", "best")


def test_unknown_preset_is_named():
    with pytest.raises(UnknownName, match=r"No preset is called 'fats'. Did you mean 'fast'"):
        presets.stages("fats", "x", 10, 0.5)


def test_a_stage_needs_one_length_and_something_to_learn():
    with pytest.raises(UserError, match=r"'a'.*one of the two"):
        Stage("a", 1e-3, epochs=1, tokens=10, answers="labels")
    with pytest.raises(UserError, match=r"'b' has nothing to learn from"):
        Stage("b", 1e-3, epochs=1)


def test_training_settings_name_the_field():
    with pytest.raises(SettingsError, match="rate_factor"):
        presets.TrainingSettings(rate_factor=0)


# ---------------------------------------------------------------- steps and rates


def test_the_rate_rises_and_falls_in_straight_lines():
    rates = [schedule.learning_rate(step, 20, 1e-3, 4) for step in range(20)]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    falls = [a - b for a, b in itertools.pairwise(rates[4:])]
    assert falls == pytest.approx([1e-3 / 16] * 15)
    assert rates[-1] == pytest.approx(1e-3 / 16)


@given(n=st.integers(1, 300), warmup=st.integers(0, 300))
def test_no_step_has_a_rate_of_zero_or_above_the_peak(n, warmup):
    warmup = min(warmup, n - 1)
    rates = [schedule.learning_rate(step, n, 2.0, warmup) for step in range(n)]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert max(rates) == 2.0


def test_tokens_become_the_first_step_count_that_reaches_them():
    stage = Stage("s", 1e-3, tokens=100, answers="labels")
    assert schedule.steps(stage, itertools.cycle([30, 40]), 2) == 3
    assert schedule.steps(stage, itertools.cycle([100]), 2) == 1


def test_epochs_become_batches():
    assert schedule.steps(Stage("s", 1e-3, epochs=2.5, answers="labels"), iter(()), 7) == round(17.5)


def test_no_examples_is_an_error():
    with pytest.raises(UserError, match="no examples"):
        schedule.steps(Stage("s", 1e-3, epochs=1, answers="labels"), iter(()), 0)


def test_checks_are_spread_and_end_with_the_last_step():
    assert schedule.checks(100, 5) == (20, 40, 60, 80, 100)
    assert schedule.checks(3, 5) == (1, 2, 3)


# ---------------------------------------------------------------- cuts


def test_the_cuts_of_bert_follow_the_published_line():
    goal = Widths.uniform(BERT, 2, 256, 128)
    assert schedule.n_cuts(BERT, goal) == 10
    rows = [schedule.widths_after(BERT, goal, t, 10) for t in range(1, 11)]
    assert [w.heads[0] for w in rows] == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2]
    assert [w.d_ff[0] for w in rows] == [3072 - -(-2816 * t // 10) for t in range(1, 11)]
    assert [w.rank for w in rows] == [704, 640, 576, 512, 448, 384, 320, 256, 192, 128]
    assert rows[-1] == goal


def test_the_embedding_stays_whole_while_a_rank_does_not_pay():
    goal = Widths.uniform(Size(2, 32, 4, 64, 40, 16, 0, 2), 2, 32, 8)
    ranks = [schedule.widths_after(Size(2, 32, 4, 64, 40, 16, 0, 2), goal, t, 4).rank for t in (1, 2, 3, 4)]
    assert ranks == [None, None, 14, 8]  # 40 * 32 / 72 = 17.8


def test_five_cuts_round_the_heads_along_the_line():
    goal = Widths.uniform(MINILM, 2, 160, 40)
    heads = [schedule.widths_after(MINILM, goal, t, 5).heads[0] for t in range(1, 6)]
    assert heads == [10, 8, 6, 4, 2]


def test_the_number_of_cuts_without_heads_to_cut():
    assert schedule.n_cuts(MINILM, Widths.uniform(MINILM, 12, 160, 40)) == 4
    assert schedule.n_cuts(MINILM, Widths.full(MINILM), asked=5) == 0
    assert schedule.n_cuts(MINILM, Widths.uniform(MINILM, 2, 160, 40), asked=1) == 1


@given(
    heads=st.tuples(*[st.integers(1, 12)] * 6),
    d_ff=st.tuples(*[st.integers(1, 1536)] * 6),
    rank=st.none() | st.integers(1, 384),
    of=st.integers(1, 12),
)
def test_cuts_only_shrink_and_end_at_the_goal(heads, d_ff, rank, of):
    goal = Widths(heads, d_ff, rank, (5,))
    rows = [schedule.widths_after(MINILM, goal, t, of) for t in range(1, of + 1)]
    assert rows[-1] == goal
    for a, b in itertools.pairwise(rows):
        assert all(x >= y for x, y in zip(a.heads + a.d_ff, b.heads + b.d_ff, strict=True))
    if rank is None or rank < 379:  # below V d / (V + d)
        sizes = [parameters(MINILM, row) for row in rows]
        assert sizes == sorted(sizes, reverse=True)


def test_each_cut_ends_a_cycle_and_the_last_one_the_stage():
    stage = Stage("s", 1e-5, epochs=1, hidden=True, answers="exits", growth=1.12, hidden_share=0.7)
    goal = Widths.uniform(MINILM, 2, 160, 40)
    cuts = tuple(schedule.widths_after(MINILM, goal, t, 5) for t in range(1, 6))
    table = schedule.timetable(stage, 503, 5, cuts)
    assert table.n_steps == table.cycles[-1].end == 503
    assert [c.cut for c in table.cycles] == list(cuts)
    assert [c.first for c in table.cycles] == [0, *(c.end for c in table.cycles[:-1])]
    assert [c.peak for c in table.cycles] == pytest.approx([1e-5 * 1.12**t for t in range(5)])
    assert [c.n_hidden for c in table.cycles] == [int(0.7 * c.n_steps) for c in table.cycles]
    assert {c.n_warmup for c in table.cycles} == {11, 10} or all(c.n_warmup >= 10 for c in table.cycles)
    assert table.checks == ()


def test_a_stage_has_at_least_a_step_for_each_cut():
    stage = Stage("s", 1e-5, epochs=1, hidden=True)
    goal = Widths.uniform(MINILM, 2, 160, 40)
    cuts = tuple(schedule.widths_after(MINILM, goal, t, 5) for t in range(1, 6))
    assert [c.n_steps for c in schedule.timetable(stage, 2, 5, cuts).cycles] == [1] * 5
