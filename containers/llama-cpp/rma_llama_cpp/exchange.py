"""One client's connection: requests under limits, answers whole or piece by piece, and whether it is still there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import h11

from rma_llama_cpp.upstream import Broken

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

#: A conversation of a million tokens is about this long.
MOST_BODY_BYTES = 8 * 1024 * 1024
MOST_HEAD_BYTES = 32 * 1024
#: Seconds for the next request on a connection, for the whole of one, and for a client to take what it is sent.
IDLE_S, BODY_S, WRITE_S = 75.0, 60.0, 60.0
#: What is still taken of a body that was refused.
LINGER_S, LINGER_BYTES = 2.0, 32 * 1024 * 1024
#: Connections at once; each costs a task and two buffers.
MOST_CONNECTIONS = 256
READ_BYTES = 65_536


class Gone(Exception):
    """The client left, or takes nothing any more."""


class Refused(Exception):
    """A request is answered with an error in OpenAI's form."""

    def __init__(self, status: int, kind: str, message: str, *, retry_after_s: int | None = None) -> None:
        """Keep what the answer says."""
        super().__init__(message)
        self.status, self.kind, self.message, self.retry_after_s = status, kind, message, retry_after_s


class Request(NamedTuple):
    """A whole request; its headers matter to nobody further on."""

    method: str
    path: str
    query: str
    body: bytes


def problem(status: int, kind: str, message: str) -> dict[str, Any]:
    """Return an error as llama.cpp and OpenAI write it."""
    return {"error": {"code": status, "message": message, "type": kind}}


async def answered(exchange: Exchange, status: int, told: object, **headers: str) -> None:
    """Answer with JSON. Raises Gone."""
    await exchange.whole(status, json.dumps(told).encode(), **headers)


class Exchange:
    """The server's side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a connection that was just accepted."""
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_HEAD_BYTES)

    async def request(self) -> Request | None:
        """Return the next request, or None when there is none any more. Raises Refused, Gone."""
        try:
            async with asyncio.timeout(IDLE_S):
                head = await self._event()
        except (TimeoutError, h11.RemoteProtocolError, OSError):
            return None
        if not isinstance(head, h11.Request):
            return None
        target = urlsplit(head.target.decode("ascii", "replace"))
        method = head.method.decode("ascii")
        headers = {bytes(name): bytes(value) for name, value in head.headers}
        if method == "POST":
            self._check(headers)
        if self._http.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[]))
        try:
            async with asyncio.timeout(BODY_S):
                body = await self._body()
        except TimeoutError:
            raise Refused(408, "invalid_request_error", "the body did not arrive in time") from None
        except (h11.RemoteProtocolError, OSError):
            raise Gone from None
        return Request(method, target.path, target.query, body)

    def _check(self, headers: dict[bytes, bytes]) -> None:
        # A page in a browser can send other types anywhere without asking first.
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise Refused(415, "invalid_request_error", "the body has to be application/json")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refused(415, "invalid_request_error", "a packed body is not read here")
        length = headers.get(b"content-length", b"0")
        if len(length) > 12 or int(length) > MOST_BODY_BYTES:  # noqa: PLR2004 - digits enough for any length
            raise Refused(413, "invalid_request_error", f"the body is longer than {MOST_BODY_BYTES} bytes")

    async def _body(self) -> bytes:
        body = bytearray()
        while not isinstance(event := await self._event(), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                raise Gone
            body += event.data
            if len(body) > MOST_BODY_BYTES:
                raise Refused(413, "invalid_request_error", f"the body is longer than {MOST_BODY_BYTES} bytes")
        return bytes(body)

    async def _event(self) -> Any:  # noqa: ANN401 - h11's events have no common type that it names in public
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(READ_BYTES))
        return event

    async def until_gone(self) -> None:
        """Return when the client has closed its side; what it sends meanwhile is kept, up to a limit."""
        kept = 0
        while kept < READ_BYTES:
            try:
                data = await self._reader.read(READ_BYTES)
            except OSError:
                return
            if not data:
                return
            kept += len(data)
            self._http.receive_data(data)

    async def whole(self, status: int, body: bytes, **headers: str) -> None:
        """Send a whole JSON answer. Raises Gone."""
        listed = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers.items()]
        if self._http.their_state is not h11.DONE:
            listed.append(("Connection", "close"))
        await self._send(h11.Response(status_code=status, headers=listed), h11.Data(data=body), h11.EndOfMessage())

    async def begin_stream(self) -> None:
        """Send the head of a stream of events. Raises Gone."""
        listed = [("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache")]
        await self._send(h11.Response(status_code=200, headers=listed))

    async def piece(self, data: bytes) -> None:
        """Send a piece of a stream. Raises Gone."""
        await self._send(h11.Data(data=data))

    async def end_stream(self) -> None:
        """Say that the stream is complete. Raises Gone."""
        await self._send(h11.EndOfMessage())

    @property
    def begun(self) -> bool:
        """Whether the head of an answer has been sent."""
        return self._http.our_state in {h11.SEND_BODY, h11.DONE, h11.MUST_CLOSE}

    async def _send(self, *events: Any) -> None:  # noqa: ANN401 - as above
        try:
            self._writer.write(b"".join(self._http.send(event) or b"" for event in events))
            async with asyncio.timeout(WRITE_S):
                await self._writer.drain()
        except (OSError, TimeoutError) as error:
            raise Gone from error

    def again(self) -> bool:
        """Whether another request can follow on this connection, and get ready for it."""
        if (self._http.our_state, self._http.their_state) != (h11.DONE, h11.DONE):
            return False
        self._http.start_next_cycle()
        return True

    async def close(self) -> None:
        """Close the connection once what was sent is out; one that is in the middle of an answer breaks off."""
        if self._http.our_state is h11.SEND_BODY:
            self._writer.transport.abort()
            return
        if self._http.their_state is h11.SEND_BODY:
            await self._linger()
        self._writer.close()

    async def _linger(self) -> None:
        """Take the rest of a body that was refused for a while: closed at once, the refusal itself would be lost."""
        left = LINGER_BYTES
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while left > 0 and (data := await self._reader.read(READ_BYTES)):
                    left -= len(data)


async def serve(exchange: Exchange, answer: Callable[[Exchange, Request], Awaitable[None]]) -> None:
    """Answer the requests of one connection until it ends."""
    try:
        more = True
        while more:
            try:
                request = await exchange.request()
                if request is None:
                    return
                await _unless_gone(exchange, answer(exchange, request))
            except Refused as refused:
                headers = {} if refused.retry_after_s is None else {"Retry-After": str(refused.retry_after_s)}
                told = problem(refused.status, refused.kind, refused.message)
                await answered(exchange, refused.status, told, **headers)
            except Broken as broken:
                logger.warning("an answer broke off: %s", broken)
                if exchange.begun:
                    return
                await answered(exchange, 502, problem(502, "server_error", "the model server broke off"))
            more = exchange.again()
    except Gone:
        return
    finally:
        await exchange.close()


async def _unless_gone(exchange: Exchange, answering: Awaitable[None]) -> None:
    """Let an answer be made; it is given up as soon as the client leaves. Raises Gone."""
    work = asyncio.ensure_future(answering)
    gone = asyncio.create_task(exchange.until_gone(), name="is the client there")
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Gone
        await work
    finally:
        for task in (work, gone):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((work, gone))
        # Its failure was told above, or the client that would be told is not there.
        if work.done() and not work.cancelled():
            work.exception()
