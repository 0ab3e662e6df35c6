"""Webhooks as Standard Webhooks has them: what is said of a task's end, how it is signed, when it comes again. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from rma_coordinator.domain.credentials import KeyId
from rma_coordinator.domain.fleet import iso
from rma_core.errors import RMAError
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rma_coordinator.domain.records import TaskRecord

#: What a secret begins with when it is shown, and how many random bytes follow.
SECRET_PREFIX, SECRET_BYTES = "whsec_", 32
#: After a new one was made, the former secret signs too for so long.
OVERLAP_S = 86_400.0
#: Seconds to the next try after each one that failed, give or take JITTER of them; after the last it is given up.
WAITS_S = (5.0, 60.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0)
JITTER = 0.2
#: A receiver that asks for more time gets this much at most.
MOST_ASKED_S = 3600.0
#: Characters of an address.
MOST_URL = 2048
#: Characters of a reason that are kept.
MOST_REASON = 300
#: A final status from here on says that the service could not do it.
LEAST_ERROR = 400


class Unreachable(RMAError):
    """A call came to nothing; the sentence is for whoever named the address."""

    code = "unreachable_webhook"


class Reply(NamedTuple):
    """The head of an answer: its status, and how long it asks to be left alone."""

    status: int
    retry_after_s: float | None = None


State = Literal["waiting", "delivered", "given_up"]


class WebhookRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is to be told about one task's end, and how that goes; written with the end. Times are Unix seconds."""

    task_id: str
    key_id: str
    url: str
    body: bytes
    state: State = "waiting"
    tries: int = 0
    #: When it is tried next, or when it was delivered or given up.
    at: float = 0.0
    #: Why the last try failed.
    reason: str = ""

    @property
    def message_id(self) -> str:
        """What its receiver knows it by, however often it comes: a task ends once."""
        return f"msg_{self.task_id.removeprefix('task-')}"


class WebhookSecret(msgspec.Struct, frozen=True, kw_only=True):
    """One signing secret; one that was replaced has an end."""

    secret: bytes
    made_at: float
    until: float | None = None


class WebhookSecrets(msgspec.Struct, frozen=True, kw_only=True):
    """The signing secrets of a key, the newest first; a signature needs the secret itself, so no hash is enough."""

    key_id: KeyId
    secrets: Annotated[tuple[WebhookSecret, ...], Meta(max_length=2)]

    def renewed(self, now: float) -> WebhookSecrets:
        """Return it with a new secret; the one before it is good for OVERLAP_S more, older ones are not."""
        former = [msgspec.structs.replace(one, until=now + OVERLAP_S) for one in self.secrets[:1]]
        new = WebhookSecret(secret=secrets.token_bytes(SECRET_BYTES), made_at=now)
        return msgspec.structs.replace(self, secrets=(new, *former))

    @property
    def shown(self) -> str:
        """The newest secret as its owner gets it, once."""
        return SECRET_PREFIX + base64.b64encode(self.secrets[0].secret).decode()

    def good(self, now: float) -> list[bytes]:
        """Return the secrets that sign now."""
        return [one.secret for one in self.secrets if one.until is None or one.until > now]


def message(record: TaskRecord, *, base_url: str = "") -> bytes:
    """Return what is said of a task's end: never the answer, only where it is."""
    refused = record.state == "succeeded" and (record.http_status or 0) >= LEAST_ERROR
    status = "failed" if refused else record.state
    ended_at, address = iso(record.ended_at or 0), f"{base_url}/api/inference/tasks/{record.task_id}"
    data = {
        "task_id": record.task_id,
        "service": record.service,
        "status": status,
        "http_status": record.http_status if record.state == "succeeded" else None,
        "created_at": iso(record.created_at),
        "ended_at": ended_at,
        "attempts": len(record.attempts),
        "task_url": address,
        "result_url": f"{address}/result" if record.state == "succeeded" else None,
    }
    return encode({"type": f"task.{status}", "timestamp": ended_at, "data": data})


def signed(message_id: str, body: bytes, *, now: float, keys: Iterable[bytes]) -> dict[str, str]:
    """Return the headers that prove who says ``body`` and when, with a signature for each of the ``keys``."""
    timestamp = str(int(now))
    content = f"{message_id}.{timestamp}.".encode() + body
    signatures = [base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode() for key in keys]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{one}" for one in signatures),
    }


def wait_s(tries: int, *, part: float, asked_s: float | None = None) -> float | None:
    """Return how long to wait after so many tries; ``None`` when that was the last.

    ``part`` is a random number of 0..1, ``asked_s`` what the receiver asked for.
    """
    if tries > len(WAITS_S):
        return None
    usual_s = WAITS_S[max(1, tries) - 1] * (1 - JITTER + 2 * JITTER * part)
    return max(usual_s, min(MOST_ASKED_S, asked_s or 0.0))


def left_s(record: WebhookRecord, now: float) -> float:
    """Return how long what waited when the coordinator ended waits still; a clock that was set back delays nothing."""
    usual_s = WAITS_S[min(record.tries, len(WAITS_S)) - 1] * (1 + JITTER) if record.tries else 0.0
    return min(usual_s, max(0.0, record.at - now))


def refusal(url: str, *, plain_http: bool = False) -> str:
    """Say why nothing is ever sent to an address, whatever its name leads to; an empty string when something may be."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "it is no URL"
    odd = not url.isascii() or not url.isprintable() or " " in url or "\\" in url
    if odd or len(url) > MOST_URL or not parts.hostname or port == 0:
        return f"it is a URL of at most {MOST_URL} ASCII characters, with a host"
    if parts.scheme != "https" and not (plain_http and parts.scheme == "http"):
        return "it begins with https://"
    if "@" in parts.netloc or parts.fragment:
        return "it has no credentials and no fragment"
    return ""
