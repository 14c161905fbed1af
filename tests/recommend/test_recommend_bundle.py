import dataclasses
import json

import numpy as np
import pytest
import torch
from recommend_bundles import N_HISTORY, doctored, fitted, histories, proof, save, world

from retouch import store
from retouch.errors import StoreError, UserError
from retouch.model import wrap
from retouch.recommend.bundle import open_bundle
from retouch.recommend.certificate import Certified
from retouch.recommend.fusion import Fusion
from retouch.recommend.generator import SIZES, Generator
from retouch.recommend.instruction import Instructions
from retouch.recommend.knowledge import TextKnowledge
from retouch.recommend.policy import Policy
from retouch.recommend.prototypes import Prototypes, fit_prototypes, on_prototypes


@pytest.fixture(scope="module")
def made(tiny):
    return world(wrap(*tiny("llama")))


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    return save(tmp_path_factory.mktemp("bundles") / "one", *made)


def windows(bundle, run):
    return bundle.windows(list(histories(run).values()))


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


# ------------------------------------------------ round trip


def test_what_is_opened_is_what_was_saved(made, folder):
    run, tokeniser = made
    scorer, bundle = fitted(run), open_bundle(folder, knowledge=run.model)
    assert equal(bundle.reference.state_dict(), run.reference.state_dict())
    assert equal(bundle.policy.state_dict(), scorer.policy.generator.state_dict())
    assert equal(bundle.knowing.knowledge_tensors(), scorer.policy.knowledge_tensors())
    assert bundle.items == run.data.items and bundle.serves == "policy" and bundle.n_history == N_HISTORY
    np.testing.assert_array_equal(bundle.counts, run.splits.counts)
    np.testing.assert_array_equal(bundle.catalogue.codes, run.catalogue.codes)
    vectors = np.random.default_rng(3).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_array_equal(bundle.tokeniser().encode(vectors), tokeniser.encode(vectors))
    seen = windows(bundle, run)
    torch.testing.assert_close(bundle.knowing.residuals(seen), scorer.policy.residuals(seen), rtol=0, atol=0)
    assert bundle.knowing.residuals(seen).abs().max() > 0.01
    assert not any(p.requires_grad for part in (bundle.policy, bundle.knowing) for p in part.parameters())
    assert Certified.load(folder).to_dict() == bundle.certificate


@pytest.mark.parametrize(
    "settings",
    [
        {"instruction": "continuous"}, {"instruction": "global"}, {"instruction": "prompt"}, {"gate": False},
        {"order": "prefix", "titles": "tokens", "context": "policy"}, {"titles_shuffled": True, "n_llm_layers": 1},
        {"instruction": "prompt", "order": "prefix"}, {"knowledge": "none"},
    ],
    ids=["continuous", "global", "prompt", "no-gate", "prefix", "shuffled-titles", "kar", "none"],
)  # fmt: skip
def test_every_kind_of_knowledge_comes_back(made, tmp_path, settings):
    run, tokeniser = made
    scorer = fitted(run, **settings)
    bundle_path = save(tmp_path / "b", run, tokeniser, scorer)
    llm = None if settings.get("knowledge") == "none" else run.model
    bundle = open_bundle(bundle_path, knowledge=llm)
    if llm is None:
        assert bundle.knowing is None and not bundle.asks
        assert not bundle.from_prototypes(windows(bundle, run)).any()
        return
    seen = windows(bundle, run)[:20]
    torch.testing.assert_close(bundle.knowing.residuals(seen), scorer.policy.residuals(seen), rtol=0, atol=0)
    assert torch.equal(bundle.codes(seen), scorer.policy.choose(torch.from_numpy(seen)).codes)


def test_knowledge_of_text_vectors_needs_no_language_model(made, tmp_path):
    run, tokeniser = made
    vectors = np.random.default_rng(1).normal(size=(24, 12)).astype(np.float32)
    torch.manual_seed(3)
    source = TextKnowledge(vectors, N_HISTORY)
    parts = Instructions(32, 12, n_books=2, n_codewords=4, d_code=8), Fusion(32, 12)
    policy = Policy(run.reference, *parts, source).eval().requires_grad_(False)
    policy.fusion.out.weight += torch.randn(32, 32)
    scorer = dataclasses.replace(fitted(run), policy=policy, record={"settings": {"knowledge": "text"}})
    bundle = open_bundle(save(tmp_path / "b", run, tokeniser, scorer))
    seen = windows(bundle, run)
    assert bundle.asks and bundle.knowing.residuals(seen).abs().max() > 0.1
    torch.testing.assert_close(bundle.knowing.residuals(seen), policy.residuals(seen), rtol=0, atol=0)
    assert "no language model" in (tmp_path / "b" / "README.md").read_text()


