"""A light client for load: one HTTP/1.1 connection, one channel. A heavy one would measure itself."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect

from rma_core.agent.channel import CLOSE_TIMEOUT_S, OPEN_TIMEOUT_S, PING_EVERY_S, PING_TIMEOUT_S
from rma_core.models import channel as frames

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rma_core.models.worker import Heartbeat, HeartbeatAnswer

#: A call without an answer by then has failed.
CALL_S = 30.0


class CallFailedError(Exception):
    """A call was answered with an error, or not at all."""


class Connection:
    """One kept-alive connection to ``url``; calls on it follow one another."""

    def __init__(self, url: str, token: str = "") -> None:
        self.token = token
        #: Headers of the last answer, their names in lower case.
        self.headers: dict[str, str] = {}
        self._address = urlsplit(url)
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def call(self, method: str, path: str, body: bytes = b"", *, within_s: float = CALL_S) -> bytes:
        """Return the answer's body. Raises CallFailedError."""
        try:
            async with asyncio.timeout(within_s), self._turn:
                status, answer = await self._exchange(method, path, body)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            raise CallFailedError(f"{method} {path}: {type(error).__name__}: {error}") from None
        if not 200 <= status < 300:
            raise CallFailedError(f"{method} {path}: {status}: {answer[:300]!r}")
        return answer

    async def json(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Any:  # noqa: ANN401 - JSON
        """Return the answer as plain data. Raises CallFailedError."""
        return json.loads(await self.call(method, path, b"" if body is None else json.dumps(body).encode()))

    async def _exchange(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if self._streams is None or self._streams[0].at_eof():
            self._streams = await asyncio.open_connection(self._address.hostname, self._address.port)
        reader, writer = self._streams
        authorization = f"Authorization: Bearer {self.token}\r\n" if self.token else ""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._address.netloc}\r\n{authorization}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        self.headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        answer = await reader.readexactly(int(self.headers.get("content-length", 0)))
        if self.headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), answer

    def close(self) -> None:
        """Close it; the next call opens a new one."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Channel:
    """One worker's channel, opened and pinged as the agent does it."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, url: str, token: str, worker_id: str) -> Channel:
        """Open it, say HELLO, and return it when ASSIGN has come. Raises what ``websockets`` raises."""
        socket = await connect(
            f"ws{url.removeprefix('http')}/api/worker/channel",
            additional_headers={"Authorization": f"Bearer {token}"},
            compression=None,
            max_size=frames.MAX_CONTROL_BYTES,
            open_timeout=OPEN_TIMEOUT_S,
            ping_interval=PING_EVERY_S,
            ping_timeout=PING_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            user_agent_header=None,
            proxy=None,
        )
        channel = cls(socket)
        await channel.ask(frames.Hello(worker_id=worker_id))
        return channel

    async def beat(self, beat: Heartbeat, slots: dict[str, int]) -> HeartbeatAnswer:
        """Send HEARTBEAT and return what ASSIGN says."""
        return await self.ask(frames.Beat(beat=beat, slots=slots))

    async def ask(self, frame: frames.Frame) -> HeartbeatAnswer:
        """Send a frame that is answered by ASSIGN, and return what that says."""
        async with asyncio.timeout(CALL_S), self._turn:
            await self._socket.send(frames.pack(frame))
            while True:
                for _, kind, content in frames.records(await self._socket.recv()):
                    said = frames.unpack_down(content) if kind == frames.CONTROL else None
                    if isinstance(said, frames.Assign):
                        return said.answer

    async def close(self) -> None:
        """Close it."""
        await self._socket.close()
