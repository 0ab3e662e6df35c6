"""Workers of speeds 1 : 4 : 16 in a real pool: a coordinator and agents as processes, chats of several turns over /v1.

What is looked at is counted by the model servers: whose turns they were given, what of each they knew already, and
tokens that they made in a span of time, beside those they make when each of them has a queue of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from rma_core.http import open_client
from tests.coordinator_process import coordinating
from tests.crash_kit import until
from tests.paced_engine import Turn, paced_engine
from tests.pools import NO_ENGINE, Running, environment, left_over, rma

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from rma_core.http import AsyncClient
    from tests.coordinator_process import Coordinator
    from tests.paced_engine import PacedEngine

#: Tokens a second of answers; reading is ten times as fast.
SPEEDS = {"slow": 10.0, "middle": 40.0, "fast": 160.0}
SLOTS = 4
#: Words of a question, and questions of a chat.
QUESTION, TURNS = 20, 8
#: What of a turn is new: the question, what says whose it is, and what says whose the answer will be.
NEW = QUESTION + 2
#: Tokens of an answer: long ones where rates are compared, so that what a busy machine adds to each matters little.
LONG, SHORT = 64, 16
#: Chats at one time: with each worker alone; with all of them, where two of three have to wait; and where each thinks
#: for a second or so before it asks, which is four fifths of what the workers can do.
ALONE, TOGETHER, THINKING = 2 * SLOTS, 36, 24
THINKS_S = 1.0
#: Seconds in which tokens are counted.
SPAN_ALONE_S, SPAN_S, SPAN_THINKING_S = 6.0, 9.0, 60.0
KEYS = 3
#: Of the sum, of all turns but the first, and of what is fair; a newcomer's first second.
LEAST_OF_SUM, LEAST_STAYED, MOST_OF_FAIR, NEWCOMER_S = 0.9, 0.8, 1.25, 1.0
PATIENCE_S = 60.0
MACHINE = Path(__file__).parent / "data" / "machines" / "laptop-2-cores-4gb.json"


class Seen(NamedTuple):
    """What the model servers did in a span of time: tokens of answers a second, and turns, of each."""

    rates: Mapping[str, float]
    turns: Mapping[str, Sequence[Turn]]

    @property
    def rate(self) -> float:
        return sum(self.rates.values())

    def of_fair(self, alone: Seen) -> dict[str, float]:
        """Return what each has of all the load, beside what it has of all that they can do."""
        return {name: rate / self.rate * alone.rate / alone.rates[name] for name, rate in self.rates.items()}

    def stayed(self) -> float:
        """Return the part of turns, but for each chat's first, of which the model server knew all that was before."""
        later = [one for turns in self.turns.values() for one in turns if one.prompt > NEW]
        return sum(one.knew_all_but(NEW) for one in later) / len(later)


