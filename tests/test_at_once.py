"""Answers that a server writes without messages: the same bytes, and messages where something holds them up."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator.api.asgi import Call
from rma_coordinator.mailbox import AT_ONCE
from rma_coordinator.server import Listener, make_config
from tests import ports
from tests.coordinator_fixtures import connected, soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from rma_coordinator.app import ASGI

TEXT = (b"content-type", b"text/plain")
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@contextlib.asynccontextmanager
async def served(handler: Callable[[Any, Any, Any], Awaitable[None]]) -> AsyncIterator[int]:
    """Serve one handler of requests by a real server; what it raises fails the test."""
    failed: list[BaseException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        try:
            await handler(scope, receive, send)
        except BaseException as error:
            failed.append(error)
            raise

    port, stop = ports.free_port(), asyncio.Event()
    config = make_config(Listener("127.0.0.1", port), None, server=os.environ["RMA_TEST_SERVER"])
    asgi: ASGI = app
    serving = asyncio.create_task(config.serve(asgi, stop))
    try:
        await until(lambda: serving.done() or _listens(port))
        yield port
    finally:
        stop.set()
        await soon(serving)
    assert not failed, failed


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


async def said(port: int, *requests: bytes) -> list[bytes]:
    """Return the lines of what is answered until the connection is closed, without the time of day."""
    async with connected(port) as (reader, writer):
        writer.write(b"".join(requests))
        return [line for line in (await reader.read()).split(b"\r\n") if not line.startswith(b"date:")]


def whole(body: bytes) -> Callable[[Any, Any, Any], Awaitable[None]]:
    async def answers(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        headers = [TEXT, (b"content-length", b"%d" % len(body))]
        if scope["path"] == "/at-once":
            assert scope["extensions"].pop(AT_ONCE).whole(200, headers, body)
            return
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answers


async def in_pieces(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [TEXT]})
    for piece in (b"a", b"", b"b" * 300, "ü".encode()):
        if scope["path"] != "/at-once" or not scope["extensions"][AT_ONCE].piece(piece):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    del scope["extensions"]
    await send({"type": "http.response.body", "body": b""})


LAST = b"%b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize("handler", [whole(b"hello"), whole(b""), in_pieces], ids=["whole", "empty", "in pieces"])
@pytest.mark.parametrize(
    "request_of",
    [
        lambda path: LAST % (b"GET " + path),
        lambda path: b"GET %b HTTP/1.0\r\nhost: x\r\n\r\n" % path,
        lambda path: b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path + LAST % (b"GET " + path),
        lambda path: b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nab" % path + LAST % (b"GET " + path),
        lambda path: (
            b"POST %b HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\nab" % path
            + LAST % (b"GET " + path)
        ),
    ],
    ids=["the last", "an old client", "two at once", "with a body", "that waits to go on"],
)
async def test_it_is_the_answer_that_messages_make(handler: Any, request_of: Any) -> None:
    async with served(handler) as port:
        by_messages, at_once = await said(port, request_of(b"/")), await said(port, request_of(b"/at-once"))
    assert any(line.startswith(b"HTTP/1.1 200 ") for line in by_messages)
    assert at_once == by_messages


@pytest.mark.parametrize(
    "header", [(b"x", b"a\r\nset-cookie: b"), (b"x\r\ny", b"a"), (b"x", b"a\nb"), (b"x", b"a\0")], ids=repr
)
async def test_no_header_of_it_can_add_another(header: tuple[bytes, bytes]) -> None:
    async def injects(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert not scope["extensions"].pop(AT_ONCE).whole(200, [header, (b"content-length", b"1")], b"x")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"y"})

    async with served(injects) as port:
        lines = await said(port, LAST % b"GET /")
    assert (lines[0][:13], lines[-5:]) == (b"HTTP/1.1 200 ", [b"1", b"y", b"0", b"", b""])
    assert not [line for line in lines if b"cookie" in line or line.startswith(b"x")]


async def test_what_has_no_place_is_not_written() -> None:
    told: list[bool] = []

    async def answers(scope: Any, receive: Any, send: Any) -> None:
        at_once = scope["extensions"].pop(AT_ONCE)
        await receive()
        headers = [(b"content-length", b"1")]
        told.append(at_once.piece(b"before the head"))
        if scope["method"] == "HEAD":
            told.append(at_once.whole(200, headers, b"x"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        told.extend((at_once.piece(b"beside a length"), at_once.whole(200, headers, b"x")))
        await send({"type": "http.response.body", "body": b"y"})
        told.extend((at_once.piece(b"behind the end"), at_once.whole(200, headers, b"x")))

    async with served(answers) as port:
        for method, last in ((b"HEAD /", b""), (b"GET /", b"y")):
            assert (await said(port, LAST % method))[-1] == last
    assert told == [False] * 11


async def test_who_has_answered_writes_nothing_into_the_next_answer() -> None:
    first, begun, told = list[Any](), asyncio.Event(), list[bool]()

    async def answers(scope: Any, receive: Any, send: Any) -> None:
        at_once = scope["extensions"].pop(AT_ONCE)
        await receive()
        last = bool(first)
        first.append(at_once)
        if last:
            told.append(first[0].whole(200, [(b"content-length", b"1")], b"x"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"y", "more_body": True})
        if last:
            told.append(first[0].piece(b"z"))
            begun.set()
        await send({"type": "http.response.body", "body": b""})
        await soon(begun.wait())

    async with served(answers) as port:
        lines = await said(port, GET + LAST % b"GET /")
    assert told == [False, False]
    assert lines.count(b"y") == 2
    assert not {b"x", b"z"} & set(lines)


async def test_who_does_not_read_or_has_left_is_written_nothing() -> None:
    wrote, held_up, left, over = [0], asyncio.Event(), asyncio.Event(), asyncio.Event()
    piece = b"x" * 100_000

    async def streams(scope: Any, receive: Any, send: Any) -> None:
        at_once = scope["extensions"].pop(AT_ONCE)
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while at_once.piece(piece):
            wrote[0] += 1
            await asyncio.sleep(0)
        held_up.set()
        await left.wait()
        assert (await receive())["type"] == "http.disconnect"
        assert not at_once.piece(piece)
        over.set()

    async with served(streams) as port:
        async with connected(port) as (_, writer):
            writer.write(GET)
            await soon(held_up.wait())
            writer.transport.abort()
        left.set()
        await soon(over.wait())
    # What the systems' buffers take, and no more.
    assert 0 < wrote[0] < 500


async def test_a_large_answer_is_waited_for_as_one_of_messages_is() -> None:
    # More than the systems' buffers take.
    body, returned = b"x" * 32_000_000, asyncio.Event()

    async def answers(scope: Any, receive: Any, send: Any) -> None:
        call = Call(scope, receive, send)
        await call.body()
        await call.give(200, [TEXT], body)
        returned.set()

    async with served(answers) as port, connected(port) as (reader, writer):
        writer.write(GET)
        await soon(reader.readuntil(b"\r\n\r\n"))
        # uvicorn's server waits before it writes, and not for what it writes last.
        assert returned.is_set() == (os.environ["RMA_TEST_SERVER"] == "uvicorn")
        assert await soon(reader.readexactly(len(body))) == body
        await soon(returned.wait())


async def test_a_call_leaves_none_of_it_to_the_collector() -> None:

    async def answers(scope: Any, receive: Any, send: Any) -> None:
        call = Call(scope, receive, send)
        await call.body()
        await call.give(200, [TEXT], b"hello")

    gc.collect()
    gc.disable()
    try:
        async with served(answers) as port:
            async with connected(port) as (reader, writer):
                writer.write(GET)
                assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200 ")
            await until(lambda: not [one for one in gc.get_objects() if type(one).__name__ in {"_AtOnce", "Exchange"}])
    finally:
        gc.enable()
