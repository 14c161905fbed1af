"""Interrupted and run again is the same as never interrupted, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import slim_toy as toy
import torch
from safetensors.torch import load_file

from retouch import store
from retouch.progress import listen
from retouch.slim.stages import Run, fit

WORDS = toy.tokenizer()
STAGES = ("finetune", "assistant", "slenderise", "recover_hidden", "recover")
STEPS = (9, 7, 9, 5, 66)


def fitted(folder, **settings):
    return fit(toy.task(), toy.model(), WORDS, toy.plan(), toy.method(**settings), folder)


class Stop:
    """A listener that interrupts one stage at one step, and notes where each stage began."""

    def __init__(self, stage=None, step=None):
        self.stage, self.step, self.begun = stage, step, {}

    def __call__(self, what, done, total):
        if not what.startswith("Training: "):
            return
        self.begun.setdefault(what.removeprefix("Training: "), done)
        if what == f"Training: {self.stage}" and done == self.step:
            raise KeyboardInterrupt


def bits(network):
    return dict(network.state_dict())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def untimed(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of the run that nothing stops, and its outcome."""
    folder = tmp_path_factory.mktemp("straight")
    found = fitted(folder)
    assert tuple(record["n_steps"] for record in found.history) == STEPS
    return folder, found


def before(folder, straight, stage):
    """Make a folder in which everything before a stage is done."""
    for name in ("answers", *STAGES[: STAGES.index(stage)]):
        for done in straight[0].glob(f"{name}-*"):
            shutil.copytree(done, folder / done.name)
    return folder


def until(folder, stage, **settings):
    """Run the stages up to one of them, and return its network."""
    run = Run(toy.task(), toy.model(), WORDS, toy.plan(), toy.method(**settings), folder)
    assistant = run.assistant(run.original())
    slim = run.slenderised(assistant, assistant, run.method.scoring())
    if stage == "recover":
        slim = run.recovered(slim, assistant, run.stages.recover_hidden)
        slim = run.recovered(slim, assistant, run.stages.recover)
    return slim.network


def stopped(stage, step, call, *given, **settings):
    with pytest.raises(KeyboardInterrupt), listen(Stop(stage, step)):
        call(*given, **settings)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_any_interruptions_change_no_bit(straight, tmp_path, seed):
    chance = random.Random(seed)
    for stage, n in zip(STAGES, STEPS, strict=True):
        stopped(stage, chance.randint(1, n), fitted, tmp_path)
    found = fitted(tmp_path)
    assert same(bits(found.network), bits(straight[1].network))
    assert same(bits(found.assistant), bits(straight[1].assistant))
    assert untimed(found.history) == untimed(straight[1].history)


@pytest.fixture(scope="module")
def ends(straight):
    """Where two of the stages end when nothing stops them."""
    return {stage: bits(until(straight[0], stage)) for stage in ("slenderise", "recover")}


@pytest.mark.parametrize(
    "stage, step, goes_on",
    [
        ("slenderise", 2, 0),  # before anything was saved
        ("slenderise", 4, 3),  # at the cut, before the cut's own state was saved
        ("slenderise", 5, 4),  # right after the cut
        ("slenderise", 8, 6),  # between two cuts
        ("recover", 17, 15),  # after the best state was seen
    ],
)
def test_it_goes_on_from_the_last_state(straight, ends, tmp_path, stage, step, goes_on):
    folder = before(tmp_path, straight, stage)
    stopped(stage, step, until, folder, stage)
    end = Stop()
    with listen(end):
        found = until(folder, stage)
    assert end.begun == {stage: goes_on}
    assert same(bits(found), ends[stage])


def test_without_saved_states_a_stage_starts_again_and_ends_the_same(straight, ends, tmp_path):
    folder = before(tmp_path, straight, "slenderise")
    stopped("slenderise", 7, until, folder, "slenderise", save_every=0)
    end = Stop()
    with listen(end):
        found = until(folder, "slenderise", save_every=0)
    assert end.begun == {"slenderise": 0}
    assert same(bits(found), ends["slenderise"])


def test_a_damaged_state_is_not_used(straight, ends, tmp_path):
    folder = before(tmp_path, straight, "slenderise")
    stopped("slenderise", 8, until, folder, "slenderise")
    (saved,) = folder.glob("slenderise-*-partial")
    numbers = saved / "state.safetensors"
    numbers.write_bytes(numbers.read_bytes()[:-100])
    end = Stop()
    with listen(end):
        found = until(folder, "slenderise")
    assert end.begun == {"slenderise": 0}
    assert same(bits(found), ends["slenderise"])


def test_a_state_holds_moments_by_name_and_generators_as_bytes(straight, tmp_path):
    folder = before(tmp_path, straight, "recover")
    stopped("recover", 17, until, folder, "recover")
    (saved,) = folder.glob("recover-*-partial")
    assert sorted(path.name for path in saved.iterdir()) == ["manifest.json", "state.json", "state.safetensors"]
    tensors = load_file(saved / "state.safetensors")
    names = {name.removeprefix("network.") for name in tensors if name.startswith("network.")}
    assert {f"moments.exp_avg.{name}" for name in names} <= tensors.keys()
    assert {f"best.{name}" for name in names} <= tensors.keys()
    assert tensors["generator.cpu"].dtype == torch.uint8
    assert tensors["generator.cpu"].shape[0] == 1
    facts = store.read_json(saved / "state.json")
    assert facts["position"]["step"] == 15
    assert facts["config"]["model_type"] == "retouch_slim"


def test_the_price_of_the_constraint_goes_on_too(straight, tmp_path):
    def bound(folder):
        return fit(toy.task(), toy.model(), WORDS, toy.plan(), toy.method(constrained=True), folder, max_harm=-9.0)

    folders = [before(tmp_path / name, straight, "recover") for name in ("straight", "stopped")]
    stopped("recover", 10, bound, folders[1])
    (saved,) = folders[1].glob("recover-*-partial")
    value, smoothed = store.read_json(saved / "state.json")["price"]
    assert value > 0
    assert smoothed is not None
    one, other = map(bound, folders)
    assert same(bits(one.network), bits(other.network))


SCRIPT = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {slim!r}]
import torch
torch.set_num_threads(1)
import test_slim_resume as t
def die(what, done, total):
    if what == "Training: slenderise" and done == 7:
        os.kill(os.getpid(), signal.SIGKILL)
with t.listen(die):
    t.fitted({folder!r})
"""


@pytest.mark.slow
def test_a_killed_process_changes_no_bit(straight, tmp_path):
    here = Path(__file__).parent
    script = SCRIPT.format(tests=str(here.parent), slim=str(here), folder=str(tmp_path))
    child = subprocess.run([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280)
    assert child.returncode == -signal.SIGKILL
    end = Stop()
    with listen(end):
        found = fitted(tmp_path)
    assert end.begun == {"slenderise": 6, "recover_hidden": 0, "recover": 0}
    assert same(bits(found.network), bits(straight[1].network))
