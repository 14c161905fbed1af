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
from retouch.errors import NoEffect, StoreError, UnknownName, UserError, WrongBase
from retouch.ledger import Ledger, carried, open_ledger, read_log, save_ledger
from retouch.linalg import Identity, solve
from retouch.model import open_model, wrap
from retouch.parting import columns_of, identities, without

NAME = "blocks.1.mlp.down"
IDS = torch.tensor([[11, 57, 102, 13, 240, 31, 8]])


def make_change(model, seed, name=NAME, **more):
    make = torch.Generator().manual_seed(seed)
    out, into = model.anatomy.shape(name)
    part = LowRank(0.1 * torch.randn(out, 1, generator=make), torch.randn(1, into, generator=make))
    more.setdefault("facts", (fact(f"land {seed}", f"city {seed}"),))
    return Change("rome", model.base_fingerprint, {name: part}, settings={"seed": seed}, **more)


def fact(subject, target, prompt="The capital of {} is", **more):
    return {"prompt": prompt, "subject": subject, "target": target, **more}


def batch(model, facts, *, lam=2.0, keep=None, mode="least_squares", seed=0, **more):
    """Facts written together at a weight: random keys and residuals, the real solver."""
    make = torch.Generator().manual_seed(seed)
    out, into = model.anatomy.shape(NAME)
    keys, residuals = torch.randn(into, len(facts), generator=make), torch.randn(out, len(facts), generator=make)
    metric = Identity(lam if mode == "least_squares" else 1.0)
    solved = solve(keys, residuals, metric, mode=mode, keep=keep)
    part = LowRank(solved.left.float(), solved.right.float())
    columns = {"keys": {NAME: keys}, "targets": {NAME: residuals}} | more
    return Change("test", model.base_fingerprint, {NAME: part}, facts=tuple(facts), **columns)


LANDS = ("France", "Italy", "Japan", "Peru")
CITIES = tuple(fact(land, "Lyon") for land in LANDS)


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
                "facts": [{"prompt": "The capital of {} is", "subject": "land 1", "target": "city 1"}],
                "until": 1,
            }
        ],
    }


def test_a_change_that_is_in_force_is_not_applied_again(two, llama):
    with pytest.raises(StoreError, match="in force already, as number 2"):
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


# A fact that is edited again.


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (fact("FRANCE", "Nice"), True),
        (fact("Ｆｒａｎｃｅ ", "Nice", "the  Capital of {} is"), True),
        (fact("Italy", "Nice"), False),
        (fact("France", "Nice", "The president of {} is"), False),
        (fact("France", "Nice", "{} is ruled from", relation="capital"), True),
        (fact("France", "Nice", "{} is ruled from", relation="president"), False),
        (fact("France", "Nice", "{} is ruled from"), False),
    ],
)
def test_facts_are_about_the_same_by_subject_and_relation_or_template(other, same):
    assert bool(identities(fact("France", "Lyon", relation="Capital")) & identities(other)) is same


def test_a_fact_that_is_edited_again_can_be_taken_out_first(llama):
    first = make_change(llama, 1, facts=CITIES[:1], keys={NAME: torch.ones(64, 1)})
    ledger = Ledger(llama).apply(first)
    fresh, again = ledger.supersede([fact("france", "Nice")])
    assert again == [] and same(bits(fresh.model), bits(llama))
    assert [e.status for e in fresh.entries] == ["superseded"] and fresh.keys(NAME) is None
    second = make_change(llama, 2, facts=(fact("france", "Nice"),), keys={NAME: torch.full((64, 1), 2.0)})
    for got in (fresh.apply(second), ledger.apply(second, policy="replace")):
        assert [line["status"] for line in got.to_dict()["changes"]] == ["superseded", "active"]
        assert got.model.fingerprint == Ledger(llama).apply(second).model.fingerprint
        assert got.keys(NAME)[0].tolist() == [2.0]


