"""Adapters in files: what comes back is what was meant, PEFT agrees, and nothing is read before it is asked for."""

import json
import os
import pickle
import signal
from dataclasses import replace

import pytest
import torch

from retouch import change as changes
from retouch import store
from retouch.change import LowRank
from retouch.errors import StoreError, WrongBase
from retouch.fuse import adapter_file
from retouch.fuse.adapter_file import check_tensors, named_tensors, open_adapter, ranks_of, weight_norms, write_adapter
from retouch.fuse.base import Adapter
from retouch.fuse.screen import screen, screen_table
from retouch.model import wrap

# of transformers, in PEFT's own code
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def opened(tiny):
    made = {}
    return lambda family: made.setdefault(family, wrap(*tiny(family), source=f"tiny {family}"))


@pytest.fixture(scope="module")
def llama(opened):
    return opened("llama")


def low(model, name, rank=2, seed=0, size=0.1):
    out, into = model.anatomy.shape(name)
    make = torch.Generator().manual_seed(seed)
    return LowRank(size * torch.randn(out, rank, generator=make), torch.randn(rank, into, generator=make))


def mixed(model):
    """Factors of every block's matrices, ranks from 1 to 4."""
    names = [name for name in model.anatomy.names() if name.startswith("blocks.")]
    return {name: low(model, name, 1 + i % 4, i) for i, name in enumerate(names)}


def written(folder, parts, model, **more):
    write_adapter(folder, parts.items(), {name: part.rank for name, part in parts.items()}, model, **more)
    return folder


def logits(network):
    with torch.no_grad():
        return network(input_ids=IDS).logits


# What we write.


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3_text"])
def test_plain_peft_gives_the_logits_of_the_parts(opened, tiny, tmp_path, family):
    from peft import PeftModel

    model = opened(family)
    parts = mixed(model)
    folder = written(tmp_path / "adapter", parts, model)
    ours = changes.apply(model, changes.Change("fuse", model.base_fingerprint, parts))
    theirs = logits(PeftModel.from_pretrained(tiny(family)[0], folder).eval())
    assert torch.allclose(logits(ours.network), theirs, atol=1e-4)
    assert (theirs - logits(model.network)).abs().max() > 0.1


def test_what_is_written_comes_back_with_all_that_was_said(llama, tmp_path):
    parts = mixed(llama)
    folder = written(tmp_path / "a", parts, llama, notes={"lam": 1.5}, plan="ab12", n_examples=7)
    adapter = open_adapter(folder, llama, name="north")
    assert (adapter.name, adapter.plan, adapter.n_examples) == ("north", "ab12", 7)
    assert adapter.base == llama.base_fingerprint
    assert adapter.notes["lam"] == 1.5
    assert adapter.notes["file"]["base"] == "verified"
    assert set(adapter.parts) == set(parts)
    for name, part in parts.items():
        assert torch.equal(adapter.parts[name].left, part.left)
        assert torch.equal(adapter.parts[name].right, part.right)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", "retouch.json",
    ]  # fmt: skip


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_half_precision_files_come_back_in_float32(llama, tmp_path, dtype, error):
    parts = mixed(llama)
    adapter = open_adapter(written(tmp_path / "a", parts, llama, dtype=dtype), llama)
    for name, part in parts.items():
        assert adapter.parts[name].left.dtype == torch.float32
        assert torch.allclose(adapter.parts[name].right, part.right, rtol=error, atol=1e-6)
        assert not torch.equal(adapter.parts[name].right, part.right)


def test_parts_may_come_in_any_order_and_with_a_lower_rank(llama, tmp_path):
    parts = mixed(llama)
    ranks = dict.fromkeys(parts, 4)
    write_adapter(tmp_path / "a", reversed(parts.items()), ranks, llama)
    adapter = open_adapter(tmp_path / "a", llama)
    assert list(adapter.parts) == list(ranks)
    assert ranks_of(adapter) == ranks
    for name, part in parts.items():
        assert torch.allclose(adapter.parts[name].delta(), part.delta(), atol=1e-12)


