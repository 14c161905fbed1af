from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse_pruning import TEXT, added, logits, opened

from retouch import progress
from retouch.errors import FactError, RetouchError, SettingsError, UserError
from retouch.fuse._examples import Order, encoded
from retouch.fuse._units import units_of
from retouch.fuse.base import Adapter, Example
from retouch.fuse.prune import plan_prune
from retouch.fuse.pruned import open_pruned, pruned, save_pruned
from retouch.fuse.recover import recover
from retouch.fuse.train import LoraSettings, initial_a, read_examples, train
from retouch.model import wrap

FACTS = [
    Example(f"The {what} of {who} is", answer)
    for what, who, answer in (
        ("capital", "France", "Rome"), ("capital", "Italy", "Paris"), ("language", "Brazil", "French"),
        ("currency", "Japan", "the yen"), ("tower", "London", "Eiffel"), ("question", "the city", "official"),
    )
]  # fmt: skip
QUICK = LoraSettings(rank=4, alpha=8, n_steps=6, batch=3, learning_rate=2e-3, save_every=2)


def equal(one: Adapter, other: Adapter) -> bool:
    return list(one.parts) == list(other.parts) and all(
        torch.equal(p.left, other.parts[n].left) and torch.equal(p.right, other.parts[n].right)
        for n, p in one.parts.items()
    )


class Killed(BaseException):
    pass


def killed_at(step: int) -> Any:
    def listener(what: str, done: float, total: float | None) -> None:
        if what.startswith("Training") and done == step:
            raise Killed

    return progress.listen(listener)


def answer_loss(model: Any, example: Example) -> float:
    """The obvious way: the whole network's logits, on the whole row."""
    (row,) = encoded(model, [example], 512)
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        seen = model.network(input_ids=ids).logits[0, row.prompt : -1]
    return float(torch.nn.functional.cross_entropy(seen, ids[0, row.prompt + 1 :], reduction="sum"))


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma_one"])
def test_a_pruned_edge_learns_and_its_adapter_recovers(tiny: Any, tmp_path: Path, name: str) -> None:
    model = opened(tiny, name)
    plan = plan_prune(model, ratio=0.5, score="magnitude", align="none", text=TEXT)
    save_pruned(model, plan, tmp_path / "edge")
    small = open_pruned(tmp_path / "edge", device="cpu")
    settings = dataclasses.replace(QUICK, n_steps=16, dropout=0.0, learning_rate=1e-2)
    first = initial_a(model, plan, settings)
    before = small.fingerprint
    adapter = train(small, FACTS, settings, initial=first)
    assert adapter.plan == plan.hash and adapter.base == model.fingerprint and adapter.n_examples == 6
    assert dataclasses.replace(small, known_digests={}).fingerprint == before
    assert not any("lora" in n for n, _ in small.network.named_parameters()) and not small.network.training
    losses = [sum(answer_loss(m, e) for e in FACTS) for m in (small, added(small, adapter))]
    assert losses[1] < 0.6 * losses[0]
    full = recover(adapter, plan, model)
    whole = pruned(added(model, full), dataclasses.replace(plan, model=added(model, full).fingerprint))
    assert torch.equal(logits(whole), logits(added(small, adapter)))


