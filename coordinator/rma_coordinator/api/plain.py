"""Workers' traffic by plain HTTP, below Quart: heartbeats, long polls, results and large request bodies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from rma_coordinator import enrolment
from rma_coordinator.api.asgi import Gone
from rma_coordinator.api.beats import LAST_CALL, nothing_new, read_beat
from rma_coordinator.domain.tasks import LEASE_S
from rma_coordinator.hub import Poll
from rma_coordinator.relay import Head, Overrun
from rma_coordinator.spool import PIECE_BYTES
from rma_core.errors import Forbidden, NotFound, Problem, RMAError, ValidationProblem
from rma_core.models.strict import convert, decode, parse
from rma_core.models.worker import Headers, TaskComplete, TaskOffers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rma_coordinator.api.asgi import Call
    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.domain.tasks import Attempt
    from rma_coordinator.pool import Pool
    from rma_coordinator.relay import Relay
    from rma_core.models.worker import Fault

logger = logging.getLogger(__name__)

#: Seconds a poll waits unless it says otherwise, and at most: below what proxies cut.
POLL_S, MAX_POLL_S = 25.0, 50.0
#: Tasks a poll may ask for at once, and attempts a task can have.
MAX_OFFERS, MAX_ATTEMPT = 64, 1_000_000
#: Largest answer a worker may send.
MAX_ANSWER_BYTES = 2**40
#: Seconds between two looks at an attempt whose client reads slowly; each renews its lease.
LOOK_S = 10.0
#: What a worker should do with an answer that is refused.
DROP = "drop it: the task goes on elsewhere or has ended"


async def heartbeat(pool: Pool, call: Call) -> None:
    """POST /api/worker/heartbeat."""
    # A token that was seen before is not even decoded: this is the hottest call.
    claims = pool.worker_tokens.seen(call.raw.get(b"authorization", b"")) or pool.worker_tokens.check(call.bearer)
    worker = enrolment.holder(pool, claims)
    beat = read_beat(await call.short_body(), worker)
    if worker.id != beat.worker_id:
        raise Forbidden(f"this token is {worker.id}'s, not {beat.worker_id}'s")
    cancel = pool.heard(worker, beat, ip_address=call.ip_address)
    nonce, known = claims.ends_soon(pool.wall()), worker.brief
    if cancel or nonce or beat.generation != known.generation or call.bound_s is None:
        answer = pool.answer(worker, beat.generation, cancel=cancel, nonce=nonce)
        pool.offers(worker)
        await call.json(answer, headers=None if answer.connect else LAST_CALL)
        return
    connect = pool.parking.keeps_channel(worker)
    pool.offers(worker)
    said = (pool.fleet.interval_s, known.generation, known.tier, known.tier_reason, connect, pool.process)
    await call.both(*nothing_new(*said))


async def poll(pool: Pool, call: Call) -> None:
    """GET /api/worker/tasks: wait for work; 204 when there is none."""
    worker = enrolment.worker_of(pool, call.bearer)
    wait_s = call.number("wait", POLL_S, least=0, most=MAX_POLL_S)
    waiting = Poll(worker.id, int(call.number("max", 1, least=1, most=MAX_OFFERS)), clock=pool.clock)
    pool.fleet.touch(worker)
    pool.hub.attach(worker.id, waiting)
    pool.offers(worker)
    pool.dispatcher.polling(worker.id, waiting=True)
    try:
        here = await _wait(call, waiting, wait_s)
    finally:
        waiting.close()
        if pool.hub.detach(worker.id, waiting):
            pool.dispatcher.polling(worker.id, waiting=False)
    if not here:
        _give_back(pool, waiting)
        raise Gone
    if waiting.offers:
        await call.json(TaskOffers(tasks=tuple(waiting.offers)))
    else:
        await call.answer(204, {"cache-control": "no-store"}, b"")


async def _wait(call: Call, waiting: Poll, wait_s: float) -> bool:
    """Wait for work, and say whether the worker is still there to take it."""
    gone = asyncio.create_task(call.left(), name=f"poll of {waiting.worker_id}")
    filled = asyncio.create_task(waiting.filled.wait(), name=f"work for {waiting.worker_id}")
    try:
        await asyncio.wait({gone, filled}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        return not gone.done()
    finally:
        for task in (gone, filled):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _give_back(pool: Pool, waiting: Poll) -> None:
    """Put attempts back that were in the answer of a poll whose worker has gone: it has never seen them."""
    for offer in list(waiting.offers):
        task = pool.dispatcher.tasks.get(offer.task_id)
        attempt = task.attempt if task else None
        if attempt is not None and attempt.lease_id == offer.lease_id:
            pool.dispatcher.give_back(attempt, "the worker left before it was handed the task")


def _attempt(pool: Pool, call: Call, worker: Worker) -> tuple[Attempt, Relay]:
    """Return the open attempt that a request's path and query name. Raises NotFound when it is outdated."""
    number = int(call.number("attempt", 0, least=1, most=MAX_ATTEMPT))
    attempt = pool.dispatcher.current(call.parts["task_id"], number, call.query.get("lease_id", ""), worker.id)
    return attempt, _relay(pool, attempt)


