"""A connection of uvicorn's that has become a WebSocket: from then on it is served as on Hypercorn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from rma_coordinator.direct import Direct
from rma_coordinator.http1_answer import Answer
from rma_coordinator.http1_parser import Head, Headers, Refused
from rma_coordinator.websocket import Socket, offer_in
from rma_coordinator.websocket_frames import GOING_AWAY

if TYPE_CHECKING:
    from collections.abc import Callable

    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    from rma_coordinator.mailbox import Message

logger = logging.getLogger(__name__)


class WebSocketLine:
    """Such a connection, among those of the server; ``over`` is called when it has ended.

    ``early`` came behind its handshake, before the answer to that.
    """

    def __init__(self, http: HttpToolsProtocol, scope: Message, over: Callable[[], None], early: bytes = b"") -> None:
        self.transport, self._over = http.transport, over
        self._app, self._state = http.app, http.server_state
        self._head = Head(scope["method"].encode(), b"", scope["headers"], scope["http_version"], keeps_alive=False)
        self.answer = Answer(self._head, self)
        self.stream: Socket | None = None
        self._reader = asyncio.StreamReader(loop=http.loop)
        stream = asyncio.StreamReaderProtocol(self._reader, loop=http.loop)
        stream.connection_made(self.transport)
        self.transport.set_protocol(stream)
        if http.flow.write_paused:
            # The transport has said so, and does not say so twice.
            stream.pause_writing()
        if early:
            self._reader.feed_data(early)
        self._writer = asyncio.StreamWriter(self.transport, stream, self._reader, http.loop)
        self._state.connections.add(self)  # type: ignore[arg-type]
        task = http.loop.create_task(self._run(scope, http.config.ws_max_size), name="a WebSocket")
        self._state.tasks.add(task)
        task.add_done_callback(self._ended)

    def response_headers(self, _protocol: str) -> Headers:
        """Return the headers of every answer."""
        return self._state.default_headers

    async def _run(self, scope: Message, most: int) -> None:
        try:
            await self._serve(scope, most)
        finally:
            self.transport.close()
            # Its place is free once it is: what was said last may wait for a client that reads slowly.
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def _serve(self, scope: Message, most: int) -> None:
        try:
            offer = offer_in(self._head)
        except Refused as refused:
            await self.say(self.answer.short(refused.status, *refused.headers))
            return
        socket = self.stream = Socket(self, scope, offer, most=most)
        async with asyncio.TaskGroup() as group:
            group.create_task(socket.run(), name="what a WebSocket is for")
            await Direct(self._reader, self.transport, socket.take).run()
            socket.leave()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._state.tasks.discard(task)
        self._state.connections.discard(self)
        self._over()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a WebSocket failed", exc_info=error, extra={"action": "bug"})

    async def let(self, scope: Message, receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI's own
        """Let the application do its work; what it raises is logged."""
        try:
            await self._app(scope, receive, send)
        except Exception:
            logger.exception("a WebSocket's application failed", extra={"action": "bug"})

    async def say(self, data: bytes) -> None:
        """Send, while anybody may hear it."""
        if not self.transport.is_closing():
            self._writer.write(data)
            # Whoever has left is found out by reading.
            with contextlib.suppress(OSError):
                await self._writer.drain()

    async def answered(self) -> None:
        """End it."""
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.leave()
        self.transport.close()

    def shutdown(self) -> None:
        """End it because the server does. Called by uvicorn."""
        if self.stream is not None:
            self.stream.leave({"type": "websocket.disconnect", "code": GOING_AWAY})
