"""Adapters made to do harm: each is refused with its reason, quickly, in little memory, and nothing is written."""

import base64
import contextlib
import gzip
import io
import json
import os
import random
import shutil
import sys
import tarfile
import time
import tracemalloc
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retouch.change import LowRank
from retouch.errors import StoreError
from retouch.fuse.adapter_file import open_adapter, write_adapter
from retouch.model import wrap

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PATH = "base_model.model.model.layers.0.mlp.down_proj"
A, B = f"{PATH}.lora_A.weight", f"{PATH}.lora_B.weight"
BOMB = "(.*a){30}b|(x+x+)+y"
SECONDS = 1.0
"""Of this process's own work: refusing takes milliseconds, and a regular expression gone wild takes for ever."""
BYTES = 64 << 20


# ---------------------------------------------------------------- what all cases start from


@pytest.fixture(scope="module")
def llama(tiny):
    model = wrap(*tiny("llama"), source="tiny llama")
    assert model.fingerprint
    return model


@pytest.fixture(scope="module")
def sound(llama, tmp_path_factory):
    """A folder that is as it should be, with our record and list of files."""
    names = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("mlp.down", "attention.query")]
    make = torch.Generator().manual_seed(0)
    parts = {}
    for name in names:
        rows, columns = llama.anatomy.shape(name)
        parts[name] = LowRank(0.1 * torch.randn(rows, 2, generator=make), torch.randn(2, columns, generator=make))
    folder = tmp_path_factory.mktemp("sound") / "adapter"
    write_adapter(folder, parts.items(), dict.fromkeys(names, 2), llama)
    return folder


@pytest.fixture
def foreign(sound, tmp_path):
    """The same as PEFT would have written it: no record, no list of files."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (TENSORS, CONFIG):
        shutil.copy(sound / name, folder / name)
    return folder


@pytest.fixture
def own(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "adapter"))


def test_what_the_cases_start_from_is_accepted(llama, foreign, sound):
    assert len(open_adapter(sound, llama).parts) == 4
    assert len(open_adapter(foreign, llama, base_unverified=True).parts) == 4


def config(**values: Any) -> Any:
    """Alter the configuration."""

    def make(folder):
        file = folder / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return make


def config_text(old: str, new: str) -> Any:
    """Alter the configuration's text, for what no program would write."""

    def make(folder):
        text = (folder / CONFIG).read_text()
        assert old in text
        (folder / CONFIG).write_text(text.replace(old, new, 1))

    return make


def put(file: str, data: bytes) -> Any:
    return lambda folder: (folder / file).write_bytes(data)


def tensors(**changed: Any) -> Any:
    """Add or replace tensors; None removes one. The keys A and B mean those of one module."""

    def make(folder):
        short = {"A": A, "B": B}
        found = load_file(folder / TENSORS) | {short.get(name, name): value for name, value in changed.items()}
        (folder / TENSORS).unlink()
        save_file({name: value for name, value in found.items() if value is not None}, folder / TENSORS)

    return make


def header(alter: Any, size: int | None = None) -> Any:
    """Alter the header: in place, or by giving its text."""

    def make(folder):
        data = (folder / TENSORS).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        told = json.loads(data[8:end])
        text = alter(told) or json.dumps(told)
        text = text if isinstance(text, bytes) else text.encode()
        (folder / TENSORS).write_bytes((size or len(text)).to_bytes(8, "little") + text + data[end:])

    return make


def instead(name: str, make_special: Any) -> Any:
    """Put something that is no plain file in a file's place."""

    def make(folder):
        (folder / name).unlink()
        make_special(folder / name)

    return make


def linked(name: str) -> Any:
    """Move a file outside and leave a link."""

    def make(folder):
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to("../outside")

    return make


def archive(kind: str) -> Any:
    """Replace the folder by an archive of it."""

    def make(folder):
        data = (folder / TENSORS).read_bytes()
        shutil.rmtree(folder)
        if kind == "zip":
            with zipfile.ZipFile(folder, "w") as file:
                file.writestr(TENSORS, data)
        else:
            with tarfile.open(folder, "w") as file:
                info = tarfile.TarInfo("../../outside")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))

    return make


def pickled(folder: Path) -> None:
    """A file that would run code when it is read."""
    (folder / TENSORS).write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R." * 10)


def torch_saved(folder: Path) -> None:
    torch.save({"weight": torch.ones(4)}, folder / TENSORS)


