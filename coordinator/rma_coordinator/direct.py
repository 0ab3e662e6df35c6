"""What comes on a connection, handled the moment it comes.

A turn of the task that reads, for each piece, costs a fifteenth of all that a request does.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from rma_coordinator.api.waiting import go_on

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

#: The most that is read at once.
MOST = 64 * 1024


class Direct(asyncio.Protocol):
    """Stands between a connection and its stream: a piece is handled at once, until handling one has to wait.

    Then a task goes on with that, and what comes meanwhile waits in the stream, within the bounds of that.
    """

    def __init__(
        self, reader: asyncio.StreamReader, transport: asyncio.BaseTransport, take: Callable[[bytes], Awaitable[None]]
    ) -> None:
        self._reader, self._take = reader, take
        self._stream = cast("asyncio.Protocol", transport.get_protocol())
        transport.set_protocol(self)
        #: Whether pieces are handled at once; whether something, or the end, has gone to the stream since it was read.
        self._at_once = self._kept = False
        #: Whether whoever writes has to wait.
        self.full = False
        #: Bytes that were handled at once since the task that reads had its turn: others want theirs.
        self._handled = 0
        #: What is left to do of a piece whose handling has to wait.
        self._rest: Awaitable[None] | None = None
        self._stirred = asyncio.Event()

    async def run(self) -> None:
        """Have everything handled that comes, one piece after the other; return at the end, whatever kind it is."""
        reader = self._reader
        while data := await self._read():
            # Less than was asked for is all there was; the end may have come with it.
            self._kept = len(data) == MOST or reader.at_eof() or reader.exception() is not None
            await self._take(data)
            if len(data) == MOST:
                # There is more, maybe without end, and nothing here has to wait.
                await asyncio.sleep(0)
            while not self._kept:
                await self._go()

    async def _read(self) -> bytes:
        try:
            return await self._reader.read(MOST)
        except OSError:  # TLS's own errors are such too
            return b""

    async def _go(self) -> None:
        """Let pieces be handled at once until one has to wait, and see to that; or until the end."""
        self._stirred.clear()
        self._at_once, self._handled = True, 0
        try:
            await self._stirred.wait()
        finally:
            self._at_once = False
        rest, self._rest = self._rest, None
        if rest is not None:
            await rest

    # -- called by the transport ---------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Handle a piece, or keep it until those before it are, and others have had their turn."""
        self._handled += len(data)
        if self._handled > MOST and self._at_once:
            self._at_once = False
            self._stirred.set()
        if not self._at_once:
            self._kept = True
            self._stream.data_received(data)
            return
        steps = self._take(data).__await__()
        try:
            waits_for = next(steps)
        except StopIteration:
            return
        self._rest, self._at_once = go_on(steps, waits_for), False
        self._stirred.set()

    def eof_received(self) -> bool | None:
        """Nothing more comes."""
        self._end()
        return self._stream.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more comes, or goes."""
        self._end()
        self._stream.connection_lost(exc)

    def _end(self) -> None:
        self._kept = True
        self._stirred.set()

    def pause_writing(self) -> None:
        """Whoever writes has to wait."""
        self.full = True
        self._stream.pause_writing()

    def resume_writing(self) -> None:
        """Whoever writes may go on."""
        self.full = False
        self._stream.resume_writing()
