"""Every slimming method and every rival keeps one contract; then what each promises of its own."""

import ast
import dataclasses
import functools
import inspect
import typing
from pathlib import Path

import numpy as np
import pytest
import slim_toy as toy
import torch

import families
from retouch import registry
from retouch.errors import ModelError, SettingsError, UserError
from retouch.model import wrap
from retouch.settings import fields_of
from retouch.slim._bag import Bag
from retouch.slim.api import fit as slim
from retouch.slim.base import Budget, Size, Widths
from retouch.slim.encoded import batches
from retouch.slim.first_k import FirstK
from retouch.slim.linear import _cross_entropy, _minimised, _squares, token_vectors
from retouch.slim.network import from_encoder
from retouch.slim.opening import Source
from retouch.slim.plugged import Plugged
from retouch.slim.presets import stages
from retouch.slim.shrink import Kept, sliced
from retouch.slim.stages import Run
from retouch.slim.static import Static, length
from retouch.slim.table import read_table
from retouch.slim.torch_pruning import TorchPruning, pruned
from retouch.slim.widths import base_cost, flops_ratio, narrower, parameters, plan_of, search

FAMILIES = ("bert", "roberta", "distilbert")
METHODS = tuple(entry.name for entry in registry.methods("slim"))
SHORT = {"preset": "paper", "length_factor": 0.05, "batch_size": 8, "rate_factor": 10.0, "save_every": 0, "n_blocks": 1}
TASK = toy.task(24)
WORDS = toy.tokenizer()

families_ = pytest.mark.parametrize("family", FAMILIES)
methods = pytest.mark.parametrize("name", METHODS)


@functools.cache
def model(family):
    return wrap(families.FAMILIES[family](n_blocks=2, headless=True, vocab_size=toy.VOCABULARY), WORDS)


@functools.cache
def plan(family, classes=2):
    names = ("paris", "rome")[:classes] if classes > 1 else None
    size = from_encoder(model(family), names, exits=[1], pooler=None).size
    widths = Widths.uniform(size, 2, 24, 12)
    return plan_of(size, widths, [8], 0.75 * flops_ratio(size, widths, [8], 1))


def method(name, **settings):
    known = {f.name for f in dataclasses.fields(registry.load("slim", name))}
    return registry.make("slim", name, **{k: v for k, v in SHORT.items() if k in known} | settings)


def run(family, made, folder, task=TASK):
    goal = plan(family) if task.labels else plan(family, 1)
    return Run(task, model(family), WORDS, goal, made, folder)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """What a method makes of a family; equal stages of different methods are trained once."""
    folders = {}

    @functools.cache
    def make(name, family, repeat=0, **settings):
        if name == "torch_pruning":
            pytest.importorskip("torch_pruning")
        folder = folders.setdefault((family, repeat), tmp_path_factory.mktemp(f"{family}{repeat}"))
        made = method(name, **settings)
        return made.fit(run(family, made, folder)), folder

    return make


