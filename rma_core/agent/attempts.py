"""The attempts that run on this machine: begun, kept alive, stopped with a reason, drained."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from rma_core.agent.answers import NOT_NOW, LinkLostError
from rma_core.agent.execute import LOAD_ATTEMPTS, AttemptFailed, forward
from rma_core.backoff import Backoff
from rma_core.errors import CoordinatorError, CoordinatorUnreachable
from rma_core.models.worker import AttemptRef

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

    from rma_core.agent.endpoint import Client
    from rma_core.agent.uplink import Uplink
    from rma_core.models.worker import Fault, TaskOffer

    BodySource = Callable[[], AsyncGenerator[bytes, None] | bytes | None]

logger = logging.getLogger(__name__)

#: The agent stops an attempt by itself this long before the coordinator would give its task away.
LEASE_MARGIN_S = 10.0
#: An attempt says that it lives this often within one lease.
SIGNS_PER_LEASE = 3
#: Seconds between two such signs at least, however short a lease the coordinator gives.
LEAST_SIGN_S = 3.0
#: Seconds between two looks at a lease at most: timers stand still while a machine sleeps, its lease does not.
LOOK_S = 5.0
#: Attempts that run at one time, whatever slots the coordinator wants: each holds connections and buffers.
MAX_ATTEMPTS = 1024
#: Seconds to tell the coordinator that an attempt was stopped, and the first wait between two tries.
TELL_TIMEOUT_S, TELL_RETRY_S = 10.0, 0.5

#: Attempts whose end is being told at one time; a coordinator that offers more than fits and does not read hears less.
MAX_TELLING = 256

EXPIRED = "nobody heard of it until its lease ended"


def lease_clock() -> float:
    """Return monotonic seconds that pass while this machine sleeps, too: its leases end meanwhile."""
    if sys.platform == "linux":
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
    elif sys.platform == "darwin":
        now = time.clock_gettime(time.CLOCK_MONOTONIC)
    else:
        now = time.monotonic()
    return now


class Place(Protocol):
    """A healthy container, or attached server, with a free slot; the slot is taken until `release`."""

    @property
    def client(self) -> Client:
        """The connections to it."""

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
        #: When the newest sign that was heard was sent, and how long the lease lasts from there.
        self.renewed_at = now
        self.lease_s = max(offer.lease_s, SIGNS_PER_LEASE * LEAST_SIGN_S)
        #: The service has answered: what is left is to deliver that.
        self.finished = False
        self.stopped: Stop | None = None
        self.task: asyncio.Task[Stop | None] | None = None
        #: When the next sign is due, the next look at the lease, and the sign that is on its way.
        self.sign_at = now + self.lease_s / SIGNS_PER_LEASE
        self.look: asyncio.TimerHandle | None = None
        self.sign: asyncio.Task[None] | None = None

    @property
    def deadline(self) -> float:
        """The moment at which it stops by itself, unless it is heard of before."""
        return self.renewed_at + max(self.lease_s - LEASE_MARGIN_S, self.lease_s / 2)

    def stop(self, stop: Stop) -> None:
        """Stop it now; the first reason counts."""
        if self.stopped is None and self.task is not None and not self.task.done():
            self.stopped = stop
            self.task.cancel()

    def let_lease_go(self) -> None:
        """Look after its lease no longer."""
        if self.look is not None:
            self.look.cancel()
        if self.sign is not None:
            self.sign.cancel()


class LeaseEndedError(LinkLostError):
    """The attempt's lease has ended: its task may be another worker's by now."""

    code = "lease_ended"


class Fenced:
    """An attempt's way up that its lease closes: an `Uplink` for the work, which may have stood still for a while."""

    def __init__(self, attempt: Attempt, clock: Callable[[], float]) -> None:
        self._attempt, self._uplink, self._clock = attempt, attempt.uplink, clock
        self.accept, self.progress, self.late = self._uplink.accept, self._uplink.progress, self._uplink.late
        self.error, self.abandon = self._uplink.error, self._uplink.abandon

    @property
    def _expired(self) -> bool:
        return self._clock() >= self._attempt.deadline

    def _check(self) -> None:
        if self._expired:
            raise LeaseEndedError(EXPIRED)

    async def head(
        self, status: int, headers: Sequence[tuple[str, str]], length: int | None, *, more: bool = False
    ) -> None:
        """Send status and headers, while the lease lasts. Raises LeaseEndedError."""
        self._check()
        await self._uplink.head(status, headers, length, more=more)

    async def data(self, chunk: bytes, *, more: bool = False) -> None:
        """Send a part, while the lease lasts. Raises LeaseEndedError."""
        self._check()
        await self._uplink.data(chunk, more=more)

    async def end(self, usage: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """End the answer; one that is whole is worth something without a lease, too."""
        self._attempt.finished = True
        if self._expired:
            self._uplink.late()
        await self._uplink.end(usage, timings)


class Attempts:
    """Every attempt that runs here; ``place`` finds a slot for an offer, or says why there is none.

    ``beat`` sends a heartbeat, which lists the attempts, and says whether it was answered.
    """

    def __init__(
        self,
        place: Callable[[TaskOffer], Place | str],
        *,
        beat: Callable[[], Awaitable[bool]] | None = None,
        clock: Callable[[], float] = lease_clock,
    ) -> None:
        self._place, self._beat, self._clock = place, beat, clock
        self._running: dict[str, Attempt] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        #: Why nothing new is begun, while that is so.
        self.closed_because = ""
        self.succeeded = self.failed = 0

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, lease_id: object) -> bool:
        return lease_id in self._running

    def refs(self) -> tuple[AttemptRef, ...]:
        """Return what goes on here."""
        return tuple(attempt.ref for attempt in self._running.values() if attempt.stopped is None)

    def begin(self, offer: TaskOffer, body: BodySource, uplink: Uplink) -> bool:
        """Begin an attempt, or give it back at once when there is no room for it; say whether it was begun."""
        if offer.lease_id in self._running:
            # Not in silence: the uplink would stay open, and the coordinator would wait for it.
            self._tell(uplink, Stop("coordinator", "an attempt with this lease runs already", tell=True))
            return False
        for older in [a for a in self._running.values() if a.ref.task_id == offer.task_id]:
            older.stop(Stop("coordinator", "a later attempt of the same task", tell=False))
        place = self._why_not() or self._place(offer)
        if isinstance(place, str):
            self._tell(uplink, Stop("owner", place, tell=True))
            return False
        attempt = Attempt(offer, uplink, place, now=self._clock())
        self._running[offer.lease_id] = attempt
        self._idle.clear()
        attempt.task = asyncio.create_task(self._run(attempt, body), name=f"{offer.task_id}/{offer.attempt}")
        attempt.task.add_done_callback(lambda task: self._over(attempt, task))
        return True

    def _why_not(self) -> str:
        """Say why nothing more is begun here, whatever the service."""
        full = f"this machine works on {MAX_ATTEMPTS} tasks already" if len(self._running) >= MAX_ATTEMPTS else ""
        return self.closed_because or full

    def stop(self, lease_id: str, stop: Stop) -> None:
        """Stop one attempt; one that is not there has ended."""
        attempt = self._running.get(lease_id)
        if attempt is not None:
            attempt.stop(stop)

    def stop_all(self, stop: Stop) -> None:
        """Stop every attempt."""
        for attempt in list(self._running.values()):
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
            self.stop_all(stop)
            await self._idle.wait()
        if self._telling:
            await asyncio.wait(self._telling)

    async def _run(self, attempt: Attempt, body: BodySource) -> Stop | None:
        """Do the work; return why there is no whole answer, if so."""
        source = body()
        self._keep_lease(attempt)
        try:
            await attempt.uplink.accept()
            way = Fenced(attempt, self._clock)
            await forward(attempt.offer, attempt.place.client, source, way, crowded=self._crowded)
        except AttemptFailed as error:
            return Stop(error.fault, error.reason, tell=True)
        except LeaseEndedError as error:
            return Stop("coordinator", error.message, tell=False)
        except (LinkLostError, *NOT_NOW) as error:
            # The coordinator waits a moment for the reason, before it charges this worker for what the way did.
            return Stop("coordinator", error.message, tell=True)
        except CoordinatorError as error:
            # The answer was refused (outdated, cancelled): there is nobody to tell.
            return Stop("coordinator", error.message, tell=False)
        finally:
            attempt.let_lease_go()
            if source is not None and not isinstance(source, bytes):
                await source.aclose()
        return None

    def _over(self, attempt: Attempt, task: asyncio.Task[Stop | None]) -> None:
        """Close the books on an attempt; as a callback, because a task cancelled before its first step runs nothing."""
        attempt.place.release()
        self._running.pop(attempt.ref.lease_id, None)
        failure = self._failure(attempt, task)
        if failure is None:
            self.succeeded += 1
            _log(attempt, "succeeded", "succeeded", logging.DEBUG)
        else:
            self.failed += failure.fault in ("worker", "service")
            _log(attempt, "failed", failure.reason, logging.DEBUG if failure.fault == "request" else logging.INFO)
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
        about = {"action": "attempt_bug", "task": attempt.ref.task_id, "attempt": attempt.ref.attempt}
        logger.error("%s failed in the agent", attempt.ref.task_id, exc_info=error, extra=about)
        return Stop("worker", "a bug in the agent; its log has the details", tell=True)

    def _crowded(self) -> bool:
        return len(self._running) >= LOAD_ATTEMPTS

    def _keep_lease(self, attempt: Attempt) -> None:
        """Look at a lease now and then: say that its attempt lives, or stop it when nobody can have heard that."""
        now = self._clock()
        if now >= attempt.deadline:
            if not attempt.finished:
                attempt.stop(Stop("coordinator", EXPIRED, tell=False))
            return
        if now >= attempt.sign_at and attempt.sign is None:
            attempt.sign = asyncio.create_task(self._sign(attempt, now))
            attempt.sign.add_done_callback(functools.partial(_signed, attempt))
            attempt.sign_at = now + attempt.lease_s / SIGNS_PER_LEASE
        due = max(attempt.sign_at, now) if attempt.sign is None else attempt.deadline
        wait_s = min(LOOK_S, due - now, attempt.deadline - now)
        attempt.look = asyncio.get_running_loop().call_later(wait_s, self._keep_lease, attempt)

    async def _sign(self, attempt: Attempt, now: float) -> None:
        """Say that the attempt lives, by a heartbeat where it has no way of its own; renew its lease when heard."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(attempt.deadline - now):
                if await attempt.uplink.progress() or (self._beat is not None and await self._beat()):
                    attempt.renewed_at = now

    def _tell(self, uplink: Uplink, stop: Stop) -> None:
        """Say why there is no answer, beside everything else; when that fails, the lease's end says it."""
        if len(self._telling) >= MAX_TELLING:
            stop = stop._replace(tell=False)
        task = asyncio.create_task(self._tell_once(uplink, stop))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell_once(self, uplink: Uplink, stop: Stop) -> None:
        """Tell it, as soon as there is a way within TELL_TIMEOUT_S; an agent that ends does not wait for one."""
        backoff = Backoff(base_s=TELL_RETRY_S)
        try:
            async with asyncio.timeout(TELL_TIMEOUT_S):
                while not await _told(uplink, stop) and not self.closed_because:  # noqa: ASYNC110 - a way is not announced
                    await asyncio.sleep(backoff.next_s())
        except TimeoutError:
            logger.debug("not told in time: %s", stop.reason)


