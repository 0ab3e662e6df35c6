"""A cable between an agent and its coordinator that tests cut, pull out and plug in again."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tests.agent_service import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Cable:
    """Forwards TCP; `cut` ends every connection, `unplug` lets none come, `pull` swallows all bytes without a word."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = ""
        self._to = (parts.hostname, parts.port)
        self._plugged = self._flowing = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._cuts = 0

    def cut(self) -> None:
        self._cuts += 1
        for writer in list(self._writers):
            writer.transport.abort()

    def unplug(self) -> None:
        self._plugged = False
        self.cut()

    def plug(self) -> None:
        self._plugged = self._flowing = True

    def pull(self) -> None:
        self._flowing = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cuts = self._cuts
        if not self._plugged:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._to)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        try:
            if cuts != self._cuts:
                return
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            for one in (writer, far_writer):
                self._writers.discard(one)
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # An aborted connection ends both ways, one as an error and one as an end.
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self._flowing:
                    writer.write(data)
                    await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def cable_to(url: str) -> AsyncIterator[Cable]:
    cable = Cable(url)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await cable.serve(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    cable.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield cable
    finally:
        server.close()
        cable.unplug()
        if tasks:
            await asyncio.wait(tasks, timeout=PATIENCE_S)
        await server.wait_closed()
