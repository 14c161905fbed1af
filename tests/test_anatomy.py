"""Every family's table is true of a real network of that family, and a wrong table is found out."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from families import DECODERS, ENCODERS, FAMILIES
from retouch import anatomy as anatomy_module
from retouch.anatomy import describe, prove
from retouch.anatomy import families as known_families
from retouch.errors import ModelError, UnknownName

IDS = torch.tensor([[11, 57, 102, 13, 240, 31, 8], [90, 14, 333, 21, 77, 210, 401]])


def _hooks(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """Write a table of one's own that is `like` a known one, but for `changes`."""

    def write(like, **changes):
        folder = tmp_path / "tables"
        folder.mkdir(exist_ok=True)
        (folder / f"{like}.yaml").write_text(yaml.safe_dump({"like": like, **changes}))
        monkeypatch.setenv("RETOUCH_ANATOMY", str(folder))

    return write


def test_importing_the_package_loads_no_torch():
    code = "import sys, retouch.anatomy as a; a.families(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_table_has_a_tiny_model():
    assert set(known_families()) == {name.removesuffix("_square") for name in FAMILIES}


@pytest.mark.parametrize("headless", [False, True], ids=["whole", "headless"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_proved(tiny, name, headless):
    network, _ = tiny(name, headless=headless)
    anatomy = describe(network.config, network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    prove(anatomy, network, IDS)
    assert anatomy.kind == ("encoder" if name in ENCODERS else "decoder")
    assert (anatomy.n_blocks, anatomy.d_model, anatomy.heads) == (2, 32, 4)
    assert anatomy.d_ff == (32 if name.endswith("_square") else 64)
    assert anatomy.has_head is not headless
    assert _hooks(network) == 0
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_resolves_to_a_parameter_of_the_stated_shape(tiny, name):
    network, _ = tiny(name)
    anatomy = describe(network.config, network)
    assert {"embed", "head", "blocks.0.mlp.down", "blocks.1.attention.out"} <= set(anatomy.names())
    for ours in anatomy.names():
        shape = tuple(network.get_parameter(anatomy.weight(ours)).shape)
        assert shape == anatomy.shape(ours)[:: -1 if anatomy.transposed(ours) else 1]


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_attention_is_known_map_by_map(tiny, name):
    network, _ = tiny(name)
    anatomy = describe(network.config, network.base_model)
    maps = [anatomy.path(f"blocks.1.attention.{part}") for part in ("query", "key", "value", "out")]
    assert len(set(maps)) == 4
    assert all(network.base_model.get_submodule(path).weight.shape == (32, 32) for path in maps)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_matrix_in_its_stated_orientation_is_what_the_module_multiplies_by(tiny, name):
    network, _ = tiny(name)
    anatomy = describe(network.config, network)
    for ours in [n for n in anatomy.names() if n.startswith("blocks.")]:
        weight = network.get_parameter(anatomy.weight(ours)).double()
        matrix = weight.T if anatomy.transposed(ours) else weight
        module = copy.deepcopy(network.get_submodule(anatomy.path(ours))).double()
        key = torch.randn(3, anatomy.shape(ours)[1], dtype=torch.float64)
        bias = getattr(module, "bias", None)
        expected = key @ matrix.T + (0 if bias is None else bias)
        torch.testing.assert_close(module(key), expected)


@pytest.mark.parametrize("headless", [False, True], ids=["whole", "headless"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_reverse_map_is_the_inverse(tiny, name, headless):
    network, _ = tiny(name, headless=headless)
    anatomy = describe(network.config, network)
    for ours in anatomy.names():
        path = anatomy.path(ours)
        assert anatomy.path(anatomy.name(path)) == path
        assert anatomy.weight(anatomy.name(anatomy.weight(ours))) == anatomy.weight(ours)
        assert anatomy.name(path) == ours
    assert [anatomy.name(anatomy.path(f"blocks.{i}")) for i in range(2)] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("name", FAMILIES)
def test_without_the_network_the_class_with_a_head_is_meant(tiny, name):
    network, _ = tiny(name)
    blind, seeing = describe(network.config), describe(network.config, network)
    assert blind.names() == seeing.names()
    assert [blind.weight(n) for n in blind.names()] == [seeing.weight(n) for n in blind.names()]
    assert blind.tied == seeing.tied
    prove(blind, network, IDS)


@pytest.mark.parametrize("name", DECODERS)
def test_reading_out_an_earlier_block_is_the_logit_lens(tiny, name):
    shallow, _ = tiny(name, n_blocks=1)
    deep, _ = tiny(name)
    shallow.load_state_dict(deep.state_dict(), strict=False)
    anatomy = describe(deep.config, deep)
    seen = []
    block = deep.get_submodule(anatomy.path("blocks.0"))
    with torch.no_grad(), block.register_forward_hook(lambda m, a, out: seen.append(out)):
        deep(IDS)
        hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        torch.testing.assert_close(anatomy.read_out(deep, hidden), shallow(IDS).logits)


def test_what_the_tables_say_of_ties_caps_and_groups(tiny):
    def of(name, **fields):
        network, _ = tiny(name, **fields)
        return describe(network.config, network)

    assert of("gpt2").tied and of("qwen2").tied and not of("llama").tied
    assert of("gemma2").softcap == 30.0 and of("gemma3_text").softcap is None
    assert of("gptj").parallel and of("gpt_neox").parallel and not of("gpt2").parallel
    assert not of("gpt_neox", use_parallel_residual=False).parallel
    assert of("gpt2").groups == {"gpt2"}
    assert of("opt").flat_mlp and not of("llama").flat_mlp
    assert of("qwen3").shape("blocks.0.attention.out") == (32, 64)
    assert of("phi3").shape("blocks.0.mlp.gate_up") == (128, 32)


@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_an_empty_n_inner_means_four_times_the_width(tiny, name):
    network, _ = tiny(name, n_inner=None)
    anatomy = describe(network.config, network)
    assert anatomy.d_ff == 128
    prove(anatomy, network, IDS)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("opt", {"word_embed_proj_dim": 16}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("gemma3_text", {"final_logit_softcapping": 2.0}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"n_blocks": 1}),
        ("llama", {"n_blocks": 5, "tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_the_less_common_sizes_are_proved_too(tiny, name, fields):
    network, _ = tiny(name, **fields)
    prove(describe(network.config, network), network, IDS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "gptj", "gemma2", "olmo2", "bert"])
def test_half_precision_is_proved(tiny, name, dtype):
    network, _ = tiny(name)
    network.to(dtype)
    prove(describe(network.config, network), network, IDS)


def test_a_training_network_is_proved_and_goes_on_training(tiny):
    network, _ = tiny("gpt2")
    network.train()
    network.transformer.ln_f.eval()
    prove(describe(network.config, network), network, IDS)
    assert network.training and network.transformer.h[1].mlp.training and not network.transformer.ln_f.training


def test_a_classifier_on_the_body_is_proved_without_a_head(tiny):
    from transformers import BertForSequenceClassification

    network, _ = tiny("bert")
    classifier = BertForSequenceClassification(network.config).eval()
    anatomy = describe(classifier.config, classifier)
    assert not anatomy.has_head
    assert anatomy.path("blocks.1") == "bert.encoder.layer.1"
    prove(anatomy, classifier, IDS)


# A wrong table.

LLAMA = {
    "attention": "self_attn",
    "attention.out": "self_attn.o_proj",
    "mlp": "mlp",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
# name: (tiny model, changes of its table, the error)
OPPOSITE = "expected {}; got the other orientation"
WRONG = {
    "axes": ("llama", {"axes": {"mlp.up": "in_out"}}, "up_proj.weight: expected blocks.0.mlp.up stored (in, out)"),
    "axes_gpt2": (
        "gpt2",
        {"axes": {"attention.out": "in_out"}},
        "c_attn.weight: expected blocks.0.attention.qkv stored (out, in)",
    ),
    "square": ("llama_square", {"axes": {"mlp.down": "in_out"}}, OPPOSITE.format("(in, out)")),
    "square_gpt2": ("gpt2_square", {"axes": {"attention.qkv": "in_out"}}, OPPOSITE.format("(out, in)")),
    "path": ("llama", {"block": LLAMA | {"mlp.down": "mlp.dwn_proj"}}, "layers.0.mlp.dwn_proj: expected a module"),
    "swapped": (
        "llama",
        {"block": LLAMA | {"mlp.up": "mlp.down_proj", "mlp.down": "mlp.up_proj"}},
        "up_proj.weight: expected blocks.0.mlp.down stored (out, in) as (32, 64); got (64, 32)",
    ),
    "blocks": ("llama", {"blocks": "model.blocks"}, "the blocks are expected at 'model.blocks' or 'blocks'"),
    "step": ("llama", {"steps": ["model.rms", "lm_head"]}, "At model.rms: expected a module"),
    "no_norm": ("llama", {"steps": ["lm_head"]}, "At lm_head: expected the network's own output to 0.0001; got"),
    "head": ("llama", {"head": "output"}, "At head: expected a head at the path of the table"),
    "softcap": ("gemma2", {"softcap": None}, "expected the network's own output to 0.0001"),
    "parallel": ("llama", {"parallel": True}, "expected attention parallel to the MLP; got the opposite"),
    "sequential": ("gptj", {"parallel": False}, "expected attention feeding the MLP of its block"),
    "flat": ("opt", {"flat_mlp": False}, "layers.0.fc2: expected input (2, 7, 64); got (14, 64)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_found_out(tiny, own_table, case):
    name, changes, message = WRONG[case]
    network, _ = tiny(name, **({"final_logit_softcapping": 1.0} if case == "softcap" else {}))
    file = {"gemma2": "gemma"}.get(name, name.removesuffix("_square"))
    own_table(file, **changes)
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        prove(describe(network.config, network), network, IDS)
    assert f"tables/{file}.yaml" in str(caught.value)
    assert _hooks(network) == 0


def test_a_configuration_that_lies_about_its_sizes_is_found_out(tiny):
    network, _ = tiny("llama")
    for key, value, message in [("intermediate_size", 48, "(48, 32)"), ("num_hidden_layers", 1, "expected 1 blocks")]:
        config = copy.deepcopy(network.config)
        setattr(config, key, value)
        with pytest.raises(ModelError) as caught:
            prove(describe(config, network), network, IDS)
        assert message in str(caught.value)


def test_a_write_that_reaches_nothing_is_found_out(tiny):
    network, _ = tiny("llama")
    network.model.layers[1].mlp.forward = lambda hidden: torch.zeros_like(
        network.model.layers[1].mlp.down_proj(network.model.layers[1].mlp.up_proj(hidden))
    )
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj: expected a vector added .* got no change"):
        prove(describe(network.config, network), network, IDS)


def test_a_network_that_refuses_the_batch_is_left_without_hooks(tiny):
    network, _ = tiny("llama")
    with pytest.raises(ModelError, match="'llama': a dummy batch of token ids does not pass through LlamaForCausalLM"):
        prove(describe(network.config, network), network, IDS + 10_000)
    assert _hooks(network) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be a table of names and values; got list"),
        ("a: [", "cannot be read as a table"),
        ("like: llama\nblok: {}", "mine.yaml: unknown blok. Allowed: model_types, "),
        ("model_types: [mine]", "missing kind, body, blocks"),
    ],
)
def test_a_table_that_is_not_one_names_its_file(tmp_path, monkeypatch, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setenv("RETOUCH_ANATOMY", str(tmp_path))
    with pytest.raises(ModelError, match=message) as caught:
        known_families()
    assert "mine.yaml" in str(caught.value)


def test_a_folder_of_tables_that_does_not_exist_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("RETOUCH_ANATOMY", str(tmp_path / "none"))
    with pytest.raises(ModelError, match="RETOUCH_ANATOMY must name a folder of tables"):
        known_families()


def test_wrong_axes_in_a_table_say_what_is_allowed(tiny, own_table):
    own_table("llama", axes="rows")
    with pytest.raises(ModelError, match="axes must be in_out or out_in; got rows"):
        describe(tiny("llama")[0].config)


def test_axes_of_a_part_that_the_blocks_lack_are_an_error(tiny, own_table):
    own_table("llama", axes={"mlp.dwn": "in_out"})
    with pytest.raises(ModelError, match=r"axes of mlp\.dwn, but its blocks have .*mlp\.down"):
        describe(tiny("llama")[0].config)


def test_axes_may_be_stated_weight_by_weight(tiny, own_table):
    own_table(
        "gpt2", axes={"attention.qkv": "in_out", "attention.out": "in_out", "mlp.up": "in_out", "mlp.down": "in_out"}
    )
    network, _ = tiny("gpt2")
    prove(describe(network.config, network), network, IDS)


# Unknown names.


def test_an_unknown_family_says_what_is_known_and_how_to_describe_it(tiny):
    config = copy.deepcopy(tiny("llama")[0].config)
    config.model_type = "lama"
    with pytest.raises(ModelError) as caught:
        describe(config)
    message = str(caught.value)
    assert "'lama'. Did you mean 'llama'?" in message
    assert all(name in message for name in known_families())
    assert "RETOUCH_ANATOMY" in message and "lama.yaml" in message
    example = next(word.strip(",") for word in message.split() if word.strip(",").endswith("llama.yaml"))
    assert Path(example).is_file()


def test_the_family_is_never_guessed_from_a_substring(tiny):
    config = copy.deepcopy(tiny("llama")[0].config)
    config.model_type = "my_llama_v2"
    with pytest.raises(ModelError):
        describe(config)


def test_a_described_family_of_ones_own_is_opened(tiny, tmp_path, monkeypatch):
    network, _ = tiny("llama")
    network.config.model_type = "mine"
    (tmp_path / "mine.yaml").write_text("like: llama\nmodel_types: [mine]\ngroups: [gpt2]\n")
    monkeypatch.setenv("RETOUCH_ANATOMY", str(tmp_path))
    anatomy = describe(network.config, network)
    prove(anatomy, network, IDS)
    assert anatomy.family == "mine" and anatomy.groups == {"mine", "gpt2"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.2.mlp.down", r"no block 2\. Allowed: blocks\.0 \.\.\. blocks\.1 \(blocks count from 0\)"),
        ("blocks.0.mlp.dwn", r"part of a llama block is called 'mlp\.dwn'\. Did you mean 'mlp\.down'"),
        ("blocks.-1", r"Known: blocks\.N, "),
        ("blocks.00", r"Known: blocks\.N, "),
        ("blocks", r"Known: blocks\.N, "),
        ("hed", r"Did you mean 'head'"),
    ],
)
def test_an_unknown_name_says_what_is_allowed(tiny, name, message):
    anatomy = describe(tiny("llama")[0].config)
    for ask in (anatomy.path, anatomy.weight, anatomy.shape, anatomy.transposed):
        with pytest.raises(UnknownName, match=message):
            ask(name)


@pytest.mark.parametrize("name", ["blocks.0", "blocks.0.mlp", "blocks.0.attention", "final_norm"])
def test_a_place_that_is_no_matrix_has_no_weight(tiny, name):
    anatomy = describe(tiny("llama")[0].config)
    assert anatomy.name(anatomy.path(name)) == name
    with pytest.raises(UnknownName, match=r"weight of a llama model .*Known: blocks\.N\.attention\.key"):
        anatomy.weight(name)


@pytest.mark.parametrize("path", ["model.layers.2", "model.layers.0.nothing", "model", "", "model.layers"])
def test_a_path_that_we_do_not_name_is_an_error(tiny, path):
    with pytest.raises(UnknownName, match=r"llama\.yaml"):
        describe(tiny("llama")[0].config).name(path)


def test_the_head_of_a_headless_network_is_unknown(tiny):
    network, _ = tiny("bert", headless=True)
    with pytest.raises(UnknownName, match="'head'"):
        describe(network.config, network).path("head")


def test_a_missing_field_of_the_configuration_is_named():
    class Config:
        model_type = "llama"

    with pytest.raises(ModelError, match=r"llama\.yaml reads the field 'num_hidden_layers'"):
        describe(Config())


@given(st.integers(0, 10**6), st.sampled_from(["", ".mlp.down", ".attention", ".mlp.up"]))
def test_block_of_reads_the_number_or_refuses(index, part):
    from transformers import GPTJConfig

    anatomy = describe(GPTJConfig(n_layer=28))
    if index < 28:
        assert anatomy.block_of(f"blocks.{index}{part}") == index
    else:
        with pytest.raises(UnknownName, match=r"blocks\.27"):
            anatomy.block_of(f"blocks.{index}{part}")


def test_block_of_something_outside_the_blocks_is_an_error(tiny):
    with pytest.raises(UnknownName, match=r"lies in no block\. Allowed: blocks\.0 \.\.\. blocks\.1"):
        describe(tiny("llama")[0].config).block_of("embed")


def test_an_anatomy_is_a_value(tiny):
    config = tiny("gpt2")[0].config
    one, two = describe(config), describe(config)
    assert one == two and hash(one) == hash(two)
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(AttributeError):
        one.d_ff = 1


def test_the_example_of_the_docstring_is_true():
    import doctest

    assert doctest.testmod(anatomy_module).failed == 0


# The tiny models themselves.


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_tiny_models_are_equal_from_build_to_build_and_not_flat(name):
    one, two = FAMILIES[name](), FAMILIES[name]()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with torch.no_grad():
        assert one(IDS).logits.std() > 0.5


def test_a_tiny_model_is_a_fresh_copy(tiny):
    one, two = tiny("llama")[0], tiny("llama")[0]
    with torch.no_grad():
        one.model.norm.weight.zero_()
    assert two.model.norm.weight.abs().sum() > 0


@pytest.mark.parametrize(("kind", "front"), [("byte", None), ("metaspace", "<s>"), ("word", "[CLS]")])
def test_tiny_tokenizers_give_offsets_and_their_marks(kind, front):
    from families import tokenizer

    text = "The Eiffel Tower is in Paris"
    encoded = tokenizer(kind)(text, return_offsets_mapping=True)
    assert text[encoded["offset_mapping"][-2 if kind == "word" else -1][0] :].strip() in "Paris"
    first = tokenizer(kind).convert_ids_to_tokens(encoded["input_ids"])[0]
    assert first == front if front else first == "The"


def test_the_network_is_blocked():
    import socket

    with pytest.raises(RuntimeError, match="Tests stay on this machine"), socket.socket() as outside:
        outside.connect(("192.0.2.1", 80))
