"""The router: rules as their formulas say, sessions called only for rows that remain, and no torch anywhere.

The stages here are small graphs that look logits up in a table, so that each test states what every exit says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch.errors import StoreError, UserError
from retouch.router import Answers, Exits, Router, open_router, read_exits
from retouch.slim.rules import Rule
from retouch.store import write_folder

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

EVEN = [0.0, 0.0]
SURE = [9.0, 0.0]


def looked_up(tables: np.ndarray, stage: int) -> bytes:
    """Build a stage that hands on, for each token, what all stages say, and answers with its own part at token 0."""
    n_stages, _, classes = tables.shape
    wide = np.concatenate(list(tables), axis=1).astype(np.float32)
    info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    mask = info("attention_mask", onnx.TensorProto.INT64, ["batch", "tokens"])
    hidden = info("hidden", onnx.TensorProto.FLOAT, ["batch", "tokens", n_stages * classes])
    ids = info("input_ids", onnx.TensorProto.INT64, ["batch", "tokens"])
    numbers = {"first": 0, "columns": range(stage * classes, (stage + 1) * classes)}
    constants = [onnx.numpy_helper.from_array(np.array(v, np.int64), k) for k, v in numbers.items()]
    constants.append(onnx.numpy_helper.from_array(wide, "table"))
    first = node("Identity", ["hidden"], ["onward"]) if stage else node("Gather", ["table", "input_ids"], ["onward"])
    nodes = [
        first,
        node("Gather", ["onward", "first"], ["token"], axis=1),
        node("Gather", ["token", "columns"], ["logits"], axis=1),
    ]
    onward = info("onward", onnx.TensorProto.FLOAT, ["batch", "tokens", n_stages * classes])
    logits = info("logits", onnx.TensorProto.FLOAT, ["batch", classes])
    outputs = [logits] if stage == n_stages - 1 else [onward, logits]
    graph = onnx.helper.make_graph(nodes, "stage", [hidden if stage else ids, mask], outputs, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


def words() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(8)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer.to_str()


def exits_of(tables: np.ndarray, **fields) -> Exits:
    n_stages, vocab, classes = tables.shape
    defaults = {
        "cuts": tuple(range(n_stages)), "rule": "entropy", "threshold": 0.5, "temperatures": (1.0,) * n_stages,
        "blocks": n_stages, "classes": classes, "task": "classification", "vocab": vocab, "positions": 16,
        "token_types": False, "max_tokens": 16, "pad": 0,
    }  # fmt: skip
    return Exits(**(defaults | fields))


def written(folder: Path, tables, **fields) -> Path:
    tables = np.array(tables, float)
    files = {f"stage{s}.onnx": looked_up(tables, s) for s in range(len(tables))}
    exits = json.dumps(exits_of(tables, **fields).to_dict())
    write_folder(folder, {**files, "exits.json": exits, "tokenizer.json": words()})
    return folder


def opened(folder: Path, tables, **fields) -> Router:
    return open_router(written(folder, tables, **fields), threads=1)


def asked(router: Router, first: list[int], n_tokens: int = 3) -> Answers:
    ids = np.repeat(np.array(first)[:, None], n_tokens, axis=1)
    return router.answer(ids, np.ones_like(ids))


# ---------------------------------------------------------------- who leaves where


def test_a_session_is_called_only_while_rows_remain(tmp_path):
    router = opened(tmp_path / "e", [[SURE, EVEN, EVEN], [EVEN, SURE, EVEN], [SURE, SURE, [0.0, 9.0]]])
    assert asked(router, [0, 0]).where.tolist() == [0, 0]
    assert (router.calls, router.rows) == ([1, 0, 0], [2, 0, 0])
    assert asked(router, [0, 1, 1]).where.tolist() == [0, 1, 1]
    assert (router.calls, router.rows) == ([2, 1, 0], [5, 2, 0])
    answers = asked(router, [2, 0, 1, 2])
    assert answers.where.tolist() == [2, 0, 1, 2]
    assert answers.logits.argmax(axis=1).tolist() == [1, 0, 0, 1]
    assert (router.calls, router.rows) == ([3, 2, 1], [9, 5, 2])


def test_no_rows_call_nothing(tmp_path):
    router = opened(tmp_path / "e", [[SURE], [SURE]])
    answers = router.answer(np.zeros((0, 4), int), np.zeros((0, 4), int))
    assert answers.logits.shape == (0, 2)
    assert answers.where.shape == (0,)
    assert router.predict([]) == []
    assert router.calls == [0, 0]


def test_the_threshold_is_strict_and_none_never_leaves(tmp_path):
    tables = [[EVEN, SURE], [SURE, SURE]]
    assert asked(opened(tmp_path / "one", tables, threshold=1.0), [0, 1]).where.tolist() == [1, 0]
    assert asked(opened(tmp_path / "more", tables, threshold=1.1), [0, 1]).where.tolist() == [0, 0]
    assert asked(opened(tmp_path / "zero", [[[1e4, -1e4]], [EVEN]], threshold=0.0), [0]).where.tolist() == [1]
    never = opened(tmp_path / "none", tables, threshold=None)
    assert asked(never, [0, 1]).where.tolist() == [1, 1]
    assert never.calls == [1, 1]


@pytest.mark.parametrize("rule", ["entropy", "max_prob", "margin"])
@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [-1e4, 3.0, 2.0]])
def test_huge_logits_give_numbers(tmp_path, rule, logits):
    two = logits[0] == logits[1]
    router = opened(tmp_path / "e", [[logits], [[0.0, 0.0, 0.0]]], rule=rule, threshold=0.99 if not two else 0.2)
    with np.errstate(all="raise", under="ignore"):
        assert asked(router, [0]).where.tolist() == [int(two)]


def by_formula(rule: str, logits: np.ndarray, temperature: float) -> float:
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    ranked = sorted(p)
    return {
        "entropy": -sum(x * np.log(x) for x in p) / np.log(len(p)),
        "max_prob": (1 - ranked[-1]) * len(p) / (len(p) - 1),
        "margin": 1 - (ranked[-1] - ranked[-2]),
    }[rule]


@pytest.mark.parametrize("rule", ["entropy", "max_prob", "margin"])
@pytest.mark.parametrize("classes", [2, 3])
def test_rules_are_their_formulas(tmp_path, rule, classes):
    tables = np.random.default_rng(1).normal(0, 2, (3, 60, classes)).astype(np.float32)
    temperatures, threshold = (2.0, 0.7, 1.0), 0.6
    router = opened(tmp_path / "e", tables, rule=rule, threshold=threshold, temperatures=temperatures)
    want = []
    for i in range(60):
        unsure = [by_formula(rule, tables[s, i].astype(float), temperatures[s]) for s in range(2)]
        want.append(next((s for s, u in enumerate(unsure) if u < threshold), 2))
    answers = asked(router, list(range(60)))
    assert answers.where.tolist() == want
    assert len(set(want)) == 3
    np.testing.assert_array_equal(answers.logits, tables[want, range(60)])


def test_patience_counts_agreement_of_the_same_row(tmp_path):
    a, b = [1.0, 0.0], [0.0, 1.0]
    tables = [[a, a, b], [a, b, a], [a, b, b], [b, b, b]]
    router = opened(tmp_path / "e", tables, rule="patience", threshold=0.51)  # two agreements of four blocks
    assert asked(router, [0, 1, 2]).where.tolist() == [2, 3, 3]
    router = opened(tmp_path / "f", tables, rule="patience", threshold=0.76)  # one agreement
    assert asked(router, [2, 1, 0]).where.tolist() == [3, 2, 1]


def test_regression_leaves_when_its_answer_stands_still(tmp_path):
    tables = [[[1.0], [0.0]], [[1.05], [0.4]], [[5.0], [0.41]], [[7.0], [0.5]]]
    fields = {"task": "regression", "target_mean": 10.0, "target_scale": 2.0}
    router = opened(tmp_path / "e", tables, rule="delta", threshold=0.1, **fields)
    assert asked(router, [0, 1]).where.tolist() == [1, 2]
    found = router.predict(["w0", "w1"])
    assert [(p.label, round(p.score, 4), p.exit_block) for p in found] == [(None, 12.1, 1), (None, 10.82, 2)]
    router = opened(tmp_path / "f", tables, rule="patience", tolerance=0.1, threshold=0.76, **fields)
    assert asked(router, [0, 1]).where.tolist() == [1, 2]
    router = opened(tmp_path / "g", tables, rule="patience", tolerance=0.02, threshold=0.76, **fields)
    assert asked(router, [0, 1]).where.tolist() == [3, 2]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_batch_answers_as_its_rows_alone(tmp_path_factory, data):
    rule = data.draw(st.sampled_from(["entropy", "max_prob", "margin", "patience"]))
    tables = np.random.default_rng(data.draw(st.integers(0, 9))).normal(0, 1.5, (3, 8, 2))
    router = opened(tmp_path_factory.mktemp("e") / "e", tables, rule=rule, threshold=data.draw(st.floats(0, 1.1)))
    rows = data.draw(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=5), min_size=1, max_size=6))
    wide = max(map(len, rows)) + data.draw(st.integers(0, 2))
    ids, mask = np.full((len(rows), wide), 7), np.zeros((len(rows), wide), int)
    for i, row in enumerate(rows):
        start = data.draw(st.integers(0, wide - len(row)))
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    together = router.answer(ids, mask)
    alone = [router.answer(np.array([row]), np.ones((1, len(row)), int)) for row in rows]
    assert together.where.tolist() == [a.where[0] for a in alone]
    np.testing.assert_array_equal(together.logits, np.concatenate([a.logits for a in alone]))


# ---------------------------------------------------------------- texts


def test_texts_come_back_in_their_order(tmp_path):
    router = opened(tmp_path / "e", [[SURE, EVEN], [EVEN, [0.0, 3.0]]], labels=("bad", "good"), temperatures=(2.0, 0.5))
    texts = ["w1 w1 w1", "w0", "w1 w0 w0", "w0 w1 w1 w1"]
    found = router.predict(texts, batch_size=3)
    assert [p.label for p in found] == ["good", "bad", "good", "bad"]
    assert [p.exit_block for p in found] == [1, 0, 1, 0]
    assert router.predict([("w1", "w0 w0")])[0].label == "good"
    assert found[0].score == pytest.approx(1 / (1 + np.exp(-6.0)))
    assert found[1].score == pytest.approx(1 / (1 + np.exp(-4.5)))


def test_long_texts_are_cut_and_long_rows_refused(tmp_path):
    router = opened(tmp_path / "e", [[SURE, EVEN], [SURE, EVEN]], positions=4, max_tokens=3)
    ids, mask, _ = router.encode(["w1 w1 w1 w1 w1", "w0"])
    assert ids.shape == (2, 3)
    assert mask.sum(axis=1).tolist() == [3, 1]
    with pytest.raises(UserError, match="5 tokens; the model reads at most 4"):
        router.answer(np.ones((1, 5), int), np.ones((1, 5), int))


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([1, 1], [1, 1], "must all be"),
        ([[1, 1]], [[1, 1, 1]], "must all be"),
        ([[1, 1]], [[0, 0]], "a token in every row"),
        ([[1, 1]], [[1, 2]], "1 for tokens"),
        ([[1, 9]], [[1, 1]], "from 0 to 1"),
        ([[1, -1]], [[1, 1]], "from 0 to 1"),
    ],
)
def test_wrong_batches_are_refused(tmp_path, ids, mask, message):
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "e", [[SURE, EVEN], [SURE, EVEN]]).answer(ids, mask)


def test_one_text_is_not_a_list_of_letters(tmp_path):
    router = opened(tmp_path / "e", [[SURE, EVEN], [SURE, EVEN]])
    with pytest.raises(UserError, match="Put it into a list"):
        router.predict("w1")
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        router.predict(["w1"], batch_size=0)
    with pytest.raises(UserError, match="Text 2 is empty"):
        router.predict(["w1", " "])
    with pytest.raises(UserError, match="mixed"):
        router.predict(["w1", ("w1", "w0")])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["w1", "w\ud800"], "Text 2 holds half of a character"),
        ([("w1", "w\udfff")], "Text 1 holds half of a character"),
        ([None], "Text 1 is None. Give a text, or a pair"),
        (["w1", 3], "Text 2 is 3"),
        ([("w1", "w0", "w1")], "Text 1 is"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, texts, message):
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "e", [[SURE, EVEN], [SURE, EVEN]]).predict(texts)


def test_the_kind_of_texts_that_it_was_not_trained_on_is_refused(tmp_path):
    tables = [[SURE, EVEN], [SURE, EVEN]]
    with pytest.raises(UserError, match="Text 1 is a pair, and this model was trained on single texts"):
        opened(tmp_path / "single", tables, pairs=False).predict([("w1", "w0")])
    with pytest.raises(UserError, match="Text 1 is a single text, and this model was trained on pairs"):
        opened(tmp_path / "pairs", tables, pairs=True).predict(["w1"])
    older = changed(written(tmp_path / "older", tables), pairs="gone")
    router = open_router(older, threads=1)
    assert router.exits.pairs is None and len(router.predict(["w1"]) + router.predict([("w1", "w0")])) == 2


# ---------------------------------------------------------------- what is refused


def changed(folder: Path, **fields) -> Path:
    """Write the folder again with other fields in exits.json; a field that is None goes."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    found = {**json.loads(files["exits.json"]), **fields}
    files["exits.json"] = json.dumps({k: v for k, v in found.items() if v != "gone"}).encode()
    write_folder(folder, files)
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2}, "has format 2; this Retouch reads up to 1. Update"),
        ({"format": 0}, "which no Retouch writes"),
        ({"format": "gone"}, "which no Retouch writes"),
        ({"format": True}, "which no Retouch writes"),
        ({"rule": "gone"}, "lacks or adds 'rule'"),
        ({"code": "x"}, "lacks or adds 'code'"),
        ({"rule": "guess"}, "rule cannot be 'guess'"),
        ({"cuts": [0]}, "cuts cannot be"),
        ({"cuts": [1, 0]}, "cuts cannot be"),
        ({"temperatures": [1.0]}, "temperatures cannot be"),
        ({"temperatures": [0.0, 1.0]}, "temperatures cannot be"),
        ({"threshold": "low"}, "threshold cannot be 'low'"),
        ({"task": "regression"}, "task cannot be 'regression'"),
        ({"rule": "delta"}, "rule cannot be 'delta'"),
        ({"labels": ["one"]}, "labels cannot be"),
        ({"max_tokens": 99}, "max_tokens cannot be 99"),
        ({"pad": 2}, "pad cannot be 2"),
        ({"precision": "int4"}, "precision cannot be 'int4'"),
        ({"pairs": 1}, "pairs cannot be 1"),
    ],
)
def test_an_exits_file_that_cannot_be_is_refused(tmp_path, fields, message):
    folder = changed(written(tmp_path / "e", [[SURE, EVEN], [SURE, EVEN]]), **fields)
    with pytest.raises(StoreError, match=message):
        open_router(folder)


