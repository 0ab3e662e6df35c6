"""Credentials: what they look like, how they are kept, what each opens. Random keys are stored as SHA-256 only."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import re
import secrets
import zlib
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from rma_coordinator.domain.limits import Limits
from rma_core.errors import Forbidden, NotAuthenticated, Problem, ValidationProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
#: 30 base62 characters are 178 bits.
SECRET_LENGTH = 30
CHECKSUM_LENGTH = 6
PREFIXES = {"rmaa_": "an admin key", "rmac_": "a client key", "rmaj_": "a join token"}

#: Everything a key can open; `infer:SERVICE` stands beside `infer:*` for one service. Without `priority:high` a request
#: may ask for it and is an ordinary one.
SCOPES = ("admin:read", "admin:write", "admin:keys", "tasks:read", "metrics", "infer:*", "priority:high")

#: The one kind of scope that is not listed: one service.
SERVICE_SCOPE = re.compile(r"infer:[a-z][a-z0-9-]{0,31}")

#: A nonce is good for this long, whatever the worker's clock says.
NONCE_S = 60.0

KeyId = Annotated[str, Meta(pattern=r"^[0-9A-Za-z]{8}$")]


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One admin or client key as it is kept; ``key_id`` is public and stands in logs. Times are Unix seconds."""

    key_id: KeyId
    hash: str
    kind: Literal["admin", "client"]
    label: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    limits: Limits | None = None
    #: On whose machines its requests come first, if on anybody's.
    owner: str = ""


class JoinTokenRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One join token as it is kept; ``used_by`` knows machines, so that a lost answer can be asked for again."""

    token_id: KeyId
    hash: str
    label: str
    created_at: float
    expires_at: float
    uses: int
    used_by: tuple[str, ...] = ()
    revoked_at: float | None = None
    #: Whose machines join with it, if anybody's in particular.
    owner: str = ""


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who calls: an id for logs, the scopes it holds, and how much it may ask for; ``None`` is as much as it likes."""

    id: str
    kind: Literal["admin", "client", "join", "worker"]
    scopes: tuple[str, ...] = ()
    limits: Limits | None = None
    #: On whose machines its requests come first, if on anybody's.
    owner: str = ""

    def may(self, scope: str) -> bool:
        """Say whether this caller's scopes open ``scope``; ``infer:*`` opens every ``infer:SERVICE``."""
        wide = scope.partition(":")[0] + ":*"
        return scope in self.scopes or wide in self.scopes

    def need(self, scope: str) -> None:
        """Raise Forbidden unless this caller may."""
        if not self.may(scope):
            message = f"this key does not open {scope}; it holds: {', '.join(self.scopes) or 'nothing'}"
            raise Forbidden(message, hints=(f"make one that does: rma keys create --scope {scope}",))


def make_secret(prefix: str) -> str:
    """Return a fresh credential: prefix, 30 random base62 characters, 6 of checksum."""
    body = prefix + "".join(secrets.choice(ALPHABET) for _ in range(SECRET_LENGTH))
    return body + _checksum(body)


def fingerprint(secret: str) -> str:
    """Return the SHA-256 of a credential, hex; the only form that is stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


def public_id(digest: str) -> str:
    """Return the eight characters by which a credential is named in lists and logs."""
    return digest[:8]


def well_formed(secret: str, prefix: str) -> bool:
    """Say whether a credential has the shape and checksum of its kind, without looking anything up."""
    length = len(prefix) + SECRET_LENGTH + CHECKSUM_LENGTH
    shape = len(secret) == length and secret.startswith(prefix) and all(c in ALPHABET for c in secret[len(prefix) :])
    return shape and hmac.compare_digest(_checksum(secret[:-CHECKSUM_LENGTH]), secret[-CHECKSUM_LENGTH:])


def check_shape(secret: str, prefix: str) -> None:
    """Raise NotAuthenticated or Forbidden with a sentence when a credential is of another kind or mistyped."""
    other = next((words for start, words in PREFIXES.items() if start != prefix and secret.startswith(start)), None)
    if other:
        message = f"this is {other}, here {PREFIXES[prefix]} is needed"
        raise Forbidden(message, hints=("see who may call what in the reference",))
    if not well_formed(secret, prefix):
        message = f"that is not {PREFIXES[prefix]}: it is mistyped or cut off"
        raise NotAuthenticated(message, hints=("copy it again, whole",))


def check_scopes(scopes: Iterable[str], creator: Principal) -> tuple[str, ...]:
    """Return scopes sorted and without doubles; a key can only make keys with a part of its own scopes.

    Raises ValidationProblem for unknown scopes, Forbidden for one that the creator does not hold.
    """
    wanted = tuple(sorted(set(scopes)))
    unknown = [scope for scope in wanted if scope not in SCOPES and not SERVICE_SCOPE.fullmatch(scope)]
    if unknown:
        problems = [Problem("$.scopes", f"there is no scope {scope!r}") for scope in unknown]
        raise ValidationProblem("key", problems, hints=(f"scopes: {', '.join(SCOPES)}, infer:SERVICE",))
    for scope in wanted:
        if not creator.may(scope):
            message = f"your key does not hold {scope}, so it cannot give it away"
            raise Forbidden(message)
    return wanted


def _checksum(body: str) -> str:
    """Return the CRC-32 of ``body`` as six base62 digits, so that a typo is found without a look-up."""
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECKSUM_LENGTH):
        number, rest = divmod(number, len(ALPHABET))
        digits = ALPHABET[rest] + digits
    return digits


class Nonces:
    """Stateless nonces: a time and its MAC under a key made at start, so that a restart voids every older one.

    ``clock`` gives seconds; used ones are remembered while they are good, by their numbers, at most ``limit`` of them.
    """

    def __init__(self, clock: Callable[[], float], *, limit: int = 100_000) -> None:
        """Make a fresh MAC key."""
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._numbers = itertools.count()
        #: Used since the last turn, and between the last two; what is older is too old to be accepted anyway.
        self._used, self._used_before = set[int](), set[int]()
        self._turned_at = clock()
        self._limit = limit

    def make(self) -> str:
        """Return a fresh nonce."""
        # The number makes it unlike any other, the MAC makes it one that nobody foresees.
        body = f"{int(self._clock() * 1000)}.{next(self._numbers):x}"
        return f"{body}.{self._mac(body)}"

    def spend(self, nonce: str) -> bool:
        """Say whether the nonce is ours, young and unused; it is used from now on."""
        body, _, mac = nonce.rpartition(".")
        # compare_digest takes text in ASCII only, and a nonce may say anything.
        if not body or not nonce.isascii() or not hmac.compare_digest(self._mac(body), mac):
            return False
        # From here on it is known to be one of ours, and so to have the form that `make` gives it.
        made_ms, _, digits = body.partition(".")
        now, number = self._clock(), int(digits, 16)
        if now - self._turned_at > NONCE_S + 1:
            recent = now - self._turned_at <= 2 * (NONCE_S + 1)
            self._used, self._used_before, self._turned_at = set(), self._used if recent else set(), now
        known = number in self._used or number in self._used_before
        if known or not -1 <= now - int(made_ms) / 1000 <= NONCE_S or len(self._used) >= self._limit:
            return False
        self._used.add(number)
        return True

    def _mac(self, body: str) -> str:
        # Each heartbeat's answer has one, and this costs a sixth of an HMAC.
        return hashlib.blake2b(body.encode(), key=self._key, digest_size=16).hexdigest()
