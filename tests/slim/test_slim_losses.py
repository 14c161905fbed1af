"""The losses against loops and closed forms, and a Trainer that distils."""

import copy

import pytest
import torch
from slim_networks import batch, inputs, network
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from retouch.errors import UnknownName, UserError
from retouch.slim.losses import (
    SlimLoss,
    assistant_loss,
    exit_loss,
    hard_loss,
    hidden_loss,
    soft_cross_entropy,
    targets,
)

B, T, D, C = 3, 5, 4, 3
LENGTHS = (5, 2, 3)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(seed):
    return [normal(B, T, D, seed=seed + i) for i in range(3)]


def logits(seed, classes=C):
    return {block: normal(B, classes, seed=seed + block) for block in (0, 2)}


MASK = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
Y = torch.tensor([2, 0, 1])


# ---------------------------------------------------------------- hidden states


def test_the_hidden_loss_is_the_loop_over_real_tokens():
    student, teacher = levels(0), levels(10)
    wanted = 0.0
    for s, t in zip(student, teacher, strict=True):
        for b, n in enumerate(LENGTHS):
            tokens = [sum(float(s[b, i, j] - t[b, i, j]) ** 2 for j in range(D)) / D for i in range(n)]
            wanted += sum(tokens) / n / B
    assert float(hidden_loss(student, teacher, MASK)) == pytest.approx(wanted, rel=1e-14)


def test_padding_has_no_say_in_the_hidden_loss():
    student, teacher = levels(0), levels(10)
    padded = [torch.where(MASK[..., None] == 1, s, 1e3) for s in student]
    assert torch.equal(hidden_loss(student, teacher, MASK), hidden_loss(padded, teacher, MASK))
    wider = [functional.pad(s, (0, 0, 0, 7), value=5.0) for s in (*student, *teacher)]
    assert torch.allclose(
        hidden_loss(wider[:3], wider[3:], functional.pad(MASK, (0, 7))),
        hidden_loss(student, teacher, MASK),
        rtol=1e-14,
    )


def test_levels_of_the_hidden_loss_add_up():
    student, teacher = levels(0), levels(10)
    parts = [hidden_loss(student, teacher, MASK, [i]) for i in range(3)]
    assert torch.allclose(sum(parts), hidden_loss(student, teacher, MASK), rtol=1e-14)
    assert len({round(float(p), 9) for p in parts}) == 3


def test_a_teacher_of_another_depth_is_refused():
    with pytest.raises(UserError, match=r"student has 3 levels.*teacher 2"):
        hidden_loss(levels(0), levels(10)[:2], MASK)


# ---------------------------------------------------------------- answers


def test_soft_cross_entropy_is_that_of_torch_and_keeps_its_scale():
    z, q = normal(B, C), normal(B, C, seed=5)
    wanted = functional.cross_entropy(z, q.softmax(-1))
    assert torch.allclose(soft_cross_entropy(q.softmax(-1), z), wanted, rtol=1e-14)
    softer = functional.cross_entropy(z / 4, (q / 4).softmax(-1)) * 16
    assert torch.allclose(soft_cross_entropy((q / 4).softmax(-1), z, tau=4.0), softer, rtol=1e-14)


def test_soft_cross_entropy_bears_certain_answers():
    z = torch.tensor([[1e4, -1e4]], dtype=torch.float64, requires_grad=True)
    loss = soft_cross_entropy(torch.tensor([[1.0, 0.0]], dtype=torch.float64), z)
    loss.backward()
    assert loss.detach() == 0 and torch.isfinite(z.grad).all()


def test_hard_loss_is_a_sum_over_exits():
    z = logits(0)
    wanted = functional.cross_entropy(z[0], Y) + functional.cross_entropy(z[2], Y)
    assert torch.allclose(hard_loss(z, Y, "classification"), wanted, rtol=1e-14)


def test_a_regression_is_charged_squared_errors_at_all_exits():
    z, t, y = logits(0, classes=1), logits(10, classes=1), normal(B, seed=3)
    hard = sum(((z[block][:, 0] - y) ** 2).mean() for block in z)
    taught = sum(((z[block] - t[block]) ** 2).mean() for block in z)
    original = sum(((z[block] - t[2]) ** 2).mean() for block in z)
    assert torch.allclose(hard_loss(z, y, "regression"), hard, rtol=1e-14)
    assert torch.allclose(exit_loss(z, t, "regression"), taught, rtol=1e-14)
    assert torch.allclose(assistant_loss(z, t[2], y, "regression"), (original + hard) / 2, rtol=1e-14)


def test_exits_learn_from_the_exit_at_their_block():
    z, t = logits(0), logits(10) | {1: normal(B, C, seed=20)}
    wanted = sum(functional.cross_entropy(z[block], t[block].softmax(-1)) for block in z)
    assert torch.allclose(exit_loss(z, t, "classification"), wanted, rtol=1e-14)


