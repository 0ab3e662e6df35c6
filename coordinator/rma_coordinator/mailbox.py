"""What an application has yet to receive of one request, or of one WebSocket."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

Message = dict[str, Any]

#: The extension of a WebSocket's scope that has messages handed over the moment they come; see `Socket.hand_over`.
HAND_OVER = "rma.hand_over"
#: The extension of a request's scope that writes its answer without messages, where the server has one: an `AtOnce`.
AT_ONCE = "rma.at_once"
#: Messages that wait for the application, of at most what is read at once.
MOST_TOLD = 10


class AtOnce(Protocol):
    """Writes an answer that nothing holds up; where it says ``False``, nothing was written, and messages are sent.

    A message for each piece is a coroutine, and a call of the server's, beside the write.
    """

    def piece(self, data: bytes, /) -> bool:
        """Write a piece of an answer that has begun."""

    def whole(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes, /) -> bool:
        """Write a whole answer, of a status that has a body; whoever has it written returns then.

        Its headers, their names in lower case, say its length once; the request's body has been read.
        """


class Mailbox:
    """What an application has yet to receive: a few messages at most, then that nobody is there any more."""

    __slots__ = ("_last", "_ready", "_room", "_told", "gone")

    def __init__(self, last: Message) -> None:
        self._last = last
        self._told: deque[Message] = deque()
        #: Set when there is something to receive, and when there is room for more.
        self._ready: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self.gone = False

    async def put(self, message: Message) -> None:
        """Add a message; wait while too many wait already. Once nobody is there it is thrown away."""
        while len(self._told) >= MOST_TOLD and not self.gone:
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        if not self.gone:
            self._told.append(message)
            _wake(self._ready)

    def leave(self, last: Message | None = None) -> None:
        """Nobody is there any more: what waits can still be received."""
        if not self.gone:
            self.gone, self._last = True, last or self._last
            _wake(self._ready)
            _wake(self._room)

    async def receive(self) -> Message:
        """Return the next message."""
        while not self._told:
            if self.gone:
                return self._last
            self._ready = asyncio.get_running_loop().create_future()
            await self._ready
        told = self._told.popleft()
        _wake(self._room)
        return told


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
