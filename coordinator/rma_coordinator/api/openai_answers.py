"""Answers under /v1: whole ones made right, streamed ones kept alive, and both given up when the client leaves."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_coordinator.api import limits, openai_errors, tasks
from rma_coordinator.api.asgi import Gone
from rma_coordinator.api.inference import trace
from rma_coordinator.api.openai_errors import APIProblem, request_id
from rma_coordinator.api.problems import status_of
from rma_coordinator.api.sse import COMMENT, CONTINUED, Answer, Stream
from rma_coordinator.domain.continuing import continued, decide, ending
from rma_core.errors import RMAError, TryLater
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from rma_coordinator.api.asgi import Call
    from rma_coordinator.domain.tasks import Task
    from rma_coordinator.pool import Pool
    from rma_coordinator.relay import Head, Relay
    from rma_coordinator.spool import Body

logger = logging.getLogger(__name__)

#: The longest whole answer, embeddings of a large batch, and the most values in it: each takes 30 bytes and more as
#: an object, all at once, and a worker may mean harm.
MAX_ANSWER_BYTES = 32 * 1024 * 1024
MOST_VALUES = 1_000_000
#: As much of a model server's refusal is read.
MAX_REFUSAL_BYTES = 64 * 1024
#: A stream is never silent for longer; its status goes out after this at the latest.
SILENCE_S = 10.0
#: A client's own patience is no reason to send comments more often than this.
LEAST_SILENCE_S = 1.0
#: How long a worker may take to close an answer whose end marker has come.
CLOSE_S = 2.0
#: Workers that one streamed answer may lose behind its beginning.
MOST_LOSSES = 3
#: Good statuses of a model server.
GOOD = range(200, 300)

EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
    "x-content-type-options": "nosniff",
}
PLAIN = {"content-type": "application/json", "x-content-type-options": "nosniff"}


class Asked(NamedTuple):
    """How the client wants its answer."""

    answer: Answer
    stream: bool
    #: Whether embeddings are wanted as base64, which not every engine knows.
    base64: bool
    #: How long the client waits in silence, where it says so.
    patience_s: float | None

    @property
    def silence_s(self) -> float:
        """Seconds after which a silent stream is kept alive."""
        patience_s = self.patience_s
        if patience_s is None or not patience_s > 0:
            return SILENCE_S
        return min(SILENCE_S, max(LEAST_SILENCE_S, patience_s / 3))


async def respond(job: Job) -> None:
    """Answer a request as its worker does, until it is answered or the client leaves.

    Raises RMAError while a status can still say what went wrong, Gone.
    """
    call, asked = job.call, job.asked
    if asked.stream:
        wire = Wire(call, lambda: {**EVENT_STREAM, **job.headers()}, silence_s=asked.silence_s)
        await _first(call.left(), wire.keep_alive(), _streamed(job, wire))
    else:
        await _first(call.left(), _whole(job))


async def _first(*steps: Coroutine[Any, Any, None]) -> None:
    """Run the steps until one of them ends, which ends the others; a failure of it is raised."""
    running = [asyncio.create_task(step, name="an answer under /v1") for step in steps]
    try:
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        # The answer stands last, and what became of it counts most.
        next(task for task in reversed(running) if task.done()).result()
    finally:
        for task in running:
            task.cancel()
        for task in running:
            with contextlib.suppress(asyncio.CancelledError, Gone, RMAError):
                await task


class Job(NamedTuple):
    """A request that has become a task, and what is needed to answer it.

    ``origin`` is the body that its first worker got; ``again`` makes a task for what is left of it, whose body has so
    many bytes.
    """

    pool: Pool
    call: Call
    task: Task
    relay: Relay
    asked: Asked
    origin: Body
    again: Callable[[int], Task]

    def headers(self) -> dict[str, str]:
        """Return the headers that say who answered, and how long what took."""
        now, task = self.pool.clock(), self.task
        found = {"x-request-id": request_id(self.call), **trace(task), **limits.headers(self.call)}
        found["openai-processing-ms"] = str(_ms(now - task.created_at))
        if task.attempt is not None:
            found["x-rma-queue-ms"] = str(_ms(task.attempt.offered_at - task.created_at))
            if state := self._model_state(task.attempt.worker_id):
                found["x-rma-model-state"] = state
        return found

    def _model_state(self, worker_id: str) -> str:
        """Return what the worker last said of the model."""
        worker = self.pool.fleet.workers.get(worker_id)
        containers = worker.containers if worker else ()
        models = (model for one in containers if one.service == self.task.service for model in one.models)
        return next((model.state for model in models if model.name == self.task.model), "")

    def failed(self) -> RMAError:
        """Return why the task ended without an answer, with every reason."""
        task = self.task
        too_late = task.ended_at is not None and task.ended_at >= task.deadline
        return tasks.failure(task.model, task.id, task.reasons, task.fault, too_late=too_late)

    def who(self) -> str:
        """Return the worker that speaks for the task."""
        return self.task.attempt.worker_id if self.task.attempt else ""


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


async def _collect(relay: Relay, limit: int) -> tuple[Head, bytes] | None:
    """Return the whole answer; nothing of it has gone to the client, so a loss only costs time.

    ``None`` when the task failed. Raises APIProblem for an answer that is too long.
    """
    while True:
        head = await relay.ready()
        if head is None:
            return None
        starts, parts, size = relay.starts, list[bytes](), 0
        async for piece in relay.pieces():
            size += len(piece)
            if size > limit:
                raise APIProblem(502, f"the answer is longer than {limit} bytes")
            parts.append(piece)
        if relay.starts == starts:
            return (head, b"".join(parts)) if relay.complete else None


async def _refusal(job: Job) -> RMAError:
    """Return what the model server said instead of an answer."""
    found = await _collect(job.relay, MAX_REFUSAL_BYTES)
    if found is None:
        return job.failed()
    head, data = found
    if head.status in GOOD:
        return APIProblem(502, f"the model server of {job.who()} did not stream its answer", retry_after_s=5)
    return openai_errors.of_service(head.status, data, job.who())


# -- whole answers -------------------------------------------------------------------------------------------------


async def _whole(job: Job) -> None:
    found = await _collect(job.relay, MAX_ANSWER_BYTES)
    if found is None:
        raise job.failed()
    head, data = found
    if head.status not in GOOD:
        raise openai_errors.of_service(head.status, data, job.who())
    body = made_right(data, job.asked)
    if body is None:
        raise APIProblem(
            502,
            f"the model server of {job.who()} answered something else than JSON, or too much of it",
            retry_after_s=5,
        )
    job.task.committed = True
    job.task.http_status = head.status
    limits.settle_whole(job.call, body)
    await job.call.answer(200, {**PLAIN, **job.headers()}, body)


def made_right(data: bytes, asked: Asked) -> bytes | None:
    """Return a whole answer with our id and the name that the client knows; ``None`` for what is no answer."""
    answer = asked.answer
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        return None
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("choices" if answer.id else "data"), list):
        return None
    if answer.id:
        found["id"], found["created"] = answer.id, answer.created
        found["object"] = "chat.completion" if answer.chat else "text_completion"
        for choice in found["choices"]:
            if isinstance(choice, dict):
                choice.setdefault("finish_reason", "stop")
    elif asked.base64:
        _pack_all(found["data"])
    found["model"] = answer.model
    return encode(found)


def _pack_all(entries: list[Any]) -> None:
    """Write embeddings as SDKs ask for them by default: little-endian floats of 32 bits, in base64."""
    for entry in entries:
        numbers = entry.get("embedding") if isinstance(entry, dict) else None
        if isinstance(numbers, list) and all(isinstance(number, (int, float)) for number in numbers):
            with contextlib.suppress(OverflowError, struct.error):
                entry["embedding"] = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


# -- streams -------------------------------------------------------------------------------------------------------


class Wire:
    """The client's end of a stream: begun as late as errors are cheap, never silent for long."""

    def __init__(self, call: Call, headers: Callable[[], dict[str, str]], *, silence_s: float) -> None:
        self._call = call
        self._headers = headers
        self._silence_s = silence_s
        self._clock = asyncio.get_running_loop().time
        self._sent_at = self._clock()
        self._busy = asyncio.Lock()

    async def send(self, data: bytes, *, more: bool = True) -> None:
        """Send whole events. Raises Gone."""
        async with self._busy:
            if not self._call.started:
                await self._call.start(200, self._headers())
            await self._call.write(data, more=more)
            self._sent_at = self._clock()

    async def keep_alive(self) -> None:
        """Send a comment whenever nothing else was sent for a while. Raises Gone."""
        while True:
            await asyncio.sleep(max(0.0, self._sent_at + self._silence_s - self._clock()))
            if self._busy.locked():
                # It is not silent, its client only reads slowly.
                self._sent_at = self._clock()
            elif self._clock() - self._sent_at >= self._silence_s:
                await self.send(COMMENT)