def test_the_assistant_learns_half_from_the_original_and_half_from_the_labels():
    z, original = logits(0), normal(B, C, seed=9)
    soft = sum(functional.cross_entropy(z[block], original.softmax(-1)) for block in z)
    hard = sum(functional.cross_entropy(z[block], Y) for block in z)
    assert torch.allclose(assistant_loss(z, original, Y, "classification"), (soft + hard) / 2, rtol=1e-14)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_no_gradient_reaches_a_teacher_and_none_is_left_at_its_answers(task):
    t = {block: z.requires_grad_() for block, z in logits(0, classes=1 if task == "regression" else C).items()}
    z = {block: v.detach().clone().requires_grad_() for block, v in t.items()}
    exit_loss(z, t, task).backward()
    assert all(v.grad is None for v in t.values())
    assert all(float(v.grad.abs().max()) < 1e-15 for v in z.values())


def test_an_exit_without_a_teacher_and_an_unknown_task_are_named():
    with pytest.raises(UserError, match=r"no exit after block 2.*\[0\]"):
        exit_loss(logits(0), {0: logits(1)[0]}, "classification")
    with pytest.raises(UnknownName, match=r"regresion.*Did you mean 'regression'"):
        hard_loss(logits(0), Y, "regresion")


def test_targets_are_in_the_units_of_the_exits():
    config = network(task="regression", target_mean=3.0, target_scale=2.0).config
    assert targets(torch.tensor([[3.0], [7.0]]), config).tolist() == [0.0, 2.0]
    assert targets(Y, network().config).tolist() == Y.tolist()


# ---------------------------------------------------------------- under a Trainer


def still(**fields):
    return network(exit_dropout=0.0, **fields)


def quiet(net):
    """Train mode without dropout, so that numbers can be compared."""
    net.train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return net


def test_slim_loss_is_the_hidden_loss_and_the_exits_of_the_batch_just_seen():
    student, teacher, rows = quiet(still(seed=0)), still(seed=5), batch(7, 2, 4)
    with SlimLoss(teacher, student, hard=0.5) as loss:
        got = loss(student(**inputs(rows)), rows["labels"])
    seen, taught = student.levels(**inputs(rows)), teacher.levels(**inputs(rows))
    wanted = hidden_loss(seen.hidden, taught.hidden, rows["attention_mask"])
    wanted = wanted + exit_loss(seen.logits, taught.logits, "classification")
    wanted = wanted + 0.5 * hard_loss(seen.logits, rows["labels"], "classification")
    assert torch.allclose(got, wanted, rtol=1e-13)
    assert student(**inputs(rows)).hidden_states is None  # the hook is off


def test_parts_of_slim_loss_can_be_left_out():
    student, teacher, rows = quiet(still(seed=0)), still(seed=5), batch(7, 2, 4)
    parts = []
    for fields in ({"exits": False}, {"hidden": False}, {}):
        with SlimLoss(teacher, student, **fields) as loss:
            parts.append(loss(student(**inputs(rows)), None))
    assert torch.allclose(parts[0] + parts[1], parts[2], rtol=1e-13)
    with pytest.raises(UserError, match="nothing to learn"):
        SlimLoss(teacher, student, hidden=False, exits=False)


def test_slim_loss_shares_an_update_between_the_batches_that_make_it():
    student, teacher = quiet(still(seed=0)), still(seed=5)
    whole = batch(4, 4, 4, 4)
    halves = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]
    with SlimLoss(teacher, student) as loss:
        once = loss(student(**inputs(whole)), whole["labels"], num_items_in_batch=4)
        twice = [loss(student(**inputs(h)), h["labels"], num_items_in_batch=torch.tensor(4)) for h in halves]
    assert torch.allclose(sum(twice), once, rtol=1e-13)


def test_an_evaluation_is_charged_its_own_answers():
    student, teacher, rows = still(seed=0), still(seed=5), batch(7, 2, 4)
    with SlimLoss(teacher, student) as loss:
        got = loss(student(**inputs(rows)), rows["labels"])
    assert torch.allclose(got, student(**rows).loss, rtol=1e-14)
    fields = {"task": "regression", "target_mean": 3.0, "target_scale": 2.0}
    student, y = still(**fields), torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    with SlimLoss(still(**fields), student) as loss:
        assert torch.allclose(loss(student(**inputs(rows)), y), student(**inputs(rows), labels=y).loss, rtol=1e-12)


def test_a_plain_trainer_distils(tmp_path):
    student, teacher = still(seed=0).float(), still(seed=5).float()
    before, taught = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    data = [{k: v[0] for k, v in batch(6, seed=seed).items()} for seed in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, logging_steps=1,
    )  # fmt: skip
    with SlimLoss(teacher, student) as loss:
        trainer = Trainer(student, arguments, train_dataset=data, eval_dataset=data, compute_loss_func=loss)
        trainer.train()
        scored = trainer.evaluate()
    history = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert history[-1] < history[0]
    assert scored["eval_loss"] > 0
    assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(torch.equal(v, taught[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
