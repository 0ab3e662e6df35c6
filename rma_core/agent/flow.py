"""Flow control: a bounded pipe between two tasks, and the window of bytes a receiver allows."""

from __future__ import annotations

import asyncio

from rma_core.models.channel import WINDOW_BYTES


class Pipe:
    """Bytes on their way from one task to another; it ends once, or breaks once with an exception.

    `put` waits while ``limit_bytes`` are inside; `feed` never waits and is for senders that keep to a window.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._data = bytearray()
        self._ended = False
        self._error: BaseException | None = None
        self._readable, self._writable = asyncio.Event(), asyncio.Event()
        self._writable.set()

    def __len__(self) -> int:
        return len(self._data)

    def feed(self, data: bytes) -> None:
        """Add bytes without waiting."""
        self._data += data
        if data:
            self._readable.set()
        if len(self._data) >= self._limit_bytes:
            self._writable.clear()

    async def put(self, data: bytes) -> None:
        """Add bytes once there is room. Raises what `fail` was given."""
        await self._writable.wait()
        if self._error is not None:
            raise self._error
        self.feed(data)

    def end(self) -> None:
        """Say that nothing follows."""
        self._ended = True
        self._readable.set()

    def fail(self, error: BaseException) -> None:
        """Break the pipe: both sides get ``error``; what was inside is lost."""
        if self._error is None:
            self._error = error
        self._readable.set()
        self._writable.set()

    async def take(self, limit_bytes: int) -> bytes:
        """Return 1 to ``limit_bytes`` bytes, or none at the end. Raises what `fail` was given."""
        await self._readable.wait()
        if self._error is not None:
            raise self._error
        data = bytes(self._data[:limit_bytes])
        del self._data[:limit_bytes]
        if not self._data and not self._ended:
            self._readable.clear()
        if len(self._data) < self._limit_bytes:
            self._writable.set()
        return data

    def whole(self) -> bytes:
        """Return everything at once when it has all come and fits, else nothing, and leave it here."""
        if not self._ended or self._error is not None:
            return b""
        data = bytes(self._data)
        self._data.clear()
        return data


class Window:
    """The bytes a receiver still allows."""

    def __init__(self, size_bytes: int = WINDOW_BYTES) -> None:
        self._left = size_bytes
        self._size = size_bytes
        self._open = asyncio.Event()
        self._open.set()

    @property
    def is_open(self) -> bool:
        """Whether something may be sent now."""
        return self._open.is_set()

    def give(self, count: int) -> None:
        """Add what the receiver has taken; it cannot give back more than it got."""
        self._left = min(self._size, self._left + count)
        if self._left > 0:
            self._open.set()

    def open(self) -> None:
        """Let whoever waits go on: what is taken from now on goes elsewhere, where no window is."""
        self._left = self._size
        self._open.set()

    async def take(self, limit_bytes: int) -> int:
        """Wait until something may be sent and return how much, at most ``limit_bytes``."""
        await self._open.wait()
        count = min(limit_bytes, self._left)
        self._left -= count
        if not self._left:
            self._open.clear()
        return count