def zipped(folder: Path) -> None:
    (folder / TENSORS).write_bytes(gzip.compress((folder / TENSORS).read_bytes()))


def huge_sparse(folder: Path) -> None:
    """A file that claims, and has, sixty-four billion bytes."""
    config(target_modules=["layers.0.mlp.down_proj"])(folder)
    rank = 10**9
    end = 4 * rank * 16
    told = {A: {"dtype": "F32", "shape": [rank, 16], "data_offsets": [0, end]}}
    told[B] = {"dtype": "F32", "shape": [32, 0], "data_offsets": [end, end]}
    text = json.dumps(told).encode()
    with (folder / TENSORS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def many_files(folder: Path) -> None:
    for i in range(1_001):
        (folder / f"{i}.json").touch()


def many_tensors(told: dict[str, Any]) -> str:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return json.dumps({f"{i}": empty for i in range(10_001)}, separators=(",", ":"))


def shift(told: dict[str, Any]) -> None:
    """Let two tensors share their bytes."""
    told[A.replace("layers.0", "layers.1")]["data_offsets"] = told[A]["data_offsets"]


def gap(told: dict[str, Any]) -> None:
    last = max(told, key=lambda name: told[name].get("data_offsets", [0, 0])[1])
    told[last]["data_offsets"] = [n + 4 for n in told[last]["data_offsets"]]


def entry(**values: Any) -> Any:
    """Alter what the header says of one tensor."""
    return header(lambda told: told[A].update(values))


def relisted(folder: Path, name: str, data: bytes) -> None:
    """Alter a file and make the list of files fit it, as somebody would on purpose."""
    import hashlib

    (folder / name).write_bytes(data)
    listed = json.loads((folder / "manifest.json").read_text())
    listed["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(listed))


def record(**values: Any) -> Any:
    """Alter our record, and the list of files with it."""

    def make(folder):
        told = json.loads((folder / "retouch.json").read_text()) | values
        relisted(folder, "retouch.json", json.dumps(told).encode())

    return make


def swollen(name: str, make_special: Any = None) -> Any:
    """A file of three billion bytes that cost nothing, or no file at all, which the list of files knows."""

    def make(folder):
        listed = json.loads((folder / "manifest.json").read_text())
        listed["files"].setdefault(name, {"sha256": "0" * 64})["bytes"] = 3 << 30
        (folder / "manifest.json").write_text(json.dumps(listed))
        (folder / name).unlink(missing_ok=True)
        if make_special is not None:
            make_special(folder / name)
            return
        with (folder / name).open("wb") as file:
            file.truncate(3 << 30)

    return make


DIGITS = "9" * 4_300
"""A number as long as Python reads one; a longer one it neither reads nor writes."""


def digits(shape: str, offsets: str) -> Any:
    return header(lambda told: f'{{"{A}":{{"dtype":"F32","shape":[{shape}],"data_offsets":[{offsets}]}}}}')


def edited_config(folder: Path) -> None:
    relisted(folder, CONFIG, (folder / CONFIG).read_bytes().replace(b'"lora_alpha": 2', b'"lora_alpha": 9'))


def flipped(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)


DOWN = "blocks.0.mlp.down"


def seen(weight: str, bits: bytes, axis: str = "columns") -> dict[str, Any]:
    return {"sets": [base64.b64encode(bits).decode()], "weights": {weight: [axis, 0]}}


@dataclass(frozen=True)
class Case:
    """A folder made hostile: how, what the error must say, and whether the folder is one of ours."""

    make: Any
    says: str
    own: bool = False


F = torch.ones
CASES = {
    # what would change more than linear layers by two factors
    "embedding weight": Case(tensors(**{"base_model.model.model.embed_tokens.weight": F(500, 32)}), "overwrite a weight"),
    "bare embedding weight": Case(tensors(**{"model.embed_tokens.weight": F(500, 32)}), "overwrite a weight"),
    "norm": Case(tensors(**{"base_model.model.model.norm.weight": F(32)}), "overwrite a weight of the base"),
    "base weight": Case(tensors(**{f"{PATH}.weight": F(32, 64)}), "overwrite a weight of the base"),
    "base layer": Case(tensors(**{f"{PATH}.base_layer.weight": F(32, 64)}), "overwrite a weight of the base"),
    "saved module": Case(tensors(**{"base_model.model.lm_head.modules_to_save.weight": F(500, 32)}), "replaces a module"),
    "bias": Case(tensors(**{f"{PATH}.lora_B.bias": F(32)}), "changes a bias"),
    "magnitude": Case(tensors(**{f"{PATH}.lora_magnitude_vector.weight": F(32)}), "magnitude vector"),
    "embedding factors": Case(tensors(**{"base_model.model.model.embed_tokens.lora_embedding_A": F(2, 500)}), "an embedding"),
    "head factors": Case(tensors(**{"base_model.model.lm_head.lora_A.weight": F(2, 32)}), "'lm_head' is no linear layer"),
    "second adapter": Case(tensors(**{f"{PATH}.lora_A.other.weight": F(2, 64)}), "not that of a factor"),
    "escape codes": Case(tensors(**{"\x1b[2J\u202eweight": F(1)}), r"\\x1b\[2J\\u202e"),
    "modules_to_save": Case(config(modules_to_save=["lm_head"]), "modules_to_save"),
    "trainable_token_indices": Case(config(trainable_token_indices=[1]), "trainable_token_indices"),
    "bias all": Case(config(bias="all"), "bias is 'all'"),
    "use_dora": Case(config(use_dora=True), "use_dora"),
    "lora_bias": Case(config(lora_bias=True), "lora_bias"),
    "layer_replication": Case(config(layer_replication=[[0, 2]]), "blocks of the base are repeated"),
    "target_parameters": Case(config(target_parameters=["mlp.experts.gate"]), "target_parameters"),
    "activated": Case(config(alora_invocation_tokens=[1, 2]), "acts on some tokens"),
    "pissa": Case(config(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "loftq": Case(config(init_lora_weights="loftq"), "init_lora_weights"),
    "start of another type": Case(config(init_lora_weights={"a": 1}), "init_lora_weights"),
    "another method": Case(config(peft_type="IA3"), "peft_type must be 'LORA'"),
    "no method": Case(put(CONFIG, b"{}"), "peft_type must be 'LORA'; it is 'None'"),
    # code
    "auto_mapping": Case(config(auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}), "names code"),
    "auto_map": Case(config(auto_map={"AutoModel": "evil.Model"}), "'auto_map' is not known"),
    "trust_remote_code": Case(config(trust_remote_code=True), "'trust_remote_code' is not known"),
    "kernel": Case(config(megatron_core="os.system"), "megatron_core is 'os.system'"),
    "megatron": Case(config(megatron_config={"a": 1}), "megatron_config"),
    "pickle only": Case(lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), "may be a pickle"),
    "pickle beside": Case(put("adapter_model.pt", b""), "may be a pickle"),
    "pickle renamed": Case(pickled, "pickle by its content"),
    "torch file renamed": Case(torch_saved, "zip archive or a pickle"),
    # the base
    "no base named": Case(lambda f: None, "--base-unverified"),
    "another base": Case(record(base="0" * 32), "was trained for model '00000000'", own=True),
    "no base in the record": Case(record(base=None), "lacks 'base'", own=True),
    # shapes and names
    "shape": Case(tensors(A=F(2, 63)), "32x64, to which lora_B 32x2 and lora_A 2x63 do not fit"),
    "transposed": Case(tensors(A=F(64, 2), B=F(2, 32)), "do not fit"),
    "factor of three axes": Case(tensors(A=F(2, 8, 8)), "lora_A 2x8x8 do not fit"),
    "half": Case(tensors(B=None), "no lora_B beside it"),
    "empty": Case(put(TENSORS, b"\x02\0\0\0\0\0\0\0{}"), "holds no factors"),
    "block out of range": Case(
        tensors(**{A.replace("layers.0", "layers.2"): F(2, 64), B.replace("layers.0", "layers.2"): F(32, 2)}),
        "layers.2.mlp.down_proj' is no linear layer",
    ),
    "unknown module": Case(tensors(**{A.replace("down", "side"): F(2, 64)}), "side_proj' is no linear layer"),
    "odd prefix": Case(tensors(**{"model.layers.0.mlp.down_proj.lora_A.weight": F(2, 64)}), "not that of a factor"),
    # numbers
    "NaN": Case(tensors(A=F(2, 64) * float("nan")), "128 of the 128 values of lora_A"),
    "infinity": Case(tensors(B=F(32, 2) * float("inf")), "not finite"),
    "infinite after scaling": Case(lambda f: (config(lora_alpha=1e4)(f), tensors(B=F(32, 2) * 3e38)(f)), "not finite"),
    "float64 beyond float32": Case(tensors(A=F(2, 64).double() * 1e300), "not finite"),
    "size": Case(tensors(B=F(32, 2) * 1e3), "over 10 times the weight's"),
    "alpha 0": Case(config(lora_alpha=0), "lora_alpha must be a number above 0"),
    "alpha negative": Case(config(lora_alpha=-8), "lora_alpha must be"),
    "alpha NaN": Case(config(lora_alpha=float("nan")), "NaN is no finite number"),
    "alpha infinite": Case(config_text('"lora_alpha": 2', '"lora_alpha": 1e999'), "no finite number"),
    "alpha large": Case(config(lora_alpha=10_001), "at most 10,000"),
    "alpha true": Case(config(lora_alpha=True), "lora_alpha must be"),
    "alpha text": Case(config(lora_alpha="8"), "lora_alpha must be"),
    "alpha of a module": Case(config(alpha_pattern={"down_proj": -1}), "alpha_pattern must be"),
    "scale by text": Case(config(use_rslora="yes"), "use_rslora must be true or false"),
    # sizes
    "rank of a billion": Case(config(r=10**9), "r must be a rank from 1 to 1,024"),
    "rank 0": Case(config(r=0), "r must be a rank"),
    "rank of a fraction": Case(config(r=2.0), "r must be a rank"),
    "rank disagrees": Case(config(r=4), "rank 4, and its tensors have 2"),
    "rank over the sizes": Case(tensors(A=F(33, 64), B=F(32, 33)), "allowed are 1 to 32"),
    "sixty-four billion bytes": Case(huge_sparse, "do not fit"),
    "digits": Case(header(lambda t: '{"a":{"shape":[' + "9" * 100_000 + "]}}"), "not valid JSON"),
    "too many tensors": Case(header(many_tensors), "at most 10,000"),
    "large header": Case(header(lambda t: json.dumps(t) + " " * (2 << 20)), "larger than 1,048,576"),
    "header of lists": Case(header(lambda t: '{"a":[' + "[]," * 340_000 + "[]]}"), "40,000 lists"),
    "large configuration": Case(config(revision="x" * (65 << 10)), "at most 65,536"),
    "deep configuration": Case(config_text('"rank_pattern": {}', '"rank_pattern": ' + "[" * 20 + "]" * 20), "16 levels"),
    "very deep configuration": Case(config_text("{}", "[" * 30_000 + "]" * 30_000), "nested too deeply"),
    "deep header": Case(header(lambda t: '{"a":' * 30_000), "nested too deeply"),
    "too many files": Case(many_files, "more than 1,000 files"),
    # patterns
    "target bomb": Case(config(target_modules=BOMB), "patterns are never compiled"),
    "target bomb in a list": Case(config(target_modules=["q_proj", BOMB]), "never regular expressions"),
    "excluded bomb": Case(config(exclude_modules=BOMB), "patterns are never compiled"),
    "layers bomb": Case(config(layers_pattern=BOMB), "never regular expressions"),
    "rank bomb": Case(config(rank_pattern={BOMB: 2}), "never regular expressions"),
    "alpha bomb": Case(config(alpha_pattern={BOMB: 2}), "never regular expressions"),
    "all linear": Case(config(target_modules="all-linear"), "patterns are never compiled"),
    "no targets": Case(config(target_modules=None), "target_modules must be a list"),
    "idle target": Case(config(target_modules=["q_proj", "down_proj", "v_proj"]), "no tensors"),
    "hidden target": Case(config(target_modules=["down_proj"]), "other modules than .*q_proj, which has tensors"),
    "half of the blocks": Case(config(layers_to_transform=[1]), r"other modules than model\.layers\.0"),
    "block of text": Case(config(layers_to_transform=["1"]), "layers_to_transform must be"),
    "two values": Case(config(alpha_pattern={"down_proj": 2, "mlp.down_proj": 3}), "two different values"),
    "key of nothing": Case(config(rank_pattern={"v_proj": 2}), "no module of this adapter"),
    # the folder
    "linked tensors": Case(linked(TENSORS), "symbolic link"),
    "linked configuration": Case(linked(CONFIG), "symbolic link"),
    "device": Case(instead(TENSORS, lambda p: p.symlink_to("/dev/zero")), "symbolic link"),
    "pipe": Case(instead(CONFIG, os.mkfifo), "no regular file"),
    "folder for a file": Case(instead(TENSORS, Path.mkdir), "no regular file"),
    "zip": Case(archive("zip"), "archives are not unpacked"),
    "tar": Case(archive("tar"), "archives are not unpacked"),
    "index": Case(put("adapter_model.safetensors.index.json", b'{"weight_map":{"a":"../../x"}}'), "adapters in several files"),
    "nothing there": Case(lambda f: shutil.rmtree(f), "Check the path"),
    "no configuration": Case(lambda f: (f / CONFIG).unlink(), "adapter_config.json cannot be read"),
    "no tensors": Case(lambda f: (f / TENSORS).unlink(), "safetensors cannot be read"),
    # the files' own form
    "configuration is a list": Case(put(CONFIG, b"[]"), "must hold a JSON object"),
    "configuration is no JSON": Case(put(CONFIG, b"import os"), "not valid JSON"),
    "configuration is UTF-16": Case(put(CONFIG, '{"peft_type": "LORA"}'.encode("utf-16")), "not valid JSON"),
    "key twice": Case(config_text('"r": 2', '"r": 2, "r": 3'), "given twice"),
    "tensor twice": Case(header(lambda t: json.dumps(t)[:-1] + f',"{A}":{json.dumps(t[A])}}}'), "given twice"),
    "overlap": Case(header(shift), "overlap"),
    "gap": Case(header(gap), "leave a gap"),
    "longer": Case(lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes() + b"\0"), "accounts for"),
    "shorter": Case(lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-1]), "accounts for"),
    "seven bytes": Case(put(TENSORS, b"1234567"), "too few for a header"),
    "endless header": Case(header(lambda t: None, size=2**63), "is larger than"),
    "header past the end": Case(header(lambda t: None, size=10**5), "does not fit into a file"),
    "header is no text": Case(header(lambda t: b"\xff\xfe{}"), "not valid JSON"),
    "offsets of endless digits": Case(digits("0", f"{DIGITS},{DIGITS}"), "go beyond its"),
    "shape of endless digits": Case(digits(f"0,{DIGITS}", "0,0"), "go beyond its"),
    "both of endless digits": Case(digits(f"1,{DIGITS}", f"0,{DIGITS}"), "go beyond its"),
    "gzip": Case(zipped, "gzip archive"),
    "integers": Case(entry(dtype="I32"), "'I32'; factors are"),
    "type of another type": Case(entry(dtype=["F32"]), "factors are"),
    "unknown field": Case(entry(path="../../x"), "not described by"),
    "negative shape": Case(entry(shape=[-2, -64]), "are not counts"),
    "shape of fractions": Case(entry(shape=[2.0, 64.0]), "are not counts"),
    "shape of truth": Case(entry(shape=[True, 128]), "are not counts"),
    "three offsets": Case(entry(data_offsets=[0, 1, 2]), "are not counts"),
    "offsets backwards": Case(entry(data_offsets=[512, 0]), "takes -512 bytes"),
    "metadata": Case(header(lambda t: t.update(__metadata__={"a": [1]})), "not text by text"),
    # our own, altered
    "one bit": Case(flipped, "other content than it was saved with", own=True),
    "configuration and list altered": Case(edited_config, "other content than retouch.json says", own=True),
    "extra file": Case(put("run.py", b"import os"), "does not belong in an adapter of Retouch", own=True),
    "file missing": Case(lambda f: (f / "README.md").unlink(), "is incomplete", own=True),
    "list leads outside": Case(put("manifest.json", b'{"format": 1, "files": {"../x": {"sha256": "", "bytes": 0}}}'), "list of files", own=True),
    "deep list": Case(put("manifest.json", b"[" * 40_000), "nested too deeply", own=True),
    "card of three billion bytes": Case(swollen("README.md"), "README.md has 3,221,225,472 bytes; at most", own=True),
    "record of three billion bytes": Case(swollen("retouch.json"), "retouch.json has 3,221,225,472 bytes", own=True),
    "list of three billion bytes": Case(swollen("manifest.json"), "manifest.json has 3,221,225,472 bytes", own=True),
    "pipe for a card": Case(swollen("README.md", os.mkfifo), "no regular file", own=True),
    "more examples than there are": Case(record(n_examples=10**400), "n_examples", own=True),
    "seen: no object": Case(record(kept=[]), "lacks what the edge could see", own=True),
    "seen: another weight": Case(record(kept=seen("blocks.9.mlp.down", b"\x01")), "lacks what the edge", own=True),
    "seen: another axis": Case(record(kept=seen(DOWN, b"\x01" * 8, "diagonal")), "lacks what the edge", own=True),
    "seen: too few bits": Case(record(kept=seen(DOWN, b"\x01")), "lacks what the edge", own=True),
    "seen: six million bits": Case(record(kept=seen(DOWN, b"\xff" * 750_000)), "lacks what the edge", own=True),
    "seen: nothing": Case(record(kept=seen(DOWN, b"\0" * 8)), "lacks what the edge", own=True),
    "seen: no text": Case(record(kept={"sets": [["a"] * 9], "weights": {DOWN: ["columns", 0]}}), "lacks what the edge", own=True),
    "seen: less than is changed": Case(record(kept=seen(DOWN, b"\x01" * 8)), "is changed in columns that", own=True),
    "another kind": Case(record(kind="change"), "no adapter of format 1", own=True),
    "later format": Case(record(format=2), "Update Retouch", own=True),
    "examples of text": Case(record(n_examples="many"), "n_examples", own=True),
    "notes of text": Case(record(notes="x"), "lacks 'notes'", own=True),
    "record without hashes": Case(record(files={}), "its hash differs", own=True),
}  # fmt: skip


