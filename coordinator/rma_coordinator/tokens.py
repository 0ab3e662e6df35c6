"""Signed tokens: what a machine proves with its key, and the short worker tokens the coordinator gives for it."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from rma_core.errors import NotAuthenticated

if TYPE_CHECKING:
    from collections.abc import Callable

#: A worker token lasts a quarter of an hour; revocation does not wait for that (the epoch is compared on each call).
WORKER_TOKEN_S = 900
#: Clocks of volunteers' machines are off; the nonce, not the clock, keeps old proofs out.
LEEWAY_S = 86_400
#: Verified tokens that are remembered: checking one again costs a dictionary look-up instead of a MAC.
CACHE_SIZE = 4096


class WorkerClaims(NamedTuple):
    """What a worker token says."""

    worker_id: str
    epoch: int
    expires_at: float


def thumbprint(public_key: str) -> str:
    """Return the identity of a device key (base64url, raw): its SHA-256, hex."""
    return hashlib.sha256(_raw(public_key)).hexdigest()


def verify_proof(token: str, *, public_key: str, kind: str, issuer: str) -> dict[str, Any]:
    """Return the claims of a JWT that the device key signed for this coordinator. Raises NotAuthenticated.

    ``kind`` is the ``typ`` it must have, so that one sort of proof is never taken for another.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(_raw(public_key))
        if jwt.get_unverified_header(token).get("typ") != kind:
            raise NotAuthenticated(f"this is not a {kind}")
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=["EdDSA"],
            audience=issuer,
            leeway=LEEWAY_S,
            options={"require": ["iss", "sub", "aud", "exp", "iat", "jti"]},
        )
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        raise NotAuthenticated(
            f"the machine's proof does not hold: {error}", hints=("is the agent up to date?",)
        ) from None
    return claims


def claimed_subject(assertion: str) -> str:
    """Return whose assertion this claims to be; check the signature with that one's key. Raises NotAuthenticated."""
    try:
        return str(jwt.decode(assertion, options={"verify_signature": False}).get("sub", ""))
    except (jwt.PyJWTError, RecursionError) as error:
        raise NotAuthenticated(f"this is not an assertion: {error}") from None


def _raw(public_key: str) -> bytes:
    return base64.urlsafe_b64decode(public_key + "=" * (-len(public_key) % 4))


class WorkerTokens:
    """Makes and checks worker tokens with a secret of the pool; ``clock`` gives Unix seconds."""

    def __init__(self, secret: bytes, *, issuer: str, clock: Callable[[], float]) -> None:
        self._secret = secret
        self._issuer = issuer
        self._clock = clock
        self._seen: OrderedDict[str, WorkerClaims] = OrderedDict()

    def make(self, worker_id: str, epoch: int) -> str:
        """Return a fresh token for one worker."""
        now = int(self._clock())
        claims = {
            "iss": self._issuer,
            "aud": self._issuer,
            "sub": worker_id,
            "iat": now,
            "exp": now + WORKER_TOKEN_S,
            "jti": secrets.token_hex(8),
            "epoch": epoch,
        }
        return jwt.encode(claims, self._secret, algorithm="HS256", headers={"typ": "rma-at+jwt"})

    def check(self, token: str) -> WorkerClaims:
        """Return what a token says. Raises NotAuthenticated for one that is not ours, or has expired."""
        known = self._seen.get(token)
        found = known or self._decode(token)
        if found.expires_at <= self._clock():
            self._seen.pop(token, None)
            raise NotAuthenticated("the worker token has expired", hints=("ask /api/worker/token for a new one",))
        if known is not None:
            self._seen.move_to_end(token)
            return known
        self._seen[token] = found
        if len(self._seen) > CACHE_SIZE:
            self._seen.popitem(last=False)
        return found

    def _decode(self, token: str) -> WorkerClaims:
        try:
            if jwt.get_unverified_header(token).get("typ") != "rma-at+jwt":
                raise NotAuthenticated("this is not a worker token")
            claims = jwt.decode(
                token,
                self._secret,
                algorithms=["HS256"],
                audience=self._issuer,
                issuer=self._issuer,
                # The cache compares the time itself, on our clock, which tests may turn.
                options={"require": ["sub", "exp", "iat", "epoch"], "verify_exp": False, "verify_iat": False},
            )
        except (jwt.PyJWTError, RecursionError) as error:
            raise NotAuthenticated(f"the worker token does not hold: {error}") from None
        return WorkerClaims(str(claims["sub"]), int(claims["epoch"]), float(claims["exp"]))
