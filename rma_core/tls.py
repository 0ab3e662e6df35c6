"""Pinned certificates: a join token can name the one certificate its coordinator has, so no public authority is needed.

The pin is the SHA-256 of the certificate's SubjectPublicKeyInfo, base64url without padding (43 characters). The
certificate is fetched once without trusting it, compared with the pin, and from then on it alone is trusted.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ssl
from typing import NamedTuple
from urllib.parse import urlsplit

from rma_core.errors import CoordinatorUnreachable, UsageProblem

#: Seconds to wait for a coordinator's certificate.
FETCH_TIMEOUT_S = 10.0
#: Length of a pin: 32 bytes in base64url without padding.
PIN_LENGTH = 43


class JoinToken(NamedTuple):
    """A join token in its two parts: what the coordinator is shown, and the pin of its certificate or ``""``."""

    secret: str
    pin: str


def split_token(text: str) -> JoinToken:
    """Return the parts of ``rmaj_…`` or ``rmaj_….PIN``. Raises UsageProblem."""
    secret, dot, pin = text.strip().partition(".")
    hints = ("copy the whole line that `rma up --lan` or `rma tokens create` printed",)
    if not secret.startswith("rmaj_") or not secret.isascii() or not secret.replace("_", "").isalnum():
        raise UsageProblem("this is no join token: one begins with rmaj_", hints=hints)
    if dot and (len(pin) != PIN_LENGTH or not pin.replace("-", "").replace("_", "").isalnum()):
        raise UsageProblem(f"the join token is cut: what follows the dot has {PIN_LENGTH} characters", hints=hints)
    return JoinToken(secret, pin)


def certificate_pin(certificate: str) -> str:
    """Return the pin of a certificate in PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = x509.load_pem_x509_certificate(certificate.encode()).public_key()
    digest = hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


async def fetch_pinned(url: str, pin: str, *, timeout_s: float = FETCH_TIMEOUT_S) -> str:
    """Return the certificate (PEM) at ``url`` when it is the pinned one; nothing secret is sent to find out.

    Raises CoordinatorUnreachable when nobody answers with TLS there, or somebody else does.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise UsageProblem("a join token with a certificate pin needs an https:// address")
    address = (parts.hostname, parts.port or 443)
    try:
        certificate = await asyncio.to_thread(ssl.get_server_certificate, address, timeout=timeout_s)
    except (OSError, ValueError) as error:
        raise CoordinatorUnreachable(
            f"no certificate from {address[0]}:{address[1]}: {error}",
            hints=("is the address right, and is the coordinator running with TLS there?",),
        ) from None
    check_pin(certificate, pin, url)
    return certificate


def check_pin(certificate: str, pin: str, url: str) -> None:
    """Raise CoordinatorUnreachable when ``certificate`` is not the pinned one."""
    if hmac.compare_digest(certificate_pin(certificate), pin):
        return
    raise CoordinatorUnreachable(
        f"the certificate at {url} is not the one that the join token names; nothing was sent",
        hints=(
            "if the coordinator has a new certificate, ask for a new join token",
            "otherwise somebody stands between this machine and the coordinator",
        ),
    )


def pinned_context(certificate: str) -> ssl.SSLContext:
    """Return a context that trusts exactly ``certificate`` (PEM), whatever host name it was made for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # The pin says who this is; the name in the certificate adds nothing, and addresses on a home network change.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=certificate)
    return context