def test_equal_adapters_are_equal_files(llama, tmp_path):
    one, two = (written(tmp_path / name, mixed(llama), llama) for name in "ab")
    for name in ("adapter_model.safetensors", "adapter_config.json", "manifest.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_parts_are_taken_one_at_a_time(llama, tmp_path):
    seen = []

    def stream(parts):
        for name, part in parts.items():
            seen.append((tmp_path / "a").exists())
            yield name, part

    parts = mixed(llama)
    write_adapter(tmp_path / "a", stream(parts), {name: part.rank for name, part in parts.items()}, llama)
    assert seen == [False] * len(parts)


DOWN, UP = "blocks.0.mlp.down", "blocks.0.mlp.up"


@pytest.mark.parametrize(
    ("given", "ranks", "more", "says"),
    [
        ([DOWN], {DOWN: 2, UP: 2}, {}, "blocks.0.mlp.up was announced"),
        ([DOWN, UP], {DOWN: 2}, {}, "mlp.up was not announced"),
        ([DOWN, DOWN], {DOWN: 2}, {}, "given twice"),
        ([DOWN], {DOWN: 1}, {}, "rank 1; the part is 32x64 with rank 2"),
        ([], {}, {}, "without a single weight"),
        ([], {"head": 2}, {}, "head is no linear layer in a block"),
        ([], {"embed": 2}, {}, "embed is no linear layer"),
        ([], {DOWN: 33}, {}, "allowed are 1 to 32"),
        ([], {DOWN: 0}, {}, "allowed are 1 to 32"),
        ([DOWN], {DOWN: 2}, {"dtype": "int8"}, "dtype must be one of"),
        ([DOWN], {DOWN: 2}, {"notes": {"x": float("nan")}}, "cannot be stored as JSON"),
        ([DOWN], {DOWN: 2}, {"notes": {"x": "y" * (1 << 20)}}, "Shorten them"),
        ([DOWN], {DOWN: 2}, {"n_examples": -1}, "n_examples must be a count"),
    ],
)
def test_what_cannot_be_written_is_refused_and_the_old_folder_stays(llama, tmp_path, given, ranks, more, says):
    old = written(tmp_path / "a", {DOWN: low(llama, DOWN)}, llama)
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    with pytest.raises(StoreError, match=says):
        write_adapter(old, ((name, low(llama, name)) for name in given), ranks, llama, **more)
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before


@pytest.mark.parametrize(
    ("part", "dtype", "says"),
    [
        (LowRank(torch.full((32, 1), float("nan")), torch.ones(1, 64)), "float32", "not finite"),
        (LowRank(torch.full((32, 1), 1e6), torch.zeros(1, 64)), "float16", "not finite"),
        (LowRank(torch.full((32, 1), 1e3), torch.ones(1, 64)), "float32", "10 times the weight's"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(llama, tmp_path, part, dtype, says):
    with pytest.raises(StoreError, match=says):
        write_adapter(tmp_path / "a", [(DOWN, part)], {DOWN: 1}, llama, dtype=dtype)
    assert list(tmp_path.glob("a*")) == []


def test_a_killed_writer_leaves_the_old_adapter(llama, tmp_path):
    folder = written(tmp_path / "a", mixed(llama), llama)
    before = open_adapter(folder, llama).parts[DOWN].delta()
    reader, writer = os.pipe()

    def parts():
        yield UP, low(llama, UP)
        os.write(writer, b"half")
        signal.pause()

    if (child := os.fork()) == 0:
        try:
            write_adapter(folder, parts(), {UP: 2, DOWN: 2}, llama)
        finally:
            os._exit(1)
    assert os.read(reader, 4) == b"half"
    assert [p for p in tmp_path.iterdir() if ".new-" in p.name], "it was killed in the middle of its work"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    assert torch.equal(open_adapter(folder, llama).parts[DOWN].delta(), before)
    written(folder, {UP: low(llama, UP)}, llama)
    assert list(open_adapter(folder, llama).parts) == [UP]
    assert [p.name for p in tmp_path.iterdir() if ".new-" in p.name] == []


# What we read.


@pytest.fixture
def trained(tiny, tmp_path):
    """Make an adapter with PEFT itself, whose factors are not zero."""

    def make(family="llama", dtype=torch.float32, **fields):
        from peft import LoraConfig, get_peft_model

        wanted = {"r": 4, "lora_alpha": 6, "target_modules": ["down_proj", "q_proj"], "task_type": "CAUSAL_LM"}
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
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 1}}),
        ("llama", {"alpha_pattern": {"layers.1.mlp.down_proj": 3}, "use_rslora": True}),
        ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
        ("llama", {"exclude_modules": ["layers.0.mlp.down_proj"]}),
        ("llama", {"init_lora_weights": "gaussian", "lora_dropout": 0.1}),
        ("gpt2", {"target_modules": ["c_proj", "c_attn"], "fan_in_fan_out": True}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    ],
)
def test_an_adapter_of_peft_has_the_logits_that_peft_gives(opened, trained, family, fields):
    network, folder = trained(family, **fields)
    model = opened(family)
    adapter = open_adapter(folder, model, base_unverified=True)
    change = changes.Change("fuse", adapter.base, dict(adapter.parts))
    assert torch.allclose(logits(changes.apply(model, change).network), logits(network), atol=1e-4)
    assert "unverified" in adapter.notes["file"]["base"]


