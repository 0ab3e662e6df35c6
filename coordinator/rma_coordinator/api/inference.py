"""The inference API below Quart: a request becomes a task, its answer is relayed as it comes.

With ``Prefer: respond-async`` or an ``Idempotency-Key`` the task is durable: it is on disk before it is acknowledged,
outlives its client, and its answer is kept for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import re
from typing import TYPE_CHECKING, NamedTuple

from rma_coordinator.api import limits, tasks
from rma_coordinator.api.asgi import Gone
from rma_coordinator.api.problems import HTTPProblem, problem, wrong_method
from rma_coordinator.api.tasks import ANSWER_HEADERS, SAFETY
from rma_coordinator.domain.fleet import ATTACHABLE
from rma_coordinator.domain.records import idempotency_key
from rma_coordinator.domain.tasks import PRIORITIES, Task, new_task_id
from rma_coordinator.domain.webhooks import refusal
from rma_core.errors import NotFound, RMAError, TryLater

if TYPE_CHECKING:
    from rma_coordinator.api.asgi import Call
    from rma_coordinator.domain.credentials import Principal
    from rma_coordinator.domain.tasks import Priority
    from rma_coordinator.pool import Pool
    from rma_coordinator.relay import Head, Relay
    from rma_coordinator.spool import Body
    from rma_core.catalog import CatalogEntry

logger = logging.getLogger(__name__)

#: Headers of a client's request that the service sees; a credential is never among them.
REQUEST_HEADERS = ("content-type", "accept", "accept-language", "user-agent")
#: What a worker takes of an address and of one header; its contract refuses longer ones.
MAX_PATH, MAX_HEADER = 4096, 8192
#: What an Idempotency-Key may be; quotes around it, as of a structured header, belong to it.
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


async def infer(pool: Pool, call: Call) -> None:
    """POST /api/inference/{service} and below: run a request on a worker and relay its answer."""
    principal = pool.keyring.principal(call.bearer)
    service, path = _target(call)
    entry = pool.check_service(service, principal)
    _check_route(entry, call.method, path)
    _request_headers(call)
    key = _idempotency_key(call)
    detached = _respond_async(call)
    webhook = _webhook(pool, call, principal, detached=detached)
    ask = Ask(principal, entry, path, priority(call, principal), deadline_s(call), webhook)
    call.check_body(_most_bytes(pool, entry))
    if why := pool.impossible(entry):
        raise HTTPProblem(501, f"no machine of this pool could ever run {service}: {why}", code="impossible")
    pool.check_store()
    if not key and not detached:
        pool.check_served(service)
    limits.admit(pool, call, principal)
    if key or detached:
        await _durable(pool, call, ask, key=key, detached=detached)
        return
    body = pool.spools.make()
    try:
        async for chunk in call.chunks(_most_bytes(pool, entry)):
            await body.write(chunk)
        await _run(pool, call, ask, _task(pool, call, ask, body), body)
    finally:
        await body.close()


class Ask(NamedTuple):
    """A request that has been looked at: who asks, for which service, at which path of it, how urgent, and so on."""

    principal: Principal
    entry: CatalogEntry
    path: str
    priority: Priority
    #: Seconds that the client gives it in all.
    asked_s: float
    #: Where its end is to be told, if anywhere.
    webhook: str


def _most_bytes(pool: Pool, entry: CatalogEntry) -> int:
    """Return how large a request may be: what the pool takes, or the service."""
    most = pool.settings.max_body_bytes
    return most if entry.max_body_bytes is None else min(most, entry.max_body_bytes)


def _task(pool: Pool, call: Call, ask: Ask, body: Body, *, durable: bool = False) -> Task:
    settings = pool.settings
    own_s = settings.async_timeout_s if durable else ask.entry.timeout_s or settings.task_timeout_s
    return Task(
        task_id=body.name,
        service=ask.entry.service,
        method=call.method,
        path=ask.path,
        headers=_request_headers(call),
        body_bytes=body.size,
        key_id=ask.principal.id,
        now=pool.clock(),
        timeout_s=min(own_s, ask.asked_s),
        durable=durable,
        first_byte_s=ask.entry.first_byte_s,
        gap_s=ask.entry.gap_s,
        priority=ask.priority,
        webhook=ask.webhook,
        owner=ask.principal.owner,
    )


def priority(call: Call, principal: Principal) -> Priority:
    """Return the class of a request: what it asks for, but no higher than its key may. Raises HTTPProblem (400)."""
    text = call.raw.get(b"rma-priority", b"normal").decode("latin-1").strip().lower()
    found = next((one for one in PRIORITIES if one == text), None)
    if found is None:
        raise HTTPProblem(400, f"RMA-Priority is one of: {', '.join(PRIORITIES)}", code="header")
    return "normal" if found == "high" and not principal.may("priority:high") else found


def deadline_s(call: Call) -> float:
    """Return how many seconds the client gives its request in all; any number unless it says. Raises HTTPProblem."""
    text = call.raw.get(b"rma-timeout")
    if text is None:
        return math.inf
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise HTTPProblem(400, "RMA-Timeout is a number of seconds, more than 0", code="header")
    return seconds


# -- durable tasks -----------------------------------------------------------------------------------------------


def _idempotency_key(call: Call) -> str:
    """Return the request's Idempotency-Key, if any. Raises HTTPProblem (400)."""
    key: str = call.headers.get("idempotency-key", "")
    if "idempotency-key" in call.headers and not IDEMPOTENCY_KEY.fullmatch(key):
        raise HTTPProblem(400, "an Idempotency-Key has 1 to 255 visible ASCII characters", code="header")
    return key


