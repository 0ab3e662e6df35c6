"""The relay of one answer: a bounded buffer between the worker that sends and the client that reads."""

from __future__ import annotations

import asyncio
import errno
import tempfile
import threading
from collections import deque
from typing import IO, TYPE_CHECKING, NamedTuple

from rma_core.errors import NotFound, OutOfSpace, RMAError
from rma_core.models.channel import WINDOW_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from rma_coordinator.domain.tasks import Attempt, Task

#: Pieces in which a stored body is read again.
PIECE_BYTES = 64 * 1024
#: Whole answers up to here are kept back until they are complete, so that a loss before that costs the client nothing.
HOLD_BYTES = 64 * 1024
#: A final HTTP status; what is below is about the connection, and never an answer.
LEAST_STATUS = 200
#: Answers of these statuses have no body.
BODILESS = frozenset({204, 304})
#: More digits than this is no length that any disk could hold.
MOST_DIGITS = 15


class Overrun(RMAError):
    """A worker sent what an answer cannot be: more than its window, than it announced, or out of order."""

    code = "overrun"


class Head(NamedTuple):
    """Status and headers of an answer, as the service gave them."""

    status: int
    headers: tuple[tuple[str, str], ...]

    @property
    def length(self) -> int | None:
        """The announced size of the body, where there is one."""
        if self.status in BODILESS:
            return 0
        text = next((value.strip() for name, value in self.headers if name.lower() == "content-length"), "")
        return int(text) if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS else None


class Body:
    """A request body, small in memory, large on disk; kept until its task is final, for another attempt may be made."""

    def __init__(self, *, memory_bytes: int, folder: Path) -> None:
        self.size = 0
        self._memory_bytes = memory_bytes
        self._folder = folder
        self._memory = bytearray()
        self._file: IO[bytes] | None = None
        self._closed = False
        # One file position for all readers, each of which reads in a thread.
        self._lock = threading.Lock()

    async def write(self, data: bytes) -> None:
        """Add a piece; moves to disk once it is large. Raises OutOfSpace."""
        self.size += len(data)
        if self._file is None and self.size <= self._memory_bytes:
            self._memory += data
            return
        try:
            await asyncio.to_thread(self._spill, data)
        except OSError as error:
            reason = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be used: {error.strerror}"
            raise OutOfSpace(
                f"the disk for request bodies {reason}", hints=("send a smaller body, or try again later",)
            ) from error

    def _spill(self, data: bytes) -> None:
        with self._lock:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                # No name: the file is gone with the process, whatever ends it.
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed by `close`
                self._file.write(self._memory)
                self._memory = bytearray()
            self._file.write(data)
            # What cannot be written must be known now, not when it is read or closed.
            self._file.flush()

    def small(self) -> bytes | None:
        """Return the whole body when it is in memory."""
        return bytes(self._memory) if self._file is None else None

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body from its start; several readers may do so one after the other or at once.

        Raises NotFound when the body is closed before its end: nobody wants the task done any more.
        """
        position = 0
        while position < self.size:
            piece = self._cut(position) if self._file is None else await asyncio.to_thread(self._read, position)
            if self._closed or not piece:
                raise NotFound("the task has ended, and its body is gone")
            position += len(piece)
            yield piece

    def _cut(self, position: int) -> bytes:
        return bytes(self._memory[position : position + PIECE_BYTES])

    def _read(self, position: int) -> bytes:
        with self._lock:
            if self._file is None or self._closed:
                return b""
            self._file.seek(position)
            return self._file.read(PIECE_BYTES)

    async def close(self) -> None:
        """Let go of the memory or the file."""
        self._closed = True
        self._memory = bytearray()
        if self._file is not None:
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()


class Relay:
    """One task's answer on its way: fed by the current attempt, read by the client, at most a window between."""

    def __init__(self, task: Task, body: Body) -> None:
        self.task = task
        self.body = body
        self.head: Head | None = None
        #: Whether all of the answer has come.
        self.complete = False
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._received = 0
        self._changed = asyncio.Event()
        self._taken: Callable[[int], None] | None = None
        self._source: Attempt | None = None

    # -- the worker's side -------------------------------------------------------------------------------------

    def begin(self, attempt: Attempt, taken: Callable[[int], None]) -> None:
        """An attempt feeds from now on; ``taken`` is told the bytes that the client has read."""
        self._source, self._taken = attempt, taken

    def fed_by(self, attempt: Attempt) -> bool:
        """Whether this attempt is the one that may feed."""
        return self._source is attempt

    def put_head(self, head: Head) -> None:
        """Take the answer's status and headers. Raises Overrun for a second one, or one that is no answer's."""
        if self.head is not None:
            raise Overrun("an answer has one head")
        if head.status < LEAST_STATUS:
            raise Overrun(f"an answer's status is not {head.status}")
        self.head = head
        self._changed.set()

    def put(self, data: bytes) -> None:
        """Take a piece of the answer. Raises Overrun out of order, or for more than was announced or is allowed."""
        if self.head is None:
            raise Overrun("an answer begins with its head")
        if self.complete:
            raise Overrun("nothing follows the end of an answer")
        if self._buffered + len(data) > WINDOW_BYTES:
            raise Overrun(f"more than {WINDOW_BYTES} bytes without credit")
        if self.head.length is not None and self._received + len(data) > self.head.length:
            raise Overrun(f"the answer is longer than the {self.head.length} bytes that it announced")
        if data:
            self._chunks.append(data)
            self._buffered += len(data)
            self._received += len(data)
            self._changed.set()

    async def room(self, wanted: int) -> None:
        """Wait until ``wanted`` bytes fit, or the task ends; for a source that has no window of its own."""
        while self._buffered and self._buffered + wanted > WINDOW_BYTES and not self.task.final:
            self._changed.clear()
            await self._changed.wait()

    def end(self) -> None:
        """The answer is whole. Raises Overrun when it cannot be."""
        if self.head is None:
            raise Overrun("an answer begins with its head")
        if self.head.length not in (None, self._received):
            raise Overrun(f"the answer announced {self.head.length} bytes and has {self._received}")
        self.complete = True
        self._changed.set()

    def restart(self) -> None:
        """Forget what a lost attempt sent; nothing of it has reached the client."""
        self.head, self.complete, self._source, self._taken = None, False, None, None
        self._chunks.clear()
        self._buffered = self._received = 0
        self._changed.set()

    def wake(self) -> None:
        """The task changed: whoever waits looks again."""
        self._changed.set()

    # -- the client's side -------------------------------------------------------------------------------------

    @property
    def whole(self) -> bytes | None:
        """The answer's body when all of it is here, else ``None``."""
        return b"".join(self._chunks) if self.complete else None

    async def ready(self) -> Head | None:
        """Wait for the head, and for the whole answer when it is announced as small; ``None`` when the task failed."""
        while True:
            if self.head is not None and (self.complete or not self._worth_holding(self.head)):
                return self.head
            if self.task.final:
                return None
            self._changed.clear()
            await self._changed.wait()

    def _worth_holding(self, head: Head) -> bool:
        return head.length is not None and head.length <= HOLD_BYTES

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the answer as it comes and give room back for each piece; ends early when the task failed."""
        while True:
            while self._chunks:
                piece = self._chunks.popleft()
                yield piece
                # Room is made only once the client has it, so that never more than a window is kept for it.
                self._buffered -= len(piece)
                self._changed.set()
                if self._taken is not None:
                    self._taken(len(piece))
            if self.complete or self.task.final:
                return
            self._changed.clear()
            await self._changed.wait()
