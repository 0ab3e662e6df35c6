"""OpenAI's API below Quart: what is asked is checked, becomes a run or joins one, and its client is answered.

`requests` reads what is asked, `runs` keeps what runs for it, `streams` and `whole` bring the answer back, `answers`
gives it to each client, `errors` says what went wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from rma_coordinator.api import limits
from rma_coordinator.api.asgi import PATIENCE_S, QUICK_BYTES
from rma_coordinator.api.inference import deadline_s, priority
from rma_coordinator.api.v1.access import check_model, principal_of
from rma_coordinator.api.v1.answers import follow, give_again
from rma_coordinator.api.v1.errors import REQUEST_ID, APIProblem, client_id, request_id
from rma_coordinator.api.v1.jobs import Asked, Job
from rma_coordinator.api.v1.requests import CHAT, COMPLETION, EMBEDDING, manner, read
from rma_coordinator.api.v1.runs import Run
from rma_coordinator.api.v1.sse import Answer
from rma_coordinator.api.v1.streams import streamed
from rma_coordinator.domain import unguessable
from rma_coordinator.domain.affinity import prefixes
from rma_coordinator.domain.continuing import TOKEN_CHARACTERS
from rma_coordinator.domain.fleet import ATTACHABLE
from rma_coordinator.domain.repeats import Kept, OtherRequest, key_of
from rma_coordinator.domain.speeds import NO_WORK, Work
from rma_coordinator.domain.tasks import LEASE_S, Task
from rma_core.errors import TryLater
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from rma_coordinator.api.asgi import Call
    from rma_coordinator.api.v1.requests import Kind, Manner
    from rma_coordinator.domain.affinity import Prefix
    from rma_coordinator.domain.credentials import Principal
    from rma_coordinator.domain.repeats import Key
    from rma_coordinator.domain.tasks import Priority
    from rma_coordinator.pool import Pool

logger = logging.getLogger(__name__)

#: The longest request: a chat with some pictures in it.
MAX_BODY_BYTES = 8 * 1024 * 1024
#: Conversations up to here are known again when they go on.
MOST_HASHED_BYTES = 256 * 1024
#: Headers that the model server sees.
TASK_HEADERS = (("content-type", "application/json"),)
#: Seconds until a place in a queue of which nothing is known is worth another try.
RETRY_AFTER_S = 5.0


async def chat_completions(pool: Pool, call: Call) -> None:
    """POST /v1/chat/completions."""
    await _serve(pool, call, CHAT)


async def completions(pool: Pool, call: Call) -> None:
    """POST /v1/completions."""
    await _serve(pool, call, COMPLETION)


async def embeddings(pool: Pool, call: Call) -> None:
    """POST /v1/embeddings."""
    await _serve(pool, call, EMBEDDING)


async def _serve(pool: Pool, call: Call, kind: Kind) -> None:
    asked_at = pool.clock()
    principal = principal_of(pool, call)
    _correlate(call)
    how = manner(call)
    found = await _found(pool, call, kind, principal, how)
    if isinstance(found, Kept):
        await give_again(call, found)
        return
    joined = found.id != request_id(call)
    if joined:
        # What the pool's admin knows the request by.
        call.scope[REQUEST_ID] = found.id
        logger.debug(
            "%s was asked for again, and is joined", found.id, extra={"action": "run_joined", "task": found.id}
        )
    # Nothing of the request's body is held here any more: it may be large, and wait for long.
    await follow(found, call, how, asked_at=asked_at, joined=joined)


async def _found(pool: Pool, call: Call, kind: Kind, principal: Principal, how: Manner) -> Run | Kept:
    """Read a request, and return what answers it: a new run, one that it repeats, or the answer that is kept for it."""
    urgency, asked_s = priority(call, principal), deadline_s(call)
    most = min(MAX_BODY_BYTES, pool.settings.max_body_bytes)
    if 0 < call.check_body(most) <= QUICK_BYTES:
        data = await call.body(most)
        return await _answering(pool, call, kind, data, Ask(principal, how, urgency, asked_s))
    body = pool.spools.make()
    try:
        async for chunk in call.chunks(most):
            await body.write(chunk)
        ask = Ask(principal, how, urgency, asked_s)
        if not body.on_disk:
            return await _answering(pool, call, kind, body.small() or b"", ask)
        # Only so many are looked at together, for as long as the disk takes; the others wait there.
        async with _turn(pool):
            data = b"".join([piece async for piece in body.pieces()])
            return await _answering(pool, call, kind, data, ask)
    finally:
        await body.close()


@contextlib.asynccontextmanager
async def _turn(pool: Pool) -> AsyncIterator[None]:
    """Have a turn at looking at a large request. Raises APIProblem when none comes."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            await pool.spools.whole.acquire()
    except TimeoutError:
        message = "too many large requests are looked at, or the coordinator's disk is slow"
        raise APIProblem(503, message, retry_after_s=RETRY_AFTER_S) from None
    try:
        yield
    finally:
        pool.spools.whole.release()


