"""HTTP/1.1 as llhttp reads it for Hypercorn: what h11 reads, refused where h11 refuses it, in whatever pieces."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import h11
import pytest
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, RawData, Updated
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator import server
from rma_coordinator.http1 import Cut, Http1
from rma_coordinator.http1_parser import Head, Parser, Refused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence

    from hypercorn.events import Event

Found = tuple[bytes, bytes, list[tuple[bytes, bytes]], bytes]

NAMES = st.sampled_from(["X-One", "x-two", "ACCEPT", "User-Agent", "Cookie", "Expect", "Connection"])
VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20).map(str.strip)
TARGETS = st.sampled_from(["/", "/v1/models?a=b&c", "/x%20y", "*", "http://pool/absolute", "/" + "a" * 200])
METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Any request that is one, its body by its length, in chunks, or none."""
    lines = [f"{draw(METHODS)} {draw(TARGETS)} HTTP/1.1", "Host: pool"]
    lines += [f"{name}:{draw(st.sampled_from(['', ' ', '  ']))}{draw(VALUES)}" for name in draw(st.lists(NAMES))]
    # One that closes the connection is the last, and what stands behind it is nobody's.
    lines = [line for line in lines if "close" not in line.lower()]
    body, framing = draw(st.binary(max_size=300)), draw(st.sampled_from(["none", "length", "chunks"]))
    if framing == "length":
        lines.append(f"content-Length: {len(body)}")
    elif framing == "chunks":
        lines.append("Transfer-Encoding: chunked")
        size = draw(st.integers(1, 100))
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        body = b"".join(b"%x;why=not\r\n%b\r\n" % (len(one), one) for one in pieces) + b"0\r\nTrailer: x\r\n\r\n"
    else:
        body = b""
    return "\r\n".join([*lines, "", ""]).encode() + body


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def ours(parts: Sequence[bytes]) -> list[Found]:
    parser, found = Parser(), list[Found]()
    for part in parts:
        for one in parser.feed(part):
            if isinstance(one, Head):
                found.append((one.method, one.target, one.headers, b""))
            elif one is not None:
                found[-1] = (*found[-1][:3], found[-1][3] + one)
    return found


def theirs(parts: Sequence[bytes]) -> list[Found]:
    connection, found = h11.Connection(h11.SERVER), list[Found]()
    for part in parts:
        connection.receive_data(part)
        while (event := connection.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.Request):
                found.append((event.method, event.target, list(event.headers), b""))
            elif isinstance(event, h11.Data):
                found[-1] = (*found[-1][:3], found[-1][3] + bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                connection.send(h11.EndOfMessage())
                connection.start_next_cycle()
    return found


@given(st.lists(requests(), min_size=1, max_size=4).map(b"".join), st.lists(st.integers(0, 5000), max_size=12))
def test_requests_are_read_as_h11_reads_them_in_whatever_pieces_they_come(data: bytes, cuts: list[int]) -> None:
    parts = pieces(data, cuts)
    assert ours(parts) == theirs(parts)


@given(st.lists(st.one_of(requests(), st.binary(max_size=40)), max_size=4).map(b"".join), st.integers(0, 5000))
def test_whatever_comes_is_requests_or_refused(data: bytes, cut: int) -> None:
    parser = Parser()
    with contextlib.suppress(Refused):
        for part in pieces(data, [cut]):
            for one in parser.feed(part):
                assert one is None or isinstance(one, bytes | Head)


HOST = b"GET / HTTP/1.1\r\nHost: pool\r\n"
POST = b"POST / HTTP/1.1\r\nHost: pool\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/0.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", 400),
        (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\nzz\r\n", 400),
        (HOST + b"X: a\r\n b\r\n\r\n", 400),
        (HOST + b"X : a\r\n\r\n", 400),
        (HOST + b"X: a\0\r\n\r\n", 400),
        (HOST + b"X: " + b"a" * server.MAX_HEAD_BYTES, 431),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX: " + b"a" * 2 * server.MAX_HEAD_BYTES, 431),
    ],
)
def test_what_is_in_doubt_is_refused(data: bytes, status: int) -> None:
    parts = [data[at : at + 10_000] for at in range(0, len(data), 10_000)]
    with pytest.raises(Refused) as refused:
        ours(parts)
    assert refused.value.status == status