def test_bfloat16_factors_of_peft_are_read(llama, trained):
    _, folder = trained(dtype=torch.bfloat16)
    parts = open_adapter(folder, llama, base_unverified=True).parts
    assert {part.left.dtype for part in parts.values()} == {torch.float32}


def test_an_own_change_as_adapter_is_read_too(llama, tmp_path):
    change = changes.Change("rome", llama.base_fingerprint, {DOWN: low(llama, DOWN)})
    changes.to_peft(change, llama, tmp_path / "a")
    with pytest.raises(StoreError, match="does not say which base"):
        open_adapter(tmp_path / "a", llama)
    assert torch.equal(
        open_adapter(tmp_path / "a", llama, base_unverified=True).parts[DOWN].left, change.parts[DOWN].left
    )


def test_alpha_and_rank_are_folded_into_the_left_factor(llama, trained):
    _, folder = trained(rank_pattern={"down_proj": 2}, use_rslora=True)
    raw = store.load_tensors(folder / "adapter_model.safetensors")
    part = open_adapter(folder, llama, base_unverified=True).parts[DOWN]
    assert torch.allclose(
        part.left, raw["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"] * 6 / 2**0.5, rtol=1e-6
    )
    assert torch.equal(part.right, raw["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"])


def test_a_pattern_of_targets_is_taken_only_where_the_tensors_tell(llama, trained):
    _, folder = trained(target_modules=r".*\.(down|q)_proj")
    with pytest.raises(StoreError, match="patterns are never compiled"):
        open_adapter(folder, llama, base_unverified=True)
    adapter = open_adapter(folder, llama, base_unverified=True, targets_from_tensors=True)
    assert set(adapter.parts) == {f"blocks.{i}.{part}" for i in (0, 1) for part in ("attention.query", "mlp.down")}


def test_an_adapter_of_other_weights_is_refused(opened, tiny, tmp_path, llama):
    other = wrap(*tiny("llama", seed=1), source="another")
    with pytest.raises(WrongBase, match=r"was trained for model .* this model is"):
        open_adapter(written(tmp_path / "a", mixed(llama), llama), other)
    with pytest.raises(WrongBase):
        open_adapter(tmp_path / "a", other, base_unverified=True)


def test_a_base_without_weights_checks_all_but_the_size(llama, tiny, tmp_path):
    folder = written(tmp_path / "a", mixed(llama), llama)
    network = tiny("llama")[0].to("meta")
    with pytest.raises(StoreError, match="whose weights are not here"):
        open_adapter(folder, replace(llama, network=network, known_digests={}))
    adapter = open_adapter(folder, replace(llama, network=network, base=llama.fingerprint))
    assert "not checked" in adapter.notes["file"]["norms"]
    assert torch.equal(adapter.parts[DOWN].left, mixed(llama)[DOWN].left)
    assert open_adapter(folder, llama).notes["file"]["norms"] == "checked"


