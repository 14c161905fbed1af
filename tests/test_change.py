"""A change is stored whole or refused, fits its model or is refused, and is the same thing as a LoRA adapter."""

from __future__ import annotations

import json
import re
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from retouch import change as changes
from retouch import store
from retouch.change import Change, Dense, LowRank
from retouch.errors import NoEffect, StoreError, WrongBase
from retouch.model import wrap

# PEFT 0.21 asks transformers 5.23 by an old name; neither is ours to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[11, 57, 102, 13, 240, 31, 8], [90, 14, 333, 21, 77, 210, 401]])
FACT = {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon"}


@pytest.fixture(scope="module")
def open_tiny(tiny):
    opened = {}

    def make(family, **fields):
        key = (family, tuple(fields.items()))
        if key not in opened:
            opened[key] = wrap(*tiny(family, **fields), source=f"tiny {family}")
        return opened[key]

    return make


@pytest.fixture(scope="module")
def llama(open_tiny):
    return open_tiny("llama")


def low(model, name, rank=2, seed=0, size=0.1):
    out, into = model.anatomy.shape(name)
    make = torch.Generator().manual_seed(seed)
    return LowRank(size * torch.randn(out, rank, generator=make), torch.randn(rank, into, generator=make))


def dense(model, name, seed=0, size=0.1):
    return Dense(size * torch.randn(model.anatomy.shape(name), generator=torch.Generator().manual_seed(seed)))


def planned(model, parts, **more):
    return Change("rome", model.base_fingerprint, parts, settings={"block": 1, "clamp": 4.0}, facts=(FACT,), **more)


def lowrank_change(model, seed=0):
    return planned(model, {f"blocks.{i}.mlp.down": low(model, f"blocks.{i}.mlp.down", 2 + i, seed) for i in (0, 1)})


def dense_change(model, seed=0):
    return planned(model, {"blocks.1.mlp.down": dense(model, "blocks.1.mlp.down", seed)})


def logits(network):
    with torch.no_grad():
        return network(input_ids=IDS).logits


def reseal(folder):
    """Make a folder's list of files fit its content again, as somebody would who alters it on purpose."""
    inner = sorted((p for p in folder.rglob("*") if p.is_dir() and (p / "manifest.json").is_file()), reverse=True)
    for each in (*inner, folder):
        names = [p.relative_to(each).as_posix() for p in each.rglob("*") if p.is_file() and p != each / "manifest.json"]
        files = {n: {"sha256": store.sha256_file(each / n), "bytes": (each / n).stat().st_size} for n in names}
        (each / "manifest.json").write_text(json.dumps({"format": store.FORMAT, "files": files}))


# Files.


@pytest.mark.parametrize("make", [lowrank_change, dense_change])
def test_a_saved_change_comes_back_bit_for_bit(llama, tmp_path, make):
    before = replace(
        make(llama),
        keys={"blocks.1.mlp.down": torch.randn(64, 3)},
        targets={"blocks.1.mlp.down": torch.randn(32, 3)},
        notes={"contexts": ["", "I am. "], "facts": [{"reach": 0.25}]},
        report={"efficacy": 1.0},
    )
    changes.save(before, tmp_path / "change")
    after = changes.load(tmp_path / "change")

    assert after.id == before.id
    assert (after.method, after.base, after.facts) == (before.method, before.base, before.facts)
    assert (after.settings, after.notes, after.report) == (before.settings, before.notes, before.report)
    assert torch.equal(after.keys["blocks.1.mlp.down"], before.keys["blocks.1.mlp.down"])
    assert after.targets.keys() == {"blocks.1.mlp.down"}
    assert torch.equal(after.targets["blocks.1.mlp.down"], before.targets["blocks.1.mlp.down"])
    assert after.parts.keys() == before.parts.keys()
    for name, part in before.parts.items():
        assert type(after.parts[name]) is type(part)
        assert all(torch.equal(after.parts[name].tensors()[k], t) for k, t in part.tensors().items())


def test_a_saved_change_is_as_small_as_its_factors(llama, tmp_path):
    change = planned(llama, {"blocks.1.mlp.down": low(llama, "blocks.1.mlp.down", 1)})
    changes.save(change, tmp_path / "change")
    assert change.n_numbers == 32 + 64
    assert sum(p.stat().st_size for p in (tmp_path / "change").iterdir()) < 4096


def test_the_card_tells_a_person_what_changes(llama, tmp_path):
    changes.save(lowrank_change(llama), tmp_path / "change")
    card = (tmp_path / "change" / "README.md").read_text()
    assert "The capital of France is **Lyon**" in card
    assert "| blocks.0.mlp.down | 2 |" in card


def test_an_id_depends_on_content_and_not_on_reports(llama):
    change = lowrank_change(llama)
    assert changes.with_report(change, {"efficacy": 1.0}).id == change.id == lowrank_change(llama).id
    others = [
        lowrank_change(llama, seed=1),
        replace(change, base="0" * 32),
        replace(change, method="memit"),
        replace(change, facts=()),
        replace(change, settings={"block": 2}),
    ]
    assert len({c.id for c in (change, *others)}) == 6


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "change"
    changes.save(lowrank_change(llama), folder)
    return folder


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_truncated_or_flipped_file_is_refused(saved, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged") / "change"
    shutil.copytree(saved, folder)
    file = folder / data.draw(st.sampled_from(sorted(p.name for p in folder.iterdir())))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    try:
        change = changes.load(folder)
    except StoreError:
        return
    # white space at the end of the manifest decides nothing
    assert file.name == "manifest.json" and change.id == changes.load(saved).id


def _tensors(folder):
    return store.load_tensors(folder / "change.safetensors")


def _rewrite(folder, tensors):
    save_file(tensors, folder / "change.safetensors")


def _extra(folder):
    _rewrite(folder, _tensors(folder) | {"blocks.0.mlp.down/other": torch.ones(2, 2)})


def _nameless(folder):
    _rewrite(folder, _tensors(folder) | {"other": torch.ones(2, 2)})


def _missing(folder):
    tensors = _tensors(folder)
    tensors.pop("blocks.0.mlp.down/left")
    _rewrite(folder, tensors)


def _misfit(folder):
    _rewrite(folder, _tensors(folder) | {"blocks.0.mlp.down/left": torch.ones(32, 5)})


def _flat(folder):
    _rewrite(folder, _tensors(folder) | {"blocks.0.mlp.down/left": torch.ones(64)})


def _one_entry(folder):
    tensors = _tensors(folder)
    tensors["blocks.0.mlp.down/left"][0, 0] += 1e-3
    _rewrite(folder, tensors)


def _infinite(folder):
    file = folder / "change.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + struct.pack("<f", float("inf")))


def _record(**values):
    def alter(folder):
        file = folder / "retouch.json"
        record = json.loads(file.read_text()) | values
        file.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))

    return alter