def _respond_async(call: Call) -> bool:
    """Say whether the client would rather be told later (RFC 7240)."""
    preferences = [part.partition(";")[0].strip().lower() for part in call.headers.get("prefer", "").split(",")]
    return "respond-async" in preferences


def _webhook(pool: Pool, call: Call, principal: Principal, *, detached: bool) -> str:
    """Return where the client wants the task's end to be told, if anywhere. Raises HTTPProblem (400, 429)."""
    url: str = call.headers.get("rma-webhook", "")
    if "rma-webhook" not in call.headers:
        return ""
    if not detached:
        raise HTTPProblem(400, "RMA-Webhook goes with Prefer: respond-async", code="header")
    if why := refusal(url, plain_http=pool.settings.webhook_http):
        raise HTTPProblem(400, f"RMA-Webhook cannot be this address: {why}", code="header")
    if not pool.keyring.webhook_secrets(principal.id.removeprefix("key:")):
        hint = f"the pool's admin makes one: rma keys webhook-secret {principal.id.removeprefix('key:')}"
        raise HTTPProblem(400, "this key has no secret to sign webhooks with", code="header", hints=(hint,))
    try:
        pool.webhooks.check_room()
    except TryLater as error:
        raise HTTPProblem(429, error.message, code="queue_full", retry_after_s=error.retry_after_s) from None
    return url


async def _durable(pool: Pool, call: Call, ask: Ask, *, key: str, detached: bool) -> None:
    """Keep the request as a durable task, or find the one that it is a repetition of; then answer as was asked."""
    scope = idempotency_key(key_id=ask.principal.id, method=call.method, path=ask.path, key=key) if key else ""
    body = pool.books.make_body(new_task_id())
    digest = hashlib.sha256(call.headers.get("content-type", "").encode() + b"\0")
    if ask.webhook:
        digest.update(ask.webhook.encode() + b"\0")
    known: str | None = None
    try:
        async for chunk in call.chunks(_most_bytes(pool, ask.entry)):
            digest.update(chunk)
            await body.write(chunk)
        known = await pool.books.find(scope, digest.hexdigest()) if scope else None
        if known is None:
            _check_queue(pool)
            _reserve(pool, ask, body.name, body)
            task = _task(pool, call, ask, body, durable=True)
            await pool.books.submit(task, body, key=scope, fingerprint=digest.hexdigest())
    except BaseException:
        await body.close()
        pool.unreserve(body.name)
        raise
    if known is not None:
        await body.close()
    await _answer_durable(pool, call, known or body.name, repeated=known is not None, detached=detached)


def _check_queue(pool: Pool) -> None:
    try:
        pool.dispatcher.check_room(coming=pool.books.coming)
    except TryLater as error:
        raise HTTPProblem(429, error.message, code="queue_full", retry_after_s=error.retry_after_s) from None


async def _answer_durable(pool: Pool, call: Call, task_id: str, *, repeated: bool, detached: bool) -> None:
    extra = {"idempotency-replayed": "true"} if repeated else {}
    location = {"location": tasks.address(task_id)}
    if not detached:
        ended = await pool.books.wait(task_id, 0)
        if not ended and not repeated:
            ended = await _until_ended(pool, call, task_id)
        if not ended:
            raise _still_running(task_id)
    record = await pool.books.record(task_id)
    if record is None:
        raise NotFound(f"{task_id} was kept for its time, and is gone", hints=("use a new Idempotency-Key",))
    if detached:
        applied = {"preference-applied": "respond-async"}
        await call.json(await tasks.view(pool, record), 202, headers={**location, **applied, **extra})
    else:
        await tasks.answer(pool, call, record, extra=extra)


def _still_running(task_id: str) -> HTTPProblem:
    return HTTPProblem(
        409,
        f"the request with this Idempotency-Key is {task_id}, and still runs",
        code="still_running",
        retry_after_s=5,
        headers={"location": tasks.address(task_id)},
        hints=(tasks.HINT,),
    )


