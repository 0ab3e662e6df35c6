"""A certificate of our own for a pool on a local network: made once, recognised by its pin in join tokens."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from typing import TYPE_CHECKING, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from rma_core.errors import SettingProblem
from rma_core.tls import certificate_pin

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cryptography.x509 import GeneralName

#: Long, because its holder is recognised by the pin; an expiring one would cut off every worker at once.
LASTS_DAYS = 3650


class Pair(NamedTuple):
    """A certificate and its key, as files."""

    cert: Path
    key: Path


def own_pair(folder: Path, *, names: Sequence[str]) -> Pair:
    """Return the folder's certificate, made when there is none."""
    pair = Pair(folder / "cert.pem", folder / "key.pem")
    if not (pair.cert.exists() and pair.key.exists()):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _make(pair, names)
    return pair


def pin_of(cert: Path) -> str:
    """Return ``.`` and the pin that follows a join token, or nothing when the certificate is not its own issuer.

    A certificate that an authority signed is checked the usual way. Raises SettingProblem for one that cannot be read.
    """
    try:
        text = cert.read_text(encoding="ascii")
        certificate = x509.load_pem_x509_certificate(text.encode())
    except (OSError, ValueError) as error:
        raise SettingProblem(
            f"the certificate {cert} cannot be used: {error}", hints=("--tls-cert takes a PEM file",)
        ) from None
    return "" if certificate.issuer != certificate.subject else "." + certificate_pin(text)


def _make(pair: Pair, names: Sequence[str]) -> None:

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "RMA pool")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=LASTS_DAYS))
        .add_extension(x509.SubjectAlternativeName([_general_name(n) for n in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _write(pair.key, private)
    _write(pair.cert, certificate.public_bytes(Encoding.PEM))


def _general_name(name: str) -> GeneralName:

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