def test_factors_are_read_one_weight_at_a_time_and_only_when_asked(llama, tmp_path, monkeypatch):
    read = []
    own = adapter_file.read_pair
    adapter = open_adapter(written(tmp_path / "a", mixed(llama), llama), llama)
    monkeypatch.setattr("retouch.fuse._factors.read_pair", lambda *a: read.append(a[1]) or own(*a))
    assert len(adapter.parts) == 14
    assert DOWN in adapter.parts and "blocks.9.mlp.down" not in adapter.parts
    assert ranks_of(adapter) == {name: part.rank for name, part in mixed(llama).items()}
    assert read == []
    copy = pickle.loads(pickle.dumps(adapter.parts))
    assert torch.equal(copy[DOWN].left, adapter.parts[DOWN].left)
    assert read == [DOWN, DOWN]


def test_a_file_that_changes_after_it_was_opened_is_not_used(llama, tmp_path):
    folder = written(tmp_path / "a", {DOWN: low(llama, DOWN)}, llama)
    adapter = open_adapter(folder, llama)
    written(folder, {DOWN: low(llama, DOWN, seed=9)}, llama)
    with pytest.raises(StoreError, match="has changed since"):
        adapter.parts[DOWN]
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StoreError, match="ended after"):
        adapter.parts[DOWN]
    file.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        adapter.parts[DOWN]


def test_harmless_keys_are_dropped_and_listed(llama, trained):
    _, folder = trained(lora_dropout=0.25)
    dropped = open_adapter(folder, llama, base_unverified=True).notes["file"]["dropped"]
    assert {"lora_dropout", "peft_version", "task_type"} <= set(dropped)
    assert "fan_in_fan_out" not in dropped  # false: it says nothing


def test_an_edge_s_adapter_fits_the_pruned_model_only(llama, tmp_path):
    from retouch.fuse.prune import plan_prune
    from retouch.fuse.pruned import pruned

    whole = wrap(*_deep(), source="deep")
    small = pruned(whole, plan_prune(whole, ratio=0.5, score="magnitude"))
    name = "blocks.2.mlp.down"
    rows, columns = small.matrix(name).shape
    assert columns < whole.anatomy.shape(name)[1]
    part = LowRank(torch.full((rows, 2), 0.01), torch.ones(2, columns))
    folder = written(tmp_path / "a", {name: part}, small)
    assert torch.equal(open_adapter(folder, small).parts[name].right, part.right)
    with pytest.raises(StoreError, match="do not fit"):
        open_adapter(folder, whole)


def _deep():
    import families

    return families.build("llama", n_blocks=4), families.tokenizer()


# What comes over a network.


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_factors_in_memory_come_back_by_weight(llama, kind):
    parts = mixed(llama)
    sent = named_tensors(parts)
    if kind == "array":
        sent = {name: tensor.numpy() for name, tensor in sent.items()}
    shapes = {name: part.shape for name, part in parts.items()}
    ranks = {name: part.rank for name, part in parts.items()}
    back = check_tensors("edge 1", sent, shapes, ranks=ranks, norms=weight_norms(llama), scales={DOWN: 2.0})
    assert torch.equal(back[DOWN].left, 2 * parts[DOWN].left)
    assert all(torch.equal(back[name].right, part.right) for name, part in parts.items())