def _relay(pool: Pool, attempt: Attempt) -> Relay:
    relay = pool.hub.relays.get(attempt.task.id)
    if relay is None:
        raise NotFound("nobody waits for this task's answer any more")
    return relay


async def task_body(pool: Pool, call: Call) -> None:
    """GET /api/worker/tasks/{task_id}/body: the client's request body, streamed."""
    _, relay = _attempt(pool, call, enrolment.worker_of(pool, call.bearer))
    await call.start(200, {"content-type": "application/octet-stream", "content-length": str(relay.body.size)})
    try:
        async for piece in relay.body.pieces():
            await call.write(piece)
    except NotFound as error:
        # Its length has gone out: only a broken connection says that the rest will not come.
        raise Gone(error.message) from None
    await call.write(b"", more=False)


async def result(pool: Pool, call: Call) -> None:
    """POST /api/worker/tasks/{task_id}/result: an answer, streamed with back-pressure; opening it accepts the task."""
    worker = enrolment.worker_of(pool, call.bearer)
    number = int(call.number("attempt", 0, least=1, most=MAX_ATTEMPT))
    attempt = pool.dispatcher.named(call.parts["task_id"], number, call.query.get("lease_id", ""), worker.id)
    status = int(call.number("status", 200, least=200, most=599))
    call.check_body(MAX_ANSWER_BYTES)
    head = Head(status, _headers(call.headers.get("rma-answer-headers", "[]")))
    # An answer may come word by word; that it lives is what its lease is for.
    chunks = call.chunks(MAX_ANSWER_BYTES, patience_s=LEASE_S, least_bytes_per_s=0)
    if attempt.open and not attempt.delivered:
        await _take(pool, attempt, head, chunks)
    elif not _has_delivered(attempt):
        await _take_late(pool, attempt, head, chunks)
    await call.json({"status": _state(attempt)})


def _has_delivered(attempt: Attempt) -> bool:
    """Whether its whole answer is here already: the worker has not heard that, and says it once more."""
    return attempt.delivered or attempt.state == "succeeded"


def _state(attempt: Attempt) -> str:
    return "succeeded" if _has_delivered(attempt) else attempt.state


async def _take(
    pool: Pool, attempt: Attempt, head: Head, chunks: AsyncIterator[bytes], usage: dict[str, float] | None = None
) -> None:
    """Take the answer of an attempt that runs, as it comes. Raises NotFound once nobody wants it, Overrun, Gone."""
    relay = _relay(pool, attempt)
    way = object()
    pool.dispatcher.accept(attempt)
    if relay.head is not None:
        # The same attempt has begun before, and its way broke: it begins anew, unless the client has seen some of it.
        if attempt.task.committed:
            pool.dispatcher.fail(attempt, "coordinator", "the connection broke while the answer was on its way")
            raise NotFound("the answer cannot begin anew", hints=("drop it: some of it has gone to the client",))
        relay.restart()
    try:
        relay.put_head(head)
        relay.begin(attempt, way)
        async for chunk in chunks:
            await _feed(pool, attempt, relay, way, chunk)
        # The end is an attempt's word too: by now the relay may be fed by a later one.
        _still_wanted(attempt, relay, way)
        relay.end()
    except Gone:
        if relay.way_of(attempt) is way:
            pool.dispatcher.broke(attempt, "the answer broke off: its connection was closed")
        raise
    except NotFound:
        raise
    except RMAError as error:
        pool.dispatcher.fail(attempt, "worker", f"the answer broke off: {error}")
        raise
    pool.dispatcher.delivered(attempt, usage=usage or {})


