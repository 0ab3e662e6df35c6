"""Requests to the engine, each on a connection of its own: to close it is how llama.cpp is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import h11

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rma_llama_cpp.keeper import Engine

#: Seconds until the engine takes a connection, and for an answer that needs no computing.
CONNECT_S, QUICK_S = 10.0, 10.0
#: Seconds the engine may be silent while it computes.
SILENCE_S = 3600.0
#: The longest answer that is kept in memory.
MOST_BYTES = 64 * 1024 * 1024
READ_BYTES = 65_536
_OK = 200


class Broken(Exception):
    """The engine's answer broke off, or never came."""


class Reply(NamedTuple):
    """A whole answer of the engine's."""

    status: int
    body: bytes


class Answering:
    """An answer as it comes."""

    def __init__(self, status: int, content_type: str, pieces: AsyncIterator[bytes]) -> None:
        """Take the head; ``pieces`` is the body, which raises Broken where it ends too soon."""
        self.status = status
        self.streams = status == _OK and content_type.startswith("text/event-stream")
        self.pieces = pieces

    async def whole(self) -> Reply:
        """Read the whole body. Raises Broken."""
        body = bytearray()
        async for piece in self.pieces:
            body += piece
            if len(body) > MOST_BYTES:
                raise Broken("the answer is too long")
        return Reply(self.status, bytes(body))

    async def events(self) -> AsyncIterator[bytes]:
        """Give the events of a stream, each without the empty line behind it. Raises Broken."""
        kept = bytearray()
        async for piece in self.pieces:
            kept += piece
            *events, rest = kept.split(b"\n\n")
            kept = bytearray(rest)
            for event in events:
                yield bytes(event)
            if len(kept) > MOST_BYTES:
                raise Broken("an event is too long")


@contextlib.asynccontextmanager
async def asked(engine: Engine, method: str, path: str, body: bytes = b"", *, silence_s: float = SILENCE_S) -> (
    AsyncIterator[Answering]
):  # fmt: skip
    """Send a request and give the answer; leaving early closes the connection. Raises Broken."""
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await engine.connect()
    except (OSError, TimeoutError) as error:
        raise Broken(f"llama.cpp cannot be reached: {error}") from None
    try:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=READ_BYTES)
        headers = [("Host", "engine"), ("Authorization", f"Bearer {engine.key}"), ("Connection", "close"),
                   ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]  # fmt: skip
        request = connection.send(h11.Request(method=method, target=path, headers=headers)) or b""
        writer.write(request + body)
        connection.send(h11.Data(data=body))
        connection.send(h11.EndOfMessage())
        head = await _event(reader, connection, silence_s)
        if not isinstance(head, h11.Response):
            raise Broken("llama.cpp closed the connection")
        kind = dict(head.headers).get(b"content-type", b"").decode("latin-1")
        yield Answering(head.status_code, kind, _pieces(reader, connection, silence_s))
    except (OSError, h11.ProtocolError) as error:
        raise Broken(f"llama.cpp broke off: {error}") from None
    finally:
        writer.transport.abort()


async def quick(engine: Engine, path: str) -> tuple[int, Any]:
    """Ask for something that needs no computing; returns status and JSON. Raises Broken."""
    try:
        async with asyncio.timeout(QUICK_S), asked(engine, "GET", path) as answering:
            reply = await answering.whole()
    except TimeoutError:
        raise Broken("llama.cpp is too busy to answer") from None
    try:
        return reply.status, json.loads(reply.body)
    except ValueError:
        raise Broken("llama.cpp gave no JSON") from None


async def _pieces(reader: asyncio.StreamReader, connection: h11.Connection, silence_s: float) -> AsyncIterator[bytes]:
    while True:
        event = await _event(reader, connection, silence_s)
        if isinstance(event, h11.EndOfMessage):
            return
        if not isinstance(event, h11.Data):
            raise Broken("llama.cpp closed the connection")
        yield bytes(event.data)


async def _event(reader: asyncio.StreamReader, connection: h11.Connection, silence_s: float) -> Any:  # noqa: ANN401
    # h11's events have no common type that it names in public.
    while True:
        event = connection.next_event()
        if event is not h11.NEED_DATA:
            return event
        try:
            # Not `wait_for`: before Python 3.12 it can lose a cancellation when data comes at the same moment.
            async with asyncio.timeout(silence_s):
                data = await reader.read(READ_BYTES)
        except TimeoutError:
            raise Broken(f"llama.cpp said nothing for {silence_s:g} s") from None
        connection.receive_data(data)