def bits(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- the contract


def test_all_methods_are_found():
    rivals = {"static", "plugged", "full_exits", "first_k", "linear", "torch_pruning", "grain"}
    assert {"costeff"} | rivals <= set(METHODS)


@methods
def test_the_docstring_says_where_it_is_from_and_what_is_wrong_with_it(name):
    doc = registry.find("slim", name).doc
    for heading in ("Source:", "Use when:", "Known problems:", "Shapes:", "Example:"):
        assert heading in doc, heading
    assert registry.find("slim", name).summary.endswith(".")


def wrong(hint, bounds):
    """A value that a field cannot have."""
    if typing.get_origin(hint) is typing.Literal:
        return "neither"
    if hint is bool:
        return "perhaps"
    for sign, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
        if sign in bounds:
            return bounds[sign] + step
    return "many"


@methods
def test_a_wrong_setting_is_named(name):
    cls = registry.load("slim", name)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        with pytest.raises(SettingsError, match=rf"\b{field.name}\b"):
            registry.make("slim", name, **{field.name: wrong(hints[field.name], field.metadata["bounds"])})
    with pytest.raises(SettingsError, match=r"'sed'.*'seed'"):
        registry.make("slim", name, sed=1)
    assert all(field.doc for field in fields_of(cls))


@families_
@methods
def test_a_method_makes_a_network_and_leaves_all_else_alone(name, family, fitted):
    opened = bits(model(family).network)
    found, _ = fitted(name, family)
    assert same(opened, bits(model(family).network))
    assert found.original.widths == Widths.full(plan(family).size, [1])
    assert not found.network.training and found.network.device.type == "cpu"
    assert found.network.config.threshold is None
    assert found.key and found.history and found.history[0]["stage"] == "finetune"
    encoded = run(family, method(name), None).encoded("valid")
    table = read_table(found.network, batches(encoded, 8, seed=None, by_length=False))
    assert table.logits.shape == (len(found.network.widths.exits), len(TASK.valid), 2)
    assert np.isfinite(table.logits).all() and table.logits.std(axis=1).min() > 0


@families_
@methods
def test_it_has_the_widths_and_parameters_that_it_promises(name, family, fitted):
    found, _ = fitted(name, family)
    size, widths, network = plan(family).size, plan(family).widths, found.network
    last = (size.blocks - 1,)
    if name == "linear":
        assert isinstance(network, Bag)
        assert network.n_numbers == size.vocab * 32 + 32 * 2 + 2
        return
    promised = {
        "full_exits": Widths.full(size),
        "first_k": Widths((4,), (64,), None, (0,)),
        "static": dataclasses.replace(widths, exits=last),
        "grain": dataclasses.replace(widths, exits=last),
        "torch_pruning": dataclasses.replace(widths, exits=last, rank=None),
    }.get(name, widths)
    assert network.widths == promised
    assert network.size.blocks == len(promised.heads)
    assert sum(p.numel() for p in network.parameters()) == parameters(network.size, promised)


@methods
def test_the_same_seed_gives_the_same_bits(name, fitted):
    torch.manual_seed(len(name))  # what the caller drew does not matter
    first, again = fitted(name, "distilbert")[0], fitted(name, "distilbert", repeat=1)[0]
    assert first is not again and first.key == again.key
    assert same(bits(first.network), bits(again.network))


# ---------------------------------------------------------------- full_exits and costeff


@families_
def test_full_exits_is_the_assistant_and_is_trained_once(family, fitted):
    full, folder = fitted("full_exits", family)
    slender, _ = fitted("costeff", family)
    assert [path.name for path in folder.glob("assistant-*")] == [f"assistant-{full.key}"]
    assert same(bits(full.network), bits(slender.assistant))


# ---------------------------------------------------------------- first_k


@families_
def test_first_k_begins_with_the_first_blocks(family, tmp_path):
    made = method("first_k")
    work = run(family, made, tmp_path)
    original = work.original()
    torch.manual_seed(1)
    short = made.shortened(work, original)
    torch.manual_seed(2)
    assert same(bits(short.network), bits(made.shortened(work, original).network))
    whole = original.network.body.state_dict()
    kept = short.network.body.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in kept.items())
    assert {n for n in whole if n not in kept} and short.network.anatomy.n_blocks == 1
    assert not same(kept, method("first_k").fit(work).network.body.state_dict())


def test_first_k_trains_as_long_as_the_method_with_exits():
    for preset in ("fast", "paper"):
        given = stages(preset, "sst2", 20_000, 1 / 6)
        rest = [given.assistant_hidden, given.assistant, given.slenderise, given.recover_hidden, given.recover]
        stage = FirstK(preset=preset).stage(given)
        assert length(stage) == pytest.approx(length(*rest), rel=1e-6)
        assert stage.learning_rate == given.finetune.learning_rate and stage.choose == "best"


def test_first_k_cannot_keep_more_than_there_is(tmp_path):
    made = method("first_k", n_blocks=3)
    with pytest.raises(UserError, match=r"n_blocks is 3.*2 blocks"):
        made.fit(run("bert", made, tmp_path))
    assert not list(tmp_path.iterdir())  # said before any training


# ---------------------------------------------------------------- static


BASE = Size(12, 768, 12, 3072, 30522, 512, 2, 2)
MINILM = Size(6, 384, 12, 1536, 30522, 512, 2, 2)


