"""Every way in which a stream goes wrong, as each kind of client sees it: a plain one, and OpenAI's SDKs."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from rma_coordinator.api.v1 import answers as openai_answers
from rma_core.models import channel as frames
from tests import sdks
from tests.coordinator_fixtures import Line, Running, soon, until
from tests.needs import need
from tests.openai_kit import (
    CHAT,
    END,
    JSON,
    ROLE,
    SSE,
    attach,
    begins,
    check_error,
    delta,
    event,
    events,
    pool_with,
    taken,
    text_of,
)
from tests.sdk_failures import ASKED, TOO_LONG

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

shared = pytest_asyncio.fixture(scope="module", loop_scope="module")

BUSY = {"error": "busy"}
STOP = delta(finish="stop")
OUT_OF_MEMORY = event({"error": {"code": 500, "message": "out of memory", "type": "server_error"}})


class Seen(NamedTuple):
    """What a client has in the end: the text, the reasons of its end, and what it raised, by status and code."""

    text: str = ""
    finishes: tuple[str, ...] = ()
    status: int | None = None
    code: str | None = None


async def whole(_: Running, line: Line, *parts: bytes) -> None:
    await line.serve(*parts, headers=SSE)


def answers(*parts: bytes) -> Callable[[Running, Line], Awaitable[object]]:
    """A model server that streams this, and closes."""
    return lambda pool, line: whole(pool, line, *parts)


def refuses(status: int, body: Any, **headers: str) -> Callable[[Running, Line], Awaitable[object]]:
    """A model server that answers with a status."""
    said = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return lambda _, line: line.serve(json.dumps(body).encode(), status=status, headers=(*JSON, *said))


async def cut(pool: Running, line: Line) -> None:
    await begins(pool, line, ROLE, delta("a"), delta("b"), b'data: {"torn')
    pool.pool.unregister(pool.pool.fleet.get(line.id))


async def cut_and_continued(pool: Running, line: Line) -> None:
    async with pool.worker(slots=0) as other:
        await begins(pool, line, ROLE, delta("a"), delta("b"))
        await attach(pool, other, "tiny", slots=1)
        pool.pool.unregister(pool.pool.fleet.get(line.id))
        await other.serve(ROLE, delta("c"), STOP, END, headers=SSE)
        # The other one's answer must have gone on before its machine goes.
        await until(lambda: not pool.pool.dispatcher.tasks)


async def silent(pool: Running, line: Line) -> None:
    """Its worker's lease runs out; being the only one, it is given the rest of the answer."""
    await begins(pool, line, ROLE, delta("a"))
    pool.turn(61)
    await line.serve(delta("b"), STOP, END, headers=SSE)


async def slow(pool: Running, line: Line) -> None:
    """Nothing comes until comments have kept the client waiting for a while."""
    task = await taken(pool, line)
    (run,) = pool.pool.repeats
    await until(lambda: all(client.call.started for client in run.clients))
    await line.answer(task.stream, ROLE, delta("a"), STOP, END, headers=SSE)


async def split(_: Running, line: Line) -> None:
    """Every byte comes by itself."""
    task = await line.task()
    await line.say(frames.Head(stream=task.stream, status=200, headers=SSE))
    said = json.dumps({"choices": [{"index": 0, "delta": {"content": "h\u00e9\U0001f600"}}]}, ensure_ascii=False)
    for byte in ROLE + f"data: {said}\n\n".encode() + STOP + END:
        await line.data(task.stream, bytes([byte]))
    await line.say(frames.End(stream=task.stream, usage={}))


