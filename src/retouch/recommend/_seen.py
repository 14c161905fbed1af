"""Who had a part in making a bundle, as salted hashes: so that nobody who trained it is taken for a stranger later.

The salt never enters a bundle: ids of users are few enough to be tried one by one by whoever knows it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import store
from ..errors import StoreError
from .splits import CERTIFICATE

if TYPE_CHECKING:
    from .data import Interactions
    from .splits import Splits

__all__ = ["Seen", "own_salt"]

_BYTES = 8


def own_salt() -> str:
    """Return the secret of this machine's cache, and draw it where there is none yet."""
    place = store.cache_dir() / "recommend" / "salt"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        drawn = place.with_name(f".salt-{secrets.token_hex(4)}")
        with os.fdopen(os.open(drawn, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(16))
        try:
            os.link(drawn, place)
        except FileExistsError:  # another process was faster: its salt stands
            pass
        except OSError:  # a file system without links
            drawn.replace(place)
        drawn.unlink(missing_ok=True)
    return place.read_text(encoding="utf-8").strip()


@dataclass(frozen=True, eq=False)
class Seen:
    """The users whose histories a bundle was made from.

    Attributes:
        mark: Tells whether a salt is the one, [8].
        users: Hash of each user, [users, 8].
        lengths: How many items of each were there then, [users].
        histories: Hash of these items, [users, 8].
    """

    mark: NDArray[np.uint8]
    users: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    histories: NDArray[np.uint8]

    @classmethod
    def of(cls, data: Interactions, splits: Splits, salt: str) -> Seen:
        """Note everybody but those whom the certificate keeps apart wholly."""
        apart = (splits.roles == CERTIFICATE) & (splits.holdout == "users")
        numbers = np.flatnonzero(~apart)
        pasts = [data.histories[u] for u in numbers]
        return cls(
            _rows([_hash(salt, b"mark")]), _rows([_user(salt, data.users[u]) for u in numbers]),
            np.array([len(past) for past in pasts], np.int64),
            _rows([_past(salt, data.users[u], past) for u, past in zip(numbers, pasts)]),
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        import torch

        store.save_tensors(path, {name: torch.from_numpy(value.copy()) for name, value in vars(self).items()})

    @classmethod
    def load(cls, path: Path) -> Seen:
        """Read what `save` wrote.

        Raises:
            StoreError: It is damaged.
        """
        arrays = {name: tensor.numpy() for name, tensor in store.load_tensors(path, cls.__dataclass_fields__).items()}
        found = cls(**arrays)
        n = len(found.lengths)
        if found.mark.shape != (1, _BYTES) or found.users.shape != (n, _BYTES) or found.histories.shape != (n, _BYTES):
            raise StoreError(f"{path} does not tell who had a part in training. Make the bundle again.")
        return found

    def fits(self, salt: str) -> bool:
        """Tell whether this is the salt of these hashes."""
        return self.mark.tobytes() == _hash(salt, b"mark")

    def sort(self, rows: Mapping[str, NDArray[np.int32]], salt: str) -> tuple[set[str], set[str]]:
        """Find users who had a part in training.

        Returns:
            Those whose history is the known one and goes on, so that its last item is new; and all others of them.
        """
        known = {user.tobytes(): i for i, user in enumerate(self.users)}
        went_on, others = set[str](), set[str]()
        for user, past in rows.items():
            if (i := known.get(_user(salt, user))) is None:
                continue
            n = int(self.lengths[i])
            same = len(past) > n and _past(salt, user, past[:n]) == self.histories[i].tobytes()
            (went_on if same else others).add(user)
        return went_on, others


def _hash(salt: str, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_BYTES, key=salt.encode()[:64]).digest()


def _user(salt: str, user: str) -> bytes:
    return _hash(salt, b"user " + user.encode())


def _past(salt: str, user: str, items: NDArray[np.int32]) -> bytes:
    return _hash(salt, b"past " + user.encode() + b"\0" + items.astype("<i4").tobytes())


def _rows(hashes: list[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, _BYTES)
