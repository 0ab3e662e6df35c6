"""What no HTTP library would send: cut, endless, slow and oversized bodies, broken framing, rubbish on the channel."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from rma_coordinator.api import asgi
from rma_coordinator.domain.records import TaskRecord
from rma_core.models import channel as frames
from tests.coordinator_fixtures import PATIENCE_S, Running, StandIn, running, soon, until
from tests.coordinator_process import Coordinator, coordinating

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from httpx2 import Response

#: What a flood sends in all, and what the coordinator's memory may grow by: far less than any body that it kept.
BODY_BYTES, FLOOD = 100 * 1024 * 1024, 6
MOST_GROWTH_BYTES = 60 * 1024 * 1024
CHUNK = b"x" * 65536


@contextlib.asynccontextmanager
async def line(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def said(reader: asyncio.StreamReader) -> bytes:
    """Return all that comes until the other side closes."""
    found = b""
    with contextlib.suppress(OSError):
        while data := await soon(reader.read(65536)):
            found += data
    return found


async def send(port: int, *parts: bytes, end: bool = False) -> bytes:
    """Send exactly these bytes; return the whole answer, empty where the connection was only closed."""
    async with line(port) as (reader, writer):
        for part in parts:
            writer.write(part)
            with contextlib.suppress(OSError):
                await soon(writer.drain())
        if end:
            writer.write_eof()
        return await said(reader)


def head(pool: Running, *lines: str, target: str = "POST /api/inference/notes HTTP/1.1") -> bytes:
    fixed = [target, "Host: pool", f"Authorization: Bearer {pool.key}", "Connection: close"]
    return "\r\n".join([*fixed, *lines, "", ""]).encode("latin-1")


def port_of(pool: Running) -> int:
    return int(pool.url.rpartition(":")[2])


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]


async def well(pool: Running) -> None:
    """Assert that nothing is left of what was sent, and that the pool still serves."""
    lanes = pool.app.extensions["rma_lanes"]
    await until(lambda: not {t for t in lanes._open if "channel" not in str(t)} or len(lanes._open) <= 1)
    assert pool.pool.dispatcher.tasks == {}
    assert pool.pool.spools.memory_used == pool.pool.spools.disk_used == 0
    assert (await pool.client.get("/health")).json()["status"] == "ok"


BROKEN = {
    "nothing": b"",
    "only line ends": b"\r\n" * 50,
    "zeros": b"\0" * 3000,
    "random bytes": bytes(range(256)) * 20,
    "a TLS hello": bytes.fromhex("16030100a5010000a10303") + b"r" * 160,
    "the HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/1.0": b"GET /health HTTP/1.0\r\n\r\n",
    "HTTP/9.9": b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "a header without a name": b"GET /health HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n",
    "a zero in a header": b"GET /health HTTP/1.1\r\nHost: x\r\nX-Y: a\0b\r\n\r\n",
    "a zero in the address": b"GET /he\0alth HTTP/1.1\r\nHost: x\r\n\r\n",
    "a folded header": b"GET /health HTTP/1.1\r\nHost: x\r\nX-Y: a\r\n b\r\nConnection: close\r\n\r\n",
    "two lengths": b"POST /api/worker/token HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a negative length": b"POST /api/worker/token HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "a length that is no number": b"POST /api/worker/token HTTP/1.1\r\nHost: x\r\nContent-Length: 0x10\r\n\r\n",
    "an enormous length": b"POST /api/worker/token HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: "
    + b"9" * 400
    + b"\r\n\r\n",
    "length and chunks": b"POST /api/worker/token HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n",
    "chunks that are none": b"POST /api/worker/token HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"zz\r\nab\r\n",
    "an enormous chunk": b"POST /api/worker/token HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"f" * 40
    + b"\r\nab\r\n",
    "another coding": b"POST /api/worker/token HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\nab",
    "an upgrade to nothing": b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n",
    "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "an address of another host": b"GET http://example.org/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "an unknown method": b"\xff\xfe /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "expectations": b"POST /api/worker/token HTTP/1.1\r\nHost: x\r\nExpect: the-impossible\r\n"
    b"Connection: close\r\nContent-Length: 2\r\n\r\n{}",
}


async def test_broken_framing_is_refused_or_closed_and_costs_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as pool:
        found = {}
        for name, data in BROKEN.items():
            answer = await send(port_of(pool), data, end=True)
            found[name] = statuses(answer)
            assert all(status < 500 or status in (501, 505) for status in found[name]), (name, answer)
            await well(pool)
        assert found["HTTP/1.0"] == [200], found
        assert found["two lengths"] in ([], [400]), found
        assert found["length and chunks"] != [200], found
    assert "Traceback" not in caplog.text


async def test_a_head_that_does_not_end_is_cut_off_and_a_huge_one_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        async with line(port_of(pool)) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            for _ in range(200):
                writer.write(b"X-More: " + b"m" * 4000 + b"\r\n")
                with contextlib.suppress(OSError):
                    await soon(writer.drain())
            assert statuses(await said(reader)) in ([], [400], [431])
        many = b"".join(b"X-%d: y\r\n" % number for number in range(3000))
        answer = await send(port_of(pool), b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + many + b"\r\n")
        assert statuses(answer) in ([200], [400], [431])
        await well(pool)


async def test_requests_one_behind_the_other_are_answered_in_order_whatever_is_wrong_with_one(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        good = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        bad = b"POST /api/worker/token HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n{]}"
        gone = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"
        last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = await send(port_of(pool), good + bad + gone + good * 20 + last)
        assert statuses(answer) == [200, 400, 404, *[200] * 21]
        # What is smuggled behind a body is a request of its own, with no more rights than that.
        inner = b"GET /api/admin/keys HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert statuses(await send(port_of(pool), bad + inner)) == [400, 401]


def notes(pool: Running, *lines: str) -> bytes:
    """Return a request for notes on a connection that stays open."""
    first = ["POST /api/inference/notes HTTP/1.1", "Host: x", f"Authorization: Bearer {pool.key}", "Content-Length: 2"]
    return "\r\n".join([*first, *lines, "", "ab"]).encode()


@pytest.mark.parametrize("behind", [b"", b"x", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_a_client_that_leaves_is_noticed_whatever_it_sent_behind_its_request(
    tmp_path: Path, behind: bytes
) -> None:
    async with running(tmp_path) as pool, pool.worker() as worker:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(pool))
        writer.write(notes(pool) + behind)
        task = await worker.task()
        writer.close()
        assert (await worker.frame(frames.Cancel)).stream == task.stream


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_body_is_never_taken_for_a_request(tmp_path: Path, *, at_once: bool) -> None:
    async with running(tmp_path) as pool:
        body = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        lines = ("Connection: Upgrade, close", "Upgrade: h2c", f"Content-Length: {len(body)}", "", "")
        whole = "\r\n".join(["POST /nowhere HTTP/1.1", "Host: x", *lines]).encode() + body
        answer = await send(port_of(pool), *([whole] if at_once else [whole[: -len(body)], body]))
        assert [400 <= status < 500 for status in statuses(answer)] == [True], answer


@pytest.mark.parametrize("behind", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"m" * 70_000])
async def test_nothing_is_written_into_an_answer_that_is_under_way(tmp_path: Path, behind: bytes) -> None:
    async with running(tmp_path) as pool, pool.worker() as worker, line(port_of(pool)) as (reader, writer):
        writer.write(notes(pool))
        task = await worker.task()
        await worker.say(frames.Head(stream=task.stream, status=200))
        await worker.data(task.stream, b"part")
        await soon(reader.readuntil(b"part"))
        writer.write(behind)
        await soon(writer.drain())
        await worker.data(task.stream, b"rest")
        await worker.say(frames.End(stream=task.stream))
        answer, refusal, _ = (await said(reader)).partition(b"HTTP/1.1 4")
        # Whole, and the refusal behind it; or cut, and nothing behind it.
        assert answer.endswith(b"0\r\n\r\n") is bool(refusal)


@pytest.mark.parametrize("prefer", ["", "Prefer: respond-async"], ids=["at once", "asynchronous"])
async def test_a_body_that_breaks_off_stalls_or_lies_makes_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefer: str
) -> None:
    monkeypatch.setattr(asgi, "PATIENCE_S", 1.0)
    monkeypatch.setattr(asgi.Call.chunks, "__kwdefaults__", {"patience_s": 1.0, "least_bytes_per_s": 1000})
    async with running(tmp_path, memory_body_bytes=1000) as pool, pool.worker():
        lines = [prefer] if prefer else []
        cut = await send(port_of(pool), head(pool, *lines, "Content-Length: 9000"), b"x" * 4000, end=True)
        assert statuses(cut) in ([], [400], [408]), cut
        stalled = await send(port_of(pool), head(pool, *lines, "Content-Length: 9000"), b"x" * 4000)
        assert statuses(stalled) == [408]
        chunked = [*lines, "Transfer-Encoding: chunked"]
        broken = await send(port_of(pool), head(pool, *chunked), b"5\r\nabcde\r\nnonsense\r\n", end=True)
        assert statuses(broken) in ([], [400]), broken
        await well(pool)
        assert await pool.pool.store.load(TaskRecord) == []


async def test_a_trickle_does_not_hold_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi.Call.chunks, "__kwdefaults__", {"patience_s": 0.5, "least_bytes_per_s": 1000})
    async with running(tmp_path) as pool, pool.worker():
        async with line(port_of(pool)) as (reader, writer):
            writer.write(head(pool, "Content-Length: 100000"))
            answer = asyncio.create_task(said(reader))
            async with asyncio.timeout(PATIENCE_S):
                while not answer.done():
                    writer.write(b"x")
                    await asyncio.wait({answer}, timeout=0.1)
        assert statuses(answer.result()) == [408]
        await well(pool)


# -- floods ------------------------------------------------------------------------------------------------------


async def pour(port: int, lines: Iterable[str], *, chunked: bool) -> bytes:
    """Send BODY_BYTES as a body, or as much of them as is taken."""
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {BODY_BYTES}"
    async with line(port) as (reader, writer):
        writer.write("\r\n".join([*lines, "Host: x", "Connection: close", framing, "", ""]).encode())
        answer = asyncio.create_task(said(reader))
        piece = b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK) if chunked else CHUNK
        with contextlib.suppress(OSError):
            for _ in range(BODY_BYTES // len(CHUNK)):
                writer.write(piece)
                await soon(writer.drain())
                if answer.done():
                    break
        return await answer


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "endless"])
async def test_bodies_of_a_hundred_megabytes_are_refused_and_leave_no_trace_in_memory(
    tmp_path: Path, *, chunked: bool
) -> None:
    async with coordinating(tmp_path / "home", max_body_bytes=8 * 1024 * 1024) as (coordinator, client):
        await client.get("/api/admin/stats")
        before = coordinator.resident_bytes()
        most = 0
        for path, status in (
            ("/api/inference/notes", 413),
            ("/api/admin/keys", 413),
            ("/api/worker/token", 413),
            ("/api/worker/heartbeat", 401),
            ("/health", 405),
            ("/nowhere", 404),
        ):
            bearer = f"Authorization: Bearer {coordinator.key}"
            lines = [f"POST {path} HTTP/1.1", bearer, "Prefer: respond-async"]
            answers = await asyncio.gather(*[pour(coordinator.port, lines, chunked=chunked) for _ in range(FLOOD)])
            most = max(most, coordinator.resident_bytes())
            # Who never stops sending may find the connection closed under the answer.
            assert {found for answer in answers for found in statuses(answer)} <= {status}, (path, answers)
        assert most - before < MOST_GROWTH_BYTES, (before, most)
        assert (await client.get("/health")).json()["status"] == "ok"
        tasks = (await client.get("/api/admin/tasks")).json()
        assert tasks["total"] == 0
        assert not [path for path in (coordinator.home / "spool").glob("*") if path.stat().st_size]


async def test_who_never_stops_sending_is_closed_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "LINGER_S", 0.3)
    async with running(tmp_path) as pool:
        for target in ("/nowhere", "/api/admin/keys", "/api/inference/nothing", "/api/worker/heartbeat"):
            async with asyncio.timeout(PATIENCE_S), line(port_of(pool)) as (reader, writer):
                writer.write(head(pool, "Transfer-Encoding: chunked", target=f"POST {target} HTTP/1.1"))
                answer = asyncio.create_task(said(reader))
                with contextlib.suppress(OSError):
                    while not answer.done():
                        writer.write(b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK))
                        await writer.drain()
                assert statuses(await answer) in ([], [401], [404], [413]), target
        await until(lambda: not pool.app.extensions["rma_lanes"]._open)


async def test_trailers_without_end_are_cut_off_and_kept_by_nobody(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(), line(port_of(pool)) as (reader, writer):
        writer.write(head(pool, "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n")
        answer, sent = asyncio.create_task(said(reader)), 0
        with contextlib.suppress(OSError):
            while not answer.done() and sent < 200 * len(CHUNK):
                writer.write(b"X-More: " + b"m" * 65_000 + b"\r\n")
                await soon(writer.drain())
                sent += len(CHUNK)
        assert statuses(await soon(answer)) in ([], [400], [431])
        assert sent < 200 * len(CHUNK)
        await well(pool)


async def test_a_flood_of_connections_that_say_nothing_costs_little(tmp_path: Path) -> None:
    async with coordinating(tmp_path / "home") as (coordinator, client):
        before = coordinator.resident_bytes()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(500):
                _, writer = await stack.enter_async_context(line(coordinator.port))
                writer.write(b"POST /api/worker/token HTTP/1.1\r\nContent-Len")
            assert (await client.get("/health")).json()["status"] == "ok"
            assert coordinator.resident_bytes() - before < MOST_GROWTH_BYTES
        await _few_connections(coordinator)


async def _few_connections(coordinator: Coordinator) -> None:
    await until(lambda: len(coordinator.process.net_connections("tcp")) < 20)


# -- the channel -------------------------------------------------------------------------------------------------

GARBAGE: tuple[str | bytes, ...] = (
    "",
    "{}",
    "null",
    "[" * 5000,
    "\0",
    '{"type": "HELLO"}',
    '{"type": "nonsense", "stream": 1}',
    '{"type": "ACCEPT", "stream": -1}',
    '{"type": "ACCEPT", "stream": 1e400}',
    '{"type": "ACCEPT", "stream": 99999999999999999999999}',
    '{"type": "END", "stream": NaN}',
    "x" * 300_000,
    b"",
    b"\0",
    b"\xff" * 9,
    bytes(300_000),
    b"\0" * 2_000_000,
)


@pytest.mark.parametrize("first", [True, False], ids=["instead of HELLO", "after HELLO"])
async def test_rubbish_on_a_channel_ends_that_channel_or_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, first: bool
) -> None:
    async with running(tmp_path) as pool, pool.worker() as other:
        machine = await pool.enrol()
        for garbage in GARBAGE:
            async with machine.channel({"notes": 1}, hello=not first) as bad:
                with contextlib.suppress(WebSocketException):
                    await bad.ws.send(garbage)
                code = await bad.closed() if first else None
            assert not first or code in (4400, 1002, 1007, 1009), (garbage, code)
            await until(lambda: machine.id not in pool.pool.hub.sinks)
        asked = asyncio.create_task(pool.infer(b"still there?"))
        await other.serve(b"yes")
        assert (await soon(asked)).text == "yes"
    assert "Traceback" not in caplog.text


#: The lines of a handshake that are about WebSocket alone.
CHANNEL = b"GET /api/worker/channel HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
WEBSOCKET = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"


async def test_a_handshake_that_is_none_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        start = f"GET /api/worker/channel HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {machine.token}\r\n"
        for lines in (
            "Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 99\r\n\r\n",
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\r\n",
            "Connection: close\r\n\r\n",
        ):
            answer = await send(port_of(pool), (start + lines).encode(), end=True)
            assert all(400 <= status < 500 for status in statuses(answer)), answer
        asks = f"{start}Upgrade: websocket\r\nConnection: Upgrade\r\n{WEBSOCKET.decode()}\r\n"
        for other in (
            asks.replace("GET", "POST", 1).replace("\r\n", "\r\nContent-Length: 3\r\n", 1) + "abc",
            asks.replace("HTTP/1.1", "HTTP/1.0", 1),
            asks.replace("/channel", "/\xff", 1),
            asks.replace("13\r\n", "14\r\n", 1),
        ):
            answer = await send(port_of(pool), other.encode("latin-1"), end=True)
            assert [400 <= status < 500 for status in statuses(answer)] == [True], (other, answer)
        for token in ("", "Bearer", "Bearer x.y.z", f"Bearer {pool.key}", "Bearer \xe4"):
            with pytest.raises(WebSocketException):
                await connect(
                    f"ws{pool.url.removeprefix('http')}/api/worker/channel",
                    additional_headers={"Authorization": token},
                    proxy=None,
                )
        await well(pool)
    assert "Traceback" not in caplog.text


async def test_who_is_refused_a_channel_or_floods_it_gives_the_place_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = WEBSOCKET
    async with running(tmp_path) as pool:
        await pool.client.get("/health")  # its connection stays
        before = pool.server.places.taken
        for lines in (
            b"\r\n",
            key + b"\r\n",
            key + b"\r\n\x81\x80abcd",
            key + b"Sec-WebSocket-Protocol: \xff\r\n\r\n",
        ):
            # The client neither leaves nor says anything more.
            answer = await send(port_of(pool), CHANNEL + lines)
            assert [400 <= status < 500 for status in statuses(answer)] == [True], (lines, answer)
        for _ in range(3):
            async with pool.worker(slots=0) as ill:
                with contextlib.suppress(WebSocketException):
                    for _ in range(40):
                        await ill.ws.send("{}")
                assert await ill.closed() == 4400
        await until(lambda: pool.server.places.taken == before)
    assert "Traceback" not in caplog.text


async def test_a_channel_may_be_spoken_to_byte_by_byte_and_its_end_is_answered(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        bearer = f"Authorization: Bearer {machine.token}\r\n\r\n".encode()
        # A ping, and an end with code 1000, each with a mask of zeros.
        ping, end = b"\x89\x82\0\0\0\0hi", b"\x88\x82\0\0\0\0\x03\xe8"
        async with line(port_of(pool)) as (reader, writer):
            for byte in CHANNEL + WEBSOCKET + bearer:
                writer.write(bytes([byte]))
                await writer.drain()
            head = await soon(reader.readuntil(b"\r\n\r\n"))
            assert head.startswith(b"HTTP/1.1 101 ")
            # As in the sample of RFC 6455, 1.3.
            assert b"accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in head
            for said_so in (ping, ping, end):
                for byte in said_so:
                    writer.write(bytes([byte]))
                    await writer.drain()
                if said_so is ping:
                    assert await soon(reader.readexactly(4)) == b"\x8a\x02hi"
            assert await said(reader) == b"\x88\x02\x03\xe8"
        await well(pool)


async def test_what_comes_right_behind_a_handshake_is_too_early(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        bearer = f"Authorization: Bearer {machine.token}\r\n".encode()
        for more in (
            b"\r\n\x89\x80\0\0\0\0",
            b"\r\n\x89",
            b"content-length: 3\r\n\r\nabc",
            b"content-length: 3\r\n\r\n",
        ):
            async with line(port_of(pool)) as (reader, writer):
                writer.write(CHANNEL + WEBSOCKET + bearer + more)
                assert (await said(reader)).startswith(b"HTTP/1.1 400 "), more
        await well(pool)


async def test_of_many_pings_at_once_the_last_is_answered_and_few_others(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        bearer = f"Authorization: Bearer {machine.token}\r\n\r\n".encode()
        async with line(port_of(pool)) as (reader, writer):
            writer.write(CHANNEL + WEBSOCKET + bearer)
            await soon(reader.readuntil(b"\r\n\r\n"))
            pings = [b"\x89\x84\0\0\0\0" + f"{number:04}".encode() for number in range(5000)]
            writer.write(b"".join(pings) + b"\x88\x82\0\0\0\0\x03\xe8")
            answer = await said(reader)
        assert answer.endswith(b"\x8a\x044999\x88\x02\x03\xe8")
        assert answer.count(b"\x8a\x04") < len(pings) / 10
        await well(pool)


async def test_who_sends_thousands_of_requests_at_once_is_cut_and_costs_little(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        for _ in range(3):
            async with line(port_of(pool)) as (reader, writer):
                writer.write(notes(pool) + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 3000)
                writer.write_eof()
                answer = await said(reader)
                assert set(statuses(answer)) <= {200, 503}
        await well(pool)


async def test_who_asks_for_a_channel_behind_a_request_waits_for_its_answer_or_is_cut(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as worker, line(port_of(pool)) as (reader, writer):
        writer.write(notes(pool) + CHANNEL + WEBSOCKET + b"\r\n")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await worker.answer((await worker.task()).stream, b"yes")
        answer = await said(reader)
        # Nothing of the one stands within the other.
        assert statuses(answer) in ([], [200, 401]), answer


async def test_frames_that_are_no_frames_close_the_connection(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        for rubbish in (
            b"\xff" * 100,
            b"\x81\x05abcde",
            b"\x8f\x80\0\0\0\0",
            b"\x81\xff" + b"\xff" * 8,
            os.urandom(500),
        ):
            async with machine.channel({"notes": 1}) as bad:
                bad.ws.transport.write(rubbish)
                await bad.closed()
            await until(lambda: machine.id not in pool.pool.hub.sinks)
        await well(pool)


# -- other people's attempts -------------------------------------------------------------------------------------


async def test_nobody_can_speak_for_another_workers_attempt(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as owner:
        thief = await pool.enrol()
        asked = asyncio.create_task(pool.infer(b"mine"))
        task = await owner.task()
        ref = owner.ref(task)
        offer = task.offer
        stolen: dict[str, Any] = {"task_id": ref.task_id, "attempt": ref.attempt, "lease_id": ref.lease_id}
        tries = [
            await thief.result(offer, b"stolen"),
            await thief.complete(offer, http_status=200, body="c3RvbGVu"),
            await thief.complete(offer, status="failed", fault="request", reason="stolen"),
            await thief.complete(offer, status="returned"),
            await body_of(pool, thief, stolen),
        ]
        assert [answer.status_code for answer in tries] == [404] * 5, [answer.text for answer in tries]
        assert all(answer.json()["hints"] for answer in tries)
        # A heartbeat that lists it is told to drop it, and changes nothing.
        beat = await thief.beat(ref)
        assert beat.json()["cancel"] == [stolen]
        for wrong in ({"attempt": 2}, {"lease_id": "0" * 32}, {"task_id": "task-" + "0" * 20}):
            named = {**stolen, **wrong}
            answer = await body_of(pool, owner.machine, named)
            assert answer.status_code == 404, named
        async with thief.channel({"notes": 1}, attempts=(ref,)) as bad:
            for frame in (
                frames.Accept(stream=task.stream),
                frames.Head(stream=task.stream, status=200),
                frames.Error(stream=task.stream, fault="request", reason="stolen"),
                frames.End(stream=task.stream, usage={}),
            ):
                await bad.say(frame)
            await bad.data(task.stream, b"stolen")
            await soon(await bad.ws.ping())
            await owner.answer(task.stream, b"the owner's")
            answer = await soon(asked)
        assert (answer.status_code, answer.text, answer.headers["rma-worker"]) == (200, "the owner's", owner.id)


async def body_of(pool: Running, machine: StandIn, named: dict[str, Any]) -> Response:
    query = f"attempt={named['attempt']}&lease_id={named['lease_id']}"
    return await pool.client.get(f"/api/worker/tasks/{named['task_id']}/body?{query}", headers=machine.headers)


async def test_a_worker_cannot_speak_for_another_worker(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as owner:
        thief = await pool.enrol()
        gone = await pool.client.delete(f"/api/worker/unregister/{owner.id}", headers=thief.headers)
        assert gone.status_code == 403
        assert (await thief.beat(worker_id=owner.id)).status_code == 403
        async with thief.channel({"notes": 1}, hello=False) as bad:
            await bad.say(frames.Hello(worker_id=owner.id, slots={"notes": 5}, attempts=()))
            assert await bad.closed() == 4400
        assert owner.id in pool.pool.hub.sinks


async def test_ids_of_every_odd_form_name_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        odd = ["task-", "task-" + "0" * 19, "%00", "..%2f..%2fetc%2fpasswd", "%ff%fe", "x" * 3000, "%F0%9F%92", "'--"]
        for name in odd:
            for method, path in (
                ("GET", f"/api/inference/tasks/{name}"),
                ("GET", f"/api/inference/tasks/{name}/result"),
                ("DELETE", f"/api/inference/tasks/{name}"),
                ("GET", f"/api/admin/workers/{name}"),
                ("POST", f"/api/admin/workers/{name}/disable"),
                ("DELETE", f"/api/admin/keys/{name}"),
            ):
                request = head(pool, "Content-Length: 0", target=f"{method} {path} HTTP/1.1")
                answer = await send(port_of(pool), request)
                assert statuses(answer) in ([404], [405]), (method, path, answer)
                assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] in ("not_found", "method")
