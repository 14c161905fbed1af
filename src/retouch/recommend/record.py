"""One user's knowledge as bytes: fixed fields, the chosen codes, the vector in half precision, a checksum.

A record that is damaged, of another format or of other versions counts as absent: reading it never raises.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

__all__ = ["MAGIC", "Record", "Versions", "decode", "encode", "history_hash", "order", "size", "tail_hash"]

MAGIC, SCHEMA = b"RTK1", 1
_HEAD = struct.Struct("<4sHHIIIIQQIeH")
N_HISTORY, N_TAIL = 20, 8


@dataclass(frozen=True)
class Versions:
    """Which model, fusion and tokeniser made a record: the first 32 bits of each fingerprint."""

    model: int
    fusion: int
    tokeniser: int

    @classmethod
    def of(cls, model: str, fusion: str, tokeniser: str) -> Versions:
        """Shorten fingerprints, which are written in hexadecimal."""
        return cls(int(model[:8], 16), int(fusion[:8], 16), int(tokeniser[:8], 16))


@dataclass(frozen=True, eq=False)
class Record:
    """What a language model knows of one user, ready for the decoder.

    Attributes:
        versions: What made it.
        history_length: How many items the user had then.
        history_hash: `history_hash` of the last items.
        computed_at_ms: When, in milliseconds since 1970.
        ttl_s: For how long it counts as fresh.
        gate: The gate's value, for reports.
        codes: The chosen codeword of each codebook.
        vector: What is added to the decoder's first input, float16.
        tail_hash: `tail_hash` of the last items; 0 where it is not known.
    """

    versions: Versions
    history_length: int
    history_hash: int
    computed_at_ms: int
    ttl_s: int
    gate: float
    codes: tuple[int, ...]
    vector: NDArray[np.float16]
    tail_hash: int = 0


def history_hash(items: Sequence[str], n_history: int = N_HISTORY) -> int:
    """Return 64 bits of the last raw ids, so that a record can be compared with a history."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items[-n_history:]:
        digest.update(len(item.encode()).to_bytes(4, "little") + item.encode())
    return int.from_bytes(digest.digest(), "little")


def tail_hash(items: Sequence[str]) -> int:
    """Return 16 bits, never 0, of the last few raw ids; 0 for fewer. For callers who send just the end of a history.

    It stands where a record has its flags, so records keep their size.
    """
    return history_hash(items, N_TAIL) % 0xFFFF + 1 if len(items) >= N_TAIL else 0


def size(n_codes: int, d_model: int) -> int:
    """Return the bytes of a record: 320 with 5 codes and width 128."""
    return _HEAD.size + 2 * n_codes + 2 + 2 * d_model + 4


def encode(record: Record) -> bytes:
    """Write a record as bytes.

    Raises:
        UserError: A number does not fit its field, or the vector is not finite.
    """
    if not np.isfinite(record.vector).all():
        raise UserError("A knowledge vector must be finite; the policy that made it has diverged.")
    v = record.versions
    try:
        head = _HEAD.pack(
            MAGIC, SCHEMA, record.tail_hash, v.model, v.fusion, v.tokeniser, record.history_length, record.history_hash,
            record.computed_at_ms, record.ttl_s, record.gate, len(record.codes),
        )  # fmt: skip
        body = struct.pack(f"<{len(record.codes)}HH", *record.codes, record.vector.size)
    except (struct.error, OverflowError) as error:
        raise UserError(f"A knowledge record does not fit its format: {error}.") from error
    raw = head + body + record.vector.astype("<f2").tobytes()
    return raw + struct.pack("<I", zlib.crc32(raw))


def decode(raw: bytes | None, versions: Versions | None = None, d_model: int | None = None) -> Record | str:
    """Read a record.

    Args:
        raw: Its bytes, or None.
        versions: What must have made it; None takes any.
        d_model: The width that its vector must have.

    Returns:
        The record, or in one word why there is none: ``absent``, ``short``, ``magic``, ``schema``, ``checksum``,
        ``length``, ``version``, ``width`` or ``value``.
    """
    if raw is None:
        return "absent"
    if len(raw) < _HEAD.size + 6:
        return "short"
    if raw[:4] != MAGIC:
        return "magic"
    if zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        return "checksum"
    _, schema, tail, *made, length, hashed, at, ttl, gate, n = _HEAD.unpack_from(raw)
    if schema != SCHEMA:
        return "schema"
    start = _HEAD.size + 2 * n
    if len(raw) < start + 6:
        return "length"
    *codes, width = struct.unpack_from(f"<{n}HH", raw, _HEAD.size)
    if len(raw) != size(n, width):
        return "length"
    if versions is not None and Versions(*made) != versions:
        return "version"
    if d_model is not None and width != d_model:
        return "width"
    vector = np.frombuffer(raw, "<f2", width, start + 2).astype(np.float16)
    if not np.isfinite(vector).all():
        return "value"
    return Record(Versions(*made), length, hashed, at, ttl, gate, tuple(codes), vector, tail)


def order(raw: bytes) -> tuple[int, int]:
    """Return what decides whether a record replaces another: history length, then time.

    Raises:
        UserError: The bytes are too few to be a record.
    """
    if len(raw) < _HEAD.size:
        raise UserError(f"A knowledge record has at least {_HEAD.size} bytes; got {len(raw)}.")
    fields = _HEAD.unpack_from(raw)
    return int(fields[6]), int(fields[8])
