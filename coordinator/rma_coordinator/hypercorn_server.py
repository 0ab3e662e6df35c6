"""The default server: Hypercorn, with a place for each connection and an end of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, cast

from hypercorn.asyncio import run as hypercorn_run
from hypercorn.asyncio import serve, tcp_server
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config, Sockets
from hypercorn.events import Closed, RawData, Updated

from rma_coordinator import server
from rma_coordinator.direct import Direct
from rma_coordinator.http1 import Cut, Http1
from rma_coordinator.server import Places, Together, listening
from rma_core.settings import CoordinatorSettings

if TYPE_CHECKING:
    from hypercorn.events import Event
    from hypercorn.typing import Framework

    from rma_coordinator.app import ASGI
    from rma_coordinator.server import Listener

logger = logging.getLogger(__name__)

#: What Hypercorn calls the task of a connection.
CONNECTION = "worker_serve.<locals>._server_callback"
#: SO_LINGER: what is closed is reset.
RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


class Idle:
    """The connections that wait for a request, the one that has waited longest first.

    Hypercorn's own way starts two tasks and cancels them for each request.
    """

    def __init__(self) -> None:
        self._since: dict[Connection, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._over = False

    def begin(self, connection: Connection) -> None:
        """A connection waits now: for its keep-alive time, or not at all when the server ends."""
        if self._over:
            connection.leave()
            return
        now = connection.loop.time()
        self._since[connection] = now
        if self._timer is None:
            self._timer = connection.loop.call_later(connection.config.keep_alive_timeout, self._look)

    def end(self, connection: Connection) -> None:
        """A connection has a request, or is no more."""
        self._since.pop(connection, None)

    def close_all(self) -> None:
        """Close all that wait, and those that will."""
        self._over = True
        for connection in list(self._since):
            connection.leave()
        self._since.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        for connection, since in list(self._since.items()):
            left_s = since + connection.config.keep_alive_timeout - connection.loop.time()
            if left_s > 0:
                self._timer = connection.loop.call_later(left_s, self._look)
                return
            del self._since[connection]
            connection.leave()


class Connection(TCPServer):
    """Hypercorn's connection, which has a place among those there may be, and ends when its client has left."""

    _left = False

    async def run(self) -> None:
        """Serve the connection, or close it at once where there are too many."""
        # Another server in this process has a configuration without places.
        places = getattr(self.config, "places", None) or Places(1)
        self._idle: Idle = getattr(self.config, "idle", None) or Idle()
        self._out = Together(self.writer, self.loop)
        if not places.take():
            # No answer and no farewell: either could make us wait for somebody who means harm.
            self.writer.transport.abort()
            return
        opened: set[Connection] = getattr(self.config, "opened", set())
        opened.add(self)
        try:
            await super().run()
        except asyncio.CancelledError:
            # The server's end. Nothing waits for what comes of this, and Python before 3.12 would log a traceback.
            self.writer.transport.abort()
        finally:
            opened.discard(self)
            self._idle.end(self)
            places.give()

    async def protocol_send(self, event: Event) -> None:
        """Send, or begin and end the idle time; who has left is not waited for."""
        if type(event) is RawData:
            if event.data:  # the end of an answer that said its length is nothing
                await self._write(event.data)
        elif type(event) is Updated:
            if not event.idle:
                self._idle.end(self)
            elif not self._left:
                self._idle.begin(self)
        elif type(event) is Cut:
            # Without this the system would end the connection as if all had been said.
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.writer.transport.abort()
        else:
            await super().protocol_send(event)

    async def _write(self, data: bytes) -> None:
        try:
            self._out.write(data)
            await self.writer.drain()
        except (OSError, RuntimeError):  # the system's own patience may be over, too
            await self.protocol.handle(Closed())

    def _at_once(self, data: bytes) -> bool:
        """Write what nothing holds up, and say whether that was so."""
        if self._direct.full or self.writer.transport.is_closing():
            return False
        try:
            if self._out.keeps:
                self._out.write(data)
            else:
                self.writer.write(data)
        except (OSError, RuntimeError):  # only a connection that is over raises: `_write` ends it
            return False
        return True

    async def _close(self) -> None:
        self._out.flush()
        with contextlib.suppress(OSError):
            await super()._close()

    def leave(self) -> None:
        """Close a connection that waits for a request."""
        self._task_group.spawn(self._initiate_server_close)

    async def _read_data(self) -> None:
        self._idle.begin(self)
        self._direct = Direct(self.reader, self.writer.transport, self._take)
        if isinstance(self.protocol, Http1):
            self.protocol.at_once = self._at_once
        try:
            await self._direct.run()
        finally:
            self._left = True
            self._idle.end(self)
        await self.protocol.handle(Closed())

    async def _take(self, data: bytes) -> None:
        await self.protocol.handle(RawData(data))

    async def _idle_timeout(self) -> None:
        """Nothing: `Idle` looks after that."""