def test_a_change_that_says_what_it_was_planned_without_replaces_that(llama):
    first = make_change(llama, 1, facts=CITIES[:1])
    second = make_change(llama, 2, facts=(fact("France", "Nice"),), notes={"supersedes": [first.id]})
    other = make_change(llama, 3, facts=(fact("France", "Brest"),))
    assert [e.status for e in Ledger(llama).apply(first).apply(second).entries] == ["superseded", "active"]
    assert [e.status for e in Ledger(llama).apply(other).apply(second).entries] == ["active", "active"]


def test_a_stacked_fact_stays_in_the_weights_but_its_key_is_free(llama, tmp_path):
    first = make_change(llama, 1, facts=CITIES[:1], keys={NAME: torch.ones(64, 1)})
    second = make_change(llama, 2, facts=(fact("France", "Nice"),), keys={NAME: torch.full((64, 1), 2.0)})
    ledger = Ledger(llama).apply(first).apply(second)
    assert {c.id for c in ledger.active} == {first.id, second.id}
    assert ledger.keys(NAME)[0].tolist() == [2.0]
    line = ledger.to_dict()["changes"][0]
    assert (line["status"], line["in_force"]) == ("superseded", True)
    save_ledger(ledger, tmp_path / "m")
    again = open_ledger(tmp_path / "m")
    assert again.to_dict() == ledger.to_dict() and same(bits(again.model), bits(ledger.model))
    old = again.undo(2)  # the older one holds again
    assert old.to_dict()["changes"][0]["status"] == "active" and old.keys(NAME)[0].tolist() == [1.0]
    assert same(bits(again.undo(1).undo(2).model), bits(llama))


def test_one_stale_fact_leaves_its_batch(llama):
    change = batch(llama, CITIES)
    ledger, again = Ledger(llama).apply(change).supersede([fact("Italy", "Milan")])
    assert again == []
    (entry,) = ledger.entries
    assert entry.active and entry.removed == {1: ("superseded", 1)} and entry.facts == [0, 2, 3]
    assert torch.equal(ledger.keys(NAME), change.keys[NAME][:, [0, 2, 3]])
    stacked = Ledger(llama).apply(change).apply(make_change(llama, 1, facts=(fact("Italy", "Milan"),)))
    assert stacked.to_dict()["changes"][0]["stale"] == [1]
    assert torch.equal(stacked.keys(NAME), change.keys[NAME][:, [0, 2, 3]])


def test_facts_of_one_value_leave_together_and_are_to_be_planned_again(llama):
    facts = (CITIES[0], fact("France", "the pound", "The money of {} is"), CITIES[1])
    make = torch.Generator().manual_seed(0)
    keys, targets = torch.randn(64, 2, generator=make), torch.randn(32, 2, generator=make)
    solved = solve(keys, targets, Identity(2.0), mode="least_squares")
    part = LowRank(solved.left.float(), solved.right.float())
    change = Change(
        "merge", llama.base_fingerprint, {NAME: part}, facts=facts, keys={NAME: keys}, targets={NAME: targets}
    )
    assert columns_of(change) == [(0, 1), (2,)]
    ledger, again = Ledger(llama).apply(change).supersede([fact("France", "Nice")])
    assert again == [facts[1]]
    assert ledger.entries[0].facts == [2] and ledger.entries[0].change.facts == (facts[2],)
    with pytest.raises(UserError, match=r"Fact 0 of change .* shares one value with fact 1"):
        Ledger(llama).apply(change).undo(1, 0)
    dense = replace(change, parts={NAME: Dense(part.delta().float())}, keys={}, targets={})
    ledger, again = Ledger(llama).apply(dense).supersede([fact("France", "Nice")])
    assert again == list(facts[1:]) and ledger.entries[0].status == "superseded"
    with pytest.raises(UserError, match="shares whole weights with facts 0, 2"):
        Ledger(llama).apply(dense).undo(1, 1)


# One fact of a batch.


