"""Pages of other origins that call /v1 from a browser: only those that the admin names, and only with a key.

No origin is let in unless the setting `cors_origins` says so: whoever has a page open in a browser beside a pool must
read nothing of it. Cookies are never asked for and never count, so a page can do nothing without a key.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rma_coordinator.api.asgi import Call

#: Headers of an answer that a page may read.
EXPOSED = (
    "idempotency-replayed",
    "openai-processing-ms",
    "retry-after",
    "x-client-request-id",
    "x-ratelimit-limit-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
    "x-request-id",
    "x-rma-attempts",
    "x-rma-first-byte-ms",
    "x-rma-joined",
    "x-rma-model-state",
    "x-rma-queue-ms",
    "x-rma-worker",
    "x-should-retry",
)
#: Headers that a page may send, where its browser does not say which it wants to.
TAKEN = "authorization, content-type, idempotency-key, rma-priority, x-rma-keepalive"
#: A list of headers as a browser asks for it.
NAMES = re.compile(rb"[A-Za-z0-9-]{1,64}( ?, ?[A-Za-z0-9-]{1,64}){0,63}")
#: Seconds for which a browser need not ask again.
MAX_AGE_S = 600
#: Every origin.
ANY = "*"


def let_in(call: Call, allowed: Sequence[str]) -> bool:
    """Let the page that calls read the answer, if its origin is allowed; say whether it is."""
    origin = call.raw[b"origin"].decode("latin-1")
    if ANY not in allowed and origin.lower() not in {one.rstrip("/").lower() for one in allowed}:
        return False
    named = ANY if ANY in allowed else origin
    extra = [
        (b"access-control-allow-origin", named.encode("latin-1")),
        (b"access-control-expose-headers", ", ".join(EXPOSED).encode()),
        (b"vary", b"origin"),
    ]
    call.mark(extra)
    return True


async def options(call: Call, methods: Sequence[str], *, page: bool) -> None:
    """OPTIONS: say what an address takes, and to a ``page`` that is let in what it may send there."""
    takes = ", ".join(sorted({*methods, "OPTIONS"}))
    headers = {"allow": takes}
    if page and b"access-control-request-method" in call.raw:
        asked = call.raw.get(b"access-control-request-headers", b"").strip()
        headers |= {
            "access-control-allow-methods": takes,
            "access-control-allow-headers": asked.decode("ascii") if NAMES.fullmatch(asked) else TAKEN,
            "access-control-max-age": str(MAX_AGE_S),
        }
        if call.raw.get(b"access-control-request-private-network") == b"true":
            # A pool at home is a private network to a page from elsewhere.
            headers["access-control-allow-private-network"] = "true"
    await call.answer(204, headers, b"")