def _no_object(folder):
    (folder / "retouch.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (_extra, r"blocks.0.mlp.down has the tensors \['left', 'other', 'right'\]"),
        (_nameless, "'other' of shape"),
        (_missing, r"has the tensors \['right'\]"),
        (_misfit, "has the tensors"),
        (_flat, r"shape \(64,\) does not belong"),
        (_infinite, "not finite"),
        (_one_entry, "The record was altered"),
        (_record(method="memit"), "does not match its id"),
        (_record(base="0" * 32), "does not match its id"),
        (_record(facts=[]), "does not match its id"),
        (_record(settings={"block": 2}), "does not match its id"),
        (_record(settings=None), "lacks 'settings'"),
        (_record(method=3), "lacks 'method'"),
        (_record(facts="all"), "lacks 'facts'"),
        (_record(facts=["all"]), "lacks 'facts'"),
        (_record(format=99), "format 99"),
        (_record(kind="model"), "kind 'model'"),
        (_no_object, "no change of format"),
    ],
)
def test_a_folder_altered_on_purpose_is_refused(saved, tmp_path, alter, says):
    folder = tmp_path / "altered"
    shutil.copytree(saved, folder)
    alter(folder)
    reseal(folder)
    with pytest.raises(StoreError, match=says):
        changes.load(folder)


# The base.


