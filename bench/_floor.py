"""The least that a server like the coordinator's does: read a body, answer a fixed JSON; same Hypercorn, same loop."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from hypercorn.asyncio import serve

from rma_coordinator.server import Listener, make_config, run
from rma_coordinator.serving import stopped

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

#: As long as the answer to a heartbeat when nothing changed.
ANSWER = b'{"heartbeat_interval_s":30.0,"generation":1,"tier":2,"nonce":"%b"}' % (b"x" * 130)
HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]


async def app(
    scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    """Serve one ASGI scope."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER, "more_body": False})


async def _main(port: int) -> int:
    config = make_config(Listener("127.0.0.1", port), None)
    until = asyncio.create_task(stopped())
    await serve(app, config, shutdown_trigger=lambda: until)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    run(_main(int(sys.argv[1])))
