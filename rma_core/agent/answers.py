"""Answers that this machine still has: kept while they are on their way, and delivered late when that way broke.

All of it is in memory and bounded: what people asked and were answered is never written to the volunteer's disk.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import TYPE_CHECKING

from rma_core.backoff import Backoff
from rma_core.errors import (
    CoordinatorError,
    CoordinatorUnreachable,
    Forbidden,
    NotAuthenticated,
    NotFound,
    Refused,
    RMAError,
    TryLater,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from rma_core.agent.client import CoordinatorClient
    from rma_core.models.worker import AttemptRef

logger = logging.getLogger(__name__)

#: Bytes of one answer that are kept; a larger one is lost with its way.
MAX_ANSWER_BYTES = 1024 * 1024
#: Bytes of all answers together that are kept while they are on their way.
MAX_COPIES_BYTES = 32 * 1024 * 1024
#: Answers that are sent and perhaps not read yet; beyond that the oldest is taken to have arrived.
MAX_SENT = 512
#: Answers that wait for late delivery, and their bytes; beyond that the oldest is let go.
MAX_KEPT, MAX_KEPT_BYTES = 256, 64 * 1024 * 1024
#: Seconds after which nobody can want a late answer any more.
KEEP_S = 3600.0
#: Late deliveries at one time, and the seconds that one may take.
MAX_DELIVERIES, DELIVER_WITHIN_S = 8, 300.0
#: Waits between two tries to deliver.
RETRY_BASE_S, RETRY_CAP_S = 1.0, 60.0

#: Failures that say nothing about the answer itself: it may be wanted later.
NOT_NOW = (CoordinatorUnreachable, TryLater, NotAuthenticated)


class LinkLostError(RMAError):
    """The way to the coordinator broke while an answer was on it; the attempt is lost, nobody can be told."""

    code = "link_lost"


class Copy:
    """One answer as far as it has come; `kept` until it is too large, or there is no room for it."""

    def __init__(
        self, room: Room, ref: AttemptRef, status: int, headers: Sequence[tuple[str, str]], length: int | None
    ) -> None:
        self.ref, self.status, self.headers = ref, status, tuple(headers)
        self.kept = True
        self.body = bytearray()
        self._room, self._reserved = room, 0
        self._reserve(length or 0)

    def add(self, chunk: bytes) -> None:
        """Add what follows."""
        if self.kept and self._reserve(len(self.body) + len(chunk)):
            self.body += chunk

    def _reserve(self, size: int) -> bool:
        more = max(0, size - self._reserved)
        if size > MAX_ANSWER_BYTES or not self._room.take(more):
            self.drop()
            return False
        self._reserved += more
        return True

    def drop(self) -> None:
        """Keep it no longer."""
        self.kept = False
        self.body = bytearray()
        self.release()

    def release(self) -> None:
        """Give its room back, but not its bytes: somebody else counts them now."""
        self._room.give(self._reserved)
        self._reserved = 0

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield its body, as often as it is asked for."""
        if self.body:
            yield bytes(self.body)


class Room:
    """Bytes that all copies may have together."""

    def __init__(self, limit_bytes: int) -> None:
        self.left = limit_bytes

    def take(self, count: int) -> bool:
        """Take room, if there is that much."""
        if count > self.left:
            return False
        self.left -= count
        return True

    def give(self, count: int) -> None:
        """Give room back."""
        self.left += count


class Late:
    """A whole answer that waits for its delivery."""

    def __init__(self, copy: Copy, now: float) -> None:
        self.copy, self.since = copy, now
        self.delivery: asyncio.Task[None] | None = None

    @property
    def size(self) -> int:
        """Bytes of its body."""
        return len(self.copy.body)


