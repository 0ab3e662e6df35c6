"""The clients of a run under /v1: each one's end of its connection, begun late, never silent, cut when it falls behind.

A client alone sets the pace of its run, by back-pressure. Of several the quickest does, and one that falls behind by
more than MOST_BEHIND is cut: it holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from rma_coordinator.api.asgi import PATIENCE_S, Gone
from rma_coordinator.api.waiting import Ahead
from rma_coordinator.relay import Behind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from rma_coordinator.api.asgi import Call
    from rma_coordinator.api.v1.requests import Manner
    from rma_coordinator.relay import Waits

#: Bytes that may wait for one of several clients; when half of it waits for each of them, their run waits too.
MOST_BEHIND = 256 * 1024


class Quiet(NamedTuple):
    """When a silent client is told that it still is waited for: first, then again and again, and with what."""

    first_s: float
    again_s: float
    says: bytes


class Client:
    """One client that waits for an answer; ``opening`` gives the headers that go out before its first byte.

    ``asked_at`` is when it began to wait, by ``clock``.
    """

    def __init__(
        self,
        call: Call,
        manner: Manner,
        *,
        opening: Callable[[], list[tuple[bytes, bytes]]],
        quiet: Quiet | None,
        clock: Callable[[], float],
        asked_at: float,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.call = call
        self.manner = manner
        self.opening = opening
        self._quiet = quiet
        self._clock = clock
        self._asked_at = self._sent_at = asked_at
        self._turn = asyncio.Lock()
        #: How many send or wait for their turn.
        self._sends = 0
        #: Done when its run has ended, when it has left, or when it was cut.
        self.over: asyncio.Future[None] = loop.create_future()
        #: Whether it is cut: it fell behind, or it cannot be written to; whether it was given the last of its answer.
        self.cut = self.ended = False
        #: Whether it is given everything at its own pace, with nothing that waits for it.
        self.alone = True
        self._left = Ahead(call.left(), self.wake)
        self._timer = loop.call_later(quiet.first_s, self._beat) if quiet else None
        self._beating: asyncio.Task[None] | None = None
        self._backlog: Backlog | None = None

    # -- the run's side ----------------------------------------------------------------------------------------

    @property
    def waited_s(self) -> tuple[float, float]:
        """Seconds since it asked, and since it last was sent anything: SDKs count the one or the other."""
        now = self._clock()
        return now - self._asked_at, now - self._sent_at

    @property
    def lost_patience(self) -> bool:
        """Whether it left because it had waited as long as it does, and will ask again."""
        return any(map(self.manner.lost_patience, self.waited_s))

    @property
    def gave_up(self) -> bool:
        """Whether it may have given up long ago, although its connection stands."""
        return self.manner.gave_up(self.waited_s[1])

    @property
    def crowded(self) -> bool:
        """Whether it should get no more: so much waits for it, or it is cut."""
        return self.cut or (self._backlog is not None and self._backlog.bytes > MOST_BEHIND // 2)

    def wake(self) -> None:
        """Its run has ended, or it is to look again."""
        if not self.over.done():
            self.over.set_result(None)

    def drop(self) -> None:
        """Cut it."""
        self.cut = True
        self.wake()

    def accompany(self, stirred: Callable[[], None]) -> None:
        """Let what it is given wait for it from now on, for it is not alone; ``stirred`` is told when some has gone."""
        if self._backlog is None:
            self.alone, self._backlog = False, Backlog(self, stirred)

    def post(self, data: bytes, *, more: bool = True) -> None:
        """Give it whole events without waiting; one for which too many wait is cut."""
        self.ended = self.ended or not more
        if self._backlog is None or not self._backlog.add(data, more=more):
            self.drop()

    # -- its own side ------------------------------------------------------------------------------------------

    async def send(self, data: bytes, *, more: bool = True) -> None:
        """Send whole events, with what comes before the first of them. Raises Gone."""
        self.ended = self.ended or not more
        async with self._in_turn():
            if not self.call.started:
                await self.call.begin(200, self.opening())
            await self.call.write(data, more=more)
            self._sent_at = self._clock()

    def push(self, data: bytes) -> Waits | None:
        """Send whole events at once; return what is to be awaited before more is sent, if anything. Raises Gone."""
        if self._sends or not self.call.started:
            return self.send(data)
        waits = self.call.push(data)
        self._sent_at = self._clock()
        return None if waits is None else Behind(self._after(waits), waits)

    async def _after(self, waits: Waits) -> None:
        async with self._in_turn():
            await waits

    @contextlib.asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        self._sends += 1
        try:
            async with self._turn:
                yield
        finally:
            self._sends -= 1

    async def end(self, data: bytes) -> None:
        """Send the last of its answer, behind all that still waits for it. Raises Gone."""
        if self._backlog is None:
            await self.send(data, more=False)
            return
        self.post(data, more=False)
        await self.flush()

    async def flush(self) -> None:
        """Wait until it has all that it was given; the last of it among that. Raises Gone."""
        if self._backlog is not None:
            await self._backlog.empty()
        if self.cut:
            raise Gone

    async def settle(self) -> None:
        """Send nothing more by itself, and wait for what it was just sending."""
        if self._timer is not None:
            self._timer.cancel()
        if self._beating is not None:
            await asyncio.wait({self._beating})

    def close(self) -> None:
        """Forget it: its answer is there, or it has gone."""
        self._left.close()
        if self._timer is not None:
            self._timer.cancel()
        if self._beating is not None:
            self._beating.cancel()
        if self._backlog is not None:
            self._backlog.close()

    # -- silence -----------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Say something if it has heard nothing for long, and look again later."""
        quiet = self._quiet
        if quiet is None or self.over.done():
            return
        loop = asyncio.get_running_loop()
        silent_s = self._clock() - self._sent_at
        wait_s = quiet.again_s if self.call.started else quiet.first_s
        if self._sends:
            # It is not silent, it only reads slowly.
            self._timer = loop.call_later(quiet.again_s, self._beat)
        elif silent_s < wait_s:
            self._timer = loop.call_later(wait_s - silent_s, self._beat)
        else:
            self._beating = asyncio.create_task(self._say(quiet.says), name="a sign of life under /v1")
            self._timer = loop.call_later(quiet.again_s, self._beat)

    async def _say(self, what: bytes) -> None:
        try:
            await self.send(what)
        except Gone:
            self.drop()


class Backlog:
    """What waits for a client that is not alone."""

    def __init__(self, client: Client, stirred: Callable[[], None]) -> None:
        self._client = client
        self._stirred = stirred
        self._waiting: deque[tuple[bytes, bool]] = deque()
        self.bytes = 0
        self._added = asyncio.Event()
        self._pumping = asyncio.create_task(self._pump(), name="what waits for a client under /v1")

    def add(self, data: bytes, *, more: bool) -> bool:
        """Add to it, and say whether there was room."""
        if self.bytes + len(data) > MOST_BEHIND:
            return False
        self._waiting.append((data, more))
        self.bytes += len(data)
        self._added.set()
        return True

    async def empty(self) -> None:
        """Wait until the last of it was sent. Raises Gone when that takes too long."""
        done, _ = await asyncio.wait({self._pumping}, timeout=PATIENCE_S)
        if not done:
            raise Gone

    def close(self) -> None:
        """Send nothing more."""
        self._pumping.cancel()

    async def _pump(self) -> None:
        more = True
        try:
            while more:
                while not self._waiting:
                    self._added.clear()
                    await self._added.wait()
                data, more = self._waiting.popleft()
                await self._client.send(data, more=more)
                self.bytes -= len(data)
                self._stirred()
        except Gone:
            self._client.drop()