def test_exits_come_back_as_they_were(tmp_path):
    tables = np.array([[SURE], [EVEN]])
    folder = written(tmp_path / "e", tables, labels=("a", "b"), threshold=None)
    assert read_exits(folder / "exits.json") == exits_of(tables, labels=("a", "b"), threshold=None)


def test_what_is_not_said_is_as_in_the_network():
    assert exits_of(np.zeros((2, 1, 2)), rule="patience").deciding() == Rule("patience", (1.0, 1.0))


def test_a_regression_cannot_leave_by_a_softmax():
    with pytest.raises(UserError, match="rule cannot be 'entropy'"):
        exits_of(np.zeros((2, 1, 1)), task="regression")


def test_a_damaged_or_foreign_folder_is_refused(tmp_path):
    folder = written(tmp_path / "e", [[SURE, EVEN], [SURE, EVEN]])
    stage = folder / "stage1.onnx"
    good = stage.read_bytes()
    stage.write_bytes(good[:-1] + b"\0")
    with pytest.raises(StoreError, match=r"stage1.onnx has other content"):
        open_router(folder)
    stage.write_bytes(good[:-1])
    with pytest.raises(StoreError, match=r"stage1.onnx has .* bytes and was saved with"):
        open_router(folder, verify=False)
    stage.unlink()
    with pytest.raises(StoreError, match=r"'stage1.onnx' missing"):
        open_router(folder)
    with pytest.raises(StoreError, match="does not exist"):
        open_router(tmp_path / "nothing")
    write_folder(tmp_path / "other", {"config.json": "{}"})
    with pytest.raises(StoreError, match=r"no exits.json, so it is no export"):
        open_router(tmp_path / "other")