def _log(attempt: Attempt, end: str, words: str, level: int) -> None:
    """Write an attempt's one line: what went well is only counted here, the coordinator has a line for its task."""
    ref = attempt.ref
    about = {"action": f"attempt_{end}", "task": ref.task_id, "attempt": ref.attempt, "service": attempt.offer.service}
    logger.log(level, "%s attempt %d: %s", ref.task_id, ref.attempt, words, extra=about)


def _signed(attempt: Attempt, task: asyncio.Task[None]) -> None:
    """Let the next sign be sent; one that failed unexpectedly is a bug, and the lease's end says the rest."""
    attempt.sign = None
    if not task.cancelled() and (error := task.exception()) is not None:
        about = {"action": "attempt_bug", "task": attempt.ref.task_id, "attempt": attempt.ref.attempt}
        logger.error("%s: no sign of life could be sent", attempt.ref.task_id, exc_info=error, extra=about)


async def _told(uplink: Uplink, stop: Stop) -> bool:
    """Tell it once; say whether there was a way to do so."""
    try:
        await (uplink.error(stop.fault, stop.reason) if stop.tell else uplink.abandon())
    except CoordinatorUnreachable:
        return False
    except (CoordinatorError, LinkLostError) as error:
        # Without its channel an attempt needs no word: HELLO does not list it.
        logger.debug("not told: %s", error)
    return True
