"""WebSocket on Hypercorn: frames as wsproto reads and writes them, in whatever pieces, and what breaks the rules."""

from __future__ import annotations

import asyncio
import gc
import itertools
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, RawData, Updated
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, TextMessage
from wsproto.events import Ping as TheirPing
from wsproto.events import Pong as TheirPong
from wsproto.utilities import generate_accept_token

from rma_coordinator.http1 import Http1
from rma_coordinator.mailbox import HAND_OVER, MOST_TOLD
from rma_coordinator.websocket import Socket
from rma_coordinator.websocket_frames import BINARY, CLOSE, PING, PONG, TEXT, End, Frames, Ping, closing, frame

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable

    from hypercorn.events import Event

    from rma_coordinator.websocket_frames import Found

MOST = 1000
MASK = b"\x01\x80\xfe\x37"


def raw(kind: int, payload: bytes = b"", *, first: int = 0x80, mask: bytes = MASK, size: bytes | None = None) -> bytes:
    """Return a client's frame; ``first`` are the bits beside its kind, ``size`` its length as it is to be written."""
    length = len(payload)
    if size is None:
        size = bytes([length]) if length < 126 else b"\x7e" + struct.pack("!H", length)
        size = size if length <= 0xFFFF else b"\x7f" + struct.pack("!Q", length)
    head = bytes([first | kind, size[0] | (0x80 if mask else 0)]) + size[1:] + mask
    return head + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload)) if mask else head + payload


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def ours(parts: Iterable[bytes], most: int = MOST) -> list[Found]:
    frames = Frames(most)
    return [found for part in parts for found in frames.feed(part)]


def theirs(parts: Iterable[bytes]) -> list[Found]:
    """Return what wsproto makes of it: messages put together, and its refusals as an end."""
    connection, found, message = Connection(ConnectionType.SERVER), list[Any](), list[Any]()
    for part in parts:
        if found and isinstance(found[-1], End):
            break
        connection.receive_data(part)
        for event in connection.events():
            if isinstance(event, Message):
                message.append(event.data if isinstance(event, TextMessage) else bytes(event.data))
                if event.message_finished:
                    joined: Any = "" if isinstance(event, TextMessage) else b""
                    found.append(joined.join(message))
                    message.clear()
            elif isinstance(event, TheirPing):
                found.append(Ping(bytes(event.payload)))
            elif isinstance(event, CloseConnection):
                code = int(event.code)
                found.append(End(code, b"" if code == 1005 else struct.pack("!H", code)))
    return found


MASKS = st.binary(min_size=4, max_size=4)
CONTROLS = st.tuples(st.sampled_from([PING, PONG]), st.binary(max_size=125))


@st.composite
def messages(draw: st.DrawFn) -> list[bytes]:
    """A message in any number of frames, with pings and pongs between them."""
    text = draw(st.booleans())
    body = draw(st.text(max_size=200)).encode()[:MOST] if text else draw(st.binary(max_size=400))
    parts, frames = pieces(body, draw(st.lists(st.integers(0, 400), max_size=3))) or [b""], list[bytes]()
    for number, part in enumerate(parts):
        frames += [raw(kind, data, mask=draw(MASKS)) for kind, data in draw(st.lists(CONTROLS, max_size=2))]
        kind = (TEXT if text else BINARY) if number == 0 else 0
        frames.append(raw(kind, part, first=0x80 if number == len(parts) - 1 else 0, mask=draw(MASKS)))
    return frames