A, B = f"{DOWN}.lora_A", f"{DOWN}.lora_B"


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (lambda t: t.clear(), "holds no factors"),
        (lambda t: t.pop(A), "no lora_A beside it"),
        (lambda t: t.update({"blocks.9.mlp.down.lora_A": t[A], "blocks.9.mlp.down.lora_B": t[B]}), "is no weight"),
        (lambda t: t.update({f"{UP}.lora_A": torch.ones(2, 32), f"{UP}.lora_B": torch.ones(64, 2)}), "was not agreed"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), "overwrite a weight"),
        (lambda t: t.update({f"{DOWN}.bias": torch.ones(32)}), "changes a bias"),
        (lambda t: t.update({A: t[A][:, :-1]}), "do not fit"),
        (lambda t: t.update({A: t[A][:1]}), "do not fit"),
        (lambda t: t.update({A: t[A][:1], B: t[B][:, :1]}), "rank 1, and 2 was agreed"),
        (lambda t: t.update({A: torch.ones(40, 64), B: torch.ones(32, 40)}), "allowed are 1 to 32"),
        (lambda t: t.update({A: t[A] * float("nan")}), "not finite"),
        (lambda t: t.update({B: t[B] * 1e30}), "10 times the weight's"),
        (lambda t: t.update({A: t[A].long()}), "no plain array"),
        (lambda t: t.update({A: t[A].to_sparse()}), "no plain array"),
        (lambda t: t.update({A: t[A].numpy().astype(object)}), "no plain array"),
        (lambda t: t.update({A: t[A].tolist()}), "no plain array"),
        (lambda t: t.update({A: t[A][0]}), "do not fit"),
        (lambda t: t.update({f"blocks.{i}.lora_A": None for i in range(10_001)}), "at most 10,000"),
    ],
)
def test_hostile_factors_in_memory_are_refused(llama, alter, says):
    tensors = named_tensors({DOWN: low(llama, DOWN)})
    alter(tensors)
    shapes = {DOWN: (32, 64), UP: (64, 32)}
    with pytest.raises(StoreError, match=says) as caught:
        check_tensors("edge 1", tensors, shapes, ranks={DOWN: 2}, norms=weight_norms(llama))
    assert "the adapter from edge 1" in str(caught.value)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), 1e5, "2", True])
def test_hostile_scales_in_memory_are_refused(llama, scale):
    with pytest.raises(StoreError, match="the scale of"):
        check_tensors("e", named_tensors({DOWN: low(llama, DOWN)}), {DOWN: (32, 64)}, scales={DOWN: scale})


# Which are unlike the others.


def sites(model, sizes, rank=2):
    return [
        Adapter(f"site {i}", {n: low(model, n, rank, 9 * i + j, size) for j, n in enumerate((DOWN, UP))}, "base")
        for i, size in enumerate(sizes)
    ]


def test_an_adapter_that_is_much_larger_is_flagged_and_kept(llama):
    found = screen(sites(llama, [0.1, 0.11, 0.09, 0.1, 3.0]))
    assert [s.flags for s in found] == [(), (), (), (), ("norm",)]
    assert found[4].norm > 10 * found[0].norm
    table = screen_table(found)
    assert len(table.rows) == 5 and table.rows[4][-1] == "norm"


def test_an_adapter_in_a_single_direction_is_flagged(llama):
    adapters = sites(llama, [0.1] * 6, rank=16)
    part = adapters[2].parts[DOWN]
    spike = {n: LowRank(p.left * torch.tensor([8.0] + [0.0] * 15), p.right) for n, p in adapters[2].parts.items()}
    found = screen([*adapters[:2], replace(adapters[2], parts=spike), *adapters[3:]])
    assert part.rank == 16 and found[2].top_share == pytest.approx(1)
    assert "top_share" in found[2].flags
    assert [s.flags for i, s in enumerate(found) if i != 2] == [()] * 5


def test_few_adapters_say_nothing_about_what_is_usual(llama):
    found = screen(sites(llama, [0.1, 0.1, 9.0]))
    assert [s.flags for s in found] == [(), (), ()]
    assert "nothing says what is usual" in screen_table(found).caption


def test_the_record_is_plain_json_with_the_files_hashes(llama, tmp_path):
    folder = written(tmp_path / "a", mixed(llama), llama)
    record = json.loads((folder / "retouch.json").read_text())
    assert record["kind"] == "adapter" and record["base"] == llama.base_fingerprint
    for name, digest in record["files"].items():
        assert store.sha256_file(folder / name) == digest