@pytest.mark.parametrize("kept", [0, 5])
def test_least_squares_without_a_fact_is_the_solve_that_never_had_it(llama, kept):
    keep = torch.randn(64, kept, generator=torch.Generator().manual_seed(9)) if kept else None
    change = batch(llama, CITIES, keep=keep)
    for gone in ({1}, {0, 3}, {1, 2, 3}):
        rest = [i for i in range(4) if i not in gone]
        keys, residuals = change.keys[NAME][:, rest], change.targets[NAME][:, rest]
        never = solve(keys, residuals, Identity(2.0), mode="least_squares", keep=keep)
        got = without(change, gone)
        assert got.facts == tuple(CITIES[i] for i in rest)
        assert torch.equal(got.keys[NAME], keys) and torch.equal(got.targets[NAME], residuals)
        wanted = never.left @ never.right
        assert (got.parts[NAME].delta() - wanted).norm() < 1e-5 * wanted.norm()


def test_equality_without_a_fact_leaves_the_others_exactly(llama):
    change = batch(llama, CITIES, mode="equality")
    part, rest = without(change, {2}).parts[NAME], [0, 1, 3]
    assert torch.equal(part.left, change.parts[NAME].left[:, rest])
    assert torch.equal(part.right, change.parts[NAME].right[rest])
    assert torch.allclose(part.delta() @ change.keys[NAME].double()[:, rest], change.targets[NAME].double()[:, rest],
                          atol=1e-4)  # fmt: skip
    assert (part.delta() @ change.keys[NAME].double()[:, 2]).norm() < 1e-4


def test_a_change_without_targets_says_so(llama):
    with pytest.raises(UserError, match="keeps no targets"):
        Ledger(llama).apply(batch(llama, CITIES, targets={})).undo(1, 0)
    equality = batch(llama, CITIES, targets={}, mode="equality")
    assert Ledger(llama).apply(equality).undo(1, 0).entries[0].facts == [1, 2, 3]


@pytest.mark.parametrize("wrong", [4, -1])
def test_undoing_a_fact_that_is_not_there_names_what_is(llama, wrong):
    ledger = Ledger(llama).apply(batch(llama, CITIES)).undo(1, 2)
    with pytest.raises(UnknownName, match=f"has no fact {wrong} in force. In force: 0, 1, 3."):
        ledger.undo(1, wrong)
    with pytest.raises(UnknownName, match="has no fact 2 in force"):
        ledger.undo(1, 2)


def test_facts_undone_one_by_one_leave_nothing_and_a_folder_keeps_them(llama, tmp_path):
    ledger = Ledger(llama).apply(make_change(llama, 1)).apply(batch(llama, CITIES)).undo(2, 1).undo(2, 3)
    save_ledger(ledger, tmp_path / "m")
    again = open_ledger(tmp_path / "m")
    assert again.to_dict() == ledger.to_dict() == {k: read_log(tmp_path / "m")[k] for k in ("base", "changes")}
    assert [r["fact"] for r in again.to_dict()["changes"][1]["removed"]] == [1, 3]
    assert torch.equal(again.keys(NAME), ledger.keys(NAME))
    last = again.undo(2, 0).undo(2, 2)
    assert last.entries[1].status == "undone"
    assert same(bits(last.model), bits(Ledger(llama).apply(make_change(llama, 1)).model))


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


def test_what_another_process_wrote_meanwhile_is_not_lost(two, tmp_path):
    save_ledger(two, folder := tmp_path / "edited")
    found, mine = carried(folder), open_ledger(folder).undo(1)
    save_ledger(open_ledger(folder).undo(2), folder, found=found)
    with pytest.raises(StoreError, match="written by another process meanwhile"):
        save_ledger(mine, folder, found=found)
    assert [e.active for e in open_ledger(folder).entries] == [True, False]
    assert carried(tmp_path / "nowhere") == []


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
    save_file({}, folder / "ledger" / "originals.safetensors")


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


def test_a_record_that_is_no_record_is_named(tmp_path):
    (tmp_path / "retouch.json").write_text("[]")
    for read in (read_log, carried):
        with pytest.raises(StoreError, match="holds"):
            read(tmp_path)