#: What the model server or its machine does, and what every client must have of it.
FAULTS: dict[str, tuple[Callable[[Running, Line], Awaitable[object]], Seen]] = {
    "nothing wrong": (answers(ROLE, delta("a"), STOP, END), Seen("a", ("stop",))),
    "cut after some tokens": (cut, Seen("ab", (), None, "worker_lost")),
    "cut after some tokens, and continued elsewhere": (cut_and_continued, Seen("abc", ("stop",))),
    "silence after some tokens": (silent, Seen("ab", ("stop",))),
    "a malformed event": (answers(ROLE, delta("a"), b"data: {oops\n\n", delta("b"), STOP, END), Seen("ab", ("stop",))),
    "200, then an error": (answers(event(TOO_LONG), END), Seen(status=400, code="context_length_exceeded")),
    "an error after some tokens": (answers(delta("a"), OUT_OF_MEMORY, END), Seen("a", (), None, "worker_failed")),
    "429 with a time to wait": (refuses(429, BUSY, retry_after="7"), Seen(status=429, code="rate_limit_exceeded")),
    "429 without": (refuses(429, BUSY), Seen(status=429, code="rate_limit_exceeded")),
    "a slow first byte": (slow, Seen("a", ("stop",))),
    "an end without its mark": (answers(ROLE, delta("a"), STOP), Seen("a", ("stop",))),
    "no end at all": (answers(ROLE, delta("a")), Seen("a", (), None, "worker_failed")),
    "two ends": (answers(delta("a"), STOP, delta("b"), STOP, END, END), Seen("a", ("stop",))),
    "characters in pieces": (split, Seen("h\u00e9\U0001f600", ("stop",))),
}  # fmt: skip
faults = pytest.mark.parametrize("name", FAULTS)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A silent stream is kept alive at once where it has to be silent."""
    if "slow" in request.node.callspec.params["name"]:
        monkeypatch.setattr(openai_answers, "SILENCE_S", 0.05)


@faults
async def test_a_plain_client(tmp_path: Path, name: str) -> None:
    fault, seen = FAULTS[name]
    async with pool_with(tmp_path) as (pool, line):
        asked = asyncio.create_task(pool.client.post(CHAT, content=json.dumps({**ASKED, "stream": True})))
        await soon(fault(pool, line))
        answer = await soon(asked)
    if seen.status is not None:
        check_error(answer, seen.status, seen.code)
        if seen.status == 429:
            assert answer.headers["retry-after"] == ("7" if "time to wait" in name else "5")
        return
    found = events(answer.text)
    last = found[-1]
    assert (last == "[DONE]") == (seen.code is None), "an end mark stands behind a whole answer alone"
    if seen.code is not None:
        assert (last["error"]["code"], last["choices"][0]["finish_reason"]) == (seen.code, "error")
        found.pop()
    if "slow" in name:
        assert answer.text.startswith(": rma\n")
    finishes = [c["finish_reason"] for e in found if e != "[DONE]" for c in e["choices"] if c["finish_reason"]]
    assert (text_of(found), tuple(finishes)) == (seen.text, seen.finishes)


@faults
async def test_the_python_sdk(tmp_path: Path, name: str) -> None:
    fault, seen = FAULTS[name]
    text, finishes, error = "", list[str](), None

    async def read(client: AsyncOpenAI) -> None:
        nonlocal text
        async for chunk in await client.chat.completions.create(**ASKED, stream=True):
            text += chunk.choices[0].delta.content or ""
            finishes.extend(filter(None, [chunk.choices[0].finish_reason]))

    async with (
        pool_with(tmp_path) as (pool, line),
        AsyncOpenAI(base_url=f"{pool.url}/v1", api_key=pool.key, max_retries=0) as client,
    ):
        reading = asyncio.create_task(read(client))
        await soon(fault(pool, line))
        try:
            await soon(reading)
        except openai.APIError as raised:
            error = raised
    assert Seen(text, tuple(finishes), getattr(error, "status_code", None), error.code if error else None) == seen
    if seen.status is None and seen.code is not None:
        assert type(error) is openai.APIError


@shared
async def node() -> AsyncIterator[sdks.Driver]:
    need("node")
    made = await asyncio.to_thread(sdks.node)
    async with sdks.node_driver(made) as driver:
        yield driver


@faults
async def test_the_node_sdk(node: sdks.Driver, tmp_path: Path, name: str) -> None:
    fault, seen = FAULTS[name]
    async with pool_with(tmp_path) as (pool, line):
        _, coming = node.begin("stream", client={"baseURL": f"{pool.url}/v1", "apiKey": pool.key}, params=ASKED)
        await soon(fault(pool, line))
        reply = await soon(coming)
    choices = [chunk["choices"][0] for chunk in reply.chunks]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    finishes = tuple(choice["finish_reason"] for choice in choices if choice["finish_reason"])
    error = reply.error
    assert Seen(text, finishes, error and error.status, error and error.code) == seen
    if seen.status is None and seen.code is not None:
        assert error is not None
        assert error.kinds[0] == "APIError"
