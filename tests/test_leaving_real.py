"""Clients that leave while a real llama.cpp computes for them, or before it does: a real agent is in between."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import pytest_asyncio

from tests import tiny_model
from tests.agent_cable import Cable
from tests.coordinator_fixtures import Running, soon, until
from tests.llama_pool import ENDLESS, FREE_WITHIN_S, TRIES, check_freed, llama_pool, until_seen
from tests.model_servers import ModelServer, serving
from tests.needs import need
from tests.openai_kit import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from rma_coordinator.domain.tasks import Task

# One model server, one agent and one coordinator for all of them.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

shared = pytest_asyncio.fixture(scope="module", loop_scope="module")


class Tap(Cable):
    """Stands between an agent and its model server, and counts the requests that pass."""

    asked = 0

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                # Answers have no such line in them, and a head comes in one piece.
                self.asked += data.count(b"POST /v1/")
                writer.write(data)
                await writer.drain()
        writer.close()


class Scene(NamedTuple):
    """A pool of one agent, whose model server has one slot."""

    pool: Running
    server: ModelServer
    tap: Tap

    def ask(self, *, streamed: bool, tokens: int = ENDLESS) -> asyncio.Task[Any]:
        return ask(self.pool, stream=streamed, max_tokens=tokens)

    def tasks(self) -> list[Task]:
        return list(self.pool.pool.dispatcher.tasks.values())

    async def at_rest(self) -> None:
        """Wait until nothing is left of any request."""
        await until(lambda: not self.tasks())
        await until_seen(lambda: not self.server.busy())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    need("llama")
    folder = tmp_path_factory.mktemp("llama")
    # So long a context that the answers asked for would take minutes, however quick the machine.
    file = tiny_model.write_chat_model(folder / "long.gguf", context=2 * ENDLESS)
    with serving(folder, file=file, env={"SLOTS": "1", "CONTEXT": str(2 * ENDLESS)}) as [found]:
        yield found


@shared
async def scene(server: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    tap = Tap(server.endpoint)
    async with await asyncio.start_server(tap.serve, "127.0.0.1", 0) as listening:
        seen = server._replace(endpoint=f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        async with llama_pool(tmp_path_factory.mktemp("pool"), [[seen]]) as pool:
            yield Scene(pool, server, tap)
        tap.unplug()


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_slot_of_a_client_that_leaves_is_free_within_a_second(scene: Scene, streamed: bool) -> None:
    async def begin() -> Any:
        asked = scene.ask(streamed=streamed)
        (task,) = await until(scene.tasks)
        # A whole answer is nowhere in sight; of a stream the client has had something.
        await until(lambda: task.committed if streamed else task.state == "running")

        async def leave() -> None:
            asked.cancel()

        return leave

    took = await check_freed(scene.server, begin)
    print(f"the slot was free after {took * 1000:.0f} ms")  # noqa: T201 - the figure, for who wants it (-s)
    await scene.at_rest()
    # And it is good for the next.
    assert (await soon(scene.ask(streamed=streamed, tokens=3))).status_code == 200
    await scene.at_rest()


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_leaves_while_it_waits_costs_the_model_server_nothing(scene: Scene, streamed: bool) -> None:
    before = scene.tap.asked
    running = scene.ask(streamed=True)
    (first,) = await until(scene.tasks)
    await until(lambda: first.committed)
    took: list[float] = []
    while len(took) < TRIES and not any(seconds <= FREE_WITHIN_S for seconds in took):
        waiting = scene.ask(streamed=streamed)
        (queued,) = await until(lambda: [task for task in scene.tasks() if task is not first])
        left_at = time.monotonic()
        waiting.cancel()
        await until(lambda queued=queued: queued.state == "cancelled")  # type: ignore[misc]  # bound now
        took.append(time.monotonic() - left_at)
        assert not queued.attempts
    print(f"the request was gone after {min(took) * 1000:.0f} ms")  # noqa: T201 - the figure, for who wants it (-s)
    assert min(took) <= FREE_WITHIN_S, took
    assert first.state == "running", "it has the only slot, and keeps it"
    # Who comes after them is next: nothing of those that left stands in the way.
    after = scene.ask(streamed=streamed, tokens=3)
    await until(lambda: len(scene.tasks()) == 2)
    running.cancel()
    assert (await soon(after)).status_code == 200
    await scene.at_rest()
    assert scene.tap.asked - before == 2, "the one that ran and the one that came after"
