"""What waits to be sent on the channel: frames that are ready in the same moment leave in one message, in order."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rma_core.agent.answers import LinkLostError
from rma_core.models.channel import BUNDLE_BYTES, bundle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

#: Bytes that wait at most; whoever has more to send waits for them to leave.
FULL_BYTES = 256 * 1024
#: Seconds that a frame waits at most for others that are known to follow.
PATIENCE_S = 0.005


class Outbox:
    """Frames on their way into one connection; `run` sends them with ``send`` until that fails.

    A message costs both sides more than all else about a small frame, and wakes the other side up.
    """

    def __init__(self, send: Callable[[str | bytes], Awaitable[None]]) -> None:
        self._send = send
        self._waiting: list[str | bytes] = []
        self._size = 0
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._room.set()
        self._timer: asyncio.TimerHandle | None = None
        self._flushed: list[asyncio.Future[None]] = []
        self._broken: LinkLostError | None = None

    async def put(self, frame: str | bytes, *, more: bool = False) -> None:
        """Let a packed frame leave now, or, when ``more`` is expected to follow, together with that.

        Waits while too much waits already. Raises LinkLostError once the connection is known to be broken.
        """
        while self._size >= FULL_BYTES and self._broken is None:
            self._room.clear()
            await self._room.wait()
        if self._broken is not None:
            raise self._broken
        self._waiting.append(frame)
        self._size += len(frame)
        if not more or self._size >= BUNDLE_BYTES:
            self._news.set()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._news.set)

    async def flush(self) -> None:
        """Return once everything that waits now has left. Raises LinkLostError."""
        if self._broken is not None:
            raise self._broken
        left = asyncio.get_running_loop().create_future()
        self._flushed.append(left)
        self._news.set()
        await left

    async def run(self) -> None:
        """Send what waits, until cancelled or ``send`` raises LinkLostError."""
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                self._forget_timer()
                flushed, self._flushed = self._flushed, []
                while self._waiting:
                    await self._send(bundle(self._taken()))
                for one in flushed:
                    if not one.done():
                        one.set_result(None)
        finally:
            self._break()

    def _taken(self) -> list[str | bytes]:
        """Take as many frames as leave together."""
        count, size = 0, 0
        for frame in self._waiting:
            size += len(frame)
            if count and size > BUNDLE_BYTES:
                size -= len(frame)
                break
            count += 1
        frames = self._waiting[:count]
        del self._waiting[:count]
        self._size -= size
        self._room.set()
        return frames

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _break(self) -> None:
        """Let everybody who waits know that nothing leaves any more."""
        self._broken = LinkLostError("the channel broke")
        self._forget_timer()
        self._room.set()
        for one in self._flushed:
            if not one.done():
                one.set_exception(self._broken)
                # Whoever waited may have been cancelled; then nobody fetches it.
                one.exception()
