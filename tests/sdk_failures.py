"""Everything that can fail under /v1, each way to bring it about once, and which exception which client makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from rma_core.models import channel as frames
from tests.coordinator_fixtures import Line, Running, until
from tests.openai_kit import CHAT, HELLO, JSON, ask, taken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    #: What is done around the request: gives the client's key and further headers.
    Prepare = Callable[[Running, Line], AbstractAsyncContextManager[dict[str, Any]]]


class Case(NamedTuple):
    """One failure: how it comes about, what of it the client carries, and what each client calls it.

    LiteLLM knows no class for some statuses of an OpenAI-compatible provider, and takes a more general one.
    """

    name: str
    prepare: Prepare
    status: int
    code: str | None
    python: str
    node: str
    litellm: str
    param: str | None = None
    fields: Mapping[str, Any] = MappingProxyType({})


def client(key: str = "", **more: Any) -> dict[str, Any]:
    return {"key": key, **more}


@contextlib.asynccontextmanager
async def nothing(_: Running, __: Line) -> AsyncIterator[dict[str, Any]]:
    yield client()


@contextlib.asynccontextmanager
async def no_key(_: Running, __: Line) -> AsyncIterator[dict[str, Any]]:
    yield client("sk-123")


@contextlib.asynccontextmanager
async def other_scope(pool: Running, _: Line) -> AsyncIterator[dict[str, Any]]:
    yield client(await pool.make_key("infer:notes"))


@contextlib.asynccontextmanager
async def small_bodies(pool: Running, _: Line) -> AsyncIterator[dict[str, Any]]:
    pool.pool.settings = pool.pool.settings.__class__(max_body_bytes=1024)
    yield client()


@contextlib.asynccontextmanager
async def name_taken(pool: Running, line: Line) -> AsyncIterator[dict[str, Any]]:
    key = await pool.make_key("infer:llm")
    first = ask(pool, model="tiny", headers={**pool.bearer(key), "idempotency-key": "n"})
    await line.task()
    yield client(key, headers={"Idempotency-Key": "n"})
    await leave(first)


@contextlib.asynccontextmanager
async def full(pool: Running, _: Line) -> AsyncIterator[dict[str, Any]]:
    waiting = [ask(pool), ask(pool)]
    await until(lambda: len(pool.pool.dispatcher.tasks) == 2)
    yield client()
    await leave(*waiting)


async def leave(*asked: asyncio.Task[Any]) -> None:
    for one in asked:
        one.cancel()
    await asyncio.wait(asked)


@contextlib.asynccontextmanager
async def away(pool: Running, line: Line) -> AsyncIterator[dict[str, Any]]:
    pool.pool.unregister(pool.pool.fleet.get(line.id))
    yield client()


def answered(status: int, body: Any) -> Prepare:
    """The model server refuses."""

    @contextlib.asynccontextmanager
    async def prepare(_: Running, line: Line) -> AsyncIterator[dict[str, Any]]:
        serving = asyncio.create_task(line.serve(json.dumps(body).encode(), status=status, headers=JSON))
        yield client()
        await serving

    return prepare


@contextlib.asynccontextmanager
async def lost(_: Running, line: Line) -> AsyncIterator[dict[str, Any]]:
    async def fail() -> None:
        task = await line.task()
        await line.say(frames.Error(stream=task.stream, fault="worker", reason="the model server crashed"))

    failing = asyncio.create_task(fail())
    yield client()
    await failing


@contextlib.asynccontextmanager
async def late(pool: Running, line: Line) -> AsyncIterator[dict[str, Any]]:
    async def wait() -> None:
        await taken(pool, line)
        pool.turn(31)

    waiting = asyncio.create_task(wait())
    yield client()
    await waiting


#: As llama.cpp says it.
TOO_LONG = {
    "error": {
        "code": 400,
        "message": "request (5024 tokens) exceeds the available context size (2048 tokens), try increasing it",
        "type": "exceed_context_size_error",
    }
}

CASES = (
    Case("no key", no_key, 401, "invalid_api_key", "AuthenticationError", "AuthenticationError", "AuthenticationError"),
    Case(
        "a key for something else", other_scope, 403, "permission_denied",
        "PermissionDeniedError", "PermissionDeniedError", "APIError",
    ),
    Case(
        "no such model", nothing, 404, "model_not_found", "NotFoundError", "NotFoundError", "NotFoundError",
        param="model", fields={"model": "gone"},
    ),
    Case(
        "a wrong request", nothing, 400, None, "BadRequestError", "BadRequestError", "BadRequestError",
        param="n", fields={"n": 2},
    ),
    Case(
        "too long for the model", answered(400, TOO_LONG), 400, "context_length_exceeded",
        "BadRequestError", "BadRequestError", "ContextWindowExceededError",
    ),
    Case(
        "too large", small_bodies, 413, "request_too_large", "APIStatusError", "APIError", "APIError",
        fields={"messages": [{"role": "user", "content": "x" * 5000}]},
    ),
    Case(
        "a name that is taken", name_taken, 422, "idempotency_key_reused",
        "UnprocessableEntityError", "UnprocessableEntityError", "BadRequestError", fields={"max_tokens": 7},
    ),
    Case("a full queue", full, 429, "rate_limit_exceeded", "RateLimitError", "RateLimitError", "RateLimitError"),
    Case("lost", lost, 502, "worker_failed", "InternalServerError", "InternalServerError", "BadGatewayError"),
    Case(
        "nobody there", away, 503, "no_worker_available",
        "InternalServerError", "InternalServerError", "ServiceUnavailableError", param="model",
    ),
    Case("too late", late, 504, "deadline_exceeded", "InternalServerError", "InternalServerError", "Timeout"),
)  # fmt: skip
#: How a pool must be for all of these to come about.
POOL: dict[str, Any] = {"slots": 1, "max_queued_tasks": 1, "task_timeout_s": 30.0}
#: What is asked for unless the case says otherwise.
ASKED: dict[str, Any] = {"model": "tiny", "messages": HELLO}
#: Where a pool speaks OpenAI's API.
BASE = CHAT.removesuffix("/chat/completions")
