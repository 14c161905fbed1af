"""Saved folders survive kills, full disks and damage; keys and hashes tell everything apart.

Run as a script, this file is the single-threaded process in which writers are forked and killed.
"""

import errno
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch import store
from retouch.errors import StoreError

A = {"one.txt": b"A" * 100_000, "sub/two.dat": bytes(range(250)) * 400, "same": b"=" * 100_000, "three": b"a" * 90_000}
B = {"one.txt": b"B" * 100_000, "sub/two.dat": bytes(range(249, -1, -1)) * 400, "same": b"=" * 100_000, "only": b"b"}


def content(folder):
    """Read a folder's files, after the full check."""
    return {name: (Path(folder) / name).read_bytes() for name in store.check_folder(folder)["files"]}


def state(folder):
    """Say in which of the known states a folder is."""
    try:
        found = content(folder)
    except StoreError as error:
        return f"unreadable: {error}"
    return {True: "A", False: "B" if found == B else "mixed"}[found == A]


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def leftovers(folder):
    return [p.name for p in Path(folder).parent.iterdir() if p.name.startswith(f".{Path(folder).name}.")]


# What runs in the script: every function takes text and gives something that JSON can hold.


def _fork(work):
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def _force(path_name):
    if path_name == "fallback":
        store.folders._exchange = lambda new, target: False