def test_serving_opens_without_a_language_model_and_chooses_the_same_codes(made, folder):
    run, _ = made
    alone, whole = open_bundle(folder), open_bundle(folder, knowledge=run.model)
    seen = windows(alone, run)
    assert not alone.asks and whole.asks
    assert torch.equal(alone.codes(seen), whole.codes(seen))
    assert torch.equal(alone.from_prototypes(seen), whole.from_prototypes(seen))
    assert alone.versions == whole.versions and alone.fingerprint == whole.fingerprint


def test_without_the_change_it_is_the_reference_bit_for_bit(made, folder):
    run, _ = made
    bundle = open_bundle(folder)
    assert not equal(bundle.policy.state_dict(), run.reference.state_dict())
    back = bundle.undone()
    assert back.serves == "reference" and equal(back.policy.state_dict(), run.reference.state_dict())
    seen, target = torch.from_numpy(windows(bundle, run)), torch.ones(len(run.data.users), dtype=torch.int64)
    with torch.no_grad():
        one, two, moved = (
            net.code_log_probs(net.encode(seen), target) for net in (back.policy, run.reference, bundle.policy)
        )
    assert torch.equal(one, two) and not torch.equal(one, moved)


@pytest.mark.parametrize("certificate", [None, proof(1e-3)], ids=["none", "refused"])
def test_without_a_certificate_that_holds_the_reference_serves(made, tmp_path, certificate):
    run, tokeniser = made
    bundle = open_bundle(save(tmp_path / "b", run, tokeniser, certificate=certificate))
    assert bundle.serves == "reference" and equal(bundle.policy.state_dict(), run.reference.state_dict())
    assert "serves the reference" in (tmp_path / "b" / "README.md").read_text()


def test_the_same_input_gives_the_same_bytes(made, folder, tmp_path):
    again = save(tmp_path / "again", *made)
    assert (again / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
    other = save(tmp_path / "other", made[0], made[1], fitted(made[0], seed=2))
    assert open_bundle(other).fingerprint != open_bundle(folder).fingerprint
    assert open_bundle(other).versions.fusion != open_bundle(folder).versions.fusion
    assert open_bundle(other).versions.tokeniser == open_bundle(folder).versions.tokeniser


def test_a_new_certificate_or_new_settings_need_no_new_records(made, folder, tmp_path):
    other = save(tmp_path / "b", *made, certificate=proof(0.8), settings={"n_history": N_HISTORY, "looks": 2})
    assert open_bundle(other).fingerprint == open_bundle(folder).fingerprint


def test_nothing_of_users_or_of_this_machine_is_in_a_bundle(made, folder):
    whole = b"".join(p.read_bytes() for p in folder.iterdir())
    assert b"/home" not in whole and b"/tmp" not in whole
    training = json.loads((folder / "training.json").read_text())
    assert "seconds" not in training["policy"] and training["policy"]["chosen_harm"] is None


# ------------------------------------------------ items


def test_items_are_found_by_id_and_by_title(folder):
    bundle = open_bundle(folder)
    assert bundle.number("i3") == 3 and bundle.number("nothing") is None
    assert [i.id for i in bundle.find("DUNE 3")] == ["i3"]
    near = bundle.find("dune")
    assert [i.id for i in near[:2]] == ["i15", "i3"] and len(near) <= 5
    assert "birch 1" in [i.title for i in bundle.find("brich 1")]
    assert bundle.find("zzzzzzzzzzzzzz") == []


def test_windows_hold_the_latest_known_items(folder):
    bundle = open_bundle(folder)
    found = bundle.windows([["i1", "x", "i2"], [], [f"i{i}" for i in range(1, 10)], ["x"]])
    assert found.tolist() == [[0, 0, 0, 0, 1, 2], [0] * 6, [4, 5, 6, 7, 8, 9], [0] * 6]


# ------------------------------------------------ what is refused


def changed(name):
    def change(raw):
        record = json.loads(raw)
        return json.dumps({**record, **name}).encode()

    return change


def line(number, **values):
    def change(raw):
        lines = raw.decode().split("\n")
        lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **values})
        return "\n".join(lines).encode()

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("retouch.json", changed({"format": 2}), "format 2.*Update Retouch"),
        ("retouch.json", changed({"kind": "change"}), "kind 'change'"),
        ("retouch.json", changed({"serves": "both"}), "lacks 'serves'"),
        ("retouch.json", changed({"makers": None}), "lacks 'makers'"),
        ("retouch.json", changed({"fingerprint": "0" * 32}), "does not match its fingerprint"),
        ("retouch.json", changed({"generator": {"size": {}}}), "fingerprint"),
        ("retouch.json", changed({"knowledge": {"source": 3}}), "describe its source"),
        ("retouch.json", lambda raw: b"[]", "kind None"),
        ("retouch.json", lambda raw: raw[:-9], "not valid JSON"),
        ("items.jsonl", line(3, count=-1), "line 3.*count from 0"),
        ("items.jsonl", line(3, id=7), "line 3: id must be str"),
        ("items.jsonl", line(3, id="i1"), "line 3: item 'i1' already stands on line 1"),
        ("items.jsonl", line(3, codes=[0, 0, 99]), r"line 3: the codes \[0, 0, 99\]"),
        ("items.jsonl", line(3, extra=1), "line 3 must hold"),
        ("items.jsonl", line(3, title="Another"), "does not match its fingerprint"),
        ("items.jsonl", lambda raw: raw.replace(b'{"id": "i4"', b"{", 1), "line 4 is not valid JSON"),
        ("items.jsonl", lambda raw: raw[:-2], "whole lines"),
        ("items.jsonl", lambda raw: raw.split(b"\n", 1)[1], "23 whole lines and 24 items"),
        ("trie.safetensors", lambda raw: None, "no trie.safetensors"),
        ("reference.safetensors", lambda raw: raw[:-40], "does not match|damaged"),
        ("README.md", lambda raw: None, "no README.md"),
        ("certificate.json", lambda raw: None, "certificate does not allow"),
        ("certificate.json", changed({"lines": 3}), "is no certificate"),
    ],
)
def test_what_was_altered_with_a_new_manifest_is_refused(folder, tmp_path, name, change, words):
    with pytest.raises(StoreError, match=words):
        open_bundle(doctored(folder, tmp_path / "b", name, change))