#: What breaks the rules, or ends the connection, wherever it comes; and what only does between messages, or in one.
ENDS = {
    "a close without a reason": raw(CLOSE),
    "a close": raw(CLOSE, struct.pack("!H", 1000) + b"bye"),
    "a close with a code of an application": raw(CLOSE, struct.pack("!H", 4999)),
    "a close of one byte": raw(CLOSE, b"x"),
    "a close with a code that nobody sends": raw(CLOSE, struct.pack("!H", 1006)),
    "a close with a code that is kept for later": raw(CLOSE, struct.pack("!H", 1004)),
    "a close with a code that nobody registered": raw(CLOSE, struct.pack("!H", 2999)),
    "a close with a code that is too small": raw(CLOSE, struct.pack("!H", 999)),
    "a close with a code that is too large": raw(CLOSE, struct.pack("!H", 5000)),
    "a close with a reason that is no text": raw(CLOSE, struct.pack("!H", 1000) + b"\xff"),
    "a ping that is too long": raw(PING, bytes(126)),
    "a ping in parts": raw(PING, b"x", first=0),
    "a close in parts": raw(CLOSE, b"", first=0),
    "a kind that is none": raw(0x3, b"x"),
    "a kind of control that is none": raw(0xB, b"x"),
    "a bit that means nothing": raw(PING, b"x", first=0xC0),
    "another": raw(PING, b"x", first=0x90),
    "no mask": raw(PING, b"x", mask=b""),
    "a length in two bytes that needs one": raw(PING, b"x" * 3, size=b"\x7e\0\x03"),
    "a length in eight bytes that needs one": raw(PING, b"x" * 3, size=b"\x7f" + struct.pack("!Q", 3)),
}
BETWEEN = {
    "the rest of nothing": raw(0x0, b"x"),
    "a length in two bytes that just needs one": raw(BINARY, bytes(125), size=b"\x7e\0\x7d"),
    "a length in eight bytes that just needs two": raw(TEXT, bytes(0xFFFF), size=b"\x7f" + struct.pack("!Q", 0xFFFF)),
    "a text that is none": raw(TEXT, b"\xc3\x28"),
    "a text that is cut": raw(TEXT, "ä".encode()[:1]),
    "half of a pair": raw(TEXT, b"\xed\xa0\x80"),
}
WITHIN = {
    "a message in a message": raw(BINARY, b"x", first=0) + raw(BINARY, b"y"),
    "a text in a message": raw(BINARY, b"x", first=0) + raw(TEXT, b"y"),
    "a character cut by the end": raw(TEXT, b"\xe2\x82", first=0) + raw(0x0),
}


@given(
    st.lists(messages(), max_size=4).map(lambda found: b"".join(itertools.chain(*found))),
    st.sampled_from([b"", *ENDS.values(), *BETWEEN.values(), *WITHIN.values()]),
    st.lists(st.integers(0, 5000), max_size=12),
)
def test_frames_are_read_as_wsproto_reads_them_in_whatever_pieces_they_come(
    good: bytes, last: bytes, cuts: list[int]
) -> None:
    parts = pieces(good + last, cuts)
    assert ours(parts, most=10_000) == theirs(parts)


@given(st.lists(st.one_of(messages().map(b"".join), st.binary(max_size=40)), max_size=5), st.integers(0, 5000))
def test_whatever_comes_is_what_wsproto_makes_of_it_or_refused_as_there(data: list[bytes], cut: int) -> None:
    parts = pieces(b"".join(data), [cut])
    mine, its = ours(parts, most=2**63), theirs(parts)
    ended = [isinstance(found[-1], End) if found else False for found in (mine, its)]
    if ended == [False, True]:
        # It reads text as it comes; here that waits for the end of its message.
        assert its.pop() == End(1007, struct.pack("!H", 1007))
    elif ended == [True, True] and mine[-1] != its[-1]:
        # Of a text that is none and is not whole either it says the one, and we the other; 1014 was registered later.
        assert {mine.pop().code, its.pop().code} in ({1002, 1007}, {1002, 1014})  # type: ignore[union-attr]
    assert mine == its


@pytest.mark.parametrize("name", [*ENDS, *BETWEEN, *WITHIN])
def test_nothing_is_read_behind_the_end(name: str) -> None:
    last = {**ENDS, **BETWEEN, **WITHIN}[name]
    frames = Frames(MOST)
    (end,) = frames.feed(last + raw(TEXT, b"more"))
    assert isinstance(end, End), name
    assert frames.feed(raw(PING, b"x") * 3) == []


