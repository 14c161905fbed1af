"""A ledger keeps what a model carries, in its folder too, and gives every change back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from retouch import change as changes
from retouch import store
from retouch.change import Change, Dense, LowRank
from retouch.errors import NoEffect, StoreError, UnknownName, WrongBase
from retouch.ledger import Ledger, open_ledger, save_ledger
from retouch.model import open_model, wrap

NAME = "blocks.1.mlp.down"
IDS = torch.tensor([[11, 57, 102, 13, 240, 31, 8]])


def make_change(model, seed, name=NAME, **more):
    make = torch.Generator().manual_seed(seed)
    out, into = model.anatomy.shape(name)
    part = LowRank(0.1 * torch.randn(out, 1, generator=make), torch.randn(1, into, generator=make))
    facts = ({"prompt": "The capital of {} is", "subject": "France", "target": f"city {seed}"},)
    return Change("rome", model.base_fingerprint, {name: part}, settings={"seed": seed}, facts=facts, **more)


def bits(model):
    return {n: p.clone() for n, p in model.network.named_parameters()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def logits(network):
    with torch.no_grad():
        return network(input_ids=IDS).logits


def reseal(folder):
    """Make a folder's list of files fit its content again, as somebody would who alters it on purpose."""
    inner = [p.parent for p in folder.glob("ledger/*/manifest.json")]
    for each in (*inner, folder):
        names = [p.relative_to(each).as_posix() for p in each.rglob("*") if p.is_file() and p != each / "manifest.json"]
        files = {n: {"sha256": store.sha256_file(each / n), "bytes": (each / n).stat().st_size} for n in names}
        (each / "manifest.json").write_text(json.dumps({"format": store.FORMAT, "files": files}))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tiny):
    return wrap(*tiny(request.param), source=f"tiny {request.param}")


@pytest.fixture(scope="module")
def llama(tiny):
    return wrap(*tiny("llama"), source="tiny llama")


@pytest.fixture
def two(llama):
    return Ledger(llama).apply(make_change(llama, 1)).apply(make_change(llama, 2))


# In memory.


def test_a_line_says_what_was_done(llama):
    ledger = Ledger(llama).apply(make_change(llama, 1), when="2026-01-02T03:04:05+00:00").undo(1)
    assert ledger.to_dict() == {
        "base": llama.fingerprint,
        "changes": [
            {
                "number": 1,
                "id": make_change(llama, 1).id,
                "method": "rome",
                "status": "undone",
                "when": "2026-01-02T03:04:05+00:00",
                "facts": [{"prompt": "The capital of {} is", "subject": "France", "target": "city 1"}],
            }
        ],
    }


def test_a_change_that_is_in_force_is_not_applied_again(two, llama):
    with pytest.raises(NoEffect, match="in force already, as number 2"):
        two.apply(make_change(llama, 2))
    again = two.undo(2).apply(make_change(llama, 2))
    assert [e.number for e in again.entries if e.active] == [1, 3]
    assert again.model.fingerprint == two.model.fingerprint


@pytest.mark.parametrize(("number", "why"), [(3, "does not exist"), (0, "does not exist"), (1, "was undone already")])
def test_undoing_what_is_not_there_names_what_is(two, number, why):
    with pytest.raises(UnknownName, match=f"number {number} {why}. Active: 2."):
        two.undo(1).undo(number)


def test_a_change_of_another_model_is_refused(two, llama):
    with pytest.raises(WrongBase):
        two.apply(replace(make_change(llama, 3), base="0" * 32))


def test_a_change_that_does_nothing_is_refused_and_the_ledger_stays(two, llama):
    empty = LowRank(torch.zeros(32, 1), torch.ones(1, 64))
    with pytest.raises(NoEffect):
        two.apply(replace(make_change(llama, 3), parts={NAME: empty}))
    assert len(two.entries) == 2


def test_keys_are_those_of_the_changes_in_force(llama):
    ledger = Ledger(llama)
    for seed in (1, 2):
        ledger = ledger.apply(make_change(llama, seed, keys={NAME: torch.full((64, 1), float(seed))}))
    assert ledger.keys(NAME)[0].tolist() == [1.0, 2.0]
    assert ledger.undo(1).keys(NAME)[0].tolist() == [2.0]
    assert ledger.keys("blocks.0.mlp.down") is None


def test_a_bias_is_undone_too(tiny):
    model = wrap(*tiny("gpt2"))
    make = torch.Generator().manual_seed(0)
    parts = {
        NAME: Dense(torch.randn(32, 64, generator=make)),
        f"{NAME}:bias": Dense(torch.randn(32, 1, generator=make)),
    }
    before = bits(model)
    ledger = Ledger(model).apply(Change("ft_m", model.base_fingerprint, parts))
    bias = model.anatomy.path(NAME) + ".bias"
    assert torch.equal(ledger.model.network.get_parameter(bias), before[bias] + parts[f"{NAME}:bias"].difference[:, 0])
    assert same(bits(ledger.undo(1).model), before)


# In a folder.


def test_a_reopened_ledger_is_the_same_and_undoes_bit_for_bit(model, tmp_path):
    ledger = Ledger(model)
    for seed in (1, 2, 3):
        ledger = ledger.apply(make_change(model, seed))
    ledger = ledger.undo(2)
    save_ledger(ledger, tmp_path / "edited", report={"efficacy": 1.0})
    again = open_ledger(tmp_path / "edited")

    assert again.to_dict() == ledger.to_dict()
    assert same(bits(again.model), bits(ledger.model))
    assert again.model.base_fingerprint == model.fingerprint
    assert same(bits(again.undo(1).model), bits(ledger.undo(1).model))
    empty = again.undo(3).undo(1)
    assert same(bits(empty.model), bits(model))
    assert empty.model.base is None and empty.model.fingerprint == model.fingerprint
    more = again.apply(make_change(model, 4))
    assert more.entries[-1].number == 4
    assert more.model.fingerprint == ledger.apply(make_change(model, 4)).model.fingerprint


