"""Privacy at an edge, step by step: clipped gradients, honest noise, an epsilon that others compute alike, and what it does."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import fuse_edges
import pytest
import torch

from retouch import registry
from retouch.errors import SettingsError, StoreError, UserError
from retouch.fuse._dp import UNIT, Private, epsilon_of_steps, public_size_of
from retouch.fuse._examples import encoded
from retouch.fuse._records import from_upload, to_capabilities, to_upload
from retouch.fuse.adapter_file import open_adapter
from retouch.fuse.base import Example
from retouch.fuse.cloud import Cloud
from retouch.fuse.cr_sign import CRSign
from retouch.fuse.edge import Sharing, capabilities, perform
from retouch.fuse.membership import membership
from retouch.fuse.simulate import simulate
from retouch.fuse.train import LoraSettings, initial_a, read_examples, train
from retouch.fuse.train import _Course as Course
from retouch.model import Model, open_model

HOW = LoraSettings(rank=4, n_steps=3, batch=4, dropout=0.0, learning_rate=1e-2, lean=False, a_init="independent")
FACTS = [Example(f"The {w} of France is", t) for w, t in zip(("capital", "language", "tower", "sea"), "abcd")]
"""Examples whose answers are equally long, so that the mean over tokens is the mean over examples."""


@pytest.fixture
def model(tiny: Any, tmp_path: Path) -> Model:
    return open_model(fuse_edges.base(tiny, tmp_path / "base"), device="cpu")


def course(model: Model, private: Private | None, public: list[Example] | None = None, **changes: Any) -> Course:
    how = dataclasses.replace(HOW, **changes)
    rows, others = encoded(model, FACTS, 512), encoded(model, public or FACTS, 512)
    made = Course(model, how, rows, others if public else [], initial_a(model, None, how), None, "law", private)
    for n, weight in made.weights.items():  # at zero B no gradient reaches A
        if "lora_B" in n:
            weight.data.normal_(generator=torch.Generator().manual_seed(len(n)), std=0.05)
    return made


def gradients(made: Course) -> list[torch.Tensor]:
    return [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in made.weights.values()]


def length(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors))


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("replay", [0.0, 0.5])
def test_without_noise_and_with_a_huge_clip_it_is_the_ordinary_gradient(model: Model, replay: float) -> None:
    public = [Example("Rome is in", t) for t in "efgh"] if replay else None
    batch = {"batch": 8, "replay": 0.5} if replay else {"batch": 4}
    assert len({len(row.target) for row in encoded(model, [*FACTS, *(public or ())], 512)}) == 1
    ordinary = course(model, None, public, **batch)
    ordinary._backward([[*ordinary.rows, *ordinary.public]])
    private = course(model, Private(1e9, 0.0), public, **batch)
    assert private.private is not None and private.private.rate == 1
    private.private.gradient([private._public()])
    for one, other in zip(gradients(ordinary), gradients(private)):
        assert torch.allclose(one, other, atol=1e-6 + 1e-5 * float(one.abs().max()))
    assert length(gradients(ordinary)) > 1e-3


def test_each_example_moves_the_sum_by_the_clip_at_most(model: Model) -> None:
    made = course(model, Private(1e9, 0.0))
    lengths, sums = [], []
    for row in made.rows:
        made._backward([[row]])
        lengths.append(length(gradients(made)))
        sums.append([g / lengths[-1] for g in gradients(made)])
        made.optimizer.zero_grad()
    clip = sorted(lengths)[1] * 1.0001  # two of four are cut
    steps = course(model, Private(clip, 0.0)).private
    assert steps is not None
    wanted = [sum(min(n, clip) * s[i] for n, s in zip(lengths, sums)) for i in range(len(sums[0]))]
    found = steps._clipped()
    assert length([a - b for a, b in zip(found, wanted)]) < 1e-4 * length(found)
    for row in made.rows:
        alone = dataclasses.replace(steps, rows=[row], how=Private(min(lengths) / 3, 0.0))
        assert length(alone._clipped()) == pytest.approx(min(lengths) / 3, rel=1e-4)


def test_noise_has_the_stated_size_and_examples_are_drawn_by_chance(model: Model) -> None:
    how = Private(0.5, 2.0, seed=3)
    made = course(model, how, batch=1)
    assert made.private is not None
    steps = made.private
    noise = torch.cat([n.flatten() for n in steps._noisy([torch.zeros(100, 100)] * 3)])
    assert float(noise.std()) == pytest.approx(0.5 * 2.0 / steps.expected, rel=0.02)
    drawn: list[int] = []
    counted = dataclasses.replace(steps, loss=lambda rows: drawn.append(len(rows)) or made._loss(rows))  # type: ignore[func-returns-value]
    sizes = []
    for _ in range(60):
        drawn.clear()
        counted.gradient()
        sizes.append(len(drawn))
    assert steps.rate == 0.25 and len(set(sizes)) > 2 and 0.5 < sum(sizes) / 60 < 1.5


def test_seed_of_the_run_gives_neither_draws_nor_noise(model: Model) -> None:
    one, other = (train(model, FACTS, HOW, private=Private()) for _ in range(2))
    assert not torch.equal(one.parts["blocks.1.mlp.up"].left, other.parts["blocks.1.mlp.up"].left)
    assert one.notes["epsilon"] == other.notes["epsilon"] == epsilon_of_steps(1.0, 1.0, 3, 1e-5)
    assert one.notes["unit"] == UNIT and {loss for _, loss in one.notes["curve"]} == {0.0}
    same = [train(model, FACTS, HOW, private=Private(seed=1)) for _ in range(2)]
    assert torch.equal(*(a.parts["blocks.1.mlp.up"].left for a in same))


# ---------------------------------------------------------------- epsilon

# flwr 1.41's RdpAccountant with dp-accounting 0.6.0, Poisson sampling, one example more or less
KNOWN = {
    (1.0, 8, 400, 150, 1e-5): 2.045796413499199,
    (2.0, 16, 1000, 1000, 1e-6): 1.2943170198450185,
    (4.0, 8, 80, 30, 1e-5): 0.5863661716852762,
    (0.6, 4, 12, 40, 1e-3): 37.386160558490666,
    (1.0, 100, 100, 10, 1e-5): 19.05359753163139,
}


@pytest.mark.parametrize("case", KNOWN)
def test_epsilon_is_the_accountants_and_never_below(case: tuple[float, int, int, int, float]) -> None:
    noise, sample, n, steps, delta = case
    found = epsilon_of_steps(noise, sample / n, steps, delta)
    loosest = 1.01 if KNOWN[case] < 5 else 1.25  # ours looks at whole orders alone, which only large epsilons notice
    assert KNOWN[case] * (1 - 1e-9) <= found <= loosest * KNOWN[case]


@pytest.mark.skipif(importlib.util.find_spec("dp_accounting") is None, reason="needs flwr[dp]")
def test_epsilon_beside_the_installed_accountant() -> None:
    from flwr.serverapp import (
        GaussianPrivacyEvent,
        NeighboringRelation,
        PrivacyConfig,
        RdpAccountant,
        SamplingMethod,
    )

    for noise, sample, n, steps, delta in KNOWN:
        how = PrivacyConfig(delta, n, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.POISSON)
        accountant = RdpAccountant(how)
        accountant.compose(GaussianPrivacyEvent(noise, sample, n), steps)
        known = accountant.get_epsilon(delta)
        assert known * (1 - 1e-9) <= epsilon_of_steps(noise, sample / n, steps, delta) <= 1.25 * known


def test_epsilon_grows_with_steps_and_falls_with_noise() -> None:
    at = [epsilon_of_steps(1.0, 0.1, n, 1e-5) for n in (0, 1, 10, 100)]
    assert at[0] == 0 and at == sorted(at) and at[1] > 0
    assert epsilon_of_steps(2.0, 0.1, 10, 1e-5) < at[2] < epsilon_of_steps(1.0, 0.2, 10, 1e-5)
    assert epsilon_of_steps(0.0, 0.1, 10, 1e-5) == math.inf


# ---------------------------------------------------------------- the whole way


@pytest.mark.parametrize("precision", ["half", "int8"])
def test_guarantee_travels_and_stands_in_the_adapters_notes(model: Model, tmp_path: Path, precision: str) -> None:
    edges, sharing = fuse_edges.specs(tmp_path), Sharing(privacy="dp-sgd", noise=1.5, precision=precision)
    cloud = Cloud(model, fuse_edges.run(), tmp_path / "run")
    a = cloud.assign([capabilities(e, sharing) for e in edges])[0]
    upload = perform(a.task, a.package, read_examples(edges[0].examples), "law", sharing)
    wanted = epsilon_of_steps(1.5, 2 / 4, 3, 1e-5)  # three examples; their public size is four
    assert upload.facts["epsilon"] == wanted and upload.facts["unit"] == UNIT and "loss" not in upload.facts
    cloud.receive(a, to_upload(from_upload(upload), "law"))
    kept = open_adapter(tmp_path / "run" / "adapters" / "law", model)
    assert kept.notes["privacy"] == "dp-sgd" and kept.notes["epsilon"] == wanted
    assert cloud.journal.entries()[-1].facts["epsilon"] == wanted


def test_one_example_more_changes_nothing_that_is_told(model: Model, tmp_path: Path) -> None:
    edge = dataclasses.replace(fuse_edges.specs(tmp_path)[0], name="law")
    rows = edge.examples.read_text(encoding="utf-8").splitlines()  # type: ignore[union-attr]
    assert [public_size_of(n) for n in (1, 2, 3, 5, 8, 9)] == [1, 2, 4, 8, 8, 16]
    for sharing in (Sharing(privacy="dp-sgd", noise=4.0), Sharing(privacy="dp-sgd", noise=4.0, public_size=3)):
        told = []
        for n in (3, 4):
            own = dataclasses.replace(edge, examples=tmp_path / f"{n}.jsonl")
            Path(own.examples).write_text("\n".join([*rows, rows[0]][:n]), encoding="utf-8")
            cloud = Cloud(model, fuse_edges.run(lora={"n_steps": None, "epochs": 2.0}), tmp_path / "run")
            able = capabilities(own, sharing)
            a = cloud.assign([able])[0]
            facts = perform(a.task, a.package, read_examples(own.examples), "law", sharing).facts
            told.append((able.n_examples, dict(facts)))
        assert told[0] == told[1] and told[0][0] == str(sharing.public_size or 4)


def test_public_size_alone_decides_rate_and_noise(model: Model) -> None:
    made = course(model, Private(1.0, 2.0, seed=3, public_size=40), batch=2, n_steps=None, epochs=3.0)
    assert made.private is not None
    assert made.private.rate == 2 / 40 and made.private.expected == 2 and made.n_steps == 60
    assert made.private.facts(60)["epsilon"] == epsilon_of_steps(2.0, 2 / 40, 60, 1e-5)


def test_a_stopped_private_run_goes_on_and_counts_all_its_steps(model: Model, tmp_path: Path) -> None:
    part = train(model, FACTS, HOW, tmp_path, private=Private(), deadline_s=0.0)
    assert part.notes["partial"] and part.notes["epsilon"] == 0.0
    whole = train(model, FACTS, HOW, tmp_path, private=Private())
    assert whole.notes["n_steps"] == 3 and whole.notes["epsilon"] == epsilon_of_steps(1.0, 1.0, 3, 1e-5)
    other = train(model, FACTS, HOW, tmp_path, private=Private(noise=9.0))  # other noise: no state is shared
    assert other.notes["epsilon"] == epsilon_of_steps(9.0, 1.0, 3, 1e-5)


# ---------------------------------------------------------------- what does not go together


def refused(model: Model, tmp_path: Path, match: str, sharing: Sharing | None = None, **run: Any) -> None:
    settings = {name: run.pop(name) for name in ("weights", "lora") if name in run}
    made = dataclasses.replace(fuse_edges.run(**settings), **run)
    with pytest.raises(UserError, match=match) as told:
        simulate(model, fuse_edges.specs(tmp_path), made, tmp_path / "run", sharing=sharing)
    assert told.value.exit_code == 2
    assert not list((tmp_path / "run").glob("journal.jsonl"))  # nobody was asked to train


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("lorahub", "questions of the domains"),
        ("bounded", "fuse merge MODEL"),
        ("regmean", "second moments"),
        ("linear", "equal ranks"),
    ],
)
def test_methods_that_the_cloud_cannot_do_are_refused_at_once(
    model: Model, tmp_path: Path, method: str, match: str
) -> None:
    refused(model, tmp_path, match, method=registry.make("fuse", method))


@pytest.mark.parametrize(
    ("method", "match"), [("linear", "no resolver"), ("tsv", "space=core"), ("knots", "space=core")]
)
def test_resolvers_that_cannot_stand_there(model: Model, tmp_path: Path, method: str, match: str) -> None:
    refused(model, tmp_path, match, method=registry.make("fuse", method), resolver=CRSign())


@pytest.mark.parametrize(
    ("sharing", "match", "more"),
    [
        ({"privacy": "secagg-linear"}, "not offered", {}),
        ({"privacy": "local-dp"}, "frozen A", {}),
        ({"privacy": "local-dp", "loss": True}, "training loss", {"lora": {"freeze_a": True}}),
        ({"privacy": "dp-sgd", "loss": True}, "training loss", {}),
        ({"count": "bucket"}, "order of its number", {"weights": "examples"}),
    ],
)
def test_privacy_and_what_it_excludes(
    model: Model, tmp_path: Path, sharing: dict[str, Any], match: str, more: dict[str, Any]
) -> None:
    refused(model, tmp_path, match, Sharing(**sharing), **more)


def test_the_cloud_hears_of_privacy_before_it_asks_anybody_to_train(model: Model, tmp_path: Path) -> None:
    from retouch.fuse._records import from_capabilities

    sent = from_capabilities(capabilities(fuse_edges.specs(tmp_path)[0], Sharing(privacy="local-dp")))
    edge = to_capabilities(sent, "node 7")
    with pytest.raises(UserError, match="law adds noise"):
        Cloud(model, fuse_edges.run(), tmp_path / "run").assign([edge])


# ---------------------------------------------------------------- int8


def test_int8_is_half_as_large_and_close(model: Model, tmp_path: Path) -> None:
    from retouch.fuse._quantised import dequantised, quantised, upload_bytes

    make = torch.Generator().manual_seed(0)
    given = {"w.lora_A": torch.randn(8, 96, generator=make), "w.lora_B": torch.randn(160, 8, generator=make) * 1e-4}
    given["w.lora_B"][:, 3] = 0
    sent = quantised(given)
    assert sum(t.nbytes for t in sent.values()) == upload_bytes([(160, 96)], 8, "int8") == 8 * (160 + 96) + 64
    assert upload_bytes([(160, 96)], 8, "float16") == 2 * 8 * (160 + 96)
    assert upload_bytes([(160, 96)], 8, "int8", freeze_a=True) == 8 * 160 + 32
    back = dequantised(sent, "law")
    for name, axis in (("w.lora_A", 1), ("w.lora_B", 0)):
        most = given[name].abs().amax(axis, keepdim=True) / 254.9
        assert bool(((back[name] - given[name]).abs() <= most).all())
    product = given["w.lora_B"] @ given["w.lora_A"]
    error = float((back["w.lora_B"] @ back["w.lora_A"] - product).norm() / product.norm())
    assert 1e-3 < error < 0.015
    assert not back["w.lora_B"][:, 3].any() and bool(back["w.lora_B"][:, 0].all())  # zeros stay, and none is made


@pytest.mark.parametrize("freeze_a", [False, True])
def test_int8_uploads_are_screened_as_others_are(model: Model, tmp_path: Path, freeze_a: bool) -> None:
    edges, both = fuse_edges.specs(tmp_path), {}
    for precision in ("half", "int8"):
        run = fuse_edges.run(lora={"freeze_a": freeze_a, "n_steps": 6}, min_edges=1)
        cloud = Cloud(model, run, tmp_path / precision)
        a = cloud.assign([capabilities(e) for e in edges])[0]
        sharing = Sharing(precision=precision)
        both[precision] = perform(a.task, a.package, read_examples(edges[0].examples), "law", sharing)
        cloud.receive(a, to_upload(from_upload(both[precision]), "law"))
    wide, narrow = (open_adapter(tmp_path / p / "adapters" / "law", model).parts for p in ("half", "int8"))
    for name, part in wide.items():
        whole = part.left @ part.right
        assert float((narrow[name].left @ narrow[name].right - whole).norm()) <= 0.02 * float(whole.norm())
    small = both["int8"]
    assert small.n_bytes < 0.75 * both["half"].n_bytes
    name = next(n for n in small.tensors if n.endswith("lora_B"))
    changes: list[dict[str, torch.Tensor | None]] = [
        {f"{name}.scale": None},
        {f"{name}.scale": torch.full_like(small.tensors[f"{name}.scale"], float("nan"))},
        {f"{name}.scale": -small.tensors[f"{name}.scale"] - 1},
        {f"{name}.scale": small.tensors[f"{name}.scale"].half()},
        {f"{name}.scale": small.tensors[f"{name}.scale"] * 1e6},
        {name: small.tensors[name].float()},
        {name: small.tensors[name].T.contiguous()},
        {"other.scale": torch.ones(2)},
    ]
    for change in changes:
        tensors = {n: t for n, t in {**small.tensors, **change}.items() if t is not None}
        with pytest.raises(StoreError, match="law"):
            cloud.receive(a, dataclasses.replace(small, tensors=tensors))
        assert cloud.journal.entries()[-1].state == "refused"


def test_upload_of_another_size_than_the_plan_gives_is_refused(model: Model, tmp_path: Path) -> None:
    edges = fuse_edges.specs(tmp_path)
    cloud = Cloud(model, fuse_edges.run(), tmp_path / "run")
    a = cloud.assign([capabilities(e) for e in edges])[0]
    upload = perform(a.task, a.package, read_examples(edges[0].examples), "law")
    tensors = {**upload.tensors, "padding": torch.zeros(1 << 20)}
    with pytest.raises(StoreError, match="its plan gives"):
        cloud.receive(a, dataclasses.replace(upload, tensors=tensors))


def test_settings_are_checked() -> None:
    for wrong in ({"precision": "int4"}, {"noise": 0.0}, {"max_norm": -1.0}, {"delta": 1.0}):
        with pytest.raises(SettingsError):
            Sharing(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what it does to an attack


def test_noise_hides_what_training_without_it_tells(model: Model) -> None:
    words = [f"{a} {b}" for a in ("north", "south", "east", "west") for b in "abcdef"]
    members = [Example(f"The code of {w} is", str(i % 10)) for i, w in enumerate(words[::2])]
    others = [Example(f"The code of {w} is", str((7 * i + 3) % 10)) for i, w in enumerate(words[1::2])]
    how = dataclasses.replace(HOW, n_steps=40, batch=12, learning_rate=2e-2)
    open_, hidden = (train(model, members, how, private=p) for p in (None, Private(1.0, 8.0, seed=0)))
    leak, left = (membership(model, a, members, others).auc for a in (open_, hidden))
    assert leak > 0.9 and abs(left - 0.5) < leak - 0.5
