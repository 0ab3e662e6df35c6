"""The plain way, for networks that let no WebSocket through: long polls for tasks, results by HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from rma_core.agent.answers import NOT_NOW, LinkLostError
from rma_core.agent.streams import closing
from rma_core.agent.uplink import Upload
from rma_core.backoff import Backoff
from rma_core.errors import CoordinatorError, NotAuthenticated, NotFound, TryLater
from rma_core.models.worker import INLINE_BODY_BYTES, AttemptRef, TaskComplete

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

    from rma_core.agent.answers import Answers, Copy
    from rma_core.agent.attempts import Attempts
    from rma_core.agent.client import CoordinatorClient
    from rma_core.models.worker import Fault, TaskOffer

    Beat = Callable[[], Awaitable[bool]]

logger = logging.getLogger(__name__)

#: Seconds a poll waits for work: below what proxies cut.
POLL_WAIT_S = 25.0
#: A poll that brought nothing and took less than this was not held open, and the next one waits.
HELD_S = POLL_WAIT_S / 2
#: Tasks taken by one poll.
MAX_OFFERS = 64


class PolledTask:
    """One attempt that a poll brought; an `Uplink`. A small answer rides along with the closing call."""

    def __init__(self, client: CoordinatorClient, answers: Answers, offer: TaskOffer) -> None:
        self.offer = offer
        self.ref = AttemptRef(task_id=offer.task_id, attempt=offer.attempt, lease_id=offer.lease_id)
        self._client, self._answers = client, answers
        self._late = False
        self._copy: Copy | None = None
        self._upload: Upload | None = None

    def body(self) -> AsyncGenerator[bytes, None] | bytes | None:
        """Return the request's body, or ``None`` when there is none."""
        if self.offer.body_url is not None and self.offer.body is None:
            return self._client.body(self.offer)
        return self.offer.body or None

    async def accept(self) -> None:
        """Nothing: one heartbeat says it for all tasks of a poll."""

    async def head(
        self,
        status: int,
        headers: Sequence[tuple[str, str]],
        length: int | None,
        *,
        more: bool = False,  # noqa: ARG002 - a small answer leaves in one piece anyway
    ) -> None:
        """Open the upload, or keep a small answer until it is whole."""
        self._copy = self._answers.copy(self.ref, status, headers, length)
        if length is None or length > INLINE_BODY_BYTES or not self._copy.kept:
            self._upload = Upload(self._client, self._answers, self._copy)

    async def data(self, chunk: bytes, *, more: bool = False) -> None:  # noqa: ARG002 - the same
        """Send or keep a part of the answer."""
        if self._upload is not None:
            await self._upload.write(chunk)
        elif self._copy is not None:
            self._copy.add(chunk)

    async def progress(self) -> bool:
        """Nothing: a heartbeat, which lists the attempt, says it."""
        return False

    def late(self) -> None:
        """From here on a small answer is kept, not told."""
        self._late = True

    async def end(self, usage: Mapping[str, float], timings: Mapping[str, float]) -> None:  # noqa: ARG002 - the plain way has no field for timings
        """Wait until the coordinator has the whole answer, or it is kept."""
        if self._upload is not None:
            await self._upload.finish()
            return
        copy, self._copy = self._copy, None
        if copy is None or not copy.kept:
            raise LinkLostError("the answer is larger than the service announced")
        if self._late or not await self._told(copy, usage):
            self._answers.keep(copy)
        else:
            copy.drop()

    async def _told(self, copy: Copy, usage: Mapping[str, float]) -> bool:
        """Send a small answer with the closing call; say whether that was heard. Raises CoordinatorError if refused."""
        done = TaskComplete(
            task_id=self.ref.task_id,
            attempt=self.ref.attempt,
            lease_id=self.ref.lease_id,
            status="succeeded",
            usage=dict(usage),
            http_status=copy.status,
            headers=copy.headers,
            body=bytes(copy.body),
        )
        try:
            await self._client.complete(done)
        except NOT_NOW:
            return False
        except BaseException:
            copy.drop()
            raise
        return True

    async def error(self, fault: Fault, reason: str) -> None:
        """Break the answer off and close the attempt."""
        await self.abandon()
        await self._client.complete(closing(self.ref, fault, reason))

    async def abandon(self) -> None:
        """Break an upload off and keep nothing."""
        if self._upload is not None:
            await self._upload.abort()
        elif self._copy is not None:
            self._copy.drop()


class Poller:
    """Asks for tasks while there is room for them; ``room`` says how many more fit now."""

    def __init__(
        self,
        client: CoordinatorClient,
        attempts: Attempts,
        answers: Answers,
        *,
        room: Callable[[], int],
        beat: Beat,
        forgotten: Callable[[], None],
        backoff: Backoff | None = None,
        idle: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._attempts, self._answers, self._clock = client, attempts, answers, clock
        self._room, self._beat, self._forgotten = room, beat, forgotten
        self._backoff = backoff or Backoff()
        # Never longer than a poll would have been held: work may come any moment.
        self._idle = idle or Backoff(cap_s=POLL_WAIT_S)
        #: Set when slots came free or a container became healthy.
        self.changed = asyncio.Event()

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            room = self._room()
            if not room:
                self.changed.clear()
                await self.changed.wait()
                continue
            await asyncio.sleep(await self._once(min(room, MAX_OFFERS)))

    async def _once(self, limit: int) -> float:
        """Poll once, begin what came, and return the seconds to wait before the next."""
        asked_at = self._clock()
        try:
            offers = await self._client.poll(wait_s=POLL_WAIT_S, limit=limit)
        except (NotAuthenticated, NotFound):
            self._forgotten()
            return self._backoff.next_s()
        except CoordinatorError as error:
            logger.debug("no poll: %s", error)
            return self._backoff.next_s(error.retry_after_s if isinstance(error, TryLater) else None)
        self._backoff.reset()
        self._answers.heard()
        begun = [offer for offer in offers if self._begin(offer)]
        if begun:
            self._idle.reset()
            # Within seconds, or the coordinator gives them to others: the heartbeat lists them as running.
            await self._beat()
            return 0.0
        if self._clock() - asked_at < HELD_S:
            return self._idle.next_s()
        self._idle.reset()
        return 0.0

    def _begin(self, offer: TaskOffer) -> bool:
        """Begin what a poll brought; say whether anything was begun."""
        if offer.lease_id in self._attempts:
            # Told again what it has: giving it back here would close the attempt that runs.
            return False
        task = PolledTask(self._client, self._answers, offer)
        return self._attempts.begin(offer, task.body, task)