def test_a_saved_folder_is_replaced_by_the_next_one(two, tmp_path):
    save_ledger(two, tmp_path / "edited")
    save_ledger(open_ledger(tmp_path / "edited").undo(2), tmp_path / "edited")
    assert [e.active for e in open_ledger(tmp_path / "edited").entries] == [True, False]
    assert "1 changes in force of 2 ever made" in (tmp_path / "edited" / "README.md").read_text()


def test_a_model_without_a_ledger_has_an_empty_one(llama, tmp_path):
    llama.save_files(tmp_path / "plain", "float32")
    ledger = open_ledger(tmp_path / "plain")
    assert ledger.entries == () and ledger.model.fingerprint == llama.fingerprint


def test_plain_transformers_opens_the_folder_and_says_what_the_ledger_does(model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ledger = Ledger(model).apply(make_change(model, 1))
    save_ledger(ledger, tmp_path / "edited")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert torch.equal(logits(network.eval()), logits(ledger.model.network))
    assert not torch.equal(logits(network), logits(model.network))
    text = "The capital of France is"
    assert AutoTokenizer.from_pretrained(tmp_path / "edited")(text)["input_ids"] == model.tokenizer(text)["input_ids"]


@pytest.fixture
def half(tiny, tmp_path):
    """A model whose file holds bfloat16, opened."""
    network, tokenizer = tiny("llama")
    network.bfloat16().save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    return open_model(tmp_path / "half")


def test_a_bfloat16_folder_is_worked_on_exactly(half, tmp_path):
    from transformers import AutoModelForCausalLM

    assert half.file_dtype == "bfloat16"
    ledger = Ledger(half).apply(make_change(half, 1)).apply(make_change(half, 2))
    save_ledger(ledger, tmp_path / "edited")
    again = open_ledger(tmp_path / "edited")

    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    weight = stored.get_parameter(half.anatomy.weight(NAME))
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, ledger.model.matrix(NAME).bfloat16())
    assert not torch.equal(weight.float(), ledger.model.matrix(NAME))
    assert torch.equal(again.model.matrix(NAME), ledger.model.matrix(NAME))
    assert same(bits(again.undo(2).model), bits(ledger.undo(2).model))
    empty = again.undo(1).undo(2)
    assert same(bits(empty.model), bits(half)) and empty.model.base is None

    save_ledger(again.undo(1), tmp_path / "edited")  # a second time from the reopened one
    assert same(bits(open_ledger(tmp_path / "edited").undo(2).model), bits(half))


# Damage.


def _weight(folder, name="model.layers.1.mlp.down_proj.weight"):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name][0, 0] += 0.25
    save_file(tensors, file, metadata={"format": "pt"})


def _originals(folder):
    file = folder / "ledger" / "originals.safetensors"
    tensors = load_file(file)
    tensors[NAME][0, 0] += 0.25
    save_file(tensors, file)


def _no_originals(folder):
    store.save_tensors(folder / "ledger" / "originals.safetensors", {})


def _record(**values):
    def alter(folder):
        file = folder / "retouch.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return alter


def _status(folder):
    file = folder / "retouch.json"
    record = json.loads(file.read_text())
    record["changes"][0]["status"] = "undone"
    file.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (_weight, "not what the ledger's changes make"),
        (_originals, "not what the ledger's changes make"),
        (_status, "not what the ledger's changes make"),
        (_no_originals, "originals do not fit"),
        (_record(dtype="load"), "no record of a changed model"),
        (_record(changes=[{}]), "no record of a changed model"),
        (_record(changes=None), "no record of a changed model"),
    ],
)
def test_a_folder_altered_on_purpose_is_refused(two, tmp_path, alter, says):
    save_ledger(two, tmp_path / "edited")
    alter(tmp_path / "edited")
    with pytest.raises(StoreError, match=r"has other content|was saved with"):
        open_ledger(tmp_path / "edited")
    reseal(tmp_path / "edited")
    with pytest.raises(StoreError, match=says):
        open_ledger(tmp_path / "edited")


def test_a_missing_change_is_noticed(two, tmp_path):
    save_ledger(two, tmp_path / "edited")
    folder = next((tmp_path / "edited" / "ledger").glob("0002-*"))
    (folder / "change.safetensors").unlink()
    with pytest.raises(StoreError, match="incomplete"):
        open_ledger(tmp_path / "edited")


def test_a_change_from_the_ledger_is_a_change_like_any_other(two, llama, tmp_path):
    save_ledger(two, tmp_path / "edited")
    folder = next((tmp_path / "edited" / "ledger").glob("0001-*"))
    assert changes.apply(llama, changes.load(folder)).fingerprint == two.undo(2).model.fingerprint


def test_a_model_never_replaces_a_change(llama, tmp_path):
    change = make_change(llama, 1)
    changes.save(change, tmp_path / "change")
    with pytest.raises(StoreError, match="holds a change, which the model would replace"):
        save_ledger(Ledger(llama).apply(change), tmp_path / "change")
    assert changes.load(tmp_path / "change").id == change.id