# ---------------------------------------------------------------- what is asked of each


class Watch:
    """Notes what the process does to the world while it is on; a hook cannot be taken away again."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self)

    def __call__(self, event, args):
        if not self.on:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in _DEEDS or event.startswith(("socket.", "subprocess.", "pickle.")):
            self.seen.append((event, args))


_DEEDS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.system", "os.exec", "os.fork", "exec", "compile"}


@pytest.fixture(scope="module")
def watch():
    return Watch()


def test_the_watch_sees_a_write(watch, tmp_path):
    watch.on = True
    (tmp_path / "a").write_bytes(b"")
    watch.on = False
    assert [event for event, _ in watch.seen] == ["open"]
    watch.seen.clear()


def refused(folder, model, watch, says, **how):
    """Open an adapter twice, and return the error once it is known what it cost in seconds and in memory."""
    began = time.process_time()
    with pytest.raises(StoreError, match=says):
        open_adapter(folder, model, **how)
    assert time.process_time() - began < SECONDS
    tracemalloc.start()
    watch.on = True
    try:
        with pytest.raises(StoreError, match=says) as caught:
            open_adapter(folder, model, **how)
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        watch.on = False
        tracemalloc.stop()
        seen, watch.seen[:] = list(watch.seen), []
    assert seen == []
    return str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_adapter_is_refused_with_its_reason(llama, watch, request, name):
    case = CASES[name]
    folder = request.getfixturevalue("own" if case.own else "foreign")
    case.make(folder)
    before = _state(folder.parent)
    unverified = not case.own and name != "no base named"
    says = refused(folder, llama, watch, case.says, base_unverified=unverified)
    assert str(folder) in says, "it says where"
    assert len(says) < 1_000
    assert _state(folder.parent) == before


def _state(root):
    return {str(p): (p.lstat().st_mode, p.lstat().st_size, p.lstat().st_mtime_ns) for p in root.rglob("*")}


@pytest.mark.parametrize("told", [("[0]", DIGITS, DIGITS), (f"[0,{DIGITS}]", "0", "0")], ids=["offsets", "shape"])
def test_a_reply_with_endless_digits_is_refused_too(told):
    from flwr.app import Array, ArrayRecord

    from retouch.fuse._records import _unpacked

    shape, start, end = told
    text = f'{{"x.lora_A":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}}}'.encode()
    data = len(text).to_bytes(8, "little") + text
    record = ArrayRecord({"safetensors": Array("uint8", (len(data),), "safetensors", data)})
    with pytest.raises(StoreError, match="go beyond its"):
        _unpacked(record, "the answer from law")


def test_the_corpus_is_as_large_as_promised():
    assert len(CASES) >= 40
    assert len({case.says for case in CASES.values()}) > 40


@pytest.mark.parametrize("path", ["a\0b", "", "no/such/folder"])
def test_a_path_that_is_none_is_refused(llama, path, tmp_path):
    with pytest.raises(StoreError):
        open_adapter(tmp_path / path, llama, base_unverified=True)


def test_tensors_that_tell_the_targets_leave_the_other_checks(llama, foreign):
    config(target_modules=BOMB, exclude_modules=BOMB, layers_pattern=BOMB)(foreign)
    how = {"base_unverified": True, "targets_from_tensors": True}
    assert len(open_adapter(foreign, llama, **how).parts) == 4
    config(rank_pattern={BOMB: 2})(foreign)
    with pytest.raises(StoreError, match="never regular expressions"):
        open_adapter(foreign, llama, **how)


def test_a_large_file_is_refused_before_it_is_read(llama, foreign):
    """Its header is sound, and its size is what the header says: still nothing of it is read."""
    huge_sparse(foreign)
    assert (foreign / TENSORS).stat().st_size > 60e9
    began = _read_bytes()
    with pytest.raises(StoreError):
        open_adapter(foreign, llama, base_unverified=True)
    assert _read_bytes() - began < 1 << 20


def _read_bytes():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


# ---------------------------------------------------------------- mutations


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Alter a file's bytes in one of the ways in which files are altered, on purpose or not."""
    at, end = sorted(draw.choices(range(len(data) + 1), k=2))
    some = draw.randbytes(draw.randint(1, 9))
    told = draw.choice([b"[" * 50, b"NaN", b"-1", b"1e999", b"null", b"{}", b'"', b"\x80\x02", b"9" * 5_000, b"\0"])
    number = draw.choice([0, 1, 2**31, 2**63, 2**64 - 1, 1 << 20]).to_bytes(8, "little")
    return draw.choice([
        data[:at] + some + data[at + len(some) :],
        data[:at] + some + data[at:],
        data[:at] + told + data[at:],
        data[:at] + data[min(end, at + 9) :],
        data[:at] + data[at : at + 200] + data[at:],
        data[:at],
        number + data[8:],
        bytes(data[:at]) + bytes([data[at % len(data)] ^ (1 << draw.randrange(8))]) + bytes(data[at + 1 :]),
        data.replace(b"0", b"1", 1) if draw.random() < 0.5 else data.replace(b":", b": ", 1),
    ])  # fmt: skip