def kill_writers(folder, n_kills, path_name, seed="0"):
    """Kill a writer that alternates between A and B at random moments; count the states found after each kill."""
    _force(path_name)
    chance = random.Random(int(seed))
    start = time.perf_counter()
    for known in (A, B, A, B):
        store.write_folder(folder, known)
    longest = (time.perf_counter() - start) / 2

    def write_forever():
        first, second = (B, A) if found == "A" else (A, B)
        while True:
            store.write_folder(folder, first)
            store.write_folder(folder, second)

    found = "B"
    counts = {"A": 0, "B": 0, "interrupted": 0}
    for _ in range(int(n_kills)):
        pid = _fork(write_forever)
        time.sleep(chance.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        counts["interrupted"] += any(".new-" in name or ".old-" in name for name in leftovers(folder))
        found = state(folder)
        counts[found] = counts.get(found, 0) + 1
    store.write_folder(folder, A)
    return {**counts, "litter": leftovers(folder)}


def stop_at_each_step(folder, path_name, signal_name):
    """Send a signal at the first, second, ... file operation of a write of B over A, until one write ends."""
    _force(path_name)
    os.fsync = lambda handle: None  # a stopped process loses nothing that the system holds: only time is saved
    number = signal.Signals[signal_name]
    found = []
    while True:
        store.write_folder(folder, A)
        step = len(found)

        def write(step=step):
            events = iter(range(10**9))

            def hook(event, args):
                if event.startswith(("open", "shutil.", "os.")) and next(events) == step:
                    os.kill(os.getpid(), number)

            sys.addaudithook(hook)
            store.write_folder(folder, B)
            if next(events) > step and number == signal.SIGINT:
                os._exit(1)  # the signal came, and landed where Python drops it

        _, status = os.waitpid(_fork(write), 0)
        if status == 0:
            return {"found": found, "last": state(folder)}
        found.append(state(folder))


def build_twice(root):
    """Let four processes ask for one cache entry at once; tell how often it was built."""
    os.environ["RETOUCH_CACHE"] = root + "/cache"
    begin = time.time() + 0.2

    def build(folder):
        with open(root + "/builds", "a") as log:
            log.write("built\n")
        time.sleep(0.3)
        (folder / "x").write_bytes(b"x" * 10)

    def ask():
        time.sleep(max(0, begin - time.time()))
        assert (store.cached("stats", "k", build) / "x").read_bytes() == b"x" * 10

    codes = [os.waitpid(pid, 0)[1] for pid in [_fork(ask) for _ in range(4)]]
    return {"builds": Path(root, "builds").read_text().count("built"), "codes": codes}


def fill_disk(mount):
    """Save on a disk of 1 MiB, in each way, what does not fit; tell the messages and what is left."""
    import torch

    folder = mount + "/change"
    store.write_folder(folder, A)
    store.write_json_atomic(mount + "/note.json", {"a": 1})
    big = bytes(2**21)
    told = []
    for what in (
        lambda: store.write_folder(folder, {"big": big}),
        lambda: store.write_folder(folder, {"small": b"1", "big": lambda path: path.write_bytes(big)}),
        lambda: store.write_folder(
            folder, {"t.safetensors": lambda path: store.save_tensors(path, {"w": torch.zeros(2**19)})}
        ),
        lambda: store.save_tensors(mount + "/t.safetensors", {"w": torch.zeros(2**19)}),
        lambda: store.write_json_atomic(mount + "/note.json", "x" * 2**21),
    ):
        checked = store.places.check_room
        for room in (checked, lambda *_: None):  # with the check before, and with the disk's own error
            store.folders.check_room = store.files.check_room = room
            try:
                what()
                told.append("no error")
            except StoreError as error:
                told.append(str(error))
            store.folders.check_room = store.files.check_room = checked
    names = sorted(p.name for p in Path(mount).iterdir())
    return {"told": told, "state": state(folder), "names": names, "note": store.read_json(mount + "/note.json")}


def script(*arguments, before=()):
    command = [*before, sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Kills and interruptions.


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    store.refuse_place(tmp_path / "new" / "deep")
    assert names_in(tmp_path) == ["file"]
    with pytest.raises(StoreError, match="cannot be written"):
        store.refuse_place(tmp_path / "file" / "out")
    store.write_folder(tmp_path / "saved", A)
    with pytest.raises(StoreError, match="lies inside"):
        store.refuse_place(tmp_path / "saved" / "out")


@pytest.mark.slow
@pytest.mark.parametrize(("path_name", "n_kills"), [("exchange", 200), ("fallback", 60)])
def test_a_killed_writer_leaves_one_whole_state(tmp_path, path_name, n_kills):
    counts = script("kill_writers", tmp_path / "saved", n_kills, path_name)
    assert counts.pop("litter") == []
    assert counts.pop("interrupted") > n_kills / 4, "the kills missed the writes"
    assert set(counts) == {"A", "B"}, counts
    assert counts["A"] + counts["B"] == n_kills
    assert min(counts.values()) > 0


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("path_name", ["exchange", "fallback"])
def test_a_stop_at_any_file_operation_leaves_one_whole_state(tmp_path, path_name, signal_name):
    result = script("stop_at_each_step", tmp_path / "saved", path_name, signal_name)
    assert len(result["found"]) > 20
    assert set(result["found"]) == {"A", "B"}
    assert result["found"] == sorted(result["found"]), "there is one moment at which A becomes B"
    assert result["last"] == "B"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_error_while_writing_keeps_the_old_folder(tmp_path, error):
    folder = tmp_path / "saved"
    store.write_folder(folder, A)
    with pytest.raises(error), store.writing(folder) as new:
        (new / "half").write_bytes(b"1")
        raise error
    assert state(folder) == "A"
    assert names_in(tmp_path) == ["saved"]
    with pytest.raises(error), store.writing(tmp_path / "never") as new:
        raise error
    assert names_in(tmp_path) == ["saved"]


def test_everything_reaches_the_disk_before_the_name_does(tmp_path, monkeypatch):
    order, sync = [], os.fsync

    def note(handle):
        order.append(Path(f"/proc/self/fd/{handle}").readlink())
        sync(handle)

    monkeypatch.setattr(os, "fsync", note)
    store.write_folder(tmp_path / "saved", A)
    new = order[0].parent if order[0].parent.name.startswith(".saved.new-") else order[0].parent.parent
    parts = {new, new / "sub", new / "manifest.json", *(new / name for name in A)}
    assert set(order[:-2]) | {order[-2]} == parts
    assert order[-2:] == [new, tmp_path]
    assert order.index(new / "sub") > order.index(new / "sub" / "two.dat")


def test_a_folder_moved_aside_comes_back(tmp_path):
    folder = tmp_path / "saved"
    store.write_folder(folder, A)
    folder.rename(tmp_path / ".saved.old-4000000-0123abcd")
    assert state(folder) == "A"
    assert names_in(tmp_path) == ["saved"]


def test_an_incomplete_folder_aside_stays_away(tmp_path):
    folder = tmp_path / "saved"
    store.write_folder(folder, A)
    (folder / "three").unlink()
    folder.rename(tmp_path / ".saved.old-4000000-0123abcd")
    with pytest.raises(StoreError, match="does not exist"):
        store.check_folder(folder)
    store.write_folder(folder, B)
    assert state(folder) == "B"
    assert names_in(tmp_path) == ["saved"]


def test_only_leftovers_of_this_name_are_swept(tmp_path):
    ours = tmp_path / ".saved.new-4000000-0123abcd"
    others = [
        tmp_path / ".saved.new-x",
        tmp_path / ".saved2.new-4000000-0123abcd",
        tmp_path / ".saved.new-1-0123abcdef",
    ]
    for path in (ours, *others):
        path.mkdir()
        (path / "x").touch()
    store.write_folder(tmp_path / "saved", A)
    assert not ours.exists()
    assert all((path / "x").exists() for path in others)


def test_a_single_file_spares_the_leftover_of_a_living_process(tmp_path):
    living, dead = tmp_path / f".x.json.new-{os.getpid()}-0123abcd", tmp_path / ".x.json.new-4194304-0123abcd"
    living.touch()
    dead.touch()
    store.write_json_atomic(tmp_path / "x.json", [1])
    assert living.exists()
    assert not dead.exists()


def test_writers_in_threads_take_turns_and_readers_never_see_a_mixture(tmp_path):
    folder = tmp_path / "saved"
    store.write_folder(folder, A)
    writers = [threading.Thread(target=lambda x=x: [store.write_folder(folder, x) for _ in range(10)]) for x in (A, B)]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers):
        assert set(store.check_folder(folder)["files"]) in ({*A}, {*B})
    assert state(folder) in {"A", "B"}
    assert names_in(tmp_path) == ["saved"]


def test_a_write_inside_a_write_of_the_same_folder_is_refused_not_stuck(tmp_path):
    with pytest.raises(StoreError, match="already being written"), store.writing(tmp_path / "x"):
        store.write_folder(tmp_path / "x", A)
    assert names_in(tmp_path) == []


def test_a_file_system_without_locks_and_exchange_still_saves(tmp_path, monkeypatch, caplog):
    def flock(handle, how):
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(store.locks.fcntl, "flock", flock)
    monkeypatch.setattr(store.folders, "_renameat2", lambda: None)
    store.write_folder(tmp_path / "saved", A)
    store.write_folder(tmp_path / "saved", B)
    assert state(tmp_path / "saved") == "B"
    assert "no locks on this file system" in caplog.text


# Places.


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,4}(/[a-zé ]{1,4}x)?\.(txt|json|dat)", fullmatch=True),
        st.binary(max_size=50),
        max_size=5,
    )
)
@settings(max_examples=12, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("round") / "deep" / "er"
    store.write_folder(folder, files)
    assert content(folder) == files
    store.write_folder(folder, {"text": "é\n"})
    assert content(folder) == {"text": "é\n".encode()}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["text"] == {"sha256": hashlib.sha256("é\n".encode()).hexdigest(), "bytes": 3}


def test_what_is_not_ours_is_not_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("mine")
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text('{"name": "mine"}')
    store.write_folder(tmp_path / "noted", A)
    (tmp_path / "noted" / "notes.md").write_text("mine")
    store.write_folder(tmp_path / "ours", A)
    before = sorted((str(p), p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*"))
    for name, why in (
        ("file", "is a file"),
        ("photos", "was not written by"),
        ("extension", "was not written by"),
        ("noted", r"did not write \('notes.md'\)"),
        ("file/below", "cannot be written"),
    ):
        with pytest.raises(StoreError, match=why):
            store.write_folder(tmp_path / name, B)
    with pytest.raises(StoreError, match="exists already"):
        store.write_folder(tmp_path / "ours", B, replace=False)
    with pytest.raises(StoreError, match="names no folder"):
        store.write_folder("/", B)
    assert sorted((str(p), p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*")) == before


def test_an_empty_folder_and_a_link_to_a_place_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    store.write_folder(tmp_path / "empty", A, replace=False)
    (tmp_path / "link").symlink_to("empty")
    store.write_folder(tmp_path / "link", B)
    assert (tmp_path / "link").is_symlink()
    assert state(tmp_path / "empty") == state(tmp_path / "link") == "B"


def test_nothing_is_written_inside_a_saved_folder(tmp_path):
    store.write_folder(tmp_path / "saved", A)
    inside = tmp_path / "saved" / "deep" / "er"
    writers = [
        lambda: store.write_folder(inside, B),
        lambda: store.writing(inside).__enter__(),
        lambda: store.write_folder(tmp_path / "saved" / "sub", B),
        lambda: store.write_json_atomic(inside / "x.json", {}),
        lambda: store.save_tensors(tmp_path / "saved" / "x.safetensors", {}),
    ]
    for write in writers:
        with pytest.raises(StoreError, match=rf"lies inside {tmp_path}/saved, .* Choose a place outside of it\."):
            write()
    assert state(tmp_path / "saved") == "A"
    assert names_in(tmp_path) == ["saved"]
    (tmp_path / "link").symlink_to(tmp_path / "saved" / "sub")
    with pytest.raises(StoreError, match="lies inside"):
        store.refuse_inside(tmp_path / "link" / "x")
    manifest = tmp_path / "saved" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": store.FORMAT + 1}))
    with pytest.raises(StoreError, match="lies inside"):
        store.refuse_inside(inside)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "a page", "version": "1"}'])
def test_a_folder_with_a_manifest_of_others_takes_what_is_written_into_it(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    store.write_folder(tmp_path / "saved", A)
    assert state(tmp_path / "saved") == "A"
    store.write_folder(tmp_path / "saved", B)  # and a saved folder itself gives way
    assert state(tmp_path / "saved") == "B"


def test_a_known_size_that_does_not_fit_is_refused_before_the_body_runs(tmp_path):
    with pytest.raises(StoreError, match=r"nothing was written"), store.writing(tmp_path / "x", need_bytes=10**18):
        raise AssertionError("the body ran")
    assert names_in(tmp_path) == []


def test_a_full_disk_is_named_and_changes_nothing(tmp_path):
    mount = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"', str(tmp_path))
    try:
        tried = subprocess.run([*mount, "true"], capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no small disk to fill: {error}")
    if tried.returncode:
        pytest.skip(f"no small disk to fill: {tried.stderr}")
    result = script("fill_disk", tmp_path, before=mount)
    assert len(result["told"]) == 10
    for message in result["told"]:
        assert "the disk is full" in message and "nothing was written" in message, message
        assert str(tmp_path) in message and ".new-" not in message
        need, free = (int(part.split()[-1].replace(",", "")) for part in message.split(" bytes are")[:2])
        assert need > free > 0
    assert result["state"] == "A"
    assert result["names"] == ["change", "note.json"]
    assert result["note"] == {"a": 1}


# Damage.


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    import torch

    folder = tmp_path_factory.mktemp("sound") / "saved"
    with store.writing(folder) as new:
        store.save_tensors(new / "w.safetensors", {"w": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)})
        store.write_json_atomic(new / "retouch.json", {"method": "x"})
        (new / "sub").mkdir()
        (new / "sub" / "text.md").write_text("hello\n")
    return folder


FILES = ("manifest.json", "w.safetensors", "retouch.json", "sub/text.md")


@given(st.sampled_from(FILES), st.integers(0, 10**6), st.integers(0, 7), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_flipped_bit_or_a_lost_end_is_refused(sound, name, position, bit, cut):
    good, manifest = (sound / name).read_bytes(), store.check_folder(sound)
    position %= len(good)
    bad = good[:position] if cut else good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :]
    try:
        (sound / name).write_bytes(bad)
        if name != "manifest.json":
            with pytest.raises(StoreError, match=r"was saved with|its hash differs"):
                store.check_folder(sound)
        else:
            with suppress(StoreError):
                assert store.check_folder(sound) == manifest
    finally:
        (sound / name).write_bytes(good)


@given(st.integers(0, 10**6), st.integers(0, 7), st.booleans())
@settings(max_examples=300, deadline=None)
def test_damaged_tensors_are_refused_or_at_least_tensors(sound, position, bit, cut):
    good = (sound / "w.safetensors").read_bytes()
    position %= len(good)
    bad = good[:position] if cut else good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :]
    path = sound.parent / "damaged.safetensors"
    path.write_bytes(bad)
    try:
        found = store.load_tensors(path, {"w", "b"})
    except StoreError:
        return
    assert not cut
    assert all(tensor.float().isfinite().all() for tensor in found.values())


def rewrite_manifest(folder, change):
    path = Path(folder) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rename_entry(name):
    return lambda folder: rewrite_manifest(folder, lambda m: m["files"].update({name: m["files"].pop("one.txt")}))


def replace_by_link(folder):
    (folder / "one.txt").rename(folder.parent / "elsewhere")
    (folder / "one.txt").symlink_to(folder.parent / "elsewhere")


DAMAGE = {
    "folder gone": (shutil.rmtree, "does not exist"),
    "a file instead": (lambda f: (shutil.rmtree(f), f.write_text("x")), "is a file; a folder"),
    "manifest gone": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    "manifest no JSON": (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "not a list of files"),
    "manifest twice": (lambda f: (f / "manifest.json").write_text('{"format": 1, "format": 1}'), "given twice"),
    "newer": (lambda f: rewrite_manifest(f, lambda m: m.update(format=2)), "has format 2.*Update Retouch"),
    "format true": (lambda f: rewrite_manifest(f, lambda m: m.update(format=True)), "not a list of files"),
    "no hash": (lambda f: rewrite_manifest(f, lambda m: m["files"]["same"].pop("sha256")), "not a list of files"),
    "file gone": (lambda f: (f / "one.txt").unlink(), r"incomplete: 'one.txt' missing"),
    "file extra": (lambda f: (f / "sub" / "more").write_text(""), r"not saved with: 'sub/more'"),
    "shorter": (lambda f: (f / "one.txt").write_bytes(b"A"), r"has 1 bytes and was saved with 100,000"),
    "other bytes": (lambda f: (f / "one.txt").write_bytes(b"C" * 100_000), "its hash differs"),
    "file link": (replace_by_link, "symbolic link"),
    "folder link": (lambda f: (f / "more").symlink_to(f.parent), "symbolic link"),
    "manifest link": (
        lambda f: (
            (f / "manifest.json").rename(f.parent / "m"),
            (f / "manifest.json").symlink_to(f.parent / "m"),
        ),
        "symbolic link",
    ),
    "pipe": (lambda f: os.mkfifo(f / "pipe"), "neither a file nor a folder"),
    "out": (rename_entry("../one.txt"), "plain names inside the folder"),
    "absolute": (rename_entry("/etc/passwd"), "plain names inside the folder"),
    "roundabout": (rename_entry("sub/../one.txt"), "plain names inside the folder"),
    "backslash": (rename_entry("..\\one.txt"), "plain names inside the folder"),
    "empty name": (rename_entry(""), "plain names inside the folder"),
    "pickle": (
        lambda f: ((f / "one.txt").rename(f / "pytorch_model.BIN"), rename_entry("pytorch_model.BIN")(f)),
        "may be a pickle",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("verify_hashes", [True, False])
def test_each_damage_has_its_own_sentence(tmp_path, what, verify_hashes):
    change, sentence = DAMAGE[what]
    folder = tmp_path / "saved"
    store.write_folder(folder, A)
    change(folder)
    if what == "other bytes" and not verify_hashes:
        store.check_folder(folder, verify_hashes=False)
        return
    with pytest.raises(StoreError, match=sentence) as caught:
        store.check_folder(folder, verify_hashes=verify_hashes)
    assert "saved" in str(caught.value)


def test_an_unreadable_folder_is_a_store_error(tmp_path, monkeypatch):
    store.write_folder(tmp_path / "saved", A)

    def deny(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(store.manifest, "sha256_file", deny)  # root may read everything, so the refusal is made up
    with pytest.raises(StoreError, match=r"cannot be read: Permission denied"):
        store.check_folder(tmp_path / "saved")


@pytest.mark.parametrize(
    "name", ["a.bin", "a.PT", "sub/a.pth", "a.pkl", "a.pickle", "a.ckpt", "../a", "/a", "manifest.json"]
)
def test_hostile_names_are_not_written_either(tmp_path, name):
    with pytest.raises(StoreError):
        store.write_folder(tmp_path / "saved", {name: b"x"})
    assert names_in(tmp_path) == []


def test_a_body_that_leaves_a_pickle_or_a_link_is_refused(tmp_path):
    for spoil in (lambda f: (f / "a.pt").touch(), lambda f: (f / "a").symlink_to("/etc/passwd")):
        with pytest.raises(StoreError), store.writing(tmp_path / "saved") as new:
            spoil(new)
    assert names_in(tmp_path) == []


def test_numpy_files_hold_numbers_only(tmp_path):
    import numpy as np

    numbers, objects = np.arange(3), np.array([{}], dtype=object)
    good = {
        "a.npy": lambda path: np.save(path, numbers),
        "e.npy": lambda path: np.save(path, np.zeros((0, 2))),
        "b.npz": lambda path: np.savez(path, x=numbers, y=numbers),
    }
    store.write_folder(tmp_path / "saved", good)
    assert set(store.check_folder(tmp_path / "saved")["files"]) == set(good)
    for bad in (
        {"a.npy": lambda path: np.save(path, objects, allow_pickle=True)},
        {"b.npz": lambda path: np.savez(path, x=numbers, y=objects)},
        {"a.npy": pickle.dumps([1])},
        {"b.npz": b"PK"},
    ):
        with pytest.raises(StoreError, match=r"Python objects|not a NumPy array"):
            store.write_folder(tmp_path / "other", bad)


# Tensors and JSON.


def tensors_of_each_dtype():
    import torch

    values = torch.tensor([[0.0, 1.0, -2.0], [0.5, 4.0, 1.0]])
    found = {name: values.to(getattr(torch, name)) for name in store.tensors._DTYPES}
    found |= {
        "view": values.t(),
        "tied": values,
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 3),
        "é": values[1],
    }
    return found


def test_tensors_return_bit_for_bit_and_the_official_reader_agrees(tmp_path):
    import torch
    from safetensors import safe_open

    given_, metadata, path = tensors_of_each_dtype(), {"b": "2", "a": "é"}, tmp_path / "deep" / "w.safetensors"
    store.save_tensors(path, given_, metadata)
    found = store.load_tensors(path, given_.keys())
    for name, tensor in given_.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert store.digest_tensor(found[name]) == store.digest_tensor(tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("view"), given_["view"])
    store.save_tensors(tmp_path / "again", dict(reversed(given_.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert (store.load_tensors(path).keys()) == given_.keys()
    store.save_tensors(path, {})
    assert store.load_tensors(path, set()) == {}


def test_tensors_that_cannot_be_stored_are_refused_by_name(tmp_path):
    import torch

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2):
        bad = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")]).to(dtype)
        with pytest.raises(StoreError, match=r"3 of the 4 values of 'w.x' are not finite"):
            store.save_tensors(tmp_path / "x", {"ok": torch.ones(1), "w.x": bad})
    with pytest.raises(StoreError, match="dtype complex64"):
        store.save_tensors(tmp_path / "x", {"c": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(StoreError, match="__metadata__"):
        store.save_tensors(tmp_path / "x", {"__metadata__": torch.zeros(1)})
    with pytest.raises(TypeError, match="metadata must be text"):
        store.save_tensors(tmp_path / "x", {}, {"a": 1})
    with pytest.raises(StoreError, match="is a folder"):
        store.save_tensors(tmp_path, {})
    assert names_in(tmp_path) == []


def test_tensor_files_that_cannot_be_trusted_are_refused(tmp_path):
    import torch
    from safetensors.torch import save_file

    good = tmp_path / "w.safetensors"
    store.save_tensors(good, {"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(StoreError, match="lacks 'c'"):
        store.load_tensors(good, {"a", "b", "c"})
    with pytest.raises(StoreError, match="also holds 'b'"):
        store.load_tensors(good, {"a"})
    with pytest.raises(StoreError, match="also holds 'a', 'b'"):
        store.load_tensors(good, [])
    for name, data, why in (
        ("gone.safetensors", None, "cannot be read"),
        ("w.pt", b"", "may be a pickle"),
        ("empty.safetensors", b"", "truncated"),
        ("long.safetensors", (2**60).to_bytes(8, "little") + b"{}", "header of 1,152,921,504,606,846,976"),
        ("json.safetensors", (4).to_bytes(8, "little") + b'{"a"', "is damaged"),
        ("pickle.safetensors", pickle.dumps({"a": [1.0] * 20}), "pickle by its content"),
        ("zip.safetensors", b"PK\x03\x04" + bytes(100), "damaged|pickle"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(StoreError, match=why):
            store.load_tensors(tmp_path / name)
    torch.save({"a": torch.ones(2)}, tmp_path / "torch.safetensors")
    with pytest.raises(StoreError, match="pickle by its content"):
        store.load_tensors(tmp_path / "torch.safetensors")
    save_file({"a": torch.tensor([float("nan")])}, tmp_path / "nan.safetensors")
    with pytest.raises(StoreError, match="1 of the 1 values of 'a'"):
        store.load_tensors(tmp_path / "nan.safetensors")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=6
)
STRICT = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text("aé\n\"", max_size=3), x, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(STRICT)
@settings(max_examples=50, deadline=None)
def test_json_returns_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    store.write_json_atomic(path, value)
    assert store.read_json(path) == value


def test_json_that_is_not_strict_is_refused(tmp_path):
    store.write_json_atomic(tmp_path / "x.json", {"old": 1})
    for bad in (float("nan"), [float("inf")], {"a": object()}, "\ud800"):
        with pytest.raises(StoreError, match="cannot be stored as JSON"):
            store.write_json_atomic(tmp_path / "x.json", bad)
    assert store.read_json(tmp_path / "x.json") == {"old": 1}
    for text in ("NaN", "[-Infinity]", "1e999", '{"a": 1, "a": 2}', "[" * 10**5, "", "1 2"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(StoreError, match="not valid JSON"):
            store.read_json(tmp_path / "bad.json")
    with pytest.raises(StoreError, match="cannot be read"):
        store.read_json(tmp_path / "gone.json")
    with pytest.raises(StoreError, match="is a folder"):
        store.write_json_atomic(tmp_path, 1)
    assert names_in(tmp_path) == ["bad.json", "x.json"]


# Keys and hashes.


def told_apart(value):
    """Write a value so that only equal values of equal types are equal."""
    if isinstance(value, dict):
        return frozenset((name, told_apart(item)) for name, item in value.items())
    if isinstance(value, list):
        return tuple(map(told_apart, value))
    return type(value).__name__, repr(value)


PARTS = st.dictionaries(st.text(max_size=4), VALUES, min_size=1, max_size=4)


@given(PARTS, st.data())
def test_each_changed_part_gives_a_new_key(parts, data):
    name, value = data.draw(st.sampled_from(sorted(parts))), data.draw(VALUES)
    changed = {**parts, name: value}
    same = told_apart(parts[name]) == told_apart(value)
    assert (store.key(**changed) == store.key(**parts)) is same
    assert store.key(**{n: v for n, v in parts.items() if n != name}) != store.key(**parts)
    assert store.key(**parts, **{name + "_more_": None}) != store.key(**parts)
    assert store.key(**dict(reversed(parts.items()))) == store.key(**parts)
    assert len(store.key(**parts)) == 32


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_neighbouring_floats_have_different_keys(x):
    import math

    assert store.key(x=x) != store.key(x=math.nextafter(x, math.inf))


def test_a_key_is_the_same_everywhere_and_knows_types_apart():
    text = '{"block":5,"names":["a","é"],"ridge":0.1}'
    assert store.key(ridge=0.1, block=5, names=["a", "é"]) == hashlib.sha256(text.encode()).hexdigest()[:32]
    apart = [
        1,
        1.0,
        True,
        "1",
        None,
        "null",
        [1],
        [[1]],
        {"a": 1},
        [],
        {},
        "",
        0.1,
        0.30000000000000004,
        0.3,
        -0.0,
        0.0,
    ]
    assert len({store.key(x=value) for value in apart}) == len(apart)
    assert store.key(x=(1, 2)) == store.key(x=[1, 2])


def test_a_key_refuses_what_has_no_stable_text():
    import torch

    for bad in (Path("x"), b"x", {1}, torch.zeros(1), {1: 2}, object(), print):
        with pytest.raises(TypeError, match=r"key\.a\.b\[1\] is a .*key is made of"):
            store.key(a={"b": [0, bad]})


def test_a_tensor_digest_sees_dtype_shape_and_every_bit():
    import torch

    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    nudged = base.clone()
    nudged.view(torch.int32)[2, 3] ^= 1
    seen = [base, nudged, base.reshape(4, 3), base.to(torch.float64), base.to(torch.bfloat16), base.to(torch.float16)]
    seen += [base.view(torch.int32), base.t(), base[:0], base.reshape(-1), torch.tensor(0.0), torch.tensor([0.0])]
    assert len({store.digest_tensor(tensor) for tensor in seen}) == len(seen)
    assert store.digest_tensor(base.t()) == store.digest_tensor(base.t().contiguous())
    assert store.digest_tensor(torch.nn.Parameter(base)) == store.digest_tensor(base)
    oracle = hashlib.sha256(b"torch.float32 (3, 4)\n" + base.numpy().tobytes()).hexdigest()
    assert store.digest_tensor(base) == oracle
    assert store.keys.raw(base).obj.__array_interface__["data"][0] == base.data_ptr(), "no copy is made"


def test_a_file_hash_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert store.sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# The cache.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path))
    return tmp_path


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("RETOUCH_CACHE", "~/own")
    assert store.cache_dir() == Path("/home/x/own")
    monkeypatch.delenv("RETOUCH_CACHE")
    assert store.cache_dir() == Path("/xdg/retouch")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert store.cache_dir() == Path("/home/x/.cache/retouch")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_dir() == Path("/home/x/.cache/retouch")


def test_an_entry_is_built_once_and_again_only_when_damaged(cache, caplog):
    built = []

    def build(folder):
        built.append(folder)
        (folder / "x").write_bytes(b"12345")

    entry = store.cached("stats", "k", build)
    assert entry == cache / "stats" / "k"
    assert store.cached("stats", "k", build, verify=True) == entry
    assert len(built) == 1
    with caplog.at_level(logging.WARNING):
        (entry / "x").write_bytes(b"123")
        store.cached("stats", "k", build)
    assert len(built) == 2
    assert "has 3 bytes and was saved with 5" in caplog.text
    (entry / "x").write_bytes(b"54321")
    store.cached("stats", "k", build)
    assert len(built) == 2, "an equal size is trusted"
    store.cached("stats", "k", build, verify=True)
    assert len(built) == 3
    (entry / "manifest.json").write_text("{")
    (entry / "other").symlink_to("x")
    store.cached("stats", "k", build)
    assert (entry / "x").read_bytes() == b"12345"
    assert names_in(entry.parent) == ["k"]
    store.cached("stats", "k2", build)
    assert len(built) == 5


def test_a_failed_build_leaves_no_entry_and_can_be_repeated(cache):
    def fail(folder):
        (folder / "x").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.cached("stats", "k", fail)
    assert names_in(cache / "stats") == []
    assert (store.cached("stats", "k", lambda folder: (folder / "x").touch()) / "x").exists()


def test_an_entry_may_need_another_but_not_itself(cache):
    store.cached("a", "k", lambda folder: store.cached("a", "other", lambda inner: None) and None)
    assert names_in(cache / "a") == ["k", "other"]
    with pytest.raises(StoreError, match="already being written"):
        store.cached("b", "k", lambda folder: store.cached("b", "k", lambda inner: None) and None)
    for kind, name in (("..", "k"), ("a", "../../k"), ("/a", "k"), ("a", "")):
        with pytest.raises(StoreError, match="plain names"):
            store.cached(kind, name, lambda folder: None)


def test_processes_that_ask_at_once_build_once(tmp_path):
    assert script("build_twice", tmp_path) == {"builds": 1, "codes": [0, 0, 0, 0]}


def test_importing_the_store_does_not_load_torch():
    code = "import sys, retouch.store; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'safetensors')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


if __name__ == "__main__":
    sys.stdout.write(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))


def test_an_empty_array_of_numpy_is_saved(tmp_path):
    import numpy as np
    import torch

    empty = torch.from_numpy(np.broadcast_to(np.float32(0), (0,)).copy()[:0])
    store.save_tensors(tmp_path / "t.safetensors", {"none": empty, "grid": torch.zeros(0, 3)})
    assert store.load_tensors(tmp_path / "t.safetensors")["grid"].shape == (0, 3)
