"""The attempts that run on this machine: begun, kept alive, stopped with a reason, drained."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from rma_core.agent.execute import LOAD_ATTEMPTS, AttemptFailed, forward
from rma_core.agent.uplink import LinkLostError
from rma_core.errors import CoordinatorError
from rma_core.models.worker import AttemptRef

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from rma_core import http
    from rma_core.agent.uplink import Uplink
    from rma_core.models.worker import Fault, TaskOffer

    BodySource = Callable[[], AsyncGenerator[bytes, None] | None]

logger = logging.getLogger(__name__)

#: The agent stops an attempt by itself this long before the coordinator would give its task away.
LEASE_MARGIN_S = 10.0
#: An attempt says that it lives this often within one lease.
SIGNS_PER_LEASE = 3
#: Seconds to tell the coordinator that an attempt was stopped.
TELL_TIMEOUT_S = 5.0

#: Attempts whose end is being told at one time; a coordinator that offers more than fits and does not read hears less.
MAX_TELLING = 256


class Place(Protocol):
    """A healthy container with a free slot; the slot is taken until `release`."""

    @property
    def client(self) -> http.AsyncClient:
        """The client for its endpoint."""

    @property
    def owner(self) -> object:
        """The container."""

    def release(self) -> None:
        """Give the slot back."""


class Stop(NamedTuple):
    """Why an attempt is stopped, whose doing it is, and whether the coordinator is to be told."""

    fault: Fault
    reason: str
    tell: bool


class Attempt:
    """One running attempt."""

    def __init__(self, offer: TaskOffer, uplink: Uplink, place: Place, *, now: float) -> None:
        self.offer, self.uplink, self.place = offer, uplink, place
        self.ref = AttemptRef(task_id=offer.task_id, attempt=offer.attempt, lease_id=offer.lease_id)
        self.started_at = self.renewed_at = now
        self.stopped: Stop | None = None
        self.task: asyncio.Task[Stop | None] | None = None

    def stop(self, stop: Stop) -> None:
        """Stop it now; the first reason counts."""
        if self.stopped is None and self.task is not None and not self.task.done():
            self.stopped = stop
            self.task.cancel()


class Attempts:
    """Every attempt that runs here; ``place`` finds a container for a service, or says why there is none."""

    def __init__(
        self,
        place: Callable[[str], Place | str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place, self._clock = place, clock
        self._running: dict[str, Attempt] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        #: Why nothing new is begun, while that is so.
        self.closed_because = ""
        self.succeeded = self.failed = 0

    def __len__(self) -> int:
        return len(self._running)

    def refs(self) -> tuple[AttemptRef, ...]:
        """Return what a heartbeat lists."""
        return tuple(attempt.ref for attempt in self._running.values())

    def begin(self, offer: TaskOffer, body: BodySource, uplink: Uplink) -> None:
        """Begin an attempt, or give it back at once when there is no room for it."""
        if offer.lease_id in self._running:
            return
        for older in [a for a in self._running.values() if a.ref.task_id == offer.task_id]:
            older.stop(Stop("coordinator", "a later attempt of the same task", tell=False))
        place = self.closed_because or self._place(offer.service)
        if isinstance(place, str):
            self._tell(uplink, Stop("owner", place, tell=True))
            return
        attempt = Attempt(offer, uplink, place, now=self._clock())
        self._running[offer.lease_id] = attempt
        self._idle.clear()
        attempt.task = asyncio.create_task(self._run(attempt, body), name=f"{offer.task_id}/{offer.attempt}")
        attempt.task.add_done_callback(lambda task: self._over(attempt, task))

    def stop(self, lease_id: str, stop: Stop) -> None:
        """Stop one attempt; one that is not there has ended."""
        attempt = self._running.get(lease_id)
        if attempt is not None:
            attempt.stop(stop)

    def stop_at(self, owner: object, stop: Stop) -> None:
        """Stop all attempts at one container."""
        for attempt in list(self._running.values()):
            if attempt.place.owner is owner:
                attempt.stop(stop)

    async def drain(self, seconds: float, stop: Stop) -> None:
        """Wait up to ``seconds`` for everything to finish, then stop the rest and wait until that is told."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            for attempt in list(self._running.values()):
                attempt.stop(stop)
            await self._idle.wait()
        if self._telling:
            await asyncio.wait(self._telling)

    async def _run(self, attempt: Attempt, body: BodySource) -> Stop | None:
        """Do the work; return why there is no whole answer, if so."""
        lease = asyncio.create_task(self._keep_lease(attempt))
        source = body()
        try:
            await attempt.uplink.accept()
            await forward(attempt.offer, attempt.place.client, source, attempt.uplink, crowded=self._crowded)
        except AttemptFailed as error:
            return Stop(error.fault, error.reason, tell=True)
        except (LinkLostError, CoordinatorError) as error:
            # The answer was refused (outdated, cancelled), or the coordinator is not there: there is nobody to tell.
            return Stop("coordinator", error.message, tell=False)
        finally:
            lease.cancel()
            if source is not None:
                await source.aclose()
        return None

    def _over(self, attempt: Attempt, task: asyncio.Task[Stop | None]) -> None:
        """Close the books on an attempt; as a callback, because a task cancelled before its first step runs nothing."""
        attempt.place.release()
        self._running.pop(attempt.ref.lease_id, None)
        failure = self._failure(attempt, task)
        if failure is None:
            self.succeeded += 1
        else:
            self.failed += failure.fault in ("worker", "service")
            logger.info("%s attempt %d: %s", attempt.ref.task_id, attempt.ref.attempt, failure.reason)
            self._tell(attempt.uplink, failure)
        if not self._running:
            self._idle.set()

    def _failure(self, attempt: Attempt, task: asyncio.Task[Stop | None]) -> Stop | None:
        if task.cancelled():
            return attempt.stopped or Stop("owner", "the agent was stopped", tell=False)
        error = task.exception()
        if error is None:
            return task.result()
        # An attempt must end in the books whatever happens; the traceback says what to mend.
        logger.error("%s failed in the agent", attempt.ref.task_id, exc_info=error)
        return Stop("worker", "a bug in the agent; its log has the details", tell=True)

    def _crowded(self) -> bool:
        return len(self._running) >= LOAD_ATTEMPTS

    async def _keep_lease(self, attempt: Attempt) -> None:
        """Say that the attempt lives; stop it before its lease ends when nobody hears that."""
        lease_s = attempt.offer.lease_s
        while True:
            await asyncio.sleep(lease_s / SIGNS_PER_LEASE)
            if await attempt.uplink.progress():
                attempt.renewed_at = self._clock()
            elif self._clock() - attempt.renewed_at > max(lease_s - LEASE_MARGIN_S, lease_s / 2):
                attempt.stop(Stop("coordinator", "the coordinator was away until the lease ended", tell=False))
                return

    def _tell(self, uplink: Uplink, stop: Stop) -> None:
        """Say why there is no answer, beside everything else; when that fails, the lease's end says it."""
        if len(self._telling) >= MAX_TELLING:
            stop = stop._replace(tell=False)
        task = asyncio.create_task(_tell(uplink, stop))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)


async def _tell(uplink: Uplink, stop: Stop) -> None:
    try:
        async with asyncio.timeout(TELL_TIMEOUT_S):
            await (uplink.error(stop.fault, stop.reason) if stop.tell else uplink.abandon())
    except (CoordinatorError, LinkLostError, TimeoutError) as error:
        logger.debug("not told: %s", error)
