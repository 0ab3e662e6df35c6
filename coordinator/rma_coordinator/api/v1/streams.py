"""Streamed answers under /v1: relayed event by event, and continued on another worker when theirs is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from typing import TYPE_CHECKING, Any

from rma_coordinator.api import limits
from rma_coordinator.api.v1 import errors as openai_errors
from rma_coordinator.api.v1.errors import APIProblem
from rma_coordinator.api.v1.jobs import GOOD
from rma_coordinator.api.v1.sse import CONTINUED, Stream
from rma_coordinator.api.v1.stalls import Watch
from rma_coordinator.domain.continuing import continued, decide, ending
from rma_core.errors import RMAError, TryLater

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_coordinator.api.v1.jobs import Job
    from rma_coordinator.api.v1.runs import Run
    from rma_coordinator.relay import Head, Relay, Waits

logger = logging.getLogger(__name__)

#: How long a worker may take to close an answer whose end marker has come.
CLOSE_S = 2.0
#: Workers that one streamed answer may lose behind its beginning.
MOST_LOSSES = 3


async def streamed(run: Run) -> None:
    """Give a run's clients its answer as it comes. Raises RMAError when it is not whole."""
    # A stream that held its run would live on with it, and both with all they have.
    known = weakref.ref(run)

    def facts() -> dict[str, Any]:
        one = known()
        return one.facts() if one is not None else {}

    stream = await _relay(run, lambda: Stream(run.job.asked.answer, facts))
    if stream is None:
        # Nothing of an answer has gone out.
        raise await run.job.refusal() if run.job.relay.head is not None else run.job.failed()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(_settle, run, stream)
        for _ in range(MOST_LOSSES):
            # What a worker ended by itself, whole or not, is its model server's way to answer.
            if run.job.relay.complete or stream.done or stream.broken or not run.job.task.committed:
                break
            await _go_on(run, stream, stack)
        if stream.skipped:
            words, task_id = "%s: %d events of its model server were no JSON and were left out", run.job.task.id
            logger.info(words, task_id, stream.skipped, extra={"action": "events_skipped", "task": task_id})
        if not stream.whole or not (stream.done or run.job.relay.complete):
            raise _broke_off(run.job, stream)
        await run.end(stream.end())


def _settle(run: Run, stream: Stream) -> None:
    limits.settle_stream(run.metered, stream.usage, stream.delivered.tokens)


def _learn(run: Run, stream: Stream, watch: Watch) -> None:
    """Learn from what a stream's engine did, if it has said its end."""
    if stream.whole and (stream.done or run.job.relay.complete):
        # What was seen of one that goes on for another is only a part of what its usage counts.
        seen = watch.seen() if run.continued_at is None else None
        run.job.measured(stream.timings, stream.usage, seen, said=stream.said, tokens=stream.delivered.tokens)


async def _go_on(run: Run, stream: Stream, stack: contextlib.AsyncExitStack) -> None:
    """Let another worker go on where a stream was lost. Raises RMAError when none can."""
    lost = run.job
    asked = b"".join([piece async for piece in lost.origin.pieces()])
    decision = decide(asked, stream.delivered)
    if decision.outcome == "give_up":
        raise _broke_off(lost, stream, decision.reason)
    if decision.outcome == "finish":
        stream.done = True
        if events := stream.add(ending(asked, stream.delivered)):
            await run.give(events)
        return
    try:
        found = await _elsewhere(lost, continued(asked, stream.delivered), stack)
    except RMAError as refused:
        raise _broke_off(lost, stream, refused.message) from None
    about = {"action": "answer_continued", "task": found.task.id}
    logger.info("%s goes on with what %s had begun", found.task.id, lost.task.id, extra=about)
    run.goes_on(found, at=stream.delivered.tokens)
    await run.give(CONTINUED)
    if await _relay(run, lambda: stream.resume(asked)) is None:
        raise await found.refusal() if found.relay.head is not None else found.failed()


async def _elsewhere(job: Job, data: bytes, stack: contextlib.AsyncExitStack) -> Job:
    """Submit what is left of a request, to another worker where there is one. Raises TryLater, OutOfSpace."""
    pool, lost = job.pool, job.task
    body = pool.spools.make()
    stack.push_async_callback(body.close)
    await body.write(data)
    task = job.again(body.size)
    task.deadline = lost.deadline
    tried = lost.excluded | {attempt.worker_id for attempt in lost.attempts}
    if pool.dispatcher.can_serve(task.service, task.model, besides=tried):
        task.excluded |= tried
    elif not pool.dispatcher.can_serve(task.service, task.model):
        raise TryLater(f"no other worker offers {task.lane}", retry_after_s=30)
    relay = pool.submit(task, body)
    stack.callback(pool.dispatcher.cancel, task, "the client left")
    return job._replace(task=task, relay=relay)


async def _relay(run: Run, begin: Callable[[], Stream]) -> Stream | None:
    """Give the answer on as it comes; return its stream when nothing more can follow, ``None`` for no stream.

    Until its first event has gone out, an answer that is begun anew is nobody's business: it is another `begin`.
    """
    relay, task = run.job.relay, run.job.task
    while True:
        head = await relay.ready()
        if head is None or head.status not in GOOD or not _is_stream(head):
            return None
        starts, stream, watch = relay.starts, begin(), Watch(run)

        def over(stream: Stream = stream) -> bool:
            return stream.done or stream.broken is not None

        def take(
            piece: bytes, stream: Stream = stream, status: int = head.status, watch: Watch = watch
        ) -> Waits | None:
            waits = None
            if events := stream.feed(piece):
                watch.heard()
                if not task.committed:
                    # From here on no other attempt may begin from the beginning.
                    task.committed, task.http_status = True, status
                    run.begins(stream)
                waits = run.push(events)
            return _nothing() if waits is None and (stream.done or stream.broken) else waits

        try:
            await relay.pour(take, over)
        finally:
            watch.stop()
        if relay.starts == starts:
            if over():
                await _close(relay)
            _learn(run, stream, watch)
            return stream


async def _nothing() -> None:
    """Wait for nothing: but whoever pours looks whether that was enough."""


async def _close(relay: Relay) -> None:
    """Let the worker close what has said its end, so that it counts as done."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            async for _ in relay.pieces():
                pass


def _is_stream(head: Head) -> bool:
    kind = next((value for name, value in head.headers if name.lower() == "content-type"), "")
    return kind.strip().lower().startswith("text/event-stream")


def _broke_off(job: Job, stream: Stream, why: str = "") -> RMAError:
    """Return why a stream is not whole, and ``why`` no other worker goes on with it."""
    if stream.broken is not None:
        return openai_errors.in_stream(stream.broken.error)
    if job.relay.complete:
        return APIProblem(502, f"the model server of {job.who()} ended its answer without a finish_reason")
    if not job.task.committed:
        return job.failed()
    reason = f"the answer broke off: {'; '.join(job.task.reasons) or 'its worker was lost'}"
    return APIProblem(502, f"{reason}; it does not go on elsewhere: {why}" if why else reason, api_code="worker_lost")