async def _take_late(
    pool: Pool, attempt: Attempt, head: Head, chunks: AsyncIterator[bytes], usage: dict[str, float] | None = None
) -> None:
    """Take the answer of an attempt that was given up: aside first, so that only a whole one costs the later attempt.

    Raises NotFound when its task has another end by now, or a later answer has begun to go out.
    """
    if not pool.dispatcher.may_come_late(attempt):
        raise NotFound("nobody wants this answer any more", hints=(DROP,))
    aside = pool.spools.make()
    try:
        async for chunk in chunks:
            await aside.write(chunk)
        if head.length not in (None, aside.size):
            raise Overrun(f"the answer announced {head.length} bytes and has {aside.size}")
        if not pool.dispatcher.revive(attempt):
            raise NotFound("nobody wants this answer any more", hints=(DROP,))
        logger.info(
            "%s: attempt %d of %s has delivered late",
            attempt.task.id,
            attempt.number,
            attempt.worker_id,
            extra={"action": "late_answer", "task": attempt.task.id, "worker": attempt.worker_id},
        )
        await _take(pool, attempt, head, aside.pieces(), usage)
    finally:
        await aside.close()


async def _feed(pool: Pool, attempt: Attempt, relay: Relay, way: object, chunk: bytes) -> None:
    """Hand a chunk on in pieces that fit; waiting for a slow client is progress, not silence.

    Raises NotFound when the attempt is not wanted any more, Overrun when it cannot be an answer.
    """
    for start in range(0, len(chunk), PIECE_BYTES):
        piece = chunk[start : start + PIECE_BYTES]
        while not await _has_room(relay, len(piece)):
            _still_wanted(attempt, relay, way)
            pool.dispatcher.progress(attempt)
        _still_wanted(attempt, relay, way)
        pool.dispatcher.progress(attempt)
        relay.put(piece)


async def _has_room(relay: Relay, wanted: int) -> bool:
    try:
        async with asyncio.timeout(LOOK_S):
            await relay.room(wanted)
    except TimeoutError:
        return False
    return True


def _still_wanted(attempt: Attempt, relay: Relay, way: object) -> None:
    if not attempt.open or relay.way_of(attempt) is not way:
        raise NotFound("nobody wants this answer any more", hints=(DROP,))


def _headers(text: str) -> tuple[tuple[str, str], ...]:
    subject = "RMA-Answer-Headers"
    return convert(parse(text, subject=subject), Headers, subject=subject)


async def complete(pool: Pool, call: Call) -> None:
    """POST /api/worker/task-complete: closes an attempt; a small answer may ride along."""
    worker = enrolment.worker_of(pool, call.bearer)
    done = decode(await call.body(), TaskComplete, subject="task-complete")
    attempt = pool.dispatcher.named(done.task_id, done.attempt, done.lease_id, worker.id)
    if done.status == "succeeded" and not _has_delivered(attempt):
        await _small_answer(pool, attempt, done)
    elif done.status != "succeeded":
        fault: Fault = done.fault or ("owner" if done.status == "returned" else "service")
        pool.dispatcher.fail(attempt, fault, done.reason or done.status)
    await call.json({"status": _state(attempt)})


async def _small_answer(pool: Pool, attempt: Attempt, done: TaskComplete) -> None:
    """Take the whole answer that rides along with a closing call."""
    missing = [name for name in ("body", "http_status") if getattr(done, name) is None]
    if missing:
        problems = [Problem(f"$.{name}", "is required of a task that succeeded") for name in missing]
        raise ValidationProblem("task-complete", problems, hints=("or stream the answer to …/result",))
    head = Head(done.http_status or 200, done.headers)
    take = _take if attempt.open else _take_late
    await take(pool, attempt, head, _once(done.body or b""), done.usage)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