def test_a_change_for_another_width_names_both_models(open_tiny):
    wide, narrow = open_tiny("llama"), open_tiny("llama_square")
    change = planned(wide, {"blocks.1.mlp.down": low(wide, "blocks.1.mlp.down")})
    with pytest.raises(WrongBase) as caught:
        changes.apply(narrow, change)
    assert str(caught.value) == (
        f"This change was planned for model {wide.fingerprint[:6]} (32x64 at blocks.1.mlp.down); this model is "
        f"{narrow.fingerprint[:6]} (32x32). Open the model it was planned for, or plan it anew."
    )


def test_a_change_for_other_weights_of_one_shape_is_refused(open_tiny):
    here, there = open_tiny("gpt_neox"), open_tiny("gpt_neox", seed=1)
    name = "blocks.1.mlp.down"
    change = planned(there, {name: dense(there, name), f"{name}:bias": Dense(torch.ones(32, 1))})
    message = rf"{there.fingerprint[:6]} \(32x64 at {re.escape(name)}\); this model is {here.fingerprint[:6]} \(32x64\)"
    with pytest.raises(WrongBase, match=message):
        changes.apply(here, change)


def test_a_weight_that_the_model_lacks_is_named(open_tiny, llama):
    parts = {"blocks.2.mlp.down": LowRank(torch.ones(32, 1), torch.ones(1, 64))}
    with pytest.raises(WrongBase, match=r"at blocks.2.mlp.down\).*\(no such weight\)"):
        changes.apply(llama, planned(llama, parts))
    neox, name = open_tiny("gpt_neox"), "blocks.1.mlp.down"
    change = planned(neox, {name: dense(neox, name), f"{name}:bias": Dense(torch.ones(32, 1))})
    with pytest.raises(WrongBase, match=r"at blocks.1.mlp.down:bias\).*\(no such weight\)"):
        changes.apply(llama, change)


# Applying.


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt2_square", "llama_square"])
@pytest.mark.parametrize("make", [lowrank_change, dense_change])
def test_apply_makes_a_new_model_and_shares_the_rest(open_tiny, family, make):
    model = open_tiny(family)
    change = make(model)
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    new = changes.apply(model, change)

    touched = {model.anatomy.weight(n) for n in change.parts}
    for name, parameter in model.network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert (new.network.get_parameter(name) is parameter) == (name not in touched)
    for name, part in change.parts.items():
        wanted = (model.matrix(name).double() + part.delta()).float()
        assert torch.equal(new.matrix(name), wanted)
    assert new.base_fingerprint == model.fingerprint != new.fingerprint
    assert not torch.equal(logits(new.network), logits(model.network))


def test_edited_gives_the_changed_model_inside_a_with(llama):
    with changes.edited(llama, lowrank_change(llama)) as new:
        assert new.fingerprint == changes.apply(llama, lowrank_change(llama)).fingerprint


def _zero(model):
    return {"blocks.1.mlp.down": LowRank(torch.zeros(32, 1), torch.ones(1, 64))}


def _not_finite(model):
    return {"blocks.1.mlp.down": LowRank(torch.full((32, 1), torch.nan), torch.ones(1, 64))}


def _overflow(model):
    return {"blocks.1.mlp.down": LowRank(torch.full((32, 1), 1e30), torch.full((1, 64), 1e30))}


def _lost(model):
    return {"blocks.1.mlp.down": LowRank(torch.full((32, 1), 1e-12), torch.ones(1, 64))}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_zero, "was to move by 0"),
        (_not_finite, "not finite"),
        (_overflow, "not finite"),
        (_lost, "stored weight misses"),
        (lambda model: {}, "holds no weights"),
    ],
)
def test_a_change_that_does_nothing_or_breaks_the_weights_raises(llama, make, says):
    with pytest.raises(NoEffect, match=says):
        changes.apply(llama, planned(llama, make(llama)))


def test_norms_are_those_of_the_difference(llama):
    change = planned(
        llama,
        {"blocks.0.mlp.down": low(llama, "blocks.0.mlp.down"), "blocks.1.mlp.down": dense(llama, "blocks.1.mlp.down")},
    )
    for name, row in change.norms(llama).items():
        delta = change.parts[name].delta()
        assert row["frobenius"] == pytest.approx(float(delta.norm()))
        assert row["spectral"] == pytest.approx(float(torch.linalg.matrix_norm(delta, 2)))
        assert row["share_of_weight"] == pytest.approx(
            float(delta.norm() / llama.matrix(name).double().norm()), rel=1e-5
        )


