"""The keyring: every key and join token of the pool, looked up by hash, changed only through here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from rma_coordinator.domain import credentials
from rma_coordinator.domain.credentials import JoinTokenRecord, KeyRecord, Principal
from rma_coordinator.domain.webhooks import WebhookSecrets
from rma_core.errors import Forbidden, NotAuthenticated, NotFound, Refused, RMAError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rma_coordinator.domain.limits import Limits

KEY_PREFIX = {"admin": "rmaa_", "client": "rmac_"}


#: So much of a machine's thumbprint is kept with the join token that it used: 64 bits are nobody else's by chance.
KNOWN_BY = 16


class Keyring:
    """Keys and join tokens in memory, ``clock`` gives Unix seconds."""

    def __init__(
        self,
        keys: Iterable[KeyRecord],
        tokens: Iterable[JoinTokenRecord],
        *,
        clock: Callable[[], float],
        webhooks: Iterable[WebhookSecrets] = (),
    ) -> None:
        """Take what the store holds."""
        self._keys = {key.hash: key for key in keys}
        self._tokens = {token.hash: token for token in tokens}
        self._webhooks = {one.key_id: one for one in webhooks}
        self._clock = clock
        #: Who holds which key, for as long as its record stays as it is.
        self._principals: dict[str, tuple[KeyRecord, Principal]] = {}

    def all_keys(self) -> list[KeyRecord]:
        """Return every key, oldest first."""
        return sorted(self._keys.values(), key=lambda key: key.created_at)

    def all_tokens(self) -> list[JoinTokenRecord]:
        """Return every join token, oldest first."""
        return sorted(self._tokens.values(), key=lambda token: token.created_at)

    def create_key(
        self,
        *,
        kind: str,
        label: str,
        scopes: tuple[str, ...],
        ttl_s: float | None = None,
        limits: Limits | None = None,
        owner: str = "",
    ) -> tuple[str, KeyRecord]:
        """Return a new key, shown this once, and its record."""
        secret = credentials.make_secret(KEY_PREFIX[kind])
        digest, now = credentials.fingerprint(secret), self._clock()
        record = KeyRecord(
            key_id=credentials.public_id(digest),
            hash=digest,
            kind="admin" if kind == "admin" else "client",
            label=label,
            scopes=scopes,
            created_at=now,
            expires_at=now + ttl_s if ttl_s else None,
            limits=limits or None,
            owner=owner,
        )
        self._keys[digest] = record
        return secret, record

    def create_token(self, *, label: str, uses: int, ttl_s: float, owner: str = "") -> tuple[str, JoinTokenRecord]:
        """Return a new join token, shown this once, and its record."""
        secret = credentials.make_secret("rmaj_")
        digest, now = credentials.fingerprint(secret), self._clock()
        record = JoinTokenRecord(
            token_id=credentials.public_id(digest),
            hash=digest,
            label=label,
            created_at=now,
            expires_at=now + ttl_s,
            uses=uses,
            owner=owner,
        )
        self._tokens[digest] = record
        return secret, record

    def revoke(self, key_id: str) -> KeyRecord | JoinTokenRecord:
        """End a key or join token at once. Raises NotFound."""
        now = self._clock()
        for key in self._keys.values():
            if key.key_id == key_id:
                self._keys[key.hash] = ended = msgspec.structs.replace(key, revoked_at=now)
                return ended
        for token in self._tokens.values():
            if token.token_id == key_id:
                self._tokens[token.hash] = spent = msgspec.structs.replace(token, revoked_at=now)
                return spent
        message = f"there is no key or join token {key_id!r}"
        raise NotFound(message, hints=("see `rma keys` and `rma tokens`",))

    def renewed_webhook_secrets(self, key_id: str) -> WebhookSecrets:
        """Return a key's signing secrets with a new one; the former is good for a while. Raises NotFound, Refused."""
        key = next((key for key in self._keys.values() if key.key_id == key_id), None)
        if key is None:
            raise NotFound(f"there is no key {key_id!r}", hints=("see `rma keys`",))
        if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= self._clock()):
            raise Refused(f"the key {key_id} has ended", hints=("make another: rma keys create",))
        known = self._webhooks.get(key_id) or WebhookSecrets(key_id=key_id, secrets=())
        return known.renewed(self._clock())

    def sign_with(self, secrets: WebhookSecrets) -> None:
        """Sign a key's webhooks with other secrets from now on."""
        self._webhooks[secrets.key_id] = secrets

    def webhook_secrets(self, key_id: str) -> list[bytes]:
        """Return what signs a key's webhooks now; none where none was ever made."""
        found = self._webhooks.get(key_id)
        return found.good(self._clock()) if found else []

    def principal(self, secret: str) -> Principal:
        """Return who holds an admin or client key. Raises NotAuthenticated, or Forbidden for another kind."""
        record = self._keys.get(credentials.fingerprint(secret))
        if record is None:
            # What has the wrong shape cannot be known; a look at that would cost every request more than all else here.
            credentials.check_shape(secret, "rmac_" if secret.startswith("rmac_") else "rmaa_")
            message = "this pool does not know that key"
            raise NotAuthenticated(message, hints=("is it another pool's? make one with `rma keys create`",))
        self._check_ended(record.revoked_at, record.expires_at, "key")
        known = self._principals.get(record.hash)
        if known is None or known[0] is not record:
            known = self._principals[record.hash] = (record, _principal(record))
        return known[1]

    def valid(self, secret: str) -> bool:
        """Say whether a key of this pool is good now."""
        try:
            self.principal(secret)
        except RMAError:
            return False
        return True

    def known_token(self, secret: str) -> JoinTokenRecord:
        """Return a join token of this pool that has not ended. Raises NotAuthenticated or Forbidden."""
        credentials.check_shape(secret, "rmaj_")
        record = self._tokens.get(credentials.fingerprint(secret))
        if record is None:
            message = "this pool does not know that join token"
            raise NotAuthenticated(message, hints=("ask the pool's admin for a new one: rma tokens create",))
        self._check_ended(record.revoked_at, record.expires_at, "join token")
        return record

    def join_token(self, secret: str, thumbprint: str | None) -> JoinTokenRecord:
        """Return a join token that this machine may (still) use. Raises NotAuthenticated or Forbidden."""
        record = self.known_token(secret)
        if (thumbprint or "")[:KNOWN_BY] not in record.used_by and len(record.used_by) >= record.uses:
            message = "this join token is used up"
            raise Forbidden(message, hints=("ask the pool's admin for a new one: rma tokens create",))
        return record

    def spend(self, record: JoinTokenRecord, thumbprint: str) -> JoinTokenRecord:
        """Count one machine against a join token; the same machine again costs nothing."""
        short = thumbprint[:KNOWN_BY]
        if short in record.used_by:
            return record
        spent = msgspec.structs.replace(record, used_by=(*record.used_by, short))
        self._tokens[record.hash] = spent
        return spent

    def _check_ended(self, revoked_at: float | None, expires_at: float | None, what: str) -> None:
        if revoked_at is not None:
            message = f"this {what} was revoked"
            raise NotAuthenticated(message)
        if expires_at is not None and expires_at <= self._clock():
            message = f"this {what} has expired"
            raise NotAuthenticated(message, hints=("ask for a new one",))


def _principal(record: KeyRecord) -> Principal:
    return Principal(
        id=f"key:{record.key_id}", kind=record.kind, scopes=record.scopes, limits=record.limits, owner=record.owner
    )
