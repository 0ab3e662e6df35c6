"""A small HTTP service on loopback for tests of the agent: it streams, stalls, floods, echoes and breaks off."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

#: Seconds a test waits for anything.
PATIENCE_S = 20.0


async def eventually(true: Callable[[], object]) -> None:
    """Wait until a condition holds that nobody announces."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():  # noqa: ASYNC110 - what is looked at belongs to the code under test, which sets no event
            await asyncio.sleep(0.005)


class LocalService:
    """Answers by path; what happened to its callers can be seen afterwards."""

    def __init__(self) -> None:
        self.url = ""
        self.healthy = True
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.sent_bytes = 0
        self.received_bytes = 0
        self.left = asyncio.Event()
        self.go_on = asyncio.Event()
        self._callers: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._callers.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            self.left.set()
        finally:
            self._callers.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        path = lines[0].split()[1]
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        if path != "/health":
            self.requests.append((path, headers))
        handler = getattr(self, "do_" + path[1:].partition("?")[0].replace("/", "_"), self.do_nothing)
        await handler(int(headers.get("content-length", "0")), reader, writer)
        await writer.drain()
        return True

    async def do_nothing(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    async def do_health(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        status = b"200 OK" if self.healthy else b"503 Service Unavailable"
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")

    async def do_echo(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = await reader.readexactly(length)
        self.received_bytes += length
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: x/y\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1\r\n")
        writer.write(f"Content-Length: {length}\r\n\r\n".encode() + body)

    async def do_deaf(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read nothing of the body, and do not answer either."""
        await asyncio.sleep(60)

    async def do_stream(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Five pieces, the last ones only after `go_on`."""
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(5):
            if number == 2:
                await writer.drain()
                await self.go_on.wait()
            writer.write(b"2\r\n" + f"{number}\n".encode() + b"\r\n")
        writer.write(b"0\r\n\r\n")

    async def do_halves(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Ten bytes with Content-Length, the second half only after `go_on`."""
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 10\r\n\r\nfirst")
        await writer.drain()
        self.sent_bytes += 5
        await self.go_on.wait()
        writer.write(b"+half")

    async def do_flood(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send as much as is taken."""
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
        while True:
            writer.write(piece)
            await writer.drain()
            self.sent_bytes += 0x8000

    async def do_big(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """3 MiB with Content-Length."""
        writer.write(b"HTTP/1.1 201 Created\r\nX-Name: gr\xfc\xdfe\r\nContent-Length: 3145728\r\n\r\n")
        for _ in range(48):
            writer.write(b"b" * 65536)
            await writer.drain()

    async def do_wait(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer only after `go_on`; set `left` when the caller goes away before."""
        gone = asyncio.create_task(reader.read(1))
        go_on = asyncio.create_task(self.go_on.wait())
        await asyncio.wait({gone, go_on}, return_when=asyncio.FIRST_COMPLETED)
        go_on.cancel()
        if gone.done():
            self.left.set()
            raise OSError("the caller left")
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nready")

    async def do_breaks(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")
        await writer.drain()
        raise OSError("breaks off")

    async def close(self) -> None:
        callers = list(self._callers)
        for task in callers:
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)


@contextlib.asynccontextmanager
async def local_service(service: LocalService | None = None) -> AsyncIterator[LocalService]:
    service = service or LocalService()
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield service
    finally:
        server.close()
        await service.close()
        await server.wait_closed()