# -- a connection --------------------------------------------------------------------------------------------------


class Line:
    """One connection without a socket: what was sent on it, and whether it was closed."""

    def __init__(self, app: Callable[..., Awaitable[None]], group: asyncio.TaskGroup) -> None:
        self.sent, self.closed, self.cut, self.idle = b"", False, False, True
        self._app, self._group = app, group
        context = WorkerContext(None)
        self.http = Http1(self._run, Config(), context, self, {}, False, None, None, self._send)  # type: ignore[arg-type]

    async def _run(self, scope: dict[str, Any], receive: Any, send: Any, *_: Any) -> None:
        await self._app(scope, receive, send)

    def spawn(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._group.create_task(run())

    async def _send(self, event: Event) -> None:
        if isinstance(event, RawData):
            self.sent += event.data
        elif isinstance(event, Updated):
            self.idle = event.idle
        elif not self.closed:
            self.closed, self.cut = True, isinstance(event, Cut)
            await self.http.handle(Closed())

    async def take(self, data: bytes) -> None:
        await self.http.handle(RawData(data))


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer with the body, its length said where the path says so."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    headers = [(b"content-length", b"%d" % len(body))] if scope["path"] == "/length" else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def talk(*data: bytes, app: Any = echo) -> Line:
    """Send on one connection; return it once nobody answers on it any more."""
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        line = Line(app, group)
        for one in data:
            await line.take(one)
    return line


def post(path: str, body: bytes, *more: bytes, version: bytes = b"1.1") -> bytes:
    lines = [b"POST %b HTTP/%b" % (path.encode(), version), b"Host: pool", b"Content-Length: %d" % len(body), *more]
    return b"\r\n".join([*lines, b"", b""]) + body


def bodies(line: Line, *methods: bytes) -> list[bytes]:
    """Return the answers' bodies as a client reads them."""
    client, found = h11.Connection(h11.CLIENT), list[bytes]()
    left = line.sent
    for method in methods:
        client.send(h11.Request(method=method, target="/", headers=[("host", "x"), ("content-length", "0")]))
        client.send(h11.EndOfMessage())
        client.receive_data(left)
        left, body = b"", b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            assert event is not h11.NEED_DATA, "an answer is not whole"
            if isinstance(event, h11.Data):
                body += bytes(event.data)
        found.append(body)
        if client.our_state is h11.DONE and client.their_state is h11.DONE:
            client.start_next_cycle()
    assert client.trailing_data[0] == b""
    return found


@pytest.mark.parametrize("path", ["/length", "/chunks"])
async def test_requests_one_behind_the_other_are_answered_in_order_on_one_connection(path: str) -> None:
    line = await talk(b"".join(post(path, body) for body in (b"one", b"", b"three")))
    assert bodies(line, b"POST", b"POST", b"POST") == [b"one", b"", b"three"]
    assert (line.closed, line.idle) == (False, True)


async def test_what_follows_a_good_request_and_is_none_is_refused_behind_its_answer() -> None:
    line = await talk(post("/length", b"good") + b"nonsense\r\n\r\n")
    assert bodies(line, b"POST", b"POST") == [b"good", b""]
    assert line.sent.count(b"HTTP/1.1 400 ") == 1
    assert line.closed


async def test_a_request_that_would_speak_http_2_is_answered_with_its_body() -> None:
    upgrade = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
    both = post("/length", b"first", *upgrade) + post("/length", b"second")
    for parts in ([both], [both[:-9], both[-9:]], [both[at : at + 1] for at in range(len(both))]):
        line = await talk(*parts)
        assert bodies(line, b"POST", b"POST") == [b"first", b"second"]


async def test_an_old_client_gets_an_answer_that_ends_with_the_connection() -> None:
    line = await talk(post("/chunks", b"old", version=b"1.0"))
    assert line.sent.endswith(b"\r\n\r\nold")
    assert b"connection: close" in line.sent
    assert line.closed


async def test_who_waits_to_be_asked_for_the_body_is_asked_once() -> None:
    head, _, body = post("/length", b"asked", b"Expect: 100-continue").partition(b"asked")
    assert body == b""
    line = await talk(head, b"asked")
    assert line.sent.startswith(b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 200 ")
    assert line.sent.count(b"HTTP/1.1 100 ") == 1


async def test_a_head_is_answered_without_a_body_and_without_a_lie() -> None:
    line = await talk(HOST.replace(b"GET", b"HEAD") + b"\r\n" + post("/length", b"next"))
    assert bodies(line, b"HEAD", b"POST") == [b"", b"next"]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param([b"too short"], id="shorter than it said"),
        pytest.param([b"x" * 20, b"more"], id="longer than it said"),
        pytest.param([], id="broken off"),
    ],
)
async def test_an_answer_that_is_not_what_it_said_never_looks_whole(answer: list[bytes]) -> None:
    async def lies(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"20")]})
        for number, body in enumerate(answer, 1):
            with contextlib.suppress(RuntimeError):
                await send({"type": "http.response.body", "body": body, "more_body": number < len(answer)})

    line = await talk(post("/", b""), app=lies)
    assert line.closed
    assert len(line.sent.partition(b"\r\n\r\n")[2]) <= 20


