"""Which keys of edges a cloud has let in and which it has revoked: a record that outlives its SuperLink.

Flower knows nodes by numbers that it gives them; only this record says which edge, and which key, a number is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from .. import store
from ..errors import StoreError

__all__ = ["Known", "Roster", "key_of"]

_KIND = {"kind": "edges of a cloud", "format": 1}


@dataclass(frozen=True)
class Known:
    """One key of one edge.

    Attributes:
        name: Of the edge.
        key: Hash of its public key.
        state: Whether it may join.
        node: Flower's number of it; None where the SuperLink does not hold it.
    """

    name: str
    key: str
    state: Literal["allowed", "revoked"] = "allowed"
    node: int | None = None


def key_of(public_key: str | Path) -> tuple[str, str]:
    """Return an edge's name and the hash of its key.

    Raises:
        StoreError: The file is no public key of OpenSSH's form.
    """
    path = Path(public_key).absolute()
    try:
        words = path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} cannot be read as a public key: {error}. Give the node.pub of an edge.") from error
    if len(words) < 2 or not words[0].startswith("ecdsa-sha2-"):
        raise StoreError(f"{path} is no public key of an edge. Give the node.pub that `fuse keys` made.")
    return words[2] if len(words) > 2 else path.parent.name, hashlib.sha256(words[1].encode()).hexdigest()


class Roster:
    """The record in a cloud's folder.

    Attributes:
        address: Where the SuperLink listened last; empty if none was started.
        ca: Certificate of its authority.
        known: The keys.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "allowed.json"
        self.address, self.ca, self.known = "", "", list[Known]()
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        record = store.read_json(self.path)
        try:
            if {name: record[name] for name in _KIND} != _KIND:
                raise ValueError("another kind or format")
            self.address, self.ca = str(record["address"]), str(record["ca"])
            self.known = [Known(**entry) for entry in record["edges"]]
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.path} is no record of edges: {error!r}. Use another folder.") from error

    def save(self) -> None:
        """Write the record.

        Raises:
            StoreError: It cannot be written.
        """
        edges = [asdict(entry) for entry in self.known]
        store.write_json_atomic(self.path, {**_KIND, "address": self.address, "ca": self.ca, "edges": edges})

    def put(self, entry: Known) -> None:
        """Write what is now known of a key."""
        self.known = [e for e in self.known if e.key != entry.key] + [entry]
        self.save()

    def find(self, key: str) -> Known | None:
        """Return what is known of a key."""
        return next((e for e in self.known if e.key == key), None)

    def of(self, name: str) -> Sequence[Known]:
        """List all keys of an edge."""
        return [e for e in self.known if e.name == name]
