"""An export answers as the network does, stage by stage, from a folder that is whole or refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from retouch.errors import StoreError, UserError
from retouch.router import Router, open_router
from retouch.slim import rules
from retouch.slim.compaction import answer
from retouch.slim.export import at_cuts, default_cuts, export, quantise, recalibrated
from retouch.slim.network import SlimConfig, SlimForSequenceClassification
from retouch.store import check_folder

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

TEXTS = [
    "The capital of France is Paris.",
    ("The currency of Japan is the yen.", "Big Ben is located in London."),
    "a",
    "the official language of Brazil " * 9,
]
ALONE = [text for text in TEXTS if isinstance(text, str)]
UNEVEN = {"heads": [2, 4, 1], "d_ff": [24, 64, 8], "kept_heads": [[1, 3], [0, 1, 2, 3], [2]]}


def slim(family: str, n_blocks: int = 3, **fields) -> SlimForSequenceClassification:
    """Build a network whose exits differ clearly."""
    base = families.build(family, n_blocks=n_blocks).config.to_dict()
    torch.manual_seed(0)
    network = SlimForSequenceClassification(SlimConfig(base=base, **fields)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_((0.4 if "exits" in name else 0.1) * torch.randn_like(parameter))
    return network


@pytest.fixture(scope="module")
def network() -> SlimForSequenceClassification:
    fields = {"rank": 12, "pooling": "mean", "exits": [0, 2], "temperatures": [0.7, 1.0], "threshold": 0.8}
    return slim("bert", id2label={0: "no", 1: "so", 2: "yes"}, **UNEVEN, **fields)


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    told = export(network, families.tokenizer("word"), tmp_path_factory.mktemp("export") / "bert")
    assert str(told).endswith("exits after blocks 0, 2.")
    return told.folder


@pytest.fixture
def router(folder) -> Router:
    return open_router(folder, threads=1)


def batch_of(data, n_rows: int, vocab: int):
    """Draw rows of any length, with padding on any side."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=n_rows, max_size=n_rows))
    wide = max(lengths) + data.draw(st.integers(0, 3))
    seed = np.random.default_rng(data.draw(st.integers(0, 999)))
    ids, mask = seed.integers(5, vocab, (n_rows, wide)), np.zeros((n_rows, wide), np.int64)
    for row, length in enumerate(lengths):
        start = data.draw(st.sampled_from([0, wide - length]))
        mask[row, start : start + length] = 1
    return ids, mask, seed.integers(0, 2, (n_rows, wide))


def unsure_of(network, rule: str, ids, mask, types) -> np.ndarray:
    """Read every asked exit's uncertainty, (exits, rows), but the last's."""
    said = network.levels(*map(torch.tensor, (ids, mask, types))).logits
    state, found = None, []
    for block in network.widths.exits[:-1]:
        heat = rules.Rule(rule, network.config.temperatures).temperature(network.widths.exits, block)
        state = rules.advance(state, said[block])
        found.append(rules.uncertainty(rule, state, network.size.blocks, heat))
    return np.array(found)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_it_answers_as_the_network_does(network, folder, data):
    rule = data.draw(st.sampled_from(["entropy", "max_prob", "margin", "patience"]))
    threshold = data.draw(st.floats(0, 1.1))
    router = open_router(folder, threads=1)
    router.exits = dataclasses.replace(router.exits, rule=rule, threshold=threshold)
    ids, mask, types = batch_of(data, data.draw(st.integers(1, 6)), router.exits.vocab)
    got = router.answer(ids, mask, types)
    want = answer(network, *map(torch.tensor, (ids, mask, types)), rule=rule, threshold=threshold)
    clear = (np.abs(unsure_of(network, rule, ids, mask, types) - threshold) > 1e-4).all(axis=0)
    np.testing.assert_array_equal(got.where[clear], want.where.numpy()[clear])
    np.testing.assert_allclose(got.logits[clear], want.logits.numpy()[clear], rtol=0, atol=1e-4)


