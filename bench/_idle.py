"""Workers with next to nothing to do: each holds its channel, lets go of it and comes back as it is told, as agents do.

What they are given they answer after a while that is set, at once unless it is. They are many in one process, so each
costs little; what they say is what an agent says.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from itertools import cycle, islice
from typing import TYPE_CHECKING, TypeVar

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from bench import _load
from rma_core.agent.channel import CLOSE_TIMEOUT_S, OPEN_TIMEOUT_S, PING_EVERY_S, PING_TIMEOUT_S
from rma_core.agent.heart import GATHER_CHANNEL_S, GATHER_HTTP_S
from rma_core.models import channel as frames
from rma_core.models.worker import ATTACHED, ContainerStatus, Heartbeat, HeartbeatAnswer, ModelStatus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from rma_core.models.hardware import HardwareReport

#: Machines that register at once, and uses of one join token.
AT_ONCE, TOKEN_USES = 8, 1000
#: The service that owners share models for.
LLM = "llm"
JSON = (("content-type", "application/json"),)
MODEL_PATH = "/v1/chat/completions"
#: Good both as a service's answer and as a chat.
ANSWER = msgspec.json.encode({
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
})  # fmt: skip


class Idler(_load.Machine):
    """One such worker, whose owner shares ``models``; ``works_s`` is how long it takes for what it is given."""

    #: Places of what its owner shares.
    places = 1

    def __init__(self, url: str, report: HardwareReport, *, models: Sequence[str] = ()) -> None:
        super().__init__(url, report, by_channel=True)
        self.models = tuple(models)
        self.works_s = 0.0
        self.open = False
        #: Tasks that it was given, answers to what it said, and how often it was told to open its channel again.
        self.given = self.heard = self.called_back = 0
        self.interval_s = 30.0
        self._wanted = True
        self._soon = asyncio.Event()
        self._working: set[asyncio.Task[None]] = set()

    def share(self, *models: str) -> None:
        """Have other models from now on, and say so at once."""
        self.models = models
        self._soon.set()

    async def run(self) -> None:
        """Be there until cancelled. Raises what its connection raises."""
        try:
            while True:
                await (self._on_its_channel() if self._wanted else self._parked())
        finally:
            await self.close()

    # -- what it says ------------------------------------------------------------------------------------------

    def _heartbeat(self) -> Heartbeat:
        beat = super()._heartbeat()
        shared = tuple(ModelStatus(name=name, context=4096) for name in self.models)
        if not shared:
            return beat
        attached = ContainerStatus(
            name="attached-8000",
            service=LLM,
            state="healthy",
            runtime=ATTACHED,
            isolated=False,
            slots=self.places,
            models=shared,
        )
        return msgspec.structs.replace(beat, containers=(*beat.containers, attached))

    @property
    def slots(self) -> dict[str, int]:
        """What it offers."""
        found: dict[str, int] = {}
        for one in self._heartbeat().containers:
            found[one.service] = found.get(one.service, 0) + one.slots
        return found

    def _heard(self, answer: HeartbeatAnswer) -> None:
        self.heard += 1
        self.interval_s = answer.heartbeat_interval_s
        if answer.containers is not None:
            self._run(answer.generation, answer.containers)
            self._soon.set()
        self.called_back += answer.connect and not self._wanted
        self._wanted = answer.connect

    async def _pause(self, gather_s: float) -> None:
        """Wait until the next heartbeat is due; what has changed is told soon."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.interval_s * random.uniform(0.8, 1.0)):
                await self._soon.wait()
            await asyncio.sleep(gather_s)
        self._soon.clear()

    # -- parked ------------------------------------------------------------------------------------------------

    async def _parked(self) -> None:
        """Beat by HTTP until it is called back; the first time at once, as whoever has lost its channel does."""
        self._soon.set()
        while not self._wanted:
            await self._pause(GATHER_HTTP_S)
            self._heard(await self.beat())

    # -- on its channel ----------------------------------------------------------------------------------------

    async def _on_its_channel(self) -> None:
        socket = await connect(
            f"ws{self._url.removeprefix('http')}/api/worker/channel",
            additional_headers={"Authorization": f"Bearer {self.token}"},
            compression=None,
            max_size=frames.MAX_CONTROL_BYTES,
            open_timeout=OPEN_TIMEOUT_S,
            ping_interval=PING_EVERY_S,
            ping_timeout=PING_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            user_agent_header=None,
            proxy=None,
        )
        self.open = True
        beating = asyncio.create_task(self._beat_on(socket))
        try:
            await socket.send(frames.pack(frames.Hello(worker_id=self.worker_id, slots=self.slots)))
            self._soon.set()
            async for message in socket:
                for stream, kind, content in frames.records(message):
                    if kind == frames.CONTROL:
                        self._told(frames.unpack_down(content), socket)
                    else:
                        self._brought(stream, content)
                if not self._wanted and not self._working:
                    return
        finally:
            self.open = False
            beating.cancel()
            for one in self._working:
                one.cancel()
            await socket.close()

    async def _beat_on(self, socket: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self._pause(GATHER_CHANNEL_S)
                await socket.send(frames.pack(frames.Beat(beat=self._heartbeat(), slots=self.slots)))

    def _told(self, frame: frames.Down, socket: ClientConnection) -> None:
        if isinstance(frame, frames.Assign):
            self._heard(frame.answer)
        elif isinstance(frame, frames.Task):
            self.given += 1
            working = asyncio.create_task(self._serve(socket, frame))
            self._working.add(working)
            working.add_done_callback(self._working.discard)

    def _brought(self, stream: int, data: bytes) -> None:
        """Take a piece of a request's body; nobody looks at it."""

    async def _serve(self, socket: ClientConnection, task: frames.Task) -> None:
        stream = task.stream
        said = [frames.pack(frames.Accept(stream=stream))]
        if self.works_s:
            await socket.send(said.pop())
            await asyncio.sleep(self.works_s)
        said.append(frames.pack(frames.Head(stream=stream, status=200, headers=JSON)))
        await socket.send(frames.bundle([*said, frames.pack_data(stream, ANSWER, end=True)]))


W = TypeVar("W", bound=Idler)


@contextlib.asynccontextmanager
async def idling(workers: Sequence[W], tokens: Callable[[int], Awaitable[str]]) -> AsyncIterator[Sequence[W]]:
    """Enrol workers, and let them be there until this ends.

    ``tokens`` makes a join token of so many uses. Raises what any of them fails with.
    """
    made = [await tokens(TOKEN_USES) for _ in range(0, len(workers), TOKEN_USES)]
    async with asyncio.TaskGroup() as group:
        running: list[asyncio.Task[None]] = []
        numbers = iter(range(len(workers)))

        async def join() -> None:
            for number in numbers:
                await workers[number].register(made[number // TOKEN_USES])
                await workers[number].close()
                running.append(group.create_task(workers[number].run()))

        await asyncio.gather(*(join() for _ in range(AT_ONCE)))
        try:
            yield workers
        finally:
            for one in running:
                one.cancel()


def kinds(count: int) -> list[HardwareReport]:
    """Return the reports of so many machines, the recorded ones again and again."""
    return list(islice(cycle(_load.machines()), count))


def request(lane: str) -> tuple[str, bytes]:
    """Return where a task for a lane (a service, or ``llm`` with a model) is asked for, and with what."""
    service, _, model = lane.partition(" ")
    if not model:
        return f"/api/inference/{service}", b"{}"
    return MODEL_PATH, msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": "hello"}]})
