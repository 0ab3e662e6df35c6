"""The client for services on this machine, against real servers that close, stall, flood and break off."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from rma_core.agent import endpoint as endpoint_module
from rma_core.agent.connection import BUFFER_BYTES
from rma_core.agent.endpoint import KEPT_CONNECTIONS, READ_BYTES, Endpoint, EndpointError
from rma_core.errors import UsageProblem
from tests.agent_service import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from rma_core.agent.endpoint import Answer

    Handler = Callable[["Service", asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
EARLY = b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 9\r\n\r\ntoo large"


class Service:
    """A server whose handler gets each connection with its number; what it heard can be seen afterwards."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""
        self.connections = 0
        self.heads: list[str] = []
        self.left = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            await self._handler(self, reader, writer, self.connections)
        except (OSError, asyncio.IncompleteReadError):
            self.left.set()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def head(self, reader: asyncio.StreamReader) -> str:
        text = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(text)
        return text

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def serving(handler: Handler, *, path: str = "") -> AsyncIterator[Service]:
    service = Service(handler)
    if path:
        server: asyncio.Server = await asyncio.start_unix_server(service.serve, path)
        service.address = f"unix:{path}"
    else:
        server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
        service.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield service
    finally:
        server.close()
        await service.close()
        await server.wait_closed()


@contextlib.asynccontextmanager
async def reached(handler: Handler, **options: Any) -> AsyncIterator[tuple[Service, Endpoint]]:
    async with serving(handler) as service:
        endpoint = Endpoint(service.address, **options)
        try:
            yield service, endpoint
        finally:
            await endpoint.aclose()


async def whole(answer: Answer) -> bytes:
    body = bytearray()
    try:
        while piece := await answer.read(65536, within_s=PATIENCE_S):
            body += piece
    finally:
        await answer.aclose()
    return bytes(body)


async def polite(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
    """Answer one request after the other."""
    while True:
        await service.head(reader)
        writer.write(OK)


async def ask(endpoint: Endpoint, method: str = "GET", **options: Any) -> bytes:
    return await whole(await endpoint.request(method, "/", answer_s=PATIENCE_S, **options))


async def endless() -> AsyncGenerator[bytes, None]:
    while True:
        yield b"x" * 65536


# Connections.


async def test_one_connection_serves_one_request_after_the_other() -> None:
    async with reached(polite) as (service, endpoint):
        assert [await ask(endpoint) for _ in range(5)] == [b"ok"] * 5
        assert service.connections == 1


async def test_only_so_many_connections_are_kept() -> None:
    async with reached(polite) as (service, endpoint):
        await asyncio.gather(*(ask(endpoint) for _ in range(KEPT_CONNECTIONS + 4)))
        assert service.connections == KEPT_CONNECTIONS + 4
        await asyncio.gather(*(ask(endpoint) for _ in range(KEPT_CONNECTIONS)))
        assert service.connections == KEPT_CONNECTIONS + 4


async def test_a_connection_that_was_kept_for_too_long_by_the_clock_is_not_used() -> None:
    now = 100.0
    async with reached(polite, clock=lambda: now) as (service, endpoint):
        await ask(endpoint)
        now += endpoint_module.ENDPOINT_KEEP_S
        await ask(endpoint)
        assert service.connections == 2


async def test_a_connection_that_nobody_uses_is_closed_without_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "ENDPOINT_KEEP_S", 0.05)
    async with reached(polite) as (service, endpoint):
        await ask(endpoint)
        async with asyncio.timeout(PATIENCE_S):
            await service.left.wait()


