"""What a Quart handler of ours sees of its request, so that handlers know neither Quart nor each other."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from quart import request

from rma_coordinator.api.asgi import CONTROL_BYTES, bearer, client_address
from rma_coordinator.api.problems import HTTPProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rma_coordinator.api.asgi import Call, Message, Receive
    from rma_coordinator.domain.credentials import Principal
    from rma_coordinator.pool import Pool


T = TypeVar("T")

#: Entries of a page at most.
MOST_ROWS = 1000
#: Where a request's scope has our own view of it.
CALL = "rma.call"


def without_body() -> Receive:
    """Return what Quart receives instead of a request's body, which handlers read through `Web.body`.

    Quart would take every body in, wanted or not, and keep it in cycles until the next full search for garbage:
    a few dozen requests to an address that does not exist would fill 256 MB.
    """
    told = False

    async def receive() -> Message:
        nonlocal told
        if told:
            # Quart cancels this when the answer has gone out.
            await asyncio.Event().wait()
        told = True
        return {"type": "http.request", "body": b"", "more_body": False}

    return receive


class Web:
    """One request to a Quart handler: credential, body, query, path; the handler may set ``status``."""

    def __init__(self, parts: dict[str, str], *, status: int, proxies: Sequence[str]) -> None:
        self.parts = parts
        self.status = status
        self.content_type = "application/json"
        self.headers = {"cache-control": "no-store"}
        self.query = dict(request.args)
        self._proxies = proxies

    @property
    def bearer(self) -> str:
        """The credential. Raises NotAuthenticated."""
        return bearer(request.headers.get("authorization", ""))

    @property
    def ip_address(self) -> str:
        """The caller's address; forwarding headers are believed from configured proxies only."""
        return client_address(request.scope.get("client"), request.headers.get("x-forwarded-for", ""), self._proxies)

    async def body(self, limit: int = CONTROL_BYTES) -> bytes:
        """Return the whole body. Raises HTTPProblem (408, 413, 415), Gone."""
        call: Call = request.scope[CALL]  # type: ignore[literal-required]  # ours, not ASGI's
        return await call.body(limit)

    def admin(self, pool: Pool, scope: str) -> Principal:
        """Return the caller when their key opens ``scope``. Raises NotAuthenticated or Forbidden."""
        principal = pool.keyring.principal(self.bearer)
        principal.need(scope)
        return principal

    def page(
        self, items: Sequence[T], name: str, *, key: Callable[[T], str], show: Callable[[T], object]
    ) -> dict[str, Any]:
        """Return one page of a list in CONTRACT's form; ``after`` names the last entry of the page before.

        Only what is on the page is shown, so that a large fleet costs no more than a small one. Raises HTTPProblem
        (400).
        """
        limit = self.query.get("limit", "100")
        if not limit.isdecimal() or not len(limit) <= len(str(MOST_ROWS)) or not 1 <= int(limit) <= MOST_ROWS:
            raise HTTPProblem(400, f"limit is a number from 1 to {MOST_ROWS}, not {limit!r}", code="query")
        after, start = self.query.get("after"), 0
        if after is not None:
            start = next((index + 1 for index, item in enumerate(items) if key(item) == after), -1)
        if start < 0:
            raise HTTPProblem(
                400, f"{after!r} is not in this list (any more): begin again without `after`", code="query"
            )
        part = items[start : start + int(limit)]
        more = start + len(part) < len(items)
        return {
            name: [show(item) for item in part],
            "total": len(items),
            "next": key(part[-1]) if more else None,
        }