class Ask(NamedTuple):
    """Who asks, how, how urgently, and with how much time."""

    principal: Principal
    how: Manner
    urgency: Priority
    #: Seconds that its client gives it.
    asked_s: float


class Wanted(NamedTuple):
    """A request that has been looked at, and the body that model servers get of it."""

    kind: Kind
    key: Key
    request: Any
    sent: bytes


async def _answering(pool: Pool, call: Call, kind: Kind, data: bytes, ask: Ask) -> Run | Kept:
    request, sent = read(data, kind)
    key = key_of(ask.principal.id, kind.path, data)
    if ask.how.name and (kept := _claimed(pool, ask.how.name, key)) is not None:
        return kept
    return _known(pool, key, ask.how) or await _begin(pool, call, ask, Wanted(kind, key, request, sent))


async def _begin(pool: Pool, call: Call, ask: Ask, wanted: Wanted) -> Run:
    """Return a new run for a request, or the one that has begun for it while its body was put aside."""
    kind, key, request, sent = wanted
    pool.check_store()
    check_model(pool, request.model)
    limits.admit(pool, call, ask.principal, sent)
    again = _again(pool, ask, wanted)
    body = pool.spools.make()
    try:
        if not body.hold(sent):
            await body.write(sent)
        if (other := _known(pool, key, ask.how)) is not None:
            await body.close()
            return other
        task = again(body.size, request_id(call))
        relay = pool.submit(task, body)
    except BaseException as error:
        await body.close()
        if isinstance(error, TryLater):
            raise _full(pool, error, request.model) from None
        raise
    job = Job(pool, task, relay, _asked(pool, kind, request, len(sent)), body, again)
    run = Run(job, key, name=ask.how.name, metered=call.scope.get(limits.METERED))
    if job.asked.stream:
        run.start(streamed(run))
    else:
        run.gather()
    return run


def _again(pool: Pool, ask: Ask, wanted: Wanted) -> Callable[..., Task]:
    """Return what makes a task for a request, or for what is left of it; it lives as long as that, and holds little."""
    kind, model, key_id = wanted.kind, wanted.request.model, ask.principal.id
    known = _prefixes(wanted.request, len(wanted.sent), salt=key_id) if kind is CHAT else ()
    work, streams = _work(pool, wanted, key_id), bool(getattr(wanted.request, "stream", None))

    def again(size: int, task_id: str = "") -> Task:
        task = _task(
            pool,
            kind,
            model,
            key_id=key_id,
            body_bytes=size,
            task_id=task_id,
            urgency=ask.urgency,
            asked_s=ask.asked_s,
        )
        task.prefixes, task.owner, task.work, task.streamed = known, ask.principal.owner, work, streams
        return task

    return again


