"""Workers' traffic by plain HTTP, below Quart: heartbeats, long polls, results and large request bodies."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rma_coordinator import enrolment
from rma_coordinator.api.asgi import Gone
from rma_coordinator.domain.tasks import LEASE_S
from rma_coordinator.hub import Poll
from rma_coordinator.relay import PIECE_BYTES, Head, Overrun
from rma_core.errors import Forbidden, NotFound, Problem, RMAError, ValidationProblem
from rma_core.models.strict import convert, decode, parse
from rma_core.models.worker import Headers, Heartbeat, TaskComplete, TaskOffers

if TYPE_CHECKING:
    from rma_coordinator.api.asgi import Call
    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.domain.tasks import Attempt
    from rma_coordinator.pool import Pool
    from rma_coordinator.relay import Relay
    from rma_core.models.worker import Fault

#: Seconds a poll waits unless it says otherwise, and at most: below what proxies cut.
POLL_S, MAX_POLL_S = 25.0, 50.0
#: Tasks a poll may ask for at once, and attempts a task can have.
MAX_OFFERS, MAX_ATTEMPT = 64, 1000
#: Largest answer a worker may send.
MAX_ANSWER_BYTES = 2**40
#: Seconds between two looks at an attempt whose client reads slowly; each renews its lease.
LOOK_S = 10.0


async def heartbeat(pool: Pool, call: Call) -> None:
    """POST /api/worker/heartbeat."""
    worker = enrolment.worker_of(pool, call.bearer)
    beat = decode(await call.body(), Heartbeat, subject="heartbeat")
    if worker.id != beat.worker_id:
        raise Forbidden(f"this token is {worker.id}'s, not {beat.worker_id}'s")
    answer = pool.heartbeat(worker, beat, ip_address=call.ip_address)
    pool.offers(worker)
    await call.json(answer)


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
    attempt, relay = _attempt(pool, call, worker)
    status = int(call.number("status", 200, least=200, most=599))
    call.check_body(MAX_ANSWER_BYTES)
    head = Head(status, _headers(call.headers.get("rma-answer-headers", "[]")))
    pool.dispatcher.accept(attempt)
    try:
        relay.put_head(head)
        relay.begin(attempt, lambda _: None)
        # An answer may come word by word; that it lives is what its lease is for.
        async for chunk in call.chunks(MAX_ANSWER_BYTES, patience_s=LEASE_S, least_bytes_per_s=0):
            await _feed(pool, attempt, relay, chunk)
        # The end is an attempt's word too: by now the relay may be fed by a later one.
        _still_wanted(attempt, relay)
        relay.end()
    except Gone:
        pool.dispatcher.broke(attempt, "the answer broke off: its connection was closed")
        raise
    except NotFound:
        raise
    except RMAError as error:
        pool.dispatcher.fail(attempt, "worker", f"the answer broke off: {error}")
        raise
    pool.dispatcher.succeed(attempt, usage={})
    await call.json({"status": attempt.state})


async def _feed(pool: Pool, attempt: Attempt, relay: Relay, chunk: bytes) -> None:
    """Hand a chunk on in pieces that fit; waiting for a slow client is progress, not silence.

    Raises NotFound when the attempt is not wanted any more, Overrun when it cannot be an answer.
    """
    for start in range(0, len(chunk), PIECE_BYTES):
        piece = chunk[start : start + PIECE_BYTES]
        while not await _has_room(relay, len(piece)):
            _still_wanted(attempt, relay)
            pool.dispatcher.progress(attempt)
        _still_wanted(attempt, relay)
        pool.dispatcher.progress(attempt)
        relay.put(piece)


async def _has_room(relay: Relay, wanted: int) -> bool:
    try:
        async with asyncio.timeout(LOOK_S):
            await relay.room(wanted)
    except TimeoutError:
        return False
    return True


def _still_wanted(attempt: Attempt, relay: Relay) -> None:
    if not attempt.open or not relay.fed_by(attempt):
        raise NotFound("nobody wants this answer any more", hints=("drop it: the task goes on elsewhere or has ended",))


def _headers(text: str) -> tuple[tuple[str, str], ...]:
    subject = "RMA-Answer-Headers"
    return convert(parse(text, subject=subject), Headers, subject=subject)


async def complete(pool: Pool, call: Call) -> None:
    """POST /api/worker/task-complete: closes an attempt; a small answer may ride along."""
    worker = enrolment.worker_of(pool, call.bearer)
    done = decode(await call.body(), TaskComplete, subject="task-complete")
    attempt = pool.dispatcher.current(done.task_id, done.attempt, done.lease_id, worker.id)
    if done.status == "succeeded":
        await _small_answer(pool, attempt, done)
    else:
        fault: Fault = done.fault or ("owner" if done.status == "returned" else "service")
        pool.dispatcher.fail(attempt, fault, done.reason or done.status)
    await call.json({"status": attempt.state})


async def _small_answer(pool: Pool, attempt: Attempt, done: TaskComplete) -> None:
    """Take the whole answer that rides along with a closing call."""
    missing = [name for name in ("body", "http_status") if getattr(done, name) is None]
    if missing:
        problems = [Problem(f"$.{name}", "is required of a task that succeeded") for name in missing]
        raise ValidationProblem("task-complete", problems, hints=("or stream the answer to …/result",))
    relay = _relay(pool, attempt)
    pool.dispatcher.accept(attempt)
    try:
        relay.put_head(Head(done.http_status or 200, done.headers))
        relay.begin(attempt, lambda _: None)
        await _feed(pool, attempt, relay, done.body or b"")
        # The end is an attempt's word too: by now the relay may be fed by a later one.
        _still_wanted(attempt, relay)
        relay.end()
    except Overrun as error:
        pool.dispatcher.fail(attempt, "worker", error.message)
        raise
    pool.dispatcher.succeed(attempt, usage=done.usage)