class Pool:
    """A pool with paced engines, one behind each agent, and keys that ask."""

    def __init__(self, folder: Path, coordinator: Coordinator, admin: AsyncClient) -> None:
        self.folder, self.coordinator, self.admin = folder, coordinator, admin
        self.engines: dict[str, PacedEngine] = {}
        self.agents: dict[str, Running] = {}
        self.token = ""
        self.clients: list[AsyncClient] = []
        self.chance, self.numbers = random.Random(5), itertools.count()

    def join(self, name: str, engine: PacedEngine) -> None:
        """Start the agent of a machine that shares an engine."""
        self.engines[name] = engine
        told = {
            "RMA_COORDINATOR_URL": self.coordinator.url, "RMA_JOIN_TOKEN": self.token, "RMA_ATTACH": engine.url,
            "RMA_RUNTIMES": "process", "RMA_SERVICES": "llm", "RMA_FAKE_DEVICES": str(MACHINE), "RMA_DRAIN_S": "1",
            "RMA_FIND_MODEL_SERVERS": "0",
        }  # fmt: skip
        self.agents[name] = Running(rma("agent"), environment(self.folder / name, {**NO_ENGINE, **told}))

    def stop(self) -> None:
        """Stop all agents, and see that nothing of them is left."""
        for name, agent in self.agents.items():
            agent.stop()
            assert left_over(self.folder / name) == []

    async def offered(self, model: str, workers: int) -> float:
        """Wait until so many workers offer a model; return when that was seen, on the loop's clock."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                listed = (await self.admin.get("/v1/models")).json()["data"]
                if sum(int(one["x_rma"]["workers"]) for one in listed if one["id"] == model) == workers:
                    return asyncio.get_running_loop().time()
                await asyncio.sleep(0.02)

    async def chat(self, model: str, key: int, tokens: int, thinks_s: float) -> None:
        """Hold one chat after the other, until cancelled."""
        while True:
            name, messages = f"chat-{next(self.numbers)}", list[dict[str, str]]()
            for turn in range(TURNS):
                words = [f"{name}:", *(f"{turn}.{number}" for number in range(QUESTION - 2))]
                messages.append({"role": "user", "content": " ".join(words)})
                await asyncio.sleep(thinks_s * self.chance.uniform(0.5, 1.5))
                messages.append({"role": "assistant", "content": await self.ask(model, key, tokens, messages)})

    async def ask(self, model: str, key: int, tokens: int, messages: Sequence[dict[str, str]]) -> str:
        """Return the answer."""
        body = {"model": model, "messages": messages, "max_tokens": tokens}
        response = await self.clients[key].post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    @contextlib.asynccontextmanager
    async def chats(self, models: Mapping[str, int], *, tokens: int, thinks_s: float = 0.0) -> AsyncIterator[None]:
        """So many chats go on with each model meanwhile."""
        begun = [
            asyncio.create_task(self.chat(model, number % KEYS, tokens, thinks_s))
            for model, count in models.items()
            for number in range(count)
        ]
        try:
            if not thinks_s:
                await until(lambda: all(one.busy == SLOTS for one in self.engines.values()), what="all slots are busy")
            yield
        finally:
            for one in begun:
                one.cancel()
            ends = await asyncio.gather(*begun, return_exceptions=True)
        assert [end for end in ends if not isinstance(end, asyncio.CancelledError)] == []
        await until(lambda: not any(one.busy for one in self.engines.values()), what="the model servers are idle")

    async def seen(self, seconds: float) -> Seen:
        """Return what happens within so many seconds."""
        loop = asyncio.get_running_loop()
        before, began = {name: (one.made, len(one.turns)) for name, one in self.engines.items()}, loop.time()
        await asyncio.sleep(seconds)
        took = loop.time() - began
        return Seen(
            {name: (one.made - before[name][0]) / took for name, one in self.engines.items()},
            {name: one.turns[before[name][1] :] for name, one in self.engines.items()},
        )


@contextlib.asynccontextmanager
async def pool_of(folder: Path, *names: str) -> AsyncIterator[Pool]:
    """A pool whose workers have the speeds of SPEEDS, and two models each: one that all have, one of its own."""
    async with contextlib.AsyncExitStack() as stack:
        coordinator, admin = await stack.enter_async_context(coordinating(folder / "coordinator"))
        pool = Pool(folder, coordinator, admin)
        pool.token = (await admin.post("/api/admin/tokens", json={"uses": 10})).json()["token"]
        for _ in range(KEYS):
            key = (await admin.post("/api/admin/keys", json={"kind": "client"})).json()["key"]
            client = open_client(coordinator.url, token=key, timeout_s=PATIENCE_S)
            pool.clients.append(await stack.enter_async_context(client))
        stack.callback(pool.stop)
        for name in names:
            pool.join(name, await stack.enter_async_context(engine_of(name)))
        await pool.offered("all", len(names))
        yield pool


def engine_of(name: str) -> contextlib.AbstractAsyncContextManager[PacedEngine]:
    speed = SPEEDS[name.partition("-")[0]]
    return paced_engine("all", name, speed=speed, reading=10 * speed, slots=SLOTS)


async def alone(pool: Pool) -> Seen:
    """Return what each worker does with a queue of its own."""
    async with pool.chats(dict.fromkeys(SPEEDS, ALONE), tokens=LONG):
        return await pool.seen(SPAN_ALONE_S)


def holds(seen: Seen, of: Seen) -> None:
    """See that chats stay with their caches, and that no worker has much more than its part of the load for it."""
    print(round(seen.rate / of.rate, 3), round(seen.stayed(), 3), seen.of_fair(of))  # noqa: T201 - how well it holds
    assert seen.stayed() >= LEAST_STAYED
    assert max(seen.of_fair(of).values()) <= MOST_OF_FAIR, seen.of_fair(of)


@pytest.mark.timeout(300)
async def test_unequal_workers_give_all_they_have_and_chats_stay_with_their_caches(tmp_path: Path) -> None:
    async with pool_of(tmp_path, *SPEEDS) as pool:
        each = await alone(pool)
        async with pool.chats({"all": TOGETHER}, tokens=LONG):
            together = await pool.seen(SPAN_S)
        print(round(together.rate / each.rate, 3), together.rates)  # noqa: T201 - how well it holds
        assert together.rate >= LEAST_OF_SUM * each.rate, (together.rates, each.rates)
        async with pool.chats({"all": TOGETHER}, tokens=SHORT):
            holds(await pool.seen(SPAN_S), each)
        assert {name: one.most for name, one in pool.engines.items()} == dict.fromkeys(SPEEDS, SLOTS)


@pytest.mark.soak
async def test_chats_that_think_stay_with_their_caches_too(tmp_path: Path) -> None:
    async with pool_of(tmp_path, *SPEEDS) as pool:
        each = await alone(pool)
        async with pool.chats({"all": THINKING}, tokens=SHORT, thinks_s=THINKS_S):
            holds(await pool.seen(SPAN_THINKING_S), each)


async def test_a_worker_that_joins_in_the_middle_of_a_burst_takes_work_within_a_second(tmp_path: Path) -> None:
    async with pool_of(tmp_path, "slow", "middle") as pool, engine_of("fast-late") as late:
        async with pool.chats({"all": TOGETHER}, tokens=SHORT):
            pool.join("late", late)
            offered_at = await pool.offered("all", 3)
            await until(lambda: late.busy == SLOTS, what="the newcomer has all that it may have")
            assert late.begun_at is not None
            assert late.begun_at - offered_at < NEWCOMER_S
        assert late.turns[0].chat.startswith("chat-")
        assert late.most == SLOTS
