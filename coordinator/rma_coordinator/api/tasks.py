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
    from rma_coordinator.domain.records import AttemptRecord, TaskRecord, TaskResult
    from rma_coordinator.domain.webhooks import WebhookRecord
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
        "deadline_at": iso(record.created_at + record.timeout_s),
        "seconds": seconds(record),
        "attempts": [attempt(record, one) for one in record.attempts],
    }
    if record.webhook:
        shown["webhook"] = webhook(record, await pool.webhooks.record(record.task_id))
    if result is not None:
        shown |= _result(record, result, "error" if refused else "result")
        if "result" in shown or refused:
            pool.traffic.answer(record.key_id, result.size)
    elif record.state in ("failed", "cancelled"):
        shown["error"] = {"code": _code(record), "message": "; ".join(record.reasons) or record.state}
    return shown


def attempt(record: TaskRecord, one: AttemptRecord) -> dict[str, Any]:
    """Return one attempt of a task; seconds count from when the task came."""
    return {
        "attempt": one.number,
        "worker_id": one.worker_id,
        "status": one.state,
        "reason": one.reason,
        "offered_s": since(record, one.offered_at),
        "started_s": since(record, one.started_at),
        "first_byte_s": since(record, one.first_byte_at),
        "ended_s": since(record, one.ended_at),
        "answer_bytes": one.answer_bytes,
        **({"model_state": one.model_state} if one.model_state else {}),
    }


def since(record: TaskRecord, moment: float | None) -> float | None:
    """Return how many seconds after a task came something happened; ``None`` for what has not."""
    return None if not moment else round(max(0.0, moment - record.created_at), 4)


def seconds(record: TaskRecord) -> dict[str, float | None]:
    """Return how long what took since a task came: until its worker had it, its answer began, and all was over."""
    last = _last(record)
    return {
        "queue": since(record, last.offered_at) if last else None,
        "first_byte": since(record, last.first_byte_at) if last else None,
        "total": since(record, record.ended_at),
    }


def _last(record: TaskRecord) -> AttemptRecord | None:
    """Return the attempt that answered, else the newest."""
    won = next((one for one in record.attempts if one.state == "succeeded"), None)
    return won or (record.attempts[-1] if record.attempts else None)


def webhook(record: TaskRecord, known: WebhookRecord | None) -> dict[str, Any]:
    """Return how the webhook of a task stands, which there is from its end on."""
    if known is None:
        return {"url": record.webhook, "status": "waiting", "tries": 0}
    moment = {"waiting": "next_at", "delivered": "delivered_at", "given_up": "given_up_at"}[known.state]
    shown = {"url": known.url, "id": known.message_id, "status": known.state, "tries": known.tries}
    return {**shown, moment: iso(known.at), **({"reason": known.reason} if known.reason else {})}


def timings(
    *,
    queue_s: float | None = None,
    first_byte_s: float | None = None,
    total_s: float | None = None,
    model_state: str = "",
) -> dict[str, str]:
    """Return the headers that say how long what took since a request came, as far as that is known."""
    named = {"queue": queue_s, "first-byte": first_byte_s, "total": total_s}
    metrics = [f"{name};dur={max(0.0, took_s) * 1000:.1f}" for name, took_s in named.items() if took_s is not None]
    found = {"server-timing": ", ".join(metrics)} if metrics else {}
    return found | ({"rma-model-state": model_state} if model_state else {})


def _code(record: TaskRecord) -> str:
    if record.state == "cancelled":
        return "cancelled"
    return "bad_request" if record.fault == "request" else "deadline" if record.late else "task_failed"


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
    took, last = seconds(record), _last(record)
    said = timings(
        queue_s=took["queue"],
        first_byte_s=took["first_byte"],
        total_s=took["total"],
        model_state=last.model_state if last else "",
    )
    headers = {**(extra or {}), **trace(record), **said}
    if result is None:
        reasons = list(record.reasons)
        raise failure(record.service, record.task_id, reasons, record.fault, too_late=record.late, headers=headers)
    kept = {name.lower(): value for name, value in result.headers if name.lower() in ANSWER_HEADERS}
    pieces = pool.books.answer_pieces(result)
    pool.traffic.answer(record.key_id, result.size)
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
        code="bad_request" if wrong else "deadline" if too_late else "task_failed",
        retry_after_s=None if wrong else 5,
        hints=(f"`rma tasks` shows {task_id} with every attempt",),
        headers=headers,
    )