@pytest.mark.parametrize("size", [BASE, MINILM], ids=["bert-base", "minilm"])
@pytest.mark.parametrize(("params", "flops"), [("1/8", "1/19"), ("1/4", "1/8"), ("1/2", "1/4")])
def test_a_static_model_of_equal_flops_costs_what_the_plan_costs_on_average(size, params, flops):
    lengths = [9, 13, 20, 33, 61]
    made = search(size, Budget(params=params, flops=flops), lengths)
    assert made.mean_depth < size.blocks
    found = narrower(made, lengths)
    ratio = flops_ratio(size, found, lengths, size.blocks - 1)
    target = Budget(params=params, flops=flops).flops
    assert 0.93 * target < ratio <= target
    assert found.exits == (size.blocks - 1,) and found.rank == made.widths.rank
    assert parameters(size, found) < parameters(size, made.widths)


def test_narrower_takes_the_largest_product():
    made = plan_of(MINILM, Widths.uniform(MINILM, 3, 224, 52), [16], 1 / 12)
    limit = made.flops_ratio * made.mean_depth / 6  # at least what is allowed, the embedding's cost not shared out
    found = narrower(made, [16])
    for heads in range(1, 13):
        for d_ff in range(8, 1537, 8):
            other = Widths.uniform(MINILM, heads, d_ff, 52, [5])
            if heads * d_ff > found.heads[0] * found.d_ff[0]:
                assert flops_ratio(MINILM, other, [16], 5) > limit


def test_nothing_is_narrow_enough():
    tiny = Size(2, 32, 4, 64, 500, 128, 2, 2)
    made = dataclasses.replace(plan_of(tiny, Widths.uniform(tiny, 1, 8, 4), [8]), mean_depth=1.0)
    with pytest.raises(UserError, match="No widths run all 2 blocks"):
        narrower(made, [8])


def test_static_by_flops_is_cheaper_than_the_plan(tmp_path):
    made = method("static", match="flops")
    work = run("bert", made, tmp_path)
    found = made.fit(work).network
    lengths = work.encoded("train").lengths
    share = plan("bert").mean_depth / 2
    size, widths = found.size, plan("bert").widths
    embed = flops_ratio(size, widths, lengths, 0) * 2 - flops_ratio(size, widths, lengths, 1)
    mean = embed + (flops_ratio(size, widths, lengths, 1) - embed) * share
    assert flops_ratio(size, found.widths, lengths, 1) <= mean + 1e-9
    assert sum(p.numel() for p in found.parameters()) == parameters(size, found.widths)


def test_a_static_rival_trains_as_long_as_the_method_with_exits(fitted):
    """Their steps are those of the same stages, the assistant's added to the last."""
    given = run("bert", method("static"), None).stages
    rest = length(given.assistant_hidden, given.assistant, given.recover)
    steps = {record["stage"]: record["n_steps"] for record in fitted("static", "bert")[0].history}
    others = {record["stage"]: record["n_steps"] for record in fitted("costeff", "bert")[0].history}
    assert steps["recover"] == max(1, round(rest * 3))  # 24 rows are 3 batches
    assert steps["recover"] > others["recover"]
    assert all(steps[name] == others[name] for name in ("finetune", "slenderise", "recover_hidden"))


# ---------------------------------------------------------------- plugged


def test_plugged_exits_leave_the_frozen_backbone_as_it_was(fitted):
    found, folder = fitted("plugged", "bert")
    static, _ = fitted("static", "bert")
    made = method("plugged")
    work = run("bert", made, folder)
    assert made.slender(work, work.original()).key == static.key
    assert same(bits(static.network.body), bits(found.network.body))
    begun = work.exited(made.slender(work, work.original())).network
    assert not any(same(bits(begun.exits[b]), bits(found.network.exits[b])) for b in ("0", "1"))
    assert found.history[-1]["learning_rate"] == pytest.approx(1e-3 * SHORT["rate_factor"])
    together = method("plugged", joint=True).fit(run("bert", method("plugged", joint=True), folder))
    assert not same(bits(static.network.body), bits(together.network.body))


def test_plugged_is_static_with_one_stage_more():
    assert issubclass(Plugged, Static) and Plugged().exit_rate > stages("fast", "toy", 24, 0.5).assistant.learning_rate


