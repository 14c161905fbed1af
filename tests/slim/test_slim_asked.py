"""What is named before any training, and certificates of several sizes at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import slim_toy as toy
import torch

import families
from retouch.errors import BoundRefused, SettingsError, StoreError, UserError
from retouch.slim._asked import Exiting, check, needed_depth, planned, task_of
from retouch.slim._parts import part_key
from retouch.slim.api import _lengths, fit
from retouch.slim.base import Budget, Size
from retouch.slim.clock import between, block_seconds, spread
from retouch.slim.data import Example
from retouch.slim.linear import Linear
from retouch.slim.network import from_encoder
from retouch.slim.opening import Source
from retouch.slim.rules import Rule
from retouch.slim.table import Table

SIZE = Size(12, 768, 12, 3072, vocab=30522, positions=512, token_types=2, classes=2)


def task(**fields):
    return replace(toy.task(), **{"calib": toy.rows(120, 3), "test": toy.rows(40, 4)} | fields)


def source(labels=None):
    return Source(toy.model(), toy.tokenizer(), "tiny/bert", labels)


def drop(folder, **more):
    given = {"method": toy.method(), "ladder": (0.9, 0.75), "folder": folder} | more
    return fit(source(), task(), budget=Budget(max_drop=0.5), **given)


# ---------------------------------------------------------------- a task as it is


def test_a_task_has_its_classes_in_the_classifiers_order():
    given = task()
    assert task_of(source(("PARIS", "rome")), given, None, None, None, {}) is given
    with pytest.raises(UserError, match="in the order rome, paris, the task in the order paris, rome"):
        task_of(source(("ROME", "PARIS")), given, None, None, None, {})
    with pytest.raises(UserError, match="numbers to predict"):
        task_of(source(("ROME", "PARIS")), toy.regression(), None, None, None, {})
    rows = {"labels": ["paris", "rome"], "keep_overlap": True}
    named = [replace(e, label=("paris", "rome")[e.label]) for e in toy.rows(60, 1)]
    with pytest.raises(UserError, match="in the order rome, paris"):
        task_of(source(("rome", "paris")), named, None, None, None, rows)


def test_nothing_is_given_beside_a_task():
    with pytest.raises(UserError, match="calib, max_train cannot be given beside a Task"):
        fit(source(), task(), calib=[], max_train=3, budget=Budget("3/4"))


# ---------------------------------------------------------------- before the training


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (Exiting(rule="entropyy"), "Did you mean 'entropy'"),
        (Exiting(rule="delta"), "is for regression"),
        (Exiting(every=0), "every must be"),
        (Exiting(min_block=-1), "min_block must be"),
    ],
)
def test_a_wrong_rule_is_named_before_the_training(ask, says, tmp_path):
    with pytest.raises(UserError, match=says):
        fit(source(), task(), budget=Budget("3/4", 0.6), method=toy.method(), folder=tmp_path, exiting=ask)
    assert not list(tmp_path.iterdir())


def test_too_few_rows_are_said_before_the_training(tmp_path, caplog):
    with pytest.raises(BoundRefused, match=r"120 examples cannot show a limit of 0\.001 .* Nothing was trained"):
        fit(source(), task(), budget=Budget("3/4", max_harm=0.001), folder=tmp_path, keep_refused=False)
    assert not list(tmp_path.iterdir())
    check(task(), Budget("3/4", max_harm=0.001), Exiting())
    assert "120 examples cannot show" in caplog.text
    check(task(), Budget("3/4", max_harm=0.001), Exiting(reference="full_depth"), keep_refused=False)


def test_a_constraint_without_a_limit_is_named_before_the_training(tmp_path):
    with pytest.raises(SettingsError, match="max_harm"):
        fit(source(), task(), budget=Budget("3/4"), method=toy.method(constrained=True), folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_place_where_no_stage_can_be_kept_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("retouch.slim._run.train", lambda *_: pytest.fail("it trained"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match="cannot be written"):
        fit(source(), task(), budget=Budget("3/4"), method=toy.method(), folder=tmp_path / "file")


def test_a_plan_counts_on_the_exits_that_are_asked():
    budget, late = Budget(flops=0.4), Exiting(min_block=8)
    assert planned(SIZE, budget, [30], None, Exiting(), toy.method(), {}).mean_depth < 9
    found = planned(SIZE, budget, [30], None, late, toy.method(), {})
    assert found.mean_depth >= 9
    assert found.widths.exits == tuple(range(12))


def test_the_preset_paper_takes_published_widths():
    budget = Budget("1/8", "1/19")
    found = planned(SIZE, budget, [128], None, Exiting(), toy.method(preset="paper"), {})
    assert (found.widths.heads[0], found.widths.d_ff[0], found.widths.rank) == (2, 256, 128)
    assert found.mean_depth == pytest.approx(5.5, abs=0.1)
    other = planned(SIZE, budget, [128], None, Exiting(), toy.method(preset="paper"), {"heads": 3, "rank": None})
    assert other.widths.heads[0] == 3
    assert planned(SIZE, budget, [128], None, Exiting(), toy.method(), {}).params_ratio <= 1 / 8


# ---------------------------------------------------------------- the smallest model


def test_certificates_of_several_sizes_hold_together(tmp_path):
    found = drop(tmp_path)
    assert found.passed
    alone = fit(
        source(), task(), budget=Budget(0.75, max_harm=0.5), method=toy.method(), folder=tmp_path,
        exiting=Exiting(delta=0.05),
    )  # fmt: skip
    assert found.plan == alone.plan
    assert found.threshold.certificate.upper == alone.threshold.certificate.upper
    assert alone.threshold.certificate.confidence == 0.95
    assert found.threshold.certificate.confidence == 0.9


def test_fixed_widths_hold_on_every_rung(tmp_path):
    found = drop(tmp_path, widths={"heads": 3}, ladder=(0.9,))
    assert found.plan.widths.heads == (3, 3)


def test_a_drop_is_certified_against_the_original_and_with_confidence(tmp_path):
    with pytest.raises(SettingsError, match="reference must be 'original' with max_drop"):
        drop(tmp_path, exiting=Exiting(reference="full_depth"))
    with pytest.raises(SettingsError, match="how must be 'ucb' or 'ltt' with max_drop"):
        drop(tmp_path, exiting=Exiting(how="crc", loss="worse"))
    with pytest.raises(UserError, match="ladder of shares is empty"):
        drop(tmp_path, ladder=())
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- keys and clocks


def test_what_turns_texts_into_input_is_part_of_a_bench_key():
    def key(tokenizer):
        return part_key(replace(source(), tokenizer=tokenizer), task(), Linear(), Budget("1/2"), Exiting())

    assert key(toy.tokenizer()) == key(toy.tokenizer())
    assert key(toy.tokenizer()) != key(families.tokenizer("word"))


def test_seconds_are_read_off_between_short_and_long_texts():
    lengths = np.array([*range(3, 103)])
    batches = spread(lengths)
    assert [len(rows) for rows in batches] == [32] * 5
    assert min(batches[0]) == 0 and max(batches[-1]) == 99
    assert len(spread([4] * 50)) == 1
    assert spread([9, 7]) == [[1, 0]]
    at = [float(lengths[rows].mean()) for rows in batches]
    read = between(lengths, at, [[m, 2 * m] for m in at])
    inner = (lengths >= at[0]) & (lengths <= at[-1])
    assert np.allclose(read[inner], np.stack([lengths, 2 * lengths], 1)[inner])


def test_only_exits_that_are_asked_take_time(monkeypatch):
    network, asked = from_encoder(toy.model(), toy.task().labels).eval(), []
    read = network.read_exit
    monkeypatch.setattr(network, "read_exit", lambda block, *more: asked.append(block) or read(block, *more))
    batch = {"input_ids": torch.tensor([[2, 4, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    block_seconds(network, batch, n_repeats=1, asked=Rule(every=2).due(network.widths.exits))
    assert {*asked} == {1}
    block_seconds(network, batch, n_repeats=1)
    assert {*asked} == {0, 1}


def test_the_plan_reads_lengths_from_all_of_the_training_rows():
    """Rows may be sorted: of 1,500 the first thousand say nothing of the others."""
    rows = [Example("the", None, 0)] * 1000 + [Example("the capital of france", None, 1)] * 500
    found = _lengths(source(), task(train=tuple(rows)), toy.method())
    assert len(found) == 750
    assert np.mean(found) == pytest.approx(4, abs=0.01)  # 3 and 6 tokens, special ones included


# ---------------------------------------------------------------- how deep texts must run


def says(right, sure):
    """Three exits of two classes on rows of class 0: which are right, and how far apart their logits are."""
    logits = np.zeros((3, len(right[0]), 2))
    logits[..., 0] = np.where(right, 1, -1) * np.asarray(sure)[:, None] / 2
    logits[..., 1] = -logits[..., 0]
    return Table(logits, (0, 1, 2), np.zeros(len(right[0]), dtype=int), np.full(len(right[0]), 8))


def test_depth_is_what_the_exits_need():
    every, none = [True] * 100, [False] * 100
    assert needed_depth(says([every] * 3, [1, 2, 3]), Rule(), "accuracy") == 1
    assert needed_depth(says([none, none, every], [1, 2, 3]), Rule(), "accuracy") == 3
    assert needed_depth(says([none, every, every], [1, 2, 3]), Rule(), "accuracy") == 2
    one = [False, *every[1:]]  # one in a hundred may be lost, two may not
    assert needed_depth(says([one, every, every], [1, 2, 3]), Rule(), "accuracy") == 1
    assert needed_depth(says([[False, *one[1:-1], False], every, every], [1, 2, 3]), Rule(), "accuracy") == 2
    assert needed_depth(says([none] * 3, [1, 2, 3]), Rule(), "accuracy") == 3


def planned_for(folder, **settings):
    told = []
    original = Source(toy.model(3), toy.tokenizer(), "tiny/bert", None)
    made = fit(
        original,
        task(),
        budget=Budget("3/4", 0.12),
        method=toy.method(**settings),
        folder=folder,
        told=lambda plan, _: told.append(plan),
    )
    return made, told


def test_weak_exits_make_the_plan_deeper_and_are_told(tmp_path, monkeypatch):
    as_planned, told = planned_for(tmp_path)  # the first exit can do this task
    assert as_planned.classifier.network.widths == told[0].widths and len(told) == 1
    monkeypatch.setattr("retouch.slim.api.needed_depth", lambda table, rule, metric: 1.5)
    made, told = planned_for(tmp_path)
    assert made.plan.mean_depth == told[1].mean_depth >= 1.5 > told[0].mean_depth
    assert made.plan.widths == made.classifier.network.widths == told[1].widths != told[0].widths
    kept, told = planned_for(tmp_path, depth="plan")
    assert kept.classifier.network.widths == told[0].widths and len(told) == 1
