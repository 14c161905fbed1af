"""Keys of edges: whom certificates name, who was revoked, and what is remembered of it."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from retouch.cli import app
from retouch.errors import StoreError, UnknownName, UserError
from retouch.fuse.deployment import Connection, register, revoke
from retouch.fuse.keys import make_keys, retire
from retouch.fuse.roster import Known, Roster, key_of


def names(path: Path) -> set[str]:
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    known = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*known.get_values_for_type(x509.DNSName), *map(str, known.get_values_for_type(x509.IPAddress))}


@pytest.mark.parametrize("hosts", [["cloud.example"], [" cloud.example ", "localhost"], ["cloud.example", "127.0.0.1"]])
def test_certificates_always_name_the_own_machine(tmp_path: Path, hosts: list[str]) -> None:
    keys = make_keys(tmp_path, hosts, ["law"])
    assert names(keys.cloud / "server.pem") == {"cloud.example", "localhost", "127.0.0.1"}
    assert names(keys.edges["law"] / "runtime.pem") == {"localhost", "127.0.0.1"}


def test_revoked_key_is_never_let_in_again(tmp_path: Path) -> None:
    law = make_keys(tmp_path / "keys", ["cloud.example"], ["law", "news"]).edges["law"]
    cloud = Connection("127.0.0.1:1", tmp_path / "flower")  # nothing listens there
    name, key = key_of(law / "node.pub")
    Roster(cloud.home).put(Known(name, key, node=7))
    assert register(cloud, law / "node.pub")  # known already: the SuperLink is not asked
    assert not revoke(cloud, "law")  # none runs, so none was told
    assert Roster(cloud.home).find(key) == Known("law", key, "revoked", 7)  # to be unregistered at the next start
    assert not register(cloud, law / "node.pub")
    assert not revoke(cloud, "law")
    with pytest.raises(UnknownName, match="law"):
        revoke(cloud, "lav")


def test_key_that_was_never_registered_can_be_revoked(tmp_path: Path) -> None:
    law = make_keys(tmp_path / "keys", ["cloud.example"], ["law"]).edges["law"]
    cloud = Connection("", tmp_path / "flower")
    revoke(cloud, "law", law / "node.pub")
    assert not register(cloud, law / "node.pub")


def test_command_revokes_and_the_name_gets_a_new_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, words = tmp_path / "keys", ["fuse", "keys", "-o", str(tmp_path / "keys"), "--json"]
    app([*words, "--host", "cloud.example", "--edge", "law"], standalone_mode=False)
    first = key_of(keys / "edges" / "law" / "node.pub")[1]
    capsys.readouterr()
    app([*words, "--revoke", "law", "--folder", str(tmp_path / "cloud")], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == {"law": {"revoked": True, "superlink_told": False}}
    (old,) = (keys / "revoked").iterdir()
    assert key_of(old / "node.pub")[1] == first and stat.S_IMODE((old / "node.key").stat().st_mode) == 0o600
    app([*words, "--host", "cloud.example", "--edge", "law"], standalone_mode=False)
    second = key_of(keys / "edges" / "law" / "node.pub")[1]
    known = Roster(tmp_path / "cloud" / "flower")
    assert known.find(first).state == "revoked" and known.find(second) is None and second != first  # type: ignore[union-attr]
    assert retire(keys, "news") is None


@pytest.mark.parametrize(
    "more", [["--revoke", "law", "--edge", "news"], ["--host", "cloud.example"], ["--revoke", "../law"]]
)
def test_command_wants_one_thing(tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(UserError):
        app(["fuse", "keys", "-o", str(tmp_path), *more], standalone_mode=False)


@pytest.mark.parametrize("text", ["", "ssh-rsa AAAA law", "not a key", "-----BEGIN PUBLIC KEY-----"])
def test_file_that_is_no_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "node.pub").write_text(text)
    with pytest.raises(StoreError, match="no public key"):
        key_of(tmp_path / "node.pub")


@pytest.mark.parametrize("change", [{"kind": "run"}, {"format": 2}, {"edges": [{"colour": 1}]}, {"address": None}])
def test_damaged_record(tmp_path: Path, change: dict[str, Any]) -> None:
    Roster(tmp_path).save()
    record = {**json.loads((tmp_path / "allowed.json").read_text()), **change}
    record = {k: v for k, v in record.items() if v is not None}
    (tmp_path / "allowed.json").write_text(json.dumps(record))
    with pytest.raises(StoreError, match="no record of edges"):
        Roster(tmp_path)