def test_some_leave_at_every_exit_and_stages_are_called_for_them_alone(network, router):
    ids = np.random.default_rng(0).integers(5, router.exits.vocab, (60, 6))
    unsure = unsure_of(network, "entropy", ids, np.ones_like(ids), np.zeros_like(ids))
    router.exits = dataclasses.replace(router.exits, threshold=float(np.quantile(unsure.min(axis=0), 0.6)))
    answers = router.answer(ids, np.ones_like(ids))
    left = [int((answers.where == block).sum()) for block in (0, 2)]
    assert min(left) > 0
    assert (router.calls, router.rows) == ([1, 1], [60, left[1]])
    early = ids[answers.where == 0]
    router.answer(early, np.ones_like(early))
    assert router.calls == [2, 1]


def test_one_row_of_one_token_is_answered(network, router):
    ids = np.array([[7]])
    got, want = router.answer(ids, [[1]]), answer(network, torch.tensor(ids), torch.ones(1, 1, dtype=torch.long))
    assert got.where.tolist() == want.where.tolist()
    np.testing.assert_allclose(got.logits, want.logits.numpy(), atol=1e-4)


def test_every_exit_can_be_asked(network, router):
    ids, mask, types = router.encode(TEXTS)
    got = router.every_exit(ids, mask, types)
    with torch.no_grad():
        want = network.levels(*map(torch.tensor, (ids, mask, types))).logits
    np.testing.assert_allclose(got, np.stack([want[0].numpy(), want[2].numpy()]), atol=1e-4)
    assert router.calls == [1, 1]


def test_texts_are_read_as_the_tokenizer_of_the_model_reads_them(network, router):
    tokenizer = families.tokenizer("word")
    said = [*router.predict(ALONE, batch_size=2), *router.predict(TEXTS[1:2])]
    for text, found in zip([*ALONE, TEXTS[1]], said):
        both = (text,) if isinstance(text, str) else text
        given = tokenizer(*both, truncation=True, max_length=128, return_tensors="pt", return_token_type_ids=True)
        want = answer(network, given["input_ids"], given["attention_mask"], given["token_type_ids"])
        heat = {0: 0.7, 2: 1.0}[int(want.where)]
        p = (want.logits[0] / heat).softmax(0)
        assert (found.label, found.exit_block) == (("no", "so", "yes")[int(p.argmax())], int(want.where))
        assert found.score == pytest.approx(float(p.max()), abs=1e-4)


def test_long_texts_are_cut_at_the_end_where_the_tokenizer_cuts_them(network, tmp_path):
    tokenizer = copy.deepcopy(families.tokenizer("word"))
    tokenizer.truncation_side = "left"
    router = open_router(export(network, tokenizer, tmp_path / "left", max_tokens=6).folder, threads=1)
    text = "the capital of France is in Brazil and not in Japan"
    want = tokenizer(text, truncation=True, max_length=6)["input_ids"]
    assert router.encode([text])[0].tolist() == [want]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cuts", "fields"),
    [
        ("mpnet", [0], {"pooler": "tanh", "heads": [3, 2], "kept_heads": [[0, 1, 3], [1, 3]], "n_blocks": 2}),
        (
            "roberta",
            [],
            {"task": "regression", "rule": "delta", "target_mean": 3.0, "target_scale": 2.0, "n_blocks": 1},
        ),
    ],
)
def test_other_families_and_tasks(tmp_path, family, cuts, fields):
    network = slim(family, threshold=0.6, **fields)
    tokenizer = families.tokenizer("word")
    router = open_router(export(network, tokenizer, tmp_path / "e", cuts=cuts, max_tokens=999).folder, threads=1)
    small = at_cuts(network, cuts)
    assert router.exits.cuts == small.widths.exits == (*cuts, network.size.blocks - 1)
    longest = router.exits.positions
    assert longest == router.exits.max_tokens < network.size.positions
    ids = np.random.default_rng(1).integers(5, router.exits.vocab, (5, longest))
    mask = np.arange(longest)[::-1] < np.array([[longest], [1], [5], [9], [3]])  # padding on the left
    got, want = router.answer(ids, mask), answer(small, torch.tensor(ids), torch.tensor(mask).long())
    np.testing.assert_allclose(got.logits, want.logits.numpy(), atol=1e-4)
    assert got.where.tolist() == want.where.tolist()
    assert router.exits.token_types == (family == "roberta")
    given = tokenizer(*TEXTS[1], return_tensors="pt", return_token_type_ids=True)
    with torch.no_grad():
        said = small(**given).logits[0]
    found = router.predict(TEXTS[1:2])[0]
    if network.config.task == "regression":
        assert (found.label, found.score) == (None, pytest.approx(said.item(), abs=1e-4))
    else:
        assert found.label == network.config.id2label[int(said.argmax())]


