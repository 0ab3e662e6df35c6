"""The inference API below Quart: a request becomes a task, its answer is relayed as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from rma_coordinator.api.asgi import Gone
from rma_coordinator.api.problems import HTTPProblem, problem, wrong_method
from rma_coordinator.domain.tasks import Task
from rma_core.errors import NotFound, RMAError, TryLater

if TYPE_CHECKING:
    from rma_coordinator.api.asgi import Call
    from rma_coordinator.pool import Pool
    from rma_coordinator.relay import Body, Head, Relay
    from rma_core.catalog import CatalogEntry

logger = logging.getLogger(__name__)

#: Headers of a client's request that the service sees; a credential is never among them.
REQUEST_HEADERS = ("content-type", "accept", "accept-language", "user-agent")
#: Headers of a service's answer that the client sees; a stranger's machine must not set cookies on our address.
ANSWER_HEADERS = (
    "content-type",
    "content-encoding",
    "content-disposition",
    "content-language",
    "cache-control",
    "retry-after",
)
#: What a worker takes of an address and of one header; its contract refuses longer ones.
MAX_PATH, MAX_HEADER = 4096, 8192
#: An answer is a stranger's: a browser must neither guess its type nor run anything in it.
SAFETY = {"x-content-type-options": "nosniff", "content-security-policy": "sandbox; default-src 'none'"}


async def infer(pool: Pool, call: Call) -> None:
    """POST /api/inference/{service} and below: run a request on a worker and relay its answer."""
    principal = pool.keyring.principal(call.bearer)
    service, path = _target(call)
    entry = pool.check_service(service, principal)
    _check_route(entry, call.method, path)
    headers = _request_headers(call)
    pool.check_served(service)
    call.check_body(pool.settings.max_body_bytes)
    body = pool.body()
    try:
        async for chunk in call.chunks(pool.settings.max_body_bytes):
            await body.write(chunk)
        task = Task(
            service=entry.service,
            method=call.method,
            path=path,
            headers=headers,
            body_bytes=body.size,
            key_id=principal.id,
            now=pool.clock(),
            timeout_s=pool.settings.task_timeout_s,
        )
        await _run(pool, call, task, body)
    finally:
        await body.close()


async def _run(pool: Pool, call: Call, task: Task, body: Body) -> None:
    try:
        relay = pool.submit(task, body)
    except TryLater as error:
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
    return {**kept, **SAFETY, **trace(task)}


def trace(task: Task) -> dict[str, str]:
    """Return the headers that say who answered."""
    headers = {"rma-task-id": task.id}
    if task.attempt:
        headers |= {"rma-worker": task.attempt.worker_id, "rma-attempt": str(task.attempt.number)}
    return headers


async def _failed(call: Call, task: Task) -> None:
    """Answer a task that ended without an answer, with every reason."""
    status = 504 if task.ended_at is not None and task.ended_at >= task.deadline else 502
    code = "task_failed"
    if task.fault == "request":
        status, code = 400, "bad_request"
    error = HTTPProblem(
        status,
        f"{task.service} did not answer: {'; '.join(task.reasons) or 'no reason known'}",
        code=code,
        retry_after_s=None if task.fault == "request" else 5,
        hints=(f"`rma tasks` shows {task.id} with every attempt",),
    )
    status, headers, body = problem(error, task_id=task.id, attempts=len(task.attempts))
    await call.answer(status, {**headers, **trace(task)}, body)
