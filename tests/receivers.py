"""A receiver of webhooks for tests: real HTTPS (or HTTP) on loopback, which answers, fails, hangs and dies as told."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING, NamedTuple

import trustme

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    import pytest

#: What it does instead of answering with a status.
HANG, DIE, FLOOD, REDIRECT = "hang", "die", "flood", "redirect"


class Arrival(NamedTuple):
    """One request as it came."""

    head: str
    headers: dict[str, str]
    body: bytes
    #: The name that TLS was begun with.
    name: str | None


class Receiver:
    """Listens on one address. ``script`` says what becomes of each request, the last entry of all that follow."""

    def __init__(self, *script: int | str, where: str = "") -> None:
        self.script: Sequence[int | str] = script or (200,)
        self.where = where
        self.arrivals: list[Arrival] = []
        self.connections = 0
        self.port = 0
        self._names: dict[ssl.SSLObject | ssl.SSLSocket, str | None] = {}
        self._serving: set[asyncio.Task[None]] = set()

    def named(self, one: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
        self._names[one] = name

    def verdict(self, arrival: Arrival) -> int | str:
        """Return what becomes of a request that has just come."""
        return self.script[min(len(self.arrivals), len(self.script)) - 1]

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        one = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._serving.add(one)
        one.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError):
                arrival = await self._read(reader, writer)
                self.arrivals.append(arrival)
                await self._answer(writer, self.verdict(arrival))
                # Whoever asked closes it.
                await reader.read(-1)
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Arrival:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        head, *lines = text.rstrip("\r\n").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Arrival(head, headers, body, self._names.get(writer.get_extra_info("ssl_object")))

    async def _answer(self, writer: asyncio.StreamWriter, what: int | str) -> None:
        if what == HANG:
            await asyncio.Event().wait()
        elif what == DIE:
            writer.transport.abort()
        elif what == FLOOD:
            writer.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                writer.write(b"x-more: " + b"x" * 10_000 + b"\r\n")
                await writer.drain()
        elif what == REDIRECT:
            writer.write(f"HTTP/1.1 307 X\r\nlocation: {self.where}\r\ncontent-length: 0\r\n\r\n".encode())
            await writer.drain()
        else:
            writer.write(f"HTTP/1.1 {what} X\r\ncontent-length: 2\r\nretry-after: 0\r\n\r\nok".encode())
            await writer.drain()

    async def close(self) -> None:
        serving = list(self._serving)
        for one in serving:
            one.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


class Authority:
    """A certificate authority of the test's own; ``trust`` makes whatever starts from here on believe it."""

    def __init__(self, folder: Path) -> None:
        self._made = trustme.CA()
        self.path = folder / "authority.pem"
        self._made.cert_pem.write_to_path(self.path)

    def trust(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(self.path))

    def context(self, *names: str) -> ssl.SSLContext:
        """Return what a server with these names speaks TLS by."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._made.issue_cert(*names).configure_cert(made)
        return made


@contextlib.asynccontextmanager
async def receiving(
    *script: int | str, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None, where: str = ""
) -> AsyncIterator[Receiver]:
    """A receiver that listens."""
    made = Receiver(*script, where=where)
    async with listening(made, host=host, port=port, tls=tls):
        yield made


@contextlib.asynccontextmanager
async def listening(
    made: Receiver, *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[None]:
    """Let a receiver listen."""
    if tls is not None:
        tls.sni_callback = made.named
    server = await asyncio.start_server(made.accept, host, port, ssl=tls)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield
    finally:
        server.close()
        await made.close()
        await server.wait_closed()
