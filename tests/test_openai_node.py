"""OpenAI's own SDK for Node, unmodified, against a coordinator whose workers share real llama.cpp servers."""

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

# What is shared here lives as long as the file: a Node, four model servers, two agents.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

shared = pytest_asyncio.fixture(scope="module", loop_scope="module")


@shared
async def node() -> AsyncIterator[sdks.Driver]:
    """A process with the SDK."""
    need("node")
    made = await asyncio.to_thread(sdks.node)
    async with sdks.node_driver(made) as driver:
        yield driver


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    need("node")
    need("llama")
    with all_servers(tmp_path_factory.mktemp("llama")) as found:
        yield found


@shared
async def pool(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with llama_pool(tmp_path_factory.mktemp("pool"), servers.machines()) as found:
        yield found


def of(pool: Running, key: str = "", **more: Any) -> dict[str, Any]:
    """Return what the SDK is told of a pool."""
    return {"baseURL": f"{pool.url}/v1", "apiKey": key or pool.key, **more}


async def value(node: sdks.Driver, do: str, pool: Running, params: Any = None) -> Any:
    reply = await node.ask(do, client=of(pool), params=params or {})
    assert reply.error is None, reply.error
    return reply.value if reply.value is not None else reply.chunks


async def test_a_chat_whole_and_streamed_gives_the_same_text(node: sdks.Driver, pool: Running) -> None:
    reply = await node.ask("chat", client=of(pool), params=CHAT)
    whole = reply.value
    assert (whole["model"], whole["object"], whole["usage"]["completion_tokens"]) == ("tiny", "chat.completion", 12)
    assert (reply.request_id or "").startswith("task-")
    chunks = await value(node, "stream", pool, CHAT)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(one.get("content") or "" for one in deltas) == whole["choices"][0]["message"]["content"]
    assert [one["role"] for one in deltas if "role" in one] == ["assistant"]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert chunks[-1]["x_rma"]["attempts"] == 1


async def test_the_sdks_own_helper_reads_a_stream_to_its_end(node: sdks.Driver, pool: Running) -> None:
    """It raises where a choice has no finish_reason."""
    final = await value(node, "helper", pool, {**CHAT, "stream_options": {"include_usage": True}})
    assert final["choices"][0]["message"]["role"] == "assistant"
    assert (final["choices"][0]["finish_reason"], final["usage"]["completion_tokens"]) == ("length", 12)


async def test_a_tool_is_called_whole_and_in_pieces(node: sdks.Driver, pool: Running) -> None:
    whole = await value(node, "chat", pool, CALLING)
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"], bool(call["id"])) == ("function", "add", True)
    check_form(call["function"]["arguments"])
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    chunks = await value(node, "stream", pool, CALLING)
    pieces = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert len(pieces) > 5
    assert [piece["id"] for piece in pieces if "id" in piece] == [pieces[0]["id"]]
    check_form("".join(piece["function"]["arguments"] for piece in pieces))
    glued = await value(node, "helper", pool, CALLING)
    (call,) = glued["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    check_form(call["function"]["arguments"])


async def test_structured_output_has_its_form(node: sdks.Driver, pool: Running) -> None:
    check_form((await value(node, "chat", pool, FORMED))["choices"][0]["message"]["content"])
    parsed = (await value(node, "parse", pool, FORMED))["choices"][0]["message"]["parsed"]
    check_form(json.dumps(parsed))
    chunks = await value(node, "stream", pool, FORMED)
    check_form("".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks))


async def test_completions_embeddings_and_the_list_of_models(node: sdks.Driver, pool: Running) -> None:
    done = await value(node, "complete", pool, {"model": "tiny", "prompt": "ab", "max_tokens": 6, "temperature": 0})
    assert (done["object"], done["choices"][0]["finish_reason"]) == ("text_completion", "length")
    given = {"model": "vectors", "input": ["Hello", "there"]}
    packed = (await value(node, "embed", pool, given))["data"]
    plain = (await value(node, "embed", pool, {**given, "encoding_format": "float"}))["data"]
    assert [len(one["embedding"]) for one in packed] == [32, 32]
    for one, other in zip(packed, plain, strict=True):
        assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-6)
    assert [model["id"] for model in await value(node, "models", pool)] == ["tiny", "tools", "vectors"]
    one = await value(node, "model", pool, {"model": "tools"})
    assert (one["owned_by"], one["status"], one["capabilities"]) == ("rma", "loaded", ["completion", "tools"])
    assert (await value(node, "model", pool, {"model": "vectors"}))["capabilities"] == ["embedding"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_model_server_stops_computing_when_the_client_leaves(
    node: sdks.Driver, pool: Running, servers: Servers, streamed: bool
) -> None:
    async def begin() -> Any:
        params = {"model": "tiny", "messages": HELLO, "max_tokens": ENDLESS}
        number, coming = node.begin("stream" if streamed else "chat", client=of(pool), params=params)

        async def leave() -> None:
            node.leave(number)
            error = (await soon(coming)).error
            # A stream that its reader aborts just ends.
            assert streamed or (error is not None and "APIUserAbortError" in error.kinds)

        return leave

    await check_freed(servers, begin)


async def test_leaving_the_loop_over_a_stream_leaves_the_stream(
    node: sdks.Driver, pool: Running, servers: Servers
) -> None:
    params = {"model": "tiny", "messages": HELLO, "max_tokens": ENDLESS}
    reply = await node.ask("stream", client=of(pool), params=params, stop_after=3)
    assert (reply.error, len(reply.chunks)) == (None, 3)
    await until(lambda: not pool.pool.dispatcher.tasks)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_every_failure_is_the_sdks_right_class(
    node: sdks.Driver, tmp_path: Path, case: Case, streamed: bool
) -> None:
    async with pool_with(tmp_path, **POOL) as (pool, line), case.prepare(pool, line) as how:
        options = {"headers": how.get("headers", {})}
        params = {**ASKED, **case.fields}
        reply = await node.ask(
            "stream" if streamed else "chat", client=of(pool, how["key"]), params=params, options=options
        )
        error = reply.error
        assert error is not None
        assert error.kinds[0] == case.node
        assert (error.status, error.code, error.param) == (case.status, case.code, case.param)
        assert (error.request_id or "").startswith("task-")


async def test_a_cut_stream_raises_and_does_not_look_whole(node: sdks.Driver, tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        _, coming = node.begin("stream", client=of(pool), params=ASKED)
        await line.serve(delta("a"), b'data: {"choi', END, headers=SSE)
        reply = await soon(coming)
        assert reply.error is not None
        assert (reply.error.kinds[0], reply.error.code) == ("APIError", "worker_failed")
        assert [chunk["choices"][0]["delta"].get("content") for chunk in reply.chunks] == ["", "a"]


async def test_a_request_that_the_sdk_repeats_after_its_timeout_runs_once(node: sdks.Driver, tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        # Which it tells; what the client as a whole was made with it does not.
        options = {"timeout": 2000}
        _, coming = node.begin("chat", client=of(pool, maxRetries=2), params=ASKED, options=options)
        task = await line.task()
        (run,) = pool.pool.repeats
        await until(lambda: not run.clients)
        await until(lambda: run.clients)
        await line.answer(task.stream, json.dumps(REPLY).encode(), headers=JSON)
        reply = await soon(coming)
        assert reply.error is None
        assert reply.value["choices"][0]["message"]["content"] == "hi"
        assert reply.request_id == task.offer.task_id
        assert [one.state for one in pool.pool.dispatcher.all()] == ["succeeded"]
