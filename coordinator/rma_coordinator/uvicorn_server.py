"""The server for large pools: uvicorn, the extra ``rma-coordinator[uvicorn]``, under the same limits as Hypercorn here.

httptools parses without any limit of its own, and uvicorn waits for a request's head for ever: both are bounded here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import sys
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from rma_coordinator import server
from rma_coordinator.mailbox import AT_ONCE
from rma_coordinator.server import Places, Together, listening
from rma_coordinator.uvicorn_websocket import WebSocketLine
from rma_core.errors import SettingProblem
from rma_core.settings import CoordinatorSettings

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

    from rma_coordinator.app import ASGI
    from rma_coordinator.server import Listener

logger = logging.getLogger(__name__)

TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 31\r\n\r\nthe request's head is too large"
)
#: Requests of one connection that wait for the answer to the one before, until nothing more is read.
MOST_WAITING = 8
#: More requests than that wait for answers to others on one connection of nobody who means well.
MOST_AT_ONCE = 256
NO_UPGRADE = "No other protocol is spoken here: leave out Upgrade."
#: What says that a request has a body.
BODY = frozenset({b"content-length", b"transfer-encoding"})
#: What uvicorn calls an error although it is ours, or said elsewhere: an answer that is cut on purpose, because its
#: worker was lost; who sends nonsense; what is still open at the end.
EXPECTED = (
    "without completing response",
    "Invalid HTTP request received",
    "Unsupported upgrade request",
    "timeout graceful shutdown exceeded",
)


class UvicornServer:
    """Serves a plain and/or a TLS listener."""

    def __init__(self, plain: Listener | None, secure: Listener | None) -> None:
        self._listeners = [one for one in (secure, plain) if one is not None]
        self.places = Places(CoordinatorSettings().max_connections)
        self._server: _Server | None = None

    async def serve(self, app: ASGI, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set. Raises OSError for an address in use."""
        _quiet()
        config = uvicorn.Config(
            cast("Any", app),
            http=type("Http", (_Http,), {"places": self.places}),
            ws=cast("Any", WebSocketLine),
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(server.KEEP_ALIVE_S),
            timeout_graceful_shutdown=int(server.GRACE_S),
            ws_max_size=server.MAX_WEBSOCKET_BYTES,
        )
        sockets = [(listening(one), _context(one)) for one in self._listeners]
        self._server = _Server(config, sockets)
        stopping = asyncio.create_task(self._until(stop), name="uvicorn is told to stop")
        try:
            await self._server.serve()
        finally:
            stopping.cancel()
            for one, _ in sockets:
                one.close()

    async def _until(self, stop: asyncio.Event) -> None:
        await stop.wait()
        if self._server is not None:
            self._server.should_exit = True

    async def cut(self, serving: asyncio.Task[None]) -> None:
        """Cancel a server that cannot stop, and its connections."""
        state = self._server.server_state if self._server is not None else None
        ending = {serving, *(state.tasks if state is not None else ())}
        for one in list(state.connections) if state is not None else ():
            if (transport := getattr(one, "transport", None)) is not None:
                transport.abort()
        for task in ending:
            task.cancel()
        await asyncio.wait(ending, timeout=server.LAST_STOP_S)


class _Server(uvicorn.Server):
    """uvicorn's server on our sockets, each with a certificate or none; signals are not its business."""

    def __init__(self, config: uvicorn.Config, sockets: list[tuple[socket.socket, ssl.SSLContext | None]]) -> None:
        super().__init__(config)
        self._own = sockets

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs the coordinator."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen. Raises SettingProblem when the application could not start."""
        del sockets
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise SettingProblem("the coordinator could not start")
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                self._protocol,
                sock=one,
                ssl=context,
                backlog=server.BACKLOG,
                ssl_handshake_timeout=server.HANDSHAKE_S if context is not None else None,
            )
            for one, context in self._own
        ]
        self.started = True

    def _protocol(self) -> asyncio.Protocol:
        made: Any = self.config.http_protocol_class
        return cast(
            "asyncio.Protocol",
            made(config=self.config, server_state=self.server_state, app_state=self.lifespan.state),
        )


class _Transport(Together):
    """What an answer's head is written to; what follows goes to the transport itself."""

    to: asyncio.Transport

    def __init__(self, cycle: Any, loop: asyncio.AbstractEventLoop) -> None:  # noqa: ANN401 - uvicorn's own
        super().__init__(cycle.transport, loop)
        self._cycle = cycle

    def write(self, data: bytes) -> None:
        """Write, or keep a head for what follows."""
        super().write(data)
        if not self.keeps:
            self._cycle.transport = self.to

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the transport has
        return getattr(self.to, name)


