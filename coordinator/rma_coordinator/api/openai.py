"""OpenAI's API below Quart: what is asked is checked, becomes a task for a worker with that model, and is answered.

`openai_answers` brings the answer back, `openai_errors` says what went wrong.
"""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_coordinator.api import bodies, limits
from rma_coordinator.api.asgi import bearer
from rma_coordinator.api.inference import deadline_s, priority
from rma_coordinator.api.openai_answers import Asked, Job, respond
from rma_coordinator.api.openai_errors import APIProblem, request_id
from rma_coordinator.api.sse import Answer
from rma_coordinator.domain.affinity import prefixes
from rma_coordinator.domain.fleet import ATTACHABLE
from rma_coordinator.domain.tasks import LEASE_S, Task
from rma_core.errors import NotAuthenticated, NotFound, Problem, TryLater, ValidationProblem
from rma_core.models.strict import MAX_EXPLAINED_BYTES, convert, encode

if TYPE_CHECKING:
    from rma_coordinator.api.asgi import Call
    from rma_coordinator.domain.affinity import Prefix
    from rma_coordinator.domain.credentials import Principal
    from rma_coordinator.domain.models import ModelView
    from rma_coordinator.domain.tasks import Priority
    from rma_coordinator.pool import Pool

#: The longest request: a chat with some pictures in it.
MAX_BODY_BYTES = 8 * 1024 * 1024
#: Values in one request, counted by what stands before each; as objects they take 100 bytes and more apiece.
MOST_VALUES = 300_000
#: Conversations up to here are known again when they go on.
MOST_HASHED_BYTES = 256 * 1024
#: The scope that opens all of it.
SCOPE = f"infer:{ATTACHABLE}"
#: Where else than in Authorization clients put their key.
KEY_HEADERS = (b"api-key", b"x-api-key")
#: Headers that the model server sees.
TASK_HEADERS = (("content-type", "application/json"),)


class Kind(NamedTuple):
    """One of OpenAI's calls that run a model."""

    path: str
    takes: type[bodies.ChatCompletionRequest | bodies.CompletionRequest | bodies.EmbeddingRequest]
    #: What its answers' ids begin with; embeddings have none.
    prefix: str = ""


CHAT = Kind("/v1/chat/completions", bodies.ChatCompletionRequest, "chatcmpl-")
COMPLETION = Kind("/v1/completions", bodies.CompletionRequest, "cmpl-")
EMBEDDING = Kind("/v1/embeddings", bodies.EmbeddingRequest)


def covers(path: str) -> bool:
    """Say whether an address belongs to OpenAI's API, whose errors have a form of their own."""
    return path.startswith("/v1/") or path == "/v1"


# -- runs ----------------------------------------------------------------------------------------------------------


async def chat_completions(pool: Pool, call: Call) -> None:
    """POST /v1/chat/completions."""
    await _run(pool, call, CHAT)


async def completions(pool: Pool, call: Call) -> None:
    """POST /v1/completions."""
    await _run(pool, call, COMPLETION)


async def embeddings(pool: Pool, call: Call) -> None:
    """POST /v1/embeddings."""
    await _run(pool, call, EMBEDDING)


async def _run(pool: Pool, call: Call, kind: Kind) -> None:
    principal = _principal(pool, call)
    urgency, asked_s = priority(call, principal), deadline_s(call)
    data = await call.body(min(MAX_BODY_BYTES, pool.settings.max_body_bytes))
    request, data = read(data, kind)
    pool.check_store()
    check_model(pool, request.model)
    limits.admit(pool, call, principal, data)
    body = pool.spools.make()

    known = _prefixes(request, len(data), salt=principal.id) if kind is CHAT else ()

    def again(size: int, task_id: str = "") -> Task:
        task = _task(
            pool,
            kind,
            request.model,
            key_id=principal.id,
            body_bytes=size,
            task_id=task_id,
            urgency=urgency,
            asked_s=asked_s,
        )
        task.prefixes = known
        return task

    try:
        await body.write(data)
        task = again(body.size, request_id(call))
        try:
            relay = pool.submit(task, body)
        except TryLater as error:
            raise APIProblem(429, error.message, retry_after_s=error.retry_after_s, hints=error.hints) from None
        try:
            await respond(Job(pool, call, task, relay, _asked(pool, call, kind, request), body, again))
        finally:
            pool.dispatcher.cancel(task, "the client left")
    finally:
        await body.close()


def _principal(pool: Pool, call: Call) -> Principal:
    """Return who pays for it. Raises NotAuthenticated, Forbidden."""
    secret = next((call.raw[name] for name in KEY_HEADERS if name in call.raw), b"").decode("latin-1").strip()
    if not secret or call.raw.get(b"authorization"):
        secret = _bearer(call)
    principal = limits.know(pool, call, pool.keyring.principal(secret))
    principal.need(SCOPE)
    return principal


def _bearer(call: Call) -> str:
    try:
        return bearer(call.raw.get(b"authorization", b"").decode("latin-1"))
    except NotAuthenticated:
        message = "an API key of this pool is needed: Authorization: Bearer rmac_…"
        raise NotAuthenticated(message, hints=("the pool's admin makes one: rma keys create --client",)) from None


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