async def _streamed(job: Job, wire: Wire) -> None:
    stream = await _relay(job, wire, lambda: Stream(job.asked.answer))
    if stream is None:
        # Nothing of an answer has gone out.
        await _refuse(job, wire, await _refusal(job) if job.relay.head is not None else job.failed())
        return
    async with contextlib.AsyncExitStack() as stack:
        error: RMAError | None = None
        for _ in range(MOST_LOSSES):
            # What a worker ended by itself, whole or not, is its model server's way to answer.
            if error is not None or job.relay.complete or stream.done or stream.broken or not job.task.committed:
                break
            job, error = await _go_on(job, wire, stream, stack)
        if stream.skipped:
            words = "%s: %d events of its model server were no JSON and were left out"
            logger.info(words, job.task.id, stream.skipped, extra={"action": "events_skipped", "task": job.task.id})
        limits.settle_stream(job.call, stream.usage, stream.delivered.tokens)
        if error is None and _is_whole(job, stream):
            await wire.send(stream.end(), more=False)
        else:
            await _refuse(job, wire, error or _broke_off(job, stream), stream)


def _is_whole(job: Job, stream: Stream) -> bool:
    return stream.whole and (stream.done or job.relay.complete)


async def _go_on(job: Job, wire: Wire, stream: Stream, stack: contextlib.AsyncExitStack) -> tuple[Job, RMAError | None]:
    """Let another worker go on where a stream was lost; return the job that did, and why it could not, if so."""
    asked = b"".join([piece async for piece in job.origin.pieces()])
    decision = decide(asked, stream.delivered)
    if decision.outcome == "give_up":
        return job, _broke_off(job, stream, decision.reason)
    if decision.outcome == "finish":
        await wire.send(stream.add(ending(asked, stream.delivered)))
        stream.done = True
        return job, None
    try:
        found = await _elsewhere(job, continued(asked, stream.delivered), stack)
    except RMAError as refused:
        return job, _broke_off(job, stream, refused.message)
    about = {"action": "answer_continued", "task": found.task.id}
    logger.info("%s goes on with what %s had begun", found.task.id, job.task.id, extra=about)
    await wire.send(CONTINUED)
    if await _relay(found, wire, lambda: stream.resume(asked)) is None:
        return found, await _refusal(found) if found.relay.head is not None else found.failed()
    return found, None


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