def test_stages_that_are_none_are_refused(tmp_path):
    folder = written(tmp_path / "e", [[SURE, EVEN], [SURE, EVEN]])
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    write_folder(folder, files | {"stage0.onnx": b"no graph"})
    with pytest.raises(StoreError, match=r"stage0.onnx cannot be opened by onnxruntime"):
        open_router(folder)
    write_folder(folder, files | {"stage0.onnx": files["stage1.onnx"]})
    with pytest.raises(StoreError, match=r"stage0.onnx takes hidden, attention_mask; input_ids"):
        open_router(folder)
    write_folder(folder, files | {"tokenizer.json": b"{}"})
    with pytest.raises(StoreError, match=r"tokenizer.json is no tokenizer"):
        open_router(folder)
    del files["stage1.onnx"]
    write_folder(folder, files)
    with pytest.raises(StoreError, match=r"lacks 'stage1.onnx'"):
        open_router(folder)


def test_it_answers_without_torch(tmp_path):
    folder = written(tmp_path / "e", [[SURE, EVEN], [SURE, [0.0, 9.0]]])
    code = f"""
import sys
from retouch.router import open_router
router = open_router({str(folder)!r}, threads=1)
print([p.label for p in router.predict(["w1 w1", "w0"])], router.calls)
print([m for m in ("torch", "transformers", "scipy", "pydantic", "onnx") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["['1', '0'] [1, 1]", "[]"]