def test_every_flipped_file_is_refused(folder, tmp_path):
    for file in sorted(p.name for p in folder.iterdir() if p.name != "manifest.json"):
        target = tmp_path / file / "b"
        doctored(folder, target, file, lambda raw: raw)
        raw = bytearray((target / file).read_bytes())
        raw[len(raw) // 2] ^= 1
        (target / file).write_bytes(bytes(raw))
        with pytest.raises(StoreError, match="other content"):
            open_bundle(target)


@pytest.mark.parametrize("name", ["reference.safetensors", "knowledge.safetensors", "prototypes.safetensors"])
def test_tensors_of_other_shapes_are_named_even_when_all_fingerprints_are_made_anew(made, folder, tmp_path, name):
    """A bundle that was put together by hand: every hash is right and one tensor is not."""
    from retouch.recommend import _bundle_files as files
    from retouch.recommend import bundle as module

    to = doctored(folder, tmp_path / "b", name, lambda raw: raw)
    tensors = store.load_tensors(to / name)
    victim = {"reference.safetensors": "first", "knowledge.safetensors": "fusion.out.weight"}.get(name, "means.0")
    tensors[victim] = torch.zeros(3, 3)
    (to / "manifest.json").unlink()
    store.save_tensors(to / name, tensors)
    hashes = {p.name: store.sha256_file(p) for p in to.iterdir()}
    record = json.loads((to / "retouch.json").read_text())
    shelf = files.read_items(to / "items.jsonl", made[0].catalogue)
    record["makers"] = files.makers(hashes, record["knowledge"], shelf, made[0].catalogue)
    record["fingerprint"] = module._fingerprint(hashes, record)
    (to / "retouch.json").write_text(json.dumps(record))
    with pytest.raises(StoreError, match=rf"{name}.*({victim}|fit)"):
        open_bundle(doctored(to, tmp_path / "c", "README.md", lambda raw: raw))


def test_another_language_model_is_refused(made, folder, tiny):
    from families import FAMILIES

    other = wrap(FAMILIES["llama"](seed=9), tiny("llama")[1], source="another one")
    with pytest.raises(StoreError, match=r"was learnt with the language model.*another one"):
        open_bundle(folder, knowledge=other)
    with pytest.raises(UserError, match="asks a network in memory and another one was given"):
        save(folder.parent / "never", *made, llm=other)
    assert not (folder.parent / "never").exists()


def test_parts_of_two_runs_are_refused(made, tmp_path):
    run, tokeniser = made
    torch.manual_seed(99)
    codes = torch.from_numpy(run.catalogue.codes.copy())
    stranger = Generator(SIZES["tiny"], codes, run.catalogue.sizes, N_HISTORY).eval()
    fewer = dataclasses.replace(run.data, items=run.data.items[:-1])
    renamed = dataclasses.replace(run.data, items=tuple(dataclasses.replace(i, title="x") for i in run.data.items))
    scorer = fitted(run)
    shuffled = dataclasses.replace(scorer, record={"settings": {"knowledge": "shuffled"}})
    for changes, words in (
        ({"reference": stranger}, "another reference"), ({"data": fewer}, "23 items"),
        ({"data": renamed}, "read other titles"), ({"fitted": shuffled}, "a control"),
        ({"fitted": dataclasses.replace(scorer, policy=None)}, "Only a fitted policy"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            save(tmp_path / "b", run, tokeniser, **{"fitted": scorer, **changes})
    assert not (tmp_path / "b").exists()


# ------------------------------------------------ prototypes


def slow_prototype(codes, vectors, asked, order, least):
    """The obvious version: keep dropping the book that explains least until enough users are left."""
    for n in range(len(order), 0, -1):
        books = order[:n]
        same = (codes[:, books] == asked[books]).all(1)
        if same.sum() >= least:
            return vectors[same].mean(0), n
    return vectors.mean(0), 0


def test_prototypes_are_means_over_users_with_the_same_codes_least_telling_books_dropped_first():
    chance = np.random.default_rng(0)
    codes = chance.integers(0, 3, (200, 4))
    vectors = (codes @ np.array([[0.1, 3, 1, 0.6]]).T + 0.05 * chance.normal(size=(200, 5))).astype(np.float32)
    made = Prototypes.fit(codes, vectors, (3, 3, 3, 3), least=5)
    assert made.books[:2].tolist() == [1, 2]
    asked = np.array(np.meshgrid(*[range(3)] * 4)).reshape(4, -1).T
    found, depth = made.of(asked)
    assert set(depth) >= {3, 4}
    for row, vector, n in zip(asked, found, depth):
        wanted, m = slow_prototype(codes, vectors, row, made.books, 5)
        assert n == m
        np.testing.assert_allclose(vector, wanted, atol=1e-5)
    strange, none = made.of(np.array([[0, 3, 0, 0], [0, -1, 0, 0]]))
    assert none.tolist() == [0, 0]
    np.testing.assert_allclose(strange, np.repeat(vectors.mean(0)[None], 2, 0), atol=1e-5)


def test_prototypes_are_saved_and_damaged_ones_refused(tmp_path):
    chance = np.random.default_rng(0)
    made = Prototypes.fit(chance.integers(0, 4, (90, 2)), chance.normal(size=(90, 3)).astype(np.float32), (4, 4))
    made.save(tmp_path / "p.safetensors")
    back = Prototypes.load(tmp_path / "p.safetensors")
    asked = chance.integers(0, 4, (30, 2))
    np.testing.assert_array_equal(made.of(asked)[0], back.of(asked)[0])
    tensors = store.load_tensors(tmp_path / "p.safetensors")
    for name, value in (
        ("books", torch.tensor([0, 0])), ("keys.0", tensors["keys.0"].flip(0)), ("means.1", tensors["means.1"][1:]),
        ("sizes", torch.tensor([1, 4])), ("keys.1", tensors["keys.1"].int()), ("means.2", torch.zeros(2, 7)),
    ):  # fmt: skip
        store.save_tensors(tmp_path / "q.safetensors", {**tensors, name: value})
        with pytest.raises(StoreError, match="fit together"):
            Prototypes.load(tmp_path / "q.safetensors")
    with pytest.raises(UserError, match="none of its book's"):
        Prototypes.fit(np.array([[4]]), np.zeros((1, 2), np.float32), (4,))
    with pytest.raises(UserError, match="Prototypes need"):
        Prototypes.fit(np.zeros((0, 1), np.int64), np.zeros((0, 2), np.float32), (4,))


def test_prototypes_of_a_policy_come_from_training_users_alone(made):
    run, _ = made
    scorer = fitted(run)
    one = fit_prototypes(scorer, run.splits, least=3)
    changed = [h.copy() for h in run.data.histories]
    for user, role in enumerate(run.splits.roles):
        if role == "certificate":
            changed[user] = changed[user] % 24 + 1
        else:
            changed[user][-2:] = changed[user][-2:] % 24 + 1  # the targets of validation and test
    other = dataclasses.replace(run.data, histories=tuple(changed))
    two = fit_prototypes(
        dataclasses.replace(scorer, asked=dataclasses.replace(scorer.asked, data=other)), run.splits, least=3
    )
    assert all(np.array_equal(a, b) for a, b in zip(one.means, two.means))
    few = fit_prototypes(scorer, run.splits, n_users=10, least=3)
    assert not np.array_equal(few.means[0], one.means[0])
    rung = on_prototypes(scorer, one)
    samples = run.splits.certificate
    codes = scorer.policy.choose(torch.from_numpy(scorer.asked.windows(samples))).codes
    np.testing.assert_array_equal(rung.residuals(samples).numpy(), one.of(codes)[0])
    assert np.isfinite(rung.log_likelihood(samples)).all()
    assert not rung.window_residuals(np.zeros((1, N_HISTORY), np.int32)).any()