async def _relay(job: Job, wire: Wire, begin: Callable[[], Stream]) -> Stream | None:
    """Send the answer on as it comes; return its stream when nothing more can follow, ``None`` for no stream.

    Until its first event has gone out, an answer that is begun anew is nobody's business: it is another `begin`.
    """
    relay, task = job.relay, job.task
    while True:
        head = await relay.ready()
        if head is None or head.status not in GOOD or not _is_stream(head):
            return None
        starts, stream = relay.starts, begin()
        pieces = relay.pieces()
        async for piece in pieces:
            if events := stream.feed(piece):
                # From here on no other attempt may begin from the beginning.
                task.committed, task.http_status = True, head.status
                await wire.send(events)
            if stream.done or stream.broken:
                await _close(pieces)
                break
        if relay.starts == starts:
            return stream


async def _close(pieces: AsyncIterator[bytes]) -> None:
    """Let the worker close what has said its end, so that it counts as done."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            async for _ in pieces:
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


async def _refuse(job: Job, wire: Wire, error: RMAError, stream: Stream | None = None) -> None:
    """Say what went wrong: with a status while there is none, else as the event that SDKs raise at."""
    if not job.call.started:
        raise error
    status = status_of(error)
    said = openai_errors.body(error, status)
    await wire.send((stream or Stream(job.asked.answer)).failure(said), more=False)