async def test_a_stream_that_breaks_off_has_no_end_marker() -> None:
    async def breaks(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})

    line = await talk(post("/", b""), app=breaks)
    assert line.sent.endswith(b"4\r\npart\r\n")
    assert line.closed
    old = await talk(post("/", b"", version=b"1.0"), app=breaks)
    assert old.sent.endswith(b"\r\n\r\npart")
    assert old.cut, "the end of the connection would look like that of the answer"


async def test_no_header_of_an_answer_can_add_another() -> None:
    async def injects(_scope: Any, _receive: Any, send: Any) -> None:
        with pytest.raises(RuntimeError, match="a line of its own"):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"a\r\nset-cookie: b")]})

    line = await talk(post("/", b""), app=injects)
    assert b"set-cookie" not in line.sent


async def test_an_answer_before_the_body_has_come_closes_the_connection() -> None:
    async def early(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    line = await talk(post("/", b"x" * 100)[:-50], app=early)
    assert line.sent.startswith(b"HTTP/1.1 413 ")
    assert line.closed


class Slow(Line):
    """A connection on which sending takes some turns of the loop."""

    turns = 0

    async def _send(self, event: Event) -> None:
        for _ in range(self.turns):
            await asyncio.sleep(0)
        await super()._send(event)


KINDS = ("echo", "early", "nothing", "broken off", "after a part")


@given(
    data=st.lists(st.one_of(requests(), st.sampled_from([b"nonsense\r\n\r\n", b"PO"])), max_size=4).map(b"".join),
    cuts=st.lists(st.integers(0, 2000), max_size=4),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1),
    turns=st.integers(0, 2),
)
def test_whatever_comes_and_however_it_is_answered_nobody_is_left_waiting(
    data: bytes, cuts: list[int], kinds: list[str], turns: int
) -> None:
    left = iter(kinds)

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        kind = next(left, "echo")
        if kind == "echo":
            await echo(scope, receive, send)
            return
        if kind == "after a part":
            await receive()
        if kind != "nothing":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"part", "more_body": kind == "broken off"})

    async def run() -> None:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            line = Slow(app, group)
            line.turns = turns
            for one in pieces(data, cuts):
                await line.take(one)
            for _ in range(turns):
                await asyncio.sleep(0)
            await line.http.handle(Closed())

    asyncio.run(run())
