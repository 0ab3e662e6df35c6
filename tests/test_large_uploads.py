"""An upload of a gigabyte: refused with the right error where it is too large, else passed on in constant memory."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from bench._idle import Idler
from rma_core.models import channel as frames
from tests.coordinator_process import coordinating
from tests.openai_kit import CHAT, JSON
from tests.stub_workers import Memory, Streamer, joined, offered, request, unread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

    from websockets.asyncio.client import ClientConnection

    from rma_core.http import AsyncClient
    from rma_core.models.worker import TaskOffer
    from tests.coordinator_process import Coordinator

#: What is sent where it is taken (in the suite, and under `make soak`), and where it is not.
SMALL_BYTES, GIGABYTE = 128 * 1024 * 1024, 1024 * 1024 * 1024
PIECE = bytes(range(256)) * 1024
#: What the coordinator's memory may grow by, whatever the size.
MOST_GROWTH_BYTES = 32 * 1024 * 1024
#: Requests that wait, of which each would take more than twice its size if it were kept, and what all may take.
WAITING, WAITING_BYTES, MOST_WAITING_BYTES = 70, 4_000_000, 96 * 1024 * 1024
#: Seconds for all of it, on a machine that is busy.
PATIENCE_S = 300.0

CATALOG = """
service = "notes"
name = "rma-notes-worker"
image = "ghcr.io/rma/notes-worker:1"
routes = ["POST /notes"]
tiers = [1, 2, 3]
[needs]
cpu_cores = 0.1
"""


class Reply(NamedTuple):
    """An answer, and how much of the body had gone when it came."""

    status: int
    kind: str
    body: Any
    sent: int


def pieces(size: int) -> Iterator[bytes]:
    """Give a body of a size, no two pieces of it the same."""
    for number in range(size // len(PIECE)):
        yield number.to_bytes(8, "big") + PIECE[8:]


def digest(size: int) -> str:
    found = hashlib.sha256()
    for piece in pieces(size):
        found.update(piece)
    return found.hexdigest()


async def upload(coordinator: Coordinator, path: str, size: int, *, chunked: bool = False) -> Reply:
    """Send a body until it has all gone or the answer has come; return that."""
    reader, writer = await asyncio.open_connection("127.0.0.1", coordinator.port)
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {coordinator.key}", framing]
    answering = asyncio.create_task(answered(reader))
    sent = 0
    try:
        writer.write("\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode())
        for piece in pieces(size):
            if answering.done():
                break
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
            sent += len(piece)
        else:
            writer.write(b"0\r\n\r\n" if chunked else b"")
        status, headers, body = await answering
        return Reply(status, headers["content-type"], json.loads(body), sent)
    finally:
        answering.cancel()
        writer.transport.abort()


async def answered(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


class Weigher(Idler):
    """A worker that answers how large a request was, and with which digest."""

    async def _serve(self, socket: ClientConnection, task: frames.Task) -> None:
        await socket.send(frames.pack(frames.Accept(stream=task.stream)))
        found, size = hashlib.sha256(), 0
        async with contextlib.aclosing(self._body(task.offer)) as body:
            async for piece in body:
                found.update(piece)
                size += len(piece)
        said = json.dumps({"bytes": size, "sha256": found.hexdigest()}).encode()
        headers = (*JSON, ("content-length", str(len(said))))
        await socket.send(frames.pack(frames.Head(stream=task.stream, status=200, headers=headers)))
        await socket.send(frames.pack_data(task.stream, said, end=True))

    async def _body(self, offer: TaskOffer) -> AsyncGenerator[bytes, None]:
        """Fetch a request's body, which waits at the coordinator."""
        assert offer.body_url is not None
        port = int(self._url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            path = f"{offer.body_url}?attempt={offer.attempt}&lease_id={offer.lease_id}"
            lines = [f"GET {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {self.token}", "", ""]
            writer.write("\r\n".join(lines).encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), head
            left = offer.body_bytes
            while left and (piece := await reader.read(min(left, 1 << 18))):
                left -= len(piece)
                yield piece
            assert not left
        finally:
            writer.transport.abort()


async def weighed(coordinator: Coordinator) -> bool:
    """Upload so little that it is taken, and say whether a worker was there for it."""
    return (await upload(coordinator, "/api/inference/notes", 2 * len(PIECE))).status == 200


@contextlib.asynccontextmanager
async def weighing(folder: Path, **settings: Any) -> AsyncGenerator[Coordinator, None]:
    """A coordinator with one worker, which has answered once."""
    catalog = folder / "catalog"
    catalog.mkdir()
    (catalog / "notes.toml").write_text(CATALOG, encoding="utf-8")
    async with (
        coordinating(folder / "home", catalog=catalog, **settings) as (coordinator, _),
        joined(coordinator, [Weigher]),
    ):
        while not await weighed(coordinator):  # noqa: ASYNC110 - it is the coordinator that knows
            await asyncio.sleep(0.1)
        yield coordinator


@pytest.mark.timeout(PATIENCE_S + 60)
@pytest.mark.parametrize("server", ["hypercorn", "uvicorn"])
@pytest.mark.parametrize("size", [SMALL_BYTES, pytest.param(GIGABYTE, marks=pytest.mark.soak)], ids=["small", "1 GB"])
async def test_a_large_upload_passes_in_constant_memory(tmp_path: Path, size: int, server: str) -> None:
    async with asyncio.timeout(PATIENCE_S), weighing(tmp_path, server=server, max_body_bytes=GIGABYTE) as coordinator:
        memory = Memory(coordinator)
        async with memory.watched():
            reply = await upload(coordinator, "/api/inference/notes", size)
        assert (reply.status, reply.body) == (200, {"bytes": size, "sha256": digest(size)})
        grew = memory.growth
        print(f"{server}: {size / 1e6:.0f} MB passed, memory grew by {grew / 1e6:.1f} MB")  # noqa: T201 - the figure
        assert grew < MOST_GROWTH_BYTES
        assert not left_on_disk(coordinator)


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "endless"])
async def test_a_gigabyte_is_refused_where_that_is_too_much(tmp_path: Path, *, chunked: bool) -> None:
    async with asyncio.timeout(PATIENCE_S), weighing(tmp_path) as coordinator:
        memory = Memory(coordinator)
        async with memory.watched():
            plain = await upload(coordinator, "/api/inference/notes", GIGABYTE, chunked=chunked)
            chat = await upload(coordinator, CHAT, GIGABYTE, chunked=chunked)
        assert (plain.status, plain.kind, plain.body["code"]) == (413, "application/problem+json", "too_large")
        assert "67108864 bytes" in plain.body["detail"]
        assert (chat.status, chat.kind) == (413, "application/json")
        assert chat.body == {
            "error": {
                "message": "a body may have at most 8388608 bytes",
                "type": "invalid_request_error",
                "param": None,
                "code": "request_too_large",
            }
        }
        assert max(plain.sent, chat.sent) < GIGABYTE // 2, "the answer comes long before the body's end"
        print(f"1 GB refused, memory grew by {memory.growth / 1e6:.1f} MB")  # noqa: T201 - the figure
        assert memory.growth < MOST_GROWTH_BYTES
        assert not left_on_disk(coordinator)
        assert await weighed(coordinator)