async def test_a_kept_connection_that_the_service_closed_is_not_used() -> None:
    async def closes(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await service.head(reader)
        writer.write(OK)

    async with reached(closes) as (service, endpoint):
        await ask(endpoint)
        await eventually(lambda: not endpoint._open)
        await ask(endpoint)
        assert (service.connections, len(service.heads)) == (2, 2)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_request_on_a_kept_connection_that_just_closes_is_tried_once_more(method: str) -> None:
    async def drops(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await service.head(reader)
        writer.write(OK)
        await service.head(reader)
        if number > 1:
            writer.write(OK)

    async with reached(drops) as (service, endpoint):
        await ask(endpoint)
        assert await ask(endpoint, method, body=b"body") == b"ok"
        assert (service.connections, len(service.heads)) == (2, 3)


async def test_a_request_on_a_new_connection_is_not_tried_again() -> None:
    async def drops(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await service.head(reader)

    async with reached(drops) as (service, endpoint):
        with pytest.raises(EndpointError, match="closed the connection"):
            await ask(endpoint)
        assert service.connections == 1


async def test_a_request_whose_answer_had_begun_is_not_tried_again() -> None:
    async def stutters(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await service.head(reader)
        writer.write(OK)
        await service.head(reader)
        writer.write(b"HTTP/1.1 2")

    async with reached(stutters) as (service, endpoint):
        await ask(endpoint)
        with pytest.raises(EndpointError, match="closed the connection"):
            await ask(endpoint)
        assert service.connections == 1


async def test_bytes_that_nobody_asked_for_end_a_kept_connection() -> None:
    async def chatty(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await service.head(reader)
        writer.write(OK)
        await writer.drain()
        if number == 1:
            await eventually(lambda: endpoint._idle)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
            await reader.read()

    async with reached(chatty) as (_, endpoint):
        assert await ask(endpoint) == b"ok"
        await eventually(lambda: not endpoint._open)
        assert await ask(endpoint) == b"ok"


async def test_an_answer_that_is_not_read_to_its_end_closes_its_connection() -> None:
    async def half(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await service.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        await reader.readexactly(1)

    async with reached(half) as (service, endpoint):
        answer = await endpoint.request("GET", "/")
        assert await answer.read(100) == b"half"
        await answer.aclose()
        async with asyncio.timeout(PATIENCE_S):
            await service.left.wait()
        assert not endpoint._open


async def test_an_address_where_nobody_listens_is_told() -> None:
    async with serving(polite) as service:
        pass
    endpoint = Endpoint(service.address)
    with pytest.raises(EndpointError, match="no connection"):
        await endpoint.request("GET", "/")
    with pytest.raises(EndpointError, match="no connection"):
        await Endpoint("unix:/nowhere/at/all").request("GET", "/")


async def test_a_service_whose_queue_is_full_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "ENDPOINT_CONNECT_S", 0.2)

    async def never(*_: object) -> None:
        await asyncio.sleep(PATIENCE_S)

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", never)
    with pytest.raises(EndpointError, match=r"no connection within 0\.2 s"):
        await Endpoint("http://127.0.0.1:9").request("GET", "/")


async def test_closing_breaks_off_what_is_being_read_and_begins_nothing_new() -> None:
    async def half(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await service.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        await reader.readexactly(1)

    async with reached(half) as (_, endpoint):
        answer = await endpoint.request("GET", "/")
        reading = asyncio.create_task(answer.read(100))
        await asyncio.sleep(0)
        await endpoint.aclose()
        with pytest.raises(EndpointError, match="being stopped"):
            await reading
        await answer.aclose()
        with pytest.raises(EndpointError, match="being stopped"):
            await endpoint.request("GET", "/")


# What goes out.


async def test_a_body_goes_with_its_length_or_in_chunks() -> None:
    async def echo(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        head = await service.head(reader)
        body = await (reader.readuntil(b"0\r\n\r\n") if "chunked" in head else reader.readexactly(4))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body)

    async def pieces() -> AsyncGenerator[bytes, None]:
        for piece in (b"ab", b"", b"cd"):
            yield piece

    async with reached(echo) as (service, endpoint):
        assert await ask(endpoint, "POST", body=b"abcd") == b"abcd"
        assert await ask(endpoint, "POST", body=pieces(), length=4) == b"abcd"
        assert await ask(endpoint, "POST", body=pieces()) == b"2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n"
        assert ["Content-Length: 4" in head for head in service.heads] == [True, True, False]


@pytest.mark.parametrize(("length", "says"), [(3, "longer"), (9, "shorter")])
async def test_a_body_of_another_length_than_announced_ends_the_request(length: int, says: str) -> None:
    async def pieces() -> AsyncGenerator[bytes, None]:
        yield b"ab"
        yield b"cd"

    async with reached(polite_after_all) as (_, endpoint):
        with pytest.raises(EndpointError, match=says):
            await ask(endpoint, "POST", body=pieces(), length=length)
        await eventually(lambda: not endpoint._open)


async def polite_after_all(
    service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int
) -> None:
    """Read everything there is before the answer."""
    await service.head(reader)
    await reader.read()
    writer.write(OK)


async def test_what_the_source_of_a_body_raises_comes_through_and_closes_the_connection() -> None:
    async def breaks() -> AsyncGenerator[bytes, None]:
        yield b"x"
        raise LookupError("gone")

    async with reached(polite_after_all) as (_, endpoint):
        with pytest.raises(LookupError, match="gone"):
            await ask(endpoint, "POST", body=breaks(), length=2)
        await eventually(lambda: not endpoint._open)


async def test_a_service_that_takes_nothing_more_of_a_body_is_found_out() -> None:
    async def deaf(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await asyncio.sleep(PATIENCE_S)

    async with reached(deaf) as (_, endpoint):
        with pytest.raises(EndpointError, match=r"nothing more of the request was taken for 0\.2 s"):
            await ask(endpoint, "POST", body=endless(), write_s=0.2)


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("@elsewhere/", []),
        ("/a b", []),
        ("/a\r\nX: y", []),
        ("/ü", []),
        ("http://elsewhere/", []),
        ("/", [("x\r\ny", "z")]),
        ("/", [("x", "y\r\nz: 1")]),
        ("/", [("x", "y\nz")]),
        ("/", [("x", "y\0")]),
        ("/", [("", "y")]),
        ("/", [("x y", "z")]),
        ("/", [("Content-Length", "5")]),
        ("/", [("transfer-encoding", "chunked")]),
        ("/", [("Host", "elsewhere")]),
    ],
)
async def test_what_would_change_a_requests_meaning_is_never_sent(path: str, headers: list[tuple[str, str]]) -> None:
    async with reached(polite) as (service, endpoint):
        with pytest.raises(UsageProblem):
            await endpoint.request("GET", path, headers=headers)
        assert service.connections == 0


async def test_nothing_of_the_environment_changes_where_a_request_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with reached(polite) as (service, endpoint):
        assert await ask(endpoint) == b"ok"
        assert service.heads[0].startswith("GET / HTTP/1.1\r\nHost: 127.0.0.1:")


# What comes back.


async def test_a_redirect_is_an_answer_like_any_other() -> None:
    async def elsewhere(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await service.head(reader)
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n")

    async with reached(elsewhere) as (service, endpoint):
        answer = await endpoint.request("GET", "/")
        assert (answer.status, dict(answer.headers)["location"]) == (302, "http://evil.example/")
        await answer.aclose()
        assert len(service.heads) == 1


@pytest.mark.parametrize("unix", [False, True])
@pytest.mark.parametrize("reads", [0, 100_000])
async def test_an_answer_before_the_requests_body_was_taken_is_the_answer(
    tmp_path: Any, unix: bool, reads: int
) -> None:
    async def refuses(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await service.head(reader)
        await reader.readexactly(reads)
        writer.write(EARLY)

    async with serving(refuses, path=str(tmp_path / "s") if unix else "") as service:
        endpoint = Endpoint(service.address)
        for _ in range(20):
            answer = await endpoint.request("POST", "/", body=endless(), length=2**40, write_s=PATIENCE_S)
            assert (answer.status, await whole(answer)) == (413, b"too large")
        assert not endpoint._idle
        await endpoint.aclose()


async def test_a_service_that_answers_while_it_reads_gets_the_rest_of_the_request() -> None:
    async def echo(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await service.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n")
        for _ in range(3):
            writer.write(await reader.readexactly(1))

    turn = asyncio.Event()

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield b"1"
        await turn.wait()
        yield b"2"
        yield b"3"

    async with reached(echo) as (_, endpoint):
        answer = await endpoint.request("POST", "/", body=pieces(), length=3)
        assert await answer.read(10, within_s=PATIENCE_S) == b"1"
        turn.set()
        assert await whole(answer) == b"23"


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\nzz\r\n", "chunk size"),
    ],
)
async def test_an_answer_that_breaks_off_gives_what_came_and_then_an_error(start: bytes, says: str) -> None:
    async def breaks(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await service.head(reader)
        writer.write(start)

    async with reached(breaks) as (_, endpoint):
        answer = await endpoint.request("GET", "/")
        assert await answer.read(100, within_s=PATIENCE_S) == b"only this"
        with pytest.raises(EndpointError, match=says):
            await answer.read(100, within_s=PATIENCE_S)
        await answer.aclose()


async def test_an_answer_without_a_length_is_cut_short_by_a_reset_and_whole_at_a_clean_end() -> None:
    async def ends(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await service.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall")
        await writer.drain()
        if number == 1:
            await taken.wait()
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    taken = asyncio.Event()
    async with reached(ends) as (_, endpoint):
        answer = await endpoint.request("GET", "/")
        assert await answer.read(100, within_s=PATIENCE_S) == b"all"
        taken.set()
        with pytest.raises(EndpointError, match="broke the connection"):
            await answer.read(100, within_s=PATIENCE_S)
        await answer.aclose()
        assert await ask(endpoint) == b"all"


async def test_a_silent_service_is_waited_for_only_so_long() -> None:
    async def silent(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        if "/half" in await service.head(reader):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        await reader.readexactly(1)

    async with reached(silent) as (_, endpoint):
        with pytest.raises(TimeoutError):
            await endpoint.request("GET", "/", answer_s=0.1)
        answer = await endpoint.request("GET", "/half", answer_s=PATIENCE_S)
        assert await answer.read(100, within_s=0.1) == b"half"
        with pytest.raises(TimeoutError):
            await answer.read(100, within_s=0.1)
        await answer.aclose()
        await eventually(lambda: not endpoint._open)


async def test_the_time_to_the_first_byte_counts_from_the_end_of_the_requests_body() -> None:
    async def slowly() -> AsyncGenerator[bytes, None]:
        for _ in range(4):
            await asyncio.sleep(0.1)
            yield b"x"

    async def echo(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await service.head(reader)
        await reader.readexactly(4)
        writer.write(OK)
        await reader.readexactly(1)

    async with reached(echo) as (_, endpoint):
        answer = await endpoint.request("POST", "/", body=slowly(), length=4, answer_s=0.3)
        assert await whole(answer) == b"ok"


async def test_a_request_that_is_cancelled_closes_its_connection_and_its_source_at_once() -> None:
    closed = asyncio.Event()

    async def source() -> AsyncGenerator[bytes, None]:
        try:
            yield b"x"
            await asyncio.sleep(PATIENCE_S)
        finally:
            closed.set()

    async def hears(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await service.head(reader)
        await reader.readexactly(2)

    async with reached(hears) as (service, endpoint):
        asking = asyncio.create_task(endpoint.request("POST", "/", body=source(), length=2))
        await eventually(lambda: service.heads)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert closed.is_set()
        async with asyncio.timeout(PATIENCE_S):
            await service.left.wait()


async def test_a_service_that_floods_is_read_only_as_fast_as_its_answer_is_taken() -> None:
    sent = 0

    async def floods(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        nonlocal sent
        await service.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
            await writer.drain()
            sent += 0x8000

    async def stands_still() -> int:
        before = -1
        while before != sent or not sent:
            before = sent
            await asyncio.sleep(0.2)
        return before

    async with reached(floods) as (_, endpoint):
        answer = await endpoint.request("GET", "/")
        stuck = await stands_still()
        assert len(answer._incoming.body) <= BUFFER_BYTES + READ_BYTES
        taken = 0
        while taken < stuck + 2**20:
            taken += len(await answer.read(65536, within_s=PATIENCE_S))
        assert await stands_still() > stuck
        assert len(answer._incoming.body) <= BUFFER_BYTES + READ_BYTES
        await answer.aclose()


async def test_an_answer_to_head_announces_a_body_and_has_none() -> None:
    async def heads(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        while await service.head(reader):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")

    async with reached(heads) as (service, endpoint):
        assert [await ask(endpoint, "HEAD") for _ in range(2)] == [b"", b""]
        assert service.connections == 1


@pytest.mark.parametrize(
    "address",
    [
        "http://10.0.0.1:80",
        "https://127.0.0.1",
        "http://evil.example",
        "http://127.0.0.1@evil.example:80",
        "http://me@127.0.0.1:80",
        "http://127.0.0.1:99999",
        "unix:relative",
        "127.0.0.1:80",
    ],
)
def test_an_endpoint_that_is_not_on_this_machine_is_refused(address: str) -> None:
    with pytest.raises(UsageProblem):
        Endpoint(address)


async def test_a_service_on_the_other_loopback_is_reached_too() -> None:
    service = Service(polite)
    try:
        server = await asyncio.start_server(service.serve, "::1", 0)
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    endpoint = Endpoint(f"http://[::1]:{server.sockets[0].getsockname()[1]}")
    assert await ask(endpoint) == b"ok"
    assert "\r\nHost: [::1]:" in service.heads[0]
    await endpoint.aclose()
    server.close()
    await service.close()
