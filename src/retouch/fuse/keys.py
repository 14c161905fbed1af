"""Keys and certificates of a deployment: who is the cloud, and which edges may join.

An own authority signs the cloud's certificate, so that edges know whom they talk to; each edge has a key of its own that
the cloud registers; only on the cloud's own machine can keys be registered (`_superlink`). Private keys are readable by their owner alone.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StoreError, UserError
from .edge import check_name
from .roster import key_of

__all__ = ["Keys", "make_keys", "retire"]

_CA_DAYS = 3650
_LOOPBACK = ("localhost", "127.0.0.1")
"""Names in every certificate: runs are submitted on the cloud's own machine."""


@dataclass(frozen=True)
class Keys:
    """Where keys and certificates lie.

    Attributes:
        folder: Holds ``ca.key``, which stays with whoever runs this, and the folders below.
        cloud: ``ca.pem``, ``server.pem``, ``server.key``: for the machine of the cloud.
        edges: By name the folder for each edge: ``ca.pem``, ``node.key``, ``node.pub``, ``runtime.pem``,
            ``runtime.key``. Only ``node.pub`` is needed at the cloud.
    """

    folder: Path
    cloud: Path
    edges: dict[str, Path]


def make_keys(folder: str | Path, hosts: Sequence[str], edges: Sequence[str], *, days: int = 90) -> Keys:
    """Make what is missing: an authority, the cloud's certificate, a key and a certificate for each edge.

    Args:
        folder: Where to; an authority that is there already goes on signing.
        hosts: Names and addresses under which edges reach the cloud; localhost and 127.0.0.1 are always added.
        edges: Names of edges.
        days: How long certificates are valid.

    Raises:
        UserError: No host is given, or a name cannot be an edge's.
        StoreError: The folder cannot be written, or its authority cannot be read.
    """
    if not hosts or not all(h.strip() for h in hosts):
        raise UserError("Give at least one host: the name or address under which edges reach the cloud.")
    names = [check_name(name) for name in edges]
    folder = Path(folder).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority = _authority(folder)
        cloud = folder / "cloud"
        if not (cloud / "server.pem").exists():
            _folder(cloud, authority)
            _certified(cloud, "server", _all(hosts), authority, days)
        places = {name: folder / "edges" / name for name in names}
        for name, place in places.items():
            if not (place / "runtime.pem").exists():
                _edge(place, name, authority, days)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror} ({error.filename}). Choose another.") from error
    return Keys(folder, cloud, places)


def _all(hosts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*(h.strip() for h in hosts), *_LOOPBACK]))


def retire(folder: str | Path, name: str) -> Path | None:
    """Move a revoked edge's key out of the way, so that the same name can be given a new one.

    Returns:
        Where it lies now; None if the folder holds no key of that edge.

    Raises:
        StoreError: It cannot be moved.
    """
    place = Path(folder).absolute() / "edges" / check_name(name)
    if not place.is_dir():
        return None
    after = Path(folder).absolute() / "revoked" / f"{name}-{key_of(place / 'node.pub')[1][:16]}"
    try:
        after.parent.mkdir(mode=0o700, exist_ok=True)
        return place.rename(after)
    except OSError as error:
        raise StoreError(f"{place} cannot be moved to {after}: {error.strerror}. Move it by hand.") from error


def _edge(place: Path, name: str, authority: tuple[Any, Any], days: int) -> None:
    from cryptography.hazmat.primitives import serialization as form

    _folder(place, authority)
    key = _key()
    plain = form.NoEncryption()
    _private(place / "node.key", key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, plain))
    public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    (place / "node.pub").write_bytes(public + f" {name}\n".encode())
    _certified(place, "runtime", _LOOPBACK, authority, days)


def _folder(place: Path, authority: tuple[Any, Any]) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding

    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    (place / "ca.pem").write_bytes(authority[1].public_bytes(Encoding.PEM))


# ---------------------------------------------------------------- certificates


def _key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _private(path: Path, data: bytes) -> None:
    """Write a private key; at no moment can others read it."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    data: bytes = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    return data


def _authority(folder: Path) -> tuple[Any, Any]:
    """Return the authority's key and certificate, made if there is none."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization as form

    key_file, file = folder / "ca.key", folder / "ca.pem"
    if key_file.exists() and file.exists():
        try:
            key = form.load_pem_private_key(key_file.read_bytes(), None)
            return key, x509.load_pem_x509_certificate(file.read_bytes())
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{key_file} or {file} cannot be read: {error}. Make new keys in another folder."
            ) from error
    key = _key()
    name = _name("Retouch edges authority")
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    made = (
        _began(name, name, key, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    certificate = _signed(made, key)
    _private(key_file, _pem(key))
    file.write_bytes(certificate.public_bytes(form.Encoding.PEM))
    return key, certificate


def _certified(place: Path, what: str, hosts: Sequence[str], authority: tuple[Any, Any], days: int) -> None:
    """Write a key and a certificate for hosts, signed by the authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509.oid import ExtendedKeyUsageOID

    signer, root = authority
    key = _key()
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    made = (
        _began(_name(hosts[0].strip()[:64]), root.subject, key, days)
        .add_extension(x509.SubjectAlternativeName([_alternative(h.strip()) for h in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
    )
    certificate = _signed(made, signer)
    _private(place / f"{what}.key", _pem(key))
    (place / f"{what}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))


def _name(text: str) -> Any:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _began(subject: Any, issuer: Any, key: Any, days: int) -> Any:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _signed(builder: Any, key: Any) -> Any:
    from cryptography.hazmat.primitives import hashes

    return builder.sign(key, hashes.SHA384())
