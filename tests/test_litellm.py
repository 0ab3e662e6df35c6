"""LiteLLM as a client, in an environment of its own, against a pool whose workers share real llama.cpp servers."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests import sdks
from tests.coordinator_fixtures import Running, soon, until
from tests.llama_pool import (
    CALLING,
    CHAT,
    ENDLESS,
    FORMED,
    HELLO,
    Servers,
    all_servers,
    check_form,
    check_freed,
    llama_pool,
)
from tests.needs import need
from tests.openai_kit import END, JSON, REPLY, SSE, delta, pool_with
from tests.sdk_failures import ASKED, CASES, POOL, Case

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

# What is shared here lives as long as the file: LiteLLM, four model servers, two agents.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

shared = pytest_asyncio.fixture(scope="module", loop_scope="module")


@shared
async def lite() -> AsyncIterator[sdks.Driver]:
    """A process with LiteLLM."""
    need("litellm")
    python = await asyncio.to_thread(sdks.litellm)
    async with sdks.litellm_driver(python) as driver:
        yield driver


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    need("litellm")
    need("llama")
    with all_servers(tmp_path_factory.mktemp("llama")) as found:
        yield found


@shared
async def pool(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with llama_pool(tmp_path_factory.mktemp("pool"), servers.machines()) as found:
        yield found


def of(pool: Running, params: Any, key: str = "", **more: Any) -> dict[str, Any]:
    """Return a request as LiteLLM takes it: the pool is one of its OpenAI-compatible providers."""
    where = {"api_base": f"{pool.url}/v1", "api_key": key or pool.key, "max_retries": 0}
    return {**params, "model": f"openai/{params['model']}", **where, **more}


async def value(lite: sdks.Driver, do: str, params: Any) -> Any:
    reply = await lite.ask(do, params=params)
    assert reply.error is None, reply.error
    return reply.value if reply.value is not None else reply.chunks


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


async def test_a_chat_whole_and_streamed_gives_the_same_text(lite: sdks.Driver, pool: Running) -> None:
    whole = await value(lite, "chat", of(pool, CHAT))
    assert (whole["model"], whole["usage"]["completion_tokens"]) == ("tiny", 12)
    assert whole["choices"][0]["finish_reason"] == "length"
    chunks = await value(lite, "stream", of(pool, CHAT))
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_a_tool_is_called_whole_and_in_pieces(lite: sdks.Driver, pool: Running) -> None:
    whole = await value(lite, "chat", of(pool, CALLING))
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "add")
    check_form(call["function"]["arguments"])
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    chunks = await value(lite, "stream", of(pool, CALLING))
    pieces = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls") or ()]
    assert len(pieces) > 5
    check_form("".join(piece["function"]["arguments"] or "" for piece in pieces))


async def test_structured_output_has_its_form(lite: sdks.Driver, pool: Running) -> None:
    check_form((await value(lite, "chat", of(pool, FORMED)))["choices"][0]["message"]["content"])
    check_form(text_of(await value(lite, "stream", of(pool, FORMED))))


async def test_embeddings_and_the_list_of_models(lite: sdks.Driver, pool: Running) -> None:
    found = await value(lite, "embed", of(pool, {"model": "vectors", "input": ["Hello", "there"]}))
    assert [len(one["embedding"]) for one in found["data"]] == [32, 32]
    assert all(isinstance(number, float) for one in found["data"] for number in one["embedding"])
    where = {"custom_llm_provider": "openai", "api_key": pool.key, "api_base": f"{pool.url}/v1"}
    assert sorted(name.removeprefix("openai/") for name in await value(lite, "models", where)) == [
        "tiny",
        "tools",
        "vectors",
    ]


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_model_server_stops_computing_when_the_client_leaves(
    lite: sdks.Driver, pool: Running, servers: Servers, streamed: bool
) -> None:
    async def begin() -> Any:
        params = of(pool, {"model": "tiny", "messages": HELLO, "max_tokens": ENDLESS})
        number, coming = lite.begin("stream" if streamed else "chat", params=params)

        async def leave() -> None:
            lite.leave(number)
            error = (await soon(coming)).error
            assert error is not None
            assert error.kinds == ["CancelledError"]

        return leave

    await check_freed(servers, begin)


async def test_a_stream_that_its_reader_closes_is_left(lite: sdks.Driver, pool: Running) -> None:
    params = of(pool, {"model": "tiny", "messages": HELLO, "max_tokens": ENDLESS})
    reply = await lite.ask("stream", params=params, stop_after=3)
    assert (reply.error, len(reply.chunks)) == (None, 3)
    await until(lambda: not pool.pool.dispatcher.tasks)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_every_failure_is_litellms_right_class(
    lite: sdks.Driver, tmp_path: Path, case: Case, streamed: bool
) -> None:
    async with pool_with(tmp_path, **POOL) as (pool, line), case.prepare(pool, line) as how:
        params = of(pool, {**ASKED, **case.fields}, how["key"], extra_headers=how.get("headers", {}))
        error = (await lite.ask("stream" if streamed else "chat", params=params)).error
        assert error is not None
        assert (error.kinds[0], error.status) == (case.litellm, case.status)


async def test_a_cut_stream_raises_and_does_not_look_whole(lite: sdks.Driver, tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        _, coming = lite.begin("stream", params=of(pool, ASKED))
        await line.serve(delta("a"), b'data: {"choi', END, headers=SSE)
        reply = await soon(coming)
        assert text_of(reply.chunks) == "a"
        assert reply.error is not None
        assert "finish_reason" in reply.error.message


async def test_a_request_that_is_repeated_after_its_timeout_runs_once(lite: sdks.Driver, tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        _, coming = lite.begin("chat", params=of(pool, ASKED, max_retries=2, timeout=2))
        task = await line.task()
        (run,) = pool.pool.repeats
        await until(lambda: not run.clients)
        await until(lambda: run.clients)
        await line.answer(task.stream, json.dumps(REPLY).encode(), headers=JSON)
        reply = await soon(coming)
        assert reply.error is None
        assert reply.value["choices"][0]["message"]["content"] == "hi"
        assert [one.state for one in pool.pool.dispatcher.all()] == ["succeeded"]