async def _until_ended(pool: Pool, call: Call, task_id: str) -> bool:
    """Wait for the task's end and say whether it has come; while the disk does not answer, it cannot.

    Raises Gone when the client leaves, which leaves the task as it is.
    """
    left = asyncio.create_task(call.left(), name=f"{task_id} client")
    ended = asyncio.create_task(pool.books.wait(task_id, pool.settings.async_timeout_s), name=f"{task_id} end")
    try:
        await asyncio.wait({left, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            raise Gone
        return ended.result()
    finally:
        for each in (left, ended):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Gone):
                await each


# -- requests whose client waits ---------------------------------------------------------------------------------


def _reserve(pool: Pool, ask: Ask, task_id: str, body: Body) -> None:
    """Reserve what a request to a language model takes of its key's tokens. Raises OverLimit."""
    if ask.entry.service == ATTACHABLE:
        limits.reserve(pool, ask.principal, task_id, body.small(), size=body.size)


async def _run(pool: Pool, call: Call, ask: Ask, task: Task, body: Body) -> None:
    _reserve(pool, ask, task.id, body)
    try:
        relay = pool.submit(task, body)
    except TryLater as error:
        pool.unreserve(task.id)
        raise HTTPProblem(429, error.message, code="queue_full", retry_after_s=error.retry_after_s) from None
    try:
        await _relay(call, task, relay)
    finally:
        pool.dispatcher.cancel(task, "the client left")


def _target(call: Call) -> tuple[str, str]:
    """Return (service, the path the service sees), query included."""
    rest = call.path.removeprefix("/api/inference/")
    query = call.scope.get("query_string", b"").decode("latin-1")
    path = f"/{rest}" + (f"?{query}" if query else "")
    if len(path) > MAX_PATH:
        raise HTTPProblem(414, f"path and query together have at most {MAX_PATH} characters")
    return rest.partition("/")[0], path


def _check_route(entry: CatalogEntry, method: str, path: str) -> None:
    """Raise NotFound, or HTTPProblem (405), unless the catalog passes this on."""
    bare = path.partition("?")[0]
    methods = [route.partition(" ")[0] for route in entry.routes if route.partition(" ")[2] == bare]
    if not methods:
        known = ", ".join(
            f"{route.partition(' ')[0]} /api/inference{route.partition(' ')[2]}" for route in entry.routes
        )
        raise NotFound(f"{entry.service} has no {bare}", hints=(f"it has: {known}",))
    if method not in methods:
        raise wrong_method(methods)


def _request_headers(call: Call) -> tuple[tuple[str, str], ...]:
    """Return the headers that the service sees. Raises HTTPProblem (400) for one that no worker would take."""
    headers = tuple((name, call.headers[name]) for name in REQUEST_HEADERS if name in call.headers)
    for name, value in headers:
        if len(value) > MAX_HEADER or not value.isascii():
            raise HTTPProblem(400, f"the header {name} has at most {MAX_HEADER} characters, of ASCII", code="header")
    return headers


async def _relay(call: Call, task: Task, relay: Relay) -> None:
    """Send the answer on as it comes, until it has gone or the client leaves."""
    left = asyncio.create_task(call.left(), name=f"{task.id} client")
    answer = asyncio.create_task(_answer(call, task, relay), name=f"{task.id} answer")
    try:
        await asyncio.wait({left, answer}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            answer.result()
    finally:
        for each in (left, answer):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Gone, CutAnswer, RMAError):
                await each


async def _answer(call: Call, task: Task, relay: Relay) -> None:
    head = await relay.ready()
    if head is None:
        await _failed(call, task)
        return
    task.committed = True
    task.http_status = head.status
    headers = _answer_headers(task, head)
    whole = relay.whole
    if whole is not None:
        await call.answer(head.status, headers, whole)
        return
    length = {} if head.length is None else {"content-length": str(head.length)}
    await call.start(head.status, {**headers, **length})
    async for piece in relay.pieces():
        await call.write(piece)
    if not relay.complete:
        # The status has gone out: a connection that breaks is the only honest way to say that the answer is cut.
        raise CutAnswer(task.id)
    await call.write(b"", more=False)


class CutAnswer(Exception):
    """The answer broke off after its beginning had gone to the client; the connection is closed without its end."""


def _answer_headers(task: Task, head: Head) -> dict[str, str]:
    kept = {name.lower(): value for name, value in head.headers if name.lower() in ANSWER_HEADERS}
    return {**kept, **SAFETY, **trace(task), **timings(task)}


def trace(task: Task) -> dict[str, str]:
    """Return the headers that say who answered."""
    headers = {"rma-task-id": task.id}
    if task.attempt:
        headers |= {"rma-worker": task.attempt.worker_id, "rma-attempt": str(task.attempt.number)}
    return headers


def timings(task: Task) -> dict[str, str]:
    """Return the headers that say how long what took, as far as that is known when the answer begins."""
    attempt, began = task.attempt, task.created_at
    if attempt is None:
        return tasks.timings(total_s=None if task.ended_at is None else task.ended_at - began)
    return tasks.timings(
        queue_s=attempt.offered_at - began,
        first_byte_s=None if attempt.first_byte_at is None else attempt.first_byte_at - began,
        total_s=None if task.ended_at is None else task.ended_at - began,
        model_state=attempt.model_state,
    )


async def _failed(call: Call, task: Task) -> None:
    """Answer a task that ended without an answer, with every reason."""
    error = tasks.failure(task.service, task.id, task.reasons, task.fault, too_late=task.late)
    status, headers, body = problem(error, task_id=task.id, attempts=len(task.attempts))
    await call.answer(status, {**headers, **trace(task), **timings(task)}, body)
