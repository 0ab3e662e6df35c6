"""Signed tokens: what a machine proves with its key, and the short worker tokens the coordinator gives for it."""

from __future__ import annotations

import asyncio
import base64
import importlib
import secrets
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator.domain.worker_records import same, thumbprint_of
from rma_core.errors import NotAuthenticated

if TYPE_CHECKING:
    from collections.abc import Callable

#: A worker token lasts a quarter of an hour; revocation does not wait for that (the epoch is compared on each call).
WORKER_TOKEN_S = 900
#: Clocks of volunteers' machines are off, and ours may be set back a day; the nonce, not the clock, keeps old proofs
#: out.
LEEWAY_S = 36 * 3600
#: Seconds after the start, when the first answers have gone out.
WARM_AFTER_S = 1.0
#: The share of a token's life after which its worker is soon to ask for the next one, and needs a nonce for that.
NONCE_AFTER = 0.5
NONCE_BEFORE_S = WORKER_TOKEN_S * (1 - NONCE_AFTER)
#: Verified tokens that are remembered: checking one again costs a dictionary look-up instead of a MAC.
CACHE_SIZE = 4096
#: How an Authorization header with a token begins.
BEARER = b"Bearer "
#: A verified token is known by so many of its last characters: 130 bits of its MAC.
KEY_BYTES = 22


async def warm() -> None:
    """Load what checks signatures soon after the start, beside the event loop: it is a fifth of the whole start."""
    await asyncio.sleep(WARM_AFTER_S)
    await asyncio.to_thread(importlib.import_module, "jwt")


class WorkerClaims(msgspec.Struct, frozen=True, gc=False):
    """What a worker token says."""

    worker_id: str
    epoch: int
    expires_at: float
    #: The hash of the header that it comes in.
    digest: int = 0

    def ends_soon(self, now: float) -> bool:
        """Whether the worker will ask for the next one before long; ``now`` is Unix seconds."""
        return self.expires_at - now < NONCE_BEFORE_S


def thumbprint(public_key: str) -> str:
    """Return the identity of a device key (base64url, raw): its SHA-256, hex."""
    return thumbprint_of(_raw(public_key))


def verify_proof(token: str, *, public_key: str, kind: str, issuer: str) -> dict[str, Any]:
    """Return the claims of a JWT that the device key signed for this coordinator. Raises NotAuthenticated.

    ``kind`` is the ``typ`` it must have, so that one sort of proof is never taken for another.
    """
    import jwt
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

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
    except (jwt.ExpiredSignatureError, jwt.ImmatureSignatureError):
        raise NotAuthenticated(
            f"this machine's clock and the coordinator's are more than {LEEWAY_S // 3600} hours apart",
            hints=("set the clock that is wrong; `timedatectl` shows it on Linux",),
        ) from None
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        raise NotAuthenticated(
            f"the machine's proof does not hold: {error}", hints=("is the agent up to date?",)
        ) from None
    return claims


def claimed_subject(assertion: str) -> str:
    """Return whose assertion this claims to be; check the signature with that one's key. Raises NotAuthenticated."""
    import jwt

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
        #: By their ends, for a token is long and a pool has many; the oldest go first, as they expire.
        self._seen: dict[bytes, WorkerClaims] = {}

    def make(self, worker_id: str, epoch: int) -> str:
        """Return a fresh token for one worker."""
        import jwt

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
        data = token.encode("utf-8", "replace")
        return self.seen(BEARER + data) or self._remember(BEARER + data, token)

    def seen(self, header: bytes) -> WorkerClaims | None:
        """Return what a token says that was checked before and is still good, else ``None``.

        ``header`` is the whole Authorization header, as workers write it.
        """
        found = self._seen.get(header[-KEY_BYTES:])
        # Nobody can guess the end; the hash sees to it that what stands before it is what was checked.
        if found is None or found.digest != hash(header) or found.expires_at <= self._clock():
            return None
        return found

    def _remember(self, header: bytes, token: str) -> WorkerClaims:
        key, digest = header[-KEY_BYTES:], hash(header)
        known = self._seen.pop(key, None)
        found = known if known is not None and known.digest == digest else self._decode(token, digest=digest)
        if found.expires_at <= self._clock():
            raise NotAuthenticated("the worker token has expired", hints=("ask /api/worker/token for a new one",))
        self._seen[key] = found
        if len(self._seen) > CACHE_SIZE:
            del self._seen[next(iter(self._seen))]
        return found

    def _decode(self, token: str, *, digest: int) -> WorkerClaims:
        import jwt

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
        # The fleet has the same text for as long as the worker is known.
        return WorkerClaims(sys.intern(str(claims["sub"])), int(claims["epoch"]), same(float(claims["exp"])), digest)
