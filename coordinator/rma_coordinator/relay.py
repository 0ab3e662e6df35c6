"""The relay of one answer: a bounded buffer between the worker that sends and the client that reads."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rma_core.errors import RMAError
from rma_core.models.channel import WINDOW_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator

    from rma_coordinator.domain.tasks import Attempt, Task
    from rma_coordinator.spool import Body

    #: Takes one piece, and returns what is to be awaited before the next, if anything.
    Take = Callable[[bytes], "Waits | None"]

#: Whole answers up to here are kept back until they are complete, so that a loss before that costs the client nothing.
HOLD_BYTES = 64 * 1024
#: A final HTTP status; what is below is about the connection, and never an answer.
LEAST_STATUS = 200
#: Answers of these statuses have no body.
BODILESS = frozenset({204, 304})
#: More digits than this is no length that any disk could hold.
MOST_DIGITS = 15


class Waits(Protocol):
    """Something to be awaited, or closed instead."""

    def __await__(self) -> Generator[Any, Any, None]:
        """Wait."""

    def close(self) -> None:
        """Let it be."""


class Behind:
    """A wait around another one: closed before it was begun, it lets that one be too."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, outer: Waits, inner: Waits) -> None:
        self._outer, self._inner = outer, inner

    def __await__(self) -> Generator[Any, Any, None]:
        return self._outer.__await__()

    def close(self) -> None:
        """Let both be."""
        self._outer.close()
        self._inner.close()


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


