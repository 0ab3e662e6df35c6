"""The device key, and what the agent signs with it: a proof at enrolment, an assertion for each worker token."""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from rma_core.errors import SettingProblem
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds a signed statement is good for; the nonce in it is what counts, this is a diagnostic for wrong clocks.
STATEMENT_LIFE_S = 60


def b64url(data: bytes) -> str:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class DeviceKey:
    """This machine's Ed25519 key; its ``thumbprint`` (hex SHA-256 of the raw public key) is the machine's identity."""

    def __init__(self, private: Ed25519PrivateKey, *, now: Callable[[], float] = time.time) -> None:
        self._private, self._now = private, now
        raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.public_key = b64url(raw)
        self.thumbprint = hashlib.sha256(raw).hexdigest()

    @classmethod
    def generate(cls) -> DeviceKey:
        """Return a new key that exists only in memory."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, data: bytes) -> DeviceKey:
        """Return the key in a PKCS#8 file. Raises SettingProblem."""
        try:
            private = load_pem_private_key(data, password=None)
        except (ValueError, TypeError) as error:
            raise SettingProblem(f"the device key cannot be read: {error}") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise SettingProblem("the device key is not an Ed25519 key")
        return cls(private)

    def to_pem(self) -> bytes:
        """Return the key as an unencrypted PKCS#8 file."""
        return self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def proof(self, *, issuer: str, nonce: str, join_token: str) -> str:
        """Return the JWT that proves, at enrolment, who holds the key and with which join token."""
        token_hash = hashlib.sha256(join_token.encode()).hexdigest()
        return self._sign("rma-proof+jwt", self.thumbprint, issuer, {"nonce": nonce, "tkn": token_hash})

    def assertion(self, *, issuer: str, nonce: str, worker_id: str) -> str:
        """Return the JWT that is exchanged for a worker token."""
        return self._sign("rma-assertion+jwt", worker_id, issuer, {"nonce": nonce})

    def _sign(self, kind: str, subject: str, issuer: str, claims: dict[str, str]) -> str:
        # Five lines instead of a JWT library, which would cost the agent 6 MB: signing has no choices to get wrong.
        now = int(self._now())
        body = {"iss": subject, "sub": subject, "aud": issuer, "iat": now, "exp": now + STATEMENT_LIFE_S}
        body |= {"jti": secrets.token_hex(16), **claims}
        text = f"{b64url(encode({'typ': kind, 'alg': 'EdDSA'}))}.{b64url(encode(body))}"
        return f"{text}.{b64url(self._private.sign(text.encode()))}"
