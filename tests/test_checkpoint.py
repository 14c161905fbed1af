"""States of training: whole, by name, told when damaged."""

import pytest
import torch

from retouch import checkpoint
from retouch.errors import StoreError

CPU = torch.device("cpu")


def test_moments_return_to_their_parameters():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    kept = checkpoint.moments(optimizer, layer.named_parameters())
    assert set(kept) == {f"{kind}.{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in ("weight", "bias")}
    fresh = torch.optim.AdamW(layer.parameters())
    checkpoint.restore_moments(fresh, layer.named_parameters(), kept)
    again = checkpoint.moments(fresh, layer.named_parameters())
    assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)


def test_there_is_no_state_where_there_is_no_folder(tmp_path):
    assert checkpoint.load(tmp_path / "none") is None and checkpoint.load(None) is None


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "state.safetensors"])
def test_a_damaged_state_is_told_removed_and_made_again(tmp_path, name, caplog):
    state = {"a": torch.ones(2)}, {"b": 1}
    checkpoint.save(tmp_path / "stage", *state)
    (tmp_path / "stage" / name).write_text("")
    assert checkpoint.load(tmp_path / "stage") is None
    assert not (tmp_path / "stage").exists() and "is damaged, so its run starts again" in caplog.text
    checkpoint.save(tmp_path / "stage", *state)
    assert checkpoint.load(tmp_path / "stage")[1] == {"b": 1}
    (tmp_path / "stage" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"Move .* away to begin again"):
        checkpoint.load(tmp_path / "stage")
    assert (tmp_path / "stage" / "notes.txt").exists(), "a file of somebody else's is never removed"


def test_the_state_of_another_run_is_told_and_left(tmp_path, caplog):
    checkpoint.save(tmp_path / "run", {"a": torch.ones(2)}, {"key": "one"})
    assert checkpoint.load(tmp_path / "run", "one")[1] == {"key": "one"}
    assert checkpoint.load(tmp_path / "run", "two") is None
    assert "other data, settings or model" in caplog.text and (tmp_path / "run").exists()


def test_prefixes_come_off_again():
    tensors = {"a": torch.ones(1), "a.b": torch.zeros(1)}
    held = checkpoint.under("one", tensors) | checkpoint.under("on", {"c": torch.ones(3)})
    assert checkpoint.select("one", held) == tensors and list(checkpoint.select("on", held)) == ["c"]


def test_random_numbers_go_on_where_they_stood():
    kept = checkpoint.generators(CPU)
    drawn = torch.rand(3)
    checkpoint.restore_generators(CPU, kept)
    assert torch.equal(torch.rand(3), drawn)


def test_fused_steps_stay_with_their_parameter_and_strange_names_are_passed_over():
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    kept = checkpoint.moments(optimizer, layer.named_parameters()) | {"network.weight": torch.ones(1, 2)}
    fresh = torch.optim.AdamW(layer.parameters(), fused=True)
    checkpoint.restore_moments(fresh, layer.named_parameters(), kept)
    one, two = optimizer.state[layer.weight], fresh.state[layer.weight]
    assert one.keys() == two.keys() and all(torch.equal(one[kind], two[kind]) for kind in one)
