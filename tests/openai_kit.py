"""What tests of /v1 share: a pool with a stand-in for a model server, its events, and how answers are looked at."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

from rma_core.models import channel as frames
from rma_core.models.worker import ATTACHED, ContainerStatus, Heartbeat, ModelStatus
from tests.coordinator_fixtures import Line, Running, running, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from httpx2 import Response

CHAT = "/v1/chat/completions"
SSE = (("content-type", "text/event-stream"),)
JSON = (("content-type", "application/json"),)
HELLO = [{"role": "user", "content": "hello"}]
REPLY = {
    "id": "1", "object": "chat.completion", "created": 5, "model": "/models/tiny.gguf",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}, "timings": {"x": 1.5},
}  # fmt: skip


@contextlib.asynccontextmanager
async def pool_with(tmp_path: Path, *models: str, slots: int = 2, **more: Any) -> AsyncIterator[tuple[Running, Line]]:
    """A pool with one worker whose owner has attached models."""
    async with running(tmp_path, **more) as pool:
        machine = await pool.enrol()
        async with machine.channel({"llm": slots}) as line:
            await attach(pool, line, *(models or ("tiny",)), slots=slots)
            yield pool, line


async def attach(pool: Running, line: Line, *models: str, slots: int = 2, state: Any = "loaded") -> None:
    """A worker says that it has models."""
    can = ("completion", "tools")
    known = tuple(ModelStatus(name=name, state=state, context=2048, capabilities=can) for name in models)
    container = ContainerStatus(
        name="attached", service="llm", state="healthy", runtime=ATTACHED, slots=slots, models=known
    )
    await line.say(frames.Beat(beat=Heartbeat(worker_id=line.id, containers=(container,)), slots={"llm": slots}))
    await until(lambda: pool.pool.dispatcher.seats[line.id].models.get("llm") == frozenset(models))


def ask(
    pool: Running, body: Any = None, path: str = CHAT, headers: dict[str, str] | None = None, **fields: Any
) -> asyncio.Task[Response]:
    """Send a request, and let it be answered meanwhile."""
    content = body if isinstance(body, bytes) else json.dumps(body or {"model": "tiny", "messages": HELLO, **fields})
    return asyncio.create_task(pool.client.post(path, content=content, headers=headers))


def stream(pool: Running, **fields: Any) -> asyncio.Task[Response]:
    return ask(pool, stream=True, **fields)


def sdk(tries: int = 0, patience_s: float | None = 20.0) -> dict[str, str]:
    """Headers as OpenAI's SDK for Python sends them."""
    patience = {} if patience_s is None else {"x-stainless-read-timeout": str(patience_s)}
    agent = {"user-agent": "AsyncOpenAI/Python 3.54.0"}
    return {**agent, "x-stainless-retry-count": str(tries), **patience}


def states(pool: Running) -> list[str]:
    """Return how the newest attempt of each task stands."""
    return [task.attempt.state if task.attempt else "queued" for task in pool.pool.dispatcher.tasks.values()]


def check_error(answer: Response, status: int, code: str | None, *, param: str | None = None) -> str:
    """Assert that an answer is OpenAI's error object, and return its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert re.fullmatch("task-[0-9a-z]{20}", answer.headers["x-request-id"])
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert isinstance(error["type"], str)
    if status in (429, 503):
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    return str(error["message"])


def check_cut(answer: Response, reason: str, code: str = "worker_failed") -> list[Any]:
    """Assert that a stream ends as one that is not whole, and return what came before."""
    found = events(answer.text)
    last = found.pop()
    assert "[DONE]" not in answer.text
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "error"}]
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert (last["error"]["code"], last["error"]["type"]) == (code, "server_error")
    assert reason in last["error"]["message"]
    assert last["id"] == found[0]["id"]
    return found


def delta(content: Any = None, *, finish: str | None = None, **more: Any) -> bytes:
    """One event of an engine, with an id and a model of its own."""
    choice = {"index": 0, "delta": {"content": content, **more}, "finish_reason": finish}
    return event({"id": "1", "object": "x", "created": 1, "model": "other", "choices": [choice]})


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


ROLE = delta("", role="assistant")
USAGE = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}})
END = b"data: [DONE]\n\n"


def events(text: str) -> list[Any]:
    """Return the events of a stream, read as strictly as the strictest SDK; the end marker is a string."""
    blocks = [block for block in re.sub(r"(?m)^: rma.*\n", "", text).split("\n\n") if block]
    assert text.endswith("\n\n"), "no event is torn"
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


def text_of(found: list[Any]) -> str:
    return "".join(c["delta"].get("content") or "" for e in found if e != "[DONE]" for c in e["choices"])


async def taken(pool: Running, line: Line) -> frames.Task:
    """Take the next task, and wait until the coordinator knows it."""
    task = await line.task()
    await until(lambda: pool.pool.dispatcher.find(task.offer.task_id).state == "running")
    (attempt,) = [one for one in pool.pool.dispatcher.find(task.offer.task_id).attempts if one.worker_id == line.id]
    await until(lambda: attempt.state == "running")
    return task


async def begins(pool: Running, line: Line, *pieces: bytes) -> frames.Task:
    """Begin to answer, and wait until the client has some of it."""
    task = await line.task()
    await line.say(frames.Head(stream=task.stream, status=200, headers=SSE))
    for piece in pieces:
        await line.data(task.stream, piece)
    await until(lambda: pool.pool.dispatcher.tasks[task.offer.task_id].committed)
    return task


async def holder(pool: Running) -> str:
    """Return the worker that is given the one request there is."""
    tasks = await until(lambda: [task for task in pool.pool.dispatcher.tasks.values() if task.attempt])
    return str(tasks[0].attempt.worker_id)


def line_stream(pool: Running, line: Line) -> int:
    """Return the number of the one stream on a worker's channel."""
    (number,) = pool.pool.hub.sinks[line.id].streams  # type: ignore[attr-defined]  # it is a channel
    return int(number)