async def test_large_requests_under_v1_wait_on_disk(tmp_path: Path) -> None:
    async with (
        asyncio.timeout(PATIENCE_S),
        coordinating(tmp_path / "home") as (coordinator, client),
        joined(coordinator, [Streamer]),
    ):
        await offered(client)
        body = request("x" * WAITING_BYTES, 1_000_000)
        assert await begun(client) == 0
        memory = Memory(coordinator)
        with contextlib.ExitStack() as held:
            async with memory.watched():
                for number in range(WAITING):
                    # More than the worker has places: some run, and some wait.
                    held.enter_context(unread(coordinator, body))
                    while await begun(client) <= number:  # noqa: ASYNC110 - it is the coordinator that knows
                        await asyncio.sleep(0.02)
        grew, waits = memory.growth / 1e6, WAITING * len(body) / 1e6
        print(f"{waits:.0f} MB of requests wait, memory grew by {grew:.1f} MB")  # noqa: T201 - the figure
        assert memory.growth < MOST_WAITING_BYTES


async def begun(client: AsyncClient) -> int:
    """Return how many requests run or wait."""
    tasks = (await client.get("/api/admin/stats")).json()["tasks"]
    return int(tasks["running"] + tasks["queued"])


def left_on_disk(coordinator: Coordinator) -> list[Path]:
    return [path for path in (coordinator.home / "spool").glob("*") if path.stat().st_size]
