"""The plain way, for networks that let no WebSocket through: long polls for tasks, results by HTTP."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rma_core.agent.backoff import Backoff
from rma_core.agent.streams import closing
from rma_core.agent.uplink import Upload
from rma_core.errors import CoordinatorError, NotAuthenticated, NotFound, TryLater
from rma_core.models.worker import INLINE_BODY_BYTES, AttemptRef, TaskComplete

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

    from rma_core.agent.attempts import Attempts
    from rma_core.agent.client import CoordinatorClient
    from rma_core.models.worker import Fault, TaskOffer

    Beat = Callable[[], Awaitable[bool]]

logger = logging.getLogger(__name__)

#: Seconds a poll waits for work: below what proxies cut.
POLL_WAIT_S = 25.0
#: Tasks taken by one poll.
MAX_OFFERS = 64


class PolledTask:
    """One attempt that a poll brought; an `Uplink`. A small answer rides along with the closing call."""

    def __init__(self, client: CoordinatorClient, offer: TaskOffer, beat: Beat) -> None:
        self.offer = offer
        self.ref = AttemptRef(task_id=offer.task_id, attempt=offer.attempt, lease_id=offer.lease_id)
        self._client, self._beat = client, beat
        self._head: tuple[int, tuple[tuple[str, str], ...]] = (0, ())
        self._small: bytearray | None = None
        self._upload: Upload | None = None

    def body(self) -> AsyncGenerator[bytes, None] | None:
        """Return the request's body, or ``None`` when there is none."""
        if self.offer.body_url is not None and self.offer.body is None:
            return self._client.body(self.offer)
        return self._inline(self.offer.body) if self.offer.body else None

    async def _inline(self, body: bytes) -> AsyncGenerator[bytes, None]:
        yield body

    async def accept(self) -> None:
        """Nothing: one heartbeat says it for all tasks of a poll."""

    async def head(self, status: int, headers: Sequence[tuple[str, str]], length: int | None) -> None:
        """Open the upload, or keep a small answer until it is whole."""
        self._head = (status, tuple(headers))
        if length is not None and length <= INLINE_BODY_BYTES:
            self._small = bytearray()
        else:
            self._upload = Upload(self._client, self.ref, status, headers)

    async def data(self, chunk: bytes) -> None:
        """Send or keep a part of the answer."""
        if self._upload is not None:
            await self._upload.write(chunk)
        elif self._small is not None:
            self._small += chunk

    async def progress(self) -> bool:
        """Heartbeat, which lists the attempt."""
        return await self._beat()

    async def end(self, usage: Mapping[str, float], timings: Mapping[str, float]) -> None:  # noqa: ARG002 - the plain way has no field for timings
        """Wait until the coordinator has the whole answer."""
        if self._upload is not None:
            await self._upload.finish()
            return
        status, headers = self._head
        done = TaskComplete(
            task_id=self.ref.task_id,
            attempt=self.ref.attempt,
            lease_id=self.ref.lease_id,
            status="succeeded",
            usage=dict(usage),
            http_status=status,
            headers=headers,
            body=bytes(self._small or b""),
        )
        await self._client.complete(done)

    async def error(self, fault: Fault, reason: str) -> None:
        """Break the answer off and close the attempt."""
        await self.abandon()
        await self._client.complete(closing(self.ref, fault, reason))

    async def abandon(self) -> None:
        """Break an upload off."""
        if self._upload is not None:
            await self._upload.abort()


class Poller:
    """Asks for tasks while there is room for them; ``room`` says how many more fit now."""

    def __init__(
        self,
        client: CoordinatorClient,
        attempts: Attempts,
        *,
        room: Callable[[], int],
        beat: Beat,
        forgotten: Callable[[], None],
        backoff: Backoff | None = None,
    ) -> None:
        self._client, self._attempts = client, attempts
        self._room, self._beat, self._forgotten = room, beat, forgotten
        self._backoff = backoff or Backoff()
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
        try:
            offers = await self._client.poll(wait_s=POLL_WAIT_S, limit=limit)
        except (NotAuthenticated, NotFound):
            self._forgotten()
            return self._backoff.next_s()
        except CoordinatorError as error:
            logger.debug("no poll: %s", error)
            return self._backoff.next_s(error.retry_after_s if isinstance(error, TryLater) else None)
        self._backoff.reset()
        for offer in offers:
            task = PolledTask(self._client, offer, self._beat)
            self._attempts.begin(offer, task.body, task)
        if offers:
            # Within seconds, or the coordinator gives them to others: the heartbeat lists them as running.
            await self._beat()
        return 0.0
