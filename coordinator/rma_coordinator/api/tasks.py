"""Asynchronous tasks, below Quart: what became of one, its answer, and its cancellation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator.api.problems import HTTPProblem
from rma_coordinator.domain.fleet import iso
from rma_core.errors import NotFound, Refused

if TYPE_CHECKING:
    from rma_coordinator.api.asgi import Call
    from rma_coordinator.domain.credentials import Principal
    from rma_coordinator.domain.records import TaskRecord, TaskResult
    from rma_coordinator.pool import Pool

#: Answers up to here stand in the task itself, when they are JSON.
INLINE_RESULT_BYTES = 64 * 1024
#: Seconds a call may wait for a task to end: below what proxies cut.
MAX_WAIT_S = 50.0
#: A final status from here on says that the service could not do it.
LEAST_ERROR = 400
#: Headers of a service's answer that the client sees; a stranger's machine must not set cookies on our address.
ANSWER_HEADERS = (
    "content-type",
    "content-encoding",
    "content-disposition",
    "content-language",
    "cache-control",
    "retry-after",
)
#: An answer is a stranger's: a browser must neither guess its type nor run anything in it.
SAFETY = {"x-content-type-options": "nosniff", "content-security-policy": "sandbox; default-src 'none'"}


def address(task_id: str) -> str:
    """Return where a task is asked after."""
    return f"/api/inference/tasks/{task_id}"


async def task(pool: Pool, call: Call) -> None:
    """GET /api/inference/tasks/{task_id}; ``wait`` seconds for its end."""
    record = await _record(pool, call, "tasks:read")
    wait_s = call.number("wait", 0, least=0, most=MAX_WAIT_S)
    if wait_s and record.ended_at is None:
        await pool.books.wait(record.task_id, wait_s)
        record = await _record(pool, call, "tasks:read")
    await call.json(await view(pool, record))


async def task_result(pool: Pool, call: Call) -> None:
    """GET /api/inference/tasks/{task_id}/result: the answer as the service gave it."""
    record = await _record(pool, call, "tasks:read")
    if record.ended_at is None:
        raise HTTPProblem(
            409, f"{record.task_id} is {record.state}", code="not_finished", retry_after_s=5, hints=(HINT,)
        )
    await answer(pool, call, record)


async def cancel_task(pool: Pool, call: Call) -> None:
    """DELETE /api/inference/tasks/{task_id}: nobody wants it any more."""
    record = await _record(pool, call, "admin:write")
    found = pool.dispatcher.tasks.get(record.task_id)
    if found is not None:
        pool.dispatcher.cancel(found, "its client cancelled it")
        if not await pool.books.wait(record.task_id, MAX_WAIT_S):
            raise HTTPProblem(503, "its end could not be written yet; it is tried again", retry_after_s=5)
        record = await _record(pool, call, "admin:write")
    if record.state != "cancelled":
        raise Refused(f"{record.task_id} has {record.state} already")
    await call.json(await view(pool, record))


HINT = "ask for the task itself; ?wait=30 answers when it has ended"


async def _record(pool: Pool, call: Call, scope: str) -> TaskRecord:
    """Return the task that a call names. Raises NotFound, also for one of another key: nobody may try ids."""
    principal = pool.keyring.principal(call.bearer)
    task_id = call.parts["task_id"]
    record = await pool.books.record(task_id)
    if record is None or not _may(principal, record, scope):
        hint = "tasks are kept for a while, for the key that made them with Prefer: respond-async or Idempotency-Key"
        raise NotFound(f"there is no task {task_id!r}", hints=(hint,))
    return record


def _may(principal: Principal, record: TaskRecord, scope: str) -> bool:
    return principal.id == record.key_id or principal.may(scope)


async def view(pool: Pool, record: TaskRecord) -> dict[str, Any]:
    """Return a task as CONTRACT writes it."""
    result = await pool.books.result(record.task_id) if record.ended_at is not None else None
    refused = result is not None and result.status >= LEAST_ERROR
    shown: dict[str, Any] = {
        "task_id": record.task_id,
        "service": record.service,
        "status": "failed" if refused else record.state,
        "created_at": iso(record.created_at),
        "ended_at": iso(record.ended_at or 0),
        "attempts": [
            {"attempt": a.number, "worker_id": a.worker_id, "status": a.state, "reason": a.reason}
            for a in record.attempts
        ],
    }
    if result is not None:
        shown |= _result(record, result, "error" if refused else "result")
    elif record.state in ("failed", "cancelled"):
        shown["error"] = {"code": _code(record), "message": "; ".join(record.reasons) or record.state}
    return shown


def _code(record: TaskRecord) -> str:
    return "cancelled" if record.state == "cancelled" else "bad_request" if record.fault == "request" else "task_failed"


def _result(record: TaskRecord, result: TaskResult, name: str) -> dict[str, Any]:
    """Return the answer inside the task where it is small JSON, else where to fetch it."""
    shown: dict[str, Any] = {"http_status": result.status, "result_url": f"{address(record.task_id)}/result"}
    kind = next((value for header, value in result.headers if header.lower() == "content-type"), "")
    if result.data is not None and len(result.data) <= INLINE_RESULT_BYTES and kind.startswith("application/json"):
        try:
            shown[name] = msgspec.json.decode(result.data)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            # It only claims to be JSON: it is fetched as it is.
            return shown
    elif name == "error":
        shown[name] = {"code": "refused_by_service", "message": f"{record.service} answered {result.status}"}
    return shown


async def answer(pool: Pool, call: Call, record: TaskRecord, *, extra: dict[str, str] | None = None) -> None:
    """Give a finished task's answer as the service gave it, or say why there is none."""
    result = await pool.books.result(record.task_id)
    headers = {**(extra or {}), **trace(record)}
    if result is None:
        raise failure(record.service, record.task_id, list(record.reasons), record.fault, headers=headers)
    kept = {name.lower(): value for name, value in result.headers if name.lower() in ANSWER_HEADERS}
    pieces = pool.books.answer_pieces(result)
    await call.start(result.status, {**kept, **SAFETY, **headers, "content-length": str(result.size)})
    async for piece in pieces:
        await call.write(piece)
    await call.write(b"", more=False)


def trace(record: TaskRecord) -> dict[str, str]:
    """Return the headers that say who answered."""
    headers = {"rma-task-id": record.task_id}
    last = next((a for a in reversed(record.attempts) if a.state == "succeeded"), None)
    return headers | ({"rma-worker": last.worker_id, "rma-attempt": str(last.number)} if last else {})


def failure(
    service: str,
    task_id: str,
    reasons: list[str],
    fault: str | None,
    *,
    too_late: bool = False,
    headers: dict[str, str] | None = None,
) -> HTTPProblem:
    """Return the problem of a task that ended without an answer, with every reason."""
    wrong = fault == "request"
    return HTTPProblem(
        400 if wrong else 504 if too_late else 502,
        f"{service} did not answer: {'; '.join(reasons) or 'no reason known'}",
        code="bad_request" if wrong else "task_failed",
        retry_after_s=None if wrong else 5,
        hints=(f"`rma tasks` shows {task_id} with every attempt",),
        headers=headers,
    )