def test_combined_changes_are_their_sum_and_keep_their_keys_and_targets(llama):
    name = "blocks.1.mlp.down"
    one, two = (
        replace(lowrank_change(llama, n), keys={name: torch.full((64, n), n)}, targets={name: torch.full((32, n), -n)})
        for n in (1, 2)
    )
    three = dense_change(llama, 3)
    both, all_three = changes.combine([one, two]), changes.combine([three, two, one])

    assert isinstance(both.parts[name], LowRank) and both.parts[name].rank == 6
    assert isinstance(all_three.parts[name], Dense)
    first, second = sorted((one, two), key=lambda c: c.id)  # the order of the sum, of the factors and of the columns
    assert torch.equal(both.keys[name], torch.cat([first.keys[name], second.keys[name]], 1))
    assert torch.equal(both.targets[name], -both.keys[name][:32])
    assert torch.equal(both.parts[name].right[: first.parts[name].rank], first.parts[name].right)
    total = sum(c.parts[name].delta() for c in (one, two, three))
    assert torch.allclose(all_three.parts[name].delta(), total, atol=1e-6)
    assert len(all_three.facts) == 3
    assert changes.combine([two, one]).id == both.id
    with pytest.raises(WrongBase, match="one model"):
        changes.combine([one, replace(two, base="0" * 32)])


def test_combined_targets_stand_beside_their_own_keys_or_are_dropped(llama):
    name = "blocks.1.mlp.down"
    one = replace(lowrank_change(llama, 1), keys={name: torch.ones(64, 2)}, targets={name: torch.ones(32, 2)})
    older = replace(lowrank_change(llama, 2), keys={name: torch.zeros(64, 1)})
    both = changes.combine([one, older])
    assert both.keys[name].shape == (64, 3) and dict(both.targets) == {}
    assert changes.combine([one, dense_change(llama)]).targets[name].shape == (32, 2)


@pytest.mark.parametrize(
    ("keys", "targets", "says"),
    [
        ((63, 2), (32, 2), "blocks.1.mlp.down is 32x64, to which keys 63x2, targets 32x2 do not fit"),
        ((64, 2), (64, 2), "keys 64x2, targets 64x2 do not fit"),
        ((64, 3), (32, 2), "keys 64x3, targets 32x2 do not fit"),
        (None, (31, 2), "to which targets 31x2 do not fit"),
    ],
)
def test_keys_and_targets_of_another_size_are_refused(llama, tmp_path, keys, targets, says):
    columns = {"keys": keys, "targets": targets}
    found = {k: {"blocks.1.mlp.down": torch.ones(size)} for k, size in columns.items() if size}
    changes.save(replace(lowrank_change(llama), **found), tmp_path / "change")
    with pytest.raises(StoreError, match=re.escape(says)):
        changes.load(tmp_path / "change")


def test_bfloat16_loses_much_of_a_small_edit_and_says_how_much(llama):
    name = "blocks.1.mlp.down"
    small = planned(llama, {name: low(llama, name, 1, size=3e-4)})
    new = changes.apply(llama, small)
    error = changes.cast_error(new, {name: llama.matrix(name)}, "bfloat16")[name]
    wanted = (new.matrix(name).bfloat16().float() - new.matrix(name)).norm() / small.parts[name].delta().norm()
    assert error == pytest.approx(float(wanted), rel=1e-3)
    assert error > 0.1
    assert changes.cast_error(new, {name: llama.matrix(name)}, "float32") == {name: 0.0}


# Adapters.