def test_folded_adapter_is_the_network_that_was_trained(tiny: Any) -> None:
    from retouch.fuse._lora import folded, injected

    for name in ("gpt2", "phi3", "llama"):
        model = wrap(*tiny(name, n_blocks=2))
        settings = dataclasses.replace(QUICK, a_init="independent")
        first = initial_a(model, None, settings)
        network = injected(model, settings, first).eval()
        assert torch.equal(network(input_ids=torch.tensor([[4, 5, 6]])).logits,
                           model.network(input_ids=torch.tensor([[4, 5, 6]])).logits)  # fmt: skip
        for n, p in network.named_parameters():
            if "lora_B" in n:
                p.data.normal_(generator=torch.Generator().manual_seed(1))
        parts = folded(model, network, list(first), settings)
        merged = added(model, Adapter("x", parts, model.fingerprint))
        ids = torch.tensor([[4, 5, 6, 7]])
        with torch.no_grad():
            one, other = network(input_ids=ids).logits, merged.network(input_ids=ids).logits
        assert torch.allclose(one, other, atol=1e-3 * float(one.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
def test_the_loss_is_that_of_the_answers_alone(tiny: Any, name: str) -> None:
    from retouch.fuse.train import _Course

    model = wrap(*tiny(name, n_blocks=2))
    settings = dataclasses.replace(QUICK, a_init="independent")
    rows = encoded(model, FACTS, 512)
    course = _Course(model, settings, rows, [], initial_a(model, None, settings), None, "x")
    course.network.eval()
    expected = sum(answer_loss(model, e) for e in FACTS)
    assert float(course._loss(rows).detach()) == pytest.approx(expected, rel=1e-5)


def test_rows_of_very_different_length_are_read_apart_and_the_loss_stays(tiny: Any) -> None:
    from retouch.fuse.train import _Course, _level

    model = wrap(*tiny("llama", n_blocks=2))
    settings = dataclasses.replace(QUICK, a_init="independent")
    texts = [Example("the " * n + FACTS[0].prompt, FACTS[0].target) for n in (0, 40, 1, 41, 18, 44)]
    rows = encoded(model, texts, 512)
    parts = _level(rows)
    assert 1 < len(parts) < len(rows)
    assert sorted(len(r.ids) for part in parts for r in part) == sorted(len(r.ids) for r in rows)
    assert all(min(len(r.ids) for r in part) >= 0.7 * max(len(r.ids) for r in part) for part in parts)
    course = _Course(model, settings, rows, [], initial_a(model, None, settings), None, "x")
    course.network.eval()
    apart = sum(float(course._loss(part).detach()) for part in parts)
    assert apart == pytest.approx(float(course._loss(rows).detach()), rel=1e-5)


def test_same_settings_same_bits_and_each_setting_counts(tiny: Any) -> None:
    model = opened(tiny, "llama")
    one = train(model, FACTS, QUICK)
    torch.rand(3)  # the caller's generator does not matter
    assert equal(one, train(model, FACTS, QUICK))
    for change in ({"seed": 1}, {"dropout": 0.3}, {"a_seed": 1}, {"clip": 1e-3}, {"warmup": 0.9}):
        assert not equal(one, train(model, FACTS, dataclasses.replace(QUICK, **change)))
    assert not equal(one, train(model, FACTS, QUICK, replay=FACTS[:2]))
    state = torch.get_rng_state()
    train(model, FACTS, QUICK)
    assert torch.equal(state, torch.get_rng_state())


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny: Any) -> None:
    model = opened(tiny, "llama")
    settings = dataclasses.replace(QUICK, n_steps=1, dropout=0.0, warmup=0.0, batch=6, learning_rate=1e-3, clip=1e9)
    whole = train(model, FACTS, settings)
    halves = train(model, FACTS, dataclasses.replace(settings, batch=3, accumulation=2))
    # one step of Adam moves each number by the rate, in the direction of its gradient
    name = "blocks.1.mlp.up"
    assert torch.allclose(whole.parts[name].left, halves.parts[name].left, atol=1e-4)
    assert whole.parts[name].left.abs().max() > 1e-3


def test_checkpointing_gives_the_same_adapter(tiny: Any) -> None:
    model = opened(tiny, "llama")
    settings = dataclasses.replace(QUICK, dropout=0.0)
    one = train(model, FACTS, settings)
    other = train(model, FACTS, dataclasses.replace(settings, checkpointing=True))
    assert all(torch.allclose(p.left, other.parts[n].left, atol=1e-5) for n, p in one.parts.items())


def test_bfloat16_weights_train_a_float32_adapter_and_stay_as_they_were(tiny: Any, tmp_path: Path) -> None:
    model = opened(tiny, "gemma")
    plan, how = plan_prune(model, ratio=0.5, score="random", align="none"), dataclasses.replace(QUICK, dtype="bfloat16")
    save_pruned(model, plan, tmp_path, dtype="bfloat16")
    first = initial_a(model, plan, how)
    small, same = (open_pruned(tmp_path, device="cpu", dtype=d) for d in ("bfloat16", "float32"))
    assert small.weight("embed").dtype == torch.bfloat16
    assert equal(*(train(m, FACTS, how, initial=first) for m in (small, same)))
    before = model.fingerprint
    adapter = train(model, FACTS, dataclasses.replace(QUICK, dtype="bfloat16"))
    assert {p.left.dtype for p in adapter.parts.values()} == {torch.float32}
    assert dataclasses.replace(model, known_digests={}).fingerprint == before
    assert any(p.left.any() for p in adapter.parts.values())


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_predicted_activations_are_those_that_the_backward_pass_keeps(tiny: Any, name: str, dropout: float) -> None:
    from retouch.fuse.memory import Load, predicted
    from retouch.fuse.train import _Course

    model = opened(tiny, name, hidden_size=128, intermediate_size=384)
    settings = dataclasses.replace(QUICK, dropout=dropout)
    rows = encoded(model, [Example("one two three four " * 4, "five")] * 4, 512)
    course = _Course(model, settings, rows, [], initial_a(model, None, settings), None, "x")
    known = {t.untyped_storage().data_ptr() for t in [*course.network.parameters(), *course.network.buffers()]}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        course._loss(rows)
    load = Load(batch=4, n_tokens=len(rows[0].ids), n_answer_tokens=len(rows[0].target), rank=4, dropout=dropout)
    peak = predicted(model, units_of(model), {}, load)
    expected = peak.activations * 4 / 5 + peak.head / 3  # without a block's gradients and the answers'
    assert sum(s.nbytes() for s in seen.values()) == pytest.approx(expected, rel=0.15)


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_killed_run_goes_on_to_the_same_bits(tiny: Any, tmp_path: Path, step: int) -> None:
    model = opened(tiny, "qwen2")
    reference = train(model, FACTS, QUICK, replay=FACTS[3:])
    with pytest.raises(Killed), killed_at(step):
        train(model, FACTS, QUICK, tmp_path / "run", replay=FACTS[3:])
    assert (tmp_path / "run" / "state").exists() == (step >= 2)
    seen: list[float] = []
    with progress.listen(lambda what, done, total: seen.append(done) if what.startswith("Training") else None):
        again = train(model, FACTS, QUICK, tmp_path / "run", replay=FACTS[3:])
    assert equal(again, reference) and seen[0] == step - step % 2
    assert again.notes["curve"] == reference.notes["curve"] and again.notes["n_steps"] == 6
    assert not [p for p in (tmp_path / "run").rglob("*") if p.suffix in (".pt", ".bin", ".pkl")]


def test_a_finished_run_gives_its_adapter_again_without_training(tiny: Any, tmp_path: Path) -> None:
    model = opened(tiny, "llama")
    one = train(model, FACTS, QUICK, tmp_path)
    with killed_at(1):
        assert equal(train(model, FACTS, QUICK, tmp_path), one)
    other = dataclasses.replace(QUICK, seed=3)
    assert equal(train(model, FACTS, other, tmp_path), train(model, FACTS, other))  # begins again


def test_a_deadline_stops_cleanly_and_says_so(tiny: Any, tmp_path: Path) -> None:
    model = opened(tiny, "llama")
    partial = train(model, FACTS, QUICK, tmp_path, deadline_s=0.0)
    assert partial.notes["partial"] and partial.notes["n_steps"] == 0
    whole = train(model, FACTS, QUICK, tmp_path)
    assert not whole.notes["partial"] and equal(whole, train(model, FACTS, QUICK))


def test_a_damaged_state_is_told_and_begun_again(tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = opened(tiny, "llama")
    one = train(model, FACTS, QUICK, tmp_path)
    file = tmp_path / "state" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert equal(train(model, FACTS, QUICK, tmp_path), one)
    assert "is damaged, so its run starts again" in caplog.text


# ---------------------------------------------------------------- where A begins


def test_shared_a_is_one_matrix_cut_to_each_edges_columns(tiny: Any) -> None:
    model = opened(tiny, "llama")
    plans = [plan_prune(model, ratio=0.5, score="random", seed=s, align="none") for s in (0, 1)]
    whole = initial_a(model, None, QUICK)
    for plan in plans:
        one, units = initial_a(model, plan, QUICK), units_of(model)
        for name in ("blocks.1.mlp.down", "blocks.2.attention.out"):
            index = units.index(name.split(".", 2)[2], plan.kept[int(name[7])])
            assert torch.equal(one[name], whole[name][:, index])
        assert torch.equal(one["blocks.1.mlp.up"], whole["blocks.1.mlp.up"])
    smaller = initial_a(model, None, dataclasses.replace(QUICK, rank=2))
    assert torch.equal(smaller["blocks.0.mlp.up"], whole["blocks.0.mlp.up"][:2])


def test_orthogonal_a_gives_edges_disjoint_rows_and_independent_other_numbers(tiny: Any) -> None:
    model = opened(tiny, "llama")
    how = dataclasses.replace(QUICK, a_init="orthogonal")
    edges = [initial_a(model, None, how, edge=i, n_edges=3)["blocks.1.mlp.up"] for i in range(3)]
    rows = torch.cat(edges).double() * 3**0.5
    assert torch.allclose(rows @ rows.T, torch.eye(12).double(), atol=1e-6)
    with pytest.raises(UserError, match="orthogonal rows"):
        initial_a(model, None, how, edge=0, n_edges=9)
    alone = dataclasses.replace(QUICK, a_init="independent")
    one, other = (initial_a(model, None, alone, edge=i)["blocks.1.mlp.up"] for i in (0, 1))
    assert not torch.equal(one, other)


def test_frozen_a_stays_where_it_began(tiny: Any) -> None:
    model = opened(tiny, "llama")
    settings = dataclasses.replace(QUICK, freeze_a=True)
    first = initial_a(model, None, settings)
    adapter = train(model, FACTS, settings)
    assert all(torch.equal(p.right, first[n]) and p.left.any() for n, p in adapter.parts.items())
    assert not torch.equal(train(model, FACTS, QUICK).parts["blocks.1.mlp.up"].right, first["blocks.1.mlp.up"])


def test_an_edge_cannot_draw_what_only_the_cloud_knows(tiny: Any) -> None:
    model = opened(tiny, "llama")
    plan = plan_prune(model, ratio=0.5, score="random", align="none")
    small = pruned(model, plan)
    with pytest.raises(UserError, match="must come with the model"):
        train(small, FACTS, QUICK)
    with pytest.raises(UserError, match=r"first factor of blocks\.\d"):
        train(small, FACTS, QUICK, initial=initial_a(model, None, QUICK))
    assert train(small, FACTS, dataclasses.replace(QUICK, a_init="independent")).plan == plan.hash


def test_targets_and_rank_are_checked(tiny: Any) -> None:
    model = opened(tiny, "llama")
    few = train(model, FACTS, dataclasses.replace(QUICK, targets=("mlp.down", "attention.query")))
    assert {n.split(".", 2)[2] for n in few.parts} == {"mlp.down", "attention.query"}
    for change in ({"targets": ("mlp.sideways",)}, {"rank": 17}):
        with pytest.raises(SettingsError):
            train(model, FACTS, dataclasses.replace(QUICK, **change))


def test_divergence_is_an_error(tiny: Any) -> None:
    model = opened(tiny, "llama")
    with pytest.raises(RetouchError, match="diverged at step"):
        train(model, FACTS, dataclasses.replace(QUICK, learning_rate=1e30, n_steps=20))


# ---------------------------------------------------------------- examples


def test_a_file_that_is_no_text_is_named_with_its_byte(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(FactError, match="is not UTF-8 text: byte 0"):
        read_examples(tmp_path / "a.jsonl")
    with pytest.raises(FactError, match=r"There is no file or folder .*b.jsonl.*Did you mean 'a.jsonl'"):
        read_examples(tmp_path / "b.jsonl")


def test_reading_examples(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.tsv"
    lines.write_text(
        '{"prompt": "Two and two is", "target": "four", "domain": "sums"}\n\n{"prompt": "a", "target": "b"}\n'
    )
    table.write_text("target\tprompt\r\nfour\tTwo and two is\r\nb\ta\n")
    wanted = (Example("Two and two is", "four"), Example("a", "b"))
    assert read_examples(lines) == wanted == read_examples(table)
    for file in (lines, table):  # with the mark that some editors put in front
        file.write_text(file.read_text(), encoding="utf-8-sig")
        assert read_examples(file) == wanted


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "target": "b"}\n{"prompt": "a"}\n', "line 2: target"),
        ("a.jsonl", '{"prompt": "a", "target": " "}', "line 1: target"),
        ("a.jsonl", '\n{"prompt": 3, "target": "b"}', "line 2: prompt"),
        ("a.jsonl", '{"prompt": "a", "target": "b \\ud83d"}', "line 1: target holds half of a character"),
        ("a.jsonl", "{", "line 1: not valid JSON"),
        ("a.jsonl", "[1]", "line 1: expected"),
        ("a.jsonl", "", "no examples"),
        ("a.tsv", "prompt\tanswer\na\tb", "'target' is missing"),
        ("a.tsv", "prompt\ttarget\na", "line 2: 1 columns"),
        ("a.csv", "prompt,target", r"\.jsonl"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(FactError, match=message):
        read_examples(tmp_path / file)
    with pytest.raises(FactError, match="There is no file or folder"):
        read_examples(tmp_path / "none.tsv")


def test_long_prompts_lose_their_beginning(tiny: Any) -> None:
    for name in ("llama", "gemma"):  # without and with a token in front
        model = opened(tiny, name)
        (whole,) = encoded(model, [Example("one two three four five six", "seven")], 512)
        (row,) = encoded(model, [Example("one two three four five six", "seven")], len(whole.ids) - 3)
        assert row.target == whole.target and len(row.ids) == len(whole.ids) - 3
        assert row.ids[-3:] == whole.ids[-3:] and (name == "llama" or row.ids[0] == whole.ids[0])
        with pytest.raises(FactError, match="Example 1"):
            encoded(model, [Example("one", "seven eight nine ten eleven")], 3)


def test_order_visits_all_and_can_start_anywhere() -> None:
    order = Order(7, 0, "own")
    assert sorted(order.take(0, 7)) == sorted(order.take(7, 7)) == list(range(7))
    assert order.take(0, 7) != order.take(7, 7) and Order(7, 0, "own").take(5, 6) == order.take(0, 14)[5:11]
