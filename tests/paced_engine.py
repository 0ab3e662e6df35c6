"""A stand-in for a llama.cpp of a chosen speed: it takes the time that one would, and counts what it makes.

Tokens are words. Requests share it as they share a batch: each one more slows every one down by CROWDING, as dispatch
reckons. It keeps what it has read and answered, goes on from the longest beginning that it knows, and tells in its
`timings` what that was. What is due is reckoned by the clock, so that a busy machine delays what it says and not what
it makes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from rma_coordinator.domain.speeds import CROWDING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

#: Conversations that it keeps, as many as fit into a llama.cpp's memory beside its slots.
KEPT = 256
#: What rounding may leave of work that is done.
ROUNDING_S = 1e-9
#: Tokens of an answer when nobody says.
ANSWER = 16


class Turn(NamedTuple):
    """One request that it was given: what of its prompt it knew already, in tokens."""

    chat: str
    cached: int
    prompt: int

    def knew_all_but(self, tokens: int) -> bool:
        """Say whether nothing had to be read but so many tokens at the end."""
        return self.prompt - self.cached <= tokens


class Work:
    """What is left to do of one request: seconds that reading and answering would take it alone."""

    def __init__(self, reading_s: float, answering_s: float) -> None:
        self.left = [reading_s, answering_s]
        self.phase = 0
        #: Set when it has read everything, and when it has answered.
        self.done = (asyncio.Event(), asyncio.Event())


class PacedEngine:
    """A server with some models, that reads and answers so many tokens a second, so many requests at once."""

    def __init__(self, *models: str, speed: float, reading: float, slots: int) -> None:
        self.models, self.speed, self.reading, self.slots = models, speed, reading, slots
        self.url = ""
        self.turns: list[Turn] = []
        #: When the first request came, on the loop's clock; the most requests that it had at one time.
        self.begun_at: float | None = None
        self.most = 0
        self._has = 0
        self._made = 0.0
        self._active: list[Work] = []
        self._queue = asyncio.Semaphore(slots)
        self._kept: OrderedDict[int, tuple[str, ...]] = OrderedDict()
        self._numbers = itertools.count()
        self._loop = asyncio.get_running_loop()
        self._at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def made(self) -> float:
        """Tokens of answers that it has made until now."""
        self._advance()
        return self._made

    @property
    def busy(self) -> int:
        """Requests that it works on."""
        return len(self._active)

    # -- time ----------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Do what was to be done until now, one end after the other."""
        now = self._loop.time()
        while self._active:
            rate = 1 / (1 + CROWDING * (len(self._active) - 1))
            first = min(self._active, key=lambda work: work.left[work.phase])
            took = min(first.left[first.phase] / rate, now - self._at)
            self._made += sum(work.phase for work in self._active) * took * rate * self.speed
            for work in self._active:
                work.left[work.phase] -= took * rate
            self._at += took
            if first.left[first.phase] > ROUNDING_S:
                return
            self._ended(first)
        self._at = now

    def _ended(self, work: Work) -> None:
        work.done[work.phase].set()
        work.phase += 1
        if work.phase == len(work.left):
            self._active.remove(work)

    def _wake(self) -> None:
        """See to it that the next end is noticed."""
        self._advance()
        if self._timer is not None:
            self._timer.cancel()
        if self._active:
            rate = 1 / (1 + CROWDING * (len(self._active) - 1))
            least = min(work.left[work.phase] for work in self._active)
            self._timer = self._loop.call_at(self._at + least / rate, self._wake)

    @contextlib.asynccontextmanager
    async def _working(self, fresh: int, tokens: int) -> AsyncIterator[Work]:
        self._has += 1
        self.most = max(self.most, self._has)
        async with contextlib.AsyncExitStack() as held:
            held.callback(self._left)
            await held.enter_async_context(self._queue)
            work = Work(fresh / self.reading, tokens / self.speed)
            self._advance()
            self._active.append(work)
            self._wake()
            try:
                yield work
            finally:
                self._advance()
                if work in self._active:
                    self._active.remove(work)
                self._wake()

    def _left(self) -> None:
        self._has -= 1

    # -- its cache -----------------------------------------------------------------------------------------------

    def _known(self, prompt: tuple[str, ...]) -> tuple[int, int | None]:
        """Return how many tokens of a prompt it has, and under which number."""
        best, found = 0, None
        for number, kept in self._kept.items():
            same = next((at for at, (a, b) in enumerate(zip(prompt, kept, strict=False)) if a != b), None)
            length = min(len(prompt), len(kept)) if same is None else same
            if length > best:
                best, found = length, number
        return best, found

    def _keep(self, words: tuple[str, ...], instead: int | None) -> None:
        if instead is not None and words[: len(self._kept.get(instead, ("",)))] == self._kept.get(instead):
            del self._kept[instead]
        self._kept[next(self._numbers)] = words
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    # -- HTTP ----------------------------------------------------------------------------------------------------

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, *_ = head.split()
            lengths = [
                line.partition(":")[2] for line in head.lower().splitlines() if line.startswith("content-length:")
            ]
            body = await reader.readexactly(int(lengths[0])) if lengths else b""
            if method == "POST":
                await self._until_left(reader, self._chat(json.loads(body), writer))
            else:
                await _whole(writer, self._says(path))
        writer.close()

    def _says(self, path: str) -> object:
        """Return what llama.cpp answers there."""
        if path == "/props":
            return {"total_slots": self.slots, "default_generation_settings": {"n_ctx": 4096}, "is_sleeping": False}
        if path == "/slots":
            return [{"id": number, "is_processing": number < self.busy} for number in range(self.slots)]
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": name, "owned_by": "llamacpp"} for name in self.models]}
        return None

    async def _until_left(self, reader: asyncio.StreamReader, answer: Any) -> None:
        """Answer, unless who asked leaves before."""
        left, answering = asyncio.create_task(reader.read(1)), asyncio.create_task(answer)
        try:
            await asyncio.wait({left, answering}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (left, answering):
                one.cancel()
            await asyncio.gather(left, answering, return_exceptions=True)

    async def _chat(self, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.begun_at = self.begun_at or self._loop.time()
        prompt = tuple(word for one in asked["messages"] for word in f"{one['role']}: {one['content']}".split())
        tokens = int(asked.get("max_tokens") or ANSWER)
        cached, known = self._known(prompt)
        # One token is always read, as llama.cpp has to.
        cached = min(cached, len(prompt) - 1)
        self.turns.append(Turn(str(asked["messages"][0]["content"]).partition(":")[0], cached, len(prompt)))
        text = " ".join(f"w{number}" for number in range(tokens - 1))
        async with self._working(len(prompt) - cached, tokens) as work:
            began = self._loop.time()
            await work.done[0].wait()
            read_at = self._loop.time()
            if asked.get("stream"):
                await _begin(writer, "text/event-stream")
                await _event(writer, _chunk(asked["model"], "w "))
            await work.done[1].wait()
        self._keep((*prompt, "assistant:", "w", *text.split()), known)
        timings = {
            "cache_n": cached, "prompt_n": len(prompt) - cached, "prompt_ms": 1000 * (read_at - began),
            "predicted_n": tokens, "predicted_ms": 1000 * (self._loop.time() - read_at),
        }  # fmt: skip
        usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens, "total_tokens": len(prompt) + tokens}
        if asked.get("stream"):
            await _event(writer, _chunk(asked["model"], text))
            await _event(writer, {**_chunk(asked["model"], None, finish="stop"), "timings": timings})
            await _event(writer, {"choices": [], "usage": usage})
            writer.write(b"data: [DONE]\n\n")
            await writer.drain()
            return
        message = {"role": "assistant", "content": f"w {text}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {"id": "1", "object": "chat.completion", "created": 1, "model": asked["model"], "choices": [choice]}
        await _whole(writer, {**whole, "usage": usage, "timings": timings})


def _chunk(model: str, content: str | None, *, finish: str | None = None) -> dict[str, Any]:
    delta = {} if content is None else {"role": "assistant", "content": content}
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": choices}


async def _begin(writer: asyncio.StreamWriter, kind: str) -> None:
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode())
    await writer.drain()


async def _event(writer: asyncio.StreamWriter, event: object) -> None:
    writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
    await writer.drain()


async def _whole(writer: asyncio.StreamWriter, found: object) -> None:
    status = "404 Not Found" if found is None else "200 OK"
    data = json.dumps(found).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(data)}"
    writer.write(f"{head}\r\n\r\n".encode() + data)
    await writer.drain()


@contextlib.asynccontextmanager
async def paced_engine(*models: str, speed: float, reading: float, slots: int) -> AsyncIterator[PacedEngine]:
    """Run one until this ends."""
    engine = PacedEngine(*models, speed=speed, reading=reading, slots=slots)
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.close()
        await server.wait_closed()