class _AtOnce:
    """Writes the answer to one request at once, as an `AtOnce` does.

    Must be taken out of the request's scope: both would live on in each other.
    """

    __slots__ = ("_cycle",)

    def __init__(self, cycle: Any) -> None:  # noqa: ANN401 - uvicorn's own
        self._cycle = cycle

    def piece(self, data: bytes) -> bool:
        """Write a piece of an answer in chunks; an empty one would be its end."""
        cycle = self._cycle
        over = cycle.disconnected or cycle.response_complete
        if over or cycle.flow.write_paused or not (cycle.chunked_encoding and data):
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def whole(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Write a whole answer, unless one of its headers could add another."""
        cycle = self._cycle
        if cycle.flow.write_paused or cycle.disconnected or cycle.response_started or cycle.scope["method"] == "HEAD":
            return False
        lines = [b"%b: %b" % header for header in (*cycle.default_headers, *headers)]
        if not cycle.keep_alive:
            lines.append(b"connection: close")
        head = b"\r\n".join((STATUS_LINE[status][:-2], *lines, b"", b""))
        if head.count(b"\n") != len(lines) + 2 or head.count(b"\r") != len(lines) + 2 or b"\0" in head:
            return False
        # What is kept there, as that the client may go on, comes before it.
        cycle.transport.flush()
        transport = cycle.transport.to
        transport.write(head + body)
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            transport.close()
        cycle.on_response()
        return True


class TooMany(Exception):
    """A client sends requests without waiting for answers, more of them than anybody needs."""


class _Http(HttpToolsProtocol):
    """A connection that has a place among those there may be, and whose requests' heads are bounded."""

    places: Places

    def __init__(self, *arguments: Any, **more: Any) -> None:  # noqa: ANN401 - uvicorn's own
        super().__init__(*arguments, **more)
        self._placed = False
        #: Requests that were not answered when the next one came.
        self._before: list[Any] = []
        #: What is being parsed.
        self._piece = b""
        #: Whether what came is a request with a body that the parser would not read.
        self._refused = False
        #: Bytes since a head, a part of a body, or a request was whole.
        self._kept = 0
        #: Since when a request's head has been coming; 0 while none is.
        self._head_since = 0.0
        self._look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place, or close at once where there is none."""
        if not self.places.take():
            # No answer and no farewell: either could make us wait for somebody who means harm.
            self.transport = transport
            transport.abort()
            return
        self._placed = True
        super().connection_made(transport)
        self._head_since = self.loop.time()
        self._look = self.loop.call_later(server.KEEP_ALIVE_S, self._look_at_head)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back, and tell those whose answers are under way, not only the last."""
        self._look_no_more()
        for one in self._before:
            one.disconnected = True
            one.message_event.set()
        if self._placed:
            self._placed = False
            self.places.give()
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse a head without end, or trailers."""
        if not self._placed:
            return
        self._kept += len(data)
        self._piece = data
        super().data_received(data)
        self._piece = b""
        if self._refused and not self.transport.is_closing():
            self.send_400_response(NO_UPGRADE)
        elif self._kept > server.MAX_HEAD_BYTES and not self.transport.is_closing():
            if self._answers:
                self.transport.abort()
                return
            self.transport.write(TOO_LARGE)
            self.transport.close()

    @property
    def _answers(self) -> bool:
        """Whether an answer is under way: what is written beside it would be taken for a part of it."""
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request; break an answer that is under way."""
        if self._answers:
            self.transport.abort()
        else:
            super().send_400_response(msg)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head_since = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; those after a body say nothing to us."""
        if self._head_since:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request's head is here."""
        self._head_since, self._kept = 0.0, 0
        upgrades = self.parser.should_upgrade() and not self._should_upgrade()
        if upgrades and any(name in BODY and value.strip(b"0") for name, value in self.headers):
            self._refused = True
            return
        before: Any = self.cycle
        super().on_headers_complete()
        cycle: Any = self.cycle
        if cycle is not before:
            cycle.transport = _Transport(cycle, self.loop)
            self.scope["extensions"] = cast("Any", {AT_ONCE: _AtOnce(cycle)})
            # The parser reads nothing behind a request that would speak another protocol.
            cycle.keep_alive = cycle.keep_alive and not upgrades
            if before is not None and not before.response_complete:
                if len(self._before) > 2 * len(self.pipeline):
                    self._before = [one for one in self._before if not one.response_complete]
                self._before.append(before)
                if len(self.pipeline) > MOST_AT_ONCE:
                    # The parser ends with it, and so does the connection: an answer is under way.
                    raise TooMany
                if len(self.pipeline) <= MOST_WAITING:
                    # Who does not read does not see its client leave.
                    self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """A part of the body is here."""
        self._kept = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here."""
        self._kept = 0
        if not self._refused:
            super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection over, and its place with it."""
        self._look_no_more()
        if self._answers:
            # Whoever asks for one waits for the answers before it.
            self.transport.abort()
            return
        self.connections.discard(self)
        self._placed = False
        path, _, query = self.url.partition(b"?")
        target = {"path": unquote(path.decode("ascii")), "raw_path": path, "query_string": query}
        # It is called while the parser's word for that is handled, which says how far that has read.
        stopped = sys.exc_info()[1]
        early = self._piece[stopped.args[0] :] if isinstance(stopped, httptools.HttpParserUpgrade) else b""
        WebSocketLine(self, {**self.scope, **target}, self.places.give, early)

    def _look_at_head(self) -> None:
        """Close the connection when its request's head has not come in time.

        A timer for each request would cost more.
        """
        since, now = self._head_since, self.loop.time()
        if since and self._answers:
            # It came while the request before it is answered, which may take long.
            since = self._head_since = now
        if since and now - since >= server.KEEP_ALIVE_S:
            self._look = None
            self.transport.close()
        else:
            self._look = self.loop.call_later(server.KEEP_ALIVE_S - (now - since if since else 0.0), self._look_at_head)

    def _look_no_more(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None


def _context(listener: Listener) -> ssl.SSLContext | None:
    if listener.cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(listener.cert, listener.key)
    context.set_alpn_protocols(["http/1.1"])
    return context


class _Expected(logging.Filter):
    """Lets pass what uvicorn has to say beyond what we know better."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a line is written."""
        if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
            return False  # a call that was still open at the end
        return not any(words in str(record.msg) for words in EXPECTED)


def _quiet() -> None:
    """Write what uvicorn tells of its own life and of each bad request for nobody."""
    told = logging.getLogger("uvicorn.error")
    if not any(isinstance(one, _Expected) for one in told.filters):
        told.addFilter(_Expected())
    told.setLevel(logging.WARNING)
