"""The default server: Hypercorn, with a place for each connection and an end of its own."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from hypercorn.asyncio import run as hypercorn_run
from hypercorn.asyncio import serve
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.events import Updated

from rma_coordinator import server
from rma_coordinator.server import Places, patient
from rma_core.settings import CoordinatorSettings

if TYPE_CHECKING:
    from hypercorn.config import Sockets
    from hypercorn.events import Event
    from hypercorn.typing import Framework

    from rma_coordinator.app import ASGI
    from rma_coordinator.server import Listener

logger = logging.getLogger(__name__)

#: What Hypercorn calls the task of a connection.
CONNECTION = "worker_serve.<locals>._server_callback"


class Connection(TCPServer):
    """Hypercorn's connection, which has a place among those there may be, and ends when its client has left.

    Hypercorn 0.18 keeps one that its client closed between two requests until the keep-alive time is over: its socket,
    its tasks, and its place.
    """

    _left = False

    async def run(self) -> None:
        """Serve the connection, or close it at once where there are too many."""
        # Another server in this process has a configuration without places.
        places = getattr(self.config, "places", None) or Places(1)
        if not places.take():
            # No answer and no farewell: either could make us wait for somebody who means harm.
            self.writer.transport.abort()
            return
        try:
            await super().run()
        except asyncio.CancelledError:
            # The server's end. Nothing waits for what comes of this, and Python before 3.12 would log a traceback.
            self.writer.transport.abort()
        finally:
            places.give()

    async def protocol_send(self, event: Event) -> None:
        """Send, or begin and end the idle time; who has left is not waited for."""
        if not (self._left and isinstance(event, Updated)):
            await super().protocol_send(event)

    async def _read_data(self) -> None:
        await super()._read_data()
        self._left = True
        await self.idle_task.stop()


hypercorn_run.TCPServer = Connection  # type: ignore[attr-defined]  # it has no setting for this


class BoundedConfig(Config):
    """Hypercorn's configuration, with a limit to connections, and sockets that give up on clients after UNREAD_S.

    The server itself waits for a client that takes nothing for ever once its answer was given up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places = Places(CoordinatorSettings().max_connections)

    def create_sockets(self) -> Sockets:
        """Return the listening sockets."""
        sockets = super().create_sockets()
        for listening in (*sockets.secure_sockets, *sockets.insecure_sockets):
            patient(listening)
        return sockets

    async def serve(self, app: ASGI, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set."""
        await serve(cast("Framework", app), self, shutdown_trigger=stop.wait)

    async def cut(self, serving: asyncio.Task[None]) -> None:
        """Cancel a server that cannot stop, and its connections."""
        await _cut(serving)


def make_config(plain: Listener | None, secure: Listener | None) -> BoundedConfig:
    """Return Hypercorn's configuration for a plain and/or a TLS listener."""
    config = BoundedConfig()
    config.bind = [listener.address for listener in (secure or plain,) if listener]
    config.insecure_bind = [plain.address] if secure and plain else []
    if secure:
        config.certfile, config.keyfile = str(secure.cert), str(secure.key)
    # Over HTTP/2, data after an early answer kills a connection with all its streams; a front proxy may speak it.
    config.alpn_protocols = ["http/1.1"]
    config.graceful_timeout = server.GRACE_S
    config.shutdown_timeout = server.GRACE_S
    config.keep_alive_timeout = server.KEEP_ALIVE_S
    config.ssl_handshake_timeout = server.HANDSHAKE_S
    config.h11_max_incomplete_size = server.MAX_HEAD_BYTES
    config.websocket_max_message_size = server.MAX_WEBSOCKET_BYTES
    # The agent sends pings. The server's own would keep each closed channel for another interval, and hold up the end.
    config.websocket_ping_interval = None
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
