"""OpenAI's own Python SDK, unmodified, against a coordinator whose workers share real llama.cpp servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, Literal

import openai
import pydantic
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from rma_core.models import channel as frames
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
from tests.openai_kit import END, JSON, REPLY, ROLE, SSE, USAGE, delta, pool_with, states
from tests.sdk_failures import ASKED, CASES, POOL, Case

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from openai.types.chat import ChatCompletionChunk

# What is shared here lives as long as the file: four model servers, two agents, a client.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

shared = pytest_asyncio.fixture(scope="module", loop_scope="module")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    need("llama")
    with all_servers(tmp_path_factory.mktemp("llama")) as found:
        yield found


@shared
async def client(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncOpenAI]:
    """A client of a pool of two real agents with real model servers."""
    async with llama_pool(tmp_path_factory.mktemp("pool"), servers.machines()) as pool, client_of(pool) as found:
        yield found


@contextlib.asynccontextmanager
async def client_of(pool: Running, **more: Any) -> AsyncIterator[AsyncOpenAI]:
    """The SDK as anyone uses it, but for its retries."""
    key = more.pop("api_key", None) or await pool.make_key("infer:llm")
    async with AsyncOpenAI(
        base_url=f"{pool.url}/v1", api_key=key, max_retries=more.pop("max_retries", 0), **more
    ) as it:
        yield it


async def test_a_chat_whole_and_streamed_gives_the_same_text(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(**CHAT)
    assert (whole.model, whole.object, whole.choices[0].finish_reason) == ("tiny", "chat.completion", "length")
    assert whole.usage.completion_tokens == 12
    assert whole._request_id.startswith("task-")
    text, ids, finishes = "", set(), []
    async for chunk in await client.chat.completions.create(**CHAT, stream=True):
        assert chunk.usage is None
        ids.add((chunk.id, chunk.created, chunk.model))
        text += chunk.choices[0].delta.content or ""
        finishes.append(chunk.choices[0].finish_reason)
    assert text == whole.choices[0].message.content
    assert len(ids) == 1
    assert finishes.count("length") == 1
    assert finishes[-1] == "length"


async def test_the_sdks_own_helper_reads_a_stream_to_its_end(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(**CHAT, stream_options={"include_usage": True}) as stream:
        async for _ in stream:
            pass
        final = stream.current_completion_snapshot
    assert final.choices[0].message.role == "assistant", "said once, for the helper glues"
    assert final.choices[0].finish_reason == "length"
    assert final.usage is not None
    assert final.usage.completion_tokens == 12
    assert final.usage.prompt_tokens > 0


async def test_a_tool_is_called_whole_and_in_pieces(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(**CALLING)
    (call,) = whole.choices[0].message.tool_calls
    assert (call.type, call.function.name, bool(call.id)) == ("function", "add", True)
    check_form(call.function.arguments)
    assert whole.choices[0].finish_reason == "tool_calls"
    pieces: list[Any] = []
    async for chunk in await client.chat.completions.create(**CALLING, stream=True):
        pieces += chunk.choices[0].delta.tool_calls or ()
    assert len(pieces) > 5
    assert [piece.id for piece in pieces if piece.id] == [pieces[0].id]
    check_form("".join(piece.function.arguments for piece in pieces))
    async with client.chat.completions.stream(**CALLING) as stream:
        final = await stream.get_final_completion()
    calls: list[Any] = list(final.choices[0].message.tool_calls or ())
    (glued,) = calls
    assert glued.function.name == "add"
    check_form(glued.function.arguments)


class Form(pydantic.BaseModel):
    """What `FORMED` prescribes."""

    a: Literal["x", "y"]
    b: bool


async def test_structured_output_has_its_form(client: AsyncOpenAI) -> None:
    check_form((await client.chat.completions.create(**FORMED)).choices[0].message.content)
    text = ""
    async for chunk in await client.chat.completions.create(**FORMED, stream=True):
        text += chunk.choices[0].delta.content or ""
    check_form(text)
    parsed = await client.chat.completions.parse(**{**FORMED, "response_format": Form})
    assert isinstance(parsed.choices[0].message.parsed, Form)


async def test_completions_embeddings_and_the_list_of_models(client: AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "ab", "max_tokens": 6, "temperature": 0}
    done = await client.completions.create(**asked)
    assert (done.object, done.model, done.choices[0].finish_reason) == ("text_completion", "tiny", "length")
    text = ""
    async for part in await client.completions.create(**asked, stream=True):
        text += part.choices[0].text
    assert text == done.choices[0].text
    packed = await client.embeddings.create(model="vectors", input=["Hello", "there"])
    plain = await client.embeddings.create(model="vectors", input=["Hello", "there"], encoding_format="float")
    assert [len(one.embedding) for one in packed.data] == [32, 32]
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0
    assert [model.id async for model in client.models.list()] == ["tiny", "tools", "vectors"]
    tools = await client.models.retrieve("tools")
    assert (tools.owned_by, tools.model_extra and tools.model_extra["capabilities"]) == ("rma", ["completion", "tools"])


async def test_the_engines_own_refusals_are_bad_requests(client: AsyncOpenAI) -> None:
    long = [{"role": "user", "content": "x" * 5000}]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**{**CHAT, "messages": long}, stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(**{**CHAT, "temperature": "hot"})


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_model_server_stops_computing_when_the_client_leaves(
    client: AsyncOpenAI, servers: Servers, streamed: bool
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": ENDLESS}

    async def begin() -> Any:
        if streamed:
            return (await client.chat.completions.create(**asked, stream=True)).close
        coming = asyncio.create_task(client.chat.completions.create(**asked))

        async def leave() -> None:
            coming.cancel()

        return leave

    await check_freed(servers, begin)


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_every_failure_is_the_sdks_right_class(tmp_path: Path, case: Case, streamed: bool) -> None:
    async with pool_with(tmp_path, **POOL) as (pool, line), case.prepare(pool, line) as how:
        async with client_of(pool, api_key=how["key"] or pool.key, default_headers=how.get("headers")) as it:
            with pytest.raises(openai.APIStatusError) as caught:
                await soon(it.chat.completions.create(**{**ASKED, **case.fields}, stream=streamed))
        error = caught.value
        assert type(error) is getattr(openai, case.python)
        assert (error.status_code, error.code, error.param) == (case.status, case.code, case.param)
        assert (error.request_id or "").startswith("task-")


async def _read_into(stream: openai.AsyncStream[ChatCompletionChunk], texts: list[str]) -> None:
    async for chunk in stream:
        texts += [choice.delta.content or "" for choice in chunk.choices]


async def test_a_cut_stream_raises_and_does_not_look_whole(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line), client_of(pool) as it:
        asked = asyncio.create_task(it.chat.completions.create(**ASKED, stream=True))
        task = await line.task()
        await line.say(frames.Head(stream=task.stream, status=200, headers=SSE))
        await line.data(task.stream, delta("a") + b'data: {"choi')
        stream = await soon(asked)
        pool.pool.unregister(pool.pool.fleet.get(line.id))
        texts: list[str] = []
        with pytest.raises(openai.APIError, match="broke off"):
            await _read_into(stream, texts)
        assert "".join(texts) == "a"


async def test_the_sdk_does_not_try_again_where_that_cannot_help(tmp_path: Path) -> None:
    async with pool_with(tmp_path, task_timeout_s=30.0) as (pool, line), client_of(pool, max_retries=2) as it:
        asked = asyncio.create_task(it.chat.completions.create(**ASKED))
        await line.task()
        await until(lambda: states(pool) == ["running"])
        pool.turn(31)
        with pytest.raises(openai.InternalServerError) as caught:
            await soon(asked)
        assert caught.value.status_code == 504
        assert not pool.pool.dispatcher.tasks


async def test_a_stream_that_its_client_closes_is_cancelled(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line), client_of(pool) as it:
        asked = asyncio.create_task(it.chat.completions.create(**ASKED, stream=True))
        task = await line.task()
        await line.say(frames.Head(stream=task.stream, status=200, headers=SSE))
        await line.data(task.stream, delta("a") + USAGE)
        stream = await soon(asked)
        await stream.close()
        assert (await line.frame(frames.Cancel)).stream == task.stream


# -- repetitions ---------------------------------------------------------------------------------------------------


async def test_a_request_that_the_sdk_repeats_after_its_timeout_runs_once(tmp_path: Path) -> None:
    """The SDK gives up, asks again by itself, and gets what its first request was for."""
    async with pool_with(tmp_path) as (pool, line), client_of(pool, max_retries=2, timeout=2) as it:
        asked = asyncio.create_task(it.chat.completions.create(**ASKED))
        task = await line.task()
        (run,) = pool.pool.repeats
        for _ in range(2):
            await until(lambda: not run.clients)
            await until(lambda: run.clients)
        await line.answer(task.stream, json.dumps(REPLY).encode(), headers=JSON)
        answer = await soon(asked)
        assert answer.choices[0].message.content == "hi"
        assert answer._request_id == task.offer.task_id
        assert [one.state for one in pool.pool.dispatcher.all()] == ["succeeded"]


async def test_a_stream_that_falls_silent_although_it_is_kept_alive_is_not_repeated(tmp_path: Path) -> None:
    """Comments come within a third of what the SDK waits, so it never gives up."""
    async with pool_with(tmp_path) as (pool, line), client_of(pool, max_retries=2, timeout=3) as it:
        asked = asyncio.create_task(it.chat.completions.create(**ASKED, stream=True))
        task = await line.task()
        await line.say(frames.Head(stream=task.stream, status=200, headers=SSE))
        stream = await soon(asked)
        texts: list[str] = []
        reading = asyncio.create_task(_read_into(stream, texts))
        # It would have given up by then.
        done, _ = await asyncio.wait({reading}, timeout=3.5)
        assert not done
        for piece in (ROLE, delta("a"), delta(finish="stop"), END):
            await line.data(task.stream, piece)
        await line.say(frames.End(stream=task.stream, usage={}))
        await soon(reading)
        assert "".join(texts) == "a"
        assert len(list(pool.pool.dispatcher.all())) == 1
