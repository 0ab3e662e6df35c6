"""A pool of two workers, real agents with real llama.cpp servers, and what clients of every kind ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from rma_core.agent.lifecycle import Agent
from rma_core.agent.start import EVERYTHING, opened
from rma_core.settings import AgentSettings
from tests import tiny_model
from tests.coordinator_fixtures import Running, running, soon, until
from tests.model_servers import SOLID, ModelServer, serving
from tests.test_agent_lifecycle import detect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

HELLO = [{"role": "user", "content": SOLID[0]}]
#: Tokens that take the tiny model much longer than any test waits.
ENDLESS = 60_000
#: Seconds in which a model server's slot must be free once its client has left.
FREE_WITHIN_S = 1.0
#: How often that is looked at before it counts as broken: other work on this machine may take a second by itself.
TRIES = 3

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
#: A chat that makes the model call the tool, once.
CALLING: dict[str, Any] = {
    "model": "tools", "messages": HELLO, "max_tokens": 200, "temperature": 0, "tools": [TOOL],
    "tool_choice": "required", "parallel_tool_calls": False, "logit_bias": tiny_model.CALLS,
}  # fmt: skip
#: A chat whose answer must have a form.
FORMED: dict[str, Any] = {
    "model": "tiny", "messages": HELLO, "max_tokens": 200, "temperature": 0,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "a", "strict": True, "schema": TOOL["function"]["parameters"]},
    },
}  # fmt: skip
CHAT: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0}


def check_form(text: str) -> None:
    """Assert that a text is JSON of the prescribed form."""
    found = json.loads(text)
    assert set(found) == {"a", "b"}
    assert found["a"] in ("x", "y")
    assert isinstance(found["b"], bool)


class Servers(NamedTuple):
    """The model servers of two machines: each has the chat model, one the model with tools, the other embeddings."""

    tiny: list[ModelServer]
    tools: ModelServer
    vectors: ModelServer

    def machines(self) -> list[list[ModelServer]]:
        """Return what each machine's owner shares."""
        return [[self.tiny[0], self.tools], [self.tiny[1], self.vectors]]

    def busy(self) -> int:
        """Return how many slots of the chat model are at work."""
        return sum(server.busy() for server in self.tiny)


@contextlib.contextmanager
def all_servers(folder: Path) -> Iterator[Servers]:
    """Run every model server until this ends."""
    folder.mkdir(exist_ok=True)
    tools = tiny_model.write_chat_model(folder / "tools.gguf", tools=True)
    vectors = tiny_model.write_embedding_model(folder / "vectors.gguf")
    env = {"EMBEDDINGS": "1", "CONTEXT": "512"}
    with (
        serving(folder / "tiny", count=2) as chats,
        serving(folder / "tools", file=tools, model="tools") as [calls],
        serving(folder / "vectors", file=vectors, model="vectors", env=env) as [embeds],
    ):
        yield Servers(chats, calls, embeds)


@contextlib.asynccontextmanager
async def agent_of(pool: Running, home: Path, servers: Sequence[ModelServer]) -> AsyncIterator[Agent]:
    """A machine that has joined, and whose owner shares model servers."""
    settings = AgentSettings(
        home=str(home), coordinator_url=pool.url, join_token=await pool.join_token(), runtimes=[], drain_s=1,
        attach=[server.endpoint for server in servers],
    )  # fmt: skip
    async with opened(settings, detect, consent=EVERYTHING) as (folder, record, key, report):
        agent = Agent(settings, folder, record, key, report=report, runtimes={})
        serving = asyncio.create_task(agent.run())
        try:
            yield agent
        finally:
            agent.stop()
            agent.stop()
            await soon(serving)


@contextlib.asynccontextmanager
async def llama_pool(folder: Path, machines: Sequence[Sequence[ModelServer]]) -> AsyncIterator[Running]:
    """A pool whose workers offer all that their owners share."""
    wanted: dict[str, int] = {}
    for server in (server for machine in machines for server in machine):
        wanted[server.model] = wanted.get(server.model, 0) + 1
    async with running(folder / "pool") as pool, contextlib.AsyncExitStack() as joined:
        for number, servers in enumerate(machines):
            await joined.enter_async_context(agent_of(pool, folder / f"agent-{number}", servers))
        await until(lambda: {name: view.workers for name, view in pool.pool.models().items()} == wanted)
        yield pool


async def check_freed(
    servers: Servers | ModelServer, begin: Callable[[], Awaitable[Callable[[], Awaitable[object]]]]
) -> float:
    """Assert that a model server's slot is free within a second of its client's leaving; return how long it took.

    ``begin`` sends a request that would take much longer and returns what leaves it.
    """
    took: list[float] = []
    while len(took) < TRIES and not any(seconds <= FREE_WITHIN_S for seconds in took):
        leave = await begin()
        await until_seen(lambda: servers.busy() == 1)
        left_at = time.monotonic()
        await leave()
        await until_seen(lambda: servers.busy() == 0)
        took.append(time.monotonic() - left_at)
    assert min(took) <= FREE_WITHIN_S, took
    return min(took)


async def until_seen(what: Callable[[], bool]) -> None:
    """Wait until something holds that takes a thread to look at."""
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(what):  # noqa: ASYNC110 - what is waited for is another process's
            await asyncio.sleep(0.02)