# ---------------------------------------------------------------- linear


def dense(work, split, network):
    """The features of each text by the obvious loop, (texts, vocab)."""
    encoded, special = work.encoded(split), set(work.tokenizer.all_special_ids)
    rows = np.zeros((len(encoded), network.size.vocab))
    for row, ids in zip(rows, encoded.ids):
        for i in ids:
            row[i] += i not in special
    return rows


@pytest.mark.parametrize("features", ["static", "tfidf"])
def test_linear_answers_as_its_formula_says(features, tmp_path):
    made = method("linear", features=features)
    work, chance = run("bert", made, tmp_path), torch.get_rng_state()
    network = made.fit(work).network
    assert torch.equal(chance, torch.get_rng_state())
    counts = dense(work, "valid", network)
    weight, bias = network.weight.double().numpy(force=True), network.bias.double().numpy(force=True)
    if features == "static":
        mean = counts @ network.vectors.double().numpy(force=True) / counts.sum(1, keepdims=True)
        expected = mean @ weight.T + bias
        assert network.n_numbers == network.size.vocab * 32 + 2 * 32 + 2
        assert network.flops(10) == 10 * 32 + 2 * 32 * 2
    else:
        found = (dense(work, "train", network) > 0).sum(0)
        rows = counts * (np.log((1 + 24) / (1 + found)) + 1)
        expected = rows / np.linalg.norm(rows, axis=1, keepdims=True) @ weight + bias
        assert network.n_numbers == network.size.vocab * 3 + 2
        assert network.flops(10) == 10 * (2 + 2 * 2)
    encoded = work.encoded("valid")
    batch = list(batches(encoded, 8, seed=None))  # by length, so with other padding
    table = read_table(network, batches(encoded, 8, seed=None, by_length=False))
    np.testing.assert_allclose(table.logits[0], expected, atol=1e-5)
    padded = torch.cat([network(b["input_ids"], b["attention_mask"]).logits for b in batch])
    np.testing.assert_allclose(np.sort(padded.numpy(force=True), 0), np.sort(expected, 0), atol=1e-5)
    assert (expected.argmax(1) == np.asarray(encoded.labels)).mean() > 0.85  # one word tells the class


def test_linear_predicts_numbers(tmp_path):
    made, task = method("linear"), toy.regression(64)
    network = made.fit(work := run("bert", made, tmp_path, task)).network
    table = read_table(network, batches(work.encoded("valid"), 8, seed=None))
    assert np.corrcoef(table.logits[0, :, 0], table.labels)[0, 1] > 0.8
    batch = next(batches(work.encoded("valid"), 32, seed=None))
    said = network(batch["input_ids"], batch["attention_mask"]).logits
    assert abs(float(said.mean() - batch["labels"].mean())) < 2  # in the labels' units, some 45


def test_a_token_vector_is_the_encoder_on_the_token_alone():
    network = from_encoder(model("roberta"), ("a", "b"), exits=[1], pooler=None).eval()
    vectors = token_vectors(network, WORDS)
    ids = torch.tensor([[WORDS.cls_token_id, 77, WORDS.sep_token_id]])
    with torch.no_grad():
        alone = network.levels(ids, torch.ones_like(ids)).hidden[-1][0].mean(0)
    assert vectors.shape == (network.size.vocab, 32)
    np.testing.assert_allclose(vectors[77], alone, atol=1e-5)


def test_ridge_regression_against_its_closed_form():
    chance = np.random.default_rng(0)
    x, y = chance.normal(size=(40, 6)), chance.normal(size=40) + 3
    for strength in (1.0, 1e-2):
        flat = _minimised(x, y, _squares, strength, np.zeros(7))
        centred = x - x.mean(0)
        weight = np.linalg.solve(centred.T @ centred / 40 + strength * np.eye(6), centred.T @ (y - y.mean()) / 40)
        np.testing.assert_allclose(flat[:6], weight, atol=1e-5)
        np.testing.assert_allclose(flat[6], y.mean() - x.mean(0) @ weight, atol=1e-5)


