"""HTTP/1.1 for Hypercorn, parsed by llhttp in place of h11: a third less of the server's share of a request.

It is as strict as h11: a request without one host, with a body whose length is in doubt, or with a head without end, is
refused. HTTP/2 without TLS is not spoken.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import httptools
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol.events import Body, Data, EndBody, Request, Response, StreamClosed
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.protocol.ws_stream import WSStream

from rma_coordinator import server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hypercorn.config import Config
    from hypercorn.events import Event
    from hypercorn.protocol.events import Event as StreamEvent
    from hypercorn.typing import AppWrapper, ConnectionState, TaskGroup, WorkerContext

    Headers = list[tuple[bytes, bytes]]

STREAM_ID = 1
#: Statuses of answers without a body, and the first that is an answer and no word on the way to one.
BODILESS, FINAL = frozenset({204, 304}), 200
BAD_REQUEST, TOO_LARGE, NOT_IMPLEMENTED = 400, 431, 501
CONTINUE = b"HTTP/1.1 100 \r\n\r\n"


class Head(NamedTuple):
    """A request, up to its body."""

    method: bytes
    target: bytes
    headers: Headers
    version: str
    keeps_alive: bool
    upgrades: bool = False
    expects: bool = False


class Refused(Exception):
    """What came is no request that could be answered; ``status`` is what it is told."""

    def __init__(self, status: int = BAD_REQUEST) -> None:
        super().__init__(status)
        self.status = status


class Parser:
    """Bytes in, and out of them the parts of requests: a `Head`, the bytes of its body, then None for its end."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._found: list[Head | bytes | None] = []
        self._url, self._headers = b"", list[tuple[bytes, bytes]]()
        self._keeps_alive = True
        #: Whether the last request is whole.
        self._ended = True
        #: Bytes since something came out of them.
        self._kept = 0
        #: What a request that would change the protocol says of its body, which llhttp does not read.
        self._framing: bytes | None = None
        self._in_head = self._resumes = False
        #: What follows the head of a WebSocket.
        self.rest: bytes | None = None

    def feed(self, data: bytes) -> list[Head | bytes | None]:
        """Return the parts that are whole now. Raises Refused, with what came before it in ``found``."""
        found: list[Head | bytes | None] = []
        self._found = found
        self._kept += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserCallbackError as error:
            raise error.__context__ if isinstance(error.__context__, Refused) else Refused from None
        except httptools.HttpParserError:
            # What follows a request after which the connection is closed is nobody's.
            if self._keeps_alive or not self._ended:
                raise Refused from None
        if found:
            self._kept = 0
        elif self._kept > server.MAX_HEAD_BYTES:
            raise Refused(TOO_LARGE)
        return found

    @property
    def found(self) -> list[Head | bytes | None]:
        """The parts that were whole before one was refused."""
        return self._found

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
                if self._framing is None:
                    self.rest = data
                    return
                self._resume()
            else:
                return

    def _resume(self) -> None:
        """Read on in a request that would have changed the protocol: it is answered as it is."""
        if self._framing:
            self._resumes = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % self._framing)
        self._framing = None

    # -- called by llhttp ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head, self._ended = not self._resumes, False
        self._url, self._headers = b"", []

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; those after a body say nothing to us."""
        if self._in_head:
            self._headers.append((name.lower(), value.strip()))

    def on_headers_complete(self) -> None:
        """The head is whole. Raises Refused."""
        if not self._in_head:
            return
        self._in_head = False
        parser, version = self._parser, self._parser.get_http_version()
        framing, upgrade, expects = _facts(self._headers, version)
        method = parser.get_method()
        websocket = upgrade == b"websocket" and method == b"GET" and parser.should_upgrade()
        if parser.should_upgrade() and not websocket:
            self._framing = framing
        self._keeps_alive = version == "1.1" and (parser.should_keep_alive() or self._framing is not None)
        self._found.append(
            Head(
                method, self._url, self._headers, version, self._keeps_alive, websocket,
                expects=expects and bool(framing) and version == "1.1",
            )
        )  # fmt: skip

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._found.append(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if not self._framing:
            self._resumes, self._ended = False, True
            self._found.append(None)


def _facts(headers: Headers, version: str) -> tuple[bytes, bytes, bool]:
    """Return a request's word on the length of its body, the protocol it wants, whether it waits. Raises Refused."""
    hosts, framing, upgrade, expects = 0, b"", b"", False
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            framing = b"content-length: %b\r\n" % value if value.strip(b"0") else b""
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked":
                raise Refused(NOT_IMPLEMENTED)
            framing = b"transfer-encoding: chunked\r\n"
        elif name == b"upgrade":
            upgrade = value.lower()
        elif name == b"expect":
            expects = value.lower() == b"100-continue"
    if hosts > 1 or (not hosts and version == "1.1"):
        raise Refused
    return framing, upgrade, expects


