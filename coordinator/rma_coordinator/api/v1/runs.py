"""Runs under /v1: one task, or one after another where an answer goes on, and every client that waits for its answer.

SDKs give up after a while and ask for the same again. Such a repetition joins the run that it was for, as long as that
lives: one that waits for a whole answer gets it too, one that reads a stream gets all of it so far and then the rest. A
run whose last client leaves ends at once, unless that client had lost its patience and is about to ask again.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from rma_coordinator.api.asgi import Gone
from rma_coordinator.api.v1.jobs import EVENT_STREAM, PLAIN
from rma_coordinator.api.v1.whole import Gathering
from rma_coordinator.domain.repeats import MOST_KEPT_BYTES, Kept
from rma_coordinator.relay import Behind
from rma_core.errors import RMAError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from rma_coordinator.api.limits import Metered
    from rma_coordinator.api.v1.clients import Client
    from rma_coordinator.api.v1.jobs import Job
    from rma_coordinator.api.v1.requests import Manner
    from rma_coordinator.api.v1.sse import Stream
    from rma_coordinator.domain.repeats import Key
    from rma_coordinator.relay import Waits

logger = logging.getLogger(__name__)

#: Seconds that a run goes on, and its answer is kept, for a client that will ask again: SDKs do within 8.
REPEATED_WITHIN_S = 10.0
#: Bytes of all whole answers that are kept for that.
MOST_WAITING_BYTES = 8 * 1024 * 1024
#: Bytes of all streams that are kept while they run, for who named them.
MOST_RECORDED_BYTES = 8 * 1024 * 1024
#: Runs that may go on for nobody; of more, those that are left then end at once.
MOST_DESERTED = 256


class Run:
    """What runs for a request, and who waits for it. ``name`` is what the client calls its request, if anything."""

    def __init__(self, job: Job, key: Key, *, name: str = "", metered: Metered | None = None) -> None:
        #: The task at work, which another one follows where an answer goes on elsewhere.
        self.job = job
        self.key = key
        self.name = name
        #: What is limited of the key that pays for it.
        self.metered = metered
        #: By this its clients and the pool's admin know it.
        self.id = job.task.id
        #: Who waits for it, in the order in which they came.
        self.clients: list[Client] = []
        self._stirred = asyncio.Event()
        #: The answer so far, where it is streamed and has begun.
        self.stream: Stream | None = None
        #: Tasks and attempts of those before the one at work.
        self.attempts_before = 0
        #: Tokens that the client had when another worker went on.
        self.continued_at: int | None = None
        #: Gives a whole answer, or nothing when a stream has gone out.
        self.work: asyncio.Future[bytes | None]
        #: Whether the end of the stream is on its way.
        self._ending = False
        self._pacing = self._freed = False
        #: Bytes of a whole answer that it holds.
        self._holds = 0
        #: Whether it waits for its clients to take more.
        self.paces = False
        self._timer: asyncio.TimerHandle | None = None
        self.began_at = job.task.created_at
        self._queue_ms: int | None = None
        self._first_byte_ms: int | None = None
        #: All that was streamed, for who comes back with the name.
        self._record: list[bytes] | None = [] if name else None
        self._recorded = 0

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin to work at a stream, as a task of its own that outlives its clients."""
        self.job.pool.repeats.begin(self.key, self)
        self.work = asyncio.create_task(work, name=f"{self.id} under /v1")
        self.work.add_done_callback(self._worked)

    def gather(self) -> None:
        """Begin to gather a whole answer, which needs no task: `settle` ends it."""
        self.job.pool.repeats.begin(self.key, self)
        self.work = asyncio.get_running_loop().create_future()
        Gathering(self).look()

    def settle(self, found: bytes | Exception) -> None:
        """The whole answer is here, or is not to come."""
        if self.work.done():
            return
        if isinstance(found, Exception):
            self.work.set_exception(found)
        else:
            self.work.set_result(found)
        self._worked(self.work)

    def may_hold(self, more: int, most: int) -> bool:
        """Say whether more of a whole answer may be kept, of ``most`` that all runs may hold together."""
        return self.job.pool.repeats.gathered_bytes + more <= most

    def hold(self, more: int) -> None:
        """Count what it keeps of a whole answer, until its last client has it."""
        self._holds += more
        self.job.pool.repeats.gathered_bytes += more

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self.work.done()

    @property
    def good(self) -> bool:
        """Whether it may still come to a good end, or has."""
        return not self.work.done() or (not self.work.cancelled() and self.work.exception() is None)

    # -- clients -----------------------------------------------------------------------------------------------

    def takes(self, manner: Manner) -> bool:
        """Say whether a client that asks for the same may have what this run gives."""
        if not self.good or self.replay() is None:
            return False
        if manner.name or self.name:
            return manner.name == self.name
        # Who asks for the same twice at once wants two answers: a repetition is of one whose client is not there.
        return manner.repeats and all(client.gave_up for client in self.clients)

    def replay(self) -> bytes | None:
        """Return what a client that joins is given first; ``None`` where it is not all kept."""
        stream = self.stream
        if stream is None:
            return b""
        begun = b"".join(self._record) if self._record else stream.replay()
        if begun is None or not self.done or self._record:
            return begun
        return begun + stream.end()

    def join(self, client: Client) -> None:
        """Let a client wait for it; those before it hold it up no longer.

        What `replay` gives is to be sent to the client before anything else runs.
        """
        self._settled()
        for one in self.clients:
            if self._pacing and one.alone:
                # It does not read what it is sent; what it lacks of that cannot be sent again.
                one.drop()
            one.accompany(self._stirred.set)
        if self.clients:
            client.accompany(self._stirred.set)
        self.clients.append(client)
        # It may be quicker than those that the run waits for.
        self._stirred.set()
        if self.done:
            client.wake()

    def leave(self, client: Client) -> None:
        """A client has what it wanted, or has gone; without any, the run ends, now or soon."""
        if client not in self.clients:
            return
        self.clients.remove(client)
        self._free()
        if self.clients:
            return
        if self.done:
            self.hold(-self._holds)
            self.stop()
        elif not self._ending:
            self._desert(client)

    def _desert(self, last: Client) -> None:
        """Go on for a client that will ask again, else end."""
        waiting = self.job.pool.repeats.waiting
        # Who names his request may come back however he left.
        returns = self.good and (bool(self.name) or last.lost_patience)
        if not returns or len(waiting) >= MOST_DESERTED:
            self.stop()
            return
        waiting.add(self)
        self._timer = asyncio.get_running_loop().call_later(REPEATED_WITHIN_S, self.stop)
        words = "%s goes on for a client that will ask again"
        logger.debug(words, self.id, extra={"action": "run_deserted", "task": self.id})

    def _settled(self) -> None:
        """It waits for nobody to come back any more."""
        self.job.pool.repeats.waiting.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def stop(self) -> None:
        """End it: nobody waits for it."""
        self._settled()
        if self.work.done():
            self.job.pool.repeats.end(self.key, self)
            return
        self.work.cancel()
        if not isinstance(self.work, asyncio.Task):
            self._worked(self.work)

    def _too_large(self) -> bool:
        """Whether its answer is too large to wait for a client, by itself or beside the others that do."""
        waiting: set[Run] = self.job.pool.repeats.waiting
        return sum(run.waiting_bytes for run in {self, *waiting}) > MOST_WAITING_BYTES

    @property
    def waiting_bytes(self) -> int:
        """Bytes of a whole answer, once it is there."""
        return len(self.work.result() or b"") if self.done and self.good else 0

    def _free(self) -> None:
        """Let the work go on that waits for a client which has gone."""
        self._stirred.set()
        if self._pacing and not self._freed:
            self._freed = True
            self.work.cancel()

    # -- the work ----------------------------------------------------------------------------------------------

    async def give(self, data: bytes) -> None:
        """Give whole events to every client, as fast as the quickest of them takes them."""
        if (waits := self.push(data)) is not None:
            await waits

    async def end(self, data: bytes) -> None:
        """Give every client the end of the answer."""
        self._ending = True
        if (waits := self.push(data, more=False)) is not None:
            await waits

    def push(self, data: bytes, *, more: bool = True) -> Waits | None:
        """Give whole events to every client at once; return what is to be awaited before more is given, if anything."""
        if self._record is not None:
            self._note(data)
        clients = self.clients
        if len(clients) == 1 and clients[0].alone:
            client = clients[0]
            try:
                waits = client.push(data) if more else client.send(data, more=False)
            except Gone:
                client.drop()
                self.leave(client)
                return None
            return None if waits is None else Behind(self._pace(client, waits), waits)
        for one in clients:
            one.post(data, more=more)
        return self._keep_pace() if clients and all(one.crowded for one in clients) else None

    async def _keep_pace(self) -> None:
        """Wait until one of several clients may be given more."""
        began, self.paces = self.job.pool.clock(), True
        try:
            while self.clients and all(one.crowded for one in self.clients):
                self._stirred.clear()
                await self._stirred.wait()
        finally:
            self._held(began)

    def _held(self, began: float) -> None:
        """Its clients have held its worker up since then."""
        self.paces = False
        attempt, relay = self.job.task.holder, self.job.relay
        # As long as there is room its worker goes on; and once it has sent all, nothing holds it up.
        if attempt is not None and attempt.ended_at is None and relay.crowded:
            attempt.held_s += self.job.pool.clock() - began

    async def _pace(self, client: Client, waits: Waits) -> None:
        """Wait for a client that is alone, until another one comes."""
        began = self.job.pool.clock()
        self._pacing = self.paces = True
        try:
            await waits
        except Gone:
            self._pacing = False
            client.drop()
            self.leave(client)
        except asyncio.CancelledError:
            work = asyncio.current_task()
            if not self._freed or work is None or work.uncancel() > 0:
                raise
        finally:
            self._pacing = self._freed = False
            self._held(began)

    def begins(self, stream: Stream) -> None:
        """A stream begins to go out: from now on whoever joins is given what there is of it."""
        self.stream = stream
        self.answers()

    def goes_on(self, job: Job, *, at: int) -> None:
        """Another task goes on with the answer, of which the client has ``at`` tokens."""
        self.attempts_before, self.continued_at = self._attempts, at
        self.job = job

    def _note(self, data: bytes) -> None:
        """Keep what goes out, as long as it and what others have kept is not too much."""
        repeats, record = self.job.pool.repeats, self._record
        if record is None:
            return
        if self._recorded + len(data) > MOST_KEPT_BYTES or repeats.recorded_bytes + len(data) > MOST_RECORDED_BYTES:
            self._forget_record()
            return
        record.append(data)
        self._recorded += len(data)
        repeats.recorded_bytes += len(data)

    def _forget_record(self) -> None:
        self.job.pool.repeats.recorded_bytes -= self._recorded
        self._record, self._recorded = None, 0

    def _worked(self, work: asyncio.Future[bytes | None]) -> None:
        """It has come to its end: everyone who waits is told, and who comes back for it finds it for a while."""
        # A whole answer is here before its worker has said so; nothing else goes on once nobody works at it.
        if not self.job.relay.complete:
            self.job.pool.dispatcher.cancel(self.job.task, _why(work))
        self.job.relay.watch = None
        self.job.origin.drop()
        for client in self.clients:
            client.wake()
        if not self.clients or work.cancelled() or work.exception() is not None:
            self.hold(-self._holds)
        error = None if work.cancelled() else work.exception()
        if not self.clients and error is not None and not isinstance(error, (RMAError, Gone)):
            logger.error("%s failed", self.id, exc_info=error, extra={"action": "bug"})
        if self._timer is None or not self.good or self._too_large():
            self._settled()
            self.job.pool.repeats.end(self.key, self)
        if self.name and self.good and (kept := self._kept()) is not None:
            self.job.pool.repeats.keep(self.name, self.key, kept)
        # Who waits has all of it, and who comes back finds what was kept.
        self._forget_record()

    def _kept(self) -> Kept | None:
        """Return the answer as it is kept for who comes back with the name."""
        if (body := self.work.result()) is not None:
            return Kept({**PLAIN, **self.headers()}, body)
        events = self.replay()
        return Kept({**EVENT_STREAM, **self.headers()}, events) if events else None

    # -- what it tells of itself -------------------------------------------------------------------------------

    def answers(self) -> None:
        """Its answer begins: how long that took stays as it is, whatever becomes of its worker."""
        self._queue_ms, self._first_byte_ms = self._waited()

    def _waited(self) -> tuple[int | None, int | None]:
        """Return milliseconds until a worker was given it, and until that worker's first byte."""
        if self._first_byte_ms is not None:
            return self._queue_ms, self._first_byte_ms
        attempt = self.job.task.attempt
        if attempt is None:
            return None, None
        began, first_at = self.began_at, attempt.first_byte_at
        return _ms(attempt.offered_at - began), None if first_at is None else _ms(first_at - began)

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that say who answered, and how long what took."""
        job, (queue_ms, first_byte_ms) = self.job, self._waited()
        found = [
            (b"x-request-id", self.id.encode()),
            (b"openai-processing-ms", b"%d" % _ms(job.pool.clock() - self.began_at)),
            (b"x-rma-attempts", b"%d" % self._attempts),
        ]
        if (attempt := job.task.attempt) is not None:
            found.append((b"x-rma-worker", attempt.worker_id.encode()))
            if attempt.model_state:
                found.append((b"x-rma-model-state", attempt.model_state.encode()))
        if queue_ms is not None:
            found.append((b"x-rma-queue-ms", b"%d" % queue_ms))
        if first_byte_ms is not None:
            found.append((b"x-rma-first-byte-ms", b"%d" % first_byte_ms))
        return found

    def headers(self) -> dict[str, str]:
        """Return the same as text."""
        return {name.decode(): value.decode() for name, value in self.raw_headers()}

    def facts(self) -> dict[str, Any]:
        """Return the same for the last event of a stream, whose headers went out before they were known."""
        job, (queue_ms, first_byte_ms) = self.job, self._waited()
        found = {
            "worker": job.who(),
            "attempts": self._attempts,
            "queue_ms": queue_ms,
            "first_byte_ms": first_byte_ms,
            "total_ms": _ms(job.pool.clock() - self.began_at),
        }
        return found if self.continued_at is None else {**found, "continued_at_token": self.continued_at}

    @property
    def _attempts(self) -> int:
        return self.attempts_before + len(self.job.task.attempts)


def _why(work: asyncio.Future[bytes | None]) -> str:
    """Return why nobody wants any more of what a task answers."""
    error = None if work.cancelled() else work.exception()
    return f"its answer could not be used: {error}" if isinstance(error, RMAError) else "the client left"


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))