@pytest.fixture
def plain(tiny):
    """Load an adapter folder with PEFT alone onto a fresh, unchanged network."""

    def load(family, folder):
        from peft import PeftModel

        return PeftModel.from_pretrained(tiny(family)[0], folder).eval()

    return load


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt2_square"])
def test_plain_peft_gives_the_same_logits_and_the_way_back_the_same_parts(open_tiny, plain, tmp_path, family):
    model = open_tiny(family)
    change = lowrank_change(model)
    changes.to_peft(change, model, tmp_path / "adapter")

    ours = logits(changes.apply(model, change).network)
    theirs = logits(plain(family, tmp_path / "adapter"))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert (theirs - logits(model.network)).abs().max() > 0.1

    back = changes.from_peft(tmp_path / "adapter", model)
    assert back.base == change.base
    for name, part in change.parts.items():
        assert torch.equal(back.parts[name].delta(), part.delta())


@pytest.fixture
def trained(tiny, tmp_path):
    """Make an adapter with PEFT itself, whose factors are not zero."""

    def make(family="llama", dtype=torch.float32, **fields):
        from peft import LoraConfig, get_peft_model

        wanted = {"r": 4, "lora_alpha": 6, "target_modules": ["down_proj", "o_proj"], "task_type": "CAUSAL_LM"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            network = get_peft_model(tiny(family)[0], LoraConfig(**(wanted | fields)))
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(0.1 * torch.randn_like(parameter))
                        parameter.data = parameter.data.to(dtype)
        network.save_pretrained(tmp_path / "trained")
        return network.eval(), tmp_path / "trained"

    return make


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"o_proj": 1}},
        {
            "rank_pattern": {r"layers\.[1-9]\.mlp\.down_proj": 2},
            "alpha_pattern": {r"layers\.1\..*": 3},
            "use_rslora": True,
        },
    ],
    ids=["plain", "rslora", "patterns", "expressions"],
)
def test_an_adapter_of_peft_becomes_a_change_of_the_same_logits(llama, trained, fields):
    network, folder = trained(**fields)
    change = changes.from_peft(folder, llama)
    assert len(change.parts) == 4
    assert torch.allclose(logits(changes.apply(llama, change).network), logits(network), atol=1e-4)


def test_a_half_precision_adapter_can_be_saved_as_a_change(llama, trained, tmp_path):
    _, folder = trained(dtype=torch.bfloat16)
    change = changes.from_peft(folder, llama)
    changes.save(change, tmp_path / "change")
    assert changes.load(tmp_path / "change").id == change.id
    assert {t.dtype for p in change.parts.values() for t in p.tensors().values()} == {torch.float32}


def _config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(llama, tmp_path, values, says):
    changes.to_peft(lowrank_change(llama), llama, tmp_path / "adapter")
    _config(tmp_path / "adapter", **values)
    with pytest.raises(StoreError, match=f"no plain LoRA.*{says}"):
        changes.from_peft(tmp_path / "adapter", llama)


def test_a_dora_adapter_of_peft_is_refused(llama, trained):
    with pytest.raises(StoreError, match="use_dora"):
        changes.from_peft(trained(use_dora=True)[1], llama)


def test_a_pickled_adapter_is_not_read(llama, tmp_path):
    changes.to_peft(lowrank_change(llama), llama, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(StoreError, match="Pickled adapters"):
        changes.from_peft(tmp_path / "adapter", llama)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (lambda t: {k.replace("down_proj", "side_proj"): v for k, v in t.items()}, "side_proj is no weight"),
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "lacks lora_B"),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, "does not belong"),
        (lambda t: {k: v[:, :1] if "lora_B" in k else v for k, v in t.items()}, "do not fit"),
    ],
)
def test_an_adapter_for_something_else_is_refused(llama, tmp_path, tensors, says):
    changes.to_peft(lowrank_change(llama), llama, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: t.contiguous() for name, t in tensors(store.load_tensors(file)).items()}, file)
    with pytest.raises(StoreError, match=says):
        changes.from_peft(tmp_path / "adapter", llama)


def test_an_adapter_for_another_width_is_refused(open_tiny, tmp_path):
    wide = open_tiny("llama")
    changes.to_peft(lowrank_change(wide), wide, tmp_path / "adapter")
    with pytest.raises(WrongBase, match="32x64"):
        changes.from_peft(tmp_path / "adapter", open_tiny("llama_square"))


def test_a_whole_difference_is_no_adapter(llama, tmp_path):
    with pytest.raises(StoreError, match="whole or not inside a block"):
        changes.to_peft(dense_change(llama), llama, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
