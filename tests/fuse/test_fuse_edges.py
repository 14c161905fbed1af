from __future__ import annotations

import dataclasses
import json
import pickle
import stat
import time
from pathlib import Path
from typing import Any

import fuse_edges
import pytest
import torch
from flwr.app import Array, ConfigRecord, Context, Error, Message, Metadata, RecordDict
from safetensors.torch import load, save

from retouch import store
from retouch.errors import FactError, RetouchError, StoreError, UserError
from retouch.fuse import client_app, server_app
from retouch.fuse._processes import Programs
from retouch.fuse._records import from_task, from_upload, to_capabilities, to_task, to_upload
from retouch.fuse.adapter_file import open_adapter
from retouch.fuse.cloud import Assignment, Cloud
from retouch.fuse.deployment import Connection, join
from retouch.fuse.edge import (
    FACTS,
    Capabilities,
    EdgeSpec,
    Sharing,
    Upload,
    cached_packages,
    capabilities,
    check_name,
    keep_package,
    perform,
)
from retouch.fuse.journal import Entry, Journal
from retouch.fuse.keys import make_keys
from retouch.fuse.membership import membership
from retouch.fuse.privacy import epsilon_of, released
from retouch.fuse.runs import open_run, save_run
from retouch.fuse.simulate import simulate
from retouch.fuse.train import read_examples
from retouch.model import Model, open_model


@pytest.fixture
def model(tiny: Any, tmp_path: Path) -> Model:
    return open_model(fuse_edges.base(tiny, tmp_path / "base"), device="cpu")


@pytest.fixture
def edges(tmp_path: Path) -> list[EdgeSpec]:
    return fuse_edges.specs(tmp_path)


def started(model: Model, edges: list[EdgeSpec], out: Path, **settings: Any) -> tuple[Cloud, Assignment]:
    cloud = Cloud(model, fuse_edges.run(**settings), out)
    return cloud, cloud.assign([capabilities(e) for e in edges])[0]


def done(a: Assignment, edge: EdgeSpec, sharing: Sharing | None = None) -> Upload:
    return perform(a.task, a.package, read_examples(edge.examples), a.name, sharing)


def message(content: RecordDict, kind: str = "train.adapter") -> Message:
    about = Metadata(1, "m", 1, 7, "", "", time.time(), 60.0, kind)
    return Message(content=content, metadata=about)


def context(edge: EdgeSpec, **more: Any) -> Context:
    node = {"domain": edge.name, "data": str(edge.examples), "ratio": edge.ratio, "rank": edge.rank, **more}
    return Context(1, 7, node, RecordDict(), {})


# ---------------------------------------------------------------- what leaves an edge