class Answers:
    """Every answer that may still be wanted from here; `run` delivers what waits.

    ``changed`` is called when there is one more to list in heartbeats.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        *,
        changed: Callable[[], None] = lambda: None,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._changed, self._clock = client, changed, clock
        self._backoff = backoff or Backoff(base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S)
        self._room = Room(MAX_COPIES_BYTES)
        self._sent: dict[str, Copy] = {}
        self._late: dict[str, Late] = {}
        self._not_before = 0.0
        #: The newest delivery did not reach the coordinator.
        self._unreached = False
        self._news = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        #: Set while an answer is sent of which it is not known that it was read.
        self.unconfirmed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._sent) + len(self._late)

    def refs(self) -> tuple[AttemptRef, ...]:
        """Return the attempts whose answers wait for their delivery."""
        return tuple(late.copy.ref for late in self._late.values())

    # While an answer is on its way.

    def copy(self, ref: AttemptRef, status: int, headers: Sequence[tuple[str, str]], length: int | None) -> Copy:
        """Begin to keep an answer; ``length`` is its announced size, where there is one."""
        return Copy(self._room, ref, status, headers, length)

    def sent(self, copy: Copy) -> None:
        """The end of an answer was sent, and nobody has said that it arrived."""
        if not copy.kept:
            return
        if len(self._sent) >= MAX_SENT:
            self.confirm([next(iter(self._sent))])
        self._sent[copy.ref.lease_id] = copy
        self._look()

    def marks(self) -> tuple[str, ...]:
        """Return what `confirm` is to be given once everything sent until now has been read."""
        return tuple(self._sent)

    def confirm(self, marks: Sequence[str]) -> None:
        """The coordinator has read these."""
        for mark in marks:
            copy = self._sent.pop(mark, None)
            if copy is not None:
                copy.drop()
        self._look()

    def broke(self) -> None:
        """The way broke: what was sent may not have arrived, and is delivered once more.

        Not at once: a moment later the way is mended, perhaps, and what was still on it has been read.
        """
        copies = list(self._sent.values())
        self._sent.clear()
        if copies:
            self._not_before = max(self._not_before, self._clock() + self._backoff.next_s())
        for copy in copies:
            self.keep(copy)
        self._look()

    # Late delivery.

    def keep(self, copy: Copy) -> None:
        """Keep a whole answer until it is delivered, refused or too old. Raises LinkLostError when it is not here."""
        if not copy.kept:
            raise LinkLostError("the way to the coordinator broke, and the answer is too large to be kept")
        copy.release()
        if not self._late:
            self._backoff.reset()
        self._late[copy.ref.lease_id] = Late(copy, self._clock())
        about = {"action": "answer_kept", "task": copy.ref.task_id, "attempt": copy.ref.attempt}
        words = "%s attempt %d: nobody has said that its answer arrived; it is kept, to be sent again"
        logger.info(words, copy.ref.task_id, copy.ref.attempt, extra=about)
        while len(self._late) > MAX_KEPT or sum(late.size for late in self._late.values()) > MAX_KEPT_BYTES:
            self._forget(next(iter(self._late.values())), "too many answers wait")
        self._look()
        self._changed()

    def kick(self) -> None:
        """Deliver now: the coordinator has just been heard of."""
        self._backoff.reset()
        self._not_before, self._unreached = 0.0, False
        self._news.set()

    def heard(self) -> None:
        """The coordinator was heard of: what did not reach it is delivered now; what it put off waits its time."""
        if self._unreached:
            self.kick()

    async def finish(self, confirm: Callable[[], Awaitable[None]], *, within_s: float) -> None:
        """Wait a moment for everything to arrive: with the agent it is gone. ``confirm`` asks what has been read."""
        self.kick()
        try:
            async with asyncio.timeout(within_s):
                await confirm()
                await self._settled.wait()
        except TimeoutError:
            words = "%d answers could not be delivered and are lost with the agent"
            logger.warning(words, len(self), extra={"action": "answers_lost"})

    async def run(self) -> None:
        """Deliver what waits, until cancelled."""
        try:
            while True:
                self._news.clear()
                wait_s = self._begin()
                try:
                    async with asyncio.timeout(wait_s):
                        await self._news.wait()
                except TimeoutError:
                    continue
        finally:
            deliveries = [late.delivery for late in self._late.values() if late.delivery is not None]
            for delivery in deliveries:
                delivery.cancel()
            await asyncio.gather(*deliveries, return_exceptions=True)

    def _begin(self) -> float | None:
        """Begin the deliveries that are due and return the seconds until the next look; ``None``: until news."""
        now = self._clock()
        for late in [late for late in self._late.values() if now - late.since > KEEP_S]:
            self._forget(late, "nobody took it for an hour")
        idle = [late for late in self._late.values() if late.delivery is None]
        if not idle:
            return None
        if now < self._not_before:
            return self._not_before - now
        for late in idle[: MAX_DELIVERIES - len(self._late) + len(idle)]:
            late.delivery = asyncio.create_task(self._deliver(late), name=f"late {late.copy.ref.task_id}")
            late.delivery.add_done_callback(functools.partial(self._ended, late))
        return None

    async def _deliver(self, late: Late) -> None:
        copy = late.copy
        async with asyncio.timeout(DELIVER_WITHIN_S):
            # Not knowing this worker is no word about its answer: that is why the token is asked for apart.
            try:
                await self._client.token()
            except (NotFound, Forbidden, Refused) as error:
                raise TryLater(error.message) from None
            await self._client.result(copy.ref, copy.status, copy.headers, copy.pieces)

    def _ended(self, late: Late, task: asyncio.Task[None]) -> None:
        late.delivery = None
        self._news.set()
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._backoff.reset()
            self._forget(late, "")
        elif isinstance(error, (*NOT_NOW, TimeoutError)):
            self._again(late, error)
        elif isinstance(error, CoordinatorError):
            self._forget(late, f"the coordinator does not want it: {error}")
        else:
            # An answer must not be tried for ever with a bug in its way; the traceback says what to mend.
            about = {"action": "answer_bug", "task": late.copy.ref.task_id, "attempt": late.copy.ref.attempt}
            logger.error("%s could not be delivered", late.copy.ref.task_id, exc_info=error, extra=about)
            self._forget(late, "a bug in the agent")

    def _again(self, late: Late, error: BaseException) -> None:
        """Try again later, the others first."""
        logger.debug("%s is not delivered: %s", late.copy.ref.task_id, error)
        if self._late.pop(late.copy.ref.lease_id, None) is late:
            self._late[late.copy.ref.lease_id] = late
        self._unreached = isinstance(error, CoordinatorUnreachable)
        now = self._clock()
        if now >= self._not_before:
            asked_s = error.retry_after_s if isinstance(error, TryLater) else None
            self._not_before = now + self._backoff.next_s(asked_s)

    def _forget(self, late: Late, reason: str) -> None:
        ref = late.copy.ref
        if self._late.get(ref.lease_id) is late:
            del self._late[ref.lease_id]
            words = f"its answer is dropped: {reason}" if reason else "its answer is delivered late"
            about = {"action": "answer_dropped" if reason else "late_answer", "task": ref.task_id}
            logger.info("%s attempt %d: %s", ref.task_id, ref.attempt, words, extra=about | {"attempt": ref.attempt})
        if late.delivery is not None:
            late.delivery.cancel()
        self._look()

    def _look(self) -> None:
        """Tell those that wait how things stand now."""
        (self.unconfirmed.set if self._sent else self.unconfirmed.clear)()
        (self._settled.clear if len(self) else self._settled.set)()
        self._news.set()