@pytest.mark.parametrize(
    "data",
    [
        raw(BINARY, bytes(MOST + 1)),
        raw(BINARY, bytes(MOST), first=0) + raw(PING, b"between") + raw(0x0, b"x"),
        # What was announced is not waited for.
        raw(BINARY, size=b"\x7e" + struct.pack("!H", MOST + 1)),
        raw(BINARY, size=b"\x7f" + struct.pack("!Q", 2**63 - 1)),
        raw(TEXT, size=b"\x7f" + struct.pack("!Q", 2**64 - 1)),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_a_message_that_is_too_long_is_refused_before_it_is_kept(data: bytes, size: int) -> None:
    frames = Frames(MOST)
    found = [one for at in range(0, len(data), size) for one in frames.feed(data[at : at + size])]
    assert found[-1] == End(1009, struct.pack("!H", 1009))
    assert len(frames._unread) + len(frames._parts) <= 2 * MOST + 14


def test_a_message_of_exactly_the_most_is_taken_and_the_next_one_too() -> None:
    halves = raw(BINARY, bytes(MOST // 2), first=0) + raw(0x0, bytes(MOST - MOST // 2))
    whole = raw(TEXT, b"x" * MOST)
    assert ours([halves + whole + halves]) == [bytes(MOST), "x" * MOST, bytes(MOST)]


def test_a_first_message_is_short_and_those_after_it_may_be_long() -> None:
    long, short = raw(BINARY, b"x" * 90), raw(BINARY, b"x" * 30)
    assert Frames(100, first=50).feed(long) == [End(1009, struct.pack("!H", 1009))]
    assert Frames(100, first=50).feed(short + long) == [b"x" * 30, b"x" * 90]


def test_parts_without_end_are_not_kept_beyond_the_most() -> None:
    frames = Frames(MOST)
    assert frames.feed(raw(TEXT, b"", first=0) + raw(0x0, b"", first=0) * 10_000) == []
    assert frames._parts == frames._unread == b""
    assert [type(one) for one in frames.feed(raw(0x0, b"x", first=0) * (MOST + 1))] == [End]


@given(st.one_of(st.text(max_size=300), st.binary(max_size=300), st.sampled_from([125, 126, 0xFFFF, 0x10000])))
def test_what_is_written_is_read_by_wsproto(said: str | bytes | int) -> None:
    said = bytes(said) if isinstance(said, int) else said
    client = Connection(ConnectionType.CLIENT)
    kind, data = (TEXT, said.encode()) if isinstance(said, str) else (BINARY, said)
    client.receive_data(
        frame(PING, b"there?") + frame(PONG, b"") + frame(kind, data) + closing(4400, "why: " + "ä" * 99)
    )
    ping, pong, message, close = client.events()
    assert (ping, pong) == (TheirPing(b"there?"), TheirPong(b""))
    assert isinstance(message, TextMessage | BytesMessage)
    assert (message.data, message.message_finished) == (said, True)
    assert isinstance(close, CloseConnection)
    assert (close.code, close.reason) == (4400, "why: " + "ä" * 59)


# -- a connection --------------------------------------------------------------------------------------------------

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
HANDSHAKE = [
    b"GET /room?a=b HTTP/1.1", b"Host: pool", b"Upgrade: websocket", b"Connection: keep-alive, Upgrade",
    b"Sec-WebSocket-Key: " + KEY, b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Extensions: permessage-deflate",
    b"Sec-WebSocket-Protocol: chat, other",
]  # fmt: skip


def asks(*without: bytes, more: Iterable[bytes] = ()) -> bytes:
    lines = [line for line in HANDSHAKE if not line.startswith(without or (b"\n",))]
    return b"\r\n".join([*lines, *more, b"", b""])


class Line:
    """One connection without a socket: what was sent on it, and whether it was closed."""

    def __init__(self, app: Callable[..., Awaitable[None]], group: asyncio.TaskGroup) -> None:
        self.sent, self.closed = b"", False
        self._app, self._group = app, group
        config = Config()
        config.websocket_max_message_size = MOST
        context = WorkerContext(None)
        self.http = Http1(self._run, config, context, self, {}, False, None, None, self._send)  # type: ignore[arg-type]

    async def _run(self, scope: dict[str, Any], receive: Any, send: Any, *_: Any) -> None:
        await self._app(scope, receive, send)

    def spawn(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._group.create_task(run())

    async def _send(self, event: Event) -> None:
        if isinstance(event, RawData):
            assert not self.closed, "it was closed"
            self.sent += event.data
        elif not isinstance(event, Updated) and not self.closed:
            self.closed = True
            await self.http.handle(Closed())

    async def take(self, data: bytes) -> None:
        await self.http.handle(RawData(data))
        for _ in range(5):
            await asyncio.sleep(0)


async def talk(*data: bytes, app: Any, leaves: bool = False) -> Line:
    """Send on one connection; return it once nobody answers on it any more."""
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        line = Line(app, group)
        for one in data:
            await line.take(one)
        if leaves:
            await line.http.handle(Closed())
    return line


class Room:
    """Lets everybody in, says back what it hears, and keeps what it was told."""

    def __init__(self) -> None:
        self.told = list[dict[str, Any]]()
        self.scope = dict[str, Any]()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.scope = scope
        while True:
            message = await receive()
            self.told.append(message)
            if message["type"] == "websocket.connect":
                await send({"type": "websocket.accept", "subprotocol": "chat", "headers": [(b"x-y", b"z")]})
            elif message["type"] == "websocket.receive":
                await send({**message, "type": "websocket.send"})
            else:
                return


async def test_who_asks_as_is_right_is_let_in_and_heard() -> None:
    room = Room()
    said = raw(TEXT, "ä".encode()) + raw(PING, b"there?") + raw(BINARY, b"\0\1", first=0) + raw(0x0, b"\2")
    line = await talk(asks(), said[:9], said[9:], raw(CLOSE, struct.pack("!H", 1001) + b"bye"), app=room)
    head, _, frames = line.sent.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"sec-websocket-accept: " + generate_accept_token(KEY) in head.split(b"\r\n")
    assert b"sec-websocket-protocol: chat" in head
    assert b"extensions" not in head
    assert b"x-y: z" in head
    echoes = {frame(TEXT, "ä".encode()), frame(PONG, b"there?"), frame(BINARY, b"\0\1\2")}
    assert all(one in frames for one in echoes)
    assert frames.endswith(frame(CLOSE, struct.pack("!H", 1001)))
    assert len(frames) == sum(map(len, echoes)) + 4
    assert line.closed
    assert room.told[-1] == {"type": "websocket.disconnect", "code": 1001}
    names = ("type", "path", "query_string", "scheme", "subprotocols")
    assert [room.scope[name] for name in names] == ["websocket", "/room", b"a=b", "ws", ["chat", "other"]]


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (asks(b"Sec-WebSocket-Key"), 400),
        (asks(b"Sec-WebSocket-Key", more=[b"Sec-WebSocket-Key: c2hvcnQ="]), 400),
        (asks(b"Sec-WebSocket-Key", more=[b"Sec-WebSocket-Key: \xff" + KEY]), 400),
        (asks(more=[b"Sec-WebSocket-Key: " + KEY]), 400),
        (asks(b"Sec-WebSocket-Version"), 400),
        (asks(b"Sec-WebSocket-Version", more=[b"Sec-WebSocket-Version: 8"]), 426),
        (asks() + raw(TEXT, b"too early"), 400),
    ],
)
async def test_a_handshake_that_is_none_is_refused_once_and_closed(asked: bytes, status: int) -> None:
    room = Room()
    line = await talk(asked, raw(TEXT, b"hello?"), app=room)
    assert line.sent.count(b"HTTP/1.1 ") == 1
    assert line.sent.startswith(b"HTTP/1.1 %d " % status)
    assert line.sent.endswith(b"\r\n\r\n")
    assert line.closed
    assert (b"sec-websocket-version: 13\r\n" in line.sent) is (b"Version: 13" not in asked)
    assert "websocket.receive" not in [message["type"] for message in room.told]


@pytest.mark.parametrize(("name", "last"), [*ENDS.items(), *BETWEEN.items(), *WITHIN.items()])
async def test_an_end_is_answered_told_and_nothing_is_said_behind_it(name: str, last: bytes) -> None:
    room = Room()
    line = await talk(asks(), last + raw(PING, b"x"), raw(TEXT, b"more"), app=room)
    (end,) = ours([last])
    assert isinstance(end, End)
    assert line.sent.partition(b"\r\n\r\n")[2] == frame(CLOSE, end.answer), name
    assert line.closed
    assert room.told[1:] == [{"type": "websocket.disconnect", "code": end.code}]


async def test_a_client_that_is_gone_without_a_word_is_told_as_that() -> None:
    room = Room()
    await talk(asks(), app=room, leaves=True)
    assert room.told[1:] == [{"type": "websocket.disconnect", "code": 1006}]


async def _closes(_scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.close", "code": 4401, "reason": "enough"})
    with pytest.raises(RuntimeError, match="no place"):
        await send({"type": "websocket.send", "text": "more"})


async def _fails(_scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    raise ValueError("it broke")


async def _explains(_scope: Any, _receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"7")]
    await send({"type": "websocket.http.response.start", "status": 401, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": b"who ", "more_body": True})
    await send({"type": "websocket.http.response.body", "body": b"are"})


async def _refuses(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "websocket.close"})


async def _says_nothing(_scope: Any, _receive: Any, _send: Any) -> None:
    """Neither let in nor refuse."""


@pytest.mark.parametrize(
    ("app", "status", "last"),
    [
        (_closes, 101, closing(4401, "enough")),
        (_fails, 101, closing(1011)),
        (_explains, 401, b"who are"),
        (_refuses, 403, b"\r\n\r\n"),
        (_says_nothing, 500, b"\r\n\r\n"),
    ],
)
async def test_what_an_application_does_is_what_its_client_is_told(app: Any, status: int, last: bytes) -> None:
    line = await talk(asks(), app=app)
    assert line.sent.startswith(b"HTTP/1.1 %d " % status)
    assert line.sent.endswith(last)
    assert line.sent.count(b"HTTP/1.1 ") == 1
    assert line.closed


async def test_an_application_that_does_not_listen_stops_who_talks() -> None:
    lets_in, listens = asyncio.Event(), asyncio.Event()
    heard = list[str]()

    async def deaf(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        lets_in.set()
        await listens.wait()
        while (message := await receive())["type"] == "websocket.receive":
            heard.append(message["text"])

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        line = Line(deaf, group)
        await line.take(asks())
        await lets_in.wait()
        talking = group.create_task(line.take(raw(TEXT, b"x") * 3 * MOST_TOLD + raw(CLOSE)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not talking.done()
        assert len(line.http.stream._told) == MOST_TOLD  # type: ignore[union-attr]
        listens.set()
    assert heard == ["x"] * 3 * MOST_TOLD
    assert line.closed


@given(
    data=st.lists(messages().map(b"".join), max_size=6),
    cuts=st.lists(st.integers(0, 2000), max_size=6),
    received=st.integers(0, 3),
    turns=st.integers(0, 6),
)
def test_what_is_handed_over_comes_once_and_behind_what_was_received(
    data: list[bytes], cuts: list[int], received: int, turns: int
) -> None:
    heard: list[Found] = []

    async def hears(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            heard.append(message["text"] if message["bytes"] is None else message["bytes"])
            if len(heard) == received:
                scope["extensions"][HAND_OVER](heard.extend)
            for _ in range(turns):
                await asyncio.sleep(0)

    said = b"".join(data)
    line = asyncio.run(talk(asks(), *pieces(said, cuts), raw(CLOSE), app=hears))
    assert heard == [found for found in ours([said]) if not isinstance(found, Ping)]
    assert line.closed


@pytest.mark.parametrize("asks_for_it", [True, False])
async def test_a_connection_that_is_over_is_not_left_to_the_collector(asks_for_it: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        if asks_for_it:
            scope["extensions"][HAND_OVER](scope.get)
        await receive()

    gc.collect()
    gc.disable()
    try:
        await talk(asks(), raw(CLOSE), app=app)
        assert not [one for one in gc.get_objects() if isinstance(one, Socket)]
    finally:
        gc.enable()


async def test_a_message_that_is_handed_over_is_there_before_anything_else_runs() -> None:
    heard: list[Found] = []
    handed_over = asyncio.Event()

    async def hears(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        scope["extensions"][HAND_OVER](heard.extend)
        await send({"type": "websocket.accept"})
        handed_over.set()
        assert (await receive())["type"] == "websocket.disconnect"

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        line = Line(hears, group)
        await line.take(asks())
        await handed_over.wait()
        with pytest.raises(StopIteration):
            line.http.handle(RawData(raw(TEXT, b"x") * 3 * MOST_TOLD)).__await__().__next__()
        assert heard == ["x"] * 3 * MOST_TOLD
        await line.take(raw(CLOSE))
    assert line.closed


class Slow(Line):
    """A connection on which sending takes some turns of the loop."""

    turns = 0

    async def _send(self, event: Event) -> None:
        for _ in range(self.turns):
            await asyncio.sleep(0)
        if not self.closed:
            await super()._send(event)


@given(
    data=st.lists(
        st.one_of(messages().map(b"".join), st.binary(max_size=20), st.sampled_from(list(ENDS.values()))), max_size=4
    ),
    cuts=st.lists(st.integers(0, 2000), max_size=4),
    app=st.sampled_from([Room, lambda: _closes, lambda: _explains, lambda: _refuses, lambda: _says_nothing]),
    turns=st.integers(0, 2),
)
def test_whatever_comes_nobody_is_left_waiting(data: list[bytes], cuts: list[int], app: Any, turns: int) -> None:
    async def run() -> None:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            line = Slow(app(), group)
            line.turns = turns
            for one in [asks(), *pieces(b"".join(data), cuts)]:
                await line.take(one)
            await line.http.handle(Closed())

    asyncio.run(run())