def test_upload_holds_the_list_and_nothing_else(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    _, a = started(model, edges, tmp_path / "run")
    reply = client_app.train(message(from_task(a.task, a.package)), context(edges[0]))
    assert set(reply.content) == {"facts", "factors"}
    assert set(reply.content["facts"]) == set(FACTS)
    upload = to_upload(reply.content, "law")
    assert set(upload.tensors) == {f"{n}.lora_{half}" for n in a.task.initial for half in "AB"}
    texts = [w for e in read_examples(edges[0].examples) for w in (e.prompt, e.target)]
    told = json.dumps(dict(reply.content["facts"].items()))
    blob = b"".join(array.data for array in reply.content["factors"].values())
    assert not any(t in told or t.encode() in blob for t in texts)
    rank, shapes = 2, [t.shape for t in upload.tensors.values()]
    assert {t.dtype for t in upload.tensors.values()} <= {torch.float16, torch.float32}
    assert upload.n_bytes <= sum(4 * s[0] * s[1] for s in shapes) and all(rank in s for s in shapes)


def test_edge_decides_what_else_is_told(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    _, a = started(model, edges, tmp_path / "run")
    told = done(a, edges[0], Sharing(loss=True, count="bucket")).facts
    assert set(told) == {*FACTS, "loss"} and told["n_examples"] == "<100"


def test_half_precision_only_where_it_changes_little(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    from retouch.fuse.edge import _compact

    assert _compact(torch.randn(4, 9)).dtype == torch.float16
    assert _compact(torch.full((4, 9), 1e-9)).dtype == torch.float32  # would underflow
    assert _compact(torch.full((4, 9), 1e6)).dtype == torch.float32  # would overflow


def test_frozen_a_is_not_sent_and_recovers_alike(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    cloud, a = started(model, edges, tmp_path / "run", lora={"freeze_a": True})
    upload = done(a, edges[0])
    assert all(name.endswith(".lora_B") for name in upload.tensors)
    cloud.receive(a, upload)
    kept = open_adapter(tmp_path / "run" / "adapters" / "law", model)
    assert torch.equal(kept.parts["blocks.1.mlp.up"].right, a.task.initial["blocks.1.mlp.up"])


def test_capabilities_travel(edges: list[EdgeSpec]) -> None:
    edge = dataclasses.replace(edges[0], budget_mib=700.0, ratio=None)
    given = capabilities(edge)
    node = Context(1, 7, {"domain": "law", "data": str(edge.examples), "budget_mib": 700, "rank": 2}, RecordDict(), {})
    reply = client_app.query(message(RecordDict(), "query.capabilities"), node)
    assert to_capabilities(reply.content, "law") == given and given.n_examples == "3"
    content = RecordDict({"capabilities": ConfigRecord({"name": "law"})})
    with pytest.raises(StoreError, match="budget_mib"):
        to_capabilities(content, "the answer of node 7")


@pytest.mark.parametrize("node", [{"domain": "law"}, {"data": "x.jsonl"}, {}])
def test_node_must_say_who_it_is_and_where_its_examples_are(node: dict[str, str]) -> None:
    with pytest.raises(UserError, match="data="):
        client_app.of_node(node)


@pytest.mark.parametrize("line", ['{"prompt": "The patient is", "target": 7, "name": "Ada"}', "Ada is ill", '["Ada"]'])
def test_what_an_error_says_stays_at_the_edge(
    model: Model, edges: list[EdgeSpec], tmp_path: Path, caplog: Any, monkeypatch: Any, line: str
) -> None:
    _, a = started(model, edges, tmp_path / "run")
    private = tmp_path / "ward.jsonl"
    private.write_text(line, encoding="utf-8")
    odd = dataclasses.replace(edges[0], examples=private)
    asked = (
        (client_app.query, RecordDict(), "query.capabilities"),
        (client_app.train, from_task(a.task, a.package), "train.adapter"),
    )
    for answer, content, kind in asked:
        with pytest.raises(RetouchError) as caught:
            answer(message(content, kind), context(odd))
        assert str(caught.value) == "FactError: the log of the edge says more" and caught.value.__suppress_context__
        assert "ward.jsonl line 1" in caplog.text  # there it helps
        caplog.clear()
    monkeypatch.setenv(client_app.EDGES, str(tmp_path / "nodes.json"))  # a simulation: all of it is one machine's
    with pytest.raises(FactError, match="line 1"):
        client_app.query(message(RecordDict(), "query.capabilities"), context(odd))


@pytest.mark.parametrize(
    "wish", [{"rank": 0}, {"rank": 1025}, {"ratio": 0.9}, {"ratio": float("nan")}, {"budget_mib": 0.0}]
)
def test_an_edge_is_checked_where_it_is_named(edges: list[EdgeSpec], tmp_path: Path, wish: dict[str, Any]) -> None:
    plain = {"ratio": None, "rank": None} | wish
    with pytest.raises(UserError, match=rf"The edge law: {next(iter(wish))} must be from"):
        capabilities(dataclasses.replace(edges[0], **plain))
    there = Connection("127.0.0.1:1", tmp_path / "home")
    with Programs() as programs, pytest.raises(FactError, match=r"nowhere\.jsonl"):
        join(programs, there, EdgeSpec("law", tmp_path / "nowhere.jsonl"), tmp_path)


# ---------------------------------------------------------------- tasks and packages


def test_task_travels_with_the_model_once(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    _, a = started(model, edges, tmp_path / "run")
    task, files = to_task(from_task(a.task, a.package))
    assert task.hash == a.task.hash and files is not None
    with pytest.raises(StoreError, match="not in the cache"):
        keep_package(task.package, None)
    place = keep_package(task.package, files)
    assert cached_packages() == (task.package,) and keep_package(task.package, None) == place
    assert store.sha256_file(place / "weights.safetensors") == store.sha256_file(a.package / "weights.safetensors")


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "weights.bin", "code.py", ".hidden.json", ""])
def test_package_with_a_strange_file_is_refused(name: str) -> None:
    with pytest.raises(StoreError, match="which none does"):
        keep_package("0" * 32, {name: b"x"})
    assert cached_packages() == ()


def test_altered_package_and_task_are_refused(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    _, a = started(model, edges, tmp_path / "run")
    content = from_task(a.task, a.package)
    _, files = to_task(content)
    assert files is not None
    with pytest.raises(StoreError, match="is not"):
        keep_package(a.task.package, {**files, "config.json": files["config.json"] + b" "})
    content["task"]["settings"] = json.dumps({**a.task.settings.to_dict(), "seed": 99})
    with pytest.raises(StoreError, match="hash"):
        to_task(content)


def test_answer_is_given_again_without_training(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    from retouch import progress

    _, a = started(model, edges, tmp_path / "run")
    first, seen = done(a, edges[0]), []
    with progress.listen(lambda what, done, total: seen.append(what)):
        again = done(a, edges[0])
    assert all(torch.equal(t, again.tensors[n]) for n, t in first.tensors.items()) and again.facts == first.facts
    assert not any("Training" in what for what in seen)


# ---------------------------------------------------------------- a whole run in one process


def test_edges_train_and_fuse_and_a_second_start_only_fuses(
    model: Model, edges: list[EdgeSpec], tmp_path: Path
) -> None:
    from retouch import progress

    out = tmp_path / "run"
    outcome = simulate(model, edges, fuse_edges.run(), out)
    assert outcome.edges == ("law", "news") and not outcome.absent
    assert outcome.facts["law"]["rank"] == 2 and outcome.facts["law"]["ratio"] > outcome.facts["news"]["ratio"]
    fused = open_adapter(outcome.fused, model)
    assert fused.parts["blocks.1.mlp.up"].rank == 6
    digest, seen = store.sha256_file(outcome.fused / "adapter_model.safetensors"), []
    with progress.listen(lambda what, done, total: seen.append(what)):
        again = simulate(model, edges, fuse_edges.run(), out)
    assert again.resumed == ("law", "news") and not any("Training" in what for what in seen)
    assert store.sha256_file(again.fused / "adapter_model.safetensors") == digest


def test_other_settings_train_again(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    simulate(model, edges, fuse_edges.run(), tmp_path / "run")
    again = simulate(model, edges, fuse_edges.run(lora={"n_steps": 2}), tmp_path / "run")
    assert again.resumed == () and again.edges == ("law", "news")


def test_quorum(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    cloud, a = started(model, edges, tmp_path / "run")
    cloud.receive(a, done(a, edges[0]))
    with pytest.raises(RetouchError, match=r"1 of 2 edges.*2 are needed.*news: no answer"):
        cloud.fuse()
    enough, _ = started(model, edges, tmp_path / "run", min_edges=1)
    outcome = enough.fuse()
    assert outcome.edges == ("law",) and outcome.absent == ("news",) and outcome.resumed == ("law",)
    assert [e.state for e in enough.journal.entries()] == ["received", "absent", "absent"]


def test_deadline_gives_a_partial_adapter_that_goes_on(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    long = {"n_steps": 100_000}
    cloud, a = started(model, edges, tmp_path / "run", lora=long, deadline_s=1e-3, min_edges=1)
    cloud.receive(a, done(a, edges[0]))
    assert cloud.fuse().partial == ("law",)
    _, again = started(model, edges, tmp_path / "run", lora=long, deadline_s=1e-3, min_edges=1)
    assert not again.finished


@pytest.mark.parametrize(
    "wish", [{"budget_mib": 1.0}, {"rank": 1024}, {"ratio": 0.99}, {"budget_mib": 9.0, "ratio": 0.2}]
)
def test_edge_with_an_impossible_wish_is_left_out_and_the_folder_goes_on(
    model: Model, edges: list[EdgeSpec], tmp_path: Path, wish: dict[str, Any]
) -> None:
    able, odd = [capabilities(e) for e in edges], Capabilities("odd", **wish)
    cloud = Cloud(model, fuse_edges.run(), tmp_path / "run")
    assert [a.name for a in cloud.assign([*able, odd])] == ["law", "news"]
    entry = cloud.journal.entries()[-1]
    assert (entry.node, entry.state, entry.plan) == ("odd", "refused", "") and "The edge odd" in entry.why
    assert set(json.loads((tmp_path / "run" / "edges.json").read_text())) == {"law", "news"}
    for spec, a in zip(edges, cloud.assignments.values()):
        cloud.receive(a, done(a, spec))
    outcome = cloud.fuse()
    assert outcome.edges == ("law", "news") and outcome.absent == ("odd",) and "odd" in outcome.why["odd"]
    again = Cloud(model, fuse_edges.run(), tmp_path / "run")
    assert [a.finished for a in again.assign([*able, Capabilities("odd", ratio=0.2)])] == [True, True, False]


def test_folder_whose_list_of_edges_holds_an_impossible_one_still_works(
    model: Model, edges: list[EdgeSpec], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    plain = {"number": 0, "budget_mib": 1.0, "ratio": None, "rank": None}
    (tmp_path / "run" / "edges.json").write_text(json.dumps({"odd": plain}), encoding="utf-8")
    cloud, a = started(model, edges, tmp_path / "run")
    assert a.name == "law" and set(cloud.unfit) == {"odd"}


def test_refusals_that_leave_too_few_end_the_run_before_training(
    model: Model, edges: list[EdgeSpec], tmp_path: Path
) -> None:
    cloud = Cloud(model, fuse_edges.run(quorum=0.9), tmp_path / "run")
    with pytest.raises(UserError, match=r"2 of 3 edges can take part, and 3 are needed.*odd"):
        cloud.assign([*map(capabilities, edges), Capabilities("odd", budget_mib=1.0)])
    assert not (tmp_path / "run" / "edges.json").exists() and not (tmp_path / "run" / "packages").exists()


def test_one_edge_cannot_stop_a_run_by_what_it_keeps_to_itself(
    model: Model, edges: list[EdgeSpec], tmp_path: Path
) -> None:
    able = [capabilities(e) for e in edges]
    shy = [
        Capabilities("vague", n_examples="<100"),
        Capabilities("none", n_examples="0"),
        Capabilities("noisy", n_examples="5", privacy="local-dp"),
        Capabilities("masked", n_examples="5", privacy="secagg-linear"),
        Capabilities("unknown", n_examples="5", privacy="magic"),
    ]
    cloud = Cloud(model, fuse_edges.run(weights="examples", quorum=0.2), tmp_path / "run")
    assert {a.name for a in cloud.assign([*able, *shy])} == {"law", "news"}
    assert set(cloud.unfit) == {e.name for e in shy}
    assert [e.state for e in cloud.journal.entries()] == ["refused"] * 5


def test_unequal_ranks_leave_the_few_out(model: Model, tmp_path: Path) -> None:
    from retouch import registry

    run = dataclasses.replace(fuse_edges.run(), method=registry.make("fuse", "linear"))
    edges = [Capabilities(name, rank=rank) for name, rank in {"a": 2, "b": 4, "c": 2}.items()]
    cloud = Cloud(model, run, tmp_path / "run")
    assert [a.name for a in cloud.assign(edges)] == ["a", "c"] and "equal ranks" in cloud.unfit["b"]


@pytest.mark.parametrize(("weights", "told", "taken"), [("examples", "<100", False), ("examples", "0", False),
    ("examples", "7", True), ("equal", "<100", True), ("equal", "0", True), ("equal", "9" * 400, False),
    ("equal", "\u0663", False)])  # fmt: skip
def test_number_of_examples_is_checked_when_it_arrives(
    model: Model, edges: list[EdgeSpec], tmp_path: Path, weights: str, told: str, taken: bool
) -> None:
    cloud, a = started(model, edges, tmp_path / "run", weights=weights)
    upload = done(a, edges[0])
    answer = dataclasses.replace(upload, facts={**upload.facts, "n_examples": told})
    if taken:
        cloud.receive(a, answer)
    else:
        with pytest.raises(StoreError, match="number of examples"):
            cloud.receive(a, answer)
    assert cloud.journal.entries()[-1].state == ("received" if taken else "refused")


@pytest.mark.parametrize("name", ["loss", "epsilon", "delta", "max_norm", "noise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_and_journalled(
    model: Model, edges: list[EdgeSpec], tmp_path: Path, name: str, value: float
) -> None:
    cloud, a = started(model, edges, tmp_path / "run")
    upload = done(a, edges[0])
    with pytest.raises(StoreError, match=f"{name} must be a finite number"):
        cloud.receive(a, dataclasses.replace(upload, facts={**upload.facts, name: value}))
    assert cloud.journal.entries()[-1].state == "refused" and "law" in cloud.why


def test_failing_edge_does_not_end_a_simulation(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    rows = [{"prompt": "The end is", "target": " far" * 30}]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    odd = EdgeSpec("odd", tmp_path / "odd.jsonl", ratio=0.2)
    outcome = simulate(model, [*edges, odd], fuse_edges.run(lora={"max_tokens": 8}), tmp_path / "run")
    assert outcome.edges == ("law", "news") and outcome.absent == ("odd",)
    states = {e.node: e.state for e in Journal(tmp_path / "run" / "journal.jsonl").entries() if e.state == "failed"}
    assert states == {"odd": "failed"} and outcome.why["odd"].startswith("odd: ")


def test_too_few_edges_are_refused_before_they_train(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 edge cannot give the 2 adapters"):
        simulate(model, edges[:1], fuse_edges.run(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_survives_its_file(tmp_path: Path) -> None:
    from retouch import registry

    run = dataclasses.replace(fuse_edges.run(quorum=0.7), method=registry.make("fuse", "ties", density=0.5), replay=())
    save_run(run, "base", tmp_path)
    again, model = open_run(tmp_path)
    assert (again.settings, again.lora, again.method, model) == (run.settings, run.lora, run.method, "base")


def test_two_edges_of_one_name(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Two edges"):
        started(model, [edges[0], edges[0]], tmp_path / "run")
    for name in ("", "../law", "a/b", "x" * 65, ".law"):
        with pytest.raises(UserError, match="Rename it"):
            check_name(name)


# ---------------------------------------------------------------- bad replies


def hostile(content: RecordDict, kind: str) -> None:
    """Change an answer as a hostile or broken edge would."""
    facts, factors = content["facts"], content["factors"]
    good = factors["safetensors"]
    tensors = load(good.data)
    name = next(n for n in tensors if n.endswith("lora_B"))

    def packed(**changed: torch.Tensor | None) -> None:
        new = {n: t for n, t in {**tensors, **changed}.items() if t is not None}
        raw(save(new))

    def raw(data: bytes, dtype: str = "uint8", kind: str = "safetensors") -> None:
        factors["safetensors"] = Array(dtype, (len(data),), kind, data)

    b = tensors[name]
    changes: dict[str, Any] = {
        "extra fact": lambda: facts.__setitem__("text", "private"),
        "no plan": lambda: facts.__delitem__("plan"),
        "other plan": lambda: facts.__setitem__("plan", "0" * 64),
        "other base": lambda: facts.__setitem__("base", "0" * 64),
        "other settings": lambda: facts.__setitem__("settings", "0" * 32),
        "rank": lambda: facts.__setitem__("ranks", [3] * len(facts["ranks"])),
        "alpha": lambda: facts.__setitem__("alphas", [0.0] * len(facts["alphas"])),
        "count": lambda: facts.__setitem__("n_examples", "-5"),
        "missing": lambda: packed(**{name: None}),
        "extra tensor": lambda: packed(**{"embed.lora_A": b.clone()}),
        "norm": lambda: packed(**{"model.norm.weight": b.clone()}),
        "traversal": lambda: packed(**{"../../x.lora_A": b.clone()}),
        "nan": lambda: packed(**{name: torch.full_like(b, float("nan"))}),
        "wide": lambda: packed(**{name: torch.cat([b, b], 1)}),
        "double": lambda: packed(**{name: b.double()}),
        "pickle": lambda: raw(pickle.dumps(tensors)),
        "numpy": lambda: factors.__setitem__("safetensors", Array(b.numpy())),
        "many arrays": lambda: factors.__setitem__("more", Array(b.numpy())),
        "short": lambda: raw(good.data[:-2]),
        "long": lambda: raw(good.data + b"xx"),
        "huge header": lambda: raw((1 << 50).to_bytes(8, "little") + good.data),
        "empty": lambda: raw(b"x"),
        "extra record": lambda: content.__setitem__("notes", ConfigRecord({"text": "private"})),
        "no factors": lambda: content.pop("factors"),
    }
    changes[kind]()


KINDS = [
    "extra fact", "no plan", "other plan", "other base", "other settings", "rank", "alpha", "count", "missing",
    "extra tensor", "norm", "traversal", "nan", "wide", "double", "pickle", "numpy", "many arrays", "short", "long",
    "huge header", "empty", "extra record", "no factors",
]  # fmt: skip


def test_bad_replies_are_refused_and_journalled(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    cloud, a = started(model, edges, tmp_path / "run")
    upload, asked = done(a, edges[0]), message(RecordDict())
    for n, kind in enumerate(KINDS, 1):
        content = from_upload(upload)
        hostile(content, kind)
        assert not server_app.take(cloud, a, Message(content, reply_to=asked)), kind
        entries = cloud.journal.entries()
        assert len(entries) == n and entries[-1].state == "refused" and "law" in entries[-1].why, kind
    assert not (tmp_path / "run" / "adapters").exists()
    loud = Upload({k: t.float() * 1e4 for k, t in upload.tensors.items()}, upload.facts)
    with pytest.raises(StoreError, match="times the weight"):
        cloud.receive(a, loud)
    assert server_app.take(cloud, a, Message(from_upload(upload), reply_to=asked))
    assert cloud.journal.entries()[-1].state == "received"


@pytest.mark.parametrize(
    ("code", "words"), [(5, "Start the node again"), (8, "smaller budget"), (2, "log of its node")]
)
def test_errors_become_sentences(model: Model, edges: list[EdgeSpec], tmp_path: Path, code: int, words: str) -> None:
    cloud, a = started(model, edges, tmp_path / "run", min_edges=1)
    reply = Message(Error(code, "Traceback\n  here\nValueError: no"), reply_to=message(RecordDict()))
    assert not server_app.take(cloud, a, reply)
    entry = cloud.journal.entries()[-1]
    assert entry.state == "failed" and words in entry.why and "ValueError: no" in entry.why


@pytest.mark.parametrize("ratio", [float("nan"), 7.0, -3.0])
def test_impossible_capabilities(ratio: float) -> None:
    from retouch.fuse._records import from_capabilities

    with pytest.raises(StoreError, match="none can have"):
        to_capabilities(from_capabilities(Capabilities("law", ratio=ratio)), "node 7")


# ---------------------------------------------------------------- journal


def test_journal_survives_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    (tmp_path / "file").write_bytes(b"x")
    entry = Entry("r", "law", "p", "s", "received", {"file": store.sha256_file(tmp_path / "file")})
    journal.add(entry)
    with journal.path.open("ab") as file:
        file.write(b'{"run": "r", "no')
    assert [e.node for e in journal.entries()] == ["law"]
    journal.add(dataclasses.replace(entry, node="news"))
    assert [e.node for e in journal.entries()] == ["law", "news"]
    assert journal.finished("r", "law", "p", "s") is not None
    for other in (("q", "law", "p", "s"), ("r", "law", "q", "s"), ("r", "law", "p", "q"), ("r", "tax", "p", "s")):
        assert journal.finished(*other) is None
    (tmp_path / "file").write_bytes(b"y")
    assert journal.finished("r", "law", "p", "s") is None
    with journal.path.open("ab") as file:
        file.write(b'{"colour": 3}\n')
    with pytest.raises(StoreError, match="line 4"):
        journal.entries()


# ---------------------------------------------------------------- keys


def test_keys_are_private_and_signed(tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
    from cryptography.x509.verification import PolicyBuilder, Store

    keys = make_keys(tmp_path / "keys", ["cloud.example", "127.0.0.1"], ["law", "news"])
    private = [*keys.folder.rglob("*.key")]
    assert len(private) == 6 and all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in private)
    assert not (keys.cloud / "ca.key").exists()
    root = x509.load_pem_x509_certificate((keys.cloud / "ca.pem").read_bytes())
    server = x509.load_pem_x509_certificate((keys.cloud / "server.pem").read_bytes())
    verifier = PolicyBuilder().store(Store([root])).build_server_verifier(x509.DNSName("cloud.example"))
    assert verifier.verify(server, [])[-1] == root
    law = load_ssh_private_key((keys.edges["law"] / "node.key").read_bytes(), None)
    public = load_ssh_public_key((keys.edges["law"] / "node.pub").read_bytes())
    assert law.public_key() == public and law.curve.name == "secp384r1"
    before = (keys.folder / "ca.key").read_bytes(), (keys.cloud / "server.pem").read_bytes()
    more = make_keys(tmp_path / "keys", ["cloud.example"], ["tax"])
    assert (keys.folder / "ca.key").read_bytes(), (keys.cloud / "server.pem").read_bytes() == before
    assert (more.edges["tax"] / "node.key").exists()
    with pytest.raises(UserError, match="host"):
        make_keys(tmp_path / "keys", [], ["law"])


# ---------------------------------------------------------------- privacy


def test_released_factors_are_clipped_and_noisy() -> None:
    left = {"a": torch.ones(30, 4) * 5, "b": torch.ones(20, 4)}
    exact = released(left, 2.0, 1e-9, 1e-5, seed=0).left
    assert sum(float(t.pow(2).sum()) for t in exact.values()) == pytest.approx(4.0, rel=1e-5)
    noisy = released(left, 2.0, 0.5, 1e-5, seed=0)
    spread = torch.cat([(noisy.left[n] - exact[n]).flatten() for n in left]).std()
    assert float(spread) == pytest.approx(1.0, rel=0.15)
    assert noisy.facts["unit"] == "the whole adapter of an edge, released once"
    again, other = released(left, 2.0, 0.5, 1e-5), released(left, 2.0, 0.5, 1e-5)
    assert not torch.equal(again.left["a"], other.left["a"])


@pytest.mark.parametrize(("noise", "delta"), [(0.7, 1e-5), (4.0, 1e-6), (20.0, 1e-3)])
def test_epsilon_is_that_of_the_gaussian_mechanism(noise: float, delta: float) -> None:
    from scipy.stats import norm

    epsilon, d = epsilon_of(noise, delta), 2 / noise
    curve = norm.cdf(d / 2 - epsilon / d) - float(torch.tensor(epsilon, dtype=torch.float64).exp()) * norm.cdf(
        -d / 2 - epsilon / d
    )
    assert curve == pytest.approx(delta, rel=1e-3)
    assert epsilon_of(2 * noise, delta) < epsilon


def test_noise_needs_a_frozen_a_and_is_told(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    sharing = Sharing(privacy="local-dp", noise=0.01, max_norm=0.1)
    _, a = started(model, edges, tmp_path / "one")
    with pytest.raises(UserError, match="frozen A"):
        done(a, edges[0], sharing)
    cloud, a = started(model, edges, tmp_path / "two", lora={"freeze_a": True})
    upload = done(a, edges[0], sharing)
    again = done(a, edges[0], sharing)  # another draw would weaken the first
    assert all(torch.equal(t, again.tensors[n]) for n, t in upload.tensors.items())
    cloud.receive(a, upload)
    assert cloud.journal.entries()[-1].facts["epsilon"] == epsilon_of(0.01, 1e-5)


def test_secure_aggregation_is_refused(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    _, a = started(model, edges, tmp_path / "run")
    with pytest.raises(UserError, match="not offered"):
        done(a, edges[0], Sharing(privacy="secagg-linear"))


def test_membership_is_seen_where_it_was_learnt(model: Model, edges: list[EdgeSpec], tmp_path: Path) -> None:
    from retouch.fuse.base import Example

    members = list(read_examples(edges[0].examples))
    others = [Example(e.prompt, "Portuguese") for e in members]
    run = fuse_edges.run(lora={"n_steps": 40, "learning_rate": 3e-2}, min_edges=1)
    outcome = simulate(model, edges[:1], run, tmp_path / "run")
    report = membership(model, open_adapter(outcome.fused, model), members, others)
    nothing = membership(model, None, members, members)
    assert report.auc > 0.8 and nothing.auc == 0.5 and report.low <= report.auc <= report.high


# ---------------------------------------------------------------- the command line


def test_command_simulates_and_goes_on(tiny: Any, edges: list[EdgeSpec], tmp_path: Path, capsys: Any) -> None:
    from retouch.cli import app

    base = fuse_edges.base(tiny, tmp_path / "base")
    words = ["fuse", "simulate", base, "-o", str(tmp_path / "run"), "--json", "--run", "text_tokens=512", "--rank", "4"]
    words += ["--n-steps", "2", "--batch", "2", "--method", "cat:lam=0.5", "--share", "count=bucket"]
    words += [w for e in edges for w in ("--edge", f"{e.name}={e.examples}:ratio={e.ratio}:rank={e.rank}")]
    for resumed in ([], ["law", "news"]):
        app(words, standalone_mode=False)
        told = json.loads(capsys.readouterr().out)
        assert told["edges"] == ["law", "news"] and told["resumed"] == resumed
    assert told["facts"]["law"]["n_examples"] == "<100"
    for wrong, match in (
        (["--edge", "law"], "NAME=EXAMPLES"),
        (["--edge", "law=x.jsonl:size=3"], "none of budget_mib"),
        ([], "--demo"),
        (["--edge", f"law={edges[0].examples}", "--share", "privacy=secagg-linear"], "not offered"),
    ):
        with pytest.raises(UserError, match=match):
            app(["fuse", "simulate", base, *wrong], standalone_mode=False)


def test_demo_sites_differ(tmp_path: Path) -> None:
    from retouch.fuse._edges_demo import demo_edges

    sites = demo_edges(tmp_path / "examples")
    assert len({s.ratio for s in sites}) == 3
    assert all(len(read_examples(s.examples)) == 12 for s in sites)