# ---------------------------------------------------------------- the folder


def test_the_folder_is_whole_and_holds_no_more_than_it_says(network, folder):
    names = {"stage0.onnx", "stage1.onnx", "exits.json", "tokenizer.json", "README.md"}
    assert set(check_folder(folder)["files"]) == names
    stages = b"".join((folder / f"stage{i}.onnx").read_bytes() for i in range(2))
    weights = 4 * sum(p.numel() for p in network.parameters())
    assert weights < len(stages) < weights + 60_000  # each weight once, and graphs without traces of who made them
    assert b".py" not in stages
    assert b"exits.2" not in (folder / "stage0.onnx").read_bytes()
    told = json.loads((folder / "exits.json").read_text())
    assert {k: told[k] for k in ("format", "rule", "threshold", "temperatures", "cuts", "labels", "precision")} == {
        "format": 1, "rule": "entropy", "threshold": 0.8, "temperatures": [0.7, 1.0], "cuts": [0, 2],
        "labels": ["no", "so", "yes"], "precision": "float32",
    }  # fmt: skip
    assert told["widths"] == {"heads": [2, 4, 1], "d_ff": [24, 64, 8], "rank": 12, "exits": [0, 2]}


def test_a_changed_stage_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    stage = copy / "stage1.onnx"
    stage.write_bytes(stage.read_bytes().replace(b"hidden", b"hadden", 1))
    with pytest.raises(StoreError, match=r"stage1.onnx has other content than it was saved with"):
        open_router(copy)