def _correlate(call: Call) -> None:
    """Note which of our requests it is that a client knows by a name of its own."""
    if theirs := client_id(call):
        about = {"action": "client_request", "task": request_id(call), "client_request_id": theirs}
        logger.info("%s is what its client calls %s", request_id(call), theirs, extra=about)


def _claimed(pool: Pool, name: str, key: Key) -> Kept | None:
    """Return the answer that is kept for a named request. Raises APIProblem (422)."""
    try:
        return pool.repeats.claim(name, key)
    except OtherRequest as error:
        hints = ("use a new one for each request",)
        raise APIProblem(422, error.message, api_code="idempotency_key_reused", hints=hints) from None


def _known(pool: Pool, key: Key, how: Manner) -> Run | None:
    """Return the run that a repetition is for, if it lives and can be joined; one that nobody can join ends."""
    if not how.repeats and not how.name:
        return None
    runs: tuple[Run, ...] = pool.repeats.runs(key)
    found = [run for run in runs if run.takes(how)]
    if not found:
        for run in runs:
            if not run.clients:
                run.stop()
        return None
    # One whose client has gone was certainly meant.
    return min(found, key=lambda run: len(run.clients))


def _full(pool: Pool, error: TryLater, model: str) -> APIProblem:
    turn_s = pool.dispatcher.turn_s(ATTACHABLE, model)
    return APIProblem(429, error.message, retry_after_s=turn_s or RETRY_AFTER_S, hints=error.hints)


def _task(
    pool: Pool,
    kind: Kind,
    model: str,
    *,
    key_id: str,
    body_bytes: int,
    task_id: str = "",
    urgency: Priority = "normal",
    asked_s: float = math.inf,
) -> Task:
    # What volunteers attached needs no entry in the catalog.
    entry = pool.catalog.get(ATTACHABLE)
    return Task(
        task_id=task_id,
        service=ATTACHABLE,
        model=model,
        method="POST",
        path=kind.path,
        headers=TASK_HEADERS,
        body_bytes=body_bytes,
        key_id=key_id,
        now=pool.clock(),
        timeout_s=min(asked_s, (entry and entry.timeout_s) or pool.settings.task_timeout_s),
        first_byte_s=entry.first_byte_s if entry else None,
        gap_s=entry.gap_s if entry else LEASE_S,
        priority=urgency,
    )


def _prefixes(request: Any, size: int, *, salt: str) -> tuple[Prefix, ...]:  # noqa: ANN401 - a record of `Kind`
    """Return the beginnings of a conversation; of one with pictures in it none, for that would hold everyone up."""
    return prefixes(map(encode, request.messages), salt=salt) if size <= MOST_HASHED_BYTES else ()


def _work(pool: Pool, wanted: Wanted, key_id: str) -> Work:
    """Return what a request is likely to be, in tokens; pictures are not measured by their bytes, nor vectors."""
    request, size = wanted.request, len(wanted.sent)
    if wanted.kind is EMBEDDING or size > MOST_HASHED_BYTES:
        return NO_WORK
    bounds = (getattr(request, "max_completion_tokens", None), request.max_tokens)
    most = next((one for one in bounds if type(one) is int and one >= 0), None)
    lane = f"{ATTACHABLE} {request.model}"
    return Work(size / TOKEN_CHARACTERS, pool.dispatcher.speeds.length(key_id, lane, most))


def _asked(pool: Pool, kind: Kind, request: Any, size: int) -> Asked:  # noqa: ANN401 - a record of `Kind`
    options = getattr(request, "stream_options", None)
    answer = Answer(
        id=kind.prefix + unguessable.source.hex(12) if kind.prefix else "",
        created=int(pool.wall()),
        model=request.model,
        chat=kind is CHAT,
        usage=bool(options and options.include_usage),
        prompt_guess=max(1, size // TOKEN_CHARACTERS),
    )
    base64 = getattr(request, "encoding_format", None) == "base64"
    bursts = bool(getattr(request, "tools", None))
    return Asked(answer, stream=bool(getattr(request, "stream", None)), base64=base64, bursts=bursts)