class Http1:
    """One connection, between Hypercorn's `TCPServer` and its streams; in place of its ``ProtocolWrapper``."""

    def __init__(  # noqa: PLR0917 - as Hypercorn calls it
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        task_group: TaskGroup,
        connection_state: ConnectionState,
        ssl: bool,  # noqa: FBT001 - the same
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
        send: Callable[[Event], Awaitable[None]],
        alpn_protocol: str | None = None,
    ) -> None:
        del alpn_protocol  # no other is offered
        self.app, self.config, self.context, self.task_group = app, config, context, task_group
        self.connection_state, self.ssl, self.client, self.server = connection_state, ssl, client, server
        self.send = send
        self.stream: HTTPStream | WSStream | None = None
        self._parser = Parser()
        self._free = asyncio.Event()
        self._head: Head | None = None
        #: Whether the body of the request is all here, its answer has begun, and has ended as it said.
        self._whole = self._begun = self._done = False
        #: Bytes that are left of an answer that said its length; -1 for one in chunks, ``None`` for one until the end.
        self._left: int | None = None
        self._closed = False

    async def initiate(self) -> None:
        """Nothing: a client begins."""

    async def handle(self, event: Event) -> None:
        """Take what came, or the end of the connection."""
        if isinstance(event, Closed):
            self._over()
            await self._close_stream()
        elif isinstance(event, RawData) and event.data and not self._closed:
            if self._parser.rest is None:
                await self._received(event.data)
            else:
                await self._frames(event.data)

    async def _received(self, data: bytes) -> None:
        refused: Refused | None = None
        try:
            found = self._parser.feed(data)
        except Refused as error:
            refused, found = error, self._parser.found
        for part in found:
            await self._part(part)
            if self._closed:
                return
        if refused is not None:
            # It may be the next request that is none.
            await self._until_free(only=self._whole)
            await self._refuse(refused.status)
        elif rest := self._parser.rest:
            await self._frames(rest)

    async def _frames(self, data: bytes) -> None:
        if self.stream is not None:
            await self.stream.handle(Data(stream_id=STREAM_ID, data=data))

    async def _part(self, part: Head | bytes | None) -> None:
        if isinstance(part, Head):
            # Its client may not have waited for the answer to the one before.
            await self._until_free()
            if not self._closed:
                await self._begin(part)
        elif self.stream is None or isinstance(self.stream, WSStream):
            return
        elif part is None:
            self._whole = True
            await self.stream.handle(EndBody(stream_id=STREAM_ID))
        else:
            await self.stream.handle(Body(stream_id=STREAM_ID, data=part))

    async def _until_free(self, *, only: bool = True) -> None:
        while only and self.stream is not None and not self._closed:
            self._free.clear()
            await self._free.wait()

    async def _begin(self, head: Head) -> None:
        await self.send(Updated(idle=False))
        self._head = head
        self._whole = self._begun = self._done = False
        kind = WSStream if head.upgrades else HTTPStream
        self.stream = kind(
            self.app, self.config, self.context, self.task_group, self.ssl, self.client, self.server, self.stream_send,
            STREAM_ID,
        )  # fmt: skip
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=head.headers,
                http_version=head.version,
                method=head.method.decode("ascii"),
                raw_path=head.target,
                state=self.connection_state,
            )
        )
        if head.expects and not self._begun:
            await self.send(RawData(CONTINUE))
        await self.context.mark_request()

    # -- answers -------------------------------------------------------------------------------------------------------

    async def stream_send(self, event: StreamEvent) -> None:
        """Send a part of an answer. Raises RuntimeError for one that is not as long as it said."""
        if isinstance(event, StreamClosed):
            await self._answered()
        elif self._closed or self._head is None:
            return
        elif isinstance(event, Response):
            await self.send(RawData(self._answer(event, self._head)))
        elif isinstance(event, Body):
            await self.send(RawData(self._framed(event.data)))
        elif isinstance(event, EndBody):
            await self._end()
        elif isinstance(event, Data):
            await self.send(RawData(event.data))

    def _answer(self, event: Response, head: Head) -> bytes:
        """Return the head of an answer, and note how its body is to be sent. Raises RuntimeError."""
        status, headers = event.status_code, [*event.headers, *self.config.response_headers("h11")]
        if status >= FINAL:
            self._begun = True
            self._left = -1
            closes = head.upgrades or not head.keeps_alive
            for name, value in event.headers:
                if name == b"content-length":
                    self._left = int(value)
                elif name == b"connection" and value.lower() == b"close":
                    closes = False  # it says so itself
                    self._head = head._replace(keeps_alive=False)
            if status in BODILESS or head.method == b"HEAD":
                self._left = 0
            elif self._left < 0 and head.version == "1.1":
                headers.append((b"transfer-encoding", b"chunked"))
            elif self._left < 0:
                self._left = None
            if closes:
                headers.append((b"connection", b"close"))
        lines = [b"HTTP/1.1 %d " % status, *[b"%b: %b" % header for header in headers], b"", b""]
        written = b"\r\n".join(lines)
        if written.count(b"\n") != len(lines) - 1 or written.count(b"\r") != len(lines) - 1 or b"\0" in written:
            raise RuntimeError("a header of an answer has a line of its own")
        return written

    def _framed(self, data: bytes) -> bytes:
        if self._left is None:
            return data
        if self._left < 0:
            return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        self._left -= len(data)
        if self._left < 0:
            self._left = 0
            raise RuntimeError("an answer is longer than it said")
        return data

    async def _end(self) -> None:
        if self._left is not None and self._left > 0:
            raise RuntimeError("an answer is shorter than it said")
        self._done = True
        if self._left == -1:
            await self.send(RawData(b"0\r\n\r\n"))

    async def _answered(self) -> None:
        """Wait for the next request, or close the connection where that cannot be."""
        await self._close_stream()
        goes_on = self._done and self._whole and self._head is not None and self._head.keeps_alive and not self._closed
        if goes_on and self._parser.rest is None and not self.context.terminated.is_set():
            self._head = None
            self._free.set()
            await self.send(Updated(idle=True))
        else:
            self._over()
            await self.send(Closed())

    async def _refuse(self, status: int) -> None:
        """Say that what came is no request, unless an answer has begun, and close."""
        if self._closed:
            return
        said = not self._begun or self._head is None
        self._over()
        if said:
            headers = [(b"content-length", b"0"), (b"connection", b"close"), *self.config.response_headers("h11")]
            lines = [b"HTTP/1.1 %d " % status, *[b"%b: %b" % header for header in headers], b"", b""]
            await self.send(RawData(b"\r\n".join(lines)))
        await self.send(Closed())

    def _over(self) -> None:
        self._closed = True
        self._free.set()

    async def _close_stream(self) -> None:
        if self.stream is not None:
            stream, self.stream = self.stream, None
            await stream.handle(StreamClosed(stream_id=STREAM_ID))