def fuzzed(folder, seed):
    """Alter one file, mostly near its beginning, where headers are; say whether anything is different."""
    draw = random.Random(seed)
    file = folder / draw.choice(sorted(p.name for p in folder.iterdir()))
    data = file.read_bytes()
    part = len(data) if draw.random() < 0.5 else min(len(data), 600)
    new = mutated(data[:part], draw) + data[part:]
    file.write_bytes(new)
    return file, data, not _same(file.name, data, new)


def _same(name, old, new):
    """A list of files that is only laid out differently says the same."""
    with contextlib.suppress(ValueError):
        return old == new or (name == "manifest.json" and json.loads(old) == json.loads(new))
    return False


def survive(sound, model, tmp_path, seeds):
    """Open mutants of one adapter, ours and a stranger's; count what was refused and accepted."""
    own = Path(shutil.copytree(sound, tmp_path / "own"))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in (TENSORS, CONFIG):
        shutil.copy(sound / name, foreign / name)
    counts = {"refused": 0, "accepted": 0}
    for seed in seeds:
        folder = own if seed % 2 else foreign
        file, data, differs = fuzzed(folder, seed)
        began = time.process_time()
        try:
            adapter = open_adapter(folder, model, base_unverified=folder is foreign)
            assert not (differs and folder is own), f"seed {seed}: altered {file.name} was accepted"
            assert all(torch.isfinite(part.delta()).all() for part in adapter.parts.values())
            counts["accepted"] += 1
        except StoreError as error:
            assert differs, f"seed {seed}: {error}"
            counts["refused"] += 1
        assert time.process_time() - began < 2, f"seed {seed}"
        file.write_bytes(data)
    assert len(open_adapter(own, model).parts) == 4
    return counts


def test_mutants_never_crash_and_altered_files_of_ours_are_never_accepted(sound, llama, tmp_path):
    counts = survive(sound, llama, tmp_path, range(300))
    assert counts["refused"] > 200
    assert counts["accepted"] > 0, "mutants that change only numbers are still adapters"


@pytest.mark.slow
def test_many_mutants_never_crash(sound, llama, tmp_path):
    assert survive(sound, llama, tmp_path, range(1_000, 3_000))["refused"] > 1_400
