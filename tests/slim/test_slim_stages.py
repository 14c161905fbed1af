"""What the stages do: they learn, cut to the plan, repeat bit for bit, and do what their switches say."""

from __future__ import annotations

import copy
import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import slim_toy as toy
import torch

import families
from retouch import registry
from retouch.errors import RetouchError, SettingsError, UserError
from retouch.progress import listen
from retouch.slim import _run, teaching
from retouch.slim.base import Widths
from retouch.slim.costeff import CostEff
from retouch.slim.cutting import Scoring
from retouch.slim.encoded import endless
from retouch.slim.losses import hidden_loss
from retouch.slim.network import from_classifier, from_encoder
from retouch.slim.presets import Stage, stages
from retouch.slim.stages import Run, fit
from retouch.slim.teaching import (
    Lesson,
    Teacher,
    answers,
    hidden_bytes,
    hidden_states,
    inputs_of,
    numbered,
    qualities,
)
from retouch.slim.widths import parameters

WORDS = toy.tokenizer()


def bits(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fitted(folder, task=None, plan=None, model=None, **settings):
    task, plan = task or toy.task(), plan or toy.plan()
    return fit(task, model or toy.model(), WORDS, plan, toy.method(**settings), folder)


def run(folder, method=None, task=None, plan=None, model=None):
    return Run(task or toy.task(), model or toy.model(), WORDS, plan or toy.plan(), method or toy.method(), folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A short run, its folder and its outcome."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fitted(folder)


# ---------------------------------------------------------------- a whole run


def test_costeff_is_found_by_its_file_name():
    assert registry.load("slim", "costeff") is CostEff
    assert "Shen" in registry.find("slim", "costeff").source


def test_every_stage_runs_in_order(whole):
    names = [record["stage"] for record in whole[1].history]
    assert names == ["finetune", "assistant", "slenderise", "recover_hidden", "recover"]


def test_the_slim_network_has_the_parameters_of_the_plan(whole):
    plan = toy.plan()
    network = whole[1].network
    assert network.widths == plan.widths
    assert sum(p.numel() for p in network.parameters()) == parameters(plan.size, plan.widths)
    assert len(network.config.kept_heads[0]) == 2
    assert max(network.config.kept_neurons[0]) < 64


def test_the_assistant_is_full_size_with_all_exits_and_the_original_has_one(whole):
    plan = toy.plan()
    assert whole[1].assistant.widths == Widths.full(plan.size)
    assert whole[1].original.widths == Widths.full(plan.size, [1])
    assert not whole[1].network.training


def test_cuts_are_recorded_where_they_happened(whole):
    cuts = whole[1].history[2]["cuts"]
    assert [(c["heads"], c["rank"]) for c in cuts] == [([3, 3], 22), ([2, 2], 12)]
    assert cuts[-1]["step"] == whole[1].history[2]["n_steps"]


def test_the_same_seed_gives_the_same_bits_and_another_one_others(whole, tmp_path):
    again = fitted(tmp_path / "again", save_every=0)
    assert same(bits(again.network), bits(whole[1].network))
    assert same(bits(again.assistant), bits(whole[1].assistant))
    other = run(tmp_path / "other", toy.method(seed=1, save_every=0)).original()
    assert not same(bits(other.network), bits(again.original))


def test_the_callers_generator_and_model_are_left_alone(tmp_path):
    model = toy.model()
    before, digest = torch.get_rng_state(), model.fingerprint
    fitted(tmp_path, model=model, length_factor=0.0002)
    assert torch.equal(torch.get_rng_state(), before)
    assert replace(model, known_digests={}).fingerprint == digest


def test_no_pickle_lies_in_any_folder_and_no_partial_state_is_left(whole):
    names = [path.name for path in whole[0].rglob("*") if path.is_file()]
    assert {Path(name).suffix for name in names} == {".safetensors", ".json"}
    assert not [path for path in whole[0].iterdir() if path.name.endswith("-partial")]


def test_progress_counts_the_steps_of_each_stage(tmp_path):
    heard = []
    with listen(lambda what, done, total: heard.append((what, done, total))):
        record = run(tmp_path, toy.method(length_factor=0.0005)).original().record
    mine = [(done, total) for what, done, total in heard if what == "Training: finetune"]
    assert mine == [(step, record["n_steps"]) for step in range(record["n_steps"] + 1)]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """An original that has learnt the task."""
    ready = run(tmp_path_factory.mktemp("learnt"), toy.method(rate_factor=100, length_factor=0.015, save_every=0))
    return ready, ready.original()


def test_fine_tuning_learns(learnt):
    ready, original = learnt
    curve = [loss for _, loss in original.record["curve"]]
    assert sum(curve[-3:]) < 0.7 * sum(curve[:3])
    assert original.record["best"] > 0.9
    assert ready.qualities(original.network) == {1: original.record["best"]}


def test_the_best_state_is_kept_and_not_the_last(learnt):
    checks = learnt[1].record["checks"]
    best = max(checks, key=lambda check: (check["mean"], -check["step"]))
    assert learnt[1].record["best_step"] == best["step"]


def test_recovery_comes_closer_to_the_teacher(learnt):
    ready, original = learnt
    begin = ready.exited(original)
    widths = replace(toy.plan().widths, rank=None)
    stage = replace(ready.stages.slenderise, answers="final", learning_rate=1e-4)
    cut = ready.slenderised(begin, original, Scoring(how="random", n_cuts=1), stage, widths)
    stage = replace(ready.stages.recover_hidden, learning_rate=5e-3)
    after = ready.recovered(cut, original, stage)
    batch = inputs_of(numbered(ready.encoded("valid"), range(32), torch.device("cpu")))
    with torch.no_grad():
        taught = original.network.levels(**batch).hidden
        far, near = (
            float(hidden_loss(one.network.levels(**batch).hidden, taught, batch["attention_mask"], stage.levels(2)))
            for one in (cut, after)
        )
    assert near < 0.9 * far


# ---------------------------------------------------------------- what may be given


def test_a_classifier_is_not_fine_tuned_again(tmp_path):
    import transformers

    config = toy.model().network.config
    torch.manual_seed(0)
    given = from_classifier(transformers.BertForSequenceClassification(config).eval())
    found = fitted(tmp_path, model=given, length_factor=0.0003)
    assert found.history[0]["stage"] == "assistant"
    assert same(bits(found.original), bits(given))
    assert found.network.pooler is None


def test_a_regression_learns_in_standardised_units(tmp_path):
    task = toy.regression()
    method = toy.method(rate_factor=100, length_factor=0.01, save_every=0)
    ready = run(tmp_path, method, task, toy.plan(classes=1))
    original = ready.original()
    assert original.network.config.target_mean == pytest.approx(sum(e.label for e in task.train) / len(task.train))
    assert original.record["best"] > 0.5
    spread = answers(ready.accelerator, original.network, ready.encoded("train"))[1]
    assert abs(float(spread.mean())) < 0.5
    slim = method.fit(run(tmp_path, toy.method(length_factor=0.0005), task, toy.plan(classes=1))).network
    assert slim.config.task == "regression"
    assert slim.config.target_scale == original.network.config.target_scale


def regressor():
    """A classifier of one number, far from 0."""
    import transformers

    config = copy.deepcopy(toy.model().network.config)
    config.num_labels = 1
    torch.manual_seed(0)
    given = transformers.BertForSequenceClassification(config).eval()
    given.classifier.bias.data.fill_(46.0)
    return from_classifier(given)


def test_a_given_regression_keeps_its_answers_in_standardised_units(tmp_path):
    task, given = toy.regression(), regressor()
    ready = run(tmp_path, task=task, plan=toy.plan(classes=1), model=given)
    original = ready.original()
    y = [e.label for e in task.train]
    assert original.network.config.target_mean == pytest.approx(sum(y) / len(y))
    batch = {"input_ids": torch.tensor([[2, 5, 16, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert torch.allclose(original.network(**batch).logits, given(**batch).logits, atol=1e-4)
    assert float(original.network.levels(**batch).logits[1].detach().abs()) < 3  # and not 46
    assert original.key != ready.model_key
    assert original.network.exits["1"].bias.item() != given.exits["1"].bias.item()


def test_a_classifier_pools_as_it_was_trained(tmp_path):
    plan = toy.plan(classes=1)
    more = {"task": toy.regression(), "plan": plan, "model": regressor()}
    assert run(tmp_path, toy.method(pooling="first"), **more).pooling == "first"
    with pytest.raises(SettingsError, match="pools 'first', as it was trained"):
        run(tmp_path, toy.method(pooling="mean"), **more)


def test_a_process_trains_in_one_precision(tmp_path):
    run(tmp_path)
    with pytest.raises(SettingsError, match="bfloat16, and this process has begun to train in float32"):
        run(tmp_path, toy.method(precision="bfloat16"))


def test_exits_where_the_plan_has_them(tmp_path):
    plan = toy.plan(n_blocks=3, exits=[0])
    found = fitted(tmp_path, plan=plan, model=toy.model(3), length_factor=0.0003, n_cuts=1, save_every=0)
    assert found.network.widths.exits == found.assistant.widths.exits == (0, 2)


def test_a_task_of_one_class_is_refused_before_any_work(tmp_path):
    task = toy.task()
    one = replace(task, train=tuple(replace(e, label=1) for e in task.train))
    with pytest.raises(UserError, match="'toy' have the label 'rome'"):
        run(tmp_path, task=one)
    assert not list(tmp_path.iterdir())


def test_a_plan_for_other_classes_is_refused(tmp_path):
    with pytest.raises(UserError, match="plan is for 3 classes; task 'toy' has 2"):
        run(tmp_path, plan=toy.plan(classes=3))


def test_a_task_without_validation_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="no validation rows"):
        run(tmp_path, task=replace(toy.task(), valid=()))


def test_divergence_says_where_and_what_to_do(tmp_path):
    with pytest.raises(RetouchError, match=r"'finetune' diverged at step \d+ of \d+.*learning rate .*rate_factor"):
        fitted(tmp_path, rate_factor=1e40, length_factor=0.01, clip=1e30)
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith("-partial")]


# ---------------------------------------------------------------- reuse


def test_a_new_width_reuses_the_stages_before_it(whole):
    folder, first = whole
    trained = []
    with listen(lambda what, done, total: trained.append(what.removeprefix("Training: ")) if "Training" in what else 0):
        second = fitted(folder, plan=toy.plan(heads=1, d_ff=16, rank=8))
    assert set(trained) == {"slenderise", "recover_hidden", "recover"}
    assert same(bits(first.assistant), bits(second.assistant))
    assert second.history[:2] == first.history[:2]


def test_a_finished_run_trains_nothing(whole):
    folder, first = whole
    trained = []
    with listen(lambda what, done, total: trained.append(what) if "Training" in what else None):
        second = fitted(folder)
    assert not trained
    assert same(bits(first.network), bits(second.network))
    assert second.network.config.to_dict() == first.network.config.to_dict()
    assert second.original.config.to_dict() == first.original.config.to_dict()
    assert second.history == first.history


def test_each_input_makes_another_key(tmp_path):
    ready = run(tmp_path)
    work = [
        ready.seed("a") != ready.seed("b"),
        run(tmp_path, toy.method(seed=1)).seed("a") != ready.seed("a"),
        run(tmp_path, task=toy.task(95)).data_key != ready.data_key,
        run(tmp_path, task=replace(toy.task(), metric="mcc")).data_key != ready.data_key,
        run(tmp_path, model=toy.model(3), plan=toy.plan(3)).model_key != ready.model_key,
        run(tmp_path, toy.method(pooling="mean")).model_key != ready.model_key,
    ]
    assert work == [True] * 6


def test_the_pooling_that_a_folder_says_is_part_of_the_key(tmp_path):
    network = toy.model().network
    keys = {}
    for name, says in (("first", "{}"), ("mean", '{"pooling_mode_mean_tokens": true}')):
        network.save_pretrained(tmp_path / name)
        (tmp_path / name / "1_Pooling").mkdir()
        (tmp_path / name / "1_Pooling" / "config.json").write_text(says)
        opened = toy.model(network=type(network).from_pretrained(tmp_path / name))
        ready = run(tmp_path / "work", model=opened)
        assert ready.pooling == name
        keys[name] = ready.model_key
    assert keys["first"] != keys["mean"]
    assert keys["first"] == run(tmp_path / "work", toy.method(pooling="first"), model=opened).model_key


# ---------------------------------------------------------------- switches


def altered(preset="fast", **switches):
    return CostEff(**switches).altered(stages(preset, "mrpc", 3668, 0.2))


def test_switches_change_the_stages_that_they_name():
    usual = altered()
    assert [usual.slenderise.answers, usual.recover.answers] == ["exits", "exits"]
    assert [altered(assistant=False).slenderise.answers, altered(assistant=False).recover.answers] == ["final"] * 2
    assert altered(exit_loss=False).recover.answers == "labels"
    assert altered(exit_loss=False, assistant=False).slenderise.answers == "labels"
    bare = altered("paper", hidden_loss=False)
    assert not any(s.hidden for s in (bare.assistant_hidden, bare.slenderise, bare.recover_hidden, bare.recover))
    assert (bare.assistant_hidden.answers, bare.recover_hidden.answers) == ("assistant", "exits")
    assert CostEff(n_cuts=1, score="random", widths="global", weighted_embedding=False).scoring() == Scoring(
        "random", "exits_ce", "global", False, 1
    )


def test_without_an_assistant_the_original_teaches(tmp_path):
    found = fitted(tmp_path, assistant=False, length_factor=0.0003, save_every=0)
    assert found.assistant is None
    assert [r["stage"] for r in found.history] == ["finetune", "slenderise", "recover_hidden", "recover"]
    assert found.network.widths == toy.plan().widths


def test_one_shot_cuts_once(tmp_path):
    found = fitted(tmp_path, n_cuts=1, exit_loss=False, equilibrium=False, length_factor=0.0002)
    assert [c["heads"] for c in found.history[2]["cuts"]] == [[2, 2]]


def test_global_widths_stay_within_the_plan(tmp_path):
    plan = toy.plan(d_ff=32)
    network = fitted(tmp_path, plan=plan, widths="global", length_factor=0.0002, n_cuts=1, save_every=0).network
    assert sum(p.numel() for p in network.parameters()) <= parameters(plan.size, plan.widths)


def test_the_paper_preset_warms_its_assistant_from_the_raw_encoder(tmp_path):
    found = fitted(tmp_path, task=toy.task(24), preset="paper", length_factor=0.05, n_cuts=0)
    names = [record["stage"] for record in found.history]
    assert names == ["finetune", "assistant_hidden", "assistant", "slenderise", "recover_hidden", "recover"]
    assert len(found.history[3]["cuts"]) == 2  # one a head


def lesson(student, stage, teacher, **more):
    return Lesson(student.eval(), stage, teacher, **more)


@pytest.fixture(scope="module")
def class_():
    """A student of two exits, a teacher, and a batch."""
    model = toy.model()
    torch.manual_seed(3)
    student = from_encoder(model, ["paris", "rome"], pooler=None).eval()
    teacher = from_encoder(model, ["paris", "rome"], pooler=None).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ready = run(None)
    encoded = ready.encoded("train")
    logits = answers(ready.accelerator, teacher, encoded)
    return student, Teacher(teacher, logits), numbered(encoded, [3, 1, 8, 20], torch.device("cpu"))


@torch.no_grad()
def test_each_kind_of_answers_is_its_own_loss(class_):
    student, teacher, batch = class_
    z = student.levels(**inputs_of(batch)).logits
    taught = {block: logits[batch["index"]] for block, logits in teacher.logits.items()}

    def soft(own, other):
        return -(other.softmax(-1) * own.log_softmax(-1)).sum(-1).mean()

    hard = sum(torch.nn.functional.cross_entropy(z[b], batch["labels"]) for b in z)
    final = sum(soft(z[b], taught[1]) for b in z)
    expected = {
        "labels": hard,
        "exits": sum(soft(z[b], taught[b]) for b in z),
        "final": final,
        "assistant": (hard + final) / 2,
    }
    for how, value in expected.items():
        loss, harm = lesson(student, Stage("s", 1.0, epochs=1, answers=how), teacher)(batch, False, 0.0)
        assert float(loss) == pytest.approx(float(value), rel=1e-5), how
        assert float(harm) == 0.0


@torch.no_grad()
def test_hidden_only_steps_charge_no_answers(class_):
    student, teacher, batch = class_
    both = lesson(student, Stage("s", 1.0, epochs=1, hidden=True, answers="exits"), teacher)
    alone = lesson(student, Stage("s", 1.0, epochs=1, hidden=True), teacher)
    answers_only = lesson(student, Stage("s", 1.0, epochs=1, answers="exits"), teacher)
    hidden = float(alone(batch, False, 0.0)[0])
    assert hidden > 0
    assert float(both(batch, True, 0.0)[0]) == pytest.approx(hidden)
    assert float(both(batch, False, 0.0)[0]) == pytest.approx(hidden + float(answers_only(batch, False, 0.0)[0]))


@torch.no_grad()
@pytest.mark.parametrize("every_block", [True, False])
def test_hidden_states_that_are_kept_give_the_loss_of_those_computed_again(class_, every_block):
    student, teacher, batch = class_
    ready, stage = run(None), Stage("s", 1.0, epochs=1, hidden=True, every_block=every_block)
    encoded, levels = ready.encoded("train"), stage.levels(student.size.blocks)
    kept = hidden_states(ready.accelerator, teacher.network, encoded, levels, batch_size=3)
    again = float(lesson(student, stage, teacher)(batch, False, 0.0)[0])
    without_network = Teacher(None, {}, hidden=kept)
    assert again > 0
    assert float(lesson(student, stage, without_network)(batch, False, 0.0)[0]) == pytest.approx(again, rel=2e-3)
    assert kept.states.nbytes == hidden_bytes(student.size, encoded, levels)


def test_hidden_states_are_kept_once_for_all_stages_where_they_fit(tmp_path, monkeypatch):
    asked = []
    real = teaching.hidden_states
    monkeypatch.setattr(_run, "hidden_states", lambda *a, **k: asked.append(a[3]) or real(*a, **k))
    kept = fitted(tmp_path / "kept")
    assert len(asked) == 1  # slenderise, recover_hidden and recover share the assistant's
    again = fitted(tmp_path / "again", hidden_mib=0)
    assert len(asked) == 1
    one, other = (f.history[-1]["curve"][-1][1] for f in (kept, again))
    assert one == pytest.approx(other, rel=0.05)
    assert kept.key != again.key  # their last bits differ


def test_equilibrium_changes_gradients_and_not_the_loss(class_):
    student, teacher, batch = class_
    found = []
    for equilibrium in (True, False):
        student.zero_grad()
        loss, _ = lesson(student, Stage("s", 1.0, epochs=1, answers="exits"), teacher, equilibrium=equilibrium)(
            batch, False, 0.0
        )
        loss.backward()
        found.append((float(loss.detach()), student.parts(0).up.weight.grad.clone()))
    assert found[0][0] == found[1][0]
    assert torch.allclose(found[1][1], 2 * found[0][1], rtol=1e-4, atol=1e-9)  # two exits above block 0


@torch.no_grad()
def test_the_price_adds_the_labels_loss_and_harm_is_measured_against_the_original(class_):
    student, teacher, batch = class_
    stage = Stage("s", 1.0, epochs=1, answers="exits")
    watching = Teacher(None, teacher.logits, teacher.logits[1])
    free, harm = lesson(student, stage, watching, watched=(1,))(batch, False, 0.0)
    priced, _ = lesson(student, stage, watching, watched=(1,))(batch, False, 2.0)
    hard = lesson(student, Stage("s", 1.0, epochs=1, answers="labels"), teacher)(batch, False, 0.0)[0]
    z = student.levels(**inputs_of(batch)).logits[1]
    entropy = torch.nn.functional.cross_entropy
    mine, other = entropy(z, batch["labels"]), entropy(teacher.logits[1][batch["index"]], batch["labels"])
    assert float(harm) == pytest.approx(float(mine - other), abs=1e-6)
    assert float(priced - free) == pytest.approx(2 * float(hard), rel=1e-5)


def test_a_constraint_needs_its_limit(tmp_path):
    with pytest.raises(SettingsError, match="max_harm"):
        fitted(tmp_path, constrained=True, length_factor=0.0002)


def test_the_constraint_reaches_the_last_stage_only(whole):
    folder, free = whole
    method = toy.method(constrained=True)
    bound = fit(toy.task(), toy.model(), WORDS, toy.plan(), method, folder, max_harm=-9.0)  # always exceeded
    assert bound.history[:4] == free.history[:4]
    assert bound.history[4]["curve"][-1][1] > 2 * free.history[4]["curve"][-1][1]


def test_only_exits_train_where_the_rest_is_frozen(whole, tmp_path):
    ready = run(whole[0])
    original = ready.original()
    plugged = ready.exited(original)
    after = ready.recovered(plugged, original, Stage("plugged", 1e-2, epochs=1, answers="assistant", only_exits=True))
    before, now = bits(plugged.network), bits(after.network)
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], now[name])}
    assert changed == {"exits"}
    assert all(parameter.requires_grad for parameter in after.network.parameters())


def test_static_rival_has_one_exit_and_the_same_widths(whole):
    ready = run(whole[0])
    original = ready.original()
    slim = ready.slenderised(ready.exited(original, []), original, Scoring(), ready.stages.slenderise)
    assert slim.network.widths == replace(toy.plan().widths, exits=(1,))


def test_a_batch_in_parts_is_the_same_batch(tmp_path):
    """Without dropout the parts' gradients add up to the whole batch's."""
    found = []
    for n_parts in (1, 3):
        ready = run(tmp_path, toy.method(n_parts=n_parts, length_factor=0.001), model=still())
        found.append(
            bits(ready.recovered(ready.original(), None, Stage("more", 1e-3, epochs=1, answers="labels")).network)
        )
    assert not same(*found)
    for name in found[0].keys() - {f"body.encoder.layer.{b}.attention.self.key.bias" for b in (0, 1)}:  # no gradient
        assert torch.allclose(found[0][name], found[1][name], atol=2e-4), name


def still():
    """A classifier without any dropout."""
    network = families.build(
        "bert", headless=True, vocab_size=toy.VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(5)
    made = from_encoder(toy.model(network=network), ["paris", "rome"], exits=[1], pooler=None)
    made.config.exit_dropout = made.dropout.p = 0.0
    return made.eval()


def test_qualities_are_of_each_exit():
    logits = {0: torch.tensor([[2.0, 1.0], [0.0, 1.0]]), 1: torch.tensor([[0.0, 1.0], [0.0, 1.0]])}
    assert qualities(logits, [0, 1], "accuracy") == {0: 1.0, 1: 0.5}


# ---------------------------------------------------------------- two processes


SCRIPT = """
import json, sys
sys.path[:0] = [{tests!r}, {slim!r}]
import torch
torch.set_num_threads(1)
import test_slim_stages as t
found = t.fitted({folder!r}, model=t.still(), length_factor=0.001)
accelerator = t.run({folder!r}, model=t.still()).accelerator
assert accelerator.num_processes == 2
if accelerator.is_main_process:
    config = found.network.config
    json.dump([config.kept_heads, config.kept_neurons], open({folder!r} + ".json", "w"))
"""


@pytest.mark.slow
def test_two_processes_keep_the_same_units_as_one(tmp_path):
    alone = fitted(tmp_path / "alone", model=still(), length_factor=0.001)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    script = SCRIPT.format(tests=str(here.parent), slim=str(here), folder=str(tmp_path / "two"))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [child.wait(timeout=280) for child in children] == [0, 0]
    kept = json.loads((tmp_path / "two.json").read_text())
    assert kept == [alone.network.config.kept_heads, alone.network.config.kept_neurons]


# ---------------------------------------------------------------- what a teacher is asked


def test_a_teacher_is_asked_about_the_rows_of_a_stage_and_no_others(tmp_path):
    ready = run(tmp_path)
    original, encoded = ready.original(), ready.encoded("train")
    whole, seed = ready.answers(original)[1], ready.seed("assistant")
    few = ready.answers(original, 3, seed)[1]
    visited = sorted(row for batch in itertools.islice(endless(encoded, 8, seed), 3) for row in batch)
    assert len(visited) == 24
    assert torch.allclose(few[visited], whole[visited], rtol=0, atol=1e-6)
    assert (whole != 0).all()
    assert not few[[row for row in range(len(encoded)) if row not in visited]].any()
    assert torch.equal(ready.answers(original, 1000, seed)[1], whole)  # more than one pass: all of them