def _prefixes(request: bodies.ChatCompletionRequest, size: int, *, salt: str) -> tuple[Prefix, ...]:
    """Return the beginnings of a conversation; of one with pictures in it none, for that would hold everyone up."""
    return prefixes(map(encode, request.messages), salt=salt) if size <= MOST_HASHED_BYTES else ()


def _asked(pool: Pool, call: Call, kind: Kind, request: Any) -> Asked:  # noqa: ANN401 - one of the records of `Kind`
    options = getattr(request, "stream_options", None)
    answer = Answer(
        id=kind.prefix + secrets.token_hex(12) if kind.prefix else "",
        created=int(pool.wall()),
        model=request.model,
        chat=kind is CHAT,
        usage=bool(options and options.include_usage),
    )
    base64 = getattr(request, "encoding_format", None) == "base64"
    return Asked(answer, stream=bool(getattr(request, "stream", None)), base64=base64, patience_s=_patience_s(call))


def _patience_s(call: Call) -> float | None:
    """Return how long the SDK waits in silence, where it says so."""
    text = call.raw.get(b"x-stainless-read-timeout", call.raw.get(b"x-stainless-timeout", b"")).decode("latin-1")
    try:
        return float(text)
    except ValueError:
        return None


# -- requests ------------------------------------------------------------------------------------------------------


def read(data: bytes, kind: Kind) -> tuple[Any, bytes]:
    """Return a request as a record, and the bytes that go to the model server. Raises ValidationProblem, APIProblem."""
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise APIProblem(400, f"a request has at most {MOST_VALUES} values, counted by commas and brackets")
    try:
        value = msgspec.json.decode(data)
    except RecursionError:
        raise ValidationProblem("request", [Problem("$", "nested too deeply")]) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValidationProblem("request", [Problem("$", f"not JSON: {error}")]) from None
    request = _convert(value, kind, size=len(data))
    stream = getattr(request, "stream", None)
    if getattr(request, "stream_options", None) is not None and not stream:
        raise APIProblem(400, "stream_options is for streams: it needs stream: true", param="stream_options")
    changed, gone = _changes(value, stream=bool(stream))
    if not changed and not gone:
        return request, data
    # What need not change stays as it was written, byte for byte.
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    kept = {name: field for name, field in fields.items() if name not in gone}
    return request, encode({**kept, **changed})


def _convert(value: object, kind: Kind, *, size: int) -> Any:  # noqa: ANN401 - one of the records of `Kind`
    if size <= MAX_EXPLAINED_BYTES:
        return convert(value, kind.takes, subject="request")
    try:
        return msgspec.convert(value, kind.takes)
    except msgspec.ValidationError as error:
        # Walking something large, to name everything that is wrong in it, would hold everyone else up.
        what, _, where = str(error).partition(" - at `")
        raise ValidationProblem("request", [Problem(where.rstrip("`") or "$", what)]) from None


def _changes(value: dict[str, Any], *, stream: bool) -> tuple[dict[str, Any], set[str]]:
    """Return the fields that model servers must see otherwise, and those that they must not see."""
    changed: dict[str, Any] = {}
    if stream:
        options = value.get("stream_options") or {}
        # What was used is counted for every request, asked for or not.
        if options.get("include_usage") is not True:
            changed["stream_options"] = {**options, "include_usage": True}
    # Several engines refuse an empty list, and SDKs send one.
    return changed, {"tools", "tool_choice"} if value.get("tools") == [] else set()


def check_model(pool: Pool, model: str) -> None:
    """Raise APIProblem for a model that nobody ever had (404), or that nobody offers now (503)."""
    try:
        pool.check_model(model)
    except NotFound as error:
        raise APIProblem(404, error.message, param="model", api_code="model_not_found", hints=error.hints) from None
    except TryLater as error:
        raise APIProblem(
            503, error.message, param="model", api_code="no_worker_available", retry_after_s=error.retry_after_s,
            hints=error.hints,
        ) from None  # fmt: skip


# -- models --------------------------------------------------------------------------------------------------------


async def models(pool: Pool, call: Call) -> None:
    """GET /v1/models: what can be asked for, and what could be lately."""
    _principal(pool, call)
    listed = [_model(pool, view) for view in pool.models().values()]
    await call.json({"object": "list", "data": listed}, headers=_about(call))


async def model(pool: Pool, call: Call) -> None:
    """GET /v1/models/{model}; a name may have slashes in it."""
    _principal(pool, call)
    name = call.parts["model"].rstrip("/")
    view = pool.models().get(name)
    if view is None:
        check_model(pool, name)
        raise APIProblem(404, f"this pool has no model {name!r}", param="model", api_code="model_not_found")
    await call.json(_model(pool, view), headers=_about(call))


def _about(call: Call) -> dict[str, str]:
    return {"x-request-id": request_id(call), **limits.headers(call)}


def _model(pool: Pool, view: ModelView) -> dict[str, Any]:
    return {
        "id": view.name,
        "object": "model",
        # Which never changes: nobody knows when a volunteer's model was made.
        "created": int(pool.record.created_at),
        "owned_by": "rma",
        "context_length": view.context or None,
        "x_rma": {"state": view.state, "workers": view.workers},
    }