def test_it_answers_without_torch(folder):
    code = f"""
import sys
from retouch.router import open_router
found = open_router({str(folder)!r}, threads=1).predict(["The capital of France is Paris.", "a"])
print(len(found), [m for m in sys.modules if m.partition(".")[0] in ("torch", "transformers")])
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 []\n", "")


# ---------------------------------------------------------------- cuts


@pytest.mark.parametrize(
    ("shares", "least", "cuts"),
    [
        ({0: 0.3, 1: 0.049, 2: 0.05, 3: 0.6}, 0.05, (0, 2, 3)),
        ({}, 0.05, (3,)),
        ({0: 1.0}, 0.05, (0, 3)),
        ({0: 0.2, 1: 0.8}, 0.5, (1, 3)),
    ],
)
def test_cuts_are_where_enough_leave(shares, least, cuts):
    assert default_cuts([0, 1, 2, 3], shares, least) == cuts


def test_cuts_keep_their_exits_and_nothing_else():
    network = slim("bert", temperatures=[0.7, 1.5, 1.0], **UNEVEN)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    small = at_cuts(network, [1])
    assert (small.widths.exits, small.config.temperatures, sorted(small.exits)) == ((1, 2), [1.5, 1.0], ["1", "2"])
    ids = torch.arange(5, 25).reshape(4, 5)
    with torch.no_grad():
        many, few = network.levels(ids, torch.ones_like(ids)), small.levels(ids, torch.ones_like(ids))
    assert all(torch.equal(many.logits[block], few.logits[block]) for block in (1, 2))
    assert network.widths.exits == (0, 1, 2)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_cuts_that_cannot_be_are_refused(network, tmp_path):
    tokenizer = families.tokenizer("word")
    with pytest.raises(UserError, match="no exit is asked after block 1; choose from 0, 2"):
        export(network, tokenizer, tmp_path / "e", cuts=[1])
    late = at_cuts(network, [0])
    late.config.min_block = 1
    with pytest.raises(UserError, match="no exit is asked after block 0; choose from 2"):
        at_cuts(late, [0])
    with pytest.raises(UserError, match="no exit after block 3"):
        default_cuts([0, 1], {3: 0.5})
    with pytest.raises(UserError, match="but not both"):
        export(network, tokenizer, tmp_path / "e", cuts=[1], shares={1: 0.5})
    with pytest.raises(UserError, match="fast tokenizer"):
        export(network, object(), tmp_path / "e")
    with pytest.raises(UserError, match="give a list of texts"):
        export(network, tokenizer, tmp_path / "e", int8=True)
    assert not (tmp_path / "e").exists()


# ---------------------------------------------------------------- int8 and new thresholds


def test_int8_is_smaller_compared_and_told(folder, tmp_path, capfd):
    told = quantise(folder, tmp_path / "int8", TEXTS * 5)
    found = told.quantised
    assert found.bytes_int8 == told.n_bytes < 0.7 * found.bytes_float32
    assert found.n_texts == 20
    pace = "faster" if found.speedup >= 1 else "SLOWER"
    assert f"x {pace} than float32" in str(told)
    assert f"{found.agreement:.1%} of 20 texts" in str(told)
    router = open_router(tmp_path / "int8", threads=1)
    assert router.exits == dataclasses.replace(open_router(folder).exits, precision="int8")
    full = open_router(folder, threads=1)
    pairs = [(full.predict([text])[0], router.predict([text])[0]) for text in TEXTS]
    assert found.agreement == np.mean([a.label == b.label for a, b in pairs])
    assert found.same_exit == np.mean([a.exit_block == b.exit_block for a, b in pairs])
    rows = full.encode(TEXTS)
    assert np.corrcoef(full.every_exit(*rows).ravel(), router.every_exit(*rows).ravel())[0, 1] > 0.9
    with pytest.raises(UserError, match="is int8 already"):
        quantise(tmp_path / "int8", tmp_path / "again", TEXTS)
    with pytest.raises(UserError, match="give a list of texts"):
        quantise(folder, tmp_path / "again", [])
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_an_export_to_int8_goes_the_same_way_in_silence(tmp_path, capfd):
    network = slim("distilbert", n_blocks=1)
    handlers, weights = logging.root.handlers[:], {k: v.clone() for k, v in network.state_dict().items()}
    told = export(network.train(), families.tokenizer("word"), tmp_path / "e", int8=True, texts=TEXTS)
    assert network.training
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
    assert logging.root.handlers == handlers
    assert capfd.readouterr() == ("", "")
    assert (told.exits.cuts, told.exits.precision, told.exits.threshold) == ((0,), "int8", None)
    assert [p.exit_block for p in open_router(told.folder).predict(ALONE)] == [0] * 3


def test_a_new_threshold_leaves_the_stages_as_they_are(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    before = check_folder(copy)["files"]
    recalibrated(copy, threshold=2.0, temperatures=[1.0, 2.0], rule="margin")
    router = open_router(copy)
    assert (router.exits.threshold, router.exits.temperatures, router.exits.rule) == (2.0, (1.0, 2.0), "margin")
    assert {p.exit_block for p in router.predict(ALONE)} == {0}
    recalibrated(copy, threshold=None)
    after = check_folder(copy)["files"]
    assert {p.exit_block for p in open_router(copy).predict(ALONE)} == {2}
    assert {n for n in before if before[n] != after[n]} == {"exits.json", "README.md"}
    with pytest.raises(UserError, match="temperatures cannot be"):
        recalibrated(copy, threshold=0.5, temperatures=[1.0])
    assert check_folder(copy)["files"] == after
