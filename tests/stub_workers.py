"""Workers that stream by the contract and cost little: many answers at once, each only as fast as there is credit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import TYPE_CHECKING, TypeVar

from bench import _common, _load
from bench._idle import Idler, idling, kinds
from rma_core.models import channel as frames
from tests.openai_kit import CHAT, END, ROLE, SSE, delta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from websockets.asyncio.client import ClientConnection

    from rma_core.http import AsyncClient
    from rma_core.models.hardware import HardwareReport
    from tests.coordinator_process import Coordinator

W = TypeVar("W", bound=Idler)

MODEL = "tiny"
#: Bytes of text of one event, and about how many bytes of events leave together.
TEXT_BYTES, TOGETHER_BYTES = 4000, 16 * 1024


def token(name: str, number: int) -> str:
    """Return what an event says: whose answer it is of, which one it is, and filler."""
    return f"{name}.{number}.".ljust(TEXT_BYTES, "-")


def text(name: str, count: int) -> str:
    """Return all that an answer of so many events says."""
    return "".join(token(name, number) for number in range(count))


class Answer:
    """One answer on its way: ``name`` is who asked, ``sent`` how many bytes of the answer have gone."""

    def __init__(self, body_bytes: int) -> None:
        self.name = ""
        self.asked = bytearray()
        self.sent = 0
        self.credit = frames.WINDOW_BYTES
        self.cancelled = False
        self.body_bytes = body_bytes
        #: Set with each piece of the body, and with credit.
        self.stirred = asyncio.Event()

    async def until_asked(self) -> None:
        while len(self.asked) < self.body_bytes:
            await self._stir()

    async def room(self, wanted: int) -> None:
        while self.credit < wanted:
            await self._stir()

    async def _stir(self) -> None:
        self.stirred.clear()
        await self.stirred.wait()


class Streamer(Idler):
    """A worker whose answers have as many events as a request asks for tokens; `answers` has all it was given."""

    places = 64

    def __init__(self, url: str, report: HardwareReport, *, models: Sequence[str] = (MODEL,)) -> None:
        super().__init__(url, report, models=models)
        self.answers: dict[int, Answer] = {}
        self._under_way: dict[int, asyncio.Task[None]] = {}

    def _told(self, frame: frames.Down, socket: ClientConnection) -> None:
        if isinstance(frame, frames.Task):
            self.answers[frame.stream] = Answer(frame.offer.body_bytes)
        elif isinstance(frame, frames.Credit):
            answer = self.answers[frame.stream]
            answer.credit += frame.bytes
            answer.stirred.set()
        elif isinstance(frame, frames.Cancel):
            self.answers[frame.stream].cancelled = True
            self._under_way[frame.stream].cancel()
        super()._told(frame, socket)

    def _brought(self, stream: int, data: bytes) -> None:
        self.answers[stream].asked += data
        self.answers[stream].stirred.set()

    async def _serve(self, socket: ClientConnection, task: frames.Task) -> None:
        current = asyncio.current_task()
        assert current is not None
        self._under_way[task.stream] = current
        answer, stream = self.answers[task.stream], task.stream
        await socket.send(frames.pack(frames.Accept(stream=stream)))
        await answer.until_asked()
        await socket.send(frames.pack(frames.Head(stream=stream, status=200, headers=SSE)))
        asked = json.loads(answer.asked)
        answer.name = asked["messages"][0]["content"]
        waiting = bytearray(ROLE)
        for number in range(asked["max_tokens"]):
            waiting += delta(token(answer.name, number))
            if len(waiting) >= TOGETHER_BYTES:
                await self._give(socket, stream, bytes(waiting))
                waiting.clear()
        await self._give(socket, stream, bytes(waiting + delta(finish="stop") + END), end=True)

    async def _give(self, socket: ClientConnection, stream: int, data: bytes, *, end: bool = False) -> None:
        answer = self.answers[stream]
        await answer.room(len(data))
        answer.credit -= len(data)
        answer.sent += len(data)
        await socket.send(frames.pack_data(stream, data, end=end))


def request(name: str, count: int) -> bytes:
    """Return the request of whoever goes by a name for a streamed answer of so many events."""
    messages = [{"role": "user", "content": name}]
    return json.dumps({"model": MODEL, "stream": True, "max_tokens": count, "messages": messages}).encode()


def head(coordinator: Coordinator, body: bytes) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: x", f"Authorization: Bearer {coordinator.key}", "Connection: close"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


@contextlib.contextmanager
def unread(coordinator: Coordinator, body: bytes) -> Iterator[None]:
    """Ask for a stream, and never read it."""
    with socket.socket() as ours:
        # With little room on its side, what it does not read waits elsewhere.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ours.connect(("127.0.0.1", coordinator.port))
        ours.sendall(head(coordinator, body))
        yield


async def offered(client: AsyncClient) -> None:
    """Wait until the pool has the model."""
    while not (await client.get("/v1/models")).json()["data"]:  # noqa: ASYNC110 - another process's to signal
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def joined(
    coordinator: Coordinator, makes: Sequence[Callable[[str, HardwareReport], W]]
) -> AsyncIterator[Sequence[W]]:
    """Workers of these kinds, on their channels."""
    server = _common.Server(coordinator.url, coordinator.key, coordinator.process)
    made = [make(server.url, report) for make, report in zip(makes, kinds(len(makes)), strict=True)]
    async with idling(made, lambda uses: _load.join_token(server, uses)) as workers:
        yield workers


class Memory:
    """Looks at the coordinator's memory all the time; ``growth`` is the most that it grew."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._before = coordinator.resident_bytes()
        self.growth = 0

    def look(self) -> int:
        """Look now, and return by how much it has grown."""
        now = self._coordinator.resident_bytes() - self._before
        self.growth = max(self.growth, now)
        return now

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Look again and again until this ends."""

        async def watch() -> None:
            while True:
                self.look()
                await asyncio.sleep(0.05)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            self.look()
            watching.cancel()