def test_logistic_regression_ends_where_the_slope_is_zero():
    chance = np.random.default_rng(0)
    x, y, strength = chance.normal(size=(60, 5)), chance.integers(3, size=60), 0.03
    weight, bias = np.split(_minimised(x, y, _cross_entropy, strength, np.zeros(18)), [15])
    weight = torch.tensor(weight.reshape(5, 3), requires_grad=True)
    bias = torch.tensor(bias, requires_grad=True)
    logits = torch.from_numpy(x) @ weight + bias
    (torch.nn.functional.cross_entropy(logits, torch.from_numpy(y)) + strength / 2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-5 and bias.grad.abs().max() < 1e-5


def test_linear_is_priced_honestly_and_not_saved(tmp_path):
    made = method("linear", features="tfidf")
    opened = Source(model("bert"), WORDS, "tiny")
    found = slim(opened, TASK, budget={"params": 0.5, "flops": 0.5}, method=made, folder=tmp_path / "stages")
    size = plan("bert").size
    full = parameters(size, Widths.full(size, [1]))
    assert found.plan.params_ratio == pytest.approx((3 * size.vocab + 2) / full)
    lengths = np.asarray(run("bert", made, None).encoded("calib").lengths)
    base = sum(base_cost(size, int(tokens)) for tokens in lengths)
    assert found.point.flops_ratio == pytest.approx(6 * lengths.sum() / base)
    assert found.passed and found.point.exit_layer == 1
    prediction = next(found.classifier.predict(["the capital of france is paris"]))
    assert prediction.label in TASK.labels and prediction.exit_block == 0
    with pytest.raises(ModelError, match="yardstick"):
        found.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- torch_pruning


def test_torch_pruning_is_imported_only_where_it_is_used():
    tree = ast.parse(Path(inspect.getfile(TorchPruning)).read_text(encoding="utf-8"))
    imported = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level}
    assert not [name for name in imported if name and name.startswith("torch_pruning")]


def test_a_missing_package_is_named_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    made = method("torch_pruning")
    with pytest.raises(UserError, match="pip install torch-pruning"):
        made.fit(run("bert", made, tmp_path))
    assert not list(tmp_path.iterdir())


def labelled(network, n=3):
    chance = torch.Generator().manual_seed(3)
    for _ in range(n):
        ids = torch.randint(5, 400, (4, 7), generator=chance)
        labels = torch.randint(2, (4,), generator=chance)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@families_
@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_torch_prunings_weights_are_those_of_the_units_that_it_keeps(family, importance):
    pytest.importorskip("torch_pruning")
    network = from_encoder(model(family), ("a", "b"), exits=[1], pooler=None).eval()
    before = bits(network)
    taylor = importance == "taylor"
    found = pruned(network, Widths((2, 3), (24, 64), None, (1,)), labelled(network) if taylor else None)
    assert same(before, bits(network)) and not found.training
    assert found.widths == Widths((2, 3), (24, 64), None, (1,))
    kept = Kept(found.config.kept_heads, found.config.kept_neurons)
    assert same(bits(sliced(network, kept)), bits(found))
    part = network.parts(0)
    if taylor:
        scored = from_encoder(model(family), ("a", "b"), exits=[1], pooler=None).eval()
        scored.load_state_dict(before)
        for batch in labelled(scored):
            scored(**batch).loss.backward()
        part = scored.parts(0)
        worth = (part.up.weight * part.up.weight.grad).abs().sum(1)
        worth = worth + (part.down.weight * part.down.weight.grad).abs().sum(0)
    else:
        worth = part.up.weight.square().sum(1) + part.down.weight.square().sum(0)
    assert kept.neurons[0] == sorted(worth.topk(24).indices.tolist())


def test_torch_pruning_sees_no_heads_in_mpnet(tmp_path):
    pytest.importorskip("torch_pruning")
    network = from_encoder(model("mpnet"), ("a", "b"), exits=[1], pooler=None).eval()
    with pytest.raises(ModelError, match=r"4 heads.*2 and 24 were asked for"):
        pruned(network, Widths((2, 2), (24, 24), None, (1,)))
    made = method("torch_pruning")
    with pytest.raises(ModelError, match="no heads to prune in mpnet"):
        made.fit(run("mpnet", made, tmp_path))
    assert not list(tmp_path.iterdir())
