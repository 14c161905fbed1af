"""What a certificate is made from: one pair of measurements for each target of users who had no part in training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import store
from ..errors import StoreError, UserError

if TYPE_CHECKING:
    from .base import Scorer
    from .data import Interactions
    from .splits import Splits

__all__ = ["CAP", "REPORTED", "ROUTABLE", "Evidence", "collect", "require_kept", "slice_key"]

Floats = NDArray[np.float64]

CAP = 1.0
"""No user counts more than this in a mean, in nats per code: a bound needs harms that have one."""

ROUTABLE = ("all", "sparse", "active")
"""Segments that are known when a user is served, so that each can be given its own rung."""

REPORTED = ("tail", "new")
"""Segments that depend on the target: their means are told, nothing is promised of them."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured of each target of the certificate's users.

    Attributes:
        users: A salted hash of each user, 8 bytes, [users, 8].
        unit: The row in `users` of each target, [targets].
        segments: Masks over the targets, by name.
        before: Log-probability of each target under the reference, in nats per code, [targets].
        after: The same for each rung.
        rank_before: Rank of each target under the reference, [targets].
        rank_after: The same for each rung.
        compared: Log-probabilities under recommenders that are not served and only told beside: ``continued``, say.
        n_levels: Codes of an item.
    """

    users: NDArray[np.uint8]
    unit: NDArray[np.int64]
    segments: Mapping[str, NDArray[np.bool_]]
    before: Floats
    after: Mapping[str, Floats]
    rank_before: NDArray[np.int64]
    rank_after: Mapping[str, NDArray[np.int64]]
    compared: Mapping[str, Floats] = field(default_factory=dict)
    n_levels: int = 4

    def harms(self, after: Floats, slack: float) -> tuple[Floats, Floats]:
        """Return the harm of each target, capped and as it is."""
        raw = np.maximum(self.before - after - slack, 0.0)
        return np.minimum(raw, CAP), raw

    def save(self, path: str | Path) -> None:
        """Write all arrays to a safetensors file."""
        import torch

        arrays: dict[str, Any] = {"users": self.users, "unit": self.unit, "before": self.before,
                                  "rank_before": self.rank_before, "n_levels": np.array([self.n_levels])}  # fmt: skip
        for kind in _KINDS:
            arrays |= {f"{kind}.{name}": array for name, array in getattr(self, kind).items()}
        store.save_tensors(path, {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})

    @classmethod
    def load(cls, path: str | Path) -> Evidence:
        """Read what `save` wrote.

        Raises:
            StoreError: The file is missing or damaged, or holds something else.
        """
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in store.load_tensors(path).items()}
        for kind in _KINDS:
            inside = [name for name in arrays if name.startswith(f"{kind}.")]
            arrays[kind] = {name.removeprefix(f"{kind}."): arrays.pop(name) for name in sorted(inside)}
        try:
            return cls(**arrays | {"n_levels": int(arrays["n_levels"][0])})
        except (KeyError, TypeError, IndexError) as error:
            raise StoreError(f"{path} holds no evidence of a certificate: {error}.") from error


_KINDS = ("segments", "after", "rank_after", "compared")


def collect(
    data: Interactions,
    splits: Splits,
    reference: Scorer,
    rungs: Mapping[str, Scorer],
    n_levels: int,
    *,
    compared: Mapping[str, Scorer] | None = None,
    salt: str = "",
) -> Evidence:
    """Measure reference and policy on the targets that were kept for the certificate.

    Args:
        data: The histories.
        splits: Who is kept for the certificate.
        reference: The recommender without knowledge.
        rungs: The policy as it serves on each rung; see `RUNGS`.
        n_levels: Codes of an item; log-probabilities are divided by it.
        compared: Recommenders whose harm is told beside: the reference trained on, another seed of it.
        salt: Makes the users' hashes useless to whoever does not know it.

    Raises:
        UserError: Nobody was kept, or a target belongs to a user who may have been used.
    """
    from .splits import CERTIFICATE, segments

    samples = splits.certificate
    require_kept(splits)
    if (splits.roles[samples.users - 1] != CERTIFICATE).any():
        raise UserError("The certificate's targets include users who were trained on. Split the data again.")
    numbers, unit = np.unique(samples.users, return_inverse=True)
    found = segments(data, splits, samples)
    masks = {name: found[name] for name in (*ROUTABLE[1:], *REPORTED)}
    hashes = [hashlib.blake2b(f"{salt}:{data.users[u - 1]}".encode(), digest_size=8).digest() for u in numbers]
    return Evidence(
        np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 8), unit.astype(np.int64), masks,
        reference.log_likelihood(samples) / n_levels,
        {name: scorer.log_likelihood(samples) / n_levels for name, scorer in rungs.items()},
        reference.ranks(samples), {name: scorer.ranks(samples) for name, scorer in rungs.items()},
        {name: scorer.log_likelihood(samples) / n_levels for name, scorer in (compared or {}).items()}, n_levels,
    )  # fmt: skip


def require_kept(splits: Splits) -> None:
    """Refuse, before any training, a split that leaves nobody to certify on.

    Raises:
        UserError: No user of the certificate has a target.
    """
    if not len(splits.certificate):
        raise UserError(
            f"No user was kept for the certificate who has a target there (split {splits.how}, seed {splits.seed}). Split "
            "the data with another seed, or use more users."
        )


def slice_key(data: Interactions, splits: Splits) -> str:
    """Name the users and targets of a certificate."""
    part = splits.certificate
    digest = hashlib.sha256(np.stack([part.users, part.cuts]).astype(np.int64).tobytes()).hexdigest()
    return store.key(data=data.fingerprint, slice=digest)