class Relay:
    """One task's answer on its way: fed by the current attempt, read by the client, at most a window between.

    ``clock`` is the dispatcher's.
    """

    def __init__(self, task: Task, body: Body, clock: Callable[[], float] = time.monotonic) -> None:
        self.task = task
        self.body = body
        self._clock = clock
        self.head: Head | None = None
        #: Whether all of the answer has come.
        self.complete = False
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._received = 0
        #: The size that the head announced, where it did.
        self._length: int | None = None
        self._changed = asyncio.Event()
        #: Told of what has been read, in steps of so many bytes, and what it has not been told of.
        self._taken: Callable[[int], None] | None = None
        self._step = self._untold = 0
        #: The attempt that feeds, and its way.
        self.source: tuple[Attempt, object] | None = None
        #: How often it was begun anew: whoever reads looks whether it still is the same answer.
        self.starts = 0
        #: Told of every change but single pieces, and of these once many wait; must be quick, and raise nothing.
        self.watch: Callable[[], None] | None = None
        #: What takes each piece as it comes, and what came of the last one.
        self._pouring: Take | None = None
        self._poured: tuple[Waits | Exception, int] | None = None

    # -- the worker's side -------------------------------------------------------------------------------------

    def begin(self, attempt: Attempt, way: object, taken: Callable[[int], None] | None = None, step: int = 0) -> None:
        """An attempt feeds from now on, by one ``way`` (a channel, a request).

        ``taken`` is told what has been read, whenever that is ``step`` bytes.
        """
        self.source, self._taken, self._step, self._untold = (attempt, way), taken, step, 0

    def way_of(self, attempt: Attempt) -> object | None:
        """Return the way by which an attempt feeds; ``None`` when it does not."""
        return self.source[1] if self.source and self.source[0] is attempt else None

    @property
    def over(self) -> bool:
        """Whether nothing more can come: its task has ended, or its end is decided."""
        return self.task.final or self.task.closing is not None

    def put_head(self, head: Head) -> None:
        """Take the answer's status and headers. Raises Overrun for a second one, or one that is no answer's."""
        if self.head is not None:
            raise Overrun("an answer has one head")
        if head.status < LEAST_STATUS:
            raise Overrun(f"an answer's status is not {head.status}")
        self.head, self._length = head, head.length
        if self.task.holder is not None:
            self.task.holder.first_byte_at = self._clock()
        self._stir()

    def put(self, data: bytes) -> None:
        """Take a piece of the answer. Raises Overrun out of order, or for more than was announced or is allowed."""
        if self.head is None:
            raise Overrun("an answer begins with its head")
        if self.complete:
            raise Overrun("nothing follows the end of an answer")
        if self._buffered + len(data) > WINDOW_BYTES:
            raise Overrun(f"more than {WINDOW_BYTES} bytes without credit")
        size = len(data)
        if self._length is not None and self._received + size > self._length:
            raise Overrun(f"the answer is longer than the {self._length} bytes that it announced")
        if not size:
            return
        self._received += size
        if self._pouring is None:
            self._keep(data)
            return
        # Handed on at once; what goes wrong with that is nothing that its worker answers for.
        waits: Waits | Exception | None
        try:
            waits = self._pouring(data)
        except Exception as error:  # noqa: BLE001 - raised where it is poured
            waits = error
        if waits is None:
            self._untold += size
            if self._untold >= self._step:
                self._tell()
            return
        self._pouring, self._poured = None, (waits, size)
        self._buffered += size
        self._changed.set()

    def _keep(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered += len(data)
        if self.watch is None:
            self._changed.set()
        elif self.crowded:
            self._stir()

    def _free(self, size: int) -> None:
        self._untold += size
        if self._untold >= self._step:
            self._tell()

    def _tell(self) -> None:
        untold, self._untold = self._untold, 0
        if self._taken is not None:
            self._taken(untold)

    def _stir(self) -> None:
        self._changed.set()
        if self.watch is not None:
            self.watch()

    async def room(self, wanted: int) -> None:
        """Wait until ``wanted`` bytes fit, or the task ends; for a source that has no window of its own."""
        while self._buffered and self._buffered + wanted > WINDOW_BYTES and not self.over:
            self._changed.clear()
            await self._changed.wait()

    def end(self) -> None:
        """The answer is whole. Raises Overrun when it cannot be."""
        if self.head is None:
            raise Overrun("an answer begins with its head")
        if self._length is not None and self._length != self._received:
            raise Overrun(f"the answer announced {self._length} bytes and has {self._received}")
        self.complete = True
        self.task.answer_bytes = self._received
        self._stir()

    def tally(self) -> None:
        """Note how much has come of the attempt that feeds; once, when it ends."""
        if self.source is not None:
            self.source[0].answer_bytes += self._received

    def restart(self) -> None:
        """Forget what a lost attempt sent; nothing of it has reached the client."""
        self.tally()
        # What another attempt sends is nothing for who took what this one did, even before that one has looked again.
        self._pouring = None
        self.head, self.complete, self.source, self._taken, self._length = None, False, None, None, None
        self._chunks.clear()
        self._buffered = self._received = 0
        self.starts += 1
        self._stir()

    def wake(self) -> None:
        """The task changed: whoever waits looks again."""
        self._stir()

    # -- the client's side -------------------------------------------------------------------------------------

    @property
    def whole(self) -> bytes | None:
        """The answer's body when all of it is here, else ``None``."""
        return b"".join(self._chunks) if self.complete else None

    @property
    def crowded(self) -> bool:
        """Whether so much waits that its worker may soon have to."""
        return self._buffered > WINDOW_BYTES // 2

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be taken."""
        return not self._buffered

    def drain(self) -> bytes:
        """Take all that waits, and give the room back."""
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        if data:
            self._free(len(data))
        return data

    async def ready(self) -> Head | None:
        """Wait for the head, and for the whole answer when it is announced as small; ``None`` when the task failed."""
        while True:
            if self.head is not None and (self.complete or not self._worth_holding):
                return self.head
            if self.over:
                return None
            self._changed.clear()
            await self._changed.wait()

    @property
    def _worth_holding(self) -> bool:
        return self._length is not None and self._length <= HOLD_BYTES

    async def pour(self, take: Take, enough: Callable[[], bool]) -> None:
        """Hand the answer on as it comes, each piece at once, until nothing more comes or it is ``enough``.

        ``take`` returns what is to be awaited before the next piece, if anything, also to have `enough` asked at once.
        Ends as `pieces` does. Raises what ``take`` raised.
        """
        starts = self.starts
        while True:
            while self._chunks:
                piece = self._chunks.popleft()
                waits = take(piece)
                if waits is not None:
                    await waits
                if self.starts != starts:
                    return
                self._buffered -= len(piece)
                self._free(len(piece))
                if enough():
                    return
            if self.complete or self.over:
                return
            await self._pour_on(take)
            if self.starts != starts or enough():
                return

    async def _pour_on(self, take: Take) -> None:
        """Hand on what comes until something else is to be done, and do that."""
        starts, self._pouring = self.starts, take
        self._changed.clear()
        try:
            await self._changed.wait()
        except asyncio.CancelledError:
            if self._poured is not None and not isinstance(self._poured[0], Exception):
                self._poured[0].close()
            self._poured = None
            raise
        finally:
            self._pouring = None
        poured, self._poured = self._poured, None
        if poured is None:
            return
        waits, size = poured
        if isinstance(waits, Exception):
            raise waits
        await waits
        if self.starts == starts:
            self._buffered -= size
            self._free(size)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the answer as it comes and give room back for each piece.

        Ends early when the task ends, and when the answer is begun anew: `starts` tells.
        """
        starts = self.starts
        while True:
            while self._chunks:
                piece = self._chunks.popleft()
                yield piece
                if self.starts != starts:
                    return
                # Room is made only once the client has it, so that never more than a window is kept for it.
                self._buffered -= len(piece)
                self._changed.set()
                self._free(len(piece))
            if self.complete or self.over:
                return
            self._changed.clear()
            await self._changed.wait()
            if self.starts != starts:
                return
