"""OpenAI's own SDK, unmodified, against a pool whose volunteers share an Ollama: answers, tools, and losses."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import openai
import pytest

from rma_core.agent.lifecycle import Agent
from rma_core.agent.start import EVERYTHING, opened
from rma_core.settings import AgentSettings
from tests.coordinator_fixtures import PATIENCE_S, Running, running, soon, until
from tests.model_servers import SOLID, serving
from tests.ollama_stand_in import MODEL, Exchange, Fronting, OllamaStandIn, lines, ollama, refusing, said
from tests.test_agent_lifecycle import detect
from tests.test_ollama_answer import WITH_TOOL
from tests.test_openai_sdk import client_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionMessageParam

    from tests.model_servers import ModelServer

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": SOLID[0]}]
TOKENS = 40
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    with serving(tmp_path_factory.mktemp("llama")) as [server]:
        yield server


@contextlib.asynccontextmanager
async def machine(pool: Running, home: Path, server: OllamaStandIn) -> AsyncIterator[Agent]:
    """A volunteer whose owner shares an Ollama."""
    settings = AgentSettings(
        home=str(home), coordinator_url=pool.url, join_token=await pool.join_token(), runtimes=[], drain_s=1,
        attach=[server.url],
    )  # fmt: skip
    async with opened(settings, detect, consent=EVERYTHING) as (folder, record, key, report):
        agent = Agent(settings, folder, record, key, report=report, runtimes={})
        working = asyncio.create_task(agent.run())
        try:
            yield agent
        finally:
            agent.stop()
            agent.stop()
            await soon(working)


@contextlib.asynccontextmanager
async def pool_of(tmp_path: Path, *servers: OllamaStandIn) -> AsyncIterator[AsyncOpenAI]:
    """A pool of volunteers, one for each Ollama, and a client of it."""
    async with running(tmp_path / "pool") as pool, client_of(pool) as client, contextlib.AsyncExitStack() as machines:
        for number, server in enumerate(servers):
            await machines.enter_async_context(machine(pool, tmp_path / f"agent-{number}", server))
        await until(lambda: pool.pool.models().get(MODEL) and pool.pool.models()[MODEL].workers == len(servers))
        async with asyncio.timeout(4 * PATIENCE_S):
            yield client


async def streamed(client: AsyncOpenAI) -> tuple[str, list[Any]]:
    """Return the text of a streamed answer, and its events."""
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, temperature=0, max_tokens=TOKENS,
        stream_options={"include_usage": True},
    )  # fmt: skip
    events = [event async for event in stream]
    return "".join(choice.delta.content or "" for event in events for choice in event.choices), events


async def test_an_answer_comes_whole_and_streamed_with_usage_and_one_id(llama: ModelServer, tmp_path: Path) -> None:
    expected = await asyncio.to_thread(llama.text, SOLID[0], max_tokens=TOKENS)
    async with ollama(Fronting(llama)) as server, pool_of(tmp_path, server) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=TOKENS)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "length")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == TOKENS
        text, events = await streamed(client)
        assert (text, len({event.id for event in events})) == (expected, 1)
        assert [choice.delta.role for event in events for choice in event.choices if choice.delta.role] == ["assistant"]
        assert (events[-1].choices, events[-1].usage.completion_tokens) == ([], TOKENS)
        completion = await client.completions.create(model=MODEL, prompt="Hello", temperature=0, max_tokens=9)
        assert len(completion.choices[0].text) == 9


async def test_an_answer_that_one_ollama_breaks_off_is_ended_by_another_as_if_nothing_had_happened(
    llama: ModelServer, tmp_path: Path
) -> None:
    expected = await asyncio.to_thread(llama.text, SOLID[0], max_tokens=TOKENS)

    async def once(server: OllamaStandIn, exchange: Exchange) -> None:
        """Whichever is asked first fails in the middle."""
        begun = bool(one.bodies("/api/chat")) + bool(two.bodies("/api/chat"))
        await Fronting(llama, fails_behind=17 if begun == 1 else None)(server, exchange)

    async with ollama(once) as one, ollama(once) as two, pool_of(tmp_path, one, two) as client:
        text, events = await streamed(client)
        assert (text, len({event.id for event in events})) == (expected, 1)
        assert events[-1].usage.completion_tokens == TOKENS
        # The second one was tried, and then given the text so far, and no more to say than was left.
        [last] = [server for server in (one, two) if len(server.bodies("/api/chat")) == 2]
        probe, continued = last.bodies("/api/chat")
        assert probe["messages"][-1]["content"] == "1, 2, 3,"
        begun = continued["messages"][-1]
        assert (begun["role"], expected.startswith(begun["content"])) == ("assistant", True)
        assert len(begun["content"]) + continued["options"]["num_predict"] == TOKENS


async def test_where_no_other_goes_on_the_client_is_told_and_nothing_looks_like_an_end(
    llama: ModelServer, tmp_path: Path
) -> None:
    async with (
        ollama(Fronting(llama, fails_behind=17), goes_on=False) as one,
        ollama(Fronting(llama, fails_behind=17), goes_on=False) as two,
        pool_of(tmp_path, one, two) as client,
    ):
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, max_tokens=TOKENS)
        finished: list[object] = []
        with pytest.raises(openai.APIError, match="does not go on from the beginning of an answer"):
            finished += [choice.finish_reason async for event in stream for choice in event.choices]
        assert not any(finished)


async def test_a_failure_before_anything_was_said_is_nobodys_to_see(llama: ModelServer, tmp_path: Path) -> None:
    expected = await asyncio.to_thread(llama.text, SOLID[0], max_tokens=TOKENS)
    busy = refusing(503, "server busy, please try again.  maximum pending requests exceeded")
    async with ollama(busy) as one, ollama(Fronting(llama)) as two, pool_of(tmp_path, one, two) as client:
        for _ in range(3):
            assert (await streamed(client))[0] == expected


async def test_tools_are_called_as_the_sdk_expects_it(tmp_path: Path) -> None:
    async with ollama(lines(*WITH_TOOL)) as server, pool_of(tmp_path, server) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS)
        [choice] = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        [call] = choice.message.tool_calls
        assert call.type == "function"
        assert (call.function.name, call.function.arguments) == ("get_weather", '{"city":"Tokyo"}')
        async with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=TOOLS) as stream:
            whole = await stream.get_final_completion()
        [again] = whole.choices[0].message.tool_calls or []
        assert (again.function.name, again.function.arguments) == ("get_weather", '{"city":"Tokyo"}')
        assert server.bodies("/api/chat")[0]["tools"] == TOOLS


async def test_errors_have_the_class_that_the_sdk_has_for_them(tmp_path: Path) -> None:
    async with (
        ollama(refusing(400, f'"{MODEL}" does not support tools')) as server,
        pool_of(tmp_path, server) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="does not support tools"):
            await client.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS)
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=MODEL, messages=HELLO, logit_bias={"5": 1})
        assert (caught.value.param, caught.value.code) == ("logit_bias", "unsupported_parameter")
        server.behaviour = refusing(500, "llama runner process has terminated: signal: killed")
        with pytest.raises(openai.InternalServerError, match="signal: killed"):
            await client.chat.completions.create(model=MODEL, messages=HELLO)


async def test_embeddings_come_as_the_sdk_asks_for_them(tmp_path: Path) -> None:
    async def embed(_: OllamaStandIn, exchange: Exchange) -> None:
        await exchange.whole(200, {"model": MODEL, "embeddings": [[0.5, -1.25]] * 2, "prompt_eval_count": 4})

    async with ollama(embed) as server, pool_of(tmp_path, server) as client:
        found = await client.embeddings.create(model=MODEL, input=["a", "b"])
        assert [one.embedding for one in found.data] == [[0.5, -1.25]] * 2
        assert found.usage.total_tokens == 4
        assert server.bodies("/api/embed")[0]["input"] == ["a", "b"]


async def test_thoughts_are_kept_apart_from_what_is_said(tmp_path: Path) -> None:
    thought = {"message": {"role": "assistant", "content": "", "thinking": "hm"}, "done": False}
    last = said("/api/chat", "", done=True, done_reason="stop")
    async with ollama(lines(thought, said("/api/chat", "Yes"), last)) as server, pool_of(tmp_path, server) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO)
        message = answer.choices[0].message
        assert (message.content, message.model_extra) == ("Yes", {"reasoning_content": "hm"})