# It has no settings for these.
hypercorn_run.TCPServer = Connection  # type: ignore[attr-defined]
tcp_server.ProtocolWrapper = Http1  # type: ignore[assignment,attr-defined]


class BoundedConfig(Config):
    """Hypercorn's configuration, with a limit to connections, and sockets that give up on clients after UNREAD_S.

    The server itself waits for a client that takes nothing for ever once its answer was given up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places = Places(CoordinatorSettings().max_connections)
        self._sockets: Sockets | None = None
        #: Where it listens: plain, and with TLS.
        self.listeners: tuple[Listener | None, Listener | None] = (None, None)
        self.idle = Idle()
        self.opened: set[Connection] = set()
        #: What every answer has, in this second.
        self._headers: tuple[int, list[tuple[bytes, bytes]]] = (0, [])

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        """Return the headers of every answer: the date, written once a second."""
        second, headers = self._headers
        if second != (now := int(time.time())):
            headers = super().response_headers(protocol)
            self._headers = now, headers
        return headers

    def create_sockets(self) -> Sockets:
        """Return the listening sockets."""
        if self._sockets is not None:
            return self._sockets
        plain, secure = ([listening(one)] if one else [] for one in self.listeners)
        return Sockets(secure, plain, [])

    async def serve(self, app: ASGI, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set. Raises OSError for an address in use."""
        # Before the application starts: once it says that it answers, it must.
        self._sockets = self.create_sockets()

        async def stopped() -> None:
            await stop.wait()
            self.idle.close_all()

        try:
            await serve(cast("Framework", app), self, shutdown_trigger=stopped)
        finally:
            for one in (*self._sockets.secure_sockets, *self._sockets.insecure_sockets):
                one.close()

    async def cut(self, serving: asyncio.Task[None]) -> None:
        """Cancel a server that cannot stop, and its connections."""
        for connection in list(self.opened):
            # What waits for a client that takes nothing would outlive being cancelled.
            connection.writer.transport.abort()
        await _cut(serving)


def make_config(plain: Listener | None, secure: Listener | None) -> BoundedConfig:
    """Return Hypercorn's configuration for a plain and/or a TLS listener."""
    config = BoundedConfig()
    config.listeners = plain, secure
    if secure:
        config.certfile, config.keyfile = str(secure.cert), str(secure.key)
    # Over HTTP/2, data after an early answer kills a connection with all its streams; a front proxy may speak it.
    config.alpn_protocols = ["http/1.1"]
    config.graceful_timeout = server.GRACE_S
    config.shutdown_timeout = server.GRACE_S
    config.keep_alive_timeout = server.KEEP_ALIVE_S
    config.ssl_handshake_timeout = server.HANDSHAKE_S
    config.websocket_max_message_size = server.MAX_WEBSOCKET_BYTES
    config.include_server_header = False
    config.backlog = server.BACKLOG
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    return config


async def _cut(serving: asyncio.Task[None]) -> None:
    """Cancel a server that cannot stop, and its connections: each waits for a client that takes nothing any more."""
    loop = asyncio.get_running_loop()
    usual = loop.get_exception_handler()
    # Until Python 3.12 each connection that is cancelled is logged with a traceback.
    loop.set_exception_handler(lambda _, context: logger.debug("while stopping: %s", context.get("message")))
    try:
        ending = {task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__qualname__", "") == CONNECTION}
        ending.add(serving)
        for _ in range(2):  # what waits for its connection to close takes the first for the end of that wait
            for task in ending:
                task.cancel()
            await asyncio.wait(ending, timeout=server.LAST_STOP_S / 2)
        await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(usual)
